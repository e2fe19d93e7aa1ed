"""What one layer says in the words of another: every representation through every inverse of the same form.

    representation of tap i ──► inverse made for tap j ──► images       PSNR matrix, loss by |i - j|, decay slope

Beside it: how alike the layers are (similarity.py), and how well tap j follows linearly from tap i (linear.py).
All functions add to the `Values` of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backsight.data.images import batches, tensor
from backsight.inverses.families import Reconstruct
from backsight.inverses.linear import LinearInverse, fit_linear_pairs, image_errors
from backsight.measures.pixels import psnr
from backsight.measures.similarity import (
    TokenSample,
    cka_from_products,
    cka_products,
    procrustes_pairs,
    residual_update,
    shuffled_rows,
    token_cosine,
)
from backsight.representation import Representation
from backsight.studies.layers import (
    GROUPS,
    Component,
    Families,
    Moments,
    Pair,
    Scores,
    Step,
    aligned_pairs,
    cross_application,
    ends_of,
    layer_group,
    loss,
    no_single,
    place_of,
    placed,
    predictable_pairs,
    probe,
    shuffled_alike,
)
from backsight.tables.pooling import influence_of_groups
from backsight.tables.values import Values
from backsight.targets import Target

# ------------------------------------------------------------------------------------------------------------- decay


def decay_pairs(target: Target, pairs: Iterable[Pair]) -> dict[str, dict[Pair, float]]:
    """{group: {pair: layer distance |i - j|}} of the pairs of two different taps that lie in one group."""
    groups: dict[str, dict[Pair, float]] = {}
    for pair in pairs:
        group = layer_group(target, pair[0])
        if pair[0] != pair[1] and group and group == layer_group(target, pair[1]):
            groups.setdefault(group, {})[pair] = abs(target.depth(pair[0]) - target.depth(pair[1]))
    return {group: groups[group] for group in GROUPS if group in groups}


def slope_through_origin(losses: Sequence[Any], distances: Sequence[float]) -> Any:
    """Least-squares slope of losses (numbers, or arrays of one shape) over distances, through (0, 0).

    At distance 0 nothing is lost by definition, hence no intercept.
    """
    steps = np.asarray(distances, float)
    return np.tensordot(steps, np.asarray(losses, float), axes=1) / np.square(steps).sum()


def add_cross(
    values: Values,
    target: Target,
    images: Any,
    families: Families,
    untrained: Mapping[int, tuple[Target, Mapping[str, Mapping[str, Reconstruct]]]],
    mean_image: Tensor,
    moments: Moments,
    distance: int = 2,
    seed: int = 0,
    batch_size: int = 50,
    trained_images: int | None = None,
) -> None:
    """The cross-application of every family, with its nulls.

    families, untrained: of `families_by_seed` and `untrained_by_seed`; mean_image: (3, H, W) of the training images;
    moments: of `tap_moments`; distance: the largest layer distance that the slopes use, so that targets of other
    depths are compared over the same distances; trained_images: families other than that of the nulls are crossed on
    the first so many images, since a chain takes far longer than a linear map. Measures: cross_psnr and
    cross_psnr_standardised (each pair), cross_loss and cross_loss_standardised (each group and distance), and for each
    group decay_slope and decay_slope_standardised (see SLOPES). The nulls are of the linear family where it is there:
    null_shuffled, null_untrained; null_mean at every tap.
    """
    names = list(next(iter(families.values())))
    reference = "linear" if "linear" in names else names[0]
    of_reference = {s: of_seed[reference] for s, of_seed in families.items()}
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    tables: list[tuple[str, str, Scores, Sequence[int]]] = []
    for family in names:
        of_family = {s: of_seed[family] for s, of_seed in families.items()}
        judged = images if family == reference or trained_images is None else tensor(images, trained_images)
        tables.append((family, "", cross_application(target, judged, of_family, **options), list(families)))
    scaled = cross_application(target, images, of_reference, feed="standardised", moments=moments, **options)
    tables.append((reference, "_standardised", scaled, list(families)))
    other = cross_application(target, images, of_reference, feed="shuffled", **options)
    tables.append(("null_shuffled", "", other, list(families)))
    if untrained and all(reference in of_seed for _, of_seed in untrained.values()):
        parts = [
            cross_application(null, images, {s: of_seed[reference]}, **options)
            for s, (null, of_seed) in untrained.items()
        ]
        null_scores = {pair: np.concatenate([part[pair] for part in parts]) for pair in parts[0]}
        tables.append(("null_untrained", "", null_scores, list(untrained)))
    for inverse, suffix, scores, seeds in tables:
        about: dict[str, Any] = {"inverse": inverse, "family": reference if inverse.startswith("null_") else inverse}
        for pair, numbers in scores.items():
            by_seed = dict(zip(seeds, numbers, strict=True))
            values.add(f"cross_psnr{suffix}", by_seed, **about, **placed(target, pair))
        if inverse != "null_shuffled":
            _add_decay(values, target, scores, seeds, distance, suffix, about)
    flat = torch.cat([psnr(batch, mean_image.expand_as(batch)) for batch in batches(images, batch_size)])
    for tap in dict.fromkeys(source for source, _ in tables[0][2]):
        values.add("cross_psnr", flat, inverse="null_mean", family="", **placed(target, (tap, tap)))


def _add_decay(
    values: Values,
    target: Target,
    scores: Scores,
    seeds: Sequence[int],
    largest: int,
    suffix: str,
    about: Mapping[str, Any],
) -> None:
    """What each image loses with the distance, and its slope, in every group."""
    for group, distances in decay_pairs(target, scores).items():
        common: dict[str, Any] = {**about, "group": group, "component": "block"}
        for step in sorted(set(distances.values())):
            at = [loss(scores, pair) for pair, apart in distances.items() if apart == step]
            by_seed = dict(zip(seeds, np.mean(at, axis=0), strict=True))
            values.add(f"cross_loss{suffix}", by_seed, **common, distance=step, pairs=len(at))
        if near := {pair: apart for pair, apart in distances.items() if apart <= largest}:
            slope = slope_through_origin([loss(scores, pair) for pair in near], list(near.values()))
            by_seed = dict(zip(seeds, slope, strict=True))
            values.add(f"decay_slope{suffix}", by_seed, **common, distance=max(near.values()), pairs=len(near))


# ------------------------------------------------------------------------------------------------------- similarity


@torch.no_grad()
def add_similarity(
    values: Values,
    target: Target,
    images: Any,
    taps: Sequence[str],
    steps: Sequence[Step] = (),
    distance: int = 2,
    seed: int = 0,
    null: bool = False,
    batch_size: int = 50,
) -> None:
    """How alike the taps of a target are: cka, procrustes, token_cosine, residual_update, cka_slope.

    taps: of the matrices, every two that hold the same tokens or queries, both ways; steps: further pairs, next to
    each other (`half_steps`), with their component. null: the target is the untrained one (inverse="null_untrained");
    else inverse is "features", and beside cka and procrustes stand values inverse="null_shuffled", where every image
    meets another one's tokens at the same places. No training seed is behind these numbers.
    """
    named = ends_of(target, taps, steps)
    first = probe(target, images, named)
    components: dict[tuple[str, str], Component] = {pair: "block" for pair in aligned_pairs(_only(first, taps))}
    wanted = [(*pair, component) for pair, component in components.items()]
    wanted += [(step.before, step.after, step.component) for step in steps if step.component != "block"]
    sample = TokenSample(seed=seed)
    cosines: dict[Pair, list[Tensor]] = {}
    updates: dict[Step, list[Tensor]] = {}
    for batch in batches(images, batch_size):
        recorded = target.record(batch.to(target.device), named)
        sample.add(recorded)
        for i, j in dict.fromkeys((i, j) for i, j, _ in wanted):
            if recorded[i].values.shape == recorded[j].values.shape:
                cosines.setdefault((i, j), []).append(token_cosine(recorded[i], recorded[j]).cpu())
        for step in steps:
            if recorded[step.before].form == recorded[step.after].form:
                update = residual_update(recorded[step.before], recorded[step.after])
                updates.setdefault(step, []).append(update.cpu())
    about: dict[str, Any] = {"family": "", "inverse": "null_untrained" if null else "features"}
    for i, j, component in wanted:
        if (i, j) in cosines:
            for way in _ways((i, j), component):
                values.add("token_cosine", torch.cat(cosines[i, j]), **about, **placed(target, way, component))
    for step, parts in updates.items():
        at = placed(target, (step.before, step.after), step.component) | {"tap": step.after}
        values.add("residual_update", torch.cat(parts), **about, **at)
    features, size = sample.minibatches(), sample.images_in_minibatch()
    for name in (about["inverse"],) if null else (about["inverse"], "null_shuffled"):
        for members in _aligned_sets(first, wanted):
            own = [features[tap] for tap in members]
            if name == "null_shuffled":
                own += [shuffled_rows(minibatches, size) for minibatches in own]
            _add_similar(values, target, own, members, wanted, size, {"family": "", "inverse": name})
    _add_cka_slope(values, target, features, first, taps, distance, size, about)


def _only(recorded: Mapping[str, Representation], taps: Sequence[str]) -> dict[str, Representation]:
    return {tap: recorded[tap] for tap in recorded if tap in taps}


def _aligned_sets(recorded: Mapping[str, Representation], wanted: Sequence[tuple[str, str, Any]]) -> list[list[str]]:
    """The taps that hold the same tokens, as lists."""
    used = {tap for i, j, _ in wanted for tap in (i, j)}
    sets: dict[tuple[Any, ...], list[str]] = {}
    for tap, representation in recorded.items():
        if tap in used:
            sets.setdefault(place_of(representation), []).append(tap)
    return list(sets.values())


def _add_similar(
    values: Values,
    target: Target,
    features: Sequence[Tensor],
    members: Sequence[str],
    wanted: Sequence[tuple[str, str, Component]],
    size: int,
    about: Mapping[str, Any],
) -> None:
    """cka and procrustes of the pairs within one set of aligned taps; features: of the members, and behind them, for a
    null, the shuffled ones."""
    place = {tap: number for number, tap in enumerate(members)}
    pairs = [(i, j, component) for i, j, component in wanted if i in place and j in place]
    shift = len(features) - len(members)
    numbers = [(place[i], place[j] + shift) for i, j, _ in pairs]
    first, second = np.array(numbers).reshape(-1, 2).T
    products = cka_products(features)
    rotated, count = procrustes_pairs(features, numbers)
    for measure, (of_images, minibatch) in {
        "cka": influence_of_groups(lambda kept: cka_from_products(products[kept])[first, second], count, size),
        "procrustes": influence_of_groups(rotated, count, size),
    }.items():
        for number, (i, j, component) in enumerate(pairs):
            for way in _ways((i, j), component):
                at = placed(target, way, component)
                values.add(measure, of_images[:, number], clusters=minibatch, **about, **at)


def _ways(pair: Pair, component: Component) -> list[Pair]:
    """A symmetric measure is said of (i, j) and, in a matrix of blocks, of (j, i)."""
    return [pair, pair[::-1]] if component == "block" else [pair]


def _add_cka_slope(
    values: Values,
    target: Target,
    features: Mapping[str, Tensor],
    recorded: Mapping[str, Representation],
    taps: Sequence[str],
    largest: int,
    size: int,
    about: Mapping[str, Any],
) -> None:
    pairs = aligned_pairs(_only(recorded, taps))
    for group, distances in decay_pairs(target, pairs).items():
        near = {pair: apart for pair, apart in distances.items() if apart <= largest}
        if not near:
            continue
        sets = _aligned_sets(recorded, [(*pair, "block") for pair in near])
        products = [cka_products([features[tap] for tap in members]) for members in sets]
        places = [
            (number, members.index(i), members.index(j))
            for i, j in near
            for number, members in enumerate(sets)
            if i in members
        ]
        steps = list(near.values())

        def slope(kept: np.ndarray, products: Any = products, places: Any = places, steps: Any = steps) -> Any:
            alike = [cka_from_products(of_set[kept]) for of_set in products]
            return slope_through_origin([1 - alike[number][i, j] for number, i, j in places], steps)

        of_images, minibatch = influence_of_groups(slope, len(products[0]), size)  # as many minibatches at every grid
        common: dict[str, Any] = {**about, "group": group, "component": "block"}
        values.add("cka_slope", of_images, clusters=minibatch, **common, distance=max(steps), pairs=len(near))


# --------------------------------------------------------------------------------------------------- predictability


def fit_predictors(
    target: Target, images: Mapping[int, Any], taps: Sequence[str], steps: Sequence[Step] = ()
) -> dict[int, dict[Pair, LinearInverse]]:
    """{training seed: {(from, to): linear map}} between all taps where one is defined, in one pass a seed.

    images: {training seed: training images}; steps: further pairs, from before a step to after it.
    """
    named = ends_of(target, taps, steps)
    first = probe(target, next(iter(images.values())), named)
    possible = predictable_pairs(first)
    pairs = [pair for pair in possible if set(pair) <= set(taps)]
    pairs += [(step.before, step.after) for step in steps if (step.before, step.after) in possible]
    pairs = list(dict.fromkeys(pairs))
    return {s: fit_linear_pairs(target, each, pairs, seed=s, progress=False) for s, each in images.items()}


@torch.no_grad()
def prediction_errors(
    target: Target,
    images: Any,
    predictors: Mapping[int, Mapping[Pair, LinearInverse]],
    shuffle: bool = False,
    seed: int = 0,
    batch_size: int = 50,
) -> dict[Pair, tuple[np.ndarray, np.ndarray]]:
    """{(from, to): ((S, N) squared errors of an image, (S, N) those of the training mean)} on held-out images.

    shuffle: predict from another image's features, the null.
    """
    pairs = list(next(iter(predictors.values())))
    taps = list(dict.fromkeys(tap for pair in pairs for tap in pair))
    parts: dict[Pair, list[Tensor]] = {pair: [] for pair in pairs}
    generator = torch.Generator().manual_seed(seed)
    for batch in no_single(images, batch_size):
        recorded = target.record(batch.to(target.device), taps)
        state = generator.get_state()
        given: dict[str, Any] = dict(recorded)
        if shuffle:
            given = {tap: shuffled_alike(each, generator, state) for tap, each in recorded.items()}
        for i, j in pairs:
            errors = [torch.stack(image_errors(each[i, j], given[i], recorded[j])) for each in predictors.values()]
            parts[i, j].append(torch.stack(errors, dim=1))
    joined = {pair: torch.cat(each, dim=2).double().numpy() for pair, each in parts.items()}
    return {pair: (each[0], each[1]) for pair, each in joined.items()}


def add_predictability(
    values: Values,
    target: Target,
    errors: Mapping[Pair, tuple[np.ndarray, np.ndarray]],
    inverse: str = "linear",
    taps: Sequence[str] = (),
    steps: Sequence[Step] = (),
    distance: int = 2,
    seeds: Sequence[int] = (0,),
) -> None:
    """predictability_r2 of pairs and steps, and r2_slope of each group, from `prediction_errors`.

    R² is 1 minus the squared error over that of the training mean, over all values of the tap. inverse: "linear" or
    the name of a null; seeds: of the predictors.
    """
    about = {"inverse": inverse, "family": "linear"}
    components: list[tuple[Pair, Component]] = [(pair, "block") for pair in errors if set(pair) <= set(taps)]
    half = [step for step in steps if step.component != "block"]
    components += [((s.before, s.after), s.component) for s in half if (s.before, s.after) in errors]
    for pair, component in components:
        at = placed(target, pair, component)
        for seed, error, total in zip(seeds, *errors[pair], strict=True):
            if total.sum() > 0:
                values.add("predictability_r2", {seed: 1 - error / total}, weight=total, **about, **at)
    if inverse == "null_shuffled":
        return
    for group, distances in decay_pairs(target, [pair for pair in errors if set(pair) <= set(taps)]).items():
        near = {p: apart for p, apart in distances.items() if apart <= distance and errors[p][1].sum() > 0}
        if not near:
            continue
        # A weighted sum of ratios as one ratio: every pair's errors in units of its own mean total.
        apart = list(near.values())
        scaled = [np.stack(errors[pair]) / errors[pair][1].mean() for pair in near]
        above, below = slope_through_origin(scaled, apart)  # (S, N) each
        below = below / (sum(apart) / np.square(apart).sum())
        common: dict[str, Any] = {**about, "group": group, "component": "block", "distance": max(apart)}
        for seed, error, total in zip(seeds, above, below, strict=True):
            values.add("r2_slope", {seed: error / total}, weight=total, **common, pairs=len(near))


# ------------------------------------------------------------------------------------------------------- half-steps


def add_half_steps(
    values: Values,
    target: Target,
    images: Any,
    inverses: Mapping[int, Mapping[str, Reconstruct]],
    steps: Sequence[Step],
    seed: int = 0,
    batch_size: int = 50,
) -> None:
    """cross_psnr and step_loss of single half-steps: what one attention or MLP step changes for a linear inverse.

    inverses: {training seed: {tap: reconstruct}} of the half-steps' taps. cross_psnr: the representation after the
    step in the inverse made before it (source_tap after, target_tap before). step_loss: dB below its own inverse.
    Steps without both inverses are left out.
    """
    readable = [
        step
        for step in steps
        if inverses and all(step.before in of_seed and step.after in of_seed for of_seed in inverses.values())
    ]
    if not readable:
        return
    pairs = [(step.after, step.before) for step in readable]
    pairs += list(dict.fromkeys((step.after, step.after) for step in readable))
    scores = cross_application(target, images, inverses, pairs, seed=seed, batch_size=batch_size)
    for step in readable:
        pair = (step.after, step.before)
        at = {"inverse": "linear", "family": "linear", **placed(target, pair, step.component)}
        for measure, numbers in (("cross_psnr", scores[pair]), ("step_loss", loss(scores, pair))):
            values.add(measure, dict(zip(inverses, numbers, strict=True)), **at)
