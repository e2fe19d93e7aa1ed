"""How far back exact inversion goes on the shipped targets, and what it costs: shares, roots, seconds.

About a quarter of an hour on two cores, with a few images; SIZE=full takes an hour or more.
Rows of `results/bench/exact.csv`: half-steps alone, from the true stream behind each; the roots of the half-steps that
fold, and how often each rule picks the right one; chains from a tap to the embedding, where an image is followed as
long as it is right, so that every one of them is back, or has met another root, or a step that was not solved (all as
`backsight.studies.exact` counts them); and what inverting costs by size, on random weights: seconds an image,
with those of a float64 forward pass of the same blocks as the baseline, so that the ratio is in passes; ViT-B/16 at
224 px, all twelve blocks, and again without its first one, whose MLP moves a random stream by more than
its own size and folds. Those models have no class token: timm starts it at almost nothing, where a LayerNorm is steep
and folds, and its roots would be all that is timed.
`python benchmarks/exact.py FILE` writes the table there instead.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from table import Row, compare, write
from torch import Tensor

from backsight.data.images import batches, open_images
from backsight.exact.inverse import ExactInverse, fit_exact
from backsight.exact.solver import Settings
from backsight.exact.steps import ExactModel
from backsight.inverses.files import load, shipped_inverses
from backsight.studies.exact import Case, chain, half_steps
from backsight.studies.roots import find_roots
from backsight.tables.pooling import pool
from backsight.tables.values import Values
from backsight.targets import Target, load_target

FULL = os.environ.get("SIZE") == "full"
SINGLE = Settings(choose=False, restarts=0, newton=20)  # the plain solver
NONE = (float("nan"), float("nan"), "")
SIZES = ((64, 2), (64, 4), (64, 8), (128, 4), (224, 4)) if FULL else ((64, 2), (64, 4), (64, 8), (128, 4))  # px, blocks
PATCHES_ALONE = {"class_token": False, "global_pool": "avg"}
BASE = ("vit_base_patch16_224", 224)


def test_images(target: Target, count: int) -> Tensor:
    return next(batches(open_images("scenes", "test", target, count), count))


def fitted(name: str, count: int, tap: str) -> Any:
    target = load_target(name)
    folder = shipped_inverses(target)
    completion = load(folder, target)["linear"] if folder is not None else {}
    images = open_images("scenes", "train", target, count)
    return fit_exact(target, images, taps=[tap], linear=completion, count=count, progress=False)[tap]


def rows_of(words: str, case: Case, measure: Callable[[Values], Any], *by: str) -> Iterator[Row]:
    """What a study adds to a table, pooled; `by`: columns whose values stand in the name of the case."""
    values = Values(case.inverse.model.target, "scenes", "test", range(case.count))
    began = time.perf_counter()
    measure(values)
    yield Row("exact", words, "seconds an image", (time.perf_counter() - began) / case.count, "s", *NONE)
    for _, row in pool(values.table()).iterrows():
        name = f"{words}, {' '.join(row[column] for column in by)} alone" if by else words
        parts = [row["measure"].replace("_", " ")]
        if row["measure"].startswith("lost_"):
            parts.append(f"at {row['step']}")
        elif isinstance(row.get("rule"), str):
            parts.append(f"rule: {row['rule']}")
        unit = "1" if row["measure"] == "roots" else "share"
        yield Row("exact", name, ", ".join(parts), float(row["value"]), unit, *NONE)


def alone(name: str, case: Case, words: str) -> Iterator[Row]:
    yield from rows_of(f"{name}, {words}", case, lambda values: half_steps(values, case), "step")


def back(name: str, case: Case, words: str) -> Iterator[Row]:
    """From the tap to where exactness ends; how every image fared, and where it was lost first."""
    named = f"{name}, {case.inverse.source} to {case.inverse.reached}, {words}"
    yield from rows_of(named, case, lambda values: chain(values, case))


def folded(name: str, case: Case, step: str) -> Iterator[Row]:
    """The roots of a half-step on tokens, from the true y, and how often each rule picks the truth's."""
    yield from rows_of(f"{name}, roots of {step}", case, lambda values: find_roots(case, step).add_to(values))


