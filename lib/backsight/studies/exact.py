"""Is the picture the only one behind a representation? How far exact inversion reaches, and what else it could find.

    where_exactness_ends   how far back each tap is exact, and what ends it           (no solving: the walk alone)
    measure_half_steps     every half-step alone, from the true y: back, another root, not solved
    measure_chain          from a tap to the embedding: the fate of every image, and where it was lost first
    measure_roots          the roots of half-steps on tokens, their distances, and which rule picks the right one
    second_root_pictures   the same y, another x: does it look different?
    measure_exactness      all of these, for trained and for untrained weights

An image is back where its error is at most `exact.RIGHT`. Everything else is one of three: it met another exact root
of a half-step, a half-step was not solved, or its error grew (by bad conditioning, or by what a norm takes). The four
shares sum to 1. Truth is recorded in float64 (`recorded_truth`): in float32, round-off alone makes wrong roots.

Intervals are over images, and over seeds of the weights where there are several: Wilson's for shares of images, widened
by the bootstrap over seeds; the bootstrap for the rest, in which an image's tokens are drawn together.
Source: Wilson, JASA 22, 1927.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import batches, open_images
from backsight.errors import BacksightError, nearest
from backsight.exact.inverse import ExactInverse, ExactModel, Trace, exact_inverses
from backsight.exact.solver import Settings
from backsight.exact.starts import measured_embedding
from backsight.exact.steps import Lost, NotInvertibleError, Step, walk
from backsight.inverses.families import Reconstruct
from backsight.inverses.module import Chain
from backsight.measures.pixels import psnr
from backsight.representation import Representation, Tokens
from backsight.studies.roots import (
    RootChoosing,
    Search,
    StepReport,
    TokenRoots,
    judged,
    polished,
    step_roots,
    table_of,
    token_map,
    token_signs,
    wilson_interval,
)
from backsight.tables.names import (
    ALL_TOKENS,
    ANOTHER_ROOT,
    BACK,
    ERROR_GROWN,
    FATES,
    ONE_TOKEN,
    RANDOM_MOVE,
    RIGHT,
    TRUE_STREAM,
    UNSOLVED,
)
from backsight.tables.pool import as_table, bootstrap_statistic, metrics_row, pooled_ratio
from backsight.targets.base import PIXELS, Target

__all__ = [
    "ALL_TOKENS",
    "FATES",
    "ONE_TOKEN",
    "RANDOM_MOVE",
    "TRUE_STREAM",
    "ChainRecord",
    "Exactness",
    "FoundRoots",
    "SecondRoots",
    "find_roots",
    "foldable_steps",
    "follow_chain",
    "measure_chain",
    "measure_exactness",
    "measure_half_steps",
    "measure_roots",
    "modular_guess",
    "recorded_truth",
    "second_root_pictures",
    "where_exactness_ends",
]

QUANTILES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
LARGEST = 1e9  # a relative error above this is no number that a median could use
USUAL_ROOT, NEAREST_TO_TRUTH = "most usual root", "root nearest to the truth"
EXTRA = ("step", "to", "rule", "quantile", "seeds")  # columns beside METRIC_COLUMNS
ALONE = Settings(restarts=0, newton=20)

Truth = Mapping[str, Representation]
Guess = Callable[[Tokens], Tensor]


# ------------------------------------------------------------------------------------------------------- intervals


def _share(measure: str, flags: Any, seed: int, of: Any = None, **columns: Any) -> dict[str, Any]:
    """A row of a share: flags, of: (S, N) numbers of hits and of trials an image (default 1 each)."""
    hits = as_table(flags)
    trials = np.ones_like(hits) if of is None else as_table(of)
    images = int((trials > 0).any(0).sum())
    value, low, high = pooled_ratio(hits, trials, seed)
    whole = of is None or value in (0.0, 1.0) or images == 1
    if images and whole:
        # A bootstrap of equal values has no length; an image counts once, however many seeds or tokens it has.
        wide = wilson_interval(value * images, images)
        low, high = (wide[0], wide[1]) if len(hits) == 1 else (min(low, wide[0]), max(high, wide[1]))
    return metrics_row(measure, value, low, high, images, seed, **{"seeds": len(hits), **columns})


def _mean(measure: str, values: Any, seed: int, **columns: Any) -> dict[str, Any]:
    """A row of a mean over (S, N) values; NaN: an image without one."""
    table = as_table(values)
    value, low, high = pooled_ratio(table, np.ones_like(table), seed)
    n = int((~np.isnan(table)).any(0).sum())
    return metrics_row(measure, value, low, high, n, seed, **{"seeds": len(table), **columns})


def _quantile(measure: str, values: Any, seed: int, quantile: float = 0.5, **columns: Any) -> dict[str, Any]:
    """A row of a quantile over (S, N) values, images drawn anew."""
    table = np.minimum(as_table(values), LARGEST)
    defined = ~np.isnan(table)
    if not defined.any():
        return metrics_row(measure, math.nan, math.nan, math.nan, 0, seed, **{"seeds": len(table), **columns})
    low, high = bootstrap_statistic(lambda drawn: _nanquantile(table[:, drawn], quantile), table.shape[1], seed)
    value, n = _nanquantile(table, quantile), int(defined.any(0).sum())
    return metrics_row(measure, value, low, high, n, seed, **{"seeds": len(table), **columns})


def _nanquantile(values: np.ndarray, quantile: float) -> float:
    known = values[~np.isnan(values)]
    return float(np.quantile(known, quantile)) if len(known) else math.nan


def _tidy(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    for column in EXTRA:
        if column not in table.columns:
            table[column] = None
    return table


# ------------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class _Case:
    """One set of weights: its inverse, and every stream on the way of its exact chain, in float64."""

    inverse: ExactInverse
    streams: Mapping[str, Tokens]

    @property
    def count(self) -> int:
        return next(iter(self.streams.values())).batch


def recorded_truth(inverse: ExactInverse, images: Tensor, batch_size: int = 64) -> dict[str, Representation]:
    """{tap: representation} of images (N, 3, H, W) at every known tap of an exact inverse's model, in float64."""
    taps = sorted(inverse.model.walk.taps, key=inverse.model.walk.taps.__getitem__)
    parts = [inverse.model.target.record(part.double(), taps) for part in images.split(batch_size)]
    return {
        tap: parts[0][tap].replace(torch.cat([part[tap].values for part in parts]))
        for tap in taps
        if isinstance(parts[0][tap], Tokens)
    }


