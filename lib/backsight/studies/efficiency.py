"""What a decibel costs: modular inverses against direct decoders under equal conditions (trainings.py), as tables.

The same images, seeds, batch size, optimiser, schedule, validation images and modes for every method, and a learning
rate that each has searched with the same budget on the validation split. One point of a curve is one whole training of
that length, with its own warm-up and decay: one that is looked at half-way has not decayed its learning rate yet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backsight.data.images import batches
from backsight.inverses.families import Reconstruct
from backsight.inverses.module import Inverses
from backsight.inverses.rows import PIXELS, Pair
from backsight.measures.pixels import psnr
from backsight.studies.nulls import null_mean, shuffled
from backsight.studies.optimisation import best_option, first_images, optimise_pixels, optimise_prior
from backsight.studies.trainings import (
    ALL,
    METHODS,
    Matched,
    Setting,
    Starts,
    Trial,
    closed_form_starts,
    count_flops,
    judged_mean,
    tap_psnr,
    without_context,
)
from backsight.tables.pool import metrics_row, pooled_ratio, pooled_rows

# method, function, the option that is chosen on validation images, its candidates
OPTIMISERS = (
    ("optimised_tv", optimise_pixels, "total_variation", (3.0, 30.0, 300.0)),
    ("optimised_prior", optimise_prior, "learning_rate", (0.001, 0.003, 0.01)),
)


# --------------------------------------------------------------------------------------------------------- tidy rows


def tidy(setting: Setting, trials: Iterable[Trial], seed: int = 0, **columns: Any) -> pd.DataFrame:
    """Tidy rows of PSNR: one for each tap and one for the mean over the judged taps (tap "all"), seeds pooled.

    Trainings that differ in nothing but the seed are one group; its seconds and FLOPs are their means. Rows of the
    search have the split of the validation images. columns: others of every row (dataset, split, …).
    """
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        rate = trial.learning_rate if trial.part == "search" else None
        key = (trial.part, trial.method, trial.start, trial.steps, trial.train_images, rate)
        groups.setdefault(key, []).append(trial)
    rows: list[dict[str, Any]] = []
    for members in groups.values():
        first = members[0]
        here = _columns(setting, members) | columns
        if first.part == "search":
            here["split"] = getattr(setting.validation, "split", "validation")
        tables = {tap: {t.seed: t.values[tap] for t in members} for tap in first.values}
        if first.part != "per_image":
            tables[ALL] = {t.seed: judged_mean(setting, t) for t in members}
        for tap, table in tables.items():
            depth = math.nan if tap == ALL else setting.target.depth(tap)
            rows += pooled_rows(table, "psnr", seed, tap=tap, depth=depth, inverse=first.method, **here)
    return pd.DataFrame(rows)


def _columns(setting: Setting, members: Sequence[Trial]) -> dict[str, Any]:
    first = members[0]
    return {
        "target": setting.target.name,
        "weights": setting.target.weights,
        "steps": first.steps,
        "flops": float(np.mean([t.flops for t in members])),
        "seconds": float(np.mean([t.seconds for t in members])),
        "parameters": first.parameters,
        "learning_rate": first.learning_rate,
        "train_images": first.train_images,
        "module": None,
        "part": first.part,
        "start": first.start,
    }


def chain_losses(values: Mapping[str, Tensor], pairs: Sequence[Pair]) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: ((N,) dB lost, (N,) squared error added)} along a chain, from the PSNR of each of its starting points.

    values: {tap: (N,) PSNR} of the chain fed with the true representation at that tap; pairs: (source, destination) of
    the modules. What the module of a tap loses is the PSNR from its destination minus that from its source; its added
    squared error is the same difference in squared error, and these sum up exactly to the error of the whole chain.
    The module that ends in pixels has no PSNR below it (NaN), and adds all of its own squared error.
    """
    found = {}
    for source, destination in pairs:
        error = torch.pow(10.0, -values[source].double() / 10)
        if destination == PIXELS:
            found[source] = (torch.full_like(error, math.nan), error)
        else:
            below = values[destination]
            found[source] = (below - values[source], error - torch.pow(10.0, -below.double() / 10))
    return found


def chain_path(pairs: Sequence[Pair]) -> list[Pair]:
    """The modules that the chain from the deepest tap runs through, deepest first."""
    ends = dict(pairs)
    source, path = pairs[-1][0], []
    while source in ends:
        path.append((source, ends[source]))
        source = ends[source]
    return path


