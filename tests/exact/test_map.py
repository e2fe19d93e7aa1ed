"""The MAP inverse: closed forms are met, the truth comes back as the noise goes, and no objective ever rises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from targets.examples import small_detector, small_timm
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.map import (
    LARGE,
    MapInverse,
    MapSettings,
    MapSolution,
    Posterior,
    fit_map,
    fit_map_tap,
    fit_way,
    one_back,
    pixel_forward,
    way_back,
)
from backsight.exact.starts import Half, affine, covariance, ridge
from backsight.exact.steps import Step
from backsight.inverses.files import read, save
from backsight.inverses.linear import fit_linear
from backsight.inverses.module import Inverses, header_for
from backsight.inverses.rows import patchify
from backsight.representation import Tokens
from backsight.targets.base import Target

THOROUGH = MapSettings(stages=(0.0,), steps=6, products=200, tolerance=1e-13, damping=1e-4, enough=0.0)
ONE = torch.eye(3, dtype=torch.float64)[None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("stages", [(0.0,), (1.0, 0.1, 0.0)])
@pytest.mark.parametrize("batch", [1, 3])
def test_of_a_linear_model_it_is_the_closed_form(batch: int, stages: tuple[float, ...]) -> None:
    """2 tokens of 5 values seen as 3 tokens of 4, of other noise a channel: Tarantola, eqs. 3.37 and 3.38."""
    matrix, factor = normal(10, 12, seed=1), normal(5, 5, seed=2)
    mean = normal(batch, 2, 5, seed=3)
    noise = torch.tensor([0.01, 0.04, 0.09, 0.16], dtype=torch.float64)
    truth = mean + normal(batch, 2, 5, seed=4) @ factor.T
    y = (truth.flatten(1) @ matrix).view(batch, 3, 4) + normal(batch, 3, 4, seed=5) * noise.sqrt()
    spread = 4 * torch.eye(4, dtype=torch.float64)[None]
    problem = Posterior(
        lambda z: (z.flatten(1) @ matrix).view(-1, 3, 4), y, mean, factor[None], noise.diag()[None], spread
    )
    solution = problem.most_probable(replace(THOROUGH, stages=stages))
    before = torch.block_diag(*[factor @ factor.T] * 2)
    inverse = torch.diag(1 / noise.repeat(3))
    posterior = torch.linalg.inv(torch.linalg.inv(before) + matrix @ inverse @ matrix.T)
    mean = mean.flatten(1)
    expected = mean + (y.flatten(1) - mean @ matrix) @ inverse @ matrix.T @ posterior
    assert torch.allclose(solution.z.flatten(1), expected, rtol=0, atol=1e-6)
    assert bool(
        (objective(problem, solution) < objective(problem, problem.most_probable(replace(THOROUGH, steps=0)))).all()
    )


def objective(problem: Posterior, solution: MapSolution) -> Tensor:
    residual = problem.residual(solution.stage)(solution.w)
    return 0.5 * residual.square().flatten(1).sum(1) + 0.5 * solution.w.square().flatten(1).sum(1)


def bent(z: Tensor) -> Tensor:
    """(B, 3, 4) -> (B, 4, 5): a two-layer network, more values behind it than before."""
    hidden = torch.tanh(z.flatten(1) @ (0.3 * normal(12, 20, seed=11)))
    return (hidden @ normal(20, 20, seed=12) + 0.2 * (z.flatten(1) @ normal(12, 20, seed=13))).view(-1, 4, 5)


def test_the_truth_of_a_bent_model_comes_back_as_the_noise_goes() -> None:
    truth, one = normal(4, 3, 4, seed=14), torch.eye(5, dtype=torch.float64)[None]
    prior = truth + 0.3 * normal(4, 3, 4, seed=15), 0.3 * torch.eye(4, dtype=torch.float64)[None]
    away = []
    for sigma in (1e-1, 1e-3, 1e-5):
        y = bent(truth) + sigma * normal(4, 4, 5, seed=16)
        settings = MapSettings(steps=6, products=40, tolerance=1e-8, enough=1e-6)
        solution = Posterior(bent, y, *prior, sigma**2 * one, 0.1 * one).most_probable(settings)
        away.append(float((solution.z - truth).square().mean().sqrt()))
    assert away[0] > 20 * away[1]
    assert away[1] > 20 * away[2]
    assert away[2] < 1e-4


def folded(z: Tensor) -> Tensor:
    """Two roots to a value, and steep: full Gauss–Newton steps overshoot."""
    return z.square() + 10 * torch.sin(3 * z)


def test_no_step_raises_the_objective_and_samples_do_not_know_of_one_another() -> None:
    mean, y = normal(6, 2, 3, seed=20), folded(normal(6, 2, 3, seed=21))
    problem = Posterior(folded, y, mean, ONE, 1e-4 * ONE, 10 * ONE)
    settings = MapSettings(stages=(1.0, 0.1, 0.0), steps=5, enough=0.0)
    solution = problem.most_probable(settings)
    found = objective(problem, solution)
    assert bool((found <= objective(problem, problem.most_probable(replace(settings, steps=0)))).all())
    fewer = problem.most_probable(replace(settings, stages=(0.0,), steps=1))
    more = problem.most_probable(replace(settings, stages=(0.0,), steps=4))
    assert bool((objective(problem, more) <= objective(problem, fewer)).all())
    settings = replace(settings, tolerance=1e-12, steps=3)
    together, alone = (
        Posterior(folded, y[part], mean[part], ONE, 1e-2 * ONE, ONE).most_probable(settings)
        for part in (slice(None), slice(2, 3))
    )
    assert torch.allclose(together.z[2:3], alone.z, rtol=0, atol=1e-8)


def test_a_whitener_makes_its_covariance_one_for_each_group() -> None:
    noise, spread = torch.diag(torch.tensor([1e-12, 1e-4, 1.0], dtype=torch.float64)), normal(2, 3, 3, seed=35)
    spread = spread @ spread.mT

    def known(noise: Tensor, spread: Tensor) -> Posterior:
        return Posterior(folded, ONE, ONE, ONE, noise, spread)

    whitener = known(noise.expand(2, 3, 3), spread).whitener(0.1)
    made = whitener.mT @ (noise + 0.1 * spread) @ whitener
    assert torch.allclose(made, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), atol=1e-8)
    assert known(1e-30 * noise[None], spread[:1]).stages()[-1] > 0
    assert known(1e3 * spread, spread).stages() == (0.0,)
    assert known(0.03 * spread, spread).stages() == (1.0, 0.1, 0.0)


def test_decades_begin_where_they_are_told_to(monkeypatch) -> None:
    begun: list[float] = []
    whitener = Posterior.whitener
    monkeypatch.setattr(Posterior, "whitener", lambda self, stage: begun.append(stage) or whitener(self, stage))
    y, one = normal(2, 4, 5, seed=16), torch.eye(5, dtype=torch.float64)[None]
    problem = Posterior(
        bent, y, normal(2, 3, 4, seed=15), torch.eye(4, dtype=torch.float64)[None], 1e-5 * one, 0.1 * one
    )
    assert problem.most_probable(MapSettings(first=1e-2, steps=1)).stage == 0
    assert begun == [1e-2, 1e-3, 0]


def residual_step(seed: int) -> Step:
    """x + MLP(x) of tokens of 6 channels."""
    first, second = normal(6, 24, seed=seed), 0.06 * normal(24, 6, seed=seed + 100)
    return Step("", "", lambda x: x + torch.tanh(x @ first.to(x)) @ second.to(x), tokenwise=True)


def test_half_steps_are_solved_one_by_one_where_the_whole_stack_is_too_bent() -> None:
    steps = [residual_step(40 + number) for number in range(24)]
    streams = [normal(64, 32, 6, seed=39)]
    for step in steps:
        streams.append(step(streams[-1]))
    truth, y, noise = streams[0][-16:], streams[-1][-16:], 1e-6 * torch.eye(6, dtype=torch.float64)[None]
    halves = [Half(step) for step in steps[::-1]]
    back, left = fit_way(halves, streams, y, noise, 1e-3)
    error = float((back - truth).square().mean())
    assert error == pytest.approx(float(left.diagonal(dim1=1, dim2=2).mean()), rel=0.1)  # it knows how far off it is

    weight = ridge([(streams[-1][:-16], streams[0][:-16])], 0)
    start = affine(y, weight)
    away = (affine(streams[-1][:-16], weight) - streams[0][:-16]).flatten(0, 1)

    def whole(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    spread = covariance((whole(start) - y).flatten(0, 1), 1e-6)[None]
    factor = torch.linalg.cholesky(covariance(away, 1e-6))[None]
    single = [values.flatten(0, 1)[:, None] for values in (y, start)]
    stacked = Posterior(whole, *single, factor, noise, spread).most_probable(MapSettings(**LARGE)).z.view_as(truth)
    assert error < 0.05 * float((start - truth).square().mean())
    assert error < 0.5 * float((stacked - truth).square().mean())
    for half in halves:
        y = one_back(half, y)
    torch.testing.assert_close(y, back)


# On a small model


def shaken(sigma: float, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Gaussian noise of a share of the values' deviation."""
    generator = torch.Generator().manual_seed(seed)
    return lambda values: values + sigma * float(values.std()) * torch.randn(values.shape, generator=generator)


