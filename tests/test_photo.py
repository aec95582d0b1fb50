"""Faces in photographs that the tests compose: found where they are, restored where that helps, left alone where not."""

import csv
import functools
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import matplotlib.cbook
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import data_loader
import inference
import loss
import model
from data_loader import DataError, find_faces, read_image, rescale, resize, working_size
from inference import CHECKPOINT, Picture, restore_photos
from loss import FACES, aimed, pointed, psnr
from model import CLEAR, Found, add_grain, blockiness, load_checkpoint, upscale

GRAY = 110


@pytest.fixture(scope="module")
def portraits():
    """Two public-domain portraits, square, 380 pixels, and where their FFHQ frames lie: (picture, x, y, side)."""
    hopper = read_image(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))[0]
    return {"hopper": (resize(hopper[6:406, 68:468], 400), 199, 200, 323),
            "astronaut": (skimage.data.astronaut()[:228, 110:338], 113, 108, 174)}


@pytest.fixture(scope="module", autouse=True)
def threads():
    """The shipped networks are large enough to gain by all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def generator():
    return load_checkpoint(CHECKPOINT)[0].for_inference()


def compose(portraits, places, width=360, height=240):
    """Lay portraits on gray: `places` are (name, side of the frame, quarter turns clockwise, left, top). Returns the
    photograph and the true (x, y, side, angle) of each frame."""
    photo, truth = np.full((height, width, 3), GRAY, np.uint8), []
    for name, side, turns, left, top in places:
        picture, x, y, frame = portraits[name]
        factor = side / frame
        picture = np.rot90(resize(picture, round(len(picture) * factor)), -turns)
        size = len(picture)
        for _ in range(turns):
            x, y = len(portraits[name][0]) - y, x
        photo[top:top + size, left:left + size] = picture[:height - top, :width - left]
        truth.append((left + x * factor, top + y * factor, side, 90 * turns))
    return photo, truth


class Only(model.Networks):
    """A generator for all faces, and others by (strength, scale)."""

    def __init__(self, generator, others={}):
        self.files, self.has_knob = dict.fromkeys((4, *(scale for _, scale in others))), (0.5, 4) in others
        self.load = lambda strength, scale: {(1, 4): generator, **others}[strength, scale]
        self.tell = lambda text: None


@functools.lru_cache
def faces_of(pixels, shape):
    return find_faces(np.frombuffer(pixels, np.uint8).reshape(shape))


def restore(generator, photo, others={}, marked=(), **options):
    """The faces of a photograph that a test restores more than once are looked for once: that takes the longest."""
    picture = Picture("photo", None, photo, marked=marked, found=Found(list(faces_of(photo.tobytes(), photo.shape))))
    [(_, sr)] = restore_photos(Only(generator, others), [picture], 16, **options)
    return sr, picture.patches


def test_faces_are_found_in_every_turn_and_size(portraits):
    """Upright and turned, large and small, touching each other and the border: to a tenth of the frame's side, and in
    the order in which one reads, though faces of a row are not quite level."""
    photo, truth = compose(portraits, [
        ("hopper", 40, 0, 0, 0), ("astronaut", 36, 1, 50, 0), ("hopper", 48, 2, 95, 10), ("astronaut", 60, 3, 160, 0),
        ("hopper", 110, 0, 225, 0), ("astronaut", 60, 0, 0, 165), ("hopper", 60, 0, 76, 165)])
    faces = find_faces(photo)
    assert len(faces) == len(truth)
    for face, (x, y, side, angle) in zip(faces, truth):
        assert np.hypot(face.x - x, face.y - y) < 0.1 * side and abs(face.size - side) < 0.1 * side
        assert abs((face.angle - angle + 180) % 360 - 180) < 15
        assert face.score > 0.8


def test_tilted_heads_are_found_as_they_are_tilted(portraits):
    """Between the quarters too, where at first sight the detector takes them for more upright, or misses them."""
    for name, side in (("hopper", 40), ("astronaut", 32), ("hopper", 120)):
        picture, x, y, frame = portraits[name]
        zoom = 2 * side / frame
        picture = resize(picture, round(len(picture) * zoom))
        for angle in (35, -35, 50):
            matrix = cv2.getRotationMatrix2D((x * zoom, y * zoom), -angle, 0.5)
            matrix[:, 2] += 150 - x * zoom, 100 - y * zoom
            [face] = find_faces(cv2.warpAffine(picture, matrix, (300, 200), borderMode=cv2.BORDER_REPLICATE))
            assert abs(face.angle - angle) < 20
            assert np.hypot(face.x - 150, face.y - 100) < 0.12 * side and abs(face.size - side) < 0.25 * side


def test_a_close_up_is_not_taken_upside_down(portraits):
    """The detector sees a head that fills the picture in every turn."""
    for name, small, large in (("astronaut", 40, 128), ("hopper", 40, 160), ("hopper", 64, 200)):
        picture, x, y, side = portraits[name]
        face = picture[y - side // 2:y + side // 2, x - side // 2:x + side // 2]
        face = resize(resize(face, small), large)
        for turns in (0, 1):
            [found] = find_faces(np.ascontiguousarray(np.rot90(face, -turns)))
            assert abs(found.angle - 90 * turns) < 20


def test_no_faces_where_there_are_none(tmp_path, monkeypatch):
    assert find_faces(skimage.data.coffee()) == [] == find_faces(np.full((40, 3000, 3), GRAY, np.uint8))
    monkeypatch.setattr(data_loader, "DETECTOR", tmp_path / "absent.onnx")
    with pytest.raises(DataError, match="absent.onnx"):
        find_faces(skimage.data.coffee())


def test_working_size_is_what_the_pixels_hold(portraits):
    """Whatever grain lies upon it; which does not make a sharp one blurred."""
    rng = np.random.default_rng(0)

    def grainy(picture, level):
        return (picture + rng.normal(0, level, (*picture.shape[:2], 1))).round().clip(0, 255).astype(np.uint8)

    for picture, x, y, side in portraits.values():
        face = picture[y - side // 2:y + side // 2, x - side // 2:x + side // 2]
        for size in (40, 64, 96, 128):
            assert working_size(resize(face, size)) > 0.6 * size
            assert working_size(grainy(resize(face, size), 6)) > 0.6 * size
        for small, large in ((32, 64), (32, 128), (40, 128), (32, 300)):
            blurred = data_loader.jpeg(resize(resize(face, small), large), 90)
            assert working_size(blurred) <= small + 4
            assert working_size(data_loader.jpeg(grainy(blurred, 8), 85)) <= small + 16
        for share, least, most in ((0.02, 32, 40), (0.04, 16, 24)):      # of more, the network leaves it blurred
            assert least <= working_size(cv2.GaussianBlur(resize(face, 160), (0, 0), share * 160)) <= most


def test_faces_under_coarse_grain_are_found():
    hopper, astronaut = reversed(loss.sample_faces().values())
    photo = cv2.GaussianBlur(cv2.resize(hopper, (240, 128)), (0, 0), 6)
    photo[26:106, 20:100], photo[26:106, 132:212] = resize(astronaut, 80), resize(hopper, 80)
    grain = cv2.GaussianBlur(np.random.default_rng(2).standard_normal((128, 240, 1)).astype(np.float32), (0, 0), 1)
    gray = photo.mean(2) * 0.7 + 40 + 20 * grain / grain.std()
    faces = find_faces(np.repeat(gray.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2))
    assert [abs(face.x - x) < 16 for face, x in zip(faces, (60, 172), strict=True)] == [True, True]


def test_of_a_face_that_grain_hides_less_shows(portraits):
    """Coarse grain, as films have: it would be taken for cracks and stains."""
    for name in ("hopper", "astronaut"):
        face = cv2.GaussianBlur(resize(portraits[name][0], 150), (0, 0), 1.0)
        grain = cv2.GaussianBlur(np.random.default_rng(0).normal(0, 1, (150, 150, 1)), (0, 0), 0.8)[..., None]
        sizes = [working_size((face * 0.5 + 70 + grain / grain.std() * levels).clip(0, 255).astype(np.uint8))
                 for levels in (0, 5, 9)]
        assert sizes[0] >= 46 > 40 >= sizes[1] >= sizes[2] == 32, (name, sizes)


def test_a_restored_face_is_nearer_to_the_truth(portraits, generator):
    """Than bicubic and, where the head lies, than the network on the picture as it lies."""
    large, truth = compose(portraits, [("hopper", 144, 1, 40, 40), ("astronaut", 144, 2, 280, 60)], 520, 280)
    photo = np.array(Image.fromarray(large).resize((130, 70), Image.Resampling.BICUBIC))
    sr, patches = restore(generator, photo)
    assert sr.shape == large.shape and [patch.action for patch in patches] == ["restored"] * 2
    lying = upscale(generator, [photo])[0]
    gains = []
    for x, y, side, _ in truth:
        middle = np.s_[int(y - side / 4):int(y + side / 4), int(x - side / 4):int(x + side / 4)]
        ours, bicubic, plain = (psnr(picture[middle], large[middle]) for picture in (sr, rescale(photo, 4), lying))
        assert ours > bicubic + 0.5
        gains.append(ours - plain)
    assert np.mean(gains) > 0.1


@pytest.mark.parametrize("way", [(4, 0), (3, 3), (3, -3)])
def test_motion_blur_is_measured_along_its_way(portraits, way):
    """Across it everything is sharp still."""
    kernel = np.zeros((9, 9), np.float32)
    cv2.line(kernel, (4 - way[0], 4 - way[1]), (4 + way[0], 4 + way[1]), 1.0)
    for picture, x, y, side in portraits.values():
        face = resize(picture[y - side // 2:y + side // 2, x - side // 2:x + side // 2], 128)
        assert data_loader.motion(face) is None and working_size(face) > 80
        blurred = cv2.filter2D(face, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT)
        angle = data_loader.motion(blurred)
        assert abs((angle - np.degrees(np.arctan2(*way[::-1])) + 90) % 180 - 90) < 10
        assert working_size(blurred) <= 46      # measured both ways: 52 to 112


@pytest.mark.parametrize("dark, bright", [(0, 20), (200, 255)])
def test_a_small_face_on_a_dark_or_bright_ground_is_found(portraits, dark, bright):
    """It is no faded photograph, though nearly all of it has few levels."""
    photo = np.random.default_rng(0).integers(dark, bright, (1000, 1000, 3), dtype=np.uint8)
    picture, x, y, frame = portraits["astronaut"]
    photo[500:579, 500:579] = resize(picture, 79)
    [face] = find_faces(photo)
    assert np.hypot(face.x - 500 - x * 60 / frame, face.y - 500 - y * 60 / frame) < 8
    assert data_loader.contrast(photo) == (0, 1)


def test_a_faded_or_dark_photograph_is_restored_as_if_it_had_its_full_contrast(portraits, generator):
    """Less contrast is no blur, and the networks know full contrast only."""
    photo, _ = compose(portraits, [("hopper", 40, 0, 10, 10), ("astronaut", 60, 0, 70, 10)], 160, 110)
    full = restore(generator, photo)[0]
    for gain, offset in ((0.2, 10), (0.45, 100)):
        sr, patches = restore(generator, np.rint(photo * gain + offset).astype(np.uint8))
        assert [patch.action for patch in patches] == ["restored"] * 2
        assert not any(patch.blurred for patch in patches)
        assert psnr(sr, full * gain + offset) > 50      # given to the network as it is: 41 and 43


def test_a_blurred_face_is_restored_and_a_sharp_one_left_alone(portraits, generator):
    """Also beside each other: what is sharp comes back as bicubic gives it, at 1x pixel for pixel, if nothing blurred
    is near."""
    photo, _ = compose(portraits, [("hopper", 110, 0, 10, 40), ("astronaut", 110, 0, 190, 40)])
    sr, patches = restore(generator, photo, factor=4)
    assert [patch.action for patch in patches] == ["sharp"] * 2 and np.array_equal(sr, rescale(photo, 4))
    change = np.abs(restore(generator, photo, factor=4, background="network")[0].astype(int) - sr)
    for patch in patches:       # what goes around a face does not paint over it
        margin = patch.side // 5
        place = change[4 * patch.top:, 4 * patch.left:][:4 * patch.side, :4 * patch.side]
        assert place[4 * margin:-4 * margin, 4 * margin:-4 * margin].max() <= 1
    assert change.max() > 20
    photo[:, 180:] = cv2.GaussianBlur(photo[:, 180:], (0, 0), 3)
    sr, patches = restore(generator, photo, factor=1)
    assert [patch.action for patch in patches] == ["sharp", "restored"]
    place = np.s_[80:130, 50:105]
    assert np.array_equal(sr[place], photo[place]) and np.abs(sr.astype(int) - photo)[:, :180].max() < 16
    eyes = np.s_[70:110, 220:280]
    detail = [cv2.Laplacian(picture[eyes], cv2.CV_64F).std() for picture in (photo, sr)]
    assert detail[1] > 3 * detail[0]


def test_a_blurred_tilted_face_is_turned_upright_for_the_network(portraits, generator, monkeypatch):
    """Which is nearer to the truth than to give it as it lies; and it comes back to its place."""
    picture, x, y, frame = portraits["astronaut"]
    zoom = 240 / frame
    for angle in (32, -140):
        matrix = cv2.getRotationMatrix2D((x - 0.5, y - 0.5), -angle, zoom)
        matrix[:, 2] += np.array([200, 160]) - (x, y)
        large = cv2.warpAffine(picture, matrix, (400, 320), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
        photo = cv2.GaussianBlur(resize(large[:, 40:360], 80), (0, 0), 1.1)
        middle = np.s_[90:230, 90:230]
        truth, results = large[:, 40:360], []
        for tilt in (10, 90):
            monkeypatch.setattr(model, "TILT", tilt)
            sr, [patch] = restore(generator, photo, factor=4)
            assert (abs(patch.turn - angle) < 15) == (tilt == 10) or patch.turn % 90 == 0
            results.append(psnr(sr[middle], truth[middle]))
        assert results[0] > results[1] + 0.1 and results[0] > psnr(rescale(photo, 4)[middle], truth[middle]) + 0.3


@pytest.mark.parametrize("side, quality, least", [(40, 85, 20), (40, None, 20), (64, 84, 20), (64, 95, 35)])
def test_small_and_coded_faces_are_turned_upright(portraits, side, quality, least):
    photo, [(x, y, *_)] = compose(portraits, [("astronaut", side, 0, 40, 40)], 200, 200)
    photo = data_loader.jpeg(photo, quality) if quality else photo
    for angle in (least - 4, least + 4):
        [patch] = model.make_patches(photo, [data_loader.Face(x, y, side, angle, 0.9)], 4)
        assert patch.action == "restored" and patch.turn == (angle if angle > least else 0)


def test_of_a_very_blurred_face_the_eightfold_network_makes_a_face(portraits, generator):
    """What shows no more than 16 pixels goes through it."""
    tiny = load_checkpoint(CHECKPOINT.with_name("srgan_x8.pth"))[0].for_inference()
    photo, [(x, y, side, _)] = compose(portraits, [("hopper", 110, 0, 20, 20)], 180, 180)
    for sigma, size in ((0.01, None), (0.02, 32), (0.045, 16)):
        blurred = cv2.GaussianBlur(photo, (0, 0), sigma * side)
        results = [restore(generator, blurred, others, factor=1) for others in ({}, {(1, 8): tiny})]
        [patch] = results[1][1]
        assert patch.working_size == (size or patch.working_size) and (patch.working_size > 32) == (size is None)
    eyes = np.s_[int(y - 0.15 * side):int(y + 0.1 * side), int(x - 0.25 * side):int(x + 0.25 * side)]
    before, four, eight = (cv2.Laplacian(sr[eyes], cv2.CV_64F).std() for sr in (blurred, *(sr for sr, _ in results)))
    assert eight > four > 3 * before and patch.sr.shape == (128, 128, 3)


def test_a_face_that_the_network_leaves_blurred_goes_through_it_again_in_fewer_pixels(generator, monkeypatch):
    """A JPEG hides how blurred it is. Also alone, not only in a photograph."""
    photo = data_loader.jpeg(cv2.GaussianBlur(skimage.data.astronaut(), (0, 0), 6), 75)
    eyes, details = np.s_[85:115, 190:255], []
    for least in (model.GAIN, 0):
        monkeypatch.setattr(model, "GAIN", least)
        sr, [patch] = restore(generator, photo, factor=1)
        details.append(cv2.Laplacian(sr[eyes], cv2.CV_64F).std())
        assert patch.working_size == 32 and len(patch.lr) == (24 if least else 32)
        assert model.enlargement(photo, None, [replace(patch, side=200)]) == 2      # as it was decided before that
    assert details[0] > 3 * details[1]
    face = data_loader.jpeg(cv2.GaussianBlur(resize(skimage.data.astronaut()[30:200, 140:310], 137), (0, 0), 6.03), 75)
    share, alone = model.shown_share(face), []
    for least in (0, 2.7):
        monkeypatch.setattr(model, "GAIN", least)
        sr = model.upscale_reduced(generator, face, share)
        alone.append(cv2.Laplacian(resize(sr, 128), cv2.CV_64F).std())
    assert round(share * 137) == 32 and alone[1] > 3 * alone[0]


@pytest.mark.parametrize("factor", [4, 1])
def test_around_a_blurred_face_what_is_as_blurred_is_restored_and_nothing_else(portraits, generator, factor):
    """At any enlargement; half of the photograph is sharp, or another time all of it blurred."""
    photo, _ = compose(portraits, [("hopper", 128, 0, 10, 30)], 280, 208)
    photo[24:184, 184:264] = skimage.data.astronaut()[340:500, 120:200]
    blurred = cv2.GaussianBlur(photo, (0, 0), 3.2)
    around = np.s_[factor * 30:factor * 178, factor * 192:factor * 256]
    truth = rescale(photo, factor)[around]
    plain = restore(generator, blurred, factor=factor, background="bicubic")[0][around]
    sr, [patch] = restore(generator, blurred, factor=factor)
    assert len(patch.lr) < 0.6 * patch.side
    detail = [cv2.Laplacian(picture, cv2.CV_64F).std() for picture in (plain, sr[around])]
    assert detail[1] > 2 * detail[0] and psnr(sr[around], truth) > psnr(plain, truth) + 1
    blurred[:, 176:] = photo[:, 176:]
    sr, [patch] = restore(generator, blurred, factor=factor)
    plain = (upscale(generator, [blurred])[0] if factor == 4 else rescale(blurred, factor))[around]
    assert len(patch.lr) < 0.6 * patch.side
    assert (np.abs(sr[around].astype(int) - plain).max(2) > 10).mean() < 0.05


@pytest.mark.parametrize("angle", [0, 90, 30])
def test_grain_stays_on_a_blurred_face_and_around_it(portraits, generator, angle):
    """Else they are smooth as plastic, and grainy beside."""
    picture, x, y, frame = portraits["hopper"]
    matrix = cv2.getRotationMatrix2D((x - 0.5, y - 0.5), -angle, 150 / frame)
    matrix[:, 2] += np.array([110, 110]) - (x, y)
    photo = cv2.warpAffine(picture, matrix, (320, 220), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE)
    grain = np.random.default_rng(0).normal(0, 6, (220, 320, 1))
    grainy = (cv2.GaussianBlur(photo, (0, 0), 4) + grain).clip(0, 255).astype(np.uint8)
    sr, [patch] = restore(generator, grainy, factor=1)
    assert patch.blurred and abs(patch.turn - angle) < 12
    fine, given = (cv2.Laplacian(levels, cv2.CV_64F) for levels in (sr.mean(2), grain))
    for part, least in (np.s_[80:140, 80:140], 0.6), (np.s_[60:160, 230:300], 0.8):
        share = (fine[part] * given[part]).sum() / np.square(given[part]).sum()
        assert least < share < least + 0.3
    black = np.hypot(*np.mgrid[-110:110, -110:210]) > 85        # without grain, like a white margin: it must not count
    grainy[black] = 0
    sr, [patch] = restore(generator, grainy, factor=1)
    fine = cv2.Laplacian(sr.mean(2), cv2.CV_64F)[80:140, 80:140]
    assert patch.blurred and 0.6 < (fine * given[80:140, 80:140]).sum() / np.square(given[80:140, 80:140]).sum() < 0.9


def test_a_face_that_shows_much_keeps_its_own_texture(portraits, generator):
    """Of those with few pixels, what is invented fits them anyway."""
    photo, _ = compose(portraits, [("hopper", 90, 0, 10, 10), ("hopper", 40, 0, 150, 10)], 240, 140)
    photo = (photo + np.random.default_rng(0).normal(0, 3, photo.shape)).clip(0, 255).astype(np.uint8)
    _, (large, small) = restore(generator, photo, factor=4)
    plain = [upscale(generator, [patch.lr])[0] for patch in (large, small)]
    near = [psnr(resize(picture, large.side), large.lr) for picture in (plain[0], large.sr)]
    assert near[1] > near[0] + 4
    assert large.action == "restored" and np.abs(small.sr.astype(int) - plain[1]).max() <= 1


def test_what_a_grainy_face_shows_does_not_depend_on_the_strength():
    """A soft network makes less of it; that is no reason to give it fewer pixels, and so invent more."""
    networks, rng = model.Networks(CHECKPOINT), np.random.default_rng(0)
    face = cv2.GaussianBlur(resize(skimage.data.astronaut()[:228, 110:338], 150), (0, 0), 2)
    grain = cv2.GaussianBlur(rng.normal(0, 1, (150, 150, 1)), (0, 0), 0.8)[..., None]
    photo = (face * 0.5 + 60 + grain / grain.std() * 6).clip(0, 255).astype(np.uint8)
    for strength in (1, 0.3, 0):
        [(picture, _)] = restore_photos(networks, [Picture("photo", None, photo)], 16, strength, 1)
        assert [(len(patch.lr), patch.strength) for patch in picture.patches] == [(32, strength)]
        alone = rescale(photo, model.shown_share(photo))  # without --photo
        lr, sr = model.upscale_blurred(networks(strength), alone, networks.tiny(strength), networks())
        assert len(lr) == len(alone) == 40 and np.array_equal(sr, upscale(networks(strength), [alone])[0])


def test_where_there_is_no_grain_none_is_made(portraits):
    """Of edges, more is lost than elsewhere: they would come back as halos."""
    picture = cv2.GaussianBlur(portraits["astronaut"][0], (0, 0), 1)
    lost = np.abs(picture.astype(int) - resize(rescale(picture, 0.3), len(picture)))
    added = np.abs(add_grain(picture, picture, 0.3, 0, 0, len(picture)).astype(int) - picture)
    assert lost.max() > 40 and added.max() < 4


def test_no_seam_and_no_colour_shift(portraits, generator):
    """Across the edge of a restored square the picture changes no more than beside it."""
    photo, _ = compose(portraits, [("hopper", 110, 0, 10, 40), ("astronaut", 80, 0, 160, 60)])
    photo = cv2.GaussianBlur(photo, (0, 0), 3)
    sr, patches = restore(generator, photo, factor=2, background="bicubic")
    bicubic = rescale(photo, 2).astype(int)
    for patch in patches:
        assert patch.action == "restored"
        top, left, side = 2 * patch.top, 2 * patch.left, 2 * patch.side
        change = np.abs(sr - bicubic)[top:top + side, left:left + side]
        rim = np.concatenate([change[0], change[-1], change[:, 0], change[:, -1]])
        assert rim.max() <= 1 < change.max()
        mean = (sr.astype(int) - bicubic)[top:top + side, left:left + side].mean((0, 1))
        assert np.abs(mean).max() < 4


def test_a_large_blurred_face_is_given_in_a_little_less_than_it_shows(portraits):
    """But in 32 pixels at least; of a sharp one nothing is taken away."""
    for blur in (2, 4):
        photo, [(x, y, side, _)] = compose(portraits, [("hopper", 240, 0, 30, 30)], 400, 340)
        face = data_loader.Face(x, y, side, 0, 1)
        [sharp] = model.make_patches(photo, [face], 4, marked=[(face, "restored")])
        [patch] = model.make_patches(cv2.GaussianBlur(photo, (0, 0), blur), [face], 4)
        assert len(sharp.lr) == model.DETAIL and 32 <= patch.working_size < side / 2
        assert len(patch.lr) == max(32, round(0.85 * patch.working_size)) and patch.action == "restored"
    assert len(patch.lr) == 32


def test_a_blurred_photograph_is_enlarged_only_so_far_that_its_faces_fill_it(portraits, generator):
    """Unless a size is asked for, or another face is not blurred."""
    for blur, also, number in ((0, [], 4), (1.5, [], 4), (4, [], 2), (8, [("astronaut", 40, 0, 290, 20)], 4), (8, [], 1)):
        photo, _ = compose(portraits, [("hopper", 240, 0, 10, 10)], 360, 260)
        photo = cv2.GaussianBlur(photo, (0, 0), blur) if blur else photo
        photo[:, 280:] = compose(portraits, also, 360, 260)[0][:, 280:]
        patches = model.make_patches(photo, find_faces(photo), 4, 12)
        assert len(patches) == 1 + len(also) and model.enlargement(photo, None, patches) == number, blur
        assert model.enlargement(photo, 4, patches) == 4
    networks, told = Only(generator), []
    networks.tell = told.append
    [(picture, sr)] = restore_photos(networks, [Picture("photo", None, photo)], 16)
    assert sr.shape == photo.shape and picture.patches[0].action == "restored" and told == [", face 1 of 1"]


@pytest.mark.parametrize("ground", ["plain", "smooth", "noisy"])
def test_a_face_that_a_jpeg_has_coarsened_is_reduced_to_what_it_shows(portraits, ground):
    """Only by a poor JPEG, whatever lies behind the face; only a face of more pixels than are left of it."""
    photo, _ = compose(portraits, [("hopper", 40, 0, 10, 10), ("hopper", 80, 0, 100, 10), ("hopper", 130, 0, 200, 60)],
                       400, 260)
    rng, empty = np.random.default_rng(0), (photo == GRAY).all(2, keepdims=True)
    behind = {"plain": photo, "noisy": np.clip(photo + rng.normal(0, 3, photo.shape), 0, 255),
              "smooth": cv2.resize(rng.uniform(60, 200, (3, 4, 3)), (400, 260), interpolation=cv2.INTER_CUBIC)}[ground]
    photo = np.where(empty, behind, photo).clip(0, 255).astype(np.uint8)
    faces = find_faces(photo)
    plain = [patch.working_size for patch in model.make_patches(photo, faces, 4)]
    assert plain[1] > 70 and plain[2] > 110
    for quality in (50, 60, 90, 95, 98):
        patches = model.make_patches(data_loader.jpeg(photo, quality), faces, 4)
        assert [patch.action for patch in patches] == ["restored", "restored", "sharp"], quality
        assert len(patches[0].lr) == patches[0].side and abs(patches[0].working_size - plain[0]) <= 6, quality
        least, most = (49, 54) if quality < 75 else (patches[1].side,) * 2        # two thirds
        assert least <= len(patches[1].lr) <= most, quality
    blocks = [blockiness(picture, *patches[1].face.square(*photo.shape[:2])) for picture in
              (photo, *(data_loader.jpeg(photo, quality) for quality in (95, 80, 60, 40)))]
    assert abs(blocks[0]) < 0.5 and blocks[1] < 1 and blocks[1:] == sorted(blocks[1:]) and blocks[3] > 3


def test_of_a_small_face_from_a_poor_jpeg_another_person_may_come_out(portraits):
    """And is called so: of more pixels than of one without JPEG; of 40 it is the same person."""
    sides = (26, 30, 22, 40)
    photo, places = compose(portraits, [("hopper" if i % 2 else "astronaut", side, 0, 11 + 70 * i, 13)
                                        for i, side in enumerate(sides)], 300, 80)
    faces = [data_loader.Face(*place[:3], 0, 0.9) for place in places]
    for quality, invented in ((None, (22,)), (95, (22,)), (75, (26, 30, 22)), (50, (26, 30, 22))):
        picture = data_loader.jpeg(photo, quality) if quality else photo
        patches = model.make_patches(picture, faces, 4)
        assert [loss.outcome(patch) for patch in patches] == [
            "mostly invented" if side in invented else "restored" for side in sides], quality


def test_in_a_dark_face_a_jpeg_of_the_same_quality_coarsens_more(portraits):
    photo, [(x, y, side, _)] = compose(portraits, [("hopper", 80, 0, 40, 40)], 200, 200)
    face = data_loader.Face(x, y, side, 0, 0.9)
    given = [len(model.make_patches(data_loader.jpeg((photo * light).astype(np.uint8), 80), [face], 4)[0].lr)
             for light in (1, 0.35)]
    assert given[0] == 80 and given[1] < 60


def test_faces_of_one_size_share_a_batch(portraits):
    photo, _ = compose(portraits, [("hopper", 40, 0, 10, 10), ("hopper", 40, 0, 80, 12), ("hopper", 40, 2, 150, 10),
                                   ("astronaut", 56, 0, 10, 90)], 220, 170)
    batches = []
    generator = load_checkpoint(CHECKPOINT)[0].for_inference()
    generator.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    sr, patches = restore(generator, photo, factor=4, background="bicubic")
    sides = [patch.side for patch in patches]
    assert sum(batches) == len(sides) == 4 and len(batches) == len(set(sides)) < 4


def test_tiny_and_clear_faces_go_through_other_networks(portraits, generator):
    """Where there are some; those that they cannot help, and without them those of fewer than 18 pixels, are left."""
    photo, _ = compose(portraits, [("hopper", 14, 0, 10, 10), ("astronaut", 25, 0, 40, 10), ("hopper", 36, 0, 90, 5),
                                   ("astronaut", 88, 0, 140, 5)], 260, 130)
    seen, networks = {"srgan_x8": [], "srresnet_x4": []}, []
    for name, sides in seen.items():
        networks.append(load_checkpoint(CHECKPOINT.with_name(f"{name}.pth"))[0].for_inference())
        networks[-1].register_forward_hook(lambda _, inputs, output, sides=sides: sides.append(inputs[0].shape[-1]))
    sr, patches = restore(generator, photo, background="bicubic")
    assert [patch.action for patch in patches] == ["small"] + ["restored"] * 3
    tiny, clear = networks
    better, patches = restore(generator, photo, {(0.7, 8): tiny, (0.5, 4): clear}, background="bicubic")
    assert [patch.action for patch in patches] == ["restored"] * 4
    assert seen["srgan_x8"] == [patches[0].side] and 18 <= patches[1].side < 24 and 30 <= patches[2].side < CLEAR
    assert seen["srresnet_x4"] == [patches[3].side]
    assert [len(patch.sr) // len(patch.lr) for patch in patches] == [8, 4, 4, 4]
    assert [patch.strength for patch in patches] == [0.7, 1, 1, 0.5]
    usual = np.s_[:, 4 * patches[2].left:4 * (patches[2].left + patches[2].side)]
    assert np.array_equal(better[usual], sr[usual]) and (better != sr).any((0, 2))[:4 * patches[2].left].any()
    assert (better != sr).any((0, 2))[4 * patches[3].left:].any()


def test_a_result_that_is_hardly_a_face_is_called_doubtful_and_what_is_none_stays_as_it_was(portraits, generator, monkeypatch):
    """In the sentence, the captions and the table; of a tilted face, which is looked at upright. Who points at it gets
    it all the same."""
    paste, red = model.paste_face, (255, 70, 50)

    def spoilt(spoil):
        def paste_spoilt(patch, canvas, photo):
            patch.sr = spoil(patch.sr) if patch.action == "restored" else patch.sr
            paste(patch, canvas, photo)

        with monkeypatch.context() as patched:
            patched.setattr(model, "paste_face", paste_spoilt)
            return restore(generator, photo, marked=marked)

    photo = compose(portraits, [("astronaut", 60, 0, 20, 15)], 130, 110)[0]
    matrix = cv2.getRotationMatrix2D((60, 52), -25, 1)
    photo = cv2.warpAffine(photo, matrix, (130, 110), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    sr, [patch] = restore(generator, photo)
    assert not patch.doubtful and loss.photo_table(Picture("a", None, photo, patches=[patch]))[0][-1] == 0
    plain = loss.photo_rows(Picture("a", None, photo, patches=[patch]), sr)[0][0][1]
    assert not (plain == red).all(-1).any()
    marked = []
    sr, [patch] = spoilt(lambda sr: np.where(np.arange(len(sr))[:, None] < len(sr) // 2, sr,        # half of it
                                             sr[int(0.6 * len(sr)), int(0.35 * len(sr))]))
    kept, [failed] = spoilt(lambda sr: np.full_like(sr, 128))
    marked = [(patch.face, "restored")]
    assert spoilt(lambda sr: np.full_like(sr, 128))[1][0].doubtful
    left, _ = restore(generator, photo, marked=[(patch.face, "left")])
    assert failed.action == "failed" and not failed.doubtful and np.array_equal(kept, left)
    picture = Picture("a", None, photo, patches=[failed], marked=[(patch.face, "failed")])
    assert "1 face, 0 restored, 1 left as is (no good face came out of number 1)" in loss.photo_sentence(picture, kept)
    assert loss.photo_table(picture)[0][-3:] == ("failed", "", 0)
    assert patch.action == "restored" and patch.doubtful
    picture = Picture("a", None, photo, patches=[patch])
    assert "1 face, 1 restored, look closely at face 1 (doubtful)" in loss.photo_sentence(picture, sr)
    assert loss.photo_table(picture)[0][-3:] == ("restored", "1", 1)
    assert loss.captioned_pairs(picture, sr, "a")[0][1].endswith(", restored, doubtful")
    assert loss.photo_rows(picture, sr)[0][3][2] == "restored, doubtful"
    assert (loss.photo_rows(picture, sr)[0][0][1] == red).all(-1).any()
    assert (loss.captioned_pairs(picture, sr)[0][0] == red).all(-1).any()


def test_a_face_has_a_strength_of_its_own(portraits):
    """The others keep theirs; what is asked for a face replaces what was asked before."""
    photo, _ = compose(portraits, [("hopper", 40, 0, 10, 10), ("astronaut", 36, 0, 80, 10)], 150, 70)
    networks = model.Networks(CHECKPOINT)

    def restored(strength, *marked):
        picture = Picture("", None, photo, marked=marked)
        [(_, sr)] = restore_photos(networks, [picture], 16, strength, 4, "bicubic")
        return sr, [patch.strength for patch in picture.patches], [patch.face for patch in picture.patches]

    vivid, strengths, [_, face] = restored(1)
    faithful, mixed = restored(0)[0], restored(1, (face, 0.5), (face, 0))
    assert strengths == [1, 1] and mixed[1:] == ([1, 0], restored(1)[2])
    assert np.array_equal(mixed[0][:, :300], vivid[:, :300]) and np.array_equal(mixed[0][:, 300:], faithful[:, 300:])
    assert (vivid[:, 300:] != faithful[:, 300:]).any() and (vivid[:, :300] != faithful[:, :300]).any()
    assert loss.captioned_pairs(Picture("", None, photo), vivid) == []
    picture = Picture("", None, photo, marked=[(face, 0.25)])
    [(_, sr)] = restore_photos(networks, [picture], 16)
    captions = [caption for _, caption in loss.captioned_pairs(picture, sr)][1:]
    assert captions[0].endswith("pixels, restored") and captions[1].endswith("pixels, restored at 0.25")
    picture.patches[1].side = 40
    assert ", as sharp as 34, restored at 0.25" in loss.captioned_pairs(picture, sr)[2][1]


def test_grain_left_in_a_reduced_face_is_smoothed_and_what_has_none_stays(portraits):
    """Coarse grain survives the reduction, and would become stains; a clean face, and a JPEG's, hardly changes."""
    for picture, *_ in portraits.values():
        blurred = resize(resize(picture, 40), 110)
        truth = resize(blurred, 40)
        assert psnr(data_loader.reduce(blurred, 40 / 110), truth) > 50
        assert psnr(data_loader.reduce(data_loader.jpeg(blurred, 85), 40 / 110), truth) > 37
    grain = cv2.GaussianBlur(np.random.default_rng(0).standard_normal((110, 110)), (0, 0), 0.8)[..., None]
    for share in (1, 0.3):      # of the contrast
        wall = np.repeat(np.linspace(0, 255, 110), 110).reshape(110, 110, 1).transpose(1, 0, 2) + 10 * grain / grain.std()
        wall = np.repeat((wall * share + 80 * (1 - share)).clip(0, 255).astype(np.uint8), 3, axis=2)
        smooth, rough = (np.diff(part[..., 0].astype(float), axis=0).std()
                         for part in (data_loader.reduce(wall, 40 / 110), resize(wall, 40)))
        assert smooth < 0.92 * rough, share


