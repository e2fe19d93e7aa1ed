"""Frozen passes over images: batches with what the taps hold, for every fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.distributed import processes, share
from backsight.data.features import FeatureStore
from backsight.data.images import ImageSource, batches, unit_floats
from backsight.representation import Representation

if TYPE_CHECKING:
    from backsight.targets.base import Target

Images = ImageSource | FeatureStore | Tensor


def held_out_passes(
    target: Target,
    images: Images,
    validation: Images | None,
    taps: Sequence[str],
    batch_size: int,
    progress: bool,
) -> Iterator[tuple[Tensor, dict[str, Representation], bool]]:
    """Every batch with its representations and whether it is held out: one forward pass an image."""
    state, seen = processes(), 0
    for held_out, source in ((False, images), (True, validation)) if validation is not None else ((False, images),):
        own = share(source)
        bar = tqdm(
            recorded_batches(target, own, taps, batch_size),
            total=-(-len(own) // batch_size),
            desc=f"{'validating' if held_out else 'fitting'} linear maps",
            leave=False,
            disable=not (progress and state.is_main_process),
        )
        for batch, recorded in bar:
            if validation is not None:
                yield batch, recorded, held_out
                continue
            places = torch.arange(seen, seen + len(batch)) * state.num_processes + state.process_index
            seen += len(batch)
            for is_held_out in (False, True):
                chosen = ((places % 5 == 4) == is_held_out).nonzero().flatten().to(batch.device)
                if len(chosen):
                    yield batch[chosen], {tap: held.index(chosen) for tap, held in recorded.items()}, is_held_out


def recorded_batches(
    target: Target,
    images: Images,
    taps: Sequence[str],
    batch_size: int,
    shuffle_seed: int | None = None,
    steps: int | None = None,
    start: int = 0,
) -> Iterator[tuple[Tensor, dict[str, Representation]]]:
    """The batches of `batches` in [0, 1] on the target's device, with what an inverse may read of each.

    That is read where a store holds it, else it comes from the frozen pass.
    """
    passes: Any
    how: dict[str, Any] = {"shuffle_seed": shuffle_seed, "steps": steps, "start": start}
    if isinstance(images, FeatureStore) and set(taps) <= set(images.taps):
        images.check(target)
        passes = images.passes(batch_size, **how, taps=taps)
    else:
        source: Any = images  # a store stands where an ImageSource does
        passes = ((batch, None) for batch in batches(source, batch_size, **how, raw=True))
    for batch, known in passes:
        if (batch.device.type, target.device.type) == ("cpu", "cuda") and torch.cuda.is_available():
            batch = batch.pin_memory()
        batch = unit_floats(batch.to(target.device, non_blocking=True))
        recorded = target.record(batch, taps) if known is None else known
        yield batch, {tap: recorded[tap].plain().to(target.device, torch.float32) for tap in taps}
