"""Inverses between grids: stages that merged tokens, several grids, odd sizes, prefix tokens that come late."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.inverses import linear as fitting
from backsight.inverses import networks as residuals
from backsight.inverses.files import read, write
from backsight.inverses.layouts import Form, cut, form_of, join, plan_layout
from backsight.inverses.linear import LinearInverse, fit_linear, fit_linear_pairs
from backsight.inverses.module import Chain, Inverse, InverseHeader, Inverses, Moments
from backsight.inverses.networks import design_for
from backsight.representation import Queries, Representation, Tokens
from backsight.targets.base import Preprocessing, Stage, Target, seeded
from backsight.training.fit import fit_direct, fit_modular, fit_polish, stage_pairs

QUICK = {"steps": 1, "batch_size": 4, "ridge_images": 12, "progress": False}


def images_of(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


class Hierarchy(Target):
    """A target from a module whose forward pass gives {tap: representation}, and from the kinds of its stages."""

    kind = "module"

    def __init__(self, model: nn.Module, stages: Mapping[str, Stage], size: tuple[int, int], deepest: int) -> None:
        self.stages, self.deepest = dict(stages), deepest
        super().__init__(
            model, "hierarchy", Preprocessing((0.5,) * 3, (0.5,) * 3, size), "random", None, list(self.stages)
        )

    @property
    def available_taps(self) -> tuple[str, ...]:
        return tuple(self.stages)

    def tap_set(self, name: str) -> tuple[str, ...]:
        return self.available_taps

    @property
    def reduction(self) -> tuple[int, int]:
        return self.deepest, self.deepest

    def check_size(self, size: tuple[int, int]) -> None:
        pass

    def stage(self, tap: str, previous: str) -> Stage:
        return self.stages[tap]

    def record(self, images: Tensor, taps: Any = None, padding: Any = None, gradient: bool = False) -> dict:
        normalised, _ = self._prepared(images, padding)
        with torch.set_grad_enabled(gradient):
            every = self.model(normalised)
        return {tap: every[tap] for tap in (self.taps if taps is None else self.resolve_taps(taps))}

    def _nothing(self, *arguments: Any) -> Any:
        raise NotImplementedError

    _places = _canonical = _forward = _rest = _randomised = _nothing


class TinySwin(nn.Module):
    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        from timm.models.swin_transformer import SwinTransformer

        self.swin = SwinTransformer(
            img_size=size,
            patch_size=4,
            window_size=4,
            embed_dim=8,
            depths=(1, 2, 1),
            num_heads=(2, 2, 4),
            num_classes=0,
        )

    def forward(self, images: Tensor) -> dict[str, Representation]:
        maps = self.swin.forward_intermediates(images, intermediates_only=True)
        return {f"layers.{number}": grid_tokens(each) for number, each in enumerate(maps)}


def grid_tokens(*maps: Tensor, prefix: Tensor | None = None, **extra: Any) -> Tokens:
    parts = [] if prefix is None else [prefix]
    values = torch.cat([*parts, *(each.flatten(2).transpose(1, 2) for each in maps)], dim=1)
    count = 0 if prefix is None else prefix.shape[1]
    return Tokens(values, tuple((each.shape[2], each.shape[3]) for each in maps), count, **extra)


class Pyramid(nn.Module):
    """A convolutional backbone of three levels, an encoder over all of them, one layer with a token, queries."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 12, 3, 2, 1)
        self.project = nn.ModuleList([nn.Conv2d(8, 16, 1), nn.Conv2d(12, 16, 1), nn.Conv2d(12, 16, 3, 2, 1)])
        self.mix = nn.Linear(16, 16)
        self.queries = nn.Linear(16, 4 * 16)

    def forward(self, images: Tensor) -> dict[str, Representation]:
        one = self.first(images).relu()
        two = self.second(one).relu()
        levels = [layer(each) for layer, each in zip(self.project, (one, two, two), strict=True)]
        code = torch.arange(sum(each[0, 0].numel() for each in levels))[None, :, None] * torch.full((16,), 0.01)
        flat = grid_tokens(*levels, position=code)
        encoded = flat.replace(flat.values + self.mix(flat.values).tanh())
        queries = self.queries(encoded.values.mean(dim=1)).unflatten(1, (4, 16))
        return {
            "backbone.0": grid_tokens(one),
            "backbone.1": grid_tokens(two),
            "encoder.0": flat,
            "encoder.1": encoded,
            "decoder.0": Queries(queries),
        }


