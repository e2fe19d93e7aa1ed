"""Every timm architecture with `forward_intermediates`: Swin, PVT, Hiera, ConvNeXt, PoolFormer, XCiT, CaiT, TNT, …

Nothing is said of single architectures here; what a model is made of is read off one observed pass:

    taps      outputs of modules through which everything goes (cuts, found exactly), and which are a picture:
              what enters the first block, every block, the ends of stages, the last norm on tokens
    axes      NCHW, NHWC, tokens behind prefix tokens, permuted tokens: found by value, where an output holds the same
              numbers as one of `forward_intermediates`; else from its neighbours, else from its shape
    the rest  the model's own pass on a blank image, with the tap's output put in (`playing`)

A *block* is a numbered child of a ModuleList or Sequential that has modules of its own and holds no other block; a
*stage* holds blocks. Where several modules return the same tensor (`stages.0`, `stages.0.blocks.1`), the tap has the
name in the model's `feature_info`, else that of the block, else the shortest. `patch_embed` is, as in a ViT, what
enters the first block, with position and class token. Where two streams run side by side and a module returns both
(TNT, CrossViT, HRNet), the tap's representation is the first, and the others travel in its context.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.representation import Grid, Tokens
from backsight.targets.axes import Axes, match, readings
from backsight.targets.base import PIXELS, Preprocessing, Size, Stage
from backsight.targets.discovered import Discovered
from backsight.targets.hooks import observe, recording
from backsight.targets.names import reason
from backsight.targets.survey import Seen, Survey, seen_in
from backsight.targets.vit import block_sizes

LOOKED_AT = 2  # images in an observed pass: with two, a batch axis is told from others
NUMBERED_AT_THE_TOP = re.compile(r"(?i)(block|stage|layer|level|cell|mixed)\w*\d\w*")
NO_BLOCKS = re.compile(r"(?i)stem|embed|downsample|head|pool|classifier")  # parts of these are no blocks
DEEPEST = 2  # numbers in a block's path: of its stage and its own
ATTENTION = re.compile(r"(?i)attention|attn|msa")
PASS_ERRORS = (RuntimeError, ValueError, AssertionError, TypeError, IndexError)  # of a model on unfit images


@dataclass(frozen=True)
class _Tap:
    """A module's output through which everything goes; one of `seen` may be a picture.

    blocks: that end here, since the last tap; final: it lies behind all blocks; featured: timm names it as the end of a
    stage.
    """

    name: str
    seen: list[Seen]
    blocks: tuple[str, ...]
    final: bool
    featured: bool


@dataclass(frozen=True)
class _Found:
    """What is known of an architecture, whatever its weights: kept for the next model of it.

    taps: with the one tensor that is the tap; axes: by the size of the images, or why it is refused.
    """

    survey: Survey
    taps: dict[str, _Tap]
    axes: dict[Size, dict[str, Axes] | str]


_KNOWN: dict[str, _Found] = {}  # by the model's signature and the size of its images


class TimmIntermediates(Discovered):
    """A timm model with `forward_intermediates`. Its output is logits (B, K), or features where it has no head.

    build: makes the same architecture again, with weights from the global generator.
    Raises BacksightError, with the reason, where no tap is found.
    """

    kind = "classifier"
    model: Any

    def __init__(
        self,
        model: nn.Module,
        name: str,
        weights: str,
        build: Callable[[], nn.Module],
        preprocessing: Preprocessing,
        classes: Sequence[str] | None = None,
        taps: str | Sequence[str] = "blocks",
    ) -> None:
        if not hasattr(model, "forward_intermediates"):
            raise BacksightError(
                f"{name} is a {type(model).__name__}, which has no forward_intermediates: use module_target() for it."
            )
        self.name, self.preprocessing, self._build = name, preprocessing, build
        self.model = self._put_to_rest(model)
        key = f"{_signature(model)} {preprocessing.size}"
        if key not in _KNOWN:
            _KNOWN[key] = self._find()
        self._found = _KNOWN[key]
        self._survey = self._found.survey
        self._chosen = {name: tap.seen[0] for name, tap in self._found.taps.items()}
        super().__init__(model, name, preprocessing, weights, classes, taps)

    # Taps and their axes

    def _find(self) -> _Found:
        """Every tap, in forward order, and how it is read at the model's own size; from two passes."""
        size, images = self.image_size, self._noise(self.image_size)
        try:
            seen = seen_in(observe(self.model, self.model, images, keep=True)[0])
            known = self._intermediates(images)
        except PASS_ERRORS as error:
            raise BacksightError(f"{self.name} cannot be a target: {reason(error)}.") from error
        taps = _candidates(self.model, seen)
        read = _read({tap.name: tap.seen for tap in taps}, known, size)
        # Of several pictures behind the last block only the last is a tap: what the pooling reads.
        finals = [tap.name for tap in taps if tap.final and tap.name in read]
        flat = {name for name in finals if read[name].form == "vector"}
        left_out = flat | set([name for name in finals if name not in flat][:-1])
        kept = [tap for tap in taps if tap.name in read.keys() - left_out]
        # A stage that only permutes what its last block returns holds the same tokens: timm's own name is kept.
        for before, after in pairwise(kept):
            if not after.blocks and _permutes(read[before.name], read[after.name]):
                left_out.add(after.name if before.featured and not after.featured else before.name)
        found: dict[str, _Tap] = {}
        pending: list[str] = []
        for tap in taps:
            pending += tap.blocks
            if tap in kept and tap.name not in left_out:
                found[tap.name] = replace(tap, blocks=tuple(pending), seen=[replace(read[tap.name], value=None)])
                pending = []
        if not found:
            raise BacksightError(
                f"{self.name} cannot be a target: no module of this {type(self.model).__name__} returns a picture "
                "through which everything goes that its output knows of the image."
            )
        survey = Survey(size, tuple(replace(each, value=None) for each in seen))
        return _Found(survey, found, {size: {name: cast(Axes, read[name].axes) for name in found}})

    def _noise(self, size: Size) -> Tensor:
        shape = (LOOKED_AT, len(self.preprocessing.mean), *size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)

    def _intermediates(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return self.model.forward_intermediates(images, norm=False, output_fmt="NCHW", intermediates_only=True)

    def _axes_at(self, size: Size) -> Mapping[str, Axes]:
        """Raises BacksightError, with the reason, where the model does not take images of this size."""
        known = self._found.axes
        if size not in known:
            try:
                known[size] = self._read_at(size)
            except PASS_ERRORS as error:
                known[size] = reason(error)
        axes = known[size]
        if isinstance(axes, str):
            raise BacksightError(
                f"{self.name} does not take images of {size} (height, width): {axes}; its own size is "
                f"{self.image_size}."
            )
        return axes

    def _read_at(self, size: Size) -> dict[str, Axes] | str:
        images, places = self._noise(size), {tap: seen.place for tap, seen in self._chosen.items()}
        with torch.no_grad(), recording(self.model, places) as there:
            self.model(images)
        values = {tap: [replace(s, value=there[tap], shape=tuple(there[tap].shape))] for tap, s in self._chosen.items()}
        read = _read(values, self._intermediates(images), size)
        lacking = [tap for tap in values if tap not in read]
        return f"{lacking[0]} holds no picture then" if lacking else {t: cast(Axes, s.axes) for t, s in read.items()}

    def _size_of(self, tap: str, tokens: Tokens) -> Size:
        for size, axes in self._found.axes.items():
            if isinstance(axes, dict) and (axes[tap].grid,) == tokens.grids:
                return size
        own, grid = self._axes_at(self.image_size)[tap].grid, tokens.grids[0]
        size = (self.image_size[0] * grid[0] // own[0], self.image_size[1] * grid[1] // own[1])
        if self._axes_at(size)[tap].grid != grid:
            raise BacksightError(f"No image size gives {tap} of {self.name} the grid {grid}.")
        return size

    @property
    def available_taps(self) -> tuple[str, ...]:
        return tuple(self._chosen)

    def tap_set(self, name: str) -> tuple[str, ...]:
        """ "fine" is "blocks": what lies inside a block differs from one architecture to the next."""
        taps, final = self.available_taps, {tap: found.final for tap, found in self._found.taps.items()}
        if name != "components":
            return taps
        # A norm behind the last block belongs to no stage, but a projection to other channels is a component.
        *_, last = [tap for tap in taps if not final[tap]] or [taps[0]]
        inner = [tap for tap in taps[1:] if not final[tap] or self._form(tap)[:2] != self._form(last)[:2]]
        ends = [tap for tap, after in pairwise(inner) if self._form(tap) != self._form(after)]
        return (taps[0], *ends, *inner[-1:])

    def _form(self, tap: str) -> tuple[Grid, int, int]:
        """Grid, channels and prefix tokens at the model's own size."""
        axes = cast(Axes, self._chosen[tap].axes)
        return axes.grid, self._chosen[tap].channels, axes.prefix

    @property
    def reduction(self) -> Size:
        first = self._form(self.available_taps[0])[0]
        return max(1, round(self.image_size[0] / first[0])), max(1, round(self.image_size[1] / first[1]))

    def check_size(self, size: Size) -> None:
        self._axes_at((size[0], size[1]))

    def stage(self, tap: str, previous: str) -> Stage:
        self._refuse_order(tap, previous)
        order = self.available_taps
        start = 0 if previous == PIXELS else order.index(previous) + 1
        blocks = [block for each in order[start : order.index(tap) + 1] for block in self._found.taps[each].blocks]
        modules = [self.model.get_submodule(block) for block in blocks]
        heads, hidden = max(map(block_sizes, modules), default=(0, 0))
        if previous == PIXELS:
            return Stage("patch_embedding", len(blocks), heads, hidden)
        if not blocks:
            same = self._form(tap)[:2] == self._form(previous)[:2]
            return Stage("norm", 0, 0, 0) if same else Stage("convolution", 1, 0, 0)
        attends = heads or any(ATTENTION.search(type(part).__name__) for each in modules for part in each.modules())
        return Stage("blocks" if attends else "convolution", len(blocks), heads, hidden)

    def _randomised(self) -> nn.Module:
        return self._build()


def _signature(model: nn.Module) -> str:
    """Equal for two models of the same architecture: every module's class, plain attributes and shapes."""
    parts = []
    for path, module in model.named_modules():
        plain = {
            k: v for k, v in vars(module).items() if k != "training" and isinstance(v, int | float | str | bool | tuple)
        }
        parts.append(
            (path, type(module), sorted(plain.items()), [tuple(p.shape) for p in module.parameters(recurse=False)])
        )
    return repr(parts)


# How a tensor is read


def _read(taps: Mapping[str, Sequence[Seen]], known: Sequence[Tensor], size: Size) -> dict[str, Seen]:
    """Of each tap the first tensor that is a picture, with its axes; those that have one."""
    values = [[(each, each.value) for each in seen if each.value is not None] for seen in taps.values()]
    pairs = [((each, match(value, other)) for each, value in pair for other in known) for pair in values]
    matched = [next((replace(each, axes=axes) for each, axes in pair if axes is not None), None) for pair in pairs]
    read = {}
    for index, (tap, seen) in enumerate(taps.items()):
        # A block has the axes of its stage, which follows; what lies behind the last stage those before it.
        around = [each for each in (*matched[index + 1 :], *reversed(matched[:index])) if each is not None]
        guesses = [replace(each, axes=guess(each.shape, around, size)) for each in seen if matched[index] is None]
        if chosen := matched[index] or next((each for each in guesses if each.axes is not None), None):
            read[tap] = chosen
    return read


def guess(shape: Sequence[int], around: Sequence[Seen], size: Size) -> Axes | None:
    """The likeliest axes of a tensor that is none of the intermediates; around: of taps nearby, the nearest first."""
    if shape[0] != LOOKED_AT or len(shape) not in (3, 4):
        return None
    nearby = [(each.shape[1:], cast(Axes, each.axes), each.channels) for each in around]
    if same := [axes for own, axes, _ in nearby if own == tuple(shape[1:])]:
        return same[0]
    likely = [axes for axes in readings(shape, 0, size) if axes.grid != (1, 1)]
    if len(shape) == 4:
        forms, orders = [(axes.grid, channels) for _, axes, channels in nearby], [axes.order for _, axes, _ in nearby]
        return max(likely, key=lambda a: ((a.grid, a.channels(shape)) in forms, a.order in orders[:1]), default=None)
    grids = dict.fromkeys(axes.grid for _, axes, _ in nearby if axes.grid != (1, 1))
    known = [each[0] for grid in grids if (each := [a for a in readings(shape, 0, size, grid=grid) if a.prefix <= 16])]
    if known:
        return min(known, key=lambda axes: axes.prefix)
    # By the shape alone, channels before tokens are not believed: PiT's class token has as many channels as a grid
    # could have tokens.
    return next((axes for axes in likely if axes.order == "bnc"), None)


def _permutes(one: Seen, other: Seen) -> bool:
    """The same tokens on other axes. (On the same axes, it is a block whose weights are still zero.)"""
    if one.value is None or other.value is None or (one.axes, one.shape) == (other.axes, other.shape):
        return False
    tokens, others = (cast(Axes, each.axes).tokens(cast(Tensor, each.value)) for each in (one, other))
    return tokens.signature == others.signature and torch.equal(tokens.values, others.values)


# What is a tap


def _candidates(model: nn.Module, seen: Sequence[Seen]) -> list[_Tap]:
    """Cuts that may be taps, in forward order.

    A module that runs several times in a pass is none: its name would not say which of its outputs is meant.
    """
    outputs = list(_outputs(seen))
    ends = {each.place.module: each.order for each in seen if each.place.side == "output"}
    cut = {found[0].place.module for found in outputs}
    parts = {path for path in ends if _is_part(model, path)}
    blocks = {path for path in parts & cut if not any(_inside(other, path) for other in parts & cut)}
    # Parts that are no cuts, as CaiT's class attention beside the tokens: no taps, but they count as depth.
    beside = {path for path in parts - cut if not any(_inside(path, each) or _inside(each, path) for each in blocks)}
    beside = {path for path in beside if not any(_inside(path, each) for each in beside)}
    featured = _featured(model) & cut
    stages = {path for path in cut if any(_inside(block, path) for block in blocks)} | featured

    units = blocks or featured or cut
    inner = [order for path, order in ends.items() if any(path == unit or _inside(path, unit) for unit in units)]
    begin, end = (min(inner), max(inner)) if inner else (0, 0)
    entering = [found[0].order for found in outputs if found[0].order < begin][-1:]
    groups: dict[tuple[int, ...], dict[str, list[Seen]]] = {}  # by the tensors: {path: what it returns}
    for found in outputs:
        groups.setdefault(tuple(each.same for each in found), {})[found[0].place.module] = found

    taps, last = [], -1.0
    for group in groups.values():
        orders = [found[0].order for found in group.values()]
        is_stem, of_block = any(order in entering for order in orders), bool(group.keys() & (blocks | stages))
        final = orders[0] > end and not of_block
        if not (is_stem or final or of_block):
            continue
        path = min(group, key=lambda path: (path not in featured, path not in blocks, path.count(".")))
        stem = is_stem and not final and path not in blocks | stages and hasattr(model, "patch_embed")
        # A block's last activation returns its tensor before the block itself has ended.
        ended = tuple(unit for unit in blocks | beside if last < ends[unit] <= orders[-1])
        used = [each for each in group[path] if each.used or len(group[path]) == 1]
        taps.append(_Tap("patch_embed" if stem else path, used, ended, final, path in featured))
        last = orders[-1]
    return taps


def _outputs(seen: Sequence[Seen]) -> Iterator[list[Seen]]:
    """For each module that runs once: the first tensor that is a cut, or, where only all together are one, all."""
    by_module: dict[str, list[Seen]] = {}
    for each in seen:
        if each.place.side == "output":
            by_module.setdefault(each.place.module, []).append(each)
    for path, returned in by_module.items():
        single = next((each.same for each in returned if each.cut), None)
        # What does not come from the images (same: -1) is the same in every pass.
        together = [e for e in returned if (e.with_companions and e.same >= 0 if single is None else e.same == single)]
        found = list({each.same: each for each in reversed(together)}.values())[::-1]
        # The model itself returns its output, which is no representation.
        if found and path and not any(each.place.call for each in returned):
            yield found


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


def _inside(path: str, other: str) -> bool:
    return path.startswith(f"{other}.")
