"""The only file that registers a hook: read, replace and survey what the modules of a model return.

watching(model, look)           every call of every module in one pass
recording(model, places)        what lies at places
playing(model, values)          the same pass with other values at places: the rest of a model behind a tap
observe(model, run, images)     every tensor of one pass, in order, and which of them are cuts
frozen(model)                   passes that leave a model of the user exactly as it was
"""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from backsight.errors import BacksightError

if TYPE_CHECKING:
    from backsight.targets.axes import Axes

Element = tuple[int | str, ...]
Edge = tuple[Any, int]  # where a tensor comes out of autograd's graph: (node, which of its outputs)


@dataclass(frozen=True)
class Place:
    """One tensor in what a module returns (or is given).

    module: path in named_modules(), "" for the model itself; call: which of its calls in a pass, from 0; element:
    keys that lead to the tensor in a tuple, list, dictionary or data class, () for the output itself; side: "output",
    "input" for the first argument, or the named one with which `element` begins, or "stream": the first, but what is
    played is written into the tensor itself, for models that go on with it outside of the module (x = x + layer(x)).
    """

    module: str
    call: int = 0
    element: Element = ()
    side: Literal["output", "input", "stream"] = "output"

    @property
    def whole(self) -> Place:
        """All that the call returns."""
        return dataclasses.replace(self, element=())


@dataclass
class Found:
    """A float tensor that a module returns, or is given, in a pass.

    kind, leaf: the module's class, and whether it has no children; order: of the call's end in the pass, or before the
    first end inside, for what is given; edge, clock: autograd's; name: as a tap; cut: of the pass; with_companions: all
    that the call returns are one together; used: the output knows of it; same: a number that equal tensors share (a
    block and the container that ends with it), -1 where no path leads from the images to it.
    What a reading adds: batch: the axis of the images, None where none is; constant: the same for every image; axes: or
    None; flops: up to the end of the call, of one image.
    """

    place: Place
    kind: str
    leaf: bool
    order: float
    shape: tuple[int, ...]
    edge: Edge | None
    clock: int
    name: str = ""
    cut: bool = False
    with_companions: bool = False
    used: bool = False
    same: int = -1
    batch: int | None = 0
    constant: bool = False
    axes: Axes | None = None
    flops: float = 0.0

    @property
    def form(self) -> Literal["map", "tokens", "vector", "other"]:
        if self.axes is None:
            return "other"
        return "vector" if self.axes.grid == (1, 1) else "map" if "h" in self.axes.order else "tokens"

    @property
    def is_picture(self) -> bool:
        return self.form in ("map", "tokens")

    @property
    def channels(self) -> int:
        return 0 if self.axes is None else self.axes.channels(self.shape)


