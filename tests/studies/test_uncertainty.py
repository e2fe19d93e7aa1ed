"""How sure a MAP inverse is: draws have the posterior's covariance, clues get the shares that they have."""

from __future__ import annotations

import pytest
import torch
from targets.examples import small_timm
from torch import Tensor

from backsight.exact.map import MapSettings, Posterior
from backsight.studies.stability import Noise, noisy
from backsight.studies.uncertainty import Uncertainty, posterior_samples, variance_shares


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
    problem = Posterior(forward, y, mean, factor, noise.diag()[None], noise.diag()[None])
    solution = problem.most_probable(thorough)
    drawn = posterior_samples(problem, solution, count=4, products=products, seed=7)
    drawn = drawn.flatten(0, 1).flatten(1)
    before = torch.block_diag(*[factor @ factor.T] * 2)
    # Where the residual is larger than the noise says, the noise is taken larger by that factor.
    taken = torch.diag(1 / (noise * max(1.0, float(solution.misfit[0]))).repeat(3))
    posterior = torch.linalg.inv(torch.linalg.inv(before) + matrix @ taken @ matrix.T)
    expected = posterior if products else before
    assert torch.allclose(drawn.square().mean(0).sqrt(), expected.diagonal().sqrt(), rtol=0.07, atol=0)
    if products:
        assert float((drawn.T @ drawn / len(drawn) - posterior).norm() / posterior.norm()) < 0.1


def test_clues_get_the_shares_that_they_have() -> None:
    generator = torch.Generator().manual_seed(0)
    clues = torch.rand(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    variance = 0.5 * clues[:, 0] + 2 * clues[:, 2]
    square = variance * torch.randn(variance.shape, generator=generator, dtype=torch.float64).square()
    assert torch.allclose(variance_shares(clues, square), torch.tensor([0.5, 0.0, 2.0]).double(), atol=0.15)


def test_it_says_how_far_off_a_picture_is() -> None:
    target = small_timm("ViT", img_size=(32, 16))

    def noise(values: Tensor, seed: int = 0) -> Tensor:
        return noisy(values, Noise("gaussian", 1e-3), torch.Generator().manual_seed(seed))

    smooth = torch.nn.functional.interpolate(
        torch.rand(28, 3, 2, 2, generator=torch.Generator().manual_seed(0)), (32, 16)
    )
    held_out, images = smooth[:24], smooth[24:]
    mean = held_out.mean(0)
    made = Uncertainty.fitted(
        target, "blocks.1", lambda given: mean.expand(given.batch, -1, -1, -1), held_out, noise, checked=8
    )
    recorded = target.record(images, ["blocks.1"])["blocks.1"]
    y = recorded.replace(noise(recorded.values, 3))
    posterior, solution, patches = made.inverse.solve(y)
    deviation = made.deviation(posterior, solution)
    error = (made.inverse.pictures(patches).clamp(0, 1) - images).square().mean()
    assert deviation.shape == images[:, 0].shape
    assert 0.3 < float(deviation.square().mean() / error) < 3
