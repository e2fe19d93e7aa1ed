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
from functools import partial
from itertools import product, zip_longest
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import unit_floats
from backsight.errors import BacksightError
from backsight.inverses.families import Reconstruct
from backsight.measures.agreement import average_precision, match_objects
from backsight.measures.hue import hue_scores, object_chroma
from backsight.measures.pixels import psnr
from backsight.measures.similarity import TokenSample, token_cosine
from backsight.representation import Predictions, concatenate
from backsight.studies.by_seed import families_by_seed
from backsight.studies.layers import cka_of_images
from backsight.studies.nulls import another, null_mean
from backsight.studies.objects import Objects
from backsight.studies.tuning import (
    answer_of,
    check_grid,
    fine_tune,
    fit_inverses,
    labelled_images,
)
from backsight.tables.names import FRESH, JOINT, NULL_MEAN, NULL_SHUFFLED, OF_START, RANDOM_HUES, START, TASK_ONLY
from backsight.tables.pooling import influence, pool
from backsight.tables.values import Values
from backsight.targets import Target
from backsight.targets.detection import PREDICTIONS

TUNING_SEEDS, FITTING_SEEDS = 1000, 2000  # added to a training seed: scenes that trained neither target nor inverse
PROBE_STRENGTHS = tuple(10.0**exponent for exponent in range(-3, 6))
MINIBATCH = 10  # images whose tokens make one minibatch of the CKA
SHOWN = 6  # images that are kept, with their reconstructions
PICTURE_MEASURES = ("psnr", "psnr_objects", "hue_error", "share_grey")
TASK_MEASURES = ("top1", "ap50", f"top1_{RANDOM_HUES}", f"ap50_{RANDOM_HUES}", "probe_top1")
UNTRAINED, PROBE = "null_untrained", "probe"

Readers = Mapping[str, Mapping[str, Reconstruct]]  # {name: {tap: reconstruction}}
# {(measure, tap, inverse): (N,) values, NaN where an image has none; and what is drawn for an interval, if not images}
Reading = dict[tuple[str, str | None, str | None], tuple[Any, np.ndarray | None]]


@torch.no_grad()
def read_model(
    target: Target,
    judged: Objects,
    inverses: Readers,
    start: Target | None = None,
    recoloured: Objects | None = None,
    seed: int = 0,
) -> Reading:
    """What a target's taps and answers show on images that trained nothing.

    inverses: the first also makes `null_shuffled` and the cross-application to the neighbour; start: the untouched
    target, to which representations are compared; recoloured: the same images with hues that say nothing of the class,
    on which only the answers are judged.
    """
    first = next(iter(inverses))
    taps = list(inverses[first])
    generator = torch.Generator().manual_seed(seed)
    sample = TokenSample(images=len(judged), seed=seed)
    collected: dict[Any, list[Tensor]] = {}
    answers: list[Any] = []
    for chosen, images in _batches(judged):
        recorded, answer = answer_of(target, images, taps)
        answers.append(answer)
        if start is not None:
            before = {f"{START} {tap}": held for tap, held in start.record(images, taps).items()}
            sample.add({tap: recorded[tap] for tap in taps} | before)
        for tap, following in zip_longest(taps, taps[1:]):
            representation: Any = recorded[tap]
            shown = {name: of[tap](representation) for name, of in inverses.items() if tap in of}
            shown[NULL_SHUFFLED] = inverses[first][tap](representation.index(another(len(images), generator)))
            scores: dict[Any, Tensor] = {
                (measure, tap, name): values
                for name, pictures in shown.items()
                for measure, values in picture_scores(images, pictures, judged.masks[chosen]).items()
            }
            if following and recorded[following].form == representation.form:
                crossed = inverses[first][tap](recorded[following]).cpu().clamp(0, 1)
                scores["cross_psnr", tap, first] = psnr(images, crossed)
                scores["token_cosine", tap, None] = token_cosine(representation, recorded[following])
            for key, values in scores.items():
                collected.setdefault(key, []).append(values.cpu())
    reading: Reading = {key: (torch.cat(parts), None) for key, parts in collected.items()}
    if start is not None:
        tokens, size = sample.minibatches(MINIBATCH), sample.images_in_minibatch(MINIBATCH)
        for tap in taps:
            alike, minibatch = cka_of_images([tokens[tap], tokens[f"{START} {tap}"]], size)
            reading["cka_to_start", tap, None] = alike[:, 0, 1], minibatch
    if judged.labelled:
        reading |= answer_scores(answers, judged, "", seed)
    if recoloured is not None and recoloured.labelled:
        given = [target(batch) for _, batch in _batches(recoloured)]
        reading |= answer_scores(given, recoloured, f"_{RANDOM_HUES}", seed)
    return reading


