"""The optimizers of every training: Muon for matrices, AdamW for the rest, one learning rate for both."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, steepest at zero; singular values end in [0.7, 1.2]
ADAMW_STEP = 0.2  # root mean square of an entry of AdamW's steps, about, to which Muon's are scaled
STACKED_VALUES = 2**24  # of matrices that are made orthogonal together


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised (Nesterov) momentum of each matrix, scaled to the size of AdamW's steps.

    The same steps as torch.optim.Muon(…, adjust_lr_fn="match_rms_adamw"), which always works in bfloat16, one matrix
    at a time: on a CPU without bfloat16 in hardware that takes some hundred times as long as float32, and longer than
    the rest of the training. Here matrices of one shape go together, in float32 on a CPU and bfloat16 on a GPU.
    Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024; Liu et al., arXiv 2502.16982.
    """

    def __init__(self, matrices: Iterable[Tensor], learning_rate: float, weight_decay: float) -> None:
        super().__init__(list(matrices), {"lr": learning_rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all matrices that have a gradient."""
        for group in self.param_groups:
            shaped: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shaped[min(matrix.shape), max(matrix.shape)].append(matrix)
            for (rows, columns), matrices in shaped.items():
                together = max(1, STACKED_VALUES // (rows * columns))
                for first in range(0, len(matrices), together):
                    self._step(matrices[first : first + together], group["lr"], group["weight_decay"])

    def _step(self, matrices: list[Tensor], learning_rate: float, weight_decay: float) -> None:
        directions = torch.stack([_wide(self._direction(matrix)) for matrix in matrices])
        for matrix, direction in zip(matrices, orthogonalised(directions), strict=True):
            matrix.mul_(1 - learning_rate * weight_decay)
            scale = ADAMW_STEP * math.sqrt(max(matrix.shape))
            matrix.add_(direction if matrix.shape == direction.shape else direction.T, alpha=-learning_rate * scale)

    def _direction(self, matrix: Tensor) -> Tensor:
        state, gradient = self.state[matrix], matrix.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum_buffer"], MOMENTUM)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def orthogonalised(matrices: Tensor) -> Tensor:
    """(M, R, C), R <= C: each with its singular values brought near one by Newton and Schulz's iteration."""
    found = matrices.bfloat16() if matrices.is_cuda else matrices
    found = found / torch.linalg.matrix_norm(found, keepdim=True).clamp(min=1e-7)
    first, third, fifth = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), found, beta=first)
    return found.to(matrices.dtype)


class Optimizers:
    """Muon for matrices and kernels, AdamW for everything else, as one.

    Muon takes matrices only: a kernel (outputs, inputs, h, w) is stepped through a matrix that shares its
    memory.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        plain: Callable[[str], bool],
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        named = [(n, p) for module in modules.values() for n, p in module.named_parameters() if p.requires_grad]
        kernels = [p for n, p in named if p.ndim in (2, 4) and not plain(n)]
        others = [p for n, p in named if not (p.ndim in (2, 4) and not plain(n))]
        self.matrices = [(nn.Parameter(_as_matrix(kernel.detach(), kernel)), kernel) for kernel in kernels]
        self.parts: list[torch.optim.Optimizer] = []
        if kernels:
            matrices = [matrix for matrix, _ in self.matrices]
            self.parts.append(Muon(matrices, learning_rate, weight_decay))
        if others:
            self.parts.append(
                torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
            )

    def step(self, learning_rate: float) -> None:
        for matrix, kernel in self.matrices:
            matrix.grad = None if kernel.grad is None else _as_matrix(kernel.grad, kernel)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()

    def moments(self) -> list[dict[str, Tensor]]:
        """What the optimizers remember of each parameter, in a fixed order."""
        return [part.state[parameter] for part, parameter in self._parameters()]

    def set_moment(self, number: int, key: str, tensor: Tensor) -> None:
        """Put back what `moments` gave, in the memory layout in which the optimizer would have made it."""
        part, parameter = self._parameters()[number]
        like = parameter.detach() if tensor.shape == parameter.shape else tensor.to(parameter.device)
        part.state[parameter][key] = torch.empty_like(like).copy_(tensor)

    def _parameters(self) -> list[tuple[torch.optim.Optimizer, nn.Parameter]]:
        return [(part, p) for part in self.parts for group in part.param_groups for p in group["params"]]


def _as_matrix(kernel: Tensor, like: Tensor) -> Tensor:
    """(outputs, everything else), columns in the memory order of `like`, of which this is a view."""
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        kernel = kernel.permute(0, 2, 3, 1)
    return kernel.reshape(len(kernel), -1)
