"""Any nn.Module as a target, without a change to it: taps are the names of its modules.

    suggest_taps(model, images)              what there is to tap, in the order of execution
    module_target(model, taps, …)            the model as a target; target.describe() shows how each tap is read

A tap's name is the path of a module, then what has to be said where there is a choice:

    "encoder.layers.3"     what this module returns
    "block@1"              its second call, where one module is called several times in a pass
    "block[1]"             the second element of the tuple or list that it returns; "block[hidden]" of a dictionary
    "block@1[hidden][0]"   both
    "layers.1.0@in"        what it is given, for a residual stream that no module returns (x = x + attention(x))

Where a module returns several tensors and the name says not which, it is the only one that is a cut (all that the
output knows of the image runs through it); else the first that reads as tokens on a grid; else the first.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError, nearest
from backsight.representation import Grid, Representation, Tokens
from backsight.targets.axes import ORDERS, USUAL_PREFIX, Axes, Order, readings
from backsight.targets.base import PIXELS, TAP_SETS, Preprocessing, Size, Stage, Target, hash_of
from backsight.targets.hooks import Found, Place, brackets, element_of, frozen, is_leaf, playing
from backsight.targets.outline import Outline, is_inside, outline
from backsight.targets.survey import plain, read_as, survey

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_SIZE = (224, 224)
RECOMMENDED = "recommended"
ATTENTION = re.compile(r"(?i)attention|attn|msa")  # in the names of classes


class Discovered(Target):
    """A target whose taps are tensors of an observed pass."""

    _found: list[Found]
    _outline: Outline
    _chosen: dict[str, Found]  # by tap

    def _axes_of(self, tap: str, shape: Sequence[int], size: Size) -> Axes:
        """How a tensor of this shape is read at the tap, in images of this size."""
        axes = self._chosen[tap].axes
        assert axes is not None
        return axes

    def _size_of(self, tap: str, tokens: Tokens) -> Size:
        """Of images whose tokens at the tap lie on this grid."""
        return self.image_size

    def _beside(self, found: Found) -> list[Found]:
        """The other tensors of the same output."""
        return [one for one in self._found if one.place.whole == found.place.whole and one.place != found.place]

    def _companions(self, found: Found) -> dict[str, Found]:
        """Those of them, by their name in `Tokens.context`, that the rest reads too, where the tap alone is no cut.

        Their first axis holds the images, or the parts of all images (of two, when it was found).
        """
        if found.cut or not found.with_companions:
            return {}
        beside = [one for one in reversed(self._beside(found)) if one.batch in (0, None) and one.shape]
        different = {one.same: one for one in beside if one.same not in (found.same, -1) and one.shape[0] % 2 == 0}
        return {brackets(one.place.element): one for one in different.values()}

    def _form(self, tap: str) -> tuple[Grid, int, int]:
        """Grid, channels and prefix tokens at the model's own size."""
        axes = self._axes_of(tap, self._chosen[tap].shape, self.image_size)
        return axes.grid, self._chosen[tap].channels, axes.prefix

    def _places(self, taps: Sequence[str]) -> dict[str, Place]:
        places = {tap: self._chosen[tap].place for tap in taps}
        for tap in taps:
            places |= {f"{tap} {key}": each.place for key, each in self._companions(self._chosen[tap]).items()}
        return places

    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        recorded: dict[str, Representation] = {}
        for tap in taps:
            keys = self._companions(self._chosen[tap])
            context = {key: seen[f"{tap} {key}"].unflatten(0, (len(images), -1)) for key in keys}
            axes = self._axes_of(tap, seen[tap].shape, (images.shape[2], images.shape[3]))
            recorded[tap] = replace(axes.tokens(seen[tap]), context=context)
        return recorded

    def _rest(self, tap: str, representation: Any) -> Any:
        _, channels, prefix = self._form(tap)
        fits = isinstance(representation, Tokens) and len(representation.grids) == 1
        if not fits or (representation.channels, representation.prefix) != (channels, prefix):
            raise BacksightError(
                f"{tap} of {self.name} holds tokens of {channels} channels on one grid behind {prefix} prefix tokens, "
                f"not a representation {representation.form}."
            )
        lacking = [key for key in self._companions(self._chosen[tap]) if key not in representation.context]
        if lacking:
            raise BacksightError(
                f"What lies behind {tap} of {self.name} also reads {', '.join(lacking)}: keep the tokens' context, "
                "which only recorded ones have."
            )
        return self._replayed(tap, representation, torch.zeros(1, len(self.preprocessing.mean), 1, 1))

    def stage(self, tap: str, previous: str) -> Stage:
        """ "blocks" where blocks, or other modules, with attention end between the taps, "norm" where nothing runs but
        normalisation and activations, else "convolution"."""
        self._between(tap, previous)
        start, stop = (-1.0 if one == PIXELS else self._chosen[one].order for one in (previous, tap))
        ended = [one.place.module for one in self._found if one.place.side == "output" and start < one.order <= stop]
        paths = {path: self.model.get_submodule(path) for path in ended}
        blocks = [path for path, end in self._outline.blocks.items() if start < end <= stop]
        steps = 2 * len(blocks) + self._is_half(tap) - self._is_half(previous)
        if not steps:
            attention = [path for path, module in paths.items() if ATTENTION.search(type(module).__name__)]
            blocks = [path for path in attention if not is_inside(path, attention)]
            steps = 2 * len(blocks)
        modules = [self.model.get_submodule(path) for path in blocks or self._outline.blocks]
        heads, hidden = (max(sizes) for sizes in zip((0, 0), *map(block_sizes, modules), strict=True))
        if previous == PIXELS:
            return Stage("patch_embedding", len(blocks), heads, hidden)
        if steps:
            attends = heads or any(ATTENTION.search(type(part).__name__) for one in modules for part in one.modules())
            return Stage("blocks" if attends else "convolution", math.ceil(steps / 2), heads, hidden)
        if all(_keeps_places(module) for module in paths.values() if is_leaf(module)):
            return Stage("norm", 0, heads, hidden)
        return Stage("convolution", 1, heads, hidden)

    def _is_half(self, tap: str) -> bool:
        """Does it lie inside a block, between two of its steps?"""
        place = self._chosen[tap].place if tap != PIXELS else Place("")
        return place.side == "stream" and is_inside(place.module, self._outline.blocks)

    def _replayed(self, tap: str, tokens: Tokens, image: Tensor) -> Any:
        """A forward pass in which the tap's output is these tokens, whatever the image (1, C, …) is."""
        size, found = self._size_of(tap, tokens), self._chosen[tap]
        value = self._axes_of(tap, found.shape, self.image_size).tensor(tokens)
        tensors = {found.same: value.reshape(len(value), *found.shape[1:]) if value.ndim < len(found.shape) else value}
        tensors |= {one.same: tokens.context[key].flatten(0, 1) for key, one in self._companions(found).items()}
        values = {each.place: tensors[each.same] for each in self._beside(found) if each.same in tensors}
        images = image.to(self.device, self.dtype).expand(tokens.batch, -1, *size)
        with playing(self.model, {**values, found.place: tensors[found.same]}):
            return self._forward(self.preprocessing.normalise(images), None)


