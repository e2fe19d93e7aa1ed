"""The recipes of the shipped targets: a few steps on a few scenes give folders that load and score."""

import json

import numpy as np
import pytest
import torch

from backsight.errors import BacksightError
from backsight.recipes import (
    BACKGROUND,
    RECIPES,
    Recipe,
    SceneArrays,
    add_scores,
    average_precision,
    scene_arrays,
    score_target,
    train_target,
)
from backsight.scenes import CLASS_NAMES, render_many
from backsight.targets import load_target


@pytest.fixture(scope="module", params=sorted(RECIPES))
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / request.param
    recipe = Recipe(request.param, steps=2, batch=8, images=32, evaluate_every=1, evaluate_images=20, warmup=1)
    return train_target(recipe, folder, progress=False)


def test_scene_arrays_hold_the_scenes_whatever_the_processes():
    one, two = (scene_arrays("validation", 5, seed=3, processes=processes) for processes in (1, 2))
    assert np.array_equal(one.images, two.images)
    for i, scene in enumerate(render_many("validation", 5, seed=3)):
        assert np.array_equal(one.images[i], scene.image)
        assert np.array_equal(one.objects[i] == 1, scene.masks[0])
        assert one.labels[i, 0] == scene.dominant
        x, y, width, height = one.boxes[i, 0] * 64
        assert np.allclose([x - width / 2, y - height / 2, width, height], scene.boxes[0], atol=1e-4)


def test_a_trained_folder_loads_as_a_target_and_is_scored(trained):
    target = load_target(str(trained))
    assert target.classes == CLASS_NAMES
    scores = score_target(target, 500)
    whole = scores[scores.classes == "all"].set_index(["measure", "rule"])
    assert set(whole.index.get_level_values("rule")) == {"mixed", "uniform"}
    assert ((whole.low <= whole.value) & (whole.value <= whole.high)).all()
    assert whole.value.max() < 0.5  # two steps teach nothing
    card = add_scores(trained / "card.json", scores, 500, save=True)
    assert json.loads((trained / "card.json").read_text())["scores"] == card["scores"]
    assert "usual hues" in (trained / "README.md").read_text()
    assert len((trained / "curve.csv").read_text().splitlines()) == 3
    with pytest.raises(BacksightError, match="500 or more"):
        score_target(target, 10)


def test_the_same_seed_trains_the_same_weights(tmp_path):
    recipe = Recipe("scenes-vit", steps=1, batch=4, images=8, evaluate_images=4)
    first, second = (train_target(recipe, tmp_path / name, progress=False) for name in "ab")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_average_precision_of_the_truth_is_one():
    data = scene_arrays("test", 40)
    logits = torch.full((40, 6, BACKGROUND + 1), -10.0)
    logits[..., BACKGROUND] = 10
    boxes = torch.rand(40, 6, 4) * 0.1 + 0.4
    for i in range(40):
        for k, label in enumerate(data.labels[i]):
            if label >= 0:
                logits[i, k, label], logits[i, k, BACKGROUND] = 20.0, -10.0
                boxes[i, k] = torch.from_numpy(data.boxes[i, k])
    scores, per_class = average_precision(logits, boxes, data)
    assert scores["ap"] > 0.999
    assert min(each["ap50"] for each in per_class.values()) > 0.999
    wrong = SceneArrays(data.images, data.objects, np.where(data.labels >= 0, (data.labels + 1) % 12, -1), data.boxes)
    assert average_precision(logits, boxes, wrong)[0]["ap50"] < 0.2


def test_unknown_recipe_and_lost_training_are_refused(tmp_path):
    with pytest.raises(BacksightError, match="there are recipes for"):
        train_target(Recipe("scenes-resnet", steps=1), tmp_path)  # type: ignore[arg-type]
    wild = Recipe("scenes-vit", steps=9, batch=8, images=16, warmup=1, rate=1e30, muon_rate=1e30, evaluate_images=4)
    with pytest.raises(BacksightError, match="at step"):
        train_target(wild, tmp_path, progress=False)
