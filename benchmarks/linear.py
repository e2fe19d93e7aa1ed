"""What the one-pass closed form saves: against one pass a tap, one solve a strength, and stored features.

About a minute on two cores. The target is a ViT of the shipped size; its weights do not change the times.
"""

from __future__ import annotations

import torch
from sklearn.linear_model import Ridge
from table import Row, compare, interleaved, write
from torch import Tensor

from backsight.inverses.linear import ALPHAS, RidgeAccumulator, best, fit_linear
from backsight.inverses.rows import patchify
from backsight.targets import load_target

IMAGES, VALIDATION, BATCH = 256, 64, 64


def one_pass() -> list[Row]:
    """Every tap from one pass, against a pass for each tap."""
    target = load_target("scenes-vit", pretrained=False)
    images = torch.rand(IMAGES, 3, *target.image_size, generator=torch.Generator().manual_seed(0))
    validation = torch.rand(VALIDATION, 3, *target.image_size, generator=torch.Generator().manual_seed(1))
    seconds = interleaved(
        {
            "together": lambda: fit_linear(target, images, validation=validation, progress=False),
            "apart": lambda: [
                fit_linear(target, images, validation, taps=[tap], progress=False) for tap in target.taps
            ],
        }
    )
    case = f"{len(target.taps)} taps of scenes-vit, {IMAGES} images"
    return [
        compare("linear", case, "seconds, one pass / a pass a tap", seconds["together"], "s", seconds["apart"], "< 0.7")
    ]


def _features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, 3, 64, 64, generator=generator)
    outputs = patchify(images, (8, 8)).flatten(0, 1)
    features = outputs @ torch.randn(192, 128, generator=generator) + torch.randn(
        len(outputs), 128, generator=generator
    )
    return features, outputs


def strengths() -> list[Row]:
    """The best of all strengths from a few solves and their errors, against a solve and an error for each."""
    features, outputs = _features()
    training, validation = RidgeAccumulator(), RidgeAccumulator()
    training.update(features[::2], outputs[::2])
    validation.update(features[1::2], outputs[1::2])
    seconds = interleaved(
        {
            "few": lambda: best(training, validation, ALPHAS),
            "every": lambda: [best(training, validation, [alpha]) for alpha in ALPHAS],
        }
    )
    case = f"{len(ALPHAS)} strengths, 128 inputs, 192 outputs"
    return [compare("linear", case, "seconds, a few / every strength", seconds["few"], "s", seconds["every"], "< 0.5")]


def memory() -> list[Row]:
    """Moments of a stream of batches, against scikit-learn on stored features: time, bytes, and the same solution."""
    features, outputs = _features()
    alpha = 0.01
    spread = features.double().std(0, unbiased=False)
    found: dict[str, Tensor] = {}

    def moments() -> RidgeAccumulator:
        accumulator = RidgeAccumulator()
        for x, y in zip(features.split(BATCH * 64), outputs.split(BATCH * 64), strict=True):
            accumulator.update(x, y)
        found["ours"] = accumulator.solve(alpha)[0]
        return accumulator

    def stored() -> None:
        model = Ridge(alpha=alpha * len(features)).fit((features.double() / spread).numpy(), outputs.double().numpy())
        found["stored"] = torch.from_numpy(model.coef_).T / spread[:, None]

    seconds = interleaved({"moments": moments, "stored": stored})
    accumulator = moments()
    ours = sum(each.nbytes for each in (accumulator.gram, accumulator.cross))
    theirs = features.nbytes + outputs.nbytes
    difference = float((found["ours"] - found["stored"]).norm() / found["stored"].norm())
    case = f"{len(features)} tokens, 128 inputs, 192 outputs"
    return [
        compare("linear", case, "seconds, moments / scikit-learn", seconds["moments"], "s", seconds["stored"], "< 1"),
        compare("linear", case, "bytes, moments / stored float32 features", ours, "B", theirs, "falls as 1 / images"),
        Row("linear", case, "relative difference of weights", difference, "1", 0.0, difference, "< 1e-8"),
    ]


if __name__ == "__main__":
    write("linear", [*one_pass(), *strengths(), *memory()])
