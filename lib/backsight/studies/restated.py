"""The study's questions asked again, of inverses that solve for the picture instead of guessing it.

    shape, detail ──► linear, direct, modular │ MAP, on the same states: paired gains, what depth costs
    colour        ──► the same scene in another hue: how much of the shift comes back
    cross-layer   ──► MAP of tap j fed with tap i's state; the exact inverse of one block fed with another's output
                                                └► verdicts: lost, fragile, non-linearly coded, cannot tell

A decoder that reads a deep tap badly may have lost the picture or may not read its code. The MAP inverse passes
candidates through the model itself, so that what it gets back beyond a decoder was there, coded in another way.
Everything here reads float32 states as they are recorded; what noise does to it is `stability_study`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, batches
from backsight.errors import BacksightError
from backsight.exact.inverse import ExactInverse
from backsight.exact.map import MapInverse, Noise, fit_map_tap
from backsight.exact.posterior import MapSettings
from backsight.exact.solver import Settings
from backsight.exact.steps import NotInvertibleError
from backsight.inverses.families import Reconstruct
from backsight.inverses.linear import fit_linear_pairs
from backsight.measures.hue import MINIMUM_CHROMA, object_chroma
from backsight.measures.pixels import score
from backsight.measures.structure import (
    HUE_OF_A_GUESS,
    Judged,
    Key,
    Measure,
    detail,
    fit_texture_probe,
    texture_accuracy,
)
from backsight.representation import Representation
from backsight.studies.layers import Pair, Scores, cross_application, loss, pairs_of_one_form, placed, translated
from backsight.studies.nulls import null_mean
from backsight.studies.quality import _rows, _with_masks, quality_images
from backsight.studies.recolour import Perturbation, open_objects, scene_objects
from backsight.studies.roots import map_base
from backsight.studies.tidy_rows import TidyRows
from backsight.tables.names import (
    EXACT,
    LOWER_IS_BETTER,
    MAP,
    NULL_GUESS,
    NULL_MEAN,
    NULL_SAME,
    NULL_SHUFFLED,
)
from backsight.tables.pool import as_table, metrics_row, pooled_interval, pooled_ratio, pooled_rows
from backsight.tables.values import METRIC_COLUMNS
from backsight.targets.base import Target

__all__ = [
    "Restated",
    "colour_follow",
    "cross_pairs",
    "depth_rows",
    "hue_shift_kept",
    "measure_restated",
]

SHOWN = 8  # images kept as pictures
REACH = 2  # places apart that taps are crossed with one another
TURNS = (30.0, 150.0)  # degrees: a smaller turn drowns, and a larger one could have gone either way round
STEP_SETTINGS = Settings(restarts=0, newton=20)  # as of a half-step alone in `exact_study`
COLUMNS = (
    *(*METRIC_COLUMNS, "seeds", "against", "of", "hue_shift", "source_tap", "target_tap", "group", "distance"),
    *("component", "band", "ceiling", "note"),
)
Place = tuple[str, str]  # inverse, tap
Tables = dict[Place, dict[str, np.ndarray]]  # {measure: (S, N)}


@dataclass(frozen=True)
class Restated:
    """metrics: tidy rows, METRIC_COLUMNS and seeds, against, of, hue_shift, source_tap, target_tap, …, note.

    images: (k, 3, H, W), the first ones; pictures: {inverse: {tap: (k, 3, H, W)}} of the first training seed;
    skipped: {tap: why it has no MAP inverse}.
    """

    metrics: pd.DataFrame
    images: Tensor
    pictures: dict[str, dict[str, Tensor]]
    skipped: dict[str, str]


# ------------------------------------------------------------------------------------------------ hue, followed or not


def hue_shift_kept(shown: np.ndarray, made: np.ndarray) -> np.ndarray:
    """(…, N) share of a hue shift that a reconstruction follows: 1 for a perfect inverse, 0 for a constant one.

    shown: (2, N) complex colours of the object (`colour.object_chroma`), before and after the shift; made: (…, 2, N) of
    the reconstructions. The turn of the hue made over the turn shown, each within ±180°: a guess has the mean 0. A
    reconstruction too grey for a hue has not followed (0). NaN where the object shown has no hue, or its turn lies
    outside TURNS: by 180° both ways round are the same.
    """
    turn = np.degrees(np.angle(shown[1] * shown[0].conj()))
    known = (np.abs(shown) >= MINIMUM_CHROMA).all(0) & (np.abs(turn) >= TURNS[0]) & (np.abs(turn) <= TURNS[1])
    followed = np.degrees(np.angle(made[..., 1, :] * made[..., 0, :].conj()))
    coloured = (np.abs(made) >= MINIMUM_CHROMA).all(-2)
    return np.where(known, np.where(coloured, followed, 0.0) / np.where(known, turn, 1.0), np.nan)


def colour_follow(shown: np.ndarray, made: np.ndarray) -> np.ndarray:
    """(…, N) slope of the colour made over the colour shown, chroma included: 1 for a perfect inverse.

    shown: (K, N) complex, made: (…, K, N), under K hues of one scene, two or more. The real least-squares `follow` of
    `colour.respond`, which asks for three hues round the circle; two give the slope as well, of any shift.
    """
    turning = shown - shown.mean(0)
    moved = made - made.mean(-2, keepdims=True)
    power = (np.abs(turning) ** 2).sum(0)
    seen = np.abs(shown).mean(0) >= MINIMUM_CHROMA
    slope = np.real(moved * turning.conj()).sum(-2) / np.where(seen & (power > 0), power, 1.0)
    return np.where(seen & (power > 0), slope, np.nan)


# --------------------------------------------------------------------------------------------------------- the inverses


@dataclass(frozen=True)
class _Study:
    """What every part needs; the names are those of `measure_restated`."""

    target: Target
    families: Mapping[int, Mapping[str, Mapping[str, Reconstruct]]]
    taps: tuple[str, ...]
    maps: Mapping[str, Sequence[MapInverse]]  # {tap: one of each of the first training seeds}
    mean: Tensor
    batch_size: int
    seed: int

    @property
    def names(self) -> list[str]:
        return list(next(iter(self.families.values())))


def _fitted_maps(
    target: Target,
    families: Mapping[int, Mapping[str, Mapping[str, Reconstruct]]],
    taps: Sequence[str],
    held_out: Tensor,
    settings: MapSettings | None,
    checked: int,
    map_seeds: int,
    seed: int,
    known: Mapping[str, Sequence[MapInverse]],
    done: Callable[[], Any],
) -> tuple[dict[str, list[MapInverse]], dict[str, str]]:
    """({tap: MAP inverses}, {tap: why there is none}): predictions and padded tokens are refused by `fit_map_tap`."""
    found: dict[str, list[MapInverse]] = {}
    skipped = {}
    for tap in taps:
        if len(known.get(tap, ())) >= map_seeds:
            found[tap] = list(known[tap])[:map_seeds]
            done()
            continue
        if not all(any(tap in inverses for inverses in each.values()) for each in families.values()):
            skipped[tap] = f"No inverse family reads {tap} of {target.name}, so that nothing starts the search."
            done()
            continue
        try:
            bases = [map_base(each, tap) for each in list(families.values())[:map_seeds]]
            found[tap] = [
                fit_map_tap(target, tap, base, held_out, Noise("float32"), settings, len(held_out), checked, seed)
                for base in bases
            ]
        except BacksightError as error:
            skipped[tap] = str(error)
        except KeyError as error:
            # Detection targets record in their own way, and the differentiable pass then never sees the tap.
            skipped[tap] = f"The pass of {target.name} from pixels to {tap} cannot be differentiated ({error})."
        done()
    return found, skipped


def _solved(inverse: Any, representation: Representation, batch_size: int) -> tuple[Tensor, Tensor]:
    """(images (B, 3, H, W) in [0, 1], (B,) mean square of the whitened residual: 1 where y is of this tap)."""
    images, misfits = [], []
    for part in torch.arange(representation.batch).split(batch_size):
        _, found, patches = inverse.solve(representation.index(part))
        images.append(inverse.pictures(patches).clamp(0, 1))
        misfits.append(found.misfit)
    return torch.cat(images).detach(), torch.cat(misfits).detach()


@torch.no_grad()
def _decoded(inverse: Reconstruct, representation: Representation, batch_size: int = 32) -> Tensor:
    parts = torch.arange(representation.batch).split(batch_size)
    return torch.cat([inverse(representation.index(part)).clamp(0, 1) for part in parts])


def _trained(study: _Study, representation: Representation, tap: str) -> dict[str, list[Tensor]]:
    """{family: [(N, 3, H, W)] one of each training seed}."""
    return {
        name: [_decoded(each[name][tap], representation) for each in study.families.values()]
        for name in study.names
        if all(tap in each[name] for each in study.families.values())
    }


def _record(target: Target, images: Tensor, taps: Iterable[str]) -> dict[str, Any]:
    return dict(target.record(images, list(taps)))


# --------------------------------------------------------------------------------------------------- shape and detail


def _measures(source: str, size: tuple[int, int], n: int, texture_images: int, seed: int) -> list[Measure]:
    """`detail`, and on scenes whether the texture can still be named (by a probe of true training images)."""
    if source != "scenes" or not texture_images:
        return [detail]
    shown = scene_objects("train", texture_images, size[0], seed)
    probe = fit_texture_probe(shown.images, shown.inside, shown.textures)
    labels = scene_objects("test", n, size[0], seed).textures
    if unknown := set(labels) - set(probe.names):
        raise BacksightError(
            f"{texture_images} training scenes hold no {', '.join(sorted(unknown))}: take more texture_images, or 0."
        )
    return [detail, texture_accuracy(probe, labels)]


def _measure_depth(
    study: _Study, judged: Judged, measures: Sequence[Measure], collected: TidyRows, done: Callable[[], Any]
) -> tuple[Tables, dict[str, dict[str, list[Tensor]]]]:
    """Rows of every measure, inverse and tap; the values of each image, and {inverse: {tap: images by seed}}."""
    images = judged.images
    prepared = [measure(judged) for measure in measures]
    recorded = _record(study.target, images, study.taps)
    tables: Tables = {}
    made: dict[str, dict[str, list[Tensor]]] = {}
    for tap in study.taps:
        by_inverse = _trained(study, recorded[tap], tap)
        if tap in study.maps:
            solved = [_solved(each, recorded[tap], study.batch_size) for each in study.maps[tap]]
            by_inverse[MAP] = [each for each, _ in solved]
            # Samples do not know of one another: another image's solution is that of its representation.
            by_inverse[NULL_SHUFFLED] = [each.roll(1, 0) for each in by_inverse[MAP]]
            collected.median(torch.stack([misfit for _, misfit in solved]), "misfit", tap, MAP)
            done()
        by_inverse[NULL_MEAN] = [study.mean.expand_as(images)]
        for inverse, pictures in by_inverse.items():
            values: dict[Key, dict[int, list[Any]]] = {}
            for number, picture in enumerate(pictures):
                scored: dict[Key, Any] = {}
                scored.update(score(images, picture, judged.masks))
                for measured in prepared:
                    scored |= measured(picture)
                for key, value in scored.items():
                    values.setdefault(key, {})[number] = [value]
            collected.rows += _rows(values, study.seed, collected.places(tap, inverse))
            tables[inverse, tap] = {
                key: as_table({number: parts[0] for number, parts in by_seed.items()})
                for key, by_seed in values.items()
                if isinstance(key, str) and isinstance(by_seed[0][0], Tensor) and not key.endswith("_ceiling")
            }
            made.setdefault(inverse, {})[tap] = pictures
        if judged.largest is not None:
            guess = (HUE_OF_A_GUESS,) * 3
            places = collected.places(tap, NULL_GUESS, seeds=1, note="by definition")
            collected.rows.append(metrics_row("hue_error", *guess, len(images), study.seed, **places))
    return tables, made


def depth_rows(tables: Tables, taps: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """Differences of per-image values: of inverses at one tap, of taps by one inverse, and what is gained back.

    tables: {(inverse, tap): {measure: (S, N)}}, of "map" and trained inverses (nulls are left out); taps: shallow to
    deep. Rows, each paired image by image (and training seed by training seed, where both have them):
    "<measure>_difference": map − each other inverse (`against`) at the tap; depth_cost: at the tap − at the shallowest
    one (`against`), of the measure `of`, for every inverse; depth_cost_recovered: (map − a trained inverse, here) /
    (that inverse at the shallowest tap − here), the share of the loss that it shows which is gone with MAP (1: MAP
    reads here what it reads at the shallowest tap); depth_cost_spared: 1 − depth_cost of map / its depth_cost, where
    MAP is held against its own level at the shallowest tap. Both NaN, with a note, where its cost may be none.
    """
    inverses = [name for name in dict.fromkeys(name for name, _ in tables) if not name.startswith("null_")]
    rows: list[dict[str, Any]] = []
    for tap in taps:
        for name in inverses:
            if name == MAP or (MAP, tap) not in tables or (name, tap) not in tables:
                continue
            for measure, values in tables[MAP, tap].items():
                if measure in tables[name, tap]:
                    paired = _paired(values, tables[name, tap][measure])
                    common = {"tap": tap, "inverse": MAP, "against": name, "of": measure}
                    rows += pooled_rows(paired, f"{measure}_difference", seed, **common)
    solved = [tap for tap in taps if (MAP, tap) in tables]
    for tap in solved[1:]:
        first, costs = solved[0], {}
        for name in inverses:
            if (name, tap) not in tables or (name, first) not in tables:
                continue
            for measure, deep in tables[name, tap].items():
                if measure not in tables[name, first]:
                    continue
                costs[name, measure] = deep - tables[name, first][measure]
                common = {"tap": tap, "inverse": name, "against": first, "of": measure}
                rows += pooled_rows(costs[name, measure], "depth_cost", seed, **common)
        for (name, measure), cost in costs.items():
            if name != MAP and (MAP, measure) in costs:
                gain = _paired(tables[MAP, tap][measure], tables[name, tap][measure])
                spared = _paired(costs[MAP, measure], cost)
                for share, gained in (("recovered", gain), ("spared", spared)):
                    columns = {"tap": tap, "inverse": MAP, "against": name, "of": measure}
                    rows.append(_share_of_loss(f"depth_cost_{share}", gained, cost, seed, columns))
    return rows


def _paired(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(S, N) of two tables, over the training seeds that both have."""
    both = min(len(ours), len(theirs))
    return ours[:both] - theirs[:both]


