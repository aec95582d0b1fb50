"""Everything between face files on disk and a batch of tensors.

Faces are read once, kept as bytes, (N, 3, 128, 128) uint8, on the training device, and cut,
flipped and reduced there for every step:

    train_files, val_files = split_files([Path("thumbnails128x128")])
    faces = load_faces(train_files)                     # (N, 3, 128, 128) uint8
    batches = FaceBatches(faces, batch_size=16)
    lr, hr = batches(step)                              # float in [0, 1]: (16, 3, 16, 16), (16, 3, 64, 64)
"""
import functools
import re
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

FACE_SIZE = 128             # FFHQ's thumbnails, the HR size
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
VAL_PERCENT = 5             # of a folder without a split of its own

# How the small picture is made from the large one. Pillow's kernels are antialiased (the kernel
# widens with the reduction), OpenCV's linear and cubic are not: they are what `cv2.resize` does
# when nobody chose, and a network that never saw them fails on them.
KERNELS = {
    "bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX,
    "cv2-linear": cv2.INTER_LINEAR, "cv2-cubic": cv2.INTER_CUBIC,
}


class DataError(Exception):
    """Input that cannot be used; the message is one sentence for the user."""


# Files ------------------------------------------------------------------------------------------

def find_images(folder):
    """List the pictures below `folder`, in sorted order. Hidden files and folders are left out."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES
                  and path.is_file()
                  and not any(part.startswith(".") for part in path.relative_to(folder).parts))


def read_image(path):
    """Read a picture of any sort: ((H, W, 3) uint8 RGB, (H, W) uint8 alpha or None).

    EXIF rotation is applied, 16-bit values are scaled to 8 bits, of an animation the first frame
    is read. Raises DataError with the reason when the file cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                    levels = np.asarray(image, dtype=np.float64)
                    # 16 bits per sample; "F" (float TIFF) is taken as [0, 1] where it fits.
                    levels *= 255 if image.mode == "F" and levels.max() <= 1 else 255 / 65535
                    gray = np.rint(levels.clip(0, 255)).astype(np.uint8)
                    return np.repeat(gray[..., None], 3, axis=2), None
                alpha = None
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    alpha = np.array(image.getchannel("A"))
                return np.array(image.convert("RGB")), alpha
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{path}: larger than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: not a picture, or damaged") from None
    except Exception as error:      # Pillow's decoders raise nearly every built-in exception
        raise DataError(f"{path}: cannot be read ({error})") from None


def split_files(train_dirs, val_dir=None):
    """List the training and the validation files of some folders; they never share a file.

    With `val_dir`, its pictures validate and all others train. Without, FFHQ's own tree
    (`.../00000/00000.png`, five-digit names in folders of a thousand) gets its official split:
    ids below 60000 train, the rest validate. In any other folder a checksum of the name chooses
    about one file in twenty, so that adding files never moves one across.
    """
    files = list({path.resolve(): path for folder in train_dirs for path in find_images(folder)}
                 .values())
    if not files:
        raise DataError(f"{' '.join(map(str, train_dirs))}: no pictures found; expected a folder "
                        f"of faces ({', '.join(SUFFIXES)}), in subfolders or not")
    if val_dir is not None:
        val = find_images(val_dir)
        if not val:
            raise DataError(f"{val_dir}: no pictures found to validate on")
        held_out = {path.resolve() for path in val}
        train = [path for path in files if path.resolve() not in held_out]
        if not train:
            raise DataError(f"{val_dir}: holds every training picture, so none is left to train on")
        return train, val

    def validates(path):
        if re.fullmatch(r"\d{5}", path.stem) and path.parent.name == f"{int(path.stem) // 1000:02d}000":
            return int(path.stem) >= 60000
        return zlib.crc32(path.name.encode()) % 100 < VAL_PERCENT

    val = [path for path in files if validates(path)]
    if not val or len(val) == len(files):   # too few files for a share: one validates
        if len(files) < 2:
            raise DataError(f"{files[0]}: one picture is too few to train and to validate on")
        val = [files[-1]]
    held_out = set(val)
    return [path for path in files if path not in held_out], val


