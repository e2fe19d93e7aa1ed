"""How far back exact inversion goes on the shipped targets, and what it costs: shares, roots, passes, seconds.

About three minutes on one core with a few images; SIZE=full, with the figures of the documentation, takes an hour.
Rows of `results/bench/exact.csv`: half-steps alone, from the true stream behind each; the roots of the half-steps that
fold, and how often each rule picks the right one; chains from a tap to the embedding, where an image is followed as
long as it is right, so that every one of them is back, or has met another root, or a step that was not solved.
`python benchmarks/exact.py FILE` writes the table there instead.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from table import Row, write
from torch import Tensor

from backsight.data import batches, open_images
from backsight.exact import RIGHT, ExactInverse, Search, Settings, TokenRoots, fit_exact, step_roots
from backsight.exact_tokens import token_map, token_signs
from backsight.families import load_families, shipped_inverses
from backsight.representation import Representation
from backsight.targets import Target, load_target

FULL = os.environ.get("SIZE") == "full"
SINGLE = Settings(alternatives=0, restarts=0, newton=20)  # the plain solver
PRECISIONS = {
    "float64, differences": SINGLE,
    "float64, derivative": replace(SINGLE, products="derivative"),
    "float32 steps, float64 residuals": replace(SINGLE, products="derivative", precision=torch.float32),
}


def test_images(target: Target, count: int) -> Tensor:
    return next(batches(open_images("scenes", "test", target.image_size, count), count))


def fitted(name: str, count: int) -> dict[str, ExactInverse]:
    target = load_target(name)
    folder = shipped_inverses(target)
    completion = load_families(folder, target)["linear"] if folder is not None else {}
    return fit_exact(target, open_images("scenes", "train", target.image_size, count), "fine", completion, count)


def figures(case: str, table: pd.DataFrame) -> Iterator[Row]:
    """Of one step, or of the last step of a chain."""
    for measure, value, unit in (
        ("images", len(table), "1"),
        ("solved to a relative residual of 1e-10", table["solved"].mean(), "share"),
        (f"input back within {RIGHT:.0e}", (table["error"] <= RIGHT).mean(), "share"),
        ("met another root here", table["another_root"].mean(), "share"),
        (f"tokens back within {RIGHT:.0e}", table["right_tokens"].mean(), "share"),
        ("relative error, median", table["error"].median(), "1"),
        ("relative error of the images that are back, median", _back(table)["error"].median(), "1"),
        ("residual, median", table["residual"].median(), "1"),
        ("Newton iterations, mean", table["iterations"].mean(), "1"),
        ("forward passes, mean", table["passes"].mean(), "1"),
        ("seconds an image", table["seconds"].mean(), "s"),
    ):
        yield Row("exact", case, measure, float(value), unit, float("nan"), float("nan"), "")


def _back(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["error"] <= RIGHT]


def half_steps(
    name: str, inverse: ExactInverse, truth: dict[str, Representation], settings: Settings, words: str
) -> Iterator[Row]:
    """Each by itself."""
    for step in inverse.model.walk.between(inverse.source, inverse.reached):
        if step.destination not in truth or step.source not in truth or step.kind == "norm":
            continue
        one = ExactInverse(inverse.model, step.destination, settings)
        trace = one.trace(truth[step.destination], truth, to=step.source)
        yield from figures(f"{name}, {step.destination} alone, {words}", trace.table())


def chain(
    name: str,
    inverse: ExactInverse,
    truth: dict[str, Representation],
    settings: Settings,
    words: str,
    oracle: bool = False,
) -> Iterator[Row]:
    """From the tap to where exactness ends; how every image fared, and where it was lost first."""
    steps = inverse.model.walk.between(inverse.source, inverse.reached)
    alive = torch.arange(truth[inverse.source].batch)
    total, streams = len(alive), truth[inverse.source]
    fates: dict[str, float] = {"another root": 0, "a step not solved": 0, "an error that has grown": 0}
    case, lost = f"{name}, {inverse.source} to {inverse.reached}, {words}", []
    began = time.perf_counter()
    for step in reversed(steps):
        if not len(alive) or step.source not in truth:
            break
        one = ExactInverse(inverse.model, step.destination, settings)
        there = truth[step.source].index(alive)
        traces = [
            one.trace(streams.index(part), {step.source: there.index(part)}, step.source, oracle=oracle)
            for part in torch.arange(len(alive)).split(one.batch_size)
        ]
        table = pd.concat([trace.table() for trace in traces])
        right = torch.tensor((table["error"] <= RIGHT).to_numpy())
        other = torch.tensor(table["another_root"].to_numpy()) & ~right
        unsolved = ~torch.tensor(table["solved"].to_numpy()) & ~right & ~other
        for fate, flags in zip(fates, (other, unsolved, ~right & ~other & ~unsolved), strict=True):
            fates[fate] += int(flags.sum())
            if bool(flags.any()) and fate != "an error that has grown":
                lost.append((f"lost first to {fate} at {step.destination}", int(flags.sum()) / total, "share"))
        if bool(right.any()):
            error = float(table["error"][table["error"] <= RIGHT].median())
            lost.append((f"back at {step.source}, relative error, median", error, "1"))
        lost.append((f"back at {step.source} within {RIGHT:.0e}", int(right.sum()) / total, "share"))
        values = torch.cat([trace.values for trace in traces])
        alive, streams = alive[right], there.replace(values).index(right.nonzero().flatten())
    for measure, value, unit in (
        ("images", total, "1"),
        (f"input back within {RIGHT:.0e}", len(alive) / total, "share"),
        *((f"lost first to {fate}", count / total, "share") for fate, count in fates.items()),
        ("seconds an image, as long as it is right", (time.perf_counter() - began) / total, "s"),
        *lost,
    ):
        yield Row("exact", case, measure, float(value), unit, *NONE)


def folded(
    inverse: ExactInverse, destination: str, truth: dict[str, Representation], examples: int, curves: int
) -> Iterator[Row]:
    """The roots of a half-step on tokens, from the true y, and how often each rule picks the truth's."""
    model = inverse.model
    step, single = (
        next(each for each in steps.between(inverse.source, inverse.reached) if each.destination == destination)
        for steps in (model.walk, model.single)
    )
    x, y = (truth[tap].values.double() for tap in (step.source, destination))
    began = time.perf_counter()
    with torch.no_grad():
        staged = model.starts[destination](step, y)
        guess = staged[0].flatten(0, 1)
        drawn = model.examples[destination].starts(y.flatten(0, 1), guess, examples)
        starts = [staged[0], staged[-1], y, *(each.view_as(y) for each in drawn), 1.4 * staged[0]]
        found = step_roots(step, y, starts, Search(rounds=curves), single)
        seconds = time.perf_counter() - began
        sign = token_signs(token_map(step.forward, step.jacobian), x.flatten(0, 1))
    there = x.flatten(0, 1)[found.token]
    near = (found.x - there).norm(dim=1) <= RIGHT * there.norm(dim=1)
    has = torch.zeros(found.tokens, dtype=torch.bool)
    has[found.token[near]] = True
    prior = model.priors[step.source]
    images, tokens = y.shape[:2]
    rated = torch.stack([each for each in _placed(prior.distance, x, found)])
    case = f"scenes-vit, roots of {destination}, {len(starts)} starts, {curves} rounds of curves"
    rows = [
        ("images", images, "1"),
        ("truth with a negative determinant", (sign < 0).double().mean(), "share"),
        ("tokens solved to a relative residual of 1e-10", (found.count > 0).double().mean(), "share"),
        ("tokens of which several roots were found", (found.count > 1).double().mean(), "share"),
        ("roots found of a token, mean", found.count.double().mean(), "1"),
        ("tokens whose signs sum to 1", (found.degree == 1).double().mean(), "share"),
        ("tokens whose truth was found", has.double().mean(), "share"),
        ("images whose truth was found whole", has.view(images, tokens).all(1).double().mean(), "share"),
        ("tokens whose signs sum to 1, truth found", has[found.degree == 1].double().mean(), "share"),
        ("tokens whose signs do not, truth found", has[found.degree != 1].double().mean(), "share"),
        ("seconds an image", seconds / images, "s"),
    ]
    for words, score in (
        ("the most usual", rated),
        ("the nearest to the ridge guess", (found.x - guess[found.token]).norm(dim=1)),
        ("the shortest", found.x.norm(dim=1)),
    ):
        best = found.best(score)
        right = near[best.clamp(min=0)] & (best >= 0)
        rows.append((f"{words} is right, tokens", right.double().mean(), "share"))
        rows.append(
            (f"{words} is right, every token of an image", right.view(images, -1).all(1).double().mean(), "share")
        )
    for measure, value, unit in rows:
        yield Row("exact", case, measure, float(value), unit, *NONE)


