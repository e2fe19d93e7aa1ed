"""How far exact inversion reaches, half-step by half-step, and what it meets on the way.

    where_exactness_ends   how far back each tap is exact, and what ends it           (no solving: the walk alone)
    half_steps             every half-step alone, from the true y: back, another root, not solved
    chain                  from a tap to the embedding, an image as long as it is right, and where it was lost first

`roots` says what becomes of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from backsight.exact.solver import Settings
from backsight.exact.steps import ExactModel, NotInvertibleError, Step, walk
from backsight.studies.roots import ALONE, Case, taken_back
from backsight.tables.names import BACK, EXACT, FATES
from backsight.tables.values import NO_SEED, Values
from backsight.targets.base import PIXELS, Target


def where_exactness_ends(target: Target, taps: Sequence[str] | str | None = None) -> pd.DataFrame:
    """How far back exactness reaches from each tap (default: the target's), and what ends it; nothing is solved.

    A row a tap: exact_to (tap; "pixels" where nothing is lost; "" where not one step back is exact), half_steps,
    means_lost (values an image that norms on the way take: what lies behind is exact up to these), and why it ends.
    """
    model, rows = walk(target), []
    for tap in target.taps if taps is None else target.resolve_taps(taps):
        steps: tuple[Step, ...] = ()
        try:
            steps, reached = model.back_from(tap)
            why = _end(model, reached)
        except NotInvertibleError as error:
            reached, why = "", str(error)
        norms = [step.norm.module.normalized_shape[0] for step in steps if step.norm is not None and step.lossy]
        lost = sum(model.sizes[tap] // channels for channels in norms)
        place = {"tap": tap, "exact_to": reached if why else PIXELS, "half_steps": len(steps)}
        rows.append({**place, "means_lost": lost, "why": why})
    return pd.DataFrame(rows)


def _end(model: ExactModel, reached: str) -> str:
    """What ends exactness at a tap, "" where nothing is lost."""
    order, embedding = (PIXELS, *model.target.available_taps), model.embedding
    if reached != order[1] or embedding is None:
        return model.gap(reached, order[order.index(reached) - 1])
    values, rank = len(embedding.matrix), embedding.rank
    lost = f"the patch embedding holds {rank} of {values} directions of a patch; the linear inverse completes it"
    return lost if rank < values else ""


def half_steps(values: Values, case: Case, settings: Settings = ALONE, train_seed: int = NO_SEED) -> None:
    """Every half-step by itself, from the true stream behind it (`step`) to the one before (`to`).

    Where a block has no tap between its halves, both together. Measures, of the study "half_step": the four FATES
    (0 or 1), tokens_right (share), log10_error (of the relative error).
    """
    for tap, before in tqdm(case.spans(), desc="half-steps", leave=False):
        outcomes, _ = taken_back(case, settings, tap, before, case.streams[tap])
        place = {"study": "half_step", "step": tap, "to": before}
        _add(values, outcomes, train_seed, tap, **place)


def chain(values: Values, case: Case, settings: Settings = ALONE, train_seed: int = NO_SEED) -> pd.DataFrame:
    """From the tap of the inverse to where exactness ends, an image followed, tap by tap, as long as it is right.

    Measures, of the study "chain": those of `half_steps`, of the whole way, and by `step` survived (still right behind
    it) and lost_another_root, lost_unsolved, lost_error_grown (lost first here). Returns a row an image, with these and
    lost_at.
    """
    source = case.inverse.source
    ends, alive, tokens = pd.DataFrame(index=range(case.count)), torch.arange(case.count), case.streams[source]
    ends["lost_at"] = None
    for tap, before in tqdm(case.spans(), desc="chain", leave=False):
        if len(alive):
            outcomes, x = taken_back(case.of_images(alive), settings, tap, before, tokens)
            ends.loc[alive.numpy(), outcomes.columns] = outcomes.to_numpy()
            right = torch.tensor((outcomes["fate"] == BACK).to_numpy())
            ends.loc[alive[~right].numpy(), "lost_at"] = tap
            alive = alive[right]
            tokens = case.streams[before].index(alive).replace(x[right])
        place = {"study": "chain", "step": tap, "to": before}
        still = ends["lost_at"].isna()
        values.add("survived", {train_seed: still.to_numpy(float)}, source, EXACT, **place)
        for fate in FATES[1:]:
            here = (ends["lost_at"] == tap) & (ends["fate"] == fate)
            values.add(f"lost_{fate}", {train_seed: here.to_numpy(float)}, source, EXACT, **place)
    _add(values, ends, train_seed, source, study="chain")
    return ends


def _add(values: Values, outcomes: pd.DataFrame, train_seed: int, tap: str, **columns: Any) -> None:
    for fate in FATES:
        values.add(fate, {train_seed: (outcomes["fate"] == fate).to_numpy(float)}, tap, EXACT, **columns)
    for measure in ("tokens_right", "log10_error"):
        values.add(measure, {train_seed: outcomes[measure].to_numpy(float)}, tap, EXACT, **columns)