def square_face(picture):
    """Cut the centre square of an (H, W, 3) uint8 picture and resize it to 128x128, antialiased."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    picture = picture[top:top + side, left:left + side]
    if side != FACE_SIZE:
        picture = np.array(Image.fromarray(picture).resize((FACE_SIZE,) * 2, Image.Resampling.LANCZOS))
    return picture


@functools.lru_cache(maxsize=1)     # both stages of a training may use the same faces
def load_split(train_dirs, val_dir, val_count, progress=True):
    """Read the faces of some folders: (those to train on, at most `val_count` to validate on, spread
    over the validation set), uint8 as of `load_faces`."""
    train_files, val_files = split_files(train_dirs, val_dir)
    every = -(-len(val_files) // val_count)
    return load_faces(train_files, progress), load_faces(val_files[::every], progress=False)


def load_faces(files, progress=True):
    """Decode faces once: (N, 3, 128, 128) uint8. 70,000 of them are 3.4 GB.

    A file that cannot be read is named in a warning on stderr and left out. Raises DataError when
    none can be read.
    """
    def decode(path):
        try:
            return square_face(read_image(path)[0])
        except DataError as error:
            tqdm.write(f"warning: {error}; left out", file=sys.stderr)
            return None

    faces = torch.empty(len(files), 3, FACE_SIZE, FACE_SIZE, dtype=torch.uint8)
    count = 0
    with ThreadPoolExecutor() as pool:
        for picture in tqdm(pool.map(decode, files), "reading faces", len(files), unit="face",
                            disable=not progress, leave=False):
            if picture is not None:
                faces[count] = torch.from_numpy(picture).permute(2, 0, 1)
                count += 1
    if not count:
        raise DataError(f"{Path(files[0]).parent}: none of the {len(files)} pictures can be read")
    return faces[:count]


def draw_faces(folder, number=12):
    """Write generated faces, 128x128: ovals with eyes and a mouth, for `train.py --dry-run` and the tests."""
    rng = np.random.default_rng(0)
    for i in range(number):
        picture = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = cv2.resize(picture, (FACE_SIZE,) * 2, interpolation=cv2.INTER_CUBIC)
        x, y = (int(v) for v in rng.integers(54, 75, 2))
        skin = tuple(int(v) for v in rng.integers(60, 250, 3))
        cv2.ellipse(picture, (x, y), (36, 48), 0, 0, 360, skin, -1, cv2.LINE_AA)
        for side in (-14, 14):
            cv2.circle(picture, (x + side, y - 10), 5, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(picture, (x + side, y - 10), 2, (30, 30, 30), -1, cv2.LINE_AA)
        cv2.ellipse(picture, (x, y + 20), (14, 6), 0, 0, 180, (60, 40, 160), 2, cv2.LINE_AA)
        cv2.imwrite(str(Path(folder) / f"{i:05d}.png"), picture)


# Tensors ----------------------------------------------------------------------------------------

def to_tensor(pictures):
    """Stack (H, W, 3) uint8 pictures of one size as (N, 3, H, W) float in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def to_uint8(batch):
    """Turn (N, 3, H, W) float, clamped to [0, 1], into (N, H, W, 3) uint8 NumPy pictures."""
    return batch.mul(255).round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def quantise(batch):
    """Round (N, 3, H, W) float to the 256 levels a picture file holds, in [0, 1]."""
    return batch.mul(255).round_().clamp_(0, 255).div_(255)


@functools.lru_cache(maxsize=256)
def _resize_matrix(size, new_size, kernel, device):
    """The library's own weights for resizing `size` samples to `new_size`: it resizes the
    identity matrix. One matrix product then does on any device what Pillow or OpenCV do."""
    identity = np.eye(size, dtype=np.float32)
    if kernel.startswith("cv2-"):
        weights = cv2.resize(identity, (new_size, size), interpolation=KERNELS[kernel])
    else:
        weights = np.asarray(Image.fromarray(identity).resize((new_size, size), KERNELS[kernel]))
    return torch.tensor(weights, device=device)                     # (size, new_size)


def resize(batch, height, width, kernel="bicubic"):
    """Resize (N, 3, H, W) float in [0, 1] with one of KERNELS, to 8-bit levels in [0, 1]: width
    first, then height. Within one grey level of the library's own result."""
    def to_levels(values):
        return (values + 0.5).floor().clamp(0, 255)

    columns = _resize_matrix(batch.shape[-1], width, kernel, batch.device)
    rows = _resize_matrix(batch.shape[-2], height, kernel, batch.device)
    levels = batch * 255 @ columns
    if not kernel.startswith("cv2-"):
        levels = to_levels(levels)          # Pillow rounds and clips between its passes too
    return to_levels((levels.mT @ rows).mT) / 255


