"""Shape and detail, measured apart: regions, edges, spatial frequencies, what was lost and what was invented, the
object's outline, its texture and its hue.

Every measure of this module is made for one batch of images first, where all that depends on the truth alone is
computed once, and is then applied to any number of reconstructions of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import masks_to_boxes

from backsight.errors import BacksightError
from backsight.measures.hue import hue_scores, object_chroma
from backsight.measures.pixels import region_psnr

EDGE_THRESHOLD = 0.08  # full ranges a pixel: a sharp step of a sixth of the range passes, a faint one does not
TOLERANCE = 64  # two edges may lie a 64th of the shorter side (at least a pixel) apart and still be one
BOUNDARY = 32  # a boundary is a 32nd of the shorter side wide, to either side of the outline
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
CROP = 32  # pixels a side of the object that the texture probe reads


@dataclass(frozen=True)
class Judged:
    """A batch of images and the truth about them.

    images: (B, 3, H, W) in [0, 1]; masks: (B, H, W) bool, all objects, or None; largest: (B, H, W) bool, the largest
    object, or None; places: (B,) int64, where the images stand in the set.
    """

    images: Tensor
    masks: Tensor | None
    largest: Tensor | None
    places: Tensor

    def first(self, count: int) -> Judged:
        """The first images of the batch."""
        return Judged(*(None if part is None else part[:count] for part in vars(self).values()))  # type: ignore


@dataclass(frozen=True)
class Ratio:
    """A measure that belongs to a set of images: the sum of `part` over that of `whole`, each (B,).

    complement: one minus that (R²).
    """

    part: Tensor
    whole: Tensor
    complement: bool = False


Key = str | tuple[str, tuple[tuple[str, Any], ...]]  # a measure, or a measure with further columns of its row
Scores = Mapping[Key, Any]  # (B,) tensors, Ratio, or what another module pools by itself
Measure = Callable[[Judged], Callable[[Tensor], Scores]]


# ------------------------------------------------------------------------------------------------------------ regions


def _highest(values: Tensor, within: int) -> Tensor:
    """(B, H, W): the highest value within so many pixels, in a square neighbourhood."""
    return F.max_pool2d(values[:, None].float(), 2 * within + 1, stride=1, padding=within)[:, 0]


def dilated(masks: Tensor, pixels: int) -> Tensor:
    """(B, H, W) bool: True within `pixels` of a True, in a square neighbourhood."""
    return _highest(masks, pixels) > 0


def regions(masks: Tensor) -> dict[str, Tensor]:
    """{"objects", "boundary", "background"}: (B, H, W) bool from the masks of all objects (B, H, W) bool.

    objects: inside; background: outside; boundary: within a 32nd of the shorter side (at least a pixel) of the
    outline, on either side of it, so that it shares pixels with both.
    """
    near = max(1, round(min(masks.shape[1:]) / BOUNDARY))
    return {"objects": masks, "boundary": dilated(masks, near) & dilated(~masks, near), "background": ~masks}


# ----------------------------------------------------------------------------------------------------------- edges


@dataclass(frozen=True)
class Edges:
    """strength: (B, H, W) colour gradient, in full ranges a pixel; edges: (B, H, W) bool, one pixel thin."""

    strength: Tensor
    edges: Tensor


def edges(images: Tensor) -> Edges:
    """The edges of (B, 3, H, W) images: local maxima of the colour gradient, across the edge, above EDGE_THRESHOLD.

    The gradient is Sobel's, the root mean square over the channels; its direction is that of the structure tensor
    summed over channels (Di Zenzo 1986), in four directions, as in Canny (1986). The threshold is a fixed one, the
    same for an image and its reconstruction: an edge that is too faint to be seen counts as none.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    rows = (padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]) / 8
    across = rows[..., 2:] - rows[..., :-2]
    columns = (padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]) / 8
    down = columns[:, :, 2:] - columns[:, :, :-2]
    across_squared, down_squared = across.square().mean(1), down.square().mean(1)
    strength = (across_squared + down_squared).sqrt()
    angle = 0.5 * torch.atan2(2 * (across * down).mean(1), across_squared - down_squared)  # of the steepest change
    direction = (angle / (math.pi / 4)).round().long() % 4  # 0 across, 1 falling diagonal, 2 down, 3 rising diagonal
    around = F.unfold(strength[:, None], 3, padding=1).unflatten(2, strength.shape[1:])  # (B, 9, H, W)
    ahead = around[:, [5, 8, 7, 6]].gather(1, direction[:, None])[:, 0]
    behind = around[:, [3, 0, 1, 2]].gather(1, direction[:, None])[:, 0]
    thin = (strength >= ahead) & (strength > behind) & (strength > EDGE_THRESHOLD)
    return Edges(strength, thin)


