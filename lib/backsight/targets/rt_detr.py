"""RT-DETR and RT-DETRv2 of transformers: RTDetrForObjectDetection and RTDetrV2ForObjectDetection.

    pixels ─► backbone.i ─► projection ─► encoder.aifi.k.layers.i ─► encoder.fpn_blocks ─► encoder.pan_blocks
              (maps)        (all levels)  (one level, attention)     (all levels, top-down) (all, bottom-up)
                 ─► decoder_input_proj ─► decoder.layers.i ─► predictions
                    (what the decoder reads) (Queries)

Facts of transformers 5.23 that the taps stand on: attention works on chosen levels only (`encode_proj_layers`), the
others go around it and travel in `Tokens.context`; behind the top-down pyramid the levels are the outputs of the
lateral convolutions and, at the finest, of the last block; queries and first boxes are chosen from the tokens of
`decoder_input_proj`, whose best are as many as `num_queries`, and boxes are refined from layer to layer: `from_tap`
computes them again. The model takes a pixel mask and ignores it: padded tokens are marked, and take part. Classes
are judged one by one (sigmoid), unless `use_focal_loss` is off.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from backsight.errors import BacksightError
from backsight.representation import Grid
from backsight.targets.base import Size
from backsight.targets.detection import DetectionTarget, Spot, halved, layer_spots
from backsight.targets.hooks import Place
from backsight.targets.hugging_face import Architecture, family

ATTENTION = {"attn": "self_attn_layer_norm"}
CROSS_ATTENTION = {"attn": "self_attn_layer_norm", "cross_attn": "encoder_attn_layer_norm"}
COCO_CLASSES = 80
PROCESSOR = {"size": {"height": 640, "width": 640}, "do_normalize": False}


class RtDetr(DetectionTarget):
    """A transformers RTDetrForObjectDetection or RTDetrV2ForObjectDetection."""

    @property
    def _activation(self) -> Literal["softmax", "sigmoid"]:
        return "sigmoid" if self.model.config.use_focal_loss else "softmax"

    @property
    def _further_levels(self) -> int:
        return max(0, int(self.model.config.num_feature_levels) - len(self._levels))

    def _grids(self, size: Size) -> tuple[Grid, ...]:
        grids = [(size[0] // level.stride[0], size[1] // level.stride[1]) for level in self._levels]
        # All further levels are made of the encoder's coarsest map, none of another.
        return (*grids, *[halved(grids[-1])] * self._further_levels)

    def check_size(self, size: Size) -> None:
        super().check_size(size)
        anchored = self.model.config.anchor_image_size
        if anchored is not None and tuple(size) != tuple(anchored):
            raise BacksightError(
                f"{self.name} has anchors for images of exactly {tuple(anchored)} (height, width), not {tuple(size)}."
            )

    @property
    def _least_tokens(self) -> int:
        return int(self.model.config.num_queries)

    def _spots(self) -> dict[str, Spot]:
        config, levels = self.model.config, self._read_levels
        entering = tuple(Place("model.encoder", element=(level,), side="input") for level in levels)
        spots = {**self._backbone_spots(), "projection": Spot("maps", "projection", entering, levels)}
        streams = {f"projection.{level}": place for level, place in zip(levels, entering, strict=True)}
        for number, level in enumerate(config.encode_proj_layers if config.encoder_layers else ()):
            name = f"projection.{level}"
            spots |= layer_spots(
                f"encoder.aifi.{number}",
                config.encoder_layers,
                {} if config.normalize_before else ATTENTION,
                "tokens",
                "encoder",
                levels=(level,),
                positioned=True,
                beside={each: place for each, place in streams.items() if each != name},
            )
            streams[name] = Place(f"model.encoder.aifi.{number}")
        if top := len(levels) - 1:
            finest = Place(f"model.encoder.fpn_blocks.{top - 1}")
            down = (finest, *(Place(f"model.encoder.lateral_convs.{top - level}") for level in levels[1:]))
            up = (finest, *(Place(f"model.encoder.pan_blocks.{level - 1}") for level in levels[1:]))
            spots["encoder.fpn_blocks"] = Spot("maps", "convolution", down, levels, Fraction(top))
            spots["encoder.pan_blocks"] = Spot("maps", "convolution", up, levels, Fraction(top))
        spots["decoder_input_proj"] = self._memory
        return {**spots, **layer_spots("decoder", config.decoder_layers, CROSS_ATTENTION, "queries", "decoder")}

    @property
    def _memory(self) -> Spot:
        levels = tuple(range(len(self._levels) + self._further_levels))
        places = tuple(Place(f"model.decoder_input_proj.{level}") for level in levels)
        return Spot("maps", "projection", places, levels)

    def _codes(self) -> dict[int, Place]:
        config = self.model.config
        if config.eval_size is not None:
            return {}
        return {
            level: Place(f"model.encoder.aifi.{number}.position_embedding")
            for number, level in enumerate(config.encode_proj_layers)
        }


FIRST = Architecture(
    "rt_detr",
    "RTDetrConfig",
    "RTDetrForObjectDetection",
    RtDetr,
    heads=("model.enc_score_head.weight",),
    processor=PROCESSOR,
)
SECOND = Architecture(
    "rt_detr_v2",
    "RTDetrV2Config",
    "RTDetrV2ForObjectDetection",
    RtDetr,
    heads=("model.enc_score_head.weight",),
    processor=PROCESSOR,
)


FAMILY = family("transformers RT-DETR", [FIRST, SECOND])
