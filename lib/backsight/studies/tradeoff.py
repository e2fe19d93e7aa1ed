"""What it costs a model to be invertible: target and inverses trained together, task against reconstruction.

    images ──► target ──► tap 1 … tap n ──► answer ──► task loss          / its value at the start
                            │        │
                     linear inverses, trained along ──► images' ──► reconstruction loss / its value at the start

    loss = (1 − t) · task + t · reconstruction

The caller's target is copied; of the copy every weight learns, in eval mode, so that neither dropout nor statistics
of a batch differ between the values of t. What the tuned target keeps is then judged by linear inverses fitted anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from backsight.errors import BacksightError
from backsight.inverses.families import Reconstruct
from backsight.measures.hue import hue_error
from backsight.measures.pixels import psnr
from backsight.measures.similarity import TokenSample, cka_products, shuffled_rows, token_cosine
from backsight.representation import Predictions, concatenate
from backsight.studies.by_seed import families_by_seed
from backsight.studies.colour_accuracy import average_precisions
from backsight.studies.nulls import null_mean, shuffled
from backsight.studies.recolour import Truth
from backsight.studies.tuning import (
    LabelledImages,
    answer_of,
    batch_of,
    check_grid,
    fine_tune,
    fit_inverses,
    labelled_images,
    pieces,
    starting_units,
)
from backsight.tables.names import FRESH, JOINT, OF_START, RANDOM_HUES, START, TASK_ONLY
from backsight.tables.pool import metrics_row, pooled_rows
from backsight.targets import Target
from backsight.targets.detection import PREDICTIONS

TUNING_SEEDS, FITTING_SEEDS = 1000, 2000  # added to a training seed: scenes that trained neither target nor inverse
PROBE_STRENGTHS = tuple(10.0**exponent for exponent in range(-5, 3))
RESAMPLES = 300  # of the bootstraps of CKA and AP50
MINIBATCH = 10  # images whose tokens make one minibatch of the CKA
PICTURE_MEASURES = ("psnr", "psnr_objects", "hue_error")
# Measures whose change against the start, and against t = 0, is paired image by image.
PAIRED = (*PICTURE_MEASURES, "token_cosine", "cross_psnr", "top1", "probe_top1")


# -------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Key:
    """What a value is of; next_tap: the deeper of two neighbours."""

    measure: str
    tap: str = ""
    inverse: str = ""
    next_tap: str = ""


@dataclass(frozen=True)
class Reading:
    """What one model shows on the judged images.

    values: {key: (N,)}, NaN where an image has none; products: {key: (M, 2, 2)}, of which a CKA is made;
    answers: {measure: Predictions} of a detector; pictures: {inverse: {tap: (K, 3, H, W)}} of the first images.
    """

    values: dict[Key, Tensor]
    products: dict[Key, np.ndarray] = field(default_factory=dict)
    answers: dict[str, Predictions] = field(default_factory=dict)
    pictures: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@torch.no_grad()
def read_model(
    target: Target,
    judged: LabelledImages,
    inverses: Mapping[str, Mapping[str, Reconstruct]],
    start: Target | None = None,
    recoloured: LabelledImages | None = None,
    seed: int = 0,
    batch_size: int = 50,
    keep: int = 6,
) -> Reading:
    """What a target's taps and answers show on images that trained nothing.

    inverses: {name: {tap: reconstruction}}; the first also makes `null_shuffled` and the cross-application to the
    neighbour; start: the untouched target, to which representations are compared; recoloured: the same images with
    hues that say nothing of the class, on which only the answers are judged.
    """
    reference = next(iter(inverses))
    taps = list(inverses[reference])
    generator = torch.Generator().manual_seed(seed)
    sample = TokenSample(images=len(judged), seed=seed)
    collected: dict[Key, list[Tensor]] = {}
    pictures: dict[str, dict[str, list[Tensor]]] = {}
    answers: list[Any] = []

    def note(key: Key, values: Tensor) -> None:
        collected.setdefault(key, []).append(values.cpu())

    for chosen in pieces(len(judged), batch_size):
        images = batch_of(judged, chosen)[0]
        objects = None if judged.objects is None else judged.objects[chosen]
        recorded, answer = answer_of(target, images, taps)
        answers.append(answer)
        before = {} if start is None else start.record(images, taps)
        sample.add({tap: recorded[tap] for tap in taps} | {f"{START} {tap}": each for tap, each in before.items()})
        for tap, following in zip(taps, [*taps[1:], ""], strict=True):
            representation: Any = recorded[tap]
            for name, each in inverses.items():
                if tap not in each:
                    continue
                made = each[tap](representation).cpu().clamp(0, 1)
                for measure, values in _picture_scores(images, made, objects).items():
                    note(Key(measure, tap, name), values)
                if chosen.start < keep:
                    pictures.setdefault(name, {}).setdefault(tap, []).append(made[: keep - chosen.start])
            other = inverses[reference][tap](shuffled(representation, generator)).cpu().clamp(0, 1)
            for measure, values in _picture_scores(images, other, objects).items():
                note(Key(measure, tap, "null_shuffled"), values)
            if tap in before:
                note(Key("cosine_to_start", tap), token_cosine(representation, before[tap]))
            if following and recorded[following].signature == representation.signature:
                note(Key("token_cosine", tap, "", following), token_cosine(representation, recorded[following]))
                crossed = inverses[reference][tap](recorded[following]).cpu().clamp(0, 1)
                note(Key("cross_psnr", tap, reference, following), psnr(images, crossed))
    scores = {key: torch.cat(parts) for key, parts in collected.items()}
    products = _products(sample, [key for key in scores if key.measure in ("cosine_to_start", "token_cosine")])
    predictions: dict[str, Predictions] = {}
    for images_of, ending in ((judged, ""), (recoloured, f"_{RANDOM_HUES}")):
        if images_of is None or not images_of.labelled:
            continue
        given: list[Any] = answers if images_of is judged else [target(each) for each in _pictures(images_of)]
        if isinstance(given[0], Predictions):
            predictions[f"ap50{ending}"] = concatenate([each.to("cpu") for each in given])
        else:
            scores |= _hits(torch.cat(given).cpu(), images_of, f"top1{ending}", seed)
    shown = {name: {tap: torch.cat(parts) for tap, parts in per.items()} for name, per in pictures.items()}
    return Reading(scores, products, predictions, shown)


def _pictures(data: LabelledImages, size: int = 50) -> Iterator[Tensor]:
    return (batch_of(data, chosen)[0] for chosen in pieces(len(data), size))


def _picture_scores(images: Tensor, made: Tensor, objects: Tensor | None) -> dict[str, Tensor]:
    """{measure: (B,)}: psnr, and inside the largest object psnr_objects and hue_error (NaN where there is none)."""
    scores = {"psnr": psnr(images, made)}
    if objects is not None:
        filled = objects.flatten(1).any(1)
        parts = images[filled], made[filled], objects[filled]
        for measure, function in (("psnr_objects", psnr), ("hue_error", hue_error)):
            scores[measure] = torch.full((len(images),), math.nan)
            if filled.any():
                scores[measure][filled] = torch.as_tensor(function(*parts), dtype=torch.float32)
    return scores


def _hits(logits: Tensor, data: LabelledImages, measure: str, seed: int) -> dict[Key, Tensor]:
    """Whether the largest logit names the largest object's class, and whether another image's logits do."""
    guesses, truth = logits.argmax(1), data.labels[:, 0]
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))
    hits = (guesses == truth).float()
    return {Key(measure): hits, Key(measure, inverse="null_shuffled"): (guesses[order] == truth).float()}


def _products(sample: TokenSample, pairs: Sequence[Key]) -> dict[Key, np.ndarray]:
    """Products of CKA (M, 2, 2): of a tap with the start, and of two neighbours; with those of shuffled images."""
    tokens = sample.minibatches(MINIBATCH)
    found: dict[Key, np.ndarray] = {}
    for pair in pairs:
        to_start = pair.measure == "cosine_to_start"
        other = tokens[f"{START} {pair.tap}" if to_start else pair.next_tap]
        images = max(1, min(MINIBATCH, sample.images // 4))
        key = Key("cka_to_start" if to_start else "cka", pair.tap, "", pair.next_tap)
        found[key] = cka_products([tokens[pair.tap], other])
        null = cka_products([tokens[pair.tap], shuffled_rows(other, images)])
        found[replace(key, inverse="null_shuffled")] = null
    return found


@torch.no_grad()
def probe_hits(target: Target, tap: str, fitting: LabelledImages, judged: LabelledImages) -> Tensor:
    """(N,) whether a linear probe, fitted anew at a tap, names the class of the largest object.

    It reads the prefix tokens (if there are any), and mean and maximum over the other tokens; ridge regression on the
    classes, its strength chosen on every fifth fitting image. It tells a class that is lost from a head that no longer
    fits what it reads.
    """
    x, wanted = _pooled(target, tap, fitting), fitting.labels[:, 0]
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, judged_x = (x - mean) / deviation, (_pooled(target, tap, judged) - mean) / deviation
    y = F.one_hot(wanted).double()
    held_out = torch.arange(len(x)) % 5 == 4

    def guesses(rows: Tensor, strength: float, inputs: Tensor) -> Tensor:
        middle = y[rows].mean(0)
        ridge = strength * int(rows.sum()) * torch.eye(x.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(x[rows].T @ x[rows] + ridge, x[rows].T @ (y[rows] - middle))
        return (inputs @ weights + middle).argmax(1)

    shares = [
        float((guesses(~held_out, strength, x[held_out]) == wanted[held_out]).double().mean())
        for strength in PROBE_STRENGTHS
    ]
    best = PROBE_STRENGTHS[int(np.argmax(shares))]
    return (guesses(torch.ones_like(held_out), best, judged_x) == judged.labels[:, 0]).float()


def _pooled(target: Target, tap: str, data: LabelledImages) -> Tensor:
    """(N, features): prefix tokens, mean and maximum over the other tokens."""
    rows = []
    for images in _pictures(data, 100):
        representation = target.record(images, [tap])[tap]
        prefix, values = getattr(representation, "prefix", 0), representation.values
        tokens = values[:, prefix:]
        rows.append(torch.cat([values[:, :prefix].flatten(1), tokens.mean(1), tokens.amax(1)], 1).cpu())
    return torch.cat(rows).double()


# -------------------------------------------------------------------------------------------------------- the study


@dataclass(frozen=True)
class Tradeoff:
    """metrics: tidy rows; history: t, seed, step, task, reconstruction (each over its value at the start);
    images: (K, 3, H, W) the first judged; pictures: {"start" or "t = …": {tap: (K, 3, H, W)}} of the first seed."""

    metrics: pd.DataFrame
    history: pd.DataFrame
    images: Tensor
    pictures: dict[str, dict[str, Tensor]]


def measure_tradeoff(
    target: Target,
    ts: Sequence[float],
    seeds: Sequence[int] = (0, 1, 2),
    *,
    images: str = "scenes",
    trained_on: str = "scenes",
    inverses: str = "",
    n: int = 200,
    train_images: int = 2000,
    fit_images: int = 800,
    steps: int = 60,
    batch_size: int = 32,
    learning_rate: float = 3e-4,
    set_inputs: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> Tradeoff:
    """Fine-tune copies of the target for every t and training seed, and measure them on images that trained nothing.

    target: its selected taps are inverted, trained for and measured; ts: shares of the reconstruction loss; seeds: of
    the training images and their order, the same for every t; images: of the test split, to judge on; trained_on:
    training split with the truth of the task, for the tuning, the inverses and the probe; inverses: a folder of
    02_train_inverse runs, whose inverses of the untouched target then read the tuned ones too; n: judged images;
    train_images, fit_images: of a seed, to tune on and to fit inverses and probe on (other images); seed: of the
    judged images and the bootstrap. For the rest see `fine_tune` and `fit_inverses`.
    Raises BacksightError on settings that cannot be measured.
    """
    ts, taps = check_grid(ts), list(target.taps)
    if n < 20:
        raise BacksightError(f"n = {n} judged images are too few for an interval of a CKA: give 20 or more.")
    judged = labelled_images(images, "test", target, n, seed, required=False)
    recoloured = labelled_images(images, "test", target, n, seed, "uniform") if images == "scenes" else None
    others = families_by_seed(target, inverses, seeds, fit_images, trained_on) if inverses else {}
    readings: dict[float | None, dict[int, Reading]] = {label: {} for label in (None, *ts)}
    nulls: dict[int, Reading] = {}
    histories = []
    last = [tap for tap in taps if tap != PREDICTIONS][-1]
    bar = tqdm(total=len(seeds) * (len(ts) + 2), desc=f"trade-off of {target.name}", leave=False, disable=not progress)
    with bar:
        for each in seeds:
            tuning = labelled_images(trained_on, "train", target, train_images, TUNING_SEEDS + each)
            fitting = labelled_images(trained_on, "train", target, fit_images, FITTING_SEEDS + each)

            def read(
                model: Target,
                made: Mapping[str, Mapping[str, Reconstruct]],
                start: Target | None = None,
                fitting: LabelledImages = fitting,
            ) -> Reading:
                reading = read_model(model, judged, made, start, recoloured, seed)
                if judged.labelled:
                    hits = probe_hits(model, last, fitting, judged)
                    reading.values[Key("probe_top1", last, "probe")] = hits
                bar.update()
                return reading

            closed = fit_inverses(target, fitting.images, taps, set_inputs, each)
            trained = {name: family for name, family in others.get(each, {}).items() if name != FRESH}
            of_start = {f"{name}_of_start": family for name, family in trained.items()}
            units = starting_units(target, closed, tuning)
            readings[None][each] = read(target, {FRESH: closed, **of_start})
            mean = null_mean(fitting.images)
            readings[None][each].values.update(_mean_image(judged, mean, taps))
            random = target.untrained(each)
            nulls[each] = read(random, {"null_untrained": fit_inverses(random, fitting.images, taps, set_inputs, each)})
            for t in ts:
                tuned = fine_tune(
                    target,
                    closed,
                    tuning,
                    t,
                    steps=steps,
                    batch_size=batch_size,
                    learning_rate=learning_rate,
                    seed=each,
                    units=units,
                )
                fresh = fit_inverses(tuned.target, fitting.images, taps, set_inputs, each)
                readers: dict[str, Mapping[str, Reconstruct]] = {
                    FRESH: fresh,
                    JOINT: tuned.inverses,
                    OF_START: closed,
                    **of_start,
                }
                readings[t][each] = read(tuned.target, readers, target)
                histories.append(tuned.history.assign(t=t, seed=each))
    metrics = tidy_rows(target, readings, nulls, judged, recoloured, seed)
    first = {label: per_seed[seeds[0]].pictures[FRESH] for label, per_seed in readings.items()}
    pictures = {START if t is None else f"t = {t:g}": shown for t, shown in first.items()}
    kept = len(next(iter(pictures[START].values())))
    return Tradeoff(metrics, pd.concat(histories), judged.images[:kept].float() / 255, pictures)


def _mean_image(judged: LabelledImages, mean: Tensor, taps: Sequence[str]) -> dict[Key, Tensor]:
    """The scores of the mean training image, the same at every tap."""
    pictures = judged.images.float() / 255
    scores = _picture_scores(pictures, mean.expand_as(pictures).clamp(0, 1), judged.objects)
    return {Key(measure, tap, "null_mean"): values for measure, values in scores.items() for tap in taps}


def tidy_rows(
    target: Target,
    readings: Mapping[float | None, Mapping[int, Reading]],
    nulls: Mapping[int, Reading],
    judged: LabelledImages,
    recoloured: LabelledImages | None,
    seed: int = 0,
) -> pd.DataFrame:
    """One row for each value of t (None: the untouched target), measure, tap and inverse, pooled over seeds.

    Columns beside METRIC_COLUMNS: seeds, t (NaN: untouched, or untrained), tuned, next_tap, and `against`: of the
    measures <name>_change, what is subtracted: the untouched target ("start") or the one tuned for the task ("t = 0").
    """
    rows: list[dict[str, Any]] = []
    common = {"target": target.name, "weights": target.weights, "dataset": judged.name, "split": judged.split}

    def row_of(key: Key, t: float | None, against: str = "") -> dict[str, Any]:
        places = {"tap": key.tap or None, "depth": target.depth(key.tap) if key.tap else None}
        columns = {"t": math.nan if t is None else t, "tuned": t is not None, "next_tap": key.next_tap or None}
        return {**common, **places, "inverse": key.inverse or None, **columns, "against": against or None}

    truths = {"ap50": judged, f"ap50_{RANDOM_HUES}": recoloured}
    precisions = {t: _precisions(per_seed, truths, seed) for t, per_seed in readings.items()}
    for t, per_seed in readings.items():
        first = next(iter(per_seed.values()))
        references = {START: None} | ({TASK_ONLY: 0.0} if 0.0 in readings and t != 0 else {})
        references = {} if t is None else references
        for key in first.values:
            values = _table(per_seed, key)
            rows += pooled_rows(values, key.measure, seed, **row_of(key, t))
            for against, reference in references.items():
                if (
                    key.measure.removesuffix(f"_{RANDOM_HUES}") in PAIRED
                    and key in readings[reference][min(per_seed)].values
                ):
                    changes = values - _table(readings[reference], key)
                    rows += pooled_rows(changes, f"{key.measure}_change", seed, **row_of(key, t, against))
        for key in first.products:
            resampled = _resampled_cka(np.stack([each.products[key] for each in per_seed.values()]), seed)
            rows.append(_resampled_row(key.measure, resampled, len(judged), seed, len(per_seed), row_of(key, t)))
        for key, scores in precisions[t].items():
            row = row_of(key, t)
            rows.append(_resampled_row(key.measure, _over_seeds(scores, seed), len(judged), seed, len(per_seed), row))
            for against, reference in references.items():
                changes = _over_seeds(scores - precisions[reference][key], seed)
                row = row_of(key, t, against)
                rows.append(_resampled_row(f"{key.measure}_change", changes, len(judged), seed, len(per_seed), row))
    for key in next(iter(nulls.values())).values:
        if key.inverse in ("null_untrained", "probe"):
            renamed = replace(key, inverse="null_untrained")
            rows += pooled_rows(_table(nulls, key), key.measure, seed, **row_of(renamed, None))
    table = pd.DataFrame(rows)
    return table[~((table["measure"].str.endswith("_change")) & table["inverse"].astype(str).str.startswith("null_"))]


def _table(per_seed: Mapping[int, Reading], key: Key) -> np.ndarray:
    """(S, N) values of one key."""
    return np.stack([each.values[key].double().numpy() for each in per_seed.values()])


def _resampled_row(
    measure: str, resampled: np.ndarray, n: int, seed: int, seeds: int, columns: Mapping[str, Any]
) -> dict[str, Any]:
    """A tidy row of (1 + R,) values: of all images, and of each resample."""
    low, high = (math.nan, math.nan) if np.isnan(resampled[1:]).all() else np.nanquantile(resampled[1:], [0.025, 0.975])
    return metrics_row(measure, float(resampled[0]), float(low), float(high), n, seed, **columns) | {"seeds": seeds}


def _weights(count: int, seed: int) -> np.ndarray:
    """(1 + R, count) how often each unit counts: once, then as drawn in each resample."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return np.vstack([np.ones(count), drawn])


