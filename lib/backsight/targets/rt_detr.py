"""RT-DETR and RT-DETRv2 of transformers: RTDetrForObjectDetection and RTDetrV2ForObjectDetection.

    pixels ─► backbone.i ─► projection ─► encoder.aifi.k.layers.i ─► encoder.fpn_blocks ─► encoder.pan_blocks
              (maps)        (all levels)  (one level, attention)     (all levels, top-down) (all, bottom-up)
                 ─► decoder_input_proj ─► decoder.layers.i ─► predictions
                    (what the decoder reads) (Queries)

Facts of transformers 5.23 that the taps stand on: attention works on chosen levels only (`encode_proj_layers`), the
others go around it; behind the top-down pyramid the levels are the outputs of the lateral convolutions and, at the
finest, of the last block; queries and first boxes are chosen from the tokens of `decoder_input_proj`, and boxes are
refined from layer to layer: `from_tap` computes them again. The model takes a pixel mask and ignores it: padded tokens
are marked, and take part.
"""

from __future__ import annotations

from fractions import Fraction

from backsight.representation import Grid
from backsight.targets.base import Size
from backsight.targets.detection import ATTENTION, DetectionTarget, Spot, halved
from backsight.targets.hooks import Place


class RtDetr(DetectionTarget):
    """A transformers RTDetrForObjectDetection or RTDetrV2ForObjectDetection."""

    @property
    def least_tokens(self) -> int:  # type: ignore[override]
        return int(self.model.config.num_queries)

    def _grids(self, size: Size) -> tuple[Grid, ...]:
        """All further levels are made of the encoder's coarsest map, none of another."""
        grids = super()._grids(size)[: len(self._levels)]
        return (*grids, *[halved(grids[-1])] * self._further_levels)

    def _encoder_spots(self) -> dict[str, Spot]:
        config, levels = self.model.config, tuple(range(len(self._levels)))
        entering = tuple(Place("model.encoder", element=(level,), side="input") for level in levels)
        spots = {"projection": Spot("maps", "projection", entering, levels)}
        streams = {f"projection.{level}": place for level, place in zip(levels, entering, strict=True)}
        for number, level in enumerate(config.encode_proj_layers if config.encoder_layers else ()):
            name = f"encoder.aifi.{number}"
            beside = {stream: place for stream, place in streams.items() if stream != f"projection.{level}"}
            code = Place(f"model.{name}.layers.0", element=(self.code,), side="input")
            attended = Spot("tokens", "encoder", levels=(level,), beside=beside, code=code)
            steps = {} if config.normalize_before else ATTENTION
            spots |= self._layer_spots(name, f"model.{name}", steps, attended)
            streams[f"projection.{level}"] = Place(f"model.{name}")
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
