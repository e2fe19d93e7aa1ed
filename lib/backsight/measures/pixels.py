"""How much of an image a reconstruction keeps, pixel by pixel.

Every measure takes (B, 3, H, W) images in [0, 1] and gives one value an image, so that intervals can be
taken over images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backsight.errors import BacksightError

PSNR_CEILING = 100.0  # dB, of two images that are equal to within float32 rounding
# SSIM windows: pixels -> sigma of the Gaussian.
WINDOWS = {11: 1.5, 7: 0.9, 3: 0.4}


def psnr(images: Tensor, reconstructions: Tensor, masks: Tensor | None = None) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB, -10 log10 of the mean squared error, at most 100 dB.

    masks: (B, H, W) bool, True = counted; the error is then averaged over those pixels only, NaN where there are none.
    Raises BacksightError on unequal shapes and values outside [0, 1].
    """
    _check_images(images, reconstructions)
    error = (images - reconstructions).square().mean(1)
    return region_psnr(error, torch.ones_like(error, dtype=torch.bool) if masks is None else masks)


def region_psnr(squared_error: Tensor, region: Tensor) -> Tensor:
    """(B,) PSNR in dB over a region (B, H, W) bool; NaN where it is empty. squared_error: (B, H, W), mean over
    channels."""
    mean = (squared_error * region).flatten(1).sum(1) / region.flatten(1).sum(1)  # 0 / 0 is NaN
    return -10 * mean.clamp(min=10 ** (-PSNR_CEILING / 10)).log10()


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """(B,) structural similarity in [-1, 1], on a Gaussian window over RGB, by separable windows (matrix products).

    The window is 11 pixels (sigma 1.5), the usual one, if both sides are at least 11; else 7 (sigma 0.9);
    else 3 (sigma 0.4), so values of images below 11 pixels do not compare with those of larger ones.
    Source: Wang et al., IEEE TIP 13, 2004; the rim as torchmetrics has it.
    """
    _check_images(images, reconstructions)
    height, width = images.shape[2:]
    fitting = [window for window in WINDOWS if window <= min(height, width)]
    if not fitting:
        raise BacksightError(f"SSIM needs images of at least 3 x 3 pixels, not {(height, width)}.")
    down, across = (_window(side, fitting[0], WINDOWS[fitting[0]], images) for side in (height, width))
    x, y = images, reconstructions
    smooth = down @ torch.stack([x, y, x * x, y * y, x * y]) @ across.T
    mean_x, mean_y, square_x, square_y, product = smooth
    variance_x = (square_x - mean_x.square()).clamp(min=0)
    variance_y = (square_y - mean_y.square()).clamp(min=0)
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 1e-4) / (mean_x.square() + mean_y.square() + 1e-4)
    return (luminance * (2 * covariance + 9e-4) / (variance_x + variance_y + 9e-4)).flatten(1).mean(1)


def _window(side: int, window: int, sigma: float, like: Tensor) -> Tensor:
    """(side, side): a Gaussian at every place, folded back at the rim (reflection), as torchmetrics has it."""
    distance = torch.arange(window) - window // 2
    kernel = torch.exp(-(distance / sigma).square() / 2)
    reached = (torch.arange(side)[:, None] + distance).abs()
    reached = torch.where(reached >= side, 2 * (side - 1) - reached, reached)
    matrix = torch.zeros(side, side).scatter_add_(1, reached, (kernel / kernel.sum()).expand(side, -1))
    return matrix.to(like)


def _check_images(images: Tensor, reconstructions: Tensor) -> None:
    if images.shape != reconstructions.shape or images.ndim != 4 or not len(images):
        raise BacksightError(
            "A measure compares images and reconstructions of one shape (batch, channels, height, width), "
            f"not {tuple(images.shape)} and {tuple(reconstructions.shape)}."
        )
    for name, values in (("images", images), ("reconstructions", reconstructions)):
        if not values.is_floating_point():
            raise BacksightError(f"The {name} need float values in [0, 1], not {values.dtype}: divide by 255.")
        low, high = float(values.min()), float(values.max())
        if not (low >= -0.01 and high <= 1.01):  # as a target takes them: interpolation overshoots a little
            raise BacksightError(
                f"The {name} need values in [0, 1], but lie in [{low:.4g}, {high:.4g}]: "
                "scale or clamp them before measuring."
            )