def _placed(score: Callable[[Tensor], Tensor], x: Tensor, found: TokenRoots) -> Iterator[Tensor]:
    """The score of every root, which is one of a whole stream: each is put into its token's place."""
    tokens = x.shape[1]
    for token, root in zip(found.token, found.x, strict=True):
        stream = x[:1].clone()
        stream[0, token % tokens] = root
        yield score(stream)[0, token % tokens]


NONE = (float("nan"), float("nan"), "")
ORACLE = Settings(restarts=0, newton=20, alternatives=16, curves=2)
CHOOSING = Settings(restarts=0, newton=20, alternatives=4)


def main() -> Iterator[Row]:
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    count = {True: (256, 32, 200, 32), False: (40, 1, 2, 1)}[FULL]
    fit, alone, many, few = count
    inverses = fitted("scenes-vit", fit)
    last = inverses["blocks.5"]
    truth = last.model.target.record(test_images(last.model.target, max(count[1:])).double(), "fine")

    def some(number: int) -> dict[str, Representation]:
        return {tap: each.index(torch.arange(number)) for tap, each in truth.items()}

    for tap in ("blocks.4", "blocks.3"):
        yield from chain("scenes-vit", inverses[tap], some(few), CHOOSING, threads)
    yield from chain("scenes-vit", last, some(few), ORACLE, f"the root nearest to the truth, {threads}", oracle=True)
    yield from chain(
        "scenes-vit", inverses["blocks.4"], some(few), ORACLE, f"the root nearest to the truth, {threads}", True
    )
    for tap in ("blocks.5", "blocks.0"):
        yield from folded(last, tap, some(max(1, few // 2)), 8, 1)
    yield from chain("scenes-vit", last, some(many), CHOOSING, threads)
    yield from half_steps("scenes-vit", last, some(alone), CHOOSING, threads)
    untrained = load_target("scenes-vit").untrained(0)
    random = fit_exact(
        untrained, open_images("scenes", "train", untrained.image_size, 40), ["blocks.5"], {}, 40, stages=2
    )["blocks.5"]
    recorded = random.model.target.record(test_images(untrained, 2 * few).double(), "fine")
    yield from chain("scenes-vit with random weights", random, recorded, CHOOSING, threads)
    for words, settings in PRECISIONS.items() if FULL else ():
        eight = some(8)
        one = ExactInverse(last.model, "blocks.4", settings)
        trace = one.trace(eight["blocks.4"], eight, "blocks.3")
        yield from figures(f"scenes-vit, blocks.4 to blocks.3, {words}", _last(trace.table()))
    for name, tap in (("scenes-detr", "encoder.layers.2"), ("scenes-swin", "layers.2"), ("scenes-deit", "blocks.5")):
        if FULL:
            inverse = fitted(name, 128)[tap]
            recorded = inverse.model.target.record(test_images(inverse.model.target, 16).double(), "fine")
            yield from chain(name, inverse, recorded, CHOOSING, threads)


def _last(table: pd.DataFrame) -> pd.DataFrame:
    """Of the last step, with the cost of all."""
    total = table.groupby("sample")[["seconds", "passes", "iterations"]].sum()
    return table[table["to"] == table["to"].iloc[-1]].set_index("sample").assign(**total)


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
