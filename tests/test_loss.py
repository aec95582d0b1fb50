from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional as F

from loss import (
    GeneratorLoss,
    UsageError,
    VGGFeatures,
    adversarial_loss,
    compare,
    discriminator_loss,
    lattice_loss,
    luma,
    plot_comparison,
    psnr,
    score,
    vgg_distance,
)
from model import Discriminator, Generator


@pytest.mark.parametrize("term", list(GeneratorLoss.TERMS))
def test_every_term_moves_every_part_of_the_generator(term, vgg_file):
    torch.manual_seed(0)
    generator, discriminator = Generator(blocks=2, channels=8), Discriminator(channels=8)
    features = VGGFeatures("conv2_2", vgg_file)
    criterion = GeneratorLoss(features, **dict.fromkeys(GeneratorLoss.TERMS, 0.0) | {term: 1.0})
    sr = generator(torch.rand(2, 3, 8, 8))
    total, terms = criterion(sr, torch.rand(2, 3, 32, 32), discriminator)
    assert list(terms) == [term] and total.item() == pytest.approx(terms[term].item())
    total.backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in features.parameters())


def test_total_is_the_weighted_sum(vgg_file):
    torch.manual_seed(0)
    sr, hr, logits = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32), torch.tensor([1.0, -2.0])
    criterion = GeneratorLoss(VGGFeatures("conv2_2", vgg_file), pixel=2, vgg=0.5, adversarial=1e-3, lattice=0.1)
    total, terms = criterion(sr, hr, lambda picture: logits if picture is sr else None)
    assert set(terms) == {"pixel", "vgg", "adversarial", "lattice"}
    expected = 2 * terms["pixel"] + 0.5 * terms["vgg"] + 1e-3 * terms["adversarial"] + 0.1 * terms["lattice"]
    assert total.item() == pytest.approx(expected.item())
    assert terms["pixel"].item() == pytest.approx(((sr - hr) ** 2).mean().item())
    with pytest.raises(TypeError, match="pixels"):
        GeneratorLoss(pixels=1)


def test_adversarial_terms_are_cross_entropy_on_logits():
    real, fake = torch.tensor([3.0, -1.0]), torch.tensor([-2.0, 0.5])
    cross_entropy = F.binary_cross_entropy_with_logits
    ones, zeros = torch.ones(2), torch.zeros(2)
    assert torch.isclose(
        discriminator_loss(real, fake), cross_entropy(real, ones) + cross_entropy(fake, zeros)
    )
    assert torch.isclose(adversarial_loss(fake), cross_entropy(fake, ones))


def test_generator_keeps_its_gradient_under_a_winning_discriminator():
    logits = torch.full((4,), -60.0, requires_grad=True)
    adversarial_loss(logits).backward()
    torch.testing.assert_close(logits.grad, torch.full((4,), -0.25))


def test_vgg_distance_does_not_depend_on_the_scale_of_the_weights(vgg_file, tmp_path):
    torch.manual_seed(0)
    sr, hr = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    state = torch.load(vgg_file, weights_only=True)
    for name in ("7.weight", "7.bias"):
        state[name] = state[name] * 100
    torch.save({f"features.{name}": value for name, value in state.items()}, tmp_path / "scaled.pth")
    plain = vgg_distance(VGGFeatures("conv2_2", vgg_file), sr, hr)
    scaled = vgg_distance(VGGFeatures("conv2_2", tmp_path / "scaled.pth"), sr, hr)
    torch.testing.assert_close(plain, scaled)
    assert plain > 0.01
    assert vgg_distance(VGGFeatures("conv2_2", vgg_file), hr, hr) == 0


def test_vgg_sees_imagenet_normalisation_and_ends_after_the_relu(vgg_file):
    features = VGGFeatures("conv2_2", vgg_file)
    seen = []
    features.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    picture = torch.tensor([0.485, 0.456 + 0.224, 0.406]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    output = features(picture)
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([0.0, 1.0, 0.0]))
    assert output.shape == (1, 128, 4, 4) and output.min() == 0