def _share_of_loss(
    measure: str, gained: np.ndarray, cost: np.ndarray, seed: int, columns: Mapping[str, Any]
) -> dict[str, Any]:
    """gained over −cost, both (S, N), where the cost is a loss."""
    cost = cost[: len(gained)]
    _, low, high = pooled_interval(cost, seed)
    lost = low > 0 if columns["of"] in LOWER_IS_BETTER else high < 0
    value = pooled_ratio(gained, -cost, seed) if lost else (math.nan,) * 3
    note = None if lost else f"{columns['against']} loses nothing that could be told from none"
    return metrics_row(measure, *value, gained.shape[1], seed, **columns, seeds=len(gained), note=note)


# -------------------------------------------------------------------------------------------------------------- colour


def _measure_hue(
    study: _Study, source: str, count: int, shifts: Sequence[float], collected: TidyRows, done: Callable[[], Any]
) -> Tables:
    """What every inverse follows of hue shifts of one object, everything else staying as it was."""
    objects = open_objects(source, study.target, count, study.seed)
    turned = [Perturbation("hue_shift", "object", hue_shift=shift) for shift in shifts]
    pictures = [objects.images, *(objects.perturbed(each) for each in turned)]
    shown = np.stack([object_chroma(each, objects.masks) for each in pictures])
    recorded = [_record(study.target, each, study.taps) for each in pictures]
    tables: Tables = {}
    for tap in study.taps:
        made: dict[str, list[list[Tensor]]] = {}
        for each in recorded:
            by_inverse = _trained(study, each[tap], tap)
            if tap in study.maps:
                by_inverse[MAP] = [_solved(one, each[tap], study.batch_size)[0] for one in study.maps[tap]]
                done()
            for name, of_seeds in by_inverse.items():
                made.setdefault(name, []).append(of_seeds)
        colours = {
            name: np.stack([[object_chroma(one, objects.masks) for one in each] for each in zip(*parts, strict=True)])
            for name, parts in made.items()
        }
        if MAP in colours and len(objects) > len(shown):
            # Every hue of another scene, and each of a different one: else the shift would be known for nothing.
            parts = [np.roll(colours[MAP][:, k], k + 1, axis=-1) for k in range(len(shown))]
            colours[NULL_SHUFFLED] = np.stack(parts, axis=1)
        for name, colour in colours.items():
            kept = np.stack([hue_shift_kept(shown[[0, k]], colour[:, [0, k]]) for k in range(1, len(shown))], axis=1)
            for number, shift in enumerate(shifts):
                collected.pooled(kept[:, number], "hue_shift_kept", tap, name, hue_shift=float(shift))
            # A shift that has no direction counts in the slope alone.
            with np.errstate(invalid="ignore"):
                defined = (~np.isnan(kept)).sum(1)
                mean = np.where(defined > 0, np.nansum(kept, axis=1) / np.maximum(defined, 1), np.nan)
            values = {"hue_shift_kept": mean, "colour_follow": colour_follow(shown, colour)}
            for measure, table in values.items():
                collected.pooled(table, measure, tap, name)
            tables[name, tap] = values
        places = collected.places(tap, NULL_GUESS, seeds=1, note="by definition")
        collected.rows.append(metrics_row("hue_shift_kept", 0.0, 0.0, 0.0, len(objects), study.seed, **places))
    return tables


