"""The MAP inverse: closed forms are met, the truth comes back as the noise goes, and no objective ever rises."""

from __future__ import annotations

import pytest
import torch
from targets.examples import small_detector, small_timm
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.map import (
    KINDS,
    Gaussian,
    Likelihood,
    Linearised,
    MapSettings,
    Noise,
    conjugate_gradients,
    fit_map,
    map_solve,
    noisy,
    pixel_forward,
    posterior_samples,
    stages_down_to,
    variance_shares,
)
from backsight.inverses.patches import patchify
from backsight.targets import Target

THOROUGH = MapSettings(stages=(0.0,), steps=6, products=200, tolerance=1e-13, damping=1e-4, enough=0.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_problem(batch: int = 3) -> tuple[Tensor, Tensor, Gaussian, Likelihood, Tensor]:
    """(A, y, prior, likelihood, truth): 2 tokens of 5 values seen as 3 tokens of 4, of other noise a channel."""
    matrix = normal(10, 12, seed=1)
    factor = normal(5, 5, seed=2)
    prior = Gaussian(normal(batch, 2, 5, seed=3), factor)
    truth = prior.at(normal(batch, 2, 5, seed=4))
    noise = torch.diag(torch.tensor([0.01, 0.04, 0.09, 0.16], dtype=torch.float64))
    error = normal(batch, 3, 4, seed=5) * noise.diagonal().sqrt()
    return matrix, (truth.flatten(1) @ matrix).view(batch, 3, 4) + error, prior, Likelihood(noise), truth


def closed_form(matrix: Tensor, y: Tensor, prior: Gaussian, likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    """(mean (B, 10), covariance (10, 10)) of the posterior: Tarantola, eqs. 3.37 and 3.38."""
    covariance = torch.block_diag(*[prior.factor @ prior.factor.T] * 2)
    noise = torch.block_diag(*[likelihood.noise] * 3)
    posterior = torch.linalg.inv(torch.linalg.inv(covariance) + matrix @ torch.linalg.inv(noise) @ matrix.T)
    mean = prior.mean.flatten(1)
    missing = y.flatten(1) - mean @ matrix
    return mean + missing @ torch.linalg.inv(noise) @ matrix.T @ posterior, posterior


@pytest.mark.parametrize("batch", [1, 3])
def test_of_a_linear_model_it_is_the_closed_form(batch: int) -> None:
    matrix, y, prior, likelihood, _ = linear_problem(batch)
    found = map_solve(lambda z: (z.flatten(1) @ matrix).view(-1, 3, 4), y, prior, likelihood, THOROUGH)
    wanted, _ = closed_form(matrix, y, prior, likelihood)
    assert torch.allclose(found.z.flatten(1), wanted, rtol=0, atol=1e-6)
    assert bool((found.objective < found.at_start).all())
    assert torch.allclose(found.z, prior.at(found.w))


def test_the_annealed_search_ends_at_the_same_place() -> None:
    matrix, y, prior, likelihood, _ = linear_problem()
    spread = 4 * torch.eye(4, dtype=torch.float64)
    annealed = MapSettings(stages=(1.0, 0.1, 0.0), steps=4, products=200, tolerance=1e-13, damping=1e-4, enough=0.0)
    found = map_solve(
        lambda z: (z.flatten(1) @ matrix).view(-1, 3, 4), y, prior, Likelihood(likelihood.noise, spread), annealed
    )
    assert torch.allclose(found.z.flatten(1), closed_form(matrix, y, prior, likelihood)[0], rtol=0, atol=1e-6)
    assert found.stage_of.unique().tolist() == [0, 1, 2]


def drawn_from(products: int) -> tuple[Tensor, Tensor, Tensor]:
    """(draws (2000, 10), posterior and prior covariance) of one sample, drawn as 500 samples that are alike."""
    matrix, y, prior, likelihood, _ = linear_problem(1)
    y, prior = y.expand(500, -1, -1), Gaussian(prior.mean.expand(500, -1, -1), prior.factor)

    def forward(z: Tensor) -> Tensor:
        return (z.flatten(1) @ matrix).view(-1, 3, 4)

    found = map_solve(forward, y, prior, likelihood, THOROUGH)
    drawn = posterior_samples(forward, y, prior, likelihood, found, count=4, products=products, seed=7)
    # Where the residual is larger than the noise says, the noise is taken larger by that factor.
    taken = Likelihood(likelihood.noise * max(1.0, float(found.misfit[0])))
    posterior = closed_form(matrix, y, prior, taken)[1]
    return drawn.flatten(0, 1).flatten(1), posterior, torch.block_diag(*[prior.factor @ prior.factor.T] * 2)


def test_draws_have_the_posterior_covariance() -> None:
    drawn, posterior, before = drawn_from(products=40)
    assert torch.allclose(drawn.square().mean(0).sqrt(), posterior.diagonal().sqrt(), rtol=0.07, atol=0)
    assert float((drawn.T @ drawn / len(drawn) - posterior).norm() / posterior.norm()) < 0.1
    assert float(posterior.trace()) < 0.1 * float(before.trace())


def test_a_draw_that_has_no_products_left_keeps_the_prior_s_width() -> None:
    drawn, _, before = drawn_from(products=0)
    assert torch.allclose(drawn.square().mean(0).sqrt(), before.diagonal().sqrt(), rtol=0.07, atol=0)


def bent(z: Tensor) -> Tensor:
    """(B, 3, 4) -> (B, 4, 5): a two-layer network, more values behind it than before."""
    hidden = torch.tanh(z.flatten(1) @ (0.3 * normal(12, 20, seed=11)))
    return (hidden @ normal(20, 20, seed=12) + 0.2 * (z.flatten(1) @ normal(12, 20, seed=13))).view(-1, 4, 5)


def test_the_truth_of_a_bent_model_comes_back_as_the_noise_goes() -> None:
    truth = normal(4, 3, 4, seed=14)
    prior = Gaussian(truth + 0.3 * normal(4, 3, 4, seed=15), 0.3 * torch.eye(4, dtype=torch.float64))
    away = []
    for sigma in (1e-1, 1e-3, 1e-5):
        y = bent(truth) + sigma * normal(4, 4, 5, seed=16)
        likelihood = Likelihood(sigma**2 * torch.eye(5, dtype=torch.float64), 0.1 * torch.eye(5, dtype=torch.float64))
        found = map_solve(bent, y, prior, likelihood, MapSettings(steps=6, products=40, tolerance=1e-8, enough=1e-6))
        away.append(float((found.z - truth).square().mean().sqrt()))
    assert away[0] > 20 * away[1]
    assert away[1] > 20 * away[2]
    assert away[2] < 1e-4


def folded(z: Tensor) -> Tensor:
    """Two roots to a value, and steep: full Gauss–Newton steps overshoot."""
    return z.square() + 10 * torch.sin(3 * z)


def test_no_step_raises_the_objective() -> None:
    prior = Gaussian(normal(6, 2, 3, seed=20), torch.eye(3, dtype=torch.float64))
    y = folded(normal(6, 2, 3, seed=21))
    likelihood = Likelihood(1e-4 * torch.eye(3, dtype=torch.float64), 10 * torch.eye(3, dtype=torch.float64))
    found = map_solve(folded, y, prior, likelihood, MapSettings(stages=(1.0, 0.1, 0.0), steps=5, enough=0.0))
    for number in range(3):
        stage = found.history[found.stage_of == number]
        assert bool((stage[1:] <= stage[:-1]).all())
    assert bool((found.objective <= found.at_start).all())
    last = likelihood.whitener(0.0)[0]
    residual = (folded(found.z) - y) @ last
    again = 0.5 * residual.square().flatten(1).sum(1) + 0.5 * found.w.square().flatten(1).sum(1)
    assert torch.allclose(found.objective, again, rtol=1e-8)


def test_samples_do_not_know_of_one_another() -> None:
    prior = Gaussian(normal(5, 2, 3, seed=20), torch.eye(3, dtype=torch.float64))
    y = folded(normal(5, 2, 3, seed=21))
    likelihood = Likelihood(1e-2 * torch.eye(3, dtype=torch.float64))
    settings = MapSettings(stages=(0.0,), steps=4, enough=0.0, tolerance=1e-12)
    together = map_solve(folded, y, prior, likelihood, settings)
    alone = map_solve(folded, y[2:3], Gaussian(prior.mean[2:3], prior.factor), likelihood, settings)
    assert torch.allclose(together.z[2:3], alone.z, rtol=0, atol=1e-8)


def test_products_are_those_of_the_jacobian() -> None:
    z = normal(2, 3, 4, seed=30)
    here = Linearised(bent, z)
    jacobian = torch.autograd.functional.jacobian(lambda each: bent(each[None])[0], z[1]).reshape(20, 12)
    u, v = normal(2, 3, 4, seed=31), normal(2, 4, 5, seed=32)
    assert torch.allclose(here.product(u)[1].flatten(), jacobian @ u[1].flatten())
    assert torch.allclose(here.transposed(v)[1].flatten(), jacobian.T @ v[1].flatten())
    straight = Linearised(lambda each: each @ torch.ones(4, 2, dtype=each.dtype), z)
    assert torch.allclose(straight.product(u), u.sum(-1, keepdim=True).expand(-1, -1, 2))


def test_conjugate_gradients_end_by_themselves() -> None:
    matrix = normal(2, 6, 6, seed=33)
    matrix = matrix @ matrix.mT + torch.eye(6, dtype=torch.float64)
    right = normal(2, 6, seed=34)
    found, used = conjugate_gradients(lambda each: torch.einsum("bij,bj->bi", matrix, each), right, 50, 1e-10)
    assert torch.allclose(found, torch.linalg.solve(matrix, right), rtol=1e-7)
    assert used <= 10
    again, more = conjugate_gradients(lambda each: torch.einsum("bij,bj->bi", matrix, each), right, 50, 1e-8, found)
    assert more == 1
    assert torch.equal(again, found)


def test_a_whitener_makes_its_covariance_one() -> None:
    noise, spread = torch.diag(torch.tensor([1e-12, 1e-4, 1.0], dtype=torch.float64)), normal(3, 3, seed=35)
    spread = spread @ spread.T
    both = Likelihood(noise, spread)
    whitener = both.whitener(0.1)[0]
    assert torch.allclose(whitener.T @ (noise + 0.1 * spread) @ whitener, torch.eye(3, dtype=torch.float64), atol=1e-8)
    assert stages_down_to(Likelihood(noise)) == (0.0,)
    assert stages_down_to(Likelihood(1e-30 * noise, spread))[-1] > 0
    assert stages_down_to(Likelihood(1e3 * spread, spread)) == (0.0,)
    assert stages_down_to(Likelihood(0.03 * spread, spread)) == (1.0, 0.1, 0.0)


def test_noises_are_of_the_size_they_say() -> None:
    values = 3 * normal(4, 50, 40, seed=36).float()
    generator = torch.Generator().manual_seed(0)
    off = noisy(values, Noise("gaussian", 0.1), generator) - values
    assert abs(float(off.std()) - 0.3) < 0.01
    assert torch.equal(noisy(values, Noise("float32")), values)
    # Uniform rounding: half a unit in the last place of 8 and of 11 bits, over √3 and over the octave.
    for kind, bits in (("bfloat16", 8), ("float16", 11)):
        relative = ((noisy(values, Noise(kind)) - values) / values).square().mean().sqrt()  # type: ignore[arg-type]
        assert 0.3 < float(relative) * 2.0**bits < 0.6
    step = values.flatten(1).abs().amax(1) / 127
    rounding = (noisy(values, Noise("int8")) - values).flatten(1).square().mean(1).sqrt()
    assert torch.allclose(rounding, step / 12**0.5, rtol=0.1)
    assert Noise("gaussian", 0.1).name == "gaussian 0.1"
    assert "gaussian" in KINDS
    with pytest.raises(BacksightError, match="sigma from 0"):
        noisy(values, Noise("gaussian", -1.0))


# On a small model


@pytest.fixture(scope="module")
def target() -> Target:
    return small_timm("ViT", img_size=(32, 16))


def scenes(count: int, seed: int) -> Tensor:
    """(B, 3, 32, 16) smooth colours: a plane in a random direction of a random colour, a small step on it."""
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.rand(count, 3, 3, generator=generator)
    down, across = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 16), indexing="ij")
    plane = torch.stack([torch.ones_like(down), down - 0.5, across - 0.5])
    images = torch.einsum("bck,khw->bchw", slopes - torch.tensor([0.0, 0.5, 0.5]), plane)
    return (0.2 + 0.6 * images).clamp(0, 1)


