"""How much of an image a reconstruction keeps: measures for each image, intervals, and null models.

Every measure takes (B, 3, H, W) images in [0, 1] and gives one value an image, so that intervals can be
taken over images. R² is the exception: it belongs to a set of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.data import batches
from backsight.errors import BacksightError
from backsight.representation import AnyRepresentation, Representation
from backsight.runs import METRIC_COLUMNS

DRAWS_AT_ONCE = 2**21  # numbers of a bootstrap held in memory
PSNR_CEILING = 100.0  # dB, of two images that are equal to within float32 rounding
# SSIM windows (pixels -> sigma of the Gaussian); torchmetrics derives the window from sigma.
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
    """(B,) structural similarity in [-1, 1], on a Gaussian window over RGB.

    The window is 11 pixels (sigma 1.5), the usual one, if both sides are at least 11; else 7 (sigma 0.9);
    else 3 (sigma 0.4), so values of images below 11 pixels do not compare with those of larger ones.
    Source: Wang et al., IEEE TIP 13, 2004; computed by torchmetrics.
    """
    # Imported here: it brings models of language and of pictures along, a third of what opening a notebook costs.
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_images(images, reconstructions)
    side = min(images.shape[2:])
    fitting = [window for window in WINDOWS if window <= side]
    if not fitting:
        raise BacksightError(f"SSIM needs images of at least 3 x 3 pixels, not {tuple(images.shape[2:])}.")
    values = structural_similarity_index_measure(
        reconstructions, images, sigma=WINDOWS[fitting[0]], data_range=1.0, reduction="none"
    )
    return torch.as_tensor(values).reshape(len(images))


def feature_cosine(representation: Representation, other: Representation) -> Tensor:
    """(B,) mean over tokens (without padding) of the cosine between two representations of one form."""
    if representation.signature != other.signature or representation.batch != other.batch:
        raise BacksightError(
            f"feature_cosine() compares representations of one form, not {representation.signature} of "
            f"{representation.batch} images and {other.signature} of {other.batch}."
        )
    cosine = F.cosine_similarity(representation.values, other.values, dim=-1)
    padding = getattr(representation, "padding", None)
    if padding is None:
        return cosine.mean(1)
    prefix = padding.new_ones(len(padding), cosine.shape[1] - padding.shape[1])
    counted = torch.cat([prefix, ~padding], dim=1)
    return (cosine * counted).sum(1) / counted.sum(1).clamp(min=1)


def r2(
    images: Tensor, reconstructions: Tensor, mean_image: Tensor, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """(value, low, high) of 1 - SSE / SST over a set of images, interval over images.

    mean_image: (3, H, W), the mean of the TRAINING images (`null_mean`): SST is the error of that null model,
    so 0 means "no better than the mean image".
    """
    _check_images(images, reconstructions)
    if mean_image.shape != images.shape[1:]:
        raise BacksightError(
            f"r2() needs a mean image of shape {tuple(images.shape[1:])}, not {tuple(mean_image.shape)}."
        )
    unexplained = (images - reconstructions).square().flatten(1).sum(1)
    total = (images - mean_image).square().flatten(1).sum(1)
    return determination(unexplained, total, seed, level)


def determination(
    unexplained: Tensor | np.ndarray,
    total: Tensor | np.ndarray,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 1000,
) -> tuple[float, float, float]:
    """(value, low, high) of R² = 1 - sum(unexplained) / sum(total), resampling images.

    unexplained, total: (B,) squared errors of each image, of the model and of the null model.
    NaN where the null model leaves no error.
    """
    numerator, denominator = _numbers(unexplained), _numbers(total)
    if numerator.shape != denominator.shape:
        raise BacksightError(
            f"determination() needs one total for each image, not {numerator.shape} and {denominator.shape}."
        )
    if denominator.sum() <= 0:
        return float("nan"), float("nan"), float("nan")
    low, high = _interval_of_ratio(numerator, denominator, seed, level, resamples)
    return float(1 - numerator.sum() / denominator.sum()), 1 - high, 1 - low


def bootstrap_interval(
    values: Tensor | np.ndarray | Sequence[float],
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 1000,
    clusters: Tensor | np.ndarray | Sequence[Any] | None = None,
) -> tuple[float, float]:
    """(low, high): percentile bootstrap interval of the mean over images.

    values: (B,); NaN values (a measure that does not exist for an image) are left out. clusters: (B,) labels,
    such as the training seed of each value: whole clusters are resampled, so that images that share one are
    not taken for independent. A single value gives an interval of zero length; none gives NaN.
    """
    numbers = _numbers(values)
    if not 0 < level < 1:
        raise BacksightError(f"The level of an interval lies between 0 and 1, but level is {level}.")
    labels = np.arange(len(numbers)) if clusters is None else np.asarray(clusters)
    if labels.shape != numbers.shape:
        raise BacksightError(
            f"bootstrap_interval() needs one cluster for each value, not {labels.shape} for {numbers.shape}."
        )
    defined = ~np.isnan(numbers)
    if not defined.any():
        return float("nan"), float("nan")
    _, group = np.unique(labels[defined], return_inverse=True)
    return _interval_of_ratio(np.bincount(group, weights=numbers[defined]), np.bincount(group), seed, level, resamples)


def _interval_of_ratio(
    numerator: np.ndarray, denominator: np.ndarray, seed: int, level: float, resamples: int
) -> tuple[float, float]:
    """Percentile interval of sum(numerator) / sum(denominator), both resampled together."""
    generator = np.random.default_rng(seed)
    ratios = []
    for start in range(0, resamples, step := max(1, DRAWS_AT_ONCE // len(numerator))):
        drawn = generator.integers(len(numerator), size=(min(step, resamples - start), len(numerator)))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(numerator[drawn].sum(1) / denominator[drawn].sum(1))
    every = np.concatenate(ratios)
    low, high = np.quantile(every[np.isfinite(every)], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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


def metrics_rows(
    values: Tensor | np.ndarray | Sequence[float],
    measure: str,
    seed: int = 0,
    clusters: Sequence[Any] | None = None,
    **columns: Any,
) -> list[dict[str, Any]]:
    """One tidy row: the mean of the values over images with its 95 % interval, and their number.

    values: (B,); columns: the other METRIC_COLUMNS (target, weights, dataset, split, tap, depth, inverse) and
    whatever a study adds. Columns that are not given are empty.
    """
    numbers = _numbers(values)
    defined = numbers[~np.isnan(numbers)]
    low, high = bootstrap_interval(numbers, seed, clusters=clusters)
    value = float(defined.mean()) if len(defined) else float("nan")
    return [metrics_row(measure, value, low, high, len(defined), seed, **columns)]


def metrics_row(
    measure: str, value: float, low: float, high: float, n: int, seed: int = 0, **columns: Any
) -> dict[str, Any]:
    """One tidy row of a value that has its interval already, such as `r2`."""
    row: dict[str, Any] = dict.fromkeys(METRIC_COLUMNS)
    row |= {"measure": measure, "value": value, "low": low, "high": high, "n": n, "seed": seed}
    return row | columns


def null_mean(train_images: Any, batch_size: int = 256) -> Tensor:
    """(3, H, W) mean of the training images (ImageSource or (N, 3, H, W)): the `null_mean` reconstruction."""
    total, count = None, 0
    for batch in batches(train_images, batch_size):
        summed = batch.double().sum(0)
        total = summed if total is None else total + summed
        count += len(batch)
    if total is None:
        raise BacksightError("null_mean() needs at least one training image, but was given none.")
    return (total / count).float()


def shuffled(representation: AnyRepresentation, generator: torch.Generator) -> AnyRepresentation:
    """The representation with every image given another image's values: the input of `null_shuffled`.

    A random cyclic permutation of the batch, so that no image keeps its own. Raises BacksightError on a batch
    of one.
    """
    batch = representation.batch
    if batch < 2:
        raise BacksightError("shuffled() needs a batch of at least 2 images, but got 1.")
    order = torch.randperm(batch, generator=generator)
    taken = torch.empty_like(order)
    taken[order] = order.roll(1)
    return representation.index(taken.to(representation.values.device))


def _numbers(values: Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, float)
    if array.ndim != 1 or not len(array):
        raise BacksightError(f"One value for each of at least one image is needed, not an array {array.shape}.")
    return array


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
        if not (low >= 0 and high <= 1):
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
