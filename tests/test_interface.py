"""The interface as people use it: the real command in a process of its own, through its API and in Chromium."""

import asyncio
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import skimage.data
import torch
from gradio_client import Client, handle_file
from PIL import Image, ImageFilter

import inference
import model
from data_loader import Face, find_images, read_image
from inference import CHECKPOINT
from loss import METHODS, append_rating, read_ratings, study_order
from model import Generator, locked, save_checkpoint
from model import upscale as upscale_picture

ROOT = Path(inference.__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Without the last ones, Chromium asks its maker's hosts for this and that.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the process below: the number of threads decides how sums are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def app(tmp_path_factory, faces):
    """`inference.py --ui --study` with two pairs of tiny networks: its address, folders and a stop()."""
    folder = tmp_path_factory.mktemp("app")
    for seed, name in enumerate(("srresnet_x4.pth", "srgan_x4.pth", "srresnet_x8.pth", "srgan_x8.pth")):
        torch.manual_seed(seed)
        generator = Generator(int(name[-5]), blocks=1, channels=8)
        generator.tail.weight.data.mul_(20)
        save_checkpoint(folder / name, generator, {})
    (folder / "tmp").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--checkpoint", folder / "srgan_x4.pth", "--device", "cpu", "--output", folder / "results"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "inference.py", "--ui", "--port", str(port), "--study", faces, *flags],
        env=os.environ | {"BROWSER": "true", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")},
        stdout=subprocess.PIPE,
        text=True,
    )

    def stop():
        process.send_signal(signal.SIGTERM)
        process.wait(20)

    try:
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}/" in line
        yield SimpleNamespace(
            url=f"http://127.0.0.1:{port}/", port=port, folder=folder, flags=list(map(str, flags)), stop=stop
        )
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def client(app):
    return Client(app.url, verbose=False, analytics_enabled=False)


def save(path, size=(12, 10), mode="RGB", seed=0):
    """Write a picture of noise."""
    shape = (size[1], size[0], len(mode))
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode).save(path)
    return path


def command(app, output, *arguments):
    """What `inference.py` writes for one file: (H, W, channels)."""
    assert inference.run([*app.flags, *map(str, arguments), "--output", str(output)]) == 0
    return np.array(Image.open(output / f"{Path(arguments[0]).stem}.png"))


def upscale(client, path, strength=1.0, shrink=False, added=False, whole=False, scale=4, only=False):
    """Call the Upscale tab: a namespace of pictures (None where there is none) and the line of text."""
    path = path and handle_file(path)
    settings = strength, shrink, added, whole, scale, only
    *outputs, eightfold, own, line = client.predict(path, *settings, api_name="/upscale")
    gallery = outputs.pop(4).get("value") or []
    faces = [(np.array(Image.open(face["image"])), face["caption"]) for face in gallery]
    files = [part["value"] if isinstance(part, dict) and "value" in part else part for part in outputs]
    pair, *files = [None if isinstance(part, dict) else part for part in files]
    pictures = [path and np.array(Image.open(path)) for path in (*(pair or (None, None)), *files)]
    names = ("bicubic", "ours", "lr", "truth", "invented", "download")
    return SimpleNamespace(line=line, faces=faces, eightfold=eightfold.get("interactive"), **dict(zip(names, pictures)))


def test_the_download_is_what_the_command_writes(app, client, tmp_path):
    plain, glass = save(tmp_path / "a b.png"), save(tmp_path / "glass.png", mode="RGBA")
    for path, strength in ((plain, 1), (plain, 0.35), (plain, 0), (glass, 0.5)):
        result = upscale(client, path, strength)
        expected = command(app, tmp_path / "out", path, "--strength", strength)
        assert np.array_equal(result.download, expected) and np.array_equal(result.ours, expected)
        assert result.truth is None and result.invented is None
    assert result.bicubic.shape == (40, 48, 4) and result.eightfold
    assert result.lr is None        # it is on the page already
    result = upscale(client, plain)
    line = (r"12 x 10 → 48 x 40 pixels; mostly invented: another person may come out; for a face of this size, "
            r"try 8x \(under More\)")
    assert re.fullmatch(line, result.line) and "try" not in upscale(client, save(tmp_path / "b.png", (26, 26))).line


def test_eight_times(app, client, faces, tmp_path):
    """The same as the command with the other pair: plain, shrunk first, with what was invented; and the example."""
    eight, out, path = ("--checkpoint", app.folder / "srgan_x8.pth"), tmp_path / "out", save(tmp_path / "a.png")
    for strength in (1, 0.35):
        result = upscale(client, path, strength, scale=8)
        assert np.array_equal(result.download, command(app, out, path, "--strength", strength, *eight))
    assert "12 x 10 → 96 x 80 pixels" in result.line and "try" not in result.line
    assert "for a face of this size, try 4x" in upscale(client, save(tmp_path / "b.png", (26, 26)), scale=8).line
    face = find_images(faces)[0]
    result = upscale(client, face, shrink=True, added=True, scale=8)
    assert result.lr.shape == (16, 16, 3) and result.truth.shape == (128, 128, 3)
    assert np.array_equal(result.download, command(app, out, face, "--simulate", *eight))
    faithful = command(app, out, face, "--simulate", *eight, "--strength", 0)
    difference = np.clip((result.ours.astype(int) - faithful) * 3 + 128, 0, 255)
    assert np.abs(difference - result.invented).max() <= 1 and difference.std() > 5
    example = upscale(client, None, scale=8)
    assert "from 16 x 16 pixels" in example.line and example.ours.shape == (128, 128, 3)
    large = upscale(client, save(tmp_path / "large.png", (501, 500)), whole=True, scale=8)
    assert "the limit is 250,000" in large.line and large.ours is None


