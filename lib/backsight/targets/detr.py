"""DETR of transformers: DetrForObjectDetection, any backbone.

    pixels ─► backbone ─► projection ─► encoder.layers.i ─► decoder.layers.i ─► decoder.layernorm ─► predictions
              (Tokens, channels of      (Tokens with        (Queries)           (Queries)            (Predictions)
               the last stage)           positional code)

Facts of transformers 5.23 that the taps stand on: layers are post-norm, so the norm that ends a half-step returns the
stream; `decoder.layers.i` is the layer's own output, before the final `decoder.layernorm`; with `auxiliary_loss=True`
that norm runs behind every layer, the next one reads the *normalised* stream, and it runs once more at the end; the
first self-attention sees zeros, so `decoder.layers.0.attn` is the same for every image. `backbone` is the map that DETR
reads; finer ones are `backbone.0`, …, where the backbone gives them, in "fine" only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from backsight.targets.detection import DetectionTarget, Spot


class Detr(DetectionTarget):
    """A transformers DetrForObjectDetection."""

    one_level = True
    heads_alone = True

    @property
    def _activation(self) -> Literal["softmax", "sigmoid"]:
        return "softmax"

    def _backbone_spots(self) -> dict[str, Spot]:
        *finer, (_, last) = super()._backbone_spots().items()
        return {**{tap: replace(spot, fine=True) for tap, spot in finer}, "backbone": last}

    def _final_norm(self, layers: int) -> int:
        return layers if self.model.config.auxiliary_loss else 0
