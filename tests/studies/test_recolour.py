"""Perturbations of colour: exact on HSV, identical where nothing changes, nothing outside the mask."""

import numpy as np
import pytest
import torch

from backsight.errors import BacksightError
from backsight.scenes.render import CLASSES, UNOWNED_HUES
from backsight.studies.colour import colour_changes
from backsight.studies.recolour import (
    NONE,
    Perturbation,
    hue_shifts,
    known_hues,
    open_objects,
    perturb,
    to_hsv,
    to_rgb,
)


@pytest.fixture(scope="module")
def objects():
    return open_objects("scenes", (48, 48), 12, seed=3)


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 20, 24), generator=generator).float() / 255
    masks = torch.zeros(4, 20, 24, dtype=torch.bool)
    masks[:, 4:15, 6:20] = True
    return images, masks


def bytes_of(images):
    return (images * 255).round().to(torch.uint8)


def test_hsv_agrees_with_colorsys_and_goes_back(pictures):
    import colorsys

    images, _ = pictures
    hsv = to_hsv(images)
    pixels = images.permute(0, 2, 3, 1).reshape(-1, 3)[:200].tolist()
    wanted = torch.tensor([colorsys.rgb_to_hsv(*pixel) for pixel in pixels]) * torch.tensor([360.0, 1.0, 1.0])
    found = hsv.permute(0, 2, 3, 1).reshape(-1, 3)[:200]
    assert torch.allclose(found, wanted, atol=1e-3)
    assert torch.allclose(to_rgb(hsv), images, atol=1e-5)


@pytest.mark.parametrize("region", ["object", "image"])
@pytest.mark.parametrize("shift", [0.0, 360.0, -720.0])
def test_a_shift_by_whole_turns_is_the_identity(pictures, region, shift):
    images, masks = pictures
    assert torch.equal(bytes_of(perturb(images, masks, Perturbation("hue_shift", region, shift))), bytes_of(images))


def test_shifts_add_up_to_a_turn(pictures):
    images, masks = pictures
    third = Perturbation("hue_shift", "image", 120.0)
    thrice = perturb(perturb(perturb(images, masks, third), masks, third), masks, third)
    assert torch.equal(bytes_of(thrice), bytes_of(images))  # 120 degrees permute the channels, exactly
    assert torch.equal(bytes_of(perturb(images, masks, third)), bytes_of(images[:, [2, 0, 1]]))


@pytest.mark.parametrize("perturbation", [Perturbation("saturation", amount=0.4), *colour_changes(6)], ids=str)
def test_of_an_object_perturbations_leave_the_background_bytes_untouched(pictures, perturbation):
    images, masks = pictures
    changed = perturb(images, masks, perturbation)
    outside = ~masks[:, None].expand_as(images)
    if perturbation.region != "image":
        assert torch.equal(changed[outside], images[outside])
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert torch.allclose(changed * 255, (changed * 255).round(), atol=1e-3)  # what a file would hold


def test_grey_has_no_colour_and_grey_pixels_keep_having_none(pictures):
    images, masks = pictures
    grey = perturb(images, masks, Perturbation("grey", "image"))
    assert (grey.amax(1) == grey.amin(1)).all()
    assert torch.allclose(grey.amax(1), images.amax(1), atol=1e-3)
    turned = perturb(grey, masks, Perturbation("hue_shift", "image", 90.0))
    assert torch.equal(bytes_of(turned), bytes_of(grey))


def test_scenes_show_exact_counterfactuals(objects):
    """The same scene with another hue; pixel by pixel gives it too, but for the blended edge of the silhouette."""
    assert objects.masks.flatten(1).float().mean(1).min() >= 0.3
    grown = torch.nn.functional.max_pool2d(objects.masks[:, None].float(), 3, 1, 1)[:, 0] > 0
    inner = torch.nn.functional.max_pool2d(1 - objects.masks[:, None].float(), 3, 1, 1)[:, 0] == 0
    for perturbation in [*hue_shifts(3)[1:], Perturbation("grey")]:
        exact, pixelwise = objects.perturbed(perturbation), perturb(objects.images, objects.masks, perturbation)
        outside = ~grown[:, None].expand_as(exact)
        assert torch.equal(exact[outside], objects.images[outside])
        inside = inner[:, None].expand_as(exact)
        # hues of 8-bit pixels are rounded, more so the darker and paler they are
        assert (exact - pixelwise).abs()[inside].max() < 6 / 255
    assert torch.equal(objects.perturbed(hue_shifts(3)[0]), objects.images)
    assert torch.equal(objects.perturbed(NONE), objects.images)


def test_objects_know_their_classes_hues_and_controls(objects):
    for label, hue, canonical in zip(objects.labels, objects.hues, objects.canonical, strict=True):
        own = CLASSES[label].hue
        assert canonical == (own is not None)
        assert hue == own or (own is None and hue not in UNOWNED_HUES)
    assert sum(members.sum() for members in objects.categories.values()) == len(objects)
    assert objects.present[:, 0].tolist() == objects.labels.tolist()
    assert objects.boxes.shape == (*objects.present.shape, 4)
    known = objects.boxes[objects.present >= 0]
    assert ((known[:, 2:] > known[:, :2]) & (known[:, 2:] <= 1)).all()


def test_placebo_hues_are_owned_by_others_in_turn():
    hues, canonical = known_hues({"a": 10.0, "b": None, "c": 200.0, "d": None, "e": None}, ("a", "b", "c", "d", "e"))
    assert canonical.tolist() == [True, False, True, False, False]
    assert hues.tolist() == [10.0, 10.0, 200.0, 200.0, 10.0]
    assert np.isnan(known_hues({"a": None}, ("a",))[0]).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Perturbation("gray"), "grey"),
        (lambda: Perturbation("hue_shift"), "amount"),
        (lambda: perturb(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 5, dtype=torch.bool), NONE), "one mask"),
        (lambda: open_objects("scenes", (32, 48), 2), "square"),
    ],
)
def test_wrong_requests_are_refused_in_a_sentence(make, words):
    with pytest.raises(BacksightError, match=words):
        make()


def test_a_folder_without_masks_is_judged_as_a_whole(tmp_path):
    from PIL import Image

    for i in range(3):
        Image.fromarray(np.full((40, 40, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    found = open_objects(str(tmp_path), (32, 32), 3)
    assert len(found) == 3
    assert found.masks.all()
    assert not found.labelled
    assert set(found.categories) == {"unlabelled"}


def test_coco_objects_come_with_masks_and_prototypes(tmp_path):
    from backsight.scenes.dataset import write_coco
    from backsight.scenes.render import SceneOptions

    options = SceneOptions(rule="strict", minimum_area=0.3)
    for split, there in (("train", "train"), ("test", "val")):
        write_coco(tmp_path, split, 40, size=32, options=options)
        (tmp_path / f"{split}2017").rename(tmp_path / f"{there}2017x")
        (tmp_path / f"{there}2017x").rename(tmp_path / f"{there}2017")
        source = tmp_path / "annotations" / f"instances_{split}2017.json"
        source.rename(tmp_path / "annotations" / f"instances_{there}2017.json")
    found = open_objects(str(tmp_path), (32, 32), 10, minimum_area=0.3)
    assert found.labelled
    assert found.rendered is None
    assert len(found) == 10
    shifted = found.perturbed(Perturbation("hue_shift", "object", 120.0))
    outside = ~found.masks[:, None].expand_as(shifted)
    assert torch.equal(shifted[outside], found.images[outside])
