"""Detectors of transformers by replay: a subclass says where its taps lie, and this file does the rest.

    pixels ─► backbone.0 ─► backbone.1 ─► projection ─► encoder.layers.i ─► decoder.layers.i ─► predictions
              (one grid each)             (all levels as one Tokens)        (Queries)           (Predictions)

A tap is a `Spot`: places in the forward pass, the levels of its tokens, and the places of what goes around it.
`from_tap` runs the model's own forward pass on blank images with the representation put in (and, behind decoder taps,
the encoder's output, which travels in `Queries.context`; beside the level of a pyramid, the other levels, which travel
in `Tokens.context`). Whatever lies between these and the tap (reference points, refined boxes, the proposals of a
two-stage model) is computed again from them, exactly.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.representation import Grid, Predictions, Queries, Representation, Tokens
from backsight.targets.base import PIXELS, Size, Stage
from backsight.targets.hooks import Element, Place, observe, playing, watching
from backsight.targets.hugging_face import TransformersTarget

PREDICTIONS = "predictions"
PIXEL_PADDING = "padding"  # in Tokens.context: (B, H, W) bool, where the tap's own levels do not tell all of it
PROBE = 128  # pixels of the blank image that measures the backbone's strides
LEARNED_POSITIONS = 50  # rows and columns that a learned position embedding of this family has

Part = Literal["backbone", "projection", "convolution", "encoder", "decoder", "norm"]


@dataclass(frozen=True)
class Spot:
    """Where a tap lies, and what it takes to go on from there.

    kind: "maps", one place (B, C, h, w) for each level; "tokens", one place (B, N, C) of all levels; "queries", one
    place (B, Q, C); levels: which of the target's grids the tokens lie on; part: what ends here; share: of a layer
    (a half-step of two: 1/2); beside: places of what goes around these, by its name in `Tokens.context`; positioned:
    a positional code travels along; fine: a step inside a layer; alone: queries that need no encoder output.
    """

    kind: Literal["maps", "tokens", "queries"]
    part: Part
    places: tuple[Place, ...]
    levels: tuple[int, ...] = ()
    share: Fraction = Fraction(0)
    beside: Mapping[str, Place] = field(default_factory=dict)
    positioned: bool = False
    fine: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Level:
    """A map of the backbone: its stride, its place, and whether the coarser levels are computed from it there."""

    stride: Size
    place: Place
    followed: bool


class DetectionTarget(TransformersTarget):
    """A detector whose taps are places in its forward pass. Its output is Predictions."""

    kind = "detector"
    maps_at: Element = ()  # in what model.backbone returns: its list of (map, mask)

    # What a subclass says of its model.

    @abstractmethod
    def _spots(self) -> dict[str, Spot]:
        """Every tap but "predictions", in forward order."""

    @property
    @abstractmethod
    def _memory(self) -> Spot:
        """What the decoder reads of the image; it becomes `Queries.context`."""

    @property
    def _activation(self) -> Literal["softmax", "sigmoid"]:
        return "sigmoid"

    @property
    def _read_levels(self) -> tuple[int, ...]:
        """The backbone's maps that the model reads."""
        return tuple(range(len(self._levels)))

    @property
    def _further_levels(self) -> int:
        """Levels that the projection makes of the coarsest map, each by a convolution of stride 2."""
        return 0

    def _codes(self) -> dict[int, Place]:
        """Where the positional code of a level is made, as (1 or B, C, h, w) or (1 or B, N, C)."""
        return {}

    def _code(self, level: int, code: Tensor) -> Tensor:
        """The code (1 or B, N, C) that is added to the tokens of a level."""
        return flat(code) if code.ndim == 4 else code

    @property
    def _least_tokens(self) -> int:
        """Tokens that an image has to give."""
        return 0

    # What the family has in common.

    @cached_property
    def spots(self) -> dict[str, Spot]:
        return self._spots()

    @property
    def available_taps(self) -> tuple[str, ...]:
        return (*self.spots, PREDICTIONS)

    def tap_set(self, name: str) -> tuple[str, ...]:
        if name == "components":
            memory = [tap for tap, spot in self.spots.items() if spot.kind != "queries"][-1]
            queries = [tap for tap, spot in self.spots.items() if spot.kind == "queries"][-1:]
            return tuple(dict.fromkeys(["projection", memory, *queries, PREDICTIONS]))
        return tuple(tap for tap in self.available_taps if name == "fine" or not self._is_fine(tap))

    def _is_fine(self, tap: str) -> bool:
        return tap != PREDICTIONS and self.spots[tap].fine

    @property
    def reduction(self) -> Size:
        return self._levels[self._read_levels[0]].stride

    @property
    def size_step(self) -> Size:
        down, across = (math.lcm(*sides) for sides in zip(*(level.stride for level in self._levels), strict=True))
        return down, across

    def check_size(self, size: Size) -> None:
        down, across = self.size_step
        if min(size) < 1 or size[0] % down or size[1] % across:
            raise BacksightError(
                f"{self.name} takes images whose height is a multiple of {down} and whose width is a multiple of "
                f"{across} (height, width), not {tuple(size)}."
            )
        grids = self._grids(size)
        finest = grids[self._read_levels[0]]
        learned = getattr(self.model.config, "position_embedding_type", "sine") == "learned"
        if learned and max(finest) > LEARNED_POSITIONS:
            largest = (LEARNED_POSITIONS * self.reduction[0], LEARNED_POSITIONS * self.reduction[1])
            raise BacksightError(
                f"{self.name} has learned positions for {LEARNED_POSITIONS} rows and columns of tokens: the largest "
                f"image is {largest}, not {tuple(size)}."
            )
        tokens = sum(grids[level][0] * grids[level][1] for level in self._memory.levels)
        if tokens < self._least_tokens:
            raise BacksightError(
                f"{self.name} chooses {self._least_tokens} of its tokens as queries, and images of {tuple(size)} give "
                f"{tokens}: take larger images."
            )

    def _grids(self, size: Size) -> tuple[Grid, ...]:
        """The grids of all levels: the backbone's maps, then those that the projection adds."""
        grids = [(size[0] // level.stride[0], size[1] // level.stride[1]) for level in self._levels]
        for _ in range(self._further_levels):
            grids.append(halved(grids[-1]))
        return tuple(grids)

    def stage(self, tap: str, previous: str) -> Stage:
        """What lies between two taps; a span over several parts is named after its hardest one.

        From maps or the pixels to queries or predictions: decoder; from the pixels, or between maps of the backbone:
        backbone; from maps to later ones: encoder, convolution, or projection where no layer lies between; from
        queries to predictions: heads. depth counts encoder and decoder layers together, or convolutional stages.
        """
        self._refuse_order(tap, previous)
        order = self.available_taps
        steps = order[0 if previous == PIXELS else order.index(previous) + 1 : order.index(tap) + 1]
        spots = [self.spots[step] for step in steps if step != PREDICTIONS]
        depth = math.ceil(sum((spot.share for spot in spots), Fraction(0)))
        config = self.model.config
        encoder = (int(config.encoder_attention_heads), int(config.encoder_ffn_dim))
        decoder = (int(config.decoder_attention_heads), int(config.decoder_ffn_dim))
        parts = {spot.part for spot in spots}
        if tap == PREDICTIONS or self.spots[tap].kind == "queries":
            from_map = previous == PIXELS or self.spots[previous].kind != "queries"
            if from_map or "decoder" in parts:
                return Stage("decoder", depth, *decoder)
            if tap != PREDICTIONS:
                return Stage("norm", 0, *decoder)
            return Stage("heads", 0, decoder[0], int(config.hidden_size))
        if previous == PIXELS or parts == {"backbone"}:
            return Stage("backbone", depth, *encoder)
        if parts == {"norm"}:
            return Stage("norm", 0, *encoder)
        if "encoder" in parts:
            return Stage("encoder", depth, *encoder)
        if "convolution" in parts:
            return Stage("convolution", max(1, depth), 0, 0)
        return Stage("projection", 0, *encoder)

    # Recording

    def _places(self, taps: Sequence[str]) -> dict[str, Place]:
        spots = [self.spots[tap] for tap in taps if tap != PREDICTIONS]
        if any(spot.kind == "queries" for spot in spots):
            spots.append(self._memory)
        places = [place for spot in spots for place in (*spot.places, *spot.beside.values())]
        codes = self._codes()
        places += [codes[level] for spot in spots if spot.positioned for level in spot.levels if level in codes]
        return {_key(place): place for place in places}

    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        size = (int(images.shape[2]), int(images.shape[3]))

        def canonical(tap: str) -> Representation:
            if tap == PREDICTIONS:
                return output
            spot = self.spots[tap]
            if spot.kind == "queries":
                return Queries(seen[_key(spot.places[0])], self._tokens(self._memory, seen, size, padding))
            return self._tokens(spot, seen, size, padding)

        return {tap: canonical(tap) for tap in taps}

    def _tokens(self, spot: Spot, seen: Mapping[str, Any], size: Size, padding: Tensor | None) -> Tokens:
        grids = self._grids(size)
        found = [seen[_key(place)] for place in spot.places]
        values = torch.cat([flat(each) for each in found], dim=1) if spot.kind == "maps" else found[0]
        context = {name: seen[_key(place)] for name, place in spot.beside.items()}
        masks = None
        if padding is not None:
            masks = torch.cat([_shrunk(padding, grids[level]).flatten(1) for level in spot.levels], dim=1)
            if len(spot.levels) < len(grids):
                context[PIXEL_PADDING] = padding
        codes = self._codes()
        position = None
        if spot.positioned and all(level in codes for level in spot.levels):
            position = torch.cat([self._code(level, seen[_key(codes[level])]) for level in spot.levels], dim=1)
            position = position if padding is not None else position[:1]
        return Tokens(values, tuple(grids[level] for level in spot.levels), 0, masks, position, context)

    def _forward(self, images: Tensor, padding: Tensor | None) -> Predictions:
        mask = None if padding is None else (~padding).long()
        output = self.model(pixel_values=images, pixel_mask=mask)
        return Predictions(output.logits, output.pred_boxes, self._activation)

    # The rest of the forward pass

    def _rest(self, tap: str, representation: Any) -> Predictions:
        if tap == PREDICTIONS:
            return self._expect(tap, representation, Predictions)
        spot = self.spots[tap]
        values: dict[Place, Tensor] = {}
        size, padding = self.image_size, None
        if spot.kind == "queries":
            queries = self._expect(tap, representation, Queries)
            values[spot.places[0]] = queries.values
            if queries.context is not None:
                size, padding = self._frame(tap, self._memory, queries.context)
                values |= dict(self._put(tap, self._memory, queries.context))
            elif not spot.alone:
                raise BacksightError(
                    f"The rest of {self.name} behind {tap} reads the encoder's output, but these queries carry no "
                    "context: pass queries from record(), or give them one with dataclasses.replace."
                )
        else:
            tokens = self._expect(tap, representation, Tokens)
            size, padding = self._frame(tap, spot, tokens)
            values |= dict(self._put(tap, spot, tokens))
        blank = representation.values.new_zeros(representation.batch, len(self.preprocessing.mean), *size)
        with playing(self.model, values):
            return self._forward(blank, padding)

    def _frame(self, tap: str, spot: Spot, tokens: Tokens) -> tuple[Size, Tensor | None]:
        """(H, W) of the images that such tokens come from, and their padding (B, H, W)."""
        stride = self._levels[spot.levels[0]].stride
        height, width = (cells * pixels for cells, pixels in zip(tokens.grids[0], stride, strict=True))
        size = (height, width)
        grids = self._grids(size)
        expected = tuple(grids[level] for level in spot.levels)
        if tokens.grids != expected or tokens.prefix:
            raise BacksightError(
                f"{tap} of {self.name} has tokens on the grids {expected} without prefix, not on {tokens.grids} with "
                f"{tokens.prefix} prefix tokens."
            )
        if tokens.padding is None or PIXEL_PADDING in tokens.context:
            return size, tokens.context.get(PIXEL_PADDING)
        return size, _grown(tokens, size)

    def _put(self, tap: str, spot: Spot, tokens: Tokens) -> Iterator[tuple[Place, Tensor]]:
        yield from zip(spot.places, tokens.maps() if spot.kind == "maps" else (tokens.values,), strict=True)
        for name, place in spot.beside.items():
            if name not in tokens.context:
                raise BacksightError(
                    f"The rest of {self.name} behind {tap} reads {name} too, but these tokens carry none in their "
                    "context: pass tokens from record(), or give them one with dataclasses.replace."
                )
            yield place, tokens.context[name]

    def _expect(self, tap: str, representation: Any, kind: Any) -> Any:
        if not isinstance(representation, kind):
            raise BacksightError(
                f"{tap} of {self.name} holds {kind.__name__.lower()}, "
                f"not a representation {getattr(representation, 'signature', type(representation).__name__)}."
            )
        return representation

    # The backbone

    @cached_property
    def _levels(self) -> tuple[Level, ...]:
        """The backbone's maps, from fine to coarse; measured on a blank image.

        A map whose module is a cut of the coarsest map is one of every map between, too: otherwise a way around it
        would lead over that map, which is a cut itself, to the coarsest.
        """
        backbone = self.model.model.backbone
        maps: list[Tensor] = []

        def coarsest(images: Tensor) -> Tensor:
            maps[:] = self._maps(backbone(images, torch.ones_like(images[:, 0])))
            return maps[-1]

        blank = torch.zeros(1, len(self.preprocessing.mean), PROBE, PROBE, device=self.device)
        with _makers(backbone) as makers:
            calls = observe(backbone, coarsest, blank).calls
        strides = [(PROBE // each.shape[2], PROBE // each.shape[3]) for each in maps]
        paths = [makers[id(each)][1] for each in maps if id(each) in makers]
        cuts = [call.path for call in calls if call.path in paths and call.found[0].cut]
        if cuts == paths and len(paths) == len(maps):
            places = [Place(f"model.backbone.{path}") for path in paths]
            return tuple(Level(stride, place, True) for stride, place in zip(strides, places, strict=True))
        last = len(maps) - 1
        return tuple(
            Level(stride, Place("model.backbone", element=(*self.maps_at, number, 0)), number == last)
            for number, stride in enumerate(strides)
        )

    def _maps(self, output: Any) -> list[Tensor]:
        for key in self.maps_at:
            output = output[key]
        return [feature_map for feature_map, _ in output]

    def _backbone_spots(self) -> dict[str, Spot]:
        """backbone.0, backbone.1, …: a map each. What it says nothing of travels beside it."""
        spots = {}
        for number, level in enumerate(self._levels):
            others = [each for each in self._read_levels if each < number or (each > number and not level.followed)]
            if number in self._read_levels or level.followed:
                beside = {f"backbone.{each}": self._levels[each].place for each in others}
                spots[f"backbone.{number}"] = Spot("maps", "backbone", (level.place,), (number,), beside=beside)
        return spots


@contextmanager
def _makers(model: nn.Module) -> Iterator[dict[int, tuple[Tensor, str]]]:
    """For the time of one pass: {id of a tensor: (the tensor, path of the outermost module that returns it)}."""
    made: dict[int, tuple[Tensor, str]] = {}

    def keep(path: str, _module: nn.Module, _given: Any, _named: Any, output: Any) -> None:
        if path and isinstance(output, Tensor):
            made[id(output)] = (output, path)

    with watching(model, keep):
        yield made


def layer_spots(
    module: str,
    count: int,
    steps: Mapping[str, str],
    kind: Literal["tokens", "queries"],
    part: Part,
    element: Element = (),
    **settings: Any,
) -> dict[str, Spot]:
    """Taps of `count` layers: "<module>.layers.i", after the half-steps inside it.

    steps: {suffix of a tap: module inside the layer whose output is the stream there}; element: where the stream
    lies in what a layer returns; settings: more of all these spots.
    """
    share = Fraction(1, len(steps) + 1)
    spots = {}
    for index in range(count):
        layer = f"{module}.layers.{index}"
        for suffix, inner in steps.items():
            # A norm returns the stream itself, an attention module that ends in one returns it first of a tuple.
            place = Place(f"model.{layer}.{inner}", element=() if inner.endswith("norm") else (0,))
            spots[f"{layer}.{suffix}"] = Spot(kind, part, (place,), share=share, fine=True, **settings)
        place = Place(f"model.{layer}", element=element)
        spots[layer] = Spot(kind, part, (place,), share=share, **settings)
    return spots


def flat(feature_map: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h w, C), row-major."""
    return feature_map.flatten(2).transpose(1, 2)


def halved(grid: Grid) -> Grid:
    """The grid behind a convolution of stride 2 with a 3 x 3 kernel and padding 1."""
    return math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)


def _key(place: Place) -> str:
    side = "" if place.side == "output" else f" ({place.side})"
    return f"{place.module}{side}, call {place.call}" + "".join(f", {key}" for key in place.element)


def _shrunk(padding: Tensor, grid: Grid) -> Tensor:
    """(B, H, W) to (B, h, w), as these models do it: the nearest pixel decides."""
    return ~F.interpolate((~padding)[None].float(), size=grid).bool()[0]


def _grown(tokens: Tokens, size: Size) -> Tensor:
    """(B, H, W) padding of images that gives the padding of these tokens on all their grids.

    The finest grid's is grown, and the one pixel that decides for a token of another grid is set as that token says:
    where a grid does not divide the image, this pixel may lie inside a cell of the finest.
    """
    assert tokens.padding is not None
    areas = [height * width for height, width in tokens.grids]
    masks = tokens.padding.split(areas, dim=1)
    finest = masks[0].unflatten(1, tokens.grids[0])[:, None].float()
    padding = F.interpolate(finest, size=size).bool().flatten(1)
    numbers = torch.arange(size[0] * size[1], dtype=torch.float64, device=padding.device).view(1, 1, *size)
    for mask, grid in zip(masks, tokens.grids, strict=True):
        padding[:, F.interpolate(numbers, size=grid).long().flatten()] = mask
    return padding.unflatten(1, size)
