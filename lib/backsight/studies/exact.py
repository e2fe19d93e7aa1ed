"""How far exact inversion reaches, half-step by half-step, and what it meets on the way.

    where_exactness_ends   how far back each tap is exact, and what ends it           (no solving: the walk alone)
    measure_half_steps     every half-step alone, from the true y: back, another root, not solved
    measure_chain          from a tap to the embedding: the fate of every image, and where it was lost first
    measure_exactness      these, and the second roots of `second_roots`, for trained and for untrained weights

An image is back where its error is at most `RIGHT`. Everything else is one of three: it met another exact root of a
half-step, a half-step was not solved, or its error grew (by bad conditioning, or by what a norm takes). The four shares
sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, batches, open_images
from backsight.errors import BacksightError, nearest
from backsight.exact.inverse import ExactInverse, fit_exact
from backsight.exact.solver import Settings
from backsight.exact.steps import ExactModel, NotInvertibleError, walk
from backsight.inverses.families import Reconstruct
from backsight.representation import Tokens
from backsight.studies.roots import Case, RootChoosing, judged
from backsight.studies.second_roots import (
    SecondRoots,
    find_roots,
    foldable_steps,
    root_rows,
    second_root_pictures,
)
from backsight.studies.tidy_rows import TidyRows
from backsight.tables.names import ANOTHER_ROOT, BACK, ERROR_GROWN, EXACT, FATES, RIGHT, UNSOLVED
from backsight.targets.base import PIXELS, Target

COLUMNS = ("step", "to", "seeds")
ALONE = Settings(restarts=0, newton=20)


# ------------------------------------------------------------------------------------------- where exactness ends


def where_exactness_ends(target: Target, taps: Sequence[str] | str | None = None) -> pd.DataFrame:
    """How far back exactness reaches from each tap (default: the target's), and what ends it; nothing is solved.

    A row a tap: target, weights, tap, depth, exact_to (tap; "pixels" where nothing is lost; "" where not one step back
    is exact), half_steps, and what ends it: ends_at and before (tap and what lies before it), dimension_in and
    dimension_out (values an image before and behind, NaN where a tap has no fixed number), reason. Norms on the way
    that take the mean of every token leave what lies behind exact up to that: norms, means_lost (values an image).
    """
    model = walk(target)
    rows = []
    for tap in target.taps if taps is None else target.resolve_taps(taps):
        try:
            inverse = ExactInverse(model, tap)
            end, steps, reached = inverse.lost, inverse.steps, inverse.reached
        except NotInvertibleError as error:
            end, steps, reached = error, (), ""
        norms = {step.destination: step.norm for step in steps if step.norm is not None and step.lossy}
        rows.append(
            {
                "target": target.name,
                "weights": target.weights,
                "tap": tap,
                "depth": target.depth(tap),
                "exact_to": reached if end else PIXELS,
                "half_steps": len(steps),
                "ends_at": end.tap if end else None,
                "before": end.previous if end else None,
                "dimension_in": end.dimension_in if end else math.nan,
                "dimension_out": end.dimension_out if end else math.nan,
                "reason": _why(target, end, model.embedding is not None) if end else "",
                "norms": ", ".join(norms),
                "means_lost": sum(model.sizes[tap] // norm.module.normalized_shape[0] for norm in norms.values()),
            }
        )
    return pd.DataFrame(rows)


def _why(target: Target, end: NotInvertibleError, affine: bool) -> str:
    """The reason, with what the walk alone does not know: what a tap holds."""
    if end.previous == PIXELS and not affine:
        return "what lies between the pixels and the first tap is no affine map of patches, and is not inverted"
    weights = next(target.model.parameters())
    image = torch.zeros(1, len(target.preprocessing.mean), *target.image_size).to(weights)
    if not isinstance(target.record(image, [end.tap])[end.tap], Tokens):
        return f"{end.tap} holds no tokens of the image, but what was read from them ({end.reason})"
    return end.reason


# ------------------------------------------------------------------------------------------------------- half-steps


def measure_half_steps(
    cases: Sequence[Case],
    settings: Settings = ALONE,
    *,
    dataset: str = "scenes",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Every half-step by itself, from the true stream behind it. Tidy rows, `step` its end and `to` its beginning.

    cases: of one architecture and the same images, by seed of the weights. Where a block has no tap between its halves,
    both together. Measures: back, another_root, unsolved, error_grown (shares of images, sum 1); tokens_right; error
    (median); seconds (an image, of solving alone).
    """
    rows = TidyRows.about(cases[0].inverse.model.target, dataset, "test", seed)
    everyone = torch.arange(cases[0].count)
    for tap, before in tqdm(_spans(cases[0].inverse), desc="half-steps", leave=False, disable=not progress):
        back = [_taken_back(one.inverse.at(tap, settings), one.streams[tap], one, everyone, before) for one in cases]
        _add_outcomes(rows, [outcomes_of(table) for table, _ in back], tap, step=tap, to=before)
    return rows.table(*COLUMNS)


def _spans(inverse: ExactInverse) -> list[tuple[str, str]]:
    """(tap, tap before it), from the last to the first: one half-step each, where every stream is a tap."""
    places = inverse.model.taps
    inside = [tap for tap in places if places[inverse.reached] <= places[tap] <= places[inverse.source]]
    return [(later, earlier) for earlier, later in pairwise(sorted(inside, key=places.__getitem__))][::-1]


def _taken_back(
    inverse: ExactInverse, tokens: Tokens, case: Case, images: Tensor, to: str
) -> tuple[pd.DataFrame, Tensor]:
    """(`judged` rows with the column image, values at `to`) of tokens of these images (numbers) of a case."""
    tables, values = [], []
    for part in torch.arange(len(images)).split(inverse.batch_size):
        truth = {name: stream.index(images[part]) for name, stream in case.streams.items()}
        here = tokens.index(part)
        trace = inverse.trace(here, to)
        table = judged(inverse, trace, here, truth)
        tables.append(table.assign(image=images[part].numpy()[table["sample"].to_numpy()]))
        values.append(trace.values)
    return pd.concat(tables, ignore_index=True), torch.cat(values)


def outcomes_of(table: pd.DataFrame) -> pd.DataFrame:
    """A row an image: its fate, where it was lost first (lost_at), the last error, and the seconds of all steps.

    table: rows of one image and step, the steps of an image in the order in which they were solved.
    """
    rows = []
    for image, steps in table.groupby("image", sort=True):
        error = steps["error"].to_numpy()
        fate, lost_at = BACK, None
        # NaN is no error that is small.
        if not error[-1] <= RIGHT:
            lost = steps.iloc[int(np.argmax(~(error <= RIGHT)))]
            fate = ANOTHER_ROOT if lost["another_root"] else UNSOLVED if not lost["solved"] else ERROR_GROWN
            lost_at = lost["step"]
        last = {"error": error[-1], "right_tokens": steps["right_tokens"].iloc[-1]}
        rows.append({"image": image, "fate": fate, "lost_at": lost_at, **last, "seconds": steps["seconds"].sum()})
    return pd.DataFrame(rows)


def _column(outcomes: Sequence[pd.DataFrame], name: str) -> np.ndarray:
    """(S, N)"""
    return np.stack([table[name].to_numpy(float) for table in outcomes])


def _fate(outcomes: Sequence[pd.DataFrame], fate: str) -> np.ndarray:
    return np.stack([(table["fate"] == fate).to_numpy(float) for table in outcomes])


def _add_outcomes(rows: TidyRows, outcomes: Sequence[pd.DataFrame], tap: str, **columns: Any) -> None:
    for fate in FATES:
        rows.share(_fate(outcomes, fate), fate, tap, EXACT, **columns)
    rows.pooled(_column(outcomes, "right_tokens"), "tokens_right", tap, EXACT, **columns)
    rows.median(_column(outcomes, "error"), "error", tap, EXACT, **columns)
    rows.pooled(_column(outcomes, "seconds"), "seconds", tap, EXACT, **columns)


# -------------------------------------------------------------------------------------------------------- the chain


def follow_chain(case: Case, settings: Settings | None = None, progress: bool = True) -> pd.DataFrame:
    """The way of every image from the tap of the inverse to where exactness ends: a row an image and step (`judged`).

    An image is followed, tap by tap, as long as it is right.
    """
    one = case.inverse.at(case.inverse.source, settings)
    alive, streams = torch.arange(case.count), case.streams[one.source]
    tables = []
    for tap, before in tqdm(_spans(one), desc="chain", leave=False, disable=not progress):
        if not len(alive):
            break
        table, values = _taken_back(one.at(tap), streams, case, alive, before)
        tables.append(table)
        right = torch.tensor((table.groupby("image")["error"].last() <= RIGHT).to_numpy())
        alive = alive[right]
        streams = case.streams[before].index(alive).replace(values[right])
    return pd.concat(tables, ignore_index=True)


def measure_chain(
    cases: Sequence[Case],
    settings: Settings | None = None,
    *,
    dataset: str = "scenes",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """The chain in tidy rows, see `follow_chain`.

    Without a step, of the whole way: the measures of `measure_half_steps`. With a step: survived (share still right
    behind it), lost_another_root, lost_unsolved, lost_error_grown (share lost first here).
    """
    first = cases[0].inverse
    outcomes = [outcomes_of(follow_chain(case, settings, progress)) for case in cases]
    rows, tap = TidyRows.about(first.model.target, dataset, "test", seed), first.source
    _add_outcomes(rows, outcomes, tap)
    order = {step.destination: number for number, step in enumerate(first.steps[::-1])}
    places = np.stack([table["lost_at"].map(order).fillna(len(order)).to_numpy() for table in outcomes])
    for step in first.steps[::-1]:
        number, where = order[step.destination], {"step": step.destination, "to": step.source}
        rows.share((places > number).astype(float), "survived", tap, EXACT, **where)
        for fate in FATES[1:]:
            rows.share((places == number) * _fate(outcomes, fate), f"lost_{fate}", tap, EXACT, **where)
    return rows.table(*COLUMNS)


# -------------------------------------------------------------------------------------------------------- the study


def measure_exactness(
    target: Target,
    families: Mapping[str, Mapping[str, Reconstruct]],
    *,
    tap: str = "",
    root_steps: Sequence[str] | None = None,
    images: str = "scenes",
    trained_on: str = "scenes",
    n: int = 32,
    n_chain: int = 200,
    n_roots: int = 8,
    fit_images: int = 256,
    examples: int = 8,
    curves: int = 1,
    seeds: Sequence[int] = (0, 1, 2),
    seed: int = 0,
    progress: bool = True,
) -> tuple[pd.DataFrame, dict[str, SecondRoots]]:
    """Half-steps, chains, roots and second roots of one target, and of untrained weights of its architecture.

    Returns tidy rows (column `study`: "half_step", "chain", "roots", "second_root"), and pictures by half-step.
    families: reconstructions by family and tap, "linear" and "modular" of which are used; tap: where the chain starts,
    default the deepest whose way back loses nothing; root_steps: half-steps whose roots are looked for, by the stream
    behind them (default: all); n, n_chain, n_roots: test images of half-steps (and of all that is done with untrained
    weights), of the chain, and of roots; fit_images: of the closed-form starts; examples, curves: starts and rounds of
    curves of `find_roots`; seeds: of untrained weights, none: trained alone.
    """
    families = {name: taps for name, taps in families.items() if name in ("linear", "modular")}
    training = open_images(trained_on, "train", target, fit_images, seed)
    most = max(n, n_chain)
    pictures = next(batches(open_images(images, "test", target, most, seed), most))
    inverse = _fitted_inverse(target, tap, training, families.get("linear", {}), fit_images)
    steps = foldable_steps(inverse)
    if unknown := [step for step in root_steps or () if step not in steps]:
        raise BacksightError(f"There is no half-step on tokens {unknown[0]!r}; {nearest(unknown[0], steps)}.")
    every = Case.of(inverse, pictures)
    about: dict[str, Any] = {"dataset": images, "seed": seed, "progress": progress}
    tables = [("half_step", measure_half_steps([every.first(n)], **about))]
    tables.append(("chain", measure_chain([every.first(n_chain)], ALONE, **about)))
    second = {}
    few = every.first(min(n, n_roots))
    steps = [step for step in steps if root_steps is None or step in root_steps]
    for step in steps:
        roots = find_roots(few, step, examples, curves)
        tables.append(("roots", root_rows(target, [roots], images, seed)))
        if families and bool((roots.roots.count > 1).any()):
            second[step] = second_root_pictures(few, roots, pictures[: few.count], families, ALONE, **about)
            tables.append(("second_root", second[step].metrics))
    if seeds:
        drawn = [_fitted_inverse(target.untrained(k), inverse.source, training, {}, fit_images) for k in seeds]
        cases = [Case.of(one, pictures[:n]) for one in drawn]
        tables.append(("half_step", measure_half_steps(cases, **about)))
        tables.append(("chain", measure_chain(cases, ALONE, **about)))
        for step in steps:
            found = [find_roots(case.first(n_roots), step, examples, curves) for case in cases]
            tables.append(("roots", root_rows(drawn[0].model.target, found, images, seed)))
    return pd.concat([table.assign(study=study) for study, table in tables], ignore_index=True), second


def _fitted_inverse(
    target: Target, tap: str, training: ImageSource, completion: Mapping[str, Reconstruct], count: int
) -> ExactInverse:
    """Of the tap; "": of the deepest whose way back loses nothing, else of the deepest."""
    model = ExactModel.of(target)
    taps = [tap] if tap else [known for known in target.taps if model.taps.get(known) in model.steps]
    if not taps:
        raise BacksightError(f"{target.name} has no exact half-step: where_exactness_ends() says why.")
    modules = cast(Mapping[str, nn.Module], completion)
    inverses = fit_exact(target, training, taps=taps, linear=modules, count=count, progress=False)
    reaching: list[Any] = list(inverses.values())
    whole = [one for one in reaching if not any(step.lossy for step in one.steps)]
    return RootChoosing.of((whole or reaching)[-1])
