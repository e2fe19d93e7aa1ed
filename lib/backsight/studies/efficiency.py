"""What a decibel costs: modular inverses against direct decoders under equal conditions.

The same images, seeds, batch size, optimiser, schedule, validation images and modes for every method, and a learning
rate that each has searched with the same budget on the validation split. One point of a curve is one whole training of
that length, with its own warm-up and decay: one that is looked at half-way has not decayed its learning rate yet.

    method               what is trained                                           judged at
    direct               a decoder from every judged tap to pixels                 the judged taps
    modular              a module for every block, chained                         every block; the means: judged taps
    modular_components   a module between neighbouring judged taps, chained        the judged taps
    modular_polished     the modules of `modular`, then jointly on pixels          as modular

FLOPs are those of matrix products, convolutions and attention that torch's FlopCounterMode meets in the training code
itself (frozen pass, inverses, backward, Muon's products), two for a multiplication and addition. Eigenvalue problems of
the closed form and the validation passes are not among them; seconds hold everything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backsight.data.images import batches, open_images
from backsight.errors import BacksightError, nearest
from backsight.inverses.families import Reconstruct
from backsight.inverses.linear import LinearInverse, Request, fit_linear_pairs
from backsight.inverses.module import Inverse, Inverses
from backsight.inverses.rows import PIXELS, Form, Pair, form_of, plan_layout
from backsight.measures.pixels import psnr
from backsight.representation import Queries, Representation
from backsight.studies.nulls import null_mean, shuffled
from backsight.studies.optimisation import best_option, first_images, optimise_pixels, optimise_prior
from backsight.tables.pool import metrics_row, pooled_ratio, pooled_rows
from backsight.targets.base import Target
from backsight.training.fit import fit_direct, fit_modular, fit_polish
from backsight.training.starts import MOMENT_IMAGES, PIXEL_FLOOR, STAGE_FLOOR, stage_pairs

METHODS = ("direct", "modular", "modular_components", "modular_polished")
COLUMNS = ("steps", "flops", "seconds", "parameters", "learning_rate", "train_images", "module", "part", "start")
COUNTED_IMAGES = 20  # and twice as many: FLOPs are extrapolated from two small fits; a multiple of 5
ALL = "all"  # the tap of a row that is the mean over the judged taps
Start = Literal["closed_form", "random"]
# method, function, the option that is chosen on validation images, its candidates
OPTIMISERS = (
    ("optimised_tv", optimise_pixels, "total_variation", (3.0, 30.0, 300.0)),
    ("optimised_prior", optimise_prior, "learning_rate", (0.001, 0.003, 0.01)),
)


@dataclass(frozen=True)
class Setting:
    """What is equal for every method.

    judged: taps at which all are compared; chain: those of the every-block chain, judged ones among them;
    trained_on, train_images: of the training split, other ones for every seed where the source has more;
    validation, test: images or an ImageSource; validation_images: how many of them choose the best weights of a fit.
    """

    target: Target
    judged: tuple[str, ...]
    chain: tuple[str, ...]
    validation: Any
    test: Any
    trained_on: str = "scenes"
    train_images: int = 1000
    batch_size: int = 16
    validation_images: int = 32
    ridge_images: int = 256

    def taps(self, method: str) -> tuple[str, ...]:
        """The taps that a method can be read at."""
        return self.chain if method in ("modular", "modular_polished") else self.judged

    def pairs(self, method: str) -> tuple[Pair, ...]:
        """(source, destination) of every module of a method."""
        taps = self.taps(method)
        if method in ("direct", "linear"):
            return tuple((tap, PIXELS) for tap in taps)
        return tuple(stage_pairs(self.target, taps, {tap: self.forms[tap] for tap in taps}))

    @cached_property
    def forms(self) -> dict[str, Form]:
        """The form of every tap and of the pixels, from one image."""
        image = next(iter(batches(self.test, 1)))
        recorded = self.target.record(image, self.chain)
        return {PIXELS: form_of(image)} | {tap: form_of(each) for tap, each in recorded.items()}

    def train(self, seed: int, count: int | None = None) -> Any:
        return open_images(self.trained_on, "train", self.target, count or self.train_images, seed)


def setting_for(target: Target, judged: str | Sequence[str], **options: Any) -> Setting:
    """The setting with the target's own taps as the every-block chain, down from the deepest judged one.

    judged: "components", which gets the tap in the middle too where there are fewer than three, or tap names.
    options: the other fields of `Setting`. Raises BacksightError on unknown taps.
    """
    taps = target.resolve_taps(judged)
    order = target.available_taps
    blocks = target.resolve_taps(target.taps)
    if judged == "components" and len(taps) < 3:
        between = [tap for tap in blocks if order.index(taps[0]) < order.index(tap) < order.index(taps[-1])]
        if between:
            taps = target.resolve_taps([*taps, between[(len(between) - 1) // 2]])
    deepest = order.index(taps[-1])
    chain = target.resolve_taps([*taps, *(tap for tap in blocks if order.index(tap) <= deepest)])
    return Setting(target, taps, chain, **options)


@dataclass(frozen=True)
class Starts:
    """Closed-form maps (ridge, token by token) of every pair, fitted in one pass over the training images."""

    maps: Mapping[Pair, LinearInverse]
    seconds: float
    images: int
    seed: int


def closed_form_starts(setting: Setting, seed: int, count: int | None = None) -> Starts:
    """The ridge maps that all methods start from, on the same images; every fifth chooses the ridge strength."""
    images = setting.train(seed, count)
    started = time.perf_counter()
    wanted = dict.fromkeys(
        [(tap, PIXELS) for tap in setting.chain] + [pair for method in METHODS for pair in setting.pairs(method)]
    )
    maps = _ridge(setting, images, list(wanted), seed)
    return Starts(maps, time.perf_counter() - started, len(images), seed)


def _ridge(setting: Setting, images: Any, pairs: Sequence[Pair], seed: int) -> dict[Pair, LinearInverse]:
    defined = [pair for pair in pairs if _is_defined(setting, pair)]
    stages = {pair for method in ("modular", "modular_components") for pair in setting.pairs(method)}
    floors = {pair: PIXEL_FLOOR if pair[1] == PIXELS else STAGE_FLOOR for pair in stages}
    requests = {pair: Request(*pair, floor=floors.get(pair, 0.0)) for pair in defined}
    fitted = fit_linear_pairs(
        setting.target, images, [*requests.values()], seed=seed, progress=False, batch_size=2 * COUNTED_IMAGES
    )
    return {pair: fitted[request] for pair, request in requests.items()}


def _is_defined(setting: Setting, pair: Pair) -> bool:
    """Whether there is a linear map between these two forms."""
    try:
        plan_layout(pair, setting.forms[pair[0]], setting.forms[pair[1]], setting.target.reduction)
    except BacksightError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------ one training


@dataclass(frozen=True)
class Trial:
    """One training and its scores.

    values: {tap: (N,) PSNR in dB of the judged images}; flops, seconds: of the training with its closed-form start;
    parameters: numbers that the inverses of all taps hold together, trained or in closed form; part: of the study.
    """

    part: str
    method: str
    start: Start
    steps: int
    learning_rate: float
    train_images: int
    seed: int
    values: Mapping[str, Tensor]
    flops: float
    seconds: float
    parameters: int


@dataclass(frozen=True)
class Cost:
    """Counted FLOPs: of the start (so many and so many an image), of the preparation of a fit, of one step."""

    start: float = 0.0
    start_image: float = 0.0
    preparation: float = 0.0
    step: float = 0.0

    def total(self, steps: int, images: int) -> float:
        return self.start + self.start_image * images + self.preparation + self.step * steps


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs of the matrix products, convolutions and attention in a call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def cost_of(setting: Setting, method: str, starts: Starts, start: Start = "closed_form") -> Cost:
    """The FLOPs of a method, counted in the code that trains it.

    A step is the difference between a training of one step and one of none. The closed form and the preparation grow
    linearly with the images, so two small fits tell both parts of them.
    """
    pairs, sizes = setting.pairs(method), (COUNTED_IMAGES, 2 * COUNTED_IMAGES)
    sample = torch.cat(list(batches(setting.train(starts.seed), COUNTED_IMAGES, starts.seed, steps=2)))

    def line(small: int, large: int) -> tuple[float, float]:
        slope = (large - small) / COUNTED_IMAGES
        return small - slope * COUNTED_IMAGES, slope

    def ridge(count: int) -> int:
        return count_flops(lambda: _ridge(setting, sample[:count], pairs, starts.seed))

    def fit(steps: int, count: int) -> int:
        options: dict[str, Any] = {"steps": steps, "learning_rate": 1e-4, "seed": starts.seed, "modules": modules}
        return count_flops(lambda: _fit(setting, method, sample[:count], starts, start, **options))

    fixed = line(*map(ridge, sizes)) if start == "closed_form" else (0.0, 0.0)
    if method == "linear":
        return Cost(*fixed)
    modules = None
    if method == "modular_polished":
        modules = _fit(setting, "modular", sample, starts, start, steps=0, learning_rate=1e-4, seed=starts.seed)
    none = [fit(0, count) for count in sizes]
    before, each = line(*none)
    return Cost(*fixed, before + each * max(MOMENT_IMAGES, setting.ridge_images), fit(1, sizes[1]) - none[1])


def _fit(
    setting: Setting,
    method: str,
    images: Any,
    starts: Starts,
    start: Start,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    validation: Any = None,
    modules: Inverses | None = None,
) -> Inverses:
    common: dict[str, Any] = {
        "validation": None
        if validation is None
        else next(batches(validation, setting.validation_images, seed, steps=1)),
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": setting.batch_size,
        "seed": seed,
        "progress": False,
    }
    if method == "modular_polished":
        if modules is None:
            raise BacksightError("A polish starts from modules: give those of a `modular` training.")
        return fit_polish(setting.target, images, modules=modules, **common)
    pairs = setting.pairs(method)
    common["starts"] = {pair: starts.maps.get(pair) if start == "closed_form" else None for pair in pairs}
    common["ridge_images"] = setting.ridge_images
    if method == "direct":
        return fit_direct(setting.target, images, taps=setting.judged, **common)
    if method not in METHODS:
        raise BacksightError(f"There is no method {method!r}; {nearest(method, METHODS)}.")
    # The plain way of the paper: every module learns from the true representation, on its own squared error.
    plain: dict[str, Any] = {} if start == "closed_form" else {"chain_fraction": 0.0, "image_share": 0.0}
    return fit_modular(setting.target, images, taps=setting.taps(method), **common, **plain)


def train_once(
    setting: Setting,
    method: str,
    starts: Starts,
    cost: Cost,
    *,
    steps: int,
    learning_rate: float,
    start: Start = "closed_form",
    part: str = "curve",
    images: Any = None,
    before: tuple[Trial, Inverses] | None = None,
) -> tuple[Trial, Inverses]:
    """Train a method and score it on the test images (or on `images`).

    start: "closed_form", or "random": modules begin at the mean with random weights, and the modular losses are the
    plain ones of the paper. before: the `modular` training that a polish goes on from; its cost is added.
    """
    train = setting.train(starts.seed, starts.images)
    modules = None if before is None else before[1]
    began = time.perf_counter()
    inverses = _fit(
        setting,
        method,
        train,
        starts,
        start,
        steps=steps,
        learning_rate=learning_rate,
        seed=starts.seed,
        validation=setting.validation,
        modules=modules,
    )
    seconds = time.perf_counter() - began
    flops = cost.preparation + cost.step * steps
    if before is not None:
        flops, seconds, steps = flops + before[0].flops, seconds + before[0].seconds, steps + before[0].steps
    elif start == "closed_form":
        flops, seconds = cost.total(steps, starts.images), seconds + starts.seconds
    values = tap_psnr(setting.target, inverses, setting.test if images is None else images)
    held = sum(map(numbers_held, inverses.modules.values()))
    trial = Trial(part, method, start, steps, learning_rate, starts.images, starts.seed, values, flops, seconds, held)
    return trial, inverses


def closed_form_trial(setting: Setting, method: str, starts: Starts, cost: Cost, part: str = "curve") -> Trial:
    """A method before its first step: the closed-form maps alone, chained where the method chains.

    "linear" is read at every tap of the chain, and holds the maps of the judged ones.
    """
    wanted = [(tap, PIXELS) for tap in setting.chain] if method == "linear" else setting.pairs(method)
    maps = {pair[0]: starts.maps[pair] for pair in wanted if pair in starts.maps}
    if method != "linear" and len(maps) < len(wanted):
        # Where a stage has no linear map a module starts at the mean, which only a fit makes.
        return train_once(setting, method, starts, cost, steps=0, learning_rate=math.nan, part=part)[0]
    values = tap_psnr(setting.target, Inverses(maps), setting.test)
    held = sum(numbers_held(maps[tap]) for tap in setting.taps(method) if tap in maps)
    flops = cost.start + cost.start_image * starts.images
    return Trial(
        part, method, "closed_form", 0, math.nan, starts.images, starts.seed, values, flops, starts.seconds, held
    )


def numbers_held(inverse: nn.Module) -> int:
    """Weights of the residual and of the closed-form map."""
    trained = sum(p.numel() for p in inverse.residual.parameters()) if isinstance(inverse, Inverse) else 0
    linear = inverse.linear if isinstance(inverse, Inverse) else inverse
    closed = 0 if linear is None else sum(b.numel() for name, b in linear.named_buffers() if name.startswith("maps."))
    return trained + closed


@torch.no_grad()
def tap_psnr(
    target: Target, reconstructions: Mapping[str, Reconstruct], images: Any, batch_size: int = 64
) -> dict[str, Tensor]:
    """{tap: (N,) PSNR in dB} of reconstructions from the true representation at each tap."""
    found: dict[str, list[Tensor]] = {tap: [] for tap in reconstructions}
    for batch in batches(images, batch_size):
        recorded = target.record(batch, list(reconstructions))
        for tap, reconstruct in reconstructions.items():
            made = reconstruct(without_context(recorded[tap]))
            found[tap].append(psnr(batch, made.float().cpu().clamp(0, 1)))
    return {tap: torch.cat(each) for tap, each in found.items()}


def without_context(representation: Representation) -> Representation:
    """Queries without the encoder's output, which an inverse must not read."""
    return Queries(representation.values) if isinstance(representation, Queries) else representation


