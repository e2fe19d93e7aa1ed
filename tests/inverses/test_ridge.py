"""Ridge regression from moments is the textbook's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inverses.recorded import normal
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from backsight.errors import BacksightError
from backsight.inverses import ridge
from backsight.inverses.linear import ALPHAS
from backsight.inverses.ridge import RidgeAccumulator, best, leading_directions


def accumulated(x: Tensor, y: Tensor, pieces: int = 3) -> RidgeAccumulator:
    accumulator = RidgeAccumulator()
    for rows in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        accumulator.update(*rows)
    return accumulator


@pytest.mark.parametrize("alpha", [1e-6, 0.01, 3.0])
def test_closed_form_is_scikit_learns(alpha: float) -> None:
    x = normal(60, 7) @ normal(7, 7, seed=1) * torch.logspace(-3, 3, 7) + 50
    y = x @ normal(7, 4, seed=2) + normal(60, 4, seed=3)
    weight, bias = accumulated(x, y).solve(alpha)
    scaler = StandardScaler().fit(x)
    reference = Ridge(alpha=alpha * len(x)).fit(scaler.transform(x), y)
    expected = reference.predict(scaler.transform(x))
    np.testing.assert_allclose(x @ weight + bias, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())
    np.testing.assert_allclose(weight, reference.coef_.T / scaler.scale_[:, None], rtol=1e-8, atol=1e-10)


def test_the_best_strength_is_that_of_the_rows_and_so_is_its_error(monkeypatch) -> None:
    """Also where it is found on a sketch of the outputs."""
    x = normal(400, 12) + 4
    signal = x[:, :1] @ normal(1, 5, seed=4)
    training = accumulated(x[:40], (signal + normal(400, 5, seed=5))[:40])
    errors: list[float] = []
    for alpha in ALPHAS:
        weight, bias = training.solve(alpha)
        errors.append(float((x[40:] @ weight + bias - signal[40:]).square().sum()))
    alpha = ALPHAS[int(np.argmin(errors))]
    assert ALPHAS[0] < alpha < ALPHAS[-1]
    solution = best(training, accumulated(x[40:], signal[40:]), ALPHAS)
    assert solution.alpha == alpha
    torch.testing.assert_close(solution.factors[0], training.solve(alpha)[0], rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(ridge, "WIDE", 1)
    monkeypatch.setattr(ridge, "SKETCH", 4)
    assert errors[ALPHAS.index(best(training, accumulated(x[40:], signal[40:]), ALPHAS).alpha)] < 1.03 * min(errors)


def test_the_best_strength_of_several_minima() -> None:
    """Large directions say one half, small ones nothing, the smallest the rest: both ends beat what is between."""
    known = normal(440, 22) * torch.tensor([1.0, *[0.1] * 20, 1e-3])
    x = known @ torch.linalg.qr(normal(22, 22, seed=1))[0]
    y = known[:, :1] + known[:, -1:] * 1e3
    training, validation = accumulated(x[:40], y[:40]), accumulated(x[40:], y[40:])
    errors = []
    for alpha in ALPHAS:
        weight, bias = training.solve(alpha)
        errors.append(float((x[40:] @ weight + bias - y[40:]).square().mean()))
    lowest = int(np.argmin(errors))
    assert lowest < 3
    assert max(errors[3:12]) > 1.2 * errors[16] > 1.2 * errors[lowest]
    assert best(training, validation, ALPHAS).alpha == ALPHAS[lowest]


def test_accumulators_add() -> None:
    x, y = normal(90, 5) + 3, normal(90, 4, seed=1)
    whole = accumulated(x, y, pieces=1)
    parts = [accumulated(*rows) for rows in zip(x.split(40), y.split(40), strict=True)]
    total = RidgeAccumulator() + parts[0] + parts[1] + parts[2] + RidgeAccumulator()
    assert total.count == whole.count
    for columns in (slice(None), slice(1, 3)):
        for added, expected in zip(total.solve(0.01, columns), whole.solve(0.01)[:2], strict=True):
            torch.testing.assert_close(added, expected[..., columns], rtol=1e-11, atol=1e-12)


def test_low_rank_is_the_projection_of_the_fitted_values() -> None:
    x, y = normal(100, 8), normal(100, 8, seed=1) @ normal(8, 6, seed=2)
    moments = accumulated(x, y)
    fitted = (x - x.mean(0)) @ moments.solve(0.2)[0]
    solution = best(moments, moments, [0.2], rank=3)
    left, right = solution.factors
    assert (left.shape, right.shape) == ((8, 3), (3, 6))
    axes = torch.linalg.svd(fitted, full_matrices=False).Vh[:3]
    torch.testing.assert_close((x - x.mean(0)) @ left @ right, fitted @ axes.T @ axes, rtol=1e-8, atol=1e-8)
    solution = best(moments, moments, [0.2], rank=6)
    torch.testing.assert_close(solution.factors[0] @ solution.factors[1], moments.solve(0.2)[0], rtol=1e-8, atol=1e-8)


def test_leading_directions_are_the_principal_ones() -> None:
    basis = torch.linalg.qr(normal(9, 9)).Q
    moments = accumulated(normal(4000, 9, seed=1) * torch.logspace(0, -4, 9) @ basis.T, normal(4000, 1))
    directions = leading_directions(moments, 3).double()
    assert directions.shape == (9, 3)
    correlation = moments.standardised()[0]
    kept = torch.linalg.eigvalsh(correlation)[-3:].sum() / 9
    variance = (directions.T @ (moments.gram / 4000) @ directions).trace() / 9
    assert float(variance) == pytest.approx(float(kept), rel=1e-5)
    few = leading_directions(accumulated(normal(4, 9), normal(4, 1)), 6)
    assert few.abs().sum(0).gt(0).tolist() == [True] * 3 + [False] * 3


def test_double_precision_keeps_what_single_loses() -> None:
    """Huge means, channels 1e-2 to 1e4 and a decisive direction of relative spread 1e-4: all in float32 features."""
    base = normal(4000, 6)
    base[:, 1] = base[:, 0] + 1e-4 * base[:, 1]
    x = (base * torch.logspace(-2, 4, 6) + torch.tensor([10, 1e2, -1e3, 1e4, 1e5, 1e6])).float()
    scaled = StandardScaler().fit_transform(x.double())
    y = torch.from_numpy(scaled[:, :1] - scaled[:, 1:2]) * 1e4 + torch.from_numpy(scaled[:, 5:])
    weight, bias = accumulated(x, y, pieces=16).solve(1e-13)
    assert float((x.double() @ weight + bias - y).square().mean() / y.var()) < 1e-5


def test_constant_channels_count_nothing_and_nan_is_told() -> None:
    x, y = normal(40, 3), normal(40, 2, seed=1)
    x[:, 1] = 1e7
    weight, _ = accumulated(x, y).solve(1e-6)
    assert torch.equal(weight[1], torch.zeros(2, dtype=torch.float64))
    x[3, 0] = torch.nan
    with pytest.raises(BacksightError, match="not finite"):
        accumulated(x, y).solve(1.0)