# --------------------------------------------------------------------------------------------------------- cross-layer


def cross_pairs(taps: Sequence[str], recorded: Mapping[str, Representation], reach: int = REACH) -> list[Pair]:
    """Every (source tap, target tap) of one form, at most `reach` places apart among `taps`, each with itself too."""
    place = {tap: number for number, tap in enumerate(taps)}
    same = pairs_of_one_form({tap: recorded[tap] for tap in taps})
    return [(i, j) for i, j in same if abs(place[i] - place[j]) <= reach]


def _measure_cross(
    study: _Study, images: Tensor, made: Mapping[str, list[Tensor]], collected: TidyRows, done: Callable[[], Any]
) -> None:
    """Every MAP inverse fed with its neighbours' states as they are, beside trained inverses and nulls.

    made: {tap: what MAP makes of its own state, by seed}. The likelihood keeps the statistics of the tap that the
    inverse was made for; cross_misfit says how little it expects such a state, and state_unexplained which share of
    the state's variance over the images the picture does not make when it is passed through the model up to tap j.
    """
    taps = [tap for tap in study.taps if tap in study.maps]
    recorded = _record(study.target, images, taps)
    pairs = cross_pairs(taps, recorded)
    if not any(i != j for i, j in pairs):
        return
    scores: dict[str, Scores] = {MAP: {}, NULL_SHUFFLED: {}}
    for pair in pairs:
        source, wanted = pair
        y = translated(recorded, pair)
        if source == wanted:
            pictures = [each[: len(images)] for each in made[source]]
        else:
            solved = [_solved(each, y, study.batch_size) for each in study.maps[wanted]]
            pictures = [each for each, _ in solved]
            at = placed(study.target, pair)
            misfit = torch.stack([each for _, each in solved])
            collected.median(misfit, "cross_misfit", source, MAP, **_without_places(at))
            done()
        unexplained = torch.stack([_unexplained(study.target, each, wanted, y) for each in pictures])
        collected.pooled(unexplained, "state_unexplained", source, MAP, **_without_places(placed(study.target, pair)))
        scores[MAP][pair] = np.stack([score(images, each)["psnr"].double().numpy() for each in pictures])
        scores[NULL_SHUFFLED][pair] = np.stack(
            [score(images, each.roll(1, 0))["psnr"].double().numpy() for each in pictures]
        )
    for name in study.names:
        inverses = {seed: each[name] for seed, each in study.families.items()}
        read = [pair for pair in pairs if all(pair[0] in each and pair[1] in each for each in inverses.values())]
        if any(i != j for i, j in read):
            scores[name] = cross_application(study.target, images, inverses, read, seed=study.seed)
    _cross_rows(study, scores, collected)
    floor = score(images, study.mean.expand_as(images))["psnr"]
    for tap in taps:
        collected.pooled(floor, "cross_psnr", tap, NULL_MEAN, **_without_places(placed(study.target, (tap, tap))))