def test_a_very_blurred_face_gets_less_strength_unless_it_has_its_own(portraits):
    """What is said of it is what the network did; without the eightfold one, which invents most, it gets all."""
    photo, [(x, y, side, _)] = compose(portraits, [("hopper", 110, 0, 20, 20)], 180, 180)
    photo, face = cv2.GaussianBlur(photo, (0, 0), 0.06 * side), data_loader.Face(x, y, side, 0, 1)
    networks, alone = model.Networks(CHECKPOINT), model.Networks(CHECKPOINT)
    del alone.files[8]

    def restored(networks, *marked, strength=1):
        picture = Picture("", None, photo, found=Found([face]), marked=marked)
        list(restore_photos(networks, [picture], 16, strength, 1, "bicubic"))
        return picture.patches[0]

    usual, own, vivid = (restored(networks, *marked) for marked in ((), [(face, 0.7)], [(face, 1)]))
    assert len(usual.lr) == 16 and [patch.strength for patch in (usual, own, vivid)] == [0.7, 0.7, 1]
    assert np.array_equal(usual.sr, own.sr) and (usual.sr != vivid.sr).any()
    assert np.array_equal(usual.sr, upscale(networks(0.7, 8), [usual.lr])[0])
    assert restored(networks, strength=0.5).strength == 0.5 and restored(alone).strength == 1
    assert np.array_equal(restored(alone).sr, upscale(alone(1, 4), [restored(alone).lr])[0])


