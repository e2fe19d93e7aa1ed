"""The recipes of the shipped targets: a few steps on a few scenes give folders that load and score."""

import json

import numpy as np
import pytest
import torch

from backsight.errors import BacksightError
from backsight.representation import Predictions
from backsight.scenes.card import add_scores, write_card
from backsight.scenes.dataset import BACKGROUND, SceneArrays, batch_of, scene_arrays
from backsight.scenes.detectors import _grid_places
from backsight.scenes.render import CLASS_NAMES, render_many
from backsight.scenes.score import _detections, average_precision, score_target
from backsight.scenes.train import RECIPES, TRAININGS, Recipe, train_target
from backsight.targets import load_target


@pytest.fixture(scope="module", params=["scenes-vit", "scenes-deformable-detr"])
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
    truth = torch.nn.functional.one_hot(torch.from_numpy(scene_arrays("test", 500).labels[:, 0]), 12).float()
    noise = torch.rand(500, 12, generator=torch.Generator().manual_seed(0))
    scores = score_target(_Answers("classifier", [truth, noise]), 500, batch=500)
    whole = scores[scores.classes == "all"].set_index("rule")
    assert whole.value["mixed"] == 1
    assert whole.value["uniform"] < 0.2
    assert (scores.groupby("rule").size() == 3 + len(CLASS_NAMES)).all()
    facts = {"target": "scenes-vit", "parameters": 1, "taps": [], "minutes": {"training": 1.0}}
    write_card(tmp_path, recipe={"images": 8, "steps": 2, "batch": 4, "seed": 0}, device="cpu", processes=1, **facts)
    card = add_scores(tmp_path / "card.json", scores, 500, save=True)
    assert json.loads((tmp_path / "card.json").read_text())["scores"] == card["scores"]
    assert "| top1 | all | 1.000 [" in (tmp_path / "README.md").read_text()
    with pytest.raises(BacksightError, match="500 or more"):
        score_target(_Answers("classifier", []), 10)


def test_a_detector_is_scored_with_intervals():
    noise = torch.Generator().manual_seed(0)
    outputs = [
        Predictions(torch.full((500, 4, 12), -9.0), torch.rand(500, 4, 4, generator=noise), "sigmoid") for _ in "ab"
    ]
    scores = score_target(_Answers("detector", outputs), 500, batch=500)
    assert set(scores.measure) == {"ap50", "ap"}
    assert (scores.groupby(["rule", "measure"]).size() == 3 + len(CLASS_NAMES)).all()
    assert ((scores.low <= scores.value + 1e-9) & (scores.value <= scores.high + 1e-9)).all()
    assert scores.value.max() < 0.1


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_what_is_saved_is_the_stock_model_with_the_outputs_of_the_training(name, tmp_path):
    recipe, data = Recipe(name, steps=1, batch=4), scene_arrays("train", 4)
    state = torch.random.get_rng_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        training = TRAININGS[name](recipe)
    batch = batch_of(data, np.arange(4), "cpu")
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
    training = TRAININGS["scenes-deformable-detr"](Recipe("scenes-deformable-detr", steps=1))
    core = training.model.model
    start = core.reference_points(core.query_position_embeddings.weight[:, : training.model.config.d_model])
    assert torch.allclose(start, _grid_places(((4, 4),), torch.device("cpu")), atol=1e-3)
    assert torch.allclose(_grid_places(((2, 4),), torch.device("cpu")).sigmoid()[5], torch.tensor([0.375, 0.75]))


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
    wrong = SceneArrays(data.images, data.objects, np.where(data.labels >= 0, (data.labels + 1) % 12, -1), data.boxes)
    for predictions in (Predictions(logits, boxes), Predictions(logits[..., :-1], boxes, "sigmoid")):
        scores = average_precision(predictions, data)
        assert scores["all"]["ap"] > 0.999
        assert min(each["ap50"] for each in scores.values()) > 0.999
        assert average_precision(predictions, wrong)["all"]["ap50"] < 0.2


def test_a_sigmoid_query_may_be_two_detections_and_a_softmax_query_one():
    logits = torch.tensor([[[3.0, 2.0, *[-9.0] * 10]]])
    boxes = torch.full((1, 1, 4), 0.5)
    scores, classes, found = _detections(Predictions(logits, boxes, "sigmoid"))
    assert classes[0, :2].tolist() == [0, 1]
    assert torch.allclose(scores[0, :2], torch.tensor([3.0, 2.0]).sigmoid())
    assert found.shape == (1, 12, 4)
    scores, classes, found = _detections(Predictions(torch.cat([logits, logits[..., -1:]], 2), boxes))
    assert classes.tolist() == [[0]]
    assert found.shape == (1, 1, 4)


def test_unknown_recipe_and_lost_training_are_refused(tmp_path):
    with pytest.raises(BacksightError, match="there are recipes for"):
        train_target(Recipe("scenes-resnet", steps=1), tmp_path)  # type: ignore[arg-type]
    wild = Recipe("scenes-vit", steps=9, batch=8, images=16, warmup=1, rate=1e30, muon_rate=1e30, evaluate_images=4)
    with pytest.raises(BacksightError, match="at step"):
        train_target(wild, tmp_path, progress=False)
