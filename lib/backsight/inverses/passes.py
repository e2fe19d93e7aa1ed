"""Frozen passes over images: batches with what the taps hold, for every fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.distributed import processes, share
from backsight.data.features import FeatureStore
from backsight.data.images import ImageSource, batches
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
    limit: int | None = None,
) -> Iterator[tuple[Tensor, dict[str, Representation]]]:
    """Batches with their plain representations: read where a store holds them, else from the frozen pass.

    limit: about this many of the first images.
    """
    steps = None if limit is None else -(-min(limit, len(images)) // batch_size)
    if isinstance(images, FeatureStore) and set(taps) <= set(images.taps):
        images.check(target)
        for batch, recorded in itertools.islice(images.passes(batch_size, taps=taps), steps):
            yield batch.to(target.device), {tap: recorded[tap].to(target.device) for tap in taps}
        return
    source: Any = images  # a store stands where an ImageSource does
    for batch in itertools.islice(batches(source, batch_size), steps):
        batch = batch.to(target.device)
        yield batch, {tap: readable(held) for tap, held in target.record(batch, taps).items()}


def readable(representation: Representation) -> Representation:
    """In float32, and without the context that only `from_tap` may read: an inverse must not see it."""
    return representation.plain().apply(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