def _cross_rows(study: _Study, scores: Mapping[str, Scores], collected: TidyRows) -> None:
    for name, found in scores.items():
        apart = [pair for pair in found if pair[0] != pair[1]]
        for pair, values in found.items():
            at = _without_places(placed(study.target, pair))
            collected.pooled(values, "cross_psnr", pair[0], name, **at)
            if name in study.names and pair in scores[MAP]:
                paired = _paired(scores[MAP][pair], values)
                collected.pooled(paired, "cross_psnr_difference", pair[0], MAP, against=name, **at)
        if name == NULL_SHUFFLED:
            continue
        note = f"mean over {len(apart)} pairs of different taps"
        losses = np.mean([loss(found, pair) for pair in apart], axis=0)
        collected.pooled(losses, "cross_loss", None, name, note=note)
        if name != MAP:
            gains = np.mean([_paired(scores[MAP][pair], found[pair]) for pair in apart], axis=0)
            collected.pooled(gains, "cross_psnr_difference", None, MAP, against=name, note=note)


def _without_places(at: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in at.items() if name not in ("tap", "depth")}


def _unexplained(target: Target, images: Tensor, tap: str, y: Representation) -> Tensor:
    """(B,) |T(images) − y|² over the mean of |y − mean of y|²: 0, y is met; 1, no better than one state for all."""
    made = _record(target, images, [tap])[tap].values
    spread = (y.values - y.values.mean(0)).square().flatten(1).sum(1).mean()
    return ((made - y.values).square().flatten(1).sum(1) / spread.clamp(min=1e-30)).double()


