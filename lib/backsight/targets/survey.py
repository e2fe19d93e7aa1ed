"""What there is to tap in a model: two passes, seen from every module.

survey(model, preprocessing, images)     every float tensor: its axes, and whether it is a cut
recommended(survey)                      cuts on a grid, one name for each tensor
suggest_taps(model, images)              the same as a table, in the order of execution
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backsight.errors import BacksightError
from backsight.targets.axes import SQUARES, Axes, moved, readings, squares_found, with_squares
from backsight.targets.base import Preprocessing, Size, device_of, dtype_of
from backsight.targets.hooks import Element, Found, Place, brackets, element_of, frozen, observe, tensors_in, watching

if TYPE_CHECKING:
    import pandas as pd

ALL = "all"


@dataclass
class Seen(Found):
    """A tensor, as the passes of a survey have shown it: of two images in the first.

    axis: along which the images lie, None where none does; split: the first axis holds the parts of all images;
    constant: the same for every image; axes: how it is read, or None; flops: up to the end of the call, of one image.
    """

    axis: int | None = 0
    split: bool = False
    constant: bool = False
    axes: Axes | None = None
    flops: float = 0.0

    @property
    def grid(self) -> Size | None:
        return None if self.axes is None else self.axes.grid

    @property
    def form(self) -> Literal["map", "tokens", "vector", "other"]:
        if self.axes is None:
            return "other"
        return "vector" if self.grid == (1, 1) else "map" if "h" in self.axes.order else "tokens"

    @property
    def is_picture(self) -> bool:
        return self.form in ("map", "tokens") and not self.constant

    @property
    def channels(self) -> int:
        return cast(Axes, self.axes).channels(self.shape)


@dataclass(frozen=True)
class Survey:
    """What the passes of a model have shown: every call's tensors, in the order in which the calls end.

    calls: {(path, number): what the call returned, in words}; output: the model's own, None where it is none for
    several images; flops: of the whole pass, of one image; reason: why no cuts could be found, or "".
    """

    size: Size
    seen: tuple[Seen, ...]
    calls: Mapping[tuple[str, int], str] = field(default_factory=dict)
    output: Element | None = None
    flops: float = 0.0
    reason: str = ""

    def beside(self, seen: Seen) -> list[Seen]:
        """The other tensors of the same output."""
        place = seen.place
        return [each for each in self.seen if each.place.whole == place.whole and each.place != place]


def suggest_taps(
    model: nn.Module,
    images: Tensor | Sequence[Any] | Size,
    preprocess: Preprocessing | None = None,
    output: str | int | None = None,
) -> pd.DataFrame:
    """What can be tapped in an unknown model, in the order of execution; the model stays as it is.

    images: (B, C, H, W) float in [0, 1] or an ImageSource, of which two are used, or (H, W) for random ones;
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

    model = plain(model)
    if isinstance(images, tuple):
        channels = 3 if preprocess is None else len(preprocess.mean)
        images = torch.rand(2, channels, *images, generator=torch.Generator().manual_seed(0))
    elif not isinstance(images, Tensor):
        examples = cast("Sequence[Any]", images)
        first = [examples[number]["image"] for number in range(min(2, len(examples)))]
        images = torch.stack(first) / (1 if first[0].is_floating_point() else 255)
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise BacksightError(
            f"suggest_taps needs float images (batch, channels, height, width) in [0, 1], or (height, width), not "
            f"{images.dtype} of shape {tuple(images.shape)}."
        )
    channels, size = images.shape[1], (images.shape[2], images.shape[3])
    found = survey(model, preprocess or Preprocessing((0.0,) * channels, (1.0,) * channels, size), images, output)
    chosen = {each.name for each in recommended(found)}
    alias = _aliases(found)
    rows = []
    for each in found.seen:
        if each.place.module and not each.constant:
            row = {"tap": each.name, "module": each.kind, "form": each.form, **read_as(each), "cut": each.cut}
            row["cost"] = round(each.flops / found.flops, 3) if found.flops else float("nan")
            rows.append(row | {"same_as": alias.get(each.name, ""), "recommended": each.name in chosen})
    return pd.DataFrame(rows)


def read_as(seen: Seen) -> dict[str, Any]:
    shape = " × ".join("B" if axis == seen.axis else str(size) for axis, size in enumerate(seen.shape))
    if seen.axes is None:
        return {"shape": shape, "axes": "", "grid": "", "prefix": 0}
    grid = " × ".join(map(str, seen.axes.grid))
    return {"shape": shape, "axes": seen.axes.order, "grid": grid, "prefix": seen.axes.prefix}


def recommended(found: Survey) -> list[Seen]:
    """Cuts on a grid, one name for each tensor: whole blocks and components, and the last of each grid.

    What modules are given counts where no module with parts returns a cut.
    """
    alias = _aliases(found)
    on_grid = [each for each in found.seen if each.cut and each.is_picture and each.name not in alias]
    on_grid = [each for each in on_grid if each.place.module]
    composites = {each.place.module for each in on_grid if not each.leaf and each.place.side == "output"}
    cuts = [each for each in on_grid if each.place.side == "output" or not composites]
    last = {each.grid: each.name for each in cuts}
    chosen = []
    for each, following in zip(cuts, [*cuts[1:], None], strict=False):
        inside = any(each.place.module.startswith(f"{path}.") for path in composites)
        step = inside or (following is not None and following.leaf)  # of several: a convolution, then its norm …
        if not each.leaf or not step or each.name in last.values() or each.place.side == "stream":
            chosen.append(each)
    return chosen


