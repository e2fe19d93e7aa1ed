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

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, batches
from backsight.errors import BacksightError
from backsight.inverses.module import Inverses
from backsight.inverses.rows import PIXELS, form_of
from backsight.measures.pixels import psnr
from backsight.tables.values import Values
from backsight.targets import Target
from backsight.training.fit import fit_direct, fit_modular
from backsight.training.starts import stage_pairs

METHODS = ("direct", "modular", "modular_components")
Start = Literal["ours", "paper"]
COSTS = ("flops", "seconds")


@dataclass(frozen=True)
class Training:
    """One training. flops, seconds: with its start; parameters: numbers that the inverses of all taps hold."""

    method: str
    start: Start
    steps: int
    seed: int
    inverses: Inverses
    flops: float
    seconds: float
    parameters: int


@dataclass(frozen=True)
class Taps:
    """judged: where all methods are compared; chain: of the every-block chain, the judged ones among them."""

    judged: tuple[str, ...]
    chain: tuple[str, ...]

    def of(self, method: str) -> tuple[str, ...]:
        return self.chain if method == "modular" else self.judged


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


def train_method(
    target: Target,
    taps: Taps,
    method: str,
    start: Start,
    images: ImageSource | Tensor,
    validation: ImageSource | Tensor,
    begun: Inverses | None = None,
    **options: Any,
) -> Inverses:
    """One training as a user would call it, or as the paper describes it.

    begun: of no step, whose closed-form starts are taken; options: steps, batch_size, seed.
    """
    own: dict[str, Any] = {"taps": taps.of(method), "progress": False, **options}
    if start == "paper":
        recorded = target.record(next(iter(batches(images, 1))), list(own["taps"]))
        forms = {tap: form_of(representation) for tap, representation in recorded.items()}
        pairs = stage_pairs(target, own["taps"], forms) if method != "direct" else ((t, PIXELS) for t in own["taps"])
        own |= {"starts": dict.fromkeys(pairs)}
    elif begun is not None:
        own |= {"starts": {(tap, module.destination): module.linear for tap, module in begun.modules.items()}}
    if method == "direct":
        return fit_direct(target, images, validation, **own)
    plain: dict[str, Any] = {"chain_fraction": 0.0, "image_share": 0.0} if start == "paper" else {}
    return fit_modular(target, images, validation, **own, **plain)


def train_all(
    target: Target,
    taps: Taps,
    train: Callable[[int], ImageSource | Tensor],
    validation: ImageSource | Tensor,
    steps: Sequence[int],
    seeds: Sequence[int] = (0,),
    starts: Sequence[Start] = ("ours", "paper"),
    batch_size: int = 16,
    progress: bool = True,
) -> list[Training]:
    """Every method from every start for every length and seed; train: the training images of a seed.

    A seed's start is made once for all lengths, and its cost is added to each. A step's FLOPs are the difference
    between a training of one step and one of none.
    """
    ways = [(method, start) for start in starts for method in METHODS]
    trainings = []
    bar = tqdm(total=len(ways) * len(seeds) * (1 + len(steps)), desc="trainings", leave=False, disable=not progress)
    with bar:
        for method, start in ways:
            step_flops = 0.0
            for seed in seeds:
                images = train(seed)

                def fit(
                    length: int,
                    begun: Inverses | None = None,
                    method: str = method,
                    start: Start = start,
                    images: ImageSource | Tensor = images,
                    seed: int = seed,
                ) -> Inverses:
                    options = {"steps": length, "batch_size": batch_size, "seed": seed}
                    return train_method(target, taps, method, start, images, validation, begun, **options)

                began = time.perf_counter()
                with FlopCounterMode(display=False) as counter:
                    begun = fit(0)
                preparation, start_flops = time.perf_counter() - began, counter.get_total_flops()
                if not step_flops:
                    none, one = (count_flops(lambda: fit(length, begun)) for length in (0, 1))  # noqa: B023
                    step_flops = one - none
                bar.update()
                for length in sorted(steps):
                    began = time.perf_counter()
                    inverses = fit(length, begun)
                    seconds = preparation + time.perf_counter() - began
                    held = sum(p.numel() for module in inverses.modules.values() for p in module.state_dict().values())
                    flops = start_flops + step_flops * length
                    trainings.append(Training(method, start, length, seed, inverses, flops, seconds, held))
                    bar.update()
    return trainings


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs of the matrix products, convolutions and attention in a call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@torch.no_grad()
def add_scores(
    values: Values,
    target: Target,
    trainings: Iterable[Training],
    taps: Taps,
    images: ImageSource | Tensor,
    mean_image: Tensor,
    batch_size: int = 64,
) -> None:
    """PSNR of every training at the judged taps, with the columns start, steps, flops, seconds (means over training
    seeds) and parameters; and of the mean training image (3, H, W), the `null_mean`."""
    trainings = list(trainings)
    costs = pd.DataFrame([vars(replace(one, inverses=Inverses({}))) for one in trainings])
    costs = costs.groupby(["method", "start", "steps"])[list(COSTS)].mean()
    scores: list[dict[str, list[Tensor]]] = [{tap: [] for tap in taps.judged} for _ in trainings]
    flat: list[Tensor] = []
    for batch in batches(images, batch_size):
        recorded = target.record(batch, list(taps.judged))
        flat.append(psnr(batch, mean_image.expand_as(batch)))
        for training, score in zip(trainings, scores, strict=True):
            for tap in taps.judged:
                score[tap].append(psnr(batch, training.inverses[tap](recorded[tap]).clamp(0, 1)))
    for training, score in zip(trainings, scores, strict=True):
        place: Any = (training.method, training.start, training.steps)
        spent = {cost: float(costs.loc[place, cost]) for cost in COSTS}
        about: dict[str, Any] = {
            "start": training.start,
            "steps": training.steps,
            "parameters": training.parameters,
            **spent,
        }
        for tap, parts in score.items():
            values.add("psnr", {training.seed: torch.cat(parts)}, tap, training.method, **about)
    for tap in taps.judged:
        values.add("psnr", torch.cat(flat), tap, "null_mean")


