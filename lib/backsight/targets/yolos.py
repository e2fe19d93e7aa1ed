"""YOLOS of transformers: YolosForObjectDetection, a plain ViT whose detection tokens are read as objects.

    pixels ─► embeddings ─► encoder.layer.i.attn ─► encoder.layer.i ─► … ─► layernorm ─► predictions
              (Tokens: class token and detection tokens as prefix, then the patches)     (Predictions)

Facts of transformers 5.23 that the taps stand on: the model orders its tokens class, patches, detection, and the
adapter puts the detection tokens before the patches; position embeddings are interpolated to the image's grid, also
those that are added between the layers (`use_mid_position_embeddings`), and a layer's tap is its own output, before
they are added; layers are pre-norm, so a half-step is what the second norm is given, and the layer adds its MLP to the
same tensor. The model has no mask, so that padded pixels would count as picture.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from backsight.targets.detection import PREDICTIONS, DetectionTarget, Level, Spot
from backsight.targets.hooks import Place


class Yolos(DetectionTarget):
    """A transformers YolosForObjectDetection. Its output is Predictions, the last class "no object"."""

    masked = False
    first_stage = "patch_embedding"

    @property
    def prefix(self) -> int:  # type: ignore[override]
        return 1 + int(self.model.config.num_detection_tokens)

    @cached_property
    def _levels(self) -> tuple[Level, ...]:
        side = int(self.model.config.patch_size)
        return (Level((side, side), Place("vit.embeddings"), True),)

    @cached_property
    def spots(self) -> dict[str, Spot]:
        def spot(part: str, place: Place, share: Fraction = Fraction(0)) -> Spot:
            return Spot("tokens", part, (place,), (0,), share, fine=place.side == "stream")

        spots = {"embeddings": spot("projection", Place("vit.embeddings"))}
        for layer in (f"encoder.layer.{index}" for index in range(self.model.config.num_hidden_layers)):
            half = Place(f"vit.{layer}.layernorm_after", side="stream")
            spots[f"{layer}.attn"] = spot("blocks", half, Fraction(1, 2))
            spots[layer] = spot("blocks", Place(f"vit.{layer}"), Fraction(1, 2))
        spots["layernorm"] = spot("norm", Place("vit.layernorm"))
        return {**spots, PREDICTIONS: Spot("predictions", "decoder")}

    def tap_set(self, name: str) -> tuple[str, ...]:
        taps = super().tap_set(name if name == "fine" else "blocks")
        return (taps[0], taps[-3], PREDICTIONS) if name == "components" else taps

    @property
    def _widths(self) -> tuple[tuple[int, int], tuple[int, int]]:
        sizes = (int(self.model.config.num_attention_heads), int(self.model.config.intermediate_size))
        return sizes, sizes

    def _ordered(self, kind: str, values: Tensor, back: bool = False) -> Tensor:
        first = values.shape[1] - self.prefix if not back else self.prefix - 1  # tokens behind the class token
        return torch.cat([values[:, :1], values[:, 1 + first :], values[:, 1 : 1 + first]], dim=1)
