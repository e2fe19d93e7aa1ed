"""What inverses make of images, and what knows nothing of an image: the mean of the training images, another image's
representation, the same architecture with random weights."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from backsight.data.images import batches
from backsight.errors import BacksightError
from backsight.inverses.families import Reconstruct
from backsight.representation import AnyRepresentation
from backsight.targets import Target

Families = Mapping[str, Mapping[str, Reconstruct]]  # {family: {tap: inverse}}
BySeed = Mapping[int, Families]  # of every training seed
Untrained = Mapping[int, tuple[Target, Families]]  # as `by_seed.untrained_by_seed` gives them


def read_taps(target: Target, by_seed: BySeed) -> list[str]:
    """The taps that any of these inverses reads, in forward order. Raises BacksightError on those of another target."""
    read = {tap for families in by_seed.values() for inverses in families.values() for tap in inverses}
    if missing := read - {*target.available_taps}:
        raise BacksightError(f"{target.name} has no taps {', '.join(sorted(missing))}: these inverses are of another")
    return [tap for tap in target.available_taps if tap in read]


def reconstructions(recorded: Mapping[str, Any], by_seed: BySeed) -> Iterator[tuple[str, str, int, Tensor]]:
    """(family, tap, training seed, (B, 3, H, W)) of every inverse of a tap that is recorded."""
    for tap, representation in recorded.items():
        for train_seed, families in by_seed.items():
            for family, inverses in families.items():
                if tap in inverses:
                    yield family, tap, train_seed, inverses[tap](representation)


def of_untrained(images: Tensor, untrained: Untrained) -> Iterator[tuple[str, str, int, Tensor]]:
    """`reconstructions` by inverses of targets with random weights, of what these see."""
    for train_seed, (target, families) in untrained.items():
        by_seed = {train_seed: families}
        yield from reconstructions(target.record(images, read_taps(target, by_seed)), by_seed)


def null_mean(train_images: Any, batch_size: int = 256) -> Tensor:
    """(3, H, W) mean of the training images (ImageSource or (N, 3, H, W)): the `null_mean` reconstruction."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches(train_images, batch_size):
        total, count = total + batch.double().sum(0), count + len(batch)
    return (total / count).float()


def another(count: int, generator: torch.Generator) -> Tensor:
    """(N,) a random cyclic permutation: which other image stands in for each, never its own."""
    order = torch.randperm(count, generator=generator)
    taken = torch.empty_like(order)
    taken[order] = order.roll(1)
    return taken


def shuffled(representation: AnyRepresentation, generator: torch.Generator) -> AnyRepresentation:
    """The representation with every image given `another` image's values: the input of `null_shuffled`.

    Raises BacksightError on a batch of one.
    """
    if representation.batch < 2:
        raise BacksightError("shuffled() needs a batch of at least 2 images, but got 1.")
    return representation.index(another(representation.batch, generator).to(representation.values.device))
