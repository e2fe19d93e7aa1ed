"""The colour measures, the permutation test and the reversion index on cases whose answer is known."""

import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch

from backsight.errors import BacksightError
from backsight.measures.agreement import average_precision, match_objects
from backsight.measures.hue import (
    MINIMUM_CHROMA,
    Response,
    hue_of,
    hue_scores,
    object_chroma,
    permutation_p,
    respond,
    reversion_index,
    shares,
)
from backsight.representation import Predictions, Tokens
from backsight.studies.colour import (
    accuracy_values,
    answer_refusal,
    colour_changes,
    colour_values,
    neighbour_values,
)
from backsight.studies.recolour import NONE, JudgedObjects, open_objects
from backsight.tables.pooling import metrics, pool
from backsight.tables.values import METRIC_COLUMNS


def flat(hue, saturation=1.0, value=1.0):
    """One picture of a single colour."""
    return torch.tensor(colorsys.hsv_to_rgb(hue / 360, saturation, value)).view(1, 3, 1, 1).expand(1, 3, 8, 8)


def everywhere(images):
    return torch.ones(len(images), *images.shape[2:], dtype=torch.bool)


def colour(images):
    return object_chroma(images, everywhere(images))


@pytest.mark.parametrize(
    ("shown", "made", "wanted"),
    [(0, 0, 0), (0, 120, 120), (350, 10, 20), (10, 350, 20), (0, 180, 180), (90, 300, 150), (359.5, 0.5, 1)],
)
def test_hue_error_is_exact_and_wraps_at_360(shown, made, wanted):
    scores = hue_scores(colour(flat(shown, 0.8, 0.9)), colour(flat(made, 0.5, 0.6)))
    assert scores["hue_error"] == pytest.approx([wanted], abs=1e-3)
    assert scores["share_grey"] == [0]


@pytest.mark.parametrize("saturation", [0.0, 0.05, MINIMUM_CHROMA / 0.9 - 1e-3])
def test_a_grey_reconstruction_has_no_hue_and_is_counted_as_grey(saturation):
    """Once it counted as an error of 90 degrees in one study, and was left out without a word in another."""
    grey, clear = colour(flat(40, saturation, 0.9)), colour(flat(40, 0.5, 0.9))
    scores = hue_scores(clear, grey)
    assert np.isnan(scores["hue_error"])[0]
    assert scores["share_grey"] == [1]
    assert all(np.isnan(values)[0] for values in hue_scores(grey, clear).values())  # nothing to lose
    assert hue_of(clear) == pytest.approx([40], abs=1e-3)


def test_only_pixels_inside_the_mask_count_and_brightness_textures_change_nothing():
    picture = flat(200, 0.7, 0.9).clone()
    picture[..., :4] *= 0.4  # a dark stripe of the same hue
    mask = everywhere(picture)
    mask[:, 6:] = False
    picture[:, :, 6:] = flat(20)[:, :, 6:]
    seen = object_chroma(picture, mask)
    assert hue_of(seen) == pytest.approx([200], abs=1e-3)
    assert np.abs(seen) == pytest.approx([0.7 * 0.9 * 0.7], abs=1e-6)  # mean of 1 and 0.4
    nothing = object_chroma(picture, torch.zeros_like(mask))
    assert all(np.isnan(values)[0] for values in hue_scores(nothing, seen).values())
    with pytest.raises(BacksightError, match="one mask for each"):
        object_chroma(picture, mask[:, 1:])


def unit(hue, chroma=0.6):
    return np.array([chroma * np.exp(1j * np.radians(hue))])


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (unit(100), "keep"), (unit(129), "keep"), (unit(5), "revert"), (unit(340), "revert"), (unit(200), "other"),
        (unit(100, 0.07), "grey"), (unit(0, 0.05), "grey"), (unit(100, 0.09), "keep"),
    ],
)  # fmt: skip
def test_objects_are_classified_by_stated_thresholds(made, wanted):
    found = shares(unit(100), made, np.array([0.0]))
    assert found[f"share_{wanted}"] == 1
    assert sum(value[0] for value in found.values()) == 1


