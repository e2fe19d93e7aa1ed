"""Cycle check: does the target, fed with a reconstruction, see what it saw in the image?

The reconstruction goes through the target once. Compared are the representations at each tap, its early features (a
perceptual distance), and its answer: the top-1 class, or the detections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backsight.data.images import batches, images_at_once
from backsight.measures.agreement import match
from backsight.measures.similarity import frechet_distance, token_cosine
from backsight.measures.structure import Judged, Key, Measure, Scores
from backsight.representation import Predictions, Tokens
from backsight.studies.nulls import BySeed, read_taps, reconstructions
from backsight.tables.pooling import influence
from backsight.tables.values import NO_SEED, Values
from backsight.targets import Target

EARLY = 3  # taps of the perceptual distance
LPIPS_WEIGHTS, LPIPS_SIDE = "checkpoints/alexnet-owt-7be5be79.pth", 64  # in torch.hub's folder; pixels at least
GROUPS = 20  # of images; one is left out at a time for the interval of a distance of sets


def lpips_network(device: torch.device) -> nn.Module | None:
    """Torchmetrics' LPIPS over torchvision's AlexNet; None where its weights are not on this machine."""
    if not Path(torch.hub.get_dir(), LPIPS_WEIGHTS).is_file():
        return None
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity  # takes long to import

    return LearnedPerceptualImagePatchSimilarity("alex").net.to(device)


def cycle(target: Target, taps: Sequence[str], count: int | None = None) -> Measure:
    """Measure: `cycle_cosine` at each of `taps` (column cycle_tap), `perceptual`, and the agreement of the answers; of
    pictures of 64 pixels or more `lpips` (Zhang et al. 2018, AlexNet), where torchvision's weights of it are present.

    count: of the first so many images only; the target runs once more for every reconstruction.
    perceptual: the distance of LPIPS (Zhang et al. 2018) without its learned weights, in the target's own features:
    at each of the first EARLY taps of its blocks, tokens on the grid are scaled to unit length, squared differences
    summed over channels and averaged over tokens; then the mean over the taps. 0 is equal; values of different targets
    do not compare. top1_agreement (classifiers): the share of images with the same likeliest class. map50 (detectors):
    AP at an IoU of 0.5, mean over classes, of the detections on the reconstruction, where the objects are the
    detections on the image of a score of CONFIDENT or more: `Matches`.
    """
    blocks = target.tap_set("blocks")
    network = lpips_network(target.device)
    recorded_taps = [tap for tap in target.available_taps if tap in {*taps, *blocks[:EARLY], blocks[-1]}]

    def seen(images: Tensor) -> tuple[dict[str, Any], list[Tensor], Tensor | Predictions | None]:
        """What is recorded, the directions of early tokens, and the answer, if classes or objects are named."""
        recorded = target.record(images, recorded_taps)
        early = [recorded[tap] for tap in blocks[:EARLY]]
        directions = [F.normalize(tokens.patches, dim=-1) for tokens in early if isinstance(tokens, Tokens)]
        answer: Any = recorded[blocks[-1]]
        if not isinstance(answer, Predictions):
            answer = target.from_tap(blocks[-1], answer) if target.answers else None
        return recorded, directions, answer

    def prepared(judged: Judged) -> Callable[[Tensor], Scores]:
        few = len(judged.images) if count is None else min(len(judged.images), max(0, count - int(judged.places[0])))
        if not few:
            return lambda reconstruction: {}
        true, early, answer = seen(judged.images[:few])

        def measured(reconstruction: Tensor) -> Scores:
            again, early_again, other = seen(reconstruction[:few])
            values: dict[Key, Any] = {
                ("cycle_cosine", (("cycle_tap", tap),)): token_cosine(true[tap], again[tap]) for tap in taps
            }
            if early:
                pairs = zip(early_again, early, strict=True)
                values["perceptual"] = torch.stack([(a - b).square().sum(-1).mean(1) for a, b in pairs]).mean(0)
            if network is not None and min(reconstruction.shape[2:]) >= LPIPS_SIDE:
                values["lpips"] = network(judged.images[:few], reconstruction[:few], normalize=True).flatten()
            if isinstance(answer, Predictions) and isinstance(other, Predictions):
                values["map50"] = match(answer, other)
            elif isinstance(answer, Tensor) and isinstance(other, Tensor):
                values["top1_agreement"] = (answer.argmax(1) == other.argmax(1)).float()
            return values

        return measured

    return prepared


@torch.no_grad()
def add_frechet_distance(values: Values, target: Target, images: Any, families: BySeed, mean_image: Tensor) -> None:
    """Add `frechet_distance` of the images and of what each inverse makes of them, two sets that the target sees.

    It sees a picture as the class token of its last tap (where there is none: as the mean token); of a DINOv2 this is
    FD-DINOv2. images: those of `values`, 200 or more, none of which these inverses were fitted on. null_mean: the mean
    image in the place of each.
    """
    last = target.tap_set("blocks")[-1]

    def seen(pictures: Tensor) -> Tensor:
        held = target.record(pictures, [last])[last]
        return held.values[:, : min(1, getattr(held, "prefix", 0)) or None].mean(1)

    true: list[Tensor] = []
    made: dict[tuple[str, str], dict[int, list[Tensor]]] = {}
    for batch in (images.to(target.device) for images in batches(images, images_at_once(images))):
        true.append(seen(batch))
        recorded = target.record(batch, read_taps(target, families))
        for family, tap, train_seed, pictures in reconstructions(recorded, families):
            made.setdefault((family, tap), {}).setdefault(train_seed, []).append(seen(pictures.clamp(0, 1)))
    whole = torch.cat(true)
    count = min(GROUPS, len(whole))
    groups = np.arange(len(whole)) % count
    names = [f"group {group}" for group in groups]

    def distance(features: Tensor) -> np.ndarray:
        def of_weights(weights: np.ndarray) -> np.ndarray:
            drawn = torch.from_numpy(weights[:, groups] > 0)
            return np.array([frechet_distance(whole[kept], features[kept]) for kept in drawn])

        return influence(of_weights, count)[groups]

    blank = distance(seen(mean_image[None].to(target.device)).expand_as(whole))
    values.add("frechet_distance", {NO_SEED: blank}, None, "null_mean", clusters=names)
    for (family, tap), by_seed in made.items():
        of_seeds = {train_seed: distance(torch.cat(parts)) for train_seed, parts in by_seed.items()}
        values.add("frechet_distance", of_seeds, tap, family, clusters=names, family=family)