def test_shrink_first_shows_the_truth_and_scores(app, client, faces, tmp_path):
    path = save(tmp_path / "sharp.png", (162, 160))
    result = upscale(client, path, shrink=True, added=True)
    assert np.array_equal(result.download, command(app, tmp_path / "out", path, "--simulate"))
    assert np.array_equal(result.truth, read_image(path)[0][:, :160]) and result.lr.shape == (40, 40, 3)
    row = (tmp_path / "out" / "metrics.csv").read_text().splitlines()[1].split(",")
    assert f"PSNR {float(row[1]):.2f} dB" in result.line and f"SSIM {float(row[2]):.3f}" in result.line
    faithful = command(app, tmp_path / "out", path, "--simulate", "--strength", 0)
    difference = np.clip((result.ours.astype(int) - faithful) * 3 + 128, 0, 255)
    assert np.abs(difference - result.invented).max() <= 1 and difference.std() > 5
    assert upscale(client, find_images(faces)[0], shrink=True).lr.shape == (32, 32, 3)


def test_a_photograph_is_searched_for_faces(app, client, tmp_path):
    """The result is the command's; the faces are shown in pairs; as one face it goes through the network whole."""
    face = skimage.data.astronaut()
    small = Image.fromarray(face[:, 60:420]).resize((72, 102), Image.Resampling.LANCZOS)
    path = tmp_path / "astronaut.png"
    small.save(path)
    result = upscale(client, path)
    assert "1 face, 1 restored" in result.line and not result.eightfold
    assert np.array_equal(result.download, command(app, tmp_path / "out", path, "--photo", "--strength", 1))
    assert [caption.split(":")[0] for _, caption in result.faces] == ["the photograph", "1"]
    assert result.faces[1][0].shape == (256, 512, 3) and "restored" in result.faces[1][1]
    faces_only = upscale(client, path, only=True)
    assert np.array_equal(faces_only.download, command(app, tmp_path / "out", path, "--photo", "--strength", 1, "--background", "bicubic"))
    assert (faces_only.download != result.download).any()
    Image.fromarray(np.hstack([small, small])).save(tmp_path / "two.png")
    result = upscale(client, tmp_path / "two.png")
    [(overview, title), *faces] = result.faces
    drawn = (overview != np.hstack([small, small])).any(2)      # frames and numbers, around both
    assert title == "the photograph" and len(faces) == 2 and drawn.mean() < 0.5
    assert drawn[:, :72].any() and drawn[:, 72:].any()
    one = upscale(client, path, whole=True)
    assert np.array_equal(one.download, command(app, tmp_path / "out", path)) and one.faces == []
    large = Image.fromarray(np.hstack([face[:256, 60:316]] * 4)).resize((2100, 525))
    large.save(tmp_path / "large.jpg")
    result = upscale(client, tmp_path / "large.jpg")
    assert "sharp already" in result.line and result.download.shape == (1050, 4200, 3)
    assert result.ours.shape == (512, 2048, 3)          # no more than a screen


def test_what_was_invented_of_a_face_with_a_strength_of_its_own(app, tmp_path):
    """It is the difference to strength 0, not to its own."""
    workshop = inference.Workshop(inference.parse_arguments(app.flags), tmp_path)
    path = tmp_path / "astronaut.png"
    Image.fromarray(skimage.data.astronaut()[:, 60:420]).resize((72, 102), Image.Resampling.LANCZOS).save(path)

    def enlarge(*marked):
        return workshop.enlarge(None, path, 0.5, False, True, False, 4, marked)

    [face] = enlarge().found[str(path)]
    middle = np.s_[round(4 * face.y) - 20:round(4 * face.y) + 20, round(4 * face.x) - 20:round(4 * face.x) + 20]
    spread = [np.abs(enlarge((face, strength)).invented[middle].astype(int) - 128).mean() for strength in (0, 1)]
    assert spread[0] == 0 and spread[1] > 1
    assert enlarge().strengths == [None, 0.5] and enlarge((face, "left")).strengths == [None, False]
    assert enlarge((face, 1)).strengths == [None, 1] and workshop.known.cache_info().misses == 1  # for both networks
    small = replace(face, size=8)
    assert enlarge((small, "restored")).strengths == [None, None]       # no wish makes a face of it


def test_pictures_that_cannot_be_used_get_a_sentence(client, app, tmp_path):
    good = save(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.jpg").write_bytes(save(tmp_path / "whole.png", (60, 60)).read_bytes()[:900])
    save(tmp_path / "large.png", (1001, 1000))
    for name, reason in {
        "empty.png": "not a picture",
        "text.png": "not a picture",
        "cut.jpg": "cannot be read",
        "large.png": "the limit is 1,000,000",
    }.items():
        result = upscale(client, tmp_path / name, whole=True)
        assert name in result.line and reason in result.line and "/" not in result.line, name
        assert result.ours is result.lr is result.download is None
    assert "only 32 x 32" in upscale(client, save(tmp_path / "face.png", (32, 32)), shrink=True).line
    example = upscale(client, None)
    assert "An example" in example.line and example.ours.shape == (128, 128, 3)
    for strength in (7, -1):
        assert "from 0 to 1" in upscale(client, good, strength).line
    assert upscale(client, good).ours is not None


def test_files_of_the_machine_are_out_of_reach(app, client):
    """A request may name what was uploaded, nothing else."""
    path = str(next(iter(find_images(ROOT / "checkpoints"))))
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, 1.0, False, False, False, 4]
    event = httpx.post(f"{app.url}gradio_api/call/upscale", json={"data": data}).json()["event_id"]
    answer = httpx.get(f"{app.url}gradio_api/call/upscale/{event}", timeout=20).text
    assert "event: error" in answer and "pixels" not in answer
    assert httpx.get(f"{app.url}gradio_api/file={path}").status_code == 403
    # Without "meta", Gradio does not look where the file lies.
    secret = save(app.folder / "secret.png")
    for path in (str(secret), "/dev/ptmx", "/etc/shadow", str(app.folder / "absent.png")):
        for name, data in {"upscale": [{"path": path}, 1.0, False, False, True, 4],
                           "folder": [[{"path": path}], 1.0]}.items():
            event = httpx.post(f"{app.url}gradio_api/call/{name}", json={"data": data}).json()["event_id"]
            answer = httpx.get(f"{app.url}gradio_api/call/{name}/{event}", timeout=20).text
            assert "12 x 10" not in answer and "1 done" not in answer, (name, path)
            assert "not a picture" not in answer and "denied" not in answer and "deleted by now" not in answer


