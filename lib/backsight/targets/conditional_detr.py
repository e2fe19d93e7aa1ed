"""Conditional DETR of transformers: ConditionalDetrForObjectDetection, any backbone.

    pixels ─► backbone.i ─► projection ─► encoder.layers.i ─► decoder.layers.i ─► decoder.layernorm ─► predictions
              (the last map counts)  (Tokens with code)        (Queries)           (Queries)

Facts of transformers 5.23 that the taps stand on: layers are post-norm, so the norm that ends a half-step returns the
stream; `decoder.layers.i` is the layer's own output, before `decoder.layernorm`, and with `auxiliary_loss=True` the
next layer reads the normalised stream; reference points come from the learned queries alone, so what follows
`decoder.layernorm` needs nothing of the image beside it. Classes are judged one by one (sigmoid focal loss).
"""

from __future__ import annotations

from backsight.targets.detection import DetectionTarget, Spot, layer_spots
from backsight.targets.hooks import Place
from backsight.targets.hugging_face import Architecture, family

ATTENTION = {"attn": "self_attn_layer_norm"}
CROSS_ATTENTION = {"attn": "self_attn_layer_norm", "cross_attn": "encoder_attn_layer_norm"}


class ConditionalDetr(DetectionTarget):
    """A transformers ConditionalDetrForObjectDetection."""

    @property
    def _read_levels(self) -> tuple[int, ...]:
        return (len(self._levels) - 1,)

    def _spots(self) -> dict[str, Spot]:
        config, levels = self.model.config, self._read_levels
        entering = Place("model.encoder", side="input")
        # With auxiliary losses the norm runs behind every layer, and once more at the end.
        final = Place("model.decoder.layernorm", call=config.decoder_layers if config.auxiliary_loss else 0)
        return {
            **self._backbone_spots(),
            "projection": Spot("tokens", "projection", (entering,), levels, positioned=True),
            **layer_spots(
                "encoder", config.encoder_layers, ATTENTION, "tokens", "encoder", levels=levels, positioned=True
            ),
            **layer_spots("decoder", config.decoder_layers, CROSS_ATTENTION, "queries", "decoder"),
            "decoder.layernorm": Spot("queries", "norm", (final,), alone=True),
        }

    @property
    def _memory(self) -> Spot:
        leaving = Place("model.encoder", element=("last_hidden_state",))
        return Spot("tokens", "encoder", (leaving,), self._read_levels, positioned=True)

    def _codes(self) -> dict[int, Place]:
        return {level: Place("model.position_embedding") for level in self._read_levels}


ARCHITECTURE = Architecture(
    "conditional_detr",
    "ConditionalDetrConfig",
    "ConditionalDetrForObjectDetection",
    ConditionalDetr,
    heads=("class_labels_classifier.weight",),
    out_indices=lambda _: [1, 2, 3, 4],
)


FAMILY = family("transformers Conditional DETR", [ARCHITECTURE])
