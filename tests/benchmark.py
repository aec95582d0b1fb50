"""Measure how fast upscaling and training are, against plain PyTorch in the same run.

    python tests/benchmark.py                   # a few minutes; on the GPU where there is one
    python tests/benchmark.py --quick           # fewer repeats, smaller inputs

Machines are noisy: contestants take turns, and every figure is a median. On CUDA a turn is 100 steps without a wait
for the GPU between them, so that launches overlap and a slow batch thread shows. The plain side ("textbook")
has the same weights, networks and losses in the default memory format; it is trained in float32 and by autocast, and
upscales in float32, a face at a time.
"""
import argparse
import contextlib
import copy
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data_loader import find_images, resize, simulate, to_tensor, to_uint8  # noqa: E402
from inference import CHECKPOINT  # noqa: E402
from loss import VGG_LAYERS, GeneratorLoss, VGGFeatures, discriminator_loss, sample_faces  # noqa: E402
from model import (  # noqa: E402
    PRECISIONS, Discriminator, Generator, bicubic, device_name, load_checkpoint, select_device, select_dtype,
    upscale)


def row(what, ours, against="", ratio=""):
    print(f"{what:45} {ours:>20}  {against:40} {ratio:>9}", flush=True)


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(contestants, device, repeats):
    """Median seconds of each function in a dict, called in turn after one turn to warm up."""
    seconds, calls = {name: [] for name in contestants}, 100 if device.type == "cuda" else 1
    for repeat in range(repeats + 1):
        for name, function in contestants.items():
            synchronise(device)
            started = time.perf_counter()
            for _ in range(calls if repeat else 3):
                function()
            synchronise(device)
            if repeat:
                seconds[name].append((time.perf_counter() - started) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def command(*arguments):
    """Run Python with arguments: (wall seconds, peak memory in GB)."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"benchmark.py: {' '.join(map(str, arguments))} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - started, usage.ru_maxrss * unit / 1e9


class Textbook(nn.Module):
    """The generator as the paper draws it, layer after layer."""

    def __init__(self, generator, bicubic_residual=True):
        super().__init__()
        self.generator, self.bicubic_residual = generator, bicubic_residual

    def forward(self, lr):
        net = self.generator
        features = net.head(lr)
        *layers, activation = net.upsample
        features = nn.Sequential(*layers)(features + net.body(features))
        features = activation(F.pixel_shuffle(features, 2))
        sr = F.conv2d(features, net.tail.weight, net.tail.bias, padding=4)
        return sr + bicubic(lr, net.scale) if self.bicubic_residual else sr


def convolution_flops(device, dtype, repeats):
    """FLOP/s of a large 3x3 convolution, the most that a network of them can reach."""
    channels, size, number = 256, 64, 128 if device.type == "cuda" else 4
    conv = nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype).requires_grad_(False)
    conv.to(memory_format=torch.channels_last)
    x = torch.rand(number, channels, size, size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    seconds = take_turns({"conv": lambda: conv(x)}, device, repeats)["conv"]
    return 2 * 9 * channels**2 * size**2 * number / seconds


def count_flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def other_runtimes(generator, dtypes, pictures):
    """What a user would take instead, PyTorch as it comes and, where they are installed (pip install onnx onnxscript
    onnxruntime openvino), other runtimes: a dict of functions that enlarge `pictures`, (N, 32, 32, 3) uint8, with the
    textbook network on the CPU; the runtimes fold and fuse it by themselves."""
    # The bicubic part is added outside: the exporters do not know it.
    net, lr = Textbook(generator, bicubic_residual=False).eval().requires_grad_(False), to_tensor(pictures)

    def finished(run):
        def enlarge():
            lr = to_tensor(pictures)
            return to_uint8(torch.from_numpy(run(lr.numpy())) + bicubic(lr, generator.scale))
        return enlarge

    runs = {}
    for dtype in dtypes:
        plain = copy.deepcopy(net).to(dtype)
        runs[f"plain PyTorch, {str(dtype)[6:]}"] = finished(lambda batch, plain=plain, dtype=dtype: plain(
            torch.from_numpy(batch).to(dtype)).float().numpy())
    with contextlib.suppress(ImportError), tempfile.TemporaryDirectory() as folder:
        import onnxruntime
        torch.onnx.export(net, (lr,), Path(folder, "net.onnx"), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(Path(folder, "net.onnx"))
        [given] = session.get_inputs()
        runs["ONNX Runtime, float32"] = finished(lambda batch: session.run(None, {given.name: batch})[0])
    with contextlib.suppress(ImportError):
        import openvino
        model = openvino.convert_model(net, example_input=lr)
        for dtype in dtypes:
            hint = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(dtype)
            compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint}) if hint else None
            if compiled:
                runs[f"OpenVINO, {str(dtype)[6:]}"] = finished(lambda batch, compiled=compiled: compiled(batch)[0])
    return runs


def measure_upscaling(args, device, dtypes):
    """Faces per second by batch size, and the share of the arithmetic that convolutions reach."""
    generator = load_checkpoint(CHECKPOINT)[0].to(device)
    plain = Textbook(generator)
    face = torch.rand(1, 3, 32, 32, device=device)
    with torch.no_grad():
        flops = count_flops(lambda: plain(face))

    def textbook():
        with torch.no_grad():
            for _ in range(8):
                plain(face)

    contestants = {"textbook": textbook}
    for dtype, number in itertools.product(dtypes, (1, 16, 64)):
        batch, net = np.full((number, 32, 32, 3), 100, np.uint8), generator.for_inference(dtype)
        contestants[dtype, number] = lambda batch=batch, net=net: [
            upscale(net, batch) for _ in range(max(1, 8 // len(batch)))]
    others = other_runtimes(load_checkpoint(CHECKPOINT)[0], dtypes, np.full((16, 32, 32, 3), 100, np.uint8)) \
        if device.type == "cpu" else {}
    seconds = take_turns(contestants | others, device, args.repeats)
    others = {name: 16 / seconds.pop(name) for name in others}
    plain_rate = 8 / seconds.pop("textbook")
    rates = {(dtype, number): max(number, 8) / value for (dtype, number), value in seconds.items()}
    for (dtype, number), rate in rates.items():
        row(f"upscaling, {str(dtype)[6:]}, batch {number}", f"{rate:.1f} faces/s",
            f"textbook: {plain_rate:.1f} faces/s", f"{rate / plain_rate:.2f}x")
    for name, rate in others.items():
        ours = rates[next(dtype for dtype in dtypes if name.endswith(str(dtype)[6:])), 16]
        row(f"upscaling, batch 16, {name.split(', ')[1]}", f"{ours:.1f} faces/s", f"{name}: {rate:.1f} faces/s",
            f"{ours / rate:.2f}x")
    for dtype in dtypes:
        reached, most = rates[dtype, 16] * flops, convolution_flops(device, dtype, args.repeats)
        row(f"upscaling, {str(dtype)[6:]}, arithmetic", f"{reached / 1e9:.0f} GFLOP/s",
            f"a large 3x3 convolution: {most / 1e9:.0f} GFLOP/s", f"{reached / most:.0%}")
    return 1 / rates[dtypes[-1], 16]        # seconds per face


def measure_commands(args, device, folder):
    """inference.py as a user starts it: one face, a folder of them, one large picture. Returns a function
    that prints the rows, given the seconds that the network alone takes for a face."""
    flags = ["--device", device, "--precision", args.precision, "--output", folder / "results"]
    number, side = (100, 512) if args.quick else (500, 1024)
    rng = np.random.default_rng(0)

    def save(path, size):       # smooth, like a photograph
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        path.parent.mkdir(exist_ok=True)
        picture.resize((size, size), Image.Resampling.BICUBIC).save(path)
        return path

    def save_photo(path):       # 12 megapixels, ten faces out of focus
        picture = cv2.resize(rng.integers(60, 200, (30, 40, 3), dtype=np.uint8), (4000, 3000),
                             interpolation=cv2.INTER_CUBIC)
        for i, face in enumerate([*sample_faces().values()] * 5):
            size = 200 + 20 * i
            soft = resize(resize(face, 32), size)
            picture[300 + i % 2 * 1400:, 100 + i // 2 * 780:][:size, :size] = soft
        Image.fromarray(picture).save(path, quality=92)
        return path

    one = save(folder / "one.png", 32)
    faces = [*sample_faces().values()]
    (folder / "many").mkdir()
    for i in range(number):     # sharp, so that none is reduced first
        lr = simulate(np.roll(faces[i % 2], i, axis=1), 4)[0]
        Image.fromarray(lr).save(folder / "many" / f"{i}.png")
    calls = {"bare": ("-c", "import torch"), "start": (ROOT / "inference.py", one, *flags),
             "many": (ROOT / "inference.py", folder / "many", *flags)}
    command(*calls["start"])                    # warms the file cache
    turns = [{name: command(*call) for name, call in calls.items()} for _ in range(3)]
    bare, start, many = (statistics.median(turn[name][0] for turn in turns) for name in calls)
    many_memory = max(turn["many"][1] for turn in turns)
    large, large_memory = command(ROOT / "inference.py", save(folder / "large.png", side), *flags)
    photo, photo_memory = command(ROOT / "inference.py", save_photo(folder / "photo.jpg"), "--photo", *flags)

    def show(per_face):
        row("start-up: inference.py on one face", f"{start:.2f} s", f"import torch: {bare:.2f} s",
            f"+{start - bare:.2f} s")
        alone = number * per_face
        row(f"inference.py on {number} faces, peak {many_memory:.2f} GB", f"{many:.1f} s",
            f"the network alone: {alone:.1f} s", f"{many / alone:.2f}x")
        row("the same without start-up", f"{many - start:.1f} s", f"the network alone: {alone:.1f} s",
            f"{(many - start) / alone:.2f}x")
        megapixels, small = (4 * side) ** 2 / 1e6, per_face * (side / 32) ** 2
        row(f"inference.py on {side}x{side}, peak {large_memory:.2f} GB",
            f"{(large - start) / megapixels:.2f} s/megapixel",
            f"as 32x32 faces: {small / megapixels:.2f} s/megapixel", f"{(large - start) / small:.2f}x")
        row(f"--photo, 12 megapixels, 10 faces, peak {photo_memory:.2f} GB", f"{photo:.1f} s",
            f"start-up: {start:.1f} s", f"{photo / start:.1f}x")

    return show


class Faces(Dataset):
    """Textbook data: each picture is decoded, cropped and reduced by Pillow whenever it is wanted."""

    def __init__(self, folder, patch, length):
        self.files, self.patch, self.length = find_images(folder), patch, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        with Image.open(self.files[i % len(self.files)]) as image:
            top, left = np.random.default_rng(i).integers(0, 129 - self.patch, 2).tolist()
            hr = image.convert("RGB").crop((left, top, left + self.patch, top + self.patch))
        lr = hr.resize((self.patch // 4,) * 2, Image.Resampling.BICUBIC)
        return tuple(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 for picture in (lr, hr))


class TextbookTraining:
    """The loop of many a tutorial, with the same networks and losses."""

    def __init__(self, args, device, features, folder, steps, dtype):
        gan = features is not None
        self.device, self.gan = device, gan
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self.generator, self.discriminator = Textbook(Generator()).to(device), Discriminator().to(device)
        self.criterion = GeneratorLoss(features, pixel=args.pixel_weight, vgg=args.vgg_weight,
                                       adversarial=args.adversarial_weight) if gan else GeneratorLoss(pixel=1)
        self.optimizers = [torch.optim.Adam(net.parameters()) for net in (self.generator, self.discriminator)]
        self.data = iter(DataLoader(Faces(folder, args.patch_size, steps * args.batch_size), args.batch_size,
                                    num_workers=min(4, os.cpu_count()), persistent_workers=True))

    def train_step(self):
        lr, hr = (batch.to(self.device) for batch in next(self.data))
        with self.autocast:
            sr = self.generator(lr)
        if self.gan:
            with self.autocast:
                loss = discriminator_loss(self.discriminator(hr), self.discriminator(sr.detach()))
            self.optimizers[1].zero_grad()
            loss.backward()
            self.optimizers[1].step()
        with self.autocast:
            loss, _ = self.criterion(sr, hr, self.discriminator)
        self.optimizers[0].zero_grad()
        loss.backward()
        self.optimizers[0].step()
        loss.item()


def measure_training(args, device, folder):
    """Images per second of each stage at the default settings, its arithmetic, and the share of the data."""
    train.draw_faces(folder, 64)
    vgg = folder / "vgg.pth"        # random: they take as long as the real ones
    with torch.device("meta"):
        from torchvision.models import vgg19
        shapes = vgg19().features[:VGG_LAYERS["conv5_4"]].state_dict()
    torch.save({name: torch.randn(value.shape) * 2 / max(1, value[0].numel()) ** 0.5
                for name, value in shapes.items()}, vgg)
    flags, compiling = (train.parse_arguments([
        "--train-dir", str(folder), "--output", str(folder / "out"), "--precision", args.precision, "--vgg-weights",
        str(vgg), "--device", args.device, *(["--batch-size", str(args.batch_size)] if args.batch_size else []), *more])
        for more in ([], ["--compile"]))
    flags.output.mkdir()
    for name in train.STAGES:
        features = VGGFeatures(flags.vgg_layer, vgg).to(device) if name == "srgan" else None
        textbooks = {f"textbook, {str(dtype)[6:]}": TextbookTraining(
            flags, device, features, folder, 100 * (args.repeats + 1), dtype).train_step
            for dtype in dict.fromkeys([torch.float32, select_dtype(args.precision, device)])}
        stage, compiled = (train.Stage(name, its_flags, device, features) for its_flags in (flags, compiling))
        prefetch, waits = stage.batches, []

        def timed(step, prefetch=prefetch, waits=waits):
            started = time.perf_counter()
            batch = prefetch(step)
            waits.append(time.perf_counter() - started)
            return batch

        stage.batches = timed
        seconds = take_turns(textbooks | {
            "ours": stage.train_step, "compiled": compiled.train_step,
            "data": lambda stage=stage, prefetch=prefetch: prefetch.batches(stage.step)}, device, args.repeats)
        rates = {contestant: flags.batch_size / value for contestant, value in seconds.items()}
        for ours, words in (("ours", ""), ("compiled", ", --compile")):
            for other in textbooks:
                row(f"training {name}{words}", f"{rates[ours]:.1f} images/s",
                    f"{other}: {rates[other]:.1f} images/s", f"{rates[ours] / rates[other]:.2f}x")
        row(f"training {name}, data", f"wait {statistics.median(waits[1:]) * 1e3:.1f} ms",
            f"to make it {seconds['data'] * 1e3:.1f} ms; the step {seconds['ours'] * 1e3:.0f} ms",
            f"{statistics.median(waits[1:]) / seconds['ours']:.1%}")
        flops = count_flops(stage.train_step)
        dtype = select_dtype(args.precision, device)
        reached, most = flops / seconds["ours"], convolution_flops(device, dtype, args.repeats)
        row(f"training {name}, arithmetic", f"{reached / 1e9:.0f} GFLOP/s",
            f"a large 3x3 convolution: {most / 1e9:.0f} GFLOP/s", f"{reached / most:.0%}")


def main():
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [%(default)s]")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS, help="of ours [%(default)s]")
    parser.add_argument("--batch-size", type=int, help="of the training [train.py's for the device]")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, smaller inputs")
    args = parser.parse_args()
    args.repeats = 2 if args.quick else 5
    device = select_device(args.device)
    dtypes = list(dict.fromkeys([torch.float32, select_dtype(args.precision, device)]))
    print(f"{device_name(device)}, PyTorch {torch.__version__}, {str(dtypes[-1])[6:]} where nothing else is said\n")
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory() as folder:
        # First, while this process is small: the peak memory of a child counts from its parent's.
        show_commands = measure_commands(args, device, Path(folder))
        show_commands(measure_upscaling(args, device, dtypes))
        faces = Path(folder, "faces")
        faces.mkdir()
        measure_training(args, device, faces)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)         # ONNX Runtime and OpenVINO beside PyTorch crash when Python ends