def _aliases(found: Survey) -> dict[str, str]:
    """{name: the name to prefer} of tensors that several modules return: a repeated block, else the outermost one; a
    place that is a cut before one that is none."""
    modules = {(each.place.module, each.kind) for each in found.seen}
    kinds = Counter((path.rpartition(".")[0], kind) for path, kind in modules)

    def preference(seen: Seen) -> tuple[bool, bool, int, int]:
        path = seen.place.module
        parent, _, name = path.rpartition(".")
        repeated = not seen.leaf and name.isdigit() and kinds[parent, seen.kind] > 1
        depth = path.count(".")
        return not seen.cut, not repeated, -depth if repeated else depth, len(seen.place.element)

    groups: dict[int, list[Seen]] = {}
    for each in found.seen:
        if each.same >= 0 and each.place.module and each.axes is not None:
            groups.setdefault(each.same, []).append(each)
    best = {same: min(group, key=preference).name for same, group in groups.items()}
    return {each.name: best[same] for same, group in groups.items() for each in group if each.name != best[same]}


# Two passes, seen from every module.


def seen_in(found: Sequence[Found]) -> list[Seen]:
    """What is found in a pass of two images; the first axis is theirs where it has two places."""
    axes = [0 if one.shape[:1] == (2,) else None for one in found]
    return [Seen(**vars(one), axis=axis, split=axis is None) for one, axis in zip(found, axes, strict=True)]


def survey(model: nn.Module, preprocessing: Preprocessing, images: Tensor, output: str | int | None = None) -> Survey:
    """Every float tensor of a model, by two passes that leave it as it was.

    images: (B, C, H, W) in [0, 1]; two of them are used, or made from the first. The second pass is of the first image,
    with squares of it changed, and of noise: it tells the axis of the images from every other one, what is the same for
    every image, and where on a grid a tensor holds which part of the picture.
    Raises BacksightError where a pass fails.
    """
    device, dtype = device_of(model), dtype_of(model)
    size, first = (images.shape[2], images.shape[3]), images[:1]
    noise = torch.rand(first.shape, generator=torch.Generator().manual_seed(1)).to(images)
    two, ten = torch.cat([images, first.flip(3)])[:2], torch.cat([with_squares(first), noise])
    two, ten = (preprocessing.normalise(each.to(device)).to(dtype) for each in (two, ten))
    chosen: list[Element | None] = []

    def run(batch: Tensor) -> Any:
        returned = model(batch)
        chosen[:] = [_output_element(returned, output, type(model).__name__)]
        return None if chosen[0] is None else output_of(returned, chosen[0])

    with frozen(model), _explained(model, size):
        found, reason = observe(model, run, two)
        before = torch.get_rng_state()
        seen = {each.place: each for each in seen_in(found)}
        words, flops = _second_pass(model, ten, seen, size)
        if not torch.equal(before, torch.get_rng_state()):
            warnings.warn(
                f"{type(model).__name__} draws random numbers in eval mode (a mask of its tokens, perhaps): the images "
                "of a batch may be treated in different ways, the same in every pass.",
                stacklevel=4,
            )
    cost, calls = math.inf, dict[Place, list[Seen]]()
    for each in reversed(seen.values()):
        each.flops = cost = min(each.flops, cost)  # what a module is given costs no more than what follows
        calls.setdefault(each.place.whole, []).insert(0, each)
    for returned in calls.values():  # the element is not said of the one that is meant then
        meant = chosen_of(returned)
        meant.name = meant.name.removesuffix(brackets(meant.place.element))
    # What a module is given is a tap only where it is a representation, and not the picture itself.
    pictures = {each.name for each in seen.values() if each.form in ("map", "tokens") and each.grid != size}
    taps = tuple(each for each in seen.values() if each.place.side == "output" or each.name in pictures)
    answers = [(ALL,), *(each.place.element for each in taps if not each.place.module and each.axis is not None)]
    answered = chosen[0] if chosen[0] in answers else None
    return Survey(size, taps, words, answered, flops, reason)


def _second_pass(
    model: nn.Module, inputs: Tensor, seen: dict[Place, Seen], size: Size
) -> tuple[dict[tuple[str, int], str], float]:
    """Fills axes and costs into `seen`; returns what every call returns, in words, and all operations."""
    words: dict[tuple[str, int], str] = {}
    counts: Counter[str] = Counter()
    counter = FlopCounterMode(display=False)

    def look(path: str, _module: nn.Module, given: Any, _named: Any, output: Any) -> None:
        flops = counter.get_total_flops() / len(inputs)
        tensors = {Place(path, counts[path], element): tensor for element, tensor in tensors_in(output)}
        if given:
            tensors |= {Place(path, counts[path], (), "stream"): tensor for e, tensor in tensors_in(given[0]) if not e}
        for place, tensor in tensors.items():
            if place in seen:
                seen[place] = replace(_read(seen[place], tensor, size), flops=flops)
        words[path, counts[path]] = _words(output)
        counts[path] += 1

    with watching(model, look), torch.no_grad(), warnings.catch_warnings(), counter:
        warnings.filterwarnings("ignore", r"Using `torch\.compile")  # of hooks that the counter sets on all modules
        model(inputs.clone())
    return words, counter.get_total_flops() / len(inputs)


