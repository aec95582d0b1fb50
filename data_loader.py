"""Everything between files on disk and arrays: reading, naming and writing pictures, batches to train on.

Faces are read once, kept as bytes on the training device, and cut, flipped and reduced there for every step:

    faces, val_faces = load_split((Path("thumbnails128x128"),), None, 100)      # (N, 3, 128, 128) uint8
    lr, hr = FaceBatches(faces, batch_size=16)(step)    # float in [0, 1]: (16, 3, 16, 16), (16, 3, 64, 64)

    python data_loader.py PHOTOS --output FACES         # cut faces to train on out of one's own photographs
"""
import argparse
import contextlib
import functools
import os
import re
import sys
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch.nn import functional as F
from tqdm import tqdm

FACE_SIZE = 128             # FFHQ's thumbnails, the HR size
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".heif")
# What is read, whatever the file is called. Pillow knows more, among them some that start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
with contextlib.suppress(ImportError):      # no requirement
    import pillow_heif
    pillow_heif.register_heif_opener()
    FORMATS += ("HEIF",)
PIXELS = 90_000_000         # of a picture: what has more is not read
Image.MAX_IMAGE_PIXELS = None       # of Pillow's own: `open_image` has ours, and `is_result` needs none
MARK = b"face-srgan"        # the field "Software" of a PNG, or a JPEG's segment, of every result: never an input
VAL_PERCENT = 5             # of a folder without a split of its own
TESTED = Path(__file__).resolve().parent / "checkpoints" / "ffhq_test.txt"      # ids of the faces that scores come from

# How the small picture is made, and how often in training. Pillow's kernels are antialiased; OpenCV's are not: they are
# what `cv2.resize` does when nobody chose, and a network that never saw them fails on them.
KERNELS = {
    "bicubic": (Image.Resampling.BICUBIC, 0.35), "bilinear": (Image.Resampling.BILINEAR, 0.05),
    "lanczos": (Image.Resampling.LANCZOS, 0.05), "area": (Image.Resampling.BOX, 0.1),
    "cv2-linear": (cv2.INTER_LINEAR, 0.35), "cv2-cubic": (cv2.INTER_CUBIC, 0.1),
}
# What else may befall the small picture, as in the robustness table: a blur's sigma in HR pixels, the deviation of
# noise in levels, the quality of a JPEG; "wild" draws them.
DAMAGES = {"none": (0, 0, 0), "blur": (1, 0, 0), "blur3": (3, 0, 0), "noise": (0, 4, 0), "jpeg75": (0, 0, 75),
           "jpeg50": (0, 0, 50), "wild": (0, 0, 0)}
# Of the pictures to train on: how much of its frame the face is reduced to and how often; the shares of those that are
# turned; damaged and, of these, blurred, noisy, JPEG-coded; as soft as a background, in HR too, so that blur may stay.
ZOOMS, ZOOM_SHARES = (1, 0.9, 0.8, 0.7, 0.6, 0.55), (0.5, 0.1, 0.1, 0.1, 0.1, 0.1)
TURNED, HURT, BLURRED, NOISY, COMPRESSED, SOFTENED = 0.2, 0.5, 0.5, 0.35, 0.5, 0.08
BLURS, SOFT_BLURS = tuple(eighths / 8 for eighths in range(1, 9)), (1.5, 2, 3, 4)       # sigmas in LR pixels
warnings.filterwarnings("ignore", module="PIL")        # PIXELS and `read_image` say what is wrong


class DataError(Exception):
    """Input that cannot be used; the message is one sentence for the user."""


# Files ------------------------------------------------------------------------------------------

def find_images(folder):
    """List the pictures below `folder`, sorted, but hidden ones; of a folder that cannot be read, warn on stderr."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: there is no such folder")
    found = []
    for parent, folders, files in os.walk(folder, onerror=lambda error: print(
            f"warning: {error.filename}: {error.strerror}; left out", file=sys.stderr)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def open_image(path):
    """Open a picture of one of FORMATS and at most PIXELS, without decoding it. Raises DataError."""
    try:
        image = Image.open(path, formats=FORMATS)
    except (Image.UnidentifiedImageError, SyntaxError, ValueError):
        raise DataError(f"{path}: not a picture ({', '.join(FORMATS)}; HEIC with pillow-heif), or damaged") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if image.width * image.height > PIXELS:
        image.close()
        raise DataError(f"{path}: larger than {PIXELS:,} pixels")
    return image


def read_image(path):
    """Read a picture of any sort: ((H, W, 3) uint8 RGB, (H, W) uint8 alpha or None). EXIF rotation is applied, 16-bit
    values are scaled to 8 bits, of an animation the first frame is read. Raises DataError with the reason."""
    with open_image(path) as image:
        try:
            image.load()
            with contextlib.suppress(Exception):        # damaged EXIF of a sound picture
                image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                levels = np.nan_to_num(np.asarray(image, dtype=np.float64))
                # 16 bits per sample; "F" (float TIFF) is taken as [0, 1] where it fits.
                levels *= 255 if image.mode == "F" and levels.max() <= 1 else 255 / 65535
                gray = np.rint(levels.clip(0, 255)).astype(np.uint8)
                return np.repeat(gray[..., None], 3, axis=2), None
            alpha = np.array(image.convert("RGBA").getchannel("A")) if image.has_transparency_data else None
            return np.array(image.convert("RGB")), alpha
        except Exception as error:          # Pillow's decoders raise nearly every built-in exception
            raise DataError(f"{path}: cannot be read ({str(error) or 'not enough memory'})") from None


def printable(path):
    """A path or name as text that every file and screen can take: bytes that are not UTF-8 become "\ufffd"; at the
    beginning, nothing is left that a spreadsheet takes for a formula."""
    text = os.fsencode(path).decode(errors="replace")
    return f"./{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_atomically(path, write):
    """Call write(file) on a temporary file, then rename it: `path` is never half written. OSError names the path."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{zlib.crc32(os.fsencode(path.name)):08x}.face-srgan.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_picture(path, picture, extras={}):
    """Write (H, W, 3 or 4) uint8, marked as a result, with Pillow's keywords "icc_profile" and "exif": as a PNG or, if
    `path` ends so, as a .jpg of quality 95 without subsampling."""
    mark, segment = PngImagePlugin.PngInfo(), b"\xff\xef" + (2 + len(MARK)).to_bytes(2, "big") + MARK
    mark.add_text("Software", MARK.decode())
    options = dict(format="JPEG", quality=95, subsampling=0, extra=segment) if path.suffix == ".jpg" else dict(
        format="PNG", compress_level=1, compress_type=3, pnginfo=mark)      # run lengths: fast
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: Image.fromarray(picture).save(file, **options, **extras))


