"""DAB-DETR of transformers: DabDetrForObjectDetection, any backbone.

    pixels ─► backbone.i ─► projection ─► encoder.layers.i ─► decoder.layers.i ─► decoder.layernorm ─► predictions
              (the last map counts)  (Tokens with code)        (Queries)           (Queries)

Facts of transformers 5.23 that the taps stand on: layers return tuples with the stream first and are post-norm; the
encoder has a final `norm` only with `normalize_before`; boxes are refined from layer to layer, so even behind
`decoder.layernorm` the model reads the boxes of earlier layers, which `from_tap` computes again from the encoder's
output; the norm runs behind every layer, and the last of these calls, not the one after it, feeds the heads. The
positional code is scaled in each encoder layer by what the tokens hold. Classes are judged one by one (sigmoid focal
loss).
"""

from __future__ import annotations

from dataclasses import replace

from backsight.targets.detection import DetectionTarget, Spot
from backsight.targets.hooks import Element, Place


class DabDetr(DetectionTarget):
    """A transformers DabDetrForObjectDetection."""

    one_level = True
    layers_return = (0,)

    def _map_at(self, number: int) -> Element:
        return 0, number, 0  # the backbone returns (maps with masks, positional codes)

    def _codes(self) -> dict[int, Place]:
        return {level: Place(self.backbone, element=(1, level)) for level in self._encoder_levels}

    def _encoder_spots(self) -> dict[str, Spot]:
        spots = super()._encoder_spots()
        if self.model.config.normalize_before:
            spots["encoder.norm"] = replace(self._encoded(Place("model.encoder.norm")), part="norm")
        return spots

    @property
    def _decoder_steps(self) -> dict[str, str]:
        return {"attn": "self_attn", "cross_attn": "cross_attn"}

    def _final_norm(self, layers: int) -> int:
        return layers - 1
