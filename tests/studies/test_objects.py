"""Images with their objects: the largest first, crowds are none, and what is not known is said to be unknown."""

import numpy as np
import pytest
import torch

from backsight.data.images import open_images
from backsight.errors import BacksightError
from backsight.studies.objects import Objects, has_objects, objects_of


def item(*sizes: int, crowd: int = 0) -> dict[str, torch.Tensor]:
    """An image of 4 x 8 pixels with objects of so many pixels, in a row each; the first `crowd` of them are crowds."""
    masks = torch.zeros(len(sizes), 4, 8, dtype=torch.bool)
    for row, size in enumerate(sizes):
        masks[row, row, :size] = True
    boxes = torch.tensor([[0.0, row, size, row + 1] for row, size in enumerate(sizes)]).view(-1, 4)
    known = {"masks": masks, "boxes": boxes, "labels": 10 + torch.arange(len(sizes))}
    return {"image": torch.zeros(3, 4, 8, dtype=torch.uint8), "crowd": torch.arange(len(sizes)) < crowd, **known}


def test_the_largest_object_is_the_first_and_a_crowd_is_none() -> None:
    largest, every, labels, boxes = objects_of(item(8, 2, 5, 3, crowd=1))
    assert largest.nonzero().tolist() == [[2, column] for column in range(5)]
    assert every.sum() == 2 + 5 + 3
    assert labels.tolist() == [12, 11, 13]
    assert boxes[0].tolist() == [0.0, 0.5, 5 / 8, 0.75]


@pytest.mark.parametrize("shown", [item(), item(8, crowd=1), {"image": torch.zeros(3, 4, 8)}])
def test_nothing_is_known_of_an_image_without_objects(shown: dict[str, torch.Tensor]) -> None:
    largest, every, labels, boxes = objects_of(shown)
    assert not any(bool(known.any()) for known in (largest, every, boxes))
    assert largest.shape == every.shape == (4, 8)
    assert labels.tolist() == [-1]


def test_scenes_are_read_with_all_their_objects_and_none_is_large_enough_for_all() -> None:
    images = open_images("scenes", "test", 32, 6, 0, masks=True)
    objects = Objects.read(images, 4)
    assert has_objects("scenes")
    assert not has_objects("photographs")
    assert (len(objects), objects.images.dtype, objects.labelled) == (4, torch.uint8, True)
    areas = [[int(mask.sum()) for mask in of["masks"]] for of in images][:4]
    assert objects.masks.flatten(1).sum(1).tolist() == [max(of) for of in areas]
    assert (objects.labels >= 0).sum(1).tolist() == [len(of) for of in areas]
    share = float(np.median(objects.masks.float().mean((1, 2))))
    large = Objects.read(images, minimum_area=share)
    assert 0 < len(large) < 6
    assert large.masks.float().mean((1, 2)).min() >= share
    with pytest.raises(BacksightError, match="lower minimum_area"):
        Objects.read(images, minimum_area=0.99)
