"""The optimizers of every training: Muon for matrices, AdamW for the rest, one learning rate for both."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, steepest at zero; singular values end in [0.7, 1.2]
ADAMW_STEP = 0.2  # root mean square of an entry of AdamW's steps, about, to which Muon's are scaled
STACKED_VALUES = 2**24  # of matrices that are made orthogonal together
HEAD_INPUTS = 256  # of the widest head that is stepped at the full rate


class Group(NamedTuple):
    """How a parameter is stepped: by Muon or by AdamW, at which share of the learning rate and of the decay."""

    muon: bool
    rate: float = 1.0
    decay: float = 1.0


def default_group(name: str, parameter: Tensor) -> Group:
    """Muon for matrices and kernels, in which a short training learns about three times as much; not for heads.

    AdamW's first steps are of one size for every weight, so that they move what a head makes by its number of inputs:
    the rate of a wide one falls with them. Source: Yang & Hu, Tensor Programs V, arXiv 2203.03466, table 3.
    """
    if "head" in name:
        return Group(False, rate=min(1.0, HEAD_INPUTS / parameter[0].numel()))
    return Group(parameter.ndim in (2, 4))


def optimizers(
    parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    group: Callable[[str, Tensor], Group] = default_group,
    betas: tuple[float, float] = (0.9, 0.95),
) -> list[torch.optim.Optimizer]:
    """Muon, AdamW, or both, for named parameters; see `step_all`."""
    grouped: dict[Group, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters:
        grouped[group(name, parameter)].append(parameter)
    groups: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for key, listed in grouped.items():
        options = {"rate": key.rate, "weight_decay": weight_decay * key.decay}
        groups[key.muon].append({"params": listed, **options})
    found: list[torch.optim.Optimizer] = [Muon(groups[True])] if groups[True] else []
    return [*found, torch.optim.AdamW(groups[False], betas=betas, fused=True)] if groups[False] else found


def step_all(optimizers: Iterable[torch.optim.Optimizer], learning_rate: float) -> None:
    """Of all parameters that have a gradient, each at its group's share of the learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]
        optimizer.step()


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised (Nesterov) momentum of a matrix; a kernel is one of (outputs, everything else).

    The same steps as torch.optim.Muon(…, adjust_lr_fn="match_rms_adamw"), which always works in bfloat16, one matrix at
    a time: a hundred times as long as float32 on a CPU without it.
    Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024; Liu et al., arXiv 2502.16982.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shaped: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                    direction = parameter.grad.lerp(momentum, MOMENTUM).flatten(1)
                    shaped[tuple(sorted(direction.shape))].append((parameter, direction))
            for (rows, columns), pairs in shaped.items():
                count, scale = max(1, STACKED_VALUES // (rows * columns)), ADAMW_STEP * math.sqrt(columns)
                for part in (pairs[first : first + count] for first in range(0, len(pairs), count)):
                    wide = torch.stack([d if len(d) == rows else d.T for _, d in part])
                    for (parameter, direction), turned in zip(part, orthogonalised(wide), strict=True):
                        turned = turned if len(direction) == rows else turned.T
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                        parameter.add_(turned.reshape(parameter.shape), alpha=-group["lr"] * scale)


def orthogonalised(matrices: Tensor) -> Tensor:
    """(M, R, C), R <= C: each with its singular values brought near one by Newton and Schulz's iteration."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    first, third, fifth = COEFFICIENTS
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
    return x.to(matrices.dtype)