class ModuleTarget(Discovered):
    """A model of the user, which stays as it is: every pass freezes it, and puts everything back after it."""

    kind = "module"

    def __init__(
        self,
        model: nn.Module,
        taps: str | Sequence[str],
        preprocessing: Preprocessing,
        grids: Mapping[str, Size] | None = None,
        axes: Mapping[str, Order] | None = None,
        output: str | int | None = None,
        name: str | None = None,
    ) -> None:
        self._grids, self._axes, self._output = dict(grids or {}), dict(axes or {}), output
        model = plain(model)
        images = torch.rand(2, len(preprocessing.mean), *preprocessing.size, generator=torch.Generator().manual_seed(0))
        self._survey = survey(model, preprocessing, images, output)
        self._found, self._chosen = self._survey.found, {}
        self._outline = outline(model, self._found)
        self._refused: dict[str, str] = {}  # by tap: why the rest of the pass cannot be run from it, or ""
        super().__init__(model, name or type(model).__name__, preprocessing, "given", taps=taps)
        if stray := sorted({*self._grids, *self._axes} - set(self._chosen)):
            raise BacksightError(
                f"grids and axes are said of {', '.join(stray)}, which are not among the taps: "
                f"{', '.join(self.taps)}; use the same names."
            )

    def __repr__(self) -> str:
        size = " × ".join(map(str, self.image_size))
        return f"{self.name}, images {size}, {len(self.taps)} taps\n{self.describe().to_string(index=False)}"

    def describe(self) -> pd.DataFrame:
        """How each tap is read: tap, module, element, shape, axes, grid, prefix, channels, cut.

        cut: "yes", "with its companions" (the other tensors that the module returns), or "no": then `from_tap` is
        refused, and all else works. `from_tap` tries it out before it answers.
        """
        import pandas as pd

        rows = []
        for tap, found in ((tap, self._chosen[tap]) for tap in self.taps):
            cut = "yes" if found.cut else "with its companions" if found.with_companions else "no"
            element = brackets(found.place.element) or "all"
            rows.append(read_as(found, element=element) | {"tap": tap, "channels": found.channels, "cut": cut})
        return pd.DataFrame(rows)

    def _put_to_rest(self, model: nn.Module) -> nn.Module:
        return model

    def _refuse_training(self) -> None:
        """Never needed: every pass runs in eval mode and puts the mode back."""

    # Taps.

    @property
    def available_taps(self) -> tuple[str, ...]:
        """What `suggest_taps` lists as a map, tokens or a vector, and all taps that were named since."""
        known = {each.name: each for each in self._found if each.axes is not None} | self._chosen
        order = {each.place: number for number, each in enumerate(self._found)}
        return tuple(sorted(known, key=lambda tap: order[known[tap].place]))

    def resolve_taps(self, taps: str | Sequence[str]) -> tuple[str, ...]:
        if isinstance(taps, str) and taps in (RECOMMENDED, *TAP_SETS) and taps not in self._survey.calls:
            taps = [each.name for each in self._outline.taps]
            if not taps:
                why = self._survey.reason or "no module's output is a map or tokens through which all must pass"
                raise BacksightError(
                    f"Nothing can be recommended in {self.name}, for {why}: look at suggest_taps() and name the taps."
                )
        return super().resolve_taps([taps] if isinstance(taps, str) and taps in TAP_SETS else taps)

    def _refuse_unknown(self, tap: str) -> None:
        if tap not in self._chosen:
            self._chosen[tap] = self._with_axes(tap, self._named(tap))

    def tap_set(self, name: str) -> tuple[str, ...]:
        return self.taps

    def _named(self, tap: str) -> Found:
        """Which tensor a name means. Raises BacksightError with the reason where it means none."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        path = re.split(r"[@\[]", tap)[0]
        if not path or path not in modules:
            raise BacksightError(f"{self.name} has no tap {tap!r}; {nearest(path, list(filter(None, modules)))}.")
        # A module that lies in two places runs under the name of the first.
        first = next(name for name, each in self.model.named_modules() if each is modules[path])
        named: dict[str, Found] = {}
        for each in (each for each in self._found if each.place.module == first):
            element = brackets(each.place.element)
            named |= {each.name: each, each.name.removesuffix(element) + element: each}
        wanted = first + re.sub("['\" ]", "", tap[len(path) :])
        if wanted not in named:
            calls = self._survey.calls.count(first)
            raise BacksightError(
                f"{tap} is no tap of {self.name}, in which {path} runs {calls} times in a forward pass"
                + (f" and returns these floating-point tensors: {', '.join(named) or 'none'}." if calls else ".")
            )
        return named[wanted]

    def _with_axes(self, tap: str, found: Found) -> Found:
        """As it is read, or declared to be. Raises BacksightError with the reason where that is no picture."""
        order, grid = self._axes.get(tap), self._grids.get(tap)
        options = [found.axes] if found.axes else []
        if found.batch is not None and (order or grid):
            options = readings(found.shape, found.batch, self.image_size, order, grid and (grid[0], grid[1]))
        what = f"{tap} of {self.name} holds a tensor of shape {found.shape} for 2 images"
        if found.constant or not options:
            why = (
                "the same for every image: there is nothing to invert"
                if found.constant
                else "none of its axes holds the images alone (windows or heads lie with them): tap a module around it"
                if found.batch is None
                else f"the axes {order!r} and the grid {grid} do not fit: correct them (axes are {', '.join(ORDERS)})"
                if order or grid
                else f"its places are no grid of the image of {self.image_size} (a change of the picture does not move "
                f"the place where it should lie): say grids={{{tap!r}: (height, width)}} (further tokens are prefix "
                f"tokens) or axes={{{tap!r}: …}} if it is one, or tap another module"
            )
            raise BacksightError(f"{what}; {why}.")
        axes = options[0]
        if not (order or grid) and (axes.prefix > USUAL_PREFIX or axes.order == "bcn"):
            warnings.warn(
                f"{what} and is read as {axes.order} on the grid {axes.grid} behind {axes.prefix} prefix tokens, which "
                "is unusual: declare grids= or axes= where that is wrong.",
                stacklevel=6,
            )
        return replace(found, axes=axes)

    # What lies between them.

    @property
    def reduction(self) -> Size:
        grid, *_ = self._form(self.taps[0])
        return -(-self.image_size[0] // grid[0]), -(-self.image_size[1] // grid[1])

    def check_size(self, size: Size) -> None:
        if tuple(size) != tuple(self.image_size):
            raise BacksightError(
                f"{self.name} was declared for images of {self.image_size} (height, width), not {tuple(size)}: "
                "give module_target another image_size."
            )

    # Passes.

    @property
    def weights_hash(self) -> str:
        """As of every target; taken anew each time, for the user may have trained the model on."""
        return hash_of(self.model)

    def _canonical(self, *arguments: Any) -> dict[str, Representation]:
        return {tap: tokens.to(torch.float32) for tap, tokens in super()._canonical(*arguments).items()}

    def _forward(self, images: Tensor, padding: Tensor | None) -> Tensor:
        with frozen(self.model):
            output = super()._forward(images, padding)
        if self._survey.output is None:
            return torch.empty(len(images), 0, device=images.device)
        return element_of(output, self._survey.output).float()

    def __call__(self, images: Tensor, padding: Tensor | None = None, gradient: bool = False) -> Any:
        """The model's own output. Raises BacksightError where that is no floating-point tensor of all images."""
        self._refuse_no_output()
        return super().__call__(images, padding, gradient)

    def _refuse_no_output(self) -> None:
        if self._survey.output is None:
            raise BacksightError(
                f"{self.name} returns no floating-point tensor with an axis of images (a list of answers, one "
                "an image, is none): its taps can be recorded, no more."
            )

    def _replayed(self, tap: str, tokens: Tokens, image: Tensor) -> Any:
        self._refuse_no_output()
        if tap not in self._refused:
            self._refused[tap] = self._why_no_rest(tap, tokens)
        if self._refused[tap]:
            raise BacksightError(self._refused[tap])
        return super()._replayed(tap, tokens, image)

    def _why_no_rest(self, tap: str, tokens: Tokens) -> str:
        """Why the rest of the pass cannot be run from this tap alone, in one sentence, or ""."""
        found, shape = self._chosen[tap], (1, len(self.preprocessing.mean), *self.image_size)
        alone = found.cut or found.with_companions or not any(each.cut for each in self._found)
        if alone:  # autograd sees no path through detached or discrete steps: whether the image still matters is tried
            noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
            replayed, one = super()._replayed, tokens.detach().index(0)
            with torch.no_grad():
                first, second = (replayed(tap, one, image) for image in (torch.zeros(shape), noise))
            alone = bool((first - second).abs().max() <= 1e-4 * first.abs().max())
        rest = f"The rest of {self.name} cannot be run from {tap}: its output does not depend on {tap} alone"
        return "" if alone else f"{rest} (a connection goes around it)."

    def with_model(self, model: nn.Module) -> ModuleTarget:
        """The same taps, read in the same way, of another model of this architecture (other weights, another seed)."""
        grids = {tap: grid for tap, grid in self._grids.items() if tap in self.taps}
        axes = {tap: order for tap, order in self._axes.items() if tap in self.taps}
        return ModuleTarget(model, self.taps, self.preprocessing, grids, axes, self._output, self.name)