def at_equal_cost(values: pd.DataFrame, cost: str = "flops") -> pd.DataFrame:
    """PSNR of every method at the cost that all of them have been trained for: one value an image, tap and seed.

    values: of `add_scores`. Of each start the largest cost that every method reaches, `budget`; between two lengths
    PSNR is interpolated along the logarithm of the cost, image by image. The measure is psnr_at_equal_<cost>. A start
    whose curves do not overlap is left out; raises BacksightError where that is every one: train for more lengths.
    """
    parts = []
    trained = values[(values["measure"] == "psnr") & (values["steps"] > 0)]
    for _, of_start in trained.groupby("start", sort=False):
        costs = of_start.groupby(["inverse", "steps"])[cost].mean()
        ranges = costs.groupby("inverse").agg(["min", "max"])
        budget = float(ranges["max"].min())
        if budget < ranges["min"].max() * (1 - 1e-9):
            continue
        for inverse, rows in of_start.groupby("inverse", sort=False):
            known = costs[inverse].sort_values()
            upper = int(np.searchsorted(known.to_numpy(), budget * (1 - 1e-9)))
            lower = max(0, upper - 1)
            apart = math.log(known.iloc[upper] / known.iloc[lower]) if upper > lower else 0.0
            share = math.log(budget / known.iloc[lower]) / apart if apart > 0 else 1.0
            same = [name for name in rows if name not in ("value", "steps", "parameters", *COSTS)]
            below, above = (rows[rows["steps"] == known.index[place]] for place in (lower, upper))
            both = above.merge(below[[*same, "value"]], on=same, suffixes=("", "_below"))
            both["value"] = share * both["value"] + (1 - share) * both.pop("value_below")
            parts.append(both[[*same, "value"]].assign(measure=f"psnr_at_equal_{cost}", budget=budget, steps=np.nan))
    if not parts:
        raise BacksightError(f"no {cost} are common to all methods, from any start: train for more lengths.")
    return pd.concat(parts, ignore_index=True)


def over_taps(values: pd.DataFrame) -> pd.DataFrame:
    """The mean over the judged taps of each image and training seed: tap "all"."""
    same = [name for name in values if name not in ("tap", "depth", "value", "weight")]
    mean = values.groupby(same, sort=False, dropna=False)["value"].mean().reset_index()
    return mean.assign(tap="all", depth=np.nan, weight=1.0)[[*values.columns]]