PYRAMID_STAGES = {
    "backbone.0": Stage("backbone", 1, 0, 0),
    "backbone.1": Stage("backbone", 1, 0, 0),
    "encoder.0": Stage("encoder", 1, 2, 24),
    "encoder.1": Stage("encoder", 1, 2, 24),
    "decoder.0": Stage("decoder", 1, 2, 24),
}
SWIN_STAGES = {
    "layers.0": Stage("patch_embedding", 1, 2, 32),
    "layers.1": Stage("blocks", 2, 2, 64),
    "layers.2": Stage("blocks", 1, 4, 128),
}


def swin(size: tuple[int, int] = (32, 64)) -> Hierarchy:
    with seeded(0):
        return Hierarchy(TinySwin(size).eval(), SWIN_STAGES, size, 16)


def pyramid(size: tuple[int, int] = (27, 38)) -> Hierarchy:
    with seeded(0):
        return Hierarchy(Pyramid(), PYRAMID_STAGES, size, 8)


TARGETS: dict[str, Callable[[], Hierarchy]] = {
    "swin": swin,
    "pyramid": pyramid,
    "even pyramid": lambda: pyramid((32, 48)),
}
KINDS = {
    "swin": ["upsampling", "splitting", "splitting"],
    "pyramid": ["upsampling", "convolution", "splitting", "encoder", "decoder"],
    "even pyramid": ["upsampling", "convolution", "splitting", "encoder", "decoder"],
}


