"""Exact and MAP inverses as families: fitted by name, written, found again, and refused where they do not belong."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from targets.examples import small_detector, small_timm
from torch import Tensor

from backsight.app.explorer.seeing import _refuse_another_form
from backsight.app.explorer.view import View
from backsight.errors import BacksightError
from backsight.exact.inverse import ExactInverse, Settings, fit_exact
from backsight.exact.map import MapInverse, MapSettings, Noise, fit_map
from backsight.inverses.families import FAMILIES, fit
from backsight.inverses.files import load, read, read_header, save, write
from backsight.inverses.module import Inverses, header_for
from backsight.targets import PIXELS, Target

TAPS = ["patch_embed", "blocks.1"]
SIZE = (32, 16)


def scenes(count: int, seed: int, size: tuple[int, int] = SIZE) -> Tensor:
    """(B, 3, H, W) smooth random pictures."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear")


@pytest.fixture(scope="module")
def target() -> Target:
    return small_timm("ViT", img_size=SIZE).select(TAPS)


@pytest.fixture(scope="module")
def exact(target: Target) -> dict[str, ExactInverse]:
    return fit("exact", target, scenes(40, 0), scenes(16, 1), progress=False)


@pytest.fixture(scope="module")
def modules(target: Target) -> dict[str, object]:
    return fit("modular", target, scenes(40, 0), scenes(16, 1), steps=1, batch_size=4, progress=False)


@pytest.fixture(scope="module")
def mapped(target: Target, modules: dict[str, object]) -> dict[str, MapInverse]:
    some = target.select(["blocks.1"])
    return fit("map", some, scenes(40, 0), scenes(16, 1), modules=modules, progress=False)


@pytest.fixture(scope="module")
def wanted(target: Target, exact: dict[str, ExactInverse], mapped: dict[str, MapInverse]) -> dict[str, Tensor]:
    """{family: images from blocks.1}, before anything was written."""
    recorded = target.record(scenes(2, 2))["blocks.1"]
    return {family: made["blocks.1"](recorded) for family, made in (("exact", exact), ("map", mapped))}


@pytest.fixture(scope="module")
def folder(
    target: Target,
    exact: dict[str, ExactInverse],
    mapped: dict[str, MapInverse],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    place = tmp_path_factory.mktemp("inverses")
    linear = fit("linear", target, scenes(40, 0), scenes(16, 1), progress=False)
    for made in (mapped, exact, linear):
        save(made, place)
    return place


def changed(path: Path, place: Path, tensors: dict[str, Tensor] | None = None, **said: object) -> Path:
    """A copy of a file with another description or other numbers."""
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["backsight"])
    save_file(tensors or load_file(path), place, {"backsight": json.dumps({**description, **said})})
    return place


def test_files_give_the_same_images_and_headers_in_the_order_of_families(
    target: Target, folder: Path, wanted: dict[str, Tensor]
) -> None:
    found = load(folder, target)
    assert {family: list(taps) for family, taps in found.items()} == {
        "linear": TAPS,
        "exact": TAPS,
        "map": ["blocks.1"],
    }
    assert set(found) <= set(FAMILIES)
    images = scenes(2, 2)
    recorded = target.record(images)
    guess = float((images - scenes(40, 0).mean(0)).square().mean())
    for family, tolerance in (("exact", 1e-5), ("map", 1e-4)):
        made = found[family]["blocks.1"](recorded["blocks.1"])
        torch.testing.assert_close(made, wanted[family], atol=tolerance, rtol=0)
        assert float((made - images).square().mean()) < 0.5 * guess
        header = read_header(folder / f"{family}--blocks.1.safetensors")
        assert header == header_for(target, family, "blocks.1", PIXELS, scenes(40, 0))
    back = found["exact"]["blocks.1"].trace(recorded["blocks.1"])
    there = recorded["patch_embed"].values.double()
    assert float((back.values - there).norm() / there.norm()) < 1e-5


def test_what_was_set_is_set_again(target: Target, exact: dict[str, ExactInverse], tmp_path: Path) -> None:
    settings = Settings(products="derivative", precision=torch.float32, newton=7)
    inverse = ExactInverse(exact["blocks.1"].model, "blocks.1", settings, batch_size=5)
    inverse.header = header_for(target, "exact", "blocks.1", PIXELS)
    loaded = read(write(inverse, tmp_path / "exact.safetensors"), target)
    assert isinstance(loaded, ExactInverse)
    assert (loaded.settings, loaded.batch_size, loaded.reached) == (settings, 5, "patch_embed")
    assert set(loaded.model.starts) == {step.destination for step in loaded.model.walk.steps.values()} - {"norm"}
    assert loaded.model.folding == exact["blocks.1"].model.folding


