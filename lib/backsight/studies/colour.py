"""The colour study: what inverses paint, and what the target answers, when objects are recoloured.

Every recoloured picture goes through the target once; each inverse paints it from each tap, and of what it paints only
the colour of the object is kept: one complex number (`hue.object_chroma`). All measures are taken from these.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import open_images
from backsight.errors import BacksightError
from backsight.inverses.families import Reconstruct
from backsight.inverses.linear import fit_linear
from backsight.measures.agreement import class_precisions, match_objects
from backsight.measures.hue import (
    hue_scores,
    object_chroma,
    permutation_p,
    respond,
    reversion_index,
    reverted,
    shares,
)
from backsight.representation import Predictions, concatenate
from backsight.scenes.dataset import cached
from backsight.scenes.render import SceneOptions
from backsight.studies.nulls import shuffled
from backsight.studies.recolour import NONE, JudgedObjects, Perturbation, Region, hue_shifts
from backsight.tables.pooling import influence
from backsight.tables.values import NO_SEED, Values
from backsight.targets import PIXELS, Target

Families = Mapping[int, Mapping[str, Mapping[str, Reconstruct]]]  # {training seed: {family: {tap: inverse}}}
# In a table: of all turns of the object's hue, not of one.
ALL_HUES: Mapping[str, Any] = {"perturbation": "hue_shift", "region": "object", "hue_shift": np.nan}
DEALS = 2000  # of the classes' hues, in the permutation test


@dataclass(frozen=True)
class Key:
    """Whose colours: the inverse (a family or a null), the family behind a null, the tap."""

    inverse: str
    tap: str
    family: str = ""


@dataclass(frozen=True)
class ColourRecord:
    """Colours of the judged objects while their hue goes round the circle.

    shown: (K, N) complex, of K turns of N objects; made: {Key: {training seed: (K, N) complex}}.
    """

    target: Target
    objects: JudgedObjects
    turns: tuple[Perturbation, ...]
    shown: np.ndarray
    made: dict[Key, dict[int, np.ndarray]]


def families_to_compare(
    families: Sequence[str], by_seed: Families, target: Target, linear_seeds: Sequence[int], count: int, scenes: bool
) -> dict[int, dict[str, Mapping[str, Reconstruct]]]:
    """Of the inverses of several training seeds those of `families`; on scenes, `linear` and `linear_uniform` are
    fitted here, alike but for their `count` training scenes: of the usual hues, or of hues that say nothing of classes.

    What an inverse has learned of typical colours comes from the colours it was fitted on; `linear_uniform` knows none.
    Raises BacksightError where nothing is left.
    """
    own = [name for name in families if not (scenes and name == "linear")]
    chosen = {seed: {name: taps for name, taps in of.items() if name in own} for seed, of in by_seed.items()}
    for seed in linear_seeds if scenes else ():
        for name, options in (("linear", SceneOptions()), ("linear_uniform", SceneOptions(rule="uniform"))):
            images = open_images(
                cached("train", count, seed, max(target.image_size), options), "all", target.image_size
            )
            chosen.setdefault(seed, {})[name] = fit_linear(target, images, seed=seed, progress=False)
    if not any(chosen.values()):
        known = sorted({name for of in by_seed.values() for name in of})
        raise BacksightError(f"families is {list(families)}, and the inverses here are {', '.join(known)}: name one.")
    return {seed: of for seed, of in chosen.items() if of}


@torch.no_grad()
def record_colours(
    target: Target,
    objects: JudgedObjects,
    turns: int,
    families: Families,
    untrained: Mapping[int, tuple[Target, Mapping[str, Mapping[str, Reconstruct]]]] | None = None,
    mean_image: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> ColourRecord:
    """The colour of each object in what every inverse makes of every tap, at `turns` hues all round the circle.

    families, untrained: as `families_by_seed` and `untrained_by_seed` give them; mean_image: (3, H, W), the null
    that knows no image. `null_shuffled` reads another image's representation, under the same turn. `painter` is no
    inverse: it paints each object in its canonical hue, whatever is shown.
    """
    taps = [t for t in target.available_taps if any(t in g for each in families.values() for g in each.values())]
    perturbations, count = hue_shifts(turns), len(objects)
    shown = np.zeros((turns, count), complex)
    made: dict[Key, dict[int, np.ndarray]] = {}
    parts = torch.arange(count).tensor_split(-(-count // batch_size))

    def note(key: Key, training_seed: int, place: int, part: Tensor, images: Tensor) -> None:
        table = made.setdefault(key, {}).setdefault(training_seed, np.full(shown.shape, np.nan, complex))
        table[place, part] = object_chroma(images.clamp(0, 1), objects.masks[part])

    for place, turn in enumerate(tqdm(perturbations, f"colours of {target.name}", leave=False, disable=not progress)):
        pictures = objects.perturbed(turn)
        for part in parts:
            shown[place, part] = object_chroma(pictures[part], objects.masks[part])
            recorded = target.record(pictures[part], taps)
            for training_seed, found in families.items():
                for family, inverses in found.items():
                    for tap, inverse in inverses.items():
                        note(Key(family, tap), training_seed, place, part, inverse(recorded[tap]))
                        if len(part) > 1 and not family.endswith("_uniform"):
                            other = shuffled(recorded[tap], torch.Generator().manual_seed(seed))
                            note(Key("null_shuffled", tap, family), training_seed, place, part, inverse(other))
            for training_seed, (null_target, null_families) in (untrained or {}).items():
                null_taps = list(dict.fromkeys(t for found in null_families.values() for t in found))
                null_recorded = null_target.record(pictures[part], null_taps)
                for family, inverses in null_families.items():
                    for tap, inverse in inverses.items():
                        key = Key("null_untrained", tap, family)
                        note(key, training_seed, place, part, inverse(null_recorded[tap]))
    canonical = np.abs(shown) * np.exp(1j * np.radians(objects.hues))
    made[Key("painter", PIXELS)] = {NO_SEED: np.where(objects.canonical, canonical, shown)}
    if mean_image is not None:
        mean = object_chroma(mean_image.expand_as(objects.images), objects.masks)
        made[Key("null_mean", PIXELS)] = {NO_SEED: np.broadcast_to(mean, shown.shape)}
    return ColourRecord(target, objects, tuple(perturbations), shown, made)


def colour_values(record: ColourRecord, seed: int = 0) -> pd.DataFrame:
    """Values of every inverse and null, of each object.

    Of each turn hue_error_shown (degrees, of reconstructions that have a hue), of inverses only; of all turns
    (ALL_HUES) the mean of hue_error_shown, of share_keep, share_revert, share_grey and share_other (of the cases whose
    hue shown is `hue.SEPARATION` degrees or more from the canonical one), of reverted_above_deals (share_revert less
    the share that comes back in a hue of another class), the reversion_index, and reverted_p, one number of all objects
    and seeds: p of `permutation_p`, with DEALS deals of the hues to the classes.
    """
    objects, shown = record.objects, record.shown
    values = Values(record.target, objects.name, objects.split, range(len(objects)))
    for key, by_seed in record.made.items():
        common: dict[str, Any] = {"tap": key.tap, "inverse": key.inverse, "family": key.family or key.inverse}
        hits = []
        for train_seed, made in by_seed.items():
            of_turns = hue_scores(shown, made)["hue_error"]
            means = {"hue_error_shown": of_turns, **shares(shown, made, objects.hues)}
            numbers = {name: _mean(table) for name, table in means.items()}
            if objects.canonical.any():
                back, hues, own = _in_every_hue(shown, made, objects)
                hits.append(back)
                others = np.where(np.arange(len(hues)) == own[:, None], np.nan, back)
                excess = back[np.arange(len(own)), own] - _mean(others.T)
                numbers["reverted_above_deals"] = np.full(len(objects), np.nan)
                numbers["reverted_above_deals"][objects.canonical] = excess
            for category, members in objects.categories.items():
                told = common | {"category": category, **ALL_HUES}
                for name, mean in numbers.items():
                    values.add(name, {train_seed: np.where(members, mean, np.nan)}, **told)
                response = respond(shown, made)
                index = reversion_index(response, objects.hues, objects.labels, objects.canonical, members)
                if index is not None:
                    values.add("reversion_index", {train_seed: influence(index, len(objects))}, **told)
                if not key.inverse.startswith("null_") and key.inverse != "painter":
                    for turn, errors in zip(record.turns, of_turns, strict=True):
                        told |= turn.columns
                        values.add("hue_error_shown", {train_seed: np.where(members, errors, np.nan)}, **told)
        if hits:
            p = permutation_p(np.mean(hits, 0), own, objects.labels[objects.canonical], DEALS, seed)
            told = common | {"category": "canonical", **ALL_HUES}
            values.add("reverted_p", [p], **told)
    return values.table()


def _mean(table: np.ndarray) -> np.ndarray:
    """(N,) mean over the rows (K, N) that have a value; NaN where none has."""
    counted = (~np.isnan(table)).sum(0)
    return np.where(counted > 0, np.nansum(table, 0) / np.maximum(counted, 1), np.nan)


def _in_every_hue(
    shown: np.ndarray, made: np.ndarray, objects: JudgedObjects
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the M objects that own a hue: (M, H) share of the turns far from each of H hues that come back in it; the H
    hues of all classes; (M,) which of them is theirs."""
    own = objects.canonical
    hues, which = np.unique(objects.hues[own], return_inverse=True)
    return np.stack([_mean(reverted(shown[:, own], made[:, own], hue)) for hue in hues], 1), hues, which


