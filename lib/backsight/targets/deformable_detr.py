"""Deformable DETR of transformers: DeformableDetrForObjectDetection, with box refinement and two stages too.

    pixels ─► backbone.i ─► projection ─► encoder.layers.i ─► decoder.layers.i ─► predictions
              (maps)        (Tokens of all levels, with       (Queries)
                             position + level embedding)

Facts of transformers 5.23 that the taps stand on: the encoder's tokens are those of all levels one after the other,
the finest first; levels beyond the backbone's are made in the projection, by convolutions of stride 2; layers are
post-norm, so the norm that ends a half-step returns the stream; there is no norm behind the last decoder layer.
Reference points of a layer come from those before it (box refinement), the first ones and the queries from the
encoder's output (two stages): `from_tap` computes them again. Classes are judged one by one (sigmoid focal loss).
"""

from __future__ import annotations

from torch import Tensor

from backsight.targets.detection import DetectionTarget, flat


class DeformableDetr(DetectionTarget):
    """A transformers DeformableDetrForObjectDetection."""

    def _code(self, level: int, code: Tensor) -> Tensor:
        return flat(code) + self.model.model.level_embed[level]

    @property
    def _least_tokens(self) -> int:
        config = self.model.config
        return int(config.two_stage_num_proposals) if config.two_stage else 0