def test_a_face_pointed_at_may_be_smaller_than_a_pixel(portraits):
    photo, _ = compose(portraits, [("hopper", 40, 0, 0, 0)], 40, 40)
    [patch] = model.make_patches(photo, [], 4, marked=[(data_loader.Face(20, 20, 0.4, 0, 1), "restored")])
    assert (patch.action, patch.side) == ("small", 1)


def test_a_wish_for_a_found_face_spares_its_neighbours(portraits):
    """Though their middles lie in its frame: a child before a parent."""
    photo, _ = compose(portraits, [("hopper", 80, 0, 10, 10)], 160, 140)
    parent, child = data_loader.Face(70, 60, 90, 0, 0.9), data_loader.Face(80, 95, 30, 5, 0.9)
    for found in ([parent, child], [child, parent]):
        for wish in (0.5, "left", "restored"):
            patches = model.make_patches(photo, found, 4, marked=[(parent, wish)])
            assert [patch.face for patch in patches] == found
            assert [patch.strength for patch in patches] == [0.5 if (face, wish) == (parent, 0.5) else None for face in found]
            assert (patches[found.index(parent)].action == "left") == (wish == "left")
    by_hand = replace(parent, size=91)
    assert [patch.face.size for patch in model.make_patches(photo, [parent, child], 4, marked=[(by_hand, "left")])] == [91]


