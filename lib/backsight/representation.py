"""What a tap holds, in one canonical form: tokens on grids, a set of object queries, or predictions.

Axis orders of the models (NCHW, NHWC, tuples) exist only inside the targets; everything else in backsight reads these
three classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.errors import BacksightError

Grid = tuple[int, int]
MASK_CELLS = 16  # a side: a mask in more detail would make `values` as large as the image
Index = int | slice | Sequence[int] | Tensor


@dataclass(frozen=True)
class Form:
    """What a representation, or images, are like, whatever the batch.

    kind: "pixels", "tokens", "queries" or "predictions"; grids: of tokens; for pixels the one image size (H, W).
    count: of queries or predictions.
    """

    kind: str
    channels: int
    grids: tuple[Grid, ...] = ()
    prefix: int = 0
    count: int = 0

    def __str__(self) -> str:
        number = " + ".join(f"{height} x {width}" for height, width in self.grids) or str(self.count)
        number = f"{self.prefix} prefix and {number}" if self.kind == "tokens" else number
        return f"{number} {self.kind} of {self.channels} channels"


class _Batch:
    """What the three have in common: tensors whose first axis is the batch, or 1 where all images share them."""

    values: Any

    @property
    def batch(self) -> int:
        return self.values.shape[0]

    @property
    def channels(self) -> int:
        return self.values.shape[2]

    @property
    def form(self) -> Form:
        """Equal for two representations that the same inverse can read."""
        return Form(type(self).__name__.lower(), self.channels, count=self.values.shape[1])

    def plain(self) -> Self:
        """What an inverse may read: without context."""
        return self

    def replace(self, values: Tensor) -> Self:
        """The same context with other values."""
        return dataclasses.replace(self, values=values)  # type: ignore[type-var]

    def apply(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The function on every tensor that travels along."""

        def applied(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: applied(part) for name, part in value.items()}
            if isinstance(value, _Batch):
                return value.apply(function)
            return function(value) if isinstance(value, Tensor) else value

        return type(self)(**{name: applied(part) for name, part in vars(self).items()})

    def index(self, which: Index) -> Self:
        """The images `which` of the batch (a number keeps the batch axis)."""
        rows = [int(which)] if isinstance(which, int) or (isinstance(which, Tensor) and which.ndim == 0) else which
        return self.apply(lambda tensor: tensor if len(tensor) == 1 < self.batch else tensor[rows])

    def detach(self) -> Self:
        return self.apply(Tensor.detach)

    def to(self, *where: torch.device | torch.dtype | str) -> Self:
        """As Tensor.to; a type is taken by floating-point tensors only."""
        places = [part for part in where if not isinstance(part, torch.dtype)]
        return self.apply(lambda tensor: tensor.to(*(where if tensor.is_floating_point() else places)))


@dataclass(frozen=True, eq=False)
class Tokens(_Batch):
    """Tokens on one or more grids, with the prefix (class, register) tokens first.

    values: (B, P + N, C); grids: ((h, w), …), row-major, areas sum to N; prefix: P;
    padding: (B, N) bool, True = padding, or None; position: (1 or B, N, C) positional code, or None; context: other
    tensors (B, …) of the same pass that only `target.from_tap` may read, to go on from here (an inverse that read
    them would see past the tap).
    Raises BacksightError where the shapes do not fit together.
    """

    values: Tensor
    grids: tuple[Grid, ...]
    prefix: int = 0
    padding: Tensor | None = None
    position: Tensor | None = None
    context: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape, area = tuple(self.values.shape), sum(height * width for height, width in self.grids)
        if len(shape) != 3 or self.prefix + area != shape[1]:
            raise BacksightError(
                f"Tokens on the grids {self.grids} behind {self.prefix} prefix tokens need values of shape "
                f"(batch, {self.prefix + area}, channels), not {shape}."
            )
        for name, batches, fitting in (("padding", shape[:1], (area,)), ("position", (1, shape[0]), (area, shape[2]))):
            given = getattr(self, name)
            if given is not None and (given.shape[0] not in batches or tuple(given.shape[1:]) != fitting):
                raise BacksightError(f"The {name} of tokens {shape} has the shape {fitting}, not {tuple(given.shape)}.")

    @property
    def patches(self) -> Tensor:
        """(B, N, C): the tokens on the grids, without the prefix."""
        return self.values[:, self.prefix :]

    @property
    def prefix_values(self) -> Tensor:
        """(B, P, C): class, distillation and register tokens."""
        return self.values[:, : self.prefix]

    @property
    def form(self) -> Form:
        return Form("tokens", self.channels, tuple((height, width) for height, width in self.grids), self.prefix)

    def plain(self) -> Tokens:
        return dataclasses.replace(self, context={})

    def replace(self, values: Tensor) -> Tokens:
        """All else as it is; but a positional code is dropped where the number of channels changes."""
        position = self.position if values.shape[2] == self.channels else None
        return dataclasses.replace(self, values=values, position=position)

    def maps(self) -> tuple[Tensor, ...]:
        """One (B, C, h, w) map for each grid."""
        pieces = self.patches.split([height * width for height, width in self.grids], dim=1)
        return tuple(piece.transpose(1, 2).unflatten(2, grid) for piece, grid in zip(pieces, self.grids, strict=True))


