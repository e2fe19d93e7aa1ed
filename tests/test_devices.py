"""Every family fits and inverts where the target is: a pretended accelerator finds what is made on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from devices import MixedDevicesError, Pretended
from targets.examples import small_detector, small_timm
from torch import Tensor

import backsight
from backsight.exact.inverse import fit_exact
from backsight.targets.base import Target


def test_the_pretended_device_refuses_what_a_real_one_does() -> None:
    with Pretended() as device:
        there, here = device.mark(torch.arange(6.0), True), torch.arange(6.0)
        assert there.device.type == "cuda"
        assert (2 * there + torch.ones_like(there)).device.type == "cuda"
        assert torch.zeros(2, device=there.device).device.type == "cuda"
        assert there.cpu().device.type == here.to(torch.float64).device.type == "cpu"
        assert (here.to(there) + there + torch.tensor(1.0) + there.new_ones(6))[torch.arange(2)].device.type == "cuda"
        mixtures: list[Callable[[], object]] = [
            lambda: there + here,
            lambda: torch.eye(6) @ there,
            lambda: here[there > 2],
            lambda: torch.zeros(6).index_add_(0, there.long(), there),
            there.numpy,
        ]
        for mixture in mixtures:
            with pytest.raises(MixedDevicesError):
                mixture()


def pictures(target: Target, count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, *target.image_size, generator=torch.Generator().manual_seed(seed))


FAMILIES = {"linear": {}, "direct": {"steps": 2}, "modular": {"steps": 2}, "exact": {"count": 12}, "map": {}}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_works_where_its_target_is(family: str) -> None:
    target = small_timm("ViT", img_size=(32, 16)).select(["patch_embed", "blocks.1"])
    images, validation = pictures(target, 24), pictures(target, 8, 1)
    with Pretended() as device:
        device.put(target.model)
        inverses = backsight.fit(family, target, images, validation, progress=False, **FAMILIES[family])
        recorded = target.record(pictures(target, 2, 2))["blocks.1"]
        assert recorded.values.device.type == "cuda"
        assert inverses["blocks.1"](recorded).device.type == "cuda"
        assert target.device.type == "cuda"


def test_an_exact_inverse_goes_where_it_is_put_with_its_copy_of_the_target() -> None:
    target = small_timm("ViT", img_size=(32, 16))
    inverses = fit_exact(target, pictures(target, 12), taps=["blocks.0", "blocks.1"], stages=1, progress=False)
    recorded = target.record(pictures(target, 2, 2), ["blocks.1"])["blocks.1"]
    here = inverses["blocks.1"](recorded)
    with Pretended() as device:
        there = inverses.to("cuda")["blocks.1"](recorded.replace(recorded.values.cuda()))
        assert there.device.type == "cuda"
        assert torch.allclose(there.cpu(), here, atol=1e-6)
        device.put(target.model)
        assert backsight.exact.steps.ExactModel.of(target).target.device.type == "cuda"
        inverses.to("cpu")
        assert torch.equal(inverses["blocks.1"](recorded), here)


def test_post_norm_chains_are_solved_where_their_target_is() -> None:
    target = small_detector()
    images = pictures(target, 10)
    with Pretended() as device:
        device.put(target.model)
        inverse = fit_exact(target, images, taps=["encoder.layers.0"], stages=2, progress=False)["encoder.layers.0"]
        trace = inverse.trace(target.record(images[:2], ["encoder.layers.0"])["encoder.layers.0"])
        assert trace.values.device.type == trace.solved.device.type == "cuda"
