"""Null models: what knows nothing of an image, the mean of the training images and another image's representation."""

from typing import Any

import torch
from torch import Tensor

from backsight.data.images import batches
from backsight.errors import BacksightError
from backsight.representation import AnyRepresentation


def null_mean(train_images: Any, batch_size: int = 256) -> Tensor:
    """(3, H, W) mean of the training images (ImageSource or (N, 3, H, W)): the `null_mean` reconstruction."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches(train_images, batch_size):
        total, count = total + batch.double().sum(0), count + len(batch)
    return (total / count).float()


def shuffled(representation: AnyRepresentation, generator: torch.Generator) -> AnyRepresentation:
    """The representation with every image given another image's values: the input of `null_shuffled`.

    A random cyclic permutation of the batch, so that no image keeps its own. Raises BacksightError on a batch
    of one.
    """
    batch = representation.batch
    if batch < 2:
        raise BacksightError("shuffled() needs a batch of at least 2 images, but got 1.")
    order = torch.randperm(batch, generator=generator)
    taken = torch.empty_like(order)
    taken[order] = order.roll(1)
    return representation.index(taken.to(representation.values.device))