def test_a_map_inverse_is_told_whole(
    target: Target, mapped: dict[str, MapInverse], modules: dict[str, object], tmp_path: Path
) -> None:
    settings = MapSettings(stages=(1.0, 0.1), steps=1, products=3)
    noise = Noise("gaussian", 0.1)
    linear = fit("linear", target, scenes(40, 0), progress=False)["blocks.1"]
    made = fit_map(target, "blocks.1", linear, scenes(16, 1), noise, settings, checked=2)
    made = replace(made, batch_size=3)
    object.__setattr__(made, "header", header_for(target, "map", "blocks.1", PIXELS))
    path = write(made, tmp_path / "map.safetensors")
    loaded = read(path, target)
    assert isinstance(loaded, MapInverse)
    assert (loaded.noise, loaded.settings, loaded.batch_size) == (noise, settings, 3)
    for name in ("factor", "basis", "gain", "shares"):
        assert torch.equal(getattr(loaded, name), getattr(made, name)), name
    assert made.likelihood.spread is not None
    assert torch.equal(loaded.likelihood.spread, made.likelihood.spread)
    assert torch.equal(loaded.start.wiener, made.start.wiener)
    # A class token and eight patches that share everything: two rows of each.
    assert {len(load_file(path)[name]) for name in ("mean", "wiener", "noise", "spread")} == {2}
    assert mapped["blocks.1"].start.base.source == "blocks.1"
    assert len(mapped["blocks.1"].start.base.modules_in_order) == len(modules)


def test_half_precision_is_half_as_large_and_leads_to_the_same_images(
    target: Target,
    exact: dict[str, ExactInverse],
    mapped: dict[str, MapInverse],
    folder: Path,
    tmp_path: Path,
    wanted: dict[str, Tensor],
) -> None:
    save(exact, tmp_path, half=True)
    save(mapped, tmp_path, half=True)
    found = load(tmp_path, target)
    recorded = target.record(scenes(2, 2))["blocks.1"]
    for family in ("exact", "map"):
        torch.testing.assert_close(found[family]["blocks.1"](recorded), wanted[family], atol=0.02, rtol=0)
        name = f"{family}--blocks.1.safetensors"
        assert (tmp_path / name).stat().st_size < 0.8 * (folder / name).stat().st_size
    kept = load_file(tmp_path / "map--blocks.1.safetensors")
    assert kept["noise"].dtype == torch.float32  # of its size, float16 would make nothing


def test_where_a_step_folds_its_roots_are_chosen_as_before(tmp_path: Path) -> None:
    target = small_timm("ViT", img_size=SIZE)
    for name, parameter in target.model.named_parameters():
        if "blocks.1.mlp.fc" in name and parameter.ndim == 2:
            parameter.data.mul_(40)
    made = fit_exact(target, scenes(20, 0), ["blocks.0", "blocks.1"], count=20, stages=1)
    assert made["blocks.1"].model.folding["blocks.1"] > 0.1
    for tap, inverse in made.items():
        inverse.header = header_for(target, "exact", tap, PIXELS)
    save(Inverses(made), tmp_path)
    loaded = load(tmp_path, target)["exact"]
    assert set(loaded["blocks.1"].model.priors) == {"blocks.1.attn"}
    assert set(loaded["blocks.1"].model.examples) == {"blocks.1"}
    assert not loaded["blocks.0"].model.priors
    recorded = target.record(scenes(1, 2))["blocks.1"]
    found, before = (each["blocks.1"].trace(recorded, to="blocks.1.attn") for each in (loaded, made))
    assert before.reports[0].solution.method.tolist() == found.reports[0].solution.method.tolist()
    torch.testing.assert_close(found.values, before.values, atol=1e-6, rtol=0)


def test_a_detector_leaves_out_what_has_no_step_back_and_says_why(tmp_path: Path) -> None:
    target = small_detector().select(["encoder.layers.1", "decoder.layers.1"])
    images = scenes(20, 0, (64, 64))
    with pytest.warns(UserWarning, match=r"no exact inverse at decoder\.layers\.1\. .*cannot be inverted exactly"):
        made = fit("exact", target, images, progress=False)
    assert list(made) == ["encoder.layers.1"]
    (path,) = save(made, tmp_path)
    recorded = target.record(scenes(2, 2, (64, 64)))["encoder.layers.1"]
    torch.testing.assert_close(read(path, target)(recorded), made["encoder.layers.1"](recorded), atol=1e-4, rtol=0)
    header = {**asdict(read_header(path)), "source": "decoder.layers.1"}
    with pytest.raises(BacksightError, match=r"decoder\.layers\.1 cannot be inverted exactly"):
        read(changed(path, tmp_path / "deeper.safetensors", header=header), target)
    with pytest.raises(BacksightError, match=r"has no exact inverse at any of its taps .*cannot be inverted exactly"):
        fit("exact", target.select(["decoder.layers.1"]), images, progress=False)
    with pytest.raises(BacksightError, match="reads tokens or queries, and predictions holds predictions"):
        fit("map", target.select(["predictions"]), images, images, progress=False)


