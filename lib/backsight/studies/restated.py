"""The study's questions asked again, of inverses that solve for the picture instead of guessing it.

    shape, detail ──► linear, direct, modular │ MAP, on the same states: paired gains, what depth costs
    colour        ──► the same scene in another hue: how much of the shift comes back
    cross-layer   ──► MAP of tap j fed with tap i's state
                            └► tables.verdicts: lost, fragile, non-linearly coded, cannot tell

A decoder that reads a deep tap badly may have lost the picture or may not read its code. The MAP inverse passes
candidates through the model itself, so that what it gets back beyond a decoder was there, coded in another way.
Everything here reads float32 states as they are recorded; what noise does to it is `studies.stability`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, batches, open_images
from backsight.errors import BacksightError
from backsight.exact.map import MapInverse, Noise, fit_map_tap, parts_of
from backsight.exact.posterior import MapSettings
from backsight.inverses.families import Reconstruct
from backsight.measures.hue import MINIMUM_CHROMA, object_chroma
from backsight.measures.pixels import score
from backsight.measures.structure import HUE_OF_A_GUESS, Judged, Measure, detail, fit_texture_probe, texture_accuracy
from backsight.representation import Representation
from backsight.studies.layers import Pair, Scores, cross_application, loss, pairs_of_one_form, placed, translated
from backsight.studies.nulls import null_mean
from backsight.studies.recolour import Perturbation, open_objects, scene_objects
from backsight.studies.roots import map_base
from backsight.studies.tidy_rows import TidyRows
from backsight.tables.names import LOWER_IS_BETTER, MAP, NULL_GUESS, NULL_MEAN, NULL_SHUFFLED
from backsight.tables.pool import as_table, pooled_interval, pooled_ratio
from backsight.targets.base import Target

SHOWN = 8  # images kept as pictures
TOGETHER = 8  # images solved at once
REACH = 2  # places apart that taps are crossed with one another
TURNS = (30.0, 150.0)  # degrees: a smaller turn drowns, and a larger one could have gone either way round
COLUMNS = ("seeds", "against", "of", "hue_shift", "source_tap", "target_tap", "group", "distance", "component", "note")
Families = Mapping[int, Mapping[str, Mapping[str, Reconstruct]]]  # {training seed: {family: {tap: reconstruction}}}
Tables = dict[tuple[str, str], dict[str, np.ndarray]]  # {(inverse, tap): {measure: (S, N)}}


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
    """What every part needs (the names are those of `measure_restated`), and the rows."""

    target: Target
    families: Families
    taps: tuple[str, ...]
    maps: Mapping[str, MapInverse]
    mean: Tensor
    rows: TidyRows
    done: Callable[[], Any]


def _map_of(
    target: Target,
    families: Families,
    tap: str,
    held_out: Tensor,
    settings: MapSettings | None,
    checked: int,
    seed: int,
) -> MapInverse | str:
    """The MAP inverse of a tap, or why there is none."""
    if not all(any(tap in inverses for inverses in by_family.values()) for by_family in families.values()):
        return f"No inverse family reads {tap} of {target.name}, so that nothing starts the search."
    base = map_base(next(iter(families.values())), tap)
    try:
        return fit_map_tap(target, tap, base, held_out, Noise("float32"), settings, len(held_out), checked, seed)
    except BacksightError as error:
        return str(error)  # predictions and padded tokens
    except KeyError as error:
        # Detection targets record in their own way, and the differentiable pass then never sees the tap.
        return f"The pass of {target.name} from pixels to {tap} cannot be differentiated ({error})."


def _solved(inverse: MapInverse, representation: Representation) -> tuple[Tensor, Tensor]:
    """(images (B, 3, H, W) in [0, 1], (B,) mean square of the whitened residual: 1 where y is of this tap)."""
    images, misfits = [], []
    for part in parts_of(representation, TOGETHER):
        _, solution, patches = inverse.solve(part)
        images.append(inverse.pictures(patches).clamp(0, 1))
        misfits.append(solution.misfit)
    return torch.cat(images).detach(), torch.cat(misfits).detach()


@torch.no_grad()
def _trained(study: _Study, representation: Representation, tap: str) -> dict[str, list[Tensor]]:
    """{family: [(N, 3, H, W)] one of each training seed}."""
    made: dict[str, list[Tensor]] = {}
    for name in next(iter(study.families.values())):
        inverses = [by_family[name] for by_family in study.families.values()]
        if all(tap in inverse for inverse in inverses):
            parts = parts_of(representation, 32)
            made[name] = [torch.cat([inverse[tap](part).clamp(0, 1) for part in parts]) for inverse in inverses]
    return made


# --------------------------------------------------------------------------------------------------- shape and detail


def _judged(images: ImageSource) -> Judged:
    items = list(images)
    pictures = torch.stack([item["image"] for item in items]).float() / 255
    places = torch.arange(len(items))
    if "masks" not in items[0]:
        return Judged(pictures, None, None, places, {})
    nothing = torch.zeros(1, *pictures.shape[2:], dtype=torch.bool)
    masks = [item["masks"].bool() if len(item["masks"]) else nothing for item in items]
    largest = torch.stack([of_image[of_image.flatten(1).sum(1).argmax()] for of_image in masks])
    return Judged(pictures, torch.stack([of_image.any(0) for of_image in masks]), largest, places, {})


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
    study: _Study, judged: Judged, measures: Sequence[Measure]
) -> tuple[Tables, dict[str, dict[str, Tensor]]]:
    """Rows of every measure, inverse and tap; the values of each image, and {inverse: {tap: images of one seed}}."""
    images, rows = judged.images, study.rows
    prepared = [measure(judged) for measure in measures]
    recorded = study.target.record(images, list(study.taps))
    tables: Tables = {}
    made: dict[str, dict[str, Tensor]] = {}
    for tap in study.taps:
        by_inverse = _trained(study, recorded[tap], tap)
        if tap in study.maps:
            solved, misfit = _solved(study.maps[tap], recorded[tap])
            # Samples do not know of one another: another image's solution is that of its representation.
            by_inverse |= {MAP: [solved], NULL_SHUFFLED: [solved.roll(1, 0)]}
            rows.median(misfit, "misfit", tap, MAP)
            study.done()
        by_inverse[NULL_MEAN] = [study.mean.expand_as(images)]
        for inverse, by_seed in by_inverse.items():
            scores: list[dict[Any, Any]] = []
            for picture in by_seed:
                scores.append(dict(score(images, picture, judged.masks)))
                for measured in prepared:
                    scores[-1] |= measured(picture)
            # Of `detail`, what has one value an image: no bands, and no ceilings.
            single = [key for key, value in scores[0].items() if isinstance(key, str) and isinstance(value, Tensor)]
            tables[inverse, tap] = {
                measure: as_table({number: of_seed[measure] for number, of_seed in enumerate(scores)})
                for measure in single
                if not measure.endswith("_ceiling")
            }
            for measure, table in tables[inverse, tap].items():
                rows.pooled(table, measure, tap, inverse)
            made.setdefault(inverse, {})[tap] = by_seed[0]
        if judged.largest is not None:
            rows.one((HUE_OF_A_GUESS,) * 3, "hue_error", tap, NULL_GUESS, len(images), seeds=1, note="by definition")
    return tables, made


def add_depth_rows(rows: TidyRows, tables: Tables, taps: Sequence[str]) -> None:
    """Differences of per-image values: of inverses at one tap, of taps by one inverse, and what is gained back.

    tables: {(inverse, tap): {measure: (S, N)}}, of "map" and trained inverses (nulls are left out); taps: shallow to
    deep. Rows, each paired image by image (and training seed by training seed, where both have them):
    "<measure>_difference": map − each other inverse (`against`) at the tap; depth_cost: at the tap − at the shallowest
    one (`against`), of the measure `of`, for every inverse; depth_cost_recovered: (map − a trained inverse, here) /
    (that inverse at the shallowest tap − here), the share of the loss that it shows which is gone with MAP (1: MAP
    reads here what it reads at the shallowest tap), NaN, with a note, where there may be no loss.
    """
    inverses = [name for name in dict.fromkeys(name for name, _ in tables) if not name.startswith("null_")]
    solved = [tap for tap in taps if (MAP, tap) in tables]
    gains: dict[tuple[str, str, str], np.ndarray] = {}
    for tap in solved:
        for name in inverses:
            other = tables.get((name, tap), {}) if name != MAP else {}
            for measure in [measure for measure in tables[MAP, tap] if measure in other]:
                gain = gains[name, tap, measure] = _paired(tables[MAP, tap][measure], other[measure])
                rows.pooled(gain, f"{measure}_difference", tap, MAP, against=name, of=measure)
    for tap in solved[1:]:
        costs = {}
        for name in inverses:
            first = tables.get((name, solved[0]), {})
            for measure, deep in tables.get((name, tap), {}).items():
                if measure in first:
                    costs[name, measure] = deep - first[measure]
                    rows.pooled(costs[name, measure], "depth_cost", tap, name, against=solved[0], of=measure)
        for (name, measure), cost in costs.items():
            if (name, tap, measure) in gains and (MAP, measure) in costs:
                _add_share_of_loss(rows, gains[name, tap, measure], cost, tap, against=name, of=measure)


def _paired(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(S, N) of two tables, over the training seeds that both have."""
    both = min(len(ours), len(theirs))
    return ours[:both] - theirs[:both]


