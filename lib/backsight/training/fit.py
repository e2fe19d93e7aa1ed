"""Fit inverses of a target: direct decoders, modular inverses, and the joint polish of a chain.

    images ──► frozen target ──► taps           one pass a batch, whatever is trained
                                  │ │ │
                       every tap's or stage's own module, loss and gradient, one after the other

A training loss is a squared error divided by the variance of what is to be found: 1 is as bad as the mean, 0 is
perfect. A validation loss is always that of the picture: what is returned is what was judged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.data.distributed import average, processes, share
from backsight.data.features import FeatureStore, images_digest
from backsight.data.images import batches, index_batches
from backsight.errors import BacksightError
from backsight.inverses.linear import LinearInverse, Request
from backsight.inverses.module import Chain, Inverses, TrainedInverse, header_for
from backsight.inverses.networks import design_for
from backsight.inverses.passes import Images, recorded_batches
from backsight.inverses.rows import PIXELS, form_of
from backsight.representation import Representation, concatenate
from backsight.targets.base import Target, seeded
from backsight.training.loop import autocast, train
from backsight.training.starts import (
    MOMENT_IMAGES,
    RECORDING_BATCH,
    Starts,
    add_in_units_of_what_is_left,
    closed_form,
    measured,
    start_requests,
)

RIDGE_IMAGES = 1024  # for closed-form starts
VALIDATION_IMAGES, LEAST_VALIDATION = 128, 32  # the first of 64 x 64 pixels; of larger ones fewer choose the weights
KEPT_BYTES = 2**30  # of representations of validation images: what needs more is computed anew at each validation
Recorded = Iterable[tuple[Tensor, dict[str, Representation]]]


def fit_direct(
    target: Target,
    images: Images,
    validation: Images | None = None,
    *,
    taps: str | Sequence[str] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 16,
    learning_rate: float = 4e-3,
    seed: int = 0,
    starts: Starts | None = None,
    ridge_images: int = RIDGE_IMAGES,
    bfloat16: bool = False,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> Inverses:
    """One decoder from every tap straight to pixels, all trained from the same frozen passes, where the target is.

    images, validation: without padding; at most VALIDATION_IMAGES of `validation` choose the weights of each decoder.
    taps: as `load_target` takes them, default the target's own. steps: 400 by default, or epochs: passes over the
    images. batch_size: images of a step, of all processes together. starts: closed-form maps {(tap, "pixels"):
    LinearInverse} that are there already; the others are fitted on `ridge_images` of the images, or with 0 are the
    mean, with random weights. bfloat16: train networks (their starts stay in float32) in it on a CPU that has it, in
    half of the time there; GPUs that have it always do. checkpoint: a file to resume from, see `training.loop.train`.
    Returns the inverses, in forward order; `inverses.module(tap).history` is a training.
    Raises BacksightError on unknown taps, unfit images, and a NaN or infinite loss.
    """
    steps = _steps(400, steps, epochs, images, batch_size)
    fit = _Fit(
        "direct", target, images, validation, steps, batch_size, learning_rate, seed, bfloat16, checkpoint, progress
    )
    return fit.stages(taps, starts or {}, ridge_images, chain_fraction=0, image_share=0)


def fit_modular(
    target: Target,
    images: Images,
    validation: Images | None = None,
    *,
    taps: str | Sequence[str] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 16,
    learning_rate: float = 4e-3,
    seed: int = 0,
    chain_fraction: float = 0.25,
    image_share: float = 0.9,
    starts: Starts | None = None,
    ridge_images: int = RIDGE_IMAGES,
    bfloat16: bool = False,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> Inverses:
    """One module for every stage: from each tap to the tap before it, from the first to pixels.

    All are trained side by side from one frozen pass a batch, each on its own loss in the space of its destination; no
    gradient runs from one to the next. What is validated is the chain: all modules come from the one step at which the
    pictures that their chains make from all taps were best.
    chain_fraction: in a chain a module is fed what the modules above have made. For this share of the images a tap is
    drawn where a chain starts, and every module below it learns from the chain's output (without gradient) instead of
    the true representation, towards the same true destination. image_share: how much of a stage's loss is measured in
    the picture that the closed-form map from its destination to pixels makes; the rest is the error in the
    destination's own space, which hardly sees what pictures are made of where few directions hold most of the variance,
    as after a LayerNorm. Both 0 is the plain modular training of the paper.
    Other arguments: see `fit_direct`; `starts` may hold {(tap, previous tap): LinearInverse}.
    Returns the inverses, in forward order: `inverses[tap]` is the chain, `inverses.module(tap)` the stage alone.
    Raises BacksightError as `fit_direct` does, and on stages without a module.
    """
    steps = _steps(400, steps, epochs, images, batch_size)
    fit = _Fit(
        "modular", target, images, validation, steps, batch_size, learning_rate, seed, bfloat16, checkpoint, progress
    )
    return fit.stages(taps, starts or {}, ridge_images, chain_fraction, image_share)


def fit_polish(
    target: Target,
    images: Images,
    validation: Images | None = None,
    *,
    modules: Inverses,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 16,
    learning_rate: float = 3e-4,
    seed: int = 0,
    bfloat16: bool = False,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> Inverses:
    """Train all modules of a chain together on the pixels it ends in: a family of its own, "modular_polished".

    modules: what `fit_modular` gave; they are copied, not changed. The images of a batch start their chains at
    different taps, equally many at each, and join on the way down. What the modules make between is no longer tied to
    what the target holds. Other arguments: see `fit_direct`; here 100 steps.
    Raises BacksightError where the modules are no chain down to pixels, or of another target.
    """
    steps, family = _steps(100, steps, epochs, images, batch_size), "modular_polished"
    fit = _Fit(
        family, target, images, validation, steps, batch_size, learning_rate, seed, bfloat16, checkpoint, progress
    )
    order = _chain_order(target, modules)
    polished = {tap: copy.deepcopy(module).to(target.device) for tap, module in modules.modules.items()}
    for inverse in polished.values():  # those that no chain runs through are only renamed
        inverse.header = replace(inverse.header, family=family)
        inverse.residual.requires_grad_(True)

    def losses(batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        entries = (torch.randperm(len(batch.images), generator=_generator(seed, step)) + step) % len(order)
        rows = torch.empty(0, dtype=torch.long)
        flowing: Any = None  # a representation, in the end the images
        for place, tap in reversed(list(enumerate(order))):
            if len(entering := (entries == place).nonzero().flatten()):
                given = batch.recorded[tap].index(entering.to(target.device))
                flowing = given if flowing is None else concatenate([flowing, given])
                rows = torch.cat([rows, entering])
            if flowing is not None:
                flowing = polished[tap].raw(flowing)
        yield PIXELS, F.mse_loss(flowing, batch.images[rows.to(target.device)]) / polished[order[0]].variance

    return fit.trained(polished, losses)


def fit_starts(
    target: Target,
    images: Images,
    validation: Images | None = None,
    *,
    families: Sequence[str] = ("direct", "modular"),
    seed: int = 0,
    ridge_images: int = RIDGE_IMAGES,
    progress: bool = True,
) -> dict[str, Starts]:
    """{family: the closed-form maps that it starts from}, from one pass over the images: `starts` of the fits above.

    Arguments as theirs, and with the same ones the maps are theirs; families that start from nothing are left out.
    """
    sample = _sample(images, max(ridge_images, MOMENT_IMAGES), seed)
    held_out = None if validation is None else _sample(validation, VALIDATION_IMAGES, seed)
    shown, recorded = next(recorded_batches(target, sample, target.taps, 1))
    forms = {name: form_of(held) for name, held in {PIXELS: shown, **recorded}.items()}
    wanted = {f: start_requests(target, target.taps, forms, f) for f in families if f in ("direct", "modular")}
    requests = [request for pairs in wanted.values() for request in pairs.values() if request]
    fitted = closed_form(target, sample, requests, held_out, seed=seed, progress=progress) if requests else {}
    return {f: {pair: fitted[request] for pair, request in pairs.items() if request} for f, pairs in wanted.items()}


class Batch(NamedTuple):
    """Images (B, 3, H, W) in [0, 1] and their representations, plain float32, on the target's device."""

    images: Tensor
    recorded: Mapping[str, Representation]


