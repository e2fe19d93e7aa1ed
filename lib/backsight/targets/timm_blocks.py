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
from backsight.targets.survey import Seen, Survey, seen_in

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
    seen: tuple[Seen, ...]
    blocks: tuple[str, ...]
    final: bool
    featured: bool


@dataclass(frozen=True)
class _Found:
    """What is known of an architecture, whatever its weights: kept for the next model of it."""

    survey: Survey
    chosen: dict[str, Seen]
    taps: dict[str, _Tap]
    axes: dict[Size, dict[str, Axes]]
    refused: dict[Size, str]


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
        self._survey, self._chosen = self._found.survey, self._found.chosen
        super().__init__(model, name, preprocessing, weights, classes, taps)

    # Taps and their axes

    def _find(self) -> _Found:
        """Every tap, in forward order, and how it is read at the model's own size; from two passes."""
        size = self.image_size
        images = torch.randn(LOOKED_AT, len(self.preprocessing.mean), *size, generator=torch.Generator().manual_seed(0))
        try:
            calls = observe(self.model, self.model, images.to(self.device, self.dtype), keep=True).calls
            known = self._intermediates(images)
        except PASS_ERRORS as error:
            raise BacksightError(f"{self.name} cannot be a target: {_reason(error)}.") from error
        seen = seen_in(calls, self.model)
        taps = _candidates(self.model, seen, len(calls))
        chosen = dict(zip([tap.name for tap in taps], _read([tap.seen for tap in taps], known, size), strict=True))
        read = {name: each for name, each in chosen.items() if each is not None}
        # Of several pictures behind the last block only the last is a tap: what the pooling reads.
        finals = [tap.name for tap in taps if tap.final and tap.name in read]
        flat = {name for name in finals if read[name].form == "vector"}
        left_out = flat | set([name for name in finals if name not in flat][:-1])
        kept = [tap for tap in taps if tap.name in read and tap.name not in left_out]
        # A stage that only permutes what its last block returns holds the same tokens: timm's own name is kept.
        for before, after in pairwise(kept):
            if not after.blocks and _permutes(read[before.name], read[after.name]):
                left_out.add(after.name if before.featured and not after.featured else before.name)
        found: dict[str, _Tap] = {}
        pending: list[str] = []
        for tap in taps:
            pending += tap.blocks
            if tap in kept and tap.name not in left_out:
                found[tap.name] = replace(tap, blocks=tuple(pending))
                pending = []
        if not found:
            raise BacksightError(
                f"{self.name} cannot be a target: no module of this {type(self.model).__name__} returns a picture "
                "through which everything goes that its output knows of the image."
            )
        survey = Survey(size, tuple(_without_value(each) for each in seen))
        axes = {name: cast(Axes, read[name].axes) for name in found}
        return _Found(survey, {name: _without_value(read[name]) for name in found}, found, {size: axes}, {})

    def _intermediates(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return self.model.forward_intermediates(
                images.to(self.device, self.dtype), norm=False, output_fmt="NCHW", intermediates_only=True
            )

    def _axes_at(self, size: Size) -> Mapping[str, Axes]:
        """Raises BacksightError, with the reason, where the model does not take images of this size."""
        axes, refused = self._found.axes, self._found.refused
        if size not in axes and size not in refused:
            shape = (LOOKED_AT, len(self.preprocessing.mean), *size)
            images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)
            places = {tap: seen.place for tap, seen in self._chosen.items()}
            try:
                with torch.no_grad(), recording(self.model, places) as there:
                    self.model(images)
                values = {
                    tap: replace(s, value=there[tap], shape=tuple(there[tap].shape)) for tap, s in self._chosen.items()
                }
                read = dict(
                    zip(values, _read([(s,) for s in values.values()], self._intermediates(images), size), strict=True)
                )
                if lacking := [tap for tap, each in read.items() if each is None]:
                    refused[size] = f"{lacking[0]} holds no picture then"
                else:
                    axes[size] = {tap: cast(Axes, cast(Seen, each).axes) for tap, each in read.items()}
            except PASS_ERRORS as error:
                refused[size] = _reason(error)
        if size in refused:
            raise BacksightError(
                f"{self.name} does not take images of {size} (height, width): {refused[size]}; "
                f"its own size is {self.image_size}."
            )
        return axes[size]

    def _size_of(self, tap: str, tokens: Tokens) -> Size:
        for size, axes in self._found.axes.items():
            if (axes[tap].grid,) == tokens.grids:
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
        taps = self.available_taps
        if name != "components":
            return taps
        # A norm behind the last block belongs to no stage, but a projection to other channels is a component.
        *_, last = [tap for tap in taps if not self._found.taps[tap].final] or [taps[0]]
        inner = [t for t in taps[1:] if not self._found.taps[t].final or self._form(t)[:2] != self._form(last)[:2]]
        ends = [
            t
            for t, after in zip(inner, [*inner[1:], ""], strict=True)
            if not after or self._form(t) != self._form(after)
        ]
        return (taps[0], *ends)

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
        heads, hidden = max((_block_sizes(module) for module in modules), default=(0, 0))
        if previous == PIXELS:
            return Stage("patch_embedding", len(blocks), heads, hidden)
        if not blocks:
            same = self._form(tap)[:2] == self._form(previous)[:2]
            return Stage("norm", 0, 0, 0) if same else Stage("convolution", 1, 0, 0)
        attends = heads or any(ATTENTION.search(type(part).__name__) for each in modules for part in each.modules())
        return Stage("blocks" if attends else "convolution", len(blocks), heads, hidden)

    def _forward(self, images: Tensor, padding: Tensor | None) -> Tensor:
        self._refuse_padding(padding)
        return self.model(images)

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


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160].rstrip(".") if str(error) else type(error).__name__


