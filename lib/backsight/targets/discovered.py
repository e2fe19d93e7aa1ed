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

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError, nearest
from backsight.representation import Representation, Tokens
from backsight.targets.axes import USUAL_PREFIX, Axes, Order, readings
from backsight.targets.base import PIXELS, TAP_SETS, Preprocessing, Size, Stage, Target, hash_of, redrawn
from backsight.targets.hooks import Element, Place, brackets, frozen, is_leaf, playing
from backsight.targets.survey import (
    ALL,
    Seen,
    Survey,
    chosen_of,
    output_of,
    plain,
    read_as,
    recommended,
    survey,
)

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_SIZE = (224, 224)
RECOMMENDED = "recommended"

_ATTENTION = re.compile(r"(?i)attention|attn")
_NAME = re.compile(r"(?P<path>[^@\[\]]+)(@(?P<call>\d+))?(?P<given>@in)?(?P<element>(\[[^\[\]]+\])*)")


class Discovered(Target):
    """A target whose taps are tensors of an observed pass."""

    _survey: Survey
    _chosen: dict[str, Seen]  # by tap

    def _axes_at(self, size: Size) -> Mapping[str, Axes]:
        """How the taps are read in images of this size."""
        return {tap: cast(Axes, seen.axes) for tap, seen in self._chosen.items()}

    def _size_of(self, tap: str, tokens: Tokens) -> Size:
        """Of images whose tokens at the tap lie on this grid."""
        return self.image_size

    def _companions(self, seen: Seen) -> dict[str, Seen]:
        """The other tensors of the same output, by their name in `Tokens.context`, where the tap alone is no cut."""
        if seen.cut or not seen.with_companions:
            return {}
        beside = [each for each in reversed(self._survey.beside(seen)) if each.axis is not None or each.split]
        different = {each.same: each for each in beside if each.same not in (seen.same, -1)}
        return {brackets(each.place.element): each for each in different.values()}

    def _places(self, taps: Sequence[str]) -> dict[str, Place]:
        places = {tap: self._chosen[tap].place for tap in taps}
        for tap in taps:
            places |= {f"{tap} {key}": each.place for key, each in self._companions(self._chosen[tap]).items()}
        return places

    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        axes_of = self._axes_at((images.shape[2], images.shape[3]))
        recorded: dict[str, Representation] = {}
        for tap in taps:
            tokens = axes_of[tap].tokens(seen[tap])
            if (tokens.grids[0], tokens.prefix) != (axes_of[tap].grid, axes_of[tap].prefix):
                raise BacksightError(f"{tap} of {self.name} is of another shape here than in the pass that found it.")
            companions = self._companions(self._chosen[tap])
            context = {key: _first(seen[f"{tap} {key}"], each.axis, len(images)) for key, each in companions.items()}
            recorded[tap] = replace(tokens, context=context)
        return recorded

    def _rest(self, tap: str, representation: Any) -> Any:
        axes, channels = self._axes_at(self.image_size)[tap], self._chosen[tap].channels
        fits = isinstance(representation, Tokens) and len(representation.grids) == 1
        if not fits or (representation.channels, representation.prefix) != (channels, axes.prefix):
            raise BacksightError(
                f"{tap} of {self.name} holds tokens of {channels} channels on one grid behind {axes.prefix} prefix "
                f"tokens, not a representation {representation.signature}."
            )
        lacking = [key for key in self._companions(self._chosen[tap]) if key not in representation.context]
        if lacking:
            raise BacksightError(
                f"What lies behind {tap} of {self.name} also reads {', '.join(lacking)}: keep the tokens' context, "
                "which only recorded ones have."
            )
        blank = torch.zeros(1, device=self.device)
        return self._replaced(tap, representation, blank.expand(1, len(self.preprocessing.mean), 1, 1))

    def _replaced(self, tap: str, tokens: Tokens, image: Tensor) -> Any:
        """A forward pass in which the tap's output is these tokens, whatever the image (1, C, …) is."""
        size, seen = self._size_of(tap, tokens), self._chosen[tap]
        tensors = {seen.same: self._axes_at(size)[tap].tensor(tokens)}
        for key, each in self._companions(seen).items():
            tensors[each.same] = _back(tokens.context[key], each.axis)
        places = {each.place: each.same for each in self._survey.beside(seen) if each.same in tensors}
        values = {place: tensors[same] for place, same in {**places, seen.place: seen.same}.items()}
        images = image.to(self.device, self.dtype).expand(tokens.batch, -1, *size)
        with playing(self.model, values):
            return self._forward(self.preprocessing.normalise(images), None)


