"""Linear inverses: ridge regression in closed form, for every tap in one pass over the images.

images ──► target ──► tap 1 … tap n          one forward pass a batch, shared by all taps
                        │        │
                 Gram + cross moments         features are never stored (ridge.py)
                        │        │
       moments of the validation images       choose the strength, give R²
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from backsight.data.features import FeatureStore
from backsight.data.images import ImageSource
from backsight.errors import BacksightError
from backsight.inverses.module import NO_HEADER, Inverse, InverseHeader, Inverses, empty_code, header_for
from backsight.inverses.passes import Images, held_out_passes
from backsight.inverses.ridge import RidgeAccumulator, best, leading_directions
from backsight.inverses.rows import (
    MAXIMUM_INPUTS,
    PIXELS,
    Block,
    Layout,
    area,
    form_of,
    pack_destination,
    pack_source,
    plan_layout,
    unpack,
)
from backsight.representation import Representation, Tokens

if TYPE_CHECKING:
    from backsight.targets.base import Target

ALPHAS: tuple[float, ...] = tuple(10 ** (exponent / 2) for exponent in range(-16, 5))
RANK = 128  # of the maps that read a whole set of queries
MAXIMUM_ROWS = 1024  # cells of one image that a fit reads of a finer grid; they are drawn anew for every batch
CHEAP = 2**24  # values of input rows that no fit needs to spare
PACKED_VALUES = 2**26  # float32 values of input rows that are laid out at once


class Request(NamedTuple):
    """A linear map that is wanted, between two taps (or to "pixels").

    context: side of the square of tokens that a row reads: 1 (what that token alone says, the `linear` family) or an
    odd number above (a convolution in closed form); floor: the least ridge strength, for an input with errors in it.
    """

    source: str
    destination: str
    context: int = 1
    floor: float = 0.0


AnyPair = TypeVar("AnyPair", bound=Sequence[Any])


class AffineMap(nn.Module):
    """x -> bias + (x - center) @ matrix (D, E), or @ left (D, R) @ right (R, E).

    Subtracting the mean first keeps the digits of channels with a large offset in float32. projection (C, directions),
    prefix_projection (P, C, directions): through which `pack_source` reads what stands around, or None. alpha: the
    ridge strength, where it was fitted in this process.
    """

    alpha = math.nan
    center: Tensor
    bias: Tensor
    projection: Tensor | None
    prefix_projection: Tensor | None

    def __init__(self, **numbers: Tensor) -> None:
        super().__init__()
        for name, tensor in {"projection": None, "prefix_projection": None, **numbers}.items():
            self.register_buffer(name, tensor)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for name, tensor in self.named_buffers() if name in ("matrix", "left", "right"))

    def forward(self, representation: Representation, block: Block) -> Tensor:
        result = pack_source(representation, block, self.projection, self.prefix_projection) - self.center
        for factor in self.factors:
            result = result @ factor
        return result + self.bias

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *arguments: Any) -> None:
        """Of any shape; torch's arguments: metadata, strict, and the missing and unexpected keys and errors so far."""
        own = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        for name, tensor in own.items():
            self.register_buffer(name, tensor.float())
        if not {"center", "bias"} <= set(own) or not self.factors:
            arguments[2].append(f"{prefix}center, bias, matrix")


class LinearInverse(Inverse):
    """A linear map; its maps of cells also read other grids than they were fitted on."""

    kind, any_grid = "linear", True

    def __init__(
        self, header: InverseHeader, layout: Layout, maps: Mapping[str, AffineMap], position: Tensor | None = None
    ) -> None:
        super().__init__(header, layout.source, layout.destination, position)
        self.layout = layout
        self.maps: Any = nn.ModuleDict(dict(maps))

    def rows(self, representation: Representation) -> dict[str, Tensor]:
        """{name of a map: its output rows (M, outputs)}."""
        blocks = self.layout.blocks.items()
        return {name: self.maps[name](representation, block) for name, block in blocks}

    def mapped(self, representation: Representation) -> Any:
        fitted = form_of(representation).grids == self.source_form.grids
        position = self.code(representation) if fitted and self.position is not None else None
        return unpack(self.rows(representation), self.layout, representation, position)

    def configuration(self) -> dict[str, Any]:
        return {**super().configuration(), "layout": asdict(self.layout)}

    @classmethod
    def build(cls, configuration: Mapping[str, Any], target: Target) -> LinearInverse:
        layout = TypeAdapter(Layout).validate_python(configuration["layout"])
        return cls(NO_HEADER, layout, {name: AffineMap() for name in layout.blocks}, empty_code(configuration))


