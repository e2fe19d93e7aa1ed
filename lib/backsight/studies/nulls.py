"""What inverses make of images, and what knows nothing of an image: the mean of the training images, another image's
representation, the same architecture with random weights."""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.data.images import batches
from backsight.inverses.families import Reconstruct
from backsight.targets import Target

Recorded = Mapping[str, Any]  # {tap: representation}
Families = Mapping[str, Mapping[str, Reconstruct]]  # {family: {tap: inverse}}
BySeed = Mapping[int, Families]  # of every training seed
Untrained = Mapping[int, tuple[Target, Families]]  # as `by_seed.untrained_by_seed` gives them


def read_taps(target: Target, by_seed: BySeed) -> list[str]:
    """The taps that any of these inverses reads, in forward order."""
    read = {tap for families in by_seed.values() for inverses in families.values() for tap in inverses}
    return [tap for tap in target.available_taps if tap in read]


def reconstructions(recorded: Recorded, by_seed: BySeed) -> Iterator[tuple[str, str, int, Tensor]]:
    """(family, tap, training seed, (B, 3, H, W)) of every inverse of a tap that is recorded."""
    for tap, representation in recorded.items():
        for train_seed, families in by_seed.items():
            for family, inverses in families.items():
                if tap in inverses:
                    yield family, tap, train_seed, inverses[tap](representation)


def with_nulls(
    recorded: Recorded, by_seed: BySeed, others: Recorded, mixed: BySeed, images: Tensor, untrained: Untrained
) -> Iterator[tuple[str, str, str, int, Tensor]]:
    """`reconstructions` with the name of the inverse first: the family of what is recorded, null_shuffled of others'
    representations by the inverses `mixed`, null_untrained of what targets with random weights see of the images."""
    drawn = ((target, {train_seed: families}) for train_seed, (target, families) in untrained.items())
    seen = (("null_untrained", target.record(images, read_taps(target, own)), own) for target, own in drawn)
    for null, representations, inverses in chain([("", recorded, by_seed), ("null_shuffled", others, mixed)], seen):
        for family, tap, train_seed, pictures in reconstructions(representations, inverses):
            yield null or family, family, tap, train_seed, pictures


def null_mean(train_images: Any) -> Tensor:
    """(3, H, W) mean of the training images (ImageSource or (N, 3, H, W)): the `null_mean` reconstruction."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches(train_images, 256):
        total, count = total + batch.double().sum(0), count + len(batch)
    return (total / count).float()


def mosaic(images: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) of the mean colours of side x side equal parts of each picture: what so many colours of it show."""
    return F.interpolate(F.adaptive_avg_pool2d(images, side), images.shape[2:])


def another(count: int, generator: torch.Generator) -> Tensor:
    """(N,) a random cyclic permutation: which other image stands in for each, never its own: for `null_shuffled`."""
    order = torch.randperm(count, generator=generator)
    taken = torch.empty_like(order)
    taken[order] = order.roll(1)
    return taken
