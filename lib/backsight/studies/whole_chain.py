"""Does an image come back to round-off through many blocks at once? Whole chains, solved from a MAP inverse's picture.

    tap ──► MAP inverse ──► start ──► solve_chain, all half-steps together ──► embedding ──► picture
                                       back │ another root │ near │ lost            the fate of every image

Back: the first stream within `exact.RIGHT` of the true one. Another root: T(x) = y to round-off, and x elsewhere. Near:
neither, but within NEAR. The null starts from another image's picture: what a search finds without a sensible start.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, batches
from backsight.errors import BacksightError
from backsight.exact.inverse import ExactInverse, ExactModel
from backsight.exact.joint import JointSettings, solve_joint
from backsight.exact.map import Noise, fit_map_tap
from backsight.exact.posterior import MapSettings
from backsight.inverses.families import Reconstruct
from backsight.measures.pixels import psnr
from backsight.representation import Representation
from backsight.studies.roots import map_base, wilson_interval
from backsight.tables.names import ANOTHER_ROOT, BACK, EXACT, LOST, MAP, NEAR, NEARBY, NULL_SHUFFLED, RIGHT
from backsight.tables.names import CHAIN_FATES as FATES
from backsight.tables.pool import bootstrap_statistic, metrics_row, pooled_rows
from backsight.targets.base import Target

__all__ = ["FATES", "NEAR", "WholeChains", "measure_whole_chains"]

EMBEDDING = "embedding"  # the true first stream, decoded in the same way: what there is to get back
SHOWN = 4


@dataclass(frozen=True)
class WholeChains:
    """metrics: tidy rows, METRIC_COLUMNS and `study` ("whole"), `seeds`; outcomes: a row a tap, start and image: fate,
    error_start, error, residual, iterations, passes, seconds_map, seconds, psnr by inverse; images (k, 3, H, W);
    pictures: {tap: {inverse: (k, 3, H, W)}}; histories: {tap: (steps + 1, N) relative residuals}."""

    metrics: pd.DataFrame
    outcomes: pd.DataFrame
    images: Tensor
    pictures: dict[str, dict[str, Tensor]]
    histories: dict[str, Tensor]


def measure_whole_chains(
    target: Target,
    families: Mapping[str, Mapping[str, Reconstruct]],
    taps: Sequence[str],
    images: ImageSource | Tensor,
    calibration: ImageSource | Tensor,
    *,
    map_settings: MapSettings | None = None,
    settings: JointSettings | None = None,
    fitted: int = 128,
    batch_size: int = 4,
    null_images: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> WholeChains:
    """Every image of every tap through all half-steps to the embedding, from the start that a MAP inverse gives.

    families: {family: {tap: reconstruction}} with one for every tap, and "linear" at the first tap, which completes
    what the patch embedding drops; calibration: held-out images, of which `fitted` fit the MAP inverse of each tap;
    null_images: of them the search is also started from the picture of the next image. Measures, of the study "whole":
    back, another_root, near, lost (shares of images, sum 1); error_start, error, residual (medians); iterations,
    passes, seconds (an image; inverse map: of the start); psnr of linear, map, exact, embedding.
    Raises BacksightError where a tap's chain does not reach an affine patch embedding.
    """
    pictures = torch.cat(list(batches(images, 64)))
    source = {} if isinstance(images, Tensor) else {"dataset": images.name, "split": images.split}
    model = ExactModel.of(target)
    first = target.available_taps[0]
    linear = families.get("linear", {}).get(first)
    inverses = {tap: ExactInverse(model, tap, completion=linear) for tap in target.resolve_taps(taps)}
    for tap, inverse in inverses.items():
        bare = tap == first or inverse.reached != first or model.embedding is None
        if bare or any(step.norm is not None for step in model.walk.between(tap, first)):
            raise BacksightError(
                f"From {tap} of {target.name} no chain of residual half-steps (without a norm behind them) reaches an "
                f"affine patch embedding; exactness ends at {inverse.reached}: leave {tap} out of the whole chains."
            )
    held_out = next(batches(calibration, fitted))
    rows: list[dict[str, Any]] = []
    frames, shown, histories = [], {}, {}
    total = len(inverses) * (len(pictures) + min(null_images, len(pictures)))
    with tqdm(total=total, desc=f"whole chains of {target.name}", leave=False, disable=not progress) as bar:
        for tap, inverse in inverses.items():
            effort = map_settings or MapSettings()
            fit = fit_map_tap(
                target, tap, map_base(families, tap), held_out, Noise("float32"), effort, fitted, checked=0, seed=seed
            )
            parts = []
            for at in torch.arange(len(pictures)).split(batch_size):
                part = pictures[at]
                began = time.perf_counter()
                _, solution, _ = fit.solve(target.record(part, [tap])[tap])
                start = fit.pictures(solution.z)
                spent = (time.perf_counter() - began) / len(part)
                parts.append(_followed(inverse, part, start, families, settings, spent))
                bar.update(len(part))
            whole = _Part.joined(parts)
            frames.append(whole.table.assign(tap=tap, start=MAP))
            shown[tap] = {name: each[:SHOWN] for name, each in whole.pictures.items()}
            histories[tap] = whole.history
            tables = {MAP: whole.table}
            few = min(null_images, len(pictures))
            if few and len(pictures) > 1:
                swapped = whole.starts.roll(1, 0)[:few]
                null = _followed(inverse, pictures[:few], swapped, families, settings, 0.0)
                frames.append(null.table.assign(tap=tap, start=NULL_SHUFFLED))
                tables[NULL_SHUFFLED] = null.table
                bar.update(few)
            place = {"target": target.name, "weights": target.weights, **source, "tap": tap, "study": "whole"}
            rows += _rows(tables, {**place, "depth": target.depth(tap)}, seed)
    outcomes = pd.concat(frames, ignore_index=True)
    return WholeChains(pd.DataFrame(rows).assign(step=None), outcomes, pictures[:SHOWN], shown, histories)


@dataclass(frozen=True)
class _Part:
    """Of some images: table a row each; pictures by inverse; history (steps + 1, B); starts (B, 3, H, W)."""

    table: pd.DataFrame
    pictures: dict[str, Tensor]
    history: Tensor
    starts: Tensor

    @classmethod
    def joined(cls, parts: Sequence[_Part]) -> _Part:
        """Histories of different length go on with their last value."""
        longest = max(len(part.history) for part in parts)
        histories = [
            torch.cat([part.history, part.history[-1:].expand(longest - len(part.history), -1)]) for part in parts
        ]
        table = pd.concat([part.table for part in parts], ignore_index=True).assign(image=lambda t: range(len(t)))
        pictures = {name: torch.cat([part.pictures[name] for part in parts]) for name in parts[0].pictures}
        return cls(table, pictures, torch.cat(histories, dim=1), torch.cat([part.starts for part in parts]))


def _followed(
    inverse: ExactInverse,
    images: Tensor,
    start: Tensor,
    families: Mapping[str, Mapping[str, Reconstruct]],
    settings: JointSettings | None,
    spent: float,
) -> _Part:
    model, tap = inverse.model, inverse.source
    target, embedding, first = model.target, model.embedding, model.target.available_taps[0]
    assert embedding is not None
    truth, history = target.record(images.double(), [first, tap]), []
    begun, there = embedding.stream(start.double()), truth[first].values
    solution = solve_joint(
        inverse.steps,
        model.single.between(tap, first),
        truth[tap].values,
        begun,
        len(embedding.prefix),
        settings,
        lambda _, residual: history.append(residual.clone()),
    )
    solved, error = solution.solved, (solution.x - there).flatten(1).norm(dim=1) / there.flatten(1).norm(dim=1)
    fates = [
        BACK if off <= RIGHT else ANOTHER_ROOT if done else NEARBY if off <= NEAR else LOST
        for done, off in zip(solved.tolist(), error.tolist(), strict=True)
    ]
    single = truth[tap].replace(truth[tap].values.float())
    end = truth[first]
    pictures = {
        **{name: made[tap](single) for name, made in families.items() if tap in made},
        MAP: start.clamp(0, 1).float(),
        EXACT: decoded(inverse, end.replace(solution.x)),
        EMBEDDING: decoded(inverse, end),
    }
    table = pd.DataFrame(
        {
            "image": range(len(images)),
            "fate": fates,
            "error_start": ((begun - there).flatten(1).norm(dim=1) / there.flatten(1).norm(dim=1)).tolist(),
            "error": error.tolist(),
            "residual": solution.residual.tolist(),
            "iterations": solution.iterations.tolist(),
            "passes": solution.passes.tolist(),
            "seconds_map": spent,
            "seconds": solution.seconds / len(images),
            **{f"psnr_{name}": psnr(images, made.to(images)).tolist() for name, made in pictures.items()},
        }
    )
    last = solution.residual[None]
    return _Part(table, pictures, torch.stack(history) if history else last, start)


def decoded(inverse: ExactInverse, embedded: Representation) -> Tensor:
    """(B, 3, H, W) in [0, 1] of the first stream."""
    first = ExactInverse(inverse.model, inverse.reached, completion=inverse.completion)
    return first(embedded)


def _rows(tables: Mapping[str, pd.DataFrame], place: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    rows = []
    for start, table in tables.items():
        count, name = len(table), EXACT if start == MAP else start
        of = {**place, "inverse": name}
        for fate in FATES:
            hits = int((table["fate"] == fate).sum())
            rows.append(metrics_row(fate, hits / count, *wilson_interval(hits, count), count, seed, seeds=1, **of))
        for measure in ("error_start", "error", "residual"):
            values = table[measure].to_numpy(float)
            rows.append(metrics_row(measure, *_median(values, seed), count, seed, seeds=1, **of))
        for measure in ("iterations", "passes", "seconds"):
            rows += pooled_rows(table[measure].to_numpy(float), measure, seed, **of)
    table = tables[MAP]
    rows += pooled_rows(table["seconds_map"].to_numpy(float), "seconds", seed, **{**place, "inverse": MAP})
    for column in table.columns[table.columns.str.startswith("psnr_")]:
        inverse = column.removeprefix("psnr_")
        rows += pooled_rows(table[column].to_numpy(float), "psnr", seed, **{**place, "inverse": inverse})
    return rows


def _median(values: np.ndarray, seed: int) -> tuple[float, float, float]:
    low, high = bootstrap_statistic(lambda drawn: float(np.median(values[drawn])), len(values), seed)
    return float(np.median(values)), low, high
