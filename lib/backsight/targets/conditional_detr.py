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
from backsight.targets.hugging_face import Architecture, family


class ConditionalDetr(Detr):
    """A transformers ConditionalDetrForObjectDetection."""

    _backbone_spots = DetectionTarget._backbone_spots

    @property
    def _activation(self) -> Literal["softmax", "sigmoid"]:
        return "sigmoid"


ARCHITECTURE = Architecture(
    "conditional_detr",
    "ConditionalDetrConfig",
    "ConditionalDetrForObjectDetection",
    ConditionalDetr,
    heads=("class_labels_classifier.weight",),
    out_indices=lambda _: [1, 2, 3, 4],
)


FAMILY = family("transformers Conditional DETR", [ARCHITECTURE])