def _cases(inverse: ExactInverse | Sequence[ExactInverse], truth: Truth | Sequence[Truth]) -> list[_Case]:
    """One case for each set of weights, of one architecture, all judged on the same images."""
    inverses = [inverse] if isinstance(inverse, ExactInverse) else list(inverse)
    truths = [truth] if isinstance(truth, Mapping) else list(truth)
    if not inverses or len(inverses) != len(truths):
        raise BacksightError(
            f"Each exact inverse needs its own truth, but there are {len(inverses)} inverses and {len(truths)} truths."
        )
    if len({(each.source, each.reached, each.model.target.name) for each in inverses}) > 1:
        raise BacksightError("Exact inverses that are judged together differ in their weights alone, not in their tap.")
    cases = [_Case(one, _streams(one, each)) for one, each in zip(inverses, truths, strict=True)]
    if len({case.count for case in cases}) > 1:
        raise BacksightError("All weights have to be judged on the same images: give each the same number of them.")
    return cases


def _streams(inverse: ExactInverse, truth: Truth) -> dict[str, Tokens]:
    """The truth at every stream of the chain; what is no tap is made by the model's own steps."""
    if inverse.reached == inverse.source:
        raise BacksightError(f"No exact step leads back from {inverse.source}: choose a later tap.")
    found: dict[str, Tokens] = {}
    with torch.no_grad():
        for step in inverse.model.walk.between(inverse.source, inverse.reached):
            for stream in (step.source, step.destination):
                given = truth.get(stream)
                if isinstance(given, Tokens):
                    if given.values.dtype != torch.float64:
                        raise BacksightError(
                            f"The truth at {stream} is of {given.values.dtype}, whose round-off looks like wrong "
                            "roots: record it with recorded_truth(), in float64."
                        )
                    found[stream] = given
            if step.source not in found:
                raise BacksightError(f"The truth lacks {step.source}: make it with recorded_truth().")
            if step.destination not in found:
                found[step.destination] = found[step.source].replace(step(found[step.source].values))
    return found


def _spans(inverse: ExactInverse) -> list[tuple[str, str]]:
    """(tap, tap before it), from the last to the first: one half-step each, where every stream is a tap."""
    places = inverse.model.walk.taps
    inside = [tap for tap in places if places[inverse.reached] <= places[tap] <= places[inverse.source]]
    return [(later, earlier) for earlier, later in pairwise(sorted(inside, key=places.__getitem__))][::-1]


def _common(case: _Case, tap: str, dataset: str, split: str) -> dict[str, Any]:
    target = case.inverse.model.target
    place = {"tap": tap, "depth": target.depth(tap), "inverse": "exact"}
    return {"target": target.name, "weights": target.weights, "dataset": dataset, "split": split, **place}


def _chosen(names: Sequence[str] | None, known: Sequence[str], what: str) -> list[str]:
    for name in names or ():
        if name not in known:
            raise BacksightError(f"There is no {what} {name!r}; {nearest(name, list(known))}.")
    return [name for name in known if names is None or name in names]


# ------------------------------------------------------------------------------------------- where exactness ends


def where_exactness_ends(target: Target, taps: Sequence[str] | str | None = None) -> pd.DataFrame:
    """How far back exactness reaches from each tap (default: the target's), and what ends it; nothing is solved.

    A row a tap: target, weights, tap, depth, exact_to (tap; "pixels" where nothing is lost; "" where not one step back
    is exact), half_steps, and what ends it: ends_at and before (tap and what lies before it), dimension_in and
    dimension_out (values an image before and behind, NaN where a tap has no fixed number), reason. Norms on the way
    that take the mean of every token leave what lies behind exact up to that: norms, means_lost (values an image).
    """
    walked = walk(target)
    model = ExactModel(target, walked, measured_embedding(target))
    rows = []
    for tap in target.taps if taps is None else target.resolve_taps(taps):
        try:
            inverse = ExactInverse(model, tap)
            lost, reached = inverse.lost, inverse.reached
        except NotInvertibleError as error:
            lost, reached = (error.lost,), ""
        norms = [each for each in lost if reached and _takes_means(walked, each)]
        ends = [each for each in lost if each not in norms]
        steps = len(walked.between(tap, reached)) if reached and reached != tap else 0
        end = ends[0] if ends else Lost(tap, "", 0, 0, "")
        rows.append(
            {
                "target": target.name,
                "weights": target.weights,
                "tap": tap,
                "depth": target.depth(tap),
                "exact_to": reached if ends else PIXELS,
                "half_steps": steps,
                "ends_at": end.tap if ends else None,
                "before": end.previous if ends else None,
                "dimension_in": end.dimension_in if ends else math.nan,
                "dimension_out": end.dimension_out if ends else math.nan,
                "reason": _why(target, end, model.embedding is not None) if ends else "",
                "norms": ", ".join(each.tap for each in norms),
                "means_lost": sum(each.dimension_in - each.dimension_out for each in norms),
            }
        )
    return pd.DataFrame(rows)


def _why(target: Target, end: Lost, affine: bool) -> str:
    """The reason, with what the walk alone does not know: what a tap holds."""
    if end.previous == PIXELS and not affine:
        return "what lies between the pixels and the first tap is no affine map of patches, and is not inverted"
    weights = next(target.model.parameters())
    image = torch.zeros(1, len(target.preprocessing.mean), *target.image_size).to(weights)
    if not isinstance(target.record(image, [end.tap])[end.tap], Tokens):
        return f"{end.tap} holds no tokens of the image, but what was read from them ({end.reason})"
    return end.reason


def _takes_means(walked: Any, lost: Lost) -> bool:
    """Whether a loss is a norm's on the way, and not the end of exactness."""
    return any(
        step.destination == lost.tap and step.source == lost.previous and step.norm is not None
        for step in walked.steps.values()
    )


# ------------------------------------------------------------------------------------------------------- half-steps


