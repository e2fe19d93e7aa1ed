"""What a tap holds, in one canonical form: tokens on grids, a set of object queries, or predictions.

Axis orders of the models (NCHW, NHWC, tuples) exist only inside the target adapters; everything else in
backsight reads these three classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.errors import BacksightError

Grid = tuple[int, int]
MASK_CELLS = 16  # a side: a mask in more detail would make `values` as large as the image
Index = int | slice | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
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
        shape = tuple(self.values.shape)
        if len(shape) != 3:
            raise BacksightError(f"Tokens need values of shape (batch, tokens, channels), not {shape}.")
        area = sum(height * width for height, width in self.grids)
        if self.prefix + area != shape[1]:
            raise BacksightError(
                f"Tokens on the grids {self.grids} with {self.prefix} prefix tokens need "
                f"{self.prefix + area} tokens, but the values have {shape[1]}."
            )
        if self.padding is not None and tuple(self.padding.shape) != (shape[0], area):
            raise BacksightError(
                f"The padding of these tokens needs the shape {(shape[0], area)}, not {tuple(self.padding.shape)}."
            )
        if self.position is not None and (
            tuple(self.position.shape[1:]) != (area, shape[2]) or self.position.shape[0] not in (1, shape[0])
        ):
            raise BacksightError(
                f"The positional code of these tokens needs the shape (1 or {shape[0]}, {area}, {shape[2]}), "
                f"not {tuple(self.position.shape)}."
            )

    @property
    def batch(self) -> int:
        return self.values.shape[0]

    @property
    def channels(self) -> int:
        return self.values.shape[2]

    @property
    def patches(self) -> Tensor:
        """(B, N, C): the tokens on the grids, without the prefix."""
        return self.values[:, self.prefix :]

    @property
    def prefix_values(self) -> Tensor:
        """(B, P, C): class, distillation and register tokens."""
        return self.values[:, : self.prefix]

    @property
    def signature(self) -> Hashable:
        """Equal for two representations that the same inverse can read (the batch size does not count)."""
        return ("tokens", self.grids, self.prefix, self.channels)

    def replace(self, values: Tensor) -> Tokens:
        """The same grids, padding and position with other values, whose channels may differ.

        A positional code is dropped where the number of channels changes.
        """
        position = self.position if values.shape[2] == self.channels else None
        return replace(self, values=values, position=position)

    def maps(self) -> tuple[Tensor, ...]:
        """One (B, C, h, w) map for each grid."""
        areas = [height * width for height, width in self.grids]
        pieces = self.patches.split(areas, dim=1)
        return tuple(piece.transpose(1, 2).unflatten(2, grid) for piece, grid in zip(pieces, self.grids, strict=True))

    def map(self) -> Tensor:
        """(B, C, h, w) of the only grid. Raises BacksightError on several grids."""
        if len(self.grids) != 1:
            raise BacksightError(f"These tokens have {len(self.grids)} grids {self.grids}: use maps(), not map().")
        return self.maps()[0]

    def index(self, which: Index) -> Tokens:
        """The images `which` of the batch (a number keeps the batch axis)."""
        which = _keep_axis(which)
        position = self.position
        if position is not None and position.shape[0] == self.batch and self.batch > 1:
            position = position[which]
        padding = None if self.padding is None else self.padding[which]
        context = {name: tensor[which] for name, tensor in self.context.items()}
        return replace(self, values=self.values[which], padding=padding, position=position, context=context)

    def apply(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        """The function on every tensor that travels with the tokens."""
        return replace(
            self,
            values=function(self.values),
            padding=None if self.padding is None else function(self.padding),
            position=None if self.position is None else function(self.position),
            context={name: function(tensor) for name, tensor in self.context.items()},
        )

    def detach(self) -> Tokens:
        return self.apply(Tensor.detach)

    def to(self, device: torch.device | str) -> Tokens:
        return self.apply(lambda tensor: tensor.to(device))


@dataclass(frozen=True, eq=False)
class Queries:
    """A set of object queries.

    values: (B, Q, C); context: the encoder's output, which only `target.from_tap` may read (an inverse that
    read it would see the image past the tap), or None.
    """

    values: Tensor
    context: Tokens | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 3:
            raise BacksightError(
                f"Queries need values of shape (batch, queries, channels), not {tuple(self.values.shape)}."
            )
        if self.context is not None and self.context.batch != self.batch:
            raise BacksightError(
                f"The context of these queries holds {self.context.batch} images, the queries {self.batch}."
            )

    @property
    def batch(self) -> int:
        return self.values.shape[0]

    @property
    def channels(self) -> int:
        return self.values.shape[2]

    @property
    def signature(self) -> Hashable:
        """Equal for two representations that the same inverse can read."""
        return ("queries", self.values.shape[1], self.channels)

    def replace(self, values: Tensor) -> Queries:
        """The same context with other values."""
        return replace(self, values=values)

    def index(self, which: Index) -> Queries:
        """The images `which` of the batch (a number keeps the batch axis)."""
        which = _keep_axis(which)
        context = None if self.context is None else self.context.index(which)
        return Queries(self.values[which], context)

    def apply(self, function: Callable[[Tensor], Tensor]) -> Queries:
        """The function on every tensor that travels with the queries."""
        context = None if self.context is None else self.context.apply(function)
        return Queries(function(self.values), context)

    def detach(self) -> Queries:
        return self.apply(Tensor.detach)

    def to(self, device: torch.device | str) -> Queries:
        return self.apply(lambda tensor: tensor.to(device))


@dataclass(frozen=True, eq=False)
class Predictions:
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
        if (
            self.logits.ndim != 3
            or self.boxes.shape[:2] != self.logits.shape[:2]
            or tuple(self.boxes.shape[2:]) != (4,)
        ):
            raise BacksightError(
                "Predictions need logits (batch, queries, classes) and boxes (batch, queries, 4), not "
                f"{tuple(self.logits.shape)} and {tuple(self.boxes.shape)}."
            )
        if self.masks is not None and (self.masks.ndim != 4 or self.masks.shape[:2] != self.logits.shape[:2]):
            raise BacksightError(
                f"Predictions of {tuple(self.logits.shape[:2])} (batch, queries) need masks (batch, queries, height, "
                f"width), not {tuple(self.masks.shape)}."
            )

    @property
    def batch(self) -> int:
        return self.logits.shape[0]

    @property
    def channels(self) -> int:
        return self.logits.shape[2] + 4 + math.prod(self._cells)

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
        if self.masks is None:
            return (0, 0)
        height, width = self.masks.shape[2:]
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

    @property
    def signature(self) -> Hashable:
        """Equal for two representations that the same inverse can read."""
        return ("predictions", self.logits.shape[1], self.channels)

    def replace(self, values: Tensor) -> Predictions:
        """Predictions with these values (B, Q, classes + 4 + cells) in the layout of `values`.

        The new logits are those whose probabilities are the values; masks come out at the size of their cells.
        """
        classes, cells = self.logits.shape[2], self._cells
        scores, boxes, masks = values.split([classes, 4, math.prod(cells)], dim=-1)
        logits = (
            scores.clamp(min=torch.finfo(values.dtype).tiny).log() if self.activation == "softmax" else _logit(scores)
        )
        shaped = None if self.masks is None else _logit(masks).unflatten(-1, cells)
        return Predictions(logits, boxes, self.activation, shaped)

    def index(self, which: Index) -> Predictions:
        """The images `which` of the batch (a number keeps the batch axis)."""
        which = _keep_axis(which)
        return self.apply(lambda tensor: tensor[which])

    def apply(self, function: Callable[[Tensor], Tensor]) -> Predictions:
        """The function on logits, boxes and masks."""
        masks = None if self.masks is None else function(self.masks)
        return Predictions(function(self.logits), function(self.boxes), self.activation, masks)

    def detach(self) -> Predictions:
        return self.apply(Tensor.detach)

    def to(self, device: torch.device | str) -> Predictions:
        return self.apply(lambda tensor: tensor.to(device))


def _logit(probabilities: Tensor) -> Tensor:
    tiny = torch.finfo(probabilities.dtype).eps
    return probabilities.clamp(tiny, 1 - tiny).logit()


Representation = Tokens | Queries | Predictions
AnyRepresentation = TypeVar("AnyRepresentation", Tokens, Queries, Predictions)


def concatenate(representations: Sequence[AnyRepresentation]) -> AnyRepresentation:
    """Batches of the same tap, one after the other.

    Raises BacksightError if there is none, or if their signatures differ.
    """
    if not representations:
        raise BacksightError("There is no representation to concatenate: the list is empty.")
    first = representations[0]
    for other in representations[1:]:
        if other.signature != first.signature:
            raise BacksightError(
                f"Representations of different form cannot be concatenated: {first.signature} and {other.signature}."
            )
    if isinstance(first, Predictions):
        predictions = [each for each in representations if isinstance(each, Predictions)]
        masks = [each.masks for each in predictions if each.masks is not None]
        return Predictions(
            torch.cat([each.logits for each in predictions]),
            torch.cat([each.boxes for each in predictions]),
            first.activation,
            torch.cat(masks) if len(masks) == len(predictions) else None,
        )
    values = torch.cat([each.values for each in representations])
    if isinstance(first, Queries):
        contexts = [each.context for each in representations if isinstance(each, Queries) and each.context]
        complete = len(contexts) == len(representations)
        return Queries(values, concatenate(contexts) if complete else None)
    tokens = [each for each in representations if isinstance(each, Tokens)]
    names = set.intersection(*(set(each.context) for each in tokens))
    context = {name: torch.cat([each.context[name] for each in tokens]) for name in sorted(names)}
    return Tokens(values, first.grids, first.prefix, _joined_padding(tokens), _joined_position(tokens), context)


def _joined_padding(tokens: Sequence[Tokens]) -> Tensor | None:
    if all(each.padding is None for each in tokens):
        return None
    return torch.cat(
        [
            each.patches.new_zeros(each.patches.shape[:2], dtype=torch.bool) if each.padding is None else each.padding
            for each in tokens
        ]
    )


def _joined_position(tokens: Sequence[Tokens]) -> Tensor | None:
    positions = [each.position for each in tokens if each.position is not None]
    if len(positions) < len(tokens):
        return None
    if all(position.shape[0] == 1 and torch.equal(position, positions[0]) for position in positions):
        return positions[0]
    return torch.cat([p.expand(each.batch, -1, -1) for p, each in zip(positions, tokens, strict=True)])


def _keep_axis(which: Index) -> slice | Sequence[int] | Tensor:
    if isinstance(which, int):
        return [which]
    if isinstance(which, Tensor) and which.ndim == 0:
        return which.reshape(1)
    return which
