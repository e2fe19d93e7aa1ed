"""Many half-steps solved at once: the start decides between roots, known tokens rule one out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backsight.exact.steps import Step
from backsight.studies.joint import solve_joint, through

SQUARE = [
    Step("a", "b", Tensor.square, tokenwise=True, jacobian=lambda x: torch.diag_embed(2 * x))
]  # two roots to every value


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_through_gives_the_last_stream() -> None:
    assert float(through([*SQUARE, *SQUARE], torch.full((1, 1, 1), 3.0))) == 81.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_start_decides_between_roots_and_known_tokens_stay(sign: float) -> None:
    truth = normal(2, 3, 4).abs() + 1
    start = sign * truth * 1.05
    solution = solve_joint(SQUARE, SQUARE, truth.square(), start, precision=torch.float64)
    assert bool(solution.solved.all())
    assert torch.allclose(solution.x, sign * truth, atol=1e-8)
    start[:, :1] = truth[:, :1]
    held = solve_joint(SQUARE, SQUARE, truth.square(), start, 1, precision=torch.float64)
    assert torch.equal(held.x[:, :1], truth[:, :1])


def test_what_cannot_be_reached_is_not_called_solved() -> None:
    y = -normal(2, 3, 4).abs()  # no square
    start = torch.ones_like(y)
    solution = solve_joint(SQUARE, SQUARE, y, start, iterations=5)
    assert not bool(solution.solved.any())
    assert bool((solution.residual > 0.1).all())
    assert bool((solution.residual <= (y - start).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).all())
