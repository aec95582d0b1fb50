import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import inference
import model
from data_loader import find_images, is_result, jpeg, read_image, rescale, simulate
from inference import CHECKPOINT
from loss import psnr, sample_faces
from model import Generator, load_checkpoint, save_checkpoint, upscale

ROOT = Path(inference.__file__).parent
FIGURES = {"comparison.png", "metrics.csv"}


def save(path, picture, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **options)


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def results(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - FIGURES


@pytest.fixture
def run(tiny_checkpoint, tmp_path):
    """Call the command with the tiny checkpoint and an output folder; return the exit status."""

    def call(*arguments, output=None, checkpoint=tiny_checkpoint):
        return inference.run(
            [
                *map(str, arguments),
                "--output",
                str(output or tmp_path / "out"),
                "--checkpoint",
                str(checkpoint),
                "--device",
                "cpu",
            ]
        )

    return call


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(CHECKPOINT)[0].for_inference()


@pytest.mark.parametrize("scale", (4, 8))
def test_shipped_weights_show_what_the_project_does(tmp_path, capsys, scale):
    """`python inference.py` alone, with the shipped weights: sharper than bicubic, still faithful."""
    flags = ["--scale", str(scale)] * (scale != 4)
    assert inference.run([*flags, "--output", str(tmp_path), "--device", "cpu"]) == 0
    assert results(tmp_path) == {"astronaut.png", "grace_hopper.png"}
    output = capsys.readouterr().out
    assert "mean" in output and f"upscaled {scale}x" in output
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    last = {line.split("  ")[0]: line.split() for line in output.splitlines()}["std. error"]
    assert float(last[2]) == pytest.approx(abs(float(rows[0]["psnr"]) - float(rows[1]["psnr"])) / 2, abs=0.006)
    for row in rows:
        assert float(row["lr_psnr"]) > 30
        assert float(row["ssim"]) > float(row["ssim_bicubic"]) + 0.02
    for name, face in sample_faces().items():
        sr = read_image(tmp_path / f"{name}.png")[0]
        lr, hr = simulate(face, scale, "bicubic")
        blurred = rescale(lr, scale)
        detail = [np.abs(np.diff(picture.astype(float), axis=1)).mean() for picture in (blurred, sr, hr)]
        assert detail[1] > detail[0] + 0.4 * (detail[2] - detail[0])
        assert np.abs(sr.mean((0, 1)) - hr.mean((0, 1))).max() < 3  # no colour shift


@pytest.mark.parametrize("scale", (4, 8))
def test_shipped_srresnet_beats_bicubic(scale):
    """Whether Pillow made the small picture or `cv2.resize` did: mean gain in dB over the portraits."""
    generator = load_checkpoint(CHECKPOINT.with_name(f"srresnet_x{scale}.pth"))[0].for_inference()
    for kernel, least in (("bicubic", 1.5), ("cv2-linear", 0.7)):
        gains = []
        for face in sample_faces().values():
            lr, hr = simulate(face, scale, kernel)
            gains.append(psnr(upscale(generator, [lr])[0], hr) - psnr(rescale(lr, scale), hr))
        assert np.mean(gains) > least, kernel


def test_a_blurred_face_is_reduced_first_to_what_it_shows(run, tmp_path, capsys, shipped):
    """To 16 of 32 pixels here, for the network for eight times. Sharp ones, and what is scored, stay as they are."""
    face = sample_faces()["astronaut"]
    sharp = simulate(face, 4)[0]
    blurred = cv2.GaussianBlur(sharp, (0, 0), 2)
    save(tmp_path / "in" / "blurred.png", blurred)
    save(tmp_path / "in" / "sharp.png", sharp)
    save(tmp_path / "hr" / "blurred.png", face)
    eight = load_checkpoint(CHECKPOINT.with_name("srgan_x8.pth"))[0].for_inference()
    small = np.asarray(Image.fromarray(blurred).resize((16, 16), Image.Resampling.BICUBIC))

    def result(name, *flags):
        assert run(tmp_path / "in" / f"{name}.png", "--precision", "float32", *flags, checkpoint=CHECKPOINT) == 0
        return read_image(tmp_path / "out" / f"{name}.png")[0]

    as_it_is = upscale(shipped, [blurred])[0]
    assert np.array_equal(result("blurred"), sr := upscale(eight, [small])[0])
    assert "1 blurred" in capsys.readouterr().out
    assert psnr(sr, face) > psnr(as_it_is, face) + 1
    assert cv2.Laplacian(sr, cv2.CV_64F).std() > 1.5 * cv2.Laplacian(as_it_is, cv2.CV_64F).std()
    assert np.array_equal(result("sharp"), upscale(shipped, [sharp])[0])
    assert "1 blurred" not in capsys.readouterr().out
    assert np.array_equal(result("blurred", "--hr", tmp_path / "hr"), as_it_is)
    assert np.array_equal(result("blurred", "--as-is"), as_it_is)


def test_the_scale_is_that_of_the_checkpoint_where_one_is_given(run, tmp_path, capsys):
    save(tmp_path / "a.png", noise(8, 8))
    assert run(tmp_path / "a.png", "--scale", "8") == 0
    said = capsys.readouterr()
    assert read_image(tmp_path / "out" / "a.png")[0].shape == (32, 32, 3) and "upscaled 4x" in said.out
    assert "enlarges 4 times, whatever --scale says" in said.err
    assert run(tmp_path / "a.png", "--scale", "8", "--photo") == 2
    assert "--scale" in capsys.readouterr().err


def test_hints_at_what_suits_the_pictures_better(run, tmp_path, capsys, faces):
    """Only where that is so: not at eight times, not for a face of the usual size, of photographs for the smallest."""
    for side in (16, 32, 80):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    tiny, usual, large = (str(tmp_path / f"{side}.png") for side in (16, 32, 80))
    for arguments, hints in (([tiny, usual, large], ["--scale 8", "--photo"]), ([usual], []),
                             ([tiny, "--scale", "8"], []), ([large, "--photo"], []), ([usual, "--photo"], ["without --photo"]),
                             ([faces, "--simulate"], []), ([large, "--simulate"], ["80 pixels; scores are given for 128"])):
        eightfold = {"checkpoint": CHECKPOINT.with_name("srgan_x8.pth")} if "8" in arguments else {}
        assert run(*arguments, **eightfold) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hint: ")]
        assert len(said) == len(hints) and all(hint in line for hint, line in zip(hints, said)), arguments


def test_alone_on_a_folder_tree(run, tmp_path):
    save(tmp_path / "in" / "a.jpg", noise(8, 8))
    save(tmp_path / "in" / "a.png", noise(8, 8, seed=1))
    save(tmp_path / "in" / "sub" / "dir.x" / "顔 $1$.png", noise(6, 9))
    save(tmp_path / "in" / "comparison.jpg", noise(8, 8))
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    before = {path: path.read_bytes() for path in (tmp_path / "in").rglob("*") if path.is_file()}
    assert run(tmp_path / "in") == 0
    expected = {"a.png", "a.png.png", "comparison.jpg.png", "sub/dir.x/顔 $1$.png"}
    assert results(tmp_path / "out") == expected
    assert (tmp_path / "out" / "comparison.png").exists()
    assert read_image(tmp_path / "out" / "sub" / "dir.x" / "顔 $1$.png")[0].shape == (24, 36, 3)
    assert before == {path: path.read_bytes() for path in before}
    assert run(tmp_path / "in") == 0 and results(tmp_path / "out") == expected  # replaced, not added


def test_results_of_another_program_are_scored_as_they_are(run, tmp_path, faces, capsys):
    """By the same table as ours; none is written again."""
    assert run(faces, "--simulate") == 0
    ours = (tmp_path / "out" / "metrics.csv").read_text()
    for path in find_images(tmp_path / "out"):
        if path.name != "comparison.png":
            save(tmp_path / "theirs" / path.relative_to(tmp_path / "out"), read_image(path)[0])
    assert run(tmp_path / "theirs", "--hr", faces, output=tmp_path / "scores") == 0
    theirs, rows = ((tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("scores", "out"))
    assert [line.rpartition(",")[0] for line in theirs] == [line.rpartition(",")[0] for line in rows]
    assert theirs[1].endswith(",as given; bicubic; damage none")
    assert "upscaled" not in capsys.readouterr().out[-200:]
    assert results(tmp_path / "scores") == set() and (tmp_path / "scores" / "comparison.png").exists()
    flags = "--hr", faces, "--kernel", "cv2-linear"     # our own, later, and as if they had been reduced otherwise
    assert run(tmp_path / "out", *flags, output=tmp_path / "scores") == 0
    again = (tmp_path / "scores" / "metrics.csv").read_text()
    first, second = (next(csv.DictReader(text.splitlines())) for text in (ours, again))
    assert len(again.splitlines()) == len(ours.splitlines()) and first["psnr"] == second["psnr"]
    assert first["psnr_bicubic"] != second["psnr_bicubic"]
    capsys.readouterr()
    fewer = tmp_path / "fewer"
    for path in find_images(faces)[1:]:
        save(fewer / path.relative_to(faces), read_image(path)[0])
    assert run(tmp_path / "out", "--hr", fewer, output=tmp_path / "scores") == 1   # one has no truth: it is named
    assert "no ground truth" in capsys.readouterr().err


def test_lpips_where_its_package_is_installed(run, tmp_path, faces, monkeypatch, capsys):
    """In the table too, which is then an earlier result all the same; without the package, one sentence says so."""
    class Lpips(torch.nn.Module):
        def forward(self, a, b):
            assert a.shape == b.shape == (1, 3, 128, 128) and -1 <= a.min() < -0.5 and 0.5 < a.max() <= 1
            return (a - b).abs().mean()

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda net, verbose: Lpips()))
    assert run(faces, "--simulate", "--lpips") == 0 == run(faces, "--simulate", "--lpips")
    assert "LPIPS" in capsys.readouterr().out
    [table] = (tmp_path / "out").glob("*.csv")
    rows = list(csv.DictReader(table.open()))
    face = read_image(find_images(faces)[0])[0]
    lr, hr = simulate(face, 4)
    sr = read_image(tmp_path / "out" / f"{rows[0]['image']}.png")[0]
    for column, picture in (("lpips", sr), ("lpips_bicubic", rescale(lr, 4))):
        assert float(rows[0][column]) == pytest.approx(np.abs(picture.astype(float) - hr).mean() / 127.5, abs=1e-5)
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert run(faces, "--simulate", "--lpips") == 2
    assert capsys.readouterr().err.endswith("--lpips needs a package that is no requirement: pip install lpips\n")