def test_a_click_means_the_face_that_was_found_there(portraits):
    """In what the page shows, at most 1024 pixels wide: the nearest whose frame it is in, else a frame of its own."""
    photo, truth = compose(portraits, [("hopper", 300, 0, 100, 200), ("astronaut", 240, 0, 900, 100)], 2048, 800)
    found = find_faces(photo)
    for face, (x, y, side, _) in zip(found, truth):
        assert pointed(photo, (x / 2, y / 2), 0.25, found) is face
        assert pointed(photo, ((x - 0.4 * side) / 2, (y + 0.4 * side) / 2), 0.25, found) is face
        assert pointed(photo, (x / 2, (y + 0.6 * side) / 2), 0.25, found) not in found
    own = pointed(photo, (600, 300), 0.3, found)
    assert (own.x, own.y, own.size) == (1200, 600, 240)
    # Until somebody moves the knob, as large as the faces that were found.
    assert pointed(photo, (600, 300), loss.FRAME, found).size == np.mean([face.size for face in found])
    assert pointed(photo, (600, 300), loss.FRAME, []).size == loss.FRAME * 800
    assert [pointed(photo, (600, 300), share, []).size for share in (None, 0, -1, 7)] == [8, 8, 8, 800]     # typed
    plain, chosen = aimed(photo, None, found), aimed(photo, found[1], found)
    assert plain.shape == chosen.shape == (400, 1024, 3)
    changed = np.argwhere((plain != chosen).any(2))     # the other colour, around the one that is meant
    assert np.abs(changed[:, ::-1] * 2 - (truth[1][0], truth[1][1])).max() < truth[1][2]


