"""Invert or guess: does a reconstruction tell its own image from all others, and how fast does noise end that?

A decoder that guesses a plausible picture scores well on averages; only one that inverts finds its own image again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.errors import BacksightError
from backsight.measures.structure import Judged, Measure, Scores
from backsight.representation import AnyRepresentation
from backsight.studies.nulls import BySeed, reconstructions
from backsight.tables.values import Values
from backsight.targets import Target

LARGEST = 64  # pixels a side at which pictures are compared
CLEAN = (("noise", 0.0),)


@dataclass(frozen=True)
class Gallery:
    """Candidates among which a reconstruction must find its image.

    vectors: (M, D) of unit length: pictures of at most LARGEST pixels a side, less the mean image.
    """

    vectors: Tensor
    mean: Tensor

    def __len__(self) -> int:
        return len(self.vectors)


def gallery(candidates: Tensor, mean_image: Tensor) -> Gallery:
    """candidates: (M, 3, H, W) in [0, 1], all different; mean_image: (3, H, W) of the training images."""
    if len(candidates) < 2:
        raise BacksightError("an image is found among at least two candidates: give more images.")
    mean = _small(mean_image[None])
    return Gallery(_vectors(candidates, mean), mean)


def _small(images: Tensor) -> Tensor:
    scale = LARGEST / max(images.shape[2:])
    height, width = (max(1, round(side * scale)) for side in images.shape[2:])
    return images if scale >= 1 else F.adaptive_avg_pool2d(images, (height, width))


def _vectors(images: Tensor, mean: Tensor) -> Tensor:
    return F.normalize((_small(images) - mean).flatten(1), dim=1)


def ranks(reconstructions: Tensor, among: Gallery, truth: Tensor) -> Tensor:
    """(B,) number of candidates that are more like the reconstruction than its own image is, 0 to M - 1.

    reconstructions: (B, 3, H, W); truth: (B,) int64, the own image's place in the gallery. Likeness is the
    correlation of pixels around the mean training image, which does not reward a reconstruction for being pale.
    Candidates that are exactly as like count half, so a reconstruction that says nothing has the middle rank.
    """
    likeness = _vectors(reconstructions, among.mean) @ among.vectors.T
    own = likeness.gather(1, truth[:, None])
    return ((likeness > own).sum(1) + ((likeness == own).sum(1) - 1) / 2).float()


def _scores(pictures: Tensor, among: Gallery, truth: Tensor) -> dict[str, Tensor]:
    place = ranks(pictures, among, truth)
    return {"retrieval_top1": (place == 0).float(), "retrieval_rank": place / (len(among) - 1)}


def retrieval(among: Gallery) -> Measure:
    """Measure: `retrieval_top1` (1 where the own image is first) and `retrieval_rank` (share of candidates before it).

    The gallery's first images are the judged ones, in their order. Chance is 1 / M and 1/2.
    """

    def prepared(judged: Judged) -> Callable[[Tensor], Scores]:
        return lambda pictures: {(name, CLEAN): of for name, of in _scores(pictures, among, judged.places).items()}

    return prepared


def noised(representation: AnyRepresentation, amount: float, generator: torch.Generator) -> AnyRepresentation:
    """The representation with Gaussian noise of `amount` times its own standard deviation over images.

    The deviation is taken about each place's mean over the images (so codes of position do not count), one number for
    each channel. Raises BacksightError on a batch of one.
    """
    values = representation.values
    if len(values) < 2:
        raise BacksightError("noised() needs a batch of at least 2 images: one has no standard deviation.")
    spread = (values - values.mean(0)).square().mean((0, 1)).sqrt()
    noise = torch.randn(values.shape, generator=generator).to(values)
    return representation.replace(values + amount * spread * noise)


@torch.no_grad()
def retrieval_under_noise(
    target: Target,
    images: Tensor,
    families: BySeed,
    among: Gallery,
    values: Values,
    noises: Sequence[float],
    seed: int = 0,
) -> None:
    """Adds `retrieval_top1` and `retrieval_rank` with column `noise`, of images whose representation is noised.

    images: (B, 3, H, W), the first of the gallery and of the values; families: {training seed: {family: {tap:
    inverse}}}; noises: in standard deviations of the representation. Every inverse reads the same noise.
    """
    truth, generator = torch.arange(len(images)), torch.Generator().manual_seed(seed)
    for recorded_tap, clean in target.record(images, target.taps).items():
        for amount in noises:
            recorded = {recorded_tap: noised(clean, amount, generator)}
            for family, tap, train_seed, pictures in reconstructions(recorded, families):
                for measure, numbers in _scores(pictures.clamp(0, 1), among, truth).items():
                    values.add(measure, {train_seed: numbers}, tap, family, family=family, noise=float(amount))
