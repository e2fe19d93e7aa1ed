"""Figures: the plotted arrays are the table's, texts are readable and inside, files are the same every time."""

import io

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from backsight.errors import BacksightError
from backsight.plots import style as figures
from backsight.plots.cards import class_scores, training_curves
from backsight.plots.grids import _broken, family_grid, merged_order, reconstruction_grid
from backsight.plots.style import depth_curves, family_colour, inverse_order, png_bytes, target_colour
from backsight.scenes.render import CLASSES, UNOWNED_HUES
from backsight.tables import names
from backsight.tables.names import RIGHT

TAPS = ("backbone", "encoder.layers.0", "decoder.layernorm", "predictions")
FAMILIES = ("linear", "direct", "modular", "modular_polished")
HUES = {kind.name: kind.hue for kind in CLASSES}
NULLS = ("null_mean", "null_shuffled", "null_untrained")


def tidy(
    target: str = "scenes-vit",
    dataset: str = "scenes",
    seeds: tuple[int, ...] = (0,),
    inverses: tuple[str, ...] = FAMILIES + NULLS,
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "target": target,
            "weights": "shipped",
            "dataset": dataset,
            "split": "test",
            "tap": tap,
            "depth": depth,
            "inverse": inverse,
            "measure": "psnr",
            "value": 30.0 - 3 * depth - place + seed,
            "low": 29.5 - 3 * depth - place + seed,
            "high": 30.5 - 3 * depth - place + seed,
            "n": 100,
            "seed": seed,
        }
        for depth, tap in reversed(list(enumerate(TAPS)))
        for place, inverse in enumerate(inverses)
        for seed in seeds
    )


def picture(height: int = 8, width: int = 8, value: float = 0.5) -> np.ndarray:
    ramp = np.linspace(0, 1, 3 * height * width).reshape(3, height, width)
    return (0.5 * ramp + 0.5 * value).astype(np.float32)


def card() -> dict[str, object]:
    names = ("all", "canonical", "colour-free", "disc", "star", "arrow")
    scores = [
        {"rule": rule, "measure": "top1", "classes": name, "value": 0.9 - 0.1 * (rule == "uniform") - 0.01 * i}
        for rule in ("mixed", "uniform")
        for i, name in enumerate(names)
    ]
    return {"target": "scenes-vit", "scores": scores}


def history() -> pd.DataFrame:
    return pd.DataFrame(
        {"step": step, "module": module, "split": split, "loss": 1.0 / step, "seconds": 0.1 * step}
        for module in ("blocks.0", "blocks.1")
        for split, every in (("train", 1), ("validation", 5))
        for step in range(every, 11, every)
    )


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    """One figure of every kind, drawn once."""
    images = np.stack([picture(6, 12, value) for value in (0.2, 0.8)])
    taps = {tap: np.clip(images * 0.9, 0, 1) for tap in TAPS}
    return {
        "curves": depth_curves(pd.concat([tidy(), tidy("scenes-detr")])),
        "grid": reconstruction_grid(torch.from_numpy(images), taps),
        "families": family_grid(images[0], {"direct": {TAPS[1]: images[0] / 2}, "linear": {TAPS[0]: images[1]}}),
        "training": training_curves(history()),
        "classes": class_scores(card(), HUES),
    }


@pytest.mark.parametrize("kind", ["curves", "grid", "families", "training", "classes"])
def test_texts_are_readable_and_nothing_is_cut_off(drawn: dict[str, Figure], kind: str) -> None:
    figure = drawn[kind]
    assert figure.get_size_inches()[0] == pytest.approx(6.5)
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert texts
    assert min(text.get_fontsize() for text in texts) >= 7
    drawn_in = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())  # inches
    width, height = figure.get_size_inches()
    assert drawn_in.x0 > -0.02
    assert drawn_in.y0 > -0.02
    assert drawn_in.x1 < width + 0.02
    assert drawn_in.y1 < height + 0.02


def test_nothing_global_changes() -> None:
    before = dict(matplotlib.rcParams)
    figure = training_curves(history())
    assert dict(matplotlib.rcParams) == before
    data, size = figure._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert size["width"] == 650


def test_a_png_is_the_same_every_time_and_carries_its_caption() -> None:
    first, second = png_bytes(training_curves(history())), png_bytes(training_curves(history()))
    assert first == second
    with Image.open(io.BytesIO(first)) as image:
        assert set(image.info) == {"dpi", "Title", "Description"}
        assert "blocks.1 0.1" in image.info["Description"]


def test_a_png_says_whether_it_shows_images(drawn: dict[str, Figure]) -> None:
    comments = {}
    for kind, figure in drawn.items():
        with Image.open(io.BytesIO(png_bytes(figure, dpi=50))) as image:
            comments[kind] = image.info.get("Comment")
            assert image.info["Title"]
            assert image.info["Description"]
    assert comments == dict.fromkeys(drawn) | {"grid": "pictures", "families": "pictures"}


def test_curves_show_the_means_in_forward_order() -> None:
    rows = tidy(seeds=(0, 2))
    axes = depth_curves(rows).axes[0]
    lines = {colors.to_hex(line.get_color()): line for line in axes.lines if line.get_marker() != "None"}
    assert set(lines) == {family_colour(name) for name in FAMILIES}
    np.testing.assert_allclose(lines[family_colour("direct")].get_ydata(), [30.0, 27.0, 24.0, 21.0])
    dashed = [line for line in axes.lines if line.get_marker() == "None"]
    assert len(dashed) == len(NULLS)
    assert all(line.is_dashed() for line in dashed)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(TAPS)
    lowest, highest = axes.dataLim.intervaly
    assert lowest <= 16.5  # the bands cover the intervals of both seeds
    assert highest == 32.5
    assert "PSNR (dB)" in axes.get_ylabel()


