"""DETR and its descendants Conditional DETR, DAB-DETR and Deformable DETR, of transformers, with any backbone.

    pixels ─► backbone.i ─► projection ─► encoder.layers.i ─► decoder.layers.i ─► decoder.layernorm ─► predictions
              (maps)        (Tokens with positional code)     (Queries)           (Queries)

Facts of transformers 5.23 that the taps stand on: layers are post-norm, so the norm that ends a half-step returns the
stream; `decoder.layers.i` is the layer's own output, before the final `decoder.layernorm`; the first self-attention of
DETR sees zeros, so its `decoder.layers.0.attn` is the same for every image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from backsight.targets.detection import DetectionTarget, Spot
from backsight.targets.hooks import Place


class ConditionalDetr(DetectionTarget):
    """A ConditionalDetrForObjectDetection. Reference points come from the learned queries alone.

    With `auxiliary_loss` the final norm runs behind every layer, the next one reads the *normalised* stream, and it
    runs once more at the end.
    """

    one_level = True
    heads_alone = True

    def _final_norm(self, layers: int) -> int:
        return layers if self.model.config.auxiliary_loss else 0


class Detr(ConditionalDetr):
    """A DetrForObjectDetection. `backbone` is the map that it reads; finer ones are `backbone.0`, … in "fine" only."""

    def _backbone_spots(self) -> dict[str, Spot]:
        *finer, (_, last) = super()._backbone_spots().items()
        return {**{tap: replace(spot, fine=True) for tap, spot in finer}, "backbone": last}


class DabDetr(DetectionTarget):
    """A DabDetrForObjectDetection. Its layers return tuples with the stream first.

    Boxes are refined from layer to layer, so even behind `decoder.layernorm` the model reads those of earlier layers,
    which `from_tap` computes again from the encoder's output; the norm runs behind every layer, and the last of these
    calls, not the one after it, feeds the heads. Each encoder layer scales the positional code by what the tokens hold.
    """

    backbone, code = "model.backbone.conv_encoder.model", "object_queries"
    one_level = True
    layers_return = (0,)

    def _encoder_spots(self) -> dict[str, Spot]:
        spots = super()._encoder_spots()
        if self.model.config.normalize_before:
            spots["encoder.norm"] = replace(self._encoded(Place("model.encoder.norm")), part="norm")
        return spots

    @property
    def _decoder_steps(self) -> Mapping[str, str]:
        return {"attn": "self_attn", "cross_attn": "cross_attn"}

    def _final_norm(self, layers: int) -> int:
        return layers - 1


class DeformableDetr(DetectionTarget):
    """A DeformableDetrForObjectDetection, with box refinement and two stages too.

    The encoder's tokens are those of all levels, the finest first; levels beyond the backbone's are made in the
    projection, by convolutions of stride 2. There is no norm behind the decoder. Reference points of a layer come from
    those before it, the first ones and the queries of two stages from the encoder's output: `from_tap` computes them.
    """

    @property
    def least_tokens(self) -> int:  # type: ignore[override]
        config = self.model.config
        return int(config.two_stage_num_proposals) if config.two_stage else 0
