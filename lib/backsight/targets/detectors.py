"""The detectors of transformers that are known here, each as what differs from DETR: where its taps lie.

Facts of transformers 5.23 that the taps stand on: layers are post-norm, so the norm that ends a half-step returns the
stream; `decoder.layers.i` is the layer's own output, before the final `decoder.layernorm`. README.md lists all taps.
A new detector is a class here, and one line in DETECTORS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from backsight.representation import Predictions
from backsight.targets.detection import ATTENTION, PREDICTIONS, DetectionTarget, Level, Spot
from backsight.targets.hooks import Place

TUPLES = {"attn": "self_attn", "cross_attn": "cross_attn"}  # half-steps of DAB-DETR
CROSS_FIRST = {"cross_attn": "cross_attn_layer_norm", "attn": "self_attn_layer_norm"}  # of Mask2Former


class ConditionalDetr(DetectionTarget):
    """Reference points come from the learned queries alone. With `auxiliary_loss` the final norm runs behind every
    layer, the next one reads the *normalised* stream, and it runs once more at the end."""

    one_level = True
    heads_alone = True

    def _final_norm(self, layers: int) -> int:
        return layers if self.model.config.auxiliary_loss else 0


class Detr(ConditionalDetr):
    """`backbone` is the map that it reads; finer ones are `backbone.0`, … in "fine" only. The first self-attention sees
    zeros, so `decoder.layers.0.attn` is the same for every image."""

    def _backbone_spots(self) -> dict[str, Spot]:
        *finer, (_, last) = super()._backbone_spots().items()
        return {**{tap: replace(spot, fine=True) for tap, spot in finer}, "backbone": last}


class DabDetr(DetectionTarget):
    """Boxes are refined from layer to layer, so even behind `decoder.layernorm` the model reads those of earlier
    layers, which `from_tap` computes again. The norm runs behind every layer, and the last of these calls, not the one
    after it, feeds the heads."""

    backbone, code = "model.backbone.conv_encoder.model", "object_queries"
    one_level = True
    layers_return = (0,)
    decoder_steps = TUPLES

    def _encoder_spots(self) -> dict[str, Spot]:
        spots = super()._encoder_spots()
        if self.model.config.normalize_before:
            spots["encoder.norm"] = replace(self._encoded(Place("model.encoder.norm")), part="norm")
        return spots

    def _final_norm(self, layers: int) -> int:
        return layers - 1


class DeformableDetr(DetectionTarget):
    """The encoder's tokens are those of all levels, the finest first; levels beyond the backbone's are made in the
    projection, by convolutions of stride 2. Reference points come from the layers before (box refinement), the first
    ones and the queries of two stages from the encoder's output: `from_tap` computes them again."""

    @property
    def _least_tokens(self) -> int:  # type: ignore[override]
        config = self.model.config
        return int(config.two_stage_num_proposals) if config.two_stage else 0


class RtDetr(DetectionTarget):
    """RT-DETR and RT-DETRv2. Attention works on chosen levels only (`encode_proj_layers`), the others go around it;
    behind the top-down pyramid the levels are the outputs of the lateral convolutions and, at the finest, of the last
    block; queries and boxes are chosen from the tokens of `decoder_input_proj`. The pixel mask is ignored: padded
    tokens are marked, and take part."""

    @property
    def _least_tokens(self) -> int:  # type: ignore[override]
        return int(self.model.config.num_queries)

    def _encoder_spots(self) -> dict[str, Spot]:
        config, levels = self.model.config, tuple(range(len(self._levels)))
        streams = {f"projection.{n}": Place("model.encoder", element=(n,), side="input") for n in levels}
        spots = {"projection": Spot("maps", "projection", tuple(streams.values()), levels)}
        for number, level in enumerate(config.encode_proj_layers if config.encoder_layers else ()):
            name = f"encoder.aifi.{number}"
            beside = {stream: place for stream, place in streams.items() if stream != f"projection.{level}"}
            code = Place(f"model.{name}.layers.0", element=(self.code,), side="input")
            attended = Spot("tokens", "encoder", levels=(level,), beside=beside, code=code)
            steps = {} if config.normalize_before else ATTENTION
            spots |= self._layer_spots(name, f"model.{name}", steps, attended)
            streams[f"projection.{level}"] = Place(f"model.{name}")
        if top := levels[-1]:
            finest = Place(f"model.encoder.fpn_blocks.{top - 1}")
            down = (finest, *(Place(f"model.encoder.lateral_convs.{top - level}") for level in levels[1:]))
            up = (finest, *(Place(f"model.encoder.pan_blocks.{level - 1}") for level in levels[1:]))
            spots["encoder.fpn_blocks"] = Spot("maps", "convolution", down, levels, Fraction(top))
            spots["encoder.pan_blocks"] = Spot("maps", "convolution", up, levels, Fraction(top))
        return {**spots, "decoder_input_proj": self._memory}

    @property
    def _memory(self) -> Spot:
        places = tuple(Place(f"model.decoder_input_proj.{level}") for level in self._encoder_levels)
        return Spot("maps", "projection", places, self._encoder_levels)


