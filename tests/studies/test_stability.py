"""Stability: spectra, growth of noise, crossings and calibrations of known answer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.solver import Linearised
from backsight.studies.lanczos import (
    Noise,
    crossing,
    least_seen,
    noise_gain,
    noisy,
    recoverable,
    relative_size,
    reliability,
    spectrum,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(values: Tensor, rows: int, seed: int = 0) -> Tensor:
    """(len(values), rows) matrix with these singular values."""
    left, right = (torch.linalg.qr(normal(size, size, seed=seed + k)).Q for k, size in enumerate((len(values), rows)))
    return left @ torch.nn.functional.pad(values.diag(), (0, rows - len(values))) @ right


def linearised(matrix: Tensor, batch: int = 2) -> Linearised:
    tokens = 3
    shape = (batch, tokens, len(matrix) // tokens)
    return Linearised(lambda z: (z.flatten(1) @ matrix).view(len(z), 1, -1), normal(*shape, seed=9))


def test_directions_above_the_noise_are_counted() -> None:
    values = torch.cat([torch.full((10,), 1.0), torch.full((14,), 1e-2), torch.full((6,), 1e-5)]).double()
    found = spectrum(linearised(with_values(values, 40)), steps=6, probes=80)
    assert found.dimensions == 30
    assert torch.allclose(found.weights.sum(-1), torch.ones(80, 2, dtype=torch.float64))
    assert torch.allclose(recoverable(found, 1e-1), torch.full((2,), 10.0, dtype=torch.float64), rtol=0.1)
    assert torch.allclose(recoverable(found, 1e-3), torch.full((2,), 24.0, dtype=torch.float64), rtol=0.1)
    assert float(recoverable(found, 2.0).max()) == 0
    assert math.isclose(float(found.values.amax()), 1.0, rel_tol=1e-6)
    few = spectrum(linearised(with_values(values, 40)), steps=2, probes=2)
    assert bool(recoverable(few, 1e-6).isnan().all())  # two products do not reach the small ones
    with pytest.raises(BacksightError, match="from 0"):
        recoverable(found, -1.0)


def test_a_full_run_of_products_gives_the_singular_values() -> None:
    matrix = normal(12, 15, seed=3)
    found = spectrum(linearised(matrix, 1), steps=12, probes=1)
    assert torch.allclose(found.values[0, 0].sqrt(), torch.linalg.svdvals(matrix).flip(0), rtol=1e-6)


def test_what_shows_least_is_found() -> None:
    values = torch.tensor([9.0, 8, 7, 6, 5, 5, 4, 4, 3, 3, 0.7, 0.1], dtype=torch.float64)
    matrix = with_values(values, 14)
    directions, left = least_seen(linearised(matrix), count=2, iterations=20, products=40)
    own = torch.linalg.svd(matrix)[0][:, -2:]
    assert torch.allclose(
        (directions.flatten(2) @ own).square().sum(-1), torch.ones(2, 2, dtype=torch.float64), atol=0.02
    )
    assert torch.allclose(left, (1 / (1 + values[[-1, -2]] ** 2))[:, None].expand(2, 2), rtol=1e-3)


@pytest.mark.parametrize("size", [1e-6, 1e-2])
def test_noise_grows_as_the_singular_values_say(size: float) -> None:
    values = torch.logspace(0, -2, 24, dtype=torch.float64)
    inverse = torch.linalg.inv(with_values(values, 24))
    found = noise_gain(lambda y: (y.flatten(1) @ inverse).view_as(y), normal(3, 4, 6), size, probes=64)
    wanted = float(values.pow(-2).mean().sqrt())
    assert torch.allclose(found, torch.full((3,), wanted, dtype=torch.float64), rtol=0.1)


def test_the_noise_is_measured() -> None:
    values = normal(4, 30, 20)
    disturbed = noisy(values, Noise("gaussian", 0.05), torch.Generator().manual_seed(0))
    assert math.isclose(relative_size(values, disturbed), 0.05, rel_tol=0.05)
    assert 1e-8 < relative_size(values, values.float()) < 6e-8


def test_the_crossing_lies_where_the_lines_meet() -> None:
    sigmas = [1e-4, 1e-3, 1e-2, 1e-1]
    exact = [-20 * math.log10(sigma) for sigma in sigmas]
    assert math.isclose(crossing(sigmas, [30.0] * 4, exact), 10**-1.5, rel_tol=1e-9)
    assert crossing(sigmas, [100.0] * 4, exact) == 0.0
    assert crossing(sigmas, [1.0] * 4, exact) == math.inf
    for wrong in ([1e-3, 1e-4, 1e-2, 1e-1], [0.0, 1e-3, 1e-2, 1e-1]):
        with pytest.raises(BacksightError, match="ascending"):
            crossing(wrong, [1.0] * 4, exact)


def test_a_right_uncertainty_is_called_right_and_a_wrong_one_wrong() -> None:
    deviation = 0.05 + normal(8, 16, 12, seed=1).abs()
    error = deviation[:, None] * normal(8, 3, 16, 12, seed=2)
    right = reliability(deviation, error)
    assert right.calibration_error < 0.05
    assert abs(right.coverage - 0.95) < 0.01
    assert right.correlation > 0.3
    assert right.table["n"].sum() == error.numel()
    assert bool((right.table["predicted"].diff().dropna() > 0).all())
    half = reliability(deviation / 2, error)
    assert abs(half.calibration_error - 1.0) < 0.1
    assert abs(half.coverage - 0.673) < 0.02
    blind = reliability(torch.full_like(deviation, float(error.square().mean().sqrt())), error)
    assert abs(blind.correlation) < 0.05
    with pytest.raises(BacksightError, match="one shape"):
        reliability(deviation[:, :4], error)
    with pytest.raises(BacksightError, match="above 0"):
        reliability(0 * deviation, error)
