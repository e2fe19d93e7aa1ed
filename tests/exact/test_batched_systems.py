"""Batches of square systems against one system at a time, narrow and wide, with one thread and with two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from backsight.exact.batched_systems import WIDE, factored, signs, solved


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def matrices(count: int, width: int) -> torch.Tensor:
    return torch.randn(count, width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", [1, 5, WIDE, WIDE + 1, 192, 257])
def test_systems_are_solved_whatever_their_width(width: int) -> None:
    batch = matrices(6, width)
    right = torch.randn(6, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = solved(batch, right)
    missed = torch.einsum("tij,tj->ti", batch, found) - right
    assert float(missed.norm() / right.norm()) < 1e-8
    again = torch.stack([torch.linalg.solve(matrix, each) for matrix, each in zip(batch, right, strict=True)])
    assert float((found - again).norm() / again.norm()) < 1e-8


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", [1, 5, WIDE, 192])
def test_signs_are_those_of_the_determinants(width: int) -> None:
    batch = matrices(9, width)
    wanted = torch.stack([torch.linalg.slogdet(matrix).sign for matrix in batch])
    assert torch.equal(signs(batch), wanted)
    assert len(wanted.unique()) == 2, "the batch holds both signs, or nothing was tested"


def test_a_singular_matrix_has_no_sign_and_no_finite_solution() -> None:
    batch = torch.stack([torch.zeros(3, 3), torch.eye(3)]).double()
    assert signs(batch).tolist() == [0.0, 1.0]
    found = solved(batch, torch.ones(2, 3, dtype=torch.float64))
    assert not bool(found[0].isfinite().all())
    assert found[1].tolist() == [1.0, 1.0, 1.0]


def test_an_empty_batch_has_no_factors() -> None:
    factors, pivots = factored(torch.zeros(0, 200, 200))
    assert (factors.shape, pivots.shape) == ((0, 200, 200), (0, 200))
