"""The two networks of SRGAN (Ledig et al. 2017, arXiv:1609.04802, section 2.1 and figure 4), their file and device, and
what they do with pictures and the faces in photographs. Tensors of pictures are RGB in [0, 1], (N, 3, H, W)."""
import contextlib
import copy
import functools
import hashlib
import inspect
import io
import os
import re
import zipfile
from collections import OrderedDict, defaultdict, deque
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import compress, pairwise, product
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from data_loader import (CERTAIN, HOPELESS, SAME, Face, contrast, cut_face, face_score, find_faces, full_contrast,
                         open_image, reduce, reduction_error, rescale, resize, to_tensor, to_uint8, turning,
                         working_size, write_atomically, write_picture)

FORMAT, PRECISIONS = "face-srgan/1", ("auto", "float32", "bfloat16", "float16")
PRECISION_HELP = "auto: bfloat16 where the hardware has it, float16 on Volta and Turing, else float32 [%(default)s]"
CONTENT = 2 * 10**9         # bytes that a .pth file may unpack to; VGG19 has 0.55
TILE, OVERLAP = 288, 24     # LR pixels; what lies further away changes three values in a million by two grey levels
TONED = 5 / 255             # error of colour guessed from brightness: less is gray or sepia (700 faces of FFHQ: 6.3 on)
WRITERS, KNOWN = 8, 2**29   # threads that compress PNGs (as many pictures wait for them); bytes of `Networks.at_work`
CUDA_FULL = "the GPU's memory is full; try a smaller --batch-size, or --device cpu"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one sentence for the user."""


class UsageError(Exception):
    """A call that cannot be carried out as it is meant; the message is one sentence for the user."""


# Networks -----------------------------------------------------------------------------------------

def bicubic(lr, scale):
    """Enlarge (N, 3, H, W) by `scale` with Pillow's bicubic kernel (a = -0.5, by antialias=True), not clamped."""
    return F.interpolate(lr.float(), scale_factor=scale, mode="bicubic", antialias=True)


