"""Small things the tests make for themselves: drawn faces, random VGG weights, a tiny network."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # small networks: threads would wait for each other

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Generator, save_checkpoint  # noqa: E402
from train import draw_faces  # noqa: E402


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    """A folder of twelve drawn faces, 128x128 PNG."""
    folder = tmp_path_factory.mktemp("faces")
    draw_faces(folder)
    return folder


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory):
    """Random VGG19 weights up to conv2_2 in the layout of torchvision's `.features`."""
    torch.manual_seed(1)
    shapes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128)}
    state = {}
    for index, (outputs, inputs) in shapes.items():
        conv = nn.Conv2d(inputs, outputs, 3)
        nn.init.kaiming_normal_(conv.weight)
        state |= {f"{index}.weight": conv.weight.data, f"{index}.bias": conv.bias.data}
    path = tmp_path_factory.mktemp("vgg") / "vgg.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A checkpoint of a small untrained generator, which is close to bicubic."""
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny_x4.pth"
    save_checkpoint(path, Generator(blocks=1, channels=8), {})
    return path


def pytest_configure(config):
    """Say at the end which tests were left out, and why (pytest -rs)."""
    config.option.reportchars += "s"
