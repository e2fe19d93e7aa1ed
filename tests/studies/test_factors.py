"""The factor table: features that are the truth score 1, noise scores chance, and every score has its nulls."""

import copy

import numpy as np
import pytest
import torch

from backsight.errors import BacksightError
from backsight.representation import Predictions, Queries, Tokens
from backsight.scenes.render import CLASSES, TEXTURES, render
from backsight.studies.factors import (
    BACKGROUND_SEED,
    CELLS,
    CHANCE,
    FACTORS,
    PLACED,
    POOLED,
    UNITS,
    colour_summary,
    factor_table,
    scene_truth,
    summary_of,
)
from backsight.tables.pooling import metrics
from backsight.tables.values import METRIC_COLUMNS

SIZE = (16, 16)
COUNTS = {"train_count": 300, "test_count": 111, "seeds": (0, 1)}
TAPS = ("class_token", "noise", "queries", "predictions")


class Oracle:
    """A target whose features are the truth of the scene that it is shown (`noise`: random ones)."""

    name, weights, image_size = "oracle", "random", SIZE
    taps = available_taps = TAPS
    depth = staticmethod(TAPS.index)
    knows = True

    def __init__(self):
        every = [scene_truth("train", COUNTS["train_count"], seed, SIZE) for seed in COUNTS["seeds"]]
        every += [scene_truth("train", COUNTS["test_count"], BACKGROUND_SEED, SIZE)]
        every += [scene_truth("test", COUNTS["test_count"], 0, SIZE)]
        every += [scene_truth("validation", COUNTS["test_count"], 0, SIZE)]
        images = torch.cat([truth.images for truth in every])
        known = torch.cat([torch.cat([truth.outputs[f] for f in FACTORS], dim=1) for truth in every]).float()
        self.known = {image.numpy().tobytes(): row for image, row in zip(images, known, strict=True)}
        self.generator = torch.Generator().manual_seed(0)

    def untrained(self, seed):
        other = copy.copy(self)
        other.knows, other.generator = False, torch.Generator().manual_seed(100 + seed)
        return other

    def record(self, images, taps):
        pixels = (images * 255).round().byte()
        truth = torch.stack([self.known[image.numpy().tobytes()] for image in pixels])
        if not self.knows:
            truth = torch.randn(truth.shape, generator=self.generator)
        batch, channels = truth.shape
        tokens = torch.zeros(batch, 1 + 15, channels)
        tokens[:, 0] = truth
        queries = torch.zeros(batch, 4, channels)
        queries[:, 2] = truth
        boxes = torch.rand(batch, 3, 4, generator=self.generator)
        boxes[:, 1, :2] = truth[:, -2:]
        noise = torch.randn(batch, 20, channels, generator=self.generator)
        made = {
            "class_token": Tokens(tokens, ((5, 3),), prefix=1),
            "noise": Tokens(noise, ((4, 4), (2, 2))),
            "queries": Queries(queries),
            "predictions": Predictions(torch.randn(batch, 3, 5, generator=self.generator), boxes),
        }
        return {tap: made[tap] for tap in taps}


@pytest.fixture(scope="module")
def table():
    return metrics(factor_table(Oracle(), **COUNTS))


def values(table, inverse, tap):
    at = table[(table["inverse"] == inverse) & (table["tap"] == tap)]
    return at.set_index("factor")["value"]


def test_truth_is_that_of_the_scenes():
    truth = scene_truth("train", 5, 3, (64, 64))
    scene = render("train", 4, 3, 64)
    assert np.array_equal(truth.images[4].permute(1, 2, 0).numpy(), scene.image)
    assert truth.outputs["shape"][4].argmax() == scene.dominant
    assert TEXTURES[int(truth.outputs["texture"][4].argmax())] == scene.textures[0]
    cosine, sine = truth.outputs["hue"][4].tolist()
    assert np.degrees(np.arctan2(sine, cosine)) % 360 == pytest.approx(scene.hues[0], abs=1e-3)
    x, y, width, height = scene.boxes[0] / 64
    assert truth.outputs["position"][4].tolist() == pytest.approx([x + width / 2, y + height / 2])
    assert all(truth.outputs[f].shape == (5, k) for f, k in zip(FACTORS, (6, len(CLASSES), 5, 2, 2), strict=True))


def test_background_is_asked_of_training_photographs_only():
    assert (scene_truth("train", 5, 3, (64, 64)).outputs["background"].sum(1) == 1).all()
    assert (scene_truth("test", 4, 0, (64, 64)).outputs["background"] == 0).all()


