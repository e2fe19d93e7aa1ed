"""Detectors of transformers by replay: detectors.py says where the taps of each lie, and this file does the rest.

A tap is a `Spot`: places in the forward pass, the levels of its tokens, and the places of what goes around it.
`from_tap` runs the model's own pass on blank images with the representation put in, and what travels in its context:
the encoder's output behind decoder taps, other levels beside one of a pyramid, the padding of the images. Whatever lies
between (reference points, refined boxes, proposals of a two-stage model) is computed again from them, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.representation import Grid, Predictions, Queries, Representation, Tokens
from backsight.targets.base import PIXELS, Size, Stage, Target
from backsight.targets.hooks import Element, Place, observe, playing

PREDICTIONS = "predictions"
PADDING = "padding"  # in Tokens.context: (B, H, W) bool
LEARNED_POSITIONS = 50  # rows and columns that a learned position embedding of this family has
PROBE = 128  # pixels of the blank image that measures the backbone's strides
# Half-steps of a post-norm layer: {suffix of the tap: module in the layer whose output is the stream there}.
ATTENTION = {"attn": "self_attn_layer_norm"}
CROSS_ATTENTION = {**ATTENTION, "cross_attn": "encoder_attn_layer_norm"}
# Of several parts between two taps, the hardest, which is the first, names the stage.
PARTS = ("decoder", "encoder", "blocks", "convolution", "projection", "backbone", "heads", "norm")
KINDS: Mapping[str, Any] = {"maps": Tokens, "tokens": Tokens, "queries": Queries, "predictions": Predictions}


@dataclass(frozen=True)
class Spot:
    """Where a tap lies, and what it takes to go on from there."""

    kind: str  # of KINDS: a place (B, C, h, w) for each level; one (B, N, C) of all levels; one (B, Q, C); none
    part: str  # of PARTS, which ends here
    places: tuple[Place, ...] = ()
    levels: tuple[int, ...] = ()  # which of the target's grids the tokens lie on
    share: Fraction = Fraction(0)  # of a layer (a half-step of two: 1/2)
    beside: Mapping[str, Place] = field(default_factory=dict)  # what goes around it, by its name in Tokens.context
    code: Place | None = None  # the positional code (B, N, C)
    fine: bool = False  # a step inside
    alone: bool = False  # queries that need no encoder output


class Level(NamedTuple):
    """A map of the backbone. The coarser ones are computed from it where it lies at a module inside."""

    stride: Size
    place: Place


class DetectionTarget(Target):
    """A detector whose taps are places in its forward pass, by default those of DETR. Its output is Predictions."""

    kind = "detector"
    model: Any

    # What a subclass may say of its model: module paths first.

    backbone, encoder, decoder = "model.backbone.model", "model.encoder", "model.decoder"
    code = "spatial_position_embeddings"  # the encoder's argument with the positional code
    one_level = False  # the encoder reads the backbone's last map only
    masked = True  # attention leaves out padding
    layers_return: Element = ()  # where the stream lies in what a layer returns
    heads_alone = False  # what follows decoder.layernorm reads nothing of the image beside it
    first_stage = "backbone"  # what lies between the pixels and the first taps
    task = "ForObjectDetection"  # in the names of transformers' classes
    decoder_steps: Mapping[str, str] = CROSS_ATTENTION
    _prefix: int = 0  # tokens before those of the grid
    _least_tokens: int = 0  # that an image has to give

    @property
    def _encoder_levels(self) -> tuple[int, ...]:
        """The grids of the encoder's tokens, in its order."""
        return tuple(range(len(self._levels) + self._further_levels))[-1 if self.one_level else 0 :]

    @property
    def _memory(self) -> Spot:
        """What the decoder reads of the image; it becomes `Queries.context`."""
        return self._encoded(Place(self.encoder, element=("last_hidden_state",)))

    def _final_norm(self, layers: int) -> int | None:
        """The call of decoder.layernorm that feeds the heads; None where there is no such norm."""
        return None

    @property
    def _widths(self) -> list[tuple[int, int]]:
        """(attention heads, MLP width) of the encoder and of the decoder."""
        config, widths = self.model.config, []
        for part in ("encoder", "decoder"):
            heads = getattr(config, f"{part}_attention_heads", None) or config.num_attention_heads
            names = (f"{part}_ffn_dim", f"{part}_feedforward_dim", "dim_feedforward", "intermediate_size")
            widths.append((int(heads), next(int(getattr(config, name)) for name in names if hasattr(config, name))))
        return widths

    def _ordered(self, kind: str, values: Tensor, back: bool = False) -> Tensor:
        """Tokens or queries from the model's order to that of Tokens and Queries, and back."""
        return values

    # Taps

    @cached_property
    def spots(self) -> dict[str, Spot]:
        """Every tap, in forward order."""
        spots = {**self._backbone_spots(), **self._encoder_spots(), **self._decoder_spots()}
        return {**spots, PREDICTIONS: Spot("predictions", "heads")}

    def _backbone_spots(self) -> dict[str, Spot]:
        """backbone.0, backbone.1, …: a map each. What it says nothing of travels beside it."""
        read = range(len(self._levels))[-1 if self.one_level else 0 :]
        spots = {}
        for number, level in enumerate(self._levels):
            followed = level.place.module != self.backbone
            others = [other for other in read if other < number or (other > number and not followed)]
            if number in read or followed:
                beside = {f"backbone.{other}": self._levels[other].place for other in others}
                spots[f"backbone.{number}"] = Spot("maps", "backbone", (level.place,), (number,), beside=beside)
        return spots

    def _encoder_spots(self) -> dict[str, Spot]:
        entering = self._encoded(Place(self.encoder, side="input"))
        layers = self._layer_spots("encoder", self.encoder, ATTENTION, entering)
        return {"projection": replace(entering, part="projection"), **layers}

    def _decoder_spots(self) -> dict[str, Spot]:
        spots = self._layer_spots("decoder", self.decoder, self.decoder_steps, Spot("queries", "decoder"))
        call = self._final_norm(sum(not spot.fine for spot in spots.values()))
        if call is not None:
            final = Place(f"{self.decoder}.layernorm", call=call)
            spots["decoder.layernorm"] = Spot("queries", "norm", (final,), alone=self.heads_alone)
        return spots

    def _encoded(self, place: Place) -> Spot:
        code = Place(self.encoder, element=(self.code,), side="input")
        return Spot("tokens", "encoder", (place,), self._encoder_levels, code=code)

    def _layer_spots(self, name: str, module: str, steps: Mapping[str, str], like: Spot) -> dict[str, Spot]:
        """Taps of a stack's layers: "<name>.layers.i", after the half-steps inside it.

        steps: {suffix of a tap: module inside the layer whose output is the stream there}; like: what else holds.
        """
        like = replace(like, share=Fraction(1, len(steps) + 1))
        spots = {}
        for layer in (f"layers.{index}" for index in range(len(self.model.get_submodule(module).layers))):
            for suffix, inner in steps.items():
                # A norm returns the stream itself, an attention module that ends in one returns it first of a tuple.
                place = Place(f"{module}.{layer}.{inner}", element=() if inner.endswith("norm") else (0,))
                spots[f"{name}.{layer}.{suffix}"] = replace(like, places=(place,), fine=True)
            place = Place(f"{module}.{layer}", element=self.layers_return)
            spots[f"{name}.{layer}"] = replace(like, places=(place,))
        return spots

    @cached_property
    def _levels(self) -> tuple[Level, ...]:
        """The backbone's maps, from fine to coarse; measured on a blank image.

        A map whose module is a cut of the coarsest map is one of every map between, too: otherwise a way around it
        would lead over that map, which is a cut itself, to the coarsest.
        """
        backbone = self.model.get_submodule(self.backbone)
        blank = torch.zeros(1, len(self.preprocessing.mean), PROBE, PROBE, device=self.device)

        def coarsest(images: Tensor) -> Any:
            maps = backbone(images)
            return maps[-1] if isinstance(maps, list) else maps.feature_maps[-1]

        returned = [one for one in observe(backbone, coarsest, blank)[0] if one.place.side == "output"]
        maps = [one for one in returned if not one.place.module]
        inside = [one for one in returned if one.place.module and one.cut and not one.place.element]
        cuts = {one.same: Place(f"{self.backbone}.{one.place.module}") for one in inside}
        followed = all(one.same in cuts for one in maps)
        places = [cuts[one.same] if followed else Place(self.backbone, element=one.place.element) for one in maps]
        strides = [(PROBE // one.shape[2], PROBE // one.shape[3]) for one in maps]
        return tuple(map(Level, strides, places))

    @property
    def _further_levels(self) -> int:
        """Levels that are made of the coarsest map, each by a convolution of stride 2."""
        return max(0, getattr(self.model.config, "num_feature_levels", 0) - len(self._levels))

    def _grids(self, size: Size) -> tuple[Grid, ...]:
        """The grids of all levels: the backbone's maps, then the further ones (a 3 x 3 kernel with padding 1)."""
        grids = [(size[0] // level.stride[0], size[1] // level.stride[1]) for level in self._levels]
        for _ in range(self._further_levels):
            grids.append((math.ceil(grids[-1][0] / 2), math.ceil(grids[-1][1] / 2)))
        return tuple(grids)

    @property
    def available_taps(self) -> tuple[str, ...]:
        return tuple(self.spots)

    def tap_set(self, name: str) -> tuple[str, ...]:
        if name == "components":
            last = {spot.kind.replace("maps", "tokens"): tap for tap, spot in self.spots.items()}
            return tuple(dict.fromkeys(["projection", *last.values()]))
        return tuple(tap for tap, spot in self.spots.items() if name == "fine" or not spot.fine)

    @property
    def reduction(self) -> Size:
        return self._levels[-1 if self.one_level else 0].stride

    @property
    def size_step(self) -> Size:
        """Height and width of images are multiples of these."""
        down, across = (math.lcm(*sides) for sides in zip(*(level.stride for level in self._levels), strict=True))
        return down, across

    def check_size(self, size: Size) -> None:
        (down, across), config, tokens = self.size_step, self.model.config, 0
        if self._least_tokens:
            tokens = sum(math.prod(self._grids(size)[level]) for level in self._memory.levels)
        anchored = tuple(getattr(config, "anchor_image_size", None) or size)
        learned = getattr(config, "position_embedding_type", "") == "learned"
        largest = (LEARNED_POSITIONS * self.reduction[0], LEARNED_POSITIONS * self.reduction[1])
        rules = {
            f"multiples of {down} high and of {across} wide": min(size) < 1 or size[0] % down or size[1] % across,
            f"exactly {anchored}, as its anchors are": tuple(size) != anchored,
            f"at most {largest}, its learned positions": learned and (size[0] > largest[0] or size[1] > largest[1]),
            f"of {self._least_tokens} tokens, for its queries, not of {tokens}": tokens < self._least_tokens,
        }
        for rule, broken in rules.items():
            if broken:
                raise BacksightError(f"{self.name} takes images that are {rule} (height, width), not {tuple(size)}.")

    def stage(self, tap: str, previous: str) -> Stage:
        """What lies between two taps; a span over several parts is named after its hardest one.

        depth counts encoder and decoder layers together, or convolutional stages.
        """
        spots = [self.spots[step] for step in self._between(tap, previous)]
        part: Any = min((spot.part for spot in spots), key=PARTS.index)
        depth = math.ceil(sum(spot.share for spot in spots))
        heads, hidden = self._widths[spots[-1].kind in ("queries", "predictions")]
        if previous == PIXELS and part != "decoder":
            part = self.first_stage
        if part == "convolution":
            return Stage(part, max(1, depth), 0, 0)
        return Stage(part, depth, heads, int(self.model.config.hidden_size) if part == "heads" else hidden)

    # Recording

    def _places(self, taps: Sequence[str]) -> dict[str, Place]:
        spots = [self.spots[tap] for tap in taps]
        if any(spot.kind == "queries" for spot in spots):
            spots.append(self._memory)
        places = [place for spot in spots for place in (*spot.places, *spot.beside.values(), spot.code) if place]
        return {str(place): place for place in places}

    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        spots = {tap: self.spots[tap] for tap in taps}
        return {tap: output if tap == PREDICTIONS else self._read(spots[tap], seen, images, padding) for tap in taps}

    def _read(self, spot: Spot, seen: Mapping[str, Any], images: Tensor, padding: Tensor | None) -> Any:
        values = [seen[str(place)] for place in spot.places]
        if spot.kind == "queries":
            context = self._read(self._memory, seen, images, padding)
            return Queries(self._ordered("queries", values[0]), context)
        grids = self._grids((images.shape[2], images.shape[3]))
        context = {name: seen[str(place)] for name, place in spot.beside.items()}
        masks, code = None, seen[str(spot.code)] if spot.code else None
        if padding is not None and self.masked:
            masks = torch.cat([_shrunk(padding, grids[level]).flatten(1) for level in spot.levels], dim=1)
            context[PADDING] = padding
        elif code is not None:
            code = code[:1]
        flat = [value.flatten(2).transpose(1, 2) if spot.kind == "maps" else value for value in values]
        tokens = self._ordered("tokens", torch.cat(flat, dim=1))
        return Tokens(tokens, tuple(grids[level] for level in spot.levels), self._prefix, masks, code, context)

    def _forward(self, images: Tensor, padding: Tensor | None) -> Predictions:
        if not self.masked:
            self._refuse_padding(padding)
        mask = {"pixel_mask": (~padding).long()} if padding is not None and self.masked else {}
        return self._predictions(self.model(pixel_values=images, **mask))

    def _predictions(self, output: Any) -> Predictions:
        """A class more than there are labels is "no object", of a softmax; else each class is judged by itself."""
        config, width = self.model.config, output.logits.shape[-1]
        softmax = width > config.num_labels or not getattr(config, "use_focal_loss", True)
        return Predictions(output.logits, output.pred_boxes, "softmax" if softmax else "sigmoid")

    def _randomised(self) -> nn.Module:
        return type(self.model)(self.model.config)

    # The rest of the forward pass

    def _rest(self, tap: str, representation: Any) -> Predictions:
        spot, tokens, values = self.spots[tap], representation, dict[Place, Tensor]()
        if not isinstance(representation, kind := KINDS[spot.kind]):
            given = getattr(representation, "form", type(representation).__name__)
            raise BacksightError(f"{tap} of {self.name} holds {kind.__name__.lower()}, not a representation {given}.")
        if spot.kind == "predictions":
            return representation
        size, lacking = self.image_size, list[str]()
        padding: Tensor | None = None
        if spot.kind == "queries":
            values[spot.places[0]] = self._ordered("queries", representation.values, back=True)
            tokens = representation.context
            lacking = ["the encoder's output"] if tokens is None and not spot.alone else []
            spot = self._memory
        if tokens is not None:
            (height, width), (down, across) = tokens.grids[0], self._levels[spot.levels[0]].stride
            size, padding = (height * down, width * across), tokens.context.get(PADDING)
            if padding is None and tokens.padding is not None:  # exact but for cells of further levels
                first = tokens.padding[:, : height * width].unflatten(1, (height, width))
                padding = F.interpolate(first[:, None].float(), size=size)[:, 0].bool()
            maps = tokens.maps() if spot.kind == "maps" else (self._ordered("tokens", tokens.values, back=True),)
            values |= dict(zip(spot.places, maps, strict=True))
            values |= {place: tokens.context[name] for name, place in spot.beside.items() if name in tokens.context}
            lacking = [name for name in spot.beside if name not in tokens.context]
        if lacking:
            raise BacksightError(
                f"The rest of {self.name} behind {tap} reads {', '.join(lacking)} too, and this representation carries "
                "none in its context: pass one from record(), or add it with dataclasses.replace."
            )
        blank = representation.values.new_zeros(representation.batch, len(self.preprocessing.mean), *size)
        with playing(self.model, values):
            return self._forward(blank, padding)


def _shrunk(padding: Tensor, grid: Grid) -> Tensor:
    """(B, H, W) to (B, h, w), as these models do it: the nearest pixel decides."""
    return ~F.interpolate((~padding)[None].float(), size=grid).bool()[0]
