"""How far SR is from HR: the loss terms of SRGAN (Ledig et al. 2017, arXiv:1609.04802,
section 2.2) for training, PSNR and SSIM for people, and opinion scores by people.

Pictures are RGB in [0, 1], (N, 3, H, W); SR may leave the range. Every term is a mean over
everything, so its size does not depend on the batch or the patch size.

    criterion = GeneratorLoss(pixel=1, vgg=0.006, adversarial=1e-3, features=VGGFeatures("conv3_4"))
    total, terms = criterion(sr, hr, discriminator(sr))     # terms: {"pixel": ..., "vgg": ..., ...}
"""
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# phi_i,j of the paper: the j-th convolution before the i-th pooling, after its ReLU. The value is
# how many layers of torchvision's vgg19().features lead there.
VGG_LAYERS = {"conv2_2": 9, "conv3_4": 18, "conv5_4": 36}


class LossError(Exception):
    """A loss that cannot be set up; the message is one sentence for the user."""


class VGGFeatures(nn.Module):
    """VGG19's features phi_i,j (section 2.2.1), frozen: (N, 3, H, W) -> (N, C, h, w).

    Args:
        layer: "conv2_2" (phi 2,2), "conv3_4" or "conv5_4" (phi 5,4, the paper's VGG54).
        weights: None takes torchvision's ImageNet weights (downloaded once, 550 MB); else a file
            with a state dict in the layout of torchvision's `vgg19()` or of its `.features`,
            complete or only as deep as `layer`.

    Raises LossError where the weights cannot be had or do not fit.
    """

    def __init__(self, layer="conv5_4", weights=None):
        super().__init__()
        from torchvision.models import VGG19_Weights, vgg19     # slow to import, seldom needed
        try:
            state = VGG19_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True) if weights is None \
                else torch.load(Path(weights), map_location="cpu", weights_only=True)
        except Exception as error:      # URLError, OSError, or what torch.load raises
            reason = str(getattr(error, "reason", None) or getattr(error, "strerror", None)
                         or "damaged, or not a state dict").rstrip(".")
            raise LossError(
                f"the VGG19 weights {weights or 'of torchvision'} cannot be loaded ({reason}); give "
                "a file with --vgg-weights FILE, or --vgg-weights none to train without") from None
        with torch.device("meta"):      # shapes only: the full network would take 550 MB
            self.layers = vgg19().features[:VGG_LAYERS[layer]]
        try:
            state = {name.removeprefix("features."): value.float() for name, value in state.items()}
            self.layers.load_state_dict({name: state[name] for name in self.layers.state_dict()},
                                        assign=True)
        except (AttributeError, KeyError, RuntimeError):
            raise LossError(f"{weights}: no VGG19 state dict in torchvision's layout that reaches "
                            f"{layer}; choose another file or --vgg-layer") from None
        for module in self.layers:
            if isinstance(module, nn.ReLU):
                module.inplace = False
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, picture):
        return self.layers((picture - self.mean) / self.std)


def vgg_distance(features, sr, hr):
    """Content loss of equation 5, relative: ||phi(sr) - phi(hr)||^2 / ||phi(hr)||^2, a mean over
    the pictures.

    The plain distance depends on how the weights are scaled and grows or shrinks by orders of
    magnitude from layer to layer, which is why the paper has to multiply it by 0.006. Divided by
    the energy of the target's features it is 0 for equal pictures and 1 where no feature answers, for
    every layer and every scaling of the weights, so that one weight fits all.
    """
    with torch.no_grad():
        target = features(hr).float()
    error = F.mse_loss(features(sr).float(), target, reduction="none")
    return (error.mean((1, 2, 3)) / target.square().mean((1, 2, 3))).mean()


def shifted(step, *pictures):
    """Cut (N, C, H, W) pictures to (H - 4, W - 4) at one of 16 offsets, another at each step.

    The pooling of VGG and the strides of D repeat every 2, 4, ... pixels. If their grid always fell on the same
    pixels, the generator would learn a pattern in step with it, a faint regular texture."""
    y, x = divmod(step * 7 % 16, 4)
    return [picture[..., y:picture.shape[2] - 4 + y, x:picture.shape[3] - 4 + x].contiguous(
        memory_format=torch.channels_last) for picture in pictures]


def total_variation(picture):
    """Mean absolute difference of neighbours, down plus across."""
    return picture.diff(dim=2).abs().mean() + picture.diff(dim=3).abs().mean()


