"""What one layer says in the words of another: every representation through every inverse of the same form.

    representation of tap i ──► inverse made for tap j ──► images       PSNR matrix, loss by |i - j|, decay slope

Beside it: how alike the layers are (similarity.py), and how well tap j follows linearly from tap i (linear.py).
All functions return tidy rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
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
from backsight.tables.pool import bootstrap_statistic, metrics_row, pooled_ratio, pooled_rows
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


def cross_rows(
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
    columns: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Tidy rows of the cross-application of every family, with its nulls.

    families, untrained: of `families_by_seed` and `untrained_by_seed`; mean_image: (3, H, W) of the training images;
    moments: of `tap_moments`; distance: the largest layer distance that the slopes use, so that targets of other
    depths are compared over the same distances; trained_images: families other than that of the nulls are crossed on
    the first so many images, since a chain takes far longer than a linear map. Measures: cross_psnr and
    cross_psnr_standardised (each pair), cross_loss and cross_loss_standardised (each group and distance), and for each
    group decay_slope, decay_slope_standardised and decay_slope_share (see SLOPES). The nulls are of the
    linear family where it is there: null_shuffled, null_untrained; null_mean at every tap.
    """
    columns = dict(columns or {})
    names = list(next(iter(families.values())))
    reference = "linear" if "linear" in names else names[0]
    of_reference = {s: each[reference] for s, each in families.items()}
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    tables: list[tuple[str, str, Scores, bool]] = []
    for family in names:
        of_family = {s: each[family] for s, each in families.items()}
        judged = images if family == reference or trained_images is None else tensor(images, trained_images)
        tables.append((family, family, cross_application(target, judged, of_family, **options), False))
    scaled = cross_application(target, images, of_reference, feed="standardised", moments=moments, **options)
    tables.append((reference, reference, scaled, True))
    other = cross_application(target, images, of_reference, feed="shuffled", **options)
    tables.append(("null_shuffled", reference, other, False))
    if all(reference in each for _, each in untrained.values()):
        parts = [
            cross_application(null, images, {s: each[reference]}, **options) for s, (null, each) in untrained.items()
        ]
        null_scores = {pair: np.concatenate([part[pair] for part in parts]) for pair in parts[0]}
        tables.append(("null_untrained", reference, null_scores, False))
    flat = torch.cat([psnr(batch, mean_image.expand_as(batch)) for batch in batches(images, batch_size)])
    floor = flat.double().numpy()[None]
    rows = []
    for inverse, family, scores, standardised in tables:
        common = columns | {"inverse": inverse, "family": family}
        rows += _pair_rows(target, scores, f"cross_psnr{'_standardised' * standardised}", seed, common)
        if inverse != "null_shuffled":
            of_images = floor[:, : next(iter(scores.values())).shape[1]]
            rows += _decay_rows(target, scores, of_images, distance, standardised, seed, common)
    for tap in dict.fromkeys(source for source, _ in tables[0][2]):
        common = columns | {"inverse": "null_mean", "family": "", **placed(target, (tap, tap))}
        rows += pooled_rows(floor, "cross_psnr", seed, **common)
    return rows


def _pair_rows(
    target: Target, scores: Scores, measure: str, seed: int, columns: Mapping[str, Any], component: Component = "block"
) -> list[dict[str, Any]]:
    return [
        row
        for pair, values in scores.items()
        for row in pooled_rows(values, measure, seed, **{**columns, **placed(target, pair, component)})
    ]