def test_keeping_and_reverting_are_not_judged_where_they_are_the_same():
    assert all(np.isnan(value)[0] for value in shares(unit(40), unit(0), np.array([0.0])).values())
    assert shares(unit(60), unit(60), np.array([0.0]))["share_keep"] == 1
    unknown = shares(unit(40), unit(40), np.array([np.nan]))  # no hue to revert to
    assert (unknown["share_keep"][0], unknown["share_revert"][0]) == (1, 0)


# ---------------------------------------------------------------------------------------------- the permutation test


@pytest.mark.parametrize("reverting", [0.0, 0.3])
def test_p_is_small_where_classes_revert_to_their_own_hue_and_uniform_where_they_do_not(reverting):
    labels, own = np.repeat(np.arange(8), 6), np.repeat([0, 0, 1, 1, 2, 2, 3, 3], 6)
    ps = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        cast = generator.dirichlet(np.ones(4))  # a cast over all classes: many come back in one hue, whatever the class
        hits = (generator.random((48, 4)) < 0.3 * cast).astype(float)
        hits[np.arange(48), own] += reverting * (generator.random(48) < 0.6)
        ps.append(permutation_p(hits, own, labels, 1000, seed))
    low = np.mean(np.array(ps) <= 0.05)
    assert low > 0.9 if reverting else low < 0.15
    assert min(ps) >= 1 / 1001


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
    """The index of all images, each once."""
    labels, hues, canonical, shown = population
    members = canonical if category == "canonical" else ~canonical
    return reversion_index(respond(shown, made), hues, labels, canonical, members)(np.ones((1, len(labels))))[0]


def test_index_is_0_for_a_perfect_inverse_and_1_for_a_painter(population):
    _labels, hues, canonical, shown = population
    assert index_of(population, shown) == pytest.approx(0, abs=1e-12)
    assert respond(shown, shown).follow == pytest.approx(np.ones(60))
    paint = 0.4 * np.exp(1j * np.radians(hues)) * np.ones_like(shown)
    for free in (shown, 0 * shown):  # a painter may leave colour-free objects as they are, or grey
        assert index_of(population, np.where(canonical, paint, free)) == pytest.approx(1, abs=1e-12)


def test_index_of_a_mixture_is_the_share_of_the_prototype(population):
    _, hues, canonical, shown = population
    paint = 0.6 * np.exp(1j * np.radians(hues))
    made = np.where(canonical, 0.75 * shown + 0.25 * paint, shown)
    assert index_of(population, made) == pytest.approx(0.25)


def test_honest_nulls_have_no_index(population):
    """Paler pictures, a colour cast over everything, and grey ones: no class pulls anywhere."""
    shown = population[-1]
    assert index_of(population, 0.3 * shown) == pytest.approx(0, abs=1e-12)
    assert index_of(population, 0.5 * shown + 0.2 * np.exp(1j)) == pytest.approx(0, abs=1e-9)
    assert index_of(population, 0 * shown) == 0
    noise = np.random.default_rng(1).normal(0, 0.005, (2, *shown.shape)) @ np.eye(shown.shape[1])
    assert abs(index_of(population, noise[0] + 1j * noise[1])) < 0.05


def test_a_constant_picture_pulls_nowhere_however_pale_the_objects_shown_are(population):
    """The mean image: one colour for all. Divided by each object's own chroma it would seem to know the classes."""
    labels, hues, canonical, _ = population
    chroma = np.where(canonical, 0.3, 0.8) + 0.1 * (labels % 3)
    shown = curve(np.linspace(0, 350, 60)) / 0.6 * chroma
    constant = np.full_like(shown, 0.1 * np.exp(0.4j))
    for category in ("canonical", "colour_free"):
        assert index_of((labels, hues, canonical, shown), constant, category) == pytest.approx(0, abs=1e-9)


def test_placebo_of_colour_free_classes_is_zero_when_classes_pull_nowhere(population):
    _, hues, canonical, shown = population
    paint = 0.6 * np.exp(1j * np.radians(hues))
    made = np.where(canonical, paint, 0.5 * shown + 0.1)
    assert index_of(population, made, "colour_free") == pytest.approx(0, abs=1e-9)
    assert index_of(population, made) > 0.8


