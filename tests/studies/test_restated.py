"""The questions restated: known answers of every measure, every verdict with its borders, a tiny target throughout."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from targets.examples import small_timm
from torch import Tensor

from backsight.data.images import open_images
from backsight.errors import BacksightError
from backsight.exact.map import Noise, fit_map_tap
from backsight.exact.posterior import MapSettings
from backsight.inverses.linear import fit_linear
from backsight.measures.hue import object_chroma
from backsight.plots.restated import cross_figure, detail_by_depth, hue_kept_by_depth, restated_pictures
from backsight.studies.layers import pairs_of_one_form
from backsight.studies.recolour import Perturbation, open_objects
from backsight.studies.restated import (
    Restated,
    add_depth_rows,
    colour_follow,
    cross_pairs,
    hue_shift_kept,
    measure_restated,
)
from backsight.studies.tidy_rows import TidyRows
from backsight.tables.values import METRIC_COLUMNS
from backsight.targets import Target

SIZE = 32
QUICK = MapSettings(stages=(1.0, 1e-2), steps=1, products=4)


def hues(*degrees: float, chroma: float = 0.5) -> np.ndarray:
    return chroma * np.exp(1j * np.radians(np.array(degrees)))


# ------------------------------------------------------------------------------------------------------------- colour


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (hues(10, 130), 1.0),  # all of the shift
        (hues(200, 320), 1.0),  # another hue, but all of its shift
        (hues(10, 70), 0.5),
        (hues(10, 10), 0.0),  # a constant
        (hues(350, 50), 0.5),  # across red
        (hues(10, 310), -0.5),  # the other way round
        (np.array([hues(10)[0], 0.01]), 0.0),  # too grey for a hue
    ],
)
def test_the_share_of_a_hue_shift(made: np.ndarray, wanted: float) -> None:
    assert hue_shift_kept(hues(10, 130)[:, None], made[:, None])[0] == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    "shown", [hues(0, 180), hues(0, 20), np.array([0.01, hues(120)[0]])], ids=["half round", "too small", "grey"]
)
def test_a_turn_that_cannot_be_told_has_no_share(shown: np.ndarray) -> None:
    assert math.isnan(hue_shift_kept(shown[:, None], shown[:, None])[0])


@pytest.mark.parametrize(
    ("made", "wanted"), [(hues(0, 180), 1.0), (hues(0, 180, chroma=0.25), 0.5), (hues(40, 40), 0.0)]
)
def test_the_slope_knows_a_half_turn_and_chroma(made: np.ndarray, wanted: float) -> None:
    assert colour_follow(hues(0, 180)[:, None], made[:, None])[0] == pytest.approx(wanted, abs=1e-12)


def test_of_scenes_in_another_hue_the_pictures_themselves_follow_and_one_picture_does_not() -> None:
    objects = open_objects("scenes", (SIZE, SIZE), 4)
    shifted = objects.perturbed(Perturbation("hue_shift", "object", hue_shift=120.0))
    shown = np.stack([object_chroma(each, objects.masks) for each in (objects.images, shifted)])
    known = np.abs(shown).min(0) >= 0.1
    assert known.any()
    for measured in (hue_shift_kept, colour_follow):
        assert np.allclose(measured(shown, shown)[known], 1.0)
        assert np.allclose(measured(shown, shown[[0, 0]])[known], 0.0)


# ------------------------------------------------------------------------------------------------- what depth costs


def made_tables() -> dict[tuple[str, str], dict[str, np.ndarray]]:
    return {
        ("map", "near"): {"psnr": np.array([[30.0, 32.0]]), "hue_error": np.array([[1.0, 1.0]])},
        ("map", "far"): {"psnr": np.array([[28.0, 30.0]]), "hue_error": np.array([[6.0, 6.0]])},
        ("modular", "near"): {"psnr": np.array([[28.0, 30.0]] * 2), "hue_error": np.array([[1.0, 1.0]] * 2)},
        ("modular", "far"): {"psnr": np.array([[18.0, 20.0]] * 2), "hue_error": np.array([[21.0, 21.0]] * 2)},
        ("linear", "near"): {"psnr": np.array([[20.0, 22.0]])},
        ("linear", "far"): {"psnr": np.array([[20.0, 22.0]])},
        ("null_mean", "near"): {"psnr": np.array([[12.0, 12.0]])},
        ("null_mean", "far"): {"psnr": np.array([[12.0, 12.0]])},
    }


def test_depth_costs_are_paired_and_exact() -> None:
    rows = TidyRows(SimpleNamespace(depth=["near", "far"].index), {}, seed=3)
    add_depth_rows(rows, made_tables(), ["near", "far"])
    table = rows.table()
    assert table["seed"].eq(3).all()
    assert not table["inverse"].str.startswith("null_").any()
    at = table.set_index(["measure", "tap", "inverse", "against", "of"])["value"]
    assert at["depth_cost", "far", "map", "near", "psnr"] == pytest.approx(-2)
    assert at["depth_cost", "far", "modular", "near", "psnr"] == pytest.approx(-10)
    assert at["depth_cost", "far", "modular", "near", "hue_error"] == pytest.approx(20)
    assert at["depth_cost_recovered", "far", "map", "modular", "psnr"] == pytest.approx(1.0)  # 28 again, as at near
    assert at["depth_cost_recovered", "far", "map", "modular", "hue_error"] == pytest.approx(0.75)
    assert at["psnr_difference", "near", "map", "modular", "psnr"] == pytest.approx(2)
    assert at["psnr_difference", "far", "map", "modular", "psnr"] == pytest.approx(10)
    assert at["psnr_difference", "far", "map", "linear", "psnr"] == pytest.approx(8)
    nothing = table[(table["measure"] == "depth_cost_recovered") & (table["against"] == "linear")].iloc[0]
    assert math.isnan(nothing["value"])
    assert nothing["note"]
    costs = table[table["measure"] == "depth_cost"].set_index(["inverse", "of"])["seeds"]
    assert (costs["map", "psnr"], costs["modular", "psnr"]) == (1, 2)


# ------------------------------------------------------------------------------------------------- a tiny target


TAPS = ["patch_embed", "blocks.0", "blocks.1"]


@pytest.fixture(scope="module")
def target() -> Target:
    torch.manual_seed(0)
    return small_timm("ViT", img_size=SIZE, patch_size=8, embed_dim=48, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def study(target: Target) -> Restated:
    linear = dict(fit_linear(target, open_images("scenes", "train", SIZE, 40), taps=TAPS, progress=False))
    del linear["patch_embed"]
    return measure_restated(
        target,
        {0: {"linear": linear}},
        TAPS,
        "scenes",
        calibration=open_images("scenes", "validation", SIZE, 10),
        n=3,
        hue_images=2,
        shifts=(120.0, 180.0),
        map_settings=QUICK,
        cross_images=3,
        fitted=10,
        checked=0,
        texture_images=120,
        progress=False,
    )


def value_of(metrics: pd.DataFrame, measure: str, **where: Any) -> float:
    rows = metrics[metrics["measure"] == measure]
    for column, wanted in where.items():
        rows = rows[rows[column].isna()] if wanted is None else rows[rows[column] == wanted]
    assert len(rows) == 1, (measure, where, rows)
    return float(rows["value"].iloc[0])


def test_the_table_is_tidy(study: Restated) -> None:
    metrics = study.metrics
    assert list(metrics.columns)[: len(METRIC_COLUMNS)] == list(METRIC_COLUMNS)
    keys = ["tap", "inverse", "measure", "against", "of", "hue_shift", "source_tap", "target_tap"]
    assert not metrics.duplicated(keys).any()
    assert list(study.skipped) == ["patch_embed"]  # which no inverse reads
    assert not ((metrics["inverse"] == "map") & (metrics["tap"] == "patch_embed")).any()
    told = metrics.dropna(subset=["value", "low", "high"])
    assert ((told["low"] <= told["value"] + 1e-9) & (told["value"] <= told["high"] + 1e-9)).all()


def test_rows_agree_with_one_another(study: Restated) -> None:
    metrics = study.metrics
    for tap in ("blocks.0", "blocks.1"):
        ours, theirs = (value_of(metrics, "psnr", tap=tap, inverse=name) for name in ("map", "linear"))
        gain = value_of(metrics, "psnr_difference", tap=tap, inverse="map", against="linear")
        assert gain == pytest.approx(ours - theirs, abs=1e-4)
        crossed = value_of(metrics, "cross_psnr", source_tap=tap, target_tap=tap, inverse="map")
        assert crossed == pytest.approx(ours, abs=1e-4)
    cost = value_of(metrics, "depth_cost", tap="blocks.1", inverse="map", of="psnr")
    ends = [value_of(metrics, "psnr", tap=tap, inverse="map") for tap in ("blocks.0", "blocks.1")]
    assert cost == pytest.approx(ends[1] - ends[0], abs=1e-4)
    # Over both pairs of different taps.
    off = [value_of(metrics, "cross_psnr", source_tap=i, target_tap=j, inverse="map") for i, j in CROSSED]
    assert value_of(metrics, "cross_loss", inverse="map", tap=None) == pytest.approx(
        sum(ends) / 2 - sum(off) / 2, abs=1e-4
    )


CROSSED = (("blocks.0", "blocks.1"), ("blocks.1", "blocks.0"))


def test_map_reads_more_than_its_nulls(study: Restated) -> None:
    for tap in ("blocks.0", "blocks.1"):
        ours = value_of(study.metrics, "psnr", tap=tap, inverse="map")
        for null in ("null_mean", "null_shuffled"):
            assert ours > value_of(study.metrics, "psnr", tap=tap, inverse=null)
        assert value_of(study.metrics, "hue_error", tap=tap, inverse="null_guess") == 90


def test_of_a_half_turn_the_slope_alone_is_told(study: Restated) -> None:
    of_half = study.metrics[(study.metrics["measure"] == "hue_shift_kept") & (study.metrics["hue_shift"] == 180)]
    assert len(of_half)
    assert of_half["value"].isna().all()
    mean = value_of(study.metrics, "hue_shift_kept", tap="blocks.0", inverse="map", hue_shift=None)
    assert mean == pytest.approx(
        value_of(study.metrics, "hue_shift_kept", tap="blocks.0", inverse="map", hue_shift=120), abs=1e-9
    )


def test_pairs_reach_two_places(target: Target) -> None:
    taps = list(target.tap_set("fine"))
    recorded = target.record(torch.rand(1, 3, SIZE, SIZE), taps)
    pairs = cross_pairs(taps, recorded)
    assert all(abs(taps.index(i) - taps.index(j)) <= 2 for i, j in pairs)
    assert {(taps[0], taps[2]), (taps[2], taps[0]), (taps[1], taps[1])} <= set(pairs)
    assert set(cross_pairs(taps, recorded, reach=99)) == set(pairs_of_one_form(recorded))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"n": 1}, "n from 2"),
        ({"cross_images": 1}, "cross_images 0 or from 2"),
        ({"shifts": (360.0,)}, "Hue shifts"),
        ({"families": {0: {"linear": {}}}}, "No tap of"),
    ],
)
def test_what_does_not_fit_is_refused(target: Target, pictures: Tensor, changed: dict[str, Any], said: str) -> None:
    given = {"families": {0: {"linear": {}}}, "n": 2, "texture_images": 0} | changed
    with pytest.raises(BacksightError, match=said):
        measure_restated(
            target, given.pop("families"), ["blocks.0"], "scenes", calibration=pictures, progress=False, **given
        )


def test_a_refused_map_says_why(target: Target, pictures: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_given: Any) -> None:
        raise KeyError("it reads predictions")

    monkeypatch.setattr("backsight.studies.restated.fit_map_tap", refuse)
    families = {0: {"linear": {"blocks.0": lambda representation: representation.values}}}
    with pytest.raises(BacksightError, match=r"No tap of blocks\.0 has a MAP inverse.*it reads predictions"):
        measure_restated(target, families, ["blocks.0"], "scenes", calibration=pictures, progress=False)


def test_maps_that_are_there_are_not_fitted_again(
    target: Target, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = {0: {"linear": dict(fit_linear(target, pictures, taps=["blocks.0"], progress=False))}}
    held_out = open_images("scenes", "validation", SIZE, 10)
    asked = {"calibration": held_out, "n": 2, "hue_images": 0, "cross_images": 0}
    asked |= {"map_settings": QUICK, "fitted": 10, "checked": 0, "texture_images": 0, "progress": False}
    fitted = measure_restated(target, families, ["blocks.0"], "scenes", **asked)
    one = fit_map_tap(
        target, "blocks.0", families[0]["linear"]["blocks.0"], held_out, Noise("float32"), QUICK, 10, checked=0
    )
    monkeypatch.setattr("backsight.studies.restated.fit_map_tap", None)
    given = measure_restated(target, families, ["blocks.0"], "scenes", maps={"blocks.0": one}, **asked)
    pd.testing.assert_frame_equal(given.metrics, fitted.metrics)


# ------------------------------------------------------------------------------------------------------------ figures


def test_figures_draw_the_table(study: Restated) -> None:
    figure = detail_by_depth(study.metrics)
    axes = next(each for each in figure.axes if each.get_title() == "PSNR (dB)")
    black = next(line for line in axes.lines if line.get_color() == "#000000")
    wanted = [value_of(study.metrics, "psnr", tap=tap, inverse="map") for tap in ("blocks.0", "blocks.1")]
    assert np.allclose(black.get_ydata(), wanted)
    matrix = cross_figure(study.metrics)
    values = next(each for each in matrix.axes if "MAP" in each.get_title()).images[0].get_array()
    assert np.allclose(np.diagonal(values), wanted, atol=1e-4)
    for made in (figure, matrix, hue_kept_by_depth(study.metrics)):
        assert "95 %" in made.caption
        assert made.description
    shown = restated_pictures(study.images[:2], {"modular": study.pictures["linear"], "map": study.pictures["map"]})
    assert shown.shows_images
    assert len(shown.axes) == 2 * 2 * 3  # the input and two taps, of two images by two inverses
