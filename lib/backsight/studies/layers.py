"""Which layers of a target are compared, and how alike they are as they stand: CKA, cosine of tokens, updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise, permutations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from backsight.data.images import batches, images_at_once
from backsight.errors import BacksightError
from backsight.inverses.linear import fit_linear_pairs, side_by_side
from backsight.measures.pixels import psnr
from backsight.measures.similarity import (
    TokenSample,
    cka_from_products,
    cka_products,
    residual_update,
    shuffled_rows,
    token_cosine,
)
from backsight.representation import Representation, Tokens
from backsight.tables.pooling import influence
from backsight.tables.values import Values
from backsight.targets import PIXELS, Target

Pair = tuple[str, str]
STACKS = ("blocks", "encoder", "decoder")
_IN_FRONT = {
    "patch_embedding": "blocks",
    "convolution": "blocks",
    "projection": "encoder",
}  # kinds of a stack's layer 0


class Step(NamedTuple):
    """Two taps next to each other in one stack, and what lies between: block, attention, cross_attention or mlp."""

    before: str
    after: str
    component: str


def stack_of(target: Target, tap: str) -> str:
    """ "blocks" (of a backbone), "encoder" or "decoder"; "" for what is no layer of a stack (backbone, norm, heads).

    The tap in front of the first layer (patch embedding, projection) belongs to the stack: it is the layer 0.
    """
    taps = target.available_taps
    place = taps.index(tap)
    kind = target.stage(tap, taps[place - 1] if place else PIXELS).kind
    return kind if kind in STACKS else _IN_FRONT.get(kind, "")


def stacks(target: Target) -> dict[str, list[str]]:
    """{stack: those of the target's taps that lie in it, shallow to deep}, for stacks with two of them or more.

    Raises BacksightError where there is none.
    """
    named: dict[str, list[str]] = {}
    for tap in target.taps:
        named.setdefault(stack_of(target, tap), []).append(tap)
    compared = {stack: members for stack, members in named.items() if stack and len(members) > 1}
    if not compared:
        raise BacksightError(f"{target.name} has no two of the taps {', '.join(target.taps)} in one stack of layers.")
    return compared


def stack_pairs(target: Target) -> list[Pair]:
    """Every two taps of one stack, both ways."""
    return [pair for members in stacks(target).values() for pair in permutations(members, 2)]


def whole_stack(target: Target, stack: str) -> list[str]:
    """All layers of a stack, whichever taps the target records."""
    return [tap for tap in target.tap_set("blocks") if stack_of(target, tap) == stack]


def between(target: Target, pair: Pair) -> dict[str, Any]:
    """The columns of a row about two taps of one stack.

    distance: layers between them; relative: as a share of the whole stack (0 at its first tap, 1 at its last),
    whichever of its taps were chosen.
    """
    source, end = pair
    depths = [target.depth(tap) for tap in whole_stack(target, stack_of(target, source))]
    distance = abs(target.depth(source) - target.depth(end))
    relative = distance / max(1, depths[-1] - depths[0])
    return {"tap": source, "source_tap": source, "target_tap": end, "distance": distance, "relative": relative}


def steps(target: Target) -> list[Step]:
    """Every layer of the target's taps as one step, and every attention, cross-attention and MLP step, forward.

    A half-step of a post-norm model (DETR) ends after its own layer norm; Swin has no taps between its half-steps.
    """
    whole = [Step(*pair, "block") for members in stacks(target).values() for pair in pairwise(members)]
    blocks, halves = set(target.tap_set("blocks")), []
    for before, after in pairwise(target.tap_set("fine")):
        known = {"attn": "attention", "cross_attn": "cross_attention"}
        component = known.get(after.rpartition(".")[2], "" if before in blocks else "mlp")
        if component and stack_of(target, before) == stack_of(target, after) != "":
            halves.append(Step(before, after, component))
    return whole + halves


@torch.no_grad()
def add_similarity(values: Values, target: Target, images: Any, null: bool = False, seed: int = 0) -> None:
    """Add cka and token_cosine of every two taps of a stack that hold the same tokens, and residual_update of `steps`.

    null: the target is the untrained one (inverse="null_untrained"); else inverse is "features", and beside cka stand
    values inverse="null_shuffled", where every image meets another one's tokens at the same places. No training seed
    is behind these numbers.
    """
    about: dict[str, Any] = {"family": "", "inverse": "null_untrained" if null else "features"}
    members = [tap for stack in stacks(target).values() for tap in stack]
    known = steps(target)
    named = {*members, *(tap for step in known for tap in (step.before, step.after))}
    sample, alike = TokenSample(seed=seed), [tap for tap in target.available_taps if tap in named]
    cosines: dict[Pair, list[Tensor]] = {}
    updates: dict[Step, list[Tensor]] = {}
    for batch in batches(images, images_at_once(images)):
        recorded = target.record(batch.to(target.device), alike)
        sample.add({tap: recorded[tap] for tap in members})
        sets = _same_tokens(target, recorded, members)
        for i, j in (pair for taps in sets for pair in combinations(taps, 2)):
            if recorded[i].values.shape == recorded[j].values.shape:
                cosines.setdefault((i, j), []).append(token_cosine(recorded[i], recorded[j]).cpu())
        for step in known:
            if recorded[step.before].form == recorded[step.after].form:
                update = residual_update(recorded[step.before], recorded[step.after])
                updates.setdefault(step, []).append(update.cpu())
    for pair, parts in cosines.items():
        for way in (pair, pair[::-1]):
            values.add("token_cosine", torch.cat(parts), **about, **between(target, way))
    for step, parts in updates.items():
        values.add("residual_update", torch.cat(parts), step.after, component=step.component, **about)
    features, size = sample.minibatches(), sample.images_in_minibatch()
    for taps in sets:
        own = [features[tap] for tap in taps]
        for inverse in (about["inverse"],) if null else (about["inverse"], "null_shuffled"):
            other = [shuffled_rows(rows, size) for rows in own] if inverse == "null_shuffled" else []
            of_images, minibatch = cka_of_images([*own, *other], size)
            for first, second in combinations(range(len(taps)), 2):
                for way in ((taps[first], taps[second]), (taps[second], taps[first])):
                    place: dict[str, Any] = {**about, "inverse": inverse, **between(target, way)}
                    values.add("cka", of_images[:, first, len(other) + second], clusters=minibatch, **place)


def cka_of_images(features: Sequence[Any], size: int) -> tuple[np.ndarray, np.ndarray]:
    """((N, K, K), (N,)) what every image contributes to the CKA of K features, in minibatches of `size` images, and
    which minibatch it is in. features: of `TokenSample.minibatches`."""
    products = cka_products(features)

    def cka(weights: np.ndarray) -> np.ndarray:
        return np.stack([cka_from_products(products[kept > 0]) for kept in weights])

    return np.repeat(influence(cka, len(products)), size, axis=0), np.repeat(np.arange(len(products)), size)


@torch.no_grad()
def add_marginal_gain(
    values: Values,
    target: Target,
    images: Mapping[int, Any],
    judged: Any,
    taps: Sequence[str],
    validation: Any = None,
) -> None:
    """Add what every tap but the deepest says beside all deeper ones of these taps, which lie on one grid.

    psnr_together of the linear inverse that reads the tap together with the deeper ones (inverse="linear_with"), and of
    them alone ("linear_deeper"): their paired difference is the tap's gain. images: {training seed: those to fit on};
    validation: of the fit; judged: the images of `values`. Raises BacksightError on taps of different grids.
    """
    names = ["+".join(taps[place:]) for place in range(len(taps))]
    scores: dict[str, dict[int, Tensor]] = {name: {} for name in names}
    for s, sample in images.items():
        pairs = [(name, PIXELS) for name in names]
        fitted = fit_linear_pairs(target, sample, pairs, validation, seed=s, progress=False)
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for batch in batches(judged, images_at_once(judged)):
            recorded = target.record(batch.to(target.device), taps)
            for name, pair in zip(names, pairs, strict=True):
                parts[name].append(psnr(batch.cpu(), fitted[pair](side_by_side(recorded, name)).cpu()))
        for name, of in parts.items():
            scores[name][s] = torch.cat(of)
    for tap, with_tap, deeper in zip(taps, names, names[1:], strict=False):
        for inverse, name in (("linear_with", with_tap), ("linear_deeper", deeper)):
            values.add("psnr_together", scores[name], tap, inverse, family="linear")


def _same_tokens(target: Target, recorded: dict[str, Representation], taps: Sequence[str]) -> list[list[str]]:
    """Taps of one stack that hold the same tokens (on the same grids), or as many queries, one list each."""
    sets: dict[Any, list[str]] = {}
    for tap in taps:
        held: Any = recorded[tap]
        place = (held.grids, held.prefix) if isinstance(held, Tokens) else held.values.shape[1]
        sets.setdefault((stack_of(target, tap), place), []).append(tap)
    return [members for members in sets.values() if len(members) > 1]