def test_images_without_hue_are_left_out(population):
    labels, hues, canonical, shown = population
    response = respond(shown, shown)
    assert isinstance(response, Response)
    grey = shown.copy()
    grey[:, :10] = 0
    assert np.isnan(respond(grey, grey).follow[:10]).all()
    assert index_of((labels, hues, canonical, grey), grey) == pytest.approx(0, abs=1e-12)
    assert reversion_index(response, np.full(60, np.nan), labels, canonical, canonical) is None
    with pytest.raises(BacksightError, match="three"):
        respond(shown[:2], shown[:2])


# ---------------------------------------------------------------------------------------------------- the whole pass


class EyesOnly:
    """A stand-in for a target whose only tap is the picture itself."""

    name, weights, kind, classes = "eyes", "random", "module", None
    available_taps = taps = ("retina",)

    def record(self, images, taps):
        return {"retina": Tokens(images.flatten(2).transpose(1, 2), ((32, 32),))}

    def depth(self, tap):
        return 0.0 if tap == "retina" else -1.0


@pytest.fixture(scope="module")
def objects():
    return open_objects("scenes", (32, 32), 24, seed=1)


@pytest.fixture(scope="module")
def table(objects):
    see = {"retina": lambda tokens: tokens.maps()[0]}
    families = {seed: {"linear": see} for seed in (0, 1)}
    blind = {0: (EyesOnly(), {"linear": {"retina": lambda tokens: 0 * tokens.maps()[0] + 0.5}})}
    mean = torch.full((3, 32, 32), 0.5)
    return metrics(colour_values(EyesOnly(), objects, 6, families, blind, mean, batch_size=10))


def chosen(table, measure, inverse="linear", category="canonical", turns="all"):
    rows = table[(table.measure == measure) & (table.inverse == inverse) & (table.category == category)]
    return rows[rows.hue_shift.isna() == (turns == "all")]


def test_a_perfect_inverse_keeps_every_colour(table):
    assert (chosen(table, "hue_error_shown").value.abs() < 1e-4).all()
    assert len(chosen(table, "hue_error_shown", turns="each")) == 6
    assert chosen(table, "share_keep").value.tolist() == [1]
    assert chosen(table, "reverted_above_deals").value.tolist() == [0]
    assert chosen(table, "reverted_p").value.tolist() == [1]
    assert chosen(table, "reversion_index").value.abs().max() < 1e-9


def test_painter_measures_one_and_nulls_nothing(table):
    for measure in ("reversion_index", "share_revert", "reverted_above_deals"):
        assert chosen(table, measure, "painter").value.tolist() == pytest.approx([1], abs=0.01)
    assert chosen(table, "reverted_p", "painter").value.max() < 0.01
    for null in ("null_mean", "null_untrained"):
        assert chosen(table, "reversion_index", null).value.abs().max() < 1e-9
        assert chosen(table, "share_grey", null).value.tolist() == [1]
        assert chosen(table, "hue_error_shown", null).empty  # grey has no hue, and no error
        assert chosen(table, "reverted_p", null).value.tolist() == [1]
    assert chosen(table, "reverted_p", "null_shuffled").value.max() > 0.01
    assert set(table.inverse) == {"linear", "painter", "null_mean", "null_untrained", "null_shuffled"}


def test_rows_are_tidy_with_intervals_and_unique(table):
    assert set(METRIC_COLUMNS) <= set(table.columns)
    assert {"seeds", "perturbation", "region", "hue_shift", "category", "family"} <= set(table.columns)
    assert table[["value", "n", "seeds"]].notna().all().all()
    assert table.loc[table.measure != "reverted_p", ["low", "high"]].notna().all().all()
    keys = ["tap", "inverse", "family", "measure", "perturbation", "region", "hue_shift", "category"]
    assert not table.duplicated(keys).any()
    parts = table[table.measure.str.startswith("share_")]
    sums = parts.groupby([k for k in keys if k != "measure"], dropna=False)["value"].sum()
    assert np.allclose(sums, 1)


# ------------------------------------------------------------------------------------------------- natural hues


