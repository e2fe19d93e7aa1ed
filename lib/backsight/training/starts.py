"""Where a training starts: at closed-form maps, with units measured once, and with stages that lead down to pixels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backsight.data.features import FeatureStore
from backsight.errors import BacksightError
from backsight.inverses.linear import LinearInverse, Request, fit_linear_pairs
from backsight.inverses.module import Inverse, Moments, header_for
from backsight.inverses.networks import design_for
from backsight.inverses.passes import recorded_batches
from backsight.inverses.rows import PIXELS, Form, Pair, area, form_of, plan_layout
from backsight.targets.base import Target, seeded

Starts = Mapping[Pair, LinearInverse | None]

MOMENT_IMAGES = 256  # for means, deviations and the unit of the losses
RECORDING_BATCH = 64
START_CONTEXT = 3  # side of the square of tokens that a closed-form start reads
# Least ridge strengths of the stages of a chain: below these a map blows up the errors of the stages above it.
STAGE_FLOOR, PIXEL_FLOOR = 1e-3, 1e-4


def untrained(
    target: Target,
    sample: FeatureStore | Tensor,
    held_out: FeatureStore | Tensor | None,
    taps: Sequence[str],
    family: str,
    starts: Starts,
    viewed: bool,
    seed: int,
    progress: bool,
) -> tuple[dict[str, Inverse], dict[str, Any], float]:
    """An inverse for every tap, exactly the closed-form map; maps from the stages' ends to pixels; pixels' variance.

    The second, where `viewed`, tell how much of a picture an error at the tap is. All maps come from one pass over the
    samples, of the training and of the validation images.
    """
    stages = family == "modular"
    first, moments = _measured(target, sample, taps)
    forms = {tap: form_of(held) for tap, held in first.items()}
    wanted = start_requests(target, taps, forms, family)
    views = {end: Request(end, PIXELS) for _, end in wanted if viewed and end != PIXELS}
    missing = {pair: request for pair, request in wanted.items() if request and pair not in starts}
    fitted = {}
    if requests := [*missing.values(), *views.values()]:
        fitted = fit_linear_pairs(target, sample, requests, validation=held_out, seed=seed, progress=progress)
    known = {**starts, **{pair: fitted[request] for pair, request in missing.items()}}
    inverses = {}
    for source, end in wanted:
        code = getattr(first[end], "position", None)
        stage = target.stage(source, end) if stages else None
        design = design_for(forms[source], forms[end], stage, positioned=code is not None, reduction=target.reduction)
        header = header_for(target, family, source, end, seed=seed)
        # Each module is drawn anew from the seed, so that it does not depend on which others there are.
        with seeded(seed):
            start = copy.deepcopy(known.get((source, end)))
            code = None if code is None else code[:1]
            inverses[source] = Inverse(header, design, start, moments[source], moments[end], code).to(target.device)
    return inverses, {tap: fitted[view].requires_grad_(False) for tap, view in views.items()}, moments[PIXELS].variance


def start_requests(
    target: Target, taps: Sequence[str], forms: Mapping[str, Form], family: str
) -> dict[Pair, Request | None]:
    """The stages of "direct" or "modular" inverses, and the closed-form map from which each starts, if there is one."""
    stages = family == "modular"
    pairs = stage_pairs(target, taps, forms) if stages else [(tap, PIXELS) for tap in taps]
    floors = {PIXELS: PIXEL_FLOOR if stages else 0.0}
    return {
        pair: Request(*pair, START_CONTEXT, floors.get(pair[1], STAGE_FLOOR))
        if _has_linear(target, pair, forms)
        else None
        for pair in pairs
    }


def _has_linear(target: Target, pair: Pair, forms: Mapping[str, Form]) -> bool:
    try:
        plan_layout(pair, forms[pair[0]], forms[pair[1]], target.reduction, context=START_CONTEXT)
    except BacksightError:
        return False
    return True


def _measured(
    target: Target, sample: FeatureStore | Tensor, taps: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Moments]]:
    """The first image of every tap and of the pixels, and the moments of all, in a stream."""
    first: dict[str, Any] = {}
    sums: dict[str, Tensor] = {}
    for images, recorded in recorded_batches(target, sample, taps, RECORDING_BATCH, limit=MOMENT_IMAGES):
        first = first or {PIXELS: images[:1], **{tap: held.index(0) for tap, held in recorded.items()}}
        parts = {PIXELS: power_sums(images.flatten(2).transpose(1, 2))}
        for tap, held in recorded.items():
            parts[tap] = power_sums(held.values, getattr(held, "prefix", 0), getattr(held, "padding", None))
        sums = {tap: part + sums.get(tap, 0) for tap, part in parts.items()}
    tokens = {tap: 1 if tap == PIXELS else held.values.shape[1] for tap, held in first.items()}
    return first, {tap: moments_of(part, tokens[tap]) for tap, part in sums.items()}


def power_sums(values: Tensor, prefix: int = 0, padding: Tensor | None = None) -> Tensor:
    """(G, 3, C): number, sum and sum of squares of the groups: each prefix token, then all tokens of the grid.

    values: (B, P + N, C); padding: (B, N) bool, True = left out. In float64, where the device has it.
    """
    values = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
    grid = values[:, prefix:].flatten(0, 1) if padding is None else values[:, prefix:][~padding]
    groups = [*values[:, :prefix].unbind(1), grid]
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
