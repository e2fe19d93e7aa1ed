"""What there is to tap in any model: two passes, seen from every module.

survey(model, preprocessing, images)     every float tensor: its axes, and whether it is a cut
suggest_taps(model, images)              the same as a table, in the order of execution
"""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backsight.errors import BacksightError
from backsight.targets.axes import SQUARES, readings, squares_found, with_squares
from backsight.targets.base import Preprocessing, Size, device_of, dtype_of, times
from backsight.targets.hooks import Element, Found, Place, brackets, element_of, frozen, observe, tensors_in, watching
from backsight.targets.outline import outline

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Survey:
    """What two passes have shown: every tensor, in the order in which the calls end.

    calls: the module of every call; output: the model's own, None where it is none for several images; reason: why no
    cuts could be found, or "".
    """

    found: list[Found]
    calls: list[str]
    output: Element | None
    reason: str


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
        recommended  cuts on a grid, one name each: what enters the blocks, blocks, ends of stages, what follows them
    Raises BacksightError where the model's forward pass fails, and on TorchScript or exported graphs.
    """
    import pandas as pd

    model = plain(model)
    if isinstance(images, tuple):
        images = torch.rand(2, len(preprocess.mean) if preprocess else 3, *images, generator=_generator(0))
    elif not isinstance(images, Tensor):
        source: Sequence[Any] = images
        first = torch.stack([source[number]["image"] for number in range(min(2, len(source)))])
        images = first / (1 if first.is_floating_point() else 255)
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise BacksightError(
            f"suggest_taps needs float images (batch, channels, height, width) in [0, 1], or (height, width), not "
            f"{images.dtype} of shape {tuple(images.shape)}."
        )
    channels, size = images.shape[1], (images.shape[2], images.shape[3])
    result = survey(model, preprocess or Preprocessing((0.0,) * channels, (1.0,) * channels, size), images, output)
    shown = [each for each in result.found if each.place.module and not each.constant]
    table = pd.DataFrame([read_as(each, form=each.form) | {"cut": each.cut} for each in shown])
    flops = max((each.flops for each in result.found), default=0)
    table["cost"] = [round(each.flops / flops, 3) if flops else math.nan for each in shown]
    chosen = outline(model, result.found).taps
    outermost_last = sorted(reversed(shown), key=lambda each: (each.cut, -each.place.module.count(".")))
    preferred = {each.same: each.name for each in (*outermost_last, *chosen) if each.same >= 0}
    names = [preferred.get(each.same, each.name) for each in shown]
    table["same_as"] = ["" if name == each.name else name for name, each in zip(names, shown, strict=True)]
    return table.assign(recommended=[each in chosen for each in shown])


def read_as(found: Found, **further: str) -> dict[str, Any]:
    """A row of a table: tap, module, what is said further, shape, axes, grid and prefix."""
    shape = times(*("B" if axis == found.batch else size for axis, size in enumerate(found.shape)))
    axes = ("", "", 0) if found.axes is None else (found.axes.order, times(*found.axes.grid), found.axes.prefix)
    known = zip(("axes", "grid", "prefix"), axes, strict=True)
    return {"tap": found.name, "module": found.kind, **further, "shape": shape, **dict(known)}


# Two passes, seen from every module.


def survey(model: nn.Module, preprocessing: Preprocessing, images: Tensor, output: str | int | None = None) -> Survey:
    """Every float tensor of a model, by two passes that leave it as it was.

    images: (B, C, H, W) in [0, 1]; two of them are used, or made from the first. The second pass is of the first image,
    with squares of it changed, and of noise: it tells the axis of the images from every other one, what is the same for
    every image, and where on a grid a tensor holds which part of the picture.
    Raises BacksightError where a pass fails.
    """
    size, first, name = (images.shape[2], images.shape[3]), images[:1], type(model).__name__
    noise = torch.rand(first.shape, generator=_generator(1)).to(images)
    two, ten = torch.cat([images, first.flip(3)])[:2], torch.cat([with_squares(first), noise])
    device, dtype = device_of(model), dtype_of(model)
    two, ten = (preprocessing.normalise(each.to(device)).to(dtype) for each in (two, ten))
    element: Element | None = None

    def run(batch: Tensor) -> Any:
        nonlocal element
        returned = model(batch)
        element = _output_element(returned, output, name)
        return None if element is None else element_of(returned, element)

    with frozen(model), _explained(model, size):
        found, reason = observe(model, run, two)
        before = torch.get_rng_state()
        calls = _second_pass(model, ten, found, size)
        if not torch.equal(before, torch.get_rng_state()):
            warnings.warn(
                f"{name} draws random numbers in eval mode (a mask of its tokens, perhaps): the images of a batch may "
                "be treated in different ways, the same in every pass.",
                stacklevel=4,
            )
    cost, returned = math.inf, dict[Place, list[Found]]()
    for each in reversed(found):
        each.flops = cost = min(each.flops, cost)  # what a module is given costs no more than what follows
        returned.setdefault(each.place.whole, []).insert(0, each)
    for tensors in returned.values():  # the element is not said of the one that is meant then
        meant = chosen_of(tensors)
        meant.name = meant.name.removesuffix(brackets(meant.place.element))
    # What a module is given is a tap only where it is a representation, and not the picture itself.
    found = [f for f in found if f.place.side == "output" or (f.axes and f.is_picture and f.axes.grid != size)]
    answers = [each.place.element for each in found if not each.place.module and each.batch is not None]
    return Survey(found, calls, element if element in answers else None, reason)


def _second_pass(model: nn.Module, inputs: Tensor, found: Sequence[Found], size: Size) -> list[str]:
    """Fills axes and costs into `found`; returns the module of every call."""
    at = {each.place: each for each in found}
    calls: list[str] = []
    counter = FlopCounterMode(display=False)

    def look(path: str, _module: nn.Module, given: Any, _named: Any, output: Any) -> None:
        call, flops = calls.count(path), counter.get_total_flops() / len(inputs)
        tensors = {Place(path, call, element): tensor for element, tensor in tensors_in(output)}
        if given and isinstance(given[0], Tensor):
            tensors[Place(path, call, (), "stream")] = given[0]
        for place in tensors.keys() & at:
            at[place].flops = flops
            _read(at[place], tensors[place], size)
        calls.append(path)

    with watching(model, look), torch.no_grad(), warnings.catch_warnings(), counter:
        warnings.filterwarnings("ignore", r"Using `torch\.compile")  # of hooks that the counter sets on all modules
        model(inputs.clone())
    return calls


def _read(found: Found, tensor: Tensor, size: Size) -> None:
    """How a tensor of two images is to be read, by the same tensor of the second pass."""
    images, sides = len(SQUARES) + 2, list(zip(found.shape, tensor.shape, strict=False))
    changed = [axis for axis, (before, after) in enumerate(sides) if before != after]
    if len(found.shape) != tensor.ndim or [sides[axis] for axis in changed] != [(2, images)]:
        found.batch, found.constant = None, found.shape == tuple(tensor.shape)
        return
    found.batch = axis = changed[0]
    found.constant = tensor.select(axis, 0).equal(tensor.select(axis, -1))
    options = [] if found.constant else readings(found.shape, axis, size)
    if options and options[0].grid != (1, 1):
        squares = {each: squares_found(each, tensor) for each in options}
        options.sort(key=lambda each: -squares[each][0])
        cells = math.prod(options[0].grid)
        # What tokens are is known by nothing else; a map has the picture's proportions, and a small one moves whole.
        if tensor.ndim == 3 or cells >= 100:
            options = [each for each in options if squares[each][1]]
        elif squares[options[0]][0] == 0 and cells >= 16:
            options = []
    found.axes = options[0] if options else None


def chosen_of(found: Sequence[Found]) -> Found:
    """Of the tensors of one call: the only cut, else the first on a grid, else the first."""
    cuts = [each for each in found if each.cut]
    return cuts[0] if len(cuts) == 1 else next((each for each in found if each.is_picture), found[0])


def _output_element(returned: Any, wanted: str | int | None, name: str) -> Element | None:
    present = [element for element, _ in tensors_in(returned)]
    if wanted is None:
        wanted = "logits" if any(element[:1] == ("logits",) for element in present) else None
        return next((element for element in present if wanted is None or element[:1] == (wanted,)), None)
    if chosen := [element for element in present if element[:1] == (wanted,)]:
        return chosen[0]
    raise BacksightError(
        f"{name} returns no floating-point tensor {wanted!r}; there are: {', '.join(map(brackets, present)) or 'none'}."
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextmanager
def _explained(model: nn.Module, size: Size) -> Iterator[None]:
    """A failure of the user's own forward pass, with the innermost module where it failed."""
    try:
        yield
    except BacksightError:
        raise
    except Exception as error:
        names = {id(module): path for path, module in model.named_modules()}
        ran = [names.get(id(frame.f_locals.get("self"))) for frame, _ in traceback.walk_tb(error.__traceback__)]
        where = f" in {inner[-1]}" if (inner := [path for path in ran if path]) else ""
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        parts = [name for name in ("vision_model", "visual", "vision_tower", "image_encoder") if hasattr(model, name)]
        hint = f" If it takes text too, give its .{parts[0]}." if parts else ""
        if "does not require grad" in str(error):
            hint = " It takes gradients by itself: wrap that in torch.enable_grad() with tensors that require them."
        what = f"The forward pass of {type(model).__name__}{where}"
        raise BacksightError(f"{what} fails on images of {size} (height, width): {reason}.{hint}") from error


def plain(model: nn.Module) -> nn.Module:
    """Without the wrappers of torch.compile and data-parallel training. Raises where hooks would see nothing."""
    while (wrapper := type(model).__name__) in ("OptimizedModule", "DataParallel", "DistributedDataParallel"):
        model = model.get_submodule("_orig_mod" if wrapper == "OptimizedModule" else "module")
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    nodes = model.graph.nodes if isinstance(model, torch.fx.GraphModule) else ()
    dissolved = nodes and not any(node.op == "call_module" and node.target != "_guards_fn" for node in nodes)
    if not modules or dissolved or any(isinstance(each, torch.jit.ScriptModule) for each in modules.values()):
        raise BacksightError(
            f"A target is made of an nn.Module whose parts run in Python, where hooks see them, not of a {wrapper} "
            "(TorchScript or an exported graph): give the model that it was made from."
        )
    if meta := [path for path, tensor in model.state_dict(keep_vars=True).items() if getattr(tensor, "is_meta", False)]:
        raise BacksightError(f"{meta[0]} lies on the meta device, without values: load the weights first.")
    return model
