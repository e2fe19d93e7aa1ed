"""Fit inverses of a target: direct decoders, modular inverses, and the joint polish of a chain.

    images ──► frozen target ──► taps           one pass a batch, whatever is trained
                                  │ │ │
                       every tap's or stage's own module, loss and gradient, side by side

All losses are squared errors divided by the variance of what is to be found, measured once before training: 1 is
as bad as the mean, 0 is perfect, and stages are comparable.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.data.distributed import processes, share
from backsight.data.features import FeatureStore
from backsight.data.images import batches
from backsight.errors import BacksightError
from backsight.inverses.layouts import PIXELS, Form, Pair, area, form_of, plan_layout
from backsight.inverses.linear import LinearInverse, Request, fit_linear_requests, recorded_batches
from backsight.inverses.module import Chain, Inverse, Moments, header_for
from backsight.inverses.networks import LAYERS, design_for
from backsight.representation import Queries, Representation, Tokens, concatenate
from backsight.targets.base import Target
from backsight.training.loop import Precision, seeded, train, training_device

MOMENT_IMAGES = 256  # for means, deviations and the unit of the losses
RECORDING_BATCH = 64
KEPT_BYTES = 2**30  # of representations of validation images; what is beyond is computed anew at each validation
START_CONTEXT = 3  # side of the square of tokens that a closed-form start reads
# Least ridge strengths of the stages of a chain: below these a map blows up the errors of the stages above it.
STAGE_FLOOR, PIXEL_FLOOR = 1e-3, 1e-4


@dataclass(frozen=True)
class Training:
    """How a fit trains; every fit takes these as keyword arguments.

    batch_size: images of a step, of all processes together; patience: the training ends early after this many tenths
    of its steps without a better validation loss; checkpoint: a file to resume from, written every `checkpoint_every`
    steps, see `training.train`; workers: processes that read images ahead, "auto" by the machine; parts: equal parts of
    a batch that go through the modules one after the other; recompute: the activations of layers are computed again on
    the way back instead of kept (one more forward pass, less memory); precision: "auto" is bfloat16 where the
    machine is faster with it; progress: whether to show a bar.
    """

    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 4e-3
    seed: int = 0
    patience: int | None = None
    checkpoint: Path | str | None = None
    checkpoint_every: int = 200
    workers: int | Literal["auto"] = "auto"
    parts: int = 1
    recompute: bool = False
    precision: Precision = "auto"
    progress: bool = True


class TrainingOptions(TypedDict, total=False):
    """The fields of `Training`, as keyword arguments."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    patience: int | None
    checkpoint: Path | str | None
    checkpoint_every: int
    workers: int | Literal["auto"]
    parts: int
    recompute: bool
    precision: Precision
    progress: bool


@dataclass(frozen=True)
class Batch:
    """Images (B, 3, H, W) and, where a store holds them or they were kept, their representations."""

    images: Tensor
    recorded: Mapping[str, Representation] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def parts(self, number: int) -> list[Batch]:
        """Equal parts, as many as `number` where the images can be divided so."""
        pieces = torch.arange(len(self)).chunk(number)
        return [
            Batch(self.images[piece], self.recorded and {tap: each.index(piece) for tap, each in self.recorded.items()})
            for piece in pieces
        ]