def test_the_pass_is_the_target_s_own_on_any_pixels(target: Target) -> None:
    images = scenes(3, 0)
    tap = "blocks.0"
    forward = pixel_forward(target, tap, (8, 8), (4, 2))
    assert torch.allclose(forward(patchify(images, (8, 8))), target.record(images, [tap])[tap].values, atol=1e-5)
    assert bool(torch.isfinite(forward(patchify(3 * images - 1, (8, 8)))).all())
    with pytest.raises(BacksightError, match=r"no tap 'blocks\.00'"):
        pixel_forward(target, "blocks.00", (8, 8), (4, 2))


def test_a_detector_s_pass_is_its_own_too() -> None:
    target = small_detector()
    height, width = target.image_size
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    for tap in ("encoder.layers.0", "decoder.layers.0"):
        forward = pixel_forward(target, tap, (8, 8), (height // 8, width // 8))
        assert torch.allclose(forward(patchify(images, (8, 8))), target.record(images, [tap])[tap].values, atol=1e-4)
        patches = patchify(images, (8, 8)).requires_grad_(True)
        forward(patches).sum().backward()
        assert float(patches.grad.abs().sum()) > 0


def test_it_beats_the_inverse_that_it_starts_from_and_says_how_far_off_it_is(target: Target) -> None:
    tap, noise = "blocks.1", Noise("gaussian", 1e-3)
    held_out, images = scenes(24, 1), scenes(4, 2)
    mean = held_out.mean(0)
    made = fit_map(target, tap, lambda each: mean.expand(each.batch, -1, -1, -1), held_out, noise, checked=8)
    recorded = target.record(images, [tap])[tap]
    disturbed = recorded.replace(noisy(recorded.values, noise, torch.Generator().manual_seed(3)))
    found, deviation = made.with_deviation(disturbed)
    assert found.shape == images.shape
    assert deviation.shape == images[:, 0].shape
    start = (made.start.patches(disturbed) - patchify(images, (8, 8))).square().mean()
    error = (found - images).square().mean()
    assert float(error) < 0.5 * float(start)
    assert 0.5 < float(deviation.square().mean() / error) < 2
    assert bool((made.gain >= 0).all())
    assert bool((made.gain <= 1).all())
    assert torch.allclose(made(disturbed.index(torch.arange(1))), found[:1], atol=1e-4)


def test_object_queries_are_fitted_on_more_images_than_a_pass_takes() -> None:
    target = small_detector()
    height, width = target.image_size
    images = torch.rand(66, 3, height, width, generator=torch.Generator().manual_seed(0))
    mean = images.mean(0)
    made = fit_map(
        target,
        "decoder.layers.0",
        lambda each: mean.expand(each.batch, -1, -1, -1),
        images,
        Noise("gaussian", 0.1),
        count=66,
        checked=0,
    )
    queries = target.record(images[:3], ["decoder.layers.0"])["decoder.layers.0"]
    assert made.start.patches(queries).shape == (3, height // 8 * (width // 8), 192)


def test_clues_get_the_shares_that_they_have() -> None:
    generator = torch.Generator().manual_seed(0)
    clues = torch.rand(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    variance = 0.5 * clues[:, 0] + 2 * clues[:, 2]
    square = variance * torch.randn(variance.shape, generator=generator, dtype=torch.float64).square()
    shares = variance_shares(clues, square)
    assert torch.allclose(shares, torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64), atol=0.15)
    assert bool((shares >= 0).all())


def test_what_it_cannot_do_it_refuses(target: Target) -> None:
    with pytest.raises(BacksightError, match="at least 5 held-out images"):
        fit_map(target, "blocks.0", lambda each: scenes(each.batch, 0), scenes(3, 0), Noise("float32"))
    y = normal(1, 3, 4)
    with pytest.raises(BacksightError, match="give its own"):
        map_solve(
            lambda z: z[:, :2], y, Gaussian(y, torch.eye(4, dtype=y.dtype)), Likelihood(torch.eye(4, dtype=y.dtype))
        )
    with pytest.raises(BacksightError, match="not finite"):
        map_solve(lambda z: z / 0, y, Gaussian(y, torch.eye(4, dtype=y.dtype)), Likelihood(torch.eye(4, dtype=y.dtype)))
