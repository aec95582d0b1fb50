import errno
import functools
import os
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data_loader import simulate, to_tensor, to_uint8, write_atomically
from loss import sample_faces
from inference import CHECKPOINT
from model import (
    CONTENT,
    CheckpointError,
    UsageError,
    Discriminator,
    Generator,
    Networks,
    SubpixelConv2d,
    bicubic,
    interpolate,
    load_checkpoint,
    checksum,
    save_checkpoint,
    select_device,
    select_dtype,
    upscale,
)


def randomise_norms(network):
    """Give batch norms statistics and weights as training leaves them, not 0 and 1."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_(0.5, 0.3)
            module.running_var.uniform_(0.5, 2)


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (12, 7)])
def test_generator_enlarges_any_size(scale, size):
    generator = Generator(scale, blocks=1, channels=8).eval()
    sr = generator(torch.rand(2, 3, *size))
    assert sr.shape == (2, 3, size[0] * scale, size[1] * scale)
    assert sr.isfinite().all()


def test_generator_is_the_papers():
    # Counted by hand from figure 4 (convolutions before a batch norm without bias): head, 16
    # blocks, the 33rd convolution, two sub-pixel convolutions, tail.
    block = 2 * (64 * 64 * 9 + 2 * 64) + 1
    expected = (
        (3 * 64 * 81 + 64 + 1)
        + 16 * block
        + (64 * 64 * 9 + 128)
        + 2 * (64 * 256 * 9 + 256 + 1)
        + (64 * 3 * 81 + 3)
    )
    generator = Generator(bicubic_residual=False)
    assert sum(p.numel() for p in generator.parameters()) == expected
    assert len(generator.body) == 16 + 2 and not generator.bicubic_residual


def test_bicubic_residual_is_what_it_says():
    torch.manual_seed(0)
    plain, residual = (
        Generator(blocks=1, channels=8, bicubic_residual=flag).eval() for flag in (False, True)
    )
    plain.load_state_dict(residual.state_dict())
    lr = torch.rand(1, 3, 6, 5)
    torch.testing.assert_close(residual(lr), plain(lr) + bicubic(lr, 4))


def test_generator_does_not_clamp():
    lr = torch.zeros(1, 3, 8, 8)
    lr[..., 4:] = 1  # bicubic overshoots at a hard edge
    sr = Generator(blocks=1, channels=8).eval()(lr)
    assert sr.max() > 1 and sr.min() < 0


def test_subpixel_convolution_starts_as_nearest_neighbour():
    torch.manual_seed(0)
    conv, shuffle = Generator(blocks=1, channels=8).upsample[:2]
    cells = shuffle(conv(torch.randn(1, 8, 5, 5)))
    torch.testing.assert_close(cells, cells[..., ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert cells[..., ::2, ::2].std() > 0.01


def textbook(generator, lr):
    """The generator as figure 4 draws it, layer after layer."""
    features = generator.head(lr)
    *layers, activation = generator.upsample
    features = nn.Sequential(*layers)(features + generator.body(features))
    features = activation(F.pixel_shuffle(features, 2))
    tail = generator.tail
    return F.conv2d(features, tail.weight, tail.bias, padding=tail.padding) + bicubic(lr, generator.scale)


@pytest.mark.parametrize("scale", [2, 4])
def test_the_tail_on_the_small_grid_is_the_tail(scale):
    torch.manual_seed(0)
    generator = Generator(scale, blocks=1, channels=8)
    lr = torch.rand(2, 3, 5, 6)
    torch.testing.assert_close(generator(lr), textbook(generator, lr), atol=1e-5, rtol=1e-5)
    weights = list(generator.parameters())
    ours, expected = (
        torch.autograd.grad(sr.square().sum(), weights) for sr in (generator(lr), textbook(generator, lr))
    )
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("upsample, tail", [
    (lambda: nn.Upsample(scale_factor=4), lambda: nn.Conv2d(8, 3, 9, padding=4)),
    (lambda: nn.Sequential(nn.Conv2d(8, 128, 3, padding=1), nn.PixelShuffle(4), nn.PReLU(8)),
     lambda: nn.Sequential(nn.Conv2d(8, 3, 5, padding=2), nn.Tanh())),
    (lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 32, 3, padding=1), nn.LeakyReLU(0.2)),
     lambda: SubpixelConv2d(8, 3, 3, padding=1)),
    (lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 32, 3, padding=1), nn.LeakyReLU(0.2)),
     lambda: SubpixelConv2d(8, 3, 5, padding=2, bias=False)),
    *((lambda: nn.Upsample(scale_factor=2), lambda options=options: SubpixelConv2d(2, 3, 5, **options)) for options in (
        dict(padding=2, padding_mode="reflect"), dict(padding=4, dilation=2), dict(padding="same")))])
def test_another_way_of_upsampling_needs_no_other_change(upsample, tail):
    torch.manual_seed(0)
    generator, lr = Generator(blocks=1, channels=8).eval(), torch.rand(2, 3, 5, 6)
    generator.upsample, generator.tail = upsample(), tail()
    features = generator.head(lr)
    features = generator.upsample(features + generator.body(features))
    if isinstance(generator.tail, SubpixelConv2d):
        sr = nn.Conv2d.forward(generator.tail, F.pixel_shuffle(features, 2))
    else:
        sr = generator.tail(features)
    for net in (generator, generator.for_inference()):
        torch.testing.assert_close(net(lr), sr + bicubic(lr, 4), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype, most, rare", [(torch.float32, 1, 1e-3), (torch.bfloat16, 3, 4e-3)])
def test_shipped_weights_give_the_textbooks_picture(dtype, most, rare):
    """In float32 within one grey level everywhere; in bfloat16 at up to four values in a thousand up to three."""
    pictures = [simulate(face, 4)[0] for face in sample_faces().values()]
    generator = load_checkpoint(CHECKPOINT)[0]
    expected = to_uint8(textbook(generator, to_tensor(pictures))).astype(int)
    levels = np.abs(upscale(generator.for_inference(dtype), pictures) - expected)
    assert levels.max() <= most
    assert (levels > (0 if dtype == torch.float32 else 1)).mean() < rare


def test_a_changed_layer_is_named_and_runs_in_inference(monkeypatch):
    """Slopes per channel, blocks that begin with the activation or the norm, a smaller tail; the shipped weights, which
    do not fit then, say where."""
    plain = Generator.__init__

    @functools.wraps(plain)
    def changed(self, *arguments, **options):
        plain(self, *arguments, **options)
        self.head[1] = nn.PReLU(self.head[0].out_channels)
        nn.init.uniform_(self.head[1].weight, -1, 1)
        for block, order in zip(self.body, ((1, 2, 0, 3, 4), (2, 1, 0, 3, 4))):
            for place, layer in enumerate([block[i] for i in order]):
                block[place] = layer
        self.tail = SubpixelConv2d(self.head[0].out_channels, 3, 3, padding=1)
        randomise_norms(self)

    monkeypatch.setattr(Generator, "__init__", changed)
    generator, lr = Generator(blocks=2, channels=8).eval(), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert (generator.for_inference()(lr) - generator(lr)).abs().max() < 1e-5
    with pytest.raises(CheckpointError, match="does not fit .*'body.0.0.bias'"):
        load_checkpoint(CHECKPOINT)


def test_for_inference_changes_nothing_but_speed():
    torch.manual_seed(0)
    generator = Generator(blocks=2, channels=8)
    randomise_norms(generator)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    lr = torch.rand(2, 3, 9, 11)
    fast = generator.for_inference()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    torch.testing.assert_close(fast(lr), textbook(generator.eval(), lr), atol=1e-5, rtol=1e-5)
    for name, value in generator.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_interpolation_goes_from_one_network_to_the_other():
    torch.manual_seed(0)
    faithful, vivid = Generator(blocks=1, channels=8), Generator(blocks=1, channels=8)
    for generator in (faithful, vivid):
        randomise_norms(generator)
    lr = torch.rand(1, 3, 6, 5)
    ends = [generator.eval()(lr) for generator in (faithful, vivid)]
    for strength, end in zip((0, 1), ends):
        torch.testing.assert_close(interpolate(faithful, vivid, strength).eval()(lr), end)
    quarter = interpolate(faithful, vivid, 0.25).state_dict()
    for name, a in faithful.state_dict().items():
        if a.is_floating_point():
            torch.testing.assert_close(quarter[name], 0.75 * a + 0.25 * vivid.state_dict()[name])
    with pytest.raises(CheckpointError):
        interpolate(faithful, Generator(blocks=2, channels=8), 0.5)


@pytest.mark.parametrize("patch", [16, 24, 64, 96, 128])
def test_discriminator_takes_any_patch_and_returns_logits(patch):
    torch.manual_seed(0)
    discriminator = Discriminator()
    assert sum(p.numel() for p in discriminator.parameters()) < 15e6
    logits = discriminator(torch.rand(2, 3, patch, patch))
    assert logits.shape == (2,)
    discriminator.classifier[-1].bias.data.fill_(7)  # a sigmoid at the end would hide this
    assert (discriminator(torch.rand(2, 3, patch, patch)) > 2).all()


def test_checkpoint_keeps_weights_architecture_and_facts(tmp_path):
    generator = Generator(scale=2, blocks=1, channels=8, bicubic_residual=False)
    randomise_norms(generator)
    facts = {"step": 7, "metrics": {"psnr": 27.5}, "data": ["ffhq"]}
    save_checkpoint(tmp_path / "a.pth", generator, facts)
    loaded, read = load_checkpoint(tmp_path / "a.pth")
    assert read == facts and loaded.architecture == generator.architecture and not loaded.training
    lr = torch.rand(1, 3, 5, 5)
    assert torch.equal(loaded(lr), generator.eval()(lr))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_an_option_added_to_the_generator_is_kept_and_old_files_stay_readable(tmp_path, tiny_checkpoint, monkeypatch):
    """With blocks that share their weights, and a buffer that no file holds, too."""
    class Scaled(Generator):
        def __init__(self, scale=4, blocks=16, channels=64, bicubic_residual=True, res_scale=1.0, gate=None):
            super().__init__(scale, blocks, channels, bicubic_residual)
            self.architecture |= dict(res_scale=res_scale, gate=gate)
            self.body[blocks - 1] = self.body[0]
            self.register_buffer("three", torch.full((1,), 3.0), persistent=False)

        def forward(self, lr):
            return super().forward(lr) * self.three

    monkeypatch.setattr("model.Generator", Scaled)
    new = Scaled(blocks=2, channels=8, res_scale=0.5, gate=0.2).eval()
    save_checkpoint(tmp_path / "new.pth", new, {})
    loaded, lr = load_checkpoint(tmp_path / "new.pth")[0], torch.rand(1, 3, 5, 5)
    assert loaded.architecture == new.architecture and loaded.body[0] is loaded.body[1]
    assert torch.equal(loaded(lr), new(lr))
    assert load_checkpoint(tiny_checkpoint)[0].architecture["res_scale"] == 1.0


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_bad_checkpoints_are_refused_in_one_sentence(tmp_path, tiny_checkpoint, monkeypatch):
    good = torch.load(tiny_checkpoint, weights_only=True)
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "cut.pth").write_bytes(tiny_checkpoint.read_bytes()[:-5000])
    (tmp_path / "empty.pth").touch()
    torch.save(Malicious(str(tmp_path / "owned")), tmp_path / "malicious.pth")
    torch.save(Generator(blocks=1, channels=8).state_dict(), tmp_path / "bare.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, change in {
        "huge": {"blocks": 10**9},
        "odd": {"scale": 3},
        "word": {"channels": "many"},
        "other": {"channels": 16},
        "extra": {"code": 1},
        "nested": {"bicubic_residual": [[1]]},
        "wide": {"blocks": 256, "channels": 1024},
    }.items():
        torch.save(good | {"architecture": good["architecture"] | change}, tmp_path / f"{name}.pth")
    torch.save(good | {"weights": dict(list(good["weights"].items())[1:])}, tmp_path / "partial.pth")
    wide = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in good["weights"].items()}
    torch.save(good | {"weights": wide}, tmp_path / "expanded.pth")
    one = torch.zeros(10**6)
    shared = {name: one[:tensor.numel()].view(tensor.shape) for name, tensor in good["weights"].items()}
    torch.save(good | {"weights": shared}, tmp_path / "shared.pth")
    for name, change in {"nan": float("nan"), "infinite": float("inf"), "flipped": 1.0}.items():
        weights = {key: tensor.clone() for key, tensor in good["weights"].items()}
        weights["tail.weight"][0, 0, 0, 0] = change
        torch.save(good | {"weights": weights} | ({} if name == "flipped" else {"checksum": checksum(weights)}),
                   tmp_path / f"{name}.pth")
    weights = {key: tensor.clone() for key, tensor in good["weights"].items()}
    weights["body.0.1.running_var"][0] = -1
    torch.save(good | {"weights": weights, "checksum": checksum(weights)}, tmp_path / "variance.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb, bomb.open(
            "archive/data.pkl", "w", force_zip64=True) as part:
        part.write(bytes(2 * 10**7))
    assert CONTENT == 2 * 10**9  # 2 GB take long to write
    monkeypatch.setattr("model.CONTENT", 10**7)
    paths = [*tmp_path.glob("*.pth"), tmp_path / "missing.pth", tmp_path]
    assert len(paths) == 24
    for path in paths:
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()


def test_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pth"
    path.write_text("old")

    def fill(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError):
        write_atomically(path, fill)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["state.pth"]


def test_devices_have_the_index_that_tensors_report(monkeypatch):
    """Without it "cuda" and "cuda:0" are two devices, and nothing on CUDA works."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert select_device("auto") == select_device("cuda") == torch.device("cuda:0") == chosen[0]
    assert select_device("cuda:1") == torch.device("cuda:1") == chosen[-1]
    assert not torch.backends.cudnn.allow_tf32
    monkeypatch.setenv("LOCAL_RANK", "1")       # torchrun's second process
    assert select_device("auto") == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    for name in ("auto", "cuda:2", "mps", "meta", "xpu", "nonsense"):
        with pytest.raises(UsageError, match="CUDA device|expected"):
            select_device(name)