def _decay_rows(
    target: Target,
    scores: Scores,
    floor: np.ndarray,
    largest: int,
    standardised: bool,
    seed: int,
    columns: Mapping[str, Any],
) -> list[dict[str, Any]]:
    rows = []
    suffix = "_standardised" * standardised
    for group, distances in decay_pairs(target, scores).items():
        common = {**columns, "group": group, "component": "block"}
        for step in sorted(set(distances.values())):
            at = [loss(scores, pair) for pair, each in distances.items() if each == step]
            rows += pooled_rows(
                np.mean(at, axis=0), f"cross_loss{suffix}", seed, **common, distance=step, pairs=len(at)
            )
        near = {pair: each for pair, each in distances.items() if each <= largest}
        if not near:
            continue
        common |= {"distance": max(near.values()), "pairs": len(near)}
        slope = slope_through_origin([loss(scores, pair) for pair in near], list(near.values()))
        rows += pooled_rows(slope, f"decay_slope{suffix}", seed, **common)
        if not standardised:
            own = np.mean([scores[tap, tap] for tap in dict.fromkeys(i for i, _ in near)], axis=0)
            found = pooled_ratio(slope, own - floor, seed)
            rows.append(metrics_row("decay_slope_share", *found, slope.shape[1], seed, seeds=len(slope), **common))
    return rows


# ------------------------------------------------------------------------------------------------------- similarity