def module_target(
    module: nn.Module,
    taps: str | Sequence[str] = RECOMMENDED,
    preprocess: Preprocessing | None = None,
    image_size: Size | None = None,
    grids: Mapping[str, Size] | None = None,
    axes: Mapping[str, Order] | None = None,
    output: str | int | None = None,
    name: str | None = None,
) -> ModuleTarget:
    """Any nn.Module as a target. The module stays as it is; every pass runs in eval mode and without its gradients.

    taps: names as this file's head says, or "recommended", those of `suggest_taps`; preprocess: mean, std and size
    (default: none, images in [0, 1]); image_size: (H, W), default that of `preprocess`, else (224, 224); grids:
    {tap: (h, w)} where tokens lie on another grid than the one found (further tokens are prefix tokens); axes: {tap:
    "bchw" | "bhwc" | "bnc" | "bcn" | "nbc" | "bc"} where the axes found are wrong; output: which element of what the
    model returns is its output (default: "logits" where there is one, else the first float tensor); name: for tables
    and files, default the module's class. A compiled or data-parallel module is unwrapped. Shapes are found by two
    passes on random images. `print(target)` shows how every tap is read.
    Raises BacksightError on unknown taps, taps that never run, run repeatedly, hold no float tensor or nothing of the
    image, grids and axes that do not fit, a module whose forward pass fails, and TorchScript or exported graphs.
    """
    preprocess = preprocess or Preprocessing((0.0,) * 3, (1.0,) * 3, DEFAULT_SIZE)
    preprocess = replace(preprocess, size=image_size or preprocess.size)
    return ModuleTarget(module, taps, preprocess, grids, axes, output, name)


def _keeps_places(module: nn.Module) -> bool:
    """Normalisation, activations and what does nothing."""
    activation = type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, nn.MultiheadAttention)
    return activation or "norm" in type(module).__name__.lower() or isinstance(module, nn.Identity | nn.Dropout)


def block_sizes(block: nn.Module) -> tuple[int, int]:
    """(attention heads, MLP width) of any block, 0 where it says neither, and the largest where it says several."""
    modules: list[Any] = list(block.modules())
    heads = [getattr(module, name, 0) for module in modules for name in ("num_heads", "heads", "n_heads", "nhead")]
    layers = [getattr(module, "fc2", None) for module in modules]
    widths = [getattr(layer, "in_features", getattr(layer, "in_channels", 0)) for layer in layers]
    widths += [module.in_split[0] for module in modules if hasattr(module, "in_split")]  # [MLP, query, key, value]
    largest, widest = (max([0, *(n for n in sizes if isinstance(n, int))]) for sizes in (heads, widths))
    return largest, widest
