"""Perturbations of colour: exact on HSV, identical where nothing changes, nothing outside the mask."""

import numpy as np
import pytest
import torch

from backsight.errors import BacksightError
from backsight.scenes.render import CLASSES, UNOWNED_HUES
from backsight.studies.recolour import (
    EXACT,
    NONE,
    SET_HUES,
    Perturbation,
    colour_perturbations,
    hue_shifts,
    known_hues,
    open_objects,
    painted,
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


@pytest.mark.parametrize("perturbation", colour_perturbations(6), ids=lambda p: f"{p.kind}-{p.region}-{p.amount}")
def test_of_an_object_perturbations_leave_the_background_bytes_untouched(pictures, perturbation):
    images, masks = pictures
    changed = perturb(images, masks, perturbation)
    outside = ~masks[:, None].expand_as(images)
    if perturbation.region == "object":
        assert torch.equal(changed[outside], images[outside])
    if perturbation.kind == "white_surroundings":
        assert (changed[outside] == 1).all()
        assert torch.equal(changed[~outside], images[~outside])
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert torch.allclose(changed * 255, (changed * 255).round(), atol=1e-3)  # what a file would hold


@pytest.mark.parametrize("hue", SET_HUES)
def test_set_hue_sets_the_hue_and_keeps_saturation_and_value(pictures, hue):
    images, masks = pictures
    before, after = to_hsv(images), to_hsv(perturb(images, masks, Perturbation("set_hue", "image", amount=hue)))
    coloured = (before[:, 1] > 0.2) & (before[:, 2] > 0.2)
    error = ((after[:, 0] - hue + 180) % 360 - 180).abs()
    assert error[coloured].max() < 5  # a step of 1/255 turns dark colours this far
    assert (after[:, 2] - before[:, 2]).abs().max() < 0.005


def test_grey_has_no_colour_and_grey_pixels_keep_having_none(pictures):
    images, masks = pictures
    grey = perturb(images, masks, Perturbation("grey", "image"))
    assert (grey.amax(1) == grey.amin(1)).all()
    assert torch.allclose(grey.amax(1), images.amax(1), atol=1e-3)
    for perturbation in (Perturbation("set_hue", "image", amount=120.0), Perturbation("hue_shift", "image", 90.0)):
        assert torch.equal(bytes_of(perturb(grey, masks, perturbation)), bytes_of(grey))


def test_scenes_show_exact_counterfactuals(objects):
    """The same scene with another hue; pixel by pixel gives it too, but for the blended edge of the silhouette."""
    assert objects.masks.flatten(1).float().mean(1).min() >= 0.3
    grown = torch.nn.functional.max_pool2d(objects.masks[:, None].float(), 3, 1, 1)[:, 0] > 0
    inner = torch.nn.functional.max_pool2d(1 - objects.masks[:, None].float(), 3, 1, 1)[:, 0] == 0
    for perturbation in [*hue_shifts(3)[1:], Perturbation("set_hue", amount=240.0), Perturbation("grey")]:
        exact, pixelwise = objects.perturbed(perturbation), perturb(objects.images, objects.masks, perturbation)
        outside = ~grown[:, None].expand_as(exact)
        assert torch.equal(exact[outside], objects.images[outside])
        inside = inner[:, None].expand_as(exact)
        # hues of 8-bit pixels are rounded, more so the darker and paler they are
        assert (exact - pixelwise).abs()[inside].max() < 6 / 255
    assert torch.equal(objects.perturbed(hue_shifts(3)[0]), objects.images)
    assert torch.equal(objects.perturbed(NONE), objects.images)
    white = objects.perturbed(Perturbation("white_surroundings", "image"))
    assert (white[(~grown[:, None]).expand_as(white)] == 1).all()


def test_objects_know_their_classes_hues_and_controls(objects):
    for label, hue, canonical in zip(objects.labels, objects.hues, objects.canonical, strict=True):
        own = CLASSES[label].hue
        assert canonical == (own is not None)
        assert hue == own or (own is None and hue not in UNOWNED_HUES)
    assert sum(members.sum() for members in objects.categories.values()) == len(objects)
    assert all(
        len(truth.labels) == len(truth.boxes) and truth.labels[0] == label
        for truth, label in zip(objects.truth, objects.labels, strict=True)
    )


def test_placebo_hues_are_owned_by_others_in_turn():
    hues, canonical = known_hues({"a": 10.0, "b": None, "c": 200.0, "d": None, "e": None}, ("a", "b", "c", "d", "e"))
    assert canonical.tolist() == [True, False, True, False, False]
    assert hues.tolist() == [10.0, 10.0, 200.0, 200.0, 10.0]
    assert np.isnan(known_hues({"a": None}, ("a",))[0]).all()


def test_painter_paints_the_object_only(pictures):
    images, masks = pictures
    made = painted(images, masks, torch.tensor([120.0, 240.0, float("nan"), 0.0]))
    outside = ~masks[:, None].expand_as(images)
    assert torch.equal(made[outside], images[outside])
    assert torch.allclose(made[2], images[2], atol=1e-5)
    inside = to_hsv(made)[0, 0][masks[0]]
    assert ((inside - 120).abs() < 0.1).float().mean() > 0.95  # all but pixels that are grey by chance


def test_the_study_holds_every_perturbation_the_issue_asks_for():
    chosen = colour_perturbations(24)
    assert chosen[0] == NONE
    for region in ("object", "image"):
        here = [p for p in chosen if p.region == region]
        assert [p.hue_shift for p in here if p.kind == "hue_shift"] == [15.0 * i for i in range(24)]
        assert {p.amount for p in here if p.kind == "set_hue"} == set(SET_HUES)
        assert "grey" in {p.kind for p in here}
    assert {kind for kind in EXACT} <= {p.kind for p in chosen}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Perturbation("hue_shif"), "hue_shift"),
        (lambda: Perturbation("hue_shift"), "degrees"),
        (lambda: Perturbation("set_hue"), "amount"),
        (lambda: Perturbation("grey", "background"), "object"),
        (lambda: colour_perturbations(10), "3, 6"),
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