# ------------------------------------------------------------------------------------------- the target's own answers


def answer_refusal(target: Target, objects: JudgedObjects) -> str:
    """Why the target's answers cannot be judged on these objects, in one sentence, or "" where they can."""
    if target.kind not in ("classifier", "detector") or target.classes is None:
        return f"{target.name} names no classes: its answers are not judged."
    if not objects.labelled:
        return f"{objects.name} has no labels: the answers of {target.name} are not judged."
    if unknown := [name for name in objects.classes if name not in target.classes]:
        return f"{target.name} does not know {unknown[0]} and other classes of {objects.name}: answers are not judged."
    return ""


def colour_changes(turns: int = 3) -> list[Perturbation]:
    """What the target's answers are judged under: nothing changed; all objects, then the image, turned and grey."""
    regions: tuple[Region, ...] = ("objects", "image")
    changes = [[*hue_shifts(turns, region)[1:], Perturbation("grey", region)] for region in regions]
    return [NONE, *changes[0], *changes[1]]


def accuracy_values(
    target: Target, objects: JudgedObjects, changes: Sequence[Perturbation], batch_size: int = 250
) -> pd.DataFrame:
    """top1 of the judged object (classifier) or ap50 of all objects (detector) under each change, the first of which
    is none, and accuracy_kept: its share of the accuracy under none, where 0 is a value as any other.

    Forward passes only. category: "all", and those of the judged objects; ap50 is the mean over a category's classes.
    Columns tap, depth and inverse stay empty. Raises BacksightError where the answers cannot be judged.
    """
    if refusal := answer_refusal(target, objects):
        raise BacksightError(refusal)
    assert target.classes is not None
    number = torch.tensor([target.classes.index(name) for name in objects.classes])
    labels, count = number[torch.from_numpy(objects.labels)].numpy(), len(objects)
    categories = {"all": np.ones(count, bool), **objects.categories}
    values = Values(target, objects.name, objects.split, range(count))
    by_change = []
    for answers in _answers(target, objects, changes, batch_size):
        if isinstance(answers, Tensor):
            by_change.append((answers.argmax(1).cpu().numpy() == labels).astype(float))
            continue
        present = torch.where(objects.present >= 0, number[objects.present.clamp(min=0)], -1)
        by_change.append(match_objects(answers, present, objects.boxes))

    def accuracies(weights: np.ndarray) -> np.ndarray:
        """(R, changes, categories)"""
        table = []
        for judged in by_change:
            if isinstance(judged, np.ndarray):
                table.append([weights @ (judged * own) / (weights @ own) for own in categories.values()])
                continue
            found = class_precisions(judged, weights)
            kinds = [found.keys() & set(labels[own]) for own in categories.values()]
            table.append([np.nanmean([found[kind] for kind in of], axis=0) for of in kinds])
        return np.array(table).transpose(2, 0, 1)

    def both(weights: np.ndarray) -> np.ndarray:
        score = accuracies(weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.stack([score, score / score[:, :1]], -1)

    shares_of = influence(both, count)
    for place, change in enumerate(changes):
        for column, (category, members) in enumerate(categories.items()):
            told = {"category": category, **change.columns}
            judged = by_change[place]
            if isinstance(judged, np.ndarray):
                values.add("top1", np.where(members, judged, np.nan), **told)
            else:
                values.add("ap50", shares_of[:, place, column, 0], **told)
            if change != NONE:
                values.add("accuracy_kept", shares_of[:, place, column, 1], **told)
    return values.table()


@torch.no_grad()
def _answers(
    target: Target, objects: JudgedObjects, changes: Sequence[Perturbation], batch_size: int
) -> Iterator[Tensor | Predictions]:
    """The target's answers to all images under each change."""
    for change in changes:
        answers = [target(batch) for batch in objects.perturbed(change).split(batch_size)]
        yield concatenate(answers) if isinstance(answers[0], Predictions) else torch.cat(answers)  # type: ignore


@torch.no_grad()
def turned_pictures(
    target: Target, objects: JudgedObjects, which: int, inverses: Mapping[str, Reconstruct], turns: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """One object in `turns` hues, (K, 3, H, W), and what comes back of it from each tap: {tap: (K, 3, H, W)}."""
    pictures = torch.stack([objects.perturbed(turn)[which] for turn in hue_shifts(turns)])
    recorded = target.record(pictures, list(inverses))
    return pictures, {tap: inverse(recorded[tap]).clamp(0, 1) for tap, inverse in inverses.items()}
