"""Inverse modules, chains of them and their files: untrained they are the closed form, and ends must meet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from inverses.recorded import FORMS, Recorded, filled, pictures
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import backsight
from backsight.errors import BacksightError
from backsight.inverses.files import load, read, read_header, save
from backsight.inverses.linear import LinearInverse, Request, fit_linear_pairs
from backsight.inverses.module import Chain, InverseHeader, Inverses, Moments, TrainedInverse
from backsight.inverses.networks import Upsampling, design_for
from backsight.inverses.rows import form_of
from backsight.representation import Form, Queries, Representation, Tokens
from backsight.targets import load_target
from backsight.targets.base import Stage, seeded

PIXELS = Form("pixels", 3, ((17, 25),))
QUERIES = Form("queries", 6, count=4)
REQUEST = Request("late", "early", 3)


def module(
    source: Form,
    destination: Form,
    stage: Stage | None = None,
    linear: LinearInverse | None = None,
    ends: tuple[str, str] = ("late", "early"),
    trained: bool = False,
    position: Tensor | None = None,
) -> TrainedInverse:
    """trained: with a last layer that is not zero any more."""
    moments = [
        Moments(torch.zeros(form.prefix + 1, form.channels), torch.ones(form.prefix + 1, form.channels), 1.0)
        for form in (source, destination)
    ]
    with seeded(0):
        design = design_for(source, destination, stage, positioned=position is not None)
        header = InverseHeader("modular", "recorded", "none", "0", *ends)
        inverse = TrainedInverse(header, design, linear, *moments, position)
        if trained:
            for name, parameter in inverse.residual.named_parameters():
                if "head" in name and parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.1)
    return inverse.eval().requires_grad_(False)


STAGES = [Stage("blocks", 1, 3, 16), Stage("convolution", 1, 0, 0), Stage("encoder", 2, 2, 16), Stage("norm", 1, 0, 0)]


@pytest.mark.parametrize("source", FORMS)
def test_every_form_of_tokens_has_a_module_to_every_other_which_starts_as_the_map(source: str) -> None:
    late, images = filled(FORMS[source]), pictures(12, 17, 25)
    for number, form in enumerate(FORMS.values()):
        target = Recorded(late=late, early=filled(form, seed=1))
        linear = fit_linear_pairs(target, images, [REQUEST], progress=False)[REQUEST]
        stage = STAGES[number % len(STAGES)]
        torch.testing.assert_close(
            module(FORMS[source], form, stage, linear).raw(late.index(0)).values, linear(late.index(0)).values
        )
        learned = module(FORMS[source], form, stage, linear, trained=True)
        assert form_of(learned(late)) == form
        assert not torch.allclose(learned(late).values, linear(late).values)
    whole = module(FORMS[source], PIXELS, trained=True)
    assert whole(late.index(0)).shape == (1, 3, 17, 25)
    asked = module(QUERIES, FORMS[source], Stage("decoder", 1, 3, 16), trained=True)
    assert form_of(asked(filled(QUERIES))) == FORMS[source]


@pytest.mark.parametrize(
    ("source", "destination", "stage", "kind"),
    [
        (QUERIES, PIXELS, None, "set_upsampling"),
        (QUERIES, QUERIES, Stage("decoder", 2, 2, 16), "queries"),
        (QUERIES, QUERIES, Stage("norm", 1, 0, 0), "mlp"),
        (Form("predictions", 9, count=4), QUERIES, Stage("heads", 1, 0, 0), "mlp"),
        (QUERIES, Form("queries", 8, count=7), None, "decoder"),
    ],
)
def test_sets_have_modules_too(source: Form, destination: Form, stage: Stage | None, kind: str) -> None:
    inverse = module(source, destination, stage, trained=True)
    assert inverse.design.kind == kind
    result = inverse.residual(Queries(torch.rand(2, source.count, source.channels)), None)
    assert result.shape[-1] == destination.channels or result.shape[1:] == (3, 17, 25)


def test_a_cell_of_many_channels_is_gathered_whole() -> None:
    """A closed-form map reads more than 4096 values through directions, which a trained one has none of."""
    fine, coarse = Form("tokens", 1100, ((4, 4),)), Form("tokens", 6, ((2, 2),))
    assert form_of(module(fine, coarse, Stage("convolution", 1, 0, 0), trained=True)(filled(fine, 2))) == coarse


def test_no_module_runs_with_the_forward_pass() -> None:
    with pytest.raises(BacksightError, match="against the forward pass"):
        design_for(FORMS["levels"], QUERIES)


@pytest.mark.parametrize(
    ("grid", "patch", "size"), [((3, 5), (4, 4), (12, 20)), ((2, 3), (6, 2), (11, 6)), ((4, 4), (7, 9), (23, 35))]
)
def test_upsampling_reaches_any_size(grid: tuple[int, int], patch: tuple[int, int], size: tuple[int, int]) -> None:
    network = Upsampling(Form("tokens", 8, (grid,), 1), 3, size, patch, 32, 1)
    assert network(Tokens(torch.rand(1, 1 + grid[0] * grid[1], 8), (grid,), 1)).shape == (1, 3, *size)


def test_a_decoder_reads_other_grids_than_it_was_trained_on() -> None:
    form, images = FORMS["class token"], pictures(12)
    target = Recorded(late=filled(form))
    linear = backsight.fit_linear(target, images, progress=False).module("late")
    decoder = module(form, Form("pixels", 3, ((8, 12),)), None, linear, trained=True)
    assert decoder(Tokens(torch.rand(2, 1 + 35, 8), ((5, 7),), 1)).shape == (2, 3, 10, 14)
    with pytest.raises(BacksightError, match="same form"):
        decoder(filled(FORMS["one grid"]))


@pytest.mark.parametrize("kind", ["blocks", "encoder"])
@pytest.mark.parametrize("ends", [("one grid", "one grid"), ("one grid", "finer"), ("levels", "other levels")])
def test_padding_is_not_looked_at(ends: tuple[str, str], kind: str) -> None:
    source, destination = FORMS[ends[0]], FORMS[ends[1]]
    hidden = [torch.zeros(2, height, width, dtype=torch.bool) for height, width in source.grids]
    for each in hidden:
        each[:, :, each.shape[2] // 2 :] = True
    padding = torch.cat([each.flatten(1) for each in hidden], dim=1)
    late = filled(source, 2, padding)
    noise = late.replace(late.values.masked_fill(padding[..., None], 1e3))
    inverse = module(source, destination, Stage(kind, 2, 2, 16), trained=True)
    one, other = inverse(late), inverse(noise)
    seen = ~nn.functional.pad(one.padding, (destination.prefix, 0))
    assert torch.isfinite(one.values).all()
    torch.testing.assert_close(one.values[seen], other.values[seen])


def test_an_inverse_of_queries_never_reads_the_context_and_brings_the_stored_code() -> None:
    code = torch.rand(1, 24, 8)
    inverse = module(QUERIES, FORMS["one grid"], Stage("decoder", 1, 2, 16), trained=True, position=code)
    queries = filled(QUERIES, 2)
    assert torch.equal(inverse(queries).position, code)
    context = Queries(queries.values, filled(FORMS["one grid"], 2))
    assert torch.equal(inverse(context).values, inverse(queries).values)


# Chains and families


def chained(*forms: Form, family: str = "modular") -> dict[str, TrainedInverse]:
    """{tap: module} from the last form down to the first: tap 0 ends in pixels."""
    modules = {}
    for number, form in enumerate(forms):
        end = (PIXELS, "pixels") if number == 0 else (forms[number - 1], str(number - 1))
        modules[str(number)] = module(form, end[0], ends=(str(number), end[1]), trained=True)
    return modules


def test_a_family_maps_every_tap_to_an_image_and_gives_the_stage_alone() -> None:
    forms = [FORMS["class token"], FORMS["finer"], QUERIES]
    inverses = Inverses(chained(*forms))
    assert (list(inverses), len(inverses), inverses.family, inverses.target) == (
        ["0", "1", "2"],
        3,
        "modular",
        "recorded",
    )
    given: dict[str, Representation] = {str(number): filled(form, 2) for number, form in enumerate(forms)}
    for tap, inverse in inverses.items():
        images = inverse(given[tap])
        assert images.shape == (2, 3, 17, 25)
        assert 0 <= images.min() <= images.max() <= 1
    assert form_of(inverses.module("2")(given["2"])) == forms[1]
    torch.testing.assert_close(inverses["1"](inverses.module("2")(given["2"])), inverses["2"](given["2"]))
    assert "3" not in inverses
    assert inverses.get("3") is None
    with pytest.raises(KeyError, match="no modular inverse of '3'"):
        inverses["3"]


def test_chain_ends_must_meet() -> None:
    modules = chained(FORMS["class token"], FORMS["finer"])
    with pytest.raises(BacksightError, match="start '7'"):
        Chain(modules, "7")
    with pytest.raises(BacksightError, match="breaks at '0'"):
        Chain(modules | {"0": module(FORMS["finer"], PIXELS, ends=("0", "pixels"))}, "1")
    other = module(FORMS["class token"], PIXELS, ends=("0", "pixels"))
    other.header = InverseHeader("modular", "recorded", "none", "1", "0", "pixels")
    with pytest.raises(BacksightError, match="different weights"):
        Chain(modules | {"0": other}, "1")


@pytest.fixture(scope="module")
def target() -> backsight.targets.Target:
    return load_target("scenes-vit", ["patch_embed", "norm"])


@pytest.fixture(scope="module")
def families(target) -> dict[str, Inverses]:
    """A closed form and a modular family without training."""
    images = torch.rand(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    linear = backsight.fit("linear", target, images, progress=False)
    return {"linear": linear, "modular": backsight.fit("modular", target, images, steps=0, progress=False)}


@pytest.mark.parametrize("half", [False, True])
def test_saved_and_loaded_is_the_same(target, families, tmp_path: Path, half: bool) -> None:
    for inverses in families.values():
        files = save(inverses, tmp_path / inverses.family, half)
        assert [path.name for path in files] == [f"{inverses.family}--{tap}.safetensors" for tap in target.taps]
    state = torch.get_rng_state()
    loaded = load(tmp_path, target)
    assert torch.equal(state, torch.get_rng_state())
    assert list(loaded) == ["linear", "modular"]
    recorded = target.record(torch.rand(2, 3, 64, 64))
    for family, inverses in loaded.items():
        assert list(inverses) == list(target.taps)
        for tap, inverse in inverses.items():
            expected = families[family][tap](recorded[tap])
            torch.testing.assert_close(inverse(recorded[tap]), expected, atol=0.02 if half else 0, rtol=0)
            assert inverses.module(tap).header == families[family].module(tap).header
            path = tmp_path / family / f"{family}--{tap}.safetensors"
            assert read_header(path).source == tap
            dtypes = {tensor.dtype for tensor in load_file(path).values()}
            assert (torch.float16 in dtypes) == half
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]  # nothing half-written stays


def changed(path: Path, place: Path, tensors: dict[str, Tensor] | None = None, **said: object) -> Path:
    """A copy of a file with another description or other numbers."""
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["backsight"])
    save_file(tensors or load_file(path), place, {"backsight": json.dumps({**description, **said})})
    return place


def test_files_that_cannot_be_read_say_why(target, families, tmp_path: Path) -> None:
    path = save(families["modular"], tmp_path / "whole")[0]
    place = tmp_path / "modular--patch_embed.safetensors"
    with pytest.raises(BacksightError, match=r"newer backsight \(format 99"):
        read(changed(path, place, format=99), target)
    with pytest.raises(BacksightError, match=r"older backsight \(format 1"):
        load(changed(path, place, format=1).parent, target)
    tensors = load_file(path)
    name = next(iter(tensors))
    with pytest.raises(BacksightError, match="NaN"):
        read(changed(path, place, tensors | {name: tensors[name] * torch.nan}), target)
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["backsight"])
    unknown = description["configuration"] | {"design": description["configuration"]["design"] | {"magic": 2}}
    with pytest.raises(BacksightError, match="magic"):
        read(changed(path, place, configuration=unknown), target)
    with pytest.raises(BacksightError, match="'fairy'"):
        read(changed(path, place, kind="fairy"), target)
    with pytest.raises(BacksightError, match="does not fit"):
        read(changed(path, place, {key: tensor for key, tensor in tensors.items() if key != name}), target)
    with pytest.raises(BacksightError, match="There is no inverse"):
        read(tmp_path / "none.safetensors", target)
    save_file(tensors, place)
    with pytest.raises(BacksightError, match="no inverse of backsight"):
        read(place, target)
    place.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BacksightError, match="damaged"):
        read(place, target)
    place.unlink()
    with pytest.raises(BacksightError, match="weights"):
        read(path, target.untrained(0))
    with pytest.raises(BacksightError, match="load that target"):
        load(tmp_path, target.untrained(0))
    with pytest.raises(BacksightError, match="not a folder"):
        load(tmp_path / "absent", target)


def test_an_unknown_family_is_refused_with_the_nearest_names(target) -> None:
    with pytest.raises(BacksightError, match="nearest: linear"):
        backsight.fit("lineer", target, pictures(4))
    with pytest.raises(TypeError, match="'leaning_rate'; nearest: learning_rate"):
        backsight.fit("linear", target, pictures(4), leaning_rate=1.0)


def test_the_shipped_inverses_are_read_and_see_the_picture(target) -> None:
    whole = load_target("scenes-vit")
    image = backsight.picture("chelsea", whole.image_size)
    recorded = whole.record(image)
    for inverses in load(Path(backsight.__file__).parents[2] / "data/weights/scenes-vit/inverses", whole).values():
        error = {tap: float((inverse(recorded[tap]) - image).square().mean()) for tap, inverse in inverses.items()}
        assert error["patch_embed"] < error["norm"] < 0.05