def is_result(path):
    """Tell whether a file was written by inference.py, at any time."""
    try:
        if path.suffix == ".csv":
            with open(path, "rb") as file:
                return file.readline().startswith((b"image,psnr,ssim,psnr_y,", b"image,face,x,y,size,"))
        with Image.open(path, formats=FORMATS) as image:        # of any size
            return image.info.get("Software") == MARK.decode() or ("APP15", MARK) in getattr(image, "applist", ())
    except Exception:       # not a picture at all, so not ours; reading it will say why
        return False


def find_inputs(inputs, output, results=False):
    """List the pictures to upscale: (pairs of (path, relative path), sentences on bad inputs). Without `results`, those
    of earlier calls are left out: in folders everywhere, as files when they lie in `output`."""
    found, problems = {}, []
    for item in map(Path, inputs):
        if item.is_dir():
            files = [(path, path.relative_to(item)) for path in find_images(item) if results or not is_result(path)]
            if not files:
                problems.append(f"{item}: no pictures in this folder (earlier results do not count)")
        elif item.is_file():
            own = not results and output.resolve() in item.resolve().parents and is_result(item)
            files = [] if own else [(item, Path(item.name))]
            problems += [f"{item}: a result of an earlier call, not upscaled again"] * own
        else:
            files = []
            problems.append(f"{item}: there is no such file or folder")
        for path, relative in files:
            found.setdefault(path.resolve(), (path, relative))
    return list(found.values()), problems


def choose_output(relative, output, taken, suffix=".png"):
    """Choose the file for a result: DIR/<relative path with `suffix`> or, where that would replace another result of
    this call or a file that is not an earlier result, a name beside it."""
    stem = relative.with_suffix("")
    for name in chain((f"{stem}{suffix}", f"{relative}{suffix}"), (f"{stem}-{n}{suffix}" for n in count(2))):
        path = output / name
        key = str(path).casefold()      # some file systems take A.png and a.png for one
        if key not in taken and (is_result(path) or not os.path.lexists(path)):
            taken.add(key)
            return path


def split_files(train_dirs, val_dir=None):
    """List the training and the validation files of some folders; they never share a file.
    With `val_dir`, its pictures validate and all others train. Without, FFHQ's own tree (`.../00000/00000.png`) gets
    its official split, ids below 60000 to train; in any other folder, and a part of FFHQ without ids of both kinds, a
    checksum of the name chooses about one file in twenty, so that adding files never moves one. What is called like a
    TESTED face is left out, of other folders than FFHQ's own with a warning."""
    def in_ffhq(path):
        return re.fullmatch(r"(\d\d)000/\1\d{3}", f"{path.parent.name}/{path.stem}")

    def chosen(path):
        return zlib.crc32(os.fsencode(path.name)) % 100 < VAL_PERCENT

    def faces_of(folder):
        tested, found = set(TESTED.read_text().split()), find_images(folder)
        named = {path for path in found if path.stem.removeprefix("img000") in tested}      # StyleGAN's tree has "img000"
        if strange := sum(not in_ffhq(path) for path in named):
            print(f"warning: {folder}: {strange} called as in {TESTED.name}, so test faces, are left out (if they are "
                  "others, rename them)", file=sys.stderr)
        if not (found := [path for path in found if path not in named]):
            raise DataError(f"{folder}: no pictures{' but test faces' * bool(named)} found ({', '.join(SUFFIXES)})")
        return found

    files = {path.resolve(): path for folder in train_dirs for path in faces_of(folder)}
    if val_dir is not None:
        val = faces_of(val_dir)
    else:
        *_, last = files.values()       # too few files for a share: one validates
        for rule in (lambda path: path.stem >= "60000" if in_ffhq(path) else chosen(path), chosen, last.__eq__):
            if 0 < len(val := [path for path in files.values() if rule(path)]) < len(files):
                break
    held_out = {path.resolve() for path in val}
    if train := [path for key, path in files.items() if key not in held_out]:
        return train, val
    raise DataError(f"{val_dir}: holds every training picture, so none is left to train on" if val_dir else
                    f"{val[0]}: one picture is too few to train and to validate on")


