"""The patch embedding, measured: tokens = patches @ matrix + bias, and the pixels back from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backsight.inverses.rows import patchify, unpatchify
from backsight.representation import Tokens
from backsight.targets.base import Target

RANK_TOLERANCE = 1e-6  # singular values below this share of the largest one count as zero
WIDEST = 4096  # values of a patch up to which it is measured


@dataclass(frozen=True)
class Embedding:
    """y = patches @ matrix + bias, patches and tokens row-major.

    matrix: (3 p q, C) on pixels in [0, 1]; bias: (n, C); rank; patch: (p, q); prefix: (P, C) the prefix tokens, which
    are the same for every image; size: (H, W).
    """

    matrix: Tensor
    bias: Tensor
    rank: int
    patch: tuple[int, int]
    prefix: Tensor
    size: tuple[int, int]

    def stream(self, images: Tensor) -> Tensor:
        """(B, P + n, C) of images (B, 3, H, W), which may leave [0, 1]."""
        patches = patchify(images.to(self.matrix), self.patch) @ self.matrix + self.bias
        return torch.cat([self.prefix.expand(len(images), -1, -1), patches], dim=1)

    def pixels(self, values: Tensor, start: Tensor | None = None) -> Tensor:
        """Unclamped images (B, 3, H, W) whose embedding is `values`, the nearest to `start` (default: grey).

        start + A⁺(y − A start): exact in what the embedding holds, `start` in what it does not.
        """
        if start is None:
            start = values.new_full((len(values), 3, *self.size), 0.5)
        patches = patchify(start.to(values), self.patch)
        missing = values[:, len(self.prefix) :] - self.bias - patches @ self.matrix
        inverse = torch.linalg.pinv(self.matrix, rtol=RANK_TOLERANCE)
        grid = (self.size[0] // self.patch[0], self.size[1] // self.patch[1])
        return unpatchify(patches + missing @ inverse, grid, self.patch)


def measured_embedding(target: Target) -> Embedding | None:
    """The target's first tap as an affine map of its patches, measured on single pixels; None where it is none."""
    tap, weights = target.available_taps[0], next(target.model.parameters())
    (height, width), patch = target.image_size, target.reduction
    count = len(target.preprocessing.mean) * patch[0] * patch[1]
    if height % patch[0] or width % patch[1] or count > WIDEST:
        return None
    grid = (height // patch[0], width // patch[1])

    def embedded(patches: Tensor) -> Any:
        tokens = target.record(unpatchify(patches.expand(-1, grid[0] * grid[1], -1), grid, patch), [tap])[tap]
        # A module's own target tells its values in float32, whatever the precision of its pass.
        return tokens.replace(tokens.values.to(weights))

    blank = embedded(weights.new_zeros(1, 1, count))
    if not isinstance(blank, Tokens) or blank.grids != (grid,):
        return None
    lines = torch.eye(count).to(weights)[:, None].split(64)
    matrix = torch.cat([(embedded(part).patches - blank.patches)[:, 0] for part in lines])
    probe = torch.rand(2, grid[0] * grid[1], count, generator=torch.Generator().manual_seed(0)).to(weights)
    values = embedded(probe).patches
    if float((values - probe @ matrix - blank.patches).norm()) > 1e-4 * float(values.norm()):
        return None
    rank = int(torch.linalg.matrix_rank(matrix, rtol=RANK_TOLERANCE))
    return Embedding(matrix, blank.patches[0], rank, patch, blank.prefix_values[0], (height, width))
