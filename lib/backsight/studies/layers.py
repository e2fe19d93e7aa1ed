"""Layers held against layers: which pairs of taps are compared, and each representation through every inverse.

representation of tap i ──► inverse made for tap j ──► images
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from backsight.data.images import batches
from backsight.errors import BacksightError
from backsight.inverses.families import Reconstruct
from backsight.measures.pixels import psnr
from backsight.representation import Queries, Representation, Tokens
from backsight.studies.by_seed import families_by_seed, linear_family
from backsight.studies.nulls import shuffled
from backsight.targets import PIXELS, Target

Pair = tuple[str, str]
Feed = Literal["own", "standardised", "shuffled"]
Families = Mapping[int, Mapping[str, Mapping[str, Reconstruct]]]  # {training seed: {family: {tap: …}}}
Scores = dict[Pair, np.ndarray]  # (S, N) of every (source tap, target tap)
Moments = Mapping[str, tuple[Tensor, Tensor]]
Component = Literal["block", "attention", "cross_attention", "mlp"]

GROUPS = ("blocks", "encoder", "decoder")
_GROUP_OF_KIND = {
    "patch_embedding": "blocks",
    "blocks": "blocks",
    "convolution": "blocks",
    "projection": "encoder",
    "encoder": "encoder",
    "decoder": "decoder",
}


@dataclass(frozen=True)
class Step:
    """Two taps next to each other in one stream, and what lies between them."""

    before: str
    after: str
    component: Component


# -------------------------------------------------------------------------------------------- which taps, which pairs


def layer_group(target: Target, tap: str) -> str:
    """ "blocks" (of a backbone), "encoder" or "decoder"; "" for what is no layer of a stack (backbone, norm, heads).

    The tap in front of the first layer (patch embedding, projection) belongs to the stack: it is the layer 0.
    """
    taps = target.available_taps
    place = taps.index(tap)
    return _GROUP_OF_KIND.get(target.stage(tap, taps[place - 1] if place else PIXELS).kind, "")


def pairs_of_one_form(recorded: Mapping[str, Representation]) -> list[Pair]:
    """Every (source tap, target tap), the diagonal too, whose representations the same inverse can read."""
    return [(i, j) for i, one in recorded.items() for j, other in recorded.items() if one.form == other.form]


def aligned_pairs(recorded: Mapping[str, Representation]) -> list[Pair]:
    """Every two taps, the earlier first, that hold the same tokens (on the same grids) or the same queries."""
    return [
        (i, j)
        for place, (i, one) in enumerate(recorded.items())
        for j, other in list(recorded.items())[place + 1 :]
        if place_of(one) == place_of(other)
    ]


def place_of(representation: Representation) -> tuple[Any, ...]:
    if isinstance(representation, Tokens):
        return ("tokens", representation.grids, representation.prefix)
    return ("set", representation.values.shape[1])


def predictable_pairs(recorded: Mapping[str, Representation]) -> list[Pair]:
    """Every (from, to) of two taps between which a linear map reads token by token, or query by query."""

    def possible(one: Representation, other: Representation) -> bool:
        if isinstance(one, Tokens):
            return isinstance(other, Tokens)
        return isinstance(other, Queries) and one.values.shape[1] == other.values.shape[1]

    return [(i, j) for i, one in recorded.items() for j, other in recorded.items() if i != j and possible(one, other)]


def half_steps(target: Target) -> list[Step]:
    """The attention, cross-attention and MLP steps of every block, in forward order; [] where there are no such taps.

    A half-step of a post-norm model (DETR) ends after its own layer norm.
    """
    steps = []
    blocks = set(target.tap_set("blocks"))
    for before, after in pairwise(target.tap_set("fine")):
        suffix = after.rpartition(".")[2]
        component: Component | None = {"attn": "attention", "cross_attn": "cross_attention"}.get(suffix)  # type: ignore[assignment]
        if component is None and before not in blocks:
            component = "mlp"
        if component is not None and layer_group(target, before) == layer_group(target, after) != "":
            steps.append(Step(before, after, component))
    return steps


def block_steps(target: Target, taps: Sequence[str]) -> list[Step]:
    """Every layer as one step, between taps of one group that are next to each other among `taps`."""
    return [
        Step(before, after, "block")
        for before, after in pairwise(tap for tap in taps if tap in target.tap_set("blocks"))
        if layer_group(target, before) == layer_group(target, after) != ""
    ]


def steps_of_grids(target: Target, images: Any, steps: Sequence[Step]) -> list[Step]:
    """The steps between tokens on grids. A linear inverse of a whole set of queries takes seconds a tap to fit."""
    recorded = probe(target, images, ends) if (ends := ends_of(target, (), steps)) else {}
    return [
        step
        for step in steps
        if isinstance(one := recorded[step.before], Tokens) and one.form == recorded[step.after].form
    ]


def ends_of(target: Target, taps: Sequence[str], steps: Sequence[Step]) -> list[str]:
    """The taps, and those before and after the steps, in forward order."""
    named = {*taps, *(tap for step in steps for tap in (step.before, step.after))}
    return [tap for tap in target.available_taps if tap in named]


def inverses_by_seed(
    target: Target,
    steps: Sequence[Step],
    folder: str | Path = "",
    seeds: Sequence[int] = (0, 1, 2),
    count: int = 2000,
    trained_on: str = "scenes",
) -> tuple[Families, dict[int, dict[str, Reconstruct]]]:
    """The families at the target's taps (`families_by_seed`), and the linear inverses of the steps' ends, by seed.

    The latter are fitted here.
    """
    found = families_by_seed(target, folder, seeds, count, trained_on)
    ends = ends_of(target, (), steps)
    if not ends:
        return found, {}
    between = target.select(ends)
    return found, {seed: dict(linear_family(between, count, seed, trained_on)["linear"]) for seed in found}


def chosen_families(
    found: Families, names: Sequence[str], taps: Sequence[str]
) -> dict[int, dict[str, dict[str, Reconstruct]]]:
    """{seed: {family: {tap: reconstruct}}} of the families in `names` that are there, at these taps.

    Raises BacksightError where none of them is there.
    """
    there = list(next(iter(found.values())))
    if not set(there) & set(names):
        raise BacksightError(
            f"families = {list(names)}: these inverses are {', '.join(there)}; name at least one of them."
        )
    return {
        s: {name: {tap: each[name][tap] for tap in taps if tap in each[name]} for name in there if name in names}
        for s, each in found.items()
    }


def forms(pairs: Iterable[Pair]) -> list[list[str]]:
    """The taps of the pairs, one list for each set of taps that are crossed with each other; single taps left out."""
    sets: list[list[str]] = []
    for i, j in pairs:
        known = next((each for each in sets if i in each or j in each), None)
        if i != j and known is None:
            sets.append([i, j])
        elif i != j and known is not None:
            known += [tap for tap in (i, j) if tap not in known]
    return sets


def probe(target: Target, images: Any, taps: Sequence[str]) -> dict[str, Representation]:
    """The recording of one image, which says what form each tap has."""
    return target.record(next(iter(batches(images, 1))).to(target.device), taps)


# ------------------------------------------------------------------------------------------------ cross-application


@torch.no_grad()
def tap_moments(target: Target, images: Any, taps: Sequence[str], batch_size: int = 50) -> Moments:
    """{tap: (mean, standard deviation)}, each (P + 1, C): of every prefix token, then of all other tokens.

    images: training images; nothing that is judged may decide how features are scaled.
    """
    sums: dict[str, list[Tensor]] = {}
    for batch in batches(images, batch_size):
        for tap, representation in target.record(batch.to(target.device), taps).items():
            prefix = representation.prefix if isinstance(representation, Tokens) else 0
            values = representation.values.double()
            parts = [*values[:, :prefix].unbind(1), values[:, prefix:].flatten(0, 1)]
            found = [
                torch.stack([part.sum(0) for part in parts]),
                torch.stack([part.square().sum(0) for part in parts]),
                values.new_tensor([len(part) for part in parts])[:, None],
            ]
            sums[tap] = [a + b for a, b in zip(sums[tap], found, strict=True)] if tap in sums else found
    moments = {}
    for tap, (total, square, count) in sums.items():
        mean = total / count
        moments[tap] = (mean.float(), (square / count - mean.square()).clamp(min=0).sqrt().float())
    return moments


def translated(recorded: Mapping[str, Representation], pair: Pair, moments: Moments | None = None) -> Representation:
    """The values of tap i in the form of tap j (its positions, its padding), as the inverse of tap j reads them.

    moments: of `tap_moments`, to give each channel the mean and the spread it has at tap j, so that what is left is
    another code and not another scale. On the diagonal nothing is changed.
    Raises BacksightError where the two taps do not have one form.
    """
    source, wanted = recorded[pair[0]], recorded[pair[1]]
    if source.form != wanted.form:
        raise BacksightError(
            f"The inverse of {pair[1]!r} reads {wanted.form}, but {pair[0]!r} holds {source.form}: "
            "cross-application needs taps of one form."
        )
    if pair[0] == pair[1]:
        return source
    values = source.values
    if moments is not None:
        (mean, spread), (new_mean, new_spread) = (_spread_out(moments[tap], values) for tap in pair)
        scale = torch.where(spread > 0, new_spread / spread.clamp(min=1e-12), 0.0)
        values = (values - mean) * scale + new_mean
    return wanted.replace(values)


def _spread_out(moments: tuple[Tensor, Tensor], values: Tensor) -> tuple[Tensor, ...]:
    """(P + 1, C) as (P + N, C)."""
    prefix = len(moments[0]) - 1
    count = values.shape[1] - prefix
    return tuple(torch.cat([each[:prefix], each[prefix:].expand(count, -1)]).to(values) for each in moments)


@torch.no_grad()
def cross_application(
    target: Target,
    images: Any,
    inverses: Mapping[int, Mapping[str, Reconstruct]],
    pairs: Iterable[Pair] | None = None,
    feed: Feed = "own",
    moments: Moments | None = None,
    seed: int = 0,
    batch_size: int = 50,
) -> Scores:
    """PSNR (dB) of every image, from the representation of tap i through the inverse made for tap j.

    inverses: {training seed: {tap: reconstruct}}; pairs: (i, j), default all of one form whose inverse is there.
    feed: "own"; "standardised" (with `moments`, see `translated`); "shuffled": another image's representation, the
    null. Returns {pair: (S, N)}; on the diagonal "own" is the plain reconstruction.
    """
    if feed == "standardised" and moments is None:
        raise BacksightError("feed='standardised' needs the moments of the taps: give what tap_moments() returns.")
    taps = [tap for tap in target.available_taps if all(tap in each for each in inverses.values())]
    chosen = pairs_of_one_form(probe(target, images, taps)) if pairs is None else list(pairs)
    used = [tap for tap in target.available_taps if any(tap in pair for pair in chosen)]
    if not chosen:
        raise BacksightError(f"{target.name} has no two taps of one form with an inverse: choose other taps.")
    parts: dict[Pair, list[Tensor]] = {pair: [] for pair in chosen}
    generator = torch.Generator().manual_seed(seed)
    for batch in no_single(images, batch_size):
        batch = batch.to(target.device)
        recorded = target.record(batch, used)
        if feed == "shuffled":
            state = generator.get_state()
            recorded = {tap: shuffled_alike(each, generator, state) for tap, each in recorded.items()}
        for pair in chosen:
            given = translated(recorded, pair, moments if feed == "standardised" else None)
            made = [psnr(batch, inverses[s][pair[1]](given).clamp(0, 1)) for s in inverses]
            parts[pair].append(torch.stack(made).cpu())
    return {pair: torch.cat(each, dim=1).double().numpy() for pair, each in parts.items()}


def shuffled_alike(representation: Any, generator: torch.Generator, state: Tensor) -> Any:
    """Every tap gets the same permutation of the images."""
    generator.set_state(state)
    return shuffled(representation, generator)


def no_single(images: Any, batch_size: int) -> Iterator[Tensor]:
    """Batches; a last image alone joins the batch before it, since it could not be shuffled."""
    waiting: Tensor | None = None
    for batch in batches(images, batch_size):
        if waiting is not None and len(batch) == 1:
            waiting = torch.cat([waiting, batch])
            continue
        if waiting is not None:
            yield waiting
        waiting = batch
    if waiting is not None:
        yield waiting


def loss(scores: Mapping[Pair, np.ndarray], pair: Pair) -> np.ndarray:
    """What is lost because the inverse was made for another tap: PSNR of (i, i) minus PSNR of (i, j), in dB."""
    return scores[pair[0], pair[0]] - scores[pair]


def placed(target: Target, pair: Pair, component: Component = "block") -> dict[str, Any]:
    """The columns of a row about the representation of the first tap in the words of the second."""
    group = layer_group(target, pair[0])
    return {
        "tap": pair[0],
        "source_tap": pair[0],
        "target_tap": pair[1],
        "group": group if group == layer_group(target, pair[1]) else "",
        "distance": abs(target.depth(pair[0]) - target.depth(pair[1])),
        "component": component,
    }


def plain_psnr(
    target: Target, images: Any, inverses: Mapping[int, Mapping[str, Reconstruct]], batch_size: int = 50
) -> dict[str, float]:
    """{tap: mean PSNR (dB) over images and seeds} of the plain reconstruction, by no way but the inverse itself."""
    parts: dict[str, list[Tensor]] = {}
    for batch in no_single(images, batch_size):
        batch = batch.to(target.device)
        for of_seed in inverses.values():
            recorded = target.record(batch, [tap for tap in target.available_taps if tap in of_seed])
            for tap, representation in recorded.items():
                with torch.no_grad():
                    made = of_seed[tap](representation).clamp(0, 1)
                parts.setdefault(tap, []).append(psnr(batch, made).cpu())
    return {tap: float(torch.cat(each).double().mean()) for tap, each in parts.items()}


@torch.no_grad()
def cross_pictures(
    target: Target, images: Tensor, inverses: Mapping[str, Reconstruct], pairs: Iterable[Pair] | None = None
) -> dict[Pair, Tensor]:
    """{(i, j): (B, 3, H, W)}: what the inverse made for tap j makes of the representation of tap i."""
    recorded = target.record(images.to(target.device), [tap for tap in target.available_taps if tap in inverses])
    chosen = pairs_of_one_form(recorded) if pairs is None else pairs
    return {pair: inverses[pair[1]](translated(recorded, pair)).clamp(0, 1).cpu() for pair in chosen}