def test_the_explorer_refuses_tokens_of_another_form() -> None:
    swin = small_timm("Swin")
    recorded = swin.record(scenes(1, 0, swin.image_size), ["layers.0", "layers.1"])
    view = View(family="map", tap="layers.0", inverse_tap="layers.1")
    with pytest.raises(BacksightError, match=r"map inverse of 'layers\.1' reads .* 32 channels, but 'layers\.0' holds"):
        _refuse_another_form(view, "layers.0", recorded)
    _refuse_another_form(replace(view, inverse_tap=""), "layers.0", recorded)
    _refuse_another_form(replace(view, family="modular"), "layers.0", recorded)  # which says so itself


def test_linear_inverses_that_are_there_are_used(target: Target) -> None:
    linear = fit("linear", target, scenes(40, 0), progress=False)
    made = fit("exact", target, scenes(40, 0), linear=linear, progress=False)
    assert made["blocks.1"].model.completion == {"patch_embed": linear["patch_embed"]}


def test_without_held_out_images_there_is_no_map_family(target: Target) -> None:
    with pytest.raises(BacksightError, match="give `validation`"):
        fit("map", target, scenes(40, 0), progress=False)


@pytest.mark.parametrize("family", ["exact", "map"])
def test_damaged_and_foreign_files_are_refused(family: str, target: Target, folder: Path, tmp_path: Path) -> None:
    path, name = folder / f"{family}--blocks.1.safetensors", f"{family}--blocks.1.safetensors"
    short = tmp_path / name
    short.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BacksightError, match="is damaged"):
        read(short, target)
    with pytest.raises(BacksightError, match="is damaged"):
        load(tmp_path, target)
    tensors = load_file(path)
    gone = {key: tensor for key, tensor in tensors.items() if key not in ("wiener", "start.blocks.1.0.0.weight")}
    with pytest.raises(BacksightError, match="does not fit its own header"):
        read(changed(path, tmp_path / "gone.safetensors", gone), target)
    with pytest.raises(BacksightError, match="does not fit its own header"):
        read(changed(path, tmp_path / "settings.safetensors", settings={"steps": 1, "magic": 2}), target)
    with pytest.raises(BacksightError, match="fitted on images of 64 x 64 pixels"):
        read(changed(path, tmp_path / "size.safetensors", image_size=[64, 64]), target)
    other = small_timm("ViT", img_size=SIZE)
    next(other.model.parameters()).data.add_(0.1)
    with pytest.raises(BacksightError, match="load that target, or fit an inverse for this one"):
        read(path, other)


def test_a_target_that_is_not_what_was_fitted_is_refused(target: Target, folder: Path, tmp_path: Path) -> None:
    exact = folder / "exact--blocks.1.safetensors"
    with pytest.raises(BacksightError, match=r"back to blocks\.0, and .* exact from there to patch_embed here"):
        read(changed(exact, tmp_path / "end.safetensors", reached="blocks.0"), target)
    mapped = folder / "map--blocks.1.safetensors"
    tensors = load_file(mapped)
    tensors["mean.counts"] = tensors["mean.counts"] + 1
    with pytest.raises(BacksightError, match="mean has the shape"):
        read(changed(mapped, tmp_path / "more.safetensors", tensors), target)


def test_a_base_that_no_file_can_hold_is_refused(
    target: Target, mapped: dict[str, MapInverse], exact: dict[str, ExactInverse], tmp_path: Path
) -> None:
    made = mapped["blocks.1"]
    nameless = replace(made, start=replace(made.start, base=lambda each: scenes(each.batch, 0)))
    with pytest.raises(BacksightError, match="rests on function, which no file can hold"):
        write(nameless, tmp_path / "map.safetensors")


def test_a_folder_of_one_family_is_found_too(target: Target, folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("exact--*"):
        shutil.copy(path, tmp_path)
    assert list(load(tmp_path, target)) == ["exact"]