def square_face(picture):
    """Cut the centre square of an (H, W, 3) uint8 picture and resize it to 128x128, antialiased."""
    return np.array(ImageOps.fit(Image.fromarray(picture), (FACE_SIZE,) * 2, Image.Resampling.LANCZOS))


@functools.lru_cache(maxsize=1)     # both stages of a training may use the same faces
def load_split(train_dirs, val_dir, val_count, progress=True):
    """Read the faces of some folders: (those to train on, at most `val_count` to validate on), as of `load_faces`."""
    train_files, val_files = split_files(train_dirs, val_dir)
    val_files = val_files[::-(-len(val_files) // val_count)]
    return load_faces(train_files, progress), load_faces(val_files, progress=False)


def load_faces(files, progress=True):
    """Decode faces once: (N, 3, 128, 128) uint8. 70,000 of them are 3.4 GB. A file that cannot be read is named in a
    warning on stderr and left out, and those that are too small are counted. Raises DataError where none is left."""
    faces = torch.empty(len(files), 3, FACE_SIZE, FACE_SIZE, dtype=torch.uint8)

    def decode(places):
        good = []
        for place in places:
            try:
                faces[place] = torch.from_numpy(square_face(picture := read_image(files[place])[0])).permute(2, 0, 1)
                small.extend([place] * (min(picture.shape[:2]) < FACE_SIZE))
                good.append(place)
            except DataError as error:
                tqdm.write(f"warning: {error}; left out", file=sys.stderr)
        return good

    # Chunks, and no more threads than processors: to pass the GIL on at every picture is slower than one thread alone.
    chunks, good, small = [range(len(files))[i:i + 100] for i in range(0, len(files), 100)], [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool, \
            tqdm(None, "reading faces", len(files), unit="face", disable=not progress, leave=False) as bar:
        for chunk, decoded in zip(chunks, pool.map(decode, chunks)):
            good += decoded
            bar.update(len(chunk))
    if not good:
        raise DataError(f"{Path(files[0]).parent}: none of the {len(files)} pictures can be read")
    if small:
        print(f"warning: {len(small)} pictures are smaller than {FACE_SIZE}x{FACE_SIZE}: no sharp HR", file=sys.stderr)
    for place, source in enumerate(good):       # in place: a second copy of all may not fit into memory
        faces[place] = faces[source]
    return faces[:len(good)]


# Faces in photographs ---------------------------------------------------------------------------

# YuNet (Wu et al. 2023, MIT licence), from OpenCV's model zoo.
DETECTOR = Path(__file__).resolve().parent / "checkpoints" / "face_detection_yunet_2023mar.onnx"
FADED = 128                                 # levels between which nearly all of a picture lies, if it is faded or dark
DETECTION_VIEWS = ((320, 0), (320, 2), (640, 0), (640, 3), (1280, 0), (2560, 0))    # longest side; sigma of a blur
PROPOSAL_SCORE, DETECTION_SCORE = 0.5, 0.8  # at first sight; looked at again: below, coffee cups become faces
CERTAIN, HOPELESS, CLOSE = 0.89, 0.85, 128  # below, a result is doubtful, is none; pixels a side of that second look
SAME = 255**2 / 10**3.7                     # mean squared error, of a PSNR of 37 dB, below which pictures look the same
SHARP, MIRRORED = 80, 0.12                  # of a face to train on: least working size, most of its side outside


@dataclass(frozen=True)
class Face:
    """A face in a photograph: centre and side of its square FFHQ frame, unturned, in pixels of the photograph;
    how far the head is turned clockwise, in degrees from -180 to 180; the detector's score, at most 1."""
    x: float
    y: float
    size: float
    angle: float
    score: float

    def square(self, height, width):
        """The frame in whole pixels, moved and cut until it lies inside a picture: (top, left, side)."""
        side = min(max(1, round(self.size)), height, width)
        return (*(min(max(0, round(centre - side / 2)), limit - side)
                  for centre, limit in ((self.y, height), (self.x, width))), side)


def find_faces(picture):
    """Find the faces in an (H, W, 3) uint8 photograph, of any size and turn: a list of Face, row by row. The detector
    sees it at several sizes, since it misses large close-ups and small faces, once blurred, against coarse grain (238
    of 312 faces, not 181), and turned; what might be a face is looked at again. Raises DataError without its file."""
    if not DETECTOR.is_file():
        raise DataError(f"{DETECTOR}: the face detector is missing; it comes with the repository")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)    # OpenCV 5 warns about every network
    detector = cv2.FaceDetectorYN.create(str(DETECTOR), "", (320, 320), PROPOSAL_SCORE)
    (height, width), found, picture = picture.shape[:2], [], full_contrast(picture)
    for side, sigma in DETECTION_VIEWS:
        factor = side / max(height, width)
        if factor > 4 and side > 320:
            break           # enlarging shows nothing new
        size = [max(1, round(length * factor)) for length in (width, height)]
        view = cv2.resize(picture[..., ::-1], size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
        view = cv2.GaussianBlur(view, (0, 0), sigma) if sigma else view
        for quarters in range(4):
            for points, score in _detect(detector, np.rot90(view, quarters)):       # complex numbers turn them back
                face = _frame(points * 1j ** quarters / factor + complex(width, height) / 2, score)
                tilt = abs((face.angle - 90 * quarters + 180) % 360 - 180)      # a lying head is easily seen wrong
                found.append((score - tilt / 720, face, view, factor))
    proposed, faces = [], []            # the same face is seen several times
    for _, face, view, factor in sorted(found, key=lambda proposal: -proposal[0]):
        if not any(_same(face, other) for other in proposed):
            proposed.append(face)
            seen = _look_again(detector, face, view, factor)
            sure = seen.score > 0.7 and max(face.score, seen.score) > DETECTION_SCORE
            if sure and not any(_same(seen, other) for other in faces):
                faces.append(seen)
    rows = []       # from above; in one are all that lie less than half a face below its first
    for face in sorted(faces, key=lambda face: face.y):
        if not rows or face.y - rows[-1][0].y > face.size / 2:
            rows.append([])
        rows[-1].append(face)
    return [face for row in rows for face in sorted(row, key=lambda face: face.x)]


def face_score(photo, face, factor):
    """How surely the detector sees a known Face in an (H, W, 3) uint8 photograph that was enlarged since by a factor:
    from 0.5, for less too, to 1. Of 100 sharp faces, 99 have more than 0.89."""
    face = replace(face, x=face.x * factor, y=face.y * factor, size=face.size * factor)
    view = cv2.copyMakeBorder(full_contrast(cut_face(photo, face, 160)), 24, 24, 24, 24, cv2.BORDER_REPLICATE)
    detector = cv2.FaceDetectorYN.create(str(DETECTOR), "", (320, 320), PROPOSAL_SCORE)
    return max((score for _, score in _detect(detector, view[..., ::-1])), default=PROPOSAL_SCORE)


def _detect(detector, view):
    """List faces of an (H, W, 3) uint8 BGR view: (five points, as complex numbers from its centre; score)."""
    detector.setInputSize(view.shape[1::-1])
    rows, centre = detector.detect(np.ascontiguousarray(view))[1], complex(*view.shape[1::-1]) / 2
    return [(row[4:14:2] + 1j * row[5:14:2] - centre, float(row[14])) for row in (() if rows is None else rows)]


def _same(face, other):
    """Tell whether two views are of the same face: upside down, its centre is the chin."""
    opposed = np.cos(np.radians(face.angle - other.angle)) < 0
    return np.hypot(face.x - other.x, face.y - other.y) < (0.2 + 0.1 * opposed) * (face.size + other.size)


def _look_again(detector, face, view, factor):
    """Look at a proposed Face closely, in twelve turns, in the BGR view, `factor` times the photograph. The detector
    sees every face as upright as it can, but is the surer the more upright it is: the most upright turn counts."""
    zoom, there = CLOSE / 2 / (face.size * factor), replace(face, x=face.x * factor, y=face.y * factor)
    views, scores = {}, np.full(12, PROPOSAL_SCORE)
    for turn in range(12):
        matrix = turning(there, 30 * turn, zoom, CLOSE)
        close = cv2.warpAffine(view, matrix, (CLOSE, CLOSE), borderMode=cv2.BORDER_REPLICATE)
        for points, score in _detect(detector, close):
            seen = _frame(points * 1j ** (turn / 3) / (zoom * factor) + complex(face.x, face.y), score)
            if score > scores[turn] and _same(seen, face) and 0.6 < seen.size / face.size < 1.6:
                views[turn], scores[turn] = seen, score
    around = np.stack([np.roll(scores, 1), scores, np.roll(scores, -1)])
    upright = 0.02 * np.cos(np.arange(12) * np.pi / 6)          # as most heads are
    support, own = around.T @ [0.15, 0.7, 0.15] + upright, round(face.angle / 30) % 12
    turn, weights = int(support.argmax()), np.square(around[:, support.argmax()] - PROPOSAL_SCORE)
    angle = 30 * (turn + (weights[2] - weights[0]) / max(weights.sum(), 1e-9))
    doubt = 0.01 + max(0, 0.92 - scores.max()) / 2      # of a very blurred face, every turn has some support
    if turn in views and np.cos(np.radians(angle - face.angle)) < 0.97 and (
            turn == own or support[turn] > support[own] + doubt):
        face = replace(views[turn], angle=float((angle + 180) % 360 - 180))
    return replace(face, score=float(scores.max()))


def _frame(points, score):
    """Make a Face of eyes, nose and mouth corners, five complex numbers, by the rule that cut FFHQ (Karras et al. 2017,
    arXiv:1710.10196, appendix C), times 0.97 for this detector: FFHQ's frames come out 1.01 times as large +- 0.07."""
    across, down = points[1] - points[0], (points[3] + points[4]) / 2 - (points[0] + points[1]) / 2
    side, angle = 0.97 * 2 * max(2 * abs(across), 1.8 * abs(down)), np.degrees(np.angle(across - 1j * down))
    centre = (points[0] + points[1]) / 2 + 0.1 * down
    return Face(float(centre.real), float(centre.imag), float(side), float(angle), score)


def reduction_error(picture, again, even=0.9):
    """Mean squared error of two (H, W, 3) uint8 pictures. From 30 pixels on, grain does not count: what is lost
    everywhere alike, so that the median of 8x8 fields has more than `even` of the mean, and less than 100."""
    if min(picture.shape[:2]) < 30:
        return cv2.norm(picture, again, cv2.NORM_L2SQR) / picture.size
    errors = np.square(picture.astype(np.float32) - again).mean(2)
    middle = np.median(cv2.resize(errors, (8, 8), interpolation=cv2.INTER_AREA))
    return errors.mean() - middle * (max(even * errors.mean(), SAME / 2) < middle < 100)


def motion(square):
    """Tell along which angle, in degrees, an (S, S, 3) uint8 crop is blurred by motion, or None: most detail that is
    left lies across it (so of 1 % of sharp faces, and of nearly all of 128 pixels that are blurred by 6 and more)."""
    middle = slice(len(square) // 4, -(len(square) // 4))
    gray = cv2.cvtColor(square, cv2.COLOR_RGB2GRAY).astype(np.float32)
    slopes = [part[middle, middle].ravel() for part in np.gradient(gray - cv2.GaussianBlur(gray, (0, 0), 1))]
    strengths, ways = np.linalg.eigh(np.cov(slopes))
    return float(np.degrees(np.arctan2(*ways[:, 0]))) if strengths[0] < 0.25 * strengths[1] else None


def working_size(square):
    """Say how much an (S, S, 3) uint8 crop of a face shows: 16, 24 or the smallest side, from 32 up to S, to which it
    can be reduced and enlarged again and be the same: a PSNR above 37 dB in the middle, or an error below 0.12 of what
    half that side would make (24: 0.04; 16, at 14: 0.08, or 0.2 and 37 dB). Much grain leaves 40 or 32. (Its errors are
    in checkpoints/photographs.md.)"""
    square = full_contrast(resize(square, 256) if len(square) > 256 else square)    # 256: far above any limit
    size, middle = len(square), slice(len(square) // 4, -(len(square) // 4))
    angle = motion(square) if size > 16 else None
    if angle is not None:       # measured along it
        square = cut_face(square, Face(size / 2, size / 2, size, angle, 1), size)

    def error(side, even=0.9):
        again = resize(resize(square, side, side if angle is None else size), size)
        return reduction_error(square[middle, middle], again[middle, middle], even)

    finest = round(0.8 * size)       # above it, a blurred face has nothing but grain
    if size >= 60 and error(finest) < error(finest, 1):
        error = functools.partial(error, even=0.8)
    if size > 16 and error(14) < max(0.08 * error(7), min(SAME, 0.2 * error(7))):
        return 16
    if size > 25 and error(24, even=1) < 0.04 * error(12, even=1):
        return 24
    if size < 34:
        return size
    rough, curve = [], np.array([1, -2, 1])     # the deviation of grain (after Immerkaer 1996), as it is, in 48 pixels
    for gray in (part.mean(2, dtype=np.float32) for part in (square, resize(square, 48))):
        curved = np.percentile(np.abs(cv2.sepFilter2D(gray, -1, curve, curve)), 25) / 1.91
        rough.append(curved * 255 / max(np.ptp(np.percentile(gray, (1, 99))), 32))
    most = size if rough[0] < 0.8 or rough[1] < 4 else 40 if rough[1] < 6 else 32
    for side in (32, 36, 40, 46, 52, 60, 70, 80, 96, 112, 128, 160, 192, 224):
        if side < 0.95 * size and (error(side) < SAME or error(side) < 0.12 * error(side // 2)):
            return min(side, most) if side < finest else side
    return size


def cut_face(photo, face, size=FACE_SIZE):
    """Cut a face out of an (H, W, 3) uint8 photograph as FFHQ does, upright, (size, size, 3) uint8; beyond the border
    the photograph is mirrored."""
    finer = size * -(-round(face.size) // size)     # turned at a multiple of the size, then reduced
    matrix = turning(face, face.angle, finer / face.size, finer)
    cut = cv2.warpAffine(photo, matrix, (finer, finer), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
    return np.array(Image.fromarray(cut).resize((size, size), Image.Resampling.LANCZOS))


def turning(face, angle, zoom, side):
    """The matrix for cv2.warpAffine that turns a photograph counterclockwise by degrees about a face and enlarges it,
    so that the face comes into the middle of a square of `side` pixels."""
    place = np.array([face.x, face.y])
    matrix = cv2.getRotationMatrix2D(place - 0.5, angle, zoom)      # whole numbers are the centres of pixels
    matrix[:, 2] += side / 2 - place
    return matrix


def cut_faces(photos, output):
    """Make a set to train on of photographs: write every face that is large and sharp enough to `output`, as <name of
    the photograph>_<its checksum>_<number>.png, over no file that is there. Returns the exit status."""
    files, problems = find_inputs(photos, output)
    files, numbers = [pair for pair in files if output.resolve() not in pair[0].resolve().parents], Counter(cut=0)
    for path, relative in tqdm(files, "cutting faces", unit="photograph", disable=None):
        try:
            photo = read_image(path)[0]
            name = f"{relative.stem}_{zlib.crc32(photo):08x}"       # other albums have files of the same names
            for number, face in enumerate(find_faces(photo), 1):
                target = output / relative.with_name(f"{name}_{number}.png")
                cut, angle = cut_face(photo, face), np.radians(face.angle)
                reach = face.size / 2 * (abs(np.sin(angle)) + abs(np.cos(angle)))
                room = min(face.x, face.y, photo.shape[1] - face.x, photo.shape[0] - face.y)
                fate = (f"smaller than {FACE_SIZE} pixels" if face.size < FACE_SIZE else
                        "cut off by the border" if reach - room > MIRRORED * face.size else
                        "not sharp" if working_size(cut) < SHARP else "already there" if target.exists() else "cut")
                if fate == "cut":
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(target, lambda file: Image.fromarray(cut).save(file, format="PNG"))
                numbers[fate] += 1
        except (DataError, OSError) as error:
            problems.append(str(error))
    print(*(f"data_loader.py: {sentence}\n" for sentence in problems), sep="", end="", file=sys.stderr)
    fates = ", ".join(f"{number} {fate}" for fate, number in numbers.items())
    print(f"{len(files)} photographs, {sum(numbers.values())} faces: {fates}")
    return 2 if not files else 1 if problems else 0


def resize(picture, width, height=None):
    """Resize (H, W) or (H, W, 3) uint8, antialiased, with Pillow's bicubic kernel; by default to a square."""
    return np.array(Image.fromarray(picture).resize((width, height or width), Image.Resampling.BICUBIC))


def rescale(picture, factor):
    """Resize (H, W) or (H, W, 3) uint8 by a factor; to 4 or 8 times, this is the baseline of all scores."""
    return resize(picture, *(max(1, round(side * factor)) for side in picture.shape[1::-1]))


def reduce(picture, factor):
    """Reduce a blurred (H, W, 3) uint8 picture by a factor; smooth what is left of grain, told by what that loses."""
    small, gain = rescale(picture, factor), contrast(picture)[1]        # as the networks see it
    lost = cv2.absdiff(np.ascontiguousarray(picture), resize(small, *picture.shape[1::-1]))
    grain = 1.48 * float(np.median(lost)) * factor * gain - 1           # about its deviation, beyond what JPEG does
    return cv2.bilateralFilter(small, 5, min(40, 20 * grain) / gain, 1.2) if grain > 0 else small


def contrast(picture):
    """Tell how to bring a faded or dark (H, W, 3) uint8 picture to the full range, by (picture - offset) * gain:
    (offset, gain). Of others, and of those with a small bright or dark thing, which may be a face: (0, 1)."""
    step = max(picture.shape) // 512 + 1
    low, lowest, highest, high = np.percentile(picture[::step, ::step], (1, 0.02, 99.98, 99))
    faded = high - low < FADED and highest - lowest < 1.25 * FADED
    return (low, 255 / max(high - low, 8)) if faded else (0, 1)


def full_contrast(picture, like=None):
    """Bring a faded or dark (H, W, 3) uint8 picture, or one of the levels of `like`, to the full range; others stay."""
    offset, gain = contrast(picture if like is None else like)
    return picture if gain == 1 else ((np.arange(256) - offset) * gain).clip(0, 255).astype(np.uint8)[picture]


# Tensors ----------------------------------------------------------------------------------------

def to_tensor(pictures):
    """Stack (H, W, 3) uint8 pictures of one size as (N, 3, H, W) float in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def to_uint8(batch):
    """Turn (N, 3, H, W) float, clamped to [0, 1], into (N, H, W, 3) uint8 NumPy pictures."""
    return batch.mul(255).round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def _levels(values):
    """Round and clip values to the levels 0 to 255, halves upwards as Pillow and OpenCV do."""
    return (values + 0.5).floor_().clamp_(0, 255)


@functools.lru_cache(maxsize=16)        # of large pictures they are large
def _resize_matrix(size, new_size, kernel, device="cpu"):
    """The library's own weights for resizing `size` samples to `new_size`; one product with them does its work."""
    identity = np.eye(size, dtype=np.float32)
    if kernel.startswith("cv2-"):
        weights = cv2.resize(identity, (new_size, size), interpolation=KERNELS[kernel][0])
    else:
        weights = np.asarray(Image.fromarray(identity).resize((new_size, size), KERNELS[kernel][0]))
    return torch.tensor(weights, device=device)                     # (size, new_size)


def _blur_matrix(size, sigma):
    """Weights for a Gaussian blur of `size` samples, sigma above 0."""
    kernel = cv2.getGaussianKernel(2 * round(3 * sigma) + 1, sigma)
    return torch.tensor(cv2.sepFilter2D(np.eye(size, dtype=np.float32), -1, kernel, np.ones(1)))    # (size, size)


@functools.lru_cache(maxsize=8)
def _crop_table(cuts, size, device):
    """A table, from which a batch picks its own with one index: weights for taking `cut` of a face's samples and
    resizing them to `size`, for each of `cuts` and every place; beyond the border the face is mirrored. Returns it,
    (places, 128, size), and by cut where its places begin in it and how many they are."""
    matrices, first = [], []
    mirrored = np.pad(np.arange(FACE_SIZE), FACE_SIZE - 1, mode="reflect")
    for cut in cuts:
        first.append(len(matrices))
        for start in range(min(0, FACE_SIZE - cut), max(0, FACE_SIZE - cut) + 1):
            samples = torch.from_numpy(mirrored[start + FACE_SIZE - 1:][:cut])
            weights = _resize_matrix(cut, size, "bicubic")
            matrices.append(torch.zeros(FACE_SIZE, size).index_add_(0, samples, weights))
    return torch.stack(matrices).to(device), np.array(first), abs(FACE_SIZE - np.array(cuts)) + 1


@functools.lru_cache(maxsize=8)
def _degradation_tables(size, scale, device):
    """Weights of the KERNELS for a reduction, (K, size, size / scale), whether they are Pillow's, (K,), and weights
    of the BLURS and SOFT_BLURS, (12, size, size)."""
    return (torch.stack([_resize_matrix(size, size // scale, kernel) for kernel in KERNELS]).to(device),
            torch.tensor([not kernel.startswith("cv2-") for kernel in KERNELS], device=device),
            torch.stack([_blur_matrix(size, sigma * scale) for sigma in BLURS + SOFT_BLURS]).to(device))


def turn(levels, angles):
    """Turn (N, 3, S, S) levels about their centre by N angles, in degrees, clockwise; borders are mirrored."""
    cos, sin = np.cos(np.radians(angles)), np.sin(np.radians(angles))
    matrices = np.moveaxis([[cos, sin, 0 * cos], [-sin, cos, 0 * cos]], -1, 0)      # (N, 2, 3)
    matrices = torch.tensor(matrices, dtype=levels.dtype, device=levels.device)
    grid = F.affine_grid(matrices, levels.shape, align_corners=False)
    return _levels(F.grid_sample(levels, grid, "bicubic", "reflection", align_corners=False))


def _resample(levels, columns, rows, round_between):
    """Apply matrices of weights to the width, then to the height, of (N, 3, H, W) levels. Pillow
    rounds and clips between its passes too: `round_between`, a bool or one per picture."""
    levels = levels @ columns
    if isinstance(round_between, torch.Tensor):
        levels = torch.where(round_between, _levels(levels), levels)
    elif round_between:
        levels = _levels(levels)
    return _levels((levels.mT @ rows).mT)


def downscale(hr, scale, kernel="bicubic"):
    """Make the low-resolution picture: (N, 3, sH, sW) in [0, 1] -> (N, 3, H, W), quantised to 8 bits, within one grey
    level of the library's own result. The default is the protocol of all scores: Pillow's antialiased bicubic."""
    rows, columns = (_resize_matrix(side, side // scale, kernel, hr.device) for side in hr.shape[-2:])
    return _resample(hr * 255, columns, rows, not kernel.startswith("cv2-")) / 255


def _blur(levels, scale, which, blurs):
    """Blur those of (N, 3, S, S) levels that `which` lists, in place, by the BLURS + SOFT_BLURS at `blurs`."""
    if len(which):
        blur = _degradation_tables(levels.shape[-1], scale, levels.device)[2][torch.from_numpy(blurs), None]
        levels[which] = _resample(levels[which], blur, blur, False)


def degrade(hr, scale, rng, rank=0, world=1):
    """Make low-resolution pictures as the world does: a kernel each and, for every second one, by chance, blur, noise
    and JPEG. hr is (N, 3, sS, sS) in [0, 1], `rng` a numpy Generator; returns (N, 3, S, S), 8-bit levels. Of a batch
    shared by processes, hr has the pictures rank, rank + world, ...: each process draws for all, and takes its own."""
    size, device, total = hr.shape[-1], hr.device, len(hr) * world
    small, mine = size // scale, slice(rank, None, world)
    shares = np.array([share for _, share in KERNELS.values()])
    kernels = rng.choice(len(KERNELS), total, p=shares / shares.sum())
    hurt = rng.random((3, total)) < np.where(rng.random(total) < HURT, [[BLURRED], [NOISY], [COMPRESSED]], 0)
    blurs, qualities = rng.integers(0, len(BLURS), total), rng.integers(40, 96, total)
    noise = {i: rng.standard_normal((3, small, small), dtype=np.float32) * np.float32(rng.uniform(1, 8))
             for i in np.flatnonzero(hurt[1])}
    noise = [noise[i] for i in range(total)[mine] if i in noise]
    blurred, noisy, coded = (np.flatnonzero(which[mine]) for which in hurt)

    reductions, pillow, _ = _degradation_tables(size, scale, device)
    levels = hr * 255
    _blur(levels, scale, blurred, blurs[mine][blurred])
    kernels = torch.from_numpy(kernels[mine]).to(device)
    reduction = reductions[kernels][:, None]
    lr = _resample(levels, reduction, reduction, pillow[kernels][:, None, None, None])
    if noise:
        lr[noisy] = _levels(lr[noisy] + torch.from_numpy(np.stack(noise)).to(device))
    lr /= 255
    if len(coded):      # OpenCV codes one picture at a time, on the CPU; of training, on the thread of Prefetch
        pictures = zip(to_uint8(lr[coded]), qualities[mine][coded])
        lr[coded] = to_tensor([jpeg(picture, quality) for picture, quality in pictures]).to(device)
    return lr


def simulate(hr, scale, kernel="bicubic", damage="none"):
    """Cut an (H, W, 3) uint8 picture to a multiple of `scale` and reduce it with one of KERNELS and one of DAMAGES:
    (lr, hr), both uint8; a picture always meets the same fate. "wild" is turned by up to 30 degrees, reduced to 0.55 to
    1 of its frame, half blurred by up to 2 HR pixels, half with noise of up to 8 levels, 70 % in JPEG 40 to 95."""
    height, width = (side - side % scale for side in hr.shape[:2])
    if not height or not width:
        raise DataError(f"only {hr.shape[1]}x{hr.shape[0]} pixels, too small to reduce")
    hr = np.ascontiguousarray(hr[:height, :width])
    rng = np.random.default_rng(zlib.crc32(hr.tobytes()))
    sigma, deviation, quality = DAMAGES[damage]
    if damage == "wild":
        angle, zoom, kernel = rng.uniform(-30, 30), rng.uniform(0.55, 1), rng.choice(list(KERNELS)[:6])    # no more
        reduced = Image.fromarray(hr).resize((round(width * zoom), round(height * zoom)), Image.Resampling.LANCZOS)
        matrix = cv2.getRotationMatrix2D(((reduced.width - 1) / 2, (reduced.height - 1) / 2), angle, 1)
        matrix[:, 2] += (width - reduced.width) / 2, (height - reduced.height) / 2
        hr = cv2.warpAffine(np.array(reduced), matrix, (width, height), flags=cv2.INTER_CUBIC,
                            borderMode=cv2.BORDER_REFLECT_101)
        sigma, deviation = rng.uniform(0, 2) * (rng.random() < 0.5), rng.uniform(0, 8) * (rng.random() < 0.5)
        quality = rng.integers(40, 96) * (rng.random() < 0.7)
    lr = to_uint8(downscale(to_tensor([cv2.GaussianBlur(hr, (0, 0), sigma) if sigma else hr]), scale, kernel))[0]
    if deviation:
        lr = np.rint(lr + rng.standard_normal(lr.shape) * deviation).clip(0, 255).astype(np.uint8)
    return jpeg(lr, quality) if quality else lr, hr


def jpeg(picture, quality):
    """Pass an (H, W, 3) uint8 RGB picture through JPEG (4:2:0) of a quality from 1 to 100."""
    data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, int(quality)])[1]
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


# Batches ----------------------------------------------------------------------------------------

class FaceBatches:
    """Training batches as a function of the step, so that a resumed training sees what an uninterrupted one sees, and
    several processes share a batch without talking: process `rank` of `world` makes pictures rank, rank + world, ...
    Args:
        faces: (N, 3, 128, 128) uint8, on `device` or on the CPU.
        batch_size: pictures in the batch of all processes.
        patch_size: height and width of the HR patches, a multiple of the scale, at most 128.
        degradation: "bicubic" (patches as they are, and downscale alone) or "mixed" (zoomed, turned, and degrade).
        device: where batches are made; default: where the faces are."""

    def __init__(self, faces, batch_size=16, patch_size=64, scale=4, degradation="mixed", seed=0, rank=0, world=1,
                 device=None):
        self.faces, self.batch_size, self.patch_size, self.scale = faces, batch_size, patch_size, scale
        self.mixed, self.seed, self.rank, self.world = degradation == "mixed", seed, rank, world
        self.device = device or faces.device
        cuts = tuple(round(patch_size / zoom) for zoom in ZOOMS)
        self.crops, self.first, self.number = _crop_table(cuts, patch_size, self.device)
        self.epoch, self.order = -1, None

    def _index(self, position):
        """The face at a position of the endless sequence of shuffled epochs."""
        epoch, place = divmod(position, len(self.faces))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.faces))
        return self.order[place]

    def __call__(self, step):
        """Make the batch of a step: lr (N, 3, patch/scale, patch/scale), hr (N, 3, patch, patch), N = batch / world."""
        rng = np.random.default_rng([self.seed, 1, step])       # for the whole batch: each process draws the same
        index = [self._index(step * self.batch_size + i) for i in range(self.batch_size)]
        turned = rng.random(self.batch_size) < TURNED * self.mixed
        angles = rng.uniform(-30, 30, self.batch_size)
        # Turned ones are reduced, which hides that turning has softened them.
        cuts = self.mixed * np.where(turned, rng.integers(2, len(ZOOMS), self.batch_size),
                                     rng.choice(len(ZOOMS), self.batch_size, p=ZOOM_SHARES))
        places = self.first[cuts] + (rng.random((2, self.batch_size)) * self.number[cuts]).astype(int)
        flips, soft = rng.random((2, self.batch_size)) < [[0.5], [SOFTENED * self.mixed]]
        blurs = len(BLURS) + rng.integers(0, len(SOFT_BLURS), self.batch_size)

        mine = slice(self.rank, None, self.world)
        faces = self.faces[torch.tensor(index[mine], device=self.faces.device)]
        if faces.device.type != self.device.type:       # the faces did not fit there
            faces = faces.pin_memory().to(self.device, non_blocking=True)
        faces = faces.float()
        rows, columns = self.crops[torch.from_numpy(places[:, mine]).to(self.device)][:, :, None]   # (N, 1, 128, patch)
        if len(which := np.flatnonzero(turned[mine])):
            faces[which] = turn(faces[which], angles[mine][which])
        hr = _resample(faces, columns, rows, True)
        _blur(hr, self.scale, which := np.flatnonzero(soft[mine]), blurs[mine][which])
        hr = torch.where(torch.from_numpy(flips[mine]).to(self.device)[:, None, None, None], hr.flip(-1), hr) / 255
        if self.mixed:
            return degrade(hr, self.scale, np.random.default_rng([self.seed, 2, step]), self.rank, self.world), hr
        return downscale(hr, self.scale), hr


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="Cut faces out of photographs, 128x128 as in FFHQ, to train on.")
    arguments.add_argument("photos", nargs="+", metavar="PHOTO", help="files and folders (recursively)")
    arguments.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the faces")
    try:
        sys.exit(cut_faces(**vars(arguments.parse_args())))
    except KeyboardInterrupt:
        sys.exit(130)
