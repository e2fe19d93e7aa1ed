"""What a decibel costs: chains of modules against direct decoders, on the same images, for several lengths of training.

    direct               a decoder from every judged tap to pixels
    modular              a module for every block down from the deepest judged tap, chained
    modular_components   a module between neighbouring judged taps, chained

    ours     the library's own way: closed-form starts, modules that learn along chains and in the picture
    paper    random weights, and every module learns alone, by squared error in its own space

One point of a curve is one whole training of that length: one that is looked at half-way has not decayed its learning
rate yet. FLOPs are those of matrix products, convolutions and attention that torch's FlopCounterMode meets in the
training code itself (frozen pass, starts, forward, backward, optimiser), two for a multiplication and addition; solves
of the closed form are not among them. Seconds hold everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, images_at_once
from backsight.errors import BacksightError
from backsight.inverses.module import Inverses
from backsight.inverses.passes import recorded_batches
from backsight.measures.pixels import psnr
from backsight.tables.values import NO_SEED, Values
from backsight.targets import Target
from backsight.training.fit import fit_direct, fit_modular

METHODS: dict[str, Any] = {"direct": fit_direct, "modular": fit_modular, "modular_components": fit_modular}
PAPER = {fit_direct: {"ridge_images": 0}, fit_modular: {"ridge_images": 0, "chain_fraction": 0, "image_share": 0}}
COSTS = ("flops", "seconds")


class Training(NamedTuple):
    """One training. flops, seconds: with its start."""

    method: str
    start: str
    steps: int
    seed: int
    inverses: Inverses
    flops: float
    seconds: float


class Taps(NamedTuple):
    """judged: where all methods are compared; chain: of the every-block chain, the judged ones among them."""

    judged: tuple[str, ...]
    chain: tuple[str, ...]


def taps_for(target: Target, judged: str | Sequence[str]) -> Taps:
    """The target's own taps as the every-block chain, down from the deepest judged one.

    judged: "components", which gets the tap in the middle too where there are fewer than three, or tap names.
    Raises BacksightError on unknown taps.
    """
    taps, order = target.resolve_taps(judged), target.available_taps
    blocks = target.resolve_taps(target.taps)
    if judged == "components" and len(taps) < 3:
        between = [tap for tap in blocks if order.index(taps[0]) < order.index(tap) < order.index(taps[-1])]
        taps = target.resolve_taps([*taps, *between[(len(between) - 1) // 2 :][:1]])
    deepest = order.index(taps[-1])
    return Taps(taps, target.resolve_taps([*taps, *(tap for tap in blocks if order.index(tap) <= deepest)]))


def train_all(
    target: Target,
    taps: Taps,
    train: Callable[[int], ImageSource | Tensor],
    validation: ImageSource | Tensor,
    steps: Sequence[int],
    seeds: Sequence[int] = (0,),
    starts: Sequence[str] = ("ours", "paper"),
    batch_size: int = 16,
) -> Iterator[Training]:
    """Every method from every start for every length and seed, one after the other; train: the images of a seed.

    A seed's start is made once for all lengths, and its cost is added to each; 0 steps are the start alone. A step's
    FLOPs, the same for every seed, are the difference between a training of one step and one of none. Where the chain
    has no further taps the two modular methods are one, and only "modular" is trained.
    """
    methods = [it for it in METHODS if it != "modular_components" or taps.chain != taps.judged]
    ways, of_step = list(product(starts, methods, seeds)), dict[tuple[str, str], int]()
    for start, method, seed in tqdm(ways, "trainings", leave=False):
        options = {"taps": taps.chain if method == "modular" else taps.judged, "seed": seed, "batch_size": batch_size}
        options |= PAPER[METHODS[method]] if start == "paper" else {}
        fit = partial(METHODS[method], target, train(seed), validation, progress=False, **options)
        began = time.perf_counter()
        with FlopCounterMode(display=False) as counter:
            modules = fit(steps=0).modules.items()
        preparation, start_flops = time.perf_counter() - began, counter.get_total_flops()
        fit = partial(fit, starts={(tap, it.destination): it.linear for tap, it in modules if it.linear is not None})
        if (start, method) not in of_step:
            none, one = (count_flops(partial(fit, steps=length)) for length in (0, 1))
            of_step[start, method] = one - none
        for length in sorted(steps):
            began = time.perf_counter()
            inverses = fit(steps=length)
            seconds = preparation + time.perf_counter() - began
            flops = float(start_flops + of_step[start, method] * length)
            yield Training(method, start, length, seed, inverses, flops, seconds)


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs of the matrix products, convolutions and attention in a call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def add_scores(
    values: Values,
    target: Target,
    trainings: Iterable[Training],
    taps: Taps,
    images: ImageSource | Tensor,
    mean_image: Tensor,
) -> None:
    """PSNR of every training at the judged taps, with the columns start, steps, flops and seconds (means over training
    seeds); and of the mean training image (3, H, W), the `null_mean`. One training is held at a time."""

    @torch.no_grad()  # and nothing around it: the trainings are made between
    def scores(read: Callable[[str, Any, Tensor], Tensor]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {tap: [] for tap in taps.judged}
        for batch, recorded in recorded_batches(target, images, taps.judged, images_at_once(images)):
            for tap, listed in parts.items():
                listed.append(psnr(batch, read(tap, recorded[tap], batch)))
        return {tap: torch.cat(listed) for tap, listed in parts.items()}

    rows = []
    for method, start, steps, seed, inverses, flops, seconds in trainings:
        of_taps = scores(lambda tap, held, batch, by=inverses: by[tap](held).clamp(0, 1))  # type: ignore[misc]
        rows.append((method, start, steps, seed, flops, seconds, of_taps))
    about = pd.DataFrame(rows, columns=["inverse", "start", "steps", "seed", *COSTS, "scores"])
    about[list(COSTS)] = about.groupby(["inverse", "start", "steps"])[list(COSTS)].transform("mean")
    null: dict[Any, Any] = {
        "inverse": "null_mean",
        "seed": NO_SEED,
        "scores": scores(lambda tap, held, batch: mean_image.expand_as(batch)),
    }
    for tap in taps.judged:
        for row in [*about.to_dict("records"), null]:
            columns: dict[Any, Any] = dict(row)
            of_taps, seed = columns.pop("scores"), columns.pop("seed")
            values.add("psnr", {seed: of_taps[tap]}, tap, **columns)


def at_equal_cost(values: pd.DataFrame, cost: str = "flops") -> pd.DataFrame:
    """PSNR of every method at the cost that all of them have been trained for: one value an image, tap and seed.

    values: of `add_scores`. Of each start the largest cost that every method reaches, `budget`; between two lengths
    PSNR is interpolated along the logarithm of the cost, image by image. The measure is psnr_at_equal_<cost>. A start
    whose curves do not overlap is left out; raises BacksightError where that is every one: train for more lengths.
    """
    parts = []
    trained = values[(values["measure"] == "psnr") & (values["steps"] > 0)]
    same = [name for name in values if name not in ("value", "steps", *COSTS)]
    for _, of_start in trained.groupby("start", sort=False):
        costs = of_start.groupby(["inverse", "steps"])[cost].mean()
        ends = costs.groupby("inverse").agg(["min", "max"])
        budget = float(ends["max"].min())
        if budget < ends["min"].max() * (1 - 1e-9):
            continue
        for inverse, rows in of_start.groupby("inverse", sort=False):
            known = np.log(costs[inverse].sort_values())
            curves = rows.set_index([*same, "steps"])["value"].unstack()[known.index]
            level = [np.interp(np.log(budget), known, curve) for curve in curves.to_numpy()]
            rows = curves.index.to_frame(index=False).assign(value=level, budget=budget)
            parts.append(rows.assign(measure=f"psnr_at_equal_{cost}"))
    if not parts:
        raise BacksightError(f"no {cost} are common to all methods, from any start: train for more lengths.")
    return pd.concat(parts, ignore_index=True)


def over_taps(values: pd.DataFrame) -> pd.DataFrame:
    """The mean over the judged taps of each image and training seed: tap "all"."""
    same = [name for name in values if name not in ("tap", "depth", "value", "weight")]
    mean = values.groupby(same, sort=False, dropna=False)["value"].mean().reset_index()
    return mean.assign(tap="all", depth=np.nan, weight=1.0)[[*values.columns]]
