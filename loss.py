"""How good SR is: the loss terms of SRGAN (Ledig et al. 2017, arXiv:1609.04802, section 2.2) for training,
PSNR, SSIM and figures for people, and the blind study: opinion scores by people (section 3.3).

Pictures are RGB in [0, 1], (N, 3, H, W); SR may leave the range. Every term is a mean over everything, so its size does
not depend on the batch or the patch size.

    criterion = GeneratorLoss(pixel=1, vgg=0.02, adversarial=3e-3, features=VGGFeatures("conv3_4"))
    total, terms = criterion(sr, hr, discriminator)     # terms: {"pixel": ..., "vgg": ..., ...}
"""
import csv
import functools
import io
import os
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from data_loader import (MARK, DataError, Face, choose_output, contrast, cut_face, find_images, full_contrast,
                         is_result, printable, read_image, rescale, resize, simulate, square_face, to_tensor,
                         write_atomically, write_picture)
from model import CLEAR, INVENTED, CheckpointError, UsageError, enlargement, load_plain, upscale

# phi_i,j of the paper: the j-th convolution before the i-th pooling, after its ReLU. The value is how many layers of
# torchvision's vgg19().features lead there.
VGG_LAYERS = {"conv2_2": 9, "conv3_4": 18, "conv5_4": 36}


class VGGFeatures(nn.Module):
    """VGG19's features phi_i,j (section 2.2.1), frozen: (N, 3, H, W) -> (N, C, h, w).

    Args:
        layer: "conv2_2" (phi 2,2), "conv3_4" or "conv5_4" (phi 5,4, the paper's VGG54).
        weights: None takes torchvision's ImageNet weights (downloaded once, 550 MB); else a file with a state dict in
            the layout of torchvision's `vgg19()` or of its `.features`, complete or only as deep as `layer`.

    Raises UsageError where the weights cannot be had or do not fit."""

    def __init__(self, layer="conv3_4", weights=None):
        super().__init__()
        from torchvision.models import VGG19_Weights, vgg19     # slow to import, seldom needed
        try:
            state = VGG19_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True) if weights is None \
                else load_plain(weights)
        except (CheckpointError, OSError, RuntimeError) as error:       # URLError is an OSError
            raise UsageError(f"the VGG19 weights cannot be loaded ({getattr(error, 'reason', error)}); give "
                             "a file with --vgg-weights FILE, or --vgg-weights none to train without") from None
        with torch.device("meta"):      # shapes only: the full network would take 550 MB
            self.layers = vgg19().features[:VGG_LAYERS[layer]]
        try:
            state = {name.removeprefix("features."): value.float() for name, value in state.items()}
            self.layers.load_state_dict({name: state[name] for name in self.layers.state_dict()}, assign=True)
        except (AttributeError, KeyError, RuntimeError):
            raise UsageError(f"{weights}: no VGG19 state dict in torchvision's layout that reaches {layer}; choose "
                             "another file or --vgg-layer") from None
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, picture):
        return self.layers((picture - self.mean) / self.std)


def vgg_distance(features, sr, hr):
    """Content loss of equation 5, relative: ||phi(sr) - phi(hr)||^2 / ||phi(hr)||^2, a mean over the pictures.

    The plain distance depends on how the weights are scaled and grows or shrinks by orders of magnitude from layer to
    layer, which is why the paper has to multiply it by 0.006. Divided by the energy of the target's features it is 0
    for equal pictures and 1 where no feature answers, for every layer and every scaling of the weights."""
    with torch.no_grad():
        target = features(hr).float()
    error = F.mse_loss(features(sr).float(), target, reduction="none")
    return (error.mean((1, 2, 3)) / target.square().mean((1, 2, 3))).mean()


def shifted(step, period, *pictures):
    """Cut `period` pixels off the height and the width of (N, C, H, W) pictures, at one of period x period offsets,
    another at each step; `period` is the scale.

    The pooling of VGG and the strides of D repeat every 2, 4, ... pixels. If their grid always fell on the same
    pixels, the generator would learn a pattern in step with it, a faint regular texture."""
    y, x = divmod(step * 7 % period ** 2, period)
    return [picture[..., y:picture.shape[2] - period + y, x:picture.shape[3] - period + x].contiguous(
        memory_format=torch.channels_last) for picture in pictures]


