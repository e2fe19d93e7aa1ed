"""Do layers speak one code? What one holds is put into the words of another and read there: stitching.

    representation of tap i ──► affine map to tap j ──► inverse made for tap j ──► picture, R² against the mean image

The map is fitted on training images, token by token (or query by query). It undoes another basis, scale and offset,
so that an inverse reads what it was made for and does not extrapolate: what is lost is what tap j's code has no linear
words for. Source: Lenc & Vedaldi, CVPR 2015; Bansal, Nakkiran & Barak, NeurIPS 2021. All functions that measure add to
the `Values` of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backsight.data.images import batches, images_at_once
from backsight.inverses.families import Reconstruct
from backsight.inverses.linear import LinearInverse, fit_linear_pairs, image_errors
from backsight.representation import Representation
from backsight.studies.layers import Pair, between, stack_pairs, stacks, whole_stack
from backsight.studies.nulls import another
from backsight.tables.pooling import influence
from backsight.tables.values import Values
from backsight.targets import Target

Maps = Mapping[int, Mapping[Pair, Any]]  # {training seed: {(tap i, tap j): the map of their representations}}
Inverses = Mapping[int, Mapping[str, Reconstruct]]  # {training seed: {tap: reconstruction}}


def fit_maps(target: Target, images: Mapping[int, Any]) -> dict[int, dict[Pair, LinearInverse]]:
    """{training seed: {(tap i, tap j): affine map}} between every two taps of a stack; images: {seed: training images}.

    Raises BacksightError where no two of the target's taps lie in one stack.
    """
    pairs = stack_pairs(target)
    return {s: fit_linear_pairs(target, sample, pairs, seed=s, progress=False) for s, sample in images.items()}


def _recordings(
    target: Target, images: Any, pairs: Mapping[Pair, Any], shuffle: bool, seed: int
) -> Iterator[tuple[Tensor, Mapping[str, Representation], Mapping[str, Representation]]]:
    """Batches, what is recorded of them, and what is read: the same or, for a null, that of other images."""
    taps = [tap for tap in target.available_taps if any(tap in pair for pair in pairs)]
    for number, batch in enumerate(batches(images, images_at_once(images))):
        if shuffle and len(batch) == 1:
            continue  # a last image alone: there is no other one
        batch = batch.to(target.device)
        given = recorded = target.record(batch, taps)
        if shuffle:
            order = another(len(batch), torch.Generator().manual_seed(seed + number))
            given = {tap: recorded[tap].index(order) for tap in taps}
        yield batch, recorded, given


@torch.no_grad()
def add_stitching(
    values: Values,
    target: Target,
    images: Any,
    inverses: Inverses,
    maps: Maps,
    mean_image: Tensor,
    inverse: str,
    family: str,
    seed: int = 0,
) -> None:
    """Add stitch_r2 of every two taps of a stack, of every tap by its own inverse, and their stitch_slope.

    images: ImageSource or (N, 3, H, W); mean_image: (3, H, W) of the training images; inverse: the family, or
    "null_shuffled" (another image's representation is mapped and read) or "null_untrained" (the target, maps and
    inverses are those of random weights), of which `family` are then the inverses.

    stitch_r2 (source_tap, target_tap; both the same: the tap's own inverse, no map): 1 − squared error / that of the
    mean image. Pictures worse than the mean image, over all images, count as the mean image: 0.

    stitch_slope: the share of what tap i's own inverse shows that does not come through tap j's, 1 − R²(i, j) /
    R²(i, i), a step of 1 in relative depth, which is the whole stack: a weighted least-squares line through the origin
    over all pairs, which count by R²(i, i), what there is to lose. The share is a sound unit: with linear inverses no
    way reads tap i better than its own one does, so that it lies in [0, 1]; and it is not owed to what the deeper tap
    has lost, since what comes through tap j is written by tap i (it may show more than tap j's own pictures do). Taps
    whose own inverse is not above the mean image have nothing to lose and are left out; pairs: of those that remain.
    endpoints: "with", or "without" the first and the last tap of each stack. stitch_slope_r2: the same in R² lost.
    """
    shuffle = inverse == "null_shuffled"
    members = [tap for stack in stacks(target).values() for tap in stack if all(tap in of for of in inverses.values())]
    pairs = [(tap, tap) for tap in members] + [pair for pair in stack_pairs(target) if {*pair} <= {*members}]
    errors: dict[Pair, list[Tensor]] = {pair: [] for pair in pairs}
    totals = []
    for batch, _, given in _recordings(target, images, errors, shuffle, seed):
        totals.append((batch - mean_image.to(batch)).square().flatten(1).sum(1).cpu())
        for i, j in pairs:
            read = {s: given[i] if i == j else maps[s][i, j](given[i]) for s in inverses}
            pictures = torch.stack([inverses[s][j](representation).clamp(0, 1) for s, representation in read.items()])
            errors[i, j].append((batch - pictures).square().flatten(2).sum(2).cpu())
    total = torch.cat(totals).double().numpy()
    lost = {pair: torch.cat(parts, dim=1).double().numpy() for pair, parts in errors.items()}  # (S, N)
    lost = {pair: np.where(error.sum(1, keepdims=True) > total.sum(), total, error) for pair, error in lost.items()}
    about: dict[str, Any] = {"inverse": inverse, "family": family}
    for pair, error in lost.items():
        r2 = dict(zip(inverses, 1 - error / total, strict=True))
        values.add("stitch_r2", r2, weight=total, **about, **between(target, pair))
    if not shuffle:
        _add_slopes(values, target, lost, total, list(inverses), about)


def _add_slopes(
    values: Values, target: Target, errors: Mapping[Pair, np.ndarray], total: np.ndarray, seeds: list[int], about: Any
) -> None:
    """errors: {pair: (S, N)}, floored; total: (N,) of the mean image."""
    ends = {whole_stack(target, stack)[place] for stack in stacks(target) for place in (0, -1)}
    readable = {i for i, j in errors if i == j and errors[i, i].sum() < total.sum() * len(seeds)}
    for endpoints, taps in {"with": readable, "without": readable - ends}.items():
        pairs = [pair for pair in errors if pair[0] != pair[1] and {*pair} <= taps]
        if not pairs:
            continue
        apart = [between(target, pair)["relative"] for pair in pairs]
        above = sum(d * (errors[i, j] - errors[i, i]) for d, (i, j) in zip(apart, pairs, strict=True))
        below = sum(d * d * (total - errors[i, i]) for d, (i, _) in zip(apart, pairs, strict=True))
        scales = {"stitch_slope": below, "stitch_slope_r2": np.square(apart).sum() * total + 0 * below}
        for measure, scale in scales.items():
            slopes = {
                s: influence(partial(_ratio, a, b), len(total)) for s, a, b in zip(seeds, above, scale, strict=True)
            }
            values.add(measure, slopes, **about, endpoints=endpoints, pairs=len(pairs))


def _ratio(above: np.ndarray, below: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ above / (weights @ below)


@torch.no_grad()
def add_predictability(
    values: Values, target: Target, images: Any, maps: Maps, inverse: str = "linear", seed: int = 0
) -> None:
    """Add predictability_r2: how much of tap j the map from tap i says, over all values of the tap.

    R² is 1 − squared error / that of the training mean. inverse: "linear", or the name of a null as of `add_stitching`.
    """
    known = next(iter(maps.values()))
    errors: dict[Pair, list[Tensor]] = {pair: [] for pair in known}
    for _, recorded, given in _recordings(target, images, known, inverse == "null_shuffled", seed):
        for i, j in known:
            of_seeds = [torch.stack(image_errors(of_seed[i, j], given[i], recorded[j])) for of_seed in maps.values()]
            errors[i, j].append(torch.stack(of_seeds))
    for pair, parts in errors.items():
        for train_seed, (error, total) in zip(maps, torch.cat(parts, dim=2).double(), strict=True):
            if total.sum() > 0:
                about: dict[str, Any] = {"inverse": inverse, "family": "linear", **between(target, pair)}
                values.add("predictability_r2", {train_seed: 1 - error / total}, weight=total, **about)


@torch.no_grad()
def cross_pictures(
    target: Target, images: Tensor, inverses: Mapping[str, Reconstruct], maps: Mapping[Pair, Any] | None = None
) -> dict[Pair, Tensor]:
    """{(i, j): (B, 3, H, W)}: what the inverse made for tap j makes of tap i, raw or put into its words by `maps`.

    Raw it reads only taps of its own form.
    """
    pairs = [(tap, tap) for tap in inverses] + [pair for pair in stack_pairs(target) if {*pair} <= {*inverses}]
    recorded = target.record(images.to(target.device), [tap for tap in target.available_taps if tap in inverses])
    pictures = {}
    for i, j in pairs:
        given = recorded[i] if i == j or maps is None else maps[i, j](recorded[i])
        if given.form == recorded[j].form:
            pictures[i, j] = inverses[j](recorded[j].replace(given.values)).clamp(0, 1).cpu()
    return pictures