def _batches(data: Objects, size: int = 50) -> Iterator[tuple[Tensor, Tensor]]:
    """Places and images of batches of about `size`, none of a single one, which has no other to be shuffled with."""
    for chosen in torch.arange(len(data)).tensor_split(max(1, len(data) // size)):
        yield chosen, unit_floats(data.images[chosen])


def picture_scores(images: Tensor, pictures: Tensor, objects: Tensor) -> dict[str, Tensor]:
    """{measure: (B,)}: psnr; inside the largest object psnr_objects, hue_error and share_grey, NaN where none is."""
    pictures = pictures.cpu().clamp(0, 1)
    colours = hue_scores(object_chroma(images, objects), object_chroma(pictures, objects))
    scores = {"psnr": psnr(images, pictures), "psnr_objects": psnr(images, pictures, objects)}
    return scores | {measure: torch.from_numpy(values).float() for measure, values in colours.items()}


def answer_scores(answers: Sequence[Any], data: Objects, ending: str, seed: int) -> Reading:
    """top1, whether the largest logit names the largest object's class; or ap50, what each image contributes to it.

    And the same of another image's answers (`null_shuffled`).
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    scores: list[Any]
    if isinstance(answers[0], Predictions):
        given = concatenate([part.to("cpu") for part in answers])
        matches = [match_objects(of, data.labels, data.boxes) for of in (given, given.index(order))]
        measure, scores = "ap50", [influence(partial(average_precision, of), len(data)) for of in matches]
    else:
        guesses = torch.cat(list(answers)).cpu().argmax(1)
        measure, scores = "top1", [(of == data.labels[:, 0]).float() for of in (guesses, guesses[order])]
    return {(measure + ending, None, name): (of, None) for name, of in zip((None, NULL_SHUFFLED), scores, strict=True)}


@torch.no_grad()
def probe_hits(target: Target, tap: str, fitting: Objects, judged: Objects) -> Tensor:
    """(N,) whether a linear probe, fitted anew at a tap, names the class of the largest object.

    Ridge regression on the classes (scikit-learn), its strength chosen by leaving out one fitting image at a time. It
    tells a class that is lost from a head that no longer fits what it reads.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), RidgeClassifierCV(PROBE_STRENGTHS))
    probe.fit(_pooled(target, tap, fitting).numpy(), fitting.labels[:, 0].numpy())
    guesses = probe.predict(_pooled(target, tap, judged).numpy())
    return (torch.from_numpy(guesses) == judged.labels[:, 0]).float()


def _pooled(target: Target, tap: str, data: Objects) -> Tensor:
    """(N, features): prefix tokens, mean and maximum over the other tokens."""
    rows = []
    for _, images in _batches(data, 100):
        representation = target.record(images, [tap])[tap]
        prefix, values = getattr(representation, "prefix", 0), representation.values
        tokens = values[:, prefix:]
        rows.append(torch.cat([values[:, :prefix].flatten(1), tokens.mean(1), tokens.amax(1)], 1).cpu())
    return torch.cat(rows).double()


