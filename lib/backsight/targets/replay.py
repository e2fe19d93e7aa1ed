"""Places in a forward pass: read what a module returns, put something else there, and find where all must pass.

    observe(model, run)                every module call of one pass, in order: shapes, and which tensors are cuts
    recording_places(model, places)    what lies at places, read by hooks
    playing(model, values)             the same pass with other values at places: the rest of a model behind a tap
    frozen(model)                      passes that leave a model of the user exactly as it was

A *cut* is a tensor through which everything goes that the output knows of the input. It is found exactly, from the
graph that autograd keeps of one pass: of all paths from the output back to the input, all run through a cut.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backsight.errors import BacksightError

Element = tuple[int | str, ...]


@dataclass(frozen=True)
class Place:
    """One tensor in what a module returns (or is given).

    module: path in named_modules(), "" for the model itself; call: which of its calls in a pass, from 0; element:
    keys that lead to the tensor in a tuple, list, dictionary or data class, () for the output itself; side:
    "output", or "input" for the first positional argument.
    """

    module: str
    call: int = 0
    element: Element = ()
    side: str = "output"


@dataclass(frozen=True)
class Found:
    """A tensor at a place: its shape, and whether it is a cut of the pass.

    same: a number that tensors of one pass share where they are one and the same (a block and the container that ends
    with it); -1 where autograd knows no path from the images to it.
    """

    element: Element
    shape: tuple[int, ...]
    cut: bool
    same: int = -1


@dataclass(frozen=True)
class Call:
    """A module's call in a pass.

    path, kind: of the module; number: from 0; found: the float tensors it returns; cut: whether these, taken together,
    are one.
    """

    path: str
    kind: str
    number: int
    found: tuple[Found, ...]
    cut: bool = False


def tensors_in(output: Any, at: Element = ()) -> Iterator[tuple[Element, Tensor]]:
    """Every floating-point tensor in nested tuples, lists, dictionaries and data classes, with its keys, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and not output.is_nested:
            yield at, output
        return
    for key, part in _parts(output):
        yield from tensors_in(part, (*at, key))


def _parts(output: Any) -> Iterator[tuple[int | str, Any]]:
    if isinstance(output, Mapping):  # ModelOutput of transformers is one, too
        yield from output.items()
    elif isinstance(output, (tuple, list)):
        yield from enumerate(output)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        yield from ((each.name, getattr(output, each.name)) for each in dataclasses.fields(output))


def element_of(output: Any, element: Element) -> Any:
    """What these keys lead to. Raises LookupError where they lead nowhere."""
    for key in element:
        if isinstance(output, Mapping):
            output = output[key]
        elif isinstance(output, (tuple, list)):
            output = output[int(key)]
        elif isinstance(key, str) and hasattr(output, key):
            output = getattr(output, key)
        else:
            raise KeyError(key)
    return output


def with_element(output: Any, element: Element, value: Any) -> Any:
    """The same output with another value there; the original is left as it is."""
    if not element:
        return value
    key, *rest = element
    inner = with_element(element_of(output, (key,)), tuple(rest), value)
    if isinstance(output, tuple):
        parts: list[Any] = list(output)
        parts[int(key)] = inner
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    changed = copy.copy(output)
    if isinstance(output, (Mapping, list)):
        changed[key] = inner
        return changed
    return dataclasses.replace(output, **{str(key): inner})


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Raises BacksightError where there is no such module."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise BacksightError(f"{type(model).__name__} has no module {path!r}.") from error


@contextmanager
def recording_places(model: nn.Module, places: Mapping[str, Place]) -> Iterator[dict[str, Any]]:
    """Hooks that read these places for the time of one pass; keys of `places` that never ran are missing after it.

    What is read is copied where it is a tensor, because a later in-place activation would write into it.
    """
    seen: dict[str, Any] = {}

    def reader(name: str, place: Place) -> Callable[[Any], None]:
        def read(value: Any) -> None:
            value = element_of(value, place.element)
            seen[name] = value.clone() if isinstance(value, Tensor) else value

        return read

    with _visiting(model, {place: reader(name, place) for name, place in places.items()}):
        yield seen


@contextmanager
def playing(model: nn.Module, values: Mapping[Place, Tensor]) -> Iterator[None]:
    """Hooks that put these tensors at their places for the time of one pass.

    A tensor takes the shape and type of what it replaces only where the adapter has brought it there: shapes are
    checked. Raises BacksightError where a shape differs, other than by the batch.
    """

    def writer(place: Place, value: Tensor) -> Callable[[Any], Any]:
        def write(output: Any) -> Any:
            there = element_of(output, place.element)
            if there.shape[1:] != value.shape[1:]:
                raise BacksightError(
                    f"{place.module} returns {tuple(there.shape)} here, and {tuple(value.shape)} cannot stand for it."
                )
            return with_element(output, place.element, value)

        return write

    with _visiting(model, {place: writer(place, value) for place, value in values.items()}):
        yield


