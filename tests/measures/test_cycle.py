"""Cycle check: an image agrees with itself, and average precision is COCO's."""

import numpy as np
import pandas as pd
import pytest
import torch
from torchvision.models import alexnet

from backsight.measures.agreement import Matches, average_precision, detections, match
from backsight.measures.structure import Judged
from backsight.representation import Predictions
from backsight.studies.cycle import LPIPS_WEIGHTS, add_frechet_distance, cycle
from backsight.studies.recolour import scene_objects
from backsight.tables.pooling import influence, interval, pool
from backsight.tables.values import Values, write_values
from backsight.targets import load_target


def predictions(count=12, queries=8, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, queries, classes + 1, generator=generator)
    corner = 0.6 * torch.rand(count, queries, 2, generator=generator)
    size = 0.15 + 0.2 * torch.rand(count, queries, 2, generator=generator)
    return Predictions(logits, torch.cat([corner + size / 2, size], -1))


def nudged(image, seed=1, noise=0.05):
    generator = torch.Generator().manual_seed(seed)
    boxes = (image.boxes + noise * torch.randn(image.boxes.shape, generator=generator)).clamp(0.02, 1)
    return Predictions(image.logits + torch.randn(image.logits.shape, generator=generator), boxes)


def coco_ap50(image, other):
    """AP50 by torchmetrics (pycocotools), with the confident detections on the image as the objects."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(iou_thresholds=[0.5], max_detection_thresholds=[1, 10, 100])
    true, found = detections(image), detections(other)
    for i in range(image.batch):
        kept = true[0][i] >= 0.5
        target = {"boxes": true[2][i][kept] * 100, "labels": true[1][i][kept]}
        metric.update([{"boxes": found[2][i] * 100, "scores": found[0][i], "labels": found[1][i]}], [target])
    return float(metric.compute()["map_50"])


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.3])
def test_average_precision_is_that_of_coco(noise):
    image = predictions()
    other = nudged(image, noise=noise)
    assert average_precision(match(image, other))[0] == pytest.approx(coco_ap50(image, other), abs=1e-6)


def test_the_same_detections_agree_entirely_and_no_objects_have_no_precision():
    image = predictions()
    assert average_precision(match(image, image))[0] == 1
    nothing = Predictions(torch.tensor([0.0, 0, 0, 50]).expand(2, 4, 4), torch.full((2, 4, 4), 0.3))
    assert np.isnan(average_precision(match(nothing, nothing)))
    assert np.isnan(influence(lambda weights: average_precision(match(nothing, nothing), weights), 2)).all()


def test_weights_are_the_same_as_drawing_images():
    image = predictions()
    matches = match(image, nudged(image))
    drawn = np.random.default_rng(0).integers(12, size=(5, 12))
    weights = np.stack([np.bincount(row, minlength=12) for row in drawn]).astype(float)
    names = ("scores", "classes", "hits", "truth")
    parts = [Matches(*(getattr(matches, name)[row] for name in names)) for row in drawn]
    expected = [average_precision(part)[0] for part in parts]
    assert average_precision(matches, weights).tolist() == pytest.approx(expected)


def test_what_each_image_contributes_gives_the_precision_and_its_interval():
    image = predictions(40)
    matches = match(image, nudged(image))
    contributions = influence(lambda weights: average_precision(matches, weights), 40)
    value, low, high = interval(contributions[None], np.ones((1, 40)))
    assert value == pytest.approx(average_precision(matches)[0])
    weights = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), 500).astype(float)
    drawn = np.quantile(average_precision(matches, weights), [0.025, 0.975])
    assert high - low == pytest.approx(drawn[1] - drawn[0], rel=0.35)


def test_sigmoid_detections_are_pairs_of_query_and_class():
    logits = torch.full((1, 2, 3), -5.0)
    logits[0, 1, 2], logits[0, 1, 0] = 3.0, 2.0
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.3, 0.4, 0.2, 0.2]]])
    scores, classes, corners = detections(Predictions(logits, boxes, "sigmoid"))
    assert classes[0, :2].tolist() == [2, 0]
    assert corners[0, :2].flatten().tolist() == pytest.approx([0.2, 0.3, 0.4, 0.5] * 2)
    assert scores[0, 0] > scores[0, 1] > 0.5 > scores[0, 2]


@pytest.mark.parametrize("name", ["scenes-vit", "scenes-detr"])
def test_an_image_agrees_with_itself(name):
    target = load_target(name, "components")
    images, *_ = scene_objects("test", 6, 64)
    compare = cycle(target, target.taps)(Judged(images, None, None, torch.arange(6)))
    same, grey = compare(images), compare(torch.full_like(images, 0.5))
    cosines = {key[1][0][1]: value for key, value in same.items() if key[0] == "cycle_cosine"}
    assert list(cosines) == list(target.taps)
    assert all(value.min() > 0.9999 for value in cosines.values())
    assert same["perceptual"].max() < 1e-6
    assert grey["perceptual"].min() > 0.01
    if name == "scenes-vit":
        assert same["top1_agreement"].eq(1).all()
        assert "map50" not in same
    else:
        assert average_precision(same["map50"])[0] == 1
        assert average_precision(grey["map50"])[0] < 0.5


def test_features_of_a_model_without_a_head_are_no_answer():
    target = load_target("vit_tiny_patch16_224", ["blocks.0"], pretrained=False, image_size=32, num_classes=0)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = cycle(target, target.taps)(Judged(images, None, None, torch.arange(2)))(images)
    assert "perceptual" in scores
    assert "top1_agreement" not in scores


def test_only_the_first_images_are_shown_to_the_target_again():
    target = load_target("vit_tiny_patch16_224", ["blocks.0"], pretrained=False, image_size=32)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    measure = cycle(target, target.taps, count=3)
    scores = [measure(Judged(images[k : k + 2], None, None, torch.arange(k, k + 2)))(images[k : k + 2]) for k in (0, 2)]
    assert [len(of["perceptual"]) for of in scores] == [2, 1]
    assert measure(Judged(images, None, None, torch.arange(4, 8)))(images) == {}


def test_sets_of_pictures_are_as_far_apart_as_the_target_sees_them(tmp_path):
    """Perfect pictures are no distance away, and pictures that are all the mean image as far as the mean image."""
    target = load_target("vit_tiny_patch16_224", ["blocks.0"], pretrained=False, image_size=32)
    images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blank = images.mean(0)
    makers = {"perfect": lambda read: images, "blank": lambda read: blank.expand_as(images)}
    families = {0: {name: {"blocks.0": made} for name, made in makers.items()}}
    values = Values(target, "noise", "all", [f"image {k}" for k in range(12)])
    add_frechet_distance(values, target, images, families, blank)
    rows = pool(values.table()).set_index("inverse")
    assert rows.value["perfect"] == pytest.approx(0, abs=1e-4 * rows.value["blank"])
    assert rows.value["blank"] == pytest.approx(rows.value["null_mean"], rel=1e-3)
    assert rows.low["blank"] > 0
    beside = Values(target, "noise", "test", ["a", "b"])
    beside.add("psnr", [1.0, 2.0])
    write_values(tmp_path / "values.parquet", pd.concat([values.table(), beside.table()]))  # one column, one type


def test_lpips_is_measured_where_its_weights_are_present(tmp_path, monkeypatch):
    """With random weights of AlexNet, which stand for those that nothing here may download."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    target = load_target("scenes-vit")
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    judged = Judged(images, None, None, torch.arange(3))
    assert "lpips" not in cycle(target, [])(judged)(images)
    (tmp_path / "checkpoints").mkdir()
    torch.save(alexnet(weights=None).state_dict(), tmp_path / LPIPS_WEIGHTS)
    measured = cycle(target, [])(judged)
    assert measured(images)["lpips"].tolist() == [0, 0, 0]
    near, far = (measured((images + shift).clamp(0, 1))["lpips"] for shift in (0.02, 0.4))
    assert (near > 0).all()
    assert (far > near).all()
