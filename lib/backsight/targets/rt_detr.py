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
from backsight.targets.detection import ATTENTION, DetectionTarget, Spot, halved
from backsight.targets.hooks import Place


class RtDetr(DetectionTarget):
    """A transformers RTDetrForObjectDetection or RTDetrV2ForObjectDetection."""

    @property
    def _activation(self) -> Literal["softmax", "sigmoid"]:
        return "sigmoid" if self.model.config.use_focal_loss else "softmax"

    def _grids(self, size: Size) -> tuple[Grid, ...]:
        grids = super()._grids(size)[: len(self._levels)]
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

    def _encoder_spots(self) -> dict[str, Spot]:
        config, levels = self.model.config, tuple(range(len(self._levels)))
        entering = tuple(Place("model.encoder", element=(level,), side="input") for level in levels)
        spots = {"projection": Spot("maps", "projection", entering, levels)}
        streams = {f"projection.{level}": place for level, place in zip(levels, entering, strict=True)}
        for number, level in enumerate(config.encode_proj_layers if config.encoder_layers else ()):
            beside = {name: place for name, place in streams.items() if name != f"projection.{level}"}
            attended = Spot("tokens", "encoder", levels=(level,), beside=beside, coded=True)
            steps = {} if config.normalize_before else ATTENTION
            name = f"encoder.aifi.{number}"
            spots |= self._layer_spots(name, f"model.{name}", steps, attended)
            streams[f"projection.{level}"] = Place(f"model.encoder.aifi.{number}")
        if top := levels[-1]:
            finest = Place(f"model.encoder.fpn_blocks.{top - 1}")
            down = (finest, *(Place(f"model.encoder.lateral_convs.{top - level}") for level in levels[1:]))
            up = (finest, *(Place(f"model.encoder.pan_blocks.{level - 1}") for level in levels[1:]))
            spots["encoder.fpn_blocks"] = Spot("maps", "convolution", down, levels, Fraction(top))
            spots["encoder.pan_blocks"] = Spot("maps", "convolution", up, levels, Fraction(top))
        return {**spots, "decoder_input_proj": self._memory}

    @property
    def _memory(self) -> Spot:
        places = tuple(Place(f"model.decoder_input_proj.{level}") for level in self._encoder_levels)
        return Spot("maps", "projection", places, self._encoder_levels)

    def _codes(self) -> dict[int, Place]:
        config = self.model.config
        attended = enumerate(config.encode_proj_layers if config.eval_size is None else ())
        return {level: Place(f"model.encoder.aifi.{number}.position_embedding") for number, level in attended}
