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
from backsight.representation import Grid, Predictions, Representation, Tokens
from backsight.targets.base import PIXELS, Size, Stage
from backsight.targets.hooks import Place, playing
from backsight.targets.hugging_face import Architecture, TransformersTarget, family

EMBEDDINGS, NORM, PREDICTIONS = "embeddings", "layernorm", "predictions"


class Yolos(TransformersTarget):
    """A transformers YolosForObjectDetection. Its output is Predictions, the last class "no object"."""

    kind = "detector"

    @property
    def available_taps(self) -> tuple[str, ...]:
        return self._taps_with(halves=True)

    def _taps_with(self, halves: bool) -> tuple[str, ...]:
        layers = range(self.model.config.num_hidden_layers)
        steps = (".attn", "") if halves else ("",)
        return (EMBEDDINGS, *(f"encoder.layer.{i}{step}" for i in layers for step in steps), NORM, PREDICTIONS)

    def tap_set(self, name: str) -> tuple[str, ...]:
        if name == "components":
            return (EMBEDDINGS, f"encoder.layer.{self.model.config.num_hidden_layers - 1}", PREDICTIONS)
        return self._taps_with(halves=name == "fine")

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
        self._refuse_order(tap, previous)
        order = self.available_taps
        steps = order[0 if previous == PIXELS else order.index(previous) + 1 : order.index(tap) + 1]
        depth = math.ceil(sum(step.startswith("encoder.") for step in steps) / 2)
        config = self.model.config
        sizes = (int(config.num_attention_heads), int(config.intermediate_size))
        if tap == PREDICTIONS:
            return Stage("decoder", depth, *sizes)
        if previous == PIXELS:
            return Stage("patch_embedding", depth, *sizes)
        return Stage("blocks" if depth else "norm", depth, *sizes)

    def _places(self, taps: Sequence[str]) -> dict[str, Place]:
        return {tap: self._place(tap) for tap in taps if tap != PREDICTIONS}

    def _place(self, tap: str) -> Place:
        if tap.endswith(".attn"):
            return Place(f"vit.{tap.removesuffix('.attn')}.layernorm_after", side="input")
        return Place(f"vit.{tap}")

    def _layer(self, tap: str) -> Any:
        return self.model.vit.encoder.layer[int(tap.split(".")[2])]

    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        side = self.reduction[0]
        grid = (images.shape[2] // side, images.shape[3] // side)
        return {tap: output if tap == PREDICTIONS else self._tokens(seen[tap], grid) for tap in taps}

    @property
    def _prefix(self) -> int:
        return 1 + int(self.model.config.num_detection_tokens)

    def _tokens(self, values: Tensor, grid: Grid) -> Tokens:
        """values: (B, 1 + N + D, C) as the model orders them."""
        count = grid[0] * grid[1]
        parts = (values[:, :1], values[:, 1 + count :], values[:, 1 : 1 + count])
        return Tokens(torch.cat(parts, dim=1), (grid,), self._prefix)

    def _forward(self, images: Tensor, padding: Tensor | None) -> Predictions:
        if padding is not None and bool(padding.any()):
            raise BacksightError(
                f"{self.name} has no attention mask, so padded pixels would count as picture: "
                "crop or stretch the images instead of padding them."
            )
        output = self.model(pixel_values=images)
        return Predictions(output.logits, output.pred_boxes)

    def _rest(self, tap: str, representation: Any) -> Predictions:
        if tap == PREDICTIONS:
            if not isinstance(representation, Predictions):
                raise BacksightError(self._misfit(tap, "predictions", representation))
            return representation
        width = int(self.model.config.hidden_size)
        if (
            not isinstance(representation, Tokens)
            or (representation.channels, representation.prefix) != (width, self._prefix)
            or len(representation.grids) != 1
        ):
            expected = f"tokens of {width} channels on one grid behind {self._prefix} prefix tokens"
            raise BacksightError(self._misfit(tap, expected, representation))
        values = torch.cat(
            [representation.values[:, :1], representation.patches, representation.values[:, 1 : self._prefix]], dim=1
        )
        if tap.endswith(".attn"):  # the layer adds the stream itself to what its MLP makes of it
            layer = self._layer(tap)
            values = layer.output(layer.intermediate(layer.layernorm_after(values)), values)
        height, width = (cells * self.reduction[0] for cells in representation.grids[0])
        blank = values.new_zeros(representation.batch, len(self.preprocessing.mean), height, width)
        with playing(self.model, {Place(f"vit.{tap.removesuffix('.attn')}"): values}):
            return self._forward(blank, None)

    def _misfit(self, tap: str, expected: str, representation: Any) -> str:
        given = getattr(representation, "signature", type(representation).__name__)
        return f"{tap} of {self.name} holds {expected}, not a representation {given}."


ARCHITECTURE = Architecture(
    "yolos",
    "YolosConfig",
    "YolosForObjectDetection",
    Yolos,
    heads=("class_labels_classifier.layers.2.weight",),
    spare=1,
)


FAMILY = family("transformers YOLOS", [ARCHITECTURE])