# What it costs by size


def cost(case: str, target: Target, tap: str, images: int, to: str | None = None) -> Iterator[Row]:
    """Seconds an image from a tap to `to` (default: the embedding); baseline: these blocks' forward pass.

    No closed-form starts: the search begins at y, which random weights do not move far.
    """
    inverse = ExactInverse(ExactModel.of(target), tap, settings=SINGLE)
    to = to or inverse.reached
    shape = (images, 3, *target.image_size)
    pictures = torch.rand(shape, generator=torch.Generator().manual_seed(0)).double()
    truth = inverse.model.target.record(pictures, [to, tap])
    steps = inverse.model.between(tap, to)
    x = truth[to].values
    forward = []
    with torch.no_grad():
        for _ in range(5):
            began = time.perf_counter()
            made = x
            for step in steps:
                made = step(made)
            forward.append((time.perf_counter() - began) / images)
    baseline = sorted(forward)[len(forward) // 2]
    began = time.perf_counter()
    trace = inverse.trace(truth[tap], to)
    seconds = (time.perf_counter() - began) / images
    error = (trace.values - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    yield compare("exact", case, "seconds an image", seconds, "s", baseline, "")
    yield Row("exact", case, "solved", float(trace.solved.double().mean()), "share", *NONE)
    yield Row("exact", case, "relative error, largest", float(error.max()), "1", *NONE)


def costs(words: str) -> Iterator[Row]:
    for side, depth in SIZES:
        target = load_target("vit_tiny_patch16_224", pretrained=False, image_size=side, depth=depth, **PATCHES_ALONE)
        case = f"vit_tiny (192 wide), {side} px, {depth} blocks, random weights, Newton, {words}"
        yield from cost(case, target, f"blocks.{depth - 1}", 1)
    target = load_target(BASE[0], pretrained=False, image_size=BASE[1], **PATCHES_ALONE)
    for first, last in ((0, 11), (1, 11)):
        case = f"ViT-B/16, 224 px, blocks {first} to {last}, one image, random weights, Newton, {words}"
        yield from cost(case, target, f"blocks.{last}", 1, f"blocks.{first - 1}" if first else None)


def main() -> Iterator[Row]:
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    fit, some, many, few = {True: (256, 32, 200, 32), False: (40, 1, 2, 1)}[FULL]
    yield from costs(threads)
    last = fitted("scenes-vit", fit, "blocks.5")
    every = Case.of(last, test_images(last.model.target, max(some, many, few)))
    for tap in ("blocks.4", "blocks.3"):
        yield from back("scenes-vit", Case(last.at(tap), every.first(few).streams), threads)
    for tap in ("blocks.5", "blocks.0"):
        yield from folded("scenes-vit", every.first(max(1, few // 2)), tap)
    yield from back("scenes-vit", every.first(many), threads)
    yield from alone("scenes-vit", every.first(some), threads)
    untrained = load_target("scenes-vit").untrained(0)
    images = open_images("scenes", "train", untrained, 40)
    random: Any = fit_exact(untrained, images, taps=["blocks.5"], stages=2, progress=False)["blocks.5"]
    drawn = Case.of(random, test_images(untrained, 2 * few))
    yield from back("scenes-vit with random weights", drawn, threads)
    for name, tap in (("scenes-detr", "encoder.layers.2"), ("scenes-swin", "layers.2"), ("scenes-deit", "blocks.5")):
        if FULL:
            inverse = fitted(name, 128, tap)
            judged = Case.of(inverse, test_images(inverse.model.target, 16))
            yield from back(name, judged, threads)


if __name__ == "__main__":
    rows: list[Row] = []
    began = time.perf_counter()
    for row in main():
        rows.append(row)
        if len(sys.argv) > 1:  # kept as it grows
            pd.DataFrame([vars(each) for each in rows]).to_csv(Path(sys.argv[1]), index=False)
    print(f"{time.perf_counter() - began:.0f} s")
    if len(sys.argv) < 2:
        write("exact", rows)
