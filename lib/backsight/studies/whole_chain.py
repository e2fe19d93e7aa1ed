"""Does an image come back to round-off through many blocks at once? Whole chains, solved from a MAP inverse's picture.

    tap ──► MAP inverse ──► start ──► solve_chain, all half-steps together ──► embedding ──► picture
                                       back │ another root │ near │ lost            the fate of every image

Back: the first stream within `exact.RIGHT` of the true one. Another root: T(x) = y to round-off, and x elsewhere. Near:
neither, but within NEAR. The null starts from another image's picture: what a search finds without a sensible start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, batches
from backsight.errors import BacksightError
from backsight.exact.inverse import ExactInverse
from backsight.exact.map import MapSettings, fit_map_tap
from backsight.exact.steps import ExactModel
from backsight.inverses.families import Reconstruct
from backsight.measures.pixels import psnr
from backsight.studies.joint import JointSettings, solve_joint
from backsight.studies.roots import map_base, relative_error
from backsight.studies.tidy_rows import TidyRows
from backsight.tables.names import ANOTHER_ROOT, BACK, EXACT, LOST, MAP, NEAR, NEARBY, NULL_SHUFFLED, RIGHT
from backsight.tables.names import CHAIN_FATES as FATES
from backsight.targets.base import Target

EMBEDDING = "embedding"  # the true first stream, decoded in the same way: what there is to get back
SHOWN = 4


@dataclass(frozen=True)
class WholeChains:
    """metrics: tidy rows, METRIC_COLUMNS and `study` ("whole"), `seeds`; outcomes: a row a tap, start and image: fate,
    error_start, error, residual, iterations, seconds, psnr by inverse; images (k, 3, H, W);
    pictures: {tap: {inverse: (k, 3, H, W)}}."""

    metrics: pd.DataFrame
    outcomes: pd.DataFrame
    images: Tensor
    pictures: dict[str, dict[str, Tensor]]


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
    back, another_root, near, lost (shares of images, sum 1); error_start, error (medians); seconds (of the search, an
    image); psnr of linear, map, exact, embedding.
    Raises BacksightError where a tap's chain does not reach an affine patch embedding.
    """
    pictures = torch.cat(list(batches(images, 64)))
    model = ExactModel.of(target)
    first = target.available_taps[0]
    linear = cast(nn.Module | None, families.get("linear", {}).get(first))
    inverses = {tap: ExactInverse(model, tap, completion=linear) for tap in target.resolve_taps(taps)}
    for tap, inverse in inverses.items():
        bare = tap == first or inverse.reached != first or model.embedding is None
        if bare or any(step.norm is not None for step in model.between(tap, first)):
            raise BacksightError(
                f"From {tap} of {target.name} no chain of residual half-steps (without a norm behind them) reaches an "
                f"affine patch embedding; exactness ends at {inverse.reached}: leave {tap} out of the whole chains."
            )
    held_out = next(batches(calibration, fitted))
    dataset, split = (None, None) if isinstance(images, Tensor) else (images.name, images.split)
    rows = TidyRows.about(target, dataset, split, seed, study="whole")
    frames, shown = [], {}
    few = min(null_images, len(pictures)) if len(pictures) > 1 else 0
    total = len(inverses) * (len(pictures) + few)
    with tqdm(total=total, desc=f"whole chains of {target.name}", leave=False, disable=not progress) as bar:
        for tap, inverse in inverses.items():
            base, effort = map_base(families, tap), map_settings or MapSettings()
            fit = fit_map_tap(target, tap, base, held_out, None, effort, fitted, checked=0)
            parts = []
            for part in pictures.split(batch_size):
                _, solution, _ = fit.solve(target.record(part, [tap])[tap])
                start = fit.pictures(solution.z)
                parts.append((start, *_followed(inverse, part, start, families, settings)))
                bar.update(len(part))
            starts, tables, made = zip(*parts, strict=True)
            outcomes = {MAP: pd.concat(tables, ignore_index=True)}
            shown[tap] = {name: torch.cat([part[name] for part in made])[:SHOWN] for name in made[0]}
            if few:
                swapped = torch.cat(starts).roll(1, 0)[:few]
                outcomes[NULL_SHUFFLED], _ = _followed(inverse, pictures[:few], swapped, families, settings)
                bar.update(few)
            for origin, table in outcomes.items():
                frames.append(table.assign(image=range(len(table)), tap=tap, start=origin))
            _add_rows(rows, tap, outcomes)
    return WholeChains(rows.table("seeds", "step"), pd.concat(frames, ignore_index=True), pictures[:SHOWN], shown)


def _followed(
    inverse: ExactInverse,
    images: Tensor,
    start: Tensor,
    families: Mapping[str, Mapping[str, Reconstruct]],
    settings: JointSettings | None,
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """(a row an image, pictures by inverse) of the search from the start (B, 3, H, W)."""
    model, tap = inverse.model, inverse.source
    target, embedding, first = model.target, model.embedding, model.target.available_taps[0]
    assert embedding is not None
    truth = target.record(images.double(), [first, tap])
    begun, end = embedding.stream(start.double()), truth[first]
    single = model.single.between(tap, first)
    solution = solve_joint(inverse.steps, single, truth[tap].values, begun, len(embedding.prefix), settings)
    error = relative_error(solution.x, end.values)
    fates = [
        BACK if off <= RIGHT else ANOTHER_ROOT if done else NEARBY if off <= NEAR else LOST
        for done, off in zip(solution.solved.tolist(), error.tolist(), strict=True)
    ]
    given, decoded = truth[tap].replace(truth[tap].values.float()), inverse.at(inverse.reached)
    pictures = {
        **{name: made[tap](given) for name, made in families.items() if tap in made},
        MAP: start.clamp(0, 1).float(),
        EXACT: decoded(end.replace(solution.x)),
        EMBEDDING: decoded(end),
    }
    columns = {name: getattr(solution, name).tolist() for name in ("residual", "iterations")}
    columns |= {"error_start": relative_error(begun, end.values).tolist(), "error": error.tolist(), "fate": fates}
    columns |= {f"psnr_{name}": psnr(images, made.to(images)).tolist() for name, made in pictures.items()}
    return pd.DataFrame({**columns, "seconds": solution.seconds / len(images)}), pictures


def _add_rows(rows: TidyRows, tap: str, outcomes: Mapping[str, pd.DataFrame]) -> None:
    for start, table in outcomes.items():
        name = EXACT if start == MAP else start
        for fate in FATES:
            rows.share((table["fate"] == fate).to_numpy(float), fate, tap, name)
        for measure in ("error_start", "error"):
            rows.median(table[measure].to_numpy(float), measure, tap, name)
        rows.pooled(table["seconds"].to_numpy(float), "seconds", tap, name)
    table = outcomes[MAP]
    for column in table.columns[table.columns.str.startswith("psnr_")]:
        rows.pooled(table[column].to_numpy(float), "psnr", tap, column.removeprefix("psnr_"))