# --------------------------------------------------------------------------------------------- maps and rows
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 9), st.integers(1, 9))
def test_cut_and_joined_is_the_same_map_for_any_grid(height: int, width: int, rows: int, columns: int) -> None:
    maps = torch.rand(2, 3, height, width)
    patch = (-(-height // rows), -(-width // columns))
    cells = cut(maps, (rows, columns), patch)
    assert cells.shape == (2, rows * columns, 3 * patch[0] * patch[1])
    torch.testing.assert_close(join(cells, (rows, columns), patch, (height, width)), maps)


def test_what_rows_read_and_give() -> None:
    coarse, fine = Form("tokens", 16, ((4, 6),)), Form("tokens", 8, ((8, 12),))
    split = plan_layout(("late", "early"), coarse, fine, context=3)
    assert (split.inputs("patches"), split.outputs("patches")) == (9 * 16, 4 * 8)
    gathered = plan_layout(("late", "early"), fine, coarse, context=3)
    assert (gathered.inputs("patches"), gathered.outputs("patches")) == (4 * 8, 16)
    averaged = plan_layout(("late", "early"), fine, coarse, maximum_inputs=20)
    assert averaged.inputs("patches") == 8
    levels = Form("tokens", 16, ((2, 3), (8, 12), (4, 6)))  # in any order
    image = Form("pixels", 3, ((64, 96),))
    whole = plan_layout(("late", "pixels"), levels, image, (32, 32))
    assert (whole.reading("patches").level, whole.inputs("patches"), whole.patch) == (1, 48, (8, 8))
    apart = plan_layout(("late", "early"), levels, levels)
    assert apart.main == ("patches_0", "patches_1", "patches_2")
    assert [apart.inputs(block) for block in apart.main] == [16, 16, 16]
    photograph = Form("pixels", 3, ((224, 224),))
    large = plan_layout(("late", "pixels"), Form("tokens", 2048, ((7, 7),)), photograph, context=3)
    assert (large.inputs("patches"), large.outputs("patches"), large.pooling) == (2048, 3072, 1)  # context dropped
    token = plan_layout(("late", "pixels"), Form("tokens", 768, ((1, 1),)), photograph)
    assert (token.pooling, token.outputs("patches")) == (8, 3 * 28 * 28)


def tokens_of(form: Form, batch: int = 12, padding: Tensor | None = None, seed: int = 0) -> Representation:
    count = form.count or form.prefix + sum(height * width for height, width in form.grids)
    values = torch.randn(batch, count, form.channels, generator=torch.Generator().manual_seed(seed))
    return Queries(values) if form.kind == "queries" else Tokens(values, form.grids, form.prefix, padding)


def untrained(source: Form, destination: Form, stage: Stage | None, linear: LinearInverse | None = None) -> Inverse:
    moments = [
        Moments(torch.zeros(f.prefix + 1, f.channels), torch.ones(f.prefix + 1, f.channels), 1.0)
        for f in (source, destination)
    ]
    with seeded(0):
        header = InverseHeader("modular", "fake", "none", "0", "late", "early")
        return Inverse(header, design_for(source, destination, stage), linear, *moments).eval()


ENDS = {
    "one grid": Form("tokens", 8, ((4, 6),)),
    "finer": Form("tokens", 6, ((8, 12),)),
    "odd": Form("tokens", 5, ((5, 7),)),
    "wide": Form("tokens", 8, ((2, 12),)),
    "class token": Form("tokens", 8, ((4, 6),), 1),
    "five tokens, coarse": Form("tokens", 12, ((2, 3),), 5),
    "one token": Form("tokens", 10, ((1, 1),)),
    "levels": Form("tokens", 8, ((4, 6), (2, 3), (1, 2))),
    "other levels": Form("tokens", 8, ((8, 12), (4, 6)), 1),
}


class Recorded:
    """Two taps whose representations are given; any image."""

    name, taps, reduction, model = "recorded", ("late", "early"), (2, 2), nn.Identity()

    def __init__(self, late: Representation, early: Representation) -> None:
        self.every, self.done = {"late": late, "early": early}, 0

    def record(self, images: Tensor, taps: list[str]) -> dict[str, Representation]:
        chosen = torch.arange(self.done, self.done + len(images))
        self.done += len(images)
        return {tap: self.every[tap].index(chosen) for tap in taps}


@pytest.mark.parametrize("source", ENDS)
def test_every_form_of_tokens_has_a_map_and_a_module_to_every_other(source: str) -> None:
    """And to pixels, and from queries; the module starts as the map, for one image too."""
    late, images = tokens_of(ENDS[source]), images_of(12, 17, 25)
    stages = [Stage("blocks", 1, 3, 16), Stage("convolution", 1, 0, 0), Stage("encoder", 1, 2, 16), None]
    for number, (name, form) in enumerate(ENDS.items()):
        target = Recorded(late, tokens_of(form, seed=1))
        linear = fit_linear_pairs(target, images, [("late", "early")], progress=False, context=3)["late", "early"]
        made = linear(late.index(0))
        assert form_of(made) == form, name
        stage = stages[number % len(stages)]
        module = untrained(ENDS[source], form, stage, linear)
        torch.testing.assert_close(module.raw(late.index(0)), made.values)
        assert form_of(module(late)) == form
    whole = fit_linear(Recorded(late, late), images, "late", progress=False)["late"]
    assert whole(late.index(0)).shape == (1, 3, 17, 25)
    assert untrained(ENDS[source], Form("pixels", 3, ((17, 25),)), None)(late.index(0)).shape == (1, 3, 17, 25)
    queries = Form("queries", 6, count=4)
    asked = tokens_of(queries)
    linear = fit_linear_pairs(Recorded(asked, late), images, [("late", "early")], progress=False)["late", "early"]
    assert form_of(linear(asked)) == ENDS[source]
    module = untrained(queries, ENDS[source], Stage("decoder", 1, 3, 16), linear)
    torch.testing.assert_close(module(asked).values, linear(asked).values)


def test_sets_of_other_size_have_a_module_and_tokens_come_first() -> None:
    module = untrained(Form("queries", 6, count=4), Form("queries", 8, count=7), None)
    assert module(tokens_of(Form("queries", 6, count=4))).values.shape == (12, 7, 8)
    with pytest.raises(BacksightError, match="against the forward pass"):
        design_for(ENDS["levels"], Form("queries", 8, count=7))


# --------------------------------------------------------------------------------------- what the maps find
def test_patch_merging_is_undone_exactly() -> None:
    fine = torch.randn(60, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    merged = (
        cut(fine, (3, 5), (2, 2)) @ torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1))).Q
    )
    late = Tokens(merged, ((3, 5),))
    target = Recorded(late, grid_tokens(fine))
    fitted = fit_linear_pairs(target, images_of(60, 6, 10), [("late", "early")], progress=False)["late", "early"]
    assert fitted.r2 > 1 - 1e-6
    torch.testing.assert_close(fitted(late).map(), fine, atol=1e-3, rtol=0)
    larger = Tokens(torch.rand(1, 24, 12), ((4, 6),))
    assert fitted(larger).grids == ((8, 12),)


