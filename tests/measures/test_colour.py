"""The colour measures and the reversion index on cases whose answer is known."""

import numpy as np
import pandas as pd
import pytest
import torch

from backsight.errors import BacksightError
from backsight.measures.hue import (
    OUTCOMES,
    Response,
    chroma_kept,
    hue_error,
    hue_of,
    object_chroma,
    outcomes,
    respond,
    reversion,
    shares,
)
from backsight.representation import Predictions, Tokens
from backsight.studies.colour import colour_values, index_values, null_places, record_colours
from backsight.studies.colour_accuracy import accuracy_values, answer_refusal, average_precisions
from backsight.studies.colour_targets import prototype_eyes_values, small_accuracy, told_apart, train_small_vit
from backsight.studies.recolour import Perturbation, Truth, colour_perturbations, open_objects, to_rgb
from backsight.tables.pooling import metrics
from backsight.tables.values import METRIC_COLUMNS


def flat(hue, saturation=1.0, value=1.0):
    """One picture of a single colour."""
    return to_rgb(torch.tensor([[hue, saturation, value]]))[:, :, None, None].expand(1, 3, 8, 8)


def everywhere(images):
    return torch.ones(len(images), *images.shape[2:], dtype=torch.bool)


@pytest.mark.parametrize(
    ("shown", "made", "wanted"),
    [(0, 0, 0), (0, 120, 120), (350, 10, 20), (10, 350, 20), (0, 180, 180), (90, 300, 150), (359.5, 0.5, 1)],
)
def test_hue_error_is_exact_and_wraps_at_360(shown, made, wanted):
    first, second = flat(shown, 0.8, 0.9), flat(made, 0.5, 0.6)
    assert hue_error(first, second, everywhere(first)) == pytest.approx([wanted], abs=1e-3)


def test_hue_of_grey_and_of_low_chroma_does_not_exist():
    grey, pale, clear = flat(40, 0.0, 0.7), flat(40, 0.05, 0.9), flat(40, 0.5, 0.9)
    for picture, exists in ((grey, False), (pale, False), (clear, True)):
        assert np.isnan(hue_error(clear, picture, everywhere(clear)))[0] == (not exists)
        assert np.isnan(hue_error(picture, clear, everywhere(clear)))[0] == (not exists)
    assert hue_of(object_chroma(clear, everywhere(clear))) == pytest.approx([40], abs=1e-3)
    assert np.isnan(chroma_kept(object_chroma(grey, everywhere(grey)), np.array([0.5])))[0]


def test_only_pixels_inside_the_mask_count_and_brightness_textures_change_nothing():
    picture = flat(200, 0.7, 0.9).clone()
    picture[..., :4] *= 0.4  # a dark stripe of the same hue
    mask = everywhere(picture)
    mask[:, 6:] = False
    picture[:, :, 6:] = flat(20)[:, :, 6:]
    colour = object_chroma(picture, mask)
    assert hue_of(colour) == pytest.approx([200], abs=1e-3)
    assert np.abs(colour) == pytest.approx([0.7 * 0.9 * 0.7], abs=1e-6)  # mean of 1 and 0.4
    with pytest.raises(BacksightError, match="empty"):
        object_chroma(picture, torch.zeros_like(mask))


def test_chroma_kept_is_a_ratio():
    first, second = flat(10, 0.8, 1.0), flat(10, 0.2, 1.0)
    kept = chroma_kept(object_chroma(first, everywhere(first)), object_chroma(second, everywhere(second)))
    assert kept == pytest.approx([0.25], abs=1e-6)


def unit(hue, chroma=0.6):
    return np.array([chroma * np.exp(1j * np.radians(hue))])


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (unit(100), "keep"), (unit(129), "keep"), (unit(5), "revert"), (unit(340), "revert"), (unit(200), "other"),
        (unit(100, 0.1), "grey"), (unit(0, 0.05), "grey"),
    ],
)  # fmt: skip
def test_objects_are_classified_by_stated_thresholds(made, wanted):
    shown, canonical = unit(100), np.array([0.0])
    assert OUTCOMES[outcomes(shown, made, canonical)[0]] == wanted
    found = shares(shown, made, canonical)
    assert found[f"share_{wanted}"] == 1
    assert sum(value[0] for value in found.values()) == 1