def _first(tensor: Tensor, axis: int | None, batch: int) -> Tensor:
    """Images first, also where a tensor keeps the parts of all images on one axis (TNT's pixels of all patches)."""
    return tensor.unflatten(0, (batch, -1)) if axis is None else tensor.movedim(axis, 0)


def _back(tensor: Tensor, axis: int | None) -> Tensor:
    return tensor.flatten(0, 1) if axis is None else tensor.movedim(0, axis)


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
        size = " × ".join(map(str, self.image_size))
        return f"{self.name}, images {size}, {len(self.taps)} taps\n{self.describe().to_string(index=False)}"

    def describe(self) -> pd.DataFrame:
        """How each tap is read: tap, module, call, element, shape, axes, grid, prefix, channels, cut.

        cut: "yes", "with its companions" (the other tensors that the module returns), or "no": then `from_tap` is
        refused, and all else works. `from_tap` tries it out before it answers.
        """
        import pandas as pd

        rows = []
        for tap in self.taps:
            seen = self._chosen[tap]
            cut = "yes" if seen.cut else "with its companions" if seen.with_companions else "no"
            place = {"call": seen.place.call, "element": brackets(seen.place.element) or ALL}
            rows.append(
                {"tap": tap, "module": seen.kind, **place, **read_as(seen), "channels": seen.channels, "cut": cut}
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
        order = {each.place: number for number, each in enumerate(self._survey.seen)}
        return tuple(sorted(known, key=lambda tap: order[known[tap].place]))

    def resolve_taps(self, taps: str | Sequence[str]) -> tuple[str, ...]:
        if taps == RECOMMENDED:
            taps = [each.name for each in recommended(self._survey)]
            if not taps:
                why = self._survey.reason or "no module's output is a map or tokens through which all must pass"
                raise BacksightError(
                    f"Nothing can be recommended in {self.name}, for {why}: look at suggest_taps() and name the taps."
                )
        elif isinstance(taps, str) and taps in TAP_SETS:
            if (taps, 0) not in self._survey.calls:
                raise BacksightError(
                    f"{self.name} is a plain module: name its taps one by one, or {RECOMMENDED!r}, not {taps!r}."
                )
            taps = [taps]
        return super().resolve_taps(taps)

    def _refuse_unknown(self, tap: str) -> None:
        if tap not in self._chosen:
            self._chosen[tap] = self._with_axes(tap, self._named(tap))

    def tap_set(self, name: str) -> tuple[str, ...]:
        return self.taps

    def _named(self, tap: str) -> Seen:
        """Which tensor a name means. Raises BacksightError with the reason where it means none."""
        path, number, element, side = self._parsed(tap)
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
        returned = self._survey.calls[path, number or 0]
        here = Place(path, number or 0, side=side)
        found = [each for each in self._survey.seen if each.place.whole == here]
        if not found:
            words = "is given nothing that no module returns" if side == "stream" else f"returns {returned}, in which"
            raise BacksightError(f"{tap} of {self.name} {words} there is no floating-point tensor: tap another module.")
        chosen = [each for each in found if each.place.element == element] if element else [chosen_of(found)]
        if not chosen:
            present = ", ".join(brackets(each.place.element) or "the output itself" for each in found)
            raise BacksightError(f"{tap} of {self.name} is not in what {path} returns ({returned}), but {present} is.")
        return chosen[0]

    def _parsed(self, tap: str) -> tuple[str, int | None, Element, Literal["output", "stream"]]:
        named = dict(self.model.named_modules(remove_duplicate=False))
        parts = _NAME.fullmatch(tap)
        path = tap if tap in named or parts is None else parts["path"]
        if not path or path not in named:
            known = [name for name in dict(self.model.named_modules()) if name]
            raise BacksightError(f"{self.name} has no tap {tap!r}; {nearest(path, known)}.")
        # A module that lies in two places runs under the name of the first.
        first = next(name for name, each in self.model.named_modules() if each is named[path])
        if parts is None or path == tap:
            return first, None, (), "output"
        keys = [key.strip("'\" ") for key in re.findall(r"\[([^\[\]]+)\]", parts["element"])]
        element = tuple(int(key) if key.isdigit() else key for key in keys)
        number = None if parts["call"] is None else int(parts["call"])
        return first, number, element, "stream" if parts["given"] else "output"

    def _with_axes(self, tap: str, seen: Seen) -> Seen:
        what = f"{tap} of {self.name} holds a tensor of shape {seen.shape} for 2 images"
        if seen.constant:
            raise BacksightError(f"{tap} of {self.name} holds the same for every image: there is nothing to invert.")
        if seen.axis is None:
            raise BacksightError(
                f"{what}, and none of its axes holds the images alone (windows or heads lie with them): "
                "tap a module around it."
            )
        order, grid = self._axes.get(tap), self._grids.get(tap)
        if order is not None and order not in get_args(Order):
            raise BacksightError(f"There are the axes {', '.join(get_args(Order))}, not {order!r}.")
        if order is not None or grid is not None:
            grid = None if grid is None else (grid[0], grid[1])
            if not (fitting := readings(seen.shape, seen.axis, self._survey.size, order, grid)):
                given = " and ".join(f"the {n} {v!r}" for n, v in (("axes", order), ("grid", grid)) if v is not None)
                raise BacksightError(f"{what}, which {given} do not fit: correct them.")
            return replace(seen, axes=fitting[0])
        if len(seen.shape) not in (2, 3, 4):
            raise BacksightError(f"{what}, and a tap needs two, three or four axes: tap another module.")
        if seen.axes is None:
            raise BacksightError(
                f"{what}, and its places are no grid of the image of {self._survey.size} (a change of the picture does "
                f"not move the place where it should lie): say grids={{{tap!r}: (height, width)}} (further tokens are "
                f"prefix tokens) or axes={{{tap!r}: …}} if it is one, or tap another module."
            )
        if seen.axes.prefix > USUAL_PREFIX or seen.axes.order == "bcn":
            warnings.warn(
                f"{what} and is read as {seen.axes.order} on the grid {seen.axes.grid} behind {seen.axes.prefix} "
                "prefix tokens, which is unusual: declare grids= or axes= where that is wrong.",
                stacklevel=6,
            )
        return seen

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
        self._refuse_order(tap, previous)
        start = -1 if previous == PIXELS else self._chosen[previous].order
        seen = self._chosen[tap]
        paths = [path for number, (path, _) in enumerate(self._survey.calls) if start < number <= seen.order]
        between = [(path, self.model.get_submodule(path)) for path in paths]
        named = [(path, module, f"{path.rpartition('.')[2]} {type(module).__name__}") for path, module in between]
        attention = [(path, module) for path, module, name in named if _ATTENTION.search(name)]
        if attention:
            outermost = [one for one in attention if not any(one[0].startswith(f"{two[0]}.") for two in attention)]
            return Stage("blocks", len(outermost), _heads(outermost[0][1], seen.channels), 0)
        leaves = [module for _, module in between if is_leaf(module)]
        if leaves and all(map(_keeps_places, leaves)):
            return Stage("norm", 1, 0, 0)
        convolutions = sum("conv" in type(module).__name__.lower() for module in leaves)
        return Stage("convolution", max(1, -(-convolutions // 2)), 0, 0)

    # Passes.

    @property
    def weights_hash(self) -> str:
        """As of every target; taken anew where the user has trained the model on."""
        values = self.model.state_dict(keep_vars=True).values()
        state = tuple((id(each), getattr(each, "_version", 0)) for each in values)
        if self._hashed is None or self._hashed[0] != state:
            self._hashed = (state, hash_of(self.model))
        return self._hashed[1]

    def _canonical(self, *arguments: Any) -> dict[str, Representation]:
        recorded = super()._canonical(*arguments)
        return {tap: tokens.replace(tokens.values.float()) for tap, tokens in recorded.items()}

    def _forward(self, images: Tensor, padding: Tensor | None) -> Tensor:
        with frozen(self.model):
            output = super()._forward(images, padding)
        if self._survey.output is None:
            return torch.empty(len(images), 0, device=images.device)
        return output_of(output, self._survey.output).float()

    def __call__(self, images: Tensor, padding: Tensor | None = None, gradient: bool = False) -> Tensor:
        """The model's own output. Raises BacksightError where that is no floating-point tensor of all images."""
        self._refuse_no_output()
        return cast(Tensor, super().__call__(images, padding, gradient))

    def _refuse_no_output(self) -> None:
        if self._survey.output is None:
            raise BacksightError(
                f"{self.name} returns no floating-point tensor with an axis of images (a list of answers, one "
                "an image, is none): its taps can be recorded, no more."
            )

    def _replaced(self, tap: str, tokens: Tokens, image: Tensor) -> Any:
        self._refuse_no_output()
        if tap not in self._checked:
            self._checked[tap] = self._why_no_rest(tap, tokens)
        if self._checked[tap]:
            raise BacksightError(self._checked[tap])
        return super()._replaced(tap, tokens, image)

    def _why_no_rest(self, tap: str, tokens: Tokens) -> str:
        """Why the rest of the pass cannot be run from this tap alone, in one sentence, or ""."""
        seen = self._chosen[tap]
        around = (
            f"The rest of {self.name} cannot be run from {tap}: its output does not depend on {tap} alone "
            "(a connection goes around it)."
        )
        if not (seen.cut or seen.with_companions) and any(each.cut for each in self._survey.seen):
            return around
        # Autograd sees no path through detached or discrete steps: whether the image still matters is tried out.
        one, shape = tokens.detach().index(0), (1, len(self.preprocessing.mean), *self.image_size)
        noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            first, second = (super(ModuleTarget, self)._replaced(tap, one, i) for i in (torch.zeros(shape), noise))
        scale = float(first.abs().max())
        return "" if bool((first - second).abs().max() <= 1e-4 * scale) else around

    def with_model(self, model: nn.Module) -> ModuleTarget:
        """The same taps, read in the same way, of another model of this architecture (other weights, another seed)."""
        grids = {tap: grid for tap, grid in self._grids.items() if tap in self.taps}
        axes = {tap: order for tap, order in self._axes.items() if tap in self.taps}
        return ModuleTarget(model, self.taps, self.preprocessing, grids, axes, self._output, self.name)

    def _randomised(self) -> nn.Module:
        def draw(model: nn.Module) -> None:
            for module in model.modules():
                # nn.MultiheadAttention has the method under a private name.
                getattr(module, "reset_parameters", getattr(module, "_reset_parameters", lambda: None))()

        return redrawn(self.model, draw, self.name)


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
    model returns is its output (default: "logits" where there is one, else the first float tensor), or "all" of them,
    flat, one after the other; name: for tables and files, default the module's class. A compiled or data-parallel
    module is unwrapped. Shapes are found by two passes on random images. `print(target)` shows how every tap is read.
    Raises BacksightError on unknown taps, taps that never run, run repeatedly, hold no float tensor or nothing of the
    image, grids and axes that do not fit, a module whose forward pass fails, and TorchScript or exported graphs.
    """
    if preprocess is None:
        size = image_size or DEFAULT_SIZE
        preprocess = Preprocessing((0.0,) * 3, (1.0,) * 3, size)
    elif image_size is not None:
        preprocess = replace(preprocess, size=image_size)
    return ModuleTarget(module, taps, preprocess, grids, axes, output, name)


def _heads(module: nn.Module, channels: int) -> int:
    """The heads that an attention module says it has, else those of 32 channels; always a divisor of the channels."""
    said = next((getattr(module, n) for n in ("num_heads", "n_heads", "heads", "nhead") if hasattr(module, n)), None)
    heads = said if isinstance(said, int) and said > 0 else max(1, channels // 32)
    return next(each for each in range(heads, 0, -1) if channels % each == 0)


def _keeps_places(module: nn.Module) -> bool:
    """Normalisation, activations and what does nothing."""
    activation = type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, nn.MultiheadAttention)
    return activation or "norm" in type(module).__name__.lower() or isinstance(module, nn.Identity | nn.Dropout)
