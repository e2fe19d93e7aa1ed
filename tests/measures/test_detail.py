"""Shape and detail: known answers on pictures whose edges, outlines, hues and frequencies are given."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from backsight.errors import BacksightError
from backsight.measures.pixels import region_psnr, ssim
from backsight.measures.structure import (
    Judged,
    Ratio,
    bands,
    colour_model,
    compare_edges,
    detail,
    dilated,
    edges,
    fit_texture_probe,
    mask_iou,
    regions,
    segmented,
    texture_accuracy,
)
from backsight.studies.recolour import scene_objects


def disc(size=32, radius=9, row=16, column=14):
    down, across = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return (down - row) ** 2 + (across - column) ** 2 <= radius**2


@pytest.fixture(scope="module")
def scene():
    """Two pictures with a red and a blue disc on grey texture: images (2, 3, 32, 32), masks (2, 32, 32)."""
    masks = torch.stack([disc(), disc(row=12, column=20, radius=7)])
    ground = 0.4 + 0.2 * torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.1, 0.9]])[:, :, None, None]
    return torch.where(masks[:, None], colours.expand(-1, -1, 32, 32), ground), masks


def judged(images, masks):
    return Judged(images, masks, masks, torch.arange(len(images)))


def numbers(values):
    return {
        key: float(value.part.sum() / value.whole.sum()) if isinstance(value, Ratio) else float(value.mean())
        for key, value in values.items()
    }


def blurred(images, sigma=1.5):
    kernel = torch.exp(-torch.arange(-4, 5).float().square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(images, (4, 4, 4, 4), mode="replicate").flatten(0, 1)[:, None]
    rows = F.conv2d(padded, kernel[None, None, None])
    return F.conv2d(rows, kernel[None, None, :, None]).reshape(images.shape)


def test_an_image_keeps_everything_of_itself(scene):
    images, masks = scene
    values = numbers(detail(judged(images, masks))(images))
    assert values["edge_f1"] == values["mask_iou"] == values["mask_iou_ceiling"] == 1
    assert values["lost"] == values["invented"] == values["hue_error"] == 0
    assert values["psnr_boundary"] == values["psnr_background"] == 100
    assert [value for key, value in values.items() if key[0] == "band_error"] == [0] * len(bands((32, 32)))


def test_blurring_loses_structure_and_invents_none(scene):
    images, masks = scene
    values = numbers(detail(judged(images, masks))(blurred(images)))
    assert values["lost"] > 0.3
    assert values["invented"] < 0.05
    assert values["edge_f1"] < 1
    errors = [value for key, value in values.items() if key[0] == "band_error"]
    assert errors[0] < 0.1 < 0.9 < errors[-1] < 1.1  # a low pass: the lowest octave is there, the highest is gone
    assert errors == sorted(errors)


def test_structure_that_the_image_does_not_have_is_invented(scene):
    _, masks = scene
    flat = torch.full((2, 3, 32, 32), 0.5)
    flat[:, :, :, 20:] = 0.8  # one edge
    stripes = flat.clone()
    stripes[:, :, ::4, :16] = 0.2
    values = numbers(detail(judged(flat, masks))(stripes))
    assert values["invented"] > 1
    assert values["lost"] == pytest.approx(0, abs=1e-6)
    nothing = numbers(detail(judged(flat, masks))(torch.full_like(flat, 0.5)))
    assert nothing["lost"] == pytest.approx(1)
    assert nothing["invented"] == nothing["edge_f1"] == 0


def test_edges_are_thin_lie_on_the_outline_and_may_be_a_pixel_off():
    masks = torch.stack([disc(), disc(column=15), disc(column=19)])
    found = edges(0.2 + 0.6 * masks[:, None].float().expand(-1, 3, -1, -1))
    outline = dilated(masks, 1) & dilated(~masks, 1)
    assert not (found.edges & ~outline).any()
    assert found.edges[0].sum() < 1.6 * 2 * math.pi * 9  # pixels of a circle of that radius
    one = type(found)(found.strength[:1], found.edges[:1])
    by_one = type(found)(found.strength[1:2], found.edges[1:2])
    by_five = type(found)(found.strength[2:], found.edges[2:])
    assert compare_edges(one, by_one, within=1)["edge_f1"] == 1
    assert compare_edges(one, by_five, within=1)["edge_f1"] < 0.6
    empty = edges(torch.full((1, 3, 32, 32), 0.5))
    assert compare_edges(empty, one, within=1)["edge_f1"].isnan()  # no edge that could be found
    assert compare_edges(one, empty, within=1)["edge_f1"] == 0


def test_a_sinusoid_has_its_power_in_its_own_octave():
    wave = torch.sin(2 * math.pi * 6 * torch.arange(64) / 64) * 0.4 + 0.5
    images = wave.expand(1, 3, 64, 64)
    half = (images - 0.5) * 0.5 + 0.5  # half the amplitude: a quarter of the power is wrong
    values = detail(Judged(images, None, None, torch.arange(1)))(half)
    per_band = {key[1][0][1]: value for key, value in values.items() if key[0] == "band_error"}
    own = max(per_band, key=lambda centre: float(per_band[centre].whole))
    assert own == 5.7  # 4 to 8 cycles
    assert float(per_band[own].part / per_band[own].whole) == pytest.approx(0.25, rel=1e-3)
    assert float(per_band[own].whole) > 0.99 * sum(float(value.whole) for value in per_band.values())


def test_regions_are_inside_outside_and_around_the_outline(scene):
    images, masks = scene
    places = regions(masks)
    assert torch.equal(places["background"], ~places["objects"])
    assert (places["boundary"] & masks).any()
    assert (places["boundary"] & ~masks).any()
    made = images.clone()
    made[:, :, ~masks.any(0)] = 0.0  # wrong where no picture has its object
    squared = (made - images).square().mean(1)
    assert region_psnr(squared, places["objects"]).eq(100).all()
    assert region_psnr(squared, places["background"]).lt(15).all()
    assert region_psnr(squared, torch.zeros_like(masks)).isnan().all()


def test_the_outline_comes_from_the_colours_of_the_true_image(scene):
    images, masks = scene
    model = colour_model(images, masks)
    assert torch.equal(segmented(images, model), masks)
    moved = images.roll(8, 3)
    assert torch.equal(segmented(moved, model), masks.roll(8, 2))
    assert mask_iou(masks, segmented(images.flip(0), model)).lt(0.3).all()  # the other picture's disc and colour
    half = masks & (torch.arange(32) < 14)
    assert mask_iou(masks[:1], half[:1]).item() == pytest.approx(half[0].sum().item() / masks[0].sum().item())
    assert mask_iou(masks[:1], torch.zeros_like(masks[:1])) == 0


def test_an_object_that_comes_back_grey_is_counted_and_has_no_hue_error(scene):
    images, masks = scene
    empty = torch.stack([masks[0], torch.zeros_like(masks[1])])
    values = detail(judged(images, empty))(torch.full_like(images, 0.5))
    assert values["hue_error"].isnan().all()
    assert values["share_grey"][0] == 1
    assert values["share_grey"][1].isnan()  # without an object there is nothing to lose


@pytest.mark.parametrize("size", [(64, 64), (24, 40), (9, 9)])
def test_ssim_is_that_of_torchmetrics(size):
    drawn = torch.rand(2, 4, 3, *size, generator=torch.Generator().manual_seed(0))
    sigma = 0.9 if min(size) < 11 else 1.5
    known = structural_similarity_index_measure(*drawn, sigma=sigma, data_range=1.0, reduction="none")
    assert ssim(*drawn).tolist() == pytest.approx(known.tolist(), abs=1e-4)


def test_the_texture_probe_knows_true_textures_of_photographs_it_has_not_seen():
    learnt, (images, inside, textures) = scene_objects("train", 400, 64), scene_objects("test", 150, 64)
    probe = fit_texture_probe(*learnt)
    measure = texture_accuracy(probe, textures)
    prepared = measure(Judged(images, inside, inside, torch.arange(150)))
    known = prepared(images)
    assert known["texture_accuracy"].mean() > 0.8
    assert torch.equal(known["texture_accuracy"], known["texture_accuracy_ceiling"])
    flat = prepared(torch.full_like(images, 0.5))["texture_accuracy"].mean()
    assert flat < 0.4  # always the same answer, to one in five
    with pytest.raises(BacksightError, match="two textures"):
        fit_texture_probe(images[:2], inside[:2], ["plain", "plain"])
    with pytest.raises(BacksightError, match="masks"):
        measure(Judged(images, None, None, torch.arange(150)))


def test_scene_objects_are_the_images_that_the_source_reads():
    from backsight.data.images import open_images

    images, inside, _ = scene_objects("test", 3, 64)
    source = open_images("scenes", "test", (64, 64), 3, masks=True)
    for i, item in enumerate(source):
        assert torch.equal((images[i] * 255).round().byte(), item["image"])
        assert torch.equal(inside[i], item["masks"][0].bool())
