"""The colour study: what inverses paint, and what the target answers, when objects are recoloured.

Every recoloured picture goes through the target once; each inverse paints it from each tap, and of what it paints only
the colour of the object is kept: one complex number (`hue.object_chroma`). All measures are taken from these.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, open_images, unit_floats
from backsight.errors import BacksightError
from backsight.inverses.families import Reconstruct
from backsight.inverses.linear import fit_linear
from backsight.measures.agreement import Matches, class_precisions, match_objects
from backsight.measures.hue import (
    hue_scores,
    nearer,
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
from backsight.studies.nulls import BySeed, Untrained, another, read_taps, with_nulls
from backsight.studies.recolour import NONE, JudgedObjects, Perturbation, Region, hue_shifts
from backsight.tables.pooling import influence
from backsight.tables.values import NO_SEED, Values
from backsight.targets import PIXELS, Target

# In a table: of all turns of the object's hue, not of one.
ALL_HUES: Mapping[str, Any] = {"perturbation": "hue_shift", "region": "object", "hue_shift": np.nan}
DEALS = 2000  # of the classes' hues, in the permutation test
Place = tuple[str, str, str]  # the inverse (a family or a null), the family (of a null: behind it), the tap


def families_to_compare(
    families: Sequence[str],
    by_seed: BySeed,
    target: Target,
    seeds: Sequence[int],
    count: int,
    scenes: bool,
    trained_on: str,
) -> dict[int, dict[str, Mapping[str, Reconstruct]]]:
    """Of the inverses of several training seeds those of `families`; and two linear ones of each of `seeds`, fitted
    here, alike but for their `count` training images.

    What an inverse has learned of typical colours comes from the colours it was fitted on. `linear_uniform` knows none:
    the hues of its scenes say nothing of classes. Of photographs its part is that of `linear_leaves`: no leaf is a
    thing. Raises BacksightError where nothing is left.
    """
    pair = ("linear", "linear_uniform") if scenes else ("linear", "linear_leaves") * (trained_on != "leaves")

    def images(name: str, seed: int) -> ImageSource:
        if not scenes:
            return open_images("leaves" if name == "linear_leaves" else trained_on, "train", target, count, seed)
        options = SceneOptions(rule="uniform" if name == "linear_uniform" else "mixed")
        return open_images(cached("train", count, seed, max(target.image_size), options), "all", target.image_size)

    kept = [name for name in families if name not in pair]
    chosen = {seed: {name: taps for name, taps in of.items() if name in kept} for seed, of in by_seed.items()}
    for seed, name in product(seeds, pair):
        chosen.setdefault(seed, {})[name] = fit_linear(target, images(name, seed), seed=seed, progress=False)
    if not any(chosen.values()):
        known = sorted({name for of in by_seed.values() for name in of})
        raise BacksightError(f"families is {list(families)}, and the inverses here are {', '.join(known)}: name one.")
    return {seed: of for seed, of in chosen.items() if of}


@torch.no_grad()
def _colours(
    target: Target,
    objects: JudgedObjects,
    turns: Sequence[Perturbation],
    families: BySeed,
    untrained: Untrained,
    seed: int,
    batch_size: int,
) -> tuple[np.ndarray, dict[Place, dict[int, np.ndarray]]]:
    """(K, N) complex, the colours of N objects in K turns, and {place: {training seed: (K, N)}} of what comes back."""
    taps, count = read_taps(target, families), len(objects)
    usual = {s: {f: of[f] for f in of if not f.endswith(("_uniform", "_leaves"))} for s, of in families.items()}
    shown = np.zeros((len(turns), count), complex)
    returned: dict[Place, dict[int, np.ndarray]] = {}
    parts = np.array_split(np.arange(count), -(-count // batch_size))
    for number, turn in enumerate(tqdm(turns, f"colours of {target.name}", leave=False)):
        pictures = objects.perturbed(turn)
        for part in parts:
            shown[number, part] = object_chroma(pictures[part], objects.masks[part])
            recorded = target.record(pictures[part], taps)
            order = another(len(part), torch.Generator().manual_seed(seed))
            others = {tap: held.index(order) for tap, held in recorded.items() if len(part) > 1}
            several = with_nulls(recorded, families, others, usual, pictures[part], untrained)
            for inverse, family, tap, train_seed, images in several:
                colours = returned.setdefault((inverse, family, tap), {})
                table = colours.setdefault(train_seed, np.full(shown.shape, np.nan, complex))
                table[number, part] = object_chroma(images.clamp(0, 1), objects.masks[part])
    return shown, returned


def colour_values(
    target: Target,
    objects: JudgedObjects,
    turns: int,
    families: BySeed,
    untrained: Untrained,
    mean_image: Tensor,
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """The colour of each object in what every inverse makes of every tap, at `turns` hues all round the circle.

    families, untrained: as of `by_seed`; mean_image: (3, H, W), the null that knows no image. `null_shuffled` reads
    another image's representation, under the same turn. `painter` is no inverse: it paints each object in its canonical
    hue, whatever is shown.

    Of each turn hue_error_shown (degrees, of reconstructions that have a hue), of inverses only; of all turns
    (ALL_HUES) the mean of hue_error_shown, of share_keep, share_revert, share_grey and share_other (of the cases whose
    hue shown is `hue.SEPARATION` degrees or more from the canonical one), of reverted_above_deals (share_revert less
    the share that comes back in a hue of another class). Of scenes reversion_index, and reverted_p (of all objects); of
    photographs, where the canonical hue is the object's natural one and another class is another photograph,
    share_nearer (of the same cases: nearer to that hue than to the one shown) and nearer_above_deals.
    """
    perturbations, canonical, labels = hue_shifts(turns), objects.canonical, objects.labels[:, 0].numpy()
    shown, returned_at = _colours(target, objects, perturbations, families, untrained, seed, batch_size)
    painted = np.where(canonical, np.abs(shown) * np.exp(1j * np.radians(objects.hues)), shown)
    mean = object_chroma(mean_image.expand_as(objects.images), objects.masks)
    for name, colours in (("painter", painted), ("null_mean", np.broadcast_to(mean, shown.shape))):
        returned_at[name, name, PIXELS] = {NO_SEED: colours}
    photographs = objects.photographs.numpy()
    values = Values(target, objects.name, objects.split, range(len(objects)), photographs)  # type: ignore[arg-type]
    hues, first, own = np.unique(objects.hues[canonical], return_index=True, return_inverse=True)
    if objects.natural:
        hues, first, own = objects.hues, *2 * [np.arange(len(objects))]
    is_own = np.arange(len(hues)) == own[:, None]
    dealt = ~is_own & (photographs[canonical][first] != photographs[canonical][:, None])  # whose hue it is not

    def above_deals(hits: np.ndarray) -> np.ndarray:
        excess = np.full(len(objects), np.nan)
        excess[canonical] = hits[is_own] - _mean(np.where(dealt, hits, np.nan).T)
        return excess

    for (inverse, family, tap), by_seed in returned_at.items():
        common: dict[str, Any] = {"tap": tap, "inverse": inverse, "family": family}
        hits = []  # of each seed (M, H): share of M canonical objects' turns that come back in each of H hues
        for train_seed, returned in by_seed.items():
            of_turns = hue_scores(shown, returned)["hue_error"]
            means = {"hue_error_shown": of_turns, **shares(shown, returned, objects.hues)}
            numbers = {name: _mean(table) for name, table in means.items()}
            cases = shown[:, canonical, None], returned[:, canonical, None]
            if canonical.any():
                hits.append(_mean(reverted(*cases, hues)))
                numbers["reverted_above_deals"] = above_deals(hits[-1])
            if objects.natural:
                close = _mean(nearer(*cases, hues))
                numbers |= {"share_nearer": close[is_own], "nearer_above_deals": above_deals(close)}
            response = None if objects.natural else respond(shown, returned)
            for category, members in objects.categories.items():
                columns = common | {"category": category}
                for name, mean in numbers.items():
                    values.add(name, {train_seed: np.where(members, mean, np.nan)}, **columns, **ALL_HUES)
                if response and (index := reversion_index(response, objects.hues, labels, canonical, members)):
                    values.add("reversion_index", {train_seed: influence(index, len(objects))}, **columns, **ALL_HUES)
                if inverse == family != "painter" and not inverse.startswith("null_"):
                    for turn, errors in zip(perturbations, of_turns, strict=True):
                        of_turn = {train_seed: np.where(members, errors, np.nan)}
                        values.add("hue_error_shown", of_turn, **columns, **turn._asdict())
        if hits and not objects.natural:
            p = permutation_p(np.mean(hits, 0), own, labels[canonical], DEALS, seed)
            values.add("reverted_p", [p], **common, category="canonical", **ALL_HUES)
    return values.table()


def _mean(table: np.ndarray) -> np.ndarray:
    """(N, …) mean over the rows (K, N, …) that have a value; NaN where none has."""
    counted = (~np.isnan(table)).sum(0)
    return np.where(counted > 0, np.nansum(table, 0) / np.maximum(counted, 1), np.nan)


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


def colour_changes(turns: int = 3, regions: Sequence[Region] = ("objects", "image")) -> list[Perturbation]:
    """What the target's answers are judged under: nothing changed; all objects, then the image, turned and grey."""
    return [NONE] + [c for r in regions for c in (*hue_shifts(turns, r)[1:], Perturbation("grey", r))]