def fit_direct(
    target: Target,
    images: Any,
    taps: str | Sequence[str] | None = None,
    *,
    validation: Any = None,
    linear: Mapping[Pair, LinearInverse | None] | None = None,
    width: int | None = None,
    ridge_images: int = 1024,
    validation_images: int = 128,
    **training: Unpack[TrainingOptions],
) -> dict[str, Inverse]:
    """One decoder from every tap straight to pixels, all trained from the same frozen passes.

    images, validation: an ImageSource, or (N, 3, H, W) uint8 or float in [0, 1], without padding. taps: as
    `load_target` takes them, default the target's own. linear: closed-form starts {(tap, "pixels"): LinearInverse}
    that are there already, None for a start at the mean with random weights; the others are fitted on
    `ridge_images` of the images. width: channels of the convolutions on the grid. validation: `validation_images` of
    it choose the best weights. training: steps = 400, batch_size = 16, learning_rate = 4e-3, seed = 0, patience,
    checkpoint, checkpoint_every, workers, progress; see `Training`.
    Returns {tap: inverse}, in forward order; `inverse.history` is its training.
    Raises BacksightError on unknown taps, unfit images, and a NaN or infinite loss.
    """
    settings = Training(**training)
    pairs = [(tap, PIXELS) for tap in _chosen(target, taps)]
    prepared = _Preparation(target, images, validation, ridge_images, validation_images, settings.seed)
    inverses, _ = prepared.inverses(pairs, "direct", linear, width, settings.progress)

    def losses(shown: Batch, _step: int) -> dict[str, Tensor]:
        batch, recorded = _record(target, shown, list(inverses))
        return {
            tap: F.mse_loss(inverse.raw(recorded[tap]), batch) / inverse.variance for tap, inverse in inverses.items()
        }

    return _trained(
        prepared,
        inverses,
        losses,
        settings,
        title=f"direct inverses of {target.name}",
        identity={"width": width},
    )


def fit_modular(
    target: Target,
    images: Any,
    taps: str | Sequence[str] | None = None,
    *,
    validation: Any = None,
    linear: Mapping[Pair, LinearInverse | None] | None = None,
    chain_fraction: float = 0.25,
    image_share: float = 0.9,
    width: int | None = None,
    depth: int | None = None,
    ridge_images: int = 1024,
    validation_images: int = 128,
    **training: Unpack[TrainingOptions],
) -> dict[str, Inverse]:
    """One module for every stage: from each tap to the tap before it, from the first to pixels.

    All modules are trained side by side from one frozen pass a batch, each on its own loss in the space of its
    destination; no gradient runs from one to the next. `Chain(inverses, tap)` puts them together.
    chain_fraction: in a chain a module is fed what the modules above have made, not what the target held. For
    this share of the images a tap is drawn where a chain starts, and every module below it learns from the
    chain's output (without gradient) instead of the true representation, towards the same true destination. It
    costs nothing. image_share: how much of a stage's loss is measured in the picture, as the error that the closed-form
    map from its destination to pixels makes of it; the rest is the error in the destination's own space. Where few
    directions hold most of the variance, as after a LayerNorm, the latter hardly sees what pictures are made of, and
    training would lose it again. chain_fraction=0 with image_share=0 is the plain modular training of the paper.
    depth: at most so many layers in a module (default: as many as its stage has).
    Other arguments: see `fit_direct`; `linear` may hold {(tap, previous tap): LinearInverse}.
    Returns {tap: inverse}, in forward order.
    Raises BacksightError on unknown taps, stages without a module, unfit images, and a NaN or infinite loss.
    """
    if not 0 <= chain_fraction <= 1:
        raise BacksightError(f"chain_fraction is a share of the images from 0 to 1, not {chain_fraction}.")
    if not 0 <= image_share <= 1:
        raise BacksightError(f"image_share is a share of the loss from 0 to 1, not {image_share}.")
    chosen = _chosen(target, taps)
    settings = Training(**training)
    prepared = _Preparation(target, images, validation, ridge_images, validation_images, settings.seed)
    pairs = list(stage_pairs(target, chosen, prepared.forms(chosen)))
    ends = [end for _, end in dict.fromkeys(pairs) if end != PIXELS] if image_share > 0 else []
    inverses, views = prepared.inverses(pairs, "modular", linear, width, settings.progress, ends, depth, stages=True)
    pixel_variance = inverses[chosen[0]].variance

    def losses(shown: Batch, step: int) -> dict[str, Tensor]:
        batch, recorded = _record(target, shown, chosen)
        starts = _chain_starts(len(batch), len(chosen), chain_fraction, settings.seed, step).to(batch.device)
        found: dict[str, Tensor] = {}
        made: dict[str, Tensor] = {}  # by the tap that a module ends at, without gradient
        for place, tap in reversed(list(enumerate(chosen))):
            given, inverse = recorded[tap], inverses[tap]
            if tap in made and chain_fraction > 0:
                chained = (starts > place)[:, None, None]
                given = given.replace(torch.where(chained, made[tap], given.values))
            wanted = recorded.get(inverse.destination)
            layout = wanted if isinstance(wanted, Tokens) else None
            values = inverse.raw(given, layout)
            made[inverse.destination] = values.detach()
            loss = _error(values, batch if wanted is None else wanted) / inverse.variance
            if (view := views.get(inverse.destination)) is not None and wanted is not None:
                reconstructed: Any = inverse.wrap(values, given, layout)
                seen = F.mse_loss(view.raw(reconstructed), view.raw(wanted)) / pixel_variance
                loss = image_share * seen + (1 - image_share) * loss
            found[tap] = loss
        return found

    return _trained(
        prepared,
        inverses,
        losses,
        settings,
        title=f"modular inverses of {target.name}",
        identity={"width": width, "depth": depth, "chain_fraction": chain_fraction, "image_share": image_share},
    )