def test_a_face_that_somebody_points_at_is_restored_too(portraits, generator):
    """Where the detector sees none; a frame set by hand replaces what lies in its middle, found or set before."""
    photo, [(x, y, side, _)] = compose(portraits, [("hopper", 40, 0, 20, 20)], 140, 100)
    wall = data_loader.Face(100, 30, 30, 0, 1)
    better = data_loader.Face(x + 3, y - 2, 44, 0, 1)

    def faces(*marked):
        marked = [(face, "restored") for face in marked]
        sr, patches = restore(generator, photo, marked=marked, factor=4, background="bicubic")
        return sr, [patch.face for patch in patches]

    sr, [found] = faces()
    also, both = faces(wall)
    better = replace(better, angle=found.angle)     # the frame is by hand, the turn the detector's, the number the same
    assert both == [found, wall] and faces(replace(better, angle=0))[1] == [better]
    assert faces(wall, better)[1] == [better, wall]
    assert faces(wall, data_loader.Face(90, 40, 50, 0, 1))[1][1:] == [data_loader.Face(90, 40, 50, 0, 1)]
    assert np.array_equal(also[:, :4 * 85], sr[:, :4 * 85])
    restored = upscale(generator, [photo[15:45, 85:115]])[0]
    middle = np.s_[40:-40, 40:-40]
    assert np.array_equal(also[60:180, 340:460][middle], restored[middle])
    sharp, [(x, y, side, _)] = compose(portraits, [("hopper", 130, 0, 20, 20)], 240, 220)
    for wish, action, size in ((None, "sharp", 130), ("restored", "restored", 96), ("left", "left", 130)):
        marked = [(data_loader.Face(x, y, side, 0, 1), wish)] if wish else []
        result, [patch] = restore(generator, sharp, marked=marked, factor=2)
        assert patch.action == action and abs(patch.working_size - size) <= 8
        assert np.array_equal(result, rescale(sharp, 2)) == (action != "restored")