@pytest.fixture(scope="module")
def natural(objects):
    """Two objects a photograph, at the left in one of three hues and at the right in one of four, photographs apart by
    their brightness."""
    count = 12
    pictures = torch.cat([flat(120 * (k % 3), 0.8, 0.4 + 0.05 * k) for k in range(count)]).repeat(1, 1, 4, 4)
    pictures[..., 16:] = torch.cat([flat(90 * (k % 4) + 10, 0.6, 0.4 + 0.05 * k) for k in range(count)])[..., :1, :1]
    left = everywhere(pictures)
    left[..., 16:] = False
    masks, pictures = torch.cat([left, ~left]), (pictures.repeat(2, 1, 1, 1) * 255).round().to(torch.uint8)
    hues = hue_of(object_chroma(pictures / 255, masks))
    known = {"photographs": torch.arange(count).repeat(2), "hues": hues, "canonical": np.ones(2 * count, bool)}
    read = {"images": pictures, "masks": masks, "every": masks, "labels": torch.full((2 * count, 1), -1)}
    return JudgedObjects("sample", "test", (), boxes=torch.zeros(2 * count, 1, 4), **read, **known)


def test_painted_objects_revert_where_the_natural_picture_comes_back_and_nowhere_else(natural):
    brightness = natural.images.amax(1).flatten(1) / 255.0  # no turn of the hue changes it

    def remember(tokens):
        own = torch.cdist(tokens.maps()[0].amax(1).flatten(1), brightness).argmin(1)
        return natural.images[own] / 255

    see = {"retina": lambda tokens: tokens.maps()[0]}
    families = {0: {"linear": see, "direct": {"retina": remember}}}
    mean = torch.full((3, 32, 32), 0.5)
    values = colour_values(EyesOnly(), natural, 6, families, {}, mean, batch_size=24)
    assert (values.image.nunique(), values.photograph.nunique()) == (24, 12)  # a photograph is what is drawn
    table = metrics(values)

    def value(measure, inverse):
        (row,) = chosen(table, measure, inverse, "natural").to_dict("records")
        assert (row["n"], row["photographs"]) == (24, 12)
        return row["value"]

    for measure in ("share_nearer", "share_revert"):
        assert value(measure, "linear") == value(measure, "null_mean") == 0
        assert value(measure, "direct") == value(measure, "painter") == 1
    for measure in ("nearer_above_deals", "reverted_above_deals"):
        assert value(measure, "linear") == value(measure, "null_mean") == 0
        assert value(measure, "painter") == value(measure, "direct") > 0.3
    assert value("hue_error_shown", "linear") == pytest.approx(0, abs=0.01)
    assert value("share_grey", "null_mean") == 1
    assert not {"reversion_index", "reverted_p"} & set(table.measure)


def test_one_colour_for_all_photographs_reverts_none_above_dealt_hues(natural):
    """Most photographs are brown: a brown picture is near the natural hue of many objects, and so it is of others'."""
    families = {0: {"linear": {"retina": lambda tokens: 0 * tokens.maps()[0] + flat(20)[..., :1, :1]}}}
    mean = torch.full((3, 32, 32), 0.5)
    table = metrics(colour_values(EyesOnly(), natural, 6, families, {}, mean, batch_size=24))
    assert chosen(table, "share_nearer", category="natural").value.item() > 0.3
    for measure in ("nearer_above_deals", "reverted_above_deals"):
        assert abs(chosen(table, measure, category="natural").value.item()) < 0.08


def test_one_object_alone_is_judged_too(objects):
    one = open_objects("scenes", (32, 32), 1, seed=1)
    families = {0: {"linear": {"retina": lambda tokens: tokens.maps()[0]}}}
    values = colour_values(EyesOnly(), one, 3, families, {}, torch.full((3, 32, 32), 0.5))
    assert set(values.inverse) == {"linear", "painter", "null_mean"}


class Seeing(EyesOnly):
    """Puts out the picture; blind: nothing but its brightness."""

    def __init__(self, blind=False):
        self.blind = blind

    def __call__(self, images):
        return images.amax(1).flatten(1) if self.blind else images.flatten(1)