def fit_polish(
    target: Target,
    images: Any,
    modules: Mapping[str, Inverse],
    *,
    validation: Any = None,
    validation_images: int = 128,
    **training: Unpack[TrainingOptions],
) -> dict[str, Inverse]:
    """Train all modules of a chain together on the pixels it ends in: a family of its own, "modular_polished".

    modules: what `fit_modular` gave; they are copied, not changed. The images of a batch start their chains at
    different taps, equally many at each, and join on the way down. What the modules make between is no longer
    tied to what the target holds: look at intermediate representations of the modular family instead.
    Other arguments: see `fit_direct`; here steps = 100 and learning_rate = 3e-4. Returns {tap: inverse}.
    Raises BacksightError where the modules are no chain down to pixels, or of another target.
    """
    settings = Training(**(TrainingOptions(steps=100, learning_rate=3e-4) | training))
    polished = {tap: copy.deepcopy(module) for tap, module in modules.items()}
    order = _chain_order(target, polished)
    prepared = _Preparation(target, images, validation, 0, validation_images, settings.seed)
    for tap, inverse in polished.items():  # those that no chain runs through are only renamed
        header = header_for(target, "modular_polished", tap, inverse.destination, images, settings.seed)
        inverse.header = replace(header, steps=inverse.header.steps)
        inverse.residual.requires_grad_(True)
        inverse.to(prepared.device)

    def losses(shown: Batch, step: int) -> dict[str, Tensor]:
        batch, recorded = _record(target, shown, order)
        generator = torch.Generator().manual_seed(_mixed(settings.seed, step))
        starts = (torch.randperm(len(batch), generator=generator) + step) % len(order)
        rows = torch.empty(0, dtype=torch.long)
        flowing: Any = None
        for place, tap in reversed(list(enumerate(order))):
            entering = (starts == place).nonzero().flatten()
            if len(entering):
                given = recorded[tap].index(entering.to(batch.device))
                flowing = given if flowing is None else concatenate([flowing, given])
                rows = torch.cat([rows, entering])
            if flowing is None:
                continue
            inverse = polished[tap]
            wanted = recorded.get(inverse.destination)
            layout = wanted.index(rows.to(batch.device)) if isinstance(wanted, Tokens) else None
            values = inverse.raw(flowing, layout)
            flowing = values if wanted is None else inverse.wrap(values, flowing, layout)
        return {PIXELS: F.mse_loss(flowing, batch[rows.to(batch.device)]) / polished[order[0]].variance}

    return _trained(
        prepared,
        polished,
        losses,
        settings,
        title=f"polishing the chain of {target.name}",
        identity={},
    )


def _floor(destination: str) -> float:
    """The least ridge strength of a stage that ends there."""
    return PIXEL_FLOOR if destination == PIXELS else STAGE_FLOOR


