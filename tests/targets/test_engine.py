"""The engine's shortcuts change the cost and nothing else: features from a store, one pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from backsight import fit_linear, load_target
from backsight.app.cli import main
from backsight.app.runner import in_charge_of
from backsight.data.features import FeatureStore, record_features
from backsight.errors import BacksightError
from backsight.inverses.families import fit
from backsight.inverses.files import load
from backsight.inverses.linear import Request, fit_linear_pairs
from backsight.targets.base import Target
from backsight.training.fit import fit_direct, fit_modular

QUICK = {"steps": 3, "batch_size": 4, "ridge_images": 16, "progress": False}


@pytest.fixture(scope="module")
def vit() -> Target:
    return load_target("scenes-vit", taps="components", pretrained=False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (24, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture(scope="module")
def store(vit: Target, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return record_features(vit, images, folder=tmp_path_factory.mktemp("store"), progress=False)


def test_inverses_from_a_store_are_those_from_the_images(vit: Target, images: Tensor, store: FeatureStore) -> None:
    """The same sample, the same batches, the same maps, but for half precision."""
    for trained in (fit_direct, fit_modular):
        plain, read = trained(vit, images, **QUICK), trained(vit, store, **QUICK)
        recorded = vit.record(images[:8].float() / 255)
        for tap in vit.taps:
            assert (plain[tap](recorded[tap]) - read[tap](recorded[tap])).abs().mean() < 0.01


def test_half_precision_hardly_moves_a_linear_inverse(vit: Target, images: Tensor, store: FeatureStore) -> None:
    assert max(store.errors.values()) < 1e-3
    plain, read = (fit_linear(vit, each, progress=False) for each in (images, store))
    for tap in vit.taps:
        shown = images[:8].float() / 255
        errors = [(each[tap](vit.record(shown)[tap]) - shown).square().mean().log10() for each in (plain, read)]
        assert abs(10 * float(errors[0] - errors[1])) < 0.05


def test_a_store_of_other_weights_is_refused(store: FeatureStore) -> None:
    other = load_target("scenes-vit", taps="components", pretrained=False, seed=1)
    with pytest.raises(BacksightError, match="record them anew"):
        fit_linear(other, store, progress=False)


def test_features_are_recorded_where_every_image_is_shown_twice(
    vit: Target, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path))
    once = {"steps": 2, "batch_size": 4, "progress": False, "features": "auto"}
    fit("direct", vit, images, images[:8], **once)
    assert not (tmp_path / "features").exists()
    fit("direct", vit, images, images[:8], **{**once, "steps": 12})
    assert len(list((tmp_path / "features").rglob("index.json"))) == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="computed anew"):
        fit("direct", vit, images, images[:8], **{**once, "steps": 12})
    with pytest.raises(BacksightError, match="cannot be written"):
        fit("direct", vit, images, images[:8], **{**once, "features": "always"})


def test_maps_of_several_contexts_come_from_one_pass(vit: Target, images: Tensor) -> None:
    """The same as apart; and the target is asked for every image once."""
    first = vit.taps[0]
    requests = [Request(first, "pixels"), Request(first, "pixels", 3, 1e-3)]
    seen: list[int] = []
    handle = vit.model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    try:
        found = fit_linear_pairs(vit, images, requests, progress=False)
    finally:
        handle.remove()
    assert sum(seen) == len(images)
    for request in requests:
        alone = fit_linear_pairs(vit, images, [request], progress=False)[request]
        maps = [each.maps["cells"].matrix for each in (alone, found[request])]
        torch.testing.assert_close(*maps, rtol=1e-5, atol=1e-6)
        assert found[request].maps["cells"].alpha >= request.floor


def test_the_command_fit_writes_inverses_that_a_notebook_finds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "inverses"
    command = ["fit", "scenes-vit", "scenes", str(out), "--taps", "components", "--families", "linear,modular"]
    options = ["--steps", "2", "--batch-size", "4", "--train-images", "16", "--validation-images", "8"]
    assert main([*command, *options]) == 0
    assert "4 inverses" in capsys.readouterr().out
    found = load(out, load_target("scenes-vit", taps="components"))
    assert {family: len(taps) for family, taps in found.items()} == {"linear": 2, "modular": 2}
    assert main(["fit", "scenes-vit", "scenes", str(out), "--families", "lineer"]) == 2
    assert "nearest: linear" in capsys.readouterr().err
    assert main(["fit", "scenes-vit", "nowhere", str(out)]) == 2
    before = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    assert main([*command, *options]) == 0  # the same fit takes its own place
    for other in ([*command, "--seed", "1"], [*command, "--random-weights"], ["fit", "scenes-deit", *command[2:]]):
        assert main([*other, *options]) == 2
        assert "with seed 0: name another folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == before
    with in_charge_of(out):
        assert main([*command, *options]) == 2
    assert "another process writes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        *(("--steps", "0"), ("--steps", "-1"), ("--batch-size", "0"), ("--batch-size", "-3"), ("--train-images", "0")),
        *(("--seed", "-1"), ("--seed", "18446744073709551616")),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_fitted(
    tmp_path: Path, option: tuple[str, str], capsys: pytest.CaptureFixture
) -> None:
    assert main(["fit", "scenes-vit", "scenes", str(tmp_path / "inverses"), *option]) == 2
    assert option[0] in capsys.readouterr().err
    assert not (tmp_path / "inverses").exists()