def compare_edges(truth: Edges, made: Edges, within: int) -> dict[Key, Tensor]:
    """{"edge_f1", "lost", "invented"}: (B,) each; `within`: pixels that two edges may lie apart.

    edge_f1: harmonic mean of precision and recall of edge pixels (the boundary measure of Martin et al. 2004, matched
    by dilation); NaN where the image has no edge. lost: strength of structure that the image has and the
    reconstruction has nowhere within reach; invented: strength that the reconstruction has and the image has nowhere
    within reach; both as a share of the image's own strength (NaN where it has none), so that lost is at most 1 and
    invented may exceed it.
    """
    found = (made.edges & dilated(truth.edges, within)).flatten(1).sum(1)
    seen = (truth.edges & dilated(made.edges, within)).flatten(1).sum(1)
    true, all_made = truth.edges.flatten(1).sum(1), made.edges.flatten(1).sum(1)
    precision, recall = found / all_made.clamp(min=1), seen / true.clamp(min=1)
    nothing = precision.new_tensor(math.nan)
    f1 = (2 * precision * recall / (precision + recall).clamp(min=1e-9)).where(true > 0, nothing)
    whole = truth.strength.flatten(1).sum(1)
    lost = (truth.strength - _highest(made.strength, within)).clamp(min=0).flatten(1).sum(1)
    invented = (made.strength - _highest(truth.strength, within)).clamp(min=0).flatten(1).sum(1)
    some = whole > 1e-3
    share = whole.clamp(min=1e-9)
    return {
        "edge_f1": f1,
        "lost": (lost / share).where(some, nothing),
        "invented": (invented / share).where(some, nothing),
    }


# ----------------------------------------------------------------------------------------------- spatial frequencies


def bands(size: Sequence[int]) -> list[tuple[float, Tensor]]:
    """Octaves of spatial frequency: (centre in cycles an image, (H, W // 2 + 1) bool of the coefficients of rfft2).

    The first octave is 1 to 2 cycles over the shorter side, the last ends at Nyquist's frequency.
    """
    height, width = size
    shorter = min(size)
    down = torch.fft.fftfreq(height)[:, None] * shorter
    across = torch.fft.rfftfreq(width)[None] * shorter
    radius = (down.square() + across.square()).sqrt()
    lowest = [2.0**octave for octave in range(max(1, int(math.log2(shorter / 2))))]
    return [(round(low * math.sqrt(2), 1), (radius >= low) & (radius < 2 * low)) for low in lowest]