def test_the_command_writes_the_picture_the_table_and_the_figure(portraits, tmp_path, capsys):
    photo, truth = compose(portraits, [("hopper", 36, 0, 5, 5), ("astronaut", 130, 0, 55, 5)], 230, 175)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    transparent = np.dstack([photo, np.full(photo.shape[:2], 200, np.uint8)])
    Image.fromarray(transparent).save(tmp_path / "in" / "party.png")
    Image.fromarray(skimage.data.coffee()[:100, :150]).save(tmp_path / "in" / "sub" / "coffee.png")
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no picture")
    out = tmp_path / "out"
    out.mkdir()
    (out / "faces.csv").write_text("mine")
    call = [str(tmp_path / "in"), "--photo", "--output", str(out), "--device", "cpu"]
    for more in ([], ["--background", "bicubic"]):     # the second time over its own results
        assert inference.run(call + more) == 1
        said = capsys.readouterr()
        assert "party.png: 2 faces, 1 restored, 1 left as is (sharp already)" in said.out
        assert "sub/coffee.png: no face found" in said.out and "broken.jpg: not a picture" in said.err
        assert {path.name for path in out.rglob("*") if path.is_file()} == {
            "party.png", "coffee.png", "comparison.png", "faces.csv", "faces-2.csv"}
    assert (out / "faces.csv").read_text() == "mine"
    sr, alpha = read_image(out / "party.png")
    assert sr.shape == (700, 920, 3) and (alpha == 200).all()
    with open(out / "faces-2.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(FACES)
    assert [(row["image"], row["face"], row["action"], row["strength"]) for row in rows] == [
        ("party.png", "1", "restored", "0.7"), ("party.png", "2", "sharp", "")]
    for row, (x, y, side, _) in zip(rows, truth):
        assert abs(float(row["x"]) - x) < 0.1 * side and abs(float(row["size"]) - side) < 0.15 * side
    call += ["--enlarge", "1"]
    assert inference.run(call) == 1
    assert np.array_equal(read_image(out / "sub" / "coffee.png")[0], skimage.data.coffee()[:100, :150])
    # By its number a face is left as it was, or restored.
    call[0] = str(tmp_path / "in" / "party.png")
    capsys.readouterr()
    assert inference.run([*call, "--leave", "1"]) == 0
    assert "1 left as is (as asked), nothing was changed" in capsys.readouterr().out
    assert np.array_equal(read_image(out / "party.png")[0], photo)
    assert inference.run([*call, "--restore", "2"]) == 0
    assert [row[8] for row in csv.reader((out / "faces-2.csv").open())] == ["action", "sharp", "restored (a little)"]
    assert not np.array_equal(read_image(out / "party.png")[0], photo)
    capsys.readouterr()
    for more in (["--leave", "2", "3"], ["--restore", "0"]):
        assert inference.run([*call, *more]) == 2
        assert "take numbers from 1 to 2, the faces found" in capsys.readouterr().err


def test_without_a_faithful_network_photographs_get_all_of_the_vivid_one(portraits, tmp_path, tiny_checkpoint):
    Image.fromarray(compose(portraits, [("hopper", 40, 0, 30, 30)], 120, 100)[0]).save(tmp_path / "a.png")
    out = tmp_path / "out"
    for more, strength in ([], "1"), (["--strength", "0.5"], None):
        call = [str(tmp_path / "a.png"), "--photo", "--checkpoint", str(tiny_checkpoint), "--output", str(out)]
        assert inference.run([*call, *more, "--device", "cpu"]) == (0 if strength else 2)
        assert [row[9] for row in csv.reader((out / "faces.csv").open())] == ["strength", "1"]


def test_mistakes_are_one_sentence(tmp_path, capsys):
    for call in (["--photo"], ["a.png", "--photo", "--simulate"], ["a.png", "--photo", "--hr", "b"],
                 ["a.png", "--photo", "--added"], ["a.png", "--enlarge", "2"], ["a.png", "--background", "bicubic"],
                 ["a.png", "--leave", "2"], ["a.png", "--restore", "2"], ["a.png", "--photo", "--scale", "8"]):
        assert inference.run([*call, "--output", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "--photo" in error and len(error.strip().splitlines()) == 1


def test_cutting_a_set_to_train_on(portraits, tmp_path, capsys, monkeypatch):
    """Upright in FFHQ's frame; not what is small, blurred or cut off; over nothing that is there."""
    photo, truth = compose(portraits, [
        ("hopper", 200, 1, 10, 10), ("astronaut", 160, 0, 300, 20), ("hopper", 60, 0, 560, 20),
        ("hopper", 140, 0, 560, 150)], 760, 330)
    photo[140:, 540:] = cv2.GaussianBlur(photo[140:, 540:], (0, 0), 3)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    Image.fromarray(photo).save(tmp_path / "in" / "sub" / "party.one.png")
    Image.fromarray(photo[:, 100:300]).save(tmp_path / "in" / "half.png")      # through the face
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no picture")
    out = tmp_path / "out"

    monkeypatch.setattr(sys, "argv", ["data_loader.py", str(tmp_path / "in"), "--output", str(out)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(data_loader.__file__, run_name="__main__")
    said = capsys.readouterr()
    assert stopped.value.code == 1 and "broken.jpg: not a picture" in said.err
    assert "2 cut" in said.out and "1 not sharp" in said.out and "smaller than 128" in said.out
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    assert [re.sub("_[0-9a-f]{8}_", "_X_", file) for file in files] == ["sub/party.one_X_1.png", "sub/party.one_X_2.png"]
    for file, (x, y, side, turn) in zip(files, truth):
        cut = read_image(out / file)[0]
        assert cut.shape == (128, 128, 3)
        square = np.rot90(photo[int(y - side / 2):int(y + side / 2), int(x - side / 2):int(x + side / 2)], turn // 90)
        soft = [cv2.GaussianBlur(picture, (0, 0), 5).ravel() for picture in (cut, resize(square, 128))]
        assert np.corrcoef(soft)[0, 1] > 0.9
    (out / files[0]).write_bytes(b"mine")
    capsys.readouterr()
    assert data_loader.cut_faces([tmp_path / "in"], out) == 1
    assert "2 already there" in capsys.readouterr().out and (out / files[0]).read_bytes() == b"mine"
    (tmp_path / "other" / "sub").mkdir(parents=True)
    Image.fromarray(photo[:, 269::-1]).save(tmp_path / "other" / "sub" / "party.one.png")       # another, named alike
    assert data_loader.cut_faces([tmp_path / "other"], out) == 0 and len([*(out / "sub").iterdir()]) == 3
    assert data_loader.cut_faces([tmp_path / "none"], out) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_an_iphone_s_heic_is_read_with_pillow_heif(tmp_path):
    """A package of its own, no requirement, for which one that unpacks a PNG stands in here."""
    (tmp_path / "pillow_heif.py").write_text("""
import io
from PIL import Image
def register_heif_opener():
    Image.register_open("HEIF", lambda file, name: Image.open(io.BytesIO(file.read()[8:])), lambda start: b"ftyp" in start)
""")
    Image.fromarray(skimage.data.astronaut()[::8, ::8]).save(tmp_path / "face.png")
    (tmp_path / "IMG_1.HEIC").write_bytes(b"1234ftyp" + (tmp_path / "face.png").read_bytes())
    call = [sys.executable, inference.__file__, str(tmp_path / "IMG_1.HEIC"), "--photo", "--output", str(tmp_path / "out")]
    without, with_it = [subprocess.Popen(call, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, text=True,
                                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                        for folder in (Path.home(), tmp_path)]
    said = without.communicate()[1]
    assert without.returncode == 2 and "IMG_1.HEIC: not a picture" in said and "pillow-heif" in said
    said = with_it.communicate()[1]
    assert with_it.returncode == 0 and (tmp_path / "out" / "IMG_1.jpg").exists(), said


def test_the_comparison_shows_the_photograph_its_result_and_its_faces(portraits, generator):
    """The result beside it, or from three rows on below; a face that is mostly invented is called so."""
    photo, _ = compose(portraits, [("hopper", 40, 0, 10, 10)], 100, 80)
    picture = Picture("party", None, photo)
    [(_, sr)] = restore_photos(Only(generator), [picture], 16)
    [row] = loss.photo_rows(picture, sr)
    assert [cell[0] for cell in row] == ["photograph", "result", "before", "after"] and row[1][2] == "400x320"
    assert np.array_equal(row[1][1], sr) and row[3][2] == "restored"
    assert [loss.outcome(replace(picture.patches[0], lr=picture.patches[0].lr[:side])) for side in (23, 24)] == [
        "mostly invented", "restored"]
    dark = Picture("party", None, photo // 5, patches=picture.patches)
    before, after = loss.photo_rows(dark, sr // 5)[0][2:]
    assert "brightened" in before[2] and before[1].max() == 255 and after[1].mean() > 3 * sr.mean() / 5
    picture.patches = [replace(patch, lr=patch.lr[:16, :16]) for patch in picture.patches] * 5
    rows = loss.photo_rows(picture, sr)
    assert [row[0] and row[0][2] for row in rows] == ["party, 100x80", None, "result, 400x320"]
    assert rows[0][3][2] == "mostly invented" and loss.photo_table(picture)[0][-3:] == ("mostly invented", "1", 0)
