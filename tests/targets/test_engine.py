"""The engine's shortcuts change the cost and nothing else: features from a store, batches in parts, layers redone."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backsight import fit_linear, load_target
from backsight.app.cli import main
from backsight.data.distributed import share
from backsight.data.features import FeatureStore, record_features
from backsight.data.images import batches
from backsight.errors import BacksightError
from backsight.inverses.families import fit
from backsight.inverses.files import load
from backsight.inverses.linear import Request, fit_linear_pairs
from backsight.inverses.networks import LAYERS
from backsight.inverses.ridge import RidgeAccumulator
from backsight.targets.base import Target
from backsight.training.fit import Batch, fit_direct, fit_modular
from backsight.training.loop import _add_gradients, faster_in_bfloat16, recomputing

QUICK = {"steps": 3, "batch_size": 4, "ridge_images": 16, "validation_images": 8, "progress": False}


@pytest.fixture(scope="module")
def vit() -> Target:
    return load_target("scenes-vit", taps="components", pretrained=False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (24, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture(scope="module")
def store(vit: Target, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return record_features(
        vit, images, folder=tmp_path_factory.mktemp("store"), shard_bytes=200_000, dtype="float32", progress=False
    )


def _weights(inverses: dict) -> dict[str, Tensor]:
    return {f"{tap}/{key}": t for tap, each in inverses.items() for key, t in each.state_dict().items()}


def _close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert (tensor - second[key]).norm() <= tolerance * (tensor.norm() + 1e-6), key


def test_inverses_from_a_store_are_those_from_the_images(vit: Target, images: Tensor, store: FeatureStore) -> None:
    """In full precision: the same sample, the same batches, the same maps."""
    _close(_weights(fit_linear(vit, images, progress=False)), _weights(fit_linear(vit, store, progress=False)), 1e-5)
    for trained in (fit_direct, fit_modular):
        plain, read = trained(vit, images, **QUICK), trained(vit, store, **QUICK)
        _close(_weights(plain), _weights(read), 1e-4)


def test_half_precision_hardly_moves_a_linear_inverse(vit: Target, images: Tensor, tmp_path: Path) -> None:
    halves = record_features(vit, images, folder=tmp_path, progress=False)
    assert max(halves.errors.values()) < 1e-3
    plain, read = (fit_linear(vit, each, progress=False) for each in (images, halves))
    for tap in vit.taps:
        assert abs(plain[tap].psnr - read[tap].psnr) < 0.05


def test_a_store_of_other_weights_is_refused(store: FeatureStore) -> None:
    other = load_target("scenes-vit", taps="components", pretrained=False, seed=1)
    with pytest.raises(BacksightError, match="record them anew"):
        fit_linear(other, store, progress=False)


def test_parts_of_a_store(store: FeatureStore, images: Tensor) -> None:
    part = store.subset(slice(1, None, 2))
    assert len(part) == 12
    assert torch.equal(part.image(3), images[7])
    assert torch.equal(part.read([3, 0])[0], images[[7, 1]].float() / 255)
    assert torch.equal(part.subset(slice(2, 4)).read([0])[0], images[5:6].float() / 255)
    drawn = store.drawn(10, seed=3)
    shuffled = next(batches(images, 10, 3, steps=1))
    assert torch.equal(drawn.read(range(10))[0], shuffled)
    assert share(store) is store


def test_features_are_recorded_where_every_image_is_shown_twice(
    vit: Target, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path))
    once = {"steps": 2, "batch_size": 4, "progress": False, "features": "auto"}
    fit("direct", vit, images, images[:8], **once)
    assert not (tmp_path / "features").exists()
    fit("direct", vit, images, images[:8], **{**once, "steps": 12})
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 1


def test_a_batch_in_parts_has_the_gradient_of_the_whole(vit: Target, images: Tensor) -> None:
    recorded = vit.record(images[:6].float() / 255)
    whole = Batch(images[:6], recorded)
    weight = torch.ones(recorded[vit.taps[0]].channels, requires_grad=True)

    def losses(batch: Batch, step: int) -> dict[str, Tensor]:
        assert len(batch.images) == len(batch)
        return {tap: (batch.recorded[tap].values * weight).square().mean() for tap in vit.taps}

    found = []
    for number in (1, 2, 3):
        weight.grad = None
        values = _add_gradients(losses, whole.parts(number), 0, nullcontext)
        found.append((values, weight.grad))
    for values, gradient in found[1:]:
        assert values == pytest.approx(found[0][0], rel=1e-5)
        assert torch.allclose(gradient, found[0][1], rtol=1e-4)
    moved = _weights(fit_modular(vit, images, parts=2, **QUICK))
    assert all((moved[key] != 0).any() for key in moved if key.endswith("head.weight"))


def test_layers_computed_again_give_the_same_inverses(vit: Target, images: Tensor) -> None:
    kept, again = (fit_modular(vit, images, recompute=how, **QUICK) for how in (False, True))
    _close(_weights(kept), _weights(again), 1e-5)


def test_layers_computed_again_keep_fewer_activations(vit: Target, images: Tensor) -> None:
    module = fit_modular(vit, images, **QUICK)[vit.taps[-1]].residual.requires_grad_(True)
    recorded = vit.record(images[:2].float() / 255)[vit.taps[-1]].values
    kept = {}
    for name, layer in (("all", None), ("again", lambda each: isinstance(each, LAYERS))):
        seen: list[int] = []

        def pack(tensor: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(tensor.numel())
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with recomputing({"module": module}, layer), hooks:
            module.blocks(recorded)
        kept[name] = sum(seen)
    assert kept["again"] < 0.5 * kept["all"]
    assert "forward" not in vars(module.blocks[0])  # nothing is left behind


def test_bfloat16_learns_too(vit: Target, images: Tensor) -> None:
    exact, rounded = (fit_modular(vit, images[:8], precision=each, **QUICK) for each in ("float32", "bfloat16"))
    for tap in vit.taps:
        assert all(parameter.dtype == torch.float32 for parameter in rounded[tap].parameters())
        assert torch.allclose(
            torch.tensor(exact[tap].history.loss.to_numpy()),
            torch.tensor(rounded[tap].history.loss.to_numpy()),
            rtol=0.1,
        )


def test_bfloat16_is_chosen_for_wide_modules_of_a_machine_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = torch.nn.Linear(512, 512), torch.nn.Linear(512, 128)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for has in (True, False):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda has=has: {"avx512_bf16": has})
        assert faster_in_bfloat16([narrow, wide]) is has
        assert not faster_in_bfloat16([narrow])


def test_a_module_has_at_most_so_many_layers(vit: Target, images: Tensor) -> None:
    last = vit.taps[-1]
    assert fit_modular(vit, images, depth=2, **QUICK)[last].design.depth == 2
    assert fit_modular(vit, images, depth=99, **QUICK)[last].design.depth == 6


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
        _close({"weight": alone.weight}, {"weight": found[request].weight}, 1e-6)
        assert found[request].alpha >= request.floor


@pytest.mark.parametrize("width", [3, 256, 513])
def test_products_in_float32_and_in_panels_give_the_moments(width: int) -> None:
    """Widths of one panel and of two, odd ones too; a mean of 30 deviations does not spoil the digits."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(900, width, generator=generator) + 30
    outputs = inputs[:, :2] @ torch.randn(2, 4, generator=generator)
    exact = inputs.double() - inputs.double().mean(0)
    for products, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        accumulator = RidgeAccumulator(products)
        for start in range(0, 900, 350):
            accumulator.update(inputs[start : start + 350], outputs[start : start + 350])
        found = accumulator.gram_about(accumulator.input_mean())
        assert torch.equal(accumulator.gram, accumulator.gram.T)
        assert (found - exact.T @ exact).abs().max() <= tolerance * 900


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