def _without_value(seen: Seen) -> Seen:
    return replace(seen, value=None)


# How a tensor is read


def _read(taps: Sequence[Sequence[Seen]], known: Sequence[Tensor], size: Size) -> list[Seen | None]:
    """Of each tap the first tensor that is a picture, with its axes; None where there is none."""
    matched = [_first(seen, lambda each: _match_any(each, known)) for seen in taps]
    read = []
    for index, seen in enumerate(taps):
        # A block has the axes of its stage, which follows; what lies behind the last stage those before it.
        around = [each for each in (*matched[index + 1 :], *reversed(matched[:index])) if each is not None]
        read.append(matched[index] or _first(seen, lambda each, around=around: guess(each.shape, around, size)))  # type: ignore[misc]
    return read


def _first(seen: Sequence[Seen], reader: Callable[[Seen], Axes | None]) -> Seen | None:
    for each in seen:
        if (axes := reader(each)) is not None:
            return replace(each, axes=axes)
    return None


def _match_any(seen: Seen, known: Sequence[Tensor]) -> Axes | None:
    found = (None if seen.value is None else match(seen.value, each) for each in known)
    return next((axes for axes in found if axes is not None), None)


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
        likely = [axes for axes in likely if _keeps_aspect(axes.grid, size)]
        return max(likely, key=lambda a: ((a.grid, a.channels(shape)) in forms, a.order in orders[:1]), default=None)
    grids = dict.fromkeys(axes.grid for _, axes, _ in nearby if axes.grid != (1, 1))
    known = [each[0] for grid in grids if (each := [a for a in readings(shape, 0, size, grid=grid) if a.prefix <= 16])]
    if known:
        return min(known, key=lambda axes: axes.prefix)
    # By the shape alone, channels before tokens are not believed: PiT's class token has as many channels as a grid
    # could have tokens.
    return next((axes for axes in likely if axes.order == "bnc"), None)