@pytest.fixture(scope="module")
def target() -> Target:
    return small_timm("ViT", img_size=(32, 16))


def scenes(count: int, seed: int, size: tuple[int, int] = (32, 16)) -> Tensor:
    """(B, 3, H, W) smooth colours: a plane in a random direction of a random colour."""
    slopes = torch.rand(count, 3, 3, generator=torch.Generator().manual_seed(seed))
    down, across = torch.meshgrid(*(torch.linspace(0, 1, side) for side in size), indexing="ij")
    plane = torch.stack([torch.ones_like(down), down - 0.5, across - 0.5])
    images = torch.einsum("bck,khw->bchw", slopes - torch.tensor([0.0, 0.5, 0.5]), plane)
    return (0.2 + 0.6 * images).clamp(0, 1)


def test_the_pass_is_the_target_s_own_on_any_pixels(target: Target) -> None:
    images = scenes(3, 0)
    forward = pixel_forward(target, "blocks.0", (8, 8), (4, 2))
    values = target.record(images, ["blocks.0"])["blocks.0"].values
    assert torch.allclose(forward(patchify(images, (8, 8))), values, atol=1e-5)
    assert bool(torch.isfinite(forward(patchify(3 * images - 1, (8, 8)))).all())
    with pytest.raises(BacksightError, match=r"blocks\.00"):
        pixel_forward(target, "blocks.00", (8, 8), (4, 2))