def lattice_loss(sr, hr, period=4, window=8):
    """Mean square of the pattern in sr - hr that repeats every `period` pixels: the mean error of each of the
    period x period places, over windows of `window` repetitions, less the mean of all places.

    A sub-pixel network can give each place a bias of its own, a regular lattice, which the VGG and adversarial losses
    reward, since it passes for texture. It hardly counts in the squared error; here, unlike texture, it does."""
    height, width = (side - side % period for side in sr.shape[2:])
    error = F.pixel_unshuffle((sr - hr)[..., :height, :width], period).unflatten(1, (3, -1))    # (N, 3, period^2, h, w)
    pattern = (error - error.mean(2, keepdim=True)).flatten(1, 2)
    return F.avg_pool2d(pattern, min(window, *pattern.shape[2:]), window // 2).square().mean()      # whole windows


def adversarial_loss(fake_logits):
    """-log D(G(lr)) of equation 6, from logits: its gradient does not vanish while D is winning."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits, fake_logits):
    """-log D(hr) - log(1 - D(G(lr))) of equation 2, from logits."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


class Term(NamedTuple):
    """A term of the generator's loss."""
    text: str           # what train.py --help calls it
    weight: float       # unless its flag says another
    both: bool          # in the loss of SRResNet too, or of SRGAN only
    value: Callable     # of the GeneratorLoss, SR, HR and D, which gives logits, and learns nothing here
    features: bool = False      # whether it needs loss.features: without VGG, it is left out


class GeneratorLoss(nn.Module):
    """The perceptual loss of equation 3: a weighted sum of TERMS, of those whose weight is not zero.

    Args:
        features: a VGGFeatures, for the term "vgg".
        period: HR pixels of the lattice, the scale.
        weights: by the names of TERMS; what is left out does not count."""

    # A new term needs its line here, and gets its flag, --NAME-weight, if NAME is a Python identifier. What it needs of
    # its own, a network for example, is made in __init__ beside `features`, and found as an attribute of `loss`.
    TERMS = {
        "pixel": Term("mean squared error (equation 4)", 1.0, True, lambda loss, sr, hr, d: F.mse_loss(sr, hr)),
        "vgg": Term("relative VGG distance", 0.02, False,
                    lambda loss, sr, hr, d: vgg_distance(loss.features, sr, hr), features=True),
        "adversarial": Term("adversarial loss", 3e-3, False, lambda loss, sr, hr, d: adversarial_loss(d(sr))),
        "lattice": Term("regular pattern", 40.0, False, lambda loss, sr, hr, d: lattice_loss(sr, hr, loss.period))}

    def __init__(self, features=None, period=4, **weights):
        super().__init__()
        if unknown := weights.keys() - self.TERMS.keys():
            raise TypeError(f"no such term: {', '.join(sorted(unknown))}")
        self.weights = {name: weights[name] for name in self.TERMS if weights.get(name)}
        self.features, self.period = features, period

    def forward(self, sr, hr, discriminator=None):
        """Return (the weighted sum, the unweighted terms by name)."""
        terms = {name: self.TERMS[name].value(self, sr, hr, discriminator) for name in self.weights}
        return sum(weight * terms[name] for name, weight in self.weights.items()), terms


# Scores and figures ------------------------------------------------------------------------------

# The tables of scores and of faces that inference.py writes; `is_result` knows them by their beginning.
METRICS = ("image", "psnr", "ssim", "psnr_y", "ssim_y", "psnr_bicubic", "ssim_bicubic",
           "psnr_y_bicubic", "ssim_y_bicubic", "lr_psnr")
LPIPS = "lpips", "lpips_bicubic"        # columns more, if asked for
AIMED, FRAME = 1024, 0.25   # pixels a side of a photograph in which faces are numbered or pointed at; a frame's share
FACES = ("image", "face", "x", "y", "size", "angle", "score", "working_size", "action", "strength", "doubtful")


def luma(picture):
    """BT.601 luma in studio range, 16 to 235: (H, W, 3) uint8 RGB -> (H, W) float."""
    return picture @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def psnr(a, b):
    """Peak signal-to-noise ratio in dB for a peak of 255; equal pictures count as 100 dB."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255 ** 2 / error)) if error > 0 else 100.0


def load_lpips(device="cpu"):
    """Load LPIPS (Zhang et al. 2018, arXiv:1801.03924; AlexNet, version 0.1), whose package is no requirement: a
    function of two (H, W, 3) uint8 pictures, nan for those smaller than 32. Raises UsageError."""
    try:
        from lpips import LPIPS as Lpips
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = Lpips(net="alex", verbose=False).eval().to(device)
    except ImportError:
        raise UsageError("--lpips needs a package that is no requirement: pip install lpips") from None
    except OSError as error:
        raise UsageError(f"--lpips: the weights of AlexNet cannot be downloaded ({error})") from None

    @torch.no_grad()
    def distance(a, b):
        large = min(a.shape[:2]) > 31
        return network(*(to_tensor([x]).to(device) * 2 - 1 for x in (a, b))).item() if large else np.nan

    return distance


def score(sr, hr):
    """Compare two (H, W, 3) uint8 pictures: PSNR (dB) and SSIM on RGB and, as psnr_y and ssim_y, on luma. No border is
    cut; SSIM is scikit-image's with its default 7x7 window (nan for pictures smaller than that)."""
    from skimage.metrics import structural_similarity   # slow to import, not always needed
    def ssim(a, b, **options):
        return float("nan") if min(a.shape[:2]) < 7 else float(structural_similarity(a, b, **options))

    y_sr, y_hr = luma(sr), luma(hr)
    return dict(psnr=psnr(sr, hr), ssim=ssim(sr, hr, channel_axis=2),
                psnr_y=psnr(y_sr, y_hr), ssim_y=ssim(y_sr, y_hr, data_range=255))


def plot_comparison(path, rows, note=""):
    """Draw pictures side by side: a list of rows, each a list of cells (title, (H, W, 3) uint8, note) or None, over
    which the cell before it and that above it may extend. More than four rows stand beside each other; a title is
    written once above its column; `note` at the foot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg     # slow to import, not always needed
    from matplotlib.figure import Figure
    columns = max(map(len, rows))
    whole = len(rows) <= 4 or any(row[:1] == [None] for row in rows)      # the rows of a photograph stay together
    blocks = 1 if whole else max(1, 10 // columns)
    lines = -(-len(rows) // blocks)
    cell, gap, caption, sizes = (280, 8, 24, (9, 10)) if blocks == 1 else (172, 5, 24, (7, 8))      # pixels, points
    width = blocks * columns * (cell + gap) + (blocks - 1) * 4 * gap
    canvas = np.full((lines * (cell + caption) + 2 * caption, width, 3), 255, np.uint8)
    figure, height, font = Figure(dpi=110), len(canvas), dict(ha="center", va="bottom", parse_math=False)
    figure.set_size_inches((width + 0.5) / 110, (height + 0.5) / 110)
    for number, row in enumerate(rows):
        block, line = divmod(number, lines)
        top = line * (cell + caption) + 2 * caption
        for column, (title, picture, text) in ((i, part) for i, part in enumerate(row) if part):
            left = (block * columns + column) * (cell + gap) + block * 4 * gap
            wide = cell + (cell + gap) * (row[column + 1:column + 2] == [None])
            high = cell + (cell + caption) * (wide > cell and rows[number + 1:number + 2] != []
                                              and rows[number + 1][column] is None)
            # Pixels of small pictures are shown, all others smooth.
            factor = min(wide / picture.shape[1], high / picture.shape[0])
            way = cv2.INTER_NEAREST if max(picture.shape) <= 64 else cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
            size = [max(1, round(side * factor)) for side in picture.shape[1::-1]]
            picture = cv2.resize(picture, size, interpolation=way)
            canvas[top:top + size[1], left:left + size[0]] = picture
            x = (left + wide / 2) / width
            figure.text(x, 1 - (top - 5) / height, shortened(text, wide // 8), fontsize=sizes[0], **font)
            if not line:
                figure.text(x, 1 - (top - caption) / height, title, fontsize=sizes[1], weight="bold", **font)
    figure.text(0.5, 5 / height, note, fontsize=8, **font)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # a name in a script without font
        written = FigureCanvasAgg(figure)
        written.draw()
    write_picture(path, np.minimum(canvas, np.asarray(written.buffer_rgba())[..., :3]))     # black on white, beside


def sample_faces():
    """Two public-domain portraits that come with scikit-image and Matplotlib, cut as FFHQ cuts."""
    import matplotlib.cbook
    import skimage.data
    astronaut = read_image(Path(skimage.data.data_dir, "astronaut.png"))[0]     # .astronaut() imports half of SciPy
    hopper = read_image(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))[0]
    return {"astronaut": square_face(astronaut[12:200, 129:317]), "grace_hopper": square_face(hopper[40:363, 106:429])}


def shortened(text, length):
    """Shorten a text in the middle."""
    return text if len(text) <= length else f"{text[:length // 2 - 1]}…{text[len(text) - length + length // 2:]}"


def compare(picture, sr, added=None, kernel="bicubic", lpips=None):
    """Compare a result with bicubic and, where it is known, the ground truth: (its row for `plot_comparison`, with the
    picture `added` at its end, its line of metrics.csv or {}). Of a large picture, the part with most detail.
    LR-PSNR: the result, reduced again by `kernel`, against the LR that was given. `lpips` comes from `load_lpips`."""
    shown, part, scale = picture.lr, picture.lr, len(sr) // len(picture.lr)
    top, left, side = 0, 0, max(shown.shape)
    if side > 128:
        side = min(64, *shown.shape[:2])
        gray = cv2.cvtColor(shown, cv2.COLOR_RGB2GRAY)
        detail = cv2.blur(cv2.absdiff(gray, cv2.blur(gray, (5, 5))).astype(np.float32), (side, side), anchor=(0, 0))
        detail = detail[:len(gray) - side + 1, :len(gray[0]) - side + 1]
        top, left = (int(place) for place in np.unravel_index(detail.argmax(), detail.shape))
        part, shown = part[top:top + side, left:left + side], frame(shown.copy(), top, left, side)
    window = np.s_[top * scale:(top + side) * scale, left * scale:(left + side) * scale]
    row = [("low resolution", shown, f"{picture.name}, {picture.lr.shape[1]}x{picture.lr.shape[0]}"),
           ("bicubic", rescale(part, scale), ""), ("ours" if picture.sr is None else "result", sr[window], "")]
    scores = {}
    if picture.hr is not None:
        baseline, ours = score(rescale(picture.lr, scale), picture.hr), score(sr, picture.hr)
        scores = {**ours, **{f"{name}_bicubic": value for name, value in baseline.items()},
                  "lr_psnr": psnr(simulate(sr, scale, kernel)[0], picture.lr)}
        if lpips:
            scores |= zip(LPIPS, (lpips(sr, picture.hr), lpips(rescale(picture.lr, scale), picture.hr)))
        row[1:] = [(*cell[:2], f"{values['psnr']:.2f} dB / {values['ssim']:.3f}")
                   for cell, values in zip(row[1:], (baseline, ours))]
        row.append(("ground truth", picture.hr[window], "PSNR / SSIM"))
    if added is not None:
        row.append(("added detail", added[window], "x3, from gray"))
    return row, scores


def added_detail(faithful, sr):
    """Show what was invented: three times the difference of a result to the faithful one, around gray, uint8."""
    return ((sr.astype(np.int16) - faithful) * 3 + 128).clip(0, 255).astype(np.uint8)


def frame(picture, top, left, side, text="", colour=(255, 220, 0)):
    """Draw a square frame, with a number, into a picture; return it."""
    line = max(1, max(picture.shape) // 400)
    cv2.rectangle(picture, (left, top), (left + side, top + side), colour, line)
    size = max(picture.shape) / 550         # to be read where the whole picture is small
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 2 * line)
    x, y = max(0, left), max(height + 3 * line, top)
    if text:
        cv2.rectangle(picture, (x, y - height - 3 * line), (x + width + 2 * line, y), colour, cv2.FILLED)
    cv2.putText(picture, text, (x + line, y - line), cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), 2 * line, cv2.LINE_AA)
    return picture


def fit(picture, side):
    """Reduce (H, W, 3) uint8 so that no side is longer than `side`."""
    factor = side / max(picture.shape)
    return cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA) if factor < 1 else picture


def aimed(picture, face, found=(), patches=()):
    """Show an (H, W, 3) uint8 photograph, reduced to AIMED pixels a side, with numbered frames around the faces found,
    red if their patches say that they are doubtful, and a blue one around a Face that is pointed at, or None."""
    shown, doubtful = fit(picture, AIMED).copy(), [patch.face for patch in patches if patch.doubtful]
    factor = len(shown) / len(picture)
    for other in filter(None, [*found, face]):
        ink = [(0, 255, 255)] * (other == face) or [(255, 70, 50)] * (other in doubtful)
        frame(shown, *(round(length * factor) for length in other.square(*picture.shape[:2])),
              str(found.index(other) + 1) if other in found else "", *ink)
    return shown


def pointed(picture, place, share, found):
    """Say which Face is meant by a point, (x, y), in what `aimed` shows: a found one, if it lies in its frame, or a
    frame around it, whose side is a share of the photograph's shorter side, or, by FRAME, the others' median."""
    x, y = np.array(place) * max(1, max(picture.shape) / AIMED)
    near = [face for face in found if max(abs(face.x - x), abs(face.y - y)) < face.size / 2]
    size = np.median([face.size for face in found] if found and share == FRAME else
                     np.clip(share or 0, 0.01, 1) * min(picture.shape[:2]))
    return min(near, key=lambda face: np.hypot(face.x - x, face.y - y),
               default=Face(float(x), float(y), float(size), 0, 1))


def face_pairs(picture, sr):
    """Cut the faces of a photograph out of it and out of its result: a list of (before, after, note), 256x256 pixels,
    turned as for the network, and at full contrast if they are faded or dark, as the note says then."""
    def cut(patch, image, n):
        if patch.turn % 90:
            face = replace(patch.face, x=patch.face.x * n, y=patch.face.y * n, size=patch.side * n)
            return cut_face(image, face, 256)
        square = image[patch.top * n:, patch.left * n:][:patch.side * n, :patch.side * n]
        return resize(np.rot90(square, patch.turn // 90), 256)

    pairs = [(cut(patch, picture.lr, 1), cut(patch, sr, len(sr) // len(picture.lr))) for patch in picture.patches]
    return [(full_contrast(before), full_contrast(after, before), ", brightened here" * bool(contrast(before)[1] > 1))
            for before, after in pairs]


def outcome(patch):
    """Say what was done with a face of a photograph."""
    if patch.action != "restored":
        return patch.action
    invented, large = len(patch.lr) < patch.least, len(patch.lr) >= CLEAR
    return "mostly invented" if invented else "restored (a little)" if large and patch.strength < 1 else "restored"


def captioned_pairs(picture, sr, name=""):
    """List a photograph's faces: (before and after side by side, (256, 512, 3) uint8, caption), and before them
    the photograph with their numbers; in a folder, where `name` is the file's, only before several."""
    name = name and f"{shortened(name, 24)}, "
    pairs = []
    for number, (patch, (*pair, note)) in enumerate(zip(picture.patches, face_pairs(picture, sr)), 1):
        shows = f", as sharp as {len(patch.lr)}" * (len(patch.lr) < patch.side)
        strength = f" at {patch.strength:g}" if patch.action == "restored" and patch.strength < 1 else ""
        done = f"{outcome(patch)}{strength}{', doubtful' * patch.doubtful}"
        pairs.append((np.hstack(pair), f"{name}{number}: {patch.side} pixels{shows}, {done}{note}"))
    overview = aimed(picture.lr, None, [patch.face for patch in picture.patches], picture.patches)
    return [(overview, f"{name}the photograph")] * (len(pairs) > bool(name)) + pairs


def photo_rows(picture, sr):
    """Make a photograph's rows for `plot_comparison`: it with numbered frames, its result, if there is room, and its
    faces before and after."""
    most, across = 12, 2 + (len(picture.patches) > 8)
    pairs = zip(picture.patches[:most], face_pairs(picture, sr))
    faces = [[("before", before, f"{number}: {patch.side} pixels{note}"),
              ("after", after, outcome(patch) + ", doubtful" * patch.doubtful)]
             for number, (patch, (before, after, note)) in enumerate(pairs, 1)]
    rows = [sum(faces[i:i + across], []) for i in range(0, len(faces), across)] or [[]]
    overview = aimed(picture.lr, None, [patch.face for patch in picture.patches[:most]], picture.patches)
    first = ("photograph", overview, f"{picture.name}, {picture.lr.shape[1]}x{picture.lr.shape[0]}"
             + f", {len(faces)} of {len(picture.patches)} faces" * (len(faces) < len(picture.patches)))
    result = "result", fit(sr, AIMED), f"{'result, ' * (len(rows) > 1)}{sr.shape[1]}x{sr.shape[0]}"
    if len(rows) == 1:
        return [[first, result, *rows[0]]]
    return [[{0: first, 2: result}.get(i), None, *row] for i, row in enumerate(rows)]      # over two columns


def photo_sentence(picture, sr):
    """Say what was done with the faces of a photograph, and where they keep it small."""
    patches, factor = picture.patches, len(sr) // len(picture.lr)
    numbers = Counter(patch.action for patch in patches)
    doubtful = [str(number) for number, patch in enumerate(patches, 1) if patch.doubtful]
    most = sum(outcome(patch) == "mostly invented" for patch in patches)
    parts = [f"{numbers['restored']} restored" + f" ({most} of them mostly invented)" * bool(most)] * bool(patches)
    parts += [f"look closely at face{'s' * (len(doubtful) > 1)} {' and '.join(doubtful)} (doubtful)"] * bool(doubtful)
    failed = " and ".join(str(number) for number, patch in enumerate(patches, 1) if patch.action == "failed")
    words = {"sharp": "left as is (sharp already)", "left": "left as is (as asked)", "small": "too small",
             "failed": f"left as is (no good face came out of number {failed})"}
    parts += [f"{numbers[action]} {text}" for action, text in words.items() if numbers[action]]
    if factor == picture.found.times < enlargement(picture.lr):
        parts += [f"{f'enlarged {factor} times only' if factor > 1 else 'not enlarged'}, since the faces are blurred"]
    parts += ["nothing was changed" if factor == 1 else "only enlarged"] * (not numbers["restored"])
    return ", ".join([f"{len(patches)} face{'s' * (len(patches) != 1)}" if patches else "no face found", *parts])


def result_sentence(picture, sr, photo, scores, suited):
    """Say what became of a picture, a photograph or one of one face, which the enlargement `suited` would suit best."""
    one, line = not photo, "{1} x {0} → {3} x {2} pixels".format(*picture.lr.shape[:2], *sr.shape[:2])
    line += f"; {photo_sentence(picture, sr)}" if photo else ""
    line += "; a face missed? See below" * (photo and len(picture.patches) != 1)
    line += "; blurred, so reduced first to what it still shows" * (picture.share < 1)
    line += "; mostly invented: another person may come out" * (one and max(picture.lr.shape) < INVENTED)
    line += f"; for a face of this size, try {suited}x (under More)" * (one and len(sr) != suited * len(picture.lr))
    return line + ("; against the truth: PSNR {psnr:.2f} dB (bicubic {psnr_bicubic:.2f}), SSIM {ssim:.3f} (bicubic "
                   "{ssim_bicubic:.3f})".format(**scores) if scores else "")


def photo_table(picture):
    """List a photograph's rows of faces.csv."""
    return [(picture.name, number, round(patch.face.x, 1), round(patch.face.y, 1), round(patch.face.size, 1),
             round(patch.face.angle, 1), round(patch.face.score, 3),
             len(patch.lr) if patch.action == "restored" else patch.working_size, outcome(patch),
             f"{patch.strength:g}" if patch.action == "restored" else "", int(patch.doubtful))
            for number, patch in enumerate(picture.patches, 1)]


def write_csv(path, header, rows):
    """Write a table."""
    csv.writer(text := io.StringIO(newline="")).writerows([header, *rows])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def report(scores, path, how):
    """Print how results were made, a row per picture, the means and their standard errors; write a CSV of pictures."""
    width = max(map(len, [*scores, "std. error"]))
    header = METRICS + LPIPS * (LPIPS[0] in next(iter(scores.values())))
    pairs = [(column, 2 if column.startswith("psnr") else 4) for column in header if f"{column}_bicubic" in header]
    print(f"{how}\n{'image':{width}}  " + "  ".join(f"{column.upper().replace('_', '-'):>{13 + digits // 2}}"
                                             for column, digits in pairs) + "  LR-PSNR\n"
          f"{'':{width}}  " + "  ".join("result bicubic" if digits == 2 else "result  bicubic" for _, digits in pairs))
    values = np.array([[row[column] for column in header[1:]] for row in scores.values()])
    spread = values.std(axis=0) / max(1, len(scores) - 1) ** 0.5
    means, errors = (dict(zip(header[1:], numbers)) for numbers in (values.mean(axis=0), spread))
    for name, row in [*sorted(scores.items()), ("mean", means), *[("std. error", errors)] * (len(scores) > 1)]:
        print(f"{name:{width}}  " + "  ".join(
            f"{row[column]:6.{digits}f} {row[column + '_bicubic']:7.{digits}f}{' ' * (digits - 2)}"
            for column, digits in pairs) + f"  {row['lr_psnr']:7.2f}")
    write_csv(path, (*header, "how"), [(name, *(f"{row[column]:.6f}" for column in header[1:]), how)
                                       for name, row in sorted(scores.items())])


# The blind study: section 3.3 of Ledig et al. 2017 ----------------------------------------------

# People rate pictures from 1 to 5, without knowing how each was made.
METHODS = ("original", "nearest", "bicubic", "SRResNet", "SRGAN")
GRADES = ("bad", "poor", "fair", "good", "excellent")
STUDY_FACES, REPEATS = 20, 10     # in a study; some pictures come twice, to see how consistent a rater is
ENOUGH = 6                  # ratings of a method, from which on an interval is given
STUDY_WELCOME = """You will see faces, one at a time. **How good does each picture look?** Give 1 (bad) to 5
(excellent), with the buttons or the keys 1 to 5; go by your first impression. Each answer is saved at once: you
may stop at any time, and continue later under the same name. **Kept for good, other than pictures that are
uploaded: the name you give, your ratings, and when you gave them.** A nickname will do."""
RATINGS = ("rater", "seed", "index", "face", "method", "repeat", "rating", "time")
STUDY_STYLE = """
#desk {max-width: 640px; margin: auto} #stimulus .icon-button-wrapper {display: none}
#stimulus img {width: 384px !important; max-width: 80vw !important; height: auto !important; margin: auto}
#grades {flex-wrap: nowrap; gap: 6px; align-items: stretch}
#grades button {font: 500 min(.9rem, 3vw) system-ui; padding: 12px 2px}
#results :is(td, th) {padding: 4px 8px; word-break: normal; overflow-wrap: normal}"""
STUDY_KEYS = """<script>
document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input, textarea")) return;
    const button = /^[1-5]$/.test(event.key) && document.getElementById("rate-" + event.key);
    if (button && button.offsetParent && !event.repeat) button.click();
});
new MutationObserver(() => document.querySelectorAll("#stimulus img:not([alt='The picture to rate'])").forEach(
    picture => picture.alt = "The picture to rate")).observe(document, {childList: true, subtree: true});
</script>"""


def study_order(rater, seed, faces):
    """List what a rater is shown, as (face, method, repeat): every face in every method in random order, and in
    the second half REPEATS pictures of the first half again, repeat = 1."""
    rng = np.random.default_rng([seed, *rater.encode()])
    shown = [(face, method, 0) for face in faces for method in METHODS]
    shown = [shown[i] for i in rng.permutation(len(shown))]
    first, second = shown[:len(shown) // 2], shown[len(shown) // 2:]
    again = rng.choice(len(first), min(REPEATS, len(first)), replace=False)
    second += [(*first[i][:2], 1) for i in again]
    return first + [second[i] for i in rng.permutation(len(second))]


def read_ratings(path):
    """Read a file of ratings: a list of dicts, numbers as int; of a picture that was rated again, the last rating.
    A last line that a crash has torn is left out."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; ratings are given in --ui --study FOLDER") from None
    header = ",".join(RATINGS).encode() + b"\n"
    if not content.startswith(header) and not header.startswith(content):
        raise DataError(f"{path}: not a file of ratings; move it away, or give another --output")
    rows, lines = {}, 0
    try:
        text = content[:content.rfind(b"\n") + 1].decode()
        for row in csv.DictReader(io.StringIO(text, newline="")):
            row |= {name: int(row[name]) for name in ("seed", "index", "repeat", "rating")}
            if row["method"] not in METHODS or row["rating"] not in range(1, 6):
                raise ValueError
            rows[row["rater"], row["seed"], row["index"]] = row
            lines += 1
    except (ValueError, TypeError, csv.Error):
        raise DataError(f"{path}: line {lines + 2} is damaged; correct or remove it") from None
    return list(rows.values())


def append_rating(path, values):
    """Add a line to a file of ratings, which is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file, io.StringIO(newline="") as text:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)                # what a crash has torn
        csv.writer(text, lineterminator="\n").writerows([values] if whole else [RATINGS, values])
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


class Study:
    """The pictures of a study, who is to see which next, and the file of ratings."""

    def __init__(self, networks, folder, output, seed):
        self.ratings, self.seed, self.faces, self.pictures = output / "ratings.csv", seed, [], {}
        if self.ratings.exists():
            read_ratings(self.ratings)
        files = [path for path in find_images(folder) if not is_result(path)]
        number = min(STUDY_FACES, len(files))
        for path in (files[i * len(files) // number] for i in range(number)):
            try:
                face = square_face(read_image(path)[0])
            except DataError as error:
                print(f"inference.py: {error}; left out", file=sys.stderr)
                continue
            name = printable(path.relative_to(folder))
            lr, _ = simulate(face, networks.scale)
            ours = (upscale(networks(strength), [lr])[0] for strength in (0, 1))
            nearest = lr.repeat(networks.scale, axis=0).repeat(networks.scale, axis=1)
            blurred = rescale(lr, networks.scale)
            self.faces.append(name)
            self.pictures |= zip(((name, method) for method in METHODS), (face, nearest, blurred, *ours))
        if not self.faces:
            raise DataError(f"--study {folder}: no pictures that can be read; expected a folder of sharp faces")

    def place(self, rater):
        """Where a rater has arrived: (index, the whole order). Raises DataError where that is nowhere."""
        if not rater:
            raise DataError("Please give a name first, or a nickname")
        order = study_order(rater, self.seed, self.faces)
        rows = read_ratings(self.ratings) if self.ratings.exists() else []
        rows = [row for row in rows if (row["rater"], row["seed"]) == (rater, self.seed)]
        if [(row["index"], row["face"], row["method"], row["repeat"]) for row in rows] != [
                (i, *shown) for i, shown in enumerate(order[:len(rows)])]:
            raise DataError(f"{rater} has rated other pictures in {self.ratings}; choose another name")
        return len(rows), order

    def rate(self, rater, index, rating):
        """Save a rating of the picture at `index`, if it is the next one, or the last one again, to correct it."""
        place, order = self.place(rater)
        if 0 <= index < len(order) and index in (place - 1, place):
            append_rating(self.ratings, (rater, self.seed, index, *order[index], rating,
                                         datetime.now(timezone.utc).isoformat(timespec="seconds")))


def build_study(study, folder):
    """Build the Study tab inside an open gr.Blocks."""
    import gradio as gr

    def ask(name, back=0):
        """Show a rater the next picture, or the one before; the page learns nothing about how it was made."""
        try:
            index, order = study.place(rater(name))
        except (DataError, OSError) as error:
            return {message: f"**{error}**"}
        index -= back and index > 0
        if index == len(order):
            return {welcome: gr.Column(visible=False), desk: gr.Column(visible=False), done: gr.Column(visible=True),
                    message: "**Done, thank you!** Everything is saved."}
        # Uncompressed, in a folder of its own: neither the size of a file nor its address tells a method or a repeat.
        path = Path(tempfile.mkdtemp(dir=folder)) / "picture.png"
        cv2.imwrite(str(path), study.pictures[order[index][:2]][..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 0])
        return {welcome: gr.Column(visible=False), desk: gr.Column(visible=True), position: index,
                picture: str(path), message: f"Picture {index + 1} of {len(order)}"}

    def rate(rating, name, index):
        try:
            study.rate(rater(name), index, rating)
        except (DataError, OSError) as error:
            return {message: f"**This rating could not be saved: {error}**"}
        return ask(name)

    def rater(name):
        """A name as it is stored; no spreadsheet takes it for a formula."""
        return " ".join(name.casefold().split()).lstrip("=+-@ ")[:60]

    def results(name):
        try:
            index, order = study.place(rater(name))
            if index < len(order):
                raise DataError("Results are shown when all pictures are rated; who runs the study sees them with "
                                "--study-report")
            lines, text = study_results(read_ratings(study.ratings))
        except (DataError, OSError) as error:
            return str(error), None
        plot = Path(tempfile.mkdtemp(dir=folder)) / "mean_opinion_scores.png"
        plot_opinions(plot, lines)
        return text, str(plot)

    with gr.Column() as welcome:
        gr.Markdown(STUDY_WELCOME)
        name = gr.Textbox(label="Your name", max_lines=1, max_length=60)
        start = gr.Button("Start or continue", variant="primary")
    message = gr.Markdown()
    with gr.Column(visible=False, elem_id="desk") as desk:
        picture = gr.Image(show_label=False, format="png", interactive=False, buttons=[], container=False,
                           elem_id="stimulus")
        with gr.Row(elem_id="grades"):
            buttons = [gr.Button(f"{n} {grade}", elem_id=f"rate-{n}", min_width=40)
                       for n, grade in enumerate(GRADES, 1)]
        back = gr.Button("Back: rate the one before again", size="sm")
    # Sent along with each rating: a key pressed twice must not rate a picture that nobody has seen yet.
    position = gr.Number(0, precision=0, visible="hidden")
    with gr.Column(visible=False) as done:
        show = gr.Button("Show the results")
        table = gr.Markdown(elem_id="results")
        plot = gr.Image(show_label=False, interactive=False, buttons=["download"])
    outputs = [welcome, desk, done, picture, message, position]
    gr.on([start.click, name.submit], ask, name, outputs, api_name="start", concurrency_id="study")
    for n, button in enumerate(buttons, 1):
        button.click(functools.partial(rate, n), [name, position], outputs, api_name=f"rate_{n}",
                     concurrency_id="study", show_progress="hidden")
    back.click(functools.partial(ask, back=1), name, outputs, api_name="back", concurrency_id="study",
               show_progress="hidden")
    show.click(results, name, [table, plot], api_name="results", concurrency_id="study")


def mean_opinion_scores(ratings, draws=2000, seed=0):
    """Mean opinion score per method (section 3.3) with the ends of its 95 % confidence interval.

    `ratings` is (raters, faces, methods) float, 1 to 5, nan where nothing was rated; returns three arrays
    (methods,), nan for a method without ratings. The bootstrap draws raters and faces anew, both: the
    interval says what other raters might think of other faces."""
    rng = np.random.default_rng(seed)
    raters, faces, _ = ratings.shape
    given, points = np.isfinite(ratings).astype(float), np.nan_to_num(ratings)
    rater_weights, face_weights = (rng.multinomial(n, np.full(n, 1 / n), draws) for n in (raters, faces))
    with np.errstate(invalid="ignore"):     # 0 / 0: a draw in which a method has no rating
        means = np.divide(*(np.einsum("dr,df,rfm->dm", rater_weights, face_weights, table, optimize=True)
                            for table in (points, given)))
        mean = points.sum((0, 1)) / given.sum((0, 1))
    low, high = np.array([np.nanpercentile(column, (2.5, 97.5)) if np.isfinite(column).any() else (np.nan,) * 2
                          for column in means.T]).T
    return mean, low, high


def krippendorff_alpha(ratings):
    """Agreement between raters, Krippendorff's alpha for interval data: 1 is perfect, 0 is chance.

    `ratings` is (raters, items) float, nan where nothing was rated. nan where no item has two ratings or all
    ratings are equal. Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"."""
    items = [column[np.isfinite(column)] for column in ratings.T]
    items = [item for item in items if len(item) > 1]
    every = np.concatenate(items) if items else np.zeros(1)
    if np.ptp(every) == 0:
        return float("nan")
    within = sum(len(item) * item.var(ddof=1) for item in items) / len(every)
    return float(1 - within / every.var(ddof=1))


def study_results(rows):
    """Evaluate the rows of `read_ratings`: (a list of (method, mean opinion score, low and high end of its 95 %
    interval, nan from fewer than ENOUGH ratings, number of ratings), the same as a Markdown table with sentences on
    raters and agreement). Repeats count for consistency only."""
    cells, repeats = defaultdict(list), []
    for row in rows:
        key = row["rater"], row["face"], row["method"]
        if row["repeat"]:
            repeats += [abs(row["rating"] - cells[key][-1])] if key in cells else []
        else:
            cells[key].append(row["rating"])
    if not cells:
        raise DataError("There are no ratings yet")
    raters, faces, methods = (sorted(set(part)) for part in zip(*cells))
    methods.sort(key=METHODS.index)
    table = np.full((len(raters), len(faces), len(methods)), np.nan)
    numbers = dict.fromkeys(methods, 0)
    for (rater, face, method), ratings in cells.items():
        table[raters.index(rater), faces.index(face), methods.index(method)] = np.mean(ratings)
        numbers[method] += len(ratings)
    alpha = krippendorff_alpha(table.reshape(len(raters), -1))
    lines = [(method, mean, low, high, number) if number >= ENOUGH else (method, mean, np.nan, np.nan, number)
             for method, mean, low, high, number in zip(methods, *mean_opinion_scores(table), numbers.values())]
    text = ["| method   | mean score | 95 % interval | ratings |",
            "|----------|------------|---------------|---------|"]
    text += [f"| {method:8} | {mean:10.2f} | " + (f" {low:.2f} to {high:.2f}" if low == low else f"{'too few':>13}")
             + f" | {number:7} |" for method, mean, low, high, number in lines]
    text += ["", f"Raters: {len(raters)}, faces: {len(faces)}, ratings: {len(rows)}."]
    text += [f"Agreement between raters (Krippendorff's alpha: 1 is perfect, 0 is chance): {alpha:.2f}."
             if np.isfinite(alpha) else "Agreement between raters: not known yet."]
    text += [f"Seeing a picture again, a rater answered {np.mean(repeats):.2f} points apart on average "
             f"({len(repeats)} repeats)." if repeats else "No repeats rated yet."]
    return lines, "\n".join(text)


def plot_opinions(path, lines):
    """Draw the mean opinion scores of `study_results` with their intervals."""
    from matplotlib.figure import Figure
    methods, means, lows, highs, _ = zip(*lines)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.vlines(methods, lows, highs, linewidth=3, alpha=0.5)
    axes.plot(methods, means, "o")
    axes.set(ylim=(0.9, 5.1), yticks=range(1, 6), yticklabels=[f"{n} {grade}" for n, grade in enumerate(GRADES, 1)],
             title="Mean opinion score with its 95 % interval")
    axes.grid(axis="y", alpha=0.3)
    write_atomically(path, lambda file: figure.savefig(
        file, format="png", dpi=130, metadata={"Software": MARK.decode()}))


def report_study(ratings, output):
    """Print the results of a file of ratings and plot them into a folder; return the exit status."""
    lines, text = study_results(read_ratings(ratings))
    output.mkdir(parents=True, exist_ok=True)
    plot = choose_output(Path("mean_opinion_scores.png"), output, set())
    plot_opinions(plot, lines)
    print(f"{text}\nPlot: {plot}")
    return 0