def _keeps_aspect(grid: Grid, size: Size) -> bool:
    """Has the grid the proportions of the image, to a cell? (MobileViT's tokens in patches have not.)"""
    return abs(grid[0] * size[1] - grid[1] * size[0]) <= max(size)


def _permutes(one: Seen, other: Seen) -> bool:
    """The same tokens on other axes. (On the same axes, it is a block whose weights are still zero.)"""
    if one.value is None or other.value is None or (one.axes, one.shape) == (other.axes, other.shape):
        return False
    tokens, others = (cast(Axes, each.axes).tokens(cast(Tensor, each.value)) for each in (one, other))
    return tokens.signature == others.signature and torch.equal(tokens.values, others.values)


# What is a tap


@dataclass(frozen=True)
class _Output:
    """What a module that runs once returns, as far as it is a cut; tensors: their numbers in the observed pass."""

    path: str
    order: float
    seen: tuple[Seen, ...]
    tensors: tuple[int, ...]


def _candidates(model: nn.Module, seen: Sequence[Seen], calls: int) -> list[_Tap]:
    """Cuts that may be taps, in forward order.

    A module that runs several times in a pass is none: its name would not say which of its outputs is meant.
    """
    outputs = list(_outputs(seen))
    ends = {each.place.module: each.order for each in seen if each.place.side == "output"}
    cut = {each.path for each in outputs}
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
    entering = [each.order for each in outputs if each.order < begin][-1:]
    groups: dict[tuple[int, ...], list[_Output]] = {}
    for each in outputs:
        groups.setdefault(each.tensors, []).append(each)

    taps, last = [], -1.0
    for group in groups.values():
        order, names = group[0].order, [each.path for each in group]
        is_stem = any(each.order in entering for each in group)
        of_block = any(name in blocks | stages for name in names)
        final = order > end and not of_block
        if not (is_stem or final or of_block):
            continue
        module = min(group, key=lambda each: (each.path not in featured, each.path not in blocks, each.path.count(".")))
        name = module.path
        if is_stem and not final and name not in blocks | stages and hasattr(model, "patch_embed"):
            name = "patch_embed"
        # A block's last activation returns its tensor before the block itself has ended.
        ended = tuple(unit for unit in blocks | beside if last < ends[unit] <= group[-1].order)
        taps.append(_Tap(name, module.seen, ended, final, module.path in featured))
        last = group[-1].order
    return taps


def _outputs(seen: Sequence[Seen]) -> Iterator[_Output]:
    """For each module that runs once: the first tensor that is a cut, or, where only all of them together are one, all
    that the output knows of."""
    by_module: dict[str, list[Seen]] = {}
    for each in seen:
        if each.place.side == "output":
            by_module.setdefault(each.place.module, []).append(each)
    for path, returned in by_module.items():
        single = next((each.same for each in returned if each.cut), None)
        # What does not come from the images (same: -1) is the same in every pass.
        together = [e for e in returned if (e.with_companions and e.same >= 0 if single is None else e.same == single)]
        found = list({each.same: each for each in reversed(together)}.values())[::-1]
        if not found or not path or any(each.place.call for each in returned):
            continue  # the model itself returns its output, which is no representation
        used = [each for each in found if each.used] if len(found) > 1 else found
        yield _Output(path, found[0].order, tuple(used), tuple(each.same for each in found))


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


# What a block is made of


def _heads(module: nn.Module) -> list[int]:
    """Attention heads, as its modules call them."""
    named = (getattr(each, name, None) for each in module.modules() for name in ("num_heads", "heads"))
    return [each for each in named if isinstance(each, int)]


def _block_sizes(module: nn.Module) -> tuple[int, int]:
    """(attention heads, MLP width), 0 where a block says neither, and the largest where it says several."""
    layers = [getattr(each, "fc2", None) for each in module.modules()]
    widths = [getattr(each, "in_features", getattr(each, "in_channels", 0)) for each in layers]
    return max(_heads(module), default=0), max((each for each in widths if isinstance(each, int)), default=0)
