"""Any nn.Module as a target, without a change to it: taps are the names of its modules.

    suggest_taps(model, images)              what there is to tap, in the order of execution
    module_target(model, taps, …)            the model as a target; target.describe() shows how each tap is read

A tap's name is the path of a module, then what has to be said where there is a choice:

    "encoder.layers.3"     what this module returns
    "block@1"              its second call, where one module is called several times in a pass
    "block[1]"             the second element of the tuple or list that it returns; "block[hidden]" of a dictionary
    "block@1[hidden][0]"   both

Where a module returns several tensors and the name says not which, it is the only one that is a cut (all that the
output knows of the image runs through it); else the first that reads as tokens on a grid; else the first.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backsight.errors import BacksightError, nearest
from backsight.representation import Grid, Representation, Tokens
from backsight.targets.axes import Axes, Order, guess_axes
from backsight.targets.base import PIXELS, TAP_SETS, Preprocessing, Size, Stage, Target, hash_of, seeded
from backsight.targets.hooks import Element, Place, element_of, frozen, observe, playing, tensors_in, watching

if TYPE_CHECKING:
    import pandas as pd

    from backsight.data.images import ImageSource

DEFAULT_SIZE = (224, 224)
RECOMMENDED = "recommended"

_NAME = re.compile(r"(?P<path>[^@\[\]]+)(@(?P<call>\d+))?(?P<element>(\[[^\[\]]+\])*)")


@dataclass(frozen=True)
class Seen:
    """A tensor that a module returns, as a pass of two and one of three images have shown it.

    name: as a tap; kind: the module's class; order: place of the call in the pass; leaf: the module has no children;
    shape: for two images; axis: along which the images lie, None where none does; constant: the same for every image;
    axes: how it is read, or None; cut, with_companions: is it a cut, are all that the call returns one, taken together;
    same: equal for equal tensors; flops: up to the end of the call, of one image.
    """

    name: str
    place: Place
    kind: str
    order: int
    leaf: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int | None
    constant: bool
    axes: Axes | None
    cut: bool
    with_companions: bool
    same: int
    flops: float

    @property
    def form(self) -> str:
        """ "map", "tokens", "vector", or "other"."""
        if self.axes is None:
            return "other"
        if self.axes.grid == (1, 1):
            return "vector"
        return "map" if len(self.axes.order) == 4 else "tokens"


@dataclass(frozen=True)
class Survey:
    """What one pass of a model has shown: every call's tensors, in the order in which the calls end.

    calls: {(path, number): what the call returned, in words}; kinds: (path, class, module) of every call; output: the
    model's own, None where it is no float tensor; flops: of the whole pass, of one image.
    """

    size: Size
    seen: tuple[Seen, ...]
    calls: Mapping[tuple[str, int], str]
    kinds: tuple[tuple[str, str, nn.Module], ...]
    output: Element | None
    flops: float

    def of(self, path: str, number: int) -> list[Seen]:
        return [each for each in self.seen if (each.place.module, each.place.call) == (path, number)]


class ModuleTarget(Target):
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
        model = _plain(model)
        size, channels = preprocessing.size, len(preprocessing.mean)
        images = torch.rand(3, channels, *size, generator=torch.Generator().manual_seed(0))
        self._survey = survey(model, preprocessing, images, output)
        self._order = {each.place: place for place, each in enumerate(self._survey.seen)}
        self._chosen: dict[str, Seen] = {}
        self._checked: dict[str, str] = {}
        self._hashed: tuple[object, str] | None = None
        super().__init__(model, name or type(model).__name__, preprocessing, "given", taps=taps)
        if stray := sorted({*self._grids, *self._axes} - set(self._chosen)):
            raise BacksightError(
                f"grids and axes are said of {', '.join(stray)}, which are not among the taps: "
                f"{', '.join(self.taps)}; use the same names."
            )

    def __repr__(self) -> str:
        height, width = self.image_size
        return (
            f"{self.name}, images {height} × {width}, {len(self.taps)} taps\n{self.describe().to_string(index=False)}"
        )

    def describe(self) -> pd.DataFrame:
        """How each tap is read: tap, module, call, element, shape, axes, grid, prefix, channels, cut.

        cut: "yes", "with its companions" (the other tensors that the module returns), or "no": then `from_tap` is
        refused, and all else works.
        """
        import pandas as pd

        rows = []
        for tap in self.taps:
            seen = self._chosen[tap]
            axes = cast(Axes, seen.axes)
            rows.append(
                {
                    "tap": tap,
                    "module": seen.kind,
                    "call": seen.place.call,
                    "element": _brackets(seen.place.element) or "all",
                    "shape": _shape(seen),
                    "axes": axes.order,
                    "grid": f"{axes.grid[0]} × {axes.grid[1]}",
                    "prefix": axes.prefix,
                    "channels": seen.shape[axes.order.index("c")],
                    "cut": "yes" if seen.cut else "with its companions" if seen.with_companions else "no",
                }
            )
        return pd.DataFrame(rows)

    def _put_to_rest(self, model: nn.Module) -> nn.Module:
        return model

    def _refuse_training(self) -> None:
        """Never needed: every pass runs in eval mode and puts the mode back."""

    # Taps.

    @property
    def available_taps(self) -> tuple[str, ...]:
        """What `suggest_taps` lists as a map, tokens or a vector, and all taps that were named since."""
        known = {each.name: each for each in self._survey.seen if each.axes is not None} | self._chosen
        return tuple(sorted(known, key=lambda tap: self._order[known[tap].place]))

    def resolve_taps(self, taps: str | Sequence[str]) -> tuple[str, ...]:
        if taps == RECOMMENDED:
            taps = [each.name for each in recommended(self._survey)]
            if not taps:
                raise BacksightError(
                    f"In {self.name} no module's output is a map or tokens through which all must pass: "
                    "look at suggest_taps() and name the taps."
                )
        elif isinstance(taps, str) and taps in TAP_SETS and (taps, 0) not in self._survey.calls:
            raise BacksightError(
                f"{self.name} is a plain module: name its taps one by one, or {RECOMMENDED!r}, not {taps!r}."
            )
        named = [part.strip() for part in taps.split(",")] if isinstance(taps, str) else list(taps)
        if not named:
            raise BacksightError(f"No tap of {self.name} is named: give a list of taps, or {RECOMMENDED!r}.")
        for tap in named:
            if tap not in self._chosen:
                self._chosen[tap] = self._read(tap)
        return tuple(sorted(dict.fromkeys(named), key=lambda tap: self._order[self._chosen[tap].place]))

    def tap_set(self, name: str) -> tuple[str, ...]:
        return self.taps

    def depth(self, tap: str) -> float:
        """Place of a tap among the selected ones; "pixels" is -1."""
        self._refuse_unselected(tap)
        return -1 if tap == PIXELS else self.taps.index(tap)

    def _read(self, tap: str) -> Seen:
        """Which tensor a name means and how it is read. Raises BacksightError with the reason where that is not so."""
        path, number, element = self._parsed(tap)
        calls = sum(each == path for each, _ in self._survey.calls)
        if calls == 0:
            raise BacksightError(
                f"These taps of {self.name} never run in a forward pass: {tap}; perhaps only its parameters are used, "
                "or its forward() is called directly."
            )
        if number is None and calls > 1:
            raise BacksightError(
                f"{path} of {self.name} runs more than once in a forward pass, {calls} times: say which of its "
                f"outputs is meant, '{path}@0' to '{path}@{calls - 1}'."
            )
        if number is not None and number >= calls:
            raise BacksightError(f"{path} of {self.name} has {calls} calls in a forward pass, from 0; not {number}.")
        found = self._survey.of(path, number or 0)
        returned = self._survey.calls[path, number or 0]
        if not found:
            raise BacksightError(
                f"{tap} of {self.name} returns {returned}, in which there is no floating-point tensor: "
                "tap another module."
            )
        chosen = [each for each in found if each.place.element == element] if element else [chosen_of(found)]
        if not chosen:
            there = ", ".join(_brackets(each.place.element) or "the output itself" for each in found)
            raise BacksightError(f"{tap} of {self.name} is not in what {path} returns ({returned}), but {there} is.")
        return self._with_axes(tap, chosen[0])

    def _parsed(self, tap: str) -> tuple[str, int | None, Element]:
        named = dict(self.model.named_modules(remove_duplicate=False))
        parts = _NAME.fullmatch(tap)
        path = tap if tap in named or parts is None else parts["path"]
        if not path or path not in named:
            known = [name for name in dict(self.model.named_modules()) if name]
            raise BacksightError(f"{self.name} has no tap {tap!r}; {nearest(path, known)}.")
        # A module that lies in two places runs under the name of the first.
        first = next(name for name, each in self.model.named_modules() if each is named[path])
        if parts is None or path == tap:
            return first, None, ()
        keys = [key.strip("'\" ") for key in re.findall(r"\[([^\[\]]+)\]", parts["element"])]
        element = tuple(int(key) if re.fullmatch(r"\d+", key) else key for key in keys)
        return first, None if parts["call"] is None else int(parts["call"]), element

    def _with_axes(self, tap: str, seen: Seen) -> Seen:
        if seen.constant:
            raise BacksightError(f"{tap} of {self.name} holds the same for every image: there is nothing to invert.")
        if seen.axis is None:
            raise BacksightError(
                f"{tap} of {self.name} returns a tensor of shape {seen.shape} for 2 images, and none of its axes holds "
                "the images alone (windows or heads lie with them): tap a module around it."
            )
        order, grid = self._axes.get(tap), self._grids.get(tap)
        if order is None and grid is None:
            if seen.axes is None:
                raise BacksightError(self._unread(tap, seen))
            return seen
        axes = _declared_axes(seen, order, grid, self._survey.size)
        if axes is None:
            raise BacksightError(
                f"{tap} of {self.name} returns a tensor of shape {seen.shape} for 2 images, which "
                f"{f'the axes {order!r}' if order else ''}{' and ' if order and grid else ''}"
                f"{f'the grid {grid}' if grid else ''} do not fit: correct them."
            )
        return replace(seen, axes=axes)

    def _unread(self, tap: str, seen: Seen) -> str:
        start = f"{tap} of {self.name} returns a tensor of shape {seen.shape} for 2 images"
        if len(seen.shape) == 3:
            return (
                f"{start}, and its tokens lie on no grid of an image of {self._survey.size}: say "
                f"grids={{{tap!r}: (height, width)}} (further tokens are prefix tokens) or axes={{{tap!r}: …}}."
            )
        if len(seen.shape) == 4:
            return (
                f"{start}, which looks like no map of an image of {self._survey.size}: say "
                f"axes={{{tap!r}: 'bchw'}} or 'bhwc' if it is one."
            )
        return f"{start}, and a tap needs two, three or four axes: tap another module."

    def _refuse_unselected(self, tap: str) -> None:
        if tap != PIXELS and tap not in self.taps:
            raise BacksightError(f"{tap!r} is not among the selected taps of {self.name}: {', '.join(self.taps)}.")

    # What lies between them.

    @property
    def reduction(self) -> Size:
        grid = cast(Axes, self._chosen[self.taps[0]].axes).grid
        return -(-self.image_size[0] // grid[0]), -(-self.image_size[1] // grid[1])

    def check_size(self, size: Size) -> None:
        if tuple(size) != tuple(self.image_size):
            raise BacksightError(
                f"{self.name} was declared for images of {self.image_size} (height, width), not {tuple(size)}: "
                "give module_target another image_size."
            )

    def stage(self, tap: str, previous: str) -> Stage:
        """ "blocks" where modules with attention in their name run between the taps, "norm" where only normalisation
        and activations do, else "convolution"."""
        self._refuse_unselected(tap)
        self._refuse_unselected(previous)
        if previous != PIXELS and self.taps.index(previous) >= self.taps.index(tap):
            raise BacksightError(f"In {self.name} the tap {previous!r} does not run before {tap!r}: swap them.")
        start = -1 if previous == PIXELS else self._chosen[previous].order
        between = self._survey.kinds[start + 1 : self._chosen[tap].order + 1]
        attention = [each for each in between if _is_attention(*each[:2])]
        if attention:
            outermost = [one for one in attention if not any(one[0].startswith(f"{two[0]}.") for two in attention)]
            channels = self._chosen[tap].shape[cast(Axes, self._chosen[tap].axes).order.index("c")]
            return Stage("blocks", len(outermost), _heads(outermost[0][2], channels), 0)
        leaves = [(kind, module) for _, kind, module in between if _is_leaf(module)]
        if leaves and all(_keeps_places(kind, module) for kind, module in leaves):
            return Stage("norm", 1, 0, 0)
        convolutions = sum("conv" in kind.lower() for kind, _ in leaves)
        return Stage("convolution", max(1, -(-convolutions // 2)), 0, 0)

    # Passes.

    @property
    def device(self) -> torch.device:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def weights_hash(self) -> str:
        """As of every target; taken anew where the user has trained the model on."""
        state = tuple((id(each), each._version) for each in self.model.state_dict(keep_vars=True).values())
        if self._hashed is None or self._hashed[0] != state:
            self._hashed = (state, hash_of(self.model))
        return self._hashed[1]

    def _places(self, taps: Sequence[str]) -> dict[str, Place]:
        return {
            tap + key: place
            for tap in taps
            for key, place in {"": self._chosen[tap].place, **self._beside(tap)}.items()
        }

    def _beside(self, tap: str) -> dict[str, Place]:
        return {f" {_brackets(each.place.element)}": each.place for each in self._companions(self._chosen[tap])}

    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        return {tap: self._tokens(tap, seen) for tap in taps}

    def _tokens(self, tap: str, seen: Mapping[str, Any]) -> Tokens:
        axes = cast(Axes, self._chosen[tap].axes)
        tokens = axes.tokens(seen[tap].float())
        if (tokens.grids[0], tokens.prefix) != (axes.grid, axes.prefix):
            raise BacksightError(
                f"{tap} of {self.name} is of another shape in this pass than in the one that found it."
            )
        context = {
            _brackets(each.place.element): seen[f"{tap} {_brackets(each.place.element)}"].movedim(
                cast(int, each.axis), 0
            )
            for each in self._companions(self._chosen[tap])
        }
        return replace(tokens, context=context)

    def _companions(self, seen: Seen) -> list[Seen]:
        """The other tensors of the same output, which `from_tap` needs where the tap alone is no cut."""
        if seen.cut or not seen.with_companions:
            return []
        others = self._survey.of(seen.place.module, seen.place.call)
        return [each for each in others if each.place != seen.place and each.same >= 0 and each.axis is not None]

    def _forward(self, images: Tensor, padding: Tensor | None) -> Tensor:
        if padding is not None and bool(padding.any()):
            raise BacksightError(f"{self.name} is a plain module without a padding mask: crop the images instead.")
        with frozen(self.model):
            output = self.model(_in_precision_of(self.model, images))
        if self._survey.output is None:
            return torch.empty(len(images), 0, device=images.device)
        return element_of(output, self._survey.output).float()

    def __call__(self, images: Tensor, padding: Tensor | None = None, gradient: bool = False) -> Tensor:
        """The model's own output. Raises BacksightError where it holds no floating-point tensor."""
        if self._survey.output is None:
            raise BacksightError(f"{self.name} returns no floating-point tensor: its taps can be recorded, no more.")
        return cast(Tensor, super().__call__(images, padding, gradient))

    def from_tap(self, tap: str, representation: Representation, gradient: bool = False) -> Tensor:
        if tap not in self._chosen:
            self.resolve_taps([tap])
        return cast(Tensor, super().from_tap(tap, representation, gradient))

    def _rest(self, tap: str, representation: Any) -> Tensor:
        if not isinstance(representation, Tokens):
            raise BacksightError(f"{tap} of {self.name} holds tokens, not {type(representation).__name__}.")
        lacking = [_brackets(each.place.element) for each in self._companions(self._chosen[tap])]
        if lacking := [name for name in lacking if name not in representation.context]:
            raise BacksightError(
                f"The output of {self.name} needs more of {tap} than these tokens hold, {', '.join(lacking)}: "
                "only tokens that were recorded carry it."
            )
        if tap not in self._checked:
            self._checked[tap] = self._why_no_rest(tap, representation)
        if self._checked[tap]:
            raise BacksightError(self._checked[tap])
        return self._replaced(tap, representation, self._blank(representation.batch))

    def _why_no_rest(self, tap: str, tokens: Tokens) -> str:
        """Why the rest of the pass cannot be run from this tap alone, in one sentence, or ""."""
        seen = self._chosen[tap]
        start = f"The rest of {self.name} cannot be run from {tap}"
        if self._survey.output is None:
            return f"{start}: the model returns no floating-point tensor."
        around = f"{start}: its output does not depend on {tap} alone (a connection goes around it)."
        traced = any(each.cut for each in self._survey.seen)
        if traced and not (seen.cut or seen.with_companions):
            return around
        # Autograd sees no path through detached or discrete steps: whether the image still matters is tried out.
        one, blank = tokens.index(0), self._blank(1)
        noise = torch.rand(blank.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        with torch.no_grad():
            first, second = (self._replaced(tap, one, images) for images in (blank, noise))
        return "" if torch.allclose(first, second, rtol=1e-5, atol=1e-6) else around

    def _replaced(self, tap: str, tokens: Tokens, images: Tensor) -> Tensor:
        """A forward pass in which the tap's output is these tokens, whatever the images are."""
        seen = self._chosen[tap]
        values = {seen.place: cast(Axes, seen.axes).tensor(tokens).to(self.device, seen.dtype)}
        for each in self._companions(seen):
            companion = tokens.context[_brackets(each.place.element)].movedim(0, cast(int, each.axis))
            values[each.place] = companion.to(self.device, each.dtype)
        with playing(self.model, values):
            return self._forward(self.preprocessing.normalise(images), None)

    def _blank(self, batch: int) -> Tensor:
        return torch.zeros(batch, len(self.preprocessing.mean), *self.image_size, device=self.device)

    def untrained(self, seed: int = 0) -> ModuleTarget:
        with seeded(seed):
            model = self._randomised().to(self.device)
        other = self.with_model(model)
        other.weights = "random"
        return other

    def with_model(self, model: nn.Module) -> ModuleTarget:
        """The same taps, read in the same way, of another model of this architecture (other weights, another seed)."""
        named = {tap: given for tap, given in self._grids.items() if tap in self.taps}
        ordered = {tap: given for tap, given in self._axes.items() if tap in self.taps}
        return ModuleTarget(model, self.taps, self.preprocessing, named, ordered, self._output, self.name)

    def select(self, taps: str | Sequence[str]) -> Self:
        other = super().select(taps)
        other._chosen = dict(self._chosen)
        return other

    def _randomised(self) -> nn.Module:
        model = copy.deepcopy(self.model)
        for name, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            # nn.MultiheadAttention has the method under a private name.
            draw = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
            if own and draw is None:
                raise BacksightError(
                    f"{name or type(module).__name__} of {self.name} cannot be drawn anew (it has no "
                    "reset_parameters): build an untrained model and give it to target.with_model()."
                )
            if draw is not None:
                draw()
        return model


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
    and files, default the module's class. A compiled or data-parallel module is unwrapped.
    Shapes are found by two passes on random images. `print(target)` shows how every tap is read.
    Raises BacksightError on unknown taps, taps that never run, run repeatedly, hold no float tensor or nothing of the
    image, grids and axes that do not fit, a module whose forward pass fails, and TorchScript or exported graphs.
    """
    if preprocess is None:
        size = image_size or DEFAULT_SIZE
        preprocess = Preprocessing((0.0,) * 3, (1.0,) * 3, size, square=size[0] == size[1])
    elif image_size is not None:
        preprocess = replace(preprocess, size=image_size, square=image_size[0] == image_size[1])
    return ModuleTarget(module, taps, preprocess, grids, axes, output, name)


def suggest_taps(
    model: nn.Module,
    images: Tensor | ImageSource | Size,
    preprocess: Preprocessing | None = None,
    output: str | int | None = None,
) -> pd.DataFrame:
    """What can be tapped in an unknown model, in the order of execution; the model stays as it is.

    images: (B, C, H, W) float in [0, 1] or an ImageSource, of which three are used, or (H, W) for random ones;
    preprocess, output: as in `module_target`. Columns:
        tap          the name for module_target
        module       the module's class
        form         "map", "tokens", "vector", or "other": not read as a picture without further help
        shape, axes, grid, prefix    for a batch of B images, as it would be read
        cut          whether all that the output knows of the image runs through it: the rest of the pass can be run
        cost         share of the pass's operations up to there (matrix products and convolutions)
        same_as      another name of the same tensor, "" where this is its only or its recommended one
        recommended  cuts on a grid, one name each: whole blocks and components, and the last of each grid
    Raises BacksightError where the model's forward pass fails, and on TorchScript or exported graphs.
    """
    import pandas as pd

    from backsight.data.images import tensor

    model = _plain(model)
    if isinstance(images, tuple):
        channels = 3 if preprocess is None else len(preprocess.mean)
        images = torch.rand(3, channels, *images, generator=torch.Generator().manual_seed(0))
    elif not isinstance(images, Tensor):
        images = tensor(images, 3)
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise BacksightError(
            f"suggest_taps needs float images (batch, channels, height, width) in [0, 1], or (height, width), not "
            f"{images.dtype} of shape {tuple(images.shape)}."
        )
    size = (images.shape[2], images.shape[3])
    if preprocess is None:
        preprocess = Preprocessing((0.0,) * images.shape[1], (1.0,) * images.shape[1], size)
    found = survey(model, preprocess, images, output)
    chosen = {each.name for each in recommended(found)}
    alias = _aliases(found)
    rows = [
        {
            "tap": each.name,
            "module": each.kind,
            "form": each.form,
            "shape": _shape(each),
            "axes": "" if each.axes is None else each.axes.order,
            "grid": "" if each.axes is None else f"{each.axes.grid[0]} × {each.axes.grid[1]}",
            "prefix": 0 if each.axes is None else each.axes.prefix,
            "cut": each.cut,
            "cost": round(each.flops / found.flops, 3) if found.flops else float("nan"),
            "same_as": alias.get(each.name, ""),
            "recommended": each.name in chosen,
        }
        for each in found.seen
        if each.place.module and not each.constant
    ]
    return pd.DataFrame(rows)


def recommended(found: Survey) -> list[Seen]:
    """Cuts on a grid, one name for each tensor: whole blocks and components, and the last of each grid."""
    alias = _aliases(found)
    cuts = [
        each
        for each in found.seen
        if each.cut and each.place.module and each.form in ("map", "tokens") and each.name not in alias
    ]
    last = {cast(Axes, each.axes).grid: each.name for each in cuts}
    composites = {each.place.module for each in cuts if not each.leaf}
    chosen = []
    for each, following in zip(cuts, [*cuts[1:], None], strict=False):
        inside = any(each.place.module.startswith(f"{path}.") for path in composites)
        step = inside or (following is not None and following.leaf)  # of several: a convolution, then its norm …
        if not each.leaf or not step or each.name in last.values():
            chosen.append(each)
    return chosen


def _aliases(found: Survey) -> dict[str, str]:
    """{name: the name to prefer} of tensors that several modules return: a repeated block, else the outermost one."""
    kinds = Counter((_parent(path), kind) for path, kind in {(path, kind) for path, kind, _ in found.kinds})

    def preference(seen: Seen) -> tuple[bool, int, int]:
        path = seen.place.module
        repeated = not seen.leaf and path.rpartition(".")[2].isdigit() and kinds[_parent(path), seen.kind] > 1
        depth = path.count(".")
        return not repeated, -depth if repeated else depth, len(seen.place.element)

    groups: dict[int, list[Seen]] = {}
    for each in found.seen:
        if each.same >= 0 and each.place.module and each.axes is not None:
            groups.setdefault(each.same, []).append(each)
    best = {same: min(group, key=preference).name for same, group in groups.items()}
    return {each.name: best[same] for same, group in groups.items() for each in group if each.name != best[same]}


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


# One pass, seen from every module.


def survey(model: nn.Module, preprocessing: Preprocessing, images: Tensor, output: str | int | None = None) -> Survey:
    """Every float tensor that a module of the model returns, by two passes that leave the model as it was.

    images: (B, C, H, W) in [0, 1]; three of them are used, or made from the first. A batch of two and one of three tell
    the axis of the images from every other one, also where several are of size two.
    Raises BacksightError where a pass fails.
    """
    device = next((each.device for each in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    noise = torch.rand(images[:1].shape, generator=torch.Generator().manual_seed(1)).to(images)
    three = torch.cat([images[:3], images[:1].flip(3), noise])[[0, 1, -1]]
    size = (three.shape[2], three.shape[3])
    inputs = _in_precision_of(model, preprocessing.normalise(three.to(device)))
    chosen: list[Element | None] = []

    def run(batch: Tensor) -> Any:
        found = model(batch)
        chosen.append(_output_element(found, output, type(model).__name__))
        return None if chosen[-1] is None else element_of(found, chosen[-1])

    with frozen(model), _explained(model, size):
        calls = observe(model, run, inputs[:2]).calls
        second, flops = _second_pass(model, inputs)
    modules = dict(model.named_modules())
    repeated = Counter(call.path for call in calls)
    seen: list[Seen] = []
    for order, call in enumerate(calls):
        returned = second.get((call.path, call.number))
        found: list[Seen] = []
        for each in call.found:
            later = None if returned is None else returned.tensors.get(each.element)
            axis = None if later is None else _image_axis(each.shape, later.shape)
            found.append(
                Seen(
                    name="",
                    place=Place(call.path, call.number, each.element),
                    kind=call.kind,
                    order=order,
                    leaf=_is_leaf(modules[call.path]),
                    shape=each.shape,
                    dtype=torch.float32 if later is None else later.dtype,
                    axis=axis,
                    constant=later is not None and _is_constant(later, each.shape, axis),
                    axes=None if later is None or axis is None else _guessed(each.shape, later.shape, axis, size),
                    cut=each.cut,
                    with_companions=call.cut,
                    same=each.same,
                    flops=0 if returned is None else returned.flops,
                )
            )
        base = call.path if repeated[call.path] == 1 else f"{call.path}@{call.number}"
        first = chosen_of(found) if found else None
        seen += [replace(s, name=base if s is first else base + _brackets(s.place.element)) for s in found]
    seen = [_settled(each, seen) for each in seen]
    words = {key: returned.words for key, returned in second.items()}
    kinds = tuple((call.path, call.kind, modules[call.path]) for call in calls)
    return Survey(size, tuple(seen), words, kinds, chosen[0], flops)


@dataclass(frozen=True)
class _Later:
    shape: tuple[int, ...]
    dtype: torch.dtype
    equal: tuple[bool, ...]  # along each axis: are the first and the last entry the same


@dataclass(frozen=True)
class _Returned:
    words: str
    tensors: Mapping[Element, _Later]
    flops: float


def _second_pass(model: nn.Module, inputs: Tensor) -> tuple[dict[tuple[str, int], _Returned], float]:
    """What every call returns without gradients, as targets are recorded, and the operations up to there."""
    returned: dict[tuple[str, int], _Returned] = {}
    counts: Counter[str] = Counter()
    counter = FlopCounterMode(display=False)

    def look(path: str, _module: nn.Module, _given: Any, _named: Any, output: Any) -> None:
        flops = counter.get_total_flops() / len(inputs)
        tensors = {element: _look_at(tensor) for element, tensor in tensors_in(output)}
        returned[path, counts[path]] = _Returned(_words(output), tensors, flops)
        counts[path] += 1

    with watching(model, look), torch.no_grad(), warnings.catch_warnings(), counter:
        warnings.filterwarnings("ignore", r"Using `torch\.compile")  # of hooks that the counter sets on all modules
        model(inputs.clone())
    return returned, counter.get_total_flops() / len(inputs)


def _look_at(tensor: Tensor) -> _Later:
    ends = (
        tensor.select(axis, 0).equal(tensor.select(axis, -1)) if size else True
        for axis, size in enumerate(tensor.shape)
    )
    return _Later(tuple(tensor.shape), tensor.dtype, tuple(ends))


def _image_axis(two: Sequence[int], three: Sequence[int]) -> int | None:
    """The axis that has 2 entries for two images and 3 for three; None where there is none or another one changes."""
    if len(two) != len(three):
        return None
    changed = [axis for axis, pair in enumerate(zip(two, three, strict=True)) if pair[0] != pair[1]]
    return changed[0] if len(changed) == 1 and (two[changed[0]], three[changed[0]]) == (2, 3) else None


def _is_constant(later: _Later, shape: Sequence[int], axis: int | None) -> bool:
    return later.shape == tuple(shape) if axis is None else later.equal[axis]


def _guessed(two: Sequence[int], three: Sequence[int], axis: int, size: Size) -> Axes | None:
    """The axes that look right: the images lie where they are known to, and the grid has the picture's shape."""
    for shape, batch in ((two, 2), (three, 3)):
        axes = guess_axes(shape, batch, size)
        if axes is not None and axes.order.index("b") == axis:
            return axes if axes.order == "bc" or _has_shape_of(axes.grid, size) else None
    return None


def _settled(seen: Seen, among: Sequence[Seen]) -> Seen:
    """A map with as many channels as it is high and wide may be channels-first or -last: as the nearest map that is
    plain is."""
    if not _is_cube(seen):
        return seen
    plain = [each for each in among if each.form == "map" and not _is_cube(each)]
    nearest_map = min(plain, key=lambda each: abs(each.order - seen.order), default=seen)
    return replace(seen, axes=nearest_map.axes and replace(nearest_map.axes, grid=cast(Axes, seen.axes).grid))


def _is_cube(seen: Seen) -> bool:
    return seen.form == "map" and len(set(seen.shape[1:])) == 1


def _has_shape_of(grid: Grid, size: Size) -> bool:
    """Up to one cell, and not finer than the picture; attention weights (B, heads, N, N) are mostly sorted out so."""
    if grid[0] > size[0] or grid[1] > size[1]:
        return False
    return abs(grid[0] - grid[1] * size[0] / size[1]) <= 1 or abs(grid[1] - grid[0] * size[1] / size[0]) <= 1


def _declared_axes(seen: Seen, order: Order | None, grid: Grid | None, size: Size) -> Axes | None:
    """The axes that the user gives, completed; None where they do not fit the tensor."""
    shape = seen.shape
    if order is None:
        axes = guess_axes(shape, 2, size, grid=grid)
        return axes if axes is not None and axes.order.index("b") == seen.axis else None
    if order not in get_args(Order):
        raise BacksightError(f"There are the axes {', '.join(get_args(Order))}, not {order!r}.")
    if len(order) != len(shape) or order.index("b") != seen.axis:
        return None
    if order in ("bchw", "bhwc", "bc"):
        own = (1, 1) if order == "bc" else (shape[order.index("h")], shape[order.index("w")])
        return Axes(order, own) if grid is None or tuple(grid) == own else None
    count, channels = shape[order.index("n")], shape[order.index("c")]
    axes = guess_axes((2, count, channels), 2, size, channels, grid)
    return None if axes is None else replace(axes, order=order)


def chosen_of(found: Sequence[Seen]) -> Seen:
    """Of the tensors of one call: the only cut, else the first on a grid, else the first."""
    cuts = [each for each in found if each.cut]
    if len(cuts) == 1:
        return cuts[0]
    return next((each for each in found if each.form in ("map", "tokens") and not each.constant), found[0])


def _output_element(found: Any, wanted: str | int | None, name: str) -> Element | None:
    there = [element for element, _ in tensors_in(found)]
    if wanted is not None:
        if chosen := [element for element in there if element[:1] == (wanted,)]:
            return chosen[0]
        raise BacksightError(
            f"{name} returns {_words(found)}, in which there is no floating-point tensor {wanted!r}; "
            f"there are: {', '.join(map(_brackets, there)) or 'none'}."
        )
    return next((element for element in there if element[:1] == ("logits",)), there[0] if there else None)


def _words(output: Any) -> str:
    if isinstance(output, Tensor):
        if output.is_quantized:
            return f"a quantised tensor ({str(output.dtype).removeprefix('torch.')})"
        return f"a tensor of {str(output.dtype).removeprefix('torch.')}"
    return "nothing" if output is None else f"a {type(output).__name__}"


@contextmanager
def _explained(model: nn.Module, size: Size) -> Iterator[None]:
    """A failure of the user's own forward pass, with the module where it failed."""
    try:
        yield
    except BacksightError:
        raise
    except Exception as error:
        where = _where(model, error.__traceback__)
        place = f"{type(model).__name__}{f' in {where}' if where else ''}"
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        if "does not require grad" in str(error):
            raise BacksightError(
                f"The forward pass of {place} takes gradients by itself (autograd), and a target is recorded frozen, "
                f"without them: wrap that step in torch.enable_grad() with tensors that require them ({reason})."
            ) from error
        raise BacksightError(
            f"The forward pass of {place} fails on three images of {size} (height, width): {reason}"
        ) from error


def _where(model: nn.Module, traceback: TracebackType | None) -> str:
    """The innermost of the model's modules that was running."""
    names = {id(module): path for path, module in model.named_modules()}
    where = ""
    while traceback is not None:
        where = names.get(id(traceback.tb_frame.f_locals.get("self")), "") or where
        traceback = traceback.tb_next
    return where


def _plain(model: nn.Module) -> nn.Module:
    """Without the wrappers of torch.compile and data-parallel training. Raises where hooks would see nothing."""
    while True:
        if type(model).__name__ == "OptimizedModule":
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            break
    if not isinstance(model, nn.Module):
        raise BacksightError(
            f"A target is made of an nn.Module, not of a {type(model).__name__}: give the model that it was made from."
        )
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise BacksightError(
                f"{path or 'This model'} is TorchScript ({type(module).__name__}), which runs outside of Python, where "
                "hooks see nothing: give the model that it was made from."
            )
    if isinstance(model, torch.fx.GraphModule) and not any(
        node.op == "call_module" and node.target != "_guards_fn" for node in model.graph.nodes
    ):
        raise BacksightError(
            "This model is an exported graph, in which its modules are dissolved, so that there is nothing to tap: "
            "give the model that it was made from."
        )
    return model


def _in_precision_of(model: nn.Module, images: Tensor) -> Tensor:
    """Images as the model's parameters are, in half or double precision too."""
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), images.dtype)
    return images.to(dtype)


def _is_attention(path: str, kind: str) -> bool:
    name = f"{path.rpartition('.')[2]} {kind}".lower()
    return "attention" in name or "attn" in name


def _heads(module: nn.Module, channels: int) -> int:
    """The heads that an attention module says it has, else those of 32 channels; always a divisor of the channels."""
    said = next((getattr(module, n) for n in ("num_heads", "n_heads", "heads", "nhead") if hasattr(module, n)), None)
    heads = said if isinstance(said, int) and said > 0 else max(1, channels // 32)
    return next(each for each in range(heads, 0, -1) if channels % each == 0)


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _keeps_places(kind: str, module: nn.Module) -> bool:
    """Normalisation, activations and what does nothing."""
    activation = type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, nn.MultiheadAttention)
    return activation or "norm" in kind.lower() or isinstance(module, nn.Identity | nn.Dropout)


def _brackets(element: Element) -> str:
    return "".join(f"[{key}]" for key in element)


def _shape(seen: Seen) -> str:
    return " × ".join("B" if axis == seen.axis else str(size) for axis, size in enumerate(seen.shape))
