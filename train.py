"""Train a face SRGAN: SRResNet on the pixel loss first, then SRGAN from it.

    python train.py --dry-run                                   # both stages in seconds, without VGG
    python train.py --train-dir thumbnails128x128               # both stages
    python train.py --output runs --resume                      # go on after any interruption
    torchrun --nproc-per-node 2 train.py --train-dir ...        # several processes

--output receives srresnet_x4.pth and srgan_x4.pth (the best of each stage), training_state.pth
(all that --resume needs), log.jsonl (a line per validation), curves.png and samples/. The recipe
follows Ledig et al. 2017 (arXiv:1609.04802, section 3.2); checkpoints/training.md has what differs, and scores.
"""
import argparse
import copy
import datetime
import functools
import gc
import json
import math
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data_loader import FACE_SIZE, DataError, FaceBatches, load_split, simulate, to_tensor, write_atomically
from loss import (VGG_LAYERS, GeneratorLoss, VGGFeatures, compare, discriminator_loss, load_lpips, plot_comparison,
                  shifted, vgg_distance)
from model import (CUDA_FULL, PRECISIONS, PRECISION_HELP, CheckpointError, Discriminator, Generator, Picture,
                   UsageError, checksum, device_name, load_checkpoint, load_plain, locked, save_checkpoint, save_plain,
                   select_device, select_dtype, upscale_pictures)

STAGES = ("srresnet", "srgan")
STATE = "training_state.pth"
# What a state tells of a stage's progress.
PROGRESS = {"step": int, "seconds": (int, float), "best": (float, int, type(None)), "sums": dict, "count": int}
UNFIT = "{}: not the state of a training of this project, or damaged; without --resume, it is set aside"
# Flags that a checkpoint does not tell: where somebody's files lie, and how the script was called.
PRIVATE = ("train_dir", "gan_train_dir", "val_dir", "init", "output", "vgg_weights", "resume", "dry_run")
VAL_FACES = 100     # validated on, spread over the validation set
LOG_EVERY = 10      # steps between looks at the losses; each look waits for the GPU
# Of the flags that are numbers: the least and the most that makes sense.
BOUNDS = {"val_every": (1, 1e9), "save_every": (1, 1e9), "keep_every": (1, 1e9), "blocks": (1, 256),
          "channels": (1, 1024), "pretrain_steps": (0, 1e9), "gan_steps": (0, 1e9), "batch_size": (1, 65536),
          "patch_size": (20, FACE_SIZE), "discriminator_steps": (0, 1e9),
          "lr": (1e-12, 1), "gan_lr": (1e-12, 1), "discriminator_lr": (1e-12, 1), "seed": (0, 2**32)}
BOUNDS |= {f"{name}_weight": (0, 1e9) for name in GeneratorLoss.TERMS}


class TrainingError(Exception):
    """Training cannot go on; the message is one sentence for the user."""


class MovingAverage:
    """Exponential moving average of a generator, batch-norm statistics included: moves `ema`, a copy of
    `generator`, at each `update`. Both must stay on their device."""

    def __init__(self, ema, generator, decay=0.999):
        pairs = list(zip(ema.state_dict().values(), generator.state_dict().values()))
        self.decay = decay
        self.floats = [*map(list, zip(*(pair for pair in pairs if pair[0].is_floating_point())))]
        self.counts = [*map(list, zip(*(pair for pair in pairs if not pair[0].is_floating_point())))]

    @torch.no_grad()
    def update(self, step):
        """Move after a step. The decay grows from 0.1 with the steps: the first, poor weights are soon forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self.floats, 1 - decay)       # one kernel instead of hundreds
        if self.counts:         # none without batch norm
            torch._foreach_copy_(*self.counts)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return _SumOverProcesses.apply(gradient)


class _ProcessesBatchNorm(torch.nn.BatchNorm2d):
    """Batch norm over the batch of all processes, on any device; unlike torch's SyncBatchNorm it never makes
    the host wait for a GPU."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        values = x.float().transpose(0, 1).flatten(1)                   # (C, N * H * W)
        moments = torch.stack([values.mean(1), values.square().mean(1)])
        mean, square = _SumOverProcesses.apply(moments) / dist.get_world_size()
        variance = (square - mean.square()).clamp(min=0)                # rounding
        with torch.no_grad():
            count = values.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        slope = self.weight * torch.rsqrt(variance + self.eps)
        offset = self.bias - mean * slope
        return (x * slope[:, None, None] + offset[:, None, None]).to(x.dtype)