@pytest.mark.parametrize("output", ["in", "in/results"])
def test_results_among_the_inputs(run, tmp_path, output):
    """Whatever --output says, no input is overwritten and no result is taken for an input."""
    save(tmp_path / "in" / "a.png", noise(8, 8))
    save(tmp_path / "in" / "b.jpg", noise(8, 8))
    save(tmp_path / "in" / "comparison.png", noise(8, 8, seed=2))
    (tmp_path / "in" / "metrics.csv").write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    counts = []
    for _ in range(2):
        assert run(tmp_path / "in", "--simulate", output=tmp_path / output) == 0
        counts.append(sorted(path for path in (tmp_path / "in").rglob("*") if path.is_file()))
    assert counts[0] == counts[1]
    assert before == {path: path.read_bytes() for path in before}
    made = [path for path in counts[0] if path not in before and path.suffix == ".png"]
    assert len(made) == 4  # three results and the comparison
    assert run(*made, output=tmp_path / output) == 2  # nothing but results: nothing to do


def test_photographs_among_their_results(run, tmp_path):
    """A JPEG beside which its result lies is not overwritten, and the result, a JPEG, is not taken for an input; what
    somebody has saved again in its place is."""
    save(tmp_path / "in" / "b.jpg", noise(70, 80))
    before = (tmp_path / "in" / "b.jpg").read_bytes()
    for _ in range(2):
        assert run(tmp_path / "in", "--photo", output=tmp_path / "in") == 0
        assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["b.jpg", "b.jpg.jpg", "comparison.png"]
    result = tmp_path / "in" / "b.jpg.jpg"
    with Image.open(result) as picture:
        picture.save(result, quality=90)
    changed = result.read_bytes()
    assert run(tmp_path / "in", "--photo", output=tmp_path / "in") == 0
    assert (tmp_path / "in" / "b.jpg").read_bytes() == before and result.read_bytes() == changed


