"""ViT and DeiT: every model of timm's VisionTransformer class.

    pixels ─► patch_embed ─► blocks.0.attn ─► blocks.0 ─► … ─► norm ─► head
              (+ position,   (half-step:      (after
               + prefix)      after attention) the MLP)

`patch_embed` is what enters the first block: patch embedding with position, class and register tokens, and the
norm that CLIP-like models put before the blocks. `norm` is a tap only where the final norm acts on the tokens
(models that pool first normalise the pooled vector instead).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.representation import Representation, Tokens
from backsight.targets.base import (
    PIXELS,
    Preprocessing,
    Site,
    Size,
    Stage,
    Target,
)


class TimmTransformer(Target):
    """A timm VisionTransformer. Its output is logits (B, K), or pooled features where it has no head."""

    kind = "classifier"
    model: Any

    def __init__(
        self,
        model: nn.Module,
        name: str,
        weights: str,
        preprocessing: Preprocessing | None = None,
        classes: Sequence[str] | None = None,
        taps: str | Sequence[str] = "blocks",
    ) -> None:
        from timm.models.vision_transformer import VisionTransformer

        if not isinstance(model, VisionTransformer):
            raise BacksightError(
                f"{name} is a {type(model).__name__}, not one of timm's VisionTransformers: "
                "use module_target() for other models."
            )
        super().__init__(model, name, preprocessing or _preprocessing(model), weights, classes, taps)

    @property
    def available_taps(self) -> tuple[str, ...]:
        return self._taps_with(halves=self._half_step_refusal() is None)

    def _taps_with(self, halves: bool) -> tuple[str, ...]:
        taps = ["patch_embed"]
        for index in range(len(self.model.blocks)):
            taps += [f"blocks.{index}.attn", f"blocks.{index}"] if halves else [f"blocks.{index}"]
        return (*taps, *(() if isinstance(self.model.norm, nn.Identity) else ("norm",)))

    def _half_step_refusal(self) -> str | None:
        for index, block in enumerate(self.model.blocks):
            if _half_step(block) is None:
                return (
                    f"blocks.{index} of {self.name} is a {type(block).__name__}, in which attention and MLP do not "
                    "follow one another: there is no state between them"
                )
        return None

    def tap_set(self, name: str) -> tuple[str, ...]:
        if name == "components":
            return ("patch_embed", f"blocks.{len(self.model.blocks) - 1}")
        if name == "fine" and (reason := self._half_step_refusal()):
            raise BacksightError(f'{reason}, so use taps="blocks".')
        return self._taps_with(halves=name == "fine")

    def _unknown_tap(self, tap: str) -> str:
        if tap.endswith(".attn") and (reason := self._half_step_refusal()):
            return f"{reason}, so {tap!r} is not a tap."
        return super()._unknown_tap(tap)

    @property
    def reduction(self) -> Size:
        embedding = self.model.patch_embed
        return embedding.img_size[0] // embedding.grid_size[0], embedding.img_size[1] // embedding.grid_size[1]

    def check_size(self, size: Size) -> None:
        if not self.model.dynamic_img_size:
            if tuple(size) != tuple(self.model.patch_embed.img_size):
                raise BacksightError(
                    f"{self.name} takes images of exactly {tuple(self.model.patch_embed.img_size)} "
                    f"(height, width), not {tuple(size)}."
                )
            return
        down, across = self.reduction
        if size[0] < down or size[1] < across or size[0] % down or size[1] % across:
            raise BacksightError(
                f"{self.name} takes images whose height is a multiple of {down} and whose width is a multiple of "
                f"{across}, not {tuple(size)}."
            )

    def stage(self, tap: str, previous: str) -> Stage:
        self._refuse_order(tap, previous)
        order = self._taps_with(halves=True)
        start = -1 if previous == PIXELS else order.index(previous)
        steps = order[start + 1 : order.index(tap) + 1]
        depth = math.ceil(sum(step.startswith("blocks.") for step in steps) / 2)
        heads, hidden = _block_sizes(self.model.blocks[0], self.model.embed_dim)
        if previous == PIXELS:
            return Stage("patch_embedding", depth, heads, hidden)
        return Stage("blocks" if depth else "norm", depth, heads, hidden)

    def _sites(self, taps: Sequence[str]) -> dict[str, Site]:
        return {tap: self._site(tap) for tap in taps}

    def _site(self, tap: str) -> Site:
        if tap == "patch_embed":
            return Site(self.model.blocks[0], "input")
        if tap == "norm":
            return Site(self.model.norm)
        block = self.model.blocks[_block_index(tap)]
        if not tap.endswith(".attn"):
            return Site(block)
        half = _half_step(block)
        assert half is not None
        return Site(half[0], "input")

    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        height, width = images.shape[2:]
        down, across = self.reduction
        grid = (height // down, width // across)
        return {tap: Tokens(seen[tap], (grid,), self.model.num_prefix_tokens) for tap in taps}

    def _forward(self, images: Tensor, padding: Tensor | None) -> Tensor:
        if padding is not None and bool(padding.any()):
            raise BacksightError(
                f"{self.name} has no attention mask, so padded pixels would count as picture: "
                "crop or stretch the images instead of padding them."
            )
        return self.model(images)

    def _rest(self, tap: str, representation: Any) -> Tensor:
        if not isinstance(representation, Tokens) or representation.channels != self.model.embed_dim:
            raise BacksightError(
                f"{tap} of {self.name} holds tokens of {self.model.embed_dim} channels, "
                f"not a representation {representation.signature}."
            )
        if representation.prefix != self.model.num_prefix_tokens:
            raise BacksightError(
                f"{tap} of {self.name} has {self.model.num_prefix_tokens} prefix tokens, not {representation.prefix}."
            )
        values = representation.values
        if tap == "norm":
            return self.model.forward_head(values)
        following = 0
        if tap != "patch_embed":
            following = _block_index(tap) + 1
            if tap.endswith(".attn"):
                half = _half_step(self.model.blocks[_block_index(tap)])
                assert half is not None
                values = half[1](values)
        for block in self.model.blocks[following:]:
            values = block(values)
        return self.model.forward_head(self.model.norm(values))

    def _randomised(self) -> nn.Module:
        model = copy.deepcopy(self.model)
        model.init_weights(needs_reset=True)
        return model


def _block_index(tap: str) -> int:
    return int(tap.split(".")[1])


def _half_step(block: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor]] | None:
    """(module whose input is the residual stream after attention, the rest of the block), None if there is none."""
    from timm.models import vision_transformer as vit

    if isinstance(block, vit.Block):
        return block.norm2, lambda x: x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    if isinstance(block, vit.ResPostBlock):
        return block.mlp, lambda x: x + block.drop_path2(block.norm2(block.mlp(x)))
    if isinstance(block, vit.ParallelThingsBlock):
        return block.ffns[0], lambda x: x + torch.stack([ffn(x) for ffn in block.ffns]).sum(dim=0)
    return None


def _block_sizes(block: Any, width: int) -> tuple[int, int]:
    """(attention heads, MLP width) of a block."""
    if hasattr(block, "in_split"):  # the parallel blocks keep [MLP, query, key, value] widths
        return int(block.num_heads), int(block.in_split[0])
    attention = block.attns[0].attn if hasattr(block, "attns") else block.attn
    mlp = block.ffns[0].mlp if hasattr(block, "ffns") else block.mlp
    final = getattr(mlp, "fc2", None)
    return int(attention.num_heads), int(getattr(final, "in_features", 4 * width))


def _preprocessing(model: Any) -> Preprocessing:
    from timm.data import resolve_model_data_config

    data = resolve_model_data_config(model)
    size = tuple(model.patch_embed.img_size or data["input_size"][1:])
    return Preprocessing(
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        size=(size[0], size[1]),
        interpolation=data["interpolation"],
        crop_fraction=float(data["crop_pct"]),
        square=size[0] == size[1],
    )
