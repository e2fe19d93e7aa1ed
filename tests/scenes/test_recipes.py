"""The recipes of the shipped targets: a few steps on a few scenes give folders that load and score."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision

from backsight.errors import BacksightError
from backsight.representation import Predictions
from backsight.scenes.card import add_scores, write_card
from backsight.scenes.dataset import BACKGROUND, scene_tensors
from backsight.scenes.detectors import QUERIES, WIDTH, cell_centres
from backsight.scenes.render import CLASS_NAMES, render_many
from backsight.scenes.score import average_precision, score_target
from backsight.scenes.train import RECIPES, TRAININGS, Recipe, recipe_of, train_target
from backsight.targets import load_target


@pytest.fixture(scope="module", params=["scenes-vit", "scenes-deformable-detr"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / request.param
    recipe = Recipe(request.param, steps=2, batch=8, images=32, evaluate_every=1, evaluate_images=20, warmup=1)
    return train_target(recipe, folder)


def test_scene_tensors_hold_the_scenes_whatever_the_processes():
    one, two = (scene_tensors("validation", 5, seed=3, processes=processes) for processes in (1, 2))
    assert torch.equal(one.images, two.images)
    for i, scene in enumerate(render_many("validation", 5, seed=3)):
        assert np.array_equal(one.images[i].permute(1, 2, 0), scene.image)
        assert np.array_equal(one.objects[i] == 1, scene.masks[0])
        assert one.labels[i, 0] == scene.dominant
        x, y, width, height = one.boxes[i, 0] * 64
        assert np.allclose([x - width / 2, y - height / 2, width, height], scene.boxes[0], atol=1e-4)


def test_a_trained_folder_loads_as_a_target_with_the_taps_of_its_card(trained):
    target = load_target(str(trained))
    assert target.classes == CLASS_NAMES
    card = json.loads((trained / "card.json").read_text())
    assert card["taps"] == list(target.available_taps)
    assert card["recipe"]["steps"] == 2
    assert len((trained / "curve.csv").read_text().splitlines()) == 1 + 3  # before, and after each step


class _Answers:
    """A target that gives these outputs, one batch after the other."""

    classes, name = CLASS_NAMES, "answers"

    def __init__(self, kind, outputs):
        self.kind, self.outputs = kind, outputs

    def __call__(self, images):
        return self.outputs.pop(0)


def test_a_classifier_is_scored_on_both_colour_rules_and_the_card_says_so(tmp_path):
    truth = torch.nn.functional.one_hot(scene_tensors("test", 500).labels[:, 0], 12).float()
    noise = torch.rand(500, 12, generator=torch.Generator().manual_seed(0))
    scores = score_target(_Answers("classifier", [*truth.split(250), *noise.split(250)]), 500)
    whole = scores[scores.classes == "all"].set_index("rule")
    assert whole.value["mixed"] == 1
    assert whole.value["uniform"] < 0.2
    assert (scores.groupby("rule").size() == 3 + len(CLASS_NAMES)).all()
    facts = {"parameters": 1, "taps": [], "minutes": {"training": 1.0}, "device": "cpu"}
    write_card(tmp_path, "scenes-vit", {"recipe": {"images": 8, "steps": 2, "batch": 4, "seed": 0}, **facts})
    add_scores(tmp_path, scores, 500)
    assert json.loads((tmp_path / "card.json").read_text())["scores"][0]["value"] == 1
    assert "| top1 | all | 1.000 [" in (tmp_path / "README.md").read_text()
    with pytest.raises(BacksightError, match="500 or more"):
        score_target(_Answers("classifier", []), 10)


def test_a_detector_is_scored_with_intervals():
    noise = torch.Generator().manual_seed(0)
    outputs = [
        Predictions(torch.full((250, 4, 12), -9.0), torch.rand(250, 4, 4, generator=noise), "sigmoid") for _ in "abcd"
    ]
    scores = score_target(_Answers("detector", outputs), 500)
    assert set(scores.measure) == {"ap50", "ap"}
    assert (scores.groupby(["rule", "measure"]).size() == 3 + len(CLASS_NAMES)).all()
    assert ((scores.low <= scores.value + 1e-9) & (scores.value <= scores.high + 1e-9)).all()
    assert scores.value.max() < 0.1


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_what_is_saved_is_the_stock_model_with_the_outputs_of_the_training(name, tmp_path):
    batch = scene_tensors("train", 4)
    state = torch.random.get_rng_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        training = TRAININGS[name]()
    training.train().loss(batch).backward()
    unused = [n for n, p in training.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused
    training.eval().save(tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.no_grad():
        wanted, found = training.outputs(batch.pixels), _stock(tmp_path)(batch.pixels)
    if isinstance(wanted, Predictions):
        assert torch.allclose(wanted.boxes, found.pred_boxes, atol=1e-5)
        wanted, found = wanted.logits, found.logits
    assert torch.allclose(wanted, found, atol=1e-4)


def _stock(folder):
    """The saved model as its library builds it."""
    import timm
    import transformers
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    if "architectures" in config:
        return getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    model = timm.create_model(config["architecture"], **config["model_args"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def test_queries_of_the_deformable_detr_start_on_a_grid():
    core = TRAININGS["scenes-deformable-detr"]().model.model
    start = core.reference_points(core.query_position_embeddings.weight[:QUERIES, :WIDTH])
    assert torch.allclose(start.sigmoid(), cell_centres(4), atol=1e-3)
    assert torch.allclose(cell_centres(1, 4)[7], torch.tensor([0.625, 0.375]))


def test_the_groups_of_queries_do_not_see_one_another():
    """The first group's answers while training are those of the stock model, which has no other."""
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 64, 64)
    for name in ("scenes-detr", "scenes-deformable-detr"):
        training = TRAININGS[name]().eval()
        alone = training.outputs(pixels)
        training.training = True  # of the queries, and not of the batch norm
        together = training.outputs(pixels)
        assert len(together.boxes) == 3 * len(alone.boxes)
        assert torch.allclose(together.boxes[:2], alone.boxes, atol=1e-6)
        assert torch.allclose(together.logits[:2], alone.logits, atol=1e-6)
        assert (together.logits[2:4] - alone.logits).abs().max() > 1e-5


