"""Mask2Former of transformers: Mask2FormerForUniversalSegmentation, a mask for each query instead of a box.

    pixels ─► backbone.i ─► projection ─► encoder.layers.i ─► decoder.layers.i ─► decoder.layernorm ─► predictions
              (maps)        (Tokens of the three coarsest     (Queries)           (Queries)            (Predictions
                             maps, the coarsest first)                                                  with masks)

`encoder` is the pixel decoder's deformable encoder, `decoder` the masked-attention decoder. Behind the encoder the
finest map of the backbone joins again (it becomes the features that masks are made of), so it travels in the context.

Facts of transformers 5.23 that the taps stand on: the attention mask of a decoder layer comes from the masks predicted
from the layer before it, so `from_tap` computes all of them again; the decoder is sequence-first; its layers
cross-attend before they self-attend, and are post-norm unless `pre_norm`; `decoder.layernorm` runs once before the
layers and once after each, of which the last feeds the heads; the pixel mask is taken and not read, so that padding
would count.

Boxes are made from the masks, see `soft_boxes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from backsight.representation import Predictions
from backsight.targets.detection import DetectionTarget, Level, Spot
from backsight.targets.hooks import Place

ENCODER_LEVELS = 3  # maps that the pixel decoder's encoder reads, in every published model and in the code
CROSS_FIRST = {"cross_attn": "cross_attn_layer_norm", "attn": "self_attn_layer_norm"}


class Mask2Former(DetectionTarget):
    """A transformers Mask2FormerForUniversalSegmentation. Its output is Predictions with masks."""

    backbone, encoder = "model.pixel_level_module.encoder", "model.pixel_level_module.decoder.encoder"
    decoder, code = "model.transformer_module.decoder", "position_embeddings"
    masked = False
    layers_return = (0,)

    @cached_property
    def _levels(self) -> tuple[Level, ...]:
        """Of a Swin, where its stages end: before the norm of each map, and before the patches are merged."""
        levels = super()._levels
        swin = getattr(self.model.get_submodule(self.backbone), "swin", None)
        if swin is None or len(swin.encoder.layers) != len(levels):
            return levels
        ends = [f"{n}.blocks.{len(stage.blocks) - 1}" for n, stage in enumerate(swin.encoder.layers)]
        places = [Place(f"{self.backbone}.swin.encoder.layers.{end}", element=(0,)) for end in ends]
        return tuple(Level(level.stride, place, True, "tokens") for level, place in zip(levels, places, strict=True))

    @property
    def _encoder_levels(self) -> tuple[int, ...]:
        """The coarsest first, as the model orders them."""
        return tuple(range(len(self._levels)))[: -ENCODER_LEVELS - 1 : -1]

    def _encoded(self, place: Place) -> Spot:
        """Beside the encoder, maps go around it, to the features of the masks."""
        around = range(int(self.model.model.pixel_level_module.decoder.num_fpn_levels))
        return replace(super()._encoded(place), beside={f"backbone.{n}": self._levels[n].place for n in around})

    @property
    def _decoder_steps(self) -> Mapping[str, str]:
        return {} if self.model.config.pre_norm else CROSS_FIRST

    def _final_norm(self, layers: int) -> int:
        return layers

    @property
    def _widths(self) -> tuple[tuple[int, int], tuple[int, int]]:
        config, heads = self.model.config, self.model.config.num_attention_heads
        return (heads, config.encoder_feedforward_dim), (heads, config.dim_feedforward)

    def _ordered(self, kind: str, values: Tensor, back: bool = False) -> Tensor:
        """The decoder is sequence-first."""
        return values.transpose(0, 1) if kind == "queries" else values

    def _predictions(self, output: Any) -> Predictions:
        masks = output.masks_queries_logits
        return Predictions(output.class_queries_logits, soft_boxes(masks), "softmax", masks)


def soft_boxes(masks: Tensor) -> Tensor:
    """Boxes of masks, from all their pixels weighted by their probability: differentiable, and never empty.

    masks: (B, Q, h, w) logits. Returns (B, Q, 4): centre x, centre y, width, height in [0, 1] of the image. The
    centre is the mean place; a side is sqrt(12) standard deviations, which for a rectangle (1 inside, 0 outside) is
    exactly its side; an object that fills its own box less evenly, or a mask that is unsure everywhere, gives a side
    that is off, at most 1.
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