def chain_table(setting: Setting, trials: Sequence[Trial], seed: int = 0, **columns: Any) -> pd.DataFrame:
    """Tidy rows along the chain: `chain_error` (dB lost at each module) and `chain_share` of its squared error.

    trials: of one length, all seeds. A direct or linear family has no chain: their rows tell how much less is read from
    a tap than from the tap before it, which a chain cannot be blamed for.
    """
    rows: list[dict[str, Any]] = []
    for method in dict.fromkeys(trial.method for trial in trials):
        members = [trial for trial in trials if trial.method == method]
        taps = [tap for tap in setting.chain if tap in members[0].values]
        reads = method in ("direct", "linear")
        pairs = list(zip(taps, (PIXELS, *taps), strict=False)) if reads else setting.pairs(method)
        path = chain_path(pairs)
        losses = {trial.seed: chain_losses(trial.values, path) for trial in members}
        whole = {trial.seed: torch.pow(10.0, -trial.values[path[0][0]].double() / 10) for trial in members}
        for source, destination in path:
            here = _columns(setting, members) | columns
            here |= {"tap": source, "depth": setting.target.depth(source), "inverse": method}
            here |= {"module": source, "part": "chain"}
            if destination != PIXELS:
                rows += pooled_rows({s: each[source][0] for s, each in losses.items()}, "chain_error", seed, **here)
            if not reads:
                added = {s: each[source][1] for s, each in losses.items()}
                value, low, high = pooled_ratio(added, whole, seed)
                n = len(next(iter(whole.values())))
                rows.append(metrics_row("chain_share", value, low, high, n, seed, seeds=len(members), **here))
    return pd.DataFrame(rows)


def difference_table(setting: Setting, trials: Sequence[Trial], first: str, second: str, seed: int = 0) -> pd.DataFrame:
    """PSNR of one method minus another's, paired image by image and seed by seed, at each judged tap and over all.

    trials: any; pairs are those that agree in part, start, steps, training images and seed. Columns: part, start,
    steps, train_images, tap, difference, low, high (dB), n, seeds.
    """
    groups: dict[tuple[Any, ...], dict[str, dict[int, Trial]]] = {}
    for trial in trials:
        if trial.method in (first, second) and trial.part not in ("search", "per_image"):
            key = (trial.part, trial.start, trial.steps, trial.train_images)
            groups.setdefault(key, {}).setdefault(trial.method, {})[trial.seed] = trial
    rows = []
    for key, methods in groups.items():
        shared = sorted(methods.get(first, {}).keys() & methods.get(second, {}).keys())
        if not shared:
            continue
        a, b = ([methods[name][s] for s in shared] for name in (first, second))
        tables = {tap: [x.values[tap] - y.values[tap] for x, y in zip(a, b, strict=True)] for tap in setting.judged}
        tables[ALL] = [judged_mean(setting, x) - judged_mean(setting, y) for x, y in zip(a, b, strict=True)]
        for tap, values in tables.items():
            row = pooled_rows(dict(zip(shared, values, strict=True)), "difference", seed)[0]
            names = ("part", "start", "steps", "train_images")
            kept = {name: row[name] for name in ("low", "high", "n", "seeds")}
            rows.append(dict(zip(names, key, strict=True)) | {"tap": tap, "difference": row["value"]} | kept)
    return pd.DataFrame(rows)


def step_costs(setting: Setting, matched: Matched) -> pd.DataFrame:
    """What one step costs: taps inverted, GFLOPs of a step, of a step and tap, of the frozen pass in it (one method a
    row)."""
    image = next(iter(batches(setting.test, 1)))
    frozen = count_flops(lambda: setting.target.record(image, setting.chain)) * setting.batch_size / 1e9
    rows = []
    for (method, start), cost in matched.costs.items():
        if cost.step:
            taps = len(setting.taps(method))
            rows.append(
                {
                    "inverse": method,
                    "start": start,
                    "taps": taps,
                    "GFLOPs a step": cost.step / 1e9,
                    "GFLOPs a step and tap": cost.step / 1e9 / taps,
                    "of it the frozen pass": frozen,
                    "learning rate": matched.rates[method, start],
                }
            )
    return pd.DataFrame(rows)


def every_block(setting: Setting) -> Setting:
    """The same setting, judged at every block: what it would take to invert all of them directly."""
    return replace(setting, judged=setting.chain)


