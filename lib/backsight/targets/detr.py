"""DETR of transformers: DetrForObjectDetection, any backbone.

    pixels ─► backbone ─► projection ─► encoder.layers.i ─► decoder.layers.i ─► decoder.layernorm ─► predictions
              (Tokens, channels of      (Tokens with        (Queries)           (Queries)            (Predictions)
               the last stage)           positional code)

Facts of transformers 5.23 that the taps stand on: `decoder.layers.i` is the layer's own output, before the final
`decoder.layernorm`; with `auxiliary_loss=True` the decoder feeds the *normalised* stream to its next layer, which
`from_tap` follows; the first self-attention sees zeros, so `decoder.layers.0.attn` is the same for every image.
Half-steps (`.attn`, `.cross_attn`) are the stream after their own layer norm, as DETR normalises after each step.
`backbone` is the map that DETR reads; finer ones are `backbone.0`, …, where the backbone gives them, in "fine" only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.representation import Predictions, Queries, Tokens
from backsight.targets.base import Size
from backsight.targets.detection import DetectionTarget, Spot, flat, layer_spots
from backsight.targets.hooks import Place
from backsight.targets.hugging_face import Architecture, family

ATTENTION = {"attn": "self_attn_layer_norm"}
CROSS_ATTENTION = {"attn": "self_attn_layer_norm", "cross_attn": "encoder_attn_layer_norm"}


class Detr(DetectionTarget):
    """A transformers DetrForObjectDetection. `from_tap` runs the layers themselves, which is faster than a replay."""

    @property
    def _activation(self) -> Literal["softmax", "sigmoid"]:
        return "softmax"

    @property
    def _read_levels(self) -> tuple[int, ...]:
        return (len(self._levels) - 1,)

    def _spots(self) -> dict[str, Spot]:
        config, levels = self.model.config, self._read_levels
        coded: dict[str, Any] = {"levels": levels, "positioned": True}
        # With auxiliary losses the norm runs behind every layer, and once more at the end.
        final = Place("model.decoder.layernorm", call=config.decoder_layers if config.auxiliary_loss else 0)
        return {
            **self._backbone_spots(),
            "projection": Spot("maps", "projection", (Place("model.input_projection"),), **coded),
            **layer_spots("encoder", config.encoder_layers, ATTENTION, "tokens", "encoder", **coded),
            **layer_spots("decoder", config.decoder_layers, CROSS_ATTENTION, "queries", "decoder"),
            "decoder.layernorm": Spot("queries", "norm", (final,), alone=True),
        }

    def _backbone_spots(self) -> dict[str, Spot]:
        """The map that DETR reads is `backbone`; finer ones, which only lead to it, count as steps inside."""
        *finer, last = super()._backbone_spots().items()
        return {**{tap: replace(spot, fine=True) for tap, spot in finer}, "backbone": last[1]}

    @property
    def _memory(self) -> Spot:
        leaving = Place("model.encoder", element=("last_hidden_state",))
        return Spot("tokens", "encoder", (leaving,), self._read_levels, positioned=True)

    def _codes(self) -> dict[int, Place]:
        return {level: Place("model.position_embedding") for level in self._read_levels}

    def _position(self, grid: Size, padding: Tensor | None, like: Tensor) -> Tensor:
        """(1 or B, N, d_model) positional code, by the model's own module; one for all images without padding."""
        if padding is None:
            mask = torch.ones((1, *grid), dtype=torch.bool, device=like.device)
        else:
            mask = ~padding.unflatten(1, grid)
        shape = torch.Size([mask.shape[0], self.model.config.d_model, *grid])
        return flat(self.model.model.position_embedding(shape, like.device, like.dtype, mask))

    def _rest(self, tap: str, representation: Any) -> Predictions:
        if tap == "predictions" or tap.startswith("backbone."):
            return super()._rest(tap, representation)
        if tap.startswith("decoder"):
            return self._rest_of_decoder(tap, self._expect(tap, representation, Queries))
        tokens = self._expect(tap, representation, Tokens)
        values = tokens.values
        if tap == "backbone":
            values = flat(self.model.model.input_projection(tokens.map()))
        position = self._position(tokens.grids[0], tokens.padding, values)
        mask = self._attention_mask(self.model.model.encoder.config, values, values, tokens.padding)
        layers = self.model.model.encoder.layers
        following = 0
        if tap.startswith("encoder"):
            _, index, step = _parts(tap)
            following = index + 1
            if step:
                values = _after_attention(layers[index], values)
        for layer in layers[following:]:
            values = layer(values, mask, spatial_position_embeddings=position.expand(tokens.batch, -1, -1))
        memory = Tokens(values, tokens.grids, 0, tokens.padding, position)
        queries = torch.zeros_like(self._query_positions(tokens.batch))
        return self._heads(self._decode(queries, 0, memory))

    def _rest_of_decoder(self, tap: str, queries: Queries) -> Predictions:
        if tap == "decoder.layernorm":
            return self._heads(queries.values)
        if queries.context is None:
            raise BacksightError(
                f"The rest of {self.name} behind {tap} reads the encoder's output, but these queries carry no "
                "context: pass queries from record(), or give them one with dataclasses.replace."
            )
        _, index, step = _parts(tap)
        layer, values, memory = self.model.model.decoder.layers[index], queries.values, queries.context
        if step == "attn":
            values = self._cross_attend(layer, values, memory)
        if step:
            values = _after_attention(layer, values)
        return self._heads(self._decode(self._between_layers(values), index + 1, memory))

    def _decode(self, values: Tensor, first: int, memory: Tokens) -> Tensor:
        """The decoder from layer `first` on, final layer norm included."""
        decoder = self.model.model.decoder
        position = self._position(memory.grids[0], memory.padding, values)
        mask = self._attention_mask(decoder.config, values, memory.values, memory.padding)
        for layer in decoder.layers[first:]:
            values = layer(
                values,
                None,
                position.expand(memory.batch, -1, -1),
                self._query_positions(memory.batch),
                memory.values,
                encoder_attention_mask=mask,
            )
            values = self._between_layers(values)
        return decoder.layernorm(values)

    def _between_layers(self, values: Tensor) -> Tensor:
        return self.model.model.decoder.layernorm(values) if self.model.config.auxiliary_loss else values

    def _cross_attend(self, layer: Any, values: Tensor, memory: Tokens) -> Tensor:
        attended, _ = layer.encoder_attn(
            hidden_states=values,
            key_value_states=memory.values,
            attention_mask=self._attention_mask(self.model.model.decoder.config, values, memory.values, memory.padding),
            position_embeddings=self._query_positions(memory.batch),
            encoder_position_embeddings=self._position(memory.grids[0], memory.padding, values).expand(
                memory.batch, -1, -1
            ),
        )
        return layer.encoder_attn_layer_norm(values + attended)

    def _query_positions(self, batch: int) -> Tensor:
        return self.model.model.query_position_embeddings.weight.unsqueeze(0).expand(batch, -1, -1)

    def _attention_mask(self, config: Any, values: Tensor, keys: Tensor, padding: Tensor | None) -> Any:
        from transformers.masking_utils import create_bidirectional_mask

        if padding is None:
            return None
        return create_bidirectional_mask(
            config=config, inputs_embeds=values, attention_mask=~padding, encoder_hidden_states=keys
        )

    def _heads(self, values: Tensor) -> Predictions:
        return Predictions(self.model.class_labels_classifier(values), self.model.bbox_predictor(values).sigmoid())

    def _expect(self, tap: str, representation: Any, kind: Any) -> Any:
        representation = super()._expect(tap, representation, kind)
        if kind is not Predictions and not tap.startswith("backbone."):
            channels = self.model.config.d_model
            if tap == "backbone":
                channels = self.model.model.input_projection.in_channels
            if representation.channels != channels:
                raise BacksightError(f"{tap} of {self.name} has {channels} channels, not {representation.channels}.")
        return representation


def _parts(tap: str) -> tuple[str, int, str]:
    """ "decoder.layers.2.attn" to ("decoder", 2, "attn")."""
    part, _, index, *step = tap.split(".")
    return part, int(index), step[0] if step else ""


def _after_attention(layer: Any, values: Tensor) -> Tensor:
    """The MLP half of an encoder or decoder layer."""
    return layer.final_layer_norm(values + layer.mlp(values))


ARCHITECTURE = Architecture(
    "detr",
    "DetrConfig",
    "DetrForObjectDetection",
    Detr,
    heads=("class_labels_classifier.weight",),
    spare=1,
    out_indices=lambda _: [1, 2, 3, 4],
)


# It also claims the model types that no family takes, to refuse them in a sentence.
FAMILY = family("transformers DETR", [ARCHITECTURE], refuses=True)