def adversarial_loss(fake_logits):
    """-log D(G(lr)) of equation 6, from logits: its gradient does not vanish while D is winning."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits, fake_logits):
    """-log D(hr) - log(1 - D(G(lr))) of equation 2, from logits."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


class GeneratorLoss(nn.Module):
    """The perceptual loss of equation 3: a weighted sum of the terms whose weight is not zero.

    Args:
        pixel: weight of the mean squared error (equation 4).
        vgg: weight of `vgg_distance`; needs `features`, a VGGFeatures.
        adversarial: weight of `adversarial_loss` (the paper: 1e-3); needs logits at each call.
        tv: weight of `total_variation`.
    """

    def __init__(self, pixel=1.0, vgg=0.0, adversarial=0.0, tv=0.0, features=None):
        super().__init__()
        self.weights = {name: weight for name, weight in
                        dict(pixel=pixel, vgg=vgg, adversarial=adversarial, tv=tv).items() if weight}
        self.features = features

    def forward(self, sr, hr, fake_logits=None):
        """Return (the weighted sum, the unweighted terms by name)."""
        compute = dict(pixel=lambda: F.mse_loss(sr, hr),
                       vgg=lambda: vgg_distance(self.features, sr, hr),
                       adversarial=lambda: adversarial_loss(fake_logits),
                       tv=lambda: total_variation(sr))
        terms = {name: compute[name]() for name in self.weights}
        return sum(weight * terms[name] for name, weight in self.weights.items()), terms


def luma(picture):
    """BT.601 luma in studio range, 16 to 235: (H, W, 3) uint8 RGB -> (H, W) float."""
    return picture @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def psnr(a, b):
    """Peak signal-to-noise ratio in dB for a peak of 255; equal pictures count as 100 dB."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255 ** 2 / error)) if error > 0 else 100.0


def score(sr, hr):
    """Compare two (H, W, 3) uint8 pictures: PSNR (dB) and SSIM on RGB and, as psnr_y and ssim_y,
    on luma. No border is cut; SSIM is scikit-image's with its default 7x7 window (nan for pictures
    smaller than that)."""
    from skimage.metrics import structural_similarity   # slow to import, not always needed
    y_sr, y_hr = luma(sr), luma(hr)
    small = min(sr.shape[:2]) < 7
    return dict(
        psnr=psnr(sr, hr),
        ssim=float("nan") if small else float(structural_similarity(sr, hr, channel_axis=2)),
        psnr_y=psnr(y_sr, y_hr),
        ssim_y=float("nan") if small else float(structural_similarity(y_sr, y_hr, data_range=255)))


def mean_opinion_scores(ratings, draws=2000, seed=0):
    """Mean opinion score per method (section 3.3) with the ends of its 95 % confidence interval.

    `ratings` is (raters, faces, methods) float, 1 to 5, nan where nothing was rated; returns three arrays
    (methods,), nan for a method without ratings. The bootstrap draws raters and faces anew, both: the
    interval says what other raters might think of other faces.
    """
    rng = np.random.default_rng(seed)
    raters, faces, _ = ratings.shape
    given, points = np.isfinite(ratings).astype(float), np.nan_to_num(ratings)
    rater_weights, face_weights = (rng.multinomial(n, np.full(n, 1 / n), draws) for n in (raters, faces))
    with np.errstate(invalid="ignore"):     # 0 / 0: a draw in which a method has no rating
        means = np.divide(*(np.einsum("dr,df,rfm->dm", rater_weights, face_weights, table, optimize=True)
                            for table in (points, given)))
        mean = points.sum((0, 1)) / given.sum((0, 1))
    low, high = np.array([np.nanpercentile(column, (2.5, 97.5)) if np.isfinite(column).any() else (np.nan,) * 2
                          for column in means.T]).T
    return mean, low, high


def krippendorff_alpha(ratings):
    """Agreement between raters, Krippendorff's alpha for interval data: 1 is perfect, 0 is chance.

    `ratings` is (raters, items) float, nan where nothing was rated. nan where no item has two ratings or all
    ratings are equal. Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".
    """
    items = [column[np.isfinite(column)] for column in ratings.T]
    items = [item for item in items if len(item) > 1]
    every = np.concatenate(items) if items else np.zeros(1)
    if np.ptp(every) == 0:
        return float("nan")
    within = sum(len(item) * item.var(ddof=1) for item in items) / len(every)
    return float(1 - within / every.var(ddof=1))