def reference_trials(setting: Setting, families: Mapping[int, Mapping[str, Mapping[str, Reconstruct]]]) -> list[Trial]:
    """Inverses from elsewhere on the same test images: the part "reference", which is matched to nothing.

    families: {training seed: {family: {tap: reconstruction}}} as `families_by_seed` gives them; of each, the taps of
    the chain. What they have cost is not known here (NaN).
    """
    trials = []
    for seed, found in families.items():
        for family, taps in found.items():
            shared = {tap: reconstruct for tap, reconstruct in taps.items() if tap in setting.chain}
            if set(shared) >= set(setting.judged):
                values = tap_psnr(setting.target, shared, setting.test)
                trials.append(_untimed("reference", family, seed, values))
    return trials


def null_trials(setting: Setting, starts: Starts) -> list[Trial]:
    """The part "nulls": the mean training image, linear inverses of another image's representation, and linear
    inverses of the same architecture with random weights (fitted on `ridge_images`), at the judged taps."""
    seed, target = starts.seed, setting.target
    mean = null_mean(setting.train(seed, setting.ridge_images))
    linear: dict[str, Reconstruct] = {tap: starts.maps[tap, PIXELS] for tap in setting.judged}
    generator = torch.Generator().manual_seed(seed)
    random_setting = replace(setting, target=target.untrained(seed))
    maps = closed_form_starts(random_setting, seed, setting.ridge_images).maps
    values = {
        "null_mean": tap_psnr(
            target, dict.fromkeys(linear, lambda given: mean.expand(given.batch, -1, -1, -1)), setting.test
        ),
        "null_shuffled": tap_psnr(
            target, {tap: _of_another(each, generator) for tap, each in linear.items()}, setting.test
        ),
        "null_untrained": tap_psnr(
            random_setting.target, {tap: maps[tap, PIXELS] for tap in setting.judged}, setting.test
        ),
    }
    return [_untimed("nulls", name, seed, found) for name, found in values.items()]


def _untimed(part: str, method: str, seed: int, values: Mapping[str, Tensor]) -> Trial:
    """Scores of what was not trained here: what it cost is not known."""
    unknown = math.nan
    return Trial(part, method, "closed_form", 0, unknown, 0, seed, values, unknown, unknown, 0)


def _of_another(inverse: Reconstruct, generator: torch.Generator) -> Reconstruct:
    def reconstruct(given: Any) -> Tensor:
        return inverse(shuffled(given, generator))

    return reconstruct


def as_data_size(trials: Iterable[Trial], seed: int, steps: int) -> list[Trial]:
    """The full training set as a point of the data-size curve: the trials of the curves with this seed and length."""
    return [
        replace(trial, part="data")
        for trial in trials
        if trial.part == "curve"
        and trial.seed == seed
        and (trial.method == "linear" or (trial.method != "modular_polished" and trial.steps == steps))
    ]


# ---------------------------------------------------------------------------------- optimisation, on the same images


@dataclass(frozen=True)
class OptimisedFew:
    """trials: one a method, of the part "per_image"; chosen: the options tried on validation images, a row each."""

    trials: tuple[Trial, ...]
    chosen: tuple[Mapping[str, Any], ...]


def few_images(setting: Setting, count: int) -> tuple[Tensor, str]:
    """The first test images (B, 3, H, W), and the deepest judged tap that is no prediction."""
    taps = [tap for tap in setting.judged if setting.forms[tap].kind != "predictions"]
    return first_images(setting.test, count), taps[-1]