def test_precision_follows_the_hardware(monkeypatch):
    """By compute capability of the device that is used, not of the current one."""
    gpus = {0: ((9, 0), "H200"), 1: ((7, 0), "V100"), 2: ((7, 5), "NVIDIA GeForce GTX 1660"), 3: ((6, 1), "GTX 1080")}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpus[device.index][0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpus[device.index][1])
    chosen = [select_dtype("auto", torch.device("cuda", i)) for i in gpus]
    assert chosen == [torch.bfloat16, torch.float16, torch.float32, torch.float32]
    assert select_dtype("float16", torch.device("cuda", 3)) == torch.float16
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert select_dtype("auto", torch.device("cuda", 3)) == torch.bfloat16


def test_siblings_are_the_same_network_at_other_scales(tmp_path):
    names = {"srgan_x4.pth": 4, "srgan_x8.pth": 8, "srresnet_x4.pth": 4, "mine.pth": 8}
    for name, scale in names.items():
        save_checkpoint(tmp_path / name, Generator(scale, blocks=1, channels=8), {})
    four, eight = tmp_path / "srgan_x4.pth", tmp_path / "srgan_x8.pth"
    assert Networks(four).files == Networks(eight).files == {4: four, 8: eight} and Networks(eight).scale == 8
    assert Networks(tmp_path / "srresnet_x4.pth").files == {4: tmp_path / "srresnet_x4.pth"}
    assert Networks(tmp_path / "mine.pth").files == {8: tmp_path / "mine.pth"}


def test_a_generator_is_loaded_as_the_flags_say(tmp_path):
    """Strength between the pair, precision; without a pair only strength 1."""
    for seed, name in enumerate(("srresnet_x4.pth", "srgan_x4.pth")):
        torch.manual_seed(seed)
        save_checkpoint(tmp_path / name, Generator(blocks=1, channels=8), {})
    faithful, vivid = (load_checkpoint(tmp_path / name)[0] for name in ("srresnet_x4.pth", "srgan_x4.pth"))
    lr = torch.rand(1, 3, 9, 7)
    for strength in (0, 0.3, 1):
        expected = interpolate(faithful, vivid, strength).for_inference()
        torch.testing.assert_close(Networks(tmp_path / "srgan_x4.pth")(strength)(lr), expected(lr))
    low = Networks(tmp_path / "srgan_x4.pth", precision="bfloat16")()
    assert next(low.parameters()).dtype == torch.bfloat16
    (tmp_path / "srresnet_x4.pth").unlink()
    alone = Networks(tmp_path / "srgan_x4.pth")
    torch.testing.assert_close(alone()(lr), vivid.for_inference()(lr))
    with pytest.raises(CheckpointError, match="srresnet_x4.pth"):
        alone(0.5)