def test_a_fine_grid_is_drawn_from_and_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    late = Tokens(grid_tokens(fine).values @ torch.eye(3).roll(1, 0), ((12, 12),))
    monkeypatch.setattr(fitting, "MAXIMUM_ROWS", 20)
    monkeypatch.setattr(fitting, "PACKED_VALUES", 144 * 3 * 4)
    counts = []
    original = fitting.RidgeAccumulator.update
    monkeypatch.setattr(
        fitting.RidgeAccumulator, "update", lambda self, *rows: counts.append(len(rows[0])) or original(self, *rows)
    )
    state = torch.get_rng_state()
    target = Recorded(late, grid_tokens(fine))
    fitted = fit_linear_pairs(target, images_of(40, 6, 10), [("late", "early")], progress=False)["late", "early"]
    assert torch.equal(state, torch.get_rng_state())
    assert sum(counts) == 40 * 20
    assert max(counts) == 4 * 20
    torch.testing.assert_close(fitted(late).map(), fine, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "ends",
    [
        ("one grid", "one grid"),
        ("one grid", "finer"),
        ("finer", "one grid"),
        ("levels", "levels"),
        ("levels", "other levels"),
        ("class token", "levels"),
    ],
)
def test_padding_is_neither_fitted_nor_looked_at(ends: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    source, destination = ENDS[ends[0]], ENDS[ends[1]]
    hidden = [torch.zeros(12, height, width, dtype=torch.bool) for height, width in source.grids]
    for each in hidden:
        each[:, :, each.shape[2] // 2 :] = True
    padding = torch.cat([each.flatten(1) for each in hidden], dim=1)
    late = tokens_of(source, padding=padding)
    noise = torch.where(torch.nn.functional.pad(padding, (source.prefix, 0))[..., None], 1e3, late.values)
    early = tokens_of(destination, seed=1)
    fits = [
        fit_linear_pairs(Recorded(each, early), images_of(12, 8, 12), [("late", "early")], progress=False, context=3)
        for each in (late, late.replace(noise))
    ]
    clean, noisy = (each["late", "early"] for each in fits)
    made = clean(late)
    torch.testing.assert_close(made.values, noisy(late.replace(noise)).values)
    assert made.padding is not None
    assert 0 < made.padding.float().mean() < 1
    mean = clean.maps[clean.layout.main[0]].get_buffer("bias")
    grid = destination.grids[0]
    last = made.patches[0, grid[0] * grid[1] - 1]
    torch.testing.assert_close(last, mean[: len(last) * (len(mean) // len(last))].reshape(len(last), -1)[:, -1])
    for stage in (Stage("blocks", 2, 2, 16), Stage("encoder", 2, 2, 16)):
        for limit in (1024, 8):  # global attention, then windows
            monkeypatch.setattr(residuals, "GLOBAL_TOKENS", limit)
            module = untrained(source, destination, stage, clean)
            nn.init.normal_(module.residual.head[1].weight)
            one, other = module(late), module(late.replace(noise))
            seen = ~torch.nn.functional.pad(one.padding, (destination.prefix, 0))
            assert torch.isfinite(one.values).all()
            torch.testing.assert_close(one.values[seen], other.values[seen])


@pytest.mark.parametrize(("shifted", "top", "left"), [(False, 8, 16), (True, 4, 12)])
def test_windows_see_their_own_tokens_and_a_summary(monkeypatch, shifted: bool, top: int, left: int) -> None:
    layer = residuals.AttentionLayer(8, 2, 16).eval()
    grids, x, change = ((11, 19), (3, 4)), torch.randn(2, 2 + 221, 8), torch.linspace(-9, 9, 8)
    whole = residuals.attend(layer, x, grids, 2)
    monkeypatch.setattr(residuals, "GLOBAL_TOKENS", 1)
    made = residuals.attend(layer, x, grids, 2, shifted=shifted)
    assert made.shape == whole.shape
    last = 2 + 10 * 19 + 18  # the last cell of the first grid, whose window starts at (top, left)
    changed = x.clone()
    changed[:, last] += change
    assert (residuals.attend(layer, changed, grids, 2, shifted=shifted) != made).any(dim=2).all()  # by the summary …
    changed[:, last - 1] -= change  # … of which this leaves nothing
    moved = (residuals.attend(layer, changed, grids, 2, shifted=shifted) - made).abs().amax(dim=2)
    own = torch.zeros(11, 19, dtype=torch.bool)
    own[top:, left:] = True
    inside, outside = moved[:, 2 : 2 + 209][:, own.flatten()], moved[:, 2 : 2 + 209][:, ~own.flatten()]
    assert inside.min() > 10 * outside.max()
    torch.testing.assert_close(moved[:, 2 + 209 :], torch.zeros(2, 12), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ end to end
@pytest.fixture(scope="module", params=TARGETS)
def fitted(request) -> tuple[str, Hierarchy, Tensor, dict[str, Inverse]]:
    target = TARGETS[request.param]()
    images = images_of(12, *target.image_size)
    return request.param, target, images, fit_modular(target, images, **QUICK).modules


def test_chains_meet_down_to_the_image(fitted, tmp_path) -> None:
    name, target, images, modules = fitted
    assert [module.design.kind for module in modules.values()] == KINDS[name]
    assert all(module.linear is not None for module in modules.values())
    recorded = target.record(images[:1])
    for tap in target.taps:
        assert Chain(modules, tap)(recorded[tap]).shape == (1, 3, *target.image_size)
    last = target.taps[-1]
    for tap, made in Chain(modules, last).intermediate(recorded[last]).items():
        if tap != "pixels":
            assert made.signature == recorded[tap].signature
            assert (getattr(made, "position", None) is None) == (getattr(recorded[tap], "position", None) is None)
    chain = Chain(modules, last)
    loaded = read(write(chain, tmp_path / "chain.safetensors"), target)
    assert torch.equal(loaded(recorded[last]), chain(recorded[last]))


def test_several_levels_end_at_a_tap_that_is_as_fine() -> None:
    target = pyramid()
    forms = {tap: form_of(each) for tap, each in target.record(images_of(1, *target.image_size)).items()}
    assert dict(stage_pairs(target, target.taps, forms)) == {
        "backbone.0": "pixels",
        "backbone.1": "backbone.0",
        "encoder.0": "backbone.0",
        "encoder.1": "encoder.0",
        "decoder.0": "encoder.1",
    }
    target.stages["encoder.0"] = Stage("projection", 0, 0, 0)
    assert dict(stage_pairs(target, target.taps, forms))["encoder.0"] == "pixels"


def test_direct_decoders_and_polish(fitted, tmp_path) -> None:
    _, target, images, modules = fitted
    direct = fit_direct(target, images, **QUICK)
    recorded = target.record(images[:1])
    for tap, inverse in direct.items():
        made = inverse(recorded[tap])
        assert made.shape == (1, 3, *target.image_size)
        loaded = read(write(inverse, tmp_path / f"{tap}.safetensors"), target)
        assert torch.equal(loaded(recorded[tap]), made)
    polished = fit_polish(target, images, modules=Inverses(modules), steps=1, batch_size=6, progress=False)
    assert {module.header.family for module in polished.modules.values()} == {"modular_polished"}
    assert polished.module(target.taps[-1]).header.steps == 2