def _add_share_of_loss(rows: TidyRows, gained: np.ndarray, cost: np.ndarray, tap: str, against: str, of: str) -> None:
    """gained over −cost, both (S, N), where the cost is a loss."""
    cost = cost[: len(gained)]
    _, low, high = pooled_interval(cost, rows.seed)
    lost = low > 0 if of in LOWER_IS_BETTER else high < 0
    value = pooled_ratio(gained, -cost, rows.seed) if lost else (math.nan,) * 3
    note = None if lost else f"{against} loses nothing that could be told from none"
    columns = {"against": against, "of": of, "seeds": len(gained), "note": note}
    rows.one(value, "depth_cost_recovered", tap, MAP, gained.shape[1], **columns)


# -------------------------------------------------------------------------------------------------------------- colour


def _measure_hue(study: _Study, source: str, count: int, shifts: Sequence[float]) -> Tables:
    """What every inverse follows of hue shifts of one object, everything else staying as it was."""
    rows, objects = study.rows, open_objects(source, study.target, count, study.rows.seed)
    turned = [Perturbation("hue_shift", "object", hue_shift=shift) for shift in shifts]
    pictures = [objects.images, *(objects.perturbed(turn) for turn in turned)]
    shown = np.stack([object_chroma(picture, objects.masks) for picture in pictures])
    recorded = [study.target.record(picture, list(study.taps)) for picture in pictures]
    tables: Tables = {}
    for tap in study.taps:
        colours: dict[str, np.ndarray] = {}  # (S, K, N)
        by_hue = []
        for states in recorded:
            by_inverse = _trained(study, states[tap], tap)
            if tap in study.maps:
                by_inverse[MAP] = [_solved(study.maps[tap], states[tap])[0]]
                study.done()
            by_hue.append(by_inverse)
        for name in by_hue[0]:
            chroma = [[object_chroma(made, objects.masks) for made in by_inverse[name]] for by_inverse in by_hue]
            colours[name] = np.stack(chroma, axis=1)
        if MAP in colours and len(objects) > len(shown):
            # Every hue of another scene, and each of a different one: else the shift would be known for nothing.
            parts = [np.roll(colours[MAP][:, k], k + 1, axis=-1) for k in range(len(shown))]
            colours[NULL_SHUFFLED] = np.stack(parts, axis=1)
        for name, colour in colours.items():
            kept = np.stack([hue_shift_kept(shown[[0, k]], colour[:, [0, k]]) for k in range(1, len(shown))], axis=1)
            for number, shift in enumerate(shifts):
                rows.pooled(kept[:, number], "hue_shift_kept", tap, name, hue_shift=float(shift))
            # A shift that has no direction counts in the slope alone.
            defined = (~np.isnan(kept)).sum(1)
            mean = np.where(defined > 0, np.nansum(kept, axis=1) / np.maximum(defined, 1), np.nan)
            tables[name, tap] = {"hue_shift_kept": mean, "colour_follow": colour_follow(shown, colour)}
            for measure, table in tables[name, tap].items():
                rows.pooled(table, measure, tap, name)
        rows.one((0.0,) * 3, "hue_shift_kept", tap, NULL_GUESS, len(objects), seeds=1, note="by definition")
    return tables