def test_features_that_are_the_truth_score_one(table):
    for tap in ("class_token", "queries"):
        assert (values(table, "probe", tap) > 0.95).all()
    assert values(table, "probe", "predictions")["position"] > 0.95


def test_noise_and_nulls_score_chance(table):
    for inverse, tap in (("probe", "noise"), ("null_untrained", "queries"), ("null_shuffled", "class_token")):
        for factor, value in values(table, inverse, tap).items():
            assert value < CHANCE[factor] + 0.15, (inverse, tap, factor)
    assert values(table, "null_shuffled", "class_token")["hue"] < 0  # sure and wrong is worse than the mean


def test_colours_tell_the_hue_of_scenes_without_any_model(table):
    colours = values(table, "null_colour_position", "noise")
    assert colours["hue"] > 0.3
    assert colours.equals(values(table, "null_colour_position", "queries"))


def test_rows_are_tidy_and_complete(table):
    assert [*METRIC_COLUMNS] == list(table.columns)[: len(METRIC_COLUMNS)]
    assert {"factor", "unit", "chance", "seeds"} <= set(table.columns)
    assert len(table) == len(FACTORS) * len(TAPS) * 4  # the probe and three nulls
    assert not table.duplicated(["factor", "tap", "inverse"]).any()
    assert (table["n"] == COUNTS["test_count"]).all()
    assert (table["seeds"] == 2).all()
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()
    assert dict(zip(table["factor"], table["unit"], strict=True)) == dict(UNITS)
    assert set(table.loc[table["factor"] == "background", "split"]) == {"train"}
    assert set(table.loc[table["factor"] != "background", "split"]) == {"test"}


def test_random_state_outside_is_left_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    factor_table(Oracle(), **(COUNTS | {"seeds": (0,)}))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("representation", "width"),
    [
        (Tokens(torch.randn(7, 2 + 49, 200), ((7, 7),), prefix=2), PLACED + 3 * POOLED + 2 * POOLED),
        (Tokens(torch.randn(7, 64 + 16, 96), ((8, 8), (4, 4))), PLACED + 3 * POOLED),
        (Tokens(torch.randn(7, 4, 3), ((2, 2),)), 4 * 3 + 3 * 3),
        (Queries(torch.randn(7, 100, 64)), 100 * (PLACED // 100) + 3 * POOLED),
        (Queries(torch.randn(7, 900, 8)), PLACED + 3 * 8),
        (Predictions(torch.randn(7, 16, 13), torch.rand(7, 16, 4)), 16 * 17 + 3 * 17),
    ],
)
def test_summaries_are_bounded_and_belong_to_each_image(representation, width):
    summary = summary_of(representation)
    whole = summary(representation)
    assert whole.shape == (7, width)
    assert whole.dtype == torch.float32
    assert torch.allclose(summary(representation.index([5, 2])), whole[[5, 2]], atol=1e-4)


def test_summary_keeps_places_apart():
    values = torch.randn(4, 64, 32)
    moved = values.unflatten(1, (8, 8)).roll(8 // CELLS, dims=2).flatten(1, 2)
    summary = summary_of(Tokens(values, ((8, 8),)))
    there, here = summary(Tokens(moved, ((8, 8),))), summary(Tokens(values, ((8, 8),)))
    assert not torch.allclose(here[:, :PLACED], there[:, :PLACED], atol=0.1)
    assert torch.allclose(here[:, PLACED:], there[:, PLACED:], atol=1e-4)


def test_constant_channels_do_no_harm():
    values = torch.randn(6, 16, 8)
    values[..., 3] = 1e4
    assert summary_of(Tokens(values, ((4, 4),)))(Tokens(values, ((4, 4),))).isfinite().all()


def test_colour_summary_finds_a_coloured_spot():
    images = torch.full((2, 3, 32, 32), 0.5)
    images[0, 0, 4:8, 20:24] = 1.0
    images[0, 1:, 4:8, 20:24] = 0.0
    x, y = colour_summary(images)[0, -2:].tolist()
    assert (x, y) == pytest.approx((22 / 32, 6 / 32), abs=0.01)


def test_scenes_that_would_mislead_are_refused():
    with pytest.raises(BacksightError, match="train on others"):
        factor_table(Oracle(), **(COUNTS | {"seeds": (0, BACKGROUND_SEED)}))
    with pytest.raises(BacksightError, match="at least two scenes"):
        factor_table(Oracle(), **(COUNTS | {"test_count": 1}))
