"""The linear inverse itself: affine maps of the rows that a layout packs, and what it scored; linear.py fits them."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.inverses.layouts import Form, Layout, form_of, pack_source, row_padding, unpack
from backsight.representation import Representation, Tokens

if TYPE_CHECKING:
    from backsight.inverses.module import InverseHeader
    from backsight.targets.base import Target


class AffineMap(nn.Module):
    """x -> bias + (x - center) @ weight, with weight (D, E) or its factors left (D, R), right (R, E).

    Subtracting the mean first keeps the digits of channels with a large offset in float32.
    """

    center: Tensor
    bias: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int | None = None) -> None:
        super().__init__()
        self.rank = rank
        self.register_buffer("center", torch.zeros(inputs))
        self.register_buffer("bias", torch.zeros(outputs))
        if rank is None:
            self.register_buffer("matrix", torch.zeros(inputs, outputs))
        else:
            self.register_buffer("left", torch.zeros(inputs, rank))
            self.register_buffer("right", torch.zeros(rank, outputs))

    @property
    def factors(self) -> tuple[Tensor, ...]:
        if self.rank is None:
            return (self.get_buffer("matrix"),)
        return self.get_buffer("left"), self.get_buffer("right")

    def forward(self, rows: Tensor) -> Tensor:
        result = rows - self.center
        for factor in self.factors:
            result = result @ factor
        return result + self.bias


@dataclass(frozen=True)
class LinearScore:
    """How well a linear inverse does on the validation split, with 95 % intervals over images.

    alpha: ridge strength of the first block; r2: against the training mean, from the moments of all
    validation images (of a fine grid: of the cells drawn), in the space that was regressed; psnr: dB, mean over
    images, None for taps; the intervals (and psnr) come from the `images` validation images that were kept in memory.
    """

    alpha: float = math.nan
    r2: float = math.nan
    r2_low: float = math.nan
    r2_high: float = math.nan
    psnr: float | None = None
    psnr_low: float | None = None
    psnr_high: float | None = None
    images: int = 0


class LinearInverse(nn.Module):
    """A linear map from the representation at `source` to `destination` (an earlier tap or "pixels")."""

    kind = "linear"

    def __init__(
        self,
        source: str,
        destination: str,
        layout: Layout,
        ranks: dict[str, int | None] | None = None,
        score: LinearScore | None = None,
        position: Literal["none", "source", "fixed"] = "none",
        position_shape: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        self.source, self.destination, self.layout = source, destination, layout
        self.header: InverseHeader | None = None  # its fit says where it comes from
        self.score = score or LinearScore()
        self.position_rule = position
        ranks = ranks or {}
        self.maps = nn.ModuleDict(
            {block: AffineMap(layout.inputs(block), layout.outputs(block), ranks.get(block)) for block in layout.blocks}
        )
        if layout.projected is not None:
            self.register_buffer("projection", torch.zeros(layout.source.channels, layout.projected))
        if position == "fixed":
            self.register_buffer("position", torch.zeros(tuple(position_shape)))

    @property
    def source_form(self) -> Form:
        return self.layout.source

    @property
    def destination_form(self) -> Form:
        return self.layout.destination

    @property
    def alpha(self) -> float:
        return self.score.alpha

    @property
    def r2(self) -> float:
        return self.score.r2

    @property
    def psnr(self) -> float | None:
        return self.score.psnr

    def affine(self, block: str | None = None) -> tuple[Tensor, Tensor]:
        """(weight (D, E), bias (E,)) of y = x @ weight + bias for one block (default: the first).

        This is what an `nn.Linear` (weight transposed) starts from.
        """
        block = block or self.layout.main[0]
        if block not in self.maps:
            raise BacksightError(f"This linear inverse has no block {block!r}; its blocks are {', '.join(self.maps)}.")
        linear = self.maps[block]
        assert isinstance(linear, AffineMap)
        weight = linear.factors[0] if linear.rank is None else linear.factors[0] @ linear.factors[1]
        bias = linear.bias.double() - linear.center.double() @ weight.double()
        return weight, bias.to(weight.dtype)

    @property
    def weight(self) -> Tensor:
        """(D, E) of the first map."""
        return self.affine()[0]

    @property
    def bias(self) -> Tensor:
        """(E,) of the first map."""
        return self.affine()[1]

    def pack(self, representation: Representation) -> dict[str, Tensor]:
        """The input rows of every block."""
        projection = self.get_buffer("projection") if self.layout.projected is not None else None
        return {block: pack_source(representation, self.layout, block, projection) for block in self.layout.blocks}

    def raw(self, representation: Representation, layout: Tokens | None = None) -> Any:
        """Like `forward`, but images are not clamped to [0, 1]."""
        self._check(representation)
        rows = {block: self.maps[block](each) for block, each in self.pack(representation).items()}
        for block in self.layout.main:
            padding = row_padding(representation, self.layout, block)
            if padding is not None:
                rows[block] = torch.where(padding.reshape(-1, 1), self.maps[block].get_buffer("bias"), rows[block])
        return unpack(rows, self.layout, representation, self._position(representation))

    def forward(self, representation: Representation, layout: Tokens | None = None) -> Any:
        """Images (B, 3, H, W) in [0, 1], or the representation at `destination`.

        Differentiable in the representation. Maps of single tokens also read other grids than they were
        fitted on. Padded tokens give the training mean. layout: for modules of a chain; not read here.
        Raises BacksightError where shapes do not agree.
        """
        result = self.raw(representation)
        return result.clamp(0, 1) if isinstance(result, Tensor) else result

    def _check(self, representation: Representation) -> None:
        given, fitted = form_of(representation), self.layout.source
        fits = given.kind == fitted.kind and given.channels == fitted.channels
        if self.layout.rows == "set":
            fits = fits and given.count == fitted.count
        if self.layout.rows == "patches":
            fits = fits and len(given.grids) == len(fitted.grids)
        if self.layout.blocks != self.layout.main or self.layout.context > 1:
            fits = fits and given.prefix == fitted.prefix
        if not fits:
            raise BacksightError(
                f"The linear inverse of {self.source!r} reads {_words(fitted)}, "
                f"but was given {_words(given)}; feed it a representation of the same shape."
            )

    def _position(self, representation: Representation) -> Tensor | None:
        if self.position_rule == "none":
            return None
        if self.position_rule == "source":
            return representation.position if isinstance(representation, Tokens) else None
        grids = representation.grids if isinstance(representation, Tokens) else self.layout.source.grids
        return self.get_buffer("position") if grids == self.layout.source.grids else None

    def configuration(self) -> dict[str, Any]:
        """Everything but the numbers in `state_dict()`, as JSON."""
        fixed = self.position_rule == "fixed"
        return {
            "source": self.source,
            "destination": self.destination,
            "layout": asdict(self.layout),
            "ranks": {block: each.rank for block, each in self.maps.items() if isinstance(each, AffineMap)},
            "score": asdict(self.score),
            "position": self.position_rule,
            "position_shape": list(self.get_buffer("position").shape) if fixed else [0],
        }

    @classmethod
    def build(cls, configuration: Mapping[str, Any], target: Target) -> LinearInverse:
        """An inverse whose numbers are still to be loaded by `load_state_dict`."""
        # Files from before there was a limit had none.
        layout = {"inputs_limit": sys.maxsize, **configuration["layout"]}
        for end in ("source", "destination"):
            form = dict(layout[end])
            form["grids"] = tuple((height, width) for height, width in form["grids"])
            layout[end] = Form(**form)
        if layout["patch"] is not None:
            layout["patch"] = tuple(layout["patch"])
        return cls(
            configuration["source"],
            configuration["destination"],
            Layout(**layout),
            configuration["ranks"],
            LinearScore(**configuration["score"]),
            configuration["position"],
            configuration["position_shape"],
        )


def _words(form: Form) -> str:
    if form.kind == "tokens":
        grids = " + ".join(f"{height} x {width}" for height, width in form.grids)
        return f"tokens on {grids} with {form.prefix} prefix tokens and {form.channels} channels"
    return f"{form.count} {form.kind} with {form.channels} channels"
