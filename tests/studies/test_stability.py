"""Stability: spectra, growth of noise, crossings and calibrations of known answer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from backsight.exact.solver import Linearised
from backsight.studies.lanczos import least_seen, recoverable, relative_size, spectrum
from backsight.studies.stability import Noise, noisy
from backsight.studies.uncertainty import reliability


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
    assert torch.allclose(found[1].sum(-1), torch.ones(80, 2, dtype=torch.float64))
    assert torch.allclose(recoverable(*found, 30, 1e-1), torch.full((2,), 10.0, dtype=torch.float64), rtol=0.1)
    assert torch.allclose(recoverable(*found, 30, 1e-3), torch.full((2,), 24.0, dtype=torch.float64), rtol=0.1)
    assert float(recoverable(*found, 30, 2.0).max()) == 0
    assert math.isclose(float(found[0].amax()), 1.0, rel_tol=1e-6)
    few = spectrum(linearised(with_values(values, 40)), steps=2, probes=2)
    assert bool(recoverable(*few, 30, 1e-6).isnan().all())  # two products do not reach the small ones


def test_a_full_run_of_products_gives_the_singular_values() -> None:
    matrix = normal(12, 15, seed=3)
    found = spectrum(linearised(matrix, 1), steps=12, probes=1)
    assert torch.allclose(found[0][0, 0].sqrt(), torch.linalg.svdvals(matrix).flip(0), rtol=1e-6)


def test_what_shows_least_is_found() -> None:
    values = torch.tensor([9.0, 8, 7, 6, 5, 5, 4, 4, 3, 3, 0.7, 0.1], dtype=torch.float64)
    matrix = with_values(values, 14)
    directions, left = least_seen(linearised(matrix), count=2, iterations=20, products=40)
    own = torch.linalg.svd(matrix)[0][:, -2:]
    assert torch.allclose(
        (directions.flatten(2) @ own).square().sum(-1), torch.ones(2, 2, dtype=torch.float64), atol=0.02
    )
    assert torch.allclose(left, (1 / (1 + values[[-1, -2]] ** 2))[:, None].expand(2, 2), rtol=1e-3)


def test_the_noise_is_measured() -> None:
    values = normal(4, 30, 20)
    disturbed = noisy(values, Noise("gaussian", 0.05), torch.Generator().manual_seed(0))
    assert math.isclose(relative_size(values, disturbed), 0.05, rel_tol=0.05)
    assert 1e-8 < relative_size(values, values.float()) < 6e-8


def test_a_right_uncertainty_is_called_right_and_a_wrong_one_wrong() -> None:
    deviation = 0.05 + normal(8, 16, 12, seed=1).abs()
    error = deviation[:, None] * normal(8, 3, 16, 12, seed=2)
    table, right = reliability(deviation, error)
    (value, low, high), coverage = right["map"]
    assert value < 0.05
    assert low <= value + 1e-3
    assert value - 1e-3 <= high
    assert abs(float(coverage.mean()) - 0.95) < 0.01
    assert table["n"].sum() == error.numel()
    assert bool((table["predicted"].diff().dropna() > 0).all())
    (value, _, _), coverage = reliability(deviation / 2, error)[1]["map"]
    assert abs(value - 1.0) < 0.1
    assert abs(float(coverage.mean()) - 0.673) < 0.02


def test_a_constant_deviation_is_judged_where_the_map_says() -> None:
    deviation = torch.where(torch.arange(64) < 32, 0.1, 0.3).expand(10, 64, 64)
    table, found = reliability(deviation, deviation[:, None] * normal(10, 3, 64, 64, seed=8))
    constant = 0.05**0.5
    assert table["constant"].tolist() == pytest.approx([constant] * 10, rel=1e-4)
    assert found["map"][0][0] < 0.02
    off = (abs(0.1 - constant) + abs(0.3 - constant)) / 2 / constant
    assert found["null_constant"][0][0] == pytest.approx(off, rel=0.02)
    # 1.96 constants are 4.38 and 1.461 of the true deviations.
    within = (math.erf(4.383 / 2**0.5) + math.erf(1.461 / 2**0.5)) / 2
    assert float(found["null_constant"][1].mean()) == pytest.approx(within, abs=0.005)


def test_noises_are_of_the_size_they_say() -> None:
    values = 3 * normal(4, 50, 40, seed=36).float()
    off = noisy(values, Noise("gaussian", 0.1), torch.Generator().manual_seed(0)) - values
    assert abs(float(off.std()) - 0.3) < 0.01
    assert torch.equal(noisy(values, Noise("float32")), values)
    # Uniform rounding: half a unit in the last place of 8 and of 11 bits, over √3 and over the octave.
    for kind, bits in (("bfloat16", 8), ("float16", 11)):
        relative = ((noisy(values, Noise(kind)) - values) / values).square().mean().sqrt()
        assert 0.3 < float(relative) * 2.0**bits < 0.6
    step = values.flatten(1).abs().amax(1) / 127
    rounding = (noisy(values, Noise("int8")) - values).flatten(1).square().mean(1).sqrt()
    assert torch.allclose(rounding, step / 12**0.5, rtol=0.1)