# --------------------------------------------------------------------------------------------------------- cross-layer


def cross_pairs(taps: Sequence[str], recorded: Mapping[str, Representation], reach: int = REACH) -> list[Pair]:
    """Every (source tap, target tap) of one form, at most `reach` places apart among `taps`, each with itself too."""
    place = {tap: number for number, tap in enumerate(taps)}
    same = pairs_of_one_form({tap: recorded[tap] for tap in taps})
    return [(i, j) for i, j in same if abs(place[i] - place[j]) <= reach]


def _measure_cross(study: _Study, images: Tensor, made: Mapping[str, Tensor]) -> None:
    """Every MAP inverse fed with its neighbours' states as they are, beside trained inverses and nulls.

    made: {tap: what MAP makes of its own state}. The likelihood keeps the statistics of the tap that the inverse was
    made for.
    """
    taps = [tap for tap in study.taps if tap in study.maps]
    recorded = study.target.record(images, taps)
    pairs = cross_pairs(taps, recorded)
    if not any(i != j for i, j in pairs):
        return
    scores: dict[str, Scores] = {MAP: {}, NULL_SHUFFLED: {}}
    for pair in pairs:
        if pair[0] == pair[1]:
            picture = made[pair[0]][: len(images)]
        else:
            picture, _ = _solved(study.maps[pair[1]], translated(recorded, pair))
            study.done()
        for name, shown in ((MAP, picture), (NULL_SHUFFLED, picture.roll(1, 0))):
            scores[name][pair] = score(images, shown)["psnr"].double().numpy()[None]
    for name in next(iter(study.families.values())):
        inverses = {seed: by_family[name] for seed, by_family in study.families.items()}
        read = [pair for pair in pairs if all(pair[0] in taps and pair[1] in taps for taps in inverses.values())]
        if any(i != j for i, j in read):
            scores[name] = cross_application(study.target, images, inverses, read, seed=study.rows.seed)
    for name, by_pair in scores.items():
        _add_cross_rows(study, name, by_pair, scores[MAP])
    floor = score(images, study.mean.expand_as(images))["psnr"]
    for tap in taps:
        study.rows.pooled(floor, "cross_psnr", tap, NULL_MEAN, **_columns(study.target, (tap, tap)))


