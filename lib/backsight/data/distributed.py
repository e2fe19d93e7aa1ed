"""Several processes on one job, as `accelerate launch` or torchrun start them: whose images are whose, who may write.

Alone, everything is one's own. Nothing here knows of targets or inverses.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor

from backsight.errors import BacksightError


def on_cpus() -> bool:
    """Whether this is one of several processes without GPUs, which accelerate has to be told."""
    return "LOCAL_RANK" in os.environ and not torch.cuda.is_available()


def processes() -> PartialState:
    """How many processes there are, and which one this is."""
    return PartialState(cpu=on_cpus())


def share(images: Any) -> Any:
    """This process's images: every n-th of n processes, from its own number on; alone, all of them.

    images: an ImageSource, a FeatureStore, or a tensor (N, …).
    Raises BacksightError, on every process alike, where there are fewer images than processes.
    """
    state = processes()
    if state.num_processes == 1:
        return images
    if len(images) < state.num_processes:
        raise BacksightError(
            f"{state.num_processes} processes cannot share {len(images)} images: launch fewer, or give more images."
        )
    own = slice(state.process_index, None, state.num_processes)
    if isinstance(images, Tensor):
        return images[own]
    if hasattr(images, "subset"):
        return images.subset(own)
    shared = copy.copy(images)
    shared.entries = images.entries[own]
    return shared


def in_order(own: Tensor) -> Tensor:
    """(N, …) of all images in their own order, on every process, from each one's rows about its `share`."""
    state = processes()
    if state.num_processes == 1:
        return own
    rows = gather_object([own.cpu()])
    places = [torch.arange(len(each)) * state.num_processes + number for number, each in enumerate(rows)]
    return torch.cat(rows)[torch.cat(places).argsort()]


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in one exchange; alone, do nothing."""
    state = processes()
    listed = list(tensors)
    if state.num_processes == 1 or not listed:
        return
    flat = reduce(torch.cat([each.flatten() for each in listed]).to(state.device), "mean")
    for each, mean in zip(listed, flat.split([each.numel() for each in listed]), strict=True):
        each.copy_(mean.view_as(each))


def is_first() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return processes().is_main_process


def wait_for_all() -> None:
    """Go on when every process has come here."""
    processes().wait_for_everyone()


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process goes through the block alone, then the others: what it makes on disk, they find."""
    with processes().main_process_first():
        yield
