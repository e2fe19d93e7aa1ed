"""Detectors of transformers by replay: a subclass says where its taps lie, and this file does the rest.

    pixels ─► backbone.0 ─► backbone.1 ─► projection ─► encoder.layers.i ─► decoder.layers.i ─► predictions
              (one grid each)             (all levels as one Tokens)        (Queries)           (Predictions)

A tap is a `Spot`: places in the forward pass, the levels of its tokens, and the places of what goes around it.
`from_tap` runs the model's own forward pass on blank images with the representation put in (and, behind decoder taps,
the encoder's output, which travels in `Queries.context`; beside the level of a pyramid, the other levels, which travel
in `Tokens.context`, as the padding of the images does). Whatever lies between these and the tap (reference points,
refined boxes, the proposals of a two-stage model) is computed again from them, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.representation import Grid, Predictions, Queries, Representation, Tokens
from backsight.targets.base import PIXELS, Size, Stage, Target
from backsight.targets.hooks import Element, Place, element_of, observe, playing

PREDICTIONS = "predictions"
PADDING = "padding"  # in Tokens.context: (B, H, W) bool
PROBE = 128  # pixels of the blank image that measures the backbone's strides
LEARNED_POSITIONS = 50  # rows and columns that a learned position embedding of this family has
# Half-steps of a post-norm layer: {suffix of the tap: module in the layer whose output is the stream there}.
ATTENTION = {"attn": "self_attn_layer_norm"}
CROSS_ATTENTION = {**ATTENTION, "cross_attn": "encoder_attn_layer_norm"}

Kind = Literal["maps", "tokens", "queries"]
# Of several parts between two taps, the hardest, which is the first, names the stage.
PARTS = ("decoder", "encoder", "convolution", "projection", "backbone", "norm")


class TransformersTarget(Target):
    """A model of transformers with a `config`, from which the same architecture can be built again."""

    model: Any

    @property
    def size_step(self) -> Size:
        """Height and width of images are multiples of these."""
        return self.reduction

    def _randomised(self) -> nn.Module:
        return type(self.model)(self.model.config)

    def _steps(self, tap: str, previous: str) -> tuple[str, ...]:
        """The taps behind `previous`, up to `tap`."""
        self._refuse_order(tap, previous)
        order = self.available_taps
        return order[0 if previous == PIXELS else order.index(previous) + 1 : order.index(tap) + 1]

    def _expect(self, tap: str, representation: Any, kind: type[Any]) -> Any:
        if not isinstance(representation, kind):
            given = getattr(representation, "signature", type(representation).__name__)
            raise BacksightError(f"{tap} of {self.name} holds {kind.__name__.lower()}, not a representation {given}.")
        return representation


@dataclass(frozen=True)
class Spot:
    """Where a tap lies, and what it takes to go on from there.

    kind: "maps", one place (B, C, h, w) for each level; "tokens", one place (B, N, C) of all levels; "queries", one
    place (B, Q, C); part: one of PARTS, which ends here; levels: which of the target's grids the tokens lie on; share:
    of a layer (a half-step of two: 1/2); beside: places of what goes around these, by its name in `Tokens.context`;
    coded: a positional code travels along; fine: a step inside; alone: queries that need no encoder output.
    """

    kind: Kind
    part: str
    places: tuple[Place, ...] = ()
    levels: tuple[int, ...] = ()
    share: Fraction = Fraction(0)
    beside: Mapping[str, Place] = field(default_factory=dict)
    coded: bool = False
    fine: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Level:
    """A map of the backbone: its stride, its place, and whether the coarser levels are computed from it there."""

    stride: Size
    place: Place
    followed: bool
    kind: Kind = "maps"


class DetectionTarget(TransformersTarget):
    """A detector whose taps are places in its forward pass, by default those of DETR. Its output is Predictions."""

    kind = "detector"

    # What a subclass may say of its model: module paths first.

    backbone, encoder, decoder = "model.backbone", "model.encoder", "model.decoder"
    positions = "model.position_embedding"
    one_level = False  # the encoder reads the backbone's last map only
    sequence_first = False  # in the decoder
    layers_return: Element = ()  # where the stream lies in what a layer returns
    heads_alone = False  # what follows decoder.layernorm reads nothing of the image beside it

    def _map_at(self, number: int) -> Element:
        """Where a map lies in what the backbone returns, by default a list of (map, mask)."""
        return number, 0

    def _through_backbone(self, images: Tensor) -> Any:
        return self.model.get_submodule(self.backbone)(images, torch.ones_like(images[:, 0]))

    @property
    def _further_levels(self) -> int:
        """Levels that are made of the coarsest map, each by a convolution of stride 2."""
        return max(0, getattr(self.model.config, "num_feature_levels", 0) - len(self._levels))

    @property
    def _encoder_levels(self) -> tuple[int, ...]:
        """The grids of the encoder's tokens, in its order."""
        return tuple(range(len(self._levels) + self._further_levels))[-1 if self.one_level else 0 :]

    @property
    def _memory(self) -> Spot:
        """What the decoder reads of the image; it becomes `Queries.context`."""
        return self._encoded(Place(self.encoder, element=("last_hidden_state",)))

    def _codes(self) -> dict[int, Place]:
        """Where the positional code of a level is made, as (1 or B, C, h, w) or (1 or B, N, C)."""
        return {level: Place(self.positions, call=call) for call, level in enumerate(self._encoder_levels)}

    def _code(self, level: int, code: Tensor) -> Tensor:
        """The code (1 or B, N, C) that is added to the tokens of a level."""
        return flat(code) if code.ndim == 4 else code

    @property
    def _decoder_steps(self) -> Mapping[str, str]:
        return CROSS_ATTENTION

    def _final_norm(self, layers: int) -> int | None:
        """The call of decoder.layernorm that feeds the heads; None where there is no such norm."""
        return None

    @property
    def _widths(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(attention heads, MLP width) of the encoder and of the decoder."""
        config = self.model.config
        encoder = (config.encoder_attention_heads, config.encoder_ffn_dim)
        return encoder, (config.decoder_attention_heads, config.decoder_ffn_dim)

    @property
    def _activation(self) -> Literal["softmax", "sigmoid"]:
        return "sigmoid"

    @property
    def _least_tokens(self) -> int:
        """Tokens that an image has to give."""
        return 0

    # Taps

    @cached_property
    def spots(self) -> dict[str, Spot]:
        """Every tap but "predictions", in forward order."""
        return {**self._backbone_spots(), **self._encoder_spots(), **self._decoder_spots()}

    def _backbone_spots(self) -> dict[str, Spot]:
        """backbone.0, backbone.1, …: a map each. What it says nothing of travels beside it."""
        read = range(len(self._levels))[-1 if self.one_level else 0 :]
        spots = {}
        for number, level in enumerate(self._levels):
            others = [other for other in read if other < number or (other > number and not level.followed)]
            if number in read or level.followed:
                beside = {f"backbone.{other}": self._levels[other].place for other in others}
                spots[f"backbone.{number}"] = Spot(level.kind, "backbone", (level.place,), (number,), beside=beside)
        return spots

    def _encoder_spots(self) -> dict[str, Spot]:
        entering = self._encoded(Place(self.encoder, side="input"))
        layers = self._layer_spots("encoder", self.encoder, ATTENTION, entering)
        return {"projection": replace(entering, part="projection"), **layers}

    def _decoder_spots(self) -> dict[str, Spot]:
        spots = self._layer_spots("decoder", self.decoder, self._decoder_steps, Spot("queries", "decoder"))
        call = self._final_norm(sum(not spot.fine for spot in spots.values()))
        if call is not None:
            final = Place(f"{self.decoder}.layernorm", call=call)
            spots["decoder.layernorm"] = Spot("queries", "norm", (final,), alone=self.heads_alone)
        return spots

    def _encoded(self, place: Place) -> Spot:
        return Spot("tokens", "encoder", (place,), self._encoder_levels, coded=True)

    def _layer_spots(self, name: str, module: str, steps: Mapping[str, str], like: Spot) -> dict[str, Spot]:
        """Taps of a stack's layers: "<name>.layers.i", after the half-steps inside it.

        steps: {suffix of a tap: module inside the layer whose output is the stream there}; like: what else holds.
        """
        share = Fraction(1, len(steps) + 1)
        spots = {}
        for layer in (f"layers.{index}" for index in range(len(self.model.get_submodule(module).layers))):
            for suffix, inner in steps.items():
                # A norm returns the stream itself, an attention module that ends in one returns it first of a tuple.
                place = Place(f"{module}.{layer}.{inner}", element=() if inner.endswith("norm") else (0,))
                spots[f"{name}.{layer}.{suffix}"] = replace(like, places=(place,), share=share, fine=True)
            place = Place(f"{module}.{layer}", element=self.layers_return)
            spots[f"{name}.{layer}"] = replace(like, places=(place,), share=share)
        return spots

    @cached_property
    def _levels(self) -> tuple[Level, ...]:
        return self._find_levels()

    def _find_levels(self) -> tuple[Level, ...]:
        """The backbone's maps, from fine to coarse; measured on a blank image.

        A map whose module is a cut of the coarsest map is one of every map between, too: otherwise a way around it
        would lead over that map, which is a cut itself, to the coarsest.
        """
        backbone = self.model.get_submodule(self.backbone)
        blank = torch.zeros(1, len(self.preprocessing.mean), PROBE, PROBE, device=self.device)

        def coarsest(images: Tensor) -> Tensor:
            return element_of(self._through_backbone(images), self._map_at(-1))

        found = [one for one in observe(backbone, coarsest, blank)[0] if one.place.side == "output"]
        returned = {one.place.element: one for one in found if not one.place.module}
        maps = [returned[self._map_at(n)] for n in range(len(returned)) if self._map_at(n) in returned]
        inside = [one for one in found if one.place.module and one.cut and one.place.element == ()]
        cuts = {one.same: one.place.module for one in inside}
        places = [Place(self.backbone, element=self._map_at(n)) for n in range(len(maps))]
        if followed := all(found.same in cuts for found in maps):
            places = [Place(f"{self.backbone}.{cuts[found.same]}") for found in maps]
        return tuple(
            Level((PROBE // found.shape[2], PROBE // found.shape[3]), place, followed or found is maps[-1])
            for found, place in zip(maps, places, strict=True)
        )

    @property
    def available_taps(self) -> tuple[str, ...]:
        return (*self.spots, PREDICTIONS)

    def tap_set(self, name: str) -> tuple[str, ...]:
        if name == "components":
            memory = [tap for tap, spot in self.spots.items() if spot.kind != "queries"][-1]
            queries = [tap for tap, spot in self.spots.items() if spot.kind == "queries"][-1:]
            return tuple(dict.fromkeys(["projection", memory, *queries, PREDICTIONS]))
        return (*(tap for tap, spot in self.spots.items() if name == "fine" or not spot.fine), PREDICTIONS)

    @property
    def reduction(self) -> Size:
        return self._levels[-1 if self.one_level else 0].stride

    @property
    def size_step(self) -> Size:
        down, across = (math.lcm(*sides) for sides in zip(*(level.stride for level in self._levels), strict=True))
        return down, across

    def check_size(self, size: Size) -> None:
        if min(size) < 1 or size[0] % self.size_step[0] or size[1] % self.size_step[1]:
            down, across = self.size_step
            raise BacksightError(
                f"{self.name} takes images whose height is a multiple of {down} and whose width is a multiple of "
                f"{across} (height, width), not {tuple(size)}."
            )
        largest = (LEARNED_POSITIONS * self.reduction[0], LEARNED_POSITIONS * self.reduction[1])
        learned = getattr(self.model.config, "position_embedding_type", "sine") == "learned"
        if learned and (size[0] > largest[0] or size[1] > largest[1]):
            raise BacksightError(
                f"{self.name} has learned positions for {LEARNED_POSITIONS} rows and columns of tokens: the largest "
                f"image is {largest}, not {tuple(size)}."
            )
        tokens = sum(math.prod(self._grids(size)[level]) for level in self._memory.levels)
        if tokens < self._least_tokens:
            raise BacksightError(
                f"{self.name} chooses {self._least_tokens} of its tokens as queries, and images of {tuple(size)} give "
                f"{tokens}: take larger images."
            )

    def _grids(self, size: Size) -> tuple[Grid, ...]:
        """The grids of all levels: the backbone's maps, then the further ones."""
        grids = [(size[0] // level.stride[0], size[1] // level.stride[1]) for level in self._levels]
        for _ in range(self._further_levels):
            grids.append(halved(grids[-1]))
        return tuple(grids)

    def stage(self, tap: str, previous: str) -> Stage:
        """What lies between two taps; a span over several parts is named after its hardest one.

        From maps or the pixels to queries or predictions: decoder; from the pixels to maps: backbone; from queries to
        predictions: heads. depth counts encoder and decoder layers together, or convolutional stages.
        """
        spots = [self.spots[step] for step in self._steps(tap, previous) if step != PREDICTIONS]
        depth = math.ceil(sum((spot.share for spot in spots), Fraction(0)))
        encoder, decoder = self._widths
        part = min((spot.part for spot in spots), key=PARTS.index, default="norm")
        if tap == PREDICTIONS or self.spots[tap].kind == "queries":
            if part == "decoder" or previous == PIXELS or self.spots[previous].kind != "queries":
                return Stage("decoder", depth, *decoder)
            heads = Stage("heads", 0, decoder[0], int(self.model.config.hidden_size))
            return heads if tap == PREDICTIONS else Stage("norm", 0, *decoder)
        if previous == PIXELS or part == "backbone":
            return Stage("backbone", depth, *encoder)
        if part == "convolution":
            return Stage("convolution", max(1, depth), 0, 0)
        return Stage(part, depth, *encoder)  # type: ignore[arg-type]

    # Recording

    def _places(self, taps: Sequence[str]) -> dict[str, Place]:
        spots = [self.spots[tap] for tap in taps if tap != PREDICTIONS]
        if any(spot.kind == "queries" for spot in spots):
            spots.append(self._memory)
        places = [place for spot in spots for place in (*spot.places, *spot.beside.values())]
        codes = self._codes()
        places += [codes[level] for spot in spots if spot.coded for level in spot.levels if level in codes]
        return {str(place): place for place in places}

    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        return {
            tap: output if tap == PREDICTIONS else self._read(self.spots[tap], seen, images, padding) for tap in taps
        }

    def _read(self, spot: Spot, seen: Mapping[str, Any], images: Tensor, padding: Tensor | None) -> Any:
        values = [seen[str(place)] for place in spot.places]
        if spot.kind == "queries":
            return Queries(self._turned(values[0]), self._read(self._memory, seen, images, padding))
        tokens = torch.cat([flat(value) for value in values], dim=1) if spot.kind == "maps" else values[0]
        grids = self._grids((images.shape[2], images.shape[3]))
        context = {name: seen[str(place)] for name, place in spot.beside.items()}
        masks = position = None
        if padding is not None:
            masks = torch.cat([_shrunk(padding, grids[level]).flatten(1) for level in spot.levels], dim=1)
            context[PADDING] = padding
        codes = self._codes()
        if spot.coded and codes.keys() >= set(spot.levels):
            position = torch.cat([self._code(level, seen[str(codes[level])]) for level in spot.levels], dim=1)
            position = position if padding is not None else position[:1]
        return Tokens(tokens, tuple(grids[level] for level in spot.levels), 0, masks, position, context)

    def _turned(self, queries: Tensor) -> Tensor:
        """(B, Q, C) to the decoder's order, and back."""
        return queries.transpose(0, 1) if self.sequence_first else queries

    def _forward(self, images: Tensor, padding: Tensor | None) -> Predictions:
        mask = None if padding is None else (~padding).long()
        output = self.model(pixel_values=images, pixel_mask=mask)
        return Predictions(output.logits, output.pred_boxes, self._activation)

    # The rest of the forward pass

    def _rest(self, tap: str, representation: Any) -> Predictions:
        if tap == PREDICTIONS:
            return self._expect(tap, representation, Predictions)
        spot, tokens, values = self.spots[tap], representation, dict[Place, Tensor]()
        if spot.kind == "queries":
            values[spot.places[0]] = self._turned(self._expect(tap, representation, Queries).values)
            if representation.context is None and not spot.alone:
                raise self._lacks(tap, "the encoder's output")
            spot, tokens = self._memory, representation.context
        size, padding = self.image_size, None
        if tokens is not None:
            size, padding = self._frame(tap, spot, self._expect(tap, tokens, Tokens))
            maps = tokens.maps() if spot.kind == "maps" else (tokens.values,)
            values |= dict(zip(spot.places, maps, strict=True))
            for name, place in spot.beside.items():
                if name not in tokens.context:
                    raise self._lacks(tap, name)
                values[place] = tokens.context[name]
        blank = representation.values.new_zeros(representation.batch, len(self.preprocessing.mean), *size)
        with playing(self.model, values):
            return self._forward(blank, padding)

    def _lacks(self, tap: str, what: str) -> BacksightError:
        return BacksightError(
            f"The rest of {self.name} behind {tap} reads {what} too, and this representation carries none in its "
            "context: pass one from record(), or add it with dataclasses.replace."
        )

    def _frame(self, tap: str, spot: Spot, tokens: Tokens) -> tuple[Size, Tensor | None]:
        """(H, W) of the images that such tokens come from, and their padding (B, H, W)."""
        stride = self._levels[spot.levels[0]].stride
        size = (tokens.grids[0][0] * stride[0], tokens.grids[0][1] * stride[1])
        grids = self._grids(size)
        expected = tuple(grids[level] for level in spot.levels)
        if tokens.grids != expected or tokens.prefix:
            raise BacksightError(
                f"{tap} of {self.name} has tokens on the grids {expected} without prefix, not on {tokens.grids} with "
                f"{tokens.prefix} prefix tokens."
            )
        if tokens.padding is None or PADDING in tokens.context:
            return size, tokens.context.get(PADDING)
        # Exact but for further levels whose cells are cut by those of the first.
        first = tokens.padding[:, : math.prod(tokens.grids[0])].unflatten(1, tokens.grids[0])
        return size, F.interpolate(first[:, None].float(), size=size)[:, 0].bool()


def flat(feature_map: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h w, C), row-major."""
    return feature_map.flatten(2).transpose(1, 2)


def halved(grid: Grid) -> Grid:
    """The grid behind a convolution of stride 2 with a 3 x 3 kernel and padding 1."""
    return math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)


def _shrunk(padding: Tensor, grid: Grid) -> Tensor:
    """(B, H, W) to (B, h, w), as these models do it: the nearest pixel decides."""
    return ~F.interpolate((~padding)[None].float(), size=grid).bool()[0]
