import errno
import functools
import importlib
import itertools
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import data_loader
import train
from loss import Term, psnr
from model import Discriminator, Generator, checksum, load_checkpoint, load_plain, save_checkpoint

ROOT = Path(train.__file__).parent
TINY = ["--blocks", "1", "--channels", "8", "--patch-size", "20", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture
def flags(faces, vgg_file, tmp_path, monkeypatch):
    """Flags of a training that takes seconds, with every loss; its figures are drawn in the dry run's test alone."""
    for name in ("plot_curves", "plot_comparison"):
        monkeypatch.setattr(train, name, lambda *arguments: None)
    return [
        *TINY,
        "--train-dir",
        str(faces),
        "--vgg-weights",
        str(vgg_file),
        "--vgg-layer",
        "conv2_2",
        "--output",
        str(tmp_path / "out"),
    ]


@pytest.fixture
def stage(flags, tmp_path):
    """A function that sets up one stage of the tiny training."""

    def setup(name, *more):
        args = train.parse_arguments([*flags, *more])
        args.output.mkdir(exist_ok=True)
        features = train.VGGFeatures(args.vgg_layer, args.vgg_weights)
        return train.Stage(name, args, torch.device("cpu"), features)

    return setup


def log_lines(folder):
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_equal(a, b, name="state"):
    """Compare nested states bit for bit."""
    assert type(a) is type(b), name
    if isinstance(a, dict):
        assert list(a) == list(b), name
        for key in a:
            if key not in ("seconds", "output", "resume", "log_size"):
                assert_equal(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    else:
        assert a == b, name


def start(*arguments, **environment):
    return subprocess.Popen([sys.executable, ROOT / "train.py", *arguments], cwd=ROOT, env=os.environ | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process, condition):
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    pytest.fail("it took over a minute")


def test_killed_and_resumed_equals_uninterrupted(flags, tmp_path, monkeypatch, capsys):
    """SIGTERM in the first stage, kill -9 in the second, --resume each time: the same bits."""
    rhythm = ["--pretrain-steps", "12", "--gan-steps", "24", "--val-every", "24", "--save-every", "4"]
    train.run([*flags, *rhythm, "--output", str(tmp_path / "whole")])

    parts, step = tmp_path / "parts", train.Stage.train_step
    state_file = parts / train.STATE

    def reached(stage, step):
        if not state_file.exists():
            return False
        state = load_plain(state_file)
        return state["stage"] == stage and state["progress"]["step"] >= step

    def step_and_signal(stage):
        step(stage)
        if stage.step == 9:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train.Stage, "train_step", step_and_signal)
        train.run([*flags, *rhythm, "--output", str(parts)])
    assert stopped.value.code == 128 + signal.SIGTERM and "--resume" in capsys.readouterr().out
    interrupted = load_plain(state_file)
    assert interrupted["stage"] == "srresnet" and interrupted["progress"]["step"] == 9

    process = start("--resume", "--output", str(parts))
    wait_for(process, lambda: reached("srgan", 8))
    process.kill()
    process.communicate()
    assert load_plain(state_file)["progress"]["step"] < 24

    train.run(["--resume", "--output", str(parts)])
    assert_equal(load_plain(tmp_path / "whole" / train.STATE), load_plain(state_file))
    for name in ("srresnet_x4.pth", "srgan_x4.pth"):
        whole, resumed = (
            torch.load(folder / name, weights_only=True) for folder in (tmp_path / "whole", parts)
        )
        assert_equal(whole["weights"], resumed["weights"])
        assert whole["training"]["step"] == resumed["training"]["step"]
    assert log_lines(tmp_path / "whole") == log_lines(parts)


def test_training_learns(tmp_path, monkeypatch):
    """A few seconds of SRResNet must beat bicubic on faces it has not seen; the log says so."""
    monkeypatch.setattr(train, "plot_curves", lambda *arguments: None)
    train.draw_faces(tmp_path, 60)
    train.run(
        [
            "--train-dir",
            str(tmp_path),
            "--output",
            str(tmp_path / "out"),
            "--blocks",
            "2",
            "--channels",
            "16",
            "--patch-size",
            "32",
            "--batch-size",
            "8",
            "--degradation",
            "bicubic",
            "--pretrain-steps",
            "300",
            "--gan-steps",
            "0",
            "--val-every",
            "150",
            "--vgg-weights",
            "none",
            "--device",
            "cpu",
            "--lr",
            "2e-3",
        ]
    )
    lines = log_lines(tmp_path / "out")
    assert [line["step"] for line in lines] == [150, 300]
    assert lines[-1]["psnr"] > lines[-1]["psnr_bicubic"] + 0.2
    assert lines[1]["train"]["pixel"] < lines[0]["train"]["pixel"]
    assert load_checkpoint(tmp_path / "out" / "srresnet_x4.pth")[1]["metrics"]["psnr"] == lines[-1]["psnr"]
    assert not (tmp_path / "out" / "srgan_x4.pth").exists()


def test_dry_run_proves_the_line_and_leaves_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    train.run(["--dry-run", "--device", "cpu"])
    output = capsys.readouterr().out
    assert "srresnet step 4" in output and "srgan step 4" in output and "2 to validate on, few to choose weights" in output
    assert not list(tmp_path.iterdir())
    train.run(["--dry-run", "--device", "cpu", "--scale", "8", "--output", str(tmp_path / "out")])
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"srresnet_x8.pth", "srgan_x8.pth", train.STATE, "log.jsonl", "curves.png", "samples"}
    assert load_checkpoint(tmp_path / "out" / "srgan_x8.pth")[0].scale == 8
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 4


