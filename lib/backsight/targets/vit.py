"""ViT and DeiT: every model of timm's VisionTransformer class.

    pixels ─► patch_embed ─► blocks.0.attn ─► blocks.0 ─► … ─► norm ─► head
              (+ position,   (half-step:      (after
               + prefix)      after attention) the MLP)

`patch_embed` is what enters the first block: patch embedding with position, class and register tokens, and the
norm that CLIP-like models put before the blocks. `norm` is a tap only where the final norm acts on the tokens
(models that pool first normalise the pooled vector instead).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.representation import Grid, Representation, Tokens
from backsight.targets.base import PIXELS, Preprocessing, Size, Stage, Target, redrawn
from backsight.targets.hooks import Place


class TimmTransformer(Target):
    """A timm VisionTransformer. Its output is logits (B, K), or pooled features where it has no head.

    Warns where the patches leave a strip of pixels out.
    """

    kind = "classifier"
    model: Any

    def __init__(
        self,
        model: Any,
        name: str,
        weights: str,
        preprocessing: Preprocessing,
        classes: Sequence[str] | None = None,
        taps: str | Sequence[str] = "blocks",
    ) -> None:
        self._halves = [_half_step(block) for block in model.blocks]
        super().__init__(model, name, preprocessing, weights, classes, taps)
        height, width = (side % cell for side, cell in zip(self.image_size, self.reduction, strict=True))
        if (height or width) and not self.model.patch_embed.dynamic_img_pad:
            warnings.warn(
                f"{name}: images of {self.image_size} in patches of {self.reduction}: the last {height} rows and "
                f"{width} columns of pixels lie in no token.",
                stacklevel=2,
            )

    @property
    def available_taps(self) -> tuple[str, ...]:
        return self._taps_with(halves=None not in self._halves)

    def _taps_with(self, halves: bool) -> tuple[str, ...]:
        taps = ["patch_embed"]
        for index in range(len(self.model.blocks)):
            taps += [f"blocks.{index}.attn", f"blocks.{index}"] if halves else [f"blocks.{index}"]
        return (*taps, *(() if isinstance(self.model.norm, nn.Identity) else ("norm",)))

    def tap_set(self, name: str) -> tuple[str, ...]:
        if name == "components":
            return ("patch_embed", f"blocks.{len(self.model.blocks) - 1}")
        if name == "fine":
            self._refuse_unknown("blocks.0.attn")
        return self._taps_with(halves=name == "fine")

    def _refuse_unknown(self, tap: str) -> None:
        if tap.endswith(".attn") and None in self._halves:
            index = self._halves.index(None)
            raise BacksightError(
                f"{tap} is no tap: blocks.{index} of {self.name} is a {type(self.model.blocks[index]).__name__}, in "
                'which attention and MLP do not follow one another, so use taps="blocks".'
            )
        super()._refuse_unknown(tap)

    @property
    def reduction(self) -> Size:
        down, across = self.model.patch_embed.feat_ratio(as_scalar=False)
        return down, across

    def check_size(self, size: Size) -> None:
        embedding, (down, across) = self.model.patch_embed, self.reduction
        if not self.model.dynamic_img_size:
            own = tuple(embedding.img_size)
            fits, allowed = tuple(size) == own, f"exactly {own} (height, width)"
        else:
            fits = embedding.dynamic_img_pad or not (size[0] % down or size[1] % across)
            allowed = f"a height that is a multiple of {down} and a width that is a multiple of {across}"
        if not fits or min(size) < 1:
            raise BacksightError(f"{self.name} takes images of {allowed}, not {tuple(size)}.")

    def stage(self, tap: str, previous: str) -> Stage:
        self._refuse_order(tap, previous)
        order = self._taps_with(halves=True)
        start = -1 if previous == PIXELS else order.index(previous)
        steps = order[start + 1 : order.index(tap) + 1]
        depth = math.ceil(sum(step.startswith("blocks.") for step in steps) / 2)
        heads, hidden = block_sizes(self.model.blocks[0])
        if previous == PIXELS:
            return Stage("patch_embedding", depth, heads, hidden)
        return Stage("blocks" if depth else "norm", depth, heads, hidden)

    def _places(self, taps: Sequence[str]) -> dict[str, Place]:
        places = {"patch_embed": Place("blocks.0", side="input")}
        for index, half in enumerate(self._halves):
            if half is not None:
                places[f"blocks.{index}.attn"] = Place(f"blocks.{index}.{half[0]}", side="input")
        return {tap: places.get(tap, Place(tap)) for tap in taps}

    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        grid: Grid = tuple(self.model.patch_embed.dynamic_feat_size(images.shape[2:]))
        return {tap: Tokens(seen[tap], (grid,), self.model.num_prefix_tokens) for tap in taps}

    def _rest(self, tap: str, representation: Any) -> Tensor:
        prefix, channels = self.model.num_prefix_tokens, self.model.embed_dim
        fits = isinstance(representation, Tokens) and representation.prefix == prefix
        if not fits or representation.channels != channels:
            raise BacksightError(
                f"{tap} of {self.name} holds tokens of {channels} channels behind {prefix} prefix tokens, "
                f"not a representation {representation.signature}."
            )
        values = representation.values
        if tap == "norm":
            return self.model.forward_head(values)
        index = -1 if tap == "patch_embed" else int(tap.split(".")[1])
        if tap.endswith(".attn"):
            values = self._halves[index][1](self.model.blocks[index], values)  # type: ignore[index]
        for block in self.model.blocks[index + 1 :]:
            values = block(values)
        return self.model.forward_head(self.model.norm(values))

    def _randomised(self) -> nn.Module:
        def draw(model: Any) -> None:
            model.init_weights(needs_reset=True)
            for module in model.modules():  # of a hybrid's convolutions, which it leaves alone
                if any(bool(weight.isnan().any()) for weight in module.parameters(recurse=False)):
                    getattr(module, "reset_parameters", lambda: None)()

        return redrawn(self.model, draw, self.name)


def _half_step(block: Any) -> tuple[str, Callable[[Any, Tensor], Tensor]] | None:
    """(module whose input is the residual stream after attention, the rest of the block), None if there is none."""
    from timm.models import vision_transformer as vit

    if isinstance(block, vit.Block):
        return "norm2", lambda block, x: x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    if isinstance(block, vit.ResPostBlock):
        return "mlp", lambda block, x: x + block.drop_path2(block.norm2(block.mlp(x)))
    if isinstance(block, vit.ParallelThingsBlock):
        return "ffns.0", lambda block, x: x + torch.stack([ffn(x) for ffn in block.ffns]).sum(dim=0)
    return None


def block_sizes(block: nn.Module) -> tuple[int, int]:
    """(attention heads, MLP width) of any block, 0 where it says neither, and the largest where it says several."""
    modules: list[Any] = list(block.modules())
    heads = [getattr(module, name, 0) for module in modules for name in ("num_heads", "heads")]
    layers = [getattr(module, "fc2", None) for module in modules]
    widths = [getattr(layer, "in_features", getattr(layer, "in_channels", 0)) for layer in layers]
    widths += [module.in_split[0] for module in modules if hasattr(module, "in_split")]  # [MLP, query, key, value]
    largest, widest = (max([0, *(n for n in sizes if isinstance(n, int))]) for sizes in (heads, widths))
    return largest, widest