def test_a_link_to_an_input_is_not_written_through(run, tmp_path):
    save(tmp_path / "a.png", noise(8, 8))
    before = (tmp_path / "a.png").read_bytes()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").symlink_to(tmp_path / "a.png")
    assert run(tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").read_bytes() == before
    assert read_image(tmp_path / "out" / "a.png.png")[0].shape == (32, 32, 3)


def test_inputs_of_every_sort(run, tmp_path, capsys):
    folder = tmp_path / "in"
    gray = noise(10, 12)[..., 0]
    rotation = Image.Exif()
    rotation[0x0112] = 6
    good = {
        "gray.png": (gray, {}),
        "gray16.png": (gray.astype(np.uint16) * 257, {}),
        "palette.png": (Image.fromarray(noise(10, 12)).quantize(16), {}),
        "cmyk.jpg": (Image.fromarray(noise(10, 12)).convert("CMYK"), {}),
        "rotated.jpg": (noise(12, 10), {"exif": rotation}),
        "alpha.png": (noise(10, 12, 4), {}),
        "moving.gif": (gray, {"save_all": True, "append_images": [Image.fromarray(gray).rotate(180)]}),
    }
    for name, (picture, options) in good.items():
        save(folder / name, picture, **options)
    save(folder / "narrow.png", noise(40, 1))
    save(folder / "dot.png", noise(1, 1))
    save(folder / "cut.png", noise(40, 40))
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])
    (folder / "text.png").write_text("hello")
    (folder / "nothing.jpg").touch()
    assert run(folder, tmp_path / "absent") == 1
    errors = capsys.readouterr().err
    for name in ("cut.png", "text.png", "nothing.jpg", "absent"):
        assert sum(name in line for line in errors.splitlines()) == 1, name
    assert "Traceback" not in errors
    out = tmp_path / "out"
    assert results(out) == {f"{Path(name).stem}.png" for name in (*good, "narrow.png", "dot.png")}
    for name in good:
        assert read_image(out / f"{Path(name).stem}.png")[0].shape == (40, 48, 3), name
    assert read_image(out / "narrow.png")[0].shape == (160, 4, 3)
    assert read_image(out / "alpha.png")[1].shape == (40, 48)