def test_a_model_that_sees_no_hue_finds_every_picture_again_and_another_picture_is_none(natural):
    changes = colour_changes(3, ["image"])
    twin = {0: (Seeing(), {})}
    noise = torch.randint(0, 256, (17, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    seen = replace(natural, images=noise[:12], masks=natural.masks[:12])
    table = pool(neighbour_values(Seeing(blind=True), seen, changes, noise[12:], twin, batch_size=5))
    of = table.fillna({"inverse": ""}).groupby(["measure", "inverse"]).value.agg(["min", "max"])
    assert of.loc["feature_cosine", ""].tolist() == pytest.approx([1, 1], abs=1e-4)
    assert of.loc["retrieval_top1", ""].tolist() == of.loc["same_neighbour", ""].tolist() == [1, 1]
    assert of.loc["retrieval_top1", "null_shuffled"].max() < 0.2
    assert of.loc["feature_cosine", "null_untrained"].max() < 0.95
    assert set(table.perturbation) == {"hue_shift", "grey"}
    assert set(table.n) == {12}


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
    labels, boxes = torch.tensor([[0, -1], [0, -1]]), torch.tensor([[box, other], [box, other]])

    def precision(predictions, weights=None):
        return average_precision(match_objects(predictions, labels, boxes), weights)

    right = predictions_of([[box, other], [box, other]], [[0, 1], [0, 1]], [[0.9, 0.8], [0.9, 0.8]])
    assert precision(right) == pytest.approx([1])
    # the likelier detection of class 0 is wrong in both images: precision 1/2 at every recall
    late = predictions_of([[other, box], [other, box]], [[0, 0], [0, 0]], [[0.9, 0.5], [0.9, 0.5]])
    assert precision(late) == pytest.approx([0.5])
    # two boxes on one object: the second is a false alarm, found after all that is right
    twice = predictions_of([[box, box], [box, box]], [[0, 0], [0, 0]], [[0.9, 0.3], [0.8, 0.2]])
    assert precision(twice) == pytest.approx([1])
    missed = predictions_of([[box, other], [other, other]], [[0, 0], [0, 0]], [[0.9, 0.1], [0.3, 0.2]])
    assert precision(missed, np.array([[1, 1], [2, 0], [0, 2]])) == pytest.approx([51 / 101, 1, 0])


class Answering(EyesOnly):
    """Knows every object of the scenes it was told; blind: says the first class where the object shown is grey."""

    def __init__(self, objects, kind):
        self.kind, self.classes, self.objects, self.asked = kind, ("nothing", *objects.classes), objects, 0

    def __call__(self, images):
        rows = torch.arange(self.asked, self.asked + len(images)) % len(self.objects)
        self.asked += len(images)
        grey = np.abs(object_chroma(images, self.objects.masks[rows])) < 0.03  # a rim of the picture around it
        if self.kind == "classifier":
            named = torch.where(torch.from_numpy(grey), 0, self.objects.labels[rows, 0] + 1)
            return torch.nn.functional.one_hot(named, len(self.classes)).float()
        labels, boxes = self.objects.labels[rows], self.objects.boxes[rows]
        named = torch.where((labels >= 0) & ~torch.from_numpy(grey)[:, None], labels + 1, len(self.classes))
        logits = 9.0 * torch.nn.functional.one_hot(named, len(self.classes) + 1)
        half = (boxes[..., 2:] - boxes[..., :2]) / 2
        return Predictions(logits, torch.cat([boxes[..., :2] + half, 2 * half], -1))


@pytest.mark.parametrize(("kind", "measure"), [("classifier", "top1"), ("detector", "ap50")])
def test_accuracy_that_colour_costs_is_exact_and_a_zero_is_not_dropped(objects, kind, measure):
    rows = pool(accuracy_values(Answering(objects, kind), objects, colour_changes(3), batch_size=7))
    found = rows.set_index(["measure", "perturbation", "region", "hue_shift", "category"]).value
    assert set(rows.category) == {"all", *objects.categories}
    for category in ("all", "canonical"):
        assert found[measure, "none", "image", :, category].tolist() == pytest.approx([1])
        assert found[measure, "hue_shift", "objects", 120.0, category] == pytest.approx(1)
        for region in ("objects", "image"):
            assert found["accuracy_kept", "grey", region, :, category].tolist() == pytest.approx([0], abs=1e-9)
    assert set(rows[rows.measure == "accuracy_kept"].n) == {len(objects)}
    assert "accuracy_kept" not in set(rows[rows.perturbation == "none"].measure)


def test_answers_that_cannot_be_judged_are_refused_in_a_sentence(objects):
    stranger = Answering(objects, "classifier")
    stranger.classes = ("cat",)
    assert "does not know" in answer_refusal(stranger, objects)
    assert "names no classes" in answer_refusal(EyesOnly(), objects)
    with pytest.raises(BacksightError, match="not know"):
        accuracy_values(stranger, objects, [NONE])
