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
from torch import Tensor
from tqdm.auto import tqdm

from backsight.errors import BacksightError
from backsight.inverses.families import Reconstruct
from backsight.measures.agreement import average_precision, match_objects
from backsight.measures.hue import hue_scores, object_chroma
from backsight.measures.pixels import psnr
from backsight.measures.similarity import TokenSample, cka_from_products, cka_products, shuffled_rows, token_cosine
from backsight.representation import Predictions, concatenate
from backsight.studies.by_seed import families_by_seed
from backsight.studies.nulls import null_mean, shuffled
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
from backsight.tables.pooling import influence, influence_of_groups, pool
from backsight.tables.values import NO_SEED, UNITS, Values
from backsight.targets import Target
from backsight.targets.detection import PREDICTIONS

TUNING_SEEDS, FITTING_SEEDS = 1000, 2000  # added to a training seed: scenes that trained neither target nor inverse
PROBE_STRENGTHS = tuple(10.0**exponent for exponent in range(-3, 6))
MINIBATCH = 10  # images whose tokens make one minibatch of the CKA
PICTURE_MEASURES = ("psnr", "psnr_objects", "hue_error", "share_grey")
TASK_MEASURES = ("top1", "ap50", f"top1_{RANDOM_HUES}", f"ap50_{RANDOM_HUES}", "probe_top1")


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

    values: {key: (N,)}, NaN where an image has none; minibatches: {key: (N,)} of those that speak of minibatches of
    images; pictures: {inverse: {tap: (K, 3, H, W)}} of the first images.
    """

    values: dict[Key, Any]
    minibatches: dict[Key, np.ndarray] = field(default_factory=dict)
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
            if following and recorded[following].form == representation.form:
                note(Key("token_cosine", tap, "", following), token_cosine(representation, recorded[following]))
                crossed = inverses[reference][tap](recorded[following]).cpu().clamp(0, 1)
                note(Key("cross_psnr", tap, reference, following), psnr(images, crossed))
    scores: dict[Key, Any] = {key: torch.cat(parts) for key, parts in collected.items()}
    alike = _ckas(sample, [key for key in scores if key.measure in ("cosine_to_start", "token_cosine")])
    scores |= {key: of_images for key, (of_images, _) in alike.items()}
    for images_of, ending in ((judged, ""), (recoloured, f"_{RANDOM_HUES}")):
        if images_of is None or not images_of.labelled:
            continue
        given: list[Any] = answers if images_of is judged else [target(each) for each in _pictures(images_of)]
        if isinstance(given[0], Predictions):
            predictions = concatenate([each.to("cpu") for each in given])
            scores |= _precisions(predictions, images_of, f"ap50{ending}", seed)
        else:
            scores |= _hits(torch.cat(given).cpu(), images_of, f"top1{ending}", seed)
    shown = {name: {tap: torch.cat(parts) for tap, parts in per.items()} for name, per in pictures.items()}
    return Reading(scores, {key: minibatch for key, (_, minibatch) in alike.items()}, shown)


def _pictures(data: LabelledImages, size: int = 50) -> Iterator[Tensor]:
    return (batch_of(data, chosen)[0] for chosen in pieces(len(data), size))


def _picture_scores(images: Tensor, made: Tensor, objects: Tensor | None) -> dict[str, Tensor]:
    """{measure: (B,)}: psnr; inside the largest object psnr_objects, hue_error and share_grey, NaN where none is."""
    if objects is None:
        return {"psnr": psnr(images, made)}
    colours = hue_scores(object_chroma(images, objects), object_chroma(made, objects))
    scores = {"psnr": psnr(images, made), "psnr_objects": psnr(images, made, objects)}
    return scores | {measure: torch.from_numpy(values).float() for measure, values in colours.items()}


def _hits(logits: Tensor, data: LabelledImages, measure: str, seed: int) -> dict[Key, Tensor]:
    """Whether the largest logit names the largest object's class, and whether another image's logits do."""
    guesses, truth = logits.argmax(1), data.labels[:, 0]
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))
    hits = (guesses == truth).float()
    return {Key(measure): hits, Key(measure, inverse="null_shuffled"): (guesses[order] == truth).float()}


def _precisions(predictions: Predictions, data: LabelledImages, measure: str, seed: int) -> dict[Key, np.ndarray]:
    """What each image contributes to AP50, mean over classes; with another image's boxes (`null_shuffled`) too."""
    half = data.boxes[..., 2:] / 2
    corners = torch.cat([data.boxes[..., :2] - half, data.boxes[..., :2] + half], 2)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))

    def of(given: Predictions) -> np.ndarray:
        matches = match_objects(given, data.labels, corners)
        return influence(lambda weights: average_precision(matches, weights), len(data))

    return {Key(measure): of(predictions), Key(measure, inverse="null_shuffled"): of(predictions.index(order))}


