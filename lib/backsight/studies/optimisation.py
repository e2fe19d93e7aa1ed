"""Inversion without training: an image is optimised until the frozen target sees in it what it saw in the original.

Two priors keep the pixels natural: little total variation (Mahendran & Vedaldi, Understanding deep image
representations by inverting them, CVPR 2015), and the structure of an untrained convolutional network that draws the
image from noise (Ulyanov et al., Deep image prior, CVPR 2018). Every image is optimised by itself, all of a batch side
by side. Nothing is learned from other images: each new one costs as much again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backsight.data.images import batches
from backsight.errors import BacksightError
from backsight.measures.pixels import psnr
from backsight.representation import Representation, Tokens
from backsight.targets.base import Target, seeded


@dataclass(frozen=True)
class Optimised:
    """images: (B, 3, H, W) in [0, 1]; losses: (steps, B) error of the representation, 1 = as bad as its mean token;
    seconds, flops: of the whole batch; flops are those of one counted step (forward, backward), times the steps."""

    images: Tensor
    losses: Tensor
    seconds: float
    flops: float


def optimise_pixels(
    target: Target,
    tap: str,
    representation: Representation,
    *,
    steps: int = 200,
    learning_rate: float = 0.05,
    total_variation: float = 1.0,
    seed: int = 0,
) -> Optimised:
    """Images whose representation at `tap` is the one given, with little total variation; by Adam on the pixels.

    total_variation: weight of the mean over pixels and channels of the squared differences to the pixels below and to
    the right (exponent 2 of the paper), beside the representation's error (see `Optimised`). Pixels start as grey with
    a little noise of the seed and are kept in [0, 1] after each step.
    Raises BacksightError as `target.record`, and for a number of steps below 1.
    """
    batch = representation.batch
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 3, *target.image_size, generator=generator)
    pixels = nn.Parameter((0.5 + 0.05 * noise).clamp(0, 1).to(target.device))

    def regularity(images: Tensor) -> Tensor:
        down, across = images.diff(dim=2).square(), images.diff(dim=3).square()
        return total_variation * (down.flatten(1).mean(1) + across.flatten(1).mean(1))

    def keep_in_range() -> None:
        with torch.no_grad():
            pixels.clamp_(0, 1)

    return _optimise(
        target, tap, representation, lambda: pixels, [pixels], regularity, keep_in_range, steps, learning_rate
    )


def optimise_prior(
    target: Target,
    tap: str,
    representation: Representation,
    *,
    steps: int = 200,
    learning_rate: float = 0.01,
    width: int = 24,
    seed: int = 0,
) -> Optimised:
    """Images whose representation at `tap` is the one given, drawn by one untrained network for each; Adam on its
    weights.

    width: channels of the network; the noise that it draws from is fixed by the seed, and the same for every image.
    Raises BacksightError as `target.record`, and for a number of steps below 1.
    """
    with seeded(seed):
        network = ImagePrior(representation.batch, target.image_size, width).to(target.device)
    return _optimise(
        target,
        tap,
        representation,
        network,
        list(network.parameters()),
        lambda images: images.new_zeros(len(images)),
        lambda: None,
        steps,
        learning_rate,
    )


class ImagePrior(nn.Module):
    """One hourglass for each image of a batch, side by side as the groups of grouped convolutions.

    noise -> [conv, halved] x levels -> [doubled, + skip, conv] x levels -> sigmoid -> (B, 3, H, W) in [0, 1]
    """

    noise: Tensor

    def __init__(self, batch: int, size: tuple[int, int], width: int, levels: int = 3) -> None:
        super().__init__()
        self.batch = batch
        # 0.1 is the spread of the noise in the original.
        noise = 0.1 * torch.rand(1, 1, width, *size)
        self.register_buffer("noise", noise.expand(-1, batch, -1, -1, -1).flatten(1, 2).clone())
        self.down = nn.ModuleList(_Layer(batch, width, width, stride=2) for _ in range(levels))
        self.same = nn.ModuleList(_Layer(batch, width, width) for _ in range(levels))
        self.up = nn.ModuleList(_Layer(batch, width, width) for _ in range(levels))
        self.out = nn.Conv2d(batch * width, batch * 3, 1, groups=batch)

    def forward(self) -> Tensor:
        x, kept = self.noise, []
        for down, same in zip(self.down, self.same, strict=True):
            kept.append(x)
            x = same(down(x))
        for layer, skipped in zip(self.up, reversed(kept), strict=True):
            x = layer(F.interpolate(x, skipped.shape[2:], mode="bilinear") + skipped)
        return self.out(x).unflatten(1, (self.batch, 3))[0].sigmoid()


class _Layer(nn.Module):
    """(1, B * C, H, W): a 3 x 3 convolution in each group, each channel normalised, leaky ReLU."""

    def __init__(self, batch: int, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            batch * inputs, batch * outputs, 3, stride, padding=1, padding_mode="reflect", groups=batch
        )
        # Batch norm over a batch of one, as in the original.
        self.norm = nn.GroupNorm(batch * outputs, batch * outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.convolution(x)), 0.2)


def _optimise(
    target: Target,
    tap: str,
    representation: Representation,
    draw: Callable[[], Tensor],
    parameters: Sequence[nn.Parameter],
    regularity: Callable[[Tensor], Tensor],
    after_step: Callable[[], None],
    steps: int,
    learning_rate: float,
) -> Optimised:
    if steps < 1:
        raise BacksightError(f"An optimisation needs at least 1 step, not {steps}.")
    wanted, counted = representation.values.detach(), _counted(representation)
    scale = _error(_mean_token(wanted, counted), wanted, counted).clamp(min=1e-12)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    losses = []

    def step() -> None:
        images = draw()
        made = target.record(images, [tap], gradient=True)[tap].values
        error = _error(made, wanted, counted) / scale
        optimizer.zero_grad()
        # The sum over images: no image's gradient depends on how many there are.
        (error + regularity(images)).sum().backward()
        optimizer.step()
        after_step()
        losses.append(error.detach().cpu())

    started = time.perf_counter()
    with FlopCounterMode(display=False) as counter:
        step()
    for _ in range(steps - 1):
        step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        images = draw().clamp(0, 1).cpu()
    return Optimised(images, torch.stack(losses), seconds, float(counter.get_total_flops()) * steps)


def _counted(representation: Representation) -> Tensor:
    """(B, N, 1): 1 for every token that is no padding."""
    values = representation.values
    counted = torch.ones_like(values[..., :1])
    if isinstance(representation, Tokens) and representation.padding is not None:
        counted[:, representation.prefix :] = (~representation.padding)[..., None].to(values)
    return counted


def _mean_token(values: Tensor, counted: Tensor) -> Tensor:
    return (values * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True)


def _error(values: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    """(B,) summed squared error over tokens and channels."""
    return ((values - wanted).square() * counted).flatten(1).sum(1)


def best_option(
    optimise: Callable[..., Optimised],
    option: str,
    choices: Sequence[float],
    target: Target,
    tap: str,
    images: Tensor,
    **options: Any,
) -> tuple[float, Mapping[float, float]]:
    """(the best, {choice: mean PSNR in dB}) of a numerical option, judged on images of another split.

    images: (B, 3, H, W), which should be validation images.
    """
    representation = target.record(images, [tap])[tap]
    found = {
        choice: float(psnr(images, optimise(target, tap, representation, **{option: choice}, **options).images).mean())
        for choice in choices
    }
    return max(found, key=found.__getitem__), found


def first_images(images: Any, count: int) -> Tensor:
    """The first `count` images (B, 3, H, W) of a source."""
    return next(iter(batches(images, min(count, len(images)))))