# -------------------------------------------------------------------------------------------------------- the search


def search_learning_rate(
    setting: Setting,
    method: str,
    starts: Starts,
    rates: Sequence[float],
    steps: int,
    start: Start = "closed_form",
    before: tuple[Trial, Inverses] | None = None,
) -> tuple[float, list[Trial], tuple[Trial, Inverses]]:
    """(the best rate, its trials, the best training) by the mean PSNR over judged taps on the validation images.

    A training that diverges counts as minus infinity: it has no values, and no trial.
    """
    results: list[tuple[Trial, Inverses]] = []
    for rate in rates:
        try:
            result = train_once(
                setting,
                method,
                starts,
                Cost(),
                steps=steps,
                learning_rate=rate,
                start=start,
                part="search",
                images=setting.validation,
                before=before,
            )
        except BacksightError as error:
            if "became" not in str(error):
                raise
            continue
        results.append(result)
    if not results:
        raise BacksightError(f"Every learning rate of {list(rates)} makes {method} diverge: give smaller ones.")
    best = max(results, key=lambda result: float(judged_mean(setting, result[0]).mean()))
    return best[0].learning_rate, [trial for trial, _ in results], best


def judged_mean(setting: Setting, trial: Trial) -> Tensor:
    """(N,): the PSNR of each image, mean over the judged taps that the method has."""
    taps = [tap for tap in setting.judged if tap in trial.values]
    return torch.stack([trial.values[tap] for tap in taps]).mean(dim=0)