def test_keeping_and_reverting_are_not_judged_where_they_are_the_same():
    assert all(np.isnan(value)[0] for value in shares(unit(40), unit(0), np.array([0.0])).values())
    assert shares(unit(60), unit(60), np.array([0.0]))["share_keep"] == 1
    assert shares(unit(0, 0.0), unit(0), np.array([0.0]))["share_revert"] == 1  # shown grey, painted canonical
    assert all(np.isnan(value)[0] for value in shares(unit(40), unit(0), np.array([np.nan])).values())


# ------------------------------------------------------------------------------------------------------- the index


def curve(hues, count=24, chroma=0.6):
    """(count, N) colours of objects whose hue goes round the circle."""
    shifts = 360 * np.arange(count)[:, None] / count
    return chroma * np.exp(1j * np.radians(np.asarray(hues)[None] + shifts))


@pytest.fixture
def population():
    """60 objects of 12 classes, a third of them colour-free, with hues like those of scenes."""
    labels = np.arange(60) % 12
    owned = np.array([0, 0, 60, 60, 120, 120, 240, 240, 0, 60, 120, 240], float)
    return labels, owned[labels], labels < 8, curve(np.random.default_rng(0).uniform(0, 360, 60))


def index_of(population, made, category="canonical"):
    """{measure: value} of all images, each once."""
    labels, hues, canonical, shown = population
    members = canonical if category == "canonical" else ~canonical
    statistics = reversion(respond(shown, made), hues, labels, canonical, members)
    return {name: statistic(np.ones((1, len(labels))))[0] for name, statistic in statistics.items()}


def test_index_is_0_for_a_perfect_inverse_and_1_for_a_painter(population):
    _labels, hues, canonical, shown = population
    perfect = index_of(population, shown)
    assert perfect["reversion_index"] == pytest.approx(0, abs=1e-12)
    assert perfect["hue_follow"] == pytest.approx(1)
    paint = 0.4 * np.exp(1j * np.radians(hues)) * np.ones_like(shown)
    for free in (shown, 0 * shown):  # a painter may leave colour-free objects as they are, or grey
        painter = index_of(population, np.where(canonical, paint, free))
        assert painter["reversion_index"] == pytest.approx(1, abs=1e-12)
        assert painter["prototype_pull"] == pytest.approx(0.4 / 0.6)


def test_index_of_a_mixture_is_the_share_of_the_prototype(population):
    _, hues, canonical, shown = population
    paint = 0.6 * np.exp(1j * np.radians(hues))
    made = np.where(canonical, 0.75 * shown + 0.25 * paint, shown)
    assert index_of(population, made)["reversion_index"] == pytest.approx(0.25)


def test_honest_nulls_have_no_index(population):
    """Paler pictures, a colour cast over everything, and grey ones: no class pulls anywhere."""
    shown = population[-1]
    assert index_of(population, 0.3 * shown)["reversion_index"] == pytest.approx(0, abs=1e-12)
    cast = index_of(population, 0.5 * shown + 0.2 * np.exp(1j))
    assert cast["reversion_index"] == pytest.approx(0, abs=1e-9)
    assert index_of(population, 0 * shown)["reversion_index"] == 0
    noise = np.random.default_rng(1).normal(0, 0.005, (2, *shown.shape)) @ np.eye(shown.shape[1])
    grey = index_of(population, noise[0] + 1j * noise[1])
    assert abs(grey["reversion_index"]) < 0.05


def test_a_constant_picture_pulls_nowhere_however_pale_the_objects_shown_are(population):
    """The mean image: one colour for all. Divided by each object's own chroma it would seem to know the classes."""
    labels, hues, canonical, _ = population
    chroma = np.where(canonical, 0.3, 0.8) + 0.1 * (labels % 3)
    shown = curve(np.linspace(0, 350, 60)) / 0.6 * chroma
    constant = np.full_like(shown, 0.1 * np.exp(0.4j))
    for category in ("canonical", "colour_free"):
        index = index_of((labels, hues, canonical, shown), constant, category)["reversion_index"]
        assert index == pytest.approx(0, abs=1e-9)


def test_placebo_of_colour_free_classes_is_zero_when_classes_pull_nowhere(population):
    _, hues, canonical, shown = population
    paint = 0.6 * np.exp(1j * np.radians(hues))
    made = np.where(canonical, paint, 0.5 * shown + 0.1)
    assert index_of(population, made, "colour_free")["reversion_index"] == pytest.approx(0, abs=1e-9)
    assert index_of(population, made)["reversion_index"] > 0.8