def measure_half_steps(
    inverse: ExactInverse | Sequence[ExactInverse],
    truth: Truth | Sequence[Truth],
    settings: Settings | None = None,
    *,
    steps: Sequence[str] | None = None,
    dataset: str = "scenes",
    split: str = "test",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Every half-step by itself, from the true stream behind it. Tidy rows, `step` its end and `to` its beginning.

    inverse: of the deepest tap, or several of one architecture with different weights (seeds), and truth the same
    (`recorded_truth`); steps: names of the streams that they lead to, default all between the tap and where exactness
    ends (where a block has no tap between its halves, both together). Measures: back, another_root, unsolved,
    error_grown (shares of images, sum 1); solved; tokens_right; residual, error (medians); error_back (of images that
    are back); iterations, passes (means; of Krylov spaces: dense derivatives count in the seconds alone); seconds (an
    image, of solving alone).
    """
    cases = _cases(inverse, truth)
    spans = [span for span in _spans(cases[0].inverse)]
    wanted = _chosen(steps, [span[0] for span in spans], "half-step")
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(wanted) * len(cases), desc="half-steps", leave=False, disable=not progress) as bar:
        for tap, before in spans:
            if tap not in wanted:
                continue
            found = []
            for case in cases:
                one = case.inverse.at(tap, settings or ALONE)
                found.append(_outcomes(_solved(one, case.streams[tap], case.streams, before)))
                bar.update()
            columns = {**_common(cases[0], tap, dataset, split), "step": tap, "to": before}
            rows += _outcome_rows(found, seed, columns)
    return _tidy(rows)


def _traced(
    one: ExactInverse, representation: Tokens, truth: Truth, to: str | None = None, oracle: bool = False
) -> tuple[Trace, list[StepReport]]:
    """The way back and what it met; oracle: with the roots nearest to the truth."""
    if oracle:
        streams = {name: each.values for name, each in truth.items()}
        one = RootChoosing.of(one, truth=streams, curves=2)
    trace = one.trace(representation, to)
    return trace, judged(one, trace, representation, truth)


def _solved(one: ExactInverse, representation: Tokens, there: Mapping[str, Tokens], to: str) -> pd.DataFrame:
    """`table_of` all images, in batches; image: its number."""
    frames = []
    for part in torch.arange(representation.batch).split(one.batch_size):
        truth = {name: each.index(part) for name, each in there.items()}
        frames.append(_numbered(_traced(one, representation.index(part), truth, to)[1], part))
    return pd.concat(frames, ignore_index=True)


def _numbered(reports: Sequence[StepReport], images: Tensor) -> pd.DataFrame:
    table = table_of(reports)
    return table.assign(image=images.numpy()[table["sample"].to_numpy()])


def _outcomes(table: pd.DataFrame) -> pd.DataFrame:
    """A row an image: its fate, where it was lost first (lost_at, lost_to), and what its steps took together.

    table: rows of one image and step, the steps of an image in the order in which they were solved.
    """
    rows = []
    for image, steps in table.groupby("image", sort=True):
        error = steps["error"].to_numpy()
        fate, lost = BACK, None
        # NaN is no error that is small.
        if not error[-1] <= RIGHT:
            lost = steps.iloc[int(np.argmax(~(error <= RIGHT)))]
            fate = ANOTHER_ROOT if lost["another_root"] else UNSOLVED if not lost["solved"] else ERROR_GROWN
        rows.append(
            {
                "image": image,
                "fate": fate,
                "lost_at": None if lost is None else lost["step"],
                "lost_to": None if lost is None else lost["to"],
                "solved": bool(steps["solved"].all()),
                "error": error[-1],
                "right_tokens": steps["right_tokens"].iloc[-1],
                "residual": steps["residual"].max(),
                **{name: steps[name].sum() for name in ("iterations", "passes", "seconds")},
            }
        )
    return pd.DataFrame(rows)


def _column(found: Sequence[pd.DataFrame], name: str) -> np.ndarray:
    """(S, N)"""
    return np.stack([each[name].to_numpy(float) for each in found])


def _fate(found: Sequence[pd.DataFrame], fate: str) -> np.ndarray:
    return np.stack([(each["fate"] == fate).to_numpy(float) for each in found])


def _outcome_rows(found: Sequence[pd.DataFrame], seed: int, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    error, back = _column(found, "error"), _fate(found, BACK)
    rows = [_share(fate, _fate(found, fate), seed, **columns) for fate in FATES]
    rows.append(_share("solved", _column(found, "solved"), seed, **columns))
    rows.append(_mean("tokens_right", _column(found, "right_tokens"), seed, **columns))
    rows.append(_quantile("residual", _column(found, "residual"), seed, **columns))
    rows.append(_quantile("error", error, seed, **columns))
    rows.append(_quantile("error_back", np.where(back > 0, error, np.nan), seed, **columns))
    return rows + [_mean(name, _column(found, name), seed, **columns) for name in ("iterations", "passes", "seconds")]


# -------------------------------------------------------------------------------------------------------- the chain


@dataclass(frozen=True)
class ChainRecord:
    """What became of every image on the way from a tap to where exactness ends.

    steps: (step, to) in the order in which they are solved; outcomes: a row an image: image, fate, lost_at, lost_to,
    error, right_tokens (share), residual, iterations, passes, seconds; table: a row an image and step (`table_of`). An
    image is followed as long as it is right.
    """

    steps: tuple[tuple[str, str], ...]
    outcomes: pd.DataFrame
    table: pd.DataFrame


def follow_chain(
    inverse: ExactInverse,
    truth: Truth,
    settings: Settings | None = None,
    *,
    oracle: bool = False,
    progress: bool = True,
) -> ChainRecord:
    """The fate of every image, from the tap of the inverse to where exactness ends.

    oracle: the root nearest to the truth is kept where a step folds.
    """
    table = _while_right(inverse.at(inverse.source, settings), _cases(inverse, truth)[0], oracle, progress)
    return ChainRecord(tuple((step.destination, step.source) for step in inverse.steps[::-1]), _outcomes(table), table)


def _while_right(one: ExactInverse, case: _Case, oracle: bool, progress: bool) -> pd.DataFrame:
    """Tap by tap, each time with those images alone that are right so far."""
    alive, streams = torch.arange(case.count), case.streams[one.source]
    frames = []
    spans = _spans(one)
    with tqdm(total=len(spans) * case.count, desc="chain", leave=False, disable=not progress) as bar:
        for tap, before in spans:
            if not len(alive):
                break
            here = one.at(tap)
            rows, values = [], []
            for part in torch.arange(len(alive)).split(here.batch_size):
                there = {name: each.index(alive[part]) for name, each in case.streams.items()}
                trace, reports = _traced(here, streams.index(part), there, before, oracle)
                rows.append(_numbered(reports, alive[part]))
                values.append(trace.values)
                bar.update(len(part))
            table = pd.concat(rows, ignore_index=True)
            frames.append(table)
            right = torch.tensor((table.groupby("image")["error"].last() <= RIGHT).to_numpy())
            alive = alive[right]
            streams = case.streams[before].index(alive).replace(torch.cat(values)[right])
    return pd.concat(frames, ignore_index=True)


def measure_chain(
    inverse: ExactInverse | Sequence[ExactInverse],
    truth: Truth | Sequence[Truth],
    settings: Settings | None = None,
    *,
    oracle: bool = False,
    dataset: str = "scenes",
    split: str = "test",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """The chain in tidy rows, the column `rule` says which roots are kept; see `follow_chain`.

    Without a step, of the whole way: back, another_root, unsolved, error_grown (of images, sum 1), the medians and
    costs of `measure_half_steps`, tokens_right and tokens_right_lost (of the images that are not back). With a step:
    survived (share still right behind it), lost_another_root, lost_unsolved, lost_error_grown (share lost first here),
    error_back (median of those that survived it).
    """
    cases = _cases(inverse, truth)
    records = [follow_chain(case.inverse, case.streams, settings, oracle=oracle, progress=progress) for case in cases]
    rule = NEAREST_TO_TRUTH if oracle else USUAL_ROOT
    return chain_rows(records, {**_common(cases[0], cases[0].inverse.source, dataset, split), "rule": rule}, seed)


def chain_rows(records: Sequence[ChainRecord], columns: Mapping[str, Any], seed: int = 0) -> pd.DataFrame:
    """Tidy rows of one record for each seed of the weights; columns: of all rows."""
    found = [record.outcomes for record in records]
    lost = _fate(found, BACK) == 0
    rows = _outcome_rows(found, seed, columns)
    right = _column(found, "right_tokens")
    rows.append(_mean("tokens_right_lost", np.where(lost, right, np.nan), seed, **columns))
    steps = records[0].steps
    order = {step: number for number, (step, _) in enumerate(steps)}
    places = [each["lost_at"].map(order).fillna(len(order)).to_numpy() for each in found]
    for number, (step, to) in enumerate(steps):
        where = {**columns, "step": step, "to": to}
        survived = np.stack([(place > number).astype(float) for place in places])
        rows.append(_share("survived", survived, seed, **where))
        for fate in FATES[1:]:
            here = np.stack([(place == number).astype(float) for place in places]) * _fate(found, fate)
            rows.append(_share(f"lost_{fate}", here, seed, **where))
        errors = np.stack([_errors(record, step, len(survived[0])) for record in records])
        rows.append(_quantile("error_back", np.where(survived > 0, errors, np.nan), seed, **where))
    return _tidy(rows)


def _errors(record: ChainRecord, step: str, count: int) -> np.ndarray:
    """(N,) behind a step, NaN of images that were not followed so far."""
    rows = record.table[record.table["step"] == step]
    errors = np.full(count, np.nan)
    errors[rows["image"].to_numpy(int)] = rows["error"].to_numpy(float)
    return errors


# ------------------------------------------------------------------------------------------------------------ roots


@dataclass(frozen=True)
class FoundRoots:
    """The roots of one half-step on tokens, from the true y of N images with n tokens each.

    roots: of all N n tokens; truth: (N n, c); near: (K,) bool, the root is the truth; signs: (N n,) of det g′ at the
    truth; scores: {rule: (K,)}, lowest is chosen; reached: {rule: (N n,) bool}, Newton's method from this start ends at
    the truth; deviation: root mean square distance of a token from the mean token of its stream; seconds of all.
    """

    step: str
    to: str
    roots: TokenRoots
    truth: Tensor
    near: Tensor
    signs: Tensor
    scores: Mapping[str, Tensor]
    reached: Mapping[str, Tensor]
    images: int
    deviation: float
    seconds: float

    def by_image(self, flags: Tensor) -> np.ndarray:
        """(N,) sums over an image's tokens of (N n,) flags."""
        return np.asarray(flags.double().view(self.images, -1).sum(1).numpy())

    @property
    def found(self) -> Tensor:
        """(N n,) bool: the truth is among the roots."""
        has = torch.zeros(self.roots.tokens, dtype=torch.bool)
        has[self.roots.token[self.near]] = True
        return has

    def nearest_other(self) -> tuple[Tensor, Tensor]:
        """(numbers of tokens that have another root, number of the nearest of these roots)."""
        distance = (self.roots.x - self.truth[self.roots.token]).norm(dim=1).masked_fill(self.near, torch.inf)
        best = self.roots.best(distance)
        has = best >= 0
        has[has.clone()] &= distance[best[has]].isfinite()
        return has.nonzero().flatten(), best[has]


def foldable_steps(inverse: ExactInverse) -> list[str]:
    """The half-steps of which roots can be listed: those that act on every token alone and end in no norm."""
    steps = inverse.model.walk.between(inverse.source, inverse.reached) if inverse.source != inverse.reached else ()
    return [step.destination for step in steps if step.tokenwise and step.norm is None and step.kind == "residual"]


def modular_guess(inverse: ExactInverse, destination: str, modular: Any) -> Guess | None:
    """A trained modular inverse's word on the stream before a half-step, from the one behind it, or None.

    modular: the family's reconstruction at `destination` (a `Chain`, whose first module ends at an earlier tap); the
    model's own half-steps lead on from there.
    """
    if not isinstance(modular, Chain):
        return None
    module = modular.path[0]
    walked, step = inverse.model.walk, _step(inverse, destination)
    if module.source != destination or module.destination not in walked.taps:
        return None
    try:
        between = [each for each in walked.between(destination, module.destination) if each.destination != destination]
    except NotInvertibleError:
        return None

    def guess(behind: Tokens) -> Tensor:
        with torch.no_grad():
            x = module(behind.replace(behind.values.float())).values.double()
            for each in between:
                x = each(x)
        if x.shape != behind.values.shape:
            raise BacksightError(
                f"The modular inverse of {destination} makes {tuple(x.shape)} values, but {step.source} has "
                f"{tuple(behind.values.shape)}: give the target's own."
            )
        return x

    return guess


def _step(inverse: ExactInverse, destination: str, single: bool = False) -> Step:
    walked = inverse.model.single if single else inverse.model.walk
    steps = {each.destination: each for each in walked.between(inverse.source, inverse.reached)}
    if destination not in steps:
        raise BacksightError(f"There is no half-step {destination!r}; {nearest(destination, list(steps))}.")
    return steps[destination]


def find_roots(
    inverse: ExactInverse,
    destination: str,
    truth: Truth,
    *,
    guesses: Mapping[str, Guess] | None = None,
    examples: int = 8,
    search: Search | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> FoundRoots:
    """The roots of the half-step that leads to `destination`, from the true y, and what rules make of them.

    Starts: the staged ridge guess, its first stage (linear), y itself, the staged guess made longer, the errors of the
    nearest training tokens (as many as `examples`), and `guesses` {name: stream behind -> (B, n, c) before}; the truth
    is no start. search: how long; batch_size: images at once. Raises BacksightError on half-steps that mix tokens.
    """
    search = search or Search()
    streams = _streams(inverse, truth)
    step, single = (_step(inverse, destination, single) for single in (False, True))
    x, behind = streams[step.source], streams[destination]
    began = time.perf_counter()
    parts = []
    bar = tqdm(
        torch.arange(x.batch).split(batch_size), desc=f"roots of {destination}", leave=False, disable=not progress
    )
    with torch.no_grad():
        for part in bar:
            parts.append(
                _roots_of(inverse, step, single, x.values[part], behind.index(part), guesses or {}, examples, search)
            )
        seconds = time.perf_counter() - began
        truths = x.values.flatten(0, 1)
        signs = token_signs(token_map(step), truths)
    found = [part[0] for part in parts]
    offsets = [sum(each.tokens for each in found[:number]) for number in range(len(found))]
    roots = TokenRoots(
        torch.cat([each.token + offset for each, offset in zip(found, offsets, strict=True)]),
        torch.cat([each.x for each in found]),
        torch.cat([each.residual for each in found]),
        torch.cat([each.sign for each in found]),
        len(truths),
    )
    there = truths[roots.token]
    near = (roots.x - there).norm(dim=1) <= RIGHT * there.norm(dim=1)
    scores = {rule: torch.cat([part[1][rule] for part in parts]) for rule in parts[0][1]}
    reached = {rule: torch.cat([part[2][rule] for part in parts]) for rule in parts[0][2]}
    deviation = float((truths - truths.mean(0)).square().sum(1).mean().sqrt())
    return FoundRoots(
        destination, step.source, roots, truths, near, signs, scores, reached, x.batch, deviation, seconds
    )


def _roots_of(
    inverse: ExactInverse,
    step: Step,
    single: Step,
    x: Tensor,
    behind: Tokens,
    guesses: Mapping[str, Guess],
    examples: int,
    search: Search,
) -> tuple[TokenRoots, dict[str, Tensor], dict[str, Tensor]]:
    """(roots, scores, which starts end at the truth) of a batch of images."""
    y, start = behind.values, inverse.fitted("starts", step)
    if start is None:
        raise BacksightError(f"{step.destination} has no closed-form start: fit the exact inverse with images.")
    staged = start(step, y)
    informed = {"linear start": staged[-1], "staged start": staged[0]}
    informed |= {f"{name} start": guess(behind) for name, guess in guesses.items()}
    starts = [*informed.values(), y, 1.4 * staged[0]]
    prior = inverse.fitted("priors", step)
    if examples and prior is not None:
        starts += prior.further_starts(y, staged[0])[:examples]
    found = step_roots(step, y, starts, search, single)
    tokens, flat, there = token_map(step), y.flatten(0, 1), x.flatten(0, 1)
    reached = {}
    for rule, values in informed.items():
        ended, residual = polished(tokens, flat, values.flatten(0, 1), search)
        right = (ended - there).norm(dim=1) <= RIGHT * there.norm(dim=1)
        reached[rule] = right & (residual <= search.tolerance)
    scores = {
        f"nearest to the {rule}": (found.x - values.flatten(0, 1)[found.token]).norm(dim=1)
        for rule, values in informed.items()
    }
    scores["shortest"] = found.x.norm(dim=1)
    if prior is not None:
        scores["most usual"] = prior.of_rows(found.x, found.token % y.shape[1])
    return found, scores, reached


def measure_roots(
    inverse: ExactInverse | Sequence[ExactInverse],
    destination: str,
    truth: Truth | Sequence[Truth],
    *,
    guesses: Mapping[str, Guess] | None = None,
    examples: int = 8,
    search: Search | None = None,
    batch_size: int = 4,
    dataset: str = "scenes",
    split: str = "test",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """How many x a half-step on tokens takes to one y, how far apart they are, and which rule picks the truth.

    Shares of tokens: negative_determinant (of the truth: then it has at least two other roots), several_roots, solved,
    complete (signs sum to 1: no root is known to be missing), truth_found, truth_found_complete,
    truth_found_incomplete; of images: truth_found_images (of all tokens). roots: mean number found of a token.
    other_distance, nearest_other (quantiles; relative to |truth|) and the same with _in_deviations, in units of the
    stream's own deviation: two unrelated tokens are about 1.4 apart. Rules (column `rule`): "… start": Newton's method
    from there ends at the truth; the others choose among all roots found: tokens_right, tokens_right_several (of tokens
    with several roots), images_right (all tokens). For the other arguments see `find_roots`.
    """
    cases = _cases(inverse, truth)
    found = [
        find_roots(
            case.inverse,
            destination,
            case.streams,
            guesses=guesses,
            examples=examples,
            search=search,
            batch_size=batch_size,
            progress=progress,
        )
        for case in cases
    ]
    columns = {**_common(cases[0], destination, dataset, split), "step": destination, "to": found[0].to}
    return root_rows(found, columns, seed)


def root_rows(found: Sequence[FoundRoots], columns: Mapping[str, Any], seed: int = 0) -> pd.DataFrame:
    """Tidy rows of the roots of one half-step, one record for each seed of the weights."""

    def share(measure: str, flags: Callable[[FoundRoots], Tensor], of: Any = None, **more: Any) -> dict[str, Any]:
        hits = np.stack([each.by_image(flags(each) & of(each) if of else flags(each)) for each in found])
        every = (lambda each: torch.ones_like(each.found)) if of is None else of
        trials = np.stack([each.by_image(every(each)) for each in found])
        return _share(measure, hits, seed, trials, **columns, **more)

    def whole(measure: str, flags: Callable[[FoundRoots], Tensor], **more: Any) -> dict[str, Any]:
        every = np.stack([flags(each).view(each.images, -1).all(1).double().numpy() for each in found])
        return _share(measure, every, seed, **columns, **more)

    several = lambda each: each.roots.count > 1  # noqa: E731
    complete = lambda each: each.roots.degree == 1  # noqa: E731
    rows = [
        share("negative_determinant", lambda each: each.signs < 0),
        share("several_roots", several),
        share("solved", lambda each: each.roots.count > 0),
        share("complete", complete),
        share("truth_found", lambda each: each.found),
        share("truth_found_complete", lambda each: each.found, complete),
        share("truth_found_incomplete", lambda each: each.found, lambda each: ~complete(each)),
        whole("truth_found_images", lambda each: each.found),
    ]
    counts = np.stack([each.by_image(each.roots.count) / (each.roots.tokens / each.images) for each in found])
    rows.append(_mean("roots", counts, seed, **columns))
    rows.append(_mean("seconds", [[each.seconds / each.images] * each.images for each in found], seed, **columns))
    rows += _distance_rows(found, columns, seed)
    for rule in found[0].reached:
        reached = lambda each, rule=rule: each.reached[rule]  # noqa: E731
        rows += [share("tokens_right", reached, rule=rule), share("tokens_right_several", reached, several, rule=rule)]
        rows.append(whole("images_right", reached, rule=rule))
    for rule in found[0].scores:
        picked = lambda each, rule=rule: _picked(each, rule)  # noqa: E731
        rows += [share("tokens_right", picked, rule=rule), share("tokens_right_several", picked, several, rule=rule)]
        rows.append(whole("images_right", picked, rule=rule))
    return _tidy(rows)


def _picked(found: FoundRoots, rule: str) -> Tensor:
    """(N n,) bool: the root with the lowest score is the truth."""
    best = found.roots.best(found.scores[rule])
    has = best >= 0
    right = torch.zeros_like(has)
    right[has] = found.near[best[has]]
    return right


def _distance_rows(found: Sequence[FoundRoots], columns: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """Quantiles over tokens; images are drawn anew, each with all of its tokens."""
    rows = []
    collected: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"other_distance": [], "nearest_other": []}
    for each in found:
        away = (each.roots.x - each.truth[each.roots.token]).norm(dim=1)
        length = each.truth[each.roots.token].norm(dim=1)
        tokens = each.roots.tokens // each.images
        for name, at in (("other_distance", ~each.near), ("nearest_other", each.nearest_other()[1])):
            image = (each.roots.token[at] // tokens).numpy()
            both = torch.stack([away[at] / length[at], away[at] / each.deviation]).numpy()
            collected[name].append((image, both))
    count = found[0].images
    for name, parts in collected.items():
        image, both = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts], axis=1)
        of_image = [np.flatnonzero(image == number) for number in range(count)]
        more = {"seeds": len(found), **columns}
        for unit, values in (("", both[0]), ("_in_deviations", both[1])):
            measure = name + unit
            if not len(values):
                rows.append(metrics_row(measure, math.nan, math.nan, math.nan, 0, seed, quantile=0.5, **more))
                continue

            def of_drawn(drawn: np.ndarray, values: np.ndarray = values, of_image: Any = of_image) -> np.ndarray:
                taken = values[np.concatenate([of_image[number] for number in drawn])]
                return np.quantile(taken, QUANTILES) if len(taken) else np.full(len(QUANTILES), np.nan)

            low, high = bootstrap_statistic(of_drawn, count, seed)
            n = sum(len(each) > 0 for each in of_image)
            for number, quantile in enumerate(QUANTILES):
                value = float(np.quantile(values, quantile))
                ends = np.broadcast_to(low, (len(QUANTILES),)), np.broadcast_to(high, (len(QUANTILES),))
                interval = (float(ends[0][number]), float(ends[1][number]))
                rows.append(metrics_row(measure, value, *interval, n, seed, quantile=quantile, **more))
    return rows


# ------------------------------------------------------------------------------------------ what a second root shows


@dataclass(frozen=True)
class SecondRoots:
    """Pictures of streams that the model takes to the very same y.

    metrics: tidy rows, column `picture`: which stream; images: (K, 3, H, W); pictures: {picture: {family: (K, 3, H,
    W)}}, of TRUE_STREAM, ONE_TOKEN, ALL_TOKENS and RANDOM_MOVE; tap: where they were decoded; destination: of the
    half-step; reached: {picture: (K,) bool} whether there is such a stream, and it leads back to that tap: other
    pictures are of no solution, and count nowhere.
    """

    metrics: pd.DataFrame
    images: Tensor
    pictures: Mapping[str, Mapping[str, Tensor]]
    tap: str
    destination: str
    reached: Mapping[str, Tensor]


def second_root_pictures(
    inverse: ExactInverse,
    destination: str,
    truth: Truth,
    images: Tensor,
    families: Mapping[str, Mapping[str, Reconstruct]],
    found: FoundRoots | None = None,
    settings: Settings | None = None,
    *,
    dataset: str = "scenes",
    split: str = "test",
    seed: int = 0,
    progress: bool = True,
    **search: Any,
) -> SecondRoots:
    """Whether a second root looks different: the true stream decoded, and streams with other roots in its place.

    images: (N, 3, H, W) behind the truth; families: {family: {tap: representation -> images}}; found: of `find_roots`
    (default: they are looked for, with the arguments `search`). The stream is decoded at the nearest tap before the
    half-step that all families have; half-steps in between are inverted exactly, so that what is decoded still leads to
    the very same y. ONE_TOKEN: the token of the grid whose nearest other root is the farthest; ALL_TOKENS: every token
    that has another root; RANDOM_MOVE: the same tokens moved as far in a random direction, which changes y.

    Measures: replaced (share of tokens), reached (share of images whose stream leads back to that tap), residual
    (median) and residual_largest, |g(x) − y| / |y| of the model's own pass; stream_distance (of tokens replaced,
    relative); psnr_between (to the picture of the true stream, dB) and psnr (to the image) for each family. Images
    without a second root have none of these. Raises BacksightError where no tap is decoded by all families.
    """
    case = _cases(inverse, truth)[0]
    found = found or find_roots(inverse, destination, case.streams, progress=progress, **search)
    if len(images) != case.count or found.images != case.count:
        raise BacksightError(f"{len(images)} images and roots of {found.images} do not fit a truth of {case.count}.")
    tap = _decoded_at(inverse, found.to, families)
    streams = {TRUE_STREAM: case.streams[found.to].values} | _replaced(found, case.streams[found.to], seed)
    pictures: dict[str, dict[str, Tensor]] = {}
    columns = {**_common(case, tap, dataset, split), "step": destination, "to": found.to}
    rows: list[dict[str, Any]] = []
    reference: dict[str, Tensor] = {}
    reached: dict[str, Tensor] = {}
    for name, values in tqdm(streams.items(), desc="second roots", leave=False, disable=not progress):
        x, solved = _back_to(inverse, case, found.to, tap, values, settings)
        moved = (values - case.streams[found.to].values).norm(dim=-1)
        has = (moved > 0).any(1) if name != TRUE_STREAM else torch.ones_like(solved)
        shown = {**columns, "picture": name, "seeds": 1}
        rows.append(_mean("replaced", np.where(has, (moved > 0).double().mean(1), np.nan), seed, **shown))
        rows.append(_share("reached", solved & has, seed, has, **shown))
        kept = reached[name] = has & solved
        residual = _residual(inverse, tap, destination, x, case.streams[destination].values)
        if name != RANDOM_MOVE:
            residual = np.where(kept, residual, np.nan)
            rows.append(_quantile("residual", residual, seed, **shown))
            largest = float(np.nanmax(residual)) if bool(kept.any()) else math.nan
            rows.append(metrics_row("residual_largest", largest, math.nan, math.nan, int(kept.sum()), seed, **shown))
        length = case.streams[found.to].values.norm(dim=-1)
        far = torch.where(moved > 0, moved / length, torch.nan).nanmean(1)
        rows.append(_mean("stream_distance", np.where(has, far, np.nan), seed, **shown))
        made = {
            family: taps[tap](case.streams[tap].replace(x.float())).detach().clamp(0, 1).float()
            for family, taps in families.items()
        }
        pictures[name] = made
        reference = reference or made
        for family, picture in made.items():
            at = {**shown, "inverse": family}
            nothing = torch.tensor(torch.nan, dtype=torch.float64)
            rows.append(_mean("psnr", torch.where(kept, psnr(images.float(), picture).double(), nothing), seed, **at))
            if name != TRUE_STREAM:
                between = psnr(reference[family], picture).double()
                rows.append(_mean("psnr_between", torch.where(kept, between, nothing), seed, **at))
                same = torch.where(kept, (reference[family] - picture).abs().amax((1, 2, 3)).double(), nothing)
                rows.append(_mean("largest_pixel_change", same, seed, **at))
    return SecondRoots(_tidy(rows), images.float(), pictures, tap, destination, reached)


def _decoded_at(inverse: ExactInverse, stream: str, families: Mapping[str, Mapping[str, Reconstruct]]) -> str:
    walked = inverse.model.walk
    places = {tap: number for tap, number in walked.taps.items()}
    place = walked.streams.index(stream)
    first = places[inverse.reached]
    known = [
        tap
        for tap, number in places.items()
        if first <= number <= place and families and all(tap in taps for taps in families.values())
    ]
    if not known:
        raise BacksightError(
            f"No tap between {inverse.reached} and {stream} is decoded by all of the families "
            f"{', '.join(families) or 'given (none)'}: give inverses of such a tap."
        )
    return max(known, key=places.__getitem__)


def _replaced(found: FoundRoots, stream: Tokens, seed: int) -> dict[str, Tensor]:
    """{picture: (N, n, c)} with other roots in place of tokens, and the null that moves as far."""
    n, flat = stream.values.shape[1], stream.values.flatten(0, 1)
    token, root = found.nearest_other()
    distance = (found.roots.x[root] - flat[token]).norm(dim=1)
    every, one = flat.clone(), flat.clone()
    every[token] = found.roots.x[root]
    for image in range(stream.batch):
        # Prefix tokens stand for no place of the picture.
        inside = ((token // n == image) & (token % n >= stream.prefix)).nonzero().flatten()
        if len(inside):
            farthest = inside[distance[inside].argmax()]
            one[token[farthest]] = found.roots.x[root[farthest]]
    drawn = torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed), dtype=flat.dtype)
    moved = every - flat
    null = flat + drawn / drawn.norm(dim=1, keepdim=True) * moved.norm(dim=1, keepdim=True)
    shape = stream.values.shape
    return {ONE_TOKEN: one.view(shape), ALL_TOKENS: every.view(shape), RANDOM_MOVE: null.view(shape)}


def _back_to(
    inverse: ExactInverse, case: _Case, stream: str, tap: str, values: Tensor, settings: Settings | None
) -> tuple[Tensor, Tensor]:
    """(x at the tap, solved) of a stream behind it."""
    if stream == tap:
        return values, torch.ones(len(values), dtype=torch.bool)
    made, solved = [], []
    for part in torch.arange(len(values)).split(inverse.batch_size):
        here = case.streams[stream].index(part).replace(values[part])
        near = {name: each.values[part] for name, each in case.streams.items()}
        trace = RootChoosing.of(inverse, near=near).at(stream, settings).trace(here, tap)
        made.append(trace.values)
        solved.append(trace.solved)
    return torch.cat(made), torch.cat(solved)


def _residual(inverse: ExactInverse, tap: str, destination: str, x: Tensor, y: Tensor) -> np.ndarray:
    """(N,) |g(x) − y| / |y| of the model's own half-steps from the tap to `destination`."""
    with torch.no_grad():
        for step in inverse.model.walk.between(inverse.source, inverse.reached):
            places = inverse.model.walk.streams
            if places.index(tap) <= places.index(step.source) and places.index(step.destination) <= places.index(
                destination
            ):
                x = step(x)
    return np.asarray(((x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).numpy())


# -------------------------------------------------------------------------------------------------------- the study


@dataclass(frozen=True)
class Exactness:
    """metrics: tidy rows of half-steps (study "half_step"), chains ("chain"), roots ("roots") and second roots
    ("second_root"), in the column `study`; reach: of `where_exactness_ends`; second_roots: by half-step."""

    metrics: pd.DataFrame
    reach: pd.DataFrame
    second_roots: Mapping[str, SecondRoots]


def measure_exactness(
    target: Target,
    families: Mapping[str, Mapping[str, Reconstruct]] | None = None,
    *,
    tap: str = "",
    steps: Sequence[str] | None = None,
    root_steps: Sequence[str] | None = None,
    images: str = "scenes",
    trained_on: str = "scenes",
    n: int = 32,
    n_chain: int = 200,
    n_roots: int = 8,
    n_pictures: int = 4,
    fit_images: int = 256,
    stages: int = 4,
    examples: int = 8,
    curves: int = 1,
    seeds: Sequence[int] = (0, 1, 2),
    oracle: bool = True,
    settings: Settings | None = None,
    inverse: ExactInverse | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Exactness:
    """All measurements of this module on one target, and on untrained weights of its architecture.

    families: reconstructions by family and tap, "linear" and "modular" of which are used (`families.load_families`);
    tap: where the chain starts, default the deepest whose way back loses nothing; steps, root_steps: half-steps that
    are measured alone, and whose roots are looked for, by the stream behind them (default: all); n, n_chain,
    n_roots, n_pictures: test images of half-steps (and of all that is done with untrained weights), of the chain, of
    roots, and of second roots; fit_images, stages: of the
    closed-form starts; examples, curves: starts and rounds of curves of `find_roots`; seeds: of untrained weights,
    none: trained alone; oracle: whether the chain is also followed with the roots nearest to the truth, on n images;
    inverse: a fitted one of `tap`.
    """
    families = {name: taps for name, taps in (families or {}).items() if name in ("linear", "modular")}
    reach = where_exactness_ends(target)
    training = open_images(trained_on, "train", target, fit_images, seed)
    most = max(n, n_chain)
    pictures = next(batches(open_images(images, "test", target, most, seed), most))
    shown = pictures[:n]
    if inverse is None:
        inverse = _fitted_inverse(target, tap, training, families.get("linear", {}), fit_images, stages)
    every = recorded_truth(inverse, pictures)
    truth, chained = (
        {name: each.index(torch.arange(min(most, count))) for name, each in every.items()} for count in (n, n_chain)
    )
    about: dict[str, Any] = {"dataset": images, "split": "test", "seed": seed, "progress": progress}
    settings = settings or ALONE
    tables = [("half_step", measure_half_steps(inverse, truth, settings, steps=steps, **about))]
    tables.append(("chain", measure_chain(inverse, chained, settings, **about)))
    if oracle:
        tables.append(("chain", measure_chain(inverse, truth, settings, oracle=True, **about)))
    wanted = _chosen(root_steps, foldable_steps(inverse), "half-step on tokens")
    few = {name: each.index(torch.arange(min(n, n_roots))) for name, each in truth.items()}
    search, second = Search(rounds=curves), {}
    for step in wanted:
        guess = modular_guess(inverse, step, families.get("modular", {}).get(step))
        found = find_roots(
            inverse,
            step,
            few,
            guesses={} if guess is None else {"modular": guess},
            examples=examples,
            search=search,
            progress=progress,
        )
        case = _cases(inverse, few)[0]
        columns = {**_common(case, step, images, "test"), "step": step, "to": found.to}
        tables.append(("roots", root_rows([found], columns, seed)))
        if families and bool((found.roots.count > 1).any()):
            some = min(found.images, n_pictures)
            first = {name: each.index(torch.arange(some)) for name, each in few.items()}
            part = _first_images(found, some)
            second[step] = second_root_pictures(inverse, step, first, shown[:some], families, part, settings, **about)
            tables.append(("second_root", second[step].metrics))
    if seeds:
        random = [
            _fitted_inverse(target.untrained(each), inverse.source, training, {}, fit_images, stages) for each in seeds
        ]
        truths = [recorded_truth(each, shown) for each in random]
        tables.append(("half_step", measure_half_steps(random, truths, settings, steps=steps, **about)))
        tables.append(("chain", measure_chain(random, truths, settings, **about)))
        fewer = [{name: each.index(torch.arange(min(n, n_roots))) for name, each in one.items()} for one in truths]
        for step in wanted:
            measured = measure_roots(random, step, fewer, examples=examples, search=search, **about)
            tables.append(("roots", measured))
    metrics = pd.concat([table.assign(study=study) for study, table in tables], ignore_index=True)
    return Exactness(metrics, reach, second)


def _first_images(found: FoundRoots, count: int) -> FoundRoots:
    """Of the first images alone."""
    tokens = found.roots.tokens // found.images * count
    kept = found.roots.token < tokens
    roots = found.roots
    return replace(
        found,
        roots=TokenRoots(roots.token[kept], roots.x[kept], roots.residual[kept], roots.sign[kept], tokens),
        truth=found.truth[:tokens],
        near=found.near[kept],
        signs=found.signs[:tokens],
        scores={rule: each[kept] for rule, each in found.scores.items()},
        reached={rule: each[:tokens] for rule, each in found.reached.items()},
        images=count,
    )


def _fitted_inverse(
    target: Target, tap: str, training: Any, completion: Mapping[str, Any], count: int, stages: int
) -> ExactInverse:
    """Of the tap; "": of the deepest whose way back loses nothing, else of the deepest."""
    names = [tap] if tap else target.taps
    inverses = exact_inverses(target, training, names, completion, count, stages=stages)
    if tap and tap not in inverses:
        raise BacksightError(f"Not one step back from {tap} of {target.name} is exact: choose an earlier tap.")
    reaching = [inverse for inverse in inverses.values() if tap or inverse.reached != inverse.source]
    if not reaching:
        raise BacksightError(f"{target.name} has no exact half-step: where_exactness_ends() says why.")
    whole = [each for each in reaching if not any(_takes_means(each.model.walk, lost) for lost in each.lost)]
    return RootChoosing.of((whole or reaching)[-1])
