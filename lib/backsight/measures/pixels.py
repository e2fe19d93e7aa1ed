"""How much of an image a reconstruction keeps, pixel by pixel.

Every measure takes (B, 3, H, W) images in [0, 1] and gives one value an image, so that intervals can be
taken over images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.errors import BacksightError
from backsight.representation import Representation

PSNR_CEILING = 100.0  # dB, of two images that are equal to within float32 rounding
# SSIM windows: pixels -> sigma of the Gaussian.
WINDOWS = {11: 1.5, 7: 0.9, 3: 0.4}


def mse(images: Tensor, reconstructions: Tensor) -> Tensor:
    """(B,) mean squared error over pixels and channels, in units of the full range squared."""
    _check_images(images, reconstructions)
    return (images - reconstructions).square().flatten(1).mean(1)


def psnr(images: Tensor, reconstructions: Tensor, masks: Tensor | None = None) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB, -10 log10(mse), at most 100 dB.

    masks: (B, H, W) bool, True = counted; the error is then averaged over those pixels only.
    Raises BacksightError on unequal shapes, values outside [0, 1] or an empty mask.
    """
    _check_images(images, reconstructions)
    error = (images - reconstructions).square().mean(1)
    if masks is None:
        mean = error.flatten(1).mean(1)
    else:
        _check_masks(masks, images)
        mean = (error * masks).flatten(1).sum(1) / masks.flatten(1).sum(1)
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


def feature_cosine(representation: Representation, other: Representation) -> Tensor:
    """(B,) mean over tokens (without padding) of the cosine between two representations of one form."""
    if representation.form != other.form or representation.batch != other.batch:
        raise BacksightError(
            f"feature_cosine() compares representations of one form, not {representation.form} of "
            f"{representation.batch} images and {other.form} of {other.batch}."
        )
    cosine = F.cosine_similarity(representation.values, other.values, dim=-1)
    padding = getattr(representation, "padding", None)
    if padding is None:
        return cosine.mean(1)
    prefix = padding.new_ones(len(padding), cosine.shape[1] - padding.shape[1])
    counted = torch.cat([prefix, ~padding], dim=1)
    return (cosine * counted).sum(1) / counted.sum(1).clamp(min=1)


def score(images: Tensor, reconstructions: Tensor, masks: Tensor | None = None) -> dict[str, Tensor]:
    """{measure: (B,)}: mse, psnr, ssim, and psnr_objects where masks (B, H, W) of the objects are given.

    Images whose mask is empty have no psnr_objects: NaN there.
    """
    values = {
        "mse": mse(images, reconstructions),
        "psnr": psnr(images, reconstructions),
        "ssim": ssim(images, reconstructions),
    }
    if masks is not None:
        filled = masks.flatten(1).any(1)
        inside = torch.full_like(values["psnr"], float("nan"))
        if filled.any():
            inside[filled] = psnr(images[filled], reconstructions[filled], masks[filled])
        values["psnr_objects"] = inside
    return values


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


def _check_masks(masks: Tensor, images: Tensor) -> None:
    wanted = (images.shape[0], *images.shape[2:])
    if masks.dtype != torch.bool or tuple(masks.shape) != wanted:
        raise BacksightError(
            f"Masks need the shape {wanted} and the type bool, not {tuple(masks.shape)} and {masks.dtype}."
        )
    empty = (~masks.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise BacksightError(
            f"The mask of image {empty[0]} in the batch is empty ({len(empty)} of {len(masks)} are): "
            "leave such images out."
        )
