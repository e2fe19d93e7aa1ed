"""Muon's steps are torch's, without its bfloat16; singular values come out near one, whatever the shape."""

import pytest
import torch
from torch import nn

from backsight.training.muon import Muon, orthogonalised

SHAPES = [(6, 9), (9, 6), (6, 9), (7, 7), (1, 5), (12, 1)]


def _matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_the_steps_are_those_of_torch() -> None:
    ours, theirs, start = _matrices(), _matrices(), _matrices()
    muon = Muon(ours, 0.02, 0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        muon.step()
        reference.step()
    for mine, other, first in zip(ours, theirs, start, strict=True):
        moved = (other - first).norm()
        assert moved > 0
        assert (mine - other).norm() < 0.03 * moved  # what bfloat16 rounds


def test_a_matrix_without_a_gradient_stays() -> None:
    still, moving = _matrices()[:2]
    before = still.detach().clone()
    moving.grad = torch.ones_like(moving)
    Muon([still, moving], 0.1, 0.1).step()
    assert torch.equal(still, before)


def test_one_by_one_is_the_same_as_together(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for values in (2**24, 1):
        monkeypatch.setattr("backsight.training.muon.STACKED_VALUES", values)
        matrices = _matrices()
        for number, matrix in enumerate(matrices):
            matrix.grad = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(number))
        Muon(matrices, 0.1, 0.0).step()
        found.append(matrices)
    for together, alone in zip(*found, strict=True):
        assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 64), (2, 1, 8)])
def test_singular_values_come_out_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_gradient_of_zeros_is_a_step_of_zero() -> None:
    assert torch.equal(orthogonalised(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))