@dataclass(frozen=True, eq=False)
class Queries(_Batch):
    """A set of object queries.

    values: (B, Q, C); context: the encoder's output, which only `target.from_tap` may read (an inverse that
    read it would see the image past the tap), or None.
    """

    values: Tensor
    context: Tokens | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 3:
            raise BacksightError(f"Queries have the shape (batch, queries, channels), not {tuple(self.values.shape)}.")

    def plain(self) -> Queries:
        return Queries(self.values)


@dataclass(frozen=True, eq=False)
class Predictions(_Batch):
    """What a detector or a segmentation model says of each query.

    logits: (B, Q, K + 1) with activation "softmax", the last class is "no object"; (B, Q, K) with "sigmoid", where
    each class is judged by itself; boxes: (B, Q, 4) centre x, centre y, width, height in [0, 1] of the image;
    masks: (B, Q, h, w) logits, or None.
    """

    logits: Tensor
    boxes: Tensor
    activation: Literal["softmax", "sigmoid"] = "softmax"
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.logits.ndim != 3 or self.boxes.shape != (*self.logits.shape[:2], 4):
            raise BacksightError(
                "Predictions have logits (batch, queries, classes) and boxes (batch, queries, 4), not "
                f"{tuple(self.logits.shape)} and {tuple(self.boxes.shape)}."
            )

    @property
    def batch(self) -> int:
        return self.logits.shape[0]

    @property
    def scores(self) -> Tensor:
        """(B, Q, K or K + 1): probabilities of the classes."""
        return self.logits.softmax(dim=-1) if self.activation == "softmax" else self.logits.sigmoid()

    @property
    def objects(self) -> Tensor:
        """(B, Q, K): probabilities of the classes that are objects."""
        return self.scores[..., :-1] if self.activation == "softmax" else self.scores

    @property
    def _cells(self) -> Grid:
        """Rows and columns of a mask in `values`: its own, at most MASK_CELLS."""
        height, width = (0, 0) if self.masks is None else self.masks.shape[2:]
        return min(height, MASK_CELLS), min(width, MASK_CELLS)

    @property
    def values(self) -> Tensor:
        """(B, Q, classes + 4 + cells): probabilities of the classes, the box, then the mask's cells, row-major.

        A cell holds the mean probability of the mask in it.
        """
        parts = [self.scores, self.boxes]
        if self.masks is not None:
            parts.append(F.adaptive_avg_pool2d(self.masks.sigmoid(), self._cells).flatten(2))
        return torch.cat(parts, dim=-1)

    def replace(self, values: Tensor) -> Predictions:
        """Predictions with these values (B, Q, classes + 4 + cells) in the layout of `values`.

        The new logits are those whose probabilities are the values; masks come out at the size of their cells.
        """
        limits, cells = torch.finfo(values.dtype), self._cells
        scores, boxes, masks = values.split([self.logits.shape[2], 4, math.prod(cells)], dim=-1)
        logits = scores.clamp(min=limits.tiny).log() if self.activation == "softmax" else scores.logit(limits.eps)
        shaped = None if self.masks is None else masks.logit(limits.eps).unflatten(-1, cells)
        return Predictions(logits, boxes, self.activation, shaped)


Representation = Tokens | Queries | Predictions
AnyRepresentation = TypeVar("AnyRepresentation", bound=_Batch)


def concatenate(representations: Sequence[AnyRepresentation]) -> AnyRepresentation:
    """Batches of the same tap, one after the other; what does not travel with all of them is dropped.

    Raises BacksightError if there is none, or if their forms differ.
    """
    if len({each.form for each in representations}) != 1:
        raise BacksightError(
            "Representations of one form can be concatenated, neither an empty list nor different forms: "
            f"{[each.form for each in representations]}."
        )
    names = vars(representations[0])
    return type(representations[0])(**{name: _joined(name, representations) for name in names})


def _joined(name: str, representations: Sequence[Any]) -> Any:
    values = [getattr(each, name) for each in representations]
    if name == "padding" and any(value is not None for value in values):
        shown = [each.patches.new_zeros(each.patches.shape[:2], dtype=torch.bool) for each in representations]
        values = [none if value is None else value for value, none in zip(values, shown, strict=True)]
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, _Batch):
        return concatenate(values)
    if isinstance(first, Mapping):
        shared = set.intersection(*(set(value) for value in values))
        return {key: torch.cat([value[key] for value in values]) for key in sorted(shared)}
    if not isinstance(first, Tensor):
        return first
    if name == "position":
        if len(first) == 1 and all(torch.equal(value, first) for value in values):
            return first
        values = [value.expand(each.batch, -1, -1) for value, each in zip(values, representations, strict=True)]
    return torch.cat(values)
