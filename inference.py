"""Upscale pictures with a trained generator, score the result, draw comparisons.

    python inference.py                                  # a few sample faces: what this project does
    python inference.py FOLDER photo.png                 # upscale files and folders into results/
    python inference.py LR_FOLDER --hr HR_FOLDER         # and score against the ground truth
    python inference.py HR_FOLDER --simulate             # reduce the pictures first, then the same

The functions are the only code path for upscaling and scoring; train.py calls them too.
"""
import argparse
import csv
import io
import os
import sys
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, count, pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from data_loader import (DAMAGES, KERNELS, DataError, downscale, find_images, quantise, read_image, simulate,
                         square_face, to_tensor, to_uint8)
from loss import psnr, score
from model import (PRECISION_HELP, PRECISIONS, CheckpointError, DeviceError, FlipEnsemble, bicubic,
                   interpolate, load_checkpoint, select_device, select_dtype, write_atomically)

CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "srgan_x4.pth"
STRENGTH = 1.0              # of the shipped weights; chosen on the validation faces
MARK = "face-srgan"         # the PNG field "Software" of every result: results are never inputs
TILE, OVERLAP = 384, 24     # LR pixels; what lies further away changes a pixel by under a grey level
WRITERS = 8                 # threads that compress PNGs; as many pictures wait to be written
SHOWN = 8                   # pictures in the comparison figure
HEADER = ("image", "psnr", "ssim", "psnr_y", "ssim_y", "psnr_bicubic", "ssim_bicubic",
          "psnr_y_bicubic", "ssim_y_bicubic", "lr_psnr")


class UsageError(Exception):
    """A call that cannot be carried out; the message is one sentence for the user."""


# Upscaling --------------------------------------------------------------------------------------