class Yolos(DetectionTarget):
    """A plain ViT, pre-norm, whose detection tokens are read as objects. Its tokens are class, patches, detection; here
    the detection tokens are prefix, too. Positions may be added between the layers, behind the tap. A half-step is what
    the second norm is given, and the layer adds its MLP to the same tensor."""

    masked = False
    first_stage = "patch_embedding"

    @property
    def _prefix(self) -> int:  # type: ignore[override]
        return 1 + int(self.model.config.num_detection_tokens)

    @cached_property
    def _levels(self) -> tuple[Level, ...]:
        side = int(self.model.config.patch_size)
        return (Level((side, side), Place("vit.embeddings")),)

    @cached_property
    def spots(self) -> dict[str, Spot]:
        def spot(part: str, place: Place, halves: int = 0) -> Spot:
            return Spot("tokens", part, (place,), (0,), Fraction(halves, 2), fine=place.side == "stream")

        spots = {"embeddings": spot("projection", Place("vit.embeddings"))}
        for layer in (f"encoder.layer.{index}" for index in range(self.model.config.num_hidden_layers)):
            spots[f"{layer}.attn"] = spot("blocks", Place(f"vit.{layer}.layernorm_after", side="stream"), 1)
            spots[layer] = spot("blocks", Place(f"vit.{layer}"), 1)
        spots["layernorm"] = spot("norm", Place("vit.layernorm"))
        return {**spots, PREDICTIONS: Spot("predictions", "decoder")}

    def tap_set(self, name: str) -> tuple[str, ...]:
        taps = super().tap_set("blocks" if name == "components" else name)
        return (taps[0], taps[-3], PREDICTIONS) if name == "components" else taps

    def _ordered(self, kind: str, values: Tensor, back: bool = False) -> Tensor:
        behind = self._prefix - 1 if back else values.shape[1] - self._prefix  # the class token, before the others
        return torch.cat([values[:, :1], values[:, 1 + behind :], values[:, 1 : 1 + behind]], dim=1)


class Mask2Former(DetectionTarget):
    """A mask for each query instead of a box: `encoder` is the pixel decoder's deformable encoder, of the three
    coarsest maps, `decoder` the masked-attention decoder, sequence-first. The mask of a layer's attention comes from
    the layer before; the norm runs once before the layers and once after each. The pixel mask is taken and not read."""

    task = "ForUniversalSegmentation"
    backbone, encoder = "model.pixel_level_module.encoder", "model.pixel_level_module.decoder.encoder"
    decoder, code = "model.transformer_module.decoder", "position_embeddings"
    masked = False
    layers_return = (0,)

    @property
    def _encoder_levels(self) -> tuple[int, ...]:
        """The coarsest first, as the model orders them."""
        return tuple(range(len(self._levels)))[:-4:-1]

    def _encoded(self, place: Place) -> Spot:
        """Beside the encoder, finer maps go around it, to the features of the masks."""
        around = range(int(self.model.model.pixel_level_module.decoder.num_fpn_levels))
        return replace(super()._encoded(place), beside={f"backbone.{n}": self._levels[n].place for n in around})

    @property
    def decoder_steps(self) -> Mapping[str, str]:  # type: ignore[override]
        return {} if self.model.config.pre_norm else CROSS_FIRST

    def _final_norm(self, layers: int) -> int:
        return layers

    def _ordered(self, kind: str, values: Tensor, back: bool = False) -> Tensor:
        return values.transpose(0, 1) if kind == "queries" else values

    def _predictions(self, output: Any) -> Predictions:
        masks = output.masks_queries_logits
        return Predictions(output.class_queries_logits, soft_boxes(masks), "softmax", masks)


def soft_boxes(masks: Tensor) -> Tensor:
    """Boxes of masks, from all their pixels weighted by their probability: differentiable, and never empty.

    masks: (B, Q, h, w) logits. Returns (B, Q, 4): centre x, centre y, width, height in [0, 1] of the image. The centre
    is the mean place; a side is sqrt(12) standard deviations, which is exact for a rectangle (1 inside, 0 outside).
    """
    weights = masks.sigmoid()
    weights = weights / weights.sum(dim=(2, 3), keepdim=True).clamp(min=torch.finfo(masks.dtype).tiny)
    centres, sides = [], []
    for profile in (weights.sum(dim=2), weights.sum(dim=3)):  # of the columns, of the rows
        count = profile.shape[-1]
        places = (torch.arange(count, device=masks.device, dtype=masks.dtype) + 0.5) / count
        centres.append((profile * places).sum(dim=-1))
        spread = (profile * (places - centres[-1][..., None]) ** 2).sum(dim=-1)
        sides.append((12 * spread + 1 / count**2).sqrt().clamp(max=1))  # with the variance inside one pixel
    return torch.stack([*centres, *sides], dim=-1)


DETECTORS: Mapping[str, type[DetectionTarget]] = {  # by `model_type` in config.json
    "detr": Detr,
    "conditional_detr": ConditionalDetr,
    "dab-detr": DabDetr,
    "deformable_detr": DeformableDetr,
    "rt_detr": RtDetr,
    "rt_detr_v2": RtDetr,
    "yolos": Yolos,
    "mask2former": Mask2Former,
}
