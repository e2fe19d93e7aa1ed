"""The colour study's pass over images and perturbations, and its values.

Every perturbed picture goes through the target once; each inverse paints it from each tap, and of what it paints only
the colour of the object is kept: one complex number (`colour.object_chroma`). All measures are taken from these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from backsight.measures.hue import chroma_kept, hue_distance, hue_of, object_chroma, respond, reversion, shares
from backsight.representation import Predictions, concatenate
from backsight.scenes.dataset import cached
from backsight.scenes.render import SceneOptions
from backsight.studies.recolour import JudgedObjects, Perturbation, painted
from backsight.tables.pooling import influence
from backsight.tables.values import NO_SEED, Values
from backsight.targets import PIXELS, Target

Families = Mapping[int, Mapping[str, Mapping[str, Reconstruct]]]  # {training seed: {family: {tap: inverse}}}
NULL_SHIFTS = 8  # points of the response curve on which the nulls are measured, at least 3


@dataclass(frozen=True)
class Key:
    """Whose colours: the inverse (a family or a null), the family behind a null, the tap."""

    inverse: str
    tap: str
    family: str = ""


@dataclass(frozen=True)
class ColourRecord:
    """Colours of the judged objects under every perturbation.

    shown: (P, N) complex, 0 where a perturbation was not inverted; made: {Key: {training seed: (P, N) complex}}, NaN
    where a perturbation was not measured; outputs: of each perturbation the target's answer on all images.
    """

    target: Target
    objects: JudgedObjects
    perturbations: tuple[Perturbation, ...]
    shown: np.ndarray
    made: dict[Key, dict[int, np.ndarray]]
    outputs: list[Tensor | Predictions] = field(default_factory=list)


def uniform_by_seed(target: Target, seeds: Sequence[int], count: int) -> Families:
    """{seed: {"linear_uniform": {tap: inverse}}}: linear inverses fitted on scenes whose hues tell nothing of classes.

    What an inverse has learned of typical colours comes from the colours that it was fitted on; these know none.
    """
    found = {}
    for seed in seeds:
        folder = cached("train", count, seed, max(target.image_size), SceneOptions(rule="uniform"))
        images = open_images(folder, "all", target.image_size)
        found[seed] = {"linear_uniform": fit_linear(target, images, seed=seed, progress=False)}
    return found


def only(wanted: Sequence[str], families: Families) -> dict[int, dict[str, Mapping[str, Reconstruct]]]:
    """Of the inverses of several training seeds, the families that are wanted. Raises BacksightError for none."""
    chosen = {seed: {name: taps for name, taps in found.items() if name in wanted} for seed, found in families.items()}
    if not all(chosen.values()):
        there = sorted({name for found in families.values() for name in found})
        raise BacksightError(f"families is {list(wanted)}, and the inverses here are {', '.join(there)}: name one.")
    return chosen


def merged(*families: Families) -> dict[int, dict[str, Mapping[str, Reconstruct]]]:
    """The families of several sources, seed by seed."""
    together: dict[int, dict[str, Mapping[str, Reconstruct]]] = {}
    for each in families:
        for seed, found in each.items():
            together.setdefault(seed, {}).update(found)
    return together


@torch.no_grad()
def record_colours(
    target: Target,
    objects: JudgedObjects,
    perturbations: Sequence[Perturbation],
    families: Families,
    untrained: Mapping[int, tuple[Target, Mapping[str, Mapping[str, Reconstruct]]]] | None = None,
    mean_image: Tensor | None = None,
    answers: bool = True,
    nulls: bool = True,
    prototype_eyes: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> ColourRecord:
    """The colour of each object in what every inverse makes of every tap, under every perturbation.

    families, untrained: as `families_by_seed` and `untrained_by_seed` give them; mean_image: (3, H, W), the null
    that knows no image. The nulls that cost a pass (`null_shuffled`: another image's representation under the same
    perturbation; `null_untrained`) are measured on NULL_SHIFTS points of the object's response curve. `painter` is no
    inverse: it paints each object in its canonical hue, whatever is shown. answers: also keep the target's outputs;
    nulls: measure null_shuffled. prototype_eyes: from 0 to 1, how far the *target* is shown each object in its
    canonical hue instead of the picture judged: a known answer, since its layers then hold so much of the prototype.
    """
    taps = [t for t in target.available_taps if any(t in g for each in families.values() for g in each.values())]
    if not taps:
        raise BacksightError(f"there is no inverse of {target.name} at any tap: give families")
    count = len(objects)
    sparse = null_places(perturbations)
    shown = np.zeros((len(perturbations), count), complex)
    made: dict[Key, dict[int, np.ndarray]] = {}
    outputs: list[Tensor | Predictions] = []
    order = _order(seed, count)
    hues = torch.from_numpy(np.where(objects.canonical, objects.hues, np.nan))

    def note(key: Key, training_seed: int, place: int, part: slice, images: Tensor) -> None:
        table = made.setdefault(key, {}).setdefault(training_seed, np.full(shown.shape, np.nan, complex))
        table[place, part] = object_chroma(images.clamp(0, 1), objects.masks[part])

    for place, perturbation in enumerate(
        tqdm(
            perturbations, desc=f"colours of {target.name}", total=len(perturbations), leave=False, disable=not progress
        )
    ):
        pictures = objects.perturbed(perturbation)
        answered = []
        for start in range(0, count, batch_size):
            part = slice(start, min(start + batch_size, count))
            batch = pictures[part]
            if not perturbation.inverted:
                if answers:
                    answered.append(target(batch))
                continue
            shown[place, part] = object_chroma(batch, objects.masks[part])
            if mean_image is not None:
                note(Key("null_mean", PIXELS), NO_SEED, place, part, mean_image.expand_as(batch))
            canonical = painted(batch, objects.masks[part], hues[part]).clamp(0, 1)
            note(Key("painter", PIXELS), NO_SEED, place, part, canonical)
            recorded = target.record(torch.lerp(batch, canonical, prototype_eyes), taps)
            if answers:  # from the deepest tap: never dearer than another whole pass
                answered.append(target.from_tap(taps[-1], recorded[taps[-1]]))
            others = target.record(pictures[order[part]], taps) if nulls and place in sparse and count > 1 else None
            for training_seed, found in families.items():
                for family, inverses in found.items():
                    for tap, inverse in inverses.items():
                        note(Key(family, tap), training_seed, place, part, inverse(recorded[tap]))
                        if others is not None and not family.endswith("_uniform"):
                            key = Key("null_shuffled", tap, family)
                            note(key, training_seed, place, part, inverse(others[tap]))
            if place in sparse and untrained is not None:
                for training_seed, (null_target, null_families) in untrained.items():
                    null_taps = list(dict.fromkeys(t for found in null_families.values() for t in found))
                    null_recorded = null_target.record(batch, null_taps)
                    for family, inverses in null_families.items():
                        for tap, inverse in inverses.items():
                            key = Key("null_untrained", tap, family)
                            note(key, training_seed, place, part, inverse(null_recorded[tap]))
        if answers:
            outputs.append(_joined(answered))
    return ColourRecord(target, objects, tuple(perturbations), shown, made, outputs)


def null_places(perturbations: Sequence[Perturbation]) -> list[int]:
    """Places of evenly spaced shifts of the object's hue, about NULL_SHIFTS of them."""
    curve = [i for i, p in enumerate(perturbations) if p.kind == "hue_shift" and p.region == "object"]
    for wanted in range(min(NULL_SHIFTS, len(curve)), 2, -1):
        if len(curve) % wanted == 0:
            return curve[:: len(curve) // wanted]
    return curve


def _order(seed: int, count: int) -> list[int]:
    """Another image for each image: a random cycle."""
    drawn = np.random.default_rng(seed).permutation(count)
    order = np.empty(count, int)
    order[drawn] = np.roll(drawn, 1)
    return order.tolist()


def _joined(answers: Sequence[Tensor | Predictions]) -> Tensor | Predictions:
    predictions = [each for each in answers if isinstance(each, Predictions)]
    if predictions:
        return concatenate(predictions)
    return torch.cat([each for each in answers if isinstance(each, Tensor)])


# ---------------------------------------------------------------------------------------------------------- tables


def colour_values(record: ColourRecord) -> pd.DataFrame:
    """Values of each perturbation that was inverted, of the whole response curve, and the reversion index.

    Rows with perturbation "hue_shift" and no hue_shift are of the whole curve: the mean over the shifts of an image;
    there, and under each single shift, shares are of the cases whose hue shown is `hue.SEPARATION` degrees or more
    from the canonical one. Nulls have the curve only.
    """
    values = _values(record)
    for key, by_seed in record.made.items():
        single = not key.inverse.startswith("null_") and key.inverse != "painter"
        for train_seed, colours in by_seed.items():
            for place, perturbation in enumerate(record.perturbations):
                if single and not np.isnan(colours[place]).any():
                    _add_measures(values, record, key, train_seed, [place], perturbation.columns)
            for region in ("object", "image"):
                if len(curve := _curve(record, region, colours)) >= 3:
                    _add_measures(values, record, key, train_seed, curve, _whole_curve(region))
                    _add_index(values, record, key, train_seed, curve, region)
    return values.table()


def index_values(record: ColourRecord) -> pd.DataFrame:
    """The reversion index and its parts, of the object's response curve."""
    values = _values(record)
    for key, by_seed in record.made.items():
        for train_seed, colours in by_seed.items():
            if len(curve := _curve(record, "object", colours)) >= 3:
                _add_index(values, record, key, train_seed, curve, "object")
    return values.table()


def _values(record: ColourRecord) -> Values:
    return Values(record.target, record.objects.name, record.objects.split, range(len(record.objects)))


def _whole_curve(region: str) -> dict[str, Any]:
    return {"perturbation": "hue_shift", "region": region, "hue_shift": np.nan, "amount": np.nan}


def _curve(record: ColourRecord, region: str, colours: np.ndarray) -> list[int]:
    """Places of the region's hue shifts at which these colours were measured."""
    return [
        place
        for place, perturbation in enumerate(record.perturbations)
        if perturbation.kind == "hue_shift" and perturbation.region == region and not np.isnan(colours[place]).any()
    ]


def _add_measures(
    values: Values, record: ColourRecord, key: Key, train_seed: int, places: list[int], columns: Mapping[str, Any]
) -> None:
    """All measures, the mean over the perturbations `places` for each image."""
    objects, shown, made = record.objects, record.shown[places], record.made[key][train_seed][places]
    for measure, table in {
        "hue_error_shown": hue_distance(hue_of(made), hue_of(shown)),
        "chroma_kept": chroma_kept(shown, made),
        **shares(shown, made, objects.hues),
    }.items():
        counted = (~np.isnan(table)).sum(0)
        mean = np.where(counted > 0, np.nansum(table, 0) / np.maximum(counted, 1), np.nan)
        _add(values, record, key, train_seed, measure, mean, columns)


def _add(
    values: Values,
    record: ColourRecord,
    key: Key,
    train_seed: int,
    measure: str,
    numbers: np.ndarray,
    columns: Mapping[str, Any],
) -> None:
    for category, members in record.objects.categories.items():
        given: dict[str, Any] = {"tap": key.tap, "inverse": key.inverse, "family": key.family or key.inverse}
        given |= {"category": category, **columns}
        values.add(measure, {train_seed: np.where(members, numbers, np.nan)}, **given)


def _add_index(values: Values, record: ColourRecord, key: Key, train_seed: int, curve: list[int], region: str) -> None:
    """What each image contributes to the index of a category; images of colour-free classes calibrate all of them."""
    objects = record.objects
    response = respond(record.shown[curve], record.made[key][train_seed][curve])
    for category, members in objects.categories.items():
        for measure, statistic in reversion(response, objects.hues, objects.labels, objects.canonical, members).items():
            given: dict[str, Any] = {"tap": key.tap, "inverse": key.inverse, "family": key.family or key.inverse}
            given |= {"category": category, **_whole_curve(region)}
            values.add(measure, {train_seed: influence(statistic, len(objects))}, **given)


@torch.no_grad()
def shifted_pictures(
    target: Target,
    objects: JudgedObjects,
    which: int,
    inverses: Mapping[str, Reconstruct],
    perturbations: Sequence[Perturbation],
) -> tuple[Tensor, dict[str, Tensor]]:
    """One object under some perturbations, (K, 3, H, W), and what comes back from each tap: {tap: (K, 3, H, W)}."""
    pictures = torch.stack([objects.perturbed(each)[which] for each in perturbations])
    recorded = target.record(pictures, list(inverses))
    return pictures, {tap: inverse(recorded[tap]).clamp(0, 1) for tap, inverse in inverses.items()}