def test_a_training_that_cannot_begin_sets_nothing_aside(flags, tmp_path):
    """A mistyped file must not cost the state of the training before."""
    train.run([*flags, "--pretrain-steps", "1", "--gan-steps", "0"])
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(SystemExit, match="missing.pth"):
        train.run([*flags, "--init", str(tmp_path / "missing.pth")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before and train.STATE in before


def test_srgan_starts_from_srresnet_and_leaves_it_alone(flags, tmp_path):
    out = tmp_path / "out"
    train.run([*flags, "--pretrain-steps", "3", "--gan-steps", "0"])
    before = (out / "srresnet_x4.pth").read_bytes()
    train.run([*flags, "--pretrain-steps", "0", "--gan-steps", "1", "--gan-lr", "1e-9"])
    assert (out / "srresnet_x4.pth").read_bytes() == before
    srresnet, srgan = (load_checkpoint(out / f"{name}_x4.pth")[0] for name in ("srresnet", "srgan"))
    for a, b in zip(srresnet.parameters(), srgan.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    # --init gives the start instead, to either stage.
    init, elsewhere = ["--init", str(out / "srresnet_x4.pth")], tmp_path / "elsewhere"
    for stage, steps in (("srresnet", ("1", "0")), ("srgan", ("0", "1"))):
        if stage == "srgan":        # whatever else lies there
            save_checkpoint(elsewhere / "srresnet_x4.pth", Generator(**srresnet.architecture), {})
        train.run([*flags, *init, "--output", str(elsewhere), "--pretrain-steps", steps[0],
                   "--gan-steps", steps[1], "--lr", "1e-9", "--gan-lr", "1e-9"])
        tuned = load_checkpoint(elsewhere / f"{stage}_x4.pth")[0]
        (elsewhere / f"{stage}_x4.pth").rename(tmp_path / f"{stage}.pth")
        for a, b in zip(srresnet.parameters(), tuned.parameters()):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    facts = load_checkpoint(out / "srgan_x4.pth")[1]
    assert facts["pretraining"]["stage"] == "srresnet" and facts["faces"] == 10
    faces = train.load_split((flags[flags.index("--train-dir") + 1],), None, 2, False)[0]
    assert facts["faces_checksum"] == checksum({"faces": faces}) != checksum({"faces": 255 - faces})
    assert facts["pretraining"]["checksum"] == checksum(load_checkpoint(out / "srresnet_x4.pth")[0].state_dict())
    assert str(tmp_path) not in str(facts)  # where somebody's data lie is nobody's business


def test_a_second_training_keeps_the_first_ones_files(flags, tmp_path):
    out = tmp_path / "out"
    for _ in range(3):
        train.run([*flags, "--pretrain-steps", "1", "--gan-steps", "0"])
    kept = {path.name for path in out.glob("*.pth")}
    assert kept == {
        f"{stem}{number}.pth" for stem in ("srresnet_x4", "training_state") for number in ("", ".1", ".2")
    }


def test_ema_moves_towards_the_generator_with_its_buffers():
    torch.manual_seed(0)
    generator, ema = Generator(blocks=1, channels=8), Generator(blocks=1, channels=8)
    for tensor in generator.state_dict().values():
        tensor.copy_(torch.full_like(tensor, 3))
    for tensor in ema.state_dict().values():
        tensor.copy_(torch.full_like(tensor, 1))
    average = train.MovingAverage(ema, generator, decay=0.75)
    average.update(step=10**6)
    for name, tensor in ema.state_dict().items():
        expected = 1.5 if tensor.is_floating_point() else 3
        assert torch.all(tensor == expected), name
    average.update(step=0)  # at first it follows quickly
    assert all(torch.all(tensor > 2.8) for tensor in ema.state_dict().values())


def test_a_generator_without_batch_norm_trains(flags, tmp_path, monkeypatch):
    """A change that many make; nothing is left then that counts batches."""
    monkeypatch.setattr(torch.nn, "BatchNorm2d", type("NoNorm", (torch.nn.Identity,), {}))
    train.run([*flags, "--pretrain-steps", "2", "--gan-steps", "2"])
    generator = load_checkpoint(tmp_path / "out" / "srgan_x4.pth")[0]
    assert not [name for name in generator.state_dict() if "running" in name]
    lr = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(generator.for_inference()(lr), generator(lr))


def test_what_is_validated_and_shipped_is_the_average(stage, tmp_path):
    srresnet = stage("srresnet", "--pretrain-steps", "50")
    for _ in range(5):
        srresnet.train_step()
    srresnet.validate()
    weights = load_checkpoint(srresnet.checkpoint)[0].state_dict()
    assert_equal(dict(weights), dict(srresnet.ema.state_dict()))
    assert any(
        not torch.equal(value, srresnet.generator.state_dict()[name]) for name, value in weights.items()
    )


def test_both_networks_learn_in_a_gan_step(stage):
    srgan = stage("srgan")
    before = {
        name: {key: value.clone() for key, value in getattr(srgan, name).state_dict().items()}
        for name in ("generator", "discriminator")
    }
    srgan.train_step()
    for name, old in before.items():
        network = getattr(srgan, name)
        for key, parameter in network.named_parameters():
            assert not torch.equal(parameter, old[key]), (name, key)
            assert parameter.requires_grad
    assert set(srgan.losses()) == {"pixel", "vgg", "adversarial", "lattice", "discriminator", "d_real", "d_fake"}


def test_a_loss_and_a_kernel_are_added_in_one_place_each(stage, monkeypatch):
    """The flag, its default and the stages follow from the entry; shares are weighed against each other."""
    term = Term("mean absolute error", 0.5, True, lambda loss, sr, hr, d: (sr - hr).abs().mean())
    monkeypatch.setitem(train.GeneratorLoss.TERMS, "absolute", term)
    relative = Term("relativistic adversarial loss", 0.0, False, lambda loss, sr, hr, d: F.softplus(
        d(hr).mean() - d(sr)).mean())       # Jolicoeur-Martineau 2018, arXiv:1807.00734
    monkeypatch.setitem(train.GeneratorLoss.TERMS, "relative", relative)
    srgan = stage("srgan", "--relative-weight", "1", "--adversarial-weight", "0")
    srgan.criterion.weights = {"relative": 1}
    srgan.train_step()
    assert set(srgan.losses()) == {"relative", "discriminator", "d_real", "d_fake"}
    assert all(parameter.grad.abs().max() > 0 for parameter in srgan.generator.parameters())
    faces = np.random.default_rng(1).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    wild = [data_loader.simulate(face, 4, damage="wild")[0] for face in faces]
    monkeypatch.setitem(data_loader.KERNELS, "hamming", (Image.Resampling.HAMMING, 0.2))
    data_loader._degradation_tables.cache_clear()
    for name in ("srresnet", "srgan"):
        assert stage(name).criterion.weights["absolute"] == 0.5
        assert stage(name, "--absolute-weight", "2", "--pixel-weight", "0").criterion.weights["absolute"] == 2
    none = [text for name, term in train.GeneratorLoss.TERMS.items() if term.both for text in (f"--{name}-weight", "0")]
    assert stage("srresnet", *none).criterion.weights == {"pixel": 1}  # never none
    style = Term("style", 1.0, True, lambda loss, sr, hr, d: loss.features(sr).mean(), features=True)
    monkeypatch.setitem(train.GeneratorLoss.TERMS, "style", style)
    train.run(["--dry-run", "--device", "cpu"])     # without VGG, whatever needs it is left out
    lr = data_loader.degrade(torch.rand(8, 3, 32, 32), 4, np.random.default_rng(0))
    assert np.array_equal(wild, [data_loader.simulate(face, 4, damage="wild")[0] for face in faces])     # as scores do
    data_loader._degradation_tables.cache_clear()
    assert lr.shape == (8, 3, 8, 8)


def test_a_loss_may_have_a_network_of_its_own(stage, monkeypatch):
    """Made beside VGG: it is frozen and in eval mode with the rest, and its values are summed in float32."""
    class WithNetwork(train.GeneratorLoss):
        TERMS = train.GeneratorLoss.TERMS | {"own": Term("own", 1.0, True, lambda loss, sr, hr, d: (
            loss.network(sr) - loss.network(hr)).abs().mean().bfloat16())}

        def __init__(self, *args, **weights):
            super().__init__(*args, **weights)
            self.network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout())

    monkeypatch.setattr(train, "GeneratorLoss", WithNetwork)
    srresnet = stage("srresnet")
    before = {name: value.clone() for name, value in srresnet.criterion.state_dict().items()}
    for _ in range(2):
        srresnet.train_step()
    assert srresnet.sums["own"].dtype == torch.float32 and srresnet.sums["own"] > 0
    network = srresnet.criterion.network
    assert not any(parameter.requires_grad for parameter in network.parameters()) and not network.training
    assert all(torch.equal(value, before[name]) for name, value in srresnet.criterion.state_dict().items())


def test_eight_times_starts_from_the_weights_of_four(stage, tmp_path):
    """A further doubling is a copy of the last; a larger scale is no start for a smaller one."""
    torch.manual_seed(5)
    save_checkpoint(tmp_path / "four.pth", four := Generator(4, 1, 8), {})
    save_checkpoint(tmp_path / "eight.pth", Generator(8, 1, 8), {})
    eight = stage("srresnet", "--scale", "8", "--patch-size", "24", "--init", str(tmp_path / "four.pth")).generator
    old, new = four.state_dict(), eight.state_dict()
    assert all(torch.equal(new[name], value) for name, value in old.items())
    assert {name for name in new if name not in old} == {f"upsample.{name}" for name in ("6.weight", "6.bias", "8.weight")}
    assert all(torch.equal(eight.upsample[6].weight, part.weight) for part in (four.upsample[3], eight.upsample[3]))
    assert not torch.equal(eight.upsample[6].weight, eight.upsample[0].weight)
    for flags in (["--init", str(tmp_path / "eight.pth")], ["--init", str(tmp_path / "four.pth"), "--blocks", "2"]):
        with pytest.raises(train.TrainingError, match="architecture"):
            stage("srresnet", *flags)


def test_the_losses_look_at_shifted_windows(stage, monkeypatch):
    """All offsets come up, for SR and HR alike: else the GAN stage trains a grid in."""
    ramp = torch.arange(24.0 * 24).view(1, 1, 24, 24)
    for period in (4, 8):
        side, windows = 24 - period, [train.shifted(step, period, ramp, ramp + 1) for step in range(period ** 2)]
        assert sorted(int(sr[0, 0, 0, 0]) for sr, _ in windows) == [24 * y + x for y in range(period)
                                                                    for x in range(period)]
        assert all(sr.shape == (1, 1, side, side) and torch.equal(hr, sr + 1) for sr, hr in windows)
        assert all(torch.equal(sr, ramp[..., y:y + side, x:x + side]) for sr, _ in windows
                   for y, x in [divmod(int(sr[0, 0, 0, 0]), 24)])
    srgan, seen, criterion = stage("srgan"), [], train.GeneratorLoss.forward
    monkeypatch.setattr(train.GeneratorLoss, "forward",
                        lambda self, sr, hr, d: (seen.extend((sr, hr)), criterion(self, sr, hr, d))[1])
    srgan.train_step()
    assert [tuple(picture.shape[2:]) for picture in seen] == [(16, 16)] * 2


def test_each_network_has_its_learning_rate(stage):
    for name, more, expected in (("srresnet", ["--lr", "5e-3"], [5e-3]), ("srgan", ["--gan-lr", "2e-3"], [2e-3, 2e-3]),
                                 ("srgan", ["--gan-lr", "2e-3", "--discriminator-lr", "6e-3"], [2e-3, 6e-3]),
                                 ("srgan", ["--discriminator-steps", "2", "--gan-lr", "2e-3"], [0, 2e-3]),
                                 ("srgan", ["--discriminator-steps", "1", "--gan-lr", "2e-3"], [2e-3, 2e-3])):
        run = stage(name, *more)
        run.train_step()
        run.train_step()
        used = [optimizer.param_groups[0]["lr"] for optimizer in (run.g_optimizer, run.d_optimizer)]
        factor = train.learning_rate(1, run.steps)
        assert used[:len(expected)] == [pytest.approx(lr * factor) for lr in expected], name


def test_learning_rate_is_constant_until_one_decay():
    """So a training can be given more steps, as long as it has not begun to fall."""
    factors = [train.learning_rate(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(0.02) and set(factors[49:600]) == {1}
    assert all(a > b for a, b in zip(factors[601:], factors[602:])) and 0.01 <= factors[-1] < 0.0101
    assert [train.learning_rate(step, 2000) for step in range(600)] == factors[:600]


def test_discriminator_learns_to_tell_real_from_generated(stage):
    """D(real) and D(fake) must part, the generator waiting: in the closest peer both are 1.0 from epoch 2 on."""
    srgan = stage(
        "srgan", "--gan-steps", "100000", "--gan-lr", "1e-9", "--discriminator-lr", "1e-3", "--vgg-weight", "0",
        "--patch-size", "32", "--batch-size", "8", "--degradation", "bicubic",
    )
    for _ in range(80):
        srgan.train_step()
    srgan.sums, srgan.count = {}, 0
    for _ in range(20):
        srgan.train_step()
    losses = srgan.losses()
    assert losses["d_real"] > losses["d_fake"] + 0.1
    assert losses["discriminator"] < 1.25


@pytest.mark.parametrize("name, measures, kept", [
    ("srresnet", "vgg lpips", 2), ("srgan", "vgg", 3), ("srgan", "vgg lpips", 1), ("srgan", "", 4)])
def test_the_best_is_kept_by_psnr_lpips_or_vgg_distance(stage, monkeypatch, name, measures, kept):
    """SRResNet by PSNR; SRGAN by LPIPS, without by the VGG distance, without both the last."""
    run = stage(name)
    table = zip((25, 27, 26, 24), (0.4, 0.3, 0.1, 0.2), (0.1, 0.2, 0.3, 0.4))
    scores = iter([dict(psnr=psnr, psnr_bicubic=24) | {measure: value for measure, value in (("vgg", vgg), ("lpips", lpips))
                                                       if measure in measures} for psnr, vgg, lpips in table])
    real_sheet = train.validate(run.ema.for_inference(), run.val_faces, run.device)[1]
    monkeypatch.setattr(train, "validate", lambda *args: (next(scores), real_sheet))
    for _ in range(4):
        run.train_step()
        run.validate()
    assert load_checkpoint(run.checkpoint)[1]["step"] == kept


def test_lpips_is_validated_where_it_is_asked_for(flags, tmp_path, monkeypatch):
    """Of the result and of bicubic, each against the true face; it cannot begin later, since it chooses the weights."""
    monkeypatch.setattr(train, "load_lpips", lambda device: psnr)
    train.run([*flags, "--pretrain-steps", "1", "--gan-steps", "1", "--lpips"])
    lines = log_lines(tmp_path / "out")
    assert [line["stage"] for line in lines] == ["srresnet", "srgan"]
    for line, end in itertools.product(lines, ("", "_bicubic")):
        assert line[f"lpips{end}"] == line[f"psnr{end}"]
    train.run([*flags, "--pretrain-steps", "0", "--gan-steps", "1"])
    assert "lpips" not in log_lines(tmp_path / "out")[-1]
    with pytest.raises(SystemExit, match="--lpips is False in the training to resume"):
        train.run(["--output", flags[-1], "--resume", "--lpips"])


def test_a_saturated_discriminator_is_reported(stage, capsys):
    srgan = stage("srgan")
    srgan.train_step()
    srgan.validate()
    assert "warning" not in capsys.readouterr().out
    srgan.train_step()
    srgan.sums |= {"d_real": torch.tensor(0.999), "d_fake": torch.tensor(0.001)}
    srgan.validate()
    assert "warning: the discriminator is saturated" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(train.BOUNDS, "lr", (0, 1e30))
    with pytest.raises(SystemExit) as stop:
        train.run([*flags, "--pretrain-steps", "200", "--lr", "1e30", "--save-every", "1"])
    assert "loss is not finite at step" in str(stop.value) and "\n" not in str(stop.value)
    state = load_plain(tmp_path / "out" / train.STATE)
    assert all(tensor.isfinite().all() for tensor in state["parts"]["generator"].values())


def test_full_disk_keeps_the_last_state(flags, tmp_path, monkeypatch):
    real_save, calls = torch.save, []

    def save(content, file):
        calls.append(1)
        if len(calls) > 2:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(content, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit) as stop:
        train.run([*flags, "--pretrain-steps", "30", "--gan-steps", "0", "--save-every", "5"])
    assert "No space left" in str(stop.value)
    assert load_plain(tmp_path / "out" / train.STATE)["progress"]["step"] == 5
    assert not list((tmp_path / "out").glob("*.tmp")) and not list((tmp_path / "out").glob(".*.tmp"))


def test_a_full_disk_is_one_sentence_that_names_the_file(flags):
    """What torch.save makes of a file that cannot be written is a RuntimeError without the reason."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(SystemExit, match=f"^train.py: .*File too large.*{train.STATE}"):
            train.run([*flags, "--pretrain-steps", "2", "--gan-steps", "0"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_curves_of_a_training_that_got_another_loss_on_the_way(tmp_path):
    """As --resume with the weight of a loss that was 0 before."""
    line = dict(stage="srresnet", step=2, psnr=20, psnr_bicubic=19, train={"pixel": 0.1})
    lines = [line, line | dict(step=4, vgg=0.2, train={"pixel": 0.1, "absolute": 0.3})]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train.plot_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_states_that_do_not_fit_are_one_sentence(flags, tmp_path):
    """Foreign and damaged ones, and a damaged log."""
    out = tmp_path / "out"
    train.run([*flags, "--pretrain-steps", "4", "--gan-steps", "0", "--val-every", "2"])
    good, log = load_plain(out / train.STATE), (out / "log.jsonl").read_text()

    def damaged(path, value):
        """A copy of the good state with another value at a path of keys."""
        state = torch.load(out / "good.pth", weights_only=True)
        *keys, last = path.split("/")
        functools.reduce(dict.get, keys, state)[last] = value
        return state

    torch.save(good, out / "good.pth")
    states = [[1, 2], {}, {"stage": "srresnet"}, torch.zeros(3), *(damaged(*change) for change in (
        ("stage", "other"), ("stage", ["srresnet"]), ("args", 7), ("args/scale", 3), ("args/lr", "fast"),
        ("args/blocks", [1]), ("args/train_dir", 5), ("args/unknown", 1), ("parts", []),
        ("parts/generator", {}), ("parts/ema", 3), ("parts/g_optimizer", {"state": {}, "param_groups": []}),
        ("progress", {}), ("progress/step", "many"), ("progress/step", -5), ("progress/sums", {"pixel": "x"}),
        ("log_size", -1)))]
    states.append(damaged("stage", "srresnet"))
    moments = states[-1]["parts"]["g_optimizer"]["state"]
    moments[0]["exp_avg"] = torch.zeros(5)
    for number, state in enumerate(states):
        torch.save(state, out / train.STATE)
        with pytest.raises(SystemExit) as stop:
            train.run(["--resume", "--output", str(out), "--pretrain-steps", "6"])
        assert str(stop.value).startswith(f"train.py: {out / train.STATE}: not the state"), (number, stop.value)
    torch.save(good | {"args": good["args"] | {"tv_weight": 0.0}}, out / train.STATE)     # gone, and did not count
    first, *others = log.splitlines()
    for line in ("{", "7", "{}", '{"stage": "srresnet", "train": 3}', first.replace('"psnr":', '"other":')):
        (out / "log.jsonl").write_text("\n".join([line, *others]) + "\n" * 400)
        with pytest.raises(SystemExit) as stop:
            train.run(["--resume", "--output", str(out), "--pretrain-steps", "6"])
        assert "log.jsonl: line 1 is damaged" in str(stop.value), line
    (out / "log.jsonl").write_text(log)
    train.run(["--resume", "--output", str(out), "--pretrain-steps", "6", "--val-every", "6"])
    assert log_lines(out)[-1]["step"] == 6


def test_a_resumed_training_keeps_its_losses(flags, tmp_path, monkeypatch):
    """One that the code has learned since does not join in, unless it is asked for; one that it lacks now is named."""
    call, out = [*flags, "--pretrain-steps", "2", "--gan-steps", "0"], tmp_path / "out"
    train.run(call)
    term = Term("mean absolute error", 0.5, True, lambda loss, sr, hr, d: (sr - hr).abs().mean())
    monkeypatch.setitem(train.GeneratorLoss.TERMS, "mean_absolute", term)
    for more, names in ((["4"], {"pixel"}), (["6", "--mean-absolute-weight", "1"], {"pixel", "mean_absolute"})):
        train.run(["--resume", "--output", str(out), "--pretrain-steps", *more])
        assert set(log_lines(out)[-1]["train"]) == names
    monkeypatch.delitem(train.GeneratorLoss.TERMS, "mean_absolute")
    with pytest.raises(SystemExit, match="trained with a loss that this code lacks, mean_absolute$"):
        train.run(["--resume", "--output", str(out)])


def test_one_training_a_folder(flags, tmp_path, monkeypatch):
    """The second is refused until the first has ended, however it did (of kill -9: see above)."""
    call, step = [*flags, "--pretrain-steps", "1", "--gan-steps", "0"], train.Stage.train_step

    def step_and_train_there_too(stage):
        monkeypatch.setattr(train.Stage, "train_step", step)
        with pytest.raises(SystemExit, match="another training is writing there"):
            train.run(call)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Stage, "train_step", step_and_train_there_too)
    with pytest.raises(SystemExit) as stopped:
        train.run(call)
    assert stopped.value.code == 130
    train.run(call)
    assert load_plain(tmp_path / "out" / train.STATE)["progress"]["step"] == 1


def test_a_signal_during_the_last_validation_ends_the_training(flags, tmp_path, monkeypatch):
    """It is not lost with the stage; --resume goes on with the next one."""
    validate = train.Stage.validate

    def interrupted(stage):
        signal.raise_signal(signal.SIGTERM)
        validate(stage)

    monkeypatch.setattr(train.Stage, "validate", interrupted)
    with pytest.raises(SystemExit) as stop:
        train.run([*flags, "--pretrain-steps", "2", "--gan-steps", "2"])
    assert stop.value.code == 128 + signal.SIGTERM
    state = load_plain(tmp_path / "out" / train.STATE)
    assert (state["stage"], state["progress"]["step"]) == ("srresnet", 2)
    monkeypatch.setattr(train.Stage, "validate", validate)
    train.run(["--resume", "--output", str(tmp_path / "out")])
    assert load_plain(tmp_path / "out" / train.STATE)["stage"] == "srgan"


def test_too_little_memory_is_one_sentence(flags, monkeypatch):
    for error in (MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate "
                                              "memory: you tried to allocate 4000000000000 bytes.")):
        monkeypatch.setattr(train.Stage, "train_step", lambda stage, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(SystemExit) as stop:
            train.run(flags)
        assert stop.value.code.startswith("train.py: the memory is full") and "--batch-size" in stop.value.code


def changes_of(stage):
    """Take three steps; return by how much they changed each parameter and each running statistic."""

    def state():
        return {
            f"{name}.{key}": value.detach().double()
            for name in ("generator", "discriminator", "ema")
            for key, value in getattr(stage, name).state_dict().items()
        }

    before = state()
    for _ in range(3):
        stage.train_step()
    return {key: value - before[key] for key, value in state().items()}


def test_a_step_too_large_for_float16_leaves_no_trace(stage):
    """Neither the weights nor the average, the batch-norm statistics or the losses remember it; the next one counts."""
    srgan = stage("srgan", "--precision", "float16")
    srgan.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    networks = srgan.generator, srgan.discriminator, srgan.ema
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
    srgan.train_step()
    assert srgan.scaler.get_scale() < 2.0**120 and srgan.step == 1 and srgan.count == 0
    for network, state in zip(networks, before):
        for name, value in network.state_dict().items():
            assert torch.equal(value, state[name]), name
    srgan.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    srgan.train_step()
    assert srgan.count == 1
    for network, state in zip(networks, before):
        assert all(not torch.equal(value, state[name]) for name, value in network.state_dict().items()
                   if "running" in name)


def test_a_float16_training_that_only_overflows_stops(stage):
    srresnet = stage("srresnet", "--precision", "float16")
    srresnet.scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    srresnet.generator.tail.weight.data.fill_(float("nan"))
    with pytest.raises(train.TrainingError, match="not finite"):
        srresnet.train_step()


def test_a_bfloat16_training_is_resumed_in_float16(flags, tmp_path):
    """Another GPU under --precision auto."""
    call = [*flags, "--pretrain-steps", "2", "--gan-steps", "0"]
    train.run([*call, "--precision", "bfloat16"])
    train.run(["--output", str(tmp_path / "out"), "--resume", "--pretrain-steps", "4", "--precision", "float16",
               "--val-every", "4"])
    assert load_plain(tmp_path / "out" / train.STATE)["parts"]["scaler"]["scale"] > 0
    assert log_lines(tmp_path / "out")[-1]["step"] == 4


def test_two_processes_train_what_one_trains(flags, tmp_path):
    """As torchrun starts them, with half of the batch each: gradients averaged, batch norm and its running statistics
    over both, the same degradations."""
    call = [*flags, "--precision", "float32", "--batch-size", "6", "--pretrain-steps", "2", "--gan-steps", "3"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free.getsockname()[1]}", "WORLD_SIZE": "2"}
    processes = [start(*call, "--output", str(tmp_path / "two"), RANK=rank, LOCAL_RANK=rank, **place) for rank in "01"]
    train.run(call)
    said, silent = (process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], said + silent
    assert said.count("srresnet step 2") == 1 and "2 processes" in said and "step" not in silent
    one, two = (load_plain(tmp_path / name / train.STATE) for name in ("out", "two"))
    assert [(line["stage"], line["step"]) for line in log_lines(tmp_path / "two")] == [("srresnet", 2), ("srgan", 3)]
    torch.manual_seed(0)
    begun = {"generator": Generator(blocks=1, channels=8), "discriminator": Discriminator(8)}
    for part, network in begun.items():
        for key, initial in network.state_dict().items():
            expected = one["parts"][part][key].double() - initial
            assert expected.norm() > 0, key
            # Adam divides each gradient by its own size, so rounding shows where one is nearly zero.
            error = two["parts"][part][key].double() - one["parts"][part][key]
            assert error.norm() < 0.01 * expected.norm(), key


def test_batch_norm_over_processes_of_what_hardly_varies(tmp_path):
    """E[x^2] - E[x]^2 may be rounded below zero."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = torch.nn.Sequential(torch.nn.BatchNorm2d(4))
        train.synchronise_batch_norm(network)
        for seed in range(5):
            noise = torch.randn(4, 4, 24, 24, generator=torch.Generator().manual_seed(seed))
            assert network(30 + 1e-3 * noise).isfinite().all() and network[0].running_var.isfinite().all()
    finally:
        torch.distributed.destroy_process_group()


def test_fixed_batch_norm_trains_all_but_the_statistics(stage, tmp_path):
    torch.manual_seed(0)
    trained = Generator(blocks=1, channels=8)
    for name, value in trained.named_buffers():
        value.copy_(torch.rand_like(value.float()) + 0.5)
    train.save_checkpoint(tmp_path / "init.pth", trained, {})
    tuning = stage("srgan", "--init", str(tmp_path / "init.pth"), "--fixed-batch-norm")
    for _ in range(2):
        tuning.train_step()
    for network in (tuning.generator, tuning.ema):
        after = network.state_dict()
        for name, value in trained.named_buffers():
            assert torch.equal(after[name], value), name
        for name, value in trained.named_parameters():
            assert not torch.equal(after[name], value), name
    # D's statistics are its own, and move.
    assert all(value.any() for name, value in tuning.discriminator.named_buffers() if "mean" in name)


def test_compiled_networks_train_the_same(stage, monkeypatch):
    """Three steps of every loss, traced as for the compiler (of which the test does without) and not, to rounding."""
    traced, compile_in_place = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: (
        traced.append(type(self)), compile_in_place(self, backend="aot_eager")))
    plain = changes_of(stage("srgan", "--precision", "float32"))
    assert not traced
    compiled = changes_of(stage("srgan", "--precision", "float32", "--compile"))
    assert set(traced) == {Generator, Discriminator, train.GeneratorLoss}
    for key, expected in plain.items():
        assert (compiled[key] - expected).norm() < 0.01 * expected.norm(), key


def test_without_a_compiler_one_sentence(monkeypatch):
    """And before anything is trained."""
    def no_compiler(graph, inputs):
        raise RuntimeError("no compiler")

    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_in_place(self, backend=no_compiler))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: pytest.fail("it was trained"))
    with pytest.raises(SystemExit, match=r"^train.py: the networks cannot be compiled \(.+\); leave out --compile$"):
        train.run(["--dry-run", "--compile", *TINY[:4], "--device", "cpu"])


def test_a_missing_folder_is_said_before_vgg_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "VGGFeatures", None)
    for name in ("--train-dir", "--gan-train-dir", "--val-dir"):
        with pytest.raises(SystemExit, match="absent: there is no such folder"):
            train.run(["--train-dir", str(tmp_path), name, str(tmp_path / "absent"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_users_mistakes_are_one_sentence(flags, tmp_path):
    (tmp_path / "empty").mkdir()
    train.run([*flags, "--pretrain-steps", "1", "--gan-steps", "0"])
    out = str(tmp_path / "out")
    calls = [
        [],
        ["--train-dir", str(tmp_path / "empty"), "--output", str(tmp_path / "e")],
        *([*flags, f"--{name.replace('_', '-')}", value] for name in train.BOUNDS for value in ("-1", "9" * 40)),
        *([*flags, f"--{name}-weight", value] for name in ("vgg", "lattice") for value in ("nan", "inf")),
        [*flags, "--patch-size", "18"],
        [*flags, "--patch-size", "256"],
        [*flags, "--batch-size", "0"],
        [*flags, "--lr", "-1"],
        [*flags, "--discriminator-lr", "0"],
        [*flags, "--pretrain-steps", "0", "--gan-steps", "0"],
        [*flags, "--device", "cuda:99"],
        [*flags, "--device", "mps"],
        [*flags, "--device", "meta"],
        [*flags, "--keep-every", "0"],
        [*flags, "--fixed-batch-norm"],
        [*flags, "--vgg-weights", str(tmp_path / "absent.pth")],
        [*flags, "--vgg-layer", "conv5_4"],
        ["--resume", "--output", str(tmp_path / "empty")],
        ["--resume", "--output", out, "--blocks", "3"],
        [*flags, "--pretrain-steps", "0", "--blocks", "2"],
    ]
    for call in calls:
        with pytest.raises(SystemExit) as stop:
            train.run(call)
        sentence = stop.value.code      # what sys.exit prints on stderr, with exit status 1
        assert isinstance(sentence, str) and sentence.startswith("train.py: "), call
        assert "\n" not in sentence, call


def test_a_full_gpu_is_one_sentence_that_names_the_batch_size(flags, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train.Stage, "train_step", full)
    with pytest.raises(SystemExit) as stop:
        train.run(flags)
    assert stop.value.code.startswith("train.py: the GPU's memory is full") and "--batch-size" in stop.value.code


def test_the_defaults_are_the_recipe_of_the_pair_that_can_be_repeated(tmp_path, monkeypatch):
    """As its files tell, with the flags that checkpoints/training.md prints; of the other stage, no flag matters."""
    text = (ROOT / "checkpoints" / "training.md").read_text()
    calls = re.search(r'COMMON="(.*?)"\n.*?train.py \$COMMON (.*?)\npython train.py \$COMMON (.*?)\n', text, re.S).groups()
    for part in ("train", "val"):
        (tmp_path / "ffhq" / part).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for stage, own in zip(train.STAGES, calls[1:]):
        printed = vars(train.parse_arguments([*calls[0].split(), *own.split()]))
        pair = load_checkpoint(ROOT / "checkpoints" / "600_faces" / f"{stage}_x4.pth")[1]
        different = {name for name in printed.keys() - set(train.PRIVATE) if pair["recipe"].get(name, False) != printed[name]}
        assert different == ({"gan_steps"} if stage == "srresnet" else set()) and pair["faces"] == 600


def test_a_new_training_keeps_what_an_earlier_one_wrote(flags, tmp_path):
    """Each checkpoint, the state, the log and the samples, under names beside its own."""
    call, out = [*flags, "--pretrain-steps", "2", "--gan-steps", "0"], tmp_path / "out"
    train.run(call)
    first = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    train.run([*call, "--seed", "5"])
    kept = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    missing = {str(path) for path, content in first.items() if content not in kept}
    assert len(first) >= 3 and missing <= {"curves.png"}       # which can be drawn again from the log
    assert (out / "samples.1").is_dir()


def test_steps_between_are_kept_too(flags, tmp_path):
    train.run([*flags, "--pretrain-steps", "5", "--gan-steps", "0", "--keep-every", "2"])
    steps = {path.name: load_checkpoint(path)[1]["step"] for path in (tmp_path / "out").glob("*_x4_*.pth")}
    assert steps == {"srresnet_x4_000002.pth": 2, "srresnet_x4_000004.pth": 4}
