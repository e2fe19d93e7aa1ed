"""Linear inverses: ridge regression in closed form, for every tap in one pass over the images.

    images ──► target ──► tap 1 … tap n          one forward pass a batch, shared by all taps
                            │        │
                     Gram + cross moments         features are never stored (ridge.py)
                            │        │
           moments of the validation images       choose the strength, give R²

What a row of the regression is, for tokens on any grids and for sets, is decided in rows.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from backsight.data.features import FeatureStore
from backsight.data.images import ImageSource
from backsight.errors import BacksightError, nearest
from backsight.inverses.module import InverseHeader, Inverses, header_for
from backsight.inverses.passes import Images, held_out_passes
from backsight.inverses.ridge import RidgeAccumulator, best, leading_directions
from backsight.inverses.rows import (
    MAXIMUM_INPUTS,
    PIXELS,
    Layout,
    Reading,
    form_of,
    from_json,
    pack_destination,
    pack_source,
    plan_layout,
    row_padding,
    unpack,
)
from backsight.measures.pixels import psnr
from backsight.representation import Representation, Tokens

if TYPE_CHECKING:
    from backsight.targets.base import Target

ALPHAS: tuple[float, ...] = tuple(10 ** (exponent / 2) for exponent in range(-16, 5))
RANK = 128  # of the maps that read a whole set of queries
MAXIMUM_ROWS = 1024  # cells of one image that a fit reads of a finer grid; they are drawn anew for every batch
CONTEXT_ROWS, LEAST_ROWS = 2**16, 64  # about so many rows are enough for maps with a context; at least of one image
PACKED_VALUES = 2**26  # float32 values of input rows that are laid out at once
SAMPLE_BYTES = 256 * 2**20  # validation images kept for the PSNR, over all taps

PositionRule = Literal["none", "source", "fixed"]


class Request(NamedTuple):
    """A linear map that is wanted: between two taps (or to "pixels"), each row reading context x context tokens.

    floor: the least ridge strength, for a map that will read an input with errors in it.
    """

    source: str
    destination: str
    context: int = 1
    floor: float = 0.0


AnyPair = TypeVar("AnyPair", bound=Sequence[Any])


class AffineMap(nn.Module):
    """x -> bias + (x - center) @ weight, with weight (D, E) or its factors left (D, R), right (R, E).

    Subtracting the mean first keeps the digits of channels with a large offset in float32. projection (C, directions),
    prefix_projection (P, C, directions): through which `pack_source` reads what stands around, or None.
    """

    center: Tensor
    bias: Tensor
    projection: Tensor | None
    prefix_projection: Tensor | None

    def __init__(self, layout: Layout, block: str, rank: int | None = None) -> None:
        super().__init__()
        inputs, outputs, channels = layout.inputs(block), layout.outputs(block), layout.source.channels
        reading = layout.reading(block)
        self.rank = rank
        self.register_buffer("center", torch.zeros(inputs))
        self.register_buffer("bias", torch.zeros(outputs))
        shapes = {"matrix": (inputs, outputs)} if rank is None else {"left": (inputs, rank), "right": (rank, outputs)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        directions, prefix = reading.directions, layout.source.prefix if reading.context > 1 else 0
        self.register_buffer("projection", torch.zeros(channels, directions) if directions else None)
        self.register_buffer(
            "prefix_projection", torch.zeros(prefix, channels, directions) if directions and prefix else None
        )

    @property
    def factors(self) -> tuple[Tensor, ...]:
        names = ("matrix",) if self.rank is None else ("left", "right")
        return tuple(self.get_buffer(name) for name in names)

    def forward(self, rows: Tensor) -> Tensor:
        result = rows - self.center
        for factor in self.factors:
            result = result @ factor
        return result + self.bias


@dataclass(frozen=True)
class LinearScore:
    """How well a linear inverse does on the validation split.

    alpha: ridge strength of the first block; r2: against the training mean, from the moments of all validation images
    (of a fine grid: of the cells drawn), in the space that was regressed; psnr: dB, mean over the `images` validation
    images that were kept in memory, None for taps.
    """

    alpha: float = math.nan
    r2: float = math.nan
    psnr: float | None = None
    images: int = 0


class LinearInverse(nn.Module):
    """A linear map from the representation at `source` to `destination` (an earlier tap or "pixels")."""

    kind = "linear"
    position: Tensor | None

    def __init__(
        self,
        source: str,
        destination: str,
        layout: Layout,
        ranks: Mapping[str, int | None] | None = None,
        score: LinearScore | None = None,
        position_rule: PositionRule = "none",
        position_shape: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        self.source, self.destination, self.layout = source, destination, layout
        self.source_form, self.destination_form = layout.source, layout.destination
        self.header: InverseHeader | None = None  # its fit says where it comes from
        self.score, self.position_rule = score or LinearScore(), position_rule
        ranks = ranks or {}
        maps = {block: AffineMap(layout, block, ranks.get(block)) for block in layout.blocks}
        self.maps = cast("dict[str, AffineMap]", nn.ModuleDict(maps))
        self.register_buffer("position", torch.zeros(tuple(position_shape)) if position_rule == "fixed" else None)

    @property
    def weight(self) -> Tensor:
        """(D, E) of y = x @ weight + bias of the first block: what an `nn.Linear` (transposed) starts from."""
        factors = self.maps[self.layout.main[0]].factors
        return factors[0] if len(factors) == 1 else factors[0] @ factors[1]

    @property
    def bias(self) -> Tensor:
        """(E,) of y = x @ weight + bias of the first block."""
        first = self.maps[self.layout.main[0]]
        return first.bias - first.center @ self.weight

    def pack(self, representation: Representation) -> dict[str, Tensor]:
        """The input rows of every block."""
        return {
            block: pack_source(representation, self.layout, block, part.projection, part.prefix_projection)
            for block, part in self.maps.items()
        }

    def raw(self, representation: Representation) -> Tensor | Representation:
        """Like `forward`, but images are not clamped to [0, 1]."""
        self._check(representation)
        rows = {block: self.maps[block](packed) for block, packed in self.pack(representation).items()}
        for block in self.layout.main:
            padding = row_padding(representation, self.layout, block)
            if padding is not None:
                rows[block] = torch.where(padding.reshape(-1, 1), self.maps[block].bias, rows[block])
        return unpack(rows, self.layout, representation, self._position(representation))

    def forward(self, representation: Representation) -> Any:
        """Images (B, 3, H, W) in [0, 1], or the representation at `destination`.

        Differentiable in the representation. Maps of cells also read other grids than they were fitted on. Padded
        tokens give the training mean. Raises BacksightError where shapes do not agree.
        """
        result = self.raw(representation)
        return result.clamp(0, 1) if isinstance(result, Tensor) else result

    def _check(self, representation: Representation) -> None:
        given, fitted = form_of(representation), self.layout.source
        fits = (given.kind, given.channels, len(given.grids)) == (fitted.kind, fitted.channels, len(fitted.grids))
        if self.layout.rows == "set":
            fits = fits and given.count == fitted.count
        if self.layout.blocks != self.layout.main or self.layout.context > 1:
            fits = fits and given.prefix == fitted.prefix
        if not fits:
            raise BacksightError(
                f"The linear inverse of {self.source!r} reads {fitted}, but was given {given}; feed it a "
                "representation of the same shape."
            )

    def _position(self, representation: Representation) -> Tensor | None:
        if self.position_rule == "source":
            return representation.position if isinstance(representation, Tokens) else None
        same = not isinstance(representation, Tokens) or representation.grids == self.layout.source.grids
        return self.position if same else None

    def configuration(self) -> dict[str, Any]:
        """Everything but the numbers in `state_dict()`, as JSON."""
        return {
            "source": self.source,
            "destination": self.destination,
            "layout": asdict(self.layout),
            "ranks": {block: part.rank for block, part in self.maps.items()},
            "score": asdict(self.score),
            "position_rule": self.position_rule,
            "position_shape": [0] if self.position is None else list(self.position.shape),
        }

    @classmethod
    def build(cls, configuration: Mapping[str, Any], target: Target) -> LinearInverse:
        """An inverse whose numbers are still to be loaded by `load_state_dict`."""
        layout, score = from_json(Layout, configuration["layout"]), from_json(LinearScore, configuration["score"])
        return cls(**{**configuration, "layout": layout, "score": score})


def fit_linear(
    target: Target,
    images: Images,
    validation: Images | None = None,
    *,
    taps: Sequence[str] | str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Inverses:
    """The linear inverse of every tap to pixels, in one pass over the images.

    taps: as `load_target` takes them, default the target's own. For the rest see `fit_linear_pairs`.
    """
    names = list(target.taps if taps is None else target.resolve_taps(taps))
    pairs = [(tap, PIXELS) for tap in names]
    fitted = fit_linear_pairs(target, images, pairs, validation, seed=seed, batch_size=batch_size, progress=progress)
    return Inverses({tap: fitted[tap, PIXELS] for tap in names})


def fit_linear_pairs(
    target: Target,
    images: Images,
    pairs: Sequence[AnyPair],
    validation: Images | None = None,
    *,
    seed: int = 0,
    context: int = 1,
    batch_size: int = 64,
    maximum_inputs: int = MAXIMUM_INPUTS,
    progress: bool = True,
) -> dict[AnyPair, LinearInverse]:
    """Linear maps between many pairs of taps, in one pass over the images.

    Of a grid with more than MAXIMUM_ROWS tokens as many are drawn for every batch: neighbours say nearly the same.
    Memory does not depend on the number of images.

    images: ImageSource, or (N, 3, H, W) in [0, 1]; pairs: (source tap, destination tap or "pixels"), or a `Request`
    with its own context and floor; validation: images of another split, on which the ridge strength is chosen from
    their moments alone (default: every fifth image of `images` is held out of the fit); seed: of the rows that are
    drawn; context: side of the square of tokens that the map of one token reads, 1 (what that token alone says, the
    `linear` family) or an odd number above (a convolution in closed form, see rows.py);
    maximum_inputs: see `plan_layout`. Under `accelerate launch` every process reads its share of the images,
    and all return the same maps.

    Returns {pair: LinearInverse}, each scored on the validation images. Raises BacksightError on an unknown tap, on
    ends between which no map is defined, and on too few images.
    """
    requests = {
        pair: pair if isinstance(pair, Request) else Request(pair[0], pair[1], context) for pair in dict.fromkeys(pairs)
    }
    _check(target, requests.values(), images, validation)
    taps = dict.fromkeys(tap for request in requests.values() for tap in request[:2] if tap != PIXELS)
    layouts: dict[Request, tuple[Layout, PositionRule, Tensor | None]] = {}
    groups: list[_Group] = []
    sample = _Sample()
    passes = held_out_passes(target, images, validation, list(taps), batch_size, progress)
    for number, (batch, recorded, held_out) in enumerate(passes):
        held: dict[str, Any] = {PIXELS: batch, **recorded}
        if not groups:
            for request in dict.fromkeys(requests.values()):
                source, end = held[request.source], held[request.destination]
                forms = form_of(source), form_of(end)
                layout = plan_layout(request[:2], *forms, target.reduction, request.context, maximum_inputs)
                layouts[request] = layout, *_position_rule(source, end)
            groups = _grouped({request: layout for request, (layout, *_) in layouts.items()}, held, len(images))
        outputs: dict[Hashable, Tensor] = {}
        for group in groups:
            group.update(held, held_out, outputs, seed + number)
        if held_out:
            sample.add(held)
    for group in groups:
        group.training, group.validation = group.training.gathered(), group.validation.gathered()
    if not groups or any(min(group.training.count, group.validation.count) == 0 for group in groups):
        raise BacksightError(
            "A linear fit needs at least 5 images, or images both to fit and to validate on: "
            "give a larger `images`, or a `validation` that is not empty."
        )
    inverses = {}
    for request, described in layouts.items():
        inverse = _solved(request, *described, groups).to(batch.device).eval()
        inverse.header = header_for(target, "linear", request.source, request.destination, images, seed)
        if request.destination == PIXELS:
            inverse.score = sample.scored(inverse)
        inverses[request] = inverse
    return {pair: inverses[request] for pair, request in requests.items()}


def _check(target: Target, requests: Collection[Request], images: Images, validation: Images | None) -> None:
    if not requests:
        raise BacksightError("A linear fit needs at least one tap to invert.")
    for name, given in (("images", images), ("validation", validation)):
        if not isinstance(given, Tensor | ImageSource | FeatureStore | None):
            raise TypeError(f"{name} are an ImageSource (open_images) or a tensor (N, 3, H, W), not {given!r:.60}")
    for source, destination, context, _ in requests:
        if context < 1 or context % 2 == 0:
            raise ValueError(f"the context of a linear map is an odd number of tokens from 1, not {context}")
        for tap, allowed in ((source, target.available_taps), (destination, (PIXELS, *target.available_taps))):
            if tap not in allowed:
                raise BacksightError(f"The target {target.name!r} has no tap {tap!r}; {nearest(tap, allowed)}.")
        if source == destination:
            raise BacksightError(f"A linear map from {source!r} to itself is the identity: choose two taps.")


@dataclass
class _Group:
    """Maps that read the same rows: one Gram matrix. rows: of one image, at most."""

    rows: int
    projections: dict[str, Tensor]
    members: list[tuple[Request, Layout, str]] = field(default_factory=list)
    training: RidgeAccumulator = field(default_factory=RidgeAccumulator)
    validation: RidgeAccumulator = field(default_factory=RidgeAccumulator)

    def update(self, recorded: Mapping[str, Any], held_out: bool, outputs: dict[Hashable, Tensor], seed: int) -> None:
        """Add a batch. outputs: the destinations' rows of this batch, shared with the other groups."""
        (source, *_), layout, block = self.members[0]
        batch, given = len(recorded[PIXELS]), recorded[source]
        ends = []
        for (_, end, *_), other, name in self.members:
            key = (end, name, other.reading(name).rows if name in other.main else None, other.patches)
            if key not in outputs:
                outputs[key] = pack_destination(recorded[end], other, name)
            ends.append(outputs[key])
        count, drawn = len(ends[0]) // batch, None
        if count > self.rows:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            drawn = order[: self.rows].sort().values.to(given.values.device)
        step = max(1, PACKED_VALUES // (count * layout.inputs(block)))
        for start in range(0, batch, step):
            part = given if step >= batch else given.index(slice(start, start + step))
            rows = [pack_source(part, layout, block, **self.projections)]
            rows += [end[start * count : (start + part.batch) * count] for end in ends]
            padding = row_padding(part, layout, block)
            if drawn is not None:
                rows = [each.unflatten(0, (part.batch, count))[:, drawn].flatten(0, 1) for each in rows]
                padding = None if padding is None else padding[:, drawn]
            if padding is not None:
                rows = [each[~padding.flatten()] for each in rows]
            (self.validation if held_out else self.training).update(*rows)


def _grouped(layouts: Mapping[Request, Layout], recorded: Mapping[str, Any], images: int) -> list[_Group]:
    groups: dict[Hashable, _Group] = {}
    for request, layout in layouts.items():
        for block in layout.blocks:
            reading = layout.reading(block)
            if (request.source, reading) not in groups:
                enough = max(LEAST_ROWS, CONTEXT_ROWS // images) if reading.context > 1 else MAXIMUM_ROWS
                projections = _projections(recorded[request.source], reading) if reading.directions else {}
                groups[request.source, reading] = _Group(min(MAXIMUM_ROWS, enough), projections)
            groups[request.source, reading].members.append((request, layout, block))
    return list(groups.values())


def _projections(representation: Representation, reading: Reading) -> dict[str, Tensor]:
    """The leading principal directions of the tokens of the first batch, and of each of its prefix tokens."""
    assert reading.directions is not None
    kinds = [representation.values]
    if isinstance(representation, Tokens):
        kinds = [representation.maps()[reading.level].movedim(1, 3)]
        kinds += representation.prefix_values.unbind(1) if reading.context > 1 else ()
    projections = []
    for values in kinds:
        moments = RidgeAccumulator()
        moments.update(values.reshape(-1, values.shape[-1]))
        projections.append(leading_directions(moments.gathered(), reading.directions).to(values.device))
    first, *others = projections
    return {"projection": first} | ({"prefix_projection": torch.stack(others)} if others else {})


def _position_rule(source: Representation, destination: Tensor | Representation) -> tuple[PositionRule, Tensor | None]:
    """Where the positional code of the destination comes from: nowhere, the source, or the first image."""
    if not isinstance(destination, Tokens) or destination.position is None:
        return "none", None
    carried = source.position if isinstance(source, Tokens) else None
    if carried is not None and carried.shape == destination.position.shape and carried.equal(destination.position):
        return "source", None
    return "fixed", destination.position[:1].clone()


def _solved(
    request: Request, layout: Layout, rule: PositionRule, position: Tensor | None, groups: Sequence[_Group]
) -> LinearInverse:
    """Of the strength that the validation moments choose, block by block."""
    alphas = [alpha for alpha in ALPHAS if alpha >= request.floor] or [max(ALPHAS)]
    states: dict[str, dict[str, Tensor]] = {}
    chosen: dict[str, float] = {}
    unexplained = total = 0.0
    for block in layout.blocks:
        member = (request, layout, block)
        group = next(group for group in groups if member in group.members)
        part, outputs = group.members.index(member), layout.outputs(block)
        rank = RANK if layout.rows == "set" and min(layout.inputs(block), outputs) > RANK else None
        solution = best(group.training, group.validation, alphas, part, rank)
        chosen[block] = solution.alpha
        unexplained += solution.error * group.validation.count * outputs
        total += group.validation.total_variance(solution.bias, part) * group.validation.count * outputs
        names = ("matrix",) if rank is None else ("left", "right")
        states[block] = {"center": solution.center, "bias": solution.bias, **group.projections}
        states[block] |= dict(zip(names, solution.factors, strict=True))
        # The largest matrices of a fit; they are not read again.
        group.training.crosses[part] = group.validation.crosses[part] = torch.empty(0)
    ranks = {block: len(state["right"]) if "right" in state else None for block, state in states.items()}
    score = LinearScore(chosen[layout.main[0]], 1 - unexplained / total if total > 0 else math.nan)
    shape = (0,) if position is None else tuple(position.shape)
    inverse = LinearInverse(request.source, request.destination, layout, ranks, score, rule, shape)
    for block, state in states.items():
        inverse.maps[block].load_state_dict(state)
    if position is not None and inverse.position is not None:
        inverse.position.copy_(position)
    return inverse


@dataclass
class _Sample:
    """The first validation images and their representations, as many as the memory allows."""

    room: int = SAMPLE_BYTES
    batches: list[dict[str, Any]] = field(default_factory=list)

    def add(self, recorded: Mapping[str, Any]) -> None:
        """recorded: {tap: representation}, and the images under "pixels"."""
        tensors = [recorded[PIXELS]]

        def noted(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        for representation in recorded.values():
            if not isinstance(representation, Tensor):
                representation.apply(noted)
        size, batch = sum(tensor[:1].nbytes for tensor in tensors), len(tensors[0])
        count = min(batch, self.room // size)
        self.room = self.room - count * size if count == batch else 0
        if count:
            images, which = recorded[PIXELS][:count], slice(0, count)
            kept = {tap: held.index(which).to("cpu") for tap, held in recorded.items() if tap != PIXELS}
            self.batches.append({PIXELS: images.cpu(), **kept})

    @torch.no_grad()
    def scored(self, inverse: LinearInverse) -> LinearScore:
        """The inverse's score with the PSNR of its images; of all processes together."""
        device = next(inverse.buffers()).device
        values: list[float] = []
        for recorded in self.batches:
            images = inverse(recorded[inverse.source].to(device)).cpu()
            values += psnr(recorded[PIXELS], images).tolist()
        values = gather_object(values)
        mean = sum(values) / len(values) if values else None
        return replace(inverse.score, psnr=mean, images=len(values))


def image_errors(
    inverse: LinearInverse, source: Representation, truth: Tensor | Representation
) -> tuple[Tensor, Tensor]:
    """(B,), (B,): squared error of each image, and of the training mean, in the space that was regressed."""
    errors = totals = source.values.new_zeros(source.batch)
    for block, inputs in inverse.pack(source).items():
        rows, affine = pack_destination(truth, inverse.layout, block), inverse.maps[block]
        padding = row_padding(source, inverse.layout, block)
        counted = 1.0 if padding is None else (~padding).reshape(-1, 1).float()
        errors = errors + ((rows - affine(inputs)).square() * counted).reshape(source.batch, -1).sum(1)
        totals = totals + ((rows - affine.bias).square() * counted).reshape(source.batch, -1).sum(1)
    return errors.cpu(), totals.cpu()