def synchronise_batch_norm(network):
    """Let every batch norm of `network` see the batch of all processes, not its own share only."""
    for module in network.modules():
        if type(module) is torch.nn.BatchNorm2d:
            module.__class__ = _ProcessesBatchNorm


def learning_rate(step, steps):
    """Factor of the learning rate: 1 after a linear warm-up of 50 steps, over the last 40 % a cosine to 0.01. So a
    training can be given more steps until it has begun to fall."""
    return min(1, (step + 1) / 50) * (0.505 + 0.495 * math.cos(math.pi * max(0, step / steps - 0.6) / 0.4))


def validate(generator, faces, device, features=None, lpips=None):
    """Reduce (N, 3, 128, 128) uint8 faces, upscale and score them as inference.py does.

    Returns the mean scores of `generator` and of bicubic, by name, with VGG `features` the relative VGG distance, with
    `lpips`, which comes from `load_lpips`, LPIPS too; and rows for `plot_comparison` of the first four faces.
    """
    pairs = (simulate(face, generator.scale) for face in faces.permute(0, 2, 3, 1).numpy())
    pictures = [Picture(f"{i}", None, lr, hr=hr) for i, (lr, hr) in enumerate(pairs)]
    lines, sheet = [], []
    for picture, sr in upscale_pictures(generator, pictures, batch_size=16):
        row, line = compare(picture, sr, lpips=lpips)
        if features is not None:
            with torch.no_grad():
                line["vgg"] = vgg_distance(features, *(to_tensor([x]).to(device) for x in (sr, picture.hr))).item()
        lines.append(line)
        sheet.append(row)
    return {name: float(np.mean([line[name] for line in lines])) for name in lines[0]}, sheet[:4]


def plot_curves(log, path):
    """Draw the training curves of a log.jsonl: PSNR, VGG distance and LPIPS, losses, D(real) and D(fake)."""
    from matplotlib.figure import Figure
    lines = read_log(log)
    figure = Figure(figsize=(14, 8))
    figure.subplots_adjust(left=0.05, right=0.85, bottom=0.07, top=0.95, wspace=0.55, hspace=0.3)
    panels = dict(zip(("validation PSNR, dB", "validation VGG distance, LPIPS", "training losses, unweighted",
                       "mean D(real) and D(fake)"), figure.subplots(2, 2).flat))
    psnr, perceptual, losses, outputs = panels.values()

    def draw(axes, label, stage, value, colour=None, style="-"):
        points = [(line["step"], value(line)) for line in lines if line["stage"] == stage]
        axes.plot(*zip(*points), marker=".", label=label, color=colour, ls=style)

    for stage in dict.fromkeys(line["stage"] for line in lines):
        last = [line for line in lines if line["stage"] == stage][-1]
        colour = f"C{STAGES.index(stage)}"
        draw(psnr, stage, stage, lambda line: line["psnr"], colour)
        for name, style in (("vgg", "-"), ("lpips", "--")):
            if name in last:
                draw(perceptual, f"{name}, {stage}", stage, lambda line: line.get(name, math.nan), colour, style)
        for name in last["train"]:
            draw(outputs if name.startswith("d_") else losses, f"{name}, {stage}", stage,
                 lambda line, name=name: line["train"].get(name, math.nan))
    psnr.axhline(lines[-1]["psnr_bicubic"], color="gray", label="bicubic")
    losses.set_yscale("log")
    outputs.set_ylim(0, 1)
    for title, axes in panels.items():
        axes.set(title=title, xlabel="step of the stage", xlim=(0, None))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))      # beside the lines
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))


def read_log(path):
    """Read a log.jsonl: a list of dicts. Raises TrainingError where a line is damaged."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, text in enumerate(lines, 1):
        try:
            lines[number - 1] = line = json.loads(text)
            line["stage"], line["train"].items(), [line[name] + 0 for name in ("step", "psnr", "psnr_bicubic")]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise TrainingError(f"{path}: line {number} is damaged; remove it") from None
    return lines


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
        cv2.imwrite(str(Path(folder) / f"drawn{i:02d}.png"), picture)


def place_faces(faces, device):
    """Move faces to the device where they leave it half of its free memory; otherwise they stay on
    the CPU, and every batch is sent."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()        # what an earlier stage has left counts as free
        if faces.nbytes >= torch.cuda.mem_get_info(device)[0] / 2:
            return faces
    return faces.to(device)