class _Preparation:
    """What every fit measures before it trains: a sample of the images, forms, moments, closed-form starts."""

    def __init__(
        self,
        target: Target,
        images: Any,
        validation: Any,
        ridge_images: int,
        validation_images: int,
        seed: int,
    ) -> None:
        for each in (images, validation):
            if getattr(each, "fit", None) == "pad":
                raise BacksightError(
                    f"The images {each.name!r} are padded, and inverses are trained on whole images: open them "
                    "with fit='crop' or fit='stretch'."
                )
        self.device = training_device()
        self.target, self.images, self.seed = target.to(self.device), images, seed
        self.sample = _sample(images, max(ridge_images, MOMENT_IMAGES), seed)
        self.validation = None if validation is None else _sample(validation, validation_images, seed)

    def forms(self, taps: Sequence[str]) -> dict[str, Form]:
        """The forms of the taps, of one image."""
        _, recorded = next(recorded_batches(self.target, self.sample, taps, 1))
        return {tap: form_of(each) for tap, each in recorded.items()}

    def inverses(
        self,
        pairs: Sequence[Pair],
        family: str,
        linear: Mapping[Pair, LinearInverse | None] | None,
        width: int | None,
        progress: bool,
        viewed: Sequence[str] = (),
        depth: int | None = None,
        stages: bool = False,
    ) -> tuple[dict[str, Inverse], dict[str, LinearInverse]]:
        """An untrained inverse for every pair, exactly the closed-form map, and the maps from `viewed` taps to pixels.

        The latter tell how much of a picture an error at the tap is. All maps come from one pass over the sample.
        """
        taps = list(dict.fromkeys(tap for pair in pairs for tap in pair if tap != PIXELS))
        first, moments = self._measure(taps)
        forms = {tap: form_of(each) for tap, each in first.items()}
        starts = dict(linear or {})
        views = {tap: Request(tap, PIXELS) for tap in viewed}
        missing = {
            (source, end): Request(source, end, START_CONTEXT, _floor(end) if stages else 0.0)
            for source, end in pairs
            if (source, end) not in starts and self._linear_is_defined((source, end), forms)
        }
        if requests := [*missing.values(), *views.values()]:
            fitted = fit_linear_requests(
                self.target, self.sample, requests, validation=self.validation, seed=self.seed, progress=progress
            )
            starts |= {pair: fitted[request] for pair, request in missing.items()}
        made = {}
        for source, destination in pairs:
            end = first[destination]
            position = end.position[:1] if isinstance(end, Tokens) and end.position is not None else None
            design = design_for(
                forms[source],
                forms[destination],
                self.target.stage(source, destination) if stages else None,
                positioned=position is not None,
                reduction=self.target.reduction,
                width=width,
                depth=depth,
            )
            start = copy.deepcopy(starts.get((source, destination)))
            header = header_for(self.target, family, source, destination, self.images, self.seed)
            # Each module is drawn anew from the seed, so that it does not depend on which others there are.
            with seeded(self.seed):
                inverse = Inverse(header, design, start, moments[source], moments[destination], position)
            made[source] = inverse.to(self.device)
        return made, {tap: fitted[request].requires_grad_(False) for tap, request in views.items()}

    def _measure(self, taps: Sequence[str]) -> tuple[dict[str, Any], dict[str, Moments]]:
        """One batch of every tap and of the pixels, and the moments of all."""
        first: dict[str, Any] = {}
        values: dict[str, list[Tensor]] = {tap: [] for tap in (PIXELS, *taps)}
        hidden: dict[str, list[Tensor]] = {}
        for batch, recorded in recorded_batches(self.target, self.sample, taps, RECORDING_BATCH, limit=MOMENT_IMAGES):
            first = first or {PIXELS: batch, **recorded}
            values[PIXELS].append(batch.flatten(2).transpose(1, 2))
            for tap in taps:
                values[tap].append(recorded[tap].values)
                if (padding := getattr(recorded[tap], "padding", None)) is not None:
                    hidden.setdefault(tap, []).append(padding)
        moments = {}
        for tap, each in values.items():
            padding = torch.cat(hidden[tap]) if tap in hidden else None
            moments[tap] = Moments.of(torch.cat(each), getattr(first[tap], "prefix", 0), padding)
        return first, moments

    def _linear_is_defined(self, pair: Pair, forms: Mapping[str, Any]) -> bool:
        try:
            plan_layout(pair, forms[pair[0]], forms[pair[1]], self.target.reduction, context=START_CONTEXT)
        except BacksightError:
            return False
        return True