def _measure_stages(
    study: _Study, exact: Mapping[str, ExactInverse], images: Tensor, held_out: Tensor, collected: TidyRows
) -> None:
    """The exact inverse of one block fed with what another block made: does it undo that one as well?

    stage_error: relative distance of the result from what went into the block of tap i (median over images), for the
    exact inverse of block j, a linear map fitted from tap j to the one before it, and no change at all; stage_solved:
    share of images for which block j can make that state (the exact inverse alone); stage_nearer: share of images where
    the result is nearer to the truth than no change.
    """
    if not exact:
        return
    walk = next(iter(exact.values())).model.walk
    blocks = [tap for tap in study.target.tap_set("blocks") if tap in walk.taps]
    before = dict(zip(blocks[1:], blocks, strict=False))
    owners: dict[str, ExactInverse] = {}
    for tap in (tap for tap in blocks if tap in exact and tap in before):
        try:
            walk.between(tap, before[tap])
        except NotInvertibleError:
            continue
        owners[tap] = exact[tap].at(tap, STEP_SETTINGS)
    if not owners:
        return
    recorded = _record(study.target, images, blocks)
    linear = fit_linear_pairs(
        study.target, held_out, [(tap, before[tap]) for tap in owners], seed=study.seed, progress=False
    )
    for wanted, inverse in owners.items():
        place = blocks.index(wanted)
        for source in blocks[max(1, place - REACH) : place + REACH + 1]:
            if recorded[source].signature != recorded[wanted].signature:
                continue
            y, truth = translated(recorded, (source, wanted)), recorded[before[source]].values.double()
            if truth.shape != recorded[before[wanted]].values.shape:
                continue
            trace = inverse.trace(y, to=before[wanted])
            with torch.no_grad():
                mapped = linear[wanted, before[wanted]](y)
            found = {EXACT: trace.values, "linear": mapped.values.double(), NULL_SAME: y.values.double()}
            errors = {name: _relative(values, truth) for name, values in found.items()}
            at = _without_places(placed(study.target, (source, wanted)))
            for name, error in errors.items():
                collected.median(error, "stage_error", source, name, **at)
                if name != NULL_SAME:
                    nearer = (error < errors[NULL_SAME]).double()
                    collected.pooled(nearer, "stage_nearer", source, name, **at)
            collected.pooled(trace.solved.double(), "stage_solved", source, EXACT, **at)