def test_alpha_is_kept(run, tmp_path):
    picture = noise(8, 8, 4)
    picture[..., 3] = 0
    picture[2:6, 2:6, 3] = 255
    save(tmp_path / "a.png", picture)
    assert run(tmp_path / "a.png") == 0
    alpha = read_image(tmp_path / "out" / "a.png")[1]
    assert (alpha[12:20, 12:20] == 255).all() and (alpha[:4] < 3).all() and 0.2 < alpha.mean() / 255 < 0.3


@pytest.mark.parametrize("photo", (False, True))
def test_colour_profile_and_exif_are_kept(run, tmp_path, photo):
    """But not the orientation, which has been applied; a damaged profile or none does no harm. A JPEG of a photograph
    stays one."""
    profile, exif = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.DateTime] = 6, "2020:02:20 20:20:20"
    exif[ExifTags.Base.ExifOffset] = {ExifTags.Base.DateTimeOriginal: "2019:01:01 00:00:00"}
    folder = tmp_path / "in"
    save(folder / "camera.jpg", noise(20, 30), exif=exif, icc_profile=profile)
    save(folder / "none.png", noise(20, 30))
    save(folder / "gray.jpg", Image.fromarray(noise(20, 30)[..., 0]), icc_profile=profile, exif=b"Exif\0\0nothing")
    assert run(folder, *["--photo"] * photo) == 0
    kind = "jpg" if photo else "png"
    with Image.open(tmp_path / "out" / f"camera.{kind}") as result:
        assert result.format == {"jpg": "JPEG", "png": "PNG"}[kind]
        assert result.size == (80, 120) and result.info["icc_profile"] == profile and is_result(Path(result.filename))
        assert dict(result.getexif()).keys() == {ExifTags.Base.DateTime, ExifTags.Base.ExifOffset}
        assert result.getexif().get_ifd(ExifTags.Base.ExifOffset) == {
            ExifTags.Base.DateTimeOriginal: "2019:01:01 00:00:00"}
    for name in ("none.png", f"gray.{kind}"):
        with Image.open(tmp_path / "out" / name) as result:
            assert result.size == (120, 80) and not result.getexif() and "icc_profile" not in result.info


def test_the_command_is_the_function(run, tmp_path, tiny_checkpoint):
    save(tmp_path / "a.png", noise(9, 7))
    for precision in ("float32", "bfloat16"):
        assert run(tmp_path / "a.png", "--precision", precision) == 0
        generator = load_checkpoint(tiny_checkpoint)[0].for_inference(getattr(torch, precision))
        expected = upscale(generator, [noise(9, 7)])[0]
        assert np.array_equal(read_image(tmp_path / "out" / "a.png")[0], expected)