def test_a_detector_s_pass_is_its_own_and_differentiable() -> None:
    target = small_detector()
    height, width = target.image_size
    images = scenes(2, 0, target.image_size)
    for tap in ("encoder.layers.0", "decoder.layers.0"):
        forward = pixel_forward(target, tap, (8, 8), (height // 8, width // 8))
        patches = patchify(images, (8, 8)).requires_grad_(True)
        values = forward(patches)
        assert torch.allclose(values, target.record(images, [tap])[tap].values, atol=1e-4)
        assert float(torch.autograd.grad(values.sum(), patches)[0].abs().sum()) > 0


def test_it_beats_the_inverse_that_it_starts_from(target: Target) -> None:
    tap, held_out, images = "blocks.1", scenes(24, 1), scenes(4, 2)
    mean = held_out.mean(0)
    bases = {tap: lambda given: mean.expand(given.batch, -1, -1, -1)}
    inverse = fit_map_tap(target, tap, bases, held_out, shaken(1e-3))
    recorded = target.record(images, [tap])[tap]
    y = recorded.replace(shaken(1e-3, 3)(recorded.values))
    made = inverse(y)
    start = (inverse.start(y) - patchify(images, (8, 8))).square().mean()
    assert made.shape == images.shape
    assert float((made - images).square().mean()) < 0.5 * float(start)
    assert bool(((inverse.gain >= 0) & (inverse.gain <= 1)).all())
    assert torch.allclose(inverse(y.index(torch.arange(1))), made[:1], atol=1e-4)


def test_covariances_are_of_groups_and_do_not_grow_with_the_tokens() -> None:
    sizes = {}
    for side in (32, 64):
        target = small_timm("ViT", img_size=side)
        images = scenes(6, 0, target.image_size)
        mean = images.mean(0)

        def base(given: Tokens, mean: Tensor = mean) -> Tensor:
            return mean.expand(given.batch, -1, -1, -1)

        inverse = fit_map_tap(target, "blocks.1", {"blocks.1": base}, images, checked=0)
        assert inverse.spread.shape == (2, 16, 16)  # of the class token, and of all patches
        sizes[side] = sum(buffer.numel() * buffer.element_size() for buffer in inverse.buffers())
    assert sizes[32] == sizes[64]
    with pytest.raises(TypeError, match="function"):  # as its base, which no file can hold
        inverse.configuration()


def test_object_queries_are_fitted_on_more_images_than_a_pass_takes() -> None:
    target = small_detector()
    images = scenes(66, 0, target.image_size)
    mean = images.mean(0)
    inverse = fit_map_tap(
        target,
        "decoder.layers.0",
        {"decoder.layers.0": lambda given: mean.expand(given.batch, -1, -1, -1)},
        images,
        shaken(0.1),
        checked=0,
    )
    queries = target.record(images[:3], ["decoder.layers.0"])["decoder.layers.0"]
    height, width = target.image_size
    assert inverse.start(queries).shape == (3, height // 8 * (width // 8), 192)


def test_a_whole_target_is_fitted_saved_and_read_back(target: Target, tmp_path: Path) -> None:
    linear = fit_linear(target, scenes(40, 0), taps=["blocks.1"], progress=False)
    settings = MapSettings(stages=(1.0, 0.1), steps=1, products=3)
    inverse = fit_map_tap(target, "blocks.1", linear, scenes(16, 1), shaken(0.1), settings, checked=2)
    recorded = target.record(scenes(2, 2))["blocks.1"]
    made = inverse(recorded)
    inverse.header = header_for(target, "map", "blocks.1", "pixels", scenes(16, 1), 0)
    for half, tolerance in ((False, 1e-6), (True, 0.02)):
        [path] = save(Inverses({"blocks.1": inverse}), tmp_path, half)
        loaded = read(path, target)
        assert isinstance(loaded, MapInverse)
        assert list(loaded.settings.stages or ()) == [1.0, 0.1]
        assert torch.equal(loaded.spread, inverse.spread)  # of its size, float16 would make nothing
        torch.testing.assert_close(loaded(recorded), made, atol=tolerance, rtol=0)
    whole = fit_map(target, scenes(40, 0), scenes(8, 1), taps=["blocks.1"], linear=linear, progress=False)
    assert whole["blocks.1"].base is linear["blocks.1"]
    assert float((whole["blocks.1"](recorded) - scenes(2, 2)).square().mean()) < 0.01


def test_deep_taps_of_large_pictures_are_led_back_first(tmp_path: Path) -> None:
    target, tap, size = small_timm("ViT", img_size=(72, 64), depth=5), "blocks.4", (72, 64)
    assert [step.destination for step in way_back(target, tap, target.taps)] == ["blocks.4.attn", "blocks.4"]
    assert not way_back(target, "blocks.3", target.taps)
    linear = fit_linear(target, scenes(40, 0, size), taps=["blocks.3", tap], progress=False)
    held_out, recorded = scenes(12, 1, size), target.record(scenes(2, 2, size))[tap]
    inverse = fit_map_tap(target, tap, linear, held_out, checked=4, further=scenes(20, 3, size))
    made = inverse(recorded)
    error, start = ((each - scenes(2, 2, size)).square().mean() for each in (made, linear[tap](recorded)))
    assert float(error) < float(start)
    inverse.header = header_for(target, "map", tap, "pixels", held_out, 0)
    [path] = save(Inverses({tap: inverse}), tmp_path)
    torch.testing.assert_close(read(path, target)(recorded), made, atol=1e-6, rtol=0)


def test_what_it_cannot_do_it_refuses(target: Target) -> None:
    with pytest.raises(BacksightError, match="at least 5 held-out images"):
        fit_map_tap(target, "blocks.0", {"blocks.0": lambda given: scenes(given.batch, 0)}, scenes(3, 0))
    with pytest.raises(BacksightError, match="give `validation`"):
        fit_map(target, scenes(40, 0), progress=False)
    detector = small_detector().select(["predictions"])
    images = scenes(6, 0, detector.image_size)
    with pytest.raises(BacksightError, match="predictions"):
        fit_map(detector, images, images, progress=False)
    y = normal(1, 3, 3)
    with pytest.raises(BacksightError, match="not finite"):
        Posterior(lambda z: z / 0, y, y, ONE, ONE, ONE).most_probable()