def _over_seeds(scores: np.ndarray, seed: int) -> np.ndarray:
    """(1 + R,) mean over training seeds of (S, 1 + R) scores; in each resample over seeds that are drawn too."""
    return (_weights(len(scores), seed + 1) * scores.T).sum(1) / len(scores)


def _resampled_cka(products: np.ndarray, seed: int) -> np.ndarray:
    """(1 + R,) CKA, mean over seeds, of products (S, M, 2, 2); minibatches and seeds are drawn in each resample."""
    totals = np.einsum("rm,smij->srij", _weights(products.shape[1], seed), products)
    scale = np.sqrt(np.clip(totals[..., 0, 0], 0, None) * np.clip(totals[..., 1, 1], 0, None))
    ckas = np.divide(totals[..., 0, 1], scale, out=np.zeros_like(scale), where=scale > 0)
    return _over_seeds(ckas, seed)


def _precisions(
    per_seed: Mapping[int, Reading], truths: Mapping[str, LabelledImages | None], seed: int
) -> dict[Key, np.ndarray]:
    """{key: (S, 1 + R)} AP50, mean over classes, on all images and on the images of each resample.

    With another image's boxes (`null_shuffled`) too.
    """
    found: dict[Key, list[np.ndarray]] = {}
    for reading in per_seed.values():
        for measure, predictions in reading.answers.items():
            data = truths[measure]
            assert data is not None
            weights, truth = _weights(len(data), seed), _truth(data)
            number = np.arange(predictions.objects.shape[2])
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
            for inverse, given in (("", predictions), ("null_shuffled", predictions.index(order))):
                classes = average_precisions(given, truth, number, weights)
                found.setdefault(Key(measure, inverse=inverse), []).append(np.nanmean(list(classes.values()), axis=0))
    return {key: np.stack(scores) for key, scores in found.items()}


