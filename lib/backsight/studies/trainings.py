"""Trainings under equal conditions: the setting that all methods share, one training and its cost, the search.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

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
from backsight.targets.base import Target
from backsight.training.fit import fit_direct, fit_modular, fit_polish
from backsight.training.starts import MOMENT_IMAGES, PIXEL_FLOOR, STAGE_FLOOR, stage_pairs

METHODS = ("direct", "modular", "modular_components", "modular_polished")
COLUMNS = ("steps", "flops", "seconds", "parameters", "learning_rate", "train_images", "module", "part", "start")
COUNTED_IMAGES = 20  # and twice as many: FLOPs are extrapolated from two small fits; a multiple of 5
ALL = "all"  # the tap of a row that is the mean over the judged taps
Start = Literal["closed_form", "random"]


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
) -> tuple[float, list[Trial]]:
    """(the best rate, its trials) by the mean PSNR over judged taps on the validation images.

    A training that diverges counts as minus infinity: it has no values, and no trial.
    """
    options: dict[str, Any] = {"steps": steps, "start": start, "part": "search", "images": setting.validation}
    trials: list[Trial] = []
    for rate in rates:
        try:
            trials.append(train_once(setting, method, starts, Cost(), learning_rate=rate, before=before, **options)[0])
        except BacksightError as error:
            if "became" not in str(error):
                raise
    if not trials:
        raise BacksightError(f"Every learning rate of {list(rates)} makes {method} diverge: give smaller ones.")
    best = max(trials, key=lambda trial: float(judged_mean(setting, trial).mean()))
    return best.learning_rate, trials


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
    setting: Setting, starts: Starts, rates: Sequence[float], steps: int, closed_form_rates: Sequence[float] = ()
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
                chosen[method, start], trials = search_learning_rate(setting, method, starts, candidates, steps, start)
                searched += trials
    key: tuple[str, Start] = ("modular_polished", "closed_form")
    costs[key] = cost_of(setting, key[0], starts)
    begun = train_once(setting, "modular", starts, Cost(), steps=0, learning_rate=math.nan)
    lower = [rate / 10 for rate in closed_form_rates or rates]
    chosen[key], trials = search_learning_rate(setting, key[0], starts, lower, steps, before=begun)
    return Matched(costs, chosen, (*searched, *trials))


def _trained(
    setting: Setting, starts: Starts, matched: Matched, method: str, steps: int, **options: Any
) -> tuple[Trial, Inverses]:
    """`train_once` at the rate and with the costs that the method was matched with."""
    key: tuple[str, Start] = (method, options.get("start", "closed_form"))
    rate, cost = matched.rates[key], matched.costs[key]
    return train_once(setting, method, starts, cost, steps=steps, learning_rate=rate, **options)


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
        done = {method: _trained(setting, starts, matched, method, length) for method in METHODS[:-1]}
        polished = "modular_polished"
        done[polished] = _trained(setting, starts, matched, polished, polish_steps, before=done["modular"])
        trials += [trial for trial, _ in done.values()]
        longest = {method: inverses for method, (_, inverses) in done.items()}
    return trials, longest


def random_starts(setting: Setting, starts: Starts, matched: Matched, steps: int) -> list[Trial]:
    """The same methods without any closed form: random weights, the modular losses those of the paper."""
    random = [method for method, start in matched.rates if start == "random"]
    return [_trained(setting, starts, matched, name, steps, start="random", part="start")[0] for name in random]


def data_sizes(setting: Setting, matched: Matched, seed: int, sizes: Sequence[int], steps: int) -> list[Trial]:
    """Every method on fewer or more training images, its closed form among them; the steps stay the same."""
    trials = []
    for count in sizes:
        starts = closed_form_starts(setting, seed, count)
        trials.append(closed_form_trial(setting, "linear", starts, matched.costs["linear", "closed_form"], "data"))
        trials += [_trained(setting, starts, matched, name, steps, part="data")[0] for name in METHODS[:-1]]
    return trials
