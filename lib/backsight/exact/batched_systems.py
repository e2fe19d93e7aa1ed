"""Batches of square systems, safe on a CPU with several threads.

torch runs the LU factorizations of a batch in threads of its own, each of which asks MKL for threads again; from about
150 columns on, MKL's row swaps then fail: "Parameter 6 was incorrect on entry to DLASWP", wrong factors, or a process
that never ends (github.com/pytorch/pytorch/issues/142815 and 141358; torch 2.15). Wide matrices are therefore
factored one after the other here, each with all threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = 128  # columns up to which torch's own batches are sound


def factored(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """(LU, pivots) of (T, c, c), as `torch.linalg.lu_solve` takes them; not finite where a matrix is singular."""
    if matrices.device.type != "cpu" or matrices.shape[-1] <= WIDE or len(matrices) < 2:
        factors, pivots, _ = torch.linalg.lu_factor_ex(matrices)
        return factors, pivots
    parts = [torch.linalg.lu_factor_ex(matrix) for matrix in matrices]
    return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])


def solved(matrices: Tensor, right: Tensor) -> Tensor:
    """Solutions of square systems (T, c, c), (T, c); not finite where a matrix is singular."""
    factors, pivots = factored(matrices)
    return torch.linalg.lu_solve(factors, pivots, right[:, :, None])[:, :, 0]


def signs(matrices: Tensor) -> Tensor:
    """(T,) signs of the determinants of (T, c, c)."""
    factors, pivots = factored(matrices)
    swaps = (pivots != torch.arange(1, pivots.shape[-1] + 1, device=pivots.device)).sum(-1)
    negative = (factors.diagonal(dim1=-2, dim2=-1) < 0).sum(-1)
    singular = (factors.diagonal(dim1=-2, dim2=-1) == 0).any(-1)
    return (1.0 - 2.0 * ((swaps + negative) % 2)).to(matrices).masked_fill(singular, 0.0)
