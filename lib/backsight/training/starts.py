"""Where a training starts: at closed-form maps, with units measured once, and with stages that lead down to pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from backsight.data.features import FeatureStore
from backsight.inverses.linear import LinearInverse, Request, fit_linear_pairs
from backsight.inverses.module import Moments, TrainedInverse
from backsight.inverses.passes import recorded_batches
from backsight.inverses.rows import PIXELS, Pair, area, is_mappable
from backsight.representation import Form
from backsight.targets.base import Target

Starts = Mapping[Pair, LinearInverse]

RECORDING_BATCH = 64
MOMENT_IMAGES = 256  # for means, deviations and the unit of the losses
START_CONTEXT = 3  # side of the square of tokens that a closed-form start reads
# Least ridge strengths of the stages of a chain: below these a map blows up the errors of the stages above it.
STAGE_FLOOR, PIXEL_FLOOR = 1e-3, 1e-4
closed_form = partial(fit_linear_pairs, rows_per_input=32)  # of a few tokens an image, where images are many


def start_requests(
    target: Target, taps: Sequence[str], forms: Mapping[str, Form], family: str
) -> dict[Pair, Request | None]:
    """The stages of "direct" or "modular" inverses, and the closed-form map from which each starts, if there is one."""
    stages = family == "modular"
    pairs = stage_pairs(target, taps, forms) if stages else [(tap, PIXELS) for tap in taps]
    floors = {PIXELS: PIXEL_FLOOR if stages else 0.0}
    return {
        (tap, end): Request(tap, end, START_CONTEXT, floors.get(end, STAGE_FLOOR))
        if is_mappable(forms[tap], forms[end])
        else None
        for tap, end in pairs
    }


def measured(
    target: Target, sample: FeatureStore | Tensor, taps: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Moments]]:
    """The first image of every tap and of the pixels, and the moments of all, in a stream."""
    first: dict[str, Any] = {}
    sums: dict[str, Tensor] = {}
    passes = recorded_batches(target, sample, taps, RECORDING_BATCH)
    for images, recorded in islice(passes, MOMENT_IMAGES // RECORDING_BATCH):
        first = first or {PIXELS: images[:1], **{tap: held.index(0) for tap, held in recorded.items()}}
        parts = {PIXELS: power_sums(values_of(images))}
        for tap, held in recorded.items():
            parts[tap] = power_sums(held.values, getattr(held, "prefix", 0))
        sums = {tap: part + sums.get(tap, 0) for tap, part in parts.items()}
    tokens = {tap: 1 if tap == PIXELS else held.values.shape[1] for tap, held in first.items()}
    return first, {tap: moments_of(part, tokens[tap]) for tap, part in sums.items()}


@torch.no_grad()
def add_in_units_of_what_is_left(inverse: TrainedInverse, images: Tensor, recorded: Mapping[str, Any]) -> None:
    """Let the network add to its closed-form start in units of the start's error, measured on these images.

    Muon's steps are of one size, whatever there is to learn: in units of the whole representation the first ones
    destroy a start that leaves a hundredth of its variance.
    """
    truth = images if inverse.destination == PIXELS else recorded[inverse.destination]
    start: Any = inverse.linear
    error = values_of(truth) - values_of(start.raw(recorded[inverse.source]))
    left = moments_of(power_sums(error, getattr(truth, "prefix", 0)), error.shape[1])
    inverse.destination_deviation.copy_(left.deviation)


def values_of(held: Any) -> Tensor:
    """(B, P + N, C) of a representation; (B, H * W, 3) of images."""
    return held.flatten(2).transpose(1, 2) if isinstance(held, Tensor) else held.values


def power_sums(values: Tensor, prefix: int = 0) -> Tensor:
    """(G, 3, C): number, sum and sum of squares of the groups: each prefix token, then all tokens of the grid.

    values: (B, P + N, C). In float64, where the device has it.
    """
    values = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
    groups = [*values[:, :prefix].unbind(1), values[:, prefix:].flatten(0, 1)]
    return torch.stack([torch.stack([torch.ones_like(x).sum(0), x.sum(0), x.square().sum(0)]) for x in groups])


def moments_of(sums: Tensor, tokens: int) -> Moments:
    """Of the images behind these power sums; tokens: of an image, the prefix among them."""
    rows, first, second = sums.unbind(1)
    mean = first / rows
    spread = (second / rows - mean.square()).clamp(min=0)
    deviation = spread.sqrt()
    # A channel that hardly moves is not blown up to the size of the others.
    deviation = deviation.clamp(min=0.01 * float(deviation.mean()) + 1e-12)
    weight = spread.new_tensor([1.0] * (len(mean) - 1) + [max(1, tokens - len(mean) + 1)])
    variance = float((spread.mean(1) * weight).sum() / weight.sum())
    return Moments(mean.float(), deviation.float(), max(variance, 1e-12))


def stage_pairs(target: Target, taps: Sequence[str], forms: Mapping[str, Form] | None = None) -> Iterator[Pair]:
    """(tap, destination) of every stage of a chain: the tap before it, or "pixels" for the first.

    A projection (a linear map of single tokens) belongs to the backbone before it, as in the paper: its inverse,
    ill-conditioned as it is, would blow up what the modules above leave of error. forms: of the taps; tokens on several
    grids go on to the nearest tap on a grid as fine as their finest: through a coarser one, what the fine levels hold
    would be lost.
    """
    ends: dict[str, str] = {}

    def holds(earlier: Form, later: Form) -> bool:
        finest = max(map(area, later.grids)) if len(later.grids) > 1 else 0
        return earlier.kind != "tokens" or max(map(area, earlier.grids)) >= finest

    for place, tap in enumerate(taps):
        earlier = [other for other in taps[:place] if forms is None or holds(forms[other], forms[tap])]
        previous = earlier[-1] if earlier else PIXELS
        projected = previous != PIXELS and target.stage(tap, previous).kind == "projection"
        ends[tap] = ends[previous] if projected else previous
        yield tap, ends[tap]