class Tradeoff(NamedTuple):
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
    set_inputs: int = 512,
    seed: int = 0,
    **tuning: Any,
) -> Tradeoff:
    """Fine-tune copies of the target for every t and training seed, and measure them on images that trained nothing.

    target: its selected taps are inverted, trained for and measured; ts: shares of the reconstruction loss; seeds: of
    the training images and their order, the same for every t; images, n, seed: of the test split, judged; trained_on:
    training split with the truth of the task; inverses: a folder of 02_train_inverse runs, whose inverses of the
    untouched target then read the tuned ones too; train_images, fit_images: of a seed, to tune on and, others, to fit
    inverses and probe on; tuning: steps, batch_size, learning_rate of `fine_tune`; set_inputs: see `fit_inverses`.
    Raises BacksightError on settings that cannot be measured.
    """
    ts, taps = check_grid(ts), list(target.taps)
    if n < 20:
        raise BacksightError(f"n = {n} judged images are too few for an interval of a CKA: give 20 or more.")
    judged = labelled_images(images, "test", target, n, seed, required=False)
    recoloured = None
    if images == "scenes":
        recoloured = labelled_images(images, "test", target, n, seed, required=False, random_hues=True)
    others = families_by_seed(target, inverses, seeds, fit_images, trained_on) if inverses else {}
    values = Values(target, judged.name, judged.split, range(len(judged)))
    shown, last = unit_floats(judged.images[:SHOWN]), [tap for tap in taps if tap != PREDICTIONS][-1]
    pictures: dict[str, dict[str, Tensor]] = {}
    histories: list[pd.DataFrame] = []

    def models(train_seed: int, tuned_on: Objects, fitting: Objects) -> Iterator[tuple[float, Target, Readers]]:
        """(t, target, inverses): untouched, of random weights, and tuned for every t."""
        fit = partial(fit_inverses, images=fitting.images, taps=taps, set_inputs=set_inputs, seed=train_seed)
        of_start = {f"{name}_of_start": of for name, of in others.get(train_seed, {}).items() if name != FRESH}
        closed, random = fit(target), target.untrained(train_seed)
        yield math.nan, target, {FRESH: closed, **of_start}
        yield math.nan, random, {UNTRAINED: fit(random)}
        for t in ts:
            tuned, along, history = fine_tune(target, closed, tuned_on, t, seed=train_seed, **tuning)
            histories.append(history.assign(t=t, seed=train_seed))
            yield t, tuned, {FRESH: fit(tuned), JOINT: along, OF_START: closed, **of_start}

    for train_seed in seeds:
        tuned_on = labelled_images(trained_on, "train", target, train_images, TUNING_SEEDS + train_seed)
        fitting = labelled_images(trained_on, "train", target, fit_images, FITTING_SEEDS + train_seed)
        several = tqdm(models(train_seed, tuned_on, fitting), f"trade-off of {target.name}", len(ts) + 2, leave=False)
        for t, model, readers in several:
            random = UNTRAINED in readers
            reading = read_model(model, judged, readers, None if math.isnan(t) else target, recoloured, seed)
            if judged.labelled:
                reading["probe_top1", last, PROBE] = probe_hits(model, last, fitting, judged), None
            for (measure, tap, inverse), (numbers, clusters) in reading.items():
                if not random or inverse in (UNTRAINED, PROBE):
                    name = UNTRAINED if random else inverse
                    values.add(measure, {train_seed: numbers}, tap, name, clusters=clusters, t=t)
            if train_seed == seeds[0] and not random:
                recorded, fresh = model.record(shown, taps), readers[FRESH]
                of_taps = {tap: fresh[tap](recorded[tap]).cpu().clamp(0, 1) for tap in taps}
                pictures[START if math.isnan(t) else f"t = {t:g}"] = of_taps
        if train_seed == seeds[0]:
            every = unit_floats(judged.images)
            scores = picture_scores(every, null_mean(fitting.images).expand_as(every), judged.masks)
            for (measure, of_mean), tap in product(scores.items(), taps):
                values.add(measure, of_mean, tap, NULL_MEAN, t=math.nan)
    return Tradeoff(values.table(), pd.concat(histories), shown, pictures)


def changes(values: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """What each t changed against tuning for the task alone (t = 0): tidy rows of measures <name>_change, paired by
    image and training seed, for pictures by inverses fitted anew and for the score of the task."""
    pictures = values["measure"].isin(PICTURE_MEASURES) & (values["inverse"] == FRESH)
    answered = values["measure"].isin(TASK_MEASURES) & ~values["inverse"].astype(str).str.startswith("null_")
    rows = pool(values[(pictures | answered) & values["t"].notna()], None, {"t": 0.0}, seed)
    return rows.assign(measure=rows["measure"] + "_change", against=TASK_ONLY, seed=seed)