def _relative(values: Tensor, truth: Tensor) -> Tensor:
    return (values - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)


# ----------------------------------------------------------------------------------------------------------- the study


def measure_restated(
    target: Target,
    families: Mapping[int, Mapping[str, Mapping[str, Reconstruct]]],
    taps: str | Sequence[str],
    images: str,
    *,
    calibration: ImageSource | Tensor,
    n: int = 16,
    hue_images: int = 8,
    shifts: Sequence[float] = (120.0,),
    map_settings: MapSettings | None = None,
    maps: Mapping[str, Sequence[MapInverse]] | None = None,
    exact: Mapping[str, ExactInverse] | None = None,
    cross_images: int = 8,
    stage_images: int = 4,
    fitted: int = 128,
    checked: int = 8,
    map_seeds: int = 1,
    texture_images: int = 1000,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Restated:
    """Shape, detail, colour and cross-layer reading by linear, direct, modular and MAP inverses of float32 states.

    families: {training seed: {family: {tap: reconstruction}}} (`families_by_seed`); images: "scenes", a COCO root or a
    folder, as `quality_images` and `open_objects` take it; calibration: held-out images, of which the first `fitted`
    fit the MAP inverses (`fit_map_tap`, of the first `map_seeds` training seeds), `checked` are solved for their gain;
    maps: {tap: such inverses, one a training seed} that are there already (`Stability.maps`) and are not fitted again;
    n: images of shape and detail; hue_images: scenes (0: none), each also under the hue shifts, in degrees;
    cross_images: of those n, of the cross-application (0: none); exact: {tap: exact inverse}, whose single blocks are
    crossed on the first `stage_images`; texture_images: training scenes of the texture probe (0: no texture).
    Taps without a MAP inverse (predictions, padded tokens, no trained inverse to start from) are in `skipped` with the
    reason, and their trained inverses are measured all the same.
    Measures: those of `detail`, psnr, ssim, mse, psnr_objects, texture_accuracy, misfit; hue_shift_kept (each shift,
    and the mean over shifts without one), colour_follow; the differences of `depth_rows`; cross_psnr,
    cross_psnr_difference, cross_loss, cross_misfit, state_unexplained; stage_error, stage_solved, stage_nearer.
    Nulls: null_mean, null_shuffled (MAP of another image's representation; for hue shifts every hue from another scene,
    where there are scenes enough), null_guess, null_unchanged.
    Raises BacksightError on counts and shifts that do not fit, and where no tap has a MAP inverse.
    """
    if n < 2 or min(hue_images, cross_images, stage_images) < 0 or cross_images == 1 or map_seeds < 1 or not families:
        raise BacksightError(
            "Give families of at least one training seed, n from 2, map_seeds from 1, and cross_images 0 or from 2: a "
            "shuffled null needs another image."
        )
    if hue_images and (not shifts or any(not math.isfinite(each) or each % 360 == 0 for each in shifts)):
        raise BacksightError(f"Hue shifts are degrees that turn a hue, such as (120.0, 240.0), not {tuple(shifts)}.")
    resolved = target.resolve_taps(taps)
    ordered = tuple(tap for tap in target.available_taps if tap in resolved)
    source, dataset, split = quality_images(images, target, n, seed)
    pictures, masks, largest, _ = next(iter(_with_masks(source, n)))
    judged = Judged(pictures, masks, largest, torch.arange(len(pictures)), {})
    held_out = _first(calibration, fitted)
    common = {"target": target.name, "weights": target.weights, "dataset": dataset, "split": split}
    collected = TidyRows(target, common, seed)
    crossed = min(cross_images, len(pictures))
    passes = 2 + (1 + len(shifts)) * bool(hue_images) + 2 * REACH * bool(crossed)
    with tqdm(
        total=passes * len(ordered), desc=f"questions to {target.name}", leave=False, disable=not progress
    ) as bar:
        maps, skipped = _fitted_maps(
            target, families, ordered, held_out, map_settings, checked, map_seeds, seed, maps or {}, bar.update
        )
        if not maps:
            raise BacksightError(
                f"No tap of {', '.join(ordered)} has a MAP inverse. {ordered[0]}: {skipped[ordered[0]]}"
            )
        study = _Study(target, families, ordered, maps, null_mean(held_out).clamp(0, 1), batch_size, seed)
        measures = _measures(images, target.image_size, len(pictures), texture_images, seed)
        tables, made = _measure_depth(study, judged, measures, collected, bar.update)
        _add(collected, depth_rows(tables, ordered, seed))
        if hue_images:
            _add(collected, depth_rows(_measure_hue(study, images, hue_images, shifts, collected, bar.update), ordered))
        if crossed:
            _measure_cross(study, pictures[:crossed], made[MAP], collected, bar.update)
        if stage_images:
            _measure_stages(study, exact or {}, pictures[:stage_images], held_out, collected)
    metrics = pd.DataFrame(collected.rows)
    metrics = metrics.reindex(columns=[*COLUMNS, *(each for each in metrics.columns if each not in COLUMNS)])
    shown = {
        inverse: {tap: by_seed[0][:SHOWN].clone() for tap, by_seed in per_tap.items()}
        for inverse, per_tap in made.items()
        if not inverse.startswith("null_")
    }
    return Restated(metrics, pictures[:SHOWN], shown, skipped)


def _add(collected: TidyRows, rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        collected.rows.append({**row, **collected.common, "depth": collected.target.depth(row["tap"])})


def _first(images: ImageSource | Tensor, count: int) -> Tensor:
    parts: list[Tensor] = []
    for part in batches(images, 64):
        parts.append(part)
        if sum(map(len, parts)) >= count:
            break
    return torch.cat(parts)[:count]
