"""Representations of any form, and a target whose taps hold what a test gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backsight.representation import Form, Queries, Representation, Tokens

FORMS = {
    "one grid": Form("tokens", 8, ((4, 6),)),
    "finer": Form("tokens", 6, ((8, 12),)),
    "odd": Form("tokens", 5, ((5, 7),)),
    "wide": Form("tokens", 8, ((2, 12),)),
    "class token": Form("tokens", 8, ((4, 6),), 1),
    "five tokens, coarse": Form("tokens", 12, ((2, 3),), 5),
    "one token": Form("tokens", 10, ((1, 1),)),
    "levels": Form("tokens", 8, ((4, 6), (2, 3), (1, 2))),
    "other levels": Form("tokens", 8, ((8, 12), (4, 6)), 1),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(count: int, height: int = 8, width: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def filled(form: Form, batch: int = 12, padding: Tensor | None = None, seed: int = 0) -> Representation:
    """Random values of a form."""
    count = form.count or form.prefix + sum(height * width for height, width in form.grids)
    values = normal(batch, count, form.channels, seed=seed).float()
    return Queries(values) if form.kind == "queries" else Tokens(values, form.grids, form.prefix, padding)


class Recorded:
    """A target whose taps hold given representations, of one image after the other; it counts its passes."""

    name, weights, weights_hash = "recorded", "none", "0"
    reduction, device = (2, 2), torch.device("cpu")

    def __init__(self, **taps: Representation) -> None:
        self.every, self.done = taps, 0
        self.taps = self.available_taps = tuple(taps)
        self.passes: list[int] = []

    def resolve_taps(self, taps: str | Sequence[str]) -> tuple[str, ...]:
        return (taps,) if isinstance(taps, str) else tuple(taps)

    def record(self, images: Tensor, taps: Sequence[str]) -> dict[str, Representation]:
        self.passes.append(len(images))
        which = torch.arange(self.done, self.done + len(images))
        self.done += len(images)
        return {tap: self.every[tap].index(which) for tap in taps}
