"""The optimizers of every training: Muon for matrices, AdamW for the rest, one learning rate for both."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, steepest at zero; singular values end in [0.7, 1.2]
ADAMW_STEP = 0.2  # root mean square of an entry of AdamW's steps, about, to which Muon's are scaled
STACKED_VALUES = 2**24  # of matrices that are made orthogonal together


class Group(NamedTuple):
    """How a parameter is stepped: by Muon or by AdamW, at which share of the learning rate and of the decay."""

    muon: bool
    rate: float = 1.0
    decay: float = 1.0


def default_group(name: str, parameter: Tensor) -> Group:
    """Muon for matrices and kernels, in which a short training learns about three times as much; not for heads."""
    return Group(parameter.ndim in (2, 4) and "head" not in name)


class Optimizers:
    """Muon and AdamW as one, each parameter stepped as `group` says.

    Muon steps along the orthogonalised (Nesterov) momentum of a matrix; a kernel (outputs, inputs, h, w) is one of
    (outputs, everything else). The same steps as torch.optim.Muon(…, adjust_lr_fn="match_rms_adamw"), which always
    works in bfloat16, one matrix at a time: a hundred times as long as float32 on a CPU without it.
    Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024; Liu et al., arXiv 2502.16982.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        learning_rate: float,
        weight_decay: float,
        group: Callable[[str, Tensor], Group] = default_group,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        grouped: dict[Group, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in (pair for module in modules.values() for pair in module.named_parameters()):
            if parameter.requires_grad:
                grouped[group(name, parameter)].append(parameter)
        self.weight_decay = weight_decay
        self.matrices = {key: parameters for key, parameters in grouped.items() if key.muon}
        self.momenta: dict[Tensor, dict[str, Tensor]] = {p: {} for listed in self.matrices.values() for p in listed}
        others = [
            {"params": parameters, "share": key.rate, "weight_decay": weight_decay * key.decay}
            for key, parameters in grouped.items()
            if not key.muon
        ]
        self.adamw = torch.optim.AdamW(others, lr=learning_rate, betas=betas, fused=True) if others else None

    def step(self, learning_rate: float) -> None:
        """Of all parameters that have a gradient."""
        for key, parameters in self.matrices.items():
            self._muon(parameters, learning_rate * key.rate, self.weight_decay * key.decay)
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate * group["share"]
            self.adamw.step()

    @torch.no_grad()
    def _muon(self, parameters: Sequence[Tensor], learning_rate: float, weight_decay: float) -> None:
        shaped: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is not None:
                if not (state := self.momenta[parameter]):
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
                direction = parameter.grad.lerp(momentum, MOMENTUM).flatten(1)
                shaped[tuple(sorted(direction.shape))].append((parameter, direction))
        for (rows, columns), pairs in shaped.items():
            count, scale = max(1, STACKED_VALUES // (rows * columns)), ADAMW_STEP * math.sqrt(columns)
            for part in (pairs[first : first + count] for first in range(0, len(pairs), count)):
                wide = torch.stack([d if len(d) == rows else d.T for _, d in part])
                for (parameter, direction), step in zip(part, orthogonalised(wide), strict=True):
                    step = step if len(direction) == rows else step.T
                    parameter.mul_(1 - learning_rate * weight_decay)
                    parameter.add_(step.reshape(parameter.shape), alpha=-learning_rate * scale)

    def state_dict(self) -> dict[str, Any]:
        return {
            "momenta": list(self.momenta.values()),
            "adamw": None if self.adamw is None else self.adamw.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for momentum, known in zip(self.momenta.values(), state["momenta"], strict=True):
            momentum.update(known)
        if self.adamw is not None:
            self.adamw.load_state_dict(state["adamw"])


def orthogonalised(matrices: Tensor) -> Tensor:
    """(M, R, C), R <= C: each with its singular values brought near one by Newton and Schulz's iteration."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    first, third, fifth = COEFFICIENTS
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
    return x.to(matrices.dtype)
