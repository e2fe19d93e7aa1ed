"""Dead leaves have the statistics of photographs, and are the same images for the same seed."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from backsight.data.images import open_images, tensor
from backsight.data.leaves import AXES


def amplitude_slope(images: Tensor) -> float:
    """Of the logarithm of the amplitude over that of the frequency, from 4 cycles an image to 0.4 a pixel."""
    grey = images.double().mean(1)
    side = grey.shape[-1]
    window = torch.hann_window(side, dtype=torch.double)
    spectra = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * window[:, None] * window).abs().square()
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.fftfreq(side)[None])
    edges = np.geomspace(4 / side, 0.4, 9)
    rings = [(frequency >= low) & (frequency < high) for low, high in pairwise(edges)]
    amplitudes = [float(spectra[:, ring].mean().sqrt()) for ring in rings]
    return float(np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(amplitudes), 1)[0])


@pytest.fixture(scope="module")
def leaves() -> Tensor:
    return tensor(open_images("leaves", "train", 128, 32))


def test_spectra_contrast_and_edges_are_those_of_photographs(leaves: Tensor) -> None:
    photographs = tensor(open_images("photographs", "all", 128))
    assert abs(amplitude_slope(leaves) - amplitude_slope(photographs)) < 0.35
    contrast = [images.mean(1).std((1, 2)).mean() for images in (leaves, photographs)]
    assert abs(contrast[0] / contrast[1] - 1) < 0.35
    for images in (leaves, photographs):  # heavy tails: normal differences would have a kurtosis of 3
        steps = images.mean(1).diff(dim=-1).flatten()
        assert steps.pow(4).mean() / steps.square().mean().square() > 10


def test_colours_vary_mostly_together(leaves: Tensor) -> None:
    for images in (leaves, tensor(open_images("photographs", "all", 128))):
        pixels = images.permute(0, 2, 3, 1).reshape(-1, 3).double()
        light, yellow_blue, red_green = ((pixels - pixels.mean(0)) @ torch.from_numpy(AXES).T).std(0)
        assert light > 2 * yellow_blue > 2 * red_green


def test_an_image_depends_on_split_seed_and_index_alone() -> None:
    many, few = open_images("leaves", "train", (37, 64), 5, 3), open_images("leaves", "train", (37, 64), 2, 3)
    assert many.image(0).shape == (3, 37, 64)
    assert torch.equal(many.image(1), few.image(1))
    others = [open_images("leaves", split, (37, 64), 2, seed) for split, seed in (("train", 4), ("test", 3))]
    for other in others:
        assert not torch.equal(other.image(1), few.image(1))
    assert not torch.equal(many.image(0), many.image(1))