def _trained(
    prepared: _Preparation,
    inverses: dict[str, Inverse],
    losses: Callable[[Batch, int], dict[str, Tensor]],
    settings: Training,
    *,
    title: str,
    identity: Mapping[str, Any],
) -> dict[str, Inverse]:
    stream = _Stream(prepared.images, settings)
    held_out = None if prepared.validation is None else _HeldOut(prepared.target, prepared.validation, list(inverses))

    def validate() -> dict[str, float]:
        assert held_out is not None
        totals: dict[str, float] = {}
        for batch in held_out:
            for name, loss in losses(batch, -1).items():
                totals[name] = totals.get(name, 0.0) + float(loss) * len(batch) / len(held_out)
        return totals

    header = next(iter(inverses.values())).header
    history = train(
        inverses,
        losses,
        stream,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        patience=settings.patience,
        checkpoint=settings.checkpoint,
        checkpoint_every=settings.checkpoint_every,
        progress=settings.progress,
        validate=None if held_out is None else validate,
        identity={
            "target": prepared.target.weights_hash,
            "family": header.family,
            "data": header.data,
            "batch_size": settings.batch_size,
            "parts": settings.parts,
            "precision": settings.precision,
            **identity,
        },
        parts=lambda batch: batch.parts(settings.parts),
        precision=settings.precision,
        recompute=(lambda module: isinstance(module, LAYERS)) if settings.recompute else None,
        plain=lambda name: "head" in name,
        describe_batch=lambda batch: f"of {len(batch)} images (order of seed {settings.seed})",
        title=title,
    )
    for tap, inverse in inverses.items():
        inverse.requires_grad_(False)
        _note_training(inverse, history[history["module"].isin([tap, PIXELS])].reset_index(drop=True))
    return inverses


def _error(values: Tensor, wanted: Tensor | Representation) -> Tensor:
    """Mean squared error of values from images, or from a representation's values where they are no padding."""
    if isinstance(wanted, Tensor):
        return F.mse_loss(values, wanted)
    if not isinstance(wanted, Tokens) or wanted.padding is None:
        return F.mse_loss(values, wanted.values)
    counted = ~F.pad(wanted.padding, (wanted.prefix, 0))
    return F.mse_loss(values[counted], wanted.values[counted])


def _note_training(inverse: Inverse, history: pd.DataFrame) -> None:
    """Steps and best validation loss into the header, the curve beside it."""
    inverse.history = history
    measured = history.loc[history["split"] == "validation", "loss"]
    steps = 0 if history.empty else int(history["step"].max())
    loss = None if measured.empty else float(measured.min())
    inverse.header = replace(inverse.header, steps=inverse.header.steps + steps, validation_loss=loss)


class _Stream:
    """Batch k of this process's shuffled images, a pure function of k; in order it is read as a stream.

    A store of features gives the representations with the images.
    """

    def __init__(self, images: Any, settings: Training) -> None:
        self.images, self.settings = share(images), settings
        self.size = max(1, settings.batch_size // processes().num_processes)
        self.next: int | None = None
        self.iterator: Iterator[Batch] = iter(())

    def __call__(self, step: int) -> Batch:
        if step != self.next:
            self.iterator = self._from(step)
        self.next = step + 1
        return next(self.iterator)

    def _from(self, step: int) -> Iterator[Batch]:
        how = self.settings
        if isinstance(self.images, FeatureStore):
            for images, recorded in self.images.passes(self.size, how.seed, how.steps, start=step):
                yield Batch(images, recorded)
        else:
            for images in batches(self.images, self.size, how.seed, how.workers, how.steps, start=step):
                yield Batch(images)


class _HeldOut:
    """This process's validation images, in batches; what the target makes of them is kept, up to KEPT_BYTES."""

    def __init__(self, target: Target, images: Tensor | FeatureStore, taps: Sequence[str]) -> None:
        self.target, self.images, self.taps = target, share(images), taps
        self.kept: list[Batch] = []

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Batch]:
        yield from self.kept
        done = sum(map(len, self.kept))
        room = KEPT_BYTES - sum(_bytes(batch) for batch in self.kept)
        if done == len(self):
            return
        rest = self.images[done:] if isinstance(self.images, Tensor) else self.images.subset(slice(done, None))
        for images, recorded in recorded_batches(self.target, rest, self.taps, RECORDING_BATCH):
            batch = Batch(images, recorded)
            room -= _bytes(batch)
            if room >= 0:
                self.kept.append(batch)
            yield batch


