"""Equations with known solutions: contractions, steep blocks, folds, systems without a root."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backsight.exact.solver import (
    Function,
    Linearised,
    Settings,
    conjugate_gradients,
    differences,
    gmres,
    line_search,
    solve,
    solved,
)

PLAIN = Settings(restarts=0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def of(function: Callable[[Tensor], Tensor]) -> Function:
    return lambda x, _which: function(x)


def mixing(x: Tensor, lipschitz: float = 0.9) -> Tensor:
    """x + f(x), f a network over all values of an image (3 tokens of 4 channels) with this Lipschitz constant."""
    first, second = (torch.linalg.qr(normal(12, 12, seed=seed)).Q.to(x) for seed in (1, 2))
    return x + lipschitz * ((x.flatten(1) @ first).tanh() @ second).view_as(x)


def cubic_root(y: Tensor) -> Tensor:
    """Cardano's real root of x³ + x = y."""
    half, root = y / 2, (y.square() / 4 + 1 / 27).sqrt()
    return (half + root).sign() * (half + root).abs() ** (1 / 3) + (half - root).sign() * (half - root).abs() ** (1 / 3)


def test_a_contraction_is_inverted_exactly() -> None:
    x = normal(5, 3, 4, seed=3)
    solution = solve(of(mixing), mixing(x), [torch.zeros_like(x)], PLAIN)
    assert bool(solution.solved.all())
    assert relative(solution.x, x) < 1e-12


@pytest.mark.parametrize("dense", [False, True])
def test_a_steep_block_is_inverted_to_its_analytic_inverse(dense: bool) -> None:
    y = 30 * normal(6, 1, 3)  # slopes up to 3 x², where a plain fixed-point iteration diverges
    jacobian = (lambda x: torch.diag_embed(1 + 3 * x.square())) if dense else None
    solution = solve(lambda x, _: x + x**3, y, [y], Settings(), jacobian=jacobian)
    assert bool(solution.solved.all())
    assert relative(solution.x, cubic_root(y)) < 1e-12


def test_a_sample_without_a_root_is_marked_and_the_others_are_solved() -> None:
    y = torch.tensor([4.0, -1.0, 9.0], dtype=torch.float64).view(3, 1, 1)
    solution = solve(of(Tensor.square), y, [torch.full_like(y, 1.7)], Settings(restarts=1))
    assert solution.solved.tolist() == [True, False, True]
    assert solution.residual[1] > 0.5
    assert torch.allclose(solution.x[[0, 2], 0, 0].abs(), torch.tensor([2.0, 3.0], dtype=torch.float64))


def test_further_starts_reach_what_the_first_does_not() -> None:
    y = torch.full((2, 1, 1), 4.0, dtype=torch.float64)
    flat = torch.zeros_like(y)  # the derivative of the square vanishes here
    assert not bool(solve(of(Tensor.square), y, [flat], PLAIN).solved.any())
    assert bool(solve(of(Tensor.square), y, [flat, flat + 1], PLAIN).solved.all())


def test_of_two_roots_the_usual_one_is_kept() -> None:
    y = torch.full((3, 1, 1), 4.0, dtype=torch.float64)
    starts = [y, -y]  # lead to 2 and to −2

    def doubt(x: Tensor, which: Tensor) -> Tensor:
        goal = torch.tensor([2.0, -2.0, -2.0], dtype=torch.float64)[which]
        return (x[:, 0, 0] - goal).abs() - 0.1

    chosen = solve(of(Tensor.square), y, starts, PLAIN, doubt=doubt)
    assert chosen.x.flatten().tolist() == pytest.approx([2, -2, -2])
    assert bool(chosen.solved.all())
    assert solve(of(Tensor.square), y, starts, PLAIN).x.flatten().tolist() == pytest.approx([2, 2, 2])


def test_samples_do_not_depend_on_their_batch() -> None:
    x = normal(6, 3, 4, seed=5)
    y = mixing(x, 3.0)
    together = solve(lambda x, _: mixing(x, 3.0), y, [y], PLAIN)
    alone = solve(lambda x, _: mixing(x, 3.0), y[2:3], [y[2:3]], PLAIN)
    assert bool(alone.solved[0]) == bool(together.solved[2])


