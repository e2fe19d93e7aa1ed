"""Every timm architecture: ViT, Swin, PVT, Hiera, ConvNeXt, XCiT, CaiT, TNT, …

    pixels ─► patch_embed ─► blocks.0.attn ─► blocks.0 ─► … ─► norm ─► head          (of a ViT)

What a model is made of is read off one observed pass: taps are cuts that hold a picture, of what enters the first block
(with position and prefix tokens: `patch_embed`), of every block and end of a stage, and of the last norm on tokens.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.representation import Grid, Tokens
from backsight.targets.axes import Axes, guess, readings
from backsight.targets.base import PIXELS, Preprocessing, Size, Stage
from backsight.targets.discovered import ATTENTION, Discovered, block_sizes
from backsight.targets.hooks import Found, observe
from backsight.targets.names import reason

NUMBERED_AT_THE_TOP = re.compile(r"(?i)(block|stage|layer|level|cell|mixed)\w*\d\w*")
NO_BLOCKS = re.compile(r"(?i)stem|embed|downsample|head|pool|classifier")  # parts of these are no blocks
DEEPEST = 2  # numbers in a block's path: of its stage and its own
PASS_ERRORS = (RuntimeError, ValueError, AssertionError, TypeError, IndexError)  # of a model on unfit images


@dataclass(frozen=True)
class _Tap:
    """found: the tensor; blocks: that end here, since the last tap; final: it lies behind all blocks; half: it lies
    inside one, between attention and MLP."""

    found: Found
    blocks: tuple[str, ...] = ()
    final: bool = False
    half: bool = False


class TimmTarget(Discovered):
    """A timm model. Its output is logits (B, K), or features where it has no head.

    build: makes the same architecture again, with weights from the global generator (default: the model's own are
    drawn anew). Warns where the patches leave a strip of pixels out; raises BacksightError where no tap is found.
    """

    kind = "classifier"
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
        self._taps = _taps(self.model, self._found, self._forms(images[:1]), self.image_size)
        if not self._taps:
            raise BacksightError(
                f"{name} cannot be a target: no module of this {type(model).__name__} returns a picture through which "
                "everything goes that its output knows of the image."
            )
        self._chosen = {tap: each.found for tap, each in self._taps.items()}
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

    def _forms(self, images: Tensor) -> list[tuple[Grid, int]]:
        """(grid, channels) of the maps that timm calls the model's intermediates; none where it says none."""
        try:
            with torch.no_grad():
                maps = self.model.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)
        except (AttributeError, *PASS_ERRORS):
            return []
        return [((each.shape[2], each.shape[3]), each.shape[1]) for each in maps]

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
        return tuple(self._taps)

    def tap_set(self, name: str) -> tuple[str, ...]:
        """ "fine" adds the stream between attention and MLP of a ViT's blocks, `blocks.i.attn`."""
        taps = {tap: each for tap, each in self._taps.items() if name == "fine" or not each.half}
        if name != "components":
            return tuple(taps)
        # A norm behind the last block belongs to no stage, but a projection to other channels is a component.
        first, *rest = taps
        *_, last = [tap for tap, each in taps.items() if not each.final] or [first]
        inner = [tap for tap in rest if not taps[tap].final or self._form(tap)[:2] != self._form(last)[:2]]
        ends = [tap for tap, after in pairwise(inner) if self._form(tap) != self._form(after)]
        return (first, *ends, *inner[-1:])

    @property
    def reduction(self) -> Size:
        embedding: Any = getattr(self.model, "patch_embed", None)
        if hasattr(embedding, "feat_ratio"):
            return tuple(embedding.feat_ratio(as_scalar=False))
        grid = self._form(self.available_taps[0])[0]
        return max(1, round(self.image_size[0] / grid[0])), max(1, round(self.image_size[1] / grid[1]))

    def stage(self, tap: str, previous: str) -> Stage:
        between = [self._taps[each] for each in self._between(tap, previous)]
        blocks = [self.model.get_submodule(block) for each in between for block in each.blocks]
        steps = 2 * len(blocks) + self._taps[tap].half - (previous != PIXELS and self._taps[previous].half)
        modules = blocks or [self.model.get_submodule(block) for each in self._taps.values() for block in each.blocks]
        heads, hidden = (max(sizes) for sizes in zip((0, 0), *map(block_sizes, modules), strict=True))
        if previous == PIXELS:
            return Stage("patch_embedding", len(blocks), heads, hidden)
        if not steps:
            same = self._form(tap)[:2] == self._form(previous)[:2]
            return Stage("norm", 0, heads, hidden) if same else Stage("convolution", 1, heads, hidden)
        attends = heads or any(ATTENTION.search(type(part).__name__) for each in modules for part in each.modules())
        return Stage("blocks" if attends else "convolution", math.ceil(steps / 2), heads, hidden)

    def _randomised(self) -> nn.Module:
        return self._build() if self._build else super()._randomised()