def _bytes(batch: Batch) -> int:
    tensors = [batch.images, *(each.values for each in (batch.recorded or {}).values())]
    return sum(tensor.nbytes for tensor in tensors)


def stage_pairs(target: Target, taps: Sequence[str], forms: Mapping[str, Form] | None = None) -> Iterator[Pair]:
    """(tap, destination) of every stage of a chain: the tap before it, or "pixels" for the first.

    A projection (a linear map of single tokens) belongs to the backbone before it, as in the paper: its inverse ends
    where the backbone's does. As a stage of its own its inverse, ill-conditioned as it is, would blow up what the
    modules above leave of error. forms: of the taps; tokens on several grids were made from more than the tap before,
    so that their inverse goes on to the nearest tap on a grid as fine as their finest: through a coarser one, what the
    fine levels hold would be lost.
    """
    ends: dict[str, str] = {}
    for place, tap in enumerate(taps):
        earlier = [each for each in taps[:place] if forms is None or _holds(forms[each], forms[tap])]
        previous = earlier[-1] if earlier else PIXELS
        projected = previous != PIXELS and target.stage(tap, previous).kind == "projection"
        ends[tap] = ends[previous] if projected else previous
        yield tap, ends[tap]


def _holds(earlier: Form, later: Form) -> bool:
    """Whether a chain may go from the later tap through the earlier one."""
    if len(later.grids) < 2 or earlier.kind != "tokens":
        return True
    return max(map(area, earlier.grids)) >= max(map(area, later.grids))


def _chosen(target: Target, taps: str | Sequence[str] | None) -> tuple[str, ...]:
    return target.taps if taps is None else target.resolve_taps(taps)


def _sample(images: Any, count: int, seed: int) -> Tensor | FeatureStore:
    """`count` of the images (all, if there are fewer), drawn by the seed, as uint8 (N, 3, H, W), or of a store."""
    count = min(count, len(images))
    size = min(count, RECORDING_BATCH)
    if isinstance(images, FeatureStore):
        return images.drawn(count, seed)
    drawn = batches(images, max(1, size), seed, steps=math.ceil(count / max(1, size)))
    return torch.cat([(batch * 255).round().to(torch.uint8) for batch in drawn])[:count]


def _record(target: Target, batch: Batch, taps: Sequence[str]) -> tuple[Tensor, Mapping[str, Representation]]:
    """Images on the target's device and the representations, in float32; queries without the encoder's output."""
    images = batch.images.to(target.device)
    if batch.recorded is not None:
        return images, {tap: batch.recorded[tap].to(target.device) for tap in taps}
    with torch.autocast(images.device.type, enabled=False):
        recorded = target.record(images, taps)
    return images, {tap: Queries(each.values) if isinstance(each, Queries) else each for tap, each in recorded.items()}


def _chain_starts(images: int, taps: int, fraction: float, seed: int, step: int) -> Tensor:
    """(images,) place of the tap at which each image's chain starts; 0 for an image that is in no chain."""
    if taps < 2:
        return torch.zeros(images, dtype=torch.long)
    generator = torch.Generator().manual_seed(_mixed(seed, step))
    chained = torch.rand(images, generator=generator) < fraction
    return torch.randint(1, taps, (images,), generator=generator) * chained


def _mixed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step + 1) % 2**63


def _chain_order(target: Target, modules: Mapping[str, Inverse]) -> list[str]:
    """The taps of a chain that runs through all modules, the one that ends in pixels first."""
    if not modules:
        raise BacksightError("There are no modules to polish: give what fit_modular() returned.")
    for tap, module in modules.items():
        if module.header.weights_hash != target.weights_hash:
            raise BacksightError(
                f"The module of {tap!r} inverts {module.header.target} with the weights "
                f"{module.header.weights_hash}, not {target.name} with {target.weights_hash}: fit it for this one."
            )
    ends = {module.destination for module in modules.values()}
    longest = max(
        (Chain(modules, tap).modules_in_order for tap in modules if tap not in ends),
        key=len,
        default=Chain(modules, next(iter(modules))).modules_in_order,
    )
    if longest[-1].destination != PIXELS:
        raise BacksightError(
            f"The modules of {', '.join(modules)} are no chain down to pixels: give all of one fit_modular()."
        )

    return [module.source for module in reversed(longest)]
