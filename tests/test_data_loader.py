import errno
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import data_loader
from data_loader import (
    DAMAGES,
    KERNELS,
    DataError,
    FaceBatches,
    degrade,
    downscale,
    find_images,
    is_result,
    jpeg,
    load_faces,
    printable,
    read_image,
    simulate,
    split_files,
    to_tensor,
    to_uint8,
)
from train import Prefetch, draw_faces, place_faces


def write(path, picture, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **options)


def gradient(height=128, width=128):
    """A smooth picture whose channels differ, so that mixed-up colours or axes show."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / width, y * 255 / height, 255 - x * 128 / width], -1).astype(np.uint8)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [(128, 128), (64, 100)])
def test_downscale_agrees_with_the_libraries(kernel, size, faces):
    pictures = [read_image(path)[0][: size[0], : size[1]] for path in find_images(faces)[:4]]
    pictures += [np.random.default_rng(i).integers(0, 2, (*size, 3), dtype=np.uint8) * 255 for i in range(2)]
    ours = to_uint8(downscale(to_tensor(pictures), 4, kernel))
    for picture, mine in zip(pictures, ours):
        small = (size[1] // 4, size[0] // 4)
        theirs = (
            cv2.resize(picture, small, interpolation=KERNELS[kernel][0])
            if kernel.startswith("cv2-")
            else np.array(Image.fromarray(picture).resize(small, KERNELS[kernel][0]))
        )
        assert np.abs(mine.astype(int) - theirs).max() <= 1


def test_downscale_is_quantised_and_antialiased():
    lr = downscale(torch.rand(1, 3, 32, 32), 4)
    torch.testing.assert_close(lr * 255, (lr * 255).round())
    checkers = np.indices((32, 32)).sum(0) % 2
    checkers = torch.tensor(checkers, dtype=torch.float32).expand(1, 3, -1, -1)
    assert (downscale(checkers, 4) - 0.5).abs().max() < 0.05


def test_ffhq_tree_gets_its_official_split(tmp_path, capsys):
    """And the faces that the scores come from are left out of it, and elsewhere, with a warning."""
    for number in (0, 3, 999, 1000, 1098, 59999, 60000, 69999):
        write(
            tmp_path / "thumbnails128x128" / f"{number // 1000:02d}000" / f"{number:05d}.png", gradient(8, 8)
        )
    train, val = split_files([tmp_path])
    assert [path.stem for path in train] == ["00000", "00999", "01000", "59999"]
    assert [path.stem for path in val] == ["60000", "69999"] and not capsys.readouterr().err
    tested = data_loader.TESTED.read_text().split()
    (tmp_path / "test").mkdir()
    for name in ("new", *tested[:20]):
        (tmp_path / "test" / f"{name}.png").touch()
    for folder in ([tmp_path / "thumbnails128x128"], tmp_path / "test"), ([tmp_path], None):
        assert not {path.stem for files in split_files(*folder) for path in files} & set(tested)
        assert ": 20 called as in ffhq_test.txt" in capsys.readouterr().err
    (tmp_path / "00003").mkdir()
    for name in ("img00003000", f"img000{tested[0]}"):      # StyleGAN's tree
        (tmp_path / "00003" / f"{name}.png").touch()
    assert [path.stem for path in split_files([tmp_path / "00003"], tmp_path / "thumbnails128x128")[0]] == ["img00003000"]
    assert ": 1 called as in ffhq_test.txt" in capsys.readouterr().err
    (tmp_path / "test" / "new.png").unlink()
    with pytest.raises(DataError, match="test: no pictures but test faces found"):
        split_files([tmp_path / "thumbnails128x128"], tmp_path / "test")


@pytest.mark.parametrize("first", [0, 60000])
def test_a_part_of_ffhq_without_one_half_of_its_split_is_split_by_name(tmp_path, first):
    """Else all of it, but for one face, would train."""
    for number in range(first, first + 200):
        write(tmp_path / f"{number // 1000:02d}000" / f"{number:05d}.png", gradient(8, 8))
    train, val = split_files([tmp_path])
    assert 4 <= len(val) <= 20 and len(train) > 140


def test_pictures_too_small_to_train_on_are_counted(tmp_path, capsys):
    for name, size in ("a", 40), ("b", 128), ("c", 127):
        write(tmp_path / f"{name}.png", gradient(size, 200))
    assert len(load_faces(sorted(tmp_path.iterdir()))) == 3
    assert "2 pictures are smaller than 128x128" in capsys.readouterr().err


def test_other_folders_split_by_name_for_good(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for i in range(60):
        write((a if i % 2 else b) / f"face{i}.png", gradient(4, 4))
    train, val = split_files([a, b, a])
    assert len(train) + len(val) == 60 and 1 <= len(val) <= 10
    assert not {path.name for path in train} & {path.name for path in val}
    assert (train, val) == split_files([a, b])
    for i in range(60, 90):
        write(a / f"face{i}.png", gradient(4, 4))
    more_train, more_val = split_files([a, b])
    assert set(train) <= set(more_train) and set(val) <= set(more_val)


def test_validation_folder_never_trains(tmp_path):
    for i in range(4):
        write(tmp_path / "all" / ("held" if i < 2 else "rest") / f"{i}.png", gradient(4, 4))
    (tmp_path / "link").symlink_to(tmp_path / "all" / "held")
    train, val = split_files([tmp_path / "all"], tmp_path / "link")
    assert [path.name for path in train] == ["2.png", "3.png"]
    assert [path.name for path in val] == ["0.png", "1.png"]


def test_useless_folders_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    write(tmp_path / "one" / "face.png", gradient())
    for folders, val in [
        ([tmp_path / "absent"], None),
        ([tmp_path / "one"], None),
        ([tmp_path / "one"], tmp_path / "one"),
        ([tmp_path / "one"], tmp_path / "absent"),
    ]:
        with pytest.raises(DataError) as error:
            split_files(folders, val)
        assert str(tmp_path) in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures found"):
        split_files([tmp_path / "empty"])


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "tif", "TIFF"])
def test_every_format_loads_with_its_colours(tmp_path, suffix):
    write(
        tmp_path / f"face.{suffix}",
        gradient(),
        **({"quality": 95} if suffix in ("jpg", "jpeg", "webp") else {}),
    )
    faces = load_faces(find_images(tmp_path), progress=False)
    assert faces.shape == (1, 3, 128, 128) and faces.dtype == torch.uint8
    assert np.abs(faces[0].permute(1, 2, 0).numpy().astype(int) - gradient()).mean() < 3


def test_any_size_becomes_the_centre_square_of_128(tmp_path):
    picture = np.zeros((256, 512, 3), np.uint8)
    picture[:, 128:384] = (np.indices((256, 256)).sum(0) % 2 * 255)[..., None]  # gray, antialiased
    picture[:, :128] = picture[:, 384:] = (255, 0, 0)  # outside of the square
    write(tmp_path / "wide.png", picture)
    face = load_faces([tmp_path / "wide.png"], progress=False)[0].float()
    assert face.shape == (3, 128, 128)
    assert (face[:, 3:-3, 3:-3] - 127).abs().max() < 12


def test_damaged_file_is_named_once_and_left_out(tmp_path, faces, capsys):
    draw_faces(tmp_path, 3)
    whole = (tmp_path / "drawn01.png").read_bytes()
    (tmp_path / "drawn01.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    loaded = load_faces(find_images(tmp_path), progress=False)
    errors = capsys.readouterr().err
    assert len(loaded) == 2
    last = torch.from_numpy(read_image(tmp_path / "drawn02.png")[0]).permute(2, 0, 1)
    assert torch.equal(loaded[1], last)     # no gap where the damaged one was
    assert errors.count("drawn01.png") == 1 and errors.count("text.png") == 1
    with pytest.raises(DataError):
        load_faces([tmp_path / "text.png"], progress=False)


def test_no_other_program_and_no_other_format_is_started(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: pytest.fail("another program was started"))
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("another program was started"))
    (tmp_path / "face.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    Image.new("RGB", (9, 9)).save(tmp_path / "other.ppm")
    (tmp_path / "other.ppm").rename(tmp_path / "other.png")
    for path in find_images(tmp_path):
        with pytest.raises(DataError, match="not a picture"):
            read_image(path)
        assert not is_result(path)


def test_pillow_never_speaks_itself(tmp_path):
    """What is odd or too large in a picture is our one sentence, or nothing; never a warning of a library."""
    nan = np.full((9, 9), np.nan, np.float32)
    nan[0, 0] = 1
    Image.fromarray(nan).save(tmp_path / "nan.tif")
    Image.new("L", (950, 949)).save(tmp_path / "large.png")
    Image.new("L", (940, 950)).save(tmp_path / "warned.png")
    write(tmp_path / "exif.jpg", gradient(20, 30), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    code = (f"import sys; sys.path.insert(0, {str(Path(data_loader.__file__).parent)!r}); import data_loader as d\n"
            "d.PIXELS, d.Image.MAX_IMAGE_PIXELS = 900_000, 890_000       # a hundredth of what they are\n"
            "for path in d.find_images('.'):\n    try: print(path, d.is_result(path), d.read_image(path)[0][0, 0])\n"
            "    except d.DataError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == "" and done.returncode == 0
    exif, large, nan, warned = done.stdout.splitlines()
    assert exif.startswith("exif.jpg False [") and large == "large.png: larger than 900,000 pixels"
    assert nan == "nan.tif False [255 255 255]" and warned == "warned.png False [0 0 0]"


def test_names_that_are_not_utf8_or_as_long_as_can_be(tmp_path, monkeypatch):
    draw_faces(tmp_path, 2)
    odd, long = os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.png"), tmp_path / f"{'n' * 251}.png"
    os.rename(tmp_path / "drawn00.png", odd)
    (tmp_path / "drawn01.png").rename(long)
    train_files, val_files = split_files([tmp_path])
    assert len(load_faces(train_files + val_files, progress=False)) == 2
    assert printable(Path(odd).name) == "b\ufffd.png" and printable("=1+1.png") == "./=1+1.png"
    data_loader.write_picture(long, gradient(9, 9))
    assert is_result(long)
    monkeypatch.setattr(data_loader, "PIXELS", 80)      # what is too large to be read
    assert is_result(long)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    draw_faces(tmp_path, 1)
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert [path.name for path in find_images(tmp_path)] == ["drawn00.png"]
    assert "secret: Permission denied" in capsys.readouterr().err


def test_read_image_understands_every_sort(tmp_path):
    picture = gradient(20, 30)
    gray = picture[..., 0]
    rotation = Image.Exif()
    rotation[0x0112] = 6
    palette = Image.fromarray(picture).quantize(256)
    cases = {
        "gray.png": (Image.fromarray(gray), {}, np.repeat(gray[..., None], 3, 2), None),
        "rgba.png": (Image.fromarray(np.dstack([picture, gray])), {}, picture, gray),
        "la.png": (
            Image.merge("LA", [Image.fromarray(gray)] * 2),
            {},
            np.repeat(gray[..., None], 3, 2),
            gray,
        ),
        "palette.png": (palette, {}, np.array(palette.convert("RGB")), None),
        "gray16.png": (
            Image.fromarray(gray.astype(np.uint16) * 257),
            {},
            np.repeat(gray[..., None], 3, 2),
            None,
        ),
        "float.tif": (
            Image.fromarray(gray.astype(np.float32) / 255),
            {},
            np.repeat(gray[..., None], 3, 2),
            None,
        ),
        "one bit.png": (
            Image.fromarray(gray > 99),
            {},
            np.repeat((gray > 99)[..., None] * np.uint8(255), 3, 2),
            None,
        ),
        "rotated.png": (Image.fromarray(picture), {"exif": rotation}, np.rot90(picture, -1), None),
        "cmyk.jpg": (Image.fromarray(picture).convert("CMYK"), {"quality": 100}, picture, None),
        "ünï 顔.webp": (Image.fromarray(picture), {"lossless": True}, picture, None),
        "moving.gif": (
            palette,
            {"save_all": True, "append_images": [palette.rotate(180)]},
            np.array(palette.convert("RGB")),
            None,
        ),
    }
    for name, (image, options, expected, expected_alpha) in cases.items():
        image.save(tmp_path / name, **options)
        rgb, alpha = read_image(tmp_path / name)
        assert rgb.dtype == np.uint8 and rgb.shape == expected.shape, name
        assert np.abs(rgb.astype(int) - expected).max() <= (8 if name == "cmyk.jpg" else 0), name
        assert (alpha is None) if expected_alpha is None else np.array_equal(alpha, expected_alpha), name


def test_batches_are_a_function_of_the_step(faces):
    bytes_ = load_faces(find_images(faces), progress=False)
    one, two = (FaceBatches(bytes_, batch_size=6, patch_size=32) for _ in range(2))
    for step in (3, 0, 7, 3):
        for a, b in zip(one(step), two(step)):
            assert torch.equal(a, b)
    lr, hr = one(3)
    assert lr.shape == (6, 3, 8, 8) and hr.shape == (6, 3, 32, 32)
    assert not torch.equal(hr, one(4)[1])
    assert not torch.equal(hr, FaceBatches(bytes_, 6, 32, seed=1)(3)[1])
    for batch in (lr, hr):
        assert 0 <= batch.min() and batch.max() <= 1
        torch.testing.assert_close(batch * 255, (batch * 255).round())


def test_processes_share_a_batch_without_overlap(faces):
    bytes_ = load_faces(find_images(faces), progress=False)
    for step in range(10):      # as many as it takes to meet every kind of damage
        whole = FaceBatches(bytes_, 6, 32)(step)
        parts = [FaceBatches(bytes_, 6, 32, rank=rank, world=2)(step) for rank in range(2)]
        for i in range(2):
            assert torch.equal(torch.stack([parts[0][i], parts[1][i]], 1).flatten(0, 1), whole[i])


def test_batches_made_ahead_are_the_batches(faces):
    bytes_ = load_faces(find_images(faces), progress=False)
    plain, ahead = FaceBatches(bytes_, 6, 32), Prefetch(FaceBatches(bytes_, 6, 32))
    for step in (0, 1, 2, 7, 3):        # a jump is what --resume makes
        for a, b in zip(ahead(step), plain(step)):
            assert torch.equal(a, b) and a.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def no_gpu(monkeypatch):
    """Tensors that have a device and a shape and nothing else, so that CUDA need not be there."""
    def pin_memory(tensor):
        assert tensor.device.type == "cpu"      # torch refuses to pin what is on a GPU
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    tables = data_loader._resize_matrix, data_loader._crop_table
    for table in tables:
        table.cache_clear()
    with FakeTensorMode():
        yield torch.device("cuda", 0)
    for table in tables:
        table.cache_clear()


@pytest.mark.parametrize("kept", ["cuda:0", "cpu"])
def test_batches_on_a_gpu_that_is_not_there(no_gpu, kept):
    """Of faces that lie there, and of faces that did not fit and are sent."""
    faces = torch.zeros(20, 3, 128, 128, dtype=torch.uint8, device=kept)
    lr, hr = FaceBatches(faces, 16, 32, degradation="bicubic", device=no_gpu)(0)
    assert lr.device == hr.device == no_gpu and lr.shape == (16, 3, 8, 8)


def test_faces_that_would_fill_the_gpu_stay_on_the_cpu(monkeypatch):
    faces, cuda = torch.zeros(10, 3, 128, 128, dtype=torch.uint8), torch.device("cuda")
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (faces.nbytes, 2 * faces.nbytes))
    assert place_faces(faces, cuda) is faces
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * faces.nbytes, 3 * faces.nbytes))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, target: ("moved to", target))
    assert place_faces(faces, cuda) == ("moved to", cuda)
    assert len(emptied) == 2    # what an earlier stage has left is free


def test_crops_are_pillows_of_the_mirrored_face():
    face = gradient()
    face[40:60, 70:90] = 255 - face[40:60, 70:90]
    crops, first, number = data_loader._crop_table((96, 160), 96, torch.device("cpu"))
    assert list(number) == [33, 33] and len(crops) == 66
    levels = to_tensor([face]) * 255
    cut = data_loader._resample(levels, crops[first[0] + 5], crops[first[0] + 20], True)
    assert np.array_equal(cut[0].permute(1, 2, 0).numpy(), face[20:116, 5:101])
    wide = data_loader._resample(levels, crops[first[1] + 3], crops[first[1] + 32], True)
    mirrored = np.pad(face, ((0, 32), (29, 3), (0, 0)), mode="reflect")
    pillow = np.array(Image.fromarray(mirrored).resize((96, 96), Image.Resampling.BICUBIC))
    assert np.abs(wide[0].permute(1, 2, 0).numpy() - pillow).max() <= 1


def test_turning_is_opencvs():
    face = cv2.GaussianBlur(gradient(), (0, 0), 2)
    turned = data_loader.turn(to_tensor([face, face]) * 255, np.array([0.0, 25.0])).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(turned[0], face)
    matrix = cv2.getRotationMatrix2D((63.5, 63.5), -25, 1)      # OpenCV's angles are counter-clockwise
    theirs = cv2.warpAffine(face, matrix, (128, 128), flags=cv2.INTER_CUBIC)
    assert np.abs(turned[1] - theirs)[40:88, 40:88].max() <= 2


def test_blurs_are_opencvs():
    picture = gradient()
    picture[40:60, 40:60] = 255 - picture[40:60, 40:60]
    for sigma in (0.4, 1.0, 1.6):
        matrix = data_loader._blur_matrix(128, sigma)
        ours = data_loader._resample(to_tensor([picture]) * 255, matrix, matrix, False)
        theirs = cv2.GaussianBlur(picture, (0, 0), sigma)
        assert np.abs(ours[0].permute(1, 2, 0).numpy() - theirs).max() <= 1
        assert np.abs(theirs.astype(int) - picture).max() > 1


def test_every_face_is_seen_once_an_epoch_whole_patches_both_ways(faces):
    marked = torch.zeros(8, 3, 128, 128, dtype=torch.uint8)
    marked[..., 64:] = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1) * 20 + 60  # bright right half
    batches = FaceBatches(marked, batch_size=4, patch_size=128, degradation="bicubic")
    orders = []
    for epoch in range(6):
        hr = torch.cat([batches(2 * epoch)[1], batches(2 * epoch + 1)[1]])
        orders.append(hr.amax((1, 2, 3)))
        assert len(set(orders[-1].tolist())) == 8
        flipped = hr[..., 0].mean((1, 2)) > hr[..., -1].mean((1, 2))
        assert 0 < flipped.sum() < 8
    assert not torch.equal(orders[0], orders[1])


def test_patches_move_and_zoom_and_pair_up(faces):
    ramp = torch.from_numpy(gradient()).permute(2, 0, 1)[None].repeat(16, 1, 1, 1)
    for degradation in ("bicubic", "mixed"):
        lr, hr = FaceBatches(ramp, 16, 64, degradation=degradation)(0)
        left, right = hr[:, 0, :, 0].mean(1), hr[:, 0, :, -1].mean(1)
        assert torch.minimum(left, right).std() > 0.02  # different places
        sizes = (left - right).abs().max() / (left - right).abs().min()
        assert sizes > 1.2 if degradation == "mixed" else sizes < 1.05 and torch.equal(lr, downscale(hr, 4))


def test_some_patches_are_soft_in_both_so_that_nothing_is_drawn_on_backgrounds(monkeypatch):
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 128, 128), dtype=np.uint8))

    def roughness(soft):
        monkeypatch.setattr(data_loader, "SOFTENED", soft)
        return FaceBatches(noise, 8, 64)(0)[1].diff(dim=-1).abs().mean((1, 2, 3))

    never, always, sometimes = map(roughness, (0, 1, 0.5))
    assert (always < 0.1 * never).all()
    assert {"soft" if torch.equal(a, b) else "sharp" if torch.equal(a, c) else "neither"
            for a, b, c in zip(sometimes, always, never)} == {"soft", "sharp"}


def test_mixed_degradation_draws_many_kinds_and_stays_aligned():
    picture = to_tensor([gradient()]).repeat(200, 1, 1, 1)
    lr = degrade(picture, 4, np.random.default_rng(0))
    torch.testing.assert_close(lr * 255, (lr * 255).round())
    assert len({sample.numpy().tobytes() for sample in lr}) > 20
    # None of them moves the picture or shifts its colours.
    assert (lr - downscale(picture, 4)).mean((2, 3)).abs().max() < 0.02
    assert torch.equal(degrade(picture, 4, np.random.default_rng(0)), lr)


def test_simulated_damages_differ_and_stay_aligned():
    picture = gradient(130, 129)
    picture[40:60, 40:60] = 255 - picture[40:60, 40:60]
    results = {damage: simulate(picture, 4, damage=damage) for damage in DAMAGES}
    for damage, (lr, hr) in results.items():
        assert lr.shape == (32, 32, 3) and np.array_equal(hr, picture[:128, :128]) == (damage != "wild")
        clean = simulate(hr, 4)[0]
        assert np.abs(lr.astype(int) - clean).mean() < 8
        assert np.abs(lr.astype(int) - clean).max() > 5 or damage == "none"
        assert np.array_equal(simulate(picture, 4, damage=damage)[0], lr)
    assert np.array_equal(results["none"][0], to_uint8(downscale(to_tensor([picture[:128, :128]]), 4))[0])
    errors = {damage: np.abs(lr.astype(int) - results["none"][0]).mean() for damage, (lr, _) in results.items()}
    assert errors["jpeg50"] > errors["jpeg75"] > 0.3


def test_jpeg_is_pillows(tmp_path):
    picture = np.kron(np.random.default_rng(0).integers(0, 256, (8, 8, 3)), np.ones((6, 6, 1)))
    picture = picture.astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=50)
    theirs = np.array(Image.open(tmp_path / "a.jpg"))
    assert np.abs(jpeg(picture, 50).astype(int) - theirs).mean() < 1.5
    assert np.abs(theirs.astype(int) - picture).mean() > 4