# What is a tap


def _taps(model: nn.Module, found: Sequence[Found], forms: Sequence[tuple[Grid, int]], size: Size) -> dict[str, _Tap]:
    """In forward order. A module that runs several times is none: its name would not say which output is meant."""
    from timm.models import VisionTransformer

    outputs = _outputs(found)
    ends = {each.place.module: each.order for each in found if each.place.side == "output"}
    parts = {path for path in ends if _is_part(model, path)}
    blocks = {path for path in parts & outputs.keys() if not _any_inside(parts & outputs.keys(), path)}
    # Parts that are no cuts, as CaiT's class attention beside the tokens: no taps, but they count as depth.
    beside = {p for p in parts - outputs.keys() if not _any_inside(blocks, p) and not _is_inside(p, blocks)}
    beside = {path for path in beside if not _is_inside(path, beside)}
    featured = _featured(model) & outputs.keys()
    stages = {path for path in outputs if _any_inside(blocks, path)} | featured
    units = blocks or featured or outputs.keys()
    inner = [order for path, order in ends.items() if path in units or _is_inside(path, units)]
    begin, end = (min(inner), max(inner)) if inner else (0, 0)
    entering = [each[0].order for each in outputs.values() if each[0].order < begin][-1:]
    sure = [readings(each.shape, 0, size) for tensors in outputs.values() for each in tensors if each.batch == 0]
    maps = Counter(each[0].order for each in sure if len(each) == 1 and "h" in each[0].order)
    usual = max(maps, key=lambda order: maps[order], default=None)
    groups: dict[tuple[int, ...], list[str]] = {}  # the modules that return the same tensors
    for path, tensors in outputs.items():
        groups.setdefault(tuple(each.same for each in tensors), []).append(path)

    taps: dict[str, _Tap] = {}
    pending: list[str] = []
    last, featured_last = -1.0, False
    for paths in groups.values():
        orders = [outputs[path][0].order for path in paths]
        of_block = any(path in blocks | stages for path in paths)
        final = orders[0] > end and not of_block
        is_stem = any(order in entering for order in orders)
        if not (is_stem or final or of_block):
            continue
        path = min(paths, key=lambda path: (path not in featured, path not in blocks, path.count(".")))
        stem = is_stem and not final and path not in blocks | stages and hasattr(model, "patch_embed")
        # A block's last activation returns its tensor before the block itself has ended.
        pending += [unit for unit in blocks | beside if last < ends[unit] <= orders[-1]]
        last = orders[-1]
        read = [each for each in outputs[path] if each.used or len(outputs[path]) == 1]
        for each in read:
            if each.batch == 0:
                each.axes = _permuted(model, path, each.shape) or guess(each.shape, forms, size, usual)
        tensor = next((each for each in read if each.axes is not None), None)
        if tensor is None or (final and tensor.form == "vector"):
            continue
        before = next(reversed(taps), "")
        if before and final and taps[before].final:  # of several pictures behind the last block the last: it is pooled
            pending = [*taps.pop(before).blocks, *pending]
        elif before and not pending and _permutes(found, taps[before].found, tensor):
            # A stage that only permutes what its last block returns: timm's own name is kept.
            if featured_last and path not in featured:
                continue
            pending = [*taps.pop(before).blocks]
        taps["patch_embed" if stem else path] = _Tap(tensor, tuple(pending), final)
        pending, featured_last = [], path in featured
    return _with_halves(taps, found) if isinstance(model, VisionTransformer) else taps