def test_values_that_are_not_finite_are_refused() -> None:
    y = normal(2, 3, 4)
    with pytest.raises(ValueError, match="not all finite"):
        solve(of(mixing), y * torch.nan, [y])


def test_a_line_search_shortens_steps_and_takes_none_that_rises() -> None:
    x = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    direction = torch.tensor([[-4.0], [1.0]], dtype=torch.float64)  # overshoots; rises
    moved, after = line_search(lambda x, which: x[:, 0].abs(), x, direction, x[:, 0].abs())
    assert after.tolist() == [pytest.approx(0.6), 1.0]
    assert moved.flatten().tolist() == [pytest.approx(-0.6), 1.0]


def test_gmres_agrees_with_the_dense_solution_for_every_sample() -> None:
    matrices = normal(5, 12, 12) / 12**0.5 + torch.eye(12, dtype=torch.float64) * torch.arange(1, 6).view(5, 1, 1)
    right = normal(5, 12, seed=1)
    right[3] = 0
    matrices[4] = 3 * torch.eye(12, dtype=torch.float64)

    used: list[int] = []

    def product(directions: Tensor, which: Tensor) -> Tensor:
        used.extend(which.tolist())
        return torch.bmm(matrices[which], directions[:, :, None])[:, :, 0]

    solution = gmres(product, right, torch.full((5,), 1e-12, dtype=torch.float64), 12)
    assert relative(solution, torch.linalg.solve(matrices, right)) < 1e-9
    assert [used.count(number) for number in (3, 4)] == [0, 1]
    assert 1 < used.count(0) <= 12


def test_conjugate_gradients_end_by_themselves() -> None:
    matrix = normal(2, 6, 6, seed=33)
    matrix = matrix @ matrix.mT + torch.eye(6, dtype=torch.float64)
    right = normal(2, 6, seed=34)

    used: list[Tensor] = []

    def operator(x: Tensor) -> Tensor:
        used.append(x)
        return torch.einsum("bij,bj->bi", matrix, x)

    solution = conjugate_gradients(operator, right, 50, 1e-10)
    assert torch.allclose(solution, torch.linalg.solve(matrix, right), rtol=1e-7)
    assert 1 < len(used) <= 10
    used.clear()
    conjugate_gradients(operator, right, 50, 1e-8, solution)
    assert len(used) == 1


def test_products_are_those_of_the_jacobian() -> None:
    x, u, v = normal(2, 3, 4), normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2)
    here = Linearised(mixing, x)
    jacobian = torch.autograd.functional.jacobian(lambda one: mixing(one[None])[0], x[1]).reshape(12, 12)
    assert torch.allclose(here.product(u)[1].flatten(), jacobian @ u[1].flatten())
    assert torch.allclose(here.transposed(v)[1].flatten(), jacobian.T @ v[1].flatten())
    one = torch.tensor([1])
    assert torch.allclose(here.of_samples(here.product)(u[1:].flatten(1), one), here.product(u)[1:].flatten(1))
    assert relative(differences(of(mixing), x, mixing(x))(u[1:].flatten(1), one)[0], jacobian @ u[1].flatten()) < 1e-6
    straight = Linearised(lambda x: x @ torch.ones(4, 2, dtype=x.dtype), x)
    assert torch.allclose(straight.product(u), u.sum(-1, keepdim=True).expand(-1, -1, 2))


@pytest.mark.parametrize("width", [5, 192])
def test_systems_are_solved_whatever_their_width_and_the_threads(width: int) -> None:
    matrices, right, threads = normal(6, width, width), normal(6, width, seed=1), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        solution = solved(matrices, right)
    finally:
        torch.set_num_threads(threads)
    assert float((torch.einsum("tij,tj->ti", matrices, solution) - right).norm() / right.norm()) < 1e-8
    singular = solved(torch.zeros(1, 3, 3), torch.ones(1, 3))
    assert not bool(singular.isfinite().all())
