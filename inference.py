"""Upscale pictures with a trained generator, score the result, draw comparisons.

    python inference.py                                  # a few sample faces: what this project does
    python inference.py FOLDER photo.png                 # upscale files and folders into results/
    python inference.py party.jpg --photo                # find the faces in photographs and restore them
    python inference.py LR_FOLDER --hr HR_FOLDER         # and score against the ground truth
    python inference.py HR_FOLDER --simulate             # reduce the pictures first, then the same
    python inference.py --ui                             # all that in a browser
    python inference.py --ui --study HR_FOLDER           # with a blind study: people rate pictures
    python inference.py --study-report results/ratings.csv

The functions are the only code path for upscaling and scoring; train.py calls them too.
"""
import argparse
import contextlib
import functools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from tqdm import tqdm

from data_loader import (DAMAGES, FACES, KERNELS, DataError, Face, choose_output, enlarge, find_faces, find_images,
                         find_inputs, open_image, printable, read_image, resize_square, sample_faces, simulate,
                         working_size, write_csv, write_png)
from loss import (STUDY_ABSENT, Study, build_study, compare, face_pairs, photo_rows, photo_table, plot_comparison,
                  plot_opinions, read_ratings, report, study_results)
from model import (CUDA_FULL, PRECISION_HELP, PRECISIONS, TILE, CheckpointError, DeviceError, FlipEnsemble,
                   load_generators, locked, select_device, select_dtype, upscale)

CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "srgan_x4.pth"
STRENGTH = 1.0              # of the shipped weights; chosen on the validation faces
WRITERS = 8                 # threads that compress PNGs; as many pictures wait to be written
SHOWN = 8                   # pictures in the comparison figure
RESULT_LIMIT = 400_000_000  # pixels of a result, of which each takes up to 8 bytes


class UsageError(Exception):
    """A call that cannot be carried out; the message is one sentence for the user."""


# The command ----------------------------------------------------------------------------------

@dataclass
class Picture:
    """One picture on its way: what was read, and where the result goes."""
    name: str                           # as it is printed and stands in the tables
    output: Path
    lr: np.ndarray                      # (H, W, 3) uint8
    alpha: np.ndarray | None = None     # (H, W) uint8
    hr: np.ndarray | None = None        # (sH, sW, 3) uint8
    patches: list = field(default_factory=list)     # the faces, of a photograph


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
                    try:
                        hr = read_image(truth)[0]
                        if hr.shape[:2] != (lr.shape[0] * scale, lr.shape[1] * scale):
                            raise DataError(f"{truth}: {hr.shape[1]}x{hr.shape[0]} pixels, not {scale} times "
                                            f"{lr.shape[1]}x{lr.shape[0]}")
                    except DataError as error:
                        failed(f"{error}; upscaled, not scored")
                        hr = None
            factor = enlargement(lr, args.enlarge) if args.photo else scale
            if lr.shape[0] * lr.shape[1] * factor ** 2 > RESULT_LIMIT:
                raise DataError(f"{path}: {lr.shape[1]}x{lr.shape[0]} pixels, too many to enlarge {factor} times: "
                                f"the result may have {RESULT_LIMIT:,}; " + (
                                    "use --enlarge 1" if args.photo else "use --photo for a photograph with faces"))
            output = choose_output(relative, args.output, taken)
            name = printable(output.relative_to(args.output).with_suffix(""))
            yield Picture(name, output, lr, alpha, hr)
        except (DataError, OSError, MemoryError) as error:
            reason = str(error) or "not enough memory"
            failed(reason if str(path) in reason else f"{path}: {reason}")