@dataclass
class _Fit:
    """What the three fits have in common."""

    family: str
    target: Target
    images: Images
    validation: Images | None
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    bfloat16: bool
    checkpoint: Path | str | None
    progress: bool

    @cached_property
    def held_out(self) -> FeatureStore | Tensor | None:
        """The images that choose the weights."""
        return None if self.validation is None else _sample(self.validation, VALIDATION_IMAGES, self.seed)

    def stages(
        self,
        taps: str | Sequence[str] | None,
        starts: Starts,
        ridge_images: int,
        chain_fraction: float,
        image_share: float,
    ) -> Inverses:
        """Start and train one module from every tap, to pixels or to the end of its stage."""
        identity = {"chain_fraction": chain_fraction, "image_share": image_share}
        for name, value in identity.items():
            if not 0 <= value <= 1:
                raise BacksightError(f"{name} is a share from 0 to 1, not {value}.")
        target, seed = self.target, self.seed
        taps = target.taps if taps is None else target.resolve_taps(taps)
        sample = _sample(self.images, max(ridge_images, MOMENT_IMAGES), seed)
        inverses, views, pixel_variance = self.started(sample, taps, starts, ridge_images > 0, viewed=image_share > 0)

        def losses(batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
            entries = _chain_starts(len(batch.images), len(taps), chain_fraction, seed, step).to(target.device)
            made: dict[str, Tensor] = {}  # by the tap that a module ends at, without gradient
            for place, tap in reversed(list(enumerate(taps))):
                given, inverse = batch.recorded[tap], inverses[tap]
                end = inverse.destination
                if tap in made and chain_fraction > 0:
                    given = given.replace(torch.where((entries > place)[:, None, None], made[tap], given.values))
                truth: Any = batch.recorded.get(end, batch.images)
                result = inverse.raw(given)
                made[end] = _values(result).detach()
                loss = F.mse_loss(_values(result), _values(truth)) / inverse.variance
                if end in views:
                    seen = F.mse_loss(views[end].raw(result), views[end].raw(truth))
                    loss = image_share * seen / pixel_variance + (1 - image_share) * loss
                yield tap, loss

        return self.trained(inverses, losses, identity)

    def started(
        self, sample: FeatureStore | Tensor, taps: Sequence[str], starts: Starts, closed: bool, viewed: bool
    ) -> tuple[dict[str, TrainedInverse], dict[str, LinearInverse], float]:
        """An inverse for every tap, exactly the closed-form map; maps from the stages' ends to pixels; their variance.

        The first beside `starts` where `closed`; the second, where `viewed`, tell how much of a picture an error at the
        tap is. All maps come from one pass.
        """
        target, seed = self.target, self.seed
        first, moments = measured(target, sample, taps)
        forms = {tap: form_of(held) for tap, held in first.items()}
        wanted = start_requests(target, taps, forms, self.family)
        views = {end: Request(end, PIXELS) for _, end in wanted if viewed and end != PIXELS}
        missing = {pair: request for pair, request in wanted.items() if closed and request and pair not in starts}
        fitted, requests = {}, [*missing.values(), *views.values()]
        if requests:
            fitted = closed_form(target, sample, requests, self.held_out, seed=seed, progress=self.progress)
        known = {**starts, **{pair: fitted[request] for pair, request in missing.items()}}
        inverses = {}
        for source, end in wanted:
            code = getattr(first[end], "position", None)
            stage = target.stage(source, end) if self.family == "modular" else None
            design = design_for(forms[source], forms[end], stage, code is not None, target.reduction)
            header = header_for(target, self.family, source, end, seed=seed)
            # Each module is drawn anew from the seed, so that it does not depend on which others there are.
            with seeded(seed):
                start = copy.deepcopy(known.get((source, end)))
                inverse = TrainedInverse(header, design, start, moments[source], moments[end], code)
            inverses[source] = inverse.to(target.device)
        judged = sample if self.held_out is None else self.held_out
        images, recorded = next(recorded_batches(target, judged, taps, RECORDING_BATCH))
        for inverse in inverses.values():
            if inverse.linear is not None:
                add_in_units_of_what_is_left(inverse, images, recorded)
        frozen = {tap: fitted[view].requires_grad_(False) for tap, view in views.items()}
        return inverses, frozen, moments[PIXELS].variance

    def trained(
        self,
        inverses: dict[str, TrainedInverse],
        losses: Callable[[Batch, int], Iterable[tuple[str, Tensor]]],
        identity: Mapping[str, Any] | None = None,
    ) -> Inverses:
        """Train, and tell in the headers what was seen and how good the pictures were.

        identity: what a checkpoint must agree in, besides what is the same of all fits.
        """
        target, images, together = self.target, self.images, self.family != "direct"
        times = self.steps * self.batch_size / len(images)
        seen = f"each seen {times:.3g} times" if times >= 1 else f"{times:.1%} of them seen"
        recorded, judging = None, self.held_out
        if judging is not None:  # every chain runs on each of them, which takes a third of the time at 224 px
            first = slice(max(LEAST_VALIDATION, VALIDATION_IMAGES * 64**2 // math.prod(target.image_size)))
            judging = judging.subset(first) if isinstance(judging, FeatureStore) else judging[first]
            recorded = _kept(target, list(inverses), share(judging))
        common = {"target": target.weights_hash, "family": self.family, "data": images_digest(images)}
        history = train(
            inverses,
            losses,
            self.stream(list(inverses)),
            steps=self.steps,
            learning_rate=self.learning_rate,
            seed=self.seed,
            bfloat16=self.bfloat16,
            checkpoint=self.checkpoint,
            validate=None if recorded is None else lambda: _validated(inverses, recorded()),
            together=together,
            identity={**common, "batch_size": self.batch_size, **(identity or {})},
            title=f"{self.family.replace('_', ' ')} inverses of {target.name} ({len(images)} images, {seen})",
            progress=self.progress,
        )
        judged = history[history["split"] == "validation"].pivot(index="step", columns="module", values="loss")
        if together and len(judged):
            judged = judged.loc[[judged.mean(axis=1).idxmin()]]
        for tap, inverse in inverses.items():
            inverse.requires_grad_(False)
            inverse.history = history[history["module"].isin([tap, PIXELS])].reset_index(drop=True)
            header = header_for(target, self.family, tap, inverse.destination, images, self.seed)
            steps = inverse.header.steps + (self.steps if len(history) else 0)
            loss = float(judged[tap].min()) if len(judged) else None
            inverse.header = replace(header, data=f"{header.data}, {seen}", steps=steps, validation_loss=loss)
        return Inverses(inverses)

    def stream(self, taps: Sequence[str]) -> Callable[[int], Batch]:
        """Batches of this process's shuffled images, to be asked for one after the other from any step on."""
        if self.batch_size % (number := processes().num_processes):
            raise BacksightError(
                f"{number} processes cannot share {self.batch_size} images a batch: choose a multiple."
            )
        target, own, size = self.target, share(self.images), self.batch_size // number
        passes: Iterator[Any] | None = None

        def batch_at(step: int) -> Batch:
            nonlocal passes
            passes = passes or recorded_batches(target, own, taps, size, self.seed, self.steps, step)
            with torch.no_grad(), autocast(target.device):
                return Batch(*next(passes))

        return batch_at


@torch.no_grad()
def _kept(target: Target, taps: Sequence[str], images: FeatureStore | Tensor) -> Callable[[], Recorded]:
    """What the target makes of validation images, batch by batch: computed once where it fits into KEPT_BYTES."""

    def recorded() -> Recorded:
        return recorded_batches(target, images, list(taps), RECORDING_BATCH)

    for batch, held in recorded():
        size = batch.nbytes + sum(representation.values.nbytes for representation in held.values())
        if size * math.ceil(len(images) / len(batch)) <= KEPT_BYTES:
            kept = list(recorded())
            return lambda: kept
        break
    return recorded


@torch.no_grad()
def _validated(inverses: Mapping[str, TrainedInverse], recorded: Recorded) -> dict[str, float]:
    """{tap: squared error of the pictures from it / their variance}, over the images of all processes."""
    whole = Inverses(inverses)
    unit = next(inverse.variance for inverse in inverses.values() if inverse.destination == PIXELS)
    totals = torch.zeros(len(inverses) + 1, dtype=torch.float64)
    for batch, held in recorded:
        errors = [F.mse_loss(whole[tap](held[tap]), batch) / unit for tap in whole]
        totals += torch.tensor([*torch.stack(errors).tolist(), 1.0], dtype=torch.float64) * len(batch)
    average([totals])
    return dict(zip(inverses, (totals[:-1] / totals[-1]).tolist(), strict=True))


def _values(result: Tensor | Representation) -> Tensor:
    return result if isinstance(result, Tensor) else result.values


def _steps(default: int, steps: int | None, epochs: float | None, images: Images, batch_size: int) -> int:
    if None not in (steps, epochs):
        raise BacksightError(f"steps = {steps} and epochs = {epochs}: give one of them.")
    if epochs is not None:
        return math.ceil(epochs * len(images) / batch_size)
    return default if steps is None else steps


def _sample(images: Images, count: int, seed: int) -> FeatureStore | Tensor:
    """`count` of the images (all, if there are fewer), drawn by the seed, as uint8 (N, 3, H, W), or of a store."""
    count = min(count, len(images))
    if isinstance(images, FeatureStore):
        return images.subset(next(index_batches(len(images), count, seed, endless=True)))
    drawn = next(batches(images, count, seed, steps=1, raw=True))
    return drawn if drawn.dtype == torch.uint8 else (drawn * 255).round().to(torch.uint8)


def _chain_starts(images: int, taps: int, fraction: float, seed: int, step: int) -> Tensor:
    """(images,) place of the tap at which each image's chain starts; 0 for an image that is in no chain."""
    if taps < 2:
        return torch.zeros(images, dtype=torch.long)
    generator = _generator(seed, step)
    chained = torch.rand(images, generator=generator) < fraction
    return torch.randint(1, taps, (images,), generator=generator) * chained


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step + 1) % 2**63)


def _chain_order(target: Target, modules: Inverses) -> list[str]:
    """The taps of a chain that runs through all modules, the one that ends in pixels first."""
    longest: Any = max((list(Chain(modules.modules, tap)) for tap in modules), key=len, default=())
    if modules.weights_hash != target.weights_hash or not longest or longest[-1].destination != PIXELS:
        raise BacksightError(
            f"The modules of {', '.join(modules)} are no chain down to pixels, or not of {target.name} with these "
            "weights: give all of one fit_modular() of this target."
        )
    return [module.source for module in reversed(longest)]
