"""Every timm architecture: ViT, Swin, PVT, Hiera, ConvNeXt, XCiT, CaiT, TNT, …

    pixels ─► patch_embed ─► blocks.0.attn ─► blocks.0 ─► … ─► norm ─► head          (of a ViT)

Taps are those of outline.py, under timm's names; what enters the first block (with position and prefix tokens) is
`patch_embed`.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.representation import Grid, Tokens
from backsight.targets.axes import Axes, guess, readings
from backsight.targets.base import Preprocessing, Size
from backsight.targets.discovered import Discovered
from backsight.targets.hooks import Found, observe
from backsight.targets.names import reason
from backsight.targets.outline import outline

PASS_ERRORS = (RuntimeError, ValueError, AssertionError, TypeError, IndexError)  # of a model on unfit images


class TimmTarget(Discovered):
    """A timm model. Its output is logits (B, K), or features where it has no head.

    build: makes the same architecture again, with weights from the global generator (default: the model's own are
    drawn anew). Warns where the patches leave a strip of pixels out; raises BacksightError where no tap is found.
    """

    kind = "classifier"
    reads_output = False
    model: Any

    def __init__(
        self,
        model: nn.Module,
        name: str,
        weights: str,
        preprocessing: Preprocessing,
        classes: Sequence[str] | None = None,
        taps: str | Sequence[str] = "blocks",
        build: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.name, self.preprocessing, self._build = name, preprocessing, build
        self.model = self._put_to_rest(model)
        images = self._blank(2, self.image_size)
        try:
            # No backward pass follows, so the graph need not hold what one would read: gigabytes of large models.
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
                self._found = observe(self.model, self.model, images)[0]
        except PASS_ERRORS as error:
            raise BacksightError(f"{name} cannot be a target: {reason(error)}.") from error
        self._read_axes(images)
        self._outline = outline(self.model, self._found, _featured(model))
        if not self._outline.taps:
            raise BacksightError(
                f"{name} cannot be a target: no module of this {type(model).__name__} returns a picture through which "
                "everything goes that its output knows of the image."
            )
        self._chosen = self._named()
        self._taken: set[Size] = set()  # further sizes of images
        self._sizes: dict[tuple[str, Grid], Size] = {}  # of the images that gave a tap this grid
        super().__init__(model, name, preprocessing, weights, classes, taps)
        embedding: Any = getattr(model, "patch_embed", None)
        strip = [side % cell for side, cell in zip(self.image_size, self.reduction, strict=True)]
        if any(strip) and hasattr(embedding, "feat_ratio") and not embedding.dynamic_img_pad:
            warnings.warn(
                f"{name}: images of {self.image_size} in patches of {self.reduction}: the last {strip[0]} rows and "
                f"{strip[1]} columns of pixels lie in no token.",
                stacklevel=2,
            )

    def _blank(self, batch: int, size: Size) -> Tensor:
        return torch.zeros(batch, len(self.preprocessing.mean), *size, device=self.device, dtype=self.dtype)

    def _read_axes(self, images: Tensor) -> None:
        """By the forms (grid, channels) of the maps that timm calls the model's intermediates, where it says any."""
        forms: list[tuple[Grid, int]] = []
        with contextlib.suppress(AttributeError, *PASS_ERRORS), torch.no_grad():
            maps = self.model.forward_intermediates(images[:1], output_fmt="NCHW", intermediates_only=True)
            forms = [((each.shape[2], each.shape[3]), each.shape[1]) for each in maps]
        for each in self._found:
            each.batch = 0 if each.shape[:1] == (2,) else None
        read = [each for each in self._found if each.used and each.batch == 0 and each.place.side == "output"]
        sure = [readings(each.shape, 0, self.image_size) for each in read]
        usual = Counter(each[0].order for each in sure if len(each) == 1 and "h" in each[0].order).most_common(1)
        for each in read:
            own = _permuted(self.model, each.place.module, each.shape)
            each.axes = own or guess(each.shape, forms, self.image_size, usual[0][0] if usual else None)

    def _named(self) -> dict[str, Found]:
        """What enters the blocks is `patch_embed`, whichever module returns it; what enters the norm, or the MLP, in a
        ViT's block is `blocks.i.attn`: the stream between attention and MLP, which no module returns."""
        from timm.models import VisionTransformer

        given = {each.name: each for each in self._found if each.cut and each.place.side == "stream"}
        chosen: dict[str, Found] = {}
        for each in self._outline.taps:
            tap = each.place.module
            if isinstance(self.model, VisionTransformer):
                for name in (f"{tap}.{part}@in" for part in ("norm2", "mlp", "ffns.0")):
                    if name in given:
                        chosen[f"{tap}.attn"] = replace(given[name], axes=each.axes)
            first = not chosen and each.order < min(self._outline.blocks.values(), default=0)
            chosen["patch_embed" if first and hasattr(self.model, "patch_embed") else tap] = each
        return chosen

    def _axes_of(self, tap: str, shape: Sequence[int], size: Size) -> Axes:
        own = super()._axes_of(tap, shape, size)
        if size == self.image_size:
            return own
        like = [each for each in readings(shape, 0, size, own.order) if each.prefix == own.prefix]
        if not like and tuple(shape[1:]) != self._chosen[tap].shape[1:]:  # some resize the images
            raise BacksightError(f"{tap} of {self.name} holds no picture in images of {size} (height, width).")
        axes = like[0] if like else own
        self._sizes.setdefault((tap, axes.grid), size)
        return axes

    def _size_of(self, tap: str, tokens: Tokens) -> Size:
        (rows, columns), grid, (height, width) = self._form(tap)[0], tokens.grids[0], self.image_size
        size = (height * grid[0] // rows, width * grid[1] // columns)
        return size if grid == (rows, columns) else self._sizes.get((tap, grid), size)

    def check_size(self, size: Size) -> None:
        """Raises BacksightError, with the reason, where the model does not take images of this size."""
        if size in (self.image_size, *self._taken):
            return
        try:
            with torch.no_grad():
                self.model(self._blank(1, size))
        except PASS_ERRORS as error:
            raise BacksightError(
                f"{self.name} does not take images of {size} (height, width): {reason(error)}; its own size is "
                f"{self.image_size}."
            ) from error
        self._taken.add(size)

    @property
    def available_taps(self) -> tuple[str, ...]:
        return tuple(self._chosen)

    def tap_set(self, name: str) -> tuple[str, ...]:
        """ "fine" adds the stream between attention and MLP of a ViT's blocks, `blocks.i.attn`."""
        taps = [tap for tap, each in self._chosen.items() if name == "fine" or each.place.side == "output"]
        if name != "components":
            return tuple(taps)
        # A norm behind the last block belongs to no stage, but a projection to other channels is a component.
        first, *inner = taps
        if self._outline.final and inner and self._form(taps[-1])[:2] == self._form(taps[-2])[:2]:
            inner.pop()
        ends = [tap for tap, after in pairwise(inner) if self._form(tap) != self._form(after)]
        return (first, *ends, *inner[-1:])

    @property
    def reduction(self) -> Size:
        embedding: Any = getattr(self.model, "patch_embed", None)
        if hasattr(embedding, "feat_ratio"):
            return tuple(embedding.feat_ratio(as_scalar=False))
        grid = self._form(self.available_taps[0])[0]
        return max(1, round(self.image_size[0] / grid[0])), max(1, round(self.image_size[1] / grid[1]))

    def _randomised(self) -> nn.Module:
        return self._build() if self._build else super()._randomised()


def _permuted(model: Any, path: str, shape: Sequence[int]) -> Axes | None:
    """Two architectures keep their tokens in another order than the grid's; timm's own functions say which."""
    from timm.models.nest import deblockify

    kind, number = type(model).__name__, path.split(".")[1:2]
    places = torch.arange(math.prod(shape[1:-1])).view(1, *shape[1:-1], 1)
    if kind == "Hiera" and len(shape) == 3 and path.count(".") < 2:
        places = model.reroll(places, int(number[0]) if number else 0)
    elif kind == "Nest" and "transformer_encoder" in path:
        places = deblockify(places, model.levels[int(number[0])].block_size)
    else:
        return None
    return Axes("bnc", (places.shape[1], places.shape[2]), 0, tuple(places.flatten().tolist()))


def _featured(model: Any) -> set[str]:
    """Modules that timm itself names as the ends of stages."""
    described = getattr(model, "feature_info", None)
    described = described if isinstance(described, (list, tuple)) else getattr(described, "info", [])
    return {str(each["module"]) for each in described if each.get("module")}