@dataclass(frozen=True)
class Matched:
    """The counted costs and the searched learning rates of every method, by (method, start)."""

    costs: Mapping[tuple[str, Start], Cost]
    rates: Mapping[tuple[str, Start], float]
    searched: tuple[Trial, ...]


def match(
    setting: Setting,
    starts: Starts,
    rates: Sequence[float],
    steps: int,
    closed_form_rates: Sequence[float] = (),
) -> Matched:
    """Count every method and search its learning rate, with equally many candidates and steps for each.

    rates: candidates from random weights, where a short training always has something to learn; closed_form_rates: from
    the closed-form start, whose weights a short training may not beat, so that all candidates tie; empty: the rates
    found from random weights. A polish searches a tenth of these, from the chain that its closed form makes.
    """
    costs: dict[tuple[str, Start], Cost] = {("linear", "closed_form"): cost_of(setting, "linear", starts)}
    chosen: dict[tuple[str, Start], float] = {}
    searched: list[Trial] = []
    kinds: tuple[tuple[Start, Sequence[float]], ...] = (("random", rates), ("closed_form", closed_form_rates))
    for method in METHODS[:-1]:
        for start, candidates in kinds:
            costs[method, start] = cost_of(setting, method, starts, start)
            chosen[method, start] = chosen.get((method, "random"), math.nan)
            if candidates:
                chosen[method, start], trials, _ = search_learning_rate(
                    setting, method, starts, candidates, steps, start
                )
                searched += trials
    key: tuple[str, Start] = ("modular_polished", "closed_form")
    costs[key] = cost_of(setting, key[0], starts)
    begun = train_once(setting, "modular", starts, Cost(), steps=0, learning_rate=math.nan)
    lower = [rate / 10 for rate in closed_form_rates or rates]
    chosen[key], trials, _ = search_learning_rate(setting, key[0], starts, lower, steps, before=begun)
    return Matched(costs, chosen, (*searched, *trials))