def test_strength_goes_from_the_faithful_network_to_the_vivid(run, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    for seed, name in enumerate(("srresnet_x4.pth", "srgan_x4.pth")):
        torch.manual_seed(seed)
        generator = Generator(blocks=1, channels=8)
        generator.tail.weight.data.mul_(20)
        save_checkpoint(folder / name, generator, {})
    save(tmp_path / "a.png", noise(9, 7))

    def result(*flags, checkpoint="srgan_x4.pth"):
        assert run(tmp_path / "a.png", *flags, checkpoint=folder / checkpoint) == 0
        return read_image(tmp_path / "out" / "a.png")[0].astype(int)

    faithful, vivid = result(checkpoint="srresnet_x4.pth"), result()
    assert np.abs(faithful - vivid).max() > 10
    assert np.array_equal(result("--strength", "0"), faithful)
    assert np.array_equal(result("--strength", "1", "--added"), vivid)
    middle = result("--strength", "0.5")
    assert np.abs(middle - faithful).sum() < np.abs(vivid - faithful).sum() > np.abs(middle - vivid).sum() > 0
    (folder / "srresnet_x4.pth").unlink()
    assert np.array_equal(result(), vivid)
    assert run(tmp_path / "a.png", "--strength", "0.5", checkpoint=folder / "srgan_x4.pth") == 2


def test_gray_and_sepia_pictures_stay_so_and_coloured_ones_coloured(shipped):
    lr = simulate(sample_faces()["grace_hopper"], 4)[0]
    gray = np.repeat(cv2.cvtColor(lr, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    sepia = (gray * (0.95, 0.8, 0.6) + 10).astype(np.uint8)
    sr = {name: upscale(shipped, [picture])[0].astype(int)
          for name, picture in (("colour", lr), ("gray", gray), ("sepia", sepia))}
    assert np.ptp(sr["gray"], axis=2).max() == 0
    tints = [picture[..., 0].astype(int) - picture[..., 2] for picture in (sr["sepia"], rescale(sepia, 4))]
    assert np.mean(tints[0] != tints[1]) < 0.02  # where black or white cuts it off
    large = cv2.cvtColor(sample_faces()["grace_hopper"], cv2.COLOR_RGB2GRAY)[..., None] * (0.95, 0.8, 0.6) + 10
    for faded in (large, large * 0.45 + 100):  # and after JPEG
        faded = jpeg(np.rint(faded).astype(np.uint8), 80)
        tints = [picture[..., 0].astype(int) - picture[..., 2] for picture in (upscale(shipped, [faded])[0],
                                                                               rescale(faded, 4))]
        assert np.mean(tints[0] != tints[1]) < 0.02
    for picture in sr.values():  # the brightness is the network's
        assert cv2.Laplacian(picture[..., 1].astype(float), -1).std() > 20
    assert np.ptp(sr["colour"], axis=2).max() > 100
    mixed = upscale(shipped, [gray, lr, sepia])  # what one is does not change another
    assert all(np.abs(ours - sr[name]).max() <= 1 for ours, name in zip(mixed, ("gray", "colour", "sepia")))
    grainy = [np.clip(picture + np.random.default_rng(0).normal(0, 3, (32, 32, 1)), 0, 255).astype(np.uint8)
              for picture in (gray, sepia)]
    ours = [upscale(shipped, [picture])[0][..., 1].astype(float) for picture in grainy]
    assert np.corrcoef(ours[0].ravel(), ours[1].ravel())[0, 1] > 0.995  # a tint is not taken for light


def test_added_detail_is_gray_where_nothing_was_added(shipped):
    lr = noise(16, 16)
    sr = upscale(shipped, [lr])[0]
    same = inference.added_detail(sr, sr)
    assert (same == 128).all()
    brighter = cv2.add(sr, (5, 5, 5, 0))
    brighter = inference.added_detail(sr, brighter)
    assert np.median(brighter) == 128 + 15


def test_scores_are_those_of_the_files(run, tmp_path, faces, tiny_checkpoint):
    """metrics.csv against scikit-image on the written PNG and Pillow's own reduction."""
    truth = tmp_path / "hr"
    for i, path in enumerate(find_images(faces)[:3]):
        save(truth / "sub" / path.name, Image.open(path))
        save(
            tmp_path / "lr" / "sub" / f"{path.stem}.bmp",
            Image.open(path).resize((32, 32), Image.Resampling.BICUBIC),
        )
    assert run(tmp_path / "lr", "--hr", truth) == 0
    with open(tmp_path / "out" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "image",
        "psnr",
        "ssim",
        "psnr_y",
        "ssim_y",
        "psnr_bicubic",
        "ssim_bicubic",
        "psnr_y_bicubic",
        "ssim_y_bicubic",
        "lr_psnr",
        "how",
    ]
    digest = hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()[:8]
    assert rows[0]["how"].startswith(f"tiny_x4.pth {digest}; strength 1; torch.")
    assert rows[2]["how"].endswith("; bicubic; damage none")
    assert [row["image"] for row in rows] == ["sub/drawn00", "sub/drawn01", "sub/drawn02"]
    y = np.array([65.481, 128.553, 24.966]) / 255
    for row in rows:
        hr = np.array(Image.open(truth / f"{row['image']}.png"))
        small = Image.open(tmp_path / "lr" / f"{row['image']}.bmp")
        pictures = {
            "": Image.open(tmp_path / "out" / f"{row['image']}.png"),
            "_bicubic": small.resize((128, 128), Image.Resampling.BICUBIC),
        }
        for suffix, picture in pictures.items():
            sr, tolerance = np.array(picture), 1e-4 if suffix == "" else 0.01
            assert float(row["psnr" + suffix]) == pytest.approx(
                peak_signal_noise_ratio(hr, sr), abs=tolerance
            )
            assert float(row["ssim" + suffix]) == pytest.approx(
                structural_similarity(hr, sr, channel_axis=2), abs=tolerance
            )
            assert float(row["psnr_y" + suffix]) == pytest.approx(
                peak_signal_noise_ratio(hr @ y, sr @ y, data_range=255), abs=tolerance
            )
            assert float(row["ssim_y" + suffix]) == pytest.approx(
                structural_similarity(hr @ y, sr @ y, data_range=255), abs=tolerance
            )
        again = pictures[""].resize((32, 32), Image.Resampling.BICUBIC)
        assert float(row["lr_psnr"]) == pytest.approx(
            peak_signal_noise_ratio(np.array(small), np.array(again)), abs=0.2
        )


def test_lr_psnr_reduces_as_the_input_was_reduced(run, tmp_path, faces):
    """A result that keeps to the LR it was given gets a high score, whichever way that was made."""
    (face,) = list(find_images(faces))[:1]
    assert run(face, "--simulate", "--kernel", "cv2-linear") == 0
    with open(tmp_path / "out" / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    lr = cv2.resize(read_image(face)[0], (32, 32))
    again = cv2.resize(read_image(next((tmp_path / "out").glob(f"{face.stem}.png")))[0], (32, 32))
    assert float(row["lr_psnr"]) == pytest.approx(peak_signal_noise_ratio(lr, again), abs=0.2)


def test_simulate_reduces_first(run, tmp_path, faces):
    whole = next(iter(find_images(faces)))
    save(tmp_path / "odd.png", read_image(whole)[0][:127, :101])
    save(tmp_path / "small.png", noise(3, 9))
    assert run(whole, tmp_path / "odd.png", tmp_path / "small.png", "--simulate") == 1
    assert read_image(tmp_path / "out" / "odd.png")[0].shape == (124, 100, 3)
    assert results(tmp_path / "out") == {whole.name, "odd.png"}
    with open(tmp_path / "out" / "metrics.csv", newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [whole.stem, "odd"]


def test_ground_truth_that_does_not_fit_is_named(run, tmp_path, capsys):
    for name in ("fits", "alone", "wrong"):
        save(tmp_path / "lr" / f"{name}.png", noise(8, 8))
    save(tmp_path / "hr" / "fits.jpg", noise(32, 32))
    save(tmp_path / "hr" / "wrong.png", noise(32, 31))
    assert run(tmp_path / "lr", "--hr", tmp_path / "hr") == 1
    printed, errors = capsys.readouterr()
    assert "alone.png" in errors and "31x32" in errors and "hint: 1 of the 2 pictures in" in printed
    assert results(tmp_path / "out") == {"fits.png"}  # what has no truth may be anything: a result with its border cut
    with open(tmp_path / "out" / "metrics.csv", newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == ["fits"]


def test_batches_and_tiles_change_nothing(shipped, monkeypatch, faces):
    """One at a time, together and in tiles: the same picture to one grey level."""
    pictures = [read_image(path)[0][:64, :72] for path in find_images(faces)[:2]]
    whole = upscale(shipped, pictures).astype(int)
    single = np.concatenate([upscale(shipped, [picture]) for picture in pictures])
    monkeypatch.setattr(model, "TILE", 40)
    tiled = upscale(shipped, pictures)
    for other in (single, tiled):
        assert np.abs(whole - other).max() <= 1


def test_large_picture_is_never_whole_in_the_network(tiny_checkpoint):
    generator = load_checkpoint(tiny_checkpoint)[0].for_inference()
    seen = []
    generator.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape[2] * inputs[0].shape[3])
    )
    assert upscale(generator, [noise(400, 1000)]).shape == (1, 1600, 4000, 3)
    assert max(seen) <= (model.TILE + 2 * model.OVERLAP) ** 2 and len(seen) == 8


def test_many_sizes_in_any_order_all_arrive(run, tmp_path):
    for i in range(23):
        save(tmp_path / "in" / f"{i}.png", np.full((4 + i % 3, 4 + i % 2, 3), i * 10, np.uint8))
    assert run(tmp_path / "in", "--batch-size", 4) == 0
    for i in range(23):
        sr = read_image(tmp_path / "out" / f"{i}.png")[0]
        assert sr.shape == (16 + i % 3 * 4, 16 + i % 2 * 4, 3) and abs(sr.mean() - i * 10) < 8


def test_usage_errors_are_one_sentence_and_status_2(run, tmp_path, capsys):
    save(tmp_path / "a.png", noise(8, 8))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("no checkpoint")
    calls = [
        (tmp_path / "empty",),
        (tmp_path / "absent.png",),
        (tmp_path / "a.png", "--device", "cuda:99"),
        (tmp_path / "a.png", "--device", "toaster"),
        (tmp_path / "a.png", "--hr", tmp_path / "absent"),
        (tmp_path / "a.png", "--checkpoint", tmp_path / "text.pth"),
        (tmp_path / "a.png", "--batch-size", 0),
        (tmp_path / "a.png", "--batch-size", "9" * 40),
        (tmp_path / "a.png", "--seed", "9" * 40),
        (tmp_path / "a.png", "--strength", "nan"),
        (tmp_path / "a.png", "--strength", 1.5),
        (tmp_path / "a.png", "--strength", 0, "--added"),
        (tmp_path / "a.png", "--kernel", "cv2-linear"),
        (tmp_path / "a.png", "--damage", "blur"),
        ("--hr", tmp_path),
    ]
    for call in calls:
        assert inference.run([*map(str, call), "--output", str(tmp_path / "out")]) == 2, call
        assert len(capsys.readouterr().err.strip().splitlines()) == 1, call
        assert not (tmp_path / "out").exists(), call        # told before anything is begun


def test_a_picture_too_large_does_not_harm_the_others(run, tmp_path, capsys, monkeypatch):
    """Before, it ended the run; so did one for which the memory was too small."""
    save(tmp_path / "in" / "a.png", noise(8, 8))
    Image.new("L", (5001, 5001)).save(tmp_path / "in" / "huge.png")
    save(tmp_path / "in" / "z.png", noise(8, 8))
    assert run(tmp_path / "in") == 1
    error = capsys.readouterr().err
    assert "huge.png: 5001x5001 pixels" in error and "--photo" in error and len(error.strip().splitlines()) == 1
    assert results(tmp_path / "out") == {"a.png", "z.png"}

    def full(path):
        if path.name == "a.png":
            raise MemoryError
        return read_image(path)

    monkeypatch.setattr(inference, "read_image", full)
    assert run(tmp_path / "in", output=tmp_path / "again") == 1
    assert "a.png: not enough memory" in capsys.readouterr().err
    assert results(tmp_path / "again") == {"z.png"}


def test_every_link_of_the_documents_leads_somewhere():
    """To a file of the repository and, where it names one, to a heading."""
    links = 0
    for document in (ROOT / "README.md", *sorted((ROOT / "checkpoints").glob("*.md"))):
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", document.read_text()):
            name, _, anchor = link.partition("#")
            target = document.parent / name if name else document
            assert target.is_file(), f"{document}: {link}"
            headings = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                        for heading in re.findall(r"^#+ (.+)$", target.read_text(), re.M)] if anchor else [""]
            assert anchor in headings, f"{document}: {link}"
            links += 1
    assert links > 20


def test_a_large_picture_is_taken_for_a_photograph_unless_told(run, tmp_path, capsys):
    """And the good one beside it is still enlarged."""
    save(tmp_path / "in" / "large.png", Image.new("RGB", (1100, 1000)))
    save(tmp_path / "in" / "face.png", noise(9, 9))
    assert run(tmp_path / "in") == 1
    said = capsys.readouterr()
    assert "large.png: 1100x1000 pixels are no single face: --photo" in said.err and "Traceback" not in said.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"face.png", "comparison.png"}


def test_memory_for_a_large_picture(tiny_checkpoint, tmp_path):
    """Beyond what the libraries take, at most 0.3 GB and 8 bytes for a pixel of the result; before, 16 and more."""
    Image.linear_gradient("L").resize((1100, 1100)).convert("RGB").save(tmp_path / "large.jpg")
    code = (f"import sys, resource; sys.path.insert(0, {str(ROOT)!r}); import inference\n"
            "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = most()\n"
            f"status = inference.run(['large.jpg', '--as-is', '--checkpoint', {str(tiny_checkpoint)!r}, '--device', 'cpu'])\n"
            "print(status, most() - before)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    status, most = map(int, done.stdout.split()[-2:])
    assert status == 0 and most * 1024 < 0.3e9 + 8 * 4400**2, most
    assert read_image_size(tmp_path / "results" / "large.png") == (4400, 4400)


def read_image_size(path):
    """Of a picture too large for Pillow's patience."""
    return tuple(int.from_bytes(path.read_bytes()[16 + 4 * i:20 + 4 * i], "big") for i in range(2))


def test_names_that_are_not_utf8(run, tmp_path, monkeypatch):
    """In the table and the figure, and on a screen that knows Latin-1 only."""
    save(tmp_path / "in" / "b.png", noise(32, 32))
    os.rename(tmp_path / "in" / "b.png", os.fsencode(tmp_path) + b"/in/b\xff\xe9.png")
    save(tmp_path / "in" / "顔.png", noise(32, 32))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    assert run(tmp_path / "in", "--simulate") == 0
    sys.stdout.flush()
    assert rb"b\ufffd\ufffd has 32 pixels; " in sys.stdout.buffer.getvalue()
    assert os.path.exists(os.fsencode(tmp_path) + b"/out/b\xff\xe9.png")
    names = [line.split(",")[0] for line in (tmp_path / "out" / "metrics.csv").read_text("utf-8").splitlines()[1:]]
    assert sorted(names) == ["b\ufffd\ufffd", "顔"] and (tmp_path / "out" / "comparison.png").exists()


def test_damaged_ground_truth_costs_its_picture_alone(run, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        save(tmp_path / "lr" / name, noise(8, 8))
        save(tmp_path / "hr" / name, noise(32, 32))
    (tmp_path / "hr" / "a.png").write_bytes((tmp_path / "hr" / "a.png").read_bytes()[:200])
    assert run(tmp_path / "lr", "--hr", tmp_path / "hr") == 1
    said = capsys.readouterr()
    assert "lr/a.png" in said.err and "hr/a.png: cannot be read" in said.err and len(said.err.splitlines()) == 1
    assert results(tmp_path / "out") == {"b.png"} and "1 of the 2 pictures" in said.out


def test_nothing_done_is_status_2_and_names_no_figure(run, tmp_path, capsys):
    (tmp_path / "a.png").write_text("hello")
    assert run(tmp_path / "a.png") == 2
    assert "compare" not in capsys.readouterr().out and not (tmp_path / "out" / "comparison.png").exists()


def test_a_figure_that_cannot_be_written_hides_no_summary(run, tmp_path, capsys, monkeypatch):
    save(tmp_path / "a.png", noise(8, 8))

    def full(path, rows, note):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(inference, "plot_comparison", full)
    assert run(tmp_path / "a.png") == 1
    output = capsys.readouterr()
    assert "1 picture upscaled" in output.out and "compare" not in output.out
    assert output.err.strip().endswith("comparison.png: cannot be written (No space left on device)")


def test_output_that_cannot_be_written_is_named(run, tmp_path, capsys):
    save(tmp_path / "in" / "sub" / "a.png", noise(8, 8))
    save(tmp_path / "in" / "b.png", noise(8, 8))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").write_text("a file where a folder is needed")
    assert run(tmp_path / "in") == 1
    assert "sub" in capsys.readouterr().err
    assert results(tmp_path / "out") == {"b.png", "sub"}


def test_the_script_itself_from_another_folder(tmp_path):
    """A real process, from elsewhere: exit status, no traceback, nothing but one sentence."""
    save(tmp_path / "a.png", noise(8, 8))
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    done = subprocess.run(
        [sys.executable, ROOT / "inference.py", "a.png", "b.png", "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and (tmp_path / "results" / "a.png").exists()
    assert "b.png" in done.stderr and "Traceback" not in done.stderr