class ResidualBlock(nn.Sequential):
    """x + BN(Conv(PReLU(BN(Conv(x))))): the block of figure 4. What is set as an attribute joins the sequence."""

    def __init__(self, channels):
        super().__init__(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.PReLU(),
                         nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        return x + super().forward(x)


class Generator(nn.Module):
    """SRResNet, the generator of SRGAN (section 2.1.1).

    Args:
        scale: enlargement, 2, 4 or 8; one sub-pixel convolution per doubling.
        blocks, channels: residual blocks and feature channels (the paper: 16 and 64).
        bicubic_residual: predict the difference to the bicubically enlarged input instead of the picture. Not in the
            paper; training starts at bicubic, not at noise, and colours cannot drift. False is the paper's network.

    Input and output are RGB in [0, 1] of any size; the output is not clamped: losses keep their gradient outside."""

    def __init__(self, scale=4, blocks=16, channels=64, bicubic_residual=True):
        super().__init__()
        if scale not in (2, 4, 8):
            raise ValueError(f"scale must be 2, 4 or 8, not {scale}")
        self.architecture = dict(scale=scale, blocks=blocks, channels=channels, bicubic_residual=bicubic_residual)
        self.scale, self.bicubic_residual = scale, bicubic_residual
        self.head = nn.Sequential(nn.Conv2d(3, channels, 9, padding=4), nn.PReLU())
        self.body = nn.Sequential(*[ResidualBlock(channels) for _ in range(blocks)],
                                  nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        upsample = OrderedDict()
        for i in range(0, 3 * (scale.bit_length() - 1), 3):
            upsample |= {f"{i}": icnr_(nn.Conv2d(channels, 4 * channels, 3, padding=1)), f"{i + 1}": nn.PixelShuffle(2),
                         f"{i + 2}": nn.PReLU()}
        del upsample[f"{i + 1}"]            # the last one is in the tail, after its PReLU: faster, and the same
        self.upsample = nn.Sequential(upsample)
        self.tail = SubpixelConv2d(channels, 3, 9, padding=4)
        if bicubic_residual:
            with torch.no_grad():           # training starts near bicubic, not at noise
                self.tail.weight.mul_(0.1)
                self.tail.bias.zero_()

    def forward(self, lr):                                  # (N, 3, H, W)
        dtype = self.head[0].weight.dtype                   # lower than float32 only in inference
        features = self.head(lr.to(dtype))                  # (N, C, H, W)
        features = features + self.body(features)           # (N, C, H, W)
        sr = self.tail(self.upsample(features)).float()     # (N, 3, sH, sW)
        return sr + bicubic(lr, self.scale) if self.bicubic_residual else sr

    def for_inference(self, dtype=torch.float32):
        """Return a frozen copy for inference, computing in `dtype`: batch norm folded into the convolution before it,
        if any, activations in place, channels-last. It takes and returns what `eval()` does, to rounding."""
        net = copy.deepcopy(self).eval().requires_grad_(False)
        for module in list(net.modules()):
            if isinstance(module, nn.Sequential):
                layers = list(module)
                for i, (before, layer) in enumerate(zip([None, *layers], layers)):
                    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and isinstance(before, nn.Conv2d):
                        module[i - 1], module[i] = fuse_conv_bn_eval(before, layer), nn.Identity()
                    elif isinstance(layer, nn.PReLU) and layer.weight.numel() == 1:
                        # LeakyReLU can work in place, but on what a layer has just made: an input is needed elsewhere.
                        module[i] = nn.LeakyReLU(layer.weight.item(), inplace=isinstance(
                            before, (nn.Conv2d, nn.BatchNorm2d, nn.PixelShuffle)))
        return net.to(dtype, memory_format=torch.channels_last)


def icnr_(conv):
    """Initialise a convolution before PixelShuffle(2) so that the pair enlarges like nearest neighbour: the four
    sub-pixels start equal, and no checkerboard is trained in (Aitken et al. 2017, arXiv:1707.02937)."""
    with torch.no_grad():
        for parameter in (conv.weight, conv.bias):
            parameter.copy_(parameter[::4].repeat_interleave(4, dim=0))
    return conv


class SubpixelConv2d(nn.Conv2d):
    """conv(F.pixel_shuffle(features, 2)), without that large intermediate: (N, 4C, H, W) -> (N, outputs, 2H, 2W). Its
    kernel, shifted by 0 or 1 for each of the four sub-pixels and unshuffled like a picture, becomes one of half the
    size for the small grid; and of its twelve outputs, unlike of three, a processor's wide registers are full."""

    def forward(self, features):
        reach, usual = self.kernel_size[0] // 2, ((1, 1), (1, 1), 1, "zeros")
        if (self.stride, self.dilation, self.groups, self.padding_mode) != usual or reach % 2 or self.bias is None \
                or self.kernel_size != (2 * reach + 1,) * 2 or self.padding != (reach, reach):      # the usual way
            return super().forward(F.pixel_shuffle(features, 2))
        kernel = F.pad(self.weight, (1, 1, 1, 1))           # (outputs, C, 4k + 3, 4k + 3)
        kernel = torch.stack([F.pixel_unshuffle(kernel[..., y:y + 2 * reach + 2, x:x + 2 * reach + 2], 2)
                              for y in (1, 0) for x in (1, 0)], dim=1).flatten(0, 1)
        return F.pixel_shuffle(F.conv2d(features, kernel, self.bias.repeat_interleave(4), padding=reach // 2), 2)


class Discriminator(nn.Module):
    """The discriminator of section 2.1.1: eight 3x3 convolutions, every second with stride 2, and two dense layers.
    Takes RGB in [0, 1] of any size from 16x16, returns logits, (N,), positive for real. The paper's dense layer sees
    all of a 96x96 picture; here features are averaged to 4x4 cells, so that any size fits 8.4 million weights."""

    def __init__(self, channels=64):
        super().__init__()
        layers, inputs = [], 3
        for i in range(8):
            outputs = channels * 2 ** (i // 2)
            layers += [nn.Conv2d(inputs, outputs, 3, stride=1 + i % 2, padding=1, bias=i == 0)]
            layers += [nn.BatchNorm2d(outputs)] * (i > 0) + [nn.LeakyReLU(0.2)]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * inputs, 16 * channels),
                                        nn.LeakyReLU(0.2), nn.Linear(16 * channels, 1))

    def forward(self, picture):                             # (N, 3, H, W)
        features = self.features(picture * 2 - 1)           # (N, 8C, H/16, W/16)
        return self.classifier(features).float().flatten()  # (N,)


def interpolate(faithful, vivid, strength):
    """Make the generator between two of one architecture, (1 - strength) * faithful + strength * vivid in each
    parameter and statistic (Wang et al. 2018, "ESRGAN", arXiv:1809.00219, section 3.4). Else raises CheckpointError."""
    if faithful.architecture != vivid.architecture:
        raise CheckpointError(f"cannot be interpolated: {faithful.architecture} and {vivid.architecture}")
    between, ends = copy.deepcopy(vivid), (faithful.state_dict(), vivid.state_dict())
    between.load_state_dict({name: a.lerp(b, strength) if a.is_floating_point() else b
                             for (name, a), b in zip(ends[0].items(), ends[1].values())})
    return between


# Checkpoints --------------------------------------------------------------------------------------

def save_plain(path, content):
    """Write tensors, numbers, strings, lists and dicts of them as one .pth file, whole or not at all."""
    with io.BytesIO() as buffer:    # torch.save into a file hides why it cannot be written
        torch.save(content, buffer)
        write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load_plain(path):
    """Read what `save_plain` wrote, or another file of plain tensors: nothing in it can run code. Raises
    CheckpointError for a missing or damaged file, and for one that unpacks to more than CONTENT bytes."""
    path = Path(path)
    try:
        if not path.is_file():      # a pipe would never end
            reason = "not a file" if path.exists() else "there is no such file"
        else:
            size = path.stat().st_size
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as parts:
                    size = sum(part.file_size for part in parts.infolist())
            if size <= CONTENT:
                return torch.load(path, map_location="cpu", weights_only=True)
            reason = f"unpacks to {size:,} bytes, more than any checkpoint of this project"
    except Exception as error:      # torch.load raises half a dozen unrelated kinds
        why = getattr(error, "strerror", None) or "damaged, or not only plain tensors"
        reason = f"cannot be read as a checkpoint ({why})"
    raise CheckpointError(f"{path}: {reason}")


def checksum(weights):
    """SHA-256 of a state dict: names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_checkpoint(path, generator, training):
    """Write a generator's weights and architecture, and the facts of its training, plain values, as one .pth file."""
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in generator.state_dict().items()}
    save_plain(path, {"format": FORMAT, "architecture": generator.architecture, "weights": weights,
                      "checksum": checksum(weights), "training": training})


def load_checkpoint(path):
    """Read a checkpoint: (generator in eval mode on the CPU, facts of its training). Raises CheckpointError for a
    missing, damaged or foreign file, and for weights that are not finite or, with a checksum, not those it tells."""
    content = load_plain(path)
    try:
        if content["format"] != FORMAT:
            raise ValueError
        architecture, weights = content["architecture"], content["weights"]
        # Before anything is computed or takes memory: plain numbers in bounds, and every shape as it must be.
        known = {name: type(flag.default) for name, flag in inspect.signature(Generator).parameters.items()}
        if any(known[name] not in (type(value), type(None)) for name, value in architecture.items()) or not (
                1 <= architecture["blocks"] <= 256 and 1 <= architecture["channels"] <= 1024):
            raise ValueError
        with torch.device("meta"):
            generator = Generator(**architecture)
        expected = {name: (tensor.shape, tensor.is_floating_point()) for name, tensor in generator.state_dict().items()}
        found = {name: (tensor.shape, tensor.is_floating_point()) for name, tensor in weights.items()}
        if found != expected:
            name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise CheckpointError(f"{path}: does not fit the Generator of this code, first in {name[:80]!r}")
        # One small storage can pose as many large tensors.
        if len({tensor.data_ptr() for tensor in weights.values()}) < len(weights) or not all(
                tensor.is_contiguous() for tensor in weights.values()):
            raise ValueError
        generator = Generator(**architecture)       # for what is not among the weights
        generator.load_state_dict(weights)
        training = dict(content["training"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        raise CheckpointError(f"{path}: not a generator checkpoint of this project (format {FORMAT})") from None
    if content.get("checksum") not in (None, checksum(weights)):
        raise CheckpointError(f"{path}: damaged, the weights are not those that were written")
    if not all(tensor.isfinite().all() and (not name.endswith("running_var") or tensor.min() >= 0)
               for name, tensor in generator.state_dict().items()):
        raise CheckpointError(f"{path}: holds weights that are not finite, or negative variances")
    return generator.eval(), training


class Networks:
    """A checkpoint, its SRResNet, and those of the other scale beside it (`files`, by scale). networks(strength, scale)
    gives one ready for inference, of a strength from 0 (SRResNet) to 1; by default, of the checkpoint's scale."""

    def __init__(self, checkpoint, device=torch.device("cpu"), precision="float32"):
        def load(strength, scale):
            generator = load_checkpoint(self.files[scale])[0]
            if strength != 1:
                if not (path := self.files[scale].with_name(f"srresnet_x{scale}.pth")).exists():
                    raise CheckpointError(f"--strength, --added and --study need {path}, the faithful network")
                generator = interpolate(load_checkpoint(path)[0], generator, strength)
            return generator.for_inference(select_dtype(precision, device)).to(device)

        self.load, self.tell = functools.lru_cache(maxsize=48)(load), lambda text: None     # the knob has 21 places
        self.scale = load_checkpoint(checkpoint)[0].scale
        paths = {n: checkpoint.with_name(re.sub(r"_x\d\.pth$", f"_x{n}.pth", checkpoint.name)) for n in (4, 8)}
        self.files = {n: p for n, p in paths.items() if p != checkpoint and p.exists()} | {self.scale: checkpoint}
        self.has_knob = all(path.with_name(f"srresnet_x{scale}.pth").exists() for scale, path in self.files.items())
        self.usual = GENTLE if self.has_knob else 1     # strength of photographs, unless another is asked for

    def __call__(self, strength=1, scale=None):
        return self.load(round(strength, 2), scale or self.scale)

    def at_work(self, job, worker, known):
        """The same for a job: its tiles take turns with others', end with the job, and are kept in `known`."""
        def load(strength, scale):
            def forward(lr):
                if job.over:
                    raise CancelledError
                key = whole, lr.shape, hashlib.sha256(lr.cpu().numpy().tobytes()).digest()
                if (sr := known.get(key)) is None:
                    sr = known[key] = worker.submit(whole, lr).result()
                return sr

            whole = self.load(strength, scale)
            generator = copy.copy(whole)
            generator.forward = forward
            return generator

        if sum(sr.nbytes for sr in list(known.values())) > KNOWN:
            known.clear()
        networks = copy.copy(self)
        networks.load, networks.tell = load, lambda text: setattr(job, "part", text)
        return networks

    def tiny(self, strength):
        """A function that gives the generator for faces below TINY pixels, or None."""
        return functools.partial(self, strength, 8) if 8 in self.files else None

    def suited(self, side, strength=1, own=None):
        """The strength and the scale that suit a face of `side` pixels in a photograph; `own` is asked for it alone."""
        scale = 8 if side < TINY and 8 in self.files else min(self.files)
        most = 1 if not self.has_knob else 0.5 if side >= CLEAR else GENTLE if side < TINY and scale == 8 else 1
        return min(strength, most) if own is None else own, scale


@contextlib.contextmanager
def locked(folder):
    """Reserve a folder for this process, as long as it lives: yields False where another one has it. Where the system
    or the file system knows no such locks, everybody gets it."""
    with contextlib.ExitStack() as stack:
        mine = True
        with contextlib.suppress(ImportError):
            import fcntl
            stack.callback(os.close, descriptor := os.open(folder, os.O_RDONLY))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                mine = not isinstance(error, BlockingIOError)
        yield mine


# Devices ------------------------------------------------------------------------------------------

def select_device(name):
    """Turn "auto", "cpu", "cuda" or "cuda:1" into a device, on CUDA with its index; auto is CUDA where there is one.
    With several processes a machine, "cuda" is the GPU of this one. From then on float32 is float32: TF32 is off."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if not re.fullmatch(r"cpu|cuda(:\d\d?)?", name):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: no CUDA device {index} is here; try --device cpu, or fewer processes")
        torch.cuda.set_device(device := torch.device("cuda", index))
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def select_dtype(name, device):
    """Turn one of PRECISIONS into a dtype; auto is bfloat16 where the hardware computes in it, float16 on GPUs of 7."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        if torch.version.hip or major >= 8:
            return torch.bfloat16
        # Pascal is slow in float16; the GTX 16 series, of 7.5 too, is known for NaN in it.
        return torch.float16 if major == 7 and "GTX 16" not in device_name(device) else torch.float32
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


# Pictures -----------------------------------------------------------------------------------------

@dataclass
class Found:
    """What a photograph is like, whatever is marked in it: looked for once, and kept."""
    faces: list | None = None
    times: int | None = None            # it is to be as large
    reach: float | None = None          # pixels, reduced as a blurred face, that are restored around it


@dataclass
class Picture:
    """One picture on its way: what was read, and where the result goes."""
    name: str                           # as it is printed and stands in the tables
    output: Path
    lr: np.ndarray                      # (H, W, 3) uint8
    alpha: np.ndarray | None = None     # (H, W) uint8
    hr: np.ndarray | None = None        # (sH, sW, 3) uint8
    sr: np.ndarray | None = None        # the same, where it is finished already, and only to be scored
    share: float = 1                    # of its pixels a side that show anything: less of a face that is blurred
    found: Found = field(default_factory=Found)     # of a photograph
    patches: list = field(default_factory=list)     # what becomes of its faces
    marked: list = field(default_factory=list)      # (Face, wish) that somebody has pointed at: see `make_patches`
    extras: dict = field(default_factory=dict)      # its colour profile and EXIF data


@torch.inference_mode()
def upscale(generator, pictures):
    """Enlarge pictures of one size: (N, H, W, 3) uint8, or a list of N, to (N, sH, sW, 3) uint8. `generator` comes from
    `for_inference()`. Large pictures go through it in tiles of up to TILE, with margins, so no seams."""
    pictures, device = np.asarray(pictures), next(generator.parameters()).device
    scale, (number, height, width, _) = generator.scale, pictures.shape
    sr = np.empty((number, height * scale, width * scale, 3), np.uint8)
    toned, given = [*map(is_toned, pictures)], pictures
    if any(toned):      # by brightness alone: the networks take a tint for light, and paint lips and eyes
        gray = (cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB) for picture in pictures)
        given = np.stack([plain if tone else picture for picture, plain, tone in zip(pictures, gray, toned)])
    offset, gain = torch.tensor([*map(contrast, given)], device=device).float().T[..., None, None, None]
    rows, columns = ([*pairwise(i * side // -(-side // TILE) for i in range(-(-side // TILE) + 1))]
                     for side in (height, width))
    for (top, bottom), (left, right) in tqdm([*product(rows, columns)], "tiles", leave=False, disable=None, delay=2):
        y, x = max(0, top - OVERLAP), max(0, left - OVERLAP)
        lr = (to_tensor(given[:, y:bottom + OVERLAP, x:right + OVERLAP]).to(device) - offset / 255) * gain
        tile = to_uint8(generator(lr.contiguous(memory_format=torch.channels_last)) / gain + offset / 255)
        sr[:, top * scale:bottom * scale, left * scale:right * scale] = \
            tile[:, (top - y) * scale:(bottom - y) * scale, (left - x) * scale:(right - x) * scale]
    for picture, result in compress(zip(pictures, sr), toned):
        keep_tone(picture, result)
    return sr


def is_toned(picture):
    """Tell whether (H, W, 3) uint8 is gray or sepia: its colours, at full contrast, follow from their brightness."""
    sample = cv2.resize(full_contrast(picture), (12, 12), interpolation=cv2.INTER_AREA).reshape(-1, 3) / 255  # no noise
    gray = sample @ (0.299, 0.587, 0.114)
    curves, tints = np.vander(gray, 3), sample[:, ::2] - gray[:, None]
    return np.square(tints - curves @ np.linalg.lstsq(curves, tints, rcond=None)[0]).sum(1).mean() <= TONED ** 2


def keep_tone(lr, sr):
    """Give the result of a gray or sepia picture, in place, its colours again; the brightness stays the result's."""
    enlarged = rescale(lr, len(sr) // len(lr))
    for top in range(0, len(sr), 512):      # large ones need not lie in memory in 16 bits
        band, own = sr[top:top + 512], enlarged[top:top + 512]
        levels = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None].astype(np.int16) for picture in (band, own)]
        band[:] = np.clip(own + levels[0] - levels[1], 0, 255)


def read_extras(path):
    """Read what a result takes over from a picture, its colour profile and EXIF data: keywords for `write_picture`."""
    extras = {}
    with contextlib.suppress(Exception), open_image(path) as image:       # damaged ones do no harm
        if (profile := image.info.get("icc_profile")) and image.mode in ("RGB", "RGBA", "P"):
            extras["icc_profile"] = profile
        if exif := image.getexif():
            exif.pop(0x0112, None)          # the orientation, which `read_image` has applied
            if len(data := exif.tobytes()) < 65000:             # no more fits into a JPEG
                extras["exif"] = data
    return extras


def shown_share(lr):
    """The share of its pixels a side to which a picture of one face, (H, W, 3) uint8, can be reduced and still be the
    same: 1 unless it is blurred (of 32 pixels by 1.6: LPIPS 0.57 as it is, 0.10 reduced), or far too large for that."""
    (height, width), side = lr.shape[:2], min(lr.shape[:2])
    if max(height, width) > 256:
        return 1
    size = working_size(lr[(height - side) // 2:, (width - side) // 2:][:side, :side])
    return size / side if size < SOFT[4] * side else 1


def upscale_blurred(generator, lr, tiny=None, vivid=None):
    """Enlarge a blurred picture: (lr as it was given in the end, sr). What `vivid`, the generator of full strength,
    leaves as soft as it was is reduced again, to 24 pixels, and to 16 if `tiny` gives a generator for these."""
    while True:
        side = max(lr.shape[:2])
        small = tiny() if tiny and side < TINY else None
        sr = upscale(small or vivid or generator, [lr])[0]
        ours, bicubic = (cv2.Laplacian(resize(picture, 128), cv2.CV_32F).std() for picture in (sr, lr))
        if ours >= GAIN * bicubic or side > 40 or side <= (16 if tiny else 24):
            return lr, sr if small or vivid in (None, generator) else upscale(generator, [lr])[0]
        lr = rescale(lr, (24 if side > 24 else 16) / side)


def upscale_reduced(generator, lr, share=1, tiny=None, vivid=None, scale=None):
    """Enlarge one picture `scale` times, by default the generator's; of a share below 1, reduced to it first."""
    if share == 1 and not scale:
        return upscale(generator, [lr])[0]
    sr = upscale_blurred(generator, reduce(lr, share) if share < 1 else lr, tiny, vivid)[1]
    return resize(sr, *(side * (scale or generator.scale) for side in lr.shape[1::-1]))


def upscale_pictures(generator, pictures, batch_size, tiny=None, vivid=None):
    """Yield (picture, sr), sr (sH, sW, 3) uint8, in any order: in batches of one size, large and blurred ones alone."""
    waiting = {}

    def flush(shape):
        group = waiting.pop(shape)
        yield from zip(group, upscale(generator, [picture.lr for picture in group]))

    for picture in pictures:
        shape = picture.lr.shape
        if picture.share < 1 or picture.sr is not None:
            ours = picture.sr is None and upscale_reduced(generator, picture.lr, picture.share, tiny, vivid)
            yield picture, ours if picture.sr is None else picture.sr
            continue
        waiting.setdefault(shape, []).append(picture)
        if len(waiting[shape]) >= min(batch_size, max(1, TILE ** 2 // (shape[0] * shape[1]))):
            yield from flush(shape)
        elif sum(map(len, waiting.values())) > 256:     # many sizes: do not hoard
            yield from flush(max(waiting, key=lambda key: len(waiting[key])))
    for shape in list(waiting):
        yield from flush(shape)


def write_result(picture, sr):
    """Write the picture of a result, with the alpha channel enlarged beside it, unless somebody else has made it."""
    if picture.sr is None:
        alpha = [] if picture.alpha is None else [rescale(picture.alpha, len(sr) // len(picture.lr))]
        write_picture(picture.output, np.dstack([sr, *alpha]) if alpha else sr, picture.extras)


def write_results(results):
    """Write pairs (picture, sr) on threads, meanwhile yield (picture, sr, future of the writing)."""
    writing = deque()
    with ThreadPoolExecutor(WRITERS) as pool:
        for picture, sr in results:
            writing.append((picture, sr, pool.submit(write_result, picture, sr)))
            while len(writing) > WRITERS or writing and sum(sr.size for _, sr, _ in writing) > 2**27:   # few large ones
                yield writing.popleft()
        yield from writing


# Faces in photographs -----------------------------------------------------------------------------

TINY, GENTLE = 18, 0.7      # pixels: below, eight times gives the better face; strength: people see scratches above it
INVENTED, POOR = 24, 32     # pixels: of less, from a JPEG of 90, or of 80, more than one of ten is more like another
CLEAR, OWN = 76, 60         # pixels: from here on, strength 0.5 is as good; what is smoothed away is laid back
DETAIL = 96                 # pixels: what shows more than fits in them is left alone (LPIPS: below, the network wins)
SOFT = {1: 0.6, 2: 0.82, 4: 0.82}       # of its frame, by enlargement: a face that fits in less of it is blurred
TILT, SURE = 10, 0.85       # degrees and score, from which on reduced faces are turned upright (LPIPS 0.051 for 0.068)
AROUND, GRAIN = 256, 0.75   # pixels a side, reduced as the face, restored around it; share of grain that the face keeps
GAIN = 2.7                  # in detail: below, the network has left a face as it was (else 2.8 to 17; 16 faces)
BLOCKS, CODED = 3.3, 36     # from a JPEG of a quality of 70 or less: two thirds of the pixels do, at least so many


@dataclass
class Patch:
    """A face of a photograph on its way through the network."""
    face: Face
    top: int                            # its square, in pixels of the photograph
    left: int
    side: int
    working_size: int
    given: int                          # pixels a side of lr, before it is tried in fewer
    action: str                         # "restored"; left alone: "sharp", "small", "left" (as asked), "failed"
    lr: np.ndarray                      # upright, of the size that the network is given
    turn: float                         # degrees by which that took to turn it counterclockwise
    blurred: bool                       # and so restored
    strength: float | None              # at which it is restored; until then, only one of its own
    least: int                          # pixels a side: of less, another person may come out
    sr: np.ndarray | None = None
    doubtful: bool = False              # whether the detector hardly takes the result for a face
    share = 1                           # as of a Picture: lr is reduced already


def blockiness(photo, top, left, side):
    """How many levels more neighbours in a square of an (H, W, 3) uint8 photograph differ across the borders of JPEG's
    blocks than within: about 0 without JPEG or resized since, 0.3 at a quality of 95, 2.5 at 80, 4 at 60 (60 faces)."""
    part, excess = photo[-(-top // 8) * 8:(top + side) // 8 * 8, -(-left // 8) * 8:(left + side) // 8 * 8], []
    for steps in (np.diff(part.mean(2, dtype=np.float32), axis=1), np.diff(part.mean(2, dtype=np.float32), axis=0).T):
        steps = np.abs(steps[:, 1:-1] - (steps[:, :-2] + steps[:, 2:]) / 2).clip(0, 20).mean(0)     # more is an edge
        steps = steps[:len(steps) // 8 * 8].reshape(-1, 8).mean(0)
        excess.append(steps[6] - steps[:5].mean())
    return float(np.mean(excess))


def with_wishes(found, marked):
    """Pair the Faces `found` with what is wished of them, or None. What is `marked`, (Face, "restored", "left", or a
    strength to restore it at), replaces that Face, or else those with their middle in its frame, and keeps its turn."""
    faces = [(face, None) for face in found]
    for face, wish in marked:
        meant = [other == face for other, _ in faces]
        meant = meant if any(meant) else [2 * max(abs(o.x - face.x), abs(o.y - face.y)) < face.size for o, _ in faces]
        place = (meant + [True]).index(True)
        turn = faces[place][0].angle if any(meant) else 0
        faces = [pair for pair, gone in zip(faces, meant) if not gone]
        faces.insert(place, (replace(face, angle=turn), wish))
    return faces


def make_patch(photo, face, wish, factor, smallest):
    """Decide what to do with one Face, see `make_patches`."""
    (top, left, side), turn, least = face.square(*photo.shape[:2]), 90 * round(face.angle / 90), INVENTED
    lr = np.rot90(photo[top:top + side, left:left + side], turn // 90)
    size = working_size(lr)
    own, wish = (None, wish) if isinstance(wish, str | None) else (wish, "restored")
    blurred = size < SOFT[factor] * side
    given = max(size, smallest) if blurred else side
    part = 0.85 if size < side / 2 else 1       # of large blurred ones, the last pixels would blacken folds
    action = "small" if side < smallest else wish or (
        "sharp" if size > DETAIL or factor == 1 and given == side else "restored")
    if action == "restored":
        size, given = (DETAIL, DETAIL) if size > DETAIL else (size, given)
        near = 128 if side < CODED else 0           # alone, a small face has too few blocks
        coded = blockiness(photo, max(0, top - near), max(0, left - near), side + 2 * near) * contrast(lr)[1]
        least = POOR if near and coded > 0.7 else INVENTED
        if size > CODED and coded > BLOCKS and not blurred:
            size = given = max(CODED, size * 2 // 3)
        given = max(min(32, given), round(part * given))
        tilt = TILT if given < side else 20 if side < 48 or coded > 1 else 35       # turning blurs sharp ones
        if abs(face.angle - turn) > tilt and face.score > SURE:
            lr, turn = cut_face(photo, replace(face, size=side), side if blurred else given), face.angle
        if given < len(lr):
            lr = reduce(lr, given / side) if blurred else resize(lr, given)
    return Patch(face, top, left, side, size, len(lr), action, lr, turn, blurred and action == "restored", own, least)


def make_patches(photo, found, factor, smallest=TINY, marked=()):
    """Decide what to do with each of the Faces `found` or `marked` in an (H, W, 3) uint8 photograph, if the result is
    `factor` times as large: a list of Patch, row by row. Frames of fewer than `smallest` pixels are left alone. Blurred
    and coded faces are reduced first to what they show, and turned upright, as are small ones; others by quarters."""
    return [make_patch(photo, face, wish, factor, smallest) for face, wish in with_wishes(found, marked)]


def add_grain(sr, part, share=1, top=0, left=0, side=0, amount=GRAIN):
    """Lay over a result what `part`, its source, lost by reducing to a share, all over a face's square, or in it."""
    again = resize(rescale(part, share) if share < 1 else sr, *part.shape[1::-1])
    grain = cv2.subtract(part, again, dtype=cv2.CV_16S)
    most = int(4 * np.median(np.abs(grain[top:top + side:4, left:left + side:4]))) if share < 1 else 255    # 2.7 sd
    grain = cv2.resize(grain.clip(-most, most), sr.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    return cv2.addWeighted(sr, 1, grain, amount, 0, dtype=cv2.CV_8U)


def paste_face(patch, canvas, photo):
    """Lay a restored face over its place in the enlarged photograph, fading in at its edge."""
    factor, face, top, left, reach = len(canvas) // len(photo), patch.face, patch.top, patch.left, patch.side
    if patch.turn % 90:     # its square reaches further in the photograph, which is not turned
        top, left, reach = min(max(0, int(face.y) - reach), top), min(max(0, int(face.x) - reach), left), 2 * reach
    part, side = photo[top:, left:][:reach, :reach], patch.side * factor
    place, sr = canvas[top * factor:, left * factor:][:reach * factor, :reach * factor], resize(patch.sr, side)
    ramp = np.clip((np.arange(side) + 0.5) / side * 6, 0, 1)
    ramp = np.square(np.sin(np.minimum(ramp, ramp[::-1]) * np.pi / 2))      # over a sixth of the side
    mask = np.minimum.outer(ramp, ramp).astype(np.float32)
    if patch.turn % 90:
        matrix = turning(replace(face, x=(face.x - left) * factor, y=(face.y - top) * factor), patch.turn, 1, side)
        sr = cv2.warpAffine(sr, matrix, place.shape[1::-1], flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)
        mask = cv2.warpAffine(mask, matrix, place.shape[1::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    else:
        sr = np.rot90(sr, -patch.turn // 90)
    if patch.blurred and patch.given < patch.side:
        sr = add_grain(sr, part, patch.given / patch.side, patch.top - top, patch.left - left, patch.side)
    place[:] = cv2.blendLinear(place, sr, 1 - mask, mask)


def restore_surroundings(generator, photo, patch, canvas, factor, most):
    """Restore what lies around a blurred face, as far as `most` pixels, reduced like it, reach, or it is wide: what is
    as blurred, or half: where as many pixels do, and half as many would lose several times as much. Grain stays."""
    given, layers, rest = len(patch.lr) / patch.side, [], 1
    reach = max(patch.side, round((most / given - patch.side) / 2))
    top, left = max(0, patch.top - reach), max(0, patch.left - reach)
    around = photo[top:patch.top + patch.side + reach, left:patch.left + patch.side + reach]
    place = canvas[top * factor:, left * factor:][:len(around) * factor, :len(around[0]) * factor]
    measured = full_contrast(around)
    for share in [share for share in (given, 2 * given) if share < SOFT[4]]:
        again = [resize(rescale(measured, part), *around.shape[1::-1]) for part in (share, share / 2)]
        losses = [rescale(np.square(cv2.absdiff(measured, other).max(2), dtype=np.float32), share) for other in again]
        losses = [cv2.GaussianBlur(loss, (0, 0), 1.5) for loss in losses]
        y, x, side, fade = (round(pixels * share) for pixels in (patch.top - top, patch.left - left, patch.side, reach))
        grain = np.percentile(losses[0][y:y + side, x:x + side], 10)
        alike = (losses[0] - grain).clip(0) / ((losses[1] - grain).clip(0) + grain + SAME / 2)
        near = [np.interp(np.arange(size) - start, (-fade, -fade / 2, side + fade / 2, side + fade), (0, 1, 1, 0))
                for size, start in zip(alike.shape, (y, x))]
        mask = np.minimum(np.clip(2 - alike / 0.15, 0, 1), np.minimum.outer(*near)).astype(np.float32)
        mask = cv2.resize(mask, place.shape[1::-1])
        if (mask * rest).mean() > 0.05:         # else the network would work for little
            layers.append((share, mask))
        rest = 1 - mask
    for share, mask in reversed(layers):
        sr = upscale_reduced(generator, around, share, scale=factor)
        sr = add_grain(sr, around, share, patch.top - top, patch.left - left, patch.side, amount=1)
        place[:] = cv2.blendLinear(place, sr, 1 - mask, mask)


def enlarge_background(generator, picture):
    """Enlarge a photograph with the network; by bicubic if grain would become worms, or all is as blurred as a face."""
    share = max((len(p.lr) / p.side if p.blurred else 1 for p in picture.patches
                 if p.action not in ("left", "failed")), default=1)
    photo = full_contrast(picture.lr)
    again = resize(rescale(photo, share), *photo.shape[1::-1])
    if share < 1 and reduction_error(photo, again) < max(SAME, reduction_error(photo, again, 1)):
        return rescale(picture.lr, generator.scale)
    return upscale(generator, [picture.lr])[0]


def enlargement(photo, factor=None, patches=()):
    """How many times a photograph is enlarged: to a handy size; what is made of blurred faces, by at most four."""
    most = max((16 * patch.given / patch.side if patch.blurred else 4 for patch in patches), default=4)
    return factor or next(n for n in (4, 2, 1) if photo[..., 0].size <= 16e6 / n ** 2 and n <= most or n == 1)


def plan_patches(picture, factor, smallest):
    """Decide what to do with the faces of a photograph, picture.patches; find them first, unless they are known."""
    photo, found = picture.lr, picture.found
    found.faces = find_faces(photo) if found.faces is None else found.faces
    plan = functools.partial(make_patches, photo, found.faces, enlargement(photo, factor), smallest)
    picture.patches = plan(picture.marked)
    if found.times is None:     # beside sharp faces, blur may be meant
        plain = plan() if picture.marked else picture.patches
        found.times, blurred = enlargement(photo, None, plain), sum(patch.blurred for patch in plain)
        found.reach = 0 if any(patch.action == "sharp" for patch in plain) else AROUND / max(1, blurred) ** 0.5


def restore_faces(networks, patches, batch_size, strength):
    """Fill in the results of patches, each by the network that suits its size, and the strength of it."""
    chosen = defaultdict(list)
    for patch in patches:
        suited = functools.partial(networks.suited, strength=strength, own=patch.strength)
        if patch.blurred and len(patch.lr) < CLEAR:     # what it shows does not depend on the strength
            tiny, vivid = networks.tiny(suited(0)[0]), networks(*networks.suited(TINY))
            patch.lr, patch.sr = upscale_blurred(networks(*suited(TINY)), patch.lr, tiny, vivid)
        else:
            chosen[suited(len(patch.lr))].append(patch)
        patch.strength = suited(len(patch.lr))[0]
    for which, alike in chosen.items():
        for patch, sr in upscale_pictures(networks(*which), alike, batch_size):
            patch.sr = add_grain(sr, patch.lr) if OWN <= len(patch.lr) == patch.side else sr


def restore_photos(networks, photos, batch_size, strength=1, factor=None, background=None):
    """Yield (picture, sr) for each Picture of a photograph, in order; sr (NH, NW, 3) uint8, picture.patches its faces.
    `factor` is N, 1, 2 or 4, by default what gives a handy size; `background`, "network" or "bicubic", is how the
    rest is enlarged: by default with the Networks, where that is quick and no face is too sharp for them."""
    for picture in photos:
        plan_patches(picture, factor, 12 if 8 in networks.files else TINY)
        photo, patches, found, times = picture.lr, picture.patches, picture.found, factor or picture.found.times
        restored = [patch for patch in patches if patch.action == "restored"]
        restore_faces(networks, restored, batch_size, strength)

        way = background or ("network" if photo[..., 0].size <= 5e5 and found.reach else "bicubic")
        painted = way == "network" and times == min(networks.files)     # mildly beside faces: edges look scribbled
        mild = functools.partial(networks, *networks.suited(CLEAR if found.faces else TINY, strength))
        canvas = enlarge_background(mild(), picture) if painted else rescale(photo, times)
        blurred = [patch for patch in patches if patch.blurred and background != "bicubic"]
        for number, patch in enumerate(blurred, 1):
            networks.tell(f", face {number} of {len(blurred)}")
            restore_surroundings(mild(), photo, patch, canvas, times, found.reach)
        for patch in sorted(patches, key=lambda patch: -patch.side):    # small ones over large ones
            if (painted or blurred) and patch.action in ("sharp", "left", "failed"):
                patch.sr = rescale(patch.lr, times)
            if patch.sr is not None:
                paste_face(patch, canvas, photo)
        asked, failed = {(face.x, face.y, face.size) for face, _ in picture.marked}, []
        for patch in restored:
            score, face = face_score(canvas, patch.face, times), patch.face
            patch.doubtful = score < CERTAIN
            failed += [(face, "failed")] * (score < HOPELESS and (face.x, face.y, face.size) not in asked)
        picture.marked = [*picture.marked, *failed]         # better as they were: once more, without them
        again = (networks, [picture], batch_size, strength, factor, background)
        yield from restore_photos(*again) if failed else [(picture, canvas)]
