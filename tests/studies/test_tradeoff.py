"""Trade-off: copies are tuned, never the caller's target; t reaches what it should; every number has its null."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from targets.examples import small_detector, small_timm
from torch.nn.functional import interpolate, one_hot
from torchvision.ops import box_convert

from backsight.errors import BacksightError
from backsight.representation import Predictions, Tokens
from backsight.scenes.dataset import write_coco
from backsight.scenes.render import CLASS_NAMES
from backsight.studies import tuning
from backsight.studies.objects import Objects
from backsight.studies.tradeoff import (
    JOINT,
    OF_START,
    answer_scores,
    changes,
    measure_tradeoff,
    probe_hits,
    read_model,
)
from backsight.studies.tuning import (
    batch_of,
    check_grid,
    fine_tune,
    fit_inverses,
    labelled_images,
    starting_units,
    task_loss,
)
from backsight.tables.pooling import metrics
from backsight.tables.values import METRIC_COLUMNS
from backsight.targets import module_target
from backsight.targets.base import hash_of

STEPS = {"steps": 3, "batch_size": 8, "learning_rate": 1e-3}


def made_up(count: int, side: int) -> Objects:
    """Smooth random pictures with a square "object" of one of two classes in each."""
    generator = torch.Generator().manual_seed(0)
    pictures = interpolate(torch.rand(count, 3, 4, 4, generator=generator), size=side, mode="bilinear")
    labels = torch.stack([torch.arange(count) % 2, torch.full((count,), -1)], 1)
    boxes = torch.tensor([0.25, 0.25, 0.75, 0.75]).expand(count, 2, 4).clone()
    objects = torch.zeros(count, side, side, dtype=torch.bool)
    objects[:, side // 4 : -side // 4, side // 4 : -side // 4] = True
    return Objects(
        "made up", "train", (), (pictures * 255).byte(), objects, objects, labels, boxes, torch.arange(count)
    )


@pytest.fixture(scope="module")
def vit():
    return small_timm("ViT")


@pytest.fixture(scope="module")
def detr():
    return small_detector().select(["encoder.layers.1", "decoder.layernorm"])


@pytest.fixture(scope="module")
def data():
    return {32: made_up(40, 32), 64: made_up(40, 64)}


@pytest.fixture(scope="module", params=["vit", "detr"])
def problem(request, data):
    """(target, inverses, images) of a tiny classifier and of a tiny detector."""
    target = request.getfixturevalue(request.param)
    images = data[max(target.image_size)]
    return target, fit_inverses(target, images.images, target.taps, 64), images


@pytest.fixture(scope="module", params=["vit", "detr"])
def result(request):
    if request.param == "vit":
        target = small_timm("ViT", num_classes=len(CLASS_NAMES))
    else:
        target = small_detector(id2label=dict(enumerate(CLASS_NAMES))).select(["encoder.layers.1", "decoder.layers.1"])
    target.classes = CLASS_NAMES
    sizes = {"n": 24, "train_images": 24, "fit_images": 60, "set_inputs": 32}
    return target, measure_tradeoff(target, [1.0, 0.0], [0, 1], **sizes, **STEPS)


def state(inverses):
    return {f"{tap}/{key}": value.clone() for tap, each in inverses.items() for key, value in each.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_the_callers_target_and_inverses_stay_as_they_are(problem, t):
    target, inverses, images = problem
    before, numbers = hash_of(target.model), state(inverses)
    tuned = fine_tune(target, inverses, images, t, **STEPS)
    assert hash_of(target.model) == before == target.weights_hash
    assert same(state(inverses), numbers)
    assert not any(p.requires_grad or p.grad is not None for p in target.model.parameters())
    assert tuned.target.weights_hash != before, "something must have been learned"
    assert not any(p.requires_grad for p in tuned.target.model.parameters())
    assert not any(b.requires_grad for each in tuned.inverses.values() for b in each.buffers())
    assert not any(module.training for module in tuned.target.model.modules())


def test_at_t_0_no_inverse_learns_and_at_t_1_no_head_does(problem):
    target, inverses, images = problem
    assert same(state(fine_tune(target, inverses, images, 0.0, **STEPS).inverses), state(inverses))
    tuned = fine_tune(target, inverses, images, 1.0, **STEPS)
    learned = state(tuned.inverses)
    assert not any(
        torch.equal(value, state(inverses)[key]) for key, value in learned.items() if key.endswith(("matrix", "right"))
    )
    head = next(name for name in ("head", "class_labels_classifier") if hasattr(target.model, name))
    before, after = (getattr(each.model, head).state_dict() for each in (target, tuned.target))
    assert same(before, after)


def test_t_1_makes_the_target_more_invertible_on_what_it_is_tuned_on(problem):
    target, inverses, images = problem
    before = starting_units(target, inverses, images)
    tuned = fine_tune(target, inverses, images, 1.0, steps=25, batch_size=20, learning_rate=1e-3)
    assert starting_units(tuned.target, tuned.inverses, images)["reconstruction"] < before["reconstruction"]
    assert tuned.history["task"].isna().all()
    assert len(tuned.history) == 25


def test_the_losses_start_at_one(problem):
    target, inverses, images = problem
    whole = {"steps": 1, "batch_size": len(images)}
    history = fine_tune(target, inverses, images, 0.5, **whole).history
    assert history[["task", "reconstruction"]].to_numpy() == pytest.approx(1, abs=1e-3)


def test_the_same_seed_gives_the_same_weights(problem):
    target, inverses, images = problem
    hashes = [fine_tune(target, inverses, images, 0.5, seed=seed, **STEPS).target.weights_hash for seed in (3, 3, 4)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_detectors_loss_is_that_of_its_own_model(detr, data):
    images, *truth = batch_of(data[64], slice(6))
    known = [{"class_labels": k[k >= 0], "boxes": boxes[k >= 0]} for k, boxes in zip(*truth, strict=True)]
    with torch.no_grad():
        own = detr.model(pixel_values=detr.preprocessing.normalise(images), labels=known).loss
    ours = task_loss(detr(images), *truth)
    assert float(ours) == pytest.approx(float(own), rel=1e-5)


def test_what_cannot_be_tuned_is_refused(vit, data, monkeypatch):
    inverses = fit_inverses(vit, data[32].images, ["norm"], 64)
    with pytest.raises(BacksightError, match=r"t = 1.5 is outside \[0, 1\]"):
        fine_tune(vit, inverses, data[32], 1.5)
    with pytest.raises(BacksightError, match="each of them once"):
        check_grid([0.5, 0.5])
    with pytest.raises(BacksightError, match="at least one step"):
        fine_tune(vit, inverses, data[32], 0.5, batch_size=41)
    other = module_target(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8)), ["0"], image_size=(32, 32))
    for taskless in (other, small_timm("ViT", num_classes=0)):  # features were taken for logits
        with pytest.raises(BacksightError, match="has no task"):
            fine_tune(taskless, inverses, data[32], 0.5)
    with pytest.raises(BacksightError, match="does not say which classes"):
        labelled_images("scenes", "train", vit, 2)
    with pytest.raises(BacksightError, match="too few"):
        measure_tradeoff(vit, [0.0], [0], n=3)
    broken = {"task": float("nan"), "reconstruction": 1.0, "variance": 1.0}
    monkeypatch.setattr(tuning, "starting_units", lambda *_: broken)
    with pytest.raises(BacksightError, match="became nan"):
        fine_tune(vit, inverses, data[32], 0.5, **STEPS)


def test_images_without_classes_are_refused_for_tuning_only(vit, tmp_path):
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (40, 40), (number * 50, 10, 10)).save(tmp_path / f"{number}.png")
    judged = labelled_images(str(tmp_path), "all", vit, 3, required=False)
    assert not judged.labelled
    assert judged.images.shape == (3, 3, 32, 32)
    with pytest.raises(BacksightError, match="does not say which classes"):
        labelled_images(str(tmp_path), "all", vit, 3)


def test_class_folders_are_taken_in_their_order(vit, tmp_path):
    from PIL import Image

    for part in ("train", "val"):
        for number, name in enumerate(("n01", "n02")):
            (tmp_path / part / name).mkdir(parents=True)
            for picture in range(2):
                colour = (200 * number, 50 + picture, 10)
                Image.new("RGB", (40, 40), colour).save(tmp_path / part / name / f"{picture}.png")
    found = labelled_images(str(tmp_path), "test", vit, 4)
    red = found.images[:, 0].float().mean((1, 2)) > 100
    assert found.labels[:, 0].tolist() == red.long().tolist()
    assert not found.masks.any()


def test_a_coco_root_tells_classes_and_boxes(coco_sample, vit):
    from backsight.data.images import open_images

    names = open_images(coco_sample, "test", masks=True, count=2).classes
    target = small_timm("ViT", num_classes=len(names))
    target.classes = names
    found = labelled_images(str(coco_sample), "test", target, 6, required=False)
    assert found.images.shape[1:] == (3, 32, 32)
    known = found.labels >= 0
    assert known.any()
    assert bool(((found.boxes[known] >= 0) & (found.boxes[known] <= 1)).all())


def test_images_of_a_coco_root_that_show_no_object_are_left_out(vit, tmp_path):
    """They made it a source that does not tell the classes of its images, and tuning was refused."""
    write_coco(tmp_path, "train", 3, size=32)
    file = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] == 2)
    content["annotations"] = [kept for kept in content["annotations"] if kept["image_id"] > 0]
    file.write_text(json.dumps(content))
    target = small_timm("ViT", num_classes=len(CLASS_NAMES))
    target.classes = CLASS_NAMES
    known = labelled_images(str(tmp_path), "train", target, 3)
    assert len(known) == 1
    assert known.labelled


def test_a_damaged_annotation_file_is_no_folder_without_truth(coco_sample, vit, tmp_path):
    root = shutil.copytree(coco_sample, tmp_path / "coco")
    for file in (root / "annotations").iterdir():
        file.write_text("{")
    with pytest.raises(BacksightError, match="is not a COCO instances file"):
        labelled_images(str(root), "test", vit, 6, required=False)


def test_a_target_is_like_itself(problem):
    target, inverses, images = problem
    reading = read_model(target, images, {"linear": inverses}, start=target)
    for tap in target.taps:
        alike, _ = reading["cka_to_start", tap, None]
        assert alike.mean() == pytest.approx(1, abs=1e-5)


def test_perfect_boxes_score_one_and_those_of_other_images_less(data):
    images = data[64]
    # Another place in every image, so that the boxes of another image do not fit.
    across = torch.linspace(0.1, 0.9, len(images))[:, None]
    boxes = torch.cat([across, *[torch.full_like(across, size) for size in (0.5, 0.02, 0.02)]], 1)[:, None]
    truth = replace(images, labels=images.labels[:, :1], boxes=box_convert(boxes, "cxcywh", "xyxy"))
    logits = 20.0 * one_hot(images.labels[:, :1], 3).float()
    scores = answer_scores([Predictions(logits, boxes)], truth, "", 0)
    assert scores["ap50", None, None][0] == pytest.approx(1)
    assert scores["ap50", None, "null_shuffled"][0].mean() < 0.2


def test_a_probe_finds_what_is_there(data):
    images = data[32]

    def record(pictures, taps):
        # The class is told by the first channel's sign; the order of the pictures is that of the data.
        number = len(pictures)
        values = torch.zeros(number, 4, 3)
        values[..., 0] = torch.where(torch.arange(number) % 2 == 0, 1.0, -1.0)[:, None]
        return {"tap": Tokens(values, ((2, 2),))}

    hits = probe_hits(SimpleNamespace(record=record), "tap", images, images)
    assert hits.tolist() == [1.0] * len(images)


def test_every_row_has_its_columns_and_its_interval(result):
    target, found = result
    table = metrics(found.values)
    assert set(METRIC_COLUMNS) | {"seeds", "t"} <= set(table.columns)
    assert set(table.t.dropna()) == {0.0, 1.0}
    assert [set(made) for made in found.pictures.values()] == [set(target.taps)] * 3
    assert table[table.measure != "probe_top1"].n.max() <= 24
    known = table[table.value.notna()]
    assert known[["low", "high"]].notna().all(axis=None)
    assert (known.low <= known.high).all()
    assert not table.duplicated(["t", "tap", "inverse", "measure"]).any()
    for t in (None, 0.0, 1.0):
        at = table[table.t.isna()] if t is None else table[table.t == t]
        for tap in target.taps:
            psnr = at[(at.measure == "psnr") & (at.tap == tap)]
            nulls = {"null_mean", "null_untrained"} if t is None else {JOINT, OF_START}
            assert set(psnr.inverse) == {"linear", "null_shuffled"} | nulls
            assert "hue_error" in set(at[at.tap == tap].measure)
        score = "top1" if target.kind == "classifier" else "ap50"
        answered = at[at.measure.isin([score, f"{score}_random_hues"])]
        assert len(answered) == 4, "usual and random hues, each beside the answers of other images"
        assert answered.value.between(0, 1).all()


def test_joint_inverses_at_t_0_are_those_of_the_start(result):
    table = metrics(result[1].values)
    at = table[(table.measure == "psnr") & (table.t == 0)].pivot_table(index="tap", columns="inverse", values="value")
    assert at[JOINT].to_numpy() == pytest.approx(at[OF_START].to_numpy(), abs=1e-5)


def test_changes_are_the_differences_of_the_scores(result):
    table = metrics(result[1].values)
    psnr = table[(table.measure == "psnr") & (table.inverse == "linear")]
    change = changes(result[1].values)
    change = change[(change.measure == "psnr_change") & (change.inverse == "linear")]
    assert set(change.t) == {1.0}
    for row in change.itertuples():
        of = psnr[psnr.tap == row.tap].set_index("t").value
        assert row.value == pytest.approx(of[1.0] - of[0.0], abs=1e-4)