def detected(queries=6):
    """The objects of 40 scenes, as sets of predictions: certain, in their places, and nothing else."""
    data = scene_tensors("test", 40)
    logits = torch.full((40, queries, BACKGROUND + 1), -10.0)
    logits[..., BACKGROUND] = 10
    boxes = torch.rand(40, queries, 4) * 0.1 + 0.4
    for i, k in (data.labels >= 0).nonzero().tolist():
        logits[i, k, data.labels[i, k]], logits[i, k, BACKGROUND] = 20.0, -10.0
        boxes[i, k] = data.boxes[i, k]
    return data, logits, boxes


def test_average_precision_of_the_truth_is_one():
    data, logits, boxes = detected()
    wrong = replace(data, labels=torch.where(data.labels >= 0, (data.labels + 1) % 12, -1))
    for predictions in (Predictions(logits, boxes), Predictions(logits[..., :-1], boxes, "sigmoid")):
        scores = average_precision(predictions, data)
        assert scores.to_numpy().min() > 0.999
        assert average_precision(predictions, wrong).loc["all", "ap50"] < 0.2


def test_average_precision_of_all_classes_is_that_of_the_library():
    from backsight.measures import agreement

    data, logits, boxes = detected()
    noise = torch.Generator().manual_seed(0)
    boxes = (boxes + 0.03 * torch.randn(boxes.shape, generator=noise)).clamp(0.02, 0.98)
    predictions = Predictions(logits / 8 + torch.randn(logits.shape, generator=noise), boxes)
    corners = torchvision.ops.box_convert(data.boxes, "cxcywh", "xyxy")
    other = agreement.average_precision(agreement.match_objects(predictions, data.labels, corners))
    assert average_precision(predictions, data).loc["all", "ap50"] == pytest.approx(other[0], abs=0.01)


def test_unknown_recipe_and_lost_training_are_refused(tmp_path):
    with pytest.raises(BacksightError, match="no recipe for 'scenes-vitt'; nearest: scenes-vit"):
        recipe_of("scenes-vitt")
    assert recipe_of("scenes-vit", 10, 3).schedule == 0
    wild = Recipe("scenes-vit", steps=9, batch=8, images=16, warmup=1, rate=1e30, muon_rate=1e30, evaluate_images=4)
    with pytest.raises(BacksightError, match="at step"):
        train_target(wild, tmp_path)