def test_strength_is_a_number_from_0_to_1(app, client, tmp_path):
    """Python's JSON knows NaN, and so does the server's."""
    path = save(tmp_path / "a.png")
    upload = httpx.post(f"{app.url}gradio_api/upload", files={"files": path.read_bytes()}).json()[0]
    body = '{"data": [{"path": "%s"}, NaN, false, false, false, 4]}' % upload
    event = httpx.post(f"{app.url}gradio_api/call/upscale", content=body,
                       headers={"content-type": "application/json"}).json()["event_id"]
    answer = httpx.get(f"{app.url}gradio_api/call/upscale/{event}", timeout=20).text
    assert "48 x 40" not in answer
    assert upscale(client, path).ours is not None


def test_what_is_cancelled_takes_its_settings_back(client, tmp_path):
    """Else they would count with the next change, unasked."""
    Image.linear_gradient("L").resize((800, 800)).save(tmp_path / "large.png")
    large = handle_file(tmp_path / "large.png")
    client.predict(large, 0.85, False, False, True, 4, False, api_name="/upscale")
    job = client.submit(large, 0.3, False, False, True, 4, True, api_name="/upscale")
    while not job.outputs():  # "Working: 1 s"
        time.sleep(0.05)
    text, *buttons_and_settings = client.predict(api_name="/cancel")
    assert text == "Cancelled." and buttons_and_settings[-6:] == [0.85, False, False, True, 4, False]
    wait([job])         # else its end may end the client's next request, too
    assert "Cancelled." not in client.predict(api_name="/cancel")


