"""Inversion without training: an invertible target is inverted, in range, reproducibly, and its cost is counted."""

import pytest
import torch
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.measures.pixels import psnr
from backsight.studies.optimisation import ImagePrior, best_option, optimise_pixels, optimise_prior
from backsight.targets import module_target
from backsight.targets.base import Target

SIZE = (16, 16)


class Patches(nn.Module):
    """An orthogonal patch embedding: as many numbers as pixels, none lost."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 2, stride=2, bias=False)
        rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0))).Q
        self.embed.weight.data = rotation.reshape(12, 3, 2, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(images).mean((2, 3))


@pytest.fixture(scope="module")
def target() -> Target:
    return module_target(Patches(), ["embed"], image_size=SIZE)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Two smooth images, inside the range, so that a prior of smoothness can draw them."""
    rows = torch.linspace(0, 3, SIZE[0])[:, None]
    columns = torch.linspace(0, 3, SIZE[1])[None]
    waves = [torch.sin(rows * a + columns * b + c) for a, b, c in ((1, 0, 0), (0, 1, 1), (1, 1, 2), (2, 0, 1))]
    return torch.stack([torch.stack(waves[:3]), torch.stack(waves[1:])]) * 0.3 + 0.5


def test_an_invertible_target_is_inverted(target: Target, images: Tensor) -> None:
    representation = target.record(images, ["embed"])["embed"]
    made = optimise_pixels(target, "embed", representation, steps=150, learning_rate=0.05, total_variation=0.0)
    assert made.losses.shape == (150, 2)
    assert made.losses[-1].max() < 1e-3
    assert psnr(images, made.images).min() > 35


def test_total_variation_smooths(target: Target, images: Tensor) -> None:
    representation = target.record(images, ["embed"])["embed"]

    def roughness(weight: float) -> float:
        made = optimise_pixels(target, "embed", representation, steps=60, total_variation=weight).images
        assert made.min() >= 0
        assert made.max() <= 1
        return float(made.diff(dim=3).square().mean() + made.diff(dim=2).square().mean())

    assert roughness(1000.0) < 0.5 * roughness(0.0)


def test_the_deep_image_prior_draws_what_the_target_saw(target: Target, images: Tensor) -> None:
    representation = target.record(images, ["embed"])["embed"]
    made = optimise_prior(target, "embed", representation, steps=150, learning_rate=0.02, width=12)
    assert (made.losses[-1] < 0.1 * made.losses[0]).all()
    assert psnr(images, made.images).min() > 20
    assert made.images.shape == images.shape


@pytest.mark.parametrize("optimise", [optimise_pixels, optimise_prior])
def test_an_image_does_not_depend_on_the_others(target: Target, images: Tensor, optimise) -> None:
    """The first image alone is the first image of the batch (for pixels to the digit; networks are drawn together)."""
    representation = target.record(images, ["embed"])["embed"]
    state = torch.get_rng_state()
    both = optimise(target, "embed", representation, steps=5, seed=1)
    again = optimise(target, "embed", representation, steps=5, seed=1)
    assert torch.equal(both.images, again.images)
    assert torch.equal(state, torch.get_rng_state())
    if optimise is optimise_pixels:
        alone = optimise(target, "embed", representation.index(0), steps=5, seed=1)
        torch.testing.assert_close(both.images[:1], alone.images, atol=1e-4, rtol=0)


def test_the_networks_of_a_prior_are_separate() -> None:
    network = ImagePrior(2, (16, 16), width=8)
    drawn = network()
    drawn[0].sum().backward()
    kernel = network.down[0].convolution.weight.grad
    assert kernel[:8].abs().sum() > 0
    assert kernel[8:].abs().sum() == 0


def test_flops_are_of_all_steps(target: Target, images: Tensor) -> None:
    representation = target.record(images, ["embed"])["embed"]
    few, many = (
        optimise_pixels(target, "embed", representation, steps=steps, total_variation=0.0).flops for steps in (2, 6)
    )
    # 2 x 64 places x 12 outputs x 12 inputs x 2 images, forward and once more for the gradient of the input.
    assert few == 2 * (2 * 64 * 12 * 12 * 2 * 2)
    assert many == 3 * few


def test_an_option_is_chosen_by_its_validation_score(target: Target, images: Tensor) -> None:
    best, found = best_option(
        optimise_pixels, "learning_rate", [1e-5, 0.05], target, "embed", images, steps=30, total_variation=0.0
    )
    assert best == 0.05
    assert set(found) == {1e-5, 0.05}
    with pytest.raises(BacksightError, match="at least 1 step"):
        optimise_pixels(target, "embed", target.record(images, ["embed"])["embed"], steps=0)
