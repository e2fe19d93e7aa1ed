"""Images as rows of patches, and back: the one place that fixes the order of values inside a patch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from backsight.errors import BacksightError


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut images into non-overlapping patches, row by row.

    images: (B, C, H, W); patch: (height, width) in pixels. Sides that are no multiple of the patch are
    continued with their last row or column, so that ceil(H / height) x ceil(W / width) patches result.
    Returns (B, N, C * height * width); inside a patch the order is channel, row, column (the order of
    `torch.nn.functional.unfold` and `pixel_shuffle`).
    """
    batch, channels, height, width = images.shape
    rows, columns = -(-height // patch[0]), -(-width // patch[1])
    missing = (rows * patch[0] - height, columns * patch[1] - width)
    if any(missing):
        images = F.pad(images, (0, missing[1], 0, missing[0]), mode="replicate")
    cells = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch[0] * patch[1])


def unpatchify(
    tokens: Tensor, grid: tuple[int, int], patch: tuple[int, int], size: tuple[int, int] | None = None
) -> Tensor:
    """Put patches back together; the inverse of `patchify`.

    tokens: (B, N, C * height * width) with N = grid rows x grid columns; patch: (height, width);
    size: (H, W) to cut the result to, for images whose sides are no multiple of the patch.
    Returns (B, C, H, W). Raises BacksightError when the tokens do not fill the grid or the patch.
    """
    batch, count, values = tokens.shape
    if count != grid[0] * grid[1]:
        raise BacksightError(
            f"unpatchify() got {count} patches for a grid of {grid[0]} x {grid[1]} = {grid[0] * grid[1]}; "
            "pass the grid that the patches were cut on, without prefix tokens."
        )
    if values % (patch[0] * patch[1]):
        raise BacksightError(
            f"unpatchify() got {values} values a patch, no multiple of {patch[0]} x {patch[1]} pixels; "
            "pass the patch size that the values were cut with."
        )
    channels = values // (patch[0] * patch[1])
    cells = tokens.reshape(batch, grid[0], grid[1], channels, patch[0], patch[1])
    images = cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, grid[0] * patch[0], grid[1] * patch[1])
    return images if size is None else images[:, :, : size[0], : size[1]]
