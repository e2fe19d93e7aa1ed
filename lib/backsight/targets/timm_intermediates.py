"""Every timm architecture with `forward_intermediates`: Swin, PVT, Hiera, ConvNeXt, PoolFormer, XCiT, CaiT, TNT, …

Nothing is said of single architectures here; what a model is made of is read off one observed pass:

    taps      outputs of modules through which everything goes (cuts, found exactly), and which are a picture:
              what enters the first block, every block, the ends of stages, the last norm on tokens
    layout    NCHW, NHWC, tokens behind prefix tokens, permuted tokens: found by value, where an output holds the same
              numbers as one of `forward_intermediates`; else from its neighbours, else from its shape
    the rest  the model's own pass on a blank image, with the tap's output put in (`playing`)

A *block* is a numbered child of a ModuleList or Sequential that has modules of its own and holds no other block; a
*stage* holds blocks. Where several modules return the same tensor (`stages.0`, `stages.0.blocks.1`), the tap has the
name in the model's `feature_info`, else that of the block, else the shortest. `patch_embed` is, as in a ViT, what
enters the first block, with position and class token. Where two streams run side by side and a module returns both
(TNT, CrossViT, HRNet), the tap's representation is the first, and the others travel in its context.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.representation import Grid, Representation, Tokens
from backsight.targets.axes import LARGEST_PREFIX, Axes, guess_axes
from backsight.targets.base import PIXELS, Preprocessing, Size, Stage, Target
from backsight.targets.hooks import Call, Element, Place, observe, playing, recording

LOOKED_AT = 2  # images in an observed pass: with two, a batch axis is told from others
NUMBERED_AT_THE_TOP = re.compile(r"(?i)(block|stage|layer|level|cell|mixed)\w*\d\w*")
NO_BLOCKS = re.compile(r"(?i)stem|embed|downsample|head|pool|classifier")  # parts of these are no blocks
DEEPEST = 2  # numbers in a block's path: of its stage and its own
ATTENTION = re.compile(r"(?i)attention|attn|msa")
PASS_ERRORS = (RuntimeError, ValueError, AssertionError, TypeError, IndexError)  # of a model on unfit images
EQUAL = 1e-5  # of the largest value: the same numbers, from two passes


@dataclass(frozen=True)
class Layout:
    """How a tensor is read. shape: its own, without the batch; axes: of the tensor, or of the (B, tokens, channels)
    that it becomes where it has more axes (Nest keeps its tokens in (B, windows, tokens, channels))."""

    shape: tuple[int, ...]
    axes: Axes

    @property
    def form(self) -> tuple[Grid, int, int]:
        """Grid, channels, prefix tokens."""
        channels = self.shape[0] if self.axes.order in ("bchw", "bcn") else self.shape[-1]
        return self.axes.grid, channels, self.axes.prefix

    def tokens(self, tensor: Tensor) -> Tokens:
        """(B, *shape) in canonical form."""
        return self.axes.tokens(tensor.flatten(1, -2) if tensor.ndim != len(self.axes.order) else tensor)

    def tensor(self, tokens: Tokens) -> Tensor:
        """(B, *shape)."""
        return self.axes.tensor(tokens).reshape(tokens.batch, *self.shape)


@dataclass(frozen=True)
class Read:
    """A tensor of the observed pass, at its place, and how it is read."""

    place: Place
    layout: Layout
    tensor: Tensor

    def permutes(self, other: Read) -> bool:
        """The same tokens on other axes. (On the same axes, it is a block whose weights are still zero.)"""
        tokens, others = self.layout.tokens(self.tensor), other.layout.tokens(other.tensor)
        same = tokens.signature == others.signature and torch.equal(tokens.values, others.values)
        return same and self.layout != other.layout


@dataclass(frozen=True)
class Tap:
    """module: whose output is the tap; element: of that output; beside: its other elements, where only all of them
    together are what the rest of the pass knows (TNT's pixel embeddings); copies: for each of these, further elements
    that are the very same tensor; blocks: that end here, since the last tap; final: it lies behind all blocks.
    """

    name: str
    module: str
    element: Element
    beside: tuple[Element, ...]
    copies: Mapping[Element, tuple[Element, ...]]
    blocks: tuple[str, ...]
    final: bool

    def places(self, element: Element) -> list[Place]:
        """Of an element and its copies."""
        return [Place(self.module, 0, each) for each in (element, *self.copies.get(element, ()))]


class TimmIntermediates(Target):
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
        # Layouts and refusals depend on the architecture alone, so that copies of the target may share them.
        self._layouts: dict[Size, dict[str, Layout]] = {}
        self._refused: dict[Size, str] = {}
        self._found = self._find()
        super().__init__(model, name, preprocessing, weights, classes, taps)

    # Taps and their layouts

    def _find(self) -> dict[str, Tap]:
        """Every tap, in forward order; their layouts at the model's own size are kept."""
        size = self.image_size
        try:
            calls = observe(self.model, self._output, self._looked_at(size)).calls
            candidates = _candidates(self.model, calls)
            places = {each.name: [Place(each.module, 0, element) for element in each.elements] for each in candidates}
            used = {(call.path, found.element) for call in calls for found in call.found if found.used}
            places = {
                tap: [each for each in several if len(several) == 1 or (each.module, each.element) in used]
                for tap, several in places.items()
            }
            read = self._read(places, size)
        except PASS_ERRORS as error:
            raise BacksightError(f"{self.name} cannot be a target: {_reason(error)}.") from error
        # Of several pictures behind the last block only the last is a tap: what the pooling reads.
        finals = [each.name for each in candidates if each.final and each.name in read]
        flat = {name for name in finals if read[name].layout.axes.grid == (1, 1)}
        left_out = flat | set([name for name in finals if name not in flat][:-1])
        kept = [each for each in candidates if each.name in read and each.name not in left_out]
        # A stage that only permutes what its last block returns holds the same tokens: timm's own name is kept.
        for before, after in pairwise(kept):
            if not after.blocks and read[before.name].permutes(read[after.name]):
                left_out.add(after.name if before.featured and not after.featured else before.name)
        found: dict[str, Tap] = {}
        self._layouts[size] = {}
        pending: list[str] = []
        for each in candidates:
            pending += each.blocks
            if each not in kept or each.name in left_out:
                continue
            place, self._layouts[size][each.name] = read[each.name].place, read[each.name].layout
            beside = tuple(element for element in each.elements if element != place.element)
            found[each.name] = Tap(
                each.name, each.module, place.element, beside, each.copies, tuple(pending), each.final
            )
            pending = []
        if not found:
            raise BacksightError(
                f"{self.name} cannot be a target: no module of this {type(self.model).__name__} returns a picture "
                "through which everything goes that its output knows of the image."
            )
        return found

    def _looked_at(self, size: Size) -> Tensor:
        """Random images as the model sees them; the same ones every time."""
        shape = (LOOKED_AT, len(self.preprocessing.mean), *size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def _read(self, places: Mapping[str, Sequence[Place]], size: Size) -> dict[str, Read]:
        """Those taps that are pictures: the first of their places that is one, what is there, and how it is read."""
        images = self._looked_at(size)
        wanted = {f"{tap}:{number}": place for tap in places for number, place in enumerate(places[tap])}
        with torch.no_grad():
            with recording(self.model, wanted) as seen:
                self.model(images)
            known = self.model.forward_intermediates(images, norm=False, output_fmt="NCHW", intermediates_only=True)
        tensors = {
            tap: [(place, seen[f"{tap}:{number}"]) for number, place in enumerate(places[tap])] for tap in places
        }
        matched = {tap: _first(there, lambda tensor: _match_any(tensor, known)) for tap, there in tensors.items()}
        read: dict[str, Read] = {}
        order = list(places)
        for index, tap in enumerate(order):
            # A block has the layout of its stage, which follows; what lies behind the last stage that before it.
            around = [matched[each] for each in (*order[index + 1 :], *reversed(order[:index]))]
            layouts = [found.layout for found in around if found is not None]
            guessed = functools.partial(_guess, around=layouts, size=size)
            if found := matched[tap] or _first(tensors[tap], guessed):
                read[tap] = found
        return read

    def _layouts_at(self, size: Size) -> dict[str, Layout]:
        """Raises BacksightError, with the reason, where the model does not take images of this size."""
        if size not in self._layouts and size not in self._refused:
            try:
                read = self._read({tap.name: tap.places(tap.element)[:1] for tap in self._found.values()}, size)
                if lacking := [tap for tap in self._found if tap not in read]:
                    self._refused[size] = f"{lacking[0]} holds no picture then"
                else:
                    self._layouts[size] = {tap: found.layout for tap, found in read.items()}
            except PASS_ERRORS as error:
                self._refused[size] = _reason(error)
        if size in self._refused:
            raise BacksightError(
                f"{self.name} does not take images of {size} (height, width): {self._refused[size]}; "
                f"its own size is {self.image_size}."
            )
        return self._layouts[size]

    def _size_of(self, tap: str, tokens: Tokens) -> Size:
        """Of images whose tokens at the tap lie on this grid."""
        for size, layouts in self._layouts.items():
            if (layouts[tap].axes.grid,) == tokens.grids:
                return size
        own, grid = self._layouts[self.image_size][tap].axes.grid, tokens.grids[0]
        size = (self.image_size[0] * grid[0] // own[0], self.image_size[1] * grid[1] // own[1])
        if self._layouts_at(size)[tap].axes.grid != grid:
            raise BacksightError(f"No image size gives {tap} of {self.name} the grid {grid}.")
        return size

    @property
    def available_taps(self) -> tuple[str, ...]:
        return tuple(self._found)

    def tap_set(self, name: str) -> tuple[str, ...]:
        """ "fine" is "blocks": what lies inside a block differs from one architecture to the next."""
        if name != "components":
            return self.available_taps
        first, *_ = self.available_taps
        # A norm behind the last block belongs to no stage, but a projection to other channels is a component.
        forms = {tap: self._form(tap) for tap in self.available_taps}
        *_, last = [tap for tap in self.available_taps if not self._found[tap].final] or [first]
        inner = [t for t in self.available_taps[1:] if not self._found[t].final or forms[t][:2] != forms[last][:2]]
        following = [*inner[1:], ""]
        ends = [tap for tap, after in zip(inner, following, strict=False) if forms[tap] != forms.get(after)]
        return (first, *ends)

    def _form(self, tap: str) -> tuple[Grid, int, int]:
        """Grid, channels and prefix tokens at the model's own size."""
        return self._layouts[self.image_size][tap].form

    @property
    def reduction(self) -> Size:
        first = self._layouts[self.image_size][self.available_taps[0]].axes.grid
        return max(1, round(self.image_size[0] / first[0])), max(1, round(self.image_size[1] / first[1]))

    def check_size(self, size: Size) -> None:
        self._layouts_at((size[0], size[1]))

    def stage(self, tap: str, previous: str) -> Stage:
        self._refuse_order(tap, previous)
        order = self.available_taps
        start = 0 if previous == PIXELS else order.index(previous) + 1
        blocks = [block for each in order[start : order.index(tap) + 1] for block in self._found[each].blocks]
        modules = [self.model.get_submodule(block) for block in blocks]
        heads, hidden = max((_block_sizes(module) for module in modules), default=(0, 0))
        attends = any(_attends(module) for module in modules)
        if previous == PIXELS:
            return Stage("patch_embedding", len(blocks), heads, hidden)
        if not blocks:
            same = self._form(tap)[:2] == self._form(previous)[:2]
            return Stage("norm", 0, 0, 0) if same else Stage("convolution", 1, 0, 0)
        return Stage("blocks" if attends else "convolution", len(blocks), heads, hidden)

    # Passes

    def _places(self, taps: Sequence[str]) -> dict[str, Place]:
        return {
            f"{tap}{_key(element)}": Place(self._found[tap].module, 0, element)
            for tap in taps
            for element in (self._found[tap].element, *self._found[tap].beside)
        }

    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        layouts = self._layouts_at((images.shape[2], images.shape[3]))
        recorded: dict[str, Representation] = {}
        for tap in taps:
            found = self._found[tap]
            tokens = layouts[tap].tokens(seen[tap + _key(found.element)])
            # Images first, because TNT keeps the pixels of all patches of all images on one axis.
            context = {_key(each): seen[tap + _key(each)].unflatten(0, (len(images), -1)) for each in found.beside}
            recorded[tap] = Tokens(tokens.values, tokens.grids, tokens.prefix, context=context)
        return recorded

    def _forward(self, images: Tensor, padding: Tensor | None) -> Tensor:
        if padding is not None and bool(padding.any()):
            raise BacksightError(
                f"{self.name} has no attention mask, so padded pixels would count as picture: "
                "crop or stretch the images instead of padding them."
            )
        return self._output(images)

    def _output(self, images: Tensor) -> Tensor:
        return self.model(images)

    def _rest(self, tap: str, representation: Any) -> Tensor:
        found = self._found[tap]
        channels = self._form(tap)[1]
        fits = isinstance(representation, Tokens) and len(representation.grids) == 1
        if not fits or representation.channels != channels:
            raise BacksightError(
                f"{tap} of {self.name} holds tokens of {channels} channels on one grid, not a representation "
                f"{representation.signature}."
            )
        size = self._size_of(tap, representation)
        layout = self._layouts_at(size)[tap]
        if representation.prefix != layout.axes.prefix:
            raise BacksightError(
                f"{tap} of {self.name} has {layout.axes.prefix} prefix tokens, not {representation.prefix}."
            )
        if lacking := [_key(each) for each in found.beside if _key(each) not in representation.context]:
            raise BacksightError(
                f"What lies behind {tap} of {self.name} also reads {', '.join(lacking)}: keep the tokens' context."
            )
        tensors = {each: representation.context[_key(each)].flatten(0, 1) for each in found.beside}
        tensors[found.element] = layout.tensor(representation)
        values = {place: tensor for element, tensor in tensors.items() for place in found.places(element)}
        blank = representation.values.new_zeros(representation.batch, len(self.preprocessing.mean), *size)
        with playing(self.model, values):
            return self._output(blank)

    def _randomised(self) -> nn.Module:
        return self._build()


def _key(element: Element) -> str:
    """The name, in a context, of an element of an output."""
    return "output " + ".".join(str(each) for each in element)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160].rstrip(".") if str(error) else type(error).__name__


# What is a tap


@dataclass(frozen=True)
class _Candidate:
    """A module's output through which everything goes; one of `elements` may be a picture.

    blocks: that end here, since the last candidate; final: it lies behind all blocks; featured: timm names it as the
    end of a stage.
    """

    name: str
    module: str
    elements: tuple[Element, ...]
    copies: Mapping[Element, tuple[Element, ...]]
    blocks: tuple[str, ...]
    final: bool
    featured: bool


@dataclass(frozen=True)
class _Output:
    """What a module that runs once returns, as far as it is a cut.

    elements: each with others that are the same tensor; tensors: their numbers in the observed pass.
    """

    path: str
    index: int
    elements: Mapping[Element, list[Element]]
    tensors: tuple[int, ...]


def _candidates(model: nn.Module, calls: Sequence[Call]) -> list[_Candidate]:
    """Cuts that may be taps, in forward order.

    A module that runs several times in a pass is none: its name would not say which of its outputs is meant.
    """
    runs = Counter(call.path for call in calls)
    outputs = [each for index, call in enumerate(calls) if runs[call.path] == 1 for each in _outputs(call, index)]
    cut = {each.path for each in outputs}
    parts = {path for path in runs if _is_part(model, path)}
    blocks = {path for path in parts & cut if not any(_inside(other, path) for other in parts & cut)}
    # Parts that are no cuts, as CaiT's class attention beside the tokens: no taps, but they count as depth.
    beside = {path for path in parts - cut if not any(_inside(path, each) or _inside(each, path) for each in blocks)}
    beside = {path for path in beside if not any(_inside(path, each) for each in beside)}
    featured = _featured(model) & cut
    stages = {path for path in cut if any(_inside(block, path) for block in blocks)} | featured

    units = blocks or featured or cut
    inner = [index for index, call in enumerate(calls) if any(_at(call.path, unit) for unit in units)]
    begin, end = (inner[0], inner[-1]) if inner else (0, 0)
    entering = [each.index for each in outputs if each.index < begin][-1:]
    groups: dict[tuple[int, ...], list[_Output]] = {}
    for each in outputs:
        groups.setdefault(each.tensors, []).append(each)

    ends = {call.path: index for index, call in enumerate(calls)}
    candidates, last = [], -1
    for group in groups.values():
        index, names = group[0].index, [each.path for each in group]
        is_stem = any(each.index in entering for each in group)
        final = index > end and not any(name in blocks | stages for name in names)
        if not (is_stem or final or any(name in blocks | stages for name in names)):
            continue
        module = min(group, key=lambda each: (each.path not in featured, each.path not in blocks, each.path.count(".")))
        name = module.path
        if is_stem and not final and name not in blocks | stages and hasattr(model, "patch_embed"):
            name = "patch_embed"
        # A block's last activation returns its tensor before the block itself has ended.
        ended = tuple(unit for unit in blocks | beside if last < ends[unit] <= group[-1].index)
        elements, copies = tuple(module.elements), {first: tuple(others) for first, others in module.elements.items()}
        candidates.append(_Candidate(name, module.path, elements, copies, ended, final, module.path in featured))
        last = group[-1].index
    return candidates


def _outputs(call: Call, index: int) -> Iterator[_Output]:
    """The first tensor that is a cut, or, where only all of them together are one, all of them."""
    single = next((found.same for found in call.found if found.cut), None)
    # What does not come from the images (same: -1) is the same in every pass.
    found = [each for each in call.found if (call.cut and each.same >= 0 if single is None else each.same == single)]
    if found and call.path:  # the model itself returns its output, which is no representation
        first: dict[int, Element] = {}
        elements: dict[Element, list[Element]] = {}
        for each in found:
            if each.same in first:
                elements[first[each.same]].append(each.element)
            else:
                first[each.same] = each.element
                elements[each.element] = []
        yield _Output(call.path, index, elements, tuple(first))


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


def _at(path: str, unit: str) -> bool:
    return path == unit or _inside(path, unit)


# How a tensor is read


def _first(tensors: Sequence[tuple[Place, Tensor]], reader: Callable[[Tensor], Layout | None]) -> Read | None:
    """The first of these that is a picture to the reader."""
    for place, tensor in tensors:
        if (layout := reader(tensor)) is not None:
            return Read(place, layout, tensor)
    return None


def _match_any(tensor: Tensor, intermediates: Sequence[Tensor]) -> Layout | None:
    found = (_match(tensor, each) for each in intermediates)
    return next((layout for layout in found if layout is not None), None)


def _match(tensor: Tensor, intermediate: Tensor) -> Layout | None:
    """The layout by which the tensor holds the same numbers as an intermediate (B, C, h, w), or None."""
    batch, channels, *sides = intermediate.shape
    if tensor.ndim < 3 or tensor.shape[0] != batch or tensor.numel() < intermediate.numel():
        return None
    shape, grid = tuple(tensor.shape[1:]), (sides[0], sides[1])
    if tensor.ndim == 4:
        if shape == (channels, *grid) and _equal(tensor, intermediate):
            return Layout(shape, Axes("bchw", grid))
        if shape == (*grid, channels) and _equal(tensor.permute(0, 3, 1, 2), intermediate):
            return Layout(shape, Axes("bhwc", grid))
    wanted = intermediate.flatten(2).transpose(1, 2)
    count = wanted.shape[1]
    if tensor.ndim == 3 and shape == (channels, count) and _equal(tensor.transpose(1, 2), wanted):
        return Layout(shape, Axes("bcn", grid))
    if shape[-1] != channels:
        return None
    tokens = tensor.flatten(1, -2)
    prefix = tokens.shape[1] - count
    if not 0 <= prefix <= LARGEST_PREFIX or (prefix and tensor.ndim > 3):
        return None
    patches = tokens[:, prefix:]
    if _equal(patches, wanted):
        return Layout(shape, Axes("bnc", grid, prefix))
    places = _places(patches[0], wanted[0])
    if _equal(patches[:, places], wanted):
        return Layout(shape, Axes("bnc", grid, prefix, tuple(places.tolist())))
    return None


def _equal(tensor: Tensor, other: Tensor) -> bool:
    return bool((tensor - other).abs().max() <= EQUAL * other.abs().max())


def _places(tokens: Tensor, wanted: Tensor) -> Tensor:
    """(N,): for each wanted token its place among the tokens, if these are the same ones (N, C) in another order.

    Tokens are sorted by their values along a random direction, in which no two different ones coincide.
    """
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(tokens.shape[1], generator=generator, dtype=torch.float64).to(tokens.device)
    found, sought = (tokens.double() @ direction).argsort(), (wanted.double() @ direction).argsort()
    return torch.empty_like(found).scatter_(0, sought, found)


def _guess(tensor: Tensor, around: Sequence[Layout], size: Size) -> Layout | None:
    """The likeliest layout of a tensor that is none of the intermediates; around: of taps nearby, the nearest first."""
    shape = tuple(tensor.shape[1:])
    if tensor.shape[0] != LOOKED_AT or tensor.ndim not in (3, 4):
        return None
    if same := [layout for layout in around if layout.shape == shape]:
        return same[0]
    if tensor.ndim == 4:
        readings = [Axes("bchw", (shape[1], shape[2])), Axes("bhwc", (shape[0], shape[1]))]
        likely = [Layout(shape, axes) for axes in readings if _keeps_aspect(axes.grid, size)]
        forms, orders = [layout.form for layout in around], [layout.axes.order for layout in around]
        return max(likely, key=lambda each: (each.form in forms, each.axes.order in orders[:1]), default=None)
    grids = dict.fromkeys(layout.axes.grid for layout in around if layout.axes.grid != (1, 1))
    known = [axes for grid in grids if (axes := guess_axes(tensor.shape, LOOKED_AT, size, grid=grid)) is not None]
    if known:
        return Layout(shape, min(known, key=lambda axes: axes.prefix))
    # By the shape alone, channels before tokens are not believed: PiT's class token has as many channels as a grid
    # could have tokens.
    axes = guess_axes(tensor.shape, LOOKED_AT, size, channels=shape[-1])
    return None if axes is None else Layout(shape, axes)


def _keeps_aspect(grid: Grid, size: Size) -> bool:
    """Has the grid the proportions of the image, to a cell? (MobileViT's tokens in patches have not.)"""
    return abs(grid[0] * size[1] - grid[1] * size[0]) <= max(size)


# What a block is made of


def _attends(module: nn.Module) -> bool:
    return bool(_heads(module)) or any(ATTENTION.search(type(each).__name__) for each in module.modules())


def _heads(module: nn.Module) -> list[int]:
    """Attention heads, as its modules call them."""
    named = (getattr(each, name, None) for each in module.modules() for name in ("num_heads", "heads"))
    return [each for each in named if isinstance(each, int)]


def _block_sizes(module: nn.Module) -> tuple[int, int]:
    """(attention heads, MLP width), 0 where a block says neither, and the largest where it says several."""
    layers = [getattr(each, "fc2", None) for each in module.modules()]
    widths = [getattr(each, "in_features", getattr(each, "in_channels", 0)) for each in layers]
    return max(_heads(module), default=0), max((each for each in widths if isinstance(each, int)), default=0)