def tensors_in(output: Any, at: Element = ()) -> Iterator[tuple[Element, Tensor]]:
    """Every floating-point tensor in nested tuples, lists, dictionaries and data classes, with its keys, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and not output.is_nested:
            yield at, output
        return
    if isinstance(output, Mapping):  # ModelOutput of transformers is one, too
        parts: Any = output.items()
    elif isinstance(output, (tuple, list)):
        parts = enumerate(output)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        parts = ((field.name, getattr(output, field.name)) for field in dataclasses.fields(output))
    else:
        return
    for key, part in parts:
        yield from tensors_in(part, (*at, key))


def element_of(output: Any, element: Element) -> Any:
    """What these keys lead to. Raises LookupError or AttributeError where they lead nowhere."""
    key: Any
    for key in element:
        output = output[key] if isinstance(output, (Mapping, tuple, list)) else getattr(output, str(key))
    return output


def with_element(output: Any, element: Element, value: Any) -> Any:
    """The same output with another value there; the original is left as it is."""
    if not element:
        return value
    key, *rest = element
    inner = with_element(element_of(output, (key,)), tuple(rest), value)
    if isinstance(output, tuple):
        parts = [inner if number == key else part for number, part in enumerate(output)]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    changed = copy.copy(output)
    if isinstance(output, (Mapping, list)):
        changed[key] = inner
    else:
        object.__setattr__(changed, str(key), inner)  # frozen data classes, too
    return changed


@contextmanager
def watching(model: nn.Module, look: Callable[..., None], enter: Callable[..., Any] | None = None) -> Iterator[None]:
    """Call look(path, module, arguments, named arguments, output) after every call of every module.

    enter(path, module, arguments, named arguments): before each call; what it returns, if not None, takes their place.
    """
    with ExitStack() as stack:
        for path, module in model.named_modules():
            stack.enter_context(module.register_forward_hook(partial(look, path), with_kwargs=True))
            if enter is not None:
                stack.enter_context(module.register_forward_pre_hook(partial(enter, path), with_kwargs=True))
        yield


class _SeenError(Exception):
    """Ends a pass of which nothing more is read."""


@contextmanager
def recording(model: nn.Module, places: Mapping[str, Place], stop: bool = False) -> Iterator[dict[str, Any]]:
    """What lies at these places in one pass; a key that never ran is missing after it.

    A tensor is copied, because a later in-place activation would write into it. stop: the pass ends with the last of
    the places, and what follows in the `with` is skipped.
    """
    seen: dict[str, Any] = {}

    def read(name: str, place: Place, value: Any) -> None:
        value = element_of(value, place.element)
        seen[name] = value.clone() if isinstance(value, Tensor) else value
        if stop and len(seen) == len(places):
            raise _SeenError

    with ExitStack() as stack:
        for name, place in places.items():
            stack.enter_context(_visit(model, place, partial(read, name, place)))
        with suppress(_SeenError):
            yield seen


@contextmanager
def playing(model: nn.Module, values: Mapping[Place, Tensor]) -> Iterator[None]:
    """One pass with copies of these tensors at their places.

    An output is replaced before and after the model's own hooks, some of which only read it, and some change it.
    Raises BacksightError where a shape differs.
    """

    def write(place: Place, value: Tensor, output: Any) -> Any:
        present = element_of(output, place.element)
        if present.shape != value.shape:
            raise BacksightError(
                f"{place.module} returns {tuple(present.shape)} here, and {tuple(value.shape)} cannot stand for it."
            )
        if place.side == "stream":
            return present.copy_(value)
        return with_element(output, place.element, value.to(present.dtype))

    with ExitStack() as stack:
        for place, value in values.items():
            visit = partial(write, place, value.clone())
            stack.enter_context(_visit(model, place, visit, prepend=True))
            if place.side == "output":
                stack.enter_context(_visit(model, place, visit))
        yield


def _visit(model: nn.Module, place: Place, visit: Callable[[Any], Any], prepend: bool = False) -> RemovableHandle:
    """Hooks `visit` to the place; what it returns, if not None, takes that place."""
    numbers, module = count(), model.get_submodule(place.module)

    def visited(value: Any) -> Any:
        changed = visit(value) if next(numbers) == place.call else None
        return value if changed is None else changed

    def before(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if place.element and place.element[0] in named:
            return given, visited(named)
        if given:
            return (visited(given[0]), *given[1:]), named
        first = next(iter(named))
        return given, {**named, first: visited(named[first])}

    if place.side == "output":
        return module.register_forward_hook(lambda _module, _given, output: visited(output), prepend=prepend)
    return module.register_forward_pre_hook(before, with_kwargs=True, prepend=prepend)


# Cuts: tensors through which everything goes that the output knows of the image. They are found exactly, from the graph
# that autograd keeps of one pass: all paths from the output back to the image run through a cut, and none reads it
# before the module returns (an earlier tensor that is returned once more is no cut there).


def observe(model: nn.Module, run: Callable[[Tensor], Any], images: Tensor) -> tuple[list[Found], str]:
    """One pass of `run` on the images, seen from every module; the model is frozen and in eval().

    Returns what every call returns, in the order in which they end, with what is given to modules and a cut that none
    returns; and why no cuts could be found from the images on, or "".
    Where autograd loses the images (no_grad, a leaf that is written into), the graph is begun at the input of the first
    module without children; where it cannot be had at all, there are no cuts.
    """
    reason = ""
    for inside in (False, True):
        try:
            found, traced = _observed(model, run, images, inside)
        except BacksightError:
            raise
        except Exception as error:  # of the user's own model, under gradients
            reason = reason or f"its pass fails while gradients are traced ({type(error).__name__}: {error})"
        else:
            if traced:
                return found, f"{reason}; cuts are those behind the first module" if inside else ""
            reason = (
                reason or "its output has no gradient with respect to the images (no_grad, detach, a discrete step)"
            )
    return _observed(model, run, images, None)[0], reason


def _observed(
    model: nn.Module, run: Callable[[Tensor], Any], images: Tensor, inside: bool | None
) -> tuple[list[Found], bool]:
    """(what is found, does the output's graph reach the start?) of one pass.

    inside: the graph starts at the first leaf module, not at the images; None: without gradients.
    """
    calls: list[list[Found]] = []  # what each of them returns
    given_to: list[Found | None] = []  # of the calls that have not ended
    given_first: list[Found] = []
    counts: Counter[str] = Counter()
    starts: list[Tensor] = []

    def seen(place: Place, module: nn.Module, order: float, tensor: Tensor) -> Found:
        known = (type(module).__name__, is_leaf(module), order, tuple(tensor.shape))
        return Found(place, *known, _edge(tensor), torch.autograd._get_sequence_nr())

    def enter(path: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        first: Any = given[0] if given else next(iter(named.values()), None)
        plain = next(tensors_in(first), ((0,), None))[0] == ()
        if inside and not starts and plain and given and is_leaf(module):
            torch.set_grad_enabled(True)  # until the end of the no_grad around it
            starts.append(first.detach().requires_grad_(True).clone())
            first, given = starts[0], (starts[0], *given[1:])
        place = Place(path, counts[path], (), "stream")
        given_to.append(seen(place, module, len(calls) - 0.5, first) if plain else None)
        return given, named

    def look(path: str, module: nn.Module, _given: Any, _named: Any, output: Any) -> None:
        here = partial(Place, path, counts[path])
        calls.append([seen(here(element), module, len(calls), tensor) for element, tensor in tensors_in(output)])
        given_first.extend(filter(None, [given_to.pop()]))
        counts[path] += 1

    with torch.set_grad_enabled(inside is not None), watching(model, look, enter):
        start = images.detach().clone().requires_grad_(inside is False)
        if inside is False:  # a copy, because a model may write into its input, and autograd protects a leaf
            starts.append(start := start.clone())
        output = run(start)
    graph = _Graph([edge for _, tensor in tensors_in(output) if (edge := _edge(tensor)) is not None])
    found = [one for returned in calls for one in returned]
    known = {one.edge for one in found}
    found += {one.edge: one for one in given_first[::-1] if one.edge not in known and graph.is_cut(one)}.values()
    numbers = {edge: number for number, edge in enumerate({one.edge for one in found} - {None})}
    for returned in calls:
        together = graph.all_pass(returned)
        for one in returned:
            one.with_companions = together
    for one in found:
        step = f"@{one.place.call}" if counts[one.place.module] > 1 else ""
        one.name = f"{one.place.module}{step}{'@in' if one.place.side == 'stream' else brackets(one.place.element)}"
        one.cut, one.used, one.same = graph.is_cut(one), one.edge in graph.known, numbers.get(one.edge, -1)
    for one in found:
        one.edge = None  # which would keep the whole graph
    return sorted(found, key=lambda one: one.order), bool(starts) and _edge(starts[0]) in graph.known


def is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def brackets(element: Element) -> str:
    return "".join(f"[{key}]" for key in element)


def _edge(tensor: Tensor) -> Edge | None:
    return None if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def _reads(node: Any) -> list[Edge]:
    return [edge for edge in node.next_functions if edge[0] is not None]


class _Graph:
    """What autograd keeps of one pass, from the output's tensors (roots) to the leaf."""

    def __init__(self, roots: list[Edge]) -> None:
        self.roots = roots
        self.first_read: dict[Edge, int] = {}  # when the first operation read it, on autograd's clock
        # Paths are counted, exactly, as integers: down from a node to the leaf, up from the roots to an edge.
        down: dict[Any, int] = {}  # every node after those that it reads
        pending = [(root, False) for root, _ in roots]
        while pending:
            node, done = pending.pop()
            if done:
                down[node] = sum(down[other] for other, _ in _reads(node)) or 1
            elif node not in down:
                pending += [(node, True), *((other, False) for other, _ in _reads(node))]
        up, through = Counter(root for root, _ in roots), Counter(roots)
        for node in reversed(down):
            for edge in _reads(node):
                up[edge[0]] += up[node]
                through[edge] += up[node]
                clock = node._sequence_nr()
                self.first_read[edge] = min(clock, self.first_read.get(edge, clock))
        total = sum(down[root] for root, _ in roots)
        self.cuts = {edge for edge, paths in through.items() if paths * down[edge[0]] == total}
        self.known = set(through)

    def is_cut(self, one: Found) -> bool:
        """Do all paths run through it, and has none read it before?"""
        return one.edge in self.cuts and self.first_read.get(one.edge, one.clock) >= one.clock

    def all_pass(self, returned: Sequence[Found]) -> bool:
        """Does no path from the roots to the leaf avoid these tensors of one call, read after it?"""
        edges = {one.edge for one in returned} - {None}
        if len(edges) < 2 or edges & self.cuts:
            return any(self.is_cut(one) for one in returned)
        pending, entered = [edge for edge in self.roots if edge not in edges], set[Any]()
        while pending:
            node, _ = pending.pop()
            if node in entered:
                continue
            entered.add(node)
            if not (before := _reads(node)):
                return False
            early = node._sequence_nr() < returned[0].clock
            pending.extend(edge for edge in before if early or edge not in edges)
        return bool(self.roots)


@contextmanager
def seeded(seed: int, *devices: torch.device | str) -> Iterator[None]:
    """The generators of the CPU and of those devices that are CUDA's start at `seed` inside, and stay as they were
    outside: model constructors draw from them."""
    cuda = sorted({device.index or 0 for device in map(torch.device, devices) if device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in cuda)):
            generator.manual_seed(seed)
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode, without gradients of its parameters; after it, it is exactly as it was.

    That is: the mode of every module, which parameters want gradients, what buffers hold, and the random states. A
    model that draws random numbers draws the same ones in every such block. Compiled parts run uncompiled, and torch's
    attention takes its ordinary path, because hooks see nothing of the fast ones.
    """
    modes = [(module, module.training) for module in model.modules()]
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The values of the buffers as they are now; one that a pass replaces (a cache that has grown) stays replaced.
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (a model of a user may draw from it)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(seeded(0, *(parameter.device for parameter in model.parameters())))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for module, _ in modes:
                module.training = False  # not eval(), which some models override
            for parameter in wanting:
                parameter.requires_grad_(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for module, mode in modes:
                module.training = mode
            for parameter in wanting:
                parameter.requires_grad_(True)
            with torch.no_grad():
                for buffer, values in buffers:
                    if not torch.equal(buffer, values):
                        buffer.copy_(values)