def set_aside(path):
    """Rename what an earlier training wrote to a free name beside it, so that nothing is lost."""
    if path.exists():
        free = next(name for n in range(1, 10**6)
                    if not (name := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists())
        path.rename(free)
        print(f"{path} of an earlier training is kept as {free.name}")


class Prefetch:
    """Makes the batch of the next step on a thread, on CUDA in a stream of its own, while the current
    one is used. Called like the `batches` it wraps, with rising steps; returns channels-last tensors."""

    def __init__(self, batches):
        self.batches, self.next = batches, (None, None)
        self.pool = ThreadPoolExecutor(1)
        # Of high priority: its few small kernels go between the training's many.
        self.stream = torch.cuda.Stream(batches.device, priority=-1) if batches.device.type == "cuda" else None

    def _make(self, step):
        with torch.cuda.stream(self.stream):        # None: does nothing
            batch = [part.contiguous(memory_format=torch.channels_last) for part in self.batches(step)]
            return batch, self.stream and self.stream.record_event()

    def __call__(self, step):
        planned, future = self.next
        batch, made = (future if planned == step else self.pool.submit(self._make, step)).result()
        self.next = step + 1, self.pool.submit(self._make, step + 1)
        if made:
            current = torch.cuda.current_stream(self.batches.device)
            current.wait_event(made)
            for part in batch:      # its memory is not to be used again before `current` is done with it
                part.record_stream(current)
        return batch


class Stage:
    """One stage of the training, "srresnet" (pixel loss) or "srgan" (all losses): its data,
    networks, optimisers and progress, and what is done with them."""

    def __init__(self, name, args, device, features=None, lpips=None):
        self.name, self.args, self.device, self.features, self.lpips = name, args, device, features, lpips
        self.gan = name == "srgan"
        self.steps = args.gan_steps if self.gan else args.pretrain_steps
        self.checkpoint = args.output / f"{name}_x{args.scale}.pth"
        self.log = args.output / "log.jsonl"
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.main_process = rank == 0

        # Setup networks, before the data, whose reading takes longer than to see a wrong flag:
        torch.manual_seed(args.seed)
        generator = Generator(args.scale, args.blocks, args.channels, not args.no_bicubic_residual)
        discriminator = Discriminator(args.channels)
        # SRGAN goes on from the SRResNet in --output, unless there was no such stage and --init names another.
        pretrained, start = args.output / f"srresnet_x{args.scale}.pth", args.init
        if self.gan and pretrained.exists() and (args.pretrain_steps or not args.init):
            start = pretrained
        self.pretraining = self.start_from(start, generator) if start else {}
        if args.fixed_batch_norm:
            if not start:
                raise TrainingError("--fixed-batch-norm keeps the statistics of trained weights: give them with --init")
            for module in generator.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()
        if self.gan and not start and self.main_process:
            print(f"there is no {pretrained}: the generator of SRGAN starts untrained")
        self.ema = copy.deepcopy(generator).requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.generator = generator.to(device, memory_format=torch.channels_last)
        self.discriminator = discriminator.to(device, memory_format=torch.channels_last)
        self.generate, self.discriminate = self.generator, self.discriminator
        self.average = MovingAverage(self.ema, self.generator)
        if world > 1:
            for network in (generator, discriminator):
                synchronise_batch_norm(network)
            self.generate, self.discriminate = (DistributedDataParallel(
                network, device_ids=[device] if device.type == "cuda" else None)
                for network in (self.generator, self.discriminator))
        weights = {name: getattr(args, f"{name}_weight") for name, term in GeneratorLoss.TERMS.items()
                   if (term.both or self.gan) and (features is not None or not term.features)}
        if not any(weights.values()):       # SRGAN alone does without pixels
            weights["pixel"] = 1.0
            if self.main_process:
                print(f"{self.name}: no loss is left, so the mean squared error counts 1")
        self.criterion = GeneratorLoss(features, args.scale, **weights).requires_grad_(False).eval().to(device)
        if args.compile:
            for module in (self.generator, self.discriminator, self.criterion):
                module.compile()

        # Setup optimisers:
        self.g_optimizer = torch.optim.Adam(self.generator.parameters(), args.gan_lr if self.gan else args.lr,
                                            fused=True)
        self.d_optimizer = torch.optim.Adam(self.discriminator.parameters(), args.discriminator_lr or args.gan_lr,
                                            fused=True)
        dtype = select_dtype(args.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.autocast = functools.partial(torch.autocast, device.type, dtype,
                                          enabled=dtype != torch.float32)
        networks = (self.generator, self.discriminator) if self.gan else (self.generator,)
        self.statistics = [buffer for network in networks for buffer in network.buffers()]

        # Setup data:
        self.folders = args.gan_train_dir if self.gan and args.gan_train_dir else args.train_dir
        faces, self.val_faces = load_split(tuple(self.folders), args.val_dir, VAL_FACES, self.main_process)
        self.data = dict(faces=len(faces), faces_checksum=checksum({"faces": faces}) if self.main_process else None)
        self.batches = Prefetch(FaceBatches(
            place_faces(faces, device), args.batch_size, args.patch_size, args.scale, args.degradation,
            seed=2 * args.seed + self.gan, rank=rank, world=world, device=device))

        # Setup progress. Batches are a function of the step and nothing else in the training is
        # random, so the step is the whole random state.
        self.step, self.seconds, self.best, self.sums, self.count = 0, 0.0, None, {}, 0
        if self.main_process:
            where, few = self.batches.batches.faces.device, ", few to choose weights by" * (len(self.val_faces) < 20)
            print(f"{name}: {len(faces)} faces to train on, kept on the {where.type}, "
                  f"{len(self.val_faces)} to validate on{few}", flush=True)

    def start_from(self, path, generator):
        """Load the weights that this stage starts from; return the facts of their training. From weights of a smaller
        scale, every further doubling begins as a copy of their last one."""
        pretrained, facts = load_checkpoint(path)
        facts["checksum"] = checksum(pretrained.state_dict())       # which weights they were
        scale = min(pretrained.scale, generator.scale)
        if pretrained.architecture | {"scale": scale} != generator.architecture | {"scale": pretrained.scale}:
            raise TrainingError(f"{path} has the architecture {pretrained.architecture}, not "
                                f"{generator.architecture}; give its flags, or another --init or --output")
        weights, last = pretrained.state_dict(), 3 * (pretrained.scale.bit_length() - 2)    # of three layers a doubling
        for name in generator.state_dict():
            part, _, rest = name.partition(".")
            if part == "upsample" and name not in weights:
                index, _, rest = rest.partition(".")
                weights[name] = weights[f"upsample.{last + int(index) % 3}.{rest}"]
        generator.load_state_dict(weights)
        return facts

    def train_step(self):
        """Take one step: update D, then G."""
        started = time.monotonic()
        factor = learning_rate(self.step, self.steps)
        for optimizer in (self.g_optimizer, self.d_optimizer):
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * factor
        if self.gan and self.step < self.args.discriminator_steps:
            self.g_optimizer.param_groups[0]["lr"] = 0      # meanwhile Adam's moments settle
        lr, hr = self.batches(self.step)
        if self.scaler.is_enabled():
            scale, statistics = self.scaler.get_scale(), [buffer.clone() for buffer in self.statistics]
        with self.autocast():
            sr = self.generate(lr)
        values = {}

        # (1) update D: real pictures up, generated ones down.
        if self.gan:
            sr, hr = shifted(self.step, self.args.scale, sr, hr)
            with self.autocast():
                real_logits, fake_logits = self.discriminate(hr), self.discriminate(sr.detach())
                loss = discriminator_loss(real_logits, fake_logits)
            self.backward(loss, self.d_optimizer)
            values.update(discriminator=loss, d_real=real_logits.sigmoid().mean(),
                          d_fake=fake_logits.sigmoid().mean())

        # (2) update G: near the target, and up in D's eyes. D only passes the gradient on.
        self.discriminator.requires_grad_(False)
        with self.autocast():
            loss, terms = self.criterion(sr, hr, self.discriminator if self.gan else None)
        self.backward(loss, self.g_optimizer)
        self.discriminator.requires_grad_(True)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < scale:
            # Too large for float16: an optimiser was skipped, and nothing else may remember the step.
            if scale < 1:
                raise TrainingError(self.diverged("scaled"))
            torch._foreach_copy_(self.statistics, statistics)
        else:
            if self.main_process:
                self.average.update(self.step)
            for name, value in {**terms, **values}.items():     # sums stay on the device until read
                self.sums[name] = self.sums.get(name, 0) + value.detach().float()
            self.count += 1
        self.step += 1
        self.seconds += time.monotonic() - started

    def backward(self, loss, optimizer):
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)

    def losses(self):
        """Mean losses since the last validation. Raises TrainingError where one is not finite."""
        means = {name: float(value) / max(1, self.count) for name, value in self.sums.items()}
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(self.diverged(" and ".join(bad)))
        return means

    def diverged(self, which):
        return (f"the {which} loss is not finite at step {self.step} of {self.name}; the last good state is kept in "
                f"{self.args.output / STATE}; --resume with a lower learning rate")

    def validate(self):
        """Score the averaged generator, log, draw, and keep its checkpoint if it is the best."""
        means = self.losses()
        self.sums, self.count = {}, 0
        scores, sheet = validate(self.ema.for_inference(), self.val_faces, self.device, self.features, self.lpips)
        line = dict(stage=self.name, step=self.step, **scores, train=means,
                    lr=self.g_optimizer.param_groups[0]["lr"], seconds=round(self.seconds, 1))
        with open(self.log, "a") as file:
            file.write(json.dumps(line) + "\n")
        samples = self.args.output / "samples"
        samples.mkdir(exist_ok=True)
        plot_comparison(samples / f"{self.name}_{self.step:06d}.png", sheet)
        plot_curves(self.log, self.args.output / "curves.png")
        tqdm.write(f"{self.name} step {self.step}: " + ", ".join(
            f"{name} {scores[name]:.4g}" for name in ("psnr", "psnr_bicubic", "ssim", "ssim_bicubic", "vgg",
                                                            "lpips") if name in scores))
        if means.get("d_real", 0) > 0.99 and means["d_fake"] < 0.01:
            tqdm.write("warning: the discriminator is saturated (D(real) > 0.99, D(fake) < 0.01); "
                       "the generator learns little from it")

        # SRResNet is chosen by PSNR. SRGAN is chosen by LPIPS or the VGG distance: PSNR would pick the
        # blurred mean of all likely faces. Without either its last averaged weights are kept.
        quality = -scores.get("lpips", scores.get("vgg", -self.step)) if self.gan else scores["psnr"]
        if self.best is None or quality > self.best:
            if self.best is None:
                set_aside(self.checkpoint)
            self.best = quality
            self.keep(self.checkpoint, scores)

    def keep(self, path, scores=None):
        """Write the averaged generator with the facts of its training."""
        recipe = {name: value for name, value in plain(self.args).items() if name not in PRIVATE}
        save_checkpoint(path, self.ema, dict(
            stage=self.name, step=self.step, metrics=scores or {}, recipe=recipe,
            data=[Path(folder).resolve().name for folder in self.folders], **self.data,
            seconds=round(self.seconds, 1), device=device_name(self.device), torch=str(torch.__version__),
            date=datetime.date.today().isoformat(), pretraining=self.pretraining))

    def parts(self):
        names = ["generator", "ema", "g_optimizer", "scaler"]
        names += ["discriminator", "d_optimizer"] if self.gan else []
        return {name: getattr(self, name) for name in names}

    def save(self):
        """Write all that --resume needs."""
        self.losses()
        progress = {name: getattr(self, name) for name in PROGRESS}
        log_size = self.log.stat().st_size if self.log.exists() else 0
        save_plain(self.args.output / STATE, dict(
            stage=self.name, args=plain(self.args), progress=progress, log_size=log_size,
            parts={name: part.state_dict() for name, part in self.parts().items()}))

    def load(self, state):
        """Go on from what `save` wrote."""
        try:
            for name, part in self.parts().items():
                if name != "scaler" or state["parts"][name]:        # empty in a state that was not float16
                    part.load_state_dict(state["parts"][name])
            for optimizer, network in ((self.g_optimizer, self.generator), (self.d_optimizer, self.discriminator)):
                for parameter in network.parameters():      # Adam's moments, which PyTorch does not check
                    if any(moment.shape not in ((), parameter.shape) for moment in optimizer.state[parameter].values()):
                        raise ValueError
            for name, kind in PROGRESS.items():
                if not isinstance(value := state["progress"][name], kind):
                    raise TypeError
                setattr(self, name, value)
            if self.step < 0 or not all(isinstance(value, torch.Tensor) for value in self.sums.values()):
                raise ValueError
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            raise TrainingError(UNFIT.format(self.args.output / STATE)) from None
        if self.main_process and self.log.exists():     # lines of steps that will be taken again
            os.truncate(self.log, min(state["log_size"], self.log.stat().st_size))
            read_log(self.log)


def read_state(path):
    """Read the state of an interrupted training. Raises TrainingError for what is none; `Stage.load` looks at the
    networks in it."""
    state = load_plain(path)
    try:
        if not isinstance(state, dict) or state["stage"] not in STAGES or type(state["log_size"]) is not int:
            raise ValueError
        if state["log_size"] < 0 or not all(isinstance(state[name], dict) for name in ("args", "parts", "progress")):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise TrainingError(UNFIT.format(path)) from None
    return state


def plain(args):
    """The flags as numbers and strings, for a .pth file."""
    return {name: [str(item) for item in value] if isinstance(value, list) else
            str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


class StopSignal:
    """Notes SIGINT and SIGTERM, so that the step is finished and saved before the end."""

    def __enter__(self):
        self.number = 0
        self.handlers = {number: signal.signal(number, self.note)
                         for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.number:         # asked twice: do not wait for the step
            sys.exit(128 + number)
        self.number = number

    def agreed(self, device):
        """The signal that any process received, so that all of them end after the same step."""
        if dist.is_initialized():
            number = torch.tensor(self.number, device=device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.number = int(number)
        return self.number


def main(args):
    # Setup processes and device:
    device = select_device(args.device)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    main_process = not dist.is_initialized() or dist.get_rank() == 0
    torch.backends.cudnn.benchmark = True
    if main_process:
        print(f"device: {device_name(device)}, {world} process{'es' * (world > 1)}, "
              f"{str(select_dtype(args.precision, device)).removeprefix('torch.')}", flush=True)
    features = None
    if args.vgg_weights != "none":
        features = VGGFeatures(args.vgg_layer, args.vgg_weights).to(device, memory_format=torch.channels_last)
    lpips = load_lpips(device) if args.lpips and main_process else None

    # Setup state: where an interrupted training goes on, or nothing.
    state = read_state(args.output / STATE) if args.resume else None
    earlier = [] if state else [STATE, "log.jsonl", "samples"]      # in the way of this training, once it can begin

    # Train the stages that are wanted and not yet done:
    with StopSignal() as stop:
        for name in STAGES[STAGES.index(state["stage"]) if state else 0:]:
            if name == "srgan" and args.gan_steps or name == "srresnet" and args.pretrain_steps:
                stage = Stage(name, args, device, features, lpips)
                if state and state["stage"] == name:
                    stage.load(state)
                elif main_process:
                    while earlier:
                        set_aside(args.output / earlier.pop())
                    stage.save()        # so that even the first steps can be resumed
                run_stage(stage, stop)
                stage = None            # its faces make room for the next stage's
                if dist.is_initialized():
                    dist.barrier()      # the next stage reads what this one's main process writes
    if main_process:
        print(f"done: {'both stages work' if args.dry_run else args.output}")


def run_stage(stage, stop):
    """Train a stage to its last step, validating and saving on the way, or until a signal."""
    args = stage.args
    with tqdm(total=stage.steps * args.batch_size, initial=stage.step * args.batch_size, desc=stage.name,
              unit="image", disable=not stage.main_process, mininterval=1) as bar:
        while stage.step < stage.steps:
            stage.train_step()
            bar.update(args.batch_size)
            last, stopping = stage.step == stage.steps, 0
            if stage.step % LOG_EVERY == 0:
                bar.set_postfix({name: f"{value:.3g}" for name, value in stage.losses().items()})
            if stage.step % LOG_EVERY == 0 or not dist.is_initialized():
                stopping = stop.agreed(stage.device)
            if stage.main_process:
                if args.keep_every and stage.step % args.keep_every == 0:
                    stage.keep(stage.checkpoint.with_stem(f"{stage.checkpoint.stem}_{stage.step:06d}"))
                if last or stage.step % args.val_every == 0:
                    stage.validate()
                    stage.save()
                elif stopping or stage.step % args.save_every == 0:
                    stage.save()
            if last:            # a signal may have come while it was validated
                stopping = stop.agreed(stage.device)
            if stopping:
                if stage.main_process:
                    tqdm.write(f"interrupted at step {stage.step} of {stage.name}; the state is saved, "
                               f"go on with --output {args.output} --resume")
                sys.exit(128 + stopping)


def fits(action, value):
    """Tell whether a value from a state is one that its flag could have given."""
    kind = bool if action.nargs == 0 else (int, float) if action.type is float else action.type or str
    values = value if action.nargs == "+" and isinstance(value, list) else [value]
    return value is None or not action.choices and all(isinstance(item, (kind, str) if kind is Path else kind)
                                                       for item in values) or value in (action.choices or ())


def parse_arguments(argv=None):
    """Read the flags. With --resume, those of the interrupted training are the defaults."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument_group("data and output").add_argument
    add("--train-dir", nargs="+", metavar="DIR", help="folders of faces to train on; of what is not "
        "128x128, the centre square is resized")
    add("--gan-train-dir", nargs="+", metavar="DIR", help="folders for SRGAN, whose discriminator "
        "wants clean faces (default: --train-dir)")
    add("--val-dir", metavar="DIR", help="faces to validate on (default: a part of the training folders)")
    add("--init", type=Path, metavar="FILE", help="checkpoint to start from, of this scale or a smaller one "
        "(default: SRResNet from random weights, SRGAN from the SRResNet in --output)")
    add("--output", type=Path, metavar="DIR", help="for checkpoints, state and log (default: runs; "
        "with --dry-run a temporary folder)")
    add("--resume", action="store_true", help="go on with the training in --output, with its flags")
    add("--dry-run", action="store_true", help="try both stages, but for VGG, on generated faces, in seconds")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [%(default)s]")
    add("--precision", default="auto", choices=PRECISIONS, help=PRECISION_HELP)
    add("--compile", action="store_true", help="compile the networks: faster steps after a minute or two; needs a "
        "C++ compiler, on CUDA Triton")
    add("--val-every", type=int, default=500, metavar="STEPS", help="validate and save the state [%(default)s]")
    add("--save-every", type=int, default=250, metavar="STEPS", help="save the state [%(default)s]")
    add("--lpips", action="store_true", help="validate LPIPS too, and choose SRGAN by it, not by the VGG distance; "
        "needs pip install lpips")
    add("--keep-every", type=int, metavar="STEPS", help="also keep the averaged generator as it is then")

    add = parser.add_argument_group("networks").add_argument
    add("--scale", type=int, default=4, choices=[2, 4, 8], help="enlargement [%(default)s]")
    add("--blocks", type=int, default=16, help="residual blocks [%(default)s]")
    add("--channels", type=int, default=64, help="feature channels of both networks [%(default)s]")
    add("--no-bicubic-residual", action="store_true", help="the paper's network: without the addition of "
        "the bicubically enlarged input")

    add = parser.add_argument_group("recipe").add_argument
    add("--pretrain-steps", type=int, default=6000, metavar="N", help="steps of SRResNet, or 0 [%(default)s]")
    add("--gan-steps", type=int, default=1900, metavar="N", help="steps of SRGAN, or 0 [%(default)s]")
    add("--discriminator-steps", type=int, default=0, metavar="N", help="in the first of them, only the discriminator "
        "learns: for an SRGAN that begins with good weights [%(default)s]")
    add("--batch-size", type=int, default=16, help="patches per step, of all processes together; learning rates "
        "and steps are for this whole batch too [%(default)s]")
    add("--patch-size", type=int, default=96, help="HR pixels: a multiple of the scale, 20 to 128 [%(default)s]")
    add("--degradation", default="mixed", choices=["bicubic", "mixed"], help="bicubic: faces as they are, reduced by "
        "Pillow; mixed: in many ways, also zoomed, turned, damaged [%(default)s]")
    add("--fixed-batch-norm", action="store_true", help="batch norm of the generator keeps the statistics it starts "
        "with: to go on training good weights, faster, with small batches or on many GPUs")
    add("--lr", type=float, default=4e-4, help="learning rate of SRResNet (Adam; at the end a cosine) [%(default)s]")
    add("--gan-lr", type=float, default=1e-4, help="learning rate of SRGAN [%(default)s]")
    add("--discriminator-lr", type=float, metavar="LR", help="learning rate of the discriminator [that of --gan-lr]")
    for name, term in GeneratorLoss.TERMS.items():
        add(f"--{name.replace('_', '-')}-weight", type=float, default=term.weight, help=f"of the {term.text}, in the "
            f"loss of {'both stages' if term.both else 'SRGAN'} [%(default)s]")
    add("--vgg-layer", default="conv3_4", choices=list(VGG_LAYERS), help="features of the VGG distance [%(default)s]")
    add("--vgg-weights", metavar="FILE", help="VGG19 state dict (default: torchvision's, downloaded "
        "once; none: train without the VGG term)")
    add("--seed", type=int, default=0, help="of the weights and the batches [%(default)s]")

    args = parser.parse_args(argv)
    stored = {}
    if args.resume:
        args.output = args.output or Path("runs")
        if not (args.output / STATE).exists():
            raise TrainingError(f"{args.output} holds no {STATE}, so there is nothing to --resume")
        stored = {f"{name}_weight": 0 for name in GeneratorLoss.TERMS}      # those that it does not know yet
        stored |= read_state(args.output / STATE)["args"] | {"output": args.output, "resume": True}
        known = {action.dest: action for action in parser._actions}
        stored = {name: value for name, value in stored.items() if name in known or value != 0}     # a loss now gone
        if lost := [name for name in stored if name not in known and f"{name}".endswith("_weight")]:
            raise TrainingError(f"{args.output / STATE}: trained with a loss that this code lacks, {lost[0][:-7]:.40}")
        if not all(name in known and fits(known[name], value) for name, value in stored.items()):
            raise TrainingError(UNFIT.format(args.output / STATE))
        parser.set_defaults(**stored)
    elif args.dry_run:
        parser.set_defaults(blocks=2, channels=16, patch_size=32, batch_size=4, pretrain_steps=4,
                            gan_steps=4, val_every=2, vgg_weights="none")
    args = parser.parse_args(argv)
    for name in ("scale", "blocks", "channels", "no_bicubic_residual", "lpips") if stored else ():
        if getattr(args, name) != stored.get(name, False):
            raise TrainingError(f"--{name.replace('_', '-')} is {stored.get(name, False)} in the training to resume")
    if not (args.train_dir or args.dry_run):
        raise TrainingError("--train-dir is needed: one or more folders of faces")
    for name, (least, most) in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not (isinstance(value, (int, float)) and least <= value <= most):
            raise TrainingError(f"--{name.replace('_', '-')} must be from {least:g} to {most:g}")
    for folder in filter(None, [*(args.train_dir or ()), *(args.gan_train_dir or ()), args.val_dir]):
        if not Path(folder).is_dir():       # before VGG is downloaded
            raise TrainingError(f"{folder}: there is no such folder")
    if not args.pretrain_steps + args.gan_steps:
        raise TrainingError("--pretrain-steps and --gan-steps must not both be 0")
    if args.patch_size % args.scale:
        raise TrainingError(f"--patch-size must be a multiple of {args.scale}")
    if args.batch_size % int(os.environ.get("WORLD_SIZE", 1)):
        raise TrainingError("--batch-size must be a multiple of the number of processes")
    return args


def run(argv=None):
    """Run `main` and turn every expected failure into one sentence and an exit status."""
    try:
        args = parse_arguments(argv)
        with tempfile.TemporaryDirectory() as folder:
            if args.dry_run and not args.train_dir:
                draw_faces(folder)
                args.train_dir = [folder]
            args.output = args.output or (Path(folder, "output") if args.dry_run else Path("runs"))
            args.output.mkdir(parents=True, exist_ok=True)
            with locked(args.output) if int(os.environ.get("RANK", 0)) == 0 else nullcontext(True) as mine:
                if not mine:
                    raise TrainingError(f"{args.output}: another training is writing there; give another --output")
                main(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except (CheckpointError, DataError, TrainingError, UsageError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit(f"train.py: {CUDA_FULL}")
    except Exception as error:      # compilers fail in a dozen ways, none of which has a base class of its own
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            sys.exit("train.py: the memory is full; try a smaller --batch-size or fewer --channels")
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch", "triton")):
            raise
        sys.exit(f"train.py: the networks cannot be compiled ({str(error).strip().splitlines()[0]}); "
                 "leave out --compile")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run()
