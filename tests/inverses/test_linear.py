"""Linear inverses: every form of tokens to every other, from one pass, and they find what is linearly there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inverses.recorded import FORMS, Recorded, filled, normal, pictures
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.inverses import linear as fitting
from backsight.inverses.files import load, save
from backsight.inverses.linear import LinearInverse, Request, fit_linear, fit_linear_pairs, side_by_side
from backsight.inverses.ridge import RidgeAccumulator
from backsight.inverses.rows import (
    Layout,
    form_of,
    pack_destination,
    pack_source,
    patchify,
    plan_layout,
    unpack,
    unpatchify,
)
from backsight.representation import Form, Predictions, Queries, Representation, Tokens
from backsight.targets import load_target

GRID, PATCH = (2, 3), (4, 4)  # of pictures of 8 x 12


def tokens_of(maps: Tensor, **extra: object) -> Tokens:
    return Tokens(maps.flatten(2).transpose(1, 2), ((maps.shape[2], maps.shape[3]),), **extra)


def mixed(images: Tensor) -> Tokens:
    """Tokens that hold all of the pixels under them, behind their mean as a class token."""
    tokens = patchify(images, PATCH)
    values = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) @ torch.linalg.qr(normal(48, 48)).Q.float()
    return Tokens(values, (GRID,), 1, position=normal(1, 6, 48, seed=2).float())


def r2(inverse: LinearInverse, source: Representation, truth: Tensor | Representation) -> float:
    errors, totals = fitting.image_errors(inverse, source, truth)
    return 1 - float(errors.sum() / totals.sum())


# Rows


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 13), st.integers(1, 13), st.integers(1, 5), st.integers(1, 5))
def test_patches_return_every_pixel(height: int, width: int, rows: int, columns: int) -> None:
    images = torch.rand(2, 3, height, width)
    grid = (-(-height // rows), -(-width // columns))
    tokens = patchify(images, (rows, columns))
    assert tokens.shape == (2, grid[0] * grid[1], 3 * rows * columns)
    assert torch.equal(unpatchify(tokens, grid, (rows, columns), (height, width)), images)


def test_patches_are_in_the_order_of_unfold() -> None:
    images = pictures(2)
    assert torch.equal(patchify(images, PATCH), nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2))
    with pytest.raises(ValueError, match="do not fill"):
        unpatchify(patchify(images, PATCH), (3, 3), PATCH)


def sizes(layout: Layout, name: str = "cells") -> tuple[int, int]:
    """Values in a row of the inputs and of the outputs, directions aside."""
    ends = [
        torch.zeros(1, form.channels, *form.grids[0]) if form.kind == "pixels" else filled(form, 1)
        for form in (layout.source, layout.destination)
    ]
    block = layout.blocks[name]
    return pack_source(ends[0], block).shape[1], pack_destination(ends[1], layout, block).shape[1]


def test_what_rows_read_and_give() -> None:
    coarse, fine = Form("tokens", 16, ((4, 6),)), Form("tokens", 8, ((8, 12),))
    split = plan_layout(coarse, fine, context=3)
    assert sizes(split) == (9 * 16, 4 * 8)
    gathered = plan_layout(fine, coarse, context=3)
    assert sizes(gathered) == (4 * 8, 16)
    assert plan_layout(fine, coarse, maximum_inputs=20).blocks["cells"].directions == 5
    levels = Form("tokens", 16, ((2, 3), (8, 12), (4, 6)))  # in any order
    whole = plan_layout(levels, Form("pixels", 3, ((64, 96),)), (32, 32))
    assert (whole.blocks["cells"].level, sizes(whole)[0], whole.patches) == (1, 48, ((8, 8),))
    apart = plan_layout(levels, levels)
    assert [sizes(apart, name)[0] for name in apart.blocks] == [16, 16, 16]
    photograph = Form("pixels", 3, ((224, 224),))
    token = plan_layout(Form("tokens", 768, ((1, 1),)), photograph)
    assert token.patches == ((28, 28),)
    queries = plan_layout(Form("queries", 256, count=100), Form("pixels", 3, ((480, 640),)))
    assert (queries.directions, sizes(queries, "set")[1]) == (40, 3 * 30 * 40)


@pytest.mark.parametrize("channels", [64, 384, 768, 2048])
def test_a_context_never_shrinks_with_the_width(channels: int) -> None:
    form = Form("tokens", channels, ((14, 14),), 1)
    layout = plan_layout(form, form, context=3)
    assert layout.blocks["cells"].context == 3
    assert (layout.directions or channels) == min(channels, 128)


@pytest.mark.parametrize(("size", "grid"), [((8, 12), GRID), ((7, 10), GRID), ((7, 10), (7, 7)), ((9, 9), (4, 5))])
def test_images_of_any_size_are_rows_of_any_grid(size: tuple[int, int], grid: tuple[int, int]) -> None:
    """Exactly, where patches side by side make them; else nearly, for smooth images, on a canvas of whole patches."""
    images = nn.functional.interpolate(pictures(2, 2, 2), size, mode="bilinear")
    source = Tokens(torch.zeros(2, grid[0] * grid[1], 5), (grid,))
    layout = plan_layout(form_of(source), form_of(images), PATCH)
    whole = unpack({"cells": pack_destination(images, layout, layout.blocks["cells"])}, layout, source, None)
    torch.testing.assert_close(whole, images, atol=0.12 if grid in ((7, 7), (4, 5)) else 0, rtol=0)


# Fits


def test_one_pass_for_all_taps_and_the_third_argument_is_the_validation() -> None:
    images = pictures(90)
    target = Recorded(early=mixed(images), late=mixed(images))
    inverses = fit_linear(target, images[:70], images[70:], batch_size=32, progress=False)
    assert list(inverses) == ["early", "late"]
    assert target.passes == [32, 32, 6, 20]
    target = Recorded(early=mixed(images), late=mixed(images))
    requests = [("early", "pixels"), Request("late", "early", 3, 1e-2), ("late", "early")]
    fitted = fit_linear_pairs(target, images, requests, batch_size=32, progress=False)
    assert (target.passes, list(fitted)) == ([32, 32, 26], requests)
    assert fitted[requests[1]].maps["cells"].alpha >= 1e-2 > fitted[requests[2]].maps["cells"].alpha


def test_a_few_tokens_of_many_images_are_enough(monkeypatch) -> None:
    """Rows are drawn before they are laid out, for each value that a row reads, and the map is nearly the same."""
    maps, kernel = normal(400, 5, 6, 7).float(), normal(4, 5, 3, 3, seed=1).float()
    target = Recorded(late=tokens_of(maps), early=tokens_of(nn.functional.conv2d(maps, kernel, padding=1)))
    pair, rows = Request("late", "early", 3), []
    original = RidgeAccumulator.update
    monkeypatch.setattr(RidgeAccumulator, "update", lambda self, *x: rows.append(len(x[0])) or original(self, *x))
    monkeypatch.setattr(fitting, "CHEAP", 0)
    fitted = fit_linear_pairs(target, pictures(400), [pair], rows_per_input=40, progress=False)[pair]
    assert sum(rows) == 400 * -(-40 * 45 // 400)
    assert r2(fitted, target.every["late"], target.every["early"]) > 1 - 1e-5


def test_taps_that_each_hold_a_half_are_read_together(tmp_path: Path) -> None:
    """Neither half says more than itself, both side by side say all, and the file comes back."""
    images = pictures(216)
    whole, rest = mixed(images), images[156:]
    halves = {tap: whole.replace(whole.values[..., part::2]) for part, tap in enumerate(("even", "odd"))}
    target = Recorded(**halves, coarse=tokens_of(torch.zeros(216, 8, 1, 3)))
    name = "even+odd"
    inverses = fit_linear(target, images[:156], rest, together=["even", "odd"], progress=False)
    assert list(inverses) == [name]
    held = {tap: half.index(torch.arange(156, 216)) for tap, half in halves.items()}
    assert r2(inverses[name], side_by_side(held, name), rest) > 1 - 1e-6
    save(inverses, tmp_path)
    loaded = load(tmp_path, target)["linear"]
    torch.testing.assert_close(loaded[name](side_by_side(held, name)), rest, atol=1e-3, rtol=0)
    target.done = 0
    with pytest.raises(BacksightError, match=r"even .*2 x 3 .* coarse .*1 x 3"):
        fit_linear(target, images[:156], together=["even", "coarse"], progress=False)


def test_an_invertible_tap_is_inverted_and_an_unrelated_one_is_not() -> None:
    images = pictures(216)
    tokens = mixed(images)
    unrelated = tokens.replace(torch.sin(1e5 * tokens.values))
    target = Recorded(mixed=tokens, unrelated=unrelated, shuffled=tokens.index(torch.arange(216).roll(1)))
    inverses = fit_linear(target, images[:156], images[156:], progress=False)
    held_out = torch.arange(156, 216)
    shares = {tap: r2(inverse, target.every[tap].index(held_out), images[156:]) for tap, inverse in inverses.items()}
    assert shares["mixed"] > 1 - 1e-6
    assert max(abs(shares["unrelated"]), abs(shares["shuffled"])) < 0.1
    torch.testing.assert_close(inverses["mixed"](tokens), images, atol=1e-3, rtol=0)


def test_the_fit_is_the_regression_of_the_stored_features() -> None:
    images = pictures(70)
    lossy = mixed(images).replace(mixed(images).values[..., :16])
    inverse = fit_linear(Recorded(lossy=lossy), images[:50], images[50:], batch_size=16, progress=False)["lossy"]
    moments = RidgeAccumulator()
    moments.update(lossy.patches[:50].flatten(0, 1), patchify(images[:50], PATCH).flatten(0, 1))
    weight, bias = moments.solve(inverse.maps["cells"].alpha)
    cells = inverse.maps["cells"]
    torch.testing.assert_close(cells.matrix.double(), weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((cells.bias - cells.center @ cells.matrix).double(), bias, rtol=1e-4, atol=1e-5)
    new = images[50:]
    error = (inverse.raw(lossy.index(slice(50, 70))) - new).square().sum()
    total = (patchify(new, PATCH) - patchify(images[:50], PATCH).mean((0, 1))).square().sum()
    assert r2(inverse, lossy.index(slice(50, 70)), new) == pytest.approx(1 - float(error / total), abs=1e-5)


@pytest.mark.parametrize("source", FORMS)
def test_every_form_of_tokens_has_a_map_to_every_other(source: str) -> None:
    """And to pixels, and from queries; it is the same map after it was described and built again."""
    late, images = filled(FORMS[source]), pictures(12, 17, 25)
    others = {f"early {number}": filled(form, seed=1) for number, form in enumerate(FORMS.values())}
    asked = filled(Form("queries", 6, count=4))
    target = Recorded(late=late, asked=asked, **others)
    pairs = [("late", tap) for tap in others] + [("late", "pixels"), ("asked", "late"), ("asked", "pixels")]
    fitted = fit_linear_pairs(target, images, [Request(*pair, 3) for pair in pairs], progress=False)
    for (start, end, *_), inverse in fitted.items():
        given = target.every[start].index(0)
        result = inverse.raw(given)
        assert form_of(result) == (Form("pixels", 3, ((17, 25),)) if end == "pixels" else form_of(target.every[end]))
        built = LinearInverse.build(json.loads(json.dumps(inverse.configuration())), target)
        built.load_state_dict(inverse.state_dict())
        values = [each if isinstance(each, Tensor) else each.values for each in (result, built.raw(given))]
        assert torch.equal(*values)


def test_tokens_to_tokens_carry_what_travels_with_them() -> None:
    images = pictures(300)
    tokens = mixed(images)
    lossy, alone = (
        Tokens(tokens.values[..., :16], (GRID,), 1),
        Tokens(tokens.patches, (GRID,), 0, None, tokens.position),
    )
    target = Recorded(mixed=tokens, lossy=lossy, alone=alone)
    fitted = fit_linear_pairs(
        target, images, [("mixed", "lossy"), ("lossy", "mixed"), ("alone", "mixed"), ("mixed", "alone")], progress=False
    )
    torch.testing.assert_close(fitted["mixed", "lossy"](tokens).values, lossy.values, atol=1e-3, rtol=0)
    assert fitted["mixed", "lossy"](tokens).position is None
    assert torch.equal(fitted["lossy", "mixed"](lossy).position, tokens.position)  # the source has none: kept
    # The prefix token is the mean of the others, and where the source has none it is found from their mean.
    torch.testing.assert_close(fitted["alone", "mixed"](alone).values, tokens.values, atol=1e-3, rtol=0)
    assert fitted["mixed", "alone"](tokens).position is tokens.position


def test_patch_merging_is_undone_exactly_and_on_other_grids() -> None:
    fine = normal(60, 3, 6, 10).float()
    late = Tokens(patchify(fine, (2, 2)) @ torch.linalg.qr(normal(12, 12, seed=1)).Q.float(), ((3, 5),))
    target = Recorded(late=late, early=tokens_of(fine))
    pairs = [("late", "early"), ("early", "late")]
    fitted = fit_linear_pairs(target, pictures(60), pairs, progress=False)
    torch.testing.assert_close(fitted["late", "early"](late).maps()[0], fine, atol=1e-3, rtol=0)
    torch.testing.assert_close(fitted["early", "late"](tokens_of(fine)).values, late.values, atol=1e-3, rtol=0)
    assert fitted["late", "early"](Tokens(torch.rand(1, 24, 12), ((4, 6),))).grids == ((8, 12),)


@pytest.mark.parametrize("channels", [5, 160])
def test_context_is_a_convolution_in_closed_form(channels: int) -> None:
    """Neighbours of many channels are read through their leading directions, in which all of them may lie."""
    width = 5
    kernel = normal(4, width, 3, 3, seed=1).float()
    maps = normal(50, width, 6, 7, seed=2).float()
    early = nn.functional.conv2d(maps, kernel, padding=1)
    lifted = torch.einsum("bchw,cd->bdhw", maps, normal(width, channels, seed=3).float()) if channels > width else maps
    target = Recorded(late=tokens_of(lifted), early=tokens_of(early))
    pairs = [Request("late", "early", 3), Request("late", "early", 1)]
    wide, alone = fit_linear_pairs(target, pictures(50), pairs, progress=False).values()
    shares = [r2(inverse, target.every["late"], target.every["early"]) for inverse in (wide, alone)]
    assert shares[0] > 1 - 1e-5
    assert shares[1] < 0.5
    torch.testing.assert_close(wide(target.every["late"]).maps()[0], early, atol=0.05, rtol=0)


def test_a_class_token_wider_than_the_images_are_many_does_not_blow_up() -> None:
    """Of 48 images it has 47 directions, of which more were read as rounding makes them."""
    form = Form("tokens", 160, ((3, 3),), 1)
    target = Recorded(late=filled(form, 60), early=filled(form, 60, seed=1))
    request = Request("late", "early", 3)
    inverse = fit_linear_pairs(target, pictures(60), [request], progress=False)[request]
    assert r2(inverse, target.every["late"].index(slice(4, 60, 5)), target.every["early"].index(slice(4, 60, 5))) > -1


@pytest.mark.parametrize(
    "ends", [("one grid", "one grid"), ("finer", "one grid"), ("levels", "other levels"), ("class token", "levels")]
)
def test_padding_is_not_looked_at(ends: tuple[str, str]) -> None:
    source, destination = FORMS[ends[0]], FORMS[ends[1]]
    hidden = [torch.zeros(12, height, width, dtype=torch.bool) for height, width in source.grids]
    for each in hidden:
        each[:, :, each.shape[2] // 2 :] = True
    padding = torch.cat([each.flatten(1) for each in hidden], dim=1)
    pair = Request("late", "early", 3)
    target = Recorded(late=filled(source), early=filled(destination, seed=1))
    inverse = fit_linear_pairs(target, pictures(12), [pair], progress=False)[pair]
    late = filled(source, padding=padding)
    noise = late.replace(late.values.masked_fill(nn.functional.pad(padding, (source.prefix, 0))[..., None], 1e3))
    one, other = inverse(late), inverse(noise)
    torch.testing.assert_close(one.values, other.values)
    assert 0 < one.padding.float().mean() < 1


def test_sets_to_pixels_tokens_and_queries() -> None:
    images = pictures(500)
    queries = (images.flatten(1) @ normal(288, 24, seed=1).float()).unflatten(1, (4, 6))
    every = {
        "decoder": Queries(queries, mixed(images)),
        "mixed": mixed(images),
        "predictions": Predictions(queries[..., :3], queries[..., 2:].sigmoid()),
    }
    pairs = [("decoder", "pixels"), ("decoder", "mixed"), ("predictions", "decoder"), ("predictions", "pixels")]
    fitted = fit_linear_pairs(Recorded(**every), images[:400], pairs, images[400:], progress=False)
    assert fitted["decoder", "pixels"](every["decoder"]).shape == images.shape
    new = slice(400, 500)
    share = r2(fitted["decoder", "pixels"], every["decoder"].index(new), images[new])
    assert 0.03 < share < 24 / 288  # 24 numbers of 288 independent pixels
    tokens = fitted["decoder", "mixed"](every["decoder"])
    assert tokens.form == every["mixed"].form
    assert torch.equal(tokens.position, every["mixed"].position)
    assert fitted["predictions", "decoder"](every["predictions"]).context is None
    predicted = fitted["predictions", "decoder"]
    assert r2(predicted, every["predictions"].index(new), every["decoder"].index(new)) > 0.6
    with pytest.raises(BacksightError, match="No linear map from 1 prefix"):
        fit_linear_pairs(Recorded(**every), images, [("mixed", "decoder")], progress=False)
    few = fit_linear_pairs(Recorded(**every), images, pairs[:1], maximum_inputs=16, progress=False)[pairs[0]]
    assert few.maps["set"].projection.shape == (6, 4)
    assert 0.02 < r2(few, every["decoder"].index(slice(4, 500, 5)), images[4::5]) < share


def test_a_fine_grid_is_drawn_from_and_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = normal(40, 3, 12, 12).float()
    late = Tokens(tokens_of(fine).values @ torch.eye(3).roll(1, 0), ((12, 12),))
    monkeypatch.setattr(fitting, "MAXIMUM_ROWS", 20)
    monkeypatch.setattr(fitting, "PACKED_VALUES", 144 * 3 * 4)
    counts, state = [], torch.get_rng_state()
    original = RidgeAccumulator.update
    monkeypatch.setattr(
        RidgeAccumulator, "update", lambda self, *rows: counts.append(len(rows[0])) or original(self, *rows)
    )
    pair = ("late", "early")
    fitted = fit_linear_pairs(Recorded(late=late, early=tokens_of(fine)), pictures(40), [pair], progress=False)[pair]
    assert torch.equal(state, torch.get_rng_state())
    assert (sum(counts), max(counts)) == (40 * 20, 4 * 20)
    torch.testing.assert_close(fitted(late).maps()[0], fine, atol=1e-3, rtol=0)


def test_gradients_reach_the_representation_and_other_grids_are_read() -> None:
    inverse = fit_linear(Recorded(mixed=mixed(pictures(60))), pictures(60), progress=False)["mixed"]
    values = torch.rand(2, 21, 48, requires_grad=True)
    images = inverse.raw(Tokens(values, ((4, 5),), 1))
    assert images.shape == (2, 3, 16, 20)
    images.sum().backward()
    assert values.grad[:, 1:].abs().min() > 0
    for foreign in (Tokens(torch.rand(1, 6, 16), (GRID,)), Queries(torch.rand(1, 4, 6))):
        with pytest.raises(BacksightError, match="was given"):
            inverse(foreign)


def test_user_errors_are_one_sentence() -> None:
    images = pictures(40)
    target = Recorded(mixed=mixed(images))
    with pytest.raises(TypeError, match="mixed"):
        fit_linear(target, images, ["mixed"])  # type: ignore[arg-type]
    with pytest.raises(BacksightError, match="at least 5 images"):
        fit_linear(target, images[:3], progress=False)
    with pytest.raises(BacksightError, match="at least one tap"):
        fit_linear(target, images, taps=[], progress=False)


def test_a_real_target_is_left_as_it_was() -> None:
    target = load_target("scenes-vit", ["patch_embed"], pretrained=False)
    weights = target.weights_hash
    images = torch.rand(12, 3, 64, 64)
    inverses = fit_linear(target, images, progress=False)
    assert inverses["patch_embed"](target.record(images[:1])["patch_embed"]).shape == (1, 3, 64, 64)
    assert target.weights_hash == weights