def learning_curves(
    setting: Setting, starts: Starts, matched: Matched, steps: Sequence[int], polish_steps: int
) -> tuple[list[Trial], dict[str, Inverses]]:
    """Every method trained anew for each number of steps; a polish follows each modular training.

    Returns the trials and, of the longest training, {method: its inverses}.
    """
    trials = [
        closed_form_trial(setting, method, starts, matched.costs[method, "closed_form"])
        for method in ("linear", *METHODS[:-1])
    ]
    longest: dict[str, Inverses] = {}
    for length in sorted(steps):
        for method in METHODS[:-1]:
            key: tuple[str, Start] = (method, "closed_form")
            done = train_once(
                setting, method, starts, matched.costs[key], steps=length, learning_rate=matched.rates[key]
            )
            trials.append(done[0])
            longest[method] = done[1]
            if method == "modular":
                modular = done
        key = ("modular_polished", "closed_form")
        polished = train_once(
            setting,
            key[0],
            starts,
            matched.costs[key],
            steps=polish_steps,
            learning_rate=matched.rates[key],
            before=modular,
        )
        trials.append(polished[0])
        longest[key[0]] = polished[1]
    return trials, longest


def random_starts(setting: Setting, starts: Starts, matched: Matched, steps: int) -> list[Trial]:
    """The same methods without any closed form: random weights, the modular losses those of the paper."""
    return [
        train_once(
            setting,
            method,
            starts,
            matched.costs[method, start],
            steps=steps,
            learning_rate=rate,
            start=start,
            part="start",
        )[0]
        for (method, start), rate in matched.rates.items()
        if start == "random"
    ]


def data_sizes(setting: Setting, matched: Matched, seed: int, sizes: Sequence[int], steps: int) -> list[Trial]:
    """Every method on fewer or more training images, its closed form among them; the steps stay the same."""
    trials = []
    for count in sizes:
        starts = closed_form_starts(setting, seed, count)
        trials.append(closed_form_trial(setting, "linear", starts, matched.costs["linear", "closed_form"], "data"))
        for method in METHODS[:-1]:
            key: tuple[str, Start] = (method, "closed_form")
            trials.append(
                train_once(
                    setting,
                    method,
                    starts,
                    matched.costs[key],
                    steps=steps,
                    learning_rate=matched.rates[key],
                    part="data",
                )[0]
            )
    return trials


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
                unknown = math.nan
                trials.append(
                    Trial("reference", family, "closed_form", 0, unknown, 0, seed, values, unknown, unknown, 0)
                )
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
    unknown = math.nan
    return [
        Trial("nulls", name, "closed_form", 0, unknown, 0, seed, found, unknown, unknown, 0)
        for name, found in values.items()
    ]


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
    setting: Setting,
    tap: str,
    images: Tensor,
    inverses: Mapping[str, Inverses],
    trials: Sequence[Trial],
    seed: int,
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
