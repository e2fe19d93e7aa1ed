"""Muon's steps are torch's, without its bfloat16; singular values come out near one, whatever the shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backsight.training.muon import Group, optimizers, orthogonalised, step_all

SHAPES = [(6, 9), (9, 6), (6, 9), (7, 7), (1, 5), (12, 1), (4, 2, 3, 3)]


def _module(shapes=SHAPES) -> nn.ParameterList:
    generator = torch.Generator().manual_seed(0)
    return nn.ParameterList([nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes])


@pytest.mark.parametrize("stacked", [2**24, 1])
def test_the_steps_are_those_of_torch(stacked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one matrix at a time; a kernel is a matrix of its outputs."""
    monkeypatch.setattr("backsight.training.muon.STACKED_VALUES", stacked)
    ours, theirs, start = _module(), [nn.Parameter(p.detach().flatten(1).clone()) for p in _module()], _module()
    stepping = optimizers(ours.named_parameters(), 0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.flatten(1).clone()
        step_all(stepping, 0.02)
        reference.step()
    for mine, other, first in zip(ours, theirs, start, strict=True):
        moved = (other - first.flatten(1)).norm()
        assert moved > 0
        assert (mine.flatten(1) - other).norm() < 0.03 * moved  # what bfloat16 rounds


def test_a_parameter_without_a_gradient_stays() -> None:
    module = _module([(3, 4), (5,), (4, 3), (6,)])
    before = [parameter.detach().clone() for parameter in module]
    module[0].grad, module[1].grad = torch.ones(3, 4), torch.ones(5)
    step_all(optimizers(module.named_parameters(), 0.1), 0.1)
    assert [torch.equal(p, b) for p, b in zip(module, before, strict=True)] == [False, False, True, True]


def test_a_group_decides_optimizer_rate_and_decay() -> None:
    module = _module([(3, 4), (3, 4), (3, 4)])
    groups = {"0": Group(False, decay=0), "1": Group(False, rate=0.1, decay=0), "2": Group(True)}
    stepping = optimizers(module.named_parameters(), 0.5, lambda name, parameter: groups[name])
    before = [parameter.detach().clone() for parameter in module]
    for parameter in module:
        parameter.grad = torch.ones_like(parameter)
    step_all(stepping, 0.01)
    moved = [(p - b).abs().mean().item() for p, b in zip(module, before, strict=True)]
    assert moved[0] == pytest.approx(0.01, rel=1e-3)  # AdamW's first step is the rate
    assert moved[1] == pytest.approx(0.001, rel=1e-2)
    assert moved[2] not in moved[:2]


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 64), (2, 1, 8)])
def test_singular_values_come_out_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_gradient_of_zeros_is_a_step_of_zero() -> None:
    assert torch.equal(orthogonalised(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


@pytest.mark.parametrize("inputs", [32, 384, 1296])
def test_the_first_step_of_a_zero_head_moves_what_it_makes_by_a_bounded_amount(inputs: int) -> None:
    """However much it reads: otherwise a wide head destroys the start that it is added to."""
    module = nn.ModuleDict({"head": nn.Linear(inputs, 2)})
    head, x = module["head"], torch.ones(4, inputs)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    (head(x) - 1).square().mean().backward()
    step_all(optimizers(module.named_parameters(), 0.0), 0.001)
    assert 0.03 < head(x).max() < 0.3
