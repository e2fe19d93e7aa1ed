"""Perturbations of colour: exact on HSV, identical where nothing changes, nothing outside the mask."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from backsight.errors import BacksightError
from backsight.measures.hue import hue_distance, hue_of, object_chroma
from backsight.scenes.render import CLASSES, UNOWNED_HUES
from backsight.studies.recolour import NONE, Perturbation, hue_shifts, known_hues, open_objects, recoloured


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


def everywhere(masks):
    return torch.ones_like(masks)


def test_colours_are_those_of_colorsys(pictures):
    import colorsys

    images, masks = pictures
    changed = bytes_of(recoloured(images, everywhere(masks), 75.0, 0.4)).permute(0, 2, 3, 1).reshape(-1, 3)[:200]
    for pixel, found in zip(images.permute(0, 2, 3, 1).reshape(-1, 3)[:200].tolist(), changed.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected = colorsys.hsv_to_rgb((hue + 75 / 360) % 1, 0.4 * saturation, value)
        assert found == pytest.approx([255 * channel for channel in expected], abs=0.51)


@pytest.mark.parametrize("shift", [0.0, 360.0, -720.0])
def test_a_shift_by_whole_turns_is_the_identity(pictures, shift):
    images, masks = pictures
    assert torch.equal(bytes_of(recoloured(images, masks, shift)), bytes_of(images))


def test_shifts_add_up_to_a_turn(pictures):
    images, masks = pictures
    every = everywhere(masks)
    thrice = recoloured(recoloured(recoloured(images, every, 120.0), every, 120.0), every, 120.0)
    assert torch.equal(bytes_of(thrice), bytes_of(images))  # 120 degrees permute the channels, exactly
    assert torch.equal(bytes_of(recoloured(images, every, 120.0)), bytes_of(images[:, [2, 0, 1]]))


@pytest.mark.parametrize(("shift", "saturation"), [(0.0, 0.4), (90.0, 1.0), (300.0, 1.5), (0.0, 0.0)])
def test_the_background_bytes_stay_untouched(pictures, shift, saturation):
    images, masks = pictures
    changed = recoloured(images, masks, shift, saturation)
    outside = ~masks[:, None].expand_as(images)
    assert torch.equal(changed[outside], images[outside])
    assert not torch.equal(changed, images)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert torch.allclose(changed * 255, (changed * 255).round(), atol=1e-3)  # what a file would hold


def test_grey_has_no_colour_and_grey_pixels_keep_having_none(pictures):
    images, masks = pictures
    grey = recoloured(images, everywhere(masks), saturation=0.0)
    assert (grey.amax(1) == grey.amin(1)).all()
    assert torch.allclose(grey.amax(1), images.amax(1), atol=1e-3)
    assert torch.equal(bytes_of(recoloured(grey, everywhere(masks), 90.0)), bytes_of(grey))


def test_scenes_show_exact_counterfactuals(objects):
    """The same scene with another hue; pixel by pixel gives it too, but for the blended edge of the silhouette."""
    assert objects.masks.flatten(1).float().mean(1).min() >= 0.3
    grown = torch.nn.functional.max_pool2d(objects.masks[:, None].float(), 3, 1, 1)[:, 0] > 0
    inner = torch.nn.functional.max_pool2d(1 - objects.masks[:, None].float(), 3, 1, 1)[:, 0] == 0
    for perturbation in [*hue_shifts(3)[1:], Perturbation("grey")]:
        exact, pixelwise = objects.perturbed(perturbation), replace(objects, rendered=None).perturbed(perturbation)
        outside = ~grown[:, None].expand_as(exact)
        assert torch.equal(exact[outside], objects.perturbed(NONE)[outside])
        inside = inner[:, None].expand_as(exact)
        # hues of 8-bit pixels are rounded, more so the darker and paler they are
        assert (exact - pixelwise).abs()[inside].max() < 6 / 255
    assert torch.equal(objects.perturbed(NONE) * 255, objects.images.float())
    assert torch.equal(objects.perturbed(hue_shifts(3)[0]), objects.perturbed(NONE))


def test_objects_know_their_classes_hues_and_controls(objects):
    for label, hue, canonical in zip(objects.labels[:, 0], objects.hues, objects.canonical, strict=True):
        own = CLASSES[label].hue
        assert canonical == (own is not None)
        assert hue == own or (own is None and hue not in UNOWNED_HUES)
    assert sum(members.sum() for members in objects.categories.values()) == len(objects)
    assert objects.boxes.shape == (*objects.labels.shape, 4)
    known = objects.boxes[objects.labels >= 0]
    assert ((known[:, 2:] > known[:, :2]) & (known[:, 2:] <= 1)).all()


def test_placebo_hues_are_owned_by_others_in_turn():
    hues, canonical = known_hues({"a": 10.0, "b": None, "c": 200.0, "d": None, "e": None}, ("a", "b", "c", "d", "e"))
    assert canonical.tolist() == [True, False, True, False, False]
    assert hues.tolist() == [10.0, 10.0, 200.0, 200.0, 10.0]
    assert np.isnan(known_hues({"a": None}, ("a",))[0]).all()


def test_scenes_are_square():
    with pytest.raises(BacksightError, match="square"):
        open_objects("scenes", (32, 48), 2)


@pytest.mark.parametrize("place", ["", "train/cat"])
def test_a_folder_without_masks_is_judged_as_a_whole(tmp_path, place):
    """Also one with classes: which object is where nobody says."""
    from PIL import Image

    for split in {place, place.replace("train", "test")}:
        (tmp_path / split).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            Image.new("RGB", (40, 40), (0, 60 * i, 0)).save(tmp_path / split / f"{i}.png")
    found = open_objects(str(tmp_path), (32, 32), 3)
    assert len(found) == 2  # one is black: it has no hue to turn
    assert found.masks.all()
    assert not found.labelled
    assert set(found.categories) == {"natural"}
    assert found.hues.tolist() == pytest.approx([120, 120])
    assert len(open_objects(str(tmp_path), (32, 32), 3, minimum_area=None)) == 3


def test_every_coco_object_with_a_hue_is_judged_and_knows_its_photograph(tmp_path):
    from backsight.scenes.dataset import write_coco

    write_coco(tmp_path, "test", 12, size=32)
    (tmp_path / "test2017").rename(tmp_path / "val2017")
    source = tmp_path / "annotations" / "instances_test2017.json"
    source.rename(source.with_name("instances_val2017.json"))
    judged = open_objects(str(tmp_path), (32, 32), 100, minimum_area=0.02)
    largest = open_objects(str(tmp_path), (32, 32), 100, minimum_area=None)
    assert len(largest) == 12 < len(judged)
    assert 1 < len(set(judged.photographs.tolist())) <= 12
    assert judged.labelled
    assert judged.natural
    assert judged.masks.float().mean((1, 2)).min() >= 0.02
    assert judged.hues.tolist() == hue_of(object_chroma(judged.perturbed(NONE), judged.masks)).tolist()
    shifted = judged.perturbed(Perturbation("hue_shift", "object", 120.0))
    outside = ~judged.masks[:, None].expand_as(shifted)
    assert torch.equal(shifted[outside], judged.perturbed(NONE)[outside])
    assert hue_distance(hue_of(object_chroma(shifted, judged.masks)), judged.hues) == pytest.approx(120, abs=1)