def optimise_few(
    setting: Setting, tap: str, images: Tensor, steps: int, seed: int = 0
) -> tuple[dict[str, Tensor], OptimisedFew]:
    """Both kinds of optimisation on these images, their option chosen on as many validation images.

    Returns {"optimised_tv" | "optimised_prior": (B, 3, H, W)} and their trials; candidates get a third of the steps,
    so that choosing costs as much as the inversion itself, and neither is charged for it.
    """
    target, validation = setting.target, first_images(setting.validation, len(images))
    representation = target.record(images, [tap])[tap]
    pictures: dict[str, Tensor] = {}
    trials, chosen = [], []
    for method, optimise, option, choices in OPTIMISERS:
        best, found = best_option(
            optimise, option, choices, target, tap, validation, steps=max(1, steps // len(choices)), seed=seed
        )
        chosen += [
            {"inverse": method, "option": option, "value": value, "validation PSNR": ratio, "chosen": value == best}
            for value, ratio in found.items()
        ]
        options: dict[str, Any] = {"steps": steps, "seed": seed, option: best}
        made = optimise(target, tap, representation, **options)
        pictures[method] = made.images
        values = {tap: psnr(images, made.images)}
        trials.append(
            Trial("per_image", method, "random", steps, math.nan, 0, seed, values, made.flops, made.seconds, 0)
        )
    return pictures, OptimisedFew(tuple(trials), tuple(chosen))


def rebuild_few(
    setting: Setting, tap: str, images: Tensor, inverses: Mapping[str, Inverses], trials: Sequence[Trial], seed: int
) -> tuple[dict[str, Tensor], list[Trial]]:
    """The same images by the longest training of every method: pictures, and trials of the part "per_image".

    Their costs are those of the whole training, and of rebuilding these images.
    """
    representation = without_context(setting.target.record(images, [tap])[tap])
    pictures: dict[str, Tensor] = {}
    made = []
    for method, modules in inverses.items():
        reconstruct = modules[tap]
        began = time.perf_counter()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            pictures[method] = reconstruct(representation).clamp(0, 1).cpu()
        spent = time.perf_counter() - began
        trained = max(
            (t for t in trials if t.part == "curve" and t.method == method and t.seed == seed), key=lambda t: t.steps
        )
        made.append(
            replace(
                trained,
                part="per_image",
                values={tap: psnr(images, pictures[method])},
                flops=trained.flops + counter.get_total_flops(),
                seconds=trained.seconds + spent,
            )
        )
    return pictures, made


def break_even(metrics: pd.DataFrame) -> pd.DataFrame:
    """From how many images on a training costs fewer FLOPs than optimising every image anew.

    metrics: tidy rows with the part "per_image". Columns: inverse, PSNR, against, its PSNR, images.
    """
    rows = metrics[(metrics["part"] == "per_image") & (metrics["tap"] != ALL)]
    trained = rows[rows["train_images"] > 0]
    found = []
    for one in rows[rows["train_images"] == 0].to_dict("records"):
        for method in trained.to_dict("records"):
            each = one["flops"] / one["n"]
            found.append(
                {
                    "inverse": method["inverse"],
                    "PSNR": method["value"],
                    "against": one["inverse"],
                    "its PSNR": one["value"],
                    "images": method["flops"] / each,
                }
            )
    return pd.DataFrame(found)


def check_comparison(metrics: pd.DataFrame) -> pd.DataFrame:
    """What this run's numbers say about the comparison: claim, holds, and the numbers behind it."""
    rows = metrics[(metrics["measure"] == "psnr") & (metrics["tap"] == ALL)]
    curve = rows[rows["part"] == "curve"]
    last = curve[curve["steps"] == curve.groupby("inverse")["steps"].transform("max")]
    value, flops = (dict(zip(last["inverse"], last[name].astype(float), strict=True)) for name in ("value", "flops"))
    found: list[dict[str, Any]] = []

    def claim(text: str, holds: bool, numbers: str) -> None:
        found.append({"claim": text, "holds": holds, "numbers": numbers})

    trained = [name for name in METHODS if name in value]
    for name in trained:
        begun = "modular" if name == "modular_polished" else name
        closed = curve.loc[(curve["inverse"] == begun) & (curve["steps"] == 0), "value"].astype(float)
        gained = value[name] - closed.mean()
        claim(f"{name}: training gained over its closed form", gained > 0, f"{gained:+.2f} dB")
    for name in trained[1:]:
        difference = value[name] - value["direct"]
        ratio = flops[name] / flops["direct"]
        claim(
            f"{name}: at least as good as direct for no more FLOPs",
            difference >= 0 and ratio <= 1,
            f"{difference:+.2f} dB, {ratio:.2f} x FLOPs",
        )
    searched = rows[rows["part"] == "search"]
    for (kind, start), group in searched.groupby(["inverse", "start"], sort=False):
        ranked = group.astype({"learning_rate": float}).sort_values("value")
        rates, best = sorted(ranked["learning_rate"]), ranked["learning_rate"].to_list()[-1]
        tied = ranked["value"].nunique() == 1 and len(rates) > 1
        tried = ", ".join(f"{rate:g}" for rate in rates)
        claim(
            f"{kind} ({start}): the best learning rate is inside the range searched",
            not tied and rates[0] < best < rates[-1],
            f"cannot tell, {tried} tie" if tied else f"{best:g} of {tried}",
        )
    return pd.DataFrame(found)