def _truth(data: LabelledImages) -> list[Truth]:
    corners = torch.cat(
        [data.boxes[..., :2] - data.boxes[..., 2:] / 2, data.boxes[..., :2] + data.boxes[..., 2:] / 2], 2
    )
    return [
        Truth(labels[labels >= 0].numpy(), boxes[labels >= 0].numpy())
        for labels, boxes in zip(data.labels, corners, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------- the answers


def answers(metrics: pd.DataFrame) -> pd.DataFrame:
    """What each t changed against tuning for the task alone (t = 0; where that is not there, against the start).

    One row for each t and question, for inverses fitted anew at the deepest tap (of a detector, at the ends of encoder
    and decoder) and for the score of the task:
    t, what, tap, against, value, low, high, n, seeds, and the verdict "up", "down" or "cannot tell" of the interval.
    """
    changes = metrics[metrics["measure"].str.endswith("_change")]
    if changes.empty:
        raise BacksightError("the table holds no change along t: give the metrics of 10_tradeoff.")
    fresh = metrics[(metrics["measure"] == "psnr") & (metrics["inverse"] == FRESH)].sort_values("depth", kind="stable")
    taps = list(dict.fromkeys(fresh["tap"]))
    inside = [[tap for tap in taps if tap.startswith(stage)] for stage in ("encoder", "decoder")]
    ends = [stage[-1] for stage in inside if stage] or taps[-1:]
    asked: list[tuple[str, str | None]] = [(measure, tap) for tap in ends for measure in PICTURE_MEASURES]
    asked += [
        (measure, None) for measure in ("top1", "ap50", f"top1_{RANDOM_HUES}", f"ap50_{RANDOM_HUES}", "probe_top1")
    ]
    rows = []
    for t in sorted(set(changes["t"].dropna())):
        at = changes[changes["t"] == t]
        against = TASK_ONLY if (at["against"] == TASK_ONLY).any() else START
        for measure, tap in asked:
            of = at[(at["measure"] == f"{measure}_change") & (at["against"] == against)]
            if tap is not None:
                of = of[(of["tap"] == tap) & (of["inverse"] == FRESH)]
            for _, row in of.iterrows():
                verdict = "up" if row["low"] > 0 else "down" if row["high"] < 0 else "cannot tell"
                told = {name: row[name] for name in ("value", "low", "high", "n", "seeds")}
                rows.append(
                    {"t": t, "what": measure, "tap": row["tap"], "against": against, **told, "verdict": verdict}
                )
    return pd.DataFrame(rows)