def test_unusable_vgg_weights_are_one_sentence(vgg_file, tmp_path, monkeypatch):
    from torchvision.models import VGG19_Weights

    def offline(self, *args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(VGG19_Weights, "get_state_dict", offline)
    (tmp_path / "text.pth").write_text("weights")
    torch.save({"0.weight": 3}, tmp_path / "foreign.pth")
    for layer, weights in [
        ("conv5_4", None),
        ("conv2_2", tmp_path / "text.pth"),
        ("conv2_2", tmp_path / "no.pth"),
        ("conv2_2", tmp_path / "foreign.pth"),
        ("conv3_4", vgg_file),
    ]:
        with pytest.raises(UsageError) as error:
            VGGFeatures(layer, weights)
        assert "\n" not in str(error.value)
        assert "--vgg-weights" in str(error.value) or "--vgg-layer" in str(error.value)


def test_lattice_loss_sees_the_pattern_and_no_texture():
    """A dot at every fourth pixel counts far more than in the squared error, noise as strong far less."""
    hr = torch.rand(2, 3, 92, 92, generator=torch.Generator().manual_seed(0))
    lattice, noise = torch.zeros_like(hr), torch.randn(hr.shape, generator=torch.Generator().manual_seed(1))
    lattice[..., 1::4, 2::4] = 0.04
    noise *= lattice.square().mean().sqrt()
    assert lattice_loss(hr, hr) == 0
    # 0.04 at one place of 16, less the mean of 0.0025: by hand.
    assert lattice_loss(hr + lattice, hr).item() == pytest.approx((0.0375**2 + 15 * 0.0025**2) / 16, rel=1e-3)
    assert lattice_loss(hr + noise, hr) < 0.05 * lattice_loss(hr + lattice, hr)
    assert lattice_loss(hr + 0.1, hr) < 1e-9            # a change of colour is no pattern
    assert lattice_loss(hr + lattice, hr, period=8) > 0.5 * lattice_loss(hr + lattice, hr)


def test_psnr_and_ssim_by_hand():
    hr = np.random.default_rng(0).integers(10, 240, (16, 16, 3), dtype=np.uint8)
    # A shift by one level is an MSE of 1: 20 log10(255); on luma 16 + 219/255 of it.
    scores = score(hr + 1, hr)
    assert scores["psnr"] == pytest.approx(48.1308, abs=1e-3)
    assert scores["psnr_y"] == pytest.approx(48.1308 + 20 * np.log10(255 / 219), abs=1e-3)
    assert 0.99 < scores["ssim"] < 1
    assert score(hr, hr) == dict(psnr=100, ssim=1, psnr_y=100, ssim_y=1)
    noise = np.random.default_rng(1).integers(0, 256, hr.shape, dtype=np.uint8)
    assert score(noise, hr)["ssim"] < 0.2
    assert psnr(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8)) == 0
    assert np.isnan(score(hr[:4], hr[:4])["ssim"])  # below the 7x7 window


def test_luma_is_bt601_studio_range():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_allclose(luma(colours), [[16, 235, 81.481, 40.966]])


def picture(name, lr, hr=None, sr=None):
    return SimpleNamespace(name=name, lr=lr, hr=hr, sr=None)


def test_a_large_picture_is_compared_where_it_has_most_detail():
    rng = np.random.default_rng(0)
    hr = np.full((1200, 800, 3), 90, np.uint8)
    hr[640:720, 320:400] = rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)
    lr = np.array(Image.fromarray(hr).resize((200, 300), Image.Resampling.BICUBIC))
    row, scores = compare(picture("a", lr, hr), hr, added=255 - hr)
    assert [title for title, _, _ in row] == ["low resolution", "bicubic", "ours", "ground truth", "added detail"]
    whole, enlarged, ours, truth, added = (part for _, part, _ in row)
    assert whole.shape == lr.shape and not np.array_equal(whole, lr)  # with a frame
    assert enlarged.shape == ours.shape == (256, 256, 3) and np.array_equal(ours, truth)
    assert np.array_equal(added, 255 - ours) and (ours != 90).all(2).sum() > 6000  # all of the detail
    assert scores["psnr"] == 100 and "100.00 dB" in row[2][2]
    [small, *_], scores = compare(picture("b", lr[:40, :50]), hr[:160, :200])
    assert np.array_equal(small[1], lr[:40, :50]) and scores == {}


def test_many_rows_stand_beside_each_other_and_long_names_are_shortened(tmp_path, monkeypatch):
    texts = []
    draw = Figure.text
    monkeypatch.setattr(Figure, "text", lambda self, x, y, text, **k: texts.append(text) or draw(self, x, y, text, **k))
    cell = np.zeros((32, 32, 3), np.uint8)
    row = [("LR", cell, "a name much longer than its place, which is small.png, 32x32"), ("bicubic", cell, ""), None]
    for number, blocks in ((2, 1), (12, 3)):
        texts.clear()
        plot_comparison(tmp_path / "a.png", [row] * number, "2 of 30 shown")
        width, height = Image.open(tmp_path / "a.png").size
        assert width > height and texts.count("LR") == texts.count("bicubic") == blocks
        names = [text for text in texts if "…" in text]
        assert len(names) == number and names[0].startswith("a name") and names[0].endswith("32x32")
        assert "2 of 30 shown" in texts