def _add_cross_rows(study: _Study, name: str, scores: Scores, of_map: Scores) -> None:
    rows, trained = study.rows, name not in (MAP, NULL_SHUFFLED)
    apart = [pair for pair in scores if pair[0] != pair[1]]
    for pair, values in scores.items():
        columns = _columns(study.target, pair)
        rows.pooled(values, "cross_psnr", pair[0], name, **columns)
        if trained:
            gain = _paired(of_map[pair], values)
            rows.pooled(gain, "cross_psnr_difference", pair[0], MAP, against=name, **columns)
    if name == NULL_SHUFFLED:
        return
    note = f"mean over {len(apart)} pairs of different taps"
    rows.pooled(np.mean([loss(scores, pair) for pair in apart], axis=0), "cross_loss", None, name, note=note)
    if trained:
        gains = np.mean([_paired(of_map[pair], scores[pair]) for pair in apart], axis=0)
        rows.pooled(gains, "cross_psnr_difference", None, MAP, against=name, note=note)


def _columns(target: Target, pair: Pair) -> dict[str, Any]:
    return {name: value for name, value in placed(target, pair).items() if name not in ("tap", "depth")}


# ----------------------------------------------------------------------------------------------------------- the study


def measure_restated(
    target: Target,
    families: Families,
    taps: str | Sequence[str],
    images: str,
    *,
    calibration: ImageSource | Tensor,
    n: int = 16,
    hue_images: int = 8,
    shifts: Sequence[float] = (120.0,),
    map_settings: MapSettings | None = None,
    maps: Mapping[str, MapInverse] | None = None,
    cross_images: int = 8,
    fitted: int = 128,
    checked: int = 8,
    texture_images: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Restated:
    """Shape, detail, colour and cross-layer reading by linear, direct, modular and MAP inverses of float32 states.

    families: as of `families_by_seed`; images: "scenes", a COCO root or a folder; calibration: held-out images, of
    which the first `fitted` fit the MAP inverses (`fit_map_tap`, of the first training seed), `checked` are solved for
    their gain; maps: {tap: MAP inverse} that are there already (`Stability.maps`) and are not fitted again; n: images
    of shape and detail; hue_images: scenes (0: none), each also under the hue shifts, in degrees; cross_images: of
    those n, of the cross-application (0: none); texture_images: training scenes of the texture probe (0: no texture).
    Taps without a MAP inverse (predictions, padded tokens, no trained inverse to start from) are in `skipped` with the
    reason, and their trained inverses are measured all the same.
    Measures: those of `detail` with one value an image, psnr, ssim, mse, psnr_objects, texture_accuracy, misfit;
    hue_shift_kept (each shift, and the mean over shifts without one), colour_follow; the differences of
    `add_depth_rows`; cross_psnr, cross_psnr_difference, cross_loss.
    Nulls: null_mean, null_shuffled (MAP of another image's representation; for hue shifts every hue from another scene,
    where there are scenes enough), null_guess.
    Raises BacksightError on counts and shifts that do not fit, and where no tap has a MAP inverse.
    """
    if n < 2 or cross_images == 1:
        raise BacksightError("Give n from 2, and cross_images 0 or from 2: a shuffled null needs another image.")
    if hue_images and (not shifts or any(not math.isfinite(shift) or shift % 360 == 0 for shift in shifts)):
        raise BacksightError(f"Hue shifts are degrees that turn a hue, such as (120.0, 240.0), not {tuple(shifts)}.")
    resolved = target.resolve_taps(taps)
    ordered = tuple(tap for tap in target.available_taps if tap in resolved)
    masked = images == "scenes" or (Path(images) / "annotations").is_dir()
    source = open_images(images, None, target, n, seed, masks=masked)
    judged = _judged(source)
    held_out = next(batches(calibration, fitted))
    crossed = min(cross_images, len(judged.images))
    passes = 2 + (1 + len(shifts)) * bool(hue_images) + 2 * REACH * bool(crossed)
    total, title = passes * len(ordered), f"questions to {target.name}"
    with tqdm(total=total, desc=title, leave=False, disable=not progress) as bar:
        ready: dict[str, MapInverse] = {}
        skipped: dict[str, str] = {}
        for tap in ordered:
            known = (maps or {}).get(tap)
            made = known or _map_of(target, families, tap, held_out, map_settings, checked, seed)
            if isinstance(made, str):
                skipped[tap] = made
            else:
                ready[tap] = made
            bar.update()
        if not ready:
            raise BacksightError(
                f"No tap of {', '.join(ordered)} has a MAP inverse. {ordered[0]}: {skipped[ordered[0]]}"
            )
        rows = TidyRows.about(target, source.name, source.split, seed)
        study = _Study(target, families, ordered, ready, null_mean(held_out).clamp(0, 1), rows, bar.update)
        measures = _measures(images, target.image_size, len(judged.images), texture_images, seed)
        tables, pictures = _measure_depth(study, judged, measures)
        add_depth_rows(rows, tables, ordered)
        if hue_images:
            add_depth_rows(rows, _measure_hue(study, images, hue_images, shifts), ordered)
        if crossed:
            _measure_cross(study, judged.images[:crossed], pictures[MAP])
    shown = {
        inverse: {tap: picture[:SHOWN].clone() for tap, picture in by_tap.items()}
        for inverse, by_tap in pictures.items()
        if not inverse.startswith("null_")
    }
    return Restated(rows.table(*COLUMNS), judged.images[:SHOWN], shown, skipped)