@torch.inference_mode()
def upscale(generator, lr):
    """Enlarge (N, 3, H, W) in [0, 1] to (N, 3, sH, sW) in [0, 1], rounded to 8-bit levels.

    `generator` comes from `Generator.for_inference()`. Large pictures are cut into equal tiles of at
    most TILE, so that memory stays bounded; each is computed with a margin, which hides the seams.
    """
    lr = lr.contiguous(memory_format=torch.channels_last)
    scale, (height, width) = generator.scale, lr.shape[2:]
    rows, columns = -(-height // TILE), -(-width // TILE)
    if rows == columns == 1:
        return quantise(generator(lr))
    sr = lr.new_empty(len(lr), 3, height * scale, width * scale)
    for top, bottom in pairwise(i * height // rows for i in range(rows + 1)):
        for left, right in pairwise(i * width // columns for i in range(columns + 1)):
            y, x = max(0, top - OVERLAP), max(0, left - OVERLAP)
            tile = generator(lr[..., y:bottom + OVERLAP, x:right + OVERLAP])
            sr[..., top * scale:bottom * scale, left * scale:right * scale] = quantise(
                tile[..., (top - y) * scale:(bottom - y) * scale, (left - x) * scale:(right - x) * scale])
    return sr


def plot_comparison(path, rows):
    """Draw a grid of pictures: one row each, a dict from caption to (H, W, 3) uint8."""
    from matplotlib.figure import Figure                # slow to import, not always needed
    cell, caption_height, columns = 2.6, 0.42, max(map(len, rows))      # inches
    height = len(rows) * (cell + caption_height)
    figure = Figure(figsize=(cell * columns, height))
    grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=dict(
        left=0, right=1, bottom=0, top=1 - caption_height / height, wspace=0.03, hspace=caption_height / cell))
    for axes, row in zip(grid, rows):
        for axis in axes:
            axis.set_axis_off()
        for axis, (caption, picture) in zip(axes, row.items()):
            if max(picture.shape) > 1024:       # more than the figure can show
                size = [max(1, side * 1024 // max(picture.shape)) for side in picture.shape[1::-1]]
                picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(caption, fontsize=9, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")      # a name in a script without font
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110,
                                                           metadata={"Software": MARK}))


# Files ------------------------------------------------------------------------------------------

@dataclass
class Picture:
    """One picture on its way: what was read, and where the result goes."""
    name: str                           # as it is printed and stands in metrics.csv
    output: Path
    lr: np.ndarray                      # (H, W, 3) uint8
    alpha: np.ndarray | None = None     # (H, W) uint8
    hr: np.ndarray | None = None        # (sH, sW, 3) uint8


def write_png(path, picture):
    """Write (H, W, 3 or 4) uint8 as a PNG that is marked as a result."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", MARK)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: Image.fromarray(picture).save(
        file, format="PNG", pnginfo=info, compress_level=1))


def is_result(path):
    """Tell whether a file was written by this script, at any time."""
    try:
        if path.suffix == ".csv":
            return path.read_bytes().startswith(",".join(HEADER).encode())
        with Image.open(path) as image:
            return image.info.get("Software") == MARK
    except Exception:       # not a picture at all, so not ours; reading it will say why
        return False


def find_inputs(inputs, output):
    """List the pictures to upscale: (pairs of (path, relative path), sentences on bad inputs).

    Earlier results are left out: in folders everywhere, as files when they lie in `output`.
    """
    found, problems = {}, []
    for item in map(Path, inputs):
        if item.is_dir():
            files = [(path, path.relative_to(item)) for path in find_images(item) if not is_result(path)]
            if not files:
                problems.append(f"{item}: no pictures in this folder (earlier results do not count)")
        elif item.is_file():
            own = output.resolve() in item.resolve().parents and is_result(item)
            files = [] if own else [(item, Path(item.name))]
            if own:
                problems.append(f"{item}: a result of an earlier call, not upscaled again")
        else:
            files = []
            problems.append(f"{item}: there is no such file or folder")
        for path, relative in files:
            found.setdefault(path.resolve(), (path, relative))
    return list(found.values()), problems


def choose_output(relative, output, taken):
    """Choose the file for a result: DIR/<relative path without suffix>.png (.csv for a .csv) or,
    where that would replace another result of this call or a file that is not an earlier result,
    a name beside it."""
    stem, suffix = relative.with_suffix(""), ".csv" if relative.suffix == ".csv" else ".png"
    for name in chain((f"{stem}{suffix}", f"{relative}{suffix}"), (f"{stem}-{n}{suffix}" for n in count(2))):
        path = output / name
        key = str(path).casefold()      # some file systems take A.png and a.png for one
        if key not in taken and (is_result(path) or not os.path.lexists(path)):
            taken.add(key)
            return path


def sample_faces():
    """Two public-domain portraits that come with scikit-image and Matplotlib, cut as FFHQ cuts."""
    import matplotlib.cbook
    import skimage.data
    hopper = read_image(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))[0]
    return {"astronaut": square_face(skimage.data.astronaut()[12:200, 129:317]),
            "grace_hopper": square_face(hopper[40:363, 106:429])}


# The command ------------------------------------------------------------------------------------

def read_pictures(args, files, scale, taken, failed):
    """Yield a Picture for each input file that can be used; report the others to `failed`."""
    truths = {}
    if args.hr:
        truths = {path.relative_to(args.hr).with_suffix(""): path for path in find_images(args.hr)}
    if not args.inputs:
        for name, face in sample_faces().items():
            lr, hr = simulate(face, scale, args.kernel, args.damage)
            output = choose_output(Path(name), args.output, taken)
            yield Picture(output.stem, output, lr, hr=hr)
    for path, relative in files:
        try:
            lr, alpha = read_image(path)
            hr = None
            if args.simulate:
                lr, hr = simulate(lr, scale, args.kernel, args.damage)
                alpha = None
            elif args.hr:
                truth = truths.get(relative.with_suffix(""))
                if truth is None:
                    failed(f"{path}: no ground truth with this name in {args.hr}; upscaled, not scored")
                else:
                    hr = read_image(truth)[0]
                    if hr.shape[:2] != (lr.shape[0] * scale, lr.shape[1] * scale):
                        failed(f"{truth}: {hr.shape[1]}x{hr.shape[0]} pixels, not {scale} times "
                               f"{lr.shape[1]}x{lr.shape[0]}; upscaled, not scored")
                        hr = None
            output = choose_output(relative, args.output, taken)
            name = output.relative_to(args.output).with_suffix("").as_posix()
            yield Picture(name, output, lr, alpha, hr)
        except (DataError, OSError) as error:
            failed(str(error) if str(path) in str(error) else f"{path}: {error}")


def upscale_pictures(generator, pictures, device, batch_size):
    """Yield (picture, sr), sr (sH, sW, 3) uint8, batching pictures of one size; large ones go
    alone, and the order may differ."""
    waiting = {}

    def flush(shape):
        group = waiting.pop(shape)
        yield from zip(group, to_uint8(upscale(generator, to_tensor([p.lr for p in group]).to(device))))

    for picture in pictures:
        shape = picture.lr.shape
        waiting.setdefault(shape, []).append(picture)
        if len(waiting[shape]) >= min(batch_size, max(1, TILE ** 2 // (shape[0] * shape[1]))):
            yield from flush(shape)
        elif sum(map(len, waiting.values())) > 256:     # many sizes: do not hoard
            yield from flush(max(waiting, key=lambda key: len(waiting[key])))
    for shape in list(waiting):
        yield from flush(shape)


def write_result(picture, sr, scale):
    """Write the PNG of a result, with the alpha channel enlarged beside it."""
    if picture.alpha is not None:
        alpha = to_tensor([np.repeat(picture.alpha[..., None], 3, axis=2)])
        sr = np.dstack([sr, to_uint8(bicubic(alpha, scale))[0, ..., 0]])
    write_png(picture.output, sr)


def write_results(results, scale, failed):
    """Write pairs (picture, sr) on threads, while the network works on the next; yield each pair when
    its file is there."""
    writing = deque()

    def settled(at_most):
        while len(writing) > at_most:
            picture, sr, future = writing.popleft()
            try:
                future.result()
            except OSError as error:
                failed(f"{picture.output}: cannot be written ({error.strerror})")
            else:
                yield picture, sr

    with ThreadPoolExecutor(WRITERS) as pool:
        for picture, sr in results:
            writing.append((picture, sr, pool.submit(write_result, picture, sr, scale)))
            yield from settled(WRITERS)
        yield from settled(0)


def compare(picture, sr, scale):
    """Compare a result with bicubic and, where it is known, the ground truth: (its row for
    `plot_comparison`, its line of metrics.csv or {})."""
    enlarged = to_uint8(bicubic(to_tensor([picture.lr]), scale))[0]
    captions = [f"{picture.name}\nLR {picture.lr.shape[1]}x{picture.lr.shape[0]}", "bicubic\n", "ours\n"]
    if picture.hr is None:
        return dict(zip(captions, (picture.lr, enlarged, sr))), {}
    ours, baseline = score(sr, picture.hr), score(enlarged, picture.hr)
    scores = {**ours, **{f"{name}_bicubic": value for name, value in baseline.items()},
              "lr_psnr": psnr(to_uint8(downscale(to_tensor([sr]), scale))[0], picture.lr)}
    captions[1] += f"{baseline['psnr']:.2f} dB / {baseline['ssim']:.3f}"
    captions[2] += f"{ours['psnr']:.2f} dB / {ours['ssim']:.3f}"
    captions.append("ground truth\nPSNR / SSIM")
    return dict(zip(captions, (picture.lr, enlarged, sr, picture.hr))), scores


def load_generators(checkpoint, strength, both=False):
    """Load a generator and set its strength, from 0 (the SRResNet beside the checkpoint) to 1 (the
    checkpoint itself): (generator, that SRResNet if `both` else None)."""
    generator, _ = load_checkpoint(checkpoint)
    if strength == 1 and not both:
        return generator, None
    path = checkpoint.with_name(f"srresnet_x{generator.scale}.pth")
    if not path.exists():
        raise UsageError(f"--strength and --added need {path}, the faithful network beside {checkpoint.name}")
    faithful, _ = load_checkpoint(path)
    return interpolate(faithful, generator, strength), faithful if both else None


def added_detail(faithful, lr, sr, device):
    """Show what was invented: three times the difference of sr to the faithful network's result,
    around gray, (H, W, 3) uint8."""
    certain = upscale(faithful, to_tensor([lr]).to(device)).cpu()
    return to_uint8((to_tensor([sr]) - certain) * 3 + 128 / 255)[0]


def main(args):
    """Carry out the command; return the exit status: 0 all done, 1 some failed, 2 nothing done."""
    started = time.monotonic()
    problems = []

    def failed(sentence):
        problems.append(sentence)
        tqdm.write(f"inference.py: {sentence}", file=sys.stderr)

    device = select_device(args.device)
    files, bad_inputs = find_inputs(args.inputs, args.output)
    for sentence in bad_inputs:
        failed(sentence)
    if args.inputs and not files:
        return 2
    if args.hr and not args.hr.is_dir():
        raise UsageError(f"--hr {args.hr}: there is no such folder")
    dtype = select_dtype(args.precision, device)
    generator, faithful = (network and network.for_inference(dtype).to(device) for network in load_generators(
        args.checkpoint, args.strength, args.added))
    if args.flip:
        generator = FlipEnsemble(generator)
    args.output.mkdir(parents=True, exist_ok=True)

    scores, sheet, done = {}, {}, 0
    taken = set()
    comparison, metrics = (choose_output(Path(name), args.output, taken)
                           for name in ("comparison.png", "metrics.csv"))
    pictures = read_pictures(args, files, generator.scale, taken, failed)
    results = upscale_pictures(generator, pictures, device, args.batch_size)
    for picture, sr in tqdm(write_results(results, generator.scale, failed), "upscaling",
                            len(files) or None, unit="picture", leave=False, disable=None):
        done += 1
        if picture.hr is not None or len(sheet) < SHOWN:
            row, line = compare(picture, sr, generator.scale)
            if line:
                scores[picture.name] = line
            if len(sheet) < SHOWN:
                if faithful is not None:
                    row["added detail\nx3, from gray"] = added_detail(faithful, picture.lr, sr, device)
                sheet[picture.name] = row
    if sheet:
        plot_comparison(comparison, [sheet[name] for name in sorted(sheet)])
    if scores:
        report(scores, metrics)
    print(f"{done} picture{'s' * (done != 1)} upscaled {generator.scale}x into {args.output} in "
          f"{time.monotonic() - started:.1f} s on the {device.type}; compare: {comparison}")
    return 1 if problems else 0


def report(scores, path):
    """Print one row per picture and the means, and write them without the means as CSV."""
    width = max(map(len, [*scores, "image"]))
    print(f"{'image':{width}}  {'PSNR':>14}  {'SSIM':>15}  {'PSNR-Y':>14}  {'SSIM-Y':>15}  {'LR-PSNR':>7}\n"
          f"{'':{width}}  " + "  ".join(["  ours bicubic", "  ours  bicubic"] * 2))
    means = {column: np.mean([row[column] for row in scores.values()]) for column in HEADER[1:]}
    for name, row in [*sorted(scores.items()), ("mean", means)]:
        print(f"{name:{width}}  " + "  ".join(
            f"{row[column]:6.{digits}f} {row[column + '_bicubic']:7.{digits}f}{' ' * (digits - 2)}"
            for column, digits in zip(HEADER[1:5], (2, 4, 2, 4))) + f"  {row['lr_psnr']:7.2f}")

    lines = [HEADER] + [(name, *(f"{row[column]:.6f}" for column in HEADER[1:]))
                        for name, row in sorted(scores.items())]
    with io.StringIO(newline="") as text:
        csv.writer(text).writerows(lines)
        write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(prog="inference.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="files and folders (recursively); without, a few "
        "sample faces")
    add("--output", type=Path, default=Path("results"), metavar="DIR", help="folder for the results [%(default)s]")
    truth = parser.add_mutually_exclusive_group()
    truth.add_argument("--hr", type=Path, metavar="DIR", help="ground truth with the same relative stems: "
                       "score against it")
    truth.add_argument("--simulate", action="store_true", help="the inputs are HR: reduce them first")
    add("--kernel", default="bicubic", choices=list(KERNELS), help="how --simulate reduces; all scores "
        "are quoted for bicubic [%(default)s]")
    add("--damage", default="none", choices=DAMAGES, help="what else --simulate does to the picture [%(default)s]")
    add("--checkpoint", type=Path, metavar="FILE", help="trained generator [the shipped SRGAN]")
    add("--strength", type=float, help="from 0, faithful: the SRResNet that lies beside the checkpoint, to 1, "
        f"vivid: the checkpoint itself [{STRENGTH} for the shipped weights, 1 with --checkpoint]")
    add("--added", action="store_true", help="show in the comparison what was invented: the difference to strength 0")
    add("--flip", action="store_true", help="average with the mirrored picture's result: a little more faithful, "
        "half as fast")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [%(default)s]")
    add("--precision", default="auto", choices=PRECISIONS, help=PRECISION_HELP)
    add("--batch-size", type=int, default=16, help="pictures of one size at a time [%(default)s]")
    args = parser.parse_args(argv)
    if args.strength is None:
        args.strength = 1.0 if args.checkpoint else STRENGTH
    args.checkpoint = args.checkpoint or CHECKPOINT
    if not 0 <= args.strength <= 1:
        raise UsageError("--strength must be from 0 to 1")
    if args.batch_size < 1:
        raise UsageError("--batch-size must be at least 1")
    if args.hr and not args.inputs:
        raise UsageError("--hr needs INPUT")
    return args


def run(argv=None):
    """Run `main` and turn every expected failure into one sentence; return the exit status."""
    try:
        return main(parse_arguments(argv))
    except (UsageError, CheckpointError, DataError, DeviceError, OSError) as error:
        print(f"inference.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
