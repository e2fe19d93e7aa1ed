"""Conditional DETR of transformers: ConditionalDetrForObjectDetection, any backbone.

    pixels ─► backbone.i ─► projection ─► encoder.layers.i ─► decoder.layers.i ─► decoder.layernorm ─► predictions
              (the last map counts)  (Tokens with code)        (Queries)           (Queries)

As of DETR, whose facts hold here too. Reference points come from the learned queries alone, so what follows
`decoder.layernorm` needs nothing of the image beside it. Classes are judged one by one (sigmoid focal loss).
"""

from __future__ import annotations

from typing import Literal

from backsight.targets.detection import DetectionTarget
from backsight.targets.detr import Detr


class ConditionalDetr(Detr):
    """A transformers ConditionalDetrForObjectDetection."""

    _backbone_spots = DetectionTarget._backbone_spots

    @property
    def _activation(self) -> Literal["softmax", "sigmoid"]:
        return "sigmoid"