def _read(seen: Seen, tensor: Tensor, size: Size) -> Seen:
    """How a tensor of two images is to be read, by the same tensor of the second pass."""
    pairs, grown = list(zip(seen.shape, tensor.shape, strict=False)), (2, len(SQUARES) + 2)
    changed = [place for place, (before, after) in enumerate(pairs) if before != after]
    axis = changed[0] if len(changed) == 1 and pairs[changed[0]] == grown else None
    if axis is None or len(seen.shape) != tensor.ndim:
        split = bool(seen.shape) and tensor.ndim > 0 and tensor.shape[0] * 2 == seen.shape[0] * (len(SQUARES) + 2)
        return replace(seen, axis=None, split=split, constant=tuple(tensor.shape) == seen.shape)
    if tensor.select(axis, 0).equal(tensor.select(axis, -1)):
        return replace(seen, axis=axis, constant=True)
    options = readings(seen.shape, axis, size)
    if options and options[0].grid != (1, 1):
        change = moved(tensor, axis)
        found = {each: squares_found(each, change) for each in options}
        options.sort(key=lambda each: -found[each][0])
        cells = math.prod(options[0].grid)
        # What tokens are is known by nothing else; a map has the picture's proportions, and a small one moves whole.
        if tensor.ndim == 3 or cells >= 100:
            options = [each for each in options if found[each][1]]
        elif found[options[0]][0] == 0 and cells >= 16:
            options = []
    return replace(seen, axis=axis, axes=options[0] if options else None)


def chosen_of(found: Sequence[Seen]) -> Seen:
    """Of the tensors of one call: the only cut, else the first on a grid, else the first."""
    cuts = [each for each in found if each.cut]
    if len(cuts) == 1:
        return cuts[0]
    return next((each for each in found if each.is_picture), found[0])


def _output_element(found: Any, wanted: str | int | None, name: str) -> Element | None:
    present = [element for element, _ in tensors_in(found)]
    if wanted == ALL and present and not any(element[:1] == (ALL,) for element in present):
        return (ALL,)
    if wanted is not None:
        if chosen := [element for element in present if element[:1] == (wanted,)]:
            return chosen[0]
        raise BacksightError(
            f"{name} returns {_words(found)}, in which there is no floating-point tensor {wanted!r}; "
            f"there are: {', '.join(map(brackets, present)) or 'none'}."
        )
    return next((element for element in present if element[:1] == ("logits",)), present[0] if present else None)


def output_of(output: Any, element: Element) -> Tensor:
    if element != (ALL,):
        return element_of(output, element)
    return torch.cat([tensor.flatten(1) for _, tensor in tensors_in(output)], dim=1)


def _words(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a {'quantised ' if output.is_quantized else ''}tensor of {str(output.dtype).removeprefix('torch.')}"
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
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if "does not require grad" in str(error):
            raise BacksightError(
                f"The forward pass of {place} takes gradients by itself (autograd), and a target is recorded frozen, "
                f"without them: wrap that step in torch.enable_grad() with tensors that require them ({reason})."
            ) from error
        parts = [name for name in ("vision_model", "visual", "vision_tower", "image_encoder") if hasattr(model, name)]
        hint = f" If it takes text too, give its .{parts[0]}." if parts else ""
        raise BacksightError(
            f"The forward pass of {place} fails on images of {size} (height, width): {reason}.{hint}"
        ) from error


def _where(model: nn.Module, traceback: TracebackType | None) -> str:
    """The innermost of the model's modules that was running."""
    names = {id(module): path for path, module in model.named_modules()}
    where = ""
    while traceback is not None:
        where = names.get(id(traceback.tb_frame.f_locals.get("self")), "") or where
        traceback = traceback.tb_next
    return where


def plain(model: nn.Module) -> nn.Module:
    """Without the wrappers of torch.compile and data-parallel training. Raises where hooks would see nothing."""
    while type(model).__name__ == "OptimizedModule" or isinstance(
        model, nn.DataParallel | nn.parallel.DistributedDataParallel
    ):
        model = model.get_submodule("_orig_mod" if type(model).__name__ == "OptimizedModule" else "module")
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
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise BacksightError(f"{path} lies on the meta device, without values: load the weights first.")
    if isinstance(model, torch.fx.GraphModule) and not any(
        node.op == "call_module" and node.target != "_guards_fn" for node in model.graph.nodes
    ):
        raise BacksightError(
            "This model is an exported graph, in which its modules are dissolved, so that there is nothing to tap: "
            "give the model that it was made from."
        )
    return model