def downscale(hr, scale, kernel="bicubic"):
    """Make the low-resolution picture: (N, 3, sH, sW) in [0, 1] -> (N, 3, H, W), quantised to
    8 bits. The default is the protocol of all scores: Pillow's antialiased bicubic."""
    return resize(hr, hr.shape[-2] // scale, hr.shape[-1] // scale, kernel)


def degrade(hr, scale, rng):
    """Make low-resolution pictures as the world does: a kernel per picture, and for three in ten a
    slight blur before, or noise or JPEG after the reduction.

    hr is (N, 3, sH, sW) in [0, 1], `rng` a numpy Generator; returns (N, 3, H, W), 8-bit levels.
    """
    kernels = rng.choice(list(KERNELS), len(hr), p=[0.3, 0.1, 0.1, 0.1, 0.3, 0.1])
    damages = rng.choice(["none", "blur", "noise", "jpeg"], len(hr), p=[0.7, 0.1, 0.1, 0.1])

    def where(choices, name):
        return torch.from_numpy(np.flatnonzero(choices == name)).to(hr.device)

    def each(batch, function):      # OpenCV works on one 8-bit picture at a time
        return to_tensor([function(picture) for picture in to_uint8(batch)]).to(batch.device)

    blurred, noisy, coded = (where(damages, name) for name in ("blur", "noise", "jpeg"))
    if len(blurred):
        hr = hr.clone()
        hr[blurred] = each(hr[blurred], lambda picture: cv2.GaussianBlur(
            picture, (0, 0), rng.uniform(0.4, 1.6)))        # sigma in HR pixels
    lr = hr.new_empty(len(hr), 3, hr.shape[2] // scale, hr.shape[3] // scale)
    for name in KERNELS:
        chosen = where(kernels, name)
        if len(chosen):
            lr[chosen] = downscale(hr[chosen], scale, name)
    if len(noisy):
        levels = rng.uniform(1, 6, (len(noisy), 1, 1, 1)) / 255     # standard deviation
        noise = rng.standard_normal((len(noisy), *lr.shape[1:])) * levels
        lr[noisy] = quantise(lr[noisy] + torch.from_numpy(noise).to(lr))
    if len(coded):
        lr[coded] = each(lr[coded], lambda picture: jpeg(picture, rng.integers(50, 96)))
    return lr


def jpeg(picture, quality):
    """Pass an (H, W, 3) uint8 RGB picture through JPEG (4:2:0) of a quality from 1 to 100."""
    data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR),
                        [cv2.IMWRITE_JPEG_QUALITY, int(quality)])[1]
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


class FaceBatches:
    """Training batches as a function of the step: the same step gives the same batch, always.

    So a resumed training sees what an uninterrupted one sees, and several processes share a
    batch without talking: process `rank` of `world` makes pictures rank, rank + world, ... of it.

    Args:
        faces: (N, 3, 128, 128) uint8; batches are made on its device.
        batch_size: pictures in the batch of all processes together.
        patch_size: height and width of the HR patches, a multiple of the scale, at most 128.
        degradation: "bicubic" (downscale alone) or "mixed" (degrade).
        min_zoom: patches are reduced by a random factor between this and 1, so that faces of
            several sizes are seen.
    """

    def __init__(self, faces, batch_size=16, patch_size=64, scale=4, degradation="mixed",
                 min_zoom=0.7, seed=0, rank=0, world=1):
        self.faces, self.batch_size, self.patch_size, self.scale = faces, batch_size, patch_size, scale
        self.degradation, self.seed, self.rank, self.world = degradation, seed, rank, world
        largest = min(FACE_SIZE, round(patch_size / min_zoom))
        # A few sizes to cut, so that patches of one size are resized together.
        self.cuts = np.unique(np.linspace(patch_size, largest, 5).round().astype(int))
        self.epoch, self.order = -1, None

    def _index(self, position):
        """The face at a position of the endless sequence of shuffled epochs."""
        epoch, place = divmod(position, len(self.faces))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.faces))
        return self.order[place]

    def __call__(self, step):
        """Make the batch of a step: lr (N, 3, patch/scale, patch/scale), hr (N, 3, patch, patch),
        float in [0, 1], N = batch_size / world."""
        # Drawn for the whole batch, so that each process draws the same.
        rng = np.random.default_rng([self.seed, 1, step])
        index = [self._index(step * self.batch_size + i) for i in range(self.batch_size)]
        cuts = rng.choice(self.cuts, self.batch_size)
        corners = (rng.random((self.batch_size, 2)) * (FACE_SIZE - cuts[:, None] + 1)).astype(int)
        flips = rng.random(self.batch_size) < 0.5

        mine = range(self.rank, self.batch_size, self.world)
        hr = torch.empty(len(mine), 3, self.patch_size, self.patch_size, device=self.faces.device)
        for cut in np.unique(cuts[mine]):
            places = [place for place, i in enumerate(mine) if cuts[i] == cut]
            patches = []
            for i in (mine[place] for place in places):
                top, left = corners[i]
                patch = self.faces[index[i], :, top:top + cut, left:left + cut]
                patches.append(patch.flip(-1) if flips[i] else patch)
            patches = torch.stack(patches).float() / 255
            hr[places] = resize(patches, self.patch_size, self.patch_size)
        if self.degradation == "mixed":
            lr = degrade(hr, self.scale, np.random.default_rng([self.seed, 2, step, self.rank]))
        else:
            lr = downscale(hr, self.scale)
        return lr, hr