@torch.no_grad()
def similarity_rows(
    target: Target,
    images: Any,
    taps: Sequence[str],
    steps: Sequence[Step] = (),
    distance: int = 2,
    seed: int = 0,
    null: bool = False,
    batch_size: int = 50,
    columns: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Tidy rows of how alike the taps of a target are: cka, procrustes, token_cosine, residual_update, cka_slope.

    taps: of the matrices, every two that hold the same tokens or queries, both ways; steps: further pairs, next to
    each other (`half_steps`), with their component. null: the target is the untrained one (inverse="null_untrained");
    else inverse is "features", and beside cka and procrustes stand rows inverse="null_shuffled", where every image
    meets another one's tokens at the same places. No training seed is behind these numbers: seeds = 1.
    """
    columns = dict(columns or {})
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
            if recorded[step.before].signature == recorded[step.after].signature:
                update = residual_update(recorded[step.before], recorded[step.after])
                updates.setdefault(step, []).append(update.cpu())
    inverse = "null_untrained" if null else "features"
    common = columns | {"family": "", "inverse": inverse}
    rows = []
    for i, j, component in wanted:
        if (i, j) in cosines:
            values = torch.cat(cosines[i, j])[None]
            rows += _both_ways(target, (i, j), component, pooled_rows(values, "token_cosine", seed, **common)[0])
    for step, parts in updates.items():
        at = placed(target, (step.before, step.after), step.component)
        at |= {"tap": step.after, "depth": target.depth(step.after)}
        rows += pooled_rows(torch.cat(parts)[None], "residual_update", seed, **(common | at))
    features = sample.minibatches()
    shown = {inverse: None} if null else {inverse: None, "null_shuffled": sample.images_in_minibatch()}
    for name, moved in shown.items():
        common = columns | {"family": "", "inverse": name, "seeds": 1}
        for members in _aligned_sets(first, wanted):
            rows += _similar_rows(target, features, members, wanted, moved, sample.count, seed, common)
    rows += _cka_slope_rows(target, features, first, taps, distance, sample.count, seed, columns, inverse)
    return rows


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


def _cka_matrix(features: Sequence[Tensor], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(value, low, high), each (T, T): CKA of every two layers with its 95 % bootstrap interval over minibatches."""
    products = cka_products(features)
    low, high = bootstrap_statistic(lambda drawn: cka_from_products(products[drawn]), len(products), seed)
    return cka_from_products(products), low, high


def _similar_rows(
    target: Target,
    features: Mapping[str, Tensor],
    members: Sequence[str],
    wanted: Sequence[tuple[str, str, Component]],
    moved: int | None,
    count: int,
    seed: int,
    columns: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """cka and procrustes of the pairs within one set of aligned taps; moved: images in a minibatch to shuffle."""
    place = {tap: number for number, tap in enumerate(members)}
    pairs = [(i, j, component) for i, j, component in wanted if i in place and j in place]
    own = [features[tap] for tap in members]
    given = own if moved is None else [*own, *(shuffled_rows(each, moved) for each in own)]
    shift = 0 if moved is None else len(own)
    numbers = [(place[i], place[j] + shift) for i, j, _ in pairs]
    alike = [np.array([each[pair] for pair in numbers]) for each in _cka_matrix(given, seed)]
    rotated = procrustes_pairs(given, numbers)
    rows = []
    for measure, (value, low, high) in (("cka", alike), ("procrustes", rotated)):
        for number, (i, j, component) in enumerate(pairs):
            found = float(value[number]), float(low[number]), float(high[number])
            row = metrics_row(measure, *found, count, seed, **columns)
            rows += _both_ways(target, (i, j), component, row)
    return rows


def _both_ways(target: Target, pair: Pair, component: Component, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A symmetric measure's row for (i, j) and, in a matrix of blocks, for (j, i)."""
    ways = [pair, pair[::-1]] if component == "block" else [pair]
    return [{**row, **placed(target, way, component)} for way in ways]


def _cka_slope_rows(
    target: Target,
    features: Mapping[str, Tensor],
    recorded: Mapping[str, Representation],
    taps: Sequence[str],
    largest: int,
    count: int,
    seed: int,
    columns: Mapping[str, Any],
    inverse: str,
) -> list[dict[str, Any]]:
    rows = []
    pairs = aligned_pairs(_only(recorded, taps))
    for group, distances in decay_pairs(target, pairs).items():
        near = {pair: each for pair, each in distances.items() if each <= largest}
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

        def slope(drawn: np.ndarray, products: Any = products, places: Any = places, steps: Any = steps) -> Any:
            found = [cka_from_products(each[drawn]) for each in products]
            return slope_through_origin([1 - found[number][i, j] for number, i, j in places], steps)

        minibatches = len(products[0])  # minibatches, as many at every grid
        low, high = bootstrap_statistic(slope, minibatches, seed)
        value = float(slope(np.arange(minibatches)))
        common = {**columns, "family": "", "inverse": inverse, "group": group, "component": "block", "seeds": 1}
        common |= {"distance": max(steps), "pairs": len(near)}
        rows.append(metrics_row("cka_slope", value, low, high, count, seed, **common))
    return rows


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


def predictability_rows(
    target: Target,
    errors: Mapping[Pair, tuple[np.ndarray, np.ndarray]],
    inverse: str = "linear",
    taps: Sequence[str] = (),
    steps: Sequence[Step] = (),
    distance: int = 2,
    seed: int = 0,
    columns: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Tidy rows of `prediction_errors`: predictability_r2 of pairs and steps, and r2_slope of each group.

    R² is 1 minus the squared error over that of the training mean, over all values of the tap. inverse: "linear" or
    the name of a null.
    """
    common = {**(columns or {}), "inverse": inverse, "family": "linear"}
    rows = []
    components: list[tuple[Pair, Component]] = [(pair, "block") for pair in errors if set(pair) <= set(taps)]
    half = [step for step in steps if step.component != "block"]
    components += [((s.before, s.after), s.component) for s in half if (s.before, s.after) in errors]
    for pair, component in components:
        error, total = errors[pair]
        unexplained, low, high = pooled_ratio(error, total, seed)
        row = metrics_row("predictability_r2", 1 - unexplained, 1 - high, 1 - low, error.shape[1], seed)
        rows.append(row | common | {"seeds": len(error)} | placed(target, pair, component))
    if inverse == "null_shuffled":
        return rows
    for group, distances in decay_pairs(target, [pair for pair in errors if set(pair) <= set(taps)]).items():
        near = {p: each for p, each in distances.items() if each <= distance and errors[p][1].sum() > 0}
        if not near:
            continue
        # A weighted sum of ratios as one ratio: every pair's errors in units of its own mean total.
        scales = [errors[pair][1].mean() for pair in near]
        steps_apart = list(near.values())
        above = [errors[pair][0] / scale for pair, scale in zip(near, scales, strict=True)]
        below = [errors[pair][1] / scale for pair, scale in zip(near, scales, strict=True)]
        weight = sum(steps_apart) / np.square(steps_apart).sum()
        found = pooled_ratio(
            slope_through_origin(above, steps_apart), slope_through_origin(below, steps_apart) / weight, seed
        )
        row = metrics_row("r2_slope", *found, above[0].shape[1], seed, seeds=len(above[0]), **common)
        rows.append(row | {"group": group, "component": "block", "distance": max(steps_apart), "pairs": len(near)})
    return rows


# ------------------------------------------------------------------------------------------------------- half-steps


def half_step_rows(
    target: Target,
    images: Any,
    inverses: Mapping[int, Mapping[str, Reconstruct]],
    steps: Sequence[Step],
    family: str = "linear",
    inverse: str | None = None,
    seed: int = 0,
    batch_size: int = 50,
    columns: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Tidy rows cross_psnr and step_loss of single half-steps: what one attention or MLP step changes for an inverse.

    inverses: {training seed: {tap: reconstruct}} of the half-steps' taps. cross_psnr: the representation after the
    step in the inverse made before it (source_tap after, target_tap before). step_loss: dB below its own inverse.
    Steps without both inverses are left out.
    """
    readable = [
        step
        for step in steps
        if inverses and all(step.before in each and step.after in each for each in inverses.values())
    ]
    if not readable:
        return []
    pairs = [(step.after, step.before) for step in readable]
    pairs += list(dict.fromkeys((step.after, step.after) for step in readable))
    scores = cross_application(target, images, inverses, pairs, seed=seed, batch_size=batch_size)
    rows = []
    for step in readable:
        pair = (step.after, step.before)
        common = {**(columns or {}), "inverse": inverse or family, "family": family}
        common |= placed(target, pair, step.component)
        rows += pooled_rows(scores[pair], "cross_psnr", seed, **common)
        rows += pooled_rows(loss(scores, pair), "step_loss", seed, **common)
    return rows


# ------------------------------------------------------------------------------------------------- what one expects


def check_cross_claims(metrics: pd.DataFrame) -> pd.DataFrame:
    """What one expects of this study, held against a run's numbers: claim, holds, share (of the cases it holds in).

    Only claims that the run can decide are listed.
    """
    rows = []

    def claim(text: str, cases: Any) -> None:
        cases = np.asarray(cases, bool)
        if cases.size:
            rows.append({"claim": text, "holds": bool(cases.all()), "share": float(cases.mean()), "cases": cases.size})

    matrix = metrics[(metrics["component"] == "block") & metrics["source_tap"].notna()]
    cross = matrix[(matrix["measure"] == "cross_psnr") & ~matrix["inverse"].str.startswith("null_")]
    for family, table in cross.groupby("inverse", sort=False):
        wide = table.pivot_table(index="source_tap", columns="target_tap", values="value", sort=False)
        own = table[table["source_tap"] == table["target_tap"]].set_index("source_tap")["value"]
        others = wide.apply(lambda row: row.drop(row.name).max(), axis=1).dropna()
        claim(f"{family}: its own inverse serves each representation best", own[others.index] >= others)
    losses = metrics[metrics["measure"] == "cross_loss"]
    for (inverse, group), table in losses.groupby(["inverse", "group"], sort=False):
        if len(table) > 1 and not str(inverse).startswith("null_"):
            ordered = table.sort_values("distance")
            claim(
                f"{inverse}, {group}: more is lost at the largest distance than at the smallest",
                [ordered["low"].iloc[-1] > ordered["high"].iloc[0]],
            )
    for measure, first in (("cka", "features"), ("procrustes", "features"), ("predictability_r2", "linear")):
        wide = matrix[matrix["measure"] == measure].pivot_table(
            index=["source_tap", "target_tap"], columns="inverse", values="value"
        )
        if {first, "null_shuffled"} <= set(wide):
            claim(f"{measure} is above that of shuffled features", wide[first] > wide["null_shuffled"])
    return pd.DataFrame(rows, columns=["claim", "holds", "share", "cases"])
