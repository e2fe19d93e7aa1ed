"""A machine with a pretended accelerator: CPU tensors, some of which count as lying on "cuda".

    with Pretended() as device:
        device.put(target.model)            its parameters and buffers lie there
        fit(…)                              raises MixedDevicesError where an operation meets tensors of both sides

What lies there is told by `tensor.device`, and follows every operation; factories, `.to()`, `.cpu()` and generators
take part. As on a real one, numbers () of the CPU mix with everything, CPU indices may index, and `copy_` crosses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("cuda", 0)
aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index_put.default)
CROSSING = (aten.copy_.default, aten._to_copy.default)


class MixedDevicesError(AssertionError):
    """What torch says of tensors on two devices."""


class Pretended:
    """Which storages lie on the pretended device; a context in which operations are watched."""

    def __init__(self) -> None:
        self.storages: dict[int, bool] = {}
        self.inside = False  # a function of tensors there, whose own temporaries lie there as well
        self.modes = (_Operations(self), _Functions(self))
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        from_numpy, fork_rng = torch.from_numpy, torch.random.fork_rng
        self.patch.setattr(torch.random, "fork_rng", lambda devices=(): fork_rng(devices=[]))
        self.patch.setattr(torch.cuda, "default_generators", (torch.Generator(),))
        self.patch.setattr(torch, "Generator", _Generator)
        self.patch.setattr(torch, "from_numpy", lambda array: self.mark(from_numpy(array), False))
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)
        self.patch.undo()

    def holds(self, tensor: Tensor) -> bool:
        return self.storages.get(tensor.untyped_storage()._cdata, False)

    def mark(self, value: Any, there: bool) -> Any:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                self.storages[tensor.untyped_storage()._cdata] = there
        return value

    def put(self, module: nn.Module) -> None:
        self.mark([*module.parameters(), *module.buffers()], True)


class _Generator(torch.Generator):
    def __new__(cls, device: object = None) -> torch.Generator:
        return super().__new__(cls)


class _Operations(TorchDispatchMode):
    """Outputs lie where the inputs do."""

    def __init__(self, device: Pretended) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((arguments, named or {})) if isinstance(leaf, Tensor)]
        sides = {self.device.holds(tensor) for tensor in tensors if tensor.ndim or self.device.holds(tensor)}
        if function in INDEXING and tensors and self.device.holds(tensors[0]):
            sides = {True}
        if len(sides) > 1 and function not in CROSSING:
            shapes = [(tuple(tensor.shape), "cuda" if self.device.holds(tensor) else "cpu") for tensor in tensors]
            raise MixedDevicesError(f"{function}: expected all tensors to be on the same device, but got {shapes}")
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self.device.mark(tensor, True in sides or (not tensors and self.device.inside))
        return result


class _Functions(TorchFunctionMode):
    """Where devices are asked for and named."""

    def __init__(self, device: Pretended) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        named = dict(named or {})
        if function == torch.Tensor.device.__get__:
            return THERE if self.device.holds(arguments[0]) else torch.device("cpu")
        if function == torch.Tensor.is_cuda.__get__:
            return self.device.holds(arguments[0])
        if function is torch.Tensor.numpy and self.device.holds(arguments[0]):
            raise MixedDevicesError("can't convert a cuda tensor to numpy: use .cpu() first")
        if function in (torch.Tensor.cpu, torch.Tensor.cuda):
            return self.device.mark(arguments[0].detach().clone(), function is torch.Tensor.cuda)
        if function is torch.Tensor.pin_memory:
            return arguments[0]
        if function is torch.Tensor.to:
            return self._moved(function, arguments, named)
        if function is torch.Tensor.__getitem__ and isinstance(arguments[1], list):
            arguments = (arguments[0], self.device.mark(torch.tensor(arguments[1]), False))
        wanted = named.pop("device", None)
        inputs = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)]
        there = torch.device(wanted).type == "cuda" if wanted is not None else any(map(self.device.holds, inputs))
        if wanted is not None:
            named["device"] = torch.device("cpu")
        self.device.inside = there
        try:
            result = function(*arguments, **named)
        finally:
            self.device.inside = False
        # What is made of Python's own numbers passes no operation.
        made = function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        return self.device.mark(result, there) if wanted is not None or made else result

    def _moved(self, function: Callable[..., Any], arguments: Any, named: dict[str, Any]) -> Tensor:
        tensor, *others = arguments
        beside = [other for other in (*others, named.get("other")) if isinstance(other, Tensor)]
        wanted = [other for other in (*others, named.get("device")) if isinstance(other, torch.device | str)]
        there = self.device.holds(tensor)
        if beside:
            there = self.device.holds(beside[0])
        elif wanted:
            there = torch.device(wanted[0]).type == "cuda"
        cpu = tree_map(lambda value: torch.device("cpu") if value in wanted else value, others) if wanted else others
        named = {**named, "device": torch.device("cpu")} if "device" in named else named
        result = function(tensor, *cpu, **named)
        if there != self.device.holds(tensor):
            result = self.device.mark(result.clone(), there)
        return result