@contextmanager
def _visiting(model: nn.Module, visits: Mapping[Place, Callable[[Any], Any]]) -> Iterator[None]:
    """Call a visit with what is at its place; what it returns, if anything, takes that place."""
    handles = []
    try:
        by_module: dict[tuple[str, str], dict[int, list[Callable[[Any], Any]]]] = {}
        for place, visit in visits.items():
            by_module.setdefault((place.module, place.side), {}).setdefault(place.call, []).append(visit)
        for (path, side), at_call in by_module.items():
            module = module_at(model, path)
            if side == "output":
                handles.append(module.register_forward_hook(_after(at_call)))
            else:
                handles.append(module.register_forward_pre_hook(_before(at_call), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _after(at_call: Mapping[int, list[Callable[[Any], Any]]]) -> Callable[[nn.Module, Any, Any], Any]:
    count = Counter[str]()

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        for visit in at_call.get(count["calls"], ()):
            changed = visit(output)
            output = output if changed is None else changed
        count["calls"] += 1
        return output

    return hook


def _before(at_call: Mapping[int, list[Callable[[Any], Any]]]) -> Callable[[nn.Module, Any, Any], Any]:
    count = Counter[str]()

    def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        first = inputs[0] if inputs else next(iter(named.values()))
        for visit in at_call.get(count["calls"], ()):
            changed = visit(first)
            first = first if changed is None else changed
        count["calls"] += 1
        if inputs:
            return (first, *inputs[1:]), named
        return inputs, {**named, next(iter(named)): first}

    return hook


@dataclass
class _Seen:
    path: str
    kind: str
    number: int
    tensors: list[tuple[Element, tuple[int, ...], Any]] = field(default_factory=list)


def observe(model: nn.Module, run: Callable[[Tensor], Any], images: Tensor) -> list[Call]:
    """One pass of `run` on the images, seen from every module, in the order in which their calls end.

    images: what `run` takes, float; the model's parameters have to be frozen and the model in eval().
    A model whose output does not depend on the images by a differentiable path has no cuts.
    """
    seen: list[_Seen] = []
    counts: Counter[str] = Counter()

    def looking(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, _inputs: Any, output: Any) -> None:
            call = _Seen(path, type(module).__name__, counts[path])
            counts[path] += 1
            call.tensors = [(element, tuple(tensor.shape), _edge(tensor)) for element, tensor in tensors_in(output)]
            seen.append(call)

        return look

    handles = []
    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_hook(looking(path)))
        leaf = images.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            # A copy, because a model may write into its input, and autograd lets no one write into a leaf.
            output = run(leaf.clone())
    finally:
        for handle in handles:
            handle.remove()
    roots = [edge for _, tensor in tensors_in(output) if (edge := _edge(tensor)) is not None]
    cuts = _cuts(roots)
    numbers: dict[Edge, int] = {}
    for call in seen:
        for _, _, edge in call.tensors:
            if edge is not None:
                numbers.setdefault(edge, len(numbers))
    return [
        Call(
            call.path,
            call.kind,
            call.number,
            tuple(Found(element, shape, edge in cuts, numbers.get(edge, -1)) for element, shape, edge in call.tensors),
            _all_pass_through(roots, {edge for _, _, edge in call.tensors if edge is not None}, cuts),
        )
        for call in seen
    ]


Edge = tuple[Any, int]


def _edge(tensor: Tensor) -> Edge | None:
    """Where a tensor comes out of autograd's graph: (node, which of its outputs)."""
    return None if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def _cuts(roots: list[Edge]) -> set[Edge]:
    """Edges that every path from the roots to a leaf runs through, by counting paths (exactly, as integers)."""
    order: list[Any] = []  # every node after those that it reads from
    entered: set[Any] = set()
    for root, _ in roots:
        pending = [(root, False)]
        while pending:
            node, done = pending.pop()
            if done:
                order.append(node)
            elif node not in entered:
                entered.add(node)
                pending.append((node, True))
                pending.extend((each, False) for each, _ in node.next_functions if each is not None)
    down: dict[Any, int] = {}  # paths from a node to a leaf
    for node in order:
        following = [each for each, _ in node.next_functions if each is not None]
        down[node] = sum(down[each] for each in following) if following else 1
    up: Counter[Any] = Counter()  # paths from the roots to a node
    through: Counter[Edge] = Counter()  # … to one of its outputs
    for edge in roots:
        up[edge[0]] += 1
        through[edge] += 1
    for node in reversed(order):
        for each, number in node.next_functions:
            if each is not None:
                up[each] += up[node]
                through[each, number] += up[node]
    total = sum(down[node] for node, _ in roots)
    return {edge for edge, paths in through.items() if paths * down[edge[0]] == total}


def _all_pass_through(roots: list[Edge], edges: set[Edge], cuts: Collection[Edge]) -> bool:
    """Whether no path from the roots to a leaf avoids these edges."""
    if not roots or not edges:
        return False
    if len(edges) == 1 or any(edge in cuts for edge in edges):
        return any(edge in cuts for edge in edges)
    pending, entered = [edge for edge in roots if edge not in edges], set[Any]()
    while pending:
        node, _ = pending.pop()
        if node in entered:
            continue
        entered.add(node)
        following = [edge for edge in node.next_functions if edge[0] is not None]
        if not following:
            return False
        pending.extend(edge for edge in following if edge not in edges)
    return True


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
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.random.fork_rng(devices=devices))
        try:
            torch.default_generator.manual_seed(0)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(0)
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
