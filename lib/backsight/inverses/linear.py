"""Linear inverses: ridge regression in closed form, for every tap in one pass over the images.

    images ──► target ──► tap 1 … tap n          one forward pass a batch, shared by all taps
                            │        │
                     Gram + cross moments         features are never stored (ridge.py)
                            │        │
              one eigendecomposition a tap        the whole path of ridge strengths
                            │        │
           moments of the validation images       choose the strength, give R²

What a row of the regression is, for tokens on any grids and for sets, is decided in layouts.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import InitVar, asdict, dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.distributed import in_order, processes, share
from backsight.data.features import FeatureStore
from backsight.data.images import batches
from backsight.errors import BacksightError
from backsight.inverses.layouts import (
    MAXIMUM_INPUTS,
    MAXIMUM_PIXELS,
    MAXIMUM_TOKENS,
    PIXELS,
    Form,
    Layout,
    Pair,
    Reading,
    form_of,
    pack_destination,
    pack_source,
    plan_layout,
    row_padding,
    unpack,
)
from backsight.inverses.linear_inverse import LinearInverse, LinearScore
from backsight.inverses.module import Inverses, header_for
from backsight.inverses.ridge import RidgeAccumulator, RidgePath, Spectrum
from backsight.measures.pixels import psnr
from backsight.representation import Grid, Queries, Representation, Tokens
from backsight.tables.pool import bootstrap_interval, determination

if TYPE_CHECKING:
    from backsight.data.images import ImageSource
    from backsight.targets.base import Target

__all__ = [
    "ALPHAS",
    "MAXIMUM_INPUTS",
    "MAXIMUM_PIXELS",
    "MAXIMUM_TOKENS",
    "PIXELS",
    "Form",
    "Layout",
    "LinearInverse",
    "LinearScore",
    "Pair",
    "Request",
    "RidgeAccumulator",
    "RidgePath",
    "Spectrum",
    "fit_linear",
    "fit_linear_pairs",
    "fit_linear_requests",
    "form_of",
    "pack_destination",
    "pack_source",
    "plan_layout",
    "recorded_batches",
    "unpack",
]

ALPHAS: tuple[float, ...] = tuple(10 ** (exponent / 2) for exponent in range(-16, 5))
RANK = 128  # of the maps that read a whole set of queries
MAXIMUM_ROWS = 1024  # cells of one image that a fit reads of a finer grid; they are drawn anew for every batch
PACKED_VALUES = 2**26  # float32 values of input rows that are laid out at once
SAMPLE_BYTES = 256 * 2**20  # validation images kept for intervals, over all taps
WIDE = 512  # inputs of a row from which the moments' products weigh on a GPU


class Request(NamedTuple):
    """A linear map that is wanted: between two taps (or to "pixels"), each row reading context x context tokens.

    floor: the least ridge strength, for a map that will read an input with errors in it.
    """

    source: str
    destination: str
    context: int = 1
    floor: float = 0.0


AnyPair = TypeVar("AnyPair", bound=tuple)


@dataclass
class _Group:
    """Maps that read the same rows: one Gram matrix, one eigendecomposition.

    members: (request, layout, block).
    """

    members: list[tuple[Request, Layout, str]]
    projection: Tensor | None
    products: InitVar[torch.dtype] = torch.float64
    training: RidgeAccumulator = field(init=False)
    validation: RidgeAccumulator = field(init=False)

    def __post_init__(self, products: torch.dtype) -> None:
        self.training, self.validation = RidgeAccumulator(products), RidgeAccumulator(products)

    def update(
        self,
        images: Tensor,
        recorded: dict[str, Representation],
        validation: bool,
        packed: dict[tuple[Any, ...], Tensor],
        seed: int,
    ) -> None:
        """Add a batch. packed: the destinations' rows of this batch, shared with the other groups."""
        request, layout, block = self.members[0]
        wanted = [_packed(member, images, recorded, packed) for member in self.members]
        accumulator = self.validation if validation else self.training
        count = len(wanted[0]) // len(images)
        drawn = _drawn_rows(count, seed).to(images.device) if count > MAXIMUM_ROWS else None
        step = max(1, PACKED_VALUES // (count * layout.inputs(block)))
        for start in range(0, len(images), step):
            part = recorded[request.source]
            if step < len(images):
                part = part.index(torch.arange(start, min(start + step, len(images)), device=images.device))
            rows = [pack_source(part, layout, block, self.projection)]
            rows += [each[start * count : (start + part.batch) * count] for each in wanted]
            padding = row_padding(part, layout, block)
            if drawn is not None:
                rows = [each.unflatten(0, (part.batch, count))[:, drawn].flatten(0, 1) for each in rows]
                padding = None if padding is None else padding[:, drawn]
            if padding is not None:
                rows = [each[~padding.flatten()] for each in rows]
            accumulator.update(*rows)


def _packed(
    member: tuple[Request, Layout, str],
    images: Tensor,
    recorded: dict[str, Representation],
    packed: dict[tuple[Any, ...], Tensor],
) -> Tensor:
    request, layout, block = member
    destination = request.destination
    on_grid = layout.rows == "patches" and block in layout.main
    rows = (layout.row_grid(block), layout.patch_of(block)) if on_grid else None
    key = (destination, block, rows, layout.pooling)
    if key not in packed:
        packed[key] = pack_destination(images if destination == PIXELS else recorded[destination], layout, block)
    return packed[key]


def _drawn_rows(count: int, seed: int) -> Tensor:
    """MAXIMUM_ROWS of `count` places, in order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:MAXIMUM_ROWS].sort().values


@dataclass
class _Sample:
    """The first validation images and their representations, as many as the memory allows."""

    room: int = SAMPLE_BYTES
    batches: list[tuple[Tensor, dict[str, Representation]]] = field(default_factory=list)

    def add(self, images: Tensor, recorded: dict[str, Representation]) -> None:
        tensors = [images, *(each.values for each in recorded.values())]
        size = sum(each[0].numel() * each.element_size() for each in tensors)
        count = min(len(images), self.room // size)
        self.room -= count * size
        if count < len(images):
            self.room = 0
        if count:
            which = torch.arange(count)
            self.batches.append(
                (images[:count].cpu(), {tap: each.index(which).to("cpu") for tap, each in recorded.items()})
            )


def fit_linear(
    target: Target,
    images: ImageSource | Tensor | FeatureStore,
    validation: ImageSource | Tensor | FeatureStore | None = None,
    *,
    taps: Sequence[str] | str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    workers: int | Literal["auto"] = 0,
    progress: bool = True,
) -> Inverses:
    """The linear inverse of every tap to pixels, in one pass over the images.

    taps: as `load_target` takes them, default the target's own. For the rest see `fit_linear_pairs`.
    """
    names = list(target.taps if taps is None else target.resolve_taps(taps))
    pairs = [(tap, PIXELS) for tap in names]
    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "workers": workers, "progress": progress}
    fitted = fit_linear_pairs(target, images, pairs, validation, **common)
    return Inverses({tap: fitted[tap, PIXELS] for tap in names})


def fit_linear_pairs(
    target: Target,
    images: ImageSource | Tensor | FeatureStore,
    pairs: Sequence[AnyPair],
    validation: ImageSource | Tensor | FeatureStore | None = None,
    *,
    seed: int = 0,
    context: int = 1,
    batch_size: int = 64,
    workers: int | Literal["auto"] = 0,
    maximum_inputs: int = MAXIMUM_INPUTS,
    progress: bool = True,
) -> dict[AnyPair, LinearInverse]:
    """Linear maps between many pairs of taps, in one pass over the images.

    Of a grid with more than MAXIMUM_ROWS tokens as many are drawn for every batch: neighbours say nearly the same,
    and the time of a fit stays in proportion to the images.

    images: ImageSource, or (N, 3, H, W) in [0, 1]; pairs: (source tap, destination tap or "pixels"), or a `Request`
    with its own context and floor; validation: images of another split, on which the ridge strength is chosen from
    their moments alone (default: every fifth image of `images` is held out of the fit); seed: of the projection of a
    long set and of the bootstrap; context: side of the square of tokens that the map of one token reads, 1 (what that
    token alone says, the `linear` family) or an odd number above (a convolution in closed form); workers: processes
    that decode images; maximum_inputs: see `plan_layout`. Under `accelerate launch` every process reads its share of
    the images, and all return the same maps.

    Returns {pair: LinearInverse}, each scored on the validation images. Raises BacksightError on an unknown tap, on
    ends between which no map is defined, and on too few images.
    """
    requests = {pair: pair if isinstance(pair, Request) else Request(*pair, context) for pair in dict.fromkeys(pairs)}
    fitted = fit_linear_requests(
        target, images, list(requests.values()), validation, batch_size, seed, progress, workers, maximum_inputs
    )
    return {pair: fitted[request] for pair, request in requests.items()}


def fit_linear_requests(
    target: Target,
    images: Any,
    requests: Sequence[Request],
    validation: Any = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
    workers: int | Literal["auto"] = 0,
    maximum_inputs: int = MAXIMUM_INPUTS,
) -> dict[Request, LinearInverse]:
    """`fit_linear_pairs` for maps of several contexts and floors, in one pass over the images."""
    _check_requests(target, requests)
    for each in (images, validation):
        if getattr(each, "fit", None) == "pad":
            raise BacksightError(
                f"The images {each.name!r} are padded, and linear maps are fitted on whole images: open them with "
                "fit='crop' or fit='stretch'."
            )
    ends = (tap for request in requests for tap in (request.source, request.destination))
    taps = list(dict.fromkeys(tap for tap in ends if tap != PIXELS))
    passes = _passes(target, images, validation, taps, batch_size, progress, workers)

    def planned(request: Request, source: Representation, destination: Tensor | Representation) -> Layout:
        return plan_layout(
            (request.source, request.destination),
            form_of(source),
            form_of(destination),
            getattr(target, "reduction", None),
            maximum_inputs,
            None,
            request.context,
        )

    moments = _accumulated(passes, requests, planned, seed)
    fitted = _solved(moments, seed)
    for request, inverse in fitted.items():
        inverse.header = header_for(target, "linear", request.source, request.destination, images, seed)
    return fitted


@dataclass
class _Moments:
    """All that a fit keeps of the images: its size does not depend on their number."""

    layouts: dict[Request, Layout] = field(default_factory=dict)
    positions: dict[Request, tuple[Literal["none", "source", "fixed"], Tensor | None]] = field(default_factory=dict)
    groups: list[_Group] = field(default_factory=list)
    sample: _Sample = field(default_factory=_Sample)


def _accumulated(
    passes: Iterable[tuple[Tensor, dict[str, Representation], bool]],
    requests: Sequence[Request],
    planned: Callable[[Request, Representation, Tensor | Representation], Layout],
    seed: int,
) -> _Moments:
    """The moments of all processes' passes: (images, representations, whether they are held out)."""
    moments = _Moments()
    for number, (batch, recorded, held_out) in enumerate(passes):
        if not moments.layouts:
            for request in requests:
                at_end = batch if request.destination == PIXELS else recorded[request.destination]
                moments.layouts[request] = planned(request, recorded[request.source], at_end)
                moments.positions[request] = _position_rule(recorded[request.source], at_end)
            moments.groups = _grouped(moments.layouts, seed, batch.device)
        packed: dict[tuple[Any, ...], Tensor] = {}
        for group in moments.groups:
            group.update(batch, recorded, held_out, packed, seed + number)
        if held_out:
            moments.sample.add(batch, recorded)
    for group in moments.groups:
        group.training, group.validation = group.training.gathered(), group.validation.gathered()
    return moments


def _solved(moments: _Moments, seed: int) -> dict[Request, LinearInverse]:
    """The maps of all requests, each of the strength that the validation moments choose, with their scores."""
    groups = moments.groups
    if not groups or any(min(each.training.count, each.validation.count) == 0 for each in groups):
        raise BacksightError(
            "A linear fit needs at least 5 images, or images both to fit and to validate on: "
            "give a larger `images`, or a `validation` that is not empty."
        )
    inverses = {}
    for request, layout in moments.layouts.items():
        rule, position = moments.positions[request]
        blocks = {
            block: (group, part)
            for group in groups
            for part, (each, _, block) in enumerate(group.members)
            if each == request
        }
        allowed = [alpha for alpha in ALPHAS if alpha >= request.floor] or [max(ALPHAS)]
        inverses[request] = _solve(request, layout, blocks, allowed, RANK, rule, position)
    _score_sample(inverses, moments.sample, seed)
    return inverses


def _check_requests(target: Target, requests: Sequence[Request]) -> None:
    if not requests:
        raise BacksightError("A linear fit needs at least one tap to invert.")
    for context in {request.context for request in requests}:
        if context < 1 or context % 2 == 0:
            raise BacksightError(f"The context of a linear map is an odd number of tokens from 1, not {context}.")
    available = getattr(target, "available_taps", target.taps)
    for source, destination, *_ in requests:
        for tap, allowed in ((source, tuple(available)), (destination, (PIXELS, *available))):
            if tap not in allowed:
                nearest = get_close_matches(tap, allowed, n=3, cutoff=0.3) or list(allowed[:5])
                raise BacksightError(
                    f"The target {target.name!r} has no tap {tap!r} to map "
                    f"{'from' if tap == source else 'to'}; nearest: {', '.join(nearest)}."
                )
        if source == destination:
            raise BacksightError(f"A linear map from {source!r} to itself is the identity: choose two taps.")


def _passes(
    target: Any,
    images: Any,
    validation: Any,
    taps: Sequence[str],
    batch_size: int,
    progress: bool,
    workers: int | Literal["auto"],
) -> Iterator[tuple[Tensor, dict[str, Representation], bool]]:
    """Every batch with its representations and whether it is held out: one forward pass an image."""
    state = processes()
    seen = 0
    for held_out, source in ((False, images), (True, validation)):
        if source is None:
            continue
        own = share(source)
        bar = tqdm(
            recorded_batches(target, own, taps, batch_size, workers=workers),
            total=-(-len(own) // batch_size),
            desc=f"{'validating' if held_out else 'fitting'} linear maps",
            leave=False,
            disable=not (progress and state.is_main_process),
        )
        for batch, recorded in bar:
            if validation is not None:
                yield batch, recorded, held_out
                continue
            places = torch.arange(seen, seen + len(batch)) * state.num_processes + state.process_index
            order = places % 5 == 4
            seen += len(batch)
            for which, is_held_out in ((~order, False), (order, True)):
                if which.any():
                    chosen = which.nonzero().flatten().to(batch.device)
                    part = {tap: each.index(chosen) for tap, each in recorded.items()}
                    yield batch[chosen], part, is_held_out


def recorded_batches(
    target: Any,
    images: Any,
    taps: Sequence[str],
    batch_size: int,
    limit: int | None = None,
    workers: int | Literal["auto"] = 0,
) -> Iterator[tuple[Tensor, dict[str, Representation]]]:
    """Batches with their representations: read where a store holds them, else from the frozen pass.

    limit: about this many of the first images. Values are float32, and queries come without the encoder's output.
    """
    device = target.device
    steps = None if limit is None else -(-min(limit, len(images)) // batch_size)
    if isinstance(images, FeatureStore) and set(taps) <= set(images.taps):
        images.check(target)
        for batch, recorded in itertools.islice(images.passes(batch_size, taps=taps), steps):
            yield batch.to(device), {tap: recorded[tap].to(device) for tap in taps}
        return
    for batch in itertools.islice(batches(images, batch_size, workers=workers), steps):
        batch = batch.to(device)
        recorded = target.record(batch, taps)
        yield batch, {tap: _plain(each) for tap, each in recorded.items()}


def _plain(representation: Representation) -> Representation:
    """In float32, and queries without the encoder's output: an inverse must not see it."""
    if isinstance(representation, Queries):
        return Queries(representation.values.float())
    return representation.apply(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def _grouped(layouts: dict[Request, Layout], seed: int, device: torch.device) -> list[_Group]:
    groups: dict[tuple[str, Reading, Grid | None], list[tuple[Request, Layout, str]]] = {}
    for request, layout in layouts.items():
        for block in layout.blocks:
            reading = layout.reading(block)
            # Gathered cells make rows of another number, which the destination's grid decides.
            rows = None if reading.gathered == (1, 1) else layout.row_grid(block)
            key = (request.source, reading, rows)
            if key not in groups:
                groups[key] = []
            groups[key].append((request, layout, block))
    made = []
    for members in groups.values():
        _, layout, block = members[0]
        projection = _projection(layout, seed, device) if block == "set" else None
        wide = layout.rows == "patches" and layout.inputs(block) >= WIDE
        fast = wide and device.type == "cuda"
        made.append(_Group(members, projection, torch.float32 if fast else torch.float64))
    return made


def _projection(layout: Layout, seed: int, device: torch.device) -> Tensor | None:
    """(C, C') with orthonormal columns, the same for every query."""
    if layout.projected is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(layout.source.channels, layout.projected, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(directions).Q.float().to(device)


def _position_rule(
    source: Representation, destination: Tensor | Representation
) -> tuple[Literal["none", "source", "fixed"], Tensor | None]:
    """Where the positional code of the destination comes from: nowhere, the source, or the first image."""
    if not isinstance(destination, Tokens) or destination.position is None:
        return "none", None
    carried = source.position if isinstance(source, Tokens) else None
    if carried is not None and carried.shape == destination.position.shape and carried.equal(destination.position):
        return "source", None
    return "fixed", destination.position[:1].clone()


def _solve(
    request: Request,
    layout: Layout,
    blocks: dict[str, tuple[_Group, int]],
    alphas: Sequence[float],
    rank: int,
    rule: Literal["none", "source", "fixed"],
    position: Tensor | None,
) -> LinearInverse:
    states: dict[str, dict[str, Tensor]] = {}
    ranks: dict[str, int | None] = {}
    chosen: dict[str, float] = {}
    unexplained = total = 0.0
    for block in layout.blocks:
        group, part = blocks[block]
        path = group.training.path(part)
        errors = path.errors(group.validation, alphas, part)
        best = min(range(len(alphas)), key=errors.__getitem__)
        chosen[block], error = alphas[best], errors[best]
        center = path.spectrum.mean
        if layout.rows == "set" and rank < min(layout.inputs(block), layout.outputs(block)):
            left, right = path.low_rank(alphas[best], rank)
            error = group.validation.mse((left, right), path.output_mean - (center @ left) @ right, part)
            ranks[block], state = left.shape[1], {"left": left, "right": right}
        else:
            ranks[block], state = None, {"matrix": path.weight(alphas[best])}
        states[block] = state | {"center": center, "bias": path.output_mean}
        cells = group.validation.count * layout.outputs(block)
        unexplained += error * cells
        total += group.validation.total_variance(path.output_mean, part) * cells
        # The largest matrices of a fit; they are not read again.
        group.training.crosses[part] = group.validation.crosses[part] = torch.empty(0)
    score = LinearScore(alpha=chosen[layout.main[0]], r2=1 - unexplained / total if total > 0 else math.nan)
    shape = (0,) if position is None else tuple(position.shape)
    inverse = LinearInverse(request.source, request.destination, layout, ranks, score, rule, shape)
    for block, state in states.items():
        inverse.maps[block].load_state_dict({name: tensor.float() for name, tensor in state.items()})
    group = blocks[layout.main[0]][0]
    if group.projection is not None:
        inverse.get_buffer("projection").copy_(group.projection)
    if position is not None:
        inverse.get_buffer("position").copy_(position)
    return inverse.to(group.training.upper.device).eval()


def _score_sample(inverses: dict[Request, LinearInverse], sample: _Sample, seed: int) -> None:
    """Add PSNR and the intervals over images to the scores."""
    if not sum(gather_object([len(sample.batches)])):
        return
    for (source, destination, *_), inverse in inverses.items():
        device = next(inverse.buffers()).device
        scores = asdict(inverse.score)
        errors, totals, ratios = [torch.zeros(0)], [torch.zeros(0)], [torch.zeros(0)]
        for images, recorded in sample.batches:
            wanted = images if destination == PIXELS else recorded[destination]
            representation = recorded[source].to(device)
            with torch.no_grad():
                error, total = image_errors(inverse, representation, wanted)
                errors.append(error)
                totals.append(total)
                if destination == PIXELS:
                    ratios.append(psnr(images, inverse(representation).cpu()))
        every_error, every_total = in_order(torch.cat(errors)), in_order(torch.cat(totals))
        _, scores["r2_low"], scores["r2_high"] = determination(every_error, every_total, seed=seed)
        scores["images"] = len(every_error)
        if destination == PIXELS:
            values = in_order(torch.cat(ratios))
            scores["psnr"] = float(values.mean())
            scores["psnr_low"], scores["psnr_high"] = bootstrap_interval(values, seed=seed)
        inverse.score = LinearScore(**scores)


def image_errors(
    inverse: LinearInverse, source: Representation, wanted: Tensor | Representation
) -> tuple[Tensor, Tensor]:
    """(B,), (B,): squared error of each image, and of the training mean, in the space that was regressed."""
    batch = source.batch
    errors, totals = torch.zeros(batch), torch.zeros(batch)
    for block, inputs in inverse.pack(source).items():
        truth = pack_destination(wanted, inverse.layout, block)
        found = inverse.maps[block](inputs).cpu()
        mean = inverse.maps[block].get_buffer("bias").cpu()
        padding = row_padding(source, inverse.layout, block)
        counted = 1.0 if padding is None else (~padding).reshape(-1, 1).float().cpu()
        errors += ((truth - found).square() * counted).reshape(batch, -1).sum(1)
        totals += ((truth - mean).square() * counted).reshape(batch, -1).sum(1)
    return errors, totals
