"""Several processes on one job, as `accelerate launch` or torchrun start them; alone, everything is one's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from backsight.errors import BacksightError


def processes() -> PartialState:
    """How many processes there are and which one this is; several without GPUs accelerate has to be told of."""
    return PartialState(cpu="LOCAL_RANK" in os.environ and not torch.cuda.is_available())


def share(images: Any) -> Any:
    """This process's images (source, feature store or tensor): every n-th of n processes, from its own number on.

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
    return images[own] if isinstance(images, Tensor) else images.subset(own)


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in one exchange; all give as many, of the same shapes."""
    state = processes()
    if state.num_processes == 1 or not tensors:
        return
    flat = reduce(torch.cat([tensor.flatten() for tensor in tensors]).to(state.device), "mean")
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
