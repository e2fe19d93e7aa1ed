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
from backsight.plots.bars import bars
from backsight.plots.depth import by_depth, curves
from backsight.plots.grids import broken, family_grid, merged_order, picture_table, reconstruction_grid
from backsight.plots.matrix import matrices
from backsight.plots.style import ShownFigure, inverse_order, look_of, png_bytes, short_tap

TAPS = ("backbone", "encoder.layers.0", "decoder.layernorm", "predictions")
FAMILIES = ("linear", "direct", "modular", "modular_polished")
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


def history() -> pd.DataFrame:
    return pd.DataFrame(
        {"step": step, "module": module, "split": split, "value": 1.0 / step, "seconds": 0.1 * step}
        for module in [f"blocks.{i}" for i in range(9)]
        for split, every in (("train", 1), ("validation", 5))
        for step in range(every, 11, every)
    )


def training() -> ShownFigure:
    return curves(history(), "Loss by step", "step", "module", "split", log="y", ylabel="loss")


def matrix(taps: int) -> pd.DataFrame:
    names = [f"blocks.{i}" for i in range(taps)]
    rows = pd.DataFrame(
        {"source_tap": down, "target_tap": across, "depth": i, "inverse": name, "value": i + 10.0 * j}
        for i, down in enumerate(names)
        for j, across in enumerate(names)
        for name in ("linear", "modular")
        if i != j
    )
    return rows.assign(target="scenes-vit", low=rows["value"] - 1, high=rows["value"] + 1, n=9).iloc[::-1]


def shares() -> pd.DataFrame:
    rows = pd.DataFrame(
        {"tap": tap, "depth": depth, "inverse": inverse, "measure": measure, "value": value}
        for depth, tap in enumerate(TAPS)
        for inverse in ("linear", "modular")
        for measure, value in (("share_keep", 0.7), ("share_revert", 0.3))
    )
    return rows.assign(target="scenes-vit", low=rows["value"] - 0.1, high=rows["value"] + 0.1, n=9)


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    """One figure of every kind, drawn once."""
    images = np.stack([picture(6, 12, value) for value in (0.2, 0.8)])
    taps = {tap: np.clip(images * 0.9, 0, 1) for tap in TAPS}
    return {
        "curves": by_depth(pd.concat([tidy(), tidy("scenes-detr")]), "psnr", "What comes back"),
        "training": training(),
        "matrices": matrices(matrix(8), "Each through each"),
        "bars": bars(shares(), "Kept or not", whiskers=["share_keep"]),
        "grid": reconstruction_grid(torch.from_numpy(images), taps),
        "families": family_grid(images[0], {"direct": {TAPS[1]: images[0] / 2}, "linear": {TAPS[0]: images[1]}}),
        "table": picture_table(
            {"one": images, "none": [None, images[0]]}, "Two columns", {"none": ["", "–"]}, ["a", "b"]
        ),
    }


@pytest.mark.parametrize("kind", ["curves", "training", "matrices", "bars", "grid", "families", "table"])
def test_texts_are_readable_and_nothing_is_cut_off(drawn: dict[str, Figure], kind: str) -> None:
    figure = drawn[kind]
    assert figure.get_size_inches()[0] <= 6.5001
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert texts
    assert min(text.get_fontsize() for text in texts) >= 8
    drawn_in = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())  # inches
    width, height = figure.get_size_inches()
    assert drawn_in.x0 > -0.02
    assert drawn_in.y0 > -0.02
    assert drawn_in.x1 < width + 0.02
    assert drawn_in.y1 < height + 0.02


def test_nothing_global_changes() -> None:
    before = dict(matplotlib.rcParams)
    figure = training()
    assert dict(matplotlib.rcParams) == before
    data, size = figure._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert abs(size["width"] - 650) < 20  # a text column, with a little room around it


def test_a_png_is_the_same_every_time_and_carries_its_caption() -> None:
    first, second = png_bytes(training()), png_bytes(training())
    assert first == second
    with Image.open(io.BytesIO(first)) as image:
        assert set(image.info) == {"dpi", "Title", "Description"}
        assert "train, blocks.0: 1 to 0.1" in image.info["Description"]


def test_every_png_says_what_it_shows(drawn: dict[str, Figure]) -> None:
    for figure in drawn.values():
        with Image.open(io.BytesIO(png_bytes(figure, dpi=50))) as image:
            assert image.info["Title"]
            assert image.info["Description"]


