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

from typing import Any

from backsight.targets.detection import DetectionTarget, Spot, layer_spots
from backsight.targets.hooks import Place
from backsight.targets.hugging_face import Architecture, family

ATTENTION = {"attn": "self_attn_layer_norm"}
CROSS_ATTENTION = {"attn": "self_attn", "cross_attn": "cross_attn"}


class DabDetr(DetectionTarget):
    """A transformers DabDetrForObjectDetection."""

    maps_at = (0,)  # the backbone returns (maps with masks, positional codes)

    @property
    def _read_levels(self) -> tuple[int, ...]:
        return (len(self._levels) - 1,)

    def _spots(self) -> dict[str, Spot]:
        config, levels = self.model.config, self._read_levels
        coded: dict[str, Any] = {"levels": levels, "positioned": True}
        spots = {
            **self._backbone_spots(),
            "projection": Spot("tokens", "projection", (Place("model.encoder", side="input"),), **coded),
            **layer_spots("encoder", config.encoder_layers, ATTENTION, "tokens", "encoder", element=(0,), **coded),
        }
        if config.normalize_before:
            spots["encoder.norm"] = Spot("tokens", "norm", (Place("model.encoder.norm"),), **coded)
        feeding = Place("model.decoder.layernorm", call=config.decoder_layers - 1)
        return {
            **spots,
            **layer_spots("decoder", config.decoder_layers, CROSS_ATTENTION, "queries", "decoder", element=(0,)),
            "decoder.layernorm": Spot("queries", "norm", (feeding,)),
        }

    @property
    def _memory(self) -> Spot:
        leaving = Place("model.encoder", element=("last_hidden_state",))
        return Spot("tokens", "encoder", (leaving,), self._read_levels, positioned=True)

    def _codes(self) -> dict[int, Place]:
        return {level: Place("model.backbone", element=(1, level)) for level in self._read_levels}


ARCHITECTURE = Architecture(
    "dab-detr",
    "DabDetrConfig",
    "DabDetrForObjectDetection",
    DabDetr,
    heads=("class_embed.weight",),
    out_indices=lambda _: [1, 2, 3, 4],
)


FAMILY = family("transformers DAB-DETR", [ARCHITECTURE])