def _ckas(sample: TokenSample, pairs: Sequence[Key]) -> dict[Key, tuple[np.ndarray, np.ndarray]]:
    """What each minibatch contributes to the CKA of a tap with the start, and of two neighbours; and of shuffled
    images; of each its minibatch."""
    tokens, size = sample.minibatches(MINIBATCH), sample.images_in_minibatch(MINIBATCH)
    alike = {}
    for pair in pairs:
        to_start = pair.measure == "cosine_to_start"
        other = tokens[f"{START} {pair.tap}" if to_start else pair.next_tap]
        key = Key("cka_to_start" if to_start else "cka", pair.tap, "", pair.next_tap)
        for name, given in (("", other), ("null_shuffled", shuffled_rows(other, size))):
            products = cka_products([tokens[pair.tap], given])

            def cka(kept: np.ndarray, products: np.ndarray = products) -> np.ndarray:
                return cka_from_products(products[kept])[0, 1]

            alike[replace(key, inverse=name)] = influence_of_groups(cka, len(products), size)
    return alike


@torch.no_grad()
def probe_hits(target: Target, tap: str, fitting: LabelledImages, judged: LabelledImages) -> Tensor:
    """(N,) whether a linear probe, fitted anew at a tap, names the class of the largest object.

    It reads the prefix tokens (if there are any), and mean and maximum over the other tokens; ridge regression on the
    classes (scikit-learn), its strength chosen by leaving out one fitting image at a time. It tells a class that is
    lost from a head that no longer fits what it reads.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), RidgeClassifierCV(PROBE_STRENGTHS))
    probe.fit(_pooled(target, tap, fitting).numpy(), fitting.labels[:, 0].numpy())
    guesses = probe.predict(_pooled(target, tap, judged).numpy())
    return (torch.from_numpy(guesses) == judged.labels[:, 0]).float()


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
    """values: one an image, t (NaN: untouched, or untrained), training seed, measure, tap and inverse;
    history: t, seed, step, task, reconstruction (each over its value at the start); images: (K, 3, H, W) the first
    judged; pictures: {"start" or "t = …": {tap: (K, 3, H, W)}} of the first seed."""

    values: pd.DataFrame
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
    judged images. For the rest see `fine_tune` and `fit_inverses`.
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
    values = values_of(target, readings, nulls, judged)
    first = {label: per_seed[seeds[0]].pictures[FRESH] for label, per_seed in readings.items()}
    pictures = {START if t is None else f"t = {t:g}": shown for t, shown in first.items()}
    kept = len(next(iter(pictures[START].values())))
    return Tradeoff(values, pd.concat(histories), judged.images[:kept].float() / 255, pictures)


def _mean_image(judged: LabelledImages, mean: Tensor, taps: Sequence[str]) -> dict[Key, Tensor]:
    """The scores of the mean training image, the same at every tap."""
    pictures = judged.images.float() / 255
    scores = _picture_scores(pictures, mean.expand_as(pictures).clamp(0, 1), judged.objects)
    return {Key(measure, tap, "null_mean"): values for measure, values in scores.items() for tap in taps}


def values_of(
    target: Target,
    readings: Mapping[float | None, Mapping[int, Reading]],
    nulls: Mapping[int, Reading],
    judged: LabelledImages,
) -> pd.DataFrame:
    """The values of all readings, by t (None: the untouched target); of the untrained targets those that are nulls.

    Columns beside COLUMNS: t (NaN: untouched, or untrained), tuned, next_tap.
    """
    values = Values(target, judged.name, judged.split, range(len(judged)))
    for t, per_seed in [*readings.items(), ("untrained", nulls)]:
        for train_seed, reading in per_seed.items():
            for key, numbers in reading.values.items():
                if t == "untrained" and key.inverse not in ("null_untrained", "probe"):
                    continue
                inverse = "null_untrained" if t == "untrained" else key.inverse or None
                tuned = isinstance(t, float)
                columns: dict[str, Any] = {"t": t if tuned else math.nan, "tuned": tuned}
                columns["next_tap"] = key.next_tap or None
                by_seed = {NO_SEED if inverse == "null_mean" else train_seed: numbers}
                if inverse == "null_mean" and train_seed != next(iter(per_seed)):
                    continue  # the same for all
                clusters = reading.minibatches.get(key)
                values.add(key.measure, by_seed, key.tap or None, inverse, clusters=clusters, **columns)
    return values.table()


def changes(values: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """What each t changed against tuning for the task alone (t = 0): tidy rows of measures <name>_change, paired by
    image and training seed, for pictures by inverses fitted anew and for the score of the task."""
    pictures = values["measure"].isin(PICTURE_MEASURES) & (values["inverse"] == FRESH)
    answered = values["measure"].isin(TASK_MEASURES) & ~values["inverse"].astype(str).str.startswith("null_")
    asked = values[(pictures | answered) & values["tuned"]]
    if not (asked["t"] == 0).any():
        raise BacksightError("the table holds no t = 0, the tuning for the task alone: what t changes cannot be told.")
    by = [name for name in asked.columns if name not in (*UNITS, "value", "weight")]
    told = pool(asked, by, {"t": 0.0}, seed)
    return told.assign(measure=told["measure"] + "_change", against=TASK_ONLY, seed=seed)