def test_eight_people_at_once(app, tmp_path):
    """Each gets the result of their own picture."""
    paths = [save(tmp_path / f"{i}.png", (8 + i, 9), seed=i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(lambda path: upscale(Client(app.url, verbose=False, analytics_enabled=False), path), paths)
        )
    for path, result in zip(paths, results):
        assert np.array_equal(result.download, command(app, tmp_path / "out", path))


def test_a_folder(app, client, tmp_path):
    paths = [save(tmp_path / f"{i}.png", (30, 26), seed=i) for i in range(3)]
    (tmp_path / "other.png").write_text("hello")
    files = [handle_file(path) for path in (*paths, tmp_path / "other.png")]
    pairs, archive, report = client.predict(files, 0.5, api_name="/folder")
    assert [pair["caption"] for pair in pairs] == ["0.png", "1.png", "2.png"]
    assert np.array(Image.open(pairs[0]["image"])).shape == (104, 240, 3)
    assert report == "3 of 4 done.\n- other.png: not a picture (PNG, JPEG, WEBP, BMP, TIFF, GIF; HEIC with pillow-heif), or damaged"
    with zipfile.ZipFile(archive) as pack:
        assert pack.namelist() == ["0_x4.png", "1_x4.png", "2_x4.png"]      # not as the originals are called
        for path in paths:
            with pack.open(f"{path.stem}_x4.png") as file:
                expected = command(app, tmp_path / "out", path, "--strength", 0.5)
                assert np.array_equal(np.array(Image.open(file)), expected)
    assert client.predict([], 0.5, api_name="/folder")[-1] == "**Choose 1 to 200 pictures first**"
    assert client.predict([files[-1]], 0.5, api_name="/folder")[1] is None


def test_a_folder_of_tiny_faces_and_a_photograph(app, client, tmp_path):
    """Each as its size asks, as the command does; the photograph's faces are listed, whatever a picture is called."""
    tiny, photo, face = save(tmp_path / "faces.png"), tmp_path / "astronaut.png", save(tmp_path / "face.png", (32, 32))
    Image.fromarray(skimage.data.astronaut()[:, 60:420]).resize((72, 102), Image.Resampling.LANCZOS).save(photo)
    files = [handle_file(path) for path in (tiny, photo, face)]
    pairs, archive, report = client.predict(files, 1, api_name="/folder")
    assert "3 of 3 done" in report and "astronaut.png: 1 face" in report and "faces.png: mostly invented" in report
    captions = [pair["caption"] for pair in pairs]
    assert captions[:2] + captions[3:] == ["faces.png", "astronaut.png", "face.png"] and ", 1: " in captions[2]
    assert np.array(Image.open(pairs[3]["image"])).shape == (128, 256, 3)
    expected = command(app, tmp_path / "out", tiny, "--checkpoint", app.folder / "srgan_x8.pth")
    with zipfile.ZipFile(archive) as pack:
        names = ["astronaut_restored.png", "face_x4.png", "faces.csv", "faces_x8.png"]
        assert sorted(pack.namelist()) == names
        with pack.open("faces_x8.png") as file:
            assert np.array_equal(np.array(Image.open(file)), expected)
        command(app, tmp_path / "out", photo, "--photo", "--strength", 1)
        table = (tmp_path / "out" / "faces.csv").read_bytes()
        assert pack.read("faces.csv") == table.replace(b"astronaut.png", b"astronaut_restored.png")


def test_the_study_goes_on_where_it_was_left(app, client, faces):
    """Nothing that reaches the rater names a method; a rating sent twice counts once."""
    order = study_order("bo", 0, [path.name for path in find_images(faces)])
    picture, text, index = client.predict(" Bo ", api_name="/start")
    assert (text, index) == ("Picture 1 of 70", 0)
    client.predict("bo", 0, api_name="/rate_5")
    picture, text, index = client.predict("BO", 0, api_name="/rate_1")
    assert (text, index) == ("Picture 2 of 70", 1) and Path(picture).name == "picture.png"
    assert client.predict("bo", api_name="/back")[1:] == ("Picture 1 of 70", 0)
    if order[1][1] == "original":
        assert np.array_equal(np.array(Image.open(picture)), read_image(faces / order[1][0])[0])
    again = Client(app.url, verbose=False, analytics_enabled=False)
    assert again.predict("bo", api_name="/start")[1:] == ("Picture 2 of 70", 1)
    rows = read_ratings(app.folder / "results" / "ratings.csv")
    assert [(r["face"], r["method"], r["rating"]) for r in rows if r["rater"] == "bo"] == [(*order[0][:2], 1)]
    assert "name" in client.predict("  ", api_name="/start")[1]
    assert "when all pictures are rated" in client.predict("bo", api_name="/results")[0]
    again = Client(app.url, verbose=False, analytics_enabled=False, download_files=False)
    addresses = {again.predict("bo", i, api_name=f"/rate_{1 + i % 5}")[0]["url"] for i in range(1, 13)}
    for i in range(13, 60):
        append_rating(app.folder / "results" / "ratings.csv", ("bo", 0, i, *order[i], 3, "now"))
    addresses |= {again.predict("bo", i, api_name=f"/rate_{1 + i % 5}")[0]["url"] for i in range(60, 69)}
    assert len(addresses) == 21 and {method for _, method, _ in order[2:14]} == set(METHODS)
    assert any(repeat for _, _, repeat in order[61:])
    assert len({len(httpx.get(address).content) for address in addresses}) == 1
    client.predict("bo", 69, api_name="/rate_3")
    table, plot = client.predict("bo", api_name="/results")
    assert f"| {order[0][1]} " in table and "Raters: 1" in table
    assert Image.open(plot).size[0] > 500
    assert client.predict("=1+1", api_name="/start")[1] == "Picture 1 of 70"
    client.predict("=1+1", 0, api_name="/rate_3")
    assert {row["rater"] for row in read_ratings(app.folder / "results" / "ratings.csv")} == {"bo", "1+1"}


@pytest.fixture(scope="module")
def page(app):
    """A page of the app in Chromium, with the list of its requests in `page.requests`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("the browser tests need Chromium, and none is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)        # milliseconds: machines are busy
        page.requests = []
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(app.url)
        yield page
        browser.close()


def test_a_face_in_the_browser(app, page, faces, tmp_path):
    """Upload, wait for the slider, turn the knob, download: the pixels of the command."""
    path = find_images(faces)[0]
    page.get_by_text("Astronaut, 128 x 128").click()  # with settings of its own, which the next picture does not keep
    page.get_by_text("against the truth").wait_for()
    page.locator("#photo button[aria-label='Remove Image'], #photo button[aria-label=Clear]").first.click()
    page.locator("#photo input[type=file]").set_input_files(path)
    page.locator("#compare img").first.wait_for()
    page.get_by_text("128 x 128 → 512 x 512 pixels").wait_for()
    line = page.locator("#compare [data-testid=slider]")
    page.wait_for_function("""() => {
        const [line, box] = ["#compare [data-testid=slider]", "#compare"].map(
            name => document.querySelector(name).getBoundingClientRect());
        return Math.abs(line.x + line.width / 2 - box.x - box.width / 2) < 20}""")      # the pictures are laid out
    before = line.bounding_box()["x"]
    line.press("ArrowLeft")  # it is a tab stop
    assert line.bounding_box()["x"] < before - 5 and int(line.get_attribute("aria-valuenow")) < 50
    line.press("Home")
    assert line.get_attribute("aria-valuenow") == "0"
    line.press("ArrowLeft")
    assert line.bounding_box()["x"] > page.locator("#compare img").first.bounding_box()["x"] - 60  # not pushed off
    moved = line.bounding_box()["x"]
    page.evaluate("""() => { window.blank = 0; new MutationObserver(() => {
        window.blank += !document.querySelector("#compare img"); }).observe(document.body, {childList: true, subtree: true}) }""")
    for key in ("ArrowLeft",) * 6 + ("ArrowRight",) * 4:  # faster than they can be answered
        page.locator("#knobs").get_by_role("slider", name="Strength").press(key)
    assert line.bounding_box()["x"] == moved
    expected = command(app, tmp_path / "out", path, "--strength", 0.6)
    assert not np.array_equal(expected, command(app, tmp_path / "out", path))
    for _ in range(100):  # the knob is live: its result comes by itself
        with page.expect_download() as download:
            page.get_by_role("button", name="Download photo").click()
        result = np.array(Image.open(download.value.path()))
        if np.array_equal(result, expected):
            break
        page.wait_for_timeout(200)
    assert np.array_equal(result, expected) and not page.evaluate("window.blank")
    assert download.value.suggested_filename == f"{path.stem}_x4.png"


def slider_picture(page, other_than=None):
    """The blurry enlargement in the slider, (H, W, 3) uint8, once it is another one."""
    for _ in range(100):
        address = page.locator("#compare img").first.get_attribute("src")
        picture = np.array(Image.open(io.BytesIO(httpx.get(address).content)).convert("RGB"))
        if other_than is None or picture.shape != other_than.shape or not np.array_equal(picture, other_than):
            return picture
        page.wait_for_timeout(100)
    raise AssertionError("the slider shows the same picture")


def test_a_face_is_pointed_at_by_hand(app, page, tmp_path):
    """And what is no picture is called so, in our words."""
    (tmp_path / "letter.txt").write_text("hello")
    page.reload()
    page.get_by_text("An example").wait_for()
    page.locator("#photo input[type=file]").set_input_files(tmp_path / "letter.txt")
    page.get_by_text("This is no picture.").wait_for()
    wall = save(tmp_path / "wall.png", (90, 70))
    page.locator("#photo input[type=file]").set_input_files(wall)
    page.get_by_text("no face found").wait_for()
    page.get_by_text("Was a face missed?").click()
    picture = page.locator("#missed img")
    picture.wait_for()
    first = picture.get_attribute("src")
    box = picture.bounding_box()
    picture.click(position={"x": 0.8 * box["width"], "y": 0.3 * box["height"]})
    for _ in range(100):  # the frame has moved
        if picture.get_attribute("src") != first:
            break
        page.wait_for_timeout(100)
    page.get_by_role("button", name="Restore it").click()
    page.get_by_text("1 face, 1 restored").wait_for()
    page.get_by_text("1: 18 pixels, mostly invented").wait_for()
    page.get_by_role("slider", name="of face").wait_for()  # it is what one looks at now
    assert "selected" in page.locator("#faces button").nth(1).get_attribute("class")
    page.get_by_text("Leave as it was").click()
    page.get_by_text("1 face, 0 restored, 1 left as is (as asked)").wait_for()
    for text in ("1 face, 1 restored", "no face found"):
        page.get_by_text("Undo change").click()
        page.get_by_text(text).wait_for()
    page.get_by_role("button", name="Restore it").click()
    page.get_by_text("1: 18 pixels, mostly invented").wait_for()
    page.locator("#faces button").nth(0).click()
    page.get_by_role("slider", name="of face").wait_for(state="hidden")
    whole = slider_picture(page)
    page.locator("#faces button").nth(1).click()  # its frame is where the click was
    face = Image.fromarray(slider_picture(page, other_than=whole))
    face, wall = np.array(face.resize((18, 18), Image.Resampling.BOX), int), read_image(wall)[0].astype(int)
    places = [(x, y) for y in range(53) for x in range(73)]
    found = min(places, key=lambda place: np.abs(wall[place[1]:place[1] + 18, place[0]:place[0] + 18] - face).sum())
    assert face.std() > 20 and np.abs(np.subtract(found, (63, 12))).max() <= 2, found
    close, ours = slider_picture(page), page.locator("#compare img").nth(1)
    shown = ours.get_attribute("src")
    page.locator("#knobs").get_by_role("slider", name="Strength").press("ArrowLeft")  # the face stays in view
    for _ in range(100):
        if ours.get_attribute("src") != shown:
            break
        page.wait_for_timeout(100)
    assert ours.get_attribute("src") != shown and np.array_equal(slider_picture(page), close)
    own, usual = page.get_by_role("slider", name="of face"), "at 0.65"
    page.get_by_text(f"1: 18 pixels, mostly invented {usual}").wait_for()
    own.press("End")  # it has a knob of its own
    page.get_by_text(re.compile("^1: 18 pixels, mostly invented(, doubtful)?$")).wait_for()     # a face on a wall
    page.get_by_text("Undo change").click()
    page.get_by_text(f"1: 18 pixels, mostly invented {usual}").wait_for()
    page.locator("#faces button").nth(0).click()
    assert np.array_equal(slider_picture(page, other_than=close), whole)
    own.wait_for(state="hidden")


def test_each_face_has_a_knob_that_stays_with_it(app, page, tmp_path):
    """A face that is clicked while the knob of another is answered is the one that is shown; "Leave as it was" means it."""
    face = Image.fromarray(skimage.data.astronaut()[:, 60:420]).resize((72, 102), Image.Resampling.LANCZOS)
    Image.fromarray(np.hstack([face, face])).save(tmp_path / "two.png")
    page.goto(app.url)
    page.get_by_text("An example").wait_for()
    missed = page.get_by_role("button", name="Was a face missed?")
    assert not missed.is_visible()      # of one face, none was
    page.locator("#photo input[type=file]").set_input_files(tmp_path / "two.png")
    page.get_by_text("2 faces, 2 restored").wait_for()
    missed.click()
    own, tiles = page.get_by_role("slider", name="of face"), page.locator("#faces button")
    assert not own.is_visible()

    def knob_is(value):     # it may be seen before it has moved
        own.wait_for()
        page.wait_for_function("value => document.querySelector(\"[aria-label*='of face']\").value == value", arg=value)

    usual = float(page.locator("#knobs").get_by_role("slider", name="Strength").input_value())
    tiles.nth(1).click()
    knob_is(usual)
    side = int(re.search(r"1: (\d+) pixels", page.locator("#faces").inner_text())[1])
    page.wait_for_function("size => Math.abs(document.querySelector(\"[aria-label*='Frame size']\").value - size) < 0.02",
                           arg=side / 102)
    seen = slider_picture(page)
    for number in (2, 1):       # after the last comes the first
        page.get_by_text("Next face").click()
        seen = slider_picture(page, other_than=seen)
        assert "selected" in tiles.nth(number).get_attribute("class")
        page.get_by_role("slider", name=f"of face {number}").wait_for()
    knob_is(usual)
    for _ in range(3):
        own.press("ArrowLeft")
    tiles.nth(2).click()
    moved = f"restored at {round(usual - 0.15, 2):g}"
    page.locator("#faces").get_by_text(moved).wait_for()
    knob_is(usual)
    assert "1: " in page.locator("#faces").get_by_text(moved).inner_text()
    page.get_by_text("Leave as it was").click()
    page.get_by_text("2 faces, 1 restored, 1 left as is (as asked)").wait_for()
    own.wait_for(state="hidden")
    tiles.nth(1).click()
    knob_is(round(usual - 0.15, 2))
    own.press("ArrowLeft")
    page.locator("#faces").get_by_text(f"restored at {round(usual - 0.2, 2):g}").wait_for()
    page.get_by_text("Leave as it was").click()
    page.get_by_text("2 faces, 0 restored, 2 left as is (as asked)").wait_for()
    page.get_by_text("Restore face").click()  # as it was before
    page.locator("#faces").get_by_text(f"restored at {round(usual - 0.2, 2):g}").wait_for()
    own.press("Home")
    page.locator("#faces").get_by_text("restored at 0").wait_for()
    page.wait_for_timeout(2100)  # a step of its own
    typed = page.locator("#this input[type=number]")
    typed.fill("0")  # no step: it changes nothing
    typed.press("Enter")
    page.wait_for_timeout(500)
    for text in (f"restored at {round(usual - 0.2, 2):g}", "2 faces, 0 restored", f"restored at {round(usual - 0.2, 2):g}"):
        page.get_by_text("Undo change").click()
        page.locator("#show").get_by_text(text).wait_for()
    page.get_by_text("Undo change").click()  # back to what it was, not to what it was at first
    page.locator("#faces").get_by_text(moved).wait_for()
    page.get_by_text("Undo change").click()
    page.get_by_text("2 faces, 2 restored").wait_for()
    page.get_by_text("Undo change").click()
    page.wait_for_function("usual => document.querySelector(\"[aria-label*='of face']\").value == usual", arg=usual)
    caption, red = page.locator("#faces .caption-label").nth(2), "3px solid rgb(255, 0, 0)"
    for text, shown in (("2: 30 pixels, restored, doubtful", True), ("2: 30 pixels, restored", False)):     # as Gradio does
        caption.evaluate("(label, text) => { label.firstChild.data = text; }", text)
        page.wait_for_function("([label, red, shown]) => (getComputedStyle(label).border == red) == shown",
                               arg=[caption.element_handle(), red, shown])


def test_ten_ratings_by_keyboard(app, page):
    page.get_by_role("tab", name="Study").click()
    page.get_by_label("Your name").fill("cy")
    page.keyboard.press("Enter")
    page.get_by_text("Picture 1 of 70").wait_for()
    for i in range(10):
        for key in ("6", "a", "Control+3", str(i % 5 + 1)):  # only the last one rates
            page.keyboard.press(key)
        page.get_by_text(f"Picture {i + 2} of 70").wait_for()
    rows = read_ratings(app.folder / "results" / "ratings.csv")
    assert [row["rating"] for row in rows if row["rater"] == "cy"] == [1, 2, 3, 4, 5] * 2
    page.get_by_role("button", name="Back").click()
    page.get_by_text("Picture 10 of 70").wait_for()
    page.keyboard.press("2")
    page.get_by_text("Picture 11 of 70").wait_for()
    assert [row["rating"] for row in read_ratings(app.folder / "results" / "ratings.csv") if row["rater"] == "cy"][9] == 2


def test_no_request_leaves_the_machine(app, page):
    """In the tests above nothing was asked of another host; and the page is not allowed to."""
    assert len(page.requests) > 10
    assert [url for url in page.requests if not url.startswith((app.url, "data:", "blob:"))] == []
    assert "default-src 'self'" in httpx.get(app.url).headers["content-security-policy"]
    blocked = "() => fetch('http://localhost:9/').then(() => 'sent', error => String(error))"
    with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
        assert page.evaluate(blocked) != "sent"


def test_a_phone_is_wide_enough(page):
    page.set_viewport_size({"width": 390, "height": 844})
    for tab in ("Upscale", "Folder", "Study"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab


def test_on_a_phone_the_result_is_in_the_first_screen_and_nothing_jumps(app, page, faces, tmp_path):
    phone = page.context.browser.new_page(viewport={"width": 390, "height": 844})
    phone.add_init_script("""window.shifts = 0; new PerformanceObserver(list => {
        for (const entry of list.getEntries()) window.shifts += entry.value}).observe({type: "layout-shift"})""")
    phone.goto(app.url)
    phone.locator("#compare img").first.wait_for()
    before = phone.locator("#compare").bounding_box()
    phone.locator("#photo input[type=file]").set_input_files(find_images(faces)[0])
    phone.get_by_text("128 x 128 → 512 x 512 pixels").wait_for()
    after = phone.locator("#compare").bounding_box()
    assert after == before and after["y"] + after["height"] <= 844
    assert phone.evaluate("window.shifts") < 0.1  # good, by web.dev/cls
    phone.locator("#photo input[type=file]").set_input_files(save(tmp_path / "tall.png", (60, 120)))
    phone.get_by_text("60 x 120 → 240 x 480 pixels").wait_for()
    image = phone.locator("#compare img").first.bounding_box()
    assert image["y"] >= after["y"] and image["y"] + image["height"] <= after["y"] + after["height"]
    for selector in ("#compare img", "#photo img"):
        assert all(image.get_attribute("alt") for image in phone.locator(selector).all())
    phone.close()


def test_nothing_is_left_when_it_ends(app, client, tmp_path):
    """The last test of the running app. Uploads and results lie in one folder."""
    upscale(client, save(tmp_path / "a.png"))
    folders = list((app.folder / "tmp").glob("face-srgan-*"))
    assert len(folders) == 1 and any(folders[0].rglob("*_x4.png"))
    app.stop()
    assert list((app.folder / "tmp").glob("face-srgan-*")) == []


@pytest.fixture
def workshop(tmp_path, tiny_checkpoint):
    return inference.Workshop(
        inference.parse_arguments(["--device", "cpu", "--checkpoint", str(tiny_checkpoint)]), tmp_path
    )


def visitor(page, host="1.2.3.4"):
    return SimpleNamespace(session_hash=page, client=SimpleNamespace(host=host))


def test_nobody_fills_the_queue_and_who_leaves_is_dropped(workshop):
    large, released = np.zeros((600, 700, 3), np.uint8), threading.Event()

    def work(job):
        return upscale_picture(workshop.networks.at_work(job, workshop.worker, {})(1), [large])

    async def last(requests):
        async for result in requests:
            pass
        return result

    async def scenario():
        first = [workshop.work(visitor(str(i)), work) for i in range(inference.WAITING)]
        assert all("s …" in text for text in await asyncio.gather(*map(anext, first)))
        with pytest.raises(inference.DataError, match="your address"):
            await anext(workshop.work(visitor("one more"), work))
        assert "s …" in await anext(workshop.work(visitor("other", "5.6.7.8"), work))
        for requests in first[:10]:
            await requests.aclose()  # a closed page
        assert all(workshop.cancel(str(i)) for i in range(10, 30)) and not workshop.cancel("10")
        slow = workshop.work(visitor("slow", "9.9.9.9"), lambda job: released.wait(60))
        assert "s …" in await anext(slow) and workshop.cancel("slow")
        assert [text async for text in slow] == [None]  # at once, whatever the thread is at
        released.set()
        again = workshop.work(visitor("30"), lambda job: "another picture", when=2)
        assert await last(again) == "another picture"
        assert [_ async for _ in workshop.work(visitor("30"), lambda job: "overtaken", when=1)] == [None]  # an answer:
        # a generator without any makes Gradio blank all that it was to fill
        assert [await last(requests) for requests in first[10:31]] == [None] * 21
        assert (await last(first[31])).shape == (1, 2400, 2800, 3)

    with ThreadPoolExecutor() as pool:  # Playwright has a loop of its own in this thread
        pool.submit(asyncio.run, scenario()).result()


def test_what_is_given_up_leaves_the_newer_result_on_the_page(workshop):
    """An answer, since without one Gradio blanks all; but nothing of what the newer request has filled."""
    page = inference.build_app(workshop, None)
    upscale_one = next(function.fn for function in page.fns.values() if function.api_name == "upscale")
    workshop.last("page").when = 5

    async def answers():
        given = str(save(workshop.folder / "other.png"))
        return [answer async for answer in upscale_one(
            given, 1, False, False, False, 4, False, [], {}, 1, visitor("page"))]

    with ThreadPoolExecutor() as pool:
        [answer] = pool.submit(asyncio.run, answers()).result()
    assert [box.value for box in answer] == ["Cancel"]


def test_moved_back_to_what_is_shown_nothing_is_made_again(workshop, monkeypatch):
    """Which Cancel does; and nobody downloads what was made before as if it were what is being made."""
    page, begun, free = inference.build_app(workshop, None), [], threading.Event()
    upscale_one = next(function.fn for function in page.fns.values() if function.api_name == "upscale")
    enlarge, given = workshop.enlarge, str(save(workshop.folder / "given.png"))

    def slowly(job, path, strength, *rest):
        begun.append(strength)
        assert strength == 1 or free.wait(20)
        return enlarge(job, path, strength, *rest)

    monkeypatch.setattr(workshop, "enlarge", slowly)

    def wish(strength, when, path=given, found={given: []}):
        return upscale_one(path, strength, False, False, False, 4, False, [], found, when, visitor("page"))

    def download(answer):
        [update] = [update for box, update in answer.items() if type(box).__name__ == "DownloadButton"]
        return update["interactive"] if isinstance(update, dict) else update.interactive

    async def scenario():
        *_, result = [answer async for answer in wish(1, 1)]
        assert download(result)
        assert not download(await anext(wish(0.5, 2)))
        [again] = [answer async for answer in wish(1, 3)]
        assert download(again) and len(again) == 3
        assert "12 x 10" in next(text for box, text in again.items() if box.elem_id == "status")
        blank = await anext(wish(0.5, 4, str(save(workshop.folder / "other.png"))))
        assert None in [update for box, update in blank.items() if type(box).__name__ == "ImageSlider"]
        [*_, again] = [answer async for answer in wish(1, 5)]
        assert download(again) and len(again) > 3  # since the page was blank
        free.set()

    with ThreadPoolExecutor() as pool:
        pool.submit(asyncio.run, scenario()).result()
    assert begun == [1, 0.5, 0.5, 1]


def test_a_large_picture_does_not_hold_up_a_face(workshop):
    """The face comes after the tile that is being computed and one that may wait already; the others after it."""
    begun, widths = threading.Event(), []
    workshop.networks(1, 4).head.register_forward_pre_hook(
        lambda _, inputs: widths.append(inputs[0].shape[-1]) or begun.set())
    at_work = workshop.networks.at_work(SimpleNamespace(over=False), workshop.worker, {})
    with ThreadPoolExecutor() as pool:
        large = pool.submit(upscale_picture, at_work(1), [np.random.default_rng(0).integers(0, 255, (600, 600, 3), np.uint8)])
        assert begun.wait(20)
        assert upscale_picture(at_work(1), [np.zeros((32, 32, 3), np.uint8)]).shape == (1, 128, 128, 3)
        assert large.result().shape == (1, 2400, 2400, 3)
    assert len(widths) == 10 and widths.index(32) <= 2


def test_a_folder_that_is_cancelled_stops_before_the_next_picture(workshop, monkeypatch):
    """Though all are sharp photographs, which the network never sees; what is done by then is given out."""
    paths = [workshop.folder / f"{name}.png" for name in "abc"]
    for path in paths:
        Image.linear_gradient("L").resize((900, 700)).save(path)
    job, read = SimpleNamespace(over=False), workshop.read

    def read_and_cancel(path):
        job.over = True
        return read(path)

    monkeypatch.setattr(workshop, "read", read_and_cancel)
    pairs, archive, line = workshop.enlarge_all(job, paths, 1)
    assert line.startswith("1 of 3 done.") and line.endswith("- b.png: not done\n- c.png: not done")
    assert len(pairs) == 1 and zipfile.ZipFile(archive).namelist() == ["a_x4.png"]


def test_the_faces_of_a_photograph_are_looked_for_once(workshop, monkeypatch):
    """Not again for other settings; after its deletion nothing of it is known any more."""
    seen = []
    monkeypatch.setattr(model, "find_faces", lambda picture: seen.append(picture.shape) or [Face(40, 40, 30, 0, 1)])
    path = save(workshop.folder / "photo.png", (90, 80))
    lines = [workshop.enlarge(None, path, 1, False, False, False, 4, faces_only=only).line for only in (False, True)]
    assert seen == [(80, 90, 3)] and all("; 1 face, " in line for line in lines)
    os.utime(path, (1, 1))
    workshop.read(path)     # who works on it keeps it
    workshop.sweep(set())
    assert path in workshop.found and path.exists()
    os.utime(path, (1, 1))
    workshop.sweep(set())
    assert path not in workshop.found
    monkeypatch.setattr(model, "find_faces", lambda picture: seen.append("none") or [])
    path = save(workshop.folder / "street.png", (90, 80))
    for _ in range(2):
        assert "no face" in workshop.enlarge(None, path, 1, False, False, False, 4).line
    assert seen[1:] == ["none"]


def test_a_change_of_one_face_computes_nothing_around_the_others(workshop, monkeypatch):
    """The result is the same as without what is kept; the photograph keeps its size, though a sharp face joins."""
    astronaut = Image.fromarray(skimage.data.astronaut()).resize((256, 256)).filter(ImageFilter.GaussianBlur(3))
    path, computed, submit = workshop.folder / "two.png", [], workshop.worker.submit
    Image.fromarray(np.hstack([np.array(astronaut)] * 2)).save(path)
    monkeypatch.setattr(workshop.worker, "submit", lambda net, lr: computed.append(lr.shape[-1]) or submit(net, lr))

    def enlarge(*marks):
        computed.clear()
        result = workshop.enlarge(None, path, 1, False, False, False, 4, marks)
        return result, read_image(Path(result.file))[0], max(computed, default=0)

    first, before, around = enlarge()
    assert "2 faces, 2 restored" in first.line and around > 200
    face = first.found[str(path)][1]
    _, after, largest = enlarge((face, "left"))
    assert largest < 60 and not np.array_equal(after, before)
    assert enlarge((Face(20, 20, 30, 0, 1), "restored"))[1].shape == before.shape
    workshop.known.cache_clear()
    _, again, largest = enlarge((face, "left"))
    assert largest > 200 and np.array_equal(again, after)
    flat = [Face(150, 20, 40, 0, 1), Face(20, 150, 40, 0, 1)]  # what lies around them differs in its shape alone
    Image.new("RGB", (300, 300), (120, 90, 70)).save(path := workshop.folder / "flat.png")
    workshop.found[path].faces = []
    enlarge(*((face, "restored") for face in flat))


def test_marks_change_nothing_else_of_a_photograph_though_they_come_first(workshop):
    """As when a face is pointed at while the first result is computed."""
    astronaut = Image.fromarray(skimage.data.astronaut()).resize((256, 256)).filter(ImageFilter.GaussianBlur(3))
    decided = []
    for first in ((), [(Face(40, 40, 30, 0, 1), "restored")]):
        astronaut.save(path := workshop.folder / f"{len(first)}.png")
        workshop.enlarge(None, path, 1, False, False, False, 4, first)
        decided.append((workshop.found[path].times, workshop.found[path].reach))
    assert decided[0] == decided[1] and len(decided[0]) == 2


def test_uploads_are_deleted_under_load_and_samples_stay(workshop, tmp_path, monkeypatch):
    """700 files of 8 clients come while old ones go; what was there at the start stays."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    inference.build_app(workshop, None)
    samples = {str(path) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(samples) >= 4

    def upload(number):
        path = tmp_path / f"{number}" / "upload.png"
        path.parent.mkdir()
        save(path)
        os.utime(path, (1, 1))
        if number % 10 == 0:
            workshop.sweep(samples)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(upload, range(700)))
    fresh = save(tmp_path / "fresh.png")
    workshop.sweep(samples)
    assert {str(path) for path in tmp_path.rglob("*") if path.is_file()} == samples | {str(fresh)}


def test_folders_of_killed_processes_are_removed_and_the_password_is_asked_for(app_flags, tmp_path):
    first, second = (tmp_path / "tmp" / f"face-srgan-{name}" for name in ("dead", "alive"))
    for folder in (first, second):
        folder.mkdir(parents=True)
        (folder / "upload.png").touch()
    with locked(second):
        process = subprocess.Popen([sys.executable, ROOT / "inference.py", *app_flags, "--auth", "me:a:b"], text=True,
                                   env=os.environ | {"BROWSER": "true", "TMPDIR": str(tmp_path / "tmp")},
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        address = re.search("http://[^ ]+", process.stdout.readline())[0]
        # And who does not know the password stays outside.
        assert httpx.get(f"{address}gradio_api/info").status_code == 401
        assert httpx.post(f"{address}login", data={"username": "me", "password": "a"}).status_code == 400
        with httpx.Client() as me:
            assert me.post(f"{address}login", data={"username": "me", "password": "a:b"}).status_code == 200
            assert me.get(f"{address}gradio_api/info").status_code == 200
            # While it computes, SIGTERM ends it at once and in silence.
            large = save(tmp_path / "large.png", (1000, 1000)).read_bytes()
            upload = me.post(f"{address}gradio_api/upload", files={"files": large}).json()[0]
            me.post(f"{address}gradio_api/call/upscale", json={"data": [{"path": upload}, 1, False, False, True, 4]})
            time.sleep(0.3)
        assert not first.exists() and (second / "upload.png").exists()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 130 and "terminate called" not in process.stderr.read()
    assert [path.name for path in (tmp_path / "tmp").glob("face-srgan-*")] == [second.name]


@pytest.fixture
def app_flags(tiny_checkpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["--ui", "--port", str(port), "--checkpoint", str(tiny_checkpoint), "--device", "cpu"]


def test_mistakes_are_one_sentence_and_status_2(tmp_path, capsys, monkeypatch, faces):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ratings.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty").mkdir()
    for call, word in {
        ("--study", faces): "--ui",
        ("--ui", "a.png"): "INPUT",
        ("--ui", "--port", "0"): "--port",
        ("--ui", "--auth", "me"): "--auth",
        ("--ui", "--study", tmp_path / "absent"): "absent",
        ("--ui", "--study", tmp_path / "empty"): "empty",
        ("--output", tmp_path / "mine", "--ui", "--study", faces): "ratings.csv",
        ("--ui", "--checkpoint", tmp_path / "absent.pth"): "absent.pth",
    }.items():
        assert inference.run(["--output", str(tmp_path), *map(str, call), "--device", "cpu"]) == 2, call
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1 and word in error, call
    assert (tmp_path / "mine" / "ratings.csv").read_text() == "a,b\n1,2\n"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert inference.run(["--ui", "--port", str(port), "--checkpoint", str(CHECKPOINT), "--device", "cpu"]) == 2
    assert str(port) in capsys.readouterr().err.strip().splitlines()[-1]
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert inference.run(["--ui", "--device", "cpu"]) == 2
    assert "pip install" in capsys.readouterr().err
