"""YOLOS of transformers: YolosForObjectDetection, a plain ViT whose detection tokens are read as objects.

    pixels ─► embeddings ─► encoder.layer.i.attn ─► encoder.layer.i ─► … ─► layernorm ─► predictions
              (Tokens: class token and detection tokens as prefix, then the patches)     (Predictions)

Facts of transformers 5.23 that the taps stand on: the model orders its tokens class, patches, detection, and the
adapter puts the detection tokens before the patches; position embeddings are interpolated to the image's grid, also
those that are added between the layers (`use_mid_position_embeddings`), and a layer's tap is its own output, before
they are added; layers are pre-norm. The model has no mask, so that padded pixels would count as picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.representation import Predictions, Representation, Tokens
from backsight.targets.base import PIXELS, Size, Stage
from backsight.targets.detection import PREDICTIONS, TransformersTarget
from backsight.targets.hooks import Place, playing

EMBEDDINGS, NORM = "embeddings", "layernorm"


class Yolos(TransformersTarget):
    """A transformers YolosForObjectDetection. Its output is Predictions, the last class "no object"."""

    kind = "detector"

    @property
    def available_taps(self) -> tuple[str, ...]:
        return self.tap_set("fine")

    def tap_set(self, name: str) -> tuple[str, ...]:
        layers = [f"encoder.layer.{index}" for index in range(self.model.config.num_hidden_layers)]
        if name == "components":
            return (EMBEDDINGS, layers[-1], PREDICTIONS)
        steps = (".attn", "") if name == "fine" else ("",)
        return (EMBEDDINGS, *(f"{layer}{step}" for layer in layers for step in steps), NORM, PREDICTIONS)

    @property
    def reduction(self) -> Size:
        side = int(self.model.config.patch_size)
        return side, side

    def check_size(self, size: Size) -> None:
        side = self.reduction[0]
        if min(size) < 1 or size[0] % side or size[1] % side:
            raise BacksightError(
                f"{self.name} takes images whose height and width are multiples of {side}, not {tuple(size)}."
            )

    def stage(self, tap: str, previous: str) -> Stage:
        """What lies between two taps; to predictions from anywhere: decoder."""
        depth = math.ceil(sum(step.startswith("encoder.") for step in self._steps(tap, previous)) / 2)
        config = self.model.config
        sizes = (int(config.num_attention_heads), int(config.intermediate_size))
        if tap == PREDICTIONS:
            return Stage("decoder", depth, *sizes)
        if previous == PIXELS:
            return Stage("patch_embedding", depth, *sizes)
        return Stage("blocks" if depth else "norm", depth, *sizes)

    def _places(self, taps: Sequence[str]) -> dict[str, Place]:
        """A half-step is what the second norm is given; the layer adds its MLP to the same tensor."""
        return {
            tap: Place(f"vit.{tap.removesuffix('.attn')}.layernorm_after", side="stream")
            if tap.endswith(".attn")
            else Place(f"vit.{tap}")
            for tap in taps
            if tap != PREDICTIONS
        }

    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        grid = (images.shape[2] // self.reduction[0], images.shape[3] // self.reduction[1])
        count = 1 + grid[0] * grid[1]

        def tokens(values: Tensor) -> Tokens:
            parts = (values[:, :1], values[:, count:], values[:, 1:count])
            return Tokens(torch.cat(parts, dim=1), (grid,), self._prefix)

        return {tap: output if tap == PREDICTIONS else tokens(seen[tap]) for tap in taps}

    @property
    def _prefix(self) -> int:
        return 1 + int(self.model.config.num_detection_tokens)

    def _forward(self, images: Tensor, padding: Tensor | None) -> Predictions:
        self._refuse_padding(padding)
        output = self.model(pixel_values=images)
        return Predictions(output.logits, output.pred_boxes)

    def _rest(self, tap: str, representation: Any) -> Predictions:
        if tap == PREDICTIONS:
            return self._expect(tap, representation, Predictions)
        tokens = self._expect(tap, representation, Tokens)
        if tokens.prefix != self._prefix or len(tokens.grids) != 1:
            raise BacksightError(
                f"{tap} of {self.name} holds one grid behind {self._prefix} prefix tokens, not {tokens.grids} behind "
                f"{tokens.prefix}."
            )
        values = torch.cat([tokens.values[:, :1], tokens.patches, tokens.values[:, 1 : self._prefix]], dim=1)
        height, width = (cells * side for cells, side in zip(tokens.grids[0], self.reduction, strict=True))
        blank = values.new_zeros(tokens.batch, len(self.preprocessing.mean), height, width)
        with playing(self.model, {self._places([tap])[tap]: values}):
            return self._forward(blank, None)