def test_curves_show_the_values_in_forward_order_and_name_each_line_once() -> None:
    axes = by_depth(tidy(), "psnr").axes[0]
    lines = {colors.to_hex(line.get_color()): line for line in axes.lines if line.get_marker() != "None"}
    assert set(lines) == {look_of(name).colour for name in FAMILIES}
    np.testing.assert_allclose(lines[look_of("direct").colour].get_ydata(), [29.0, 26.0, 23.0, 20.0])
    dashed = [line for line in axes.lines if line.get_marker() == "None"]
    assert len(dashed) == len(NULLS)
    assert all(line.is_dashed() for line in dashed)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(TAPS)
    assert sorted(text.get_text() for text in axes.texts) == sorted(look_of(name).label for name in FAMILIES + NULLS)
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert min(np.diff(heights)) > 0.03, "names of lines lie on one another"
    assert axes.get_ylabel() == "PSNR (dB)"


def test_every_target_and_data_set_has_its_own_panel_and_every_measure() -> None:
    figure = by_depth(pd.concat([tidy(), tidy(dataset="photographs"), tidy("x")]), "psnr")
    titles = [axes.get_title(loc="left").replace("\n", " ") for axes in figure.axes]
    assert titles == ["scenes-vit · scenes, test", "scenes-vit · photographs, test", "x · scenes, test"]
    rows = pd.concat([tidy(), tidy().assign(measure="ssim", ceiling=25.0)])
    figure = by_depth(rows, ["ssim", "psnr", "r2"], levels={"on true images": "ceiling"})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["SSIM (1 = identical)", "PSNR (dB)"]
    assert "n = 100 images" in figure.caption
    assert "95 % intervals" in figure.caption


def test_of_many_taps_four_lines_are_drawn() -> None:
    figure = training()
    assert [len(axes.lines) for axes in figure.axes] == [4, 4]
    assert {text.get_text() for axes in figure.axes for text in axes.texts} == {f"blocks.{i}" for i in (0, 3, 5, 8)}


def test_no_step_at_all_has_a_place_on_a_logarithmic_axis() -> None:
    rows = tidy(inverses=("linear",)).assign(steps=[0, 10, 100, 1000])
    axes = curves(rows, "PSNR by steps", "steps", log="x").axes[0]
    assert axes.lines[0].get_xdata()[0] == 0
    assert axes.transData.transform((0, 20))[0] < axes.transData.transform((10, 20))[0]


@pytest.mark.parametrize(
    ("rows", "measure", "named"),
    [
        (tidy(), "pnsr", "psnr"),
        (tidy().drop(columns="value"), "psnr", "value"),
        (pd.concat([tidy(), tidy()]), "psnr", "linear at predictions"),
        (tidy().assign(tap=None), "psnr", "nothing to draw"),
    ],
)
def test_tables_that_would_mislead_are_refused(rows: pd.DataFrame, measure: str, named: str) -> None:
    with pytest.raises(BacksightError, match=named):
        by_depth(rows, measure)


def test_a_matrix_has_the_order_of_the_taps_and_numbers_where_they_fit() -> None:
    axes = matrices(matrix(3), "Each through each").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2"]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[np.nan, 10, 20], [1, np.nan, 21], [2, 12, np.nan]])
    assert [text.get_text() for text in axes.texts] == ["10", "20", "1", "21", "2", "12"]
    assert not matrices(matrix(9), "Each through each").axes[0].texts


def test_stacked_bars_add_up_and_backward_is_the_other_way_round() -> None:
    axes = bars(shares(), "Kept or not", backward=True).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["pred", "dec norm", "enc 0", "backbone"]
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches]
    np.testing.assert_allclose(tops, [0.7] * 4 + [1.0] * 4)


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


def test_colours_mean_one_thing() -> None:
    inverses = {look_of(name).colour for name in FAMILIES}
    assert not inverses & {look_of(name).colour for name in ("scenes-vit", "scenes-deit", "scenes-swin", "scenes-detr")}
    assert look_of("vit_base_patch16_224").colour == look_of("vit_base_patch16_224").colour
    assert look_of("vit_base_patch16_224").colour not in inverses
    assert inverse_order(["null_mean", "modular", "own", "linear"]) == ["linear", "modular", "own", "null_mean"]


def test_long_tap_names_break_at_their_dots() -> None:
    assert broken("encoder.layers.2", 0.55) == ["encoder", "layers.2"]
    assert broken("blocks.2", 0.55) == ["blocks.2"]
    assert merged_order([["a", "c"], ["a", "b", "c", "d"]]) == ["a", "b", "c", "d"]


def test_short_names_of_taps() -> None:
    names = ["blocks.3", "encoder.layers.1.attn", "layers.0.blocks.1", "patch_embed", "norm"]
    assert [short_tap(name) for name in names] == ["3", "enc 1.attn", "0.1", "embed", "norm"]