def test_images_without_hue_are_left_out(population):
    labels, hues, canonical, shown = population
    response = respond(shown, shown)
    assert isinstance(response, Response)
    assert response.follow.shape == (60,)
    grey = shown.copy()
    grey[:, :10] = 0
    assert index_of((labels, hues, canonical, grey), grey)["hue_follow"] == pytest.approx(1)
    assert reversion(response, np.full(60, np.nan), labels, canonical, canonical) == {}
    with pytest.raises(BacksightError, match="three"):
        respond(shown[:2], shown[:2])


# ---------------------------------------------------------------------------------------------------- the whole pass


class EyesOnly:
    """A stand-in for a target whose only tap is the picture itself, and for one whose tap is the wrong picture."""

    name, weights, kind, classes = "eyes", "random", "module", None
    available_taps = taps = ("retina",)

    def record(self, images, taps):
        return {"retina": Tokens(images.flatten(2).transpose(1, 2), ((32, 32),))}

    def depth(self, tap):
        return 0.0 if tap == "retina" else -1.0


@pytest.fixture(scope="module")
def record():
    objects = open_objects("scenes", (32, 32), 24, seed=1)
    see = {"retina": lambda tokens: tokens.maps()[0]}
    families = {seed: {"linear": see} for seed in (0, 1)}
    perturbations = colour_perturbations(6)
    blind = {0: (EyesOnly(), {"linear": {"retina": lambda tokens: 0 * tokens.maps()[0] + 0.5}})}
    mean = torch.full((3, 32, 32), 0.5)
    return record_colours(
        EyesOnly(), objects, perturbations, families, blind, mean, answers=False, batch_size=10, progress=False
    )


@pytest.fixture(scope="module")
def table(record):
    return metrics(colour_values(record))


def chosen(table, measure, inverse="linear", category="canonical", **columns):
    rows = table[(table.measure == measure) & (table.inverse == inverse) & (table.category == category)]
    for name, value in columns.items():
        rows = rows[rows[name].isna()] if value is None else rows[rows[name] == value]
    return rows


def test_a_perfect_inverse_keeps_every_colour(table):
    assert (chosen(table, "hue_error_shown").value.abs() < 1e-4).all()
    assert (chosen(table, "chroma_kept").value.sub(1).abs() < 1e-6).all()
    coloured = chosen(table, "share_keep", region="object")
    assert (coloured[coloured.perturbation.isin(["hue_shift", "set_hue"])].value == 1).all()
    index = chosen(table, "reversion_index")
    assert set(index.region) == {"object", "image"}
    assert index.value.abs().max() < 1e-9


def test_painter_measures_one_and_nulls_nothing(table):
    painter = chosen(table, "reversion_index", "painter", region="object")
    assert len(painter) == 1
    assert painter.value.iloc[0] > 0.97
    assert chosen(table, "share_revert", "painter", perturbation="hue_shift", hue_shift=None).value.min() > 0.97
    for null in ("null_mean", "null_untrained"):
        assert chosen(table, "reversion_index", null, region="object").value.abs().max() < 1e-9
    assert set(table.inverse) == {"linear", "painter", "null_mean", "null_untrained", "null_shuffled"}


def test_rows_are_tidy_with_intervals_and_unique(table):
    assert set(METRIC_COLUMNS) <= set(table.columns)
    assert {"seeds", "perturbation", "region", "hue_shift", "amount", "category", "family"} <= set(table.columns)
    assert table[["value", "low", "high", "n", "seeds"]].notna().all().all()
    assert (table.low <= table.value + 1e-9).all()
    assert (table.value <= table.high + 1e-9).all()
    keys = ["tap", "inverse", "family", "measure", "perturbation", "region", "hue_shift", "amount", "category"]
    assert not table.duplicated(keys).any()
    parts = table[table.measure.str.startswith("share_")]
    sums = parts.groupby([k for k in keys if k != "measure"], dropna=False)["value"].sum()
    assert np.allclose(sums, 1)


def test_index_values_are_those_of_the_whole_table(record, table):
    rows = metrics(index_values(record))
    here = table[table.measure.isin(["reversion_index", "hue_follow", "prototype_pull"]) & (table.region == "object")]
    assert len(rows) == len(here)
    assert np.allclose(sorted(rows.value), sorted(here.value))


def test_nulls_are_measured_on_evenly_spaced_shifts():
    places = null_places(colour_perturbations(24))
    assert [colour_perturbations(24)[i].hue_shift for i in places] == [45.0 * i for i in range(8)]
    assert len(null_places(colour_perturbations(3))) == 3
    assert null_places([Perturbation("grey")]) == []


