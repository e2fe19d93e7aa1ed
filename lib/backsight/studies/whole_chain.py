"""Does an image come back to round-off through many blocks at once? Whole chains, solved from a MAP inverse's picture.

    tap ──► MAP inverse ──► start ──► solve_joint, all half-steps together ──► embedding ──► picture
                                       back │ another root │ near │ lost            the fate of every image

Back: the first stream within `RIGHT` of the true one. Another root: T(x) = y to round-off, and x elsewhere. Near:
neither, but within NEAR. The null starts from another image's picture: what a search finds without a sensible start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from backsight.errors import BacksightError
from backsight.exact.inverse import ExactInverse
from backsight.exact.map import MapSettings, fit_map_tap
from backsight.exact.steps import Embedding, ExactModel, in_precision, walk
from backsight.inverses.families import Reconstruct
from backsight.inverses.rows import patchify
from backsight.measures.pixels import psnr
from backsight.studies.by_seed import map_base
from backsight.studies.exact import relative_error
from backsight.studies.joint import solve_joint
from backsight.tables.names import ANOTHER_ROOT, BACK, CHAIN_FATES, EXACT, LOST, MAP, NEAR, NEARBY, NULL_SHUFFLED, RIGHT
from backsight.tables.values import Values
from backsight.targets.base import Target

EMBEDDING = "embedding"  # the true first stream, decoded in the same way: what there is to get back
NULL_IMAGES = 2
BATCH = 4


def whole_chains(
    values: Values,
    target: Target,
    families: Mapping[str, Mapping[str, Reconstruct]],
    taps: Sequence[str],
    images: Tensor,
    held_out: Tensor,
    map_settings: MapSettings | None = None,
    iterations: int = 30,
) -> dict[str, dict[str, Tensor]]:
    """Every image of every tap through all half-steps to the embedding, from the start that a MAP inverse gives.

    families: with an inverse of every tap, and "linear" at the first one, which completes what the patch embedding
    drops; held_out: fit the MAP inverse of each tap. Of NULL_IMAGES the search is also started from the picture of the
    next image (inverse null_shuffled). Returns {tap: {inverse: (N, 3, H, W)}}.

    Values of the study "whole": back, another_root, near, lost (0 or 1) and log10_error (relative) of the inverse
    exact; psnr of the families, map, exact, embedding (the true first stream, decoded alike).
    Raises BacksightError where a tap's chain does not reach an affine patch embedding.
    """
    model, first = ExactModel.of(target), target.available_taps[0]
    linear = cast(nn.Module | None, families.get("linear", {}).get(first))
    inverses = {tap: ExactInverse(model, tap, completion=linear) for tap in target.resolve_taps(taps)}
    for tap, inverse in inverses.items():
        bare = tap == first or inverse.reached != first or model.embedding is None
        if bare or any(step.norm is not None for step in inverse.steps):
            raise BacksightError(
                f"From {tap} of {target.name} no chain of residual half-steps (without a norm behind them) reaches an "
                f"affine patch embedding; exactness ends at {inverse.reached}: leave {tap} out of the whole chains."
            )
    embedding, single = cast(Embedding, model.embedding), walk(in_precision(target, torch.float32))
    shown, every = {}, torch.arange(len(images))
    for tap, inverse in tqdm(inverses.items(), desc=f"whole chains of {target.name}", leave=False):
        fit = fit_map_tap(target, tap, {tap: map_base(families, tap)}, held_out, None, map_settings, checked=0)
        given, truth = target.record(images, [tap])[tap], model.target.record(images.double(), [first, tap])
        start = torch.cat([fit.pictures(fit.solve(given.index(part))[1].z) for part in every.split(BATCH)])
        searches, ends = {EXACT: (every, start), NULL_SHUFFLED: (every[:NULL_IMAGES], start.roll(1, 0))}, {}
        for name, (which, pictures) in list(searches.items())[: len(images)]:  # one image alone has no other's picture
            patches = patchify(pictures[which].to(embedding.matrix), embedding.patch) @ embedding.matrix
            prefix = embedding.prefix.expand(len(which), -1, -1)
            solutions, begun = [], torch.cat([prefix, patches + embedding.bias], dim=1)
            for part in which.split(BATCH):
                ways, y = (inverse.steps, single.between(tap, first)), truth[tap].index(part).values
                solutions.append(solve_joint(*ways, y, begun[part], len(embedding.prefix), iterations))
            ends[name] = torch.cat([one.x for one in solutions])
            error = relative_error(ends[name], truth[first].index(which).values).cpu().numpy()
            solved = torch.cat([one.solved for one in solutions]).cpu().numpy()
            fates = np.select([error <= RIGHT, solved, error <= NEAR], [BACK, ANOTHER_ROOT, NEARBY], LOST)
            for fate in CHAIN_FATES:
                values.add(fate, fates == fate, tap, name, study="whole")
            values.add("log10_error", np.log10(error.clip(min=1e-17)), tap, name, study="whole")
        decoded = inverse.at(first)
        returned = {name: taps[tap](given) for name, taps in families.items() if tap in taps} | {MAP: start.clamp(0, 1)}
        returned |= {EXACT: decoded(truth[first].replace(ends[EXACT])), EMBEDDING: decoded(truth[first])}
        shown[tap] = {name: pictures.to(images) for name, pictures in returned.items()}
        for name, pictures in shown[tap].items():
            values.add("psnr", psnr(images, pictures), tap, name, study="whole")
    return shown