def _with_halves(taps: Mapping[str, _Tap], found: Sequence[Found]) -> dict[str, _Tap]:
    """The stream between attention and MLP is given to the norm, or the MLP, behind it, and no module returns it."""
    given = {each.name: each for each in found if each.cut and each.place.side == "stream"}
    both: dict[str, _Tap] = {}
    for tap, each in taps.items():
        for name in (f"{tap}.{part}@in" for part in ("norm2", "mlp", "ffns.0")):
            if name in given:
                both[f"{tap}.attn"] = _Tap(replace(given[name], axes=each.found.axes), half=True)
        both[tap] = each
    return both


def _permuted(model: Any, path: str, shape: Sequence[int]) -> Axes | None:
    """Two architectures keep their tokens in another order than the grid's; timm's own functions say which."""
    from timm.models.nest import deblockify

    kind, number = type(model).__name__, path.split(".")[1:2]
    places = torch.arange(math.prod(shape[1:-1])).view(1, *shape[1:-1], 1)
    if kind == "Hiera" and len(shape) == 3:
        places = model.reroll(places, int(number[0]) if number else 0)
    elif kind == "Nest" and "transformer_encoder" in path:
        places = deblockify(places, model.levels[int(number[0])].block_size)
    else:
        return None
    return Axes("bnc", (places.shape[1], places.shape[2]), 0, tuple(places.flatten().tolist()))


def _permutes(found: Sequence[Found], before: Found, after: Found) -> bool:
    """The same tokens on other axes: no module but those around it has run since."""
    between = {one.place.module for one in found if before.order < one.order <= after.order and one.same != before.same}
    one, two = before.axes, after.axes
    if one is None or two is None or (one.grid, one.prefix, before.channels) != (two.grid, two.prefix, after.channels):
        return False
    moved = (one, before.shape) != (two, after.shape)
    return moved and all(_is_inside(before.place.module, {path}) for path in between)


def _is_inside(path: str, others: Collection[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)


def _any_inside(others: Collection[str], path: str) -> bool:
    return any(other.startswith(f"{path}.") for other in others)


def _outputs(found: Sequence[Found]) -> dict[str, list[Found]]:
    """For each module that runs once: the first tensor that is a cut, or, where only all together are one, all."""
    by_module: dict[str, list[Found]] = {}
    for each in found:
        each.batch = 0 if each.shape[:1] == (2,) else None
        if each.place.side == "output" and each.place.module:  # what the model itself returns is no representation
            by_module.setdefault(each.place.module, []).append(each)
    outputs = {}
    for path, returned in by_module.items():
        single = next((each.same for each in returned if each.cut), None)
        # What does not come from the images (same: -1) is the same in every pass.
        together = [e for e in returned if (e.with_companions and e.same >= 0 if single is None else e.same == single)]
        if together and not any(each.place.call for each in returned):
            outputs[path] = [*{each.same: each for each in reversed(together)}.values()][::-1]
    return outputs


def _is_part(model: nn.Module, path: str) -> bool:
    """Is it a block by its place: a numbered one among others, with modules of its own, outside of stem and head?

    Not one that lies deeper than a stage's blocks, nor one between plain layers, which make a block with it.
    """
    first, *inner = path.split(".")
    top = bool(NUMBERED_AT_THE_TOP.fullmatch(first))
    if not path or NO_BLOCKS.search(path) or not any(model.get_submodule(path).children()):
        return False
    if not inner:
        return top
    container = model.get_submodule(path.rpartition(".")[0])
    if not inner[-1].isdigit() or not isinstance(container, (nn.ModuleList, nn.Sequential)):
        return False
    siblings = [any(each.children()) for each in container.children()]
    return top + sum(each.isdigit() for each in inner) <= DEEPEST and 2 * sum(siblings) >= len(siblings)


def _featured(model: Any) -> set[str]:
    """Modules that timm itself names as the ends of stages."""
    described = getattr(model, "feature_info", None)
    described = described if isinstance(described, (list, tuple)) else getattr(described, "info", [])
    return {str(each["module"]) for each in described if each.get("module")}