@torch.no_grad()
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
    number = torch.tensor([*((target.classes or ()).index(name) for name in objects.classes), -1])
    present, count = number[objects.labels], len(objects)  # -1: none
    labels = present[:, 0].numpy()
    categories = {"all": np.ones(count, bool), **objects.categories}

    def judged(change: Perturbation) -> np.ndarray | Matches:
        """Whether each image is named rightly (N,), or the matches of all detections."""
        answers = [target(batch) for batch in objects.perturbed(change).split(batch_size)]
        if isinstance(answers[0], Predictions):
            return match_objects(concatenate(answers), present, objects.boxes)  # type: ignore
        return (torch.cat(answers).argmax(1).cpu().numpy() == labels).astype(float)  # type: ignore[arg-type]

    by_change = [judged(change) for change in changes]

    def accuracies(weights: np.ndarray) -> np.ndarray:
        """(R, changes, categories, 2): the accuracy, and its share of that under the first change."""
        table = []
        for hits in by_change:
            if isinstance(hits, np.ndarray):
                table.append([weights @ (hits * own) / (weights @ own) for own in categories.values()])
                continue
            precisions = class_precisions(hits, weights)
            kinds = [precisions.keys() & set(labels[own]) for own in categories.values()]
            table.append([np.nanmean([precisions[kind] for kind in of], axis=0) for of in kinds])
        scores = np.array(table).transpose(2, 0, 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.stack([scores, scores / scores[:, :1]], -1)

    of_images, values = influence(accuracies, count), Values(target, objects.name, objects.split, range(count))
    for place, (change, hits) in enumerate(zip(changes, by_change, strict=True)):
        for column, (category, members) in enumerate(categories.items()):
            about = {"category": category, **change._asdict()}
            score, kept = of_images[:, place, column].T
            if isinstance(hits, np.ndarray):
                values.add("top1", np.where(members, hits, np.nan), **about)
            else:
                values.add("ap50", score, **about)
            if change != NONE:
                values.add("accuracy_kept", kept, **about)
    return values.table()


@torch.no_grad()
def neighbour_values(
    target: Target,
    objects: JudgedObjects,
    changes: Sequence[Perturbation],
    gallery: Tensor,
    untrained: Untrained,
    seed: int = 0,
    batch_size: int = 32,
) -> pd.DataFrame:
    """What a target without a head makes of pictures under each change, the first of which is none: by the features
    that it puts out.

    gallery: (M, 3, H, W) uint8, other pictures. feature_cosine: to the unchanged picture; retrieval_top1: 1 where that
    lies nearest, among the gallery and all unchanged pictures; same_neighbour: 1 where of the others the same one lies
    nearest as to the unchanged picture. null_shuffled: another picture, under the same change; null_untrained: the
    same architecture with random weights. Columns tap and depth stay empty.
    """
    values = Values(target, objects.name, objects.split, range(len(objects)))
    order = another(len(objects), torch.Generator().manual_seed(seed))
    twins = [("null_untrained", train_seed, twin) for train_seed, (twin, _) in untrained.items()]
    for name, train_seed, eye in [("", NO_SEED, target), *twins]:

        def features(pictures: Tensor, eye: Target = eye) -> Tensor:
            return F.normalize(torch.cat([eye(part).flatten(1).cpu() for part in pictures.split(batch_size)]), dim=1)  # type: ignore[union-attr]

        plain = features(objects.perturbed(NONE))
        among = torch.cat([plain, features(unit_floats(gallery))])
        usual = (plain @ among.T).fill_diagonal_(-2).argmax(1)
        for change in changes[1:]:
            seen = features(objects.perturbed(change))
            for inverse, of in [(name or None, seen)] + [("null_shuffled", seen[order])] * (not name):
                likeness = of @ among.T
                own, about = likeness.diagonal().clone(), {"category": "all", **change._asdict()}
                first, same = own >= likeness.amax(1), likeness.fill_diagonal_(-2).argmax(1) == usual
                scores = {"feature_cosine": own, "retrieval_top1": first.float(), "same_neighbour": same.float()}
                for measure, numbers in scores.items():
                    values.add(measure, {train_seed: numbers}, inverse=inverse, **about)
    return values.table()


@torch.no_grad()
def turned_pictures(
    target: Target, objects: JudgedObjects, which: int, inverses: Mapping[str, Reconstruct], turns: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """One object in `turns` hues, (K, 3, H, W), and what comes back of it from each tap: {tap: (K, 3, H, W)}."""
    pictures = torch.stack([objects.perturbed(turn)[which] for turn in hue_shifts(turns)])
    recorded = target.record(pictures, list(inverses))
    return pictures, {tap: inverse(recorded[tap]).clamp(0, 1) for tap, inverse in inverses.items()}