def spectrum(images: Tensor) -> Tensor:
    """(B, H, W // 2 + 1) power summed over channels, under a Hann window that hides the picture's rim."""
    height, width = images.shape[2:]
    down, across = (torch.hann_window(side + 2, periodic=False)[1:-1].to(images) for side in (height, width))
    window = down[:, None] * across
    mean = (images * window).sum((2, 3), keepdim=True) / window.sum()
    power = torch.fft.rfft2((images - mean) * window).abs().square().sum(1)
    power[..., 1 : (width + 1) // 2] *= 2  # these stand for their mirrored partners as well
    return power


# ---------------------------------------------------------------------------------------------- the object's outline


def colour_model(images: Tensor, inside: Tensor, penalty: float = 1e-3) -> Tensor:
    """(B, 10) weights that tell an object's colours from all others in its own image, by ridge regression.

    images: (B, 3, H, W); inside: (B, H, W) bool. A pixel is described by red, green, blue, their squares and
    products, and a constant; inside is +1, outside -1, both weigh the same in sum. No position is used.
    """
    described = _colours(images)
    labels = inside.flatten(1).float()
    count = labels.sum(1, keepdim=True)
    weights = labels / count.clamp(min=1) + (1 - labels) / (labels.shape[1] - count).clamp(min=1)
    weighted = described * weights[..., None]
    system = weighted.transpose(1, 2) @ described + penalty * torch.eye(described.shape[2])
    wanted = (weighted * (2 * labels - 1)[..., None]).sum(1)
    return torch.linalg.solve(system, wanted)


def segmented(images: Tensor, model: Tensor) -> Tensor:
    """(B, H, W) bool: the pixels that a `colour_model` takes for the object."""
    return ((_colours(images) @ model[..., None])[..., 0] > 0).unflatten(1, images.shape[2:])


def _colours(images: Tensor) -> Tensor:
    """(B, H * W, 10): one, colours, their squares and products."""
    red, green, blue = images.flatten(2).unbind(1)
    terms = [torch.ones_like(red), red, green, blue, red * red, green * green, blue * blue]
    return torch.stack([*terms, red * green, red * blue, green * blue], -1)


def mask_iou(masks: Tensor, others: Tensor) -> Tensor:
    """(B,) intersection over union of (B, H, W) bool masks; NaN where both are empty."""
    both = (masks & others).flatten(1).sum(1)
    either = (masks | others).flatten(1).sum(1)
    return both / either  # 0 / 0 is NaN


# --------------------------------------------------------------------------------------------- the measures together


def detail(judged: Judged) -> Callable[[Tensor], Scores]:
    """Edges, bands, lost and invented structure; with masks also regions, the object's outline and its hue."""
    images = judged.images
    size = images.shape[2:]
    within = max(1, round(min(size) / TOLERANCE))
    true_edges = edges(images)
    octaves = [(centre, chosen.to(images.device)) for centre, chosen in bands(size)]
    power = spectrum(images)
    powers = [power[:, chosen].sum(1) for _, chosen in octaves]
    places = None if judged.masks is None else regions(judged.masks)
    inside = judged.largest
    if inside is not None:
        filled = inside.flatten(1).any(1)
        model, colours = colour_model(images, inside), object_chroma(images, inside)
        ceiling = mask_iou(inside, segmented(images, model))

    def measured(made: Tensor) -> Scores:
        values: dict[Key, Any] = {}
        values.update(compare_edges(true_edges, edges(made), within))
        error = spectrum(made - images)
        for (centre, chosen), whole in zip(octaves, powers, strict=True):
            values["band_error", (("band", centre),)] = Ratio(error[:, chosen].sum(1), whole)
        if places is not None:
            squared = (made - images).square().mean(1)
            for name in ("boundary", "background"):
                values[f"psnr_{name}"] = region_psnr(squared, places[name])
        if inside is not None:
            nothing = made.new_tensor(math.nan)
            values["mask_iou"] = mask_iou(inside, segmented(made, model)).where(filled, nothing)
            values["mask_iou_ceiling"] = ceiling.where(filled, nothing)
            for name, scores in hue_scores(colours, object_chroma(made, inside)).items():
                values[name] = torch.from_numpy(scores)
        return values

    return measured


# --------------------------------------------------------------------------------------------------------- texture


def texture_features(images: Tensor, inside: Tensor) -> Tensor:
    """(B, D): how the brightness of an object varies, without its colour, place, size or orientation.

    The object's bounding box is taken out at CROP x CROP pixels; its luma is put to mean 0 inside the mask and 0
    outside. Features: its spread, the quantiles of the luma over the spread, and the power by frequency and by
    direction (directions from the strongest on), all relative to the power of the mask itself.
    """
    crops, masks = _object_crops(images, inside)
    count = masks.flatten(1).sum(1).clamp(min=1)
    mean = (crops * masks).flatten(1).sum(1) / count
    centred = (crops - mean[:, None, None]) * masks
    spread = (centred.square().flatten(1).sum(1) / count).sqrt()
    standard = centred / (spread[:, None, None] + 0.01)
    ranked = standard.masked_fill(~masks.bool(), math.inf).flatten(1).sort(1).values
    levels = torch.linspace(0.05, 0.95, 10, device=images.device)
    quantiles = ranked.gather(1, (levels * (count[:, None] - 1)).round().long())
    power = torch.fft.fftshift(torch.fft.fft2(standard).abs().square(), dim=(1, 2)) / count[:, None, None]
    places = torch.arange(CROP, device=images.device) - CROP // 2
    down, across = torch.meshgrid(places, places, indexing="ij")
    radius = (down.square() + across.square()).sqrt()
    rings = torch.stack([((radius >= low) & (radius < low + 1.5)).float() for low in np.arange(0.5, 15.5, 1.5)])
    by_ring = (power.flatten(1) @ rings.flatten(1).T + 1e-3).log()
    turn = (torch.atan2(down, across) % math.pi / math.pi * 12).long().clamp(max=11)
    sectors = F.one_hot(turn, 12).permute(2, 0, 1) * ((radius >= 2) & (radius < 14))
    by_direction = power.flatten(1) @ sectors.flatten(1).float().T
    strongest = by_direction.argmax(1, keepdim=True)
    order = (strongest + torch.arange(12, device=images.device)) % 12
    turned = by_direction.gather(1, order)
    turned = turned / turned.sum(1, keepdim=True).clamp(min=1e-6)
    return torch.cat([(spread[:, None] + 0.005).log(), quantiles, by_ring, turned], 1)


def _object_crops(images: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """(B, CROP, CROP) luma and 0/1 masks of the objects' bounding boxes made square; an empty mask takes all."""
    luma = (images * images.new_tensor(LUMA)[:, None, None]).sum(1)
    height, width = luma.shape[1:]
    empty = ~inside.flatten(1).any(1)
    shown = inside | empty[:, None, None]
    left, top, right, bottom = (masks_to_boxes(shown) + torch.tensor([0, 0, 1, 1]).to(luma)).T  # inclusive there
    side = torch.maximum(bottom - top, right - left)
    theta = luma.new_zeros(len(luma), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = side / width, (left + right) / width - 1
    theta[:, 1, 1], theta[:, 1, 2] = side / height, (top + bottom) / height - 1
    grid = F.affine_grid(theta, [len(luma), 2, CROP, CROP], align_corners=False)
    both = torch.stack([luma, shown.float()], 1)
    crops, masks = F.grid_sample(both, grid, mode="bilinear", align_corners=False).unbind(1)
    return crops, (masks > 0.5).float()


def fit_texture_probe(images: Tensor, inside: Tensor, labels: Sequence[str]) -> Any:
    """A logistic regression (a scikit-learn pipeline) from `texture_features` of TRUE images to the texture's name."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    if len(set(labels)) < 2:
        raise BacksightError(
            f"a texture probe needs objects of two textures or more, not {', '.join(set(labels)) or 'none'}."
        )
    clip = FunctionTransformer(np.clip, kw_args={"a_min": -5, "a_max": 5})
    probe = make_pipeline(StandardScaler(), clip, LogisticRegression(C=1.0, max_iter=500))
    return probe.fit(texture_features(images, inside).numpy(), list(labels))


def texture_accuracy(probe: Any, labels: Sequence[str]) -> Measure:
    """Measure: does the probe of `fit_texture_probe`, made on true images, name the texture of the largest object?

    labels: the true textures of all judged images, in their order.
    """
    true = np.array(labels)

    def prepared(judged: Judged) -> Callable[[Tensor], Scores]:
        if judged.largest is None:
            raise BacksightError("texture_accuracy() needs the objects' masks: open the images with masks=True.")
        inside, wanted = judged.largest, true[judged.places.numpy()]

        def named(images: Tensor) -> Tensor:
            return torch.from_numpy(probe.predict(texture_features(images, inside).cpu().numpy()) == wanted).float()

        ceiling = named(judged.images)
        return lambda made: {"texture_accuracy": named(made), "texture_accuracy_ceiling": ceiling}

    return prepared