def fit_linear(
    target: Target,
    images: Images,
    validation: Images | None = None,
    *,
    taps: Sequence[str] | str | None = None,
    together: Sequence[str] | str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Inverses:
    """The linear inverse of every tap to pixels, in one pass over the images.

    taps: as `load_target` takes them, default the target's own; together: taps, instead, that one inverse reads side by
    side, see `side_by_side`: its name, and key, is "a+b". For the rest see `fit_linear_pairs`.
    """
    asked = taps if together is None else together
    names = target.taps if asked is None else target.resolve_taps(asked)
    pairs = [(tap, PIXELS) for tap in (names if together is None else ["+".join(names)])]
    fitted = fit_linear_pairs(target, images, pairs, validation, seed=seed, batch_size=batch_size, progress=progress)
    return Inverses({tap: inverse for (tap, _), inverse in fitted.items()})


def side_by_side(recorded: Mapping[str, Any], name: str) -> Representation:
    """What the taps of a name "a+b" hold as one: tokens (B, N, C_a + C_b) without prefix; of a single tap its own.

    Raises BacksightError where they do not hold tokens on the same grids.
    """
    parts = [recorded[tap] for tap in name.split("+")]
    if len(parts) == 1:
        return parts[0]
    if len({getattr(part, "grids", number) for number, part in enumerate(parts)}) > 1:
        forms = ", ".join(f"{tap} {part.form}" for tap, part in zip(name.split("+"), parts, strict=True))
        raise BacksightError(f"Taps that are read together hold tokens on the same grids, and not {forms}.")
    return Tokens(torch.cat([part.patches for part in parts], dim=2), parts[0].grids, padding=parts[0].padding)


def fit_linear_pairs(
    target: Target,
    images: Images,
    pairs: Sequence[AnyPair],
    validation: Images | None = None,
    *,
    seed: int = 0,
    batch_size: int = 64,
    maximum_inputs: int = MAXIMUM_INPUTS,
    rows_per_input: int | None = None,
    progress: bool = True,
) -> dict[AnyPair, LinearInverse]:
    """Linear maps between many pairs of taps, in one pass over the images.

    Of a grid with more than MAXIMUM_ROWS tokens as many are drawn for every batch: neighbours say nearly the same; or
    fewer, where `rows_per_input` rows for each of the values that a row reads are enough (of narrow rows more). Memory
    does not depend on the number of images.

    images: ImageSource, or (N, 3, H, W) in [0, 1]; pairs: (source tap, or several as "a+b", destination tap or
    "pixels"), or a `Request`; validation: images of another split, on which the ridge strength is chosen from their
    moments alone (default: every fifth image of `images` is held out of the fit); seed: of the rows that are drawn;
    maximum_inputs: see `plan_layout`. Under `accelerate launch` every process reads its share of the images, and all
    return the same maps.

    Returns {pair: LinearInverse}. Raises BacksightError on an unknown tap, on ends between which no map is defined, and
    on too few images.
    """
    requests = {pair: Request(*pair) for pair in pairs}
    if not requests:
        raise BacksightError("A linear fit needs at least one tap to invert.")
    for name, given in (("images", images), ("validation", validation)):
        if not isinstance(given, Tensor | ImageSource | FeatureStore | None):
            raise TypeError(f"{name} are an ImageSource (open_images) or a tensor (N, 3, H, W), not {given!r:.60}")
    if len(images) < (5 if validation is None else 1) or (validation is not None and not len(validation)):
        raise BacksightError(
            "A linear fit needs at least 5 images, or images both to fit and to validate on: "
            "give a larger `images`, or a `validation` that is not empty."
        )
    ends = dict.fromkeys(end for request in requests.values() for end in request[:2] if end != PIXELS)
    taps = list(dict.fromkeys(tap for end in ends for tap in end.split("+")))
    inverses: dict[Request, LinearInverse] = {}
    groups: dict[tuple[str, Block], _Group] = {}
    passes = held_out_passes(target, images, validation, taps, batch_size, progress)
    for number, (batch, recorded, held_out) in enumerate(passes):
        held: dict[str, Any] = {PIXELS: batch, **{end: side_by_side(recorded, end) for end in ends}}
        for request in () if groups else dict.fromkeys(requests.values()):
            source, end = held[request.source], held[request.destination]
            forms = form_of(source), form_of(end)
            layout = plan_layout(*forms, target.reduction, request.context, maximum_inputs)
            header = header_for(target, "linear", *request[:2], images, seed)
            inverses[request] = LinearInverse(header, layout, {}, getattr(end, "position", None))
            for name, block in layout.blocks.items():
                key = request.source, block._replace(gives=())
                if key not in groups:
                    groups[key] = _Group(source, block, len(images), rows_per_input)
                groups[key].members.append((request, layout, name))
        for group in groups.values():
            group.update(held, held_out, seed + number)
    for key in list(groups):
        for request, name, affine in groups.pop(key).solved():  # its moments are not kept
            inverses[request].maps[name] = affine
    for inverse in inverses.values():
        inverse.to(batch.device).eval()
    return {pair: inverses[request] for pair, request in requests.items()}


class _Group:
    """Maps that read the same rows: one Gram matrix. The directions of what it reads are those of the first batch."""

    def __init__(self, representation: Representation, block: Block, images: int, rows_per_input: int | None) -> None:
        self.block = block
        self.members: list[tuple[Request, Layout, str]] = []
        self.widths: list[int] = []  # of the members' outputs
        self.training, self.validation = RidgeAccumulator(), RidgeAccumulator()
        self.projections = _projections(representation, block) if block.directions else {}
        inputs = pack_source(representation.index(0), block, **self.projections).shape[1]
        enough = images * MAXIMUM_ROWS if rows_per_input is None else max(rows_per_input * inputs, CHEAP // inputs)
        self.rows = min(MAXIMUM_ROWS, -(-enough // images))  # of one image

    def update(self, held: Mapping[str, Any], held_out: bool, seed: int) -> None:
        """Add a batch; held: {tap: representation}, and the images under "pixels"."""
        given, batch = held[self.members[0][0].source], len(held[PIXELS])
        parts = [pack_destination(held[to.destination], it, it.blocks[name]) for to, it, name in self.members]
        self.widths, ends = [part.shape[1] for part in parts], torch.cat(parts, dim=1)
        drawn: Any = slice(None)
        count = len(ends) // batch
        if count > self.rows:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            drawn = order[: self.rows].sort().values.to(ends.device)
        ends = ends.unflatten(0, (batch, count))[:, drawn]
        read = self.block.context**2 * area(self.block.gathered)
        size = max(1, PACKED_VALUES // (count * read * given.channels))
        for start in range(0, batch, size):
            part = given if size >= batch else given.index(slice(start, start + size))
            moments = self.validation if held_out else self.training
            inputs = pack_source(part, self.block, drawn=drawn, **self.projections)
            moments.update(inputs, ends[start : start + part.batch].flatten(0, 1))

    def solved(self) -> Iterator[tuple[Request, str, AffineMap]]:
        """(request, name of the map, the map), of the strengths that the validation chooses."""
        training, validation, end = self.training.gathered(), self.validation.gathered(), 0
        for (request, _, name), width in zip(self.members, self.widths, strict=True):
            start, end = end, end + width
            rank = RANK if name == "set" and min(len(training.input_mean), width) > RANK else None
            alphas = [alpha for alpha in ALPHAS if alpha >= request.floor] or [max(ALPHAS)]
            solution = best(training, validation, alphas, slice(start, end), rank)
            factors = zip(("matrix",) if rank is None else ("left", "right"), solution.factors, strict=True)
            numbers = {"center": solution.center, "bias": solution.bias, **dict(factors), **self.projections}
            numbers = {key: part.float().contiguous() for key, part in numbers.items()}
            affine = AffineMap(**numbers)
            affine.alpha = solution.alpha
            yield request, name, affine


def _projections(representation: Representation, block: Block) -> dict[str, Tensor]:
    """The leading principal directions of the tokens, and of each of the prefix tokens."""
    kinds = [representation.values]
    if isinstance(representation, Tokens):
        kinds = [representation.maps()[block.level].movedim(1, 3)]
        kinds += representation.prefix_values.unbind(1) if block.context > 1 else ()
    projections = []
    for values in kinds:
        moments = RidgeAccumulator()
        moments.update(values.reshape(-1, values.shape[-1]), values.new_zeros(values[..., 0].numel(), 0))
        projections.append(leading_directions(moments.gathered(), block.directions or 0).to(values.device))
    first, *others = projections
    return {"projection": first} | ({"prefix_projection": torch.stack(others)} if others else {})


def image_errors(
    inverse: LinearInverse, source: Representation, truth: Tensor | Representation
) -> tuple[Tensor, Tensor]:
    """(B,), (B,): squared error of each image, and of the training mean, in the space that was regressed."""
    errors = totals = source.values.new_zeros(source.batch)
    for name, predicted in inverse.rows(source).items():
        rows = pack_destination(truth, inverse.layout, inverse.layout.blocks[name])
        errors = errors + (rows - predicted).square().reshape(source.batch, -1).sum(1)
        totals = totals + (rows - inverse.maps[name].bias).square().reshape(source.batch, -1).sum(1)
    return errors.cpu(), totals.cpu()