# ------------------------------------------------------------------------------------------------------- answers


def predictions_of(boxes, classes, scores, count=3):
    """Softmax predictions of `count` classes from corners xyxy."""
    boxes = torch.tensor(boxes, dtype=torch.float32)
    centre = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)
    chance = torch.full((*boxes.shape[:2], count + 1), 1e-6)
    chance.scatter_(2, torch.tensor(classes)[..., None], torch.tensor(scores)[..., None])
    chance[..., -1] = 1 - chance[..., :-1].sum(-1)
    return Predictions(chance.log(), centre)


def test_average_precision_on_known_cases():
    box, other = [0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]
    truth = [Truth(np.array([0]), np.array([box])), Truth(np.array([0]), np.array([box]))]
    number, weights = np.arange(3), np.ones((1, 2))
    right = predictions_of([[box, other], [box, other]], [[0, 1], [0, 1]], [[0.9, 0.8], [0.9, 0.8]])
    assert average_precisions(right, truth, number, weights)[0] == pytest.approx([1])
    # the likelier detection of class 0 is wrong in both images: precision 1/2 at every recall
    late = predictions_of([[other, box], [other, box]], [[0, 0], [0, 0]], [[0.9, 0.5], [0.9, 0.5]])
    assert average_precisions(late, truth, number, weights)[0] == pytest.approx([0.5])
    # two boxes on one object: the second is a false alarm, found after all that is right
    twice = predictions_of([[box, box], [box, box]], [[0, 0], [0, 0]], [[0.9, 0.3], [0.8, 0.2]])
    assert average_precisions(twice, truth, number, weights)[0] == pytest.approx([1])
    missed = predictions_of([[box, other], [other, other]], [[0, 0], [0, 0]], [[0.9, 0.1], [0.3, 0.2]])
    assert average_precisions(missed, truth, number, np.array([[1, 1], [2, 0], [0, 2]]))[0] == pytest.approx(
        [0.5, 1, 0]
    )


class Oracle(EyesOnly):
    kind = "classifier"

    def __init__(self, classes):
        self.classes = classes


def test_top1_counts_the_judged_objects(record):
    objects = record.objects
    logits = torch.nn.functional.one_hot(torch.from_numpy(objects.labels) + 1, len(objects.classes) + 1).float()
    target = Oracle(("nothing", *objects.classes))
    rows = metrics(accuracy_values(target, objects, [Perturbation("grey")], [logits]))
    assert dict(zip(rows.category, rows.value, strict=True)) == dict.fromkeys(objects.categories, 1.0)
    assert rows[["seeds", "measure"]].drop_duplicates().to_numpy().tolist() == [[1, "top1"]]
    assert "does not know" in answer_refusal(Oracle(("cat",)), objects)
    assert "names no classes" in answer_refusal(EyesOnly(), objects)
    with pytest.raises(BacksightError, match="not know"):
        accuracy_values(Oracle(("cat",)), objects, [], [])


# ----------------------------------------------------------------------------------------- targets of known habit


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_index_of_prototype_eyes_is_their_share(record, share):
    """The target holds the prototype, the inverse is perfect: the whole pass has a known answer."""
    families = {0: {"linear": {"retina": lambda tokens: tokens.maps()[0]}}}
    rows = metrics(prototype_eyes_values(EyesOnly(), record.objects, families, share, shifts=6))
    index = rows[(rows.measure == "sanity_reversion_index") & (rows.category == "canonical")]
    assert index.value.tolist() == pytest.approx([share], abs=0.02)


def test_small_targets_are_trained_by_seed_and_set_side_by_side():
    state = torch.get_rng_state()
    first, second = (train_small_vit("strict", 2, progress=False) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.weights_hash == second.weights_hash
    assert first.image_size == (32, 32)
    assert len(small_accuracy(first, count=8)) == 2
    with pytest.raises(BacksightError, match="1 or more"):
        train_small_vit("strict", 0)
    row = {"measure": "sanity_reversion_index", "category": "canonical", "inverse": "linear", "depth": 0, "tap": "norm"}
    rows = [row | {"target": name, "value": v, "low": v - 0.1, "high": v + 0.1} for name, v in (("a", 0.0), ("b", 0.5))]
    assert told_apart(pd.DataFrame(rows), "a", "b").apart.tolist() == [True]
    assert told_apart(pd.DataFrame(rows), "a", "a").apart.tolist() == [False]


# ------------------------------------------------------------------------------------------------------- figures
