"""How sure a MAP inverse is: draws have the posterior's covariance, and right deviations are called right."""

from __future__ import annotations

import pytest
import torch
from targets.examples import small_timm
from torch import Tensor

from backsight.exact.map import MapSettings, Posterior, fit_map_tap
from backsight.studies.noise import calibration_error, coverage, deviation, noisy, posterior_samples, reliability


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("products", [40, 0])
def test_draws_have_the_posterior_covariance_and_without_products_the_prior_s(products: int) -> None:
    """One sample of a linear model, drawn as 500 samples that are alike."""
    matrix, factor = normal(10, 12, seed=1), normal(5, 5, seed=2)
    mean = normal(1, 2, 5, seed=3)
    noise = torch.tensor([0.01, 0.04, 0.09, 0.16], dtype=torch.float64)
    truth = mean + normal(1, 2, 5, seed=4) @ factor.T
    y = (truth.flatten(1) @ matrix).view(1, 3, 4) + normal(1, 3, 4, seed=5) * noise.sqrt()
    y, mean = (values.expand(500, -1, -1) for values in (y, mean))

    def forward(z: Tensor) -> Tensor:
        return (z.flatten(1) @ matrix).view(-1, 3, 4)

    thorough = MapSettings(stages=(0.0,), steps=6, products=200, tolerance=1e-13, damping=1e-4, enough=0.0)
    problem = Posterior(forward, y, mean, factor[None], noise.diag()[None], noise.diag()[None])
    solution = problem.most_probable(thorough)
    drawn = posterior_samples(problem, solution, count=4, products=products, seed=7)
    drawn = drawn.flatten(0, 1).flatten(1)
    before = torch.block_diag(*[factor @ factor.T] * 2)
    # Where the residual is larger than the noise says, the noise is taken larger by that factor.
    misfit = float(problem.residual(solution.stage)(solution.w)[0].square().mean())
    taken = torch.diag(1 / (noise * max(1.0, misfit)).repeat(3))
    posterior = torch.linalg.inv(torch.linalg.inv(before) + matrix @ taken @ matrix.T)
    expected = posterior if products else before
    assert torch.allclose(drawn.square().mean(0).sqrt(), expected.diagonal().sqrt(), rtol=0.07, atol=0)
    if products:
        assert float((drawn.T @ drawn / len(drawn) - posterior).norm() / posterior.norm()) < 0.1


def test_it_says_how_far_off_a_picture_is() -> None:
    target = small_timm("ViT", img_size=(32, 16))

    def noise(values: Tensor, seed: int = 0) -> Tensor:
        return noisy(values, 1e-3, torch.Generator().manual_seed(seed))

    smooth = torch.nn.functional.interpolate(
        torch.rand(28, 3, 2, 2, generator=torch.Generator().manual_seed(0)), (32, 16)
    )
    held_out, images = smooth[:24], smooth[24:]
    mean = held_out.mean(0)
    bases = {"blocks.1": lambda given: mean.expand(given.batch, -1, -1, -1)}
    inverse = fit_map_tap(target, "blocks.1", bases, held_out, noise)
    recorded = target.record(images, ["blocks.1"])["blocks.1"]
    y = recorded.replace(noise(recorded.values, 3))
    posterior, solution, patches, _ = inverse.solve(y)
    expected = deviation(inverse, posterior, solution)
    assert expected.shape == images[:, 0].shape
    assert 0.3 < float(expected.square().mean() / (inverse.pictures(patches).clamp(0, 1) - images).square().mean()) < 3


def test_a_right_uncertainty_is_called_right_and_a_wrong_one_wrong() -> None:
    expected = 0.05 + normal(8, 16, 12, seed=1).abs()
    error = expected[:, None] * normal(8, 3, 16, 12, seed=2)
    sums = reliability(expected, error)
    assert sums[0].sum() == error.numel()
    predicted = sums[1].sum(0) / sums[0].sum(0)
    assert (predicted[1:] > predicted[:-1]).all()
    assert calibration_error(sums)[0].mean() < 0.05
    assert abs(float(coverage(expected, error).mean()) - 0.95) < 0.01
    assert calibration_error(reliability(expected / 2, error))[0].mean() == pytest.approx(1, abs=0.1)
    assert abs(float(coverage(expected / 2, error).mean()) - 0.673) < 0.02


def test_a_constant_deviation_is_judged_where_the_map_says() -> None:
    expected = torch.where(torch.arange(64) < 32, 0.1, 0.3).expand(10, 64, 64)
    error = expected[:, None] * normal(10, 3, 64, 64, seed=8)
    own, of_constant = calibration_error(reliability(expected, error))
    constant = 0.05**0.5
    assert own.mean() < 0.02
    off = (abs(0.1 - constant) + abs(0.3 - constant)) / 2 / constant
    assert of_constant.mean() == pytest.approx(off, rel=0.02)