def test_every_data_set_has_its_own_panel() -> None:
    rows = pd.concat([tidy(), tidy(dataset="photographs"), tidy("x")])
    figure = depth_curves(rows)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["scenes-vit · scenes, test", "x · scenes, test"] + [
        f"{name} · photographs, test" for name in ("scenes-vit", "x")
    ]
    assert not figure.axes[3].lines  # not measured, and said so


@pytest.mark.parametrize(
    ("rows", "measure", "named"),
    [
        (tidy(), "pnsr", "psnr"),
        (tidy().drop(columns="low"), "psnr", "low"),
        (pd.concat([tidy(), tidy()]), "psnr", "linear at predictions"),
        (tidy().assign(tap=None), "psnr", "psnr"),
    ],
)
def test_tables_that_would_mislead_are_refused(rows: pd.DataFrame, measure: str, named: str) -> None:
    with pytest.raises(BacksightError, match=named):
        depth_curves(rows, measure)


def test_a_grid_holds_the_pictures_unsmoothed_and_in_proportion(drawn: dict[str, Figure]) -> None:
    figure = drawn["grid"]
    assert len(figure.axes) == 2 * (1 + len(TAPS))
    shown = figure.axes[0].images[0]
    np.testing.assert_array_equal(shown.get_array(), picture(6, 12, 0.2).transpose(1, 2, 0))
    assert shown.get_interpolation() == "nearest"
    box = figure.axes[0].get_window_extent()
    assert box.width / box.height == pytest.approx(2, rel=0.02)


def test_captions_are_the_psnr() -> None:
    images = np.full((1, 3, 4, 4), 0.5, np.float32)
    made = {"norm": images + 0.1}
    assert "20.0 dB" in [text.get_text() for text in reconstruction_grid(images, made).texts]


def test_a_missing_picture_leaves_its_place_empty(drawn: dict[str, Figure]) -> None:
    assert len(drawn["families"].axes) == 4  # two inputs and one picture of each family
    labels = [text.get_text() for text in drawn["families"].texts]
    assert labels.index("linear") < labels.index("direct")
    assert "backbone" in labels


def test_many_taps_continue_below() -> None:
    images = np.full((1, 3, 4, 4), 0.5, np.float32)
    figure = reconstruction_grid(images, {f"blocks.{i}": images for i in range(13)})
    assert len(figure.axes) == 13 + 2  # the input is repeated in the second block
    assert len({round(axes.get_position().y0, 3) for axes in figure.axes}) == 2


@pytest.mark.parametrize(
    ("images", "made", "message"),
    [
        (np.zeros((1, 4, 4, 3), np.float32), {}, r"images: pictures have the shape \(B, 3, H, W\)"),
        (np.zeros((1, 3, 4, 4), np.float32), {"norm": np.zeros((2, 3, 4, 4), np.float32)}, "norm: the shape is"),
        (np.zeros((1, 3, 4, 4), np.float32), {"norm": np.full((1, 3, 4, 4), 1.5)}, r"norm: pictures are numbers"),
        (np.zeros((1, 3, 4, 4), np.uint8), {}, "images: pictures are numbers"),
        (np.zeros((1, 3, 4, 4), np.float32), {}, "no reconstruction"),
    ],
)
def test_pictures_of_another_kind_are_refused(images: np.ndarray, made: dict, message: str) -> None:
    with pytest.raises(BacksightError, match=message):
        reconstruction_grid(images, made)


def test_class_scores_draw_both_colour_rules(drawn: dict[str, Figure]) -> None:
    axes = drawn["classes"].axes[0]
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [0.87, 0.86, 0.85, 0.77, 0.76, 0.75])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["disc (0°)", "star (0°)", "arrow (any hue)"]
    with pytest.raises(BacksightError, match="no scores"):
        class_scores({"target": "scenes-vit"}, HUES)


def test_a_history_without_rows_or_columns_is_refused() -> None:
    with pytest.raises(BacksightError, match="nothing was trained"):
        training_curves(history().iloc[:0])
    with pytest.raises(BacksightError, match="lacks the columns loss"):
        training_curves(history().drop(columns="loss"))


def test_colours_mean_one_thing() -> None:
    assert not set(figures.FAMILY_COLOURS.values()) & set(figures.TARGET_COLOURS.values())
    assert target_colour("vit_base_patch16_224") == target_colour("vit_base_patch16_224")
    assert target_colour("vit_base_patch16_224") not in figures.FAMILY_COLOURS.values()
    assert inverse_order(["null_mean", "modular", "own", "linear"]) == ["linear", "modular", "own", "null_mean"]


def test_long_tap_names_break_at_their_dots() -> None:
    assert _broken("encoder.layers.2", 0.55) == ["encoder", "layers.2"]
    assert _broken("blocks.2", 0.55) == ["blocks.2"]
    assert merged_order([["a", "c"], ["a", "b", "c", "d"]]) == ["a", "b", "c", "d"]


def test_names_of_tables_are_those_of_the_rooms_that_make_them() -> None:
    assert names.UNOWNED_HUES == UNOWNED_HUES
    assert names.RIGHT == RIGHT