def upscale_pictures(generator, pictures, batch_size):
    """Yield (picture, sr), sr (sH, sW, 3) uint8, batching pictures of one size; large ones go
    alone, and the order may differ."""
    waiting = {}

    def flush(shape):
        group = waiting.pop(shape)
        yield from zip(group, upscale(generator, [picture.lr for picture in group]))

    for picture in pictures:
        shape = picture.lr.shape
        waiting.setdefault(shape, []).append(picture)
        if len(waiting[shape]) >= min(batch_size, max(1, TILE ** 2 // (shape[0] * shape[1]))):
            yield from flush(shape)
        elif sum(map(len, waiting.values())) > 256:     # many sizes: do not hoard
            yield from flush(max(waiting, key=lambda key: len(waiting[key])))
    for shape in list(waiting):
        yield from flush(shape)


def write_result(picture, sr):
    """Write the PNG of a result, with the alpha channel enlarged beside it."""
    if picture.alpha is not None:
        sr = np.dstack([sr, enlarge(picture.alpha, len(sr) // len(picture.lr))])
    write_png(picture.output, sr)


def write_results(results):
    """Write pairs (picture, sr) on threads, while the network works on the next and the first are compared;
    yield (picture, sr, future of the writing)."""
    writing = deque()
    with ThreadPoolExecutor(WRITERS) as pool:
        for picture, sr in results:
            writing.append((picture, sr, pool.submit(write_result, picture, sr)))
            # Large ones are not hoarded: each would wait with all its pixels.
            while len(writing) > WRITERS or writing and sum(sr.size for _, sr, _ in writing) > 2**27:
                yield writing.popleft()
        yield from writing


def added_detail(faithful, lr, sr):
    """Show what was invented: three times the difference of sr to the faithful network's result,
    around gray, (H, W, 3) uint8."""
    return ((sr.astype(np.int16) - upscale(faithful, [lr])[0]) * 3 + 128).clip(0, 255).astype(np.uint8)


SMALLEST = 20               # pixels of a frame from which a face can be made
DETAIL = 46                 # pixels: what shows more than fits in them is sharper than anything we give
SOFT = 0.6                  # of its frame: a face that fits in less of it is blurred


@dataclass
class Patch:
    """A face of a photograph on its way through the network."""
    face: Face
    top: int                            # its square, in pixels of the photograph
    left: int
    side: int
    working_size: int
    action: str                         # "restored", "sharp" (left alone) or "small" (too small)
    lr: np.ndarray                      # upright, of the size that the network is given
    sr: np.ndarray | None = None


def find_patches(photo, factor):
    """Find the faces of an (H, W, 3) uint8 photograph and decide what to do with each, if the result is `factor`
    times as large: a list of Patch, from left to right.

    A face whose pixels hold what they can goes through the network as it is, a blurred one is reduced first to
    what it shows; turned by more than 45 degrees, it is turned by quarters, which loses nothing.
    """
    patches = []
    for face in find_faces(photo):
        top, left, side = face.square(*photo.shape[:2])
        lr = np.rot90(photo[top:top + side, left:left + side], round(face.angle / 90))
        size = working_size(lr)
        soft = size < SOFT * side
        action = "small" if side < SMALLEST else \
            "sharp" if size > DETAIL or factor == 1 and not soft else "restored"
        patches.append(Patch(face, top, left, side, size, action, resize_square(lr, size) if soft else lr))
    return patches


def lay(patch, canvas, factor):
    """Lay a restored face over its place in the enlarged photograph, fading into it at the edge of its square."""
    side = patch.side * factor
    sr = np.rot90(resize_square(patch.sr, side), -round(patch.face.angle / 90))
    ramp = np.clip((np.arange(side) + 0.5) / side * 6, 0, 1)
    ramp = np.square(np.sin(np.minimum(ramp, ramp[::-1]) * np.pi / 2))      # over a sixth of the side
    place = canvas[patch.top * factor:, patch.left * factor:][:side, :side]
    mask = np.minimum.outer(ramp, ramp)[..., None].astype(np.float32)
    place[:] = np.rint(place + mask * (sr - place.astype(np.float32)))


def enlargement(photo, factor=None):
    """How many times a photograph is enlarged: by default what gives a handy size."""
    size = photo.shape[0] * photo.shape[1]
    return factor or (4 if size <= 1e6 else 2 if size <= 4e6 else 1)


def restore_photos(generator, photos, batch_size, factor=None, background=None):
    """Yield (picture, sr) for each Picture of a photograph, in order; sr (NH, NW, 3) uint8, picture.patches its faces.

    `factor` is N, 1, 2 or 4, by default what gives a handy size; `background`, "network" or "bicubic", is how the
    rest is enlarged: by default with the network, where that is quick. Faces go through it in batches, those of
    several photographs together.
    """
    def restore(group):
        patches = [patch for _, _, faces in group for patch in faces if patch.action == "restored"]
        for patch, patch.sr in upscale_pictures(generator, patches, batch_size):
            pass
        for picture, number, picture.patches in group:
            megapixels = picture.lr.shape[0] * picture.lr.shape[1] / 1e6
            way = background or ("network" if megapixels <= 0.5 else "bicubic")
            canvas = upscale(generator, [picture.lr])[0] if way == "network" and number == generator.scale else \
                enlarge(picture.lr, number)
            for patch in sorted(picture.patches, key=lambda patch: -patch.side):    # small ones over large ones
                if patch.sr is not None:
                    lay(patch, canvas, number)
            yield picture, canvas

    group, pixels = [], 0
    for picture in photos:
        size = picture.lr.shape[0] * picture.lr.shape[1]
        number = enlargement(picture.lr, factor)
        group.append((picture, number, find_patches(picture.lr, number)))
        pixels += size
        if pixels > 4e6 or sum(len(patches) for _, _, patches in group) >= batch_size:
            yield from restore(group)
            group, pixels = [], 0
    yield from restore(group)


def photo_sentence(patches):
    """Say what was done with the faces of a photograph."""
    numbers = Counter(patch.action for patch in patches)
    parts = [f"{numbers['restored']} restored"]
    parts += [f"{numbers['sharp']} left as they are (sharp already)"] * bool(numbers["sharp"])
    parts += [f"{numbers['small']} too small (under {SMALLEST} pixels)"] * bool(numbers["small"])
    return f"{len(patches)} face{'s' * (len(patches) != 1)}, {', '.join(parts)}" if patches else "no face found"


def main(args):
    """Carry out the command; return the exit status: 0 all done, 1 some failed, 2 nothing done."""
    if args.study_report:
        return report_study(args)
    if args.ui:
        return serve(args)
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

    scores, sheet, faces, taken, done = {}, {}, [], set(), 0
    comparison, table = (choose_output(Path(name), args.output, taken)
                         for name in ("comparison.png", "faces.csv" if args.photo else "metrics.csv"))
    pictures = read_pictures(args, files, generator.scale, taken, failed)
    results = restore_photos(generator, pictures, args.batch_size, args.enlarge, args.background) if args.photo else \
        upscale_pictures(generator, pictures, args.batch_size)
    for picture, sr, writing in tqdm(write_results(results), "upscaling", len(files) or None, unit="picture",
                                     leave=False, disable=None):
        rows, line = [], {}
        if args.photo:
            rows = photo_rows(picture, sr) if len(sheet) < SHOWN else []
        elif picture.hr is not None or len(sheet) < SHOWN:
            rows, line = compare(picture, sr, generator.scale)
        try:
            writing.result()
        except OSError as error:
            failed(f"{picture.output}: cannot be written ({error.strerror})")
            continue
        done += 1
        if args.photo:
            tqdm.write(f"{picture.name}: {photo_sentence(picture.patches)}")
            faces += photo_table(picture)
        if line:
            scores[picture.name] = line
        if len(sheet) < SHOWN:
            if faithful is not None:
                rows[0]["added detail\nx3, from gray"] = added_detail(faithful, picture.lr, sr)
            sheet[picture.name] = rows
    try:
        if scores:
            report(scores, table)
        if faces:
            write_csv(table, FACES, faces)
        if sheet:
            plot_comparison(comparison, [row for name in sorted(sheet) for row in sheet[name]])
    except OSError as error:
        failed(f"{error.filename or args.output}: cannot be written ({error.strerror})")
        sheet = {}
    what = f"photograph{'s' * (done != 1)} restored" if args.photo else \
        f"picture{'s' * (done != 1)} upscaled {generator.scale}x"
    print(f"{done} {what} into {args.output} in {time.monotonic() - started:.1f} s on the {device.type}"
          + f"; compare: {comparison}" * bool(sheet))
    return 2 if not done else 1 if problems else 0


# The interface ----------------------------------------------------------------------------------

LIMIT = 1_000_000           # pixels of a picture that goes through the network whole; more would take minutes on a CPU
PHOTO_LIMIT = 16_000_000    # pixels of a photograph, of which only the faces do
FACE_AT_MOST = 64           # pixels a side: what is larger is a photograph
SCREEN = 2048               # pixels a side of what the slider shows
FILES = 200                 # pictures at a time in the Folder tab
KEPT = 10                   # minutes until an uploaded picture and its result are deleted

INTRODUCTION = """# Face SRGAN
Give a small picture of a face, see it large and sharp; or a photograph, whose faces are found. **What is
added is invented**: one of many faces that fit. It is no evidence of who somebody is and must never be used to
identify anyone."""
WORDS = """
- **Bicubic**: the ordinary way to enlarge a picture. It invents nothing and looks blurred.
- **Strength**: 0 is the faithful network (SRResNet): soft, closest to the truth on average. 1 is the vivid one
  (SRGAN): sharp, because it invents what faces usually look like. Between them, the two are mixed.
- **Shrink it first**: makes a sharp picture small, then enlarges it: the result can be held against the truth.
- **PSNR** (in decibels) and **SSIM** (1 at most): how near a result is to the truth, pixel by pixel and in
  structure; more is nearer. Sharp results often score lower than soft ones: people have to look, too.
- **What was invented**: the difference to the faithful result, three times as strong, around gray."""
PRIVACY = f"""Your pictures stay on the computer that runs this page, in a temporary folder, and are deleted after
{KEPT} minutes or when the program ends. Nothing is sent to anybody else."""
# Nothing on the page may ask another host for anything, whatever Gradio's templates refer to.
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
STYLE = """
:root {--block-info-text-color: #52525b} .dark {--block-info-text-color: #a1a1aa}
#photo img, #compare img, .pixels img {image-rendering: pixelated}
#photo img, .pixels img {width: 100% !important; height: 100% !important; object-fit: contain}
#desk {max-width: 640px; margin: auto}
#stimulus img {width: 384px !important; max-width: 80vw !important; height: auto !important; margin: auto;
    object-fit: contain !important}
#stimulus .icon-button-wrapper, footer .divider {display: none}
#grades {flex-wrap: nowrap; gap: 6px; align-items: stretch}
#grades button {font: 500 min(.9rem, 3vw) system-ui; padding: 12px 2px}
#pairs .grid-wrap {max-height: none !important; height: auto !important}
#pairs .grid-container button {aspect-ratio: 2}
@media (max-width: 600px) {#pairs .grid-container {grid-template-columns: 1fr !important}}
#results :is(td, th) {padding: 4px 8px; word-break: normal; overflow-wrap: normal}"""
KEYS = """<script>
document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input, textarea")) return;
    const button = /^[1-5]$/.test(event.key) && document.getElementById("rate-" + event.key);
    if (button && button.offsetParent && !event.repeat) button.click();
    const line = document.querySelector("#compare [data-testid=slider]");
    const step = {ArrowLeft: -16, ArrowRight: 16}[event.key];
    if (line && line.offsetParent && step) {        // Gradio's slider knows the mouse alone
        const {x, y, width} = line.getBoundingClientRect();
        for (const [type, move] of [["mousedown", 0], ["mousemove", step], ["mouseup", step]])
            (move ? window : line).dispatchEvent(new MouseEvent(
                type, {clientX: x + width / 2 + move, clientY: y + 9, view: window, bubbles: true}));
    }
});
</script>"""


def only_this_host(app):
    """Wrap an ASGI app: the browser refuses every request of its pages to another host."""
    async def wrapped(scope, receive, send):
        def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            return send(message)
        await app(scope, receive, with_policy)
    return wrapped


class Workshop:
    """What the command does with a picture, for the interface: results lie in `folder`, and one network is at
    work at a time, picture by picture, so that nobody's folder holds up somebody's face."""

    def __init__(self, args, folder):
        self.args, self.folder, self.turn = args, folder, threading.Lock()
        self.device = select_device(args.device)
        self.dtype = select_dtype(args.precision, self.device)
        self.generator = functools.lru_cache(maxsize=24)(self._generator)       # the knob has 21 places
        self.scale = self.generator(args.strength).scale
        self.has_knob = args.checkpoint.with_name(f"srresnet_x{self.scale}.pth").exists()
        self.upscale(np.zeros((32, 32, 3), np.uint8), args.strength)            # the first one is slow

    def _generator(self, strength):
        if not 0 <= strength <= 1:
            raise UsageError("Strength is a number from 0 to 1")
        generator = load_generators(self.args.checkpoint, strength)[0].for_inference(self.dtype).to(self.device)
        return FlipEnsemble(generator) if self.args.flip else generator

    def sweep(self, kept, age=KEPT * 60):
        """Delete what is older than `age` seconds and not among the paths `kept`; Gradio's own way dies under load."""
        for parent, _, files in os.walk(self.folder):
            for path in (os.path.join(parent, name) for name in files):
                with contextlib.suppress(OSError):
                    if path not in kept and os.stat(path).st_mtime < time.time() - age:
                        os.unlink(path)

    def upscale(self, lr, strength):
        with self.turn:
            return upscale(self.generator(round(strength, 2)), [lr])[0]

    def restore(self, picture, strength, whole=True):
        """Upscale a Picture; where it is a photograph and not taken as one face, restore its faces."""
        if whole or max(picture.lr.shape) <= FACE_AT_MOST:
            return self.upscale(picture.lr, strength)
        with self.turn:
            [(_, sr)] = restore_photos(self.generator(round(strength, 2)), [picture], self.args.batch_size)
        return sr

    def read(self, path, output, shrink=False, whole=True):
        """Read an upload as a Picture; nothing else of this machine, whatever a request names. Raises DataError."""
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise DataError("This picture was not uploaded here")
        if not path.is_file():
            raise DataError(f"{path.name} has been deleted by now, as promised below; please give it again")
        limit = LIMIT if whole or shrink else PHOTO_LIMIT
        try:
            with open_image(path) as image:
                width, height = image.size
            if width * height > limit:
                raise DataError(f"{path} has {width} x {height} pixels, too many: the limit is {limit:,} in all"
                                f"{' for one face; please cut it out' * (limit == LIMIT)}, or reduce the picture first")
            (lr, alpha), hr = read_image(path), None
            if shrink:
                (lr, hr), alpha = simulate(lr, self.scale, self.args.kernel, self.args.damage), None
        except DataError as error:
            raise DataError(str(error).replace(str(path), path.name)) from None
        return Picture(path.stem, output, lr, alpha, hr)

    def enlarge(self, path, strength, shrink, added, whole):
        """Upscale one upload: a namespace of the file to download, the files of the slider (bicubic and ours, no
        larger than a screen), the pictures LR, truth and what was invented (or None), the pairs of faces with captions,
        and one line on what was done."""
        started, folder = time.monotonic(), Path(tempfile.mkdtemp(dir=self.folder))
        picture = self.read(path, folder / f"{path.stem}_x{self.scale}.png", shrink, whole)
        sr = self.restore(picture, strength, whole or shrink)
        if picture.patches or sr.shape[0] != picture.lr.shape[0] * self.scale:
            picture.output = folder / f"{path.stem}_restored.png"
        factor = len(sr) // len(picture.lr)
        write_result(picture, sr)
        bicubic, scores = enlarge(picture.lr, factor), {}
        if picture.hr is not None:
            _, scores = compare(picture, sr, self.scale)
        invented = None
        if added and not picture.patches and factor == self.scale:
            with self.turn:
                invented = added_detail(self.generator(0.0), picture.lr, sr)
        pair = [picture.output, folder / "bicubic.png"]
        if max(sr.shape) <= SCREEN:
            write_result(replace(picture, output=pair[1]), bicubic)
        else:
            pair[0] = folder / "screen.png"
            for file, large in zip(pair, (sr, bicubic)):
                write_png(file, fit(large, SCREEN))
        (height, width), (large_height, large_width) = picture.lr.shape[:2], sr.shape[:2]
        line = f"{width} x {height} → {large_width} x {large_height} pixels"
        if not whole and not shrink and max(picture.lr.shape) > FACE_AT_MOST:
            line += f"; {photo_sentence(picture.patches)}"
        line += f"; in {time.monotonic() - started:.2f} s on the {self.device.type.upper()}"
        if scores:
            line += ("; against the truth: PSNR {psnr:.2f} dB (bicubic {psnr_bicubic:.2f}), "
                     "SSIM {ssim:.3f} (bicubic {ssim_bicubic:.3f})").format(**scores)
        faces = [(np.hstack([resize_square(face, 256) for face in pair]),
                  f"{number}: {patch.side} pixels, {patch.action}")
                 for number, (patch, pair) in enumerate(zip(picture.patches, face_pairs(picture, sr)), 1)]
        return SimpleNamespace(file=str(picture.output), pair=(str(pair[1]), str(pair[0])), lr=fit(picture.lr, SCREEN),
                               hr=picture.hr, invented=invented, faces=faces, line=line)

    def enlarge_all(self, paths, strength):
        """Upscale many uploads, photographs with their faces: (files of pairs bicubic | ours with their names, ZIP or
        None, sentences on what cannot be read)."""
        folder, taken, pairs, problems = Path(tempfile.mkdtemp(dir=self.folder)), set(), [], []
        archive = folder / f"faces_x{self.scale}.zip"
        with zipfile.ZipFile(archive, "w") as pack:
            for path in paths:
                try:
                    picture = self.read(path, choose_output(Path(path.name), folder, taken), whole=False)
                    sr = self.restore(picture, strength, whole=False)
                    write_result(picture, sr)
                    pack.write(picture.output, picture.output.name)
                    pair = np.hstack([enlarge(picture.lr, len(sr) // len(picture.lr)), sr])
                    write_png(picture.output, fit(pair, 1024))      # the gallery shows no more
                    done = f": {photo_sentence(picture.patches)}" if picture.patches else ""
                    pairs.append((str(picture.output), picture.output.name + done))
                except (DataError, OSError) as error:
                    problems.append(str(error))
        return pairs, str(archive) if pairs else None, problems


def fit(picture, side):
    """Reduce (H, W, 3) uint8 so that no side is longer than `side`."""
    factor = side / max(picture.shape)
    return cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA) if factor < 1 else picture


def build_app(workshop, study):
    """Build the page, a gr.Blocks; `study` is a Study or None."""
    import gradio as gr

    def sentence(error):
        gr.Warning(str(error))
        return f"**{error}**"

    def upscale_one(photo, strength, shrink, added, whole):
        nothing = {slider: None, pixels: None, truth: gr.Image(None, visible=False), status: "",
                   invented: gr.Image(None, visible=False), faces: gr.Gallery(None, visible=False),
                   download: gr.DownloadButton(interactive=False)}
        if photo is None:
            return nothing
        try:
            result = workshop.enlarge(Path(photo), strength, shrink, added, whole)
        except (DataError, CheckpointError, UsageError, OSError) as error:
            return nothing | {status: sentence(error)}
        return {slider: result.pair, pixels: result.lr, truth: gr.Image(result.hr, visible=result.hr is not None),
                invented: gr.Image(result.invented, visible=result.invented is not None), status: result.line,
                faces: gr.Gallery(result.faces, visible=bool(result.faces)),
                download: gr.DownloadButton(value=result.file, interactive=True)}

    def enlarge_all(files, strength, progress=gr.Progress()):
        if not files:
            return [], None, "Choose some pictures first."
        if len(files) > FILES:
            return [], None, sentence(f"{len(files)} pictures are too many at once: the limit is {FILES}")
        files = progress.tqdm(files, desc="upscaling", unit="picture")
        pairs, archive, problems = workshop.enlarge_all(map(Path, files), strength)
        lines = [f"{len(pairs)} enlarged, {len(problems)} could not be read."] + [f"- {line}" for line in problems]
        return pairs, archive, "\n".join(lines)

    knob = functools.partial(
        gr.Slider, 0, 1, workshop.args.strength, step=0.05, label="Strength", interactive=workshop.has_knob,
        info="0: faithful and soft. 1: vivid and sharp, more of it invented.", buttons=[])
    shown = functools.partial(gr.Image, format="png", interactive=False, buttons=["fullscreen"], height=220,
                              elem_classes="pixels")

    with gr.Blocks(title="Face SRGAN", analytics_enabled=False) as app:
        gr.Markdown(INTRODUCTION)
        with gr.Tab("Upscale"):
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    photo = gr.Image(type="filepath", image_mode=None, label="Your picture", height=260,
                                     buttons=[], sources=["upload", "clipboard", "webcam"], elem_id="photo")
                    # The file as it is, for read_image, which says what is wrong with it.
                    photo.preprocess = lambda payload: payload and payload.path
                    shrink = gr.Checkbox(label="This is already sharp: shrink it first", render=False,
                                         info="Then the truth is known, and shown beside the result.")
                    samples = []
                    for name, face in sample_faces().items():
                        for hr in (False, True):
                            path = workshop.folder / f"{name}{'_sharp' * hr}.png"
                            write_png(path, face if hr else simulate(face, workshop.scale)[0])
                            samples.append([str(path), hr])
                    gr.Examples(samples, [photo, shrink], label="Or try one of these", example_labels=[
                        "Astronaut", "Astronaut, sharp", "Grace Hopper", "Grace Hopper, sharp"])
                    strength = knob()
                    shrink.render()
                    added = gr.Checkbox(label="Show what was invented", interactive=workshop.has_knob)
                    whole = gr.Checkbox(label="Treat it as one face", info="Otherwise a picture of more than "
                                        f"{FACE_AT_MOST} pixels is a photograph, whose faces are searched for.")
                with gr.Column(scale=2, min_width=300):
                    slider = gr.ImageSlider(label="Bicubic | ours: drag the line, or use ← →", type="filepath",
                                            interactive=False, buttons=["fullscreen"], elem_id="compare")
                    status = gr.Markdown()
                    download = gr.DownloadButton("Download ours as PNG", variant="primary", interactive=False)
                    faces = gr.Gallery(label="The faces, before and after", columns=3, height=260, object_fit="contain",
                                       format="png", interactive=False, buttons=[], visible=False, elem_id="faces")
                    with gr.Row():
                        pixels = shown(label="The small picture")
                        truth = shown(label="The truth", visible=False)
                        invented = shown(label="What was invented", visible=False)
            gr.on([photo.change, strength.change, shrink.input, added.input, whole.input], upscale_one,
                  [photo, strength, shrink, added, whole],
                  [slider, pixels, truth, invented, faces, download, status],
                  trigger_mode="always_last", api_name="upscale", concurrency_id="upscale")
            with gr.Accordion("What do the words mean?", open=False):
                gr.Markdown(WORDS)
        with gr.Tab("Folder"):
            gr.Markdown(f"Up to {FILES} pictures at once: faces, and photographs of up to 16 megapixels.")
            files = gr.File(file_count="multiple", label="Pictures", height=180)
            same = knob()
            go, report = gr.Button("Upscale all", variant="primary"), gr.Markdown()
            archive = gr.File(label="All results as one ZIP", interactive=False)
            gallery = gr.Gallery(label="Bicubic (left) and ours (right)", columns=2, object_fit="contain",
                                 interactive=False, buttons=[], height="auto", elem_id="pairs")
            go.click(enlarge_all, [files, same], [gallery, archive, report], api_name="folder")
        with gr.Tab("Study"):
            if study:
                build_study(study, workshop.folder, sentence)
            else:
                gr.Markdown(STUDY_ABSENT)
        gr.Markdown(PRIVACY)
    return app.queue(default_concurrency_limit=1, max_size=256)


def serve(args):
    """Start the interface and stay until it is stopped; return the exit status."""
    # Read when Gradio is imported or its components are made. What people upload is in our own folder, and goes with it.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for remains in Path(tempfile.gettempdir()).glob("face-srgan-*"):        # of processes that were killed
        with contextlib.suppress(OSError), locked(remains) as dead:
            if dead:
                shutil.rmtree(remains)
    with tempfile.TemporaryDirectory(prefix="face-srgan-", ignore_cleanup_errors=True) as folder, locked(folder):
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            import gradio as gr
            from starlette.middleware import Middleware
        except ImportError:
            raise UsageError("--ui needs Gradio: pip install -r requirements.txt") from None
        workshop = Workshop(args, Path(folder))
        app = build_app(workshop, Study(workshop, args.study, args.ratings, args.seed) if args.study else None)
        try:
            _, address, _ = app.launch(
                server_name=args.host, server_port=args.port, share=False, ssr_mode=False, quiet=True,
                inbrowser=True, prevent_thread_lock=True, run_history=False, footer_links=["settings"],
                theme=gr.themes.Default(font="system-ui", font_mono="ui-monospace"), css=STYLE, head=KEYS,
                max_file_size="50mb", app_kwargs={"middleware": [Middleware(only_this_host)]})
        except OSError:
            raise UsageError(f"--host {args.host} --port {args.port or '7860 to 7959'}: cannot listen there; "
                             "another program does, or the address is not this machine's") from None
        print(f"Face SRGAN is at {address} on the {workshop.device.type}; Ctrl-C ends it", flush=True)
        kept = {str(path) for path in Path(folder).rglob("*")}
        try:
            while True:
                workshop.sweep(kept)
                time.sleep(60)
        except KeyboardInterrupt:       # SIGTERM too
            shutil.rmtree(folder, ignore_errors=True)
            sys.stdout.flush()
            os._exit(130)               # a thread may be inside the network, which does not end gently
        finally:
            app.close(verbose=False)


def report_study(args):
    """Print and plot the results of a study; return the exit status."""
    lines, text = study_results(read_ratings(args.study_report))
    args.output.mkdir(parents=True, exist_ok=True)
    plot = choose_output(Path("mean_opinion_scores.png"), args.output, set())
    plot_opinions(plot, lines)
    print(f"{text}\nPlot: {plot}")
    return 0


# Arguments --------------------------------------------------------------------------------------

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
    add("--photo", action="store_true", help="the inputs are photographs: find their faces, restore each where that "
        "makes it better, and put them back")
    add("--enlarge", type=int, choices=[1, 2, 4], help="of a photograph [4 up to 1 megapixel, 2 up to 4, else 1]")
    add("--background", choices=["network", "bicubic"], help="how the rest of a photograph is enlarged 4 "
        "times [network up to half a megapixel, else bicubic; 1 and 2 times always bicubic]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [%(default)s]")
    add("--precision", default="auto", choices=PRECISIONS, help=PRECISION_HELP)
    add("--batch-size", type=int, default=16, help="pictures of one size at a time [%(default)s]")
    page = parser.add_argument_group("in a browser")
    add = page.add_argument
    add("--ui", action="store_true", help="open the interface in a browser, on this machine only")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in [%(default)s]")
    add("--port", type=int, help="port to listen on [the first free one from 7860 on]")
    add("--study", type=Path, metavar="DIR", help="HR faces for a blind study in the interface: people rate the "
        "originals and four ways to enlarge them, without knowing which is which")
    add("--ratings", type=Path, metavar="CSV", help="file that the ratings are appended to [results/ratings.csv]")
    add("--seed", type=int, default=0, help="of the order in which a rater sees the pictures [%(default)s]")
    add("--study-report", type=Path, metavar="CSV", help="print the mean opinion scores of a study, and plot them")
    args = parser.parse_args(argv)
    args.ratings = args.ratings or args.output / "ratings.csv"
    if args.photo and (not args.inputs or args.hr or args.simulate or args.added):
        raise UsageError("--photo needs INPUT, and does not go with --simulate, --hr or --added")
    if (args.enlarge or args.background) and not args.photo:
        raise UsageError("--enlarge and --background need --photo")
    if args.study and not args.ui:
        raise UsageError("--study needs --ui")
    if args.ui and (args.inputs or args.hr or args.simulate):
        raise UsageError("--ui takes its pictures in the browser: leave out INPUT, --hr and --simulate")
    if args.port is not None and not 1 <= args.port <= 65535:
        raise UsageError("--port must be from 1 to 65535")
    if not 0 <= args.seed <= 2**32:
        raise UsageError(f"--seed must be from 0 to {2**32}")
    if args.strength is None:
        args.strength = 1.0 if args.checkpoint else STRENGTH
    args.checkpoint = args.checkpoint or CHECKPOINT
    if not 0 <= args.strength <= 1:
        raise UsageError("--strength must be from 0 to 1")
    if not 1 <= args.batch_size <= 65536:
        raise UsageError("--batch-size must be from 1 to 65536")
    if args.hr and not args.inputs:
        raise UsageError("--hr needs INPUT")
    return args


def run(argv=None):
    """Run `main` and turn every expected failure into one sentence; return the exit status."""
    try:
        # A name that the terminal cannot show must not end the work.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        return main(parse_arguments(argv))
    except (UsageError, CheckpointError, DataError, DeviceError, OSError) as error:
        print(f"inference.py: {error}", file=sys.stderr)
        return 2
    except (torch.OutOfMemoryError, MemoryError) as error:
        print(f"inference.py: {'the memory is full' if isinstance(error, MemoryError) else CUDA_FULL}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
