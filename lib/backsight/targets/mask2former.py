"""Mask2Former of transformers: Mask2FormerForUniversalSegmentation, a mask for each query instead of a box.

    pixels ─► backbone.i ─► projection ─► encoder.layers.i ─► decoder.layers.i ─► decoder.layernorm ─► predictions
              (maps)        (Tokens of the three coarsest     (Queries)           (Queries)            (Predictions
                             maps, the coarsest first)                                                  with masks)

`encoder` is the pixel decoder's deformable encoder, `decoder` the masked-attention decoder. Behind the encoder the
finest map of the backbone joins again (it becomes the features that masks are made of), so it travels in the context.

Facts of transformers 5.23 that the taps stand on: the attention mask of a decoder layer comes from the masks predicted
from the layer before it, so `from_tap` computes all of them again; the decoder is sequence-first; its layers
cross-attend before they self-attend, and are post-norm unless `pre_norm`; `decoder.layernorm` runs once before the
layers and once after each, of which the last feeds the heads; the pixel mask is taken and not read, so that padding
would count.

Boxes are made from the masks, see `soft_boxes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.representation import Predictions, Queries, Representation
from backsight.targets.base import PIXELS, Stage
from backsight.targets.detection import PREDICTIONS, PROBE, DetectionTarget, Level, Spot, flat, layer_spots
from backsight.targets.hooks import Place, playing
from backsight.targets.hugging_face import Architecture, family

BACKBONE = "model.pixel_level_module.encoder"
PIXEL_DECODER = "pixel_level_module.decoder"
DECODER = "transformer_module.decoder"
ENCODER_LEVELS = 3  # maps that the pixel decoder's encoder reads, in every published model and in the code
CROSS_FIRST = {"cross_attn": "cross_attn_layer_norm", "attn": "self_attn_layer_norm"}


class Mask2Former(DetectionTarget):
    """A transformers Mask2FormerForUniversalSegmentation. Its output is Predictions with masks."""

    @cached_property
    def _levels(self) -> tuple[Level, ...]:
        """The backbone's maps, from fine to coarse; strides are measured on a blank image."""
        backbone = self.model.get_submodule(BACKBONE)
        blank = torch.zeros(1, len(self.preprocessing.mean), PROBE, PROBE, device=self.device)
        with torch.no_grad():
            maps = backbone(blank).feature_maps
        strides = [(PROBE // each.shape[2], PROBE // each.shape[3]) for each in maps]
        stages = self._swin_stages(len(maps))
        if stages is not None:
            return tuple(Level(stride, place, True) for stride, place in zip(strides, stages, strict=True))
        return tuple(
            Level(stride, Place(BACKBONE, element=("feature_maps", number)), number == len(maps) - 1)
            for number, stride in enumerate(strides)
        )

    def _swin_stages(self, count: int) -> list[Place] | None:
        """Where a Swin backbone's stages end, before the norm of each map and before the patches are merged."""
        stages = getattr(
            getattr(getattr(self.model.get_submodule(BACKBONE), "swin", None), "encoder", None), "layers", []
        )
        if len(stages) != count:
            return None
        return [
            Place(f"{BACKBONE}.swin.encoder.layers.{number}.blocks.{len(stage.blocks) - 1}", element=(0,))
            for number, stage in enumerate(stages)
        ]

    @property
    def _encoder_levels(self) -> tuple[int, ...]:
        """The coarsest first, as the model orders them."""
        return tuple(range(len(self._levels)))[: -ENCODER_LEVELS - 1 : -1]

    @property
    def _beside_encoder(self) -> Mapping[str, Place]:
        """Maps that go around the encoder, to the features of the masks."""
        count = int(self.model.model.pixel_level_module.decoder.num_fpn_levels)
        return {f"backbone.{level}": self._levels[level].place for level in range(count)}

    def _backbone_spots(self) -> dict[str, Spot]:
        spots = super()._backbone_spots()
        if self._swin_stages(len(self._levels)) is None:
            return spots
        return {tap: replace(spot, kind="tokens") for tap, spot in spots.items()}

    def _spots(self) -> dict[str, Spot]:
        config = self.model.config
        on_maps: dict[str, Any] = {"levels": self._encoder_levels, "beside": self._beside_encoder, "positioned": True}
        entering = Place(f"model.{PIXEL_DECODER}.encoder", side="input")
        encoder = layer_spots(
            f"{PIXEL_DECODER}.encoder",
            config.encoder_layers,
            {"attn": "self_attn_layer_norm"},
            "tokens",
            "encoder",
            (0,),
            **on_maps,
        )
        layers = len(self.model.get_submodule(f"model.{DECODER}").layers)
        decoder = layer_spots(DECODER, layers, {} if config.pre_norm else CROSS_FIRST, "queries", "decoder", (0,))
        last = Place(f"model.{DECODER}.layernorm", call=layers)
        return {
            **self._backbone_spots(),
            "projection": Spot("tokens", "projection", (entering,), **on_maps),
            **{tap.removeprefix("pixel_level_module.decoder."): spot for tap, spot in encoder.items()},
            **{tap.removeprefix("transformer_module."): spot for tap, spot in decoder.items()},
            "decoder.layernorm": Spot("queries", "norm", (last,)),
        }

    @property
    def _memory(self) -> Spot:
        leaving = Place(f"model.{PIXEL_DECODER}.encoder", element=("last_hidden_state",))
        return Spot("tokens", "encoder", (leaving,), self._encoder_levels, beside=self._beside_encoder, positioned=True)

    def _codes(self) -> dict[int, Place]:
        module = f"model.{PIXEL_DECODER}.position_embedding"
        return {level: Place(module, call=call) for call, level in enumerate(self._encoder_levels)}

    def _code(self, level: int, code: Tensor) -> Tensor:
        embedding = self.model.model.pixel_level_module.decoder.level_embed
        return flat(code) + embedding[self._encoder_levels.index(level)]

    def stage(self, tap: str, previous: str) -> Stage:
        """As of a detector; one number of heads serves encoder and decoder."""
        self._refuse_order(tap, previous)
        order, config = self.available_taps, self.model.config
        steps = order[0 if previous == PIXELS else order.index(previous) + 1 : order.index(tap) + 1]
        spots = [self.spots[step] for step in steps if step != PREDICTIONS]
        depth = math.ceil(sum((spot.share for spot in spots), Fraction(0)))
        parts = {spot.part for spot in spots}
        heads = int(config.num_attention_heads)
        encoder, decoder = (heads, int(config.encoder_feedforward_dim)), (heads, int(config.dim_feedforward))
        if tap == PREDICTIONS or self.spots[tap].kind == "queries":
            if previous == PIXELS or self.spots[previous].kind != "queries" or "decoder" in parts:
                return Stage("decoder", depth, *decoder)
            return (
                Stage("heads", 0, heads, int(config.hidden_dim)) if tap == PREDICTIONS else Stage("norm", 0, *decoder)
            )
        if previous == PIXELS or parts == {"backbone"}:
            return Stage("backbone", depth, *encoder)
        return Stage("encoder" if depth else "projection", depth, *encoder)

    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        batch_first = {
            key: value.transpose(0, 1) if key.startswith(f"model.{DECODER}.") else value for key, value in seen.items()
        }
        return super()._canonical(taps, batch_first, output, images, None)

    def _forward(self, images: Tensor, padding: Tensor | None) -> Predictions:
        if padding is not None and bool(padding.any()):
            raise BacksightError(
                f"{self.name} takes a mask of padded pixels and does not read it, so padding would count as picture: "
                "crop or stretch the images instead of padding them."
            )
        output = self.model(pixel_values=images)
        masks = output.masks_queries_logits
        return Predictions(output.class_queries_logits, soft_boxes(masks), "softmax", masks)

    def _rest(self, tap: str, representation: Any) -> Predictions:
        if tap == PREDICTIONS or self.spots[tap].kind != "queries":
            return super()._rest(tap, representation)
        queries = self._expect(tap, representation, Queries)
        if queries.context is None:
            raise BacksightError(
                f"The rest of {self.name} behind {tap} reads the encoder's output, but these queries carry no "
                "context: pass queries from record(), or give them one with dataclasses.replace."
            )
        size, _ = self._frame(tap, self._memory, queries.context)
        values = dict(self._put(tap, self._memory, queries.context))
        values[self.spots[tap].places[0]] = queries.values.transpose(0, 1)
        blank = queries.values.new_zeros(queries.batch, len(self.preprocessing.mean), *size)
        with playing(self.model, values):
            return self._forward(blank, None)


def soft_boxes(masks: Tensor) -> Tensor:
    """Boxes of masks, from all their pixels weighted by their probability: differentiable, and never empty.

    masks: (B, Q, h, w) logits. Returns (B, Q, 4): centre x, centre y, width, height in [0, 1] of the image. The
    centre is the mean place; a side is sqrt(12) standard deviations, which for a rectangle (1 inside, 0 outside) is
    exactly its side; an object that fills its own box less evenly, or a mask that is unsure everywhere, gives a side
    that is off, at most 1.
    """
    weights = masks.sigmoid()
    total = weights.sum(dim=(2, 3)).clamp(min=torch.finfo(masks.dtype).tiny)
    centres, sides = [], []
    for along, other in ((3, 2), (2, 3)):
        count = masks.shape[along]
        places = (torch.arange(count, device=masks.device, dtype=masks.dtype) + 0.5) / count
        profile = weights.sum(dim=other) / total[..., None]
        centre = (profile * places).sum(dim=-1)
        within = 1 / (12 * count**2)  # the variance of places inside one pixel
        variance = (profile * (places - centre[..., None]) ** 2).sum(dim=-1) + within
        centres.append(centre)
        sides.append((12 * variance).sqrt().clamp(max=1))
    return torch.stack([*centres, *sides], dim=-1)


def _swin(embed: int, depths: Sequence[int], heads: Sequence[int], window: int) -> dict[str, Any]:
    return {
        "model_type": "swin",
        "embed_dim": embed,
        "depths": list(depths),
        "num_heads": list(heads),
        "window_size": window,
        "out_features": [f"stage{number + 1}" for number in range(len(depths))],
    }


ARCHITECTURE = Architecture(
    "mask2former",
    "Mask2FormerConfig",
    "Mask2FormerForUniversalSegmentation",
    Mask2Former,
    heads=("class_predictor.weight",),
    spare=1,
)


FAMILY = family("transformers Mask2Former", [ARCHITECTURE])
