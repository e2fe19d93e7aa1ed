"""Any nn.Module as a target: taps are the names of its modules.

Outputs become tokens: (B, C, h, w) one grid; (B, N, C) one grid, square unless `grids` says otherwise; (B, C) one
token; of a tuple, list or dictionary the first tensor counts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.representation import Representation, Tokens
from backsight.targets.base import PIXELS, Preprocessing, Site, Size, Stage, Target, recording, seeded

DEFAULT_SIZE = (224, 224)


class ModuleTarget(Target):
    """A module of the user. Its output is the first tensor that the module returns."""

    kind = "module"

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[str],
        preprocessing: Preprocessing,
        grids: Mapping[str, Size],
    ) -> None:
        named = {name: each for name, each in model.named_modules() if name}
        self._named = named
        self._grids = dict(grids)
        self._straight: dict[str, bool] = {}
        super().__init__(model, type(model).__name__, preprocessing, "given", taps=taps)
        # Module names are listed in the order of construction; taps need the order of the forward pass.
        self.taps = self._in_forward_order(self.taps)

    @property
    def available_taps(self) -> tuple[str, ...]:
        return tuple(self._named)

    def resolve_taps(self, taps: str | Sequence[str]) -> tuple[str, ...]:
        if isinstance(taps, str) and taps in ("blocks", "components", "fine") and taps not in self._named:
            raise BacksightError(f"{self.name} is a plain module: name its taps one by one, not as {taps!r}.")
        return super().resolve_taps(taps)

    def select(self, taps: str | Sequence[str]) -> Self:
        other = super().select(taps)
        other.taps = other._in_forward_order(other.taps)
        return other

    def depth(self, tap: str) -> float:
        """Place of a tap among the selected ones; "pixels" is -1."""
        self._refuse_unselected(tap)
        return -1 if tap == PIXELS else self.taps.index(tap)

    def tap_set(self, name: str) -> tuple[str, ...]:
        return self.taps

    def _in_forward_order(self, taps: Sequence[str]) -> tuple[str, ...]:
        order: list[str] = []

        def noting(tap: str) -> Site:
            return Site(self._named[tap], read=lambda _: order.append(tap))

        with torch.no_grad(), recording({tap: noting(tap) for tap in taps}):
            self._forward(self._blank(), None)
        if silent := [tap for tap in taps if tap not in order]:
            raise BacksightError(f"These taps of {self.name} never run in a forward pass: {', '.join(silent)}.")
        if repeated := sorted({tap for tap in order if order.count(tap) > 1}):
            raise BacksightError(
                f"{', '.join(repeated)} of {self.name} run more than once in a forward pass, so the name says not "
                "which of its outputs is meant: tap modules around it."
            )
        return tuple(order)

    def _blank(self) -> Tensor:
        return torch.zeros(1, len(self.preprocessing.mean), *self.image_size, device=self.device)

    @property
    def reduction(self) -> Size:
        grid = self.record(self._blank(), self.taps[:1])[self.taps[0]].grids[0]  # type: ignore[union-attr]
        return self.image_size[0] // grid[0], self.image_size[1] // grid[1]

    def check_size(self, size: Size) -> None:
        if tuple(size) != tuple(self.image_size):
            raise BacksightError(
                f"{self.name} was declared for images of {self.image_size} (height, width), not {tuple(size)}: "
                "give module_target another image_size."
            )

    def stage(self, tap: str, previous: str) -> Stage:
        self._refuse_order(tap, previous)
        return Stage("backbone", 1, 0, 0)

    def _refuse_order(self, tap: str, previous: str) -> None:
        self._refuse_unselected(tap)
        self._refuse_unselected(previous)
        if previous != PIXELS and self.taps.index(previous) >= self.taps.index(tap):
            raise BacksightError(f"In {self.name} the tap {previous!r} does not run before {tap!r}: swap them.")

    def _refuse_unselected(self, tap: str) -> None:
        if tap != PIXELS and tap not in self.taps:
            raise BacksightError(f"{tap!r} is not among the selected taps of {self.name}: {', '.join(self.taps)}.")

    def _sites(self, taps: Sequence[str]) -> dict[str, Site]:
        # A clone, because a later in-place activation would write into what was recorded.
        return {tap: Site(self._named[tap], read=lambda out: _first_tensor(out).clone()) for tap in taps}

    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        return {tap: self._tokens(tap, seen[tap]) for tap in taps}

    def _tokens(self, tap: str, values: Tensor) -> Tokens:
        if values.ndim == 4:
            return Tokens(values.flatten(2).transpose(1, 2), (tuple(values.shape[2:]),))  # type: ignore[arg-type]
        if values.ndim == 2:
            return Tokens(values.unsqueeze(1), ((1, 1),))
        if values.ndim != 3:
            raise BacksightError(
                f"{tap} of {self.name} returns a tensor of shape {tuple(values.shape)}, and a tap needs "
                "(B, C, h, w), (B, N, C) or (B, C)."
            )
        count = values.shape[1]
        if tap in self._grids:
            grid = self._grids[tap]
            return Tokens(values, (grid,), prefix=count - grid[0] * grid[1])
        side = math.isqrt(count)
        if side * side != count:
            raise BacksightError(
                f"{tap} of {self.name} returns {count} tokens, which is no square grid: "
                f"say grids={{{tap!r}: (height, width)}} (further tokens are prefix tokens)."
            )
        return Tokens(values, ((side, side),))

    def _forward(self, images: Tensor, padding: Tensor | None) -> Tensor:
        if padding is not None and bool(padding.any()):
            raise BacksightError(f"{self.name} is a plain module without a padding mask: crop the images instead.")
        return _first_tensor(self.model(images))

    def _rest(self, tap: str, representation: Any) -> Tensor:
        if not isinstance(representation, Tokens):
            raise BacksightError(f"{tap} of {self.name} holds tokens, not {type(representation).__name__}.")
        if tap not in self._straight:
            self._straight[tap] = self._is_bottleneck(tap, representation)
        if not self._straight[tap]:
            raise BacksightError(
                f"The output of {self.name} does not depend on {tap} alone (a connection goes around it), so the "
                "rest of the forward pass cannot be run from there."
            )
        return self._replaced(tap, representation, self._blank().expand(representation.batch, -1, -1, -1))

    def _is_bottleneck(self, tap: str, tokens: Tokens) -> bool:
        """Does the output stay the same when the image behind the replaced tap changes?"""
        one = tokens.index(0)
        noise = torch.rand(self._blank().shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        with torch.no_grad():
            blank, noisy = (self._replaced(tap, one, images) for images in (self._blank(), noise))
        return torch.allclose(blank, noisy, rtol=1e-5, atol=1e-6)

    def _replaced(self, tap: str, tokens: Tokens, images: Tensor) -> Tensor:
        """A forward pass in which the tap's output is these tokens, whatever the images are."""

        def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            original = _first_tensor(output)
            values = tokens.map() if original.ndim == 4 else tokens.values
            values = values.reshape(original.shape)
            if isinstance(output, Tensor):
                return values
            if isinstance(output, tuple) and type(output) is tuple:
                return tuple(values if each is original else each for each in output)
            raise BacksightError(
                f"{tap} of {self.name} returns a {type(output).__name__}, which cannot be replaced: tap another module."
            )

        handle = self._named[tap].register_forward_hook(replace)
        try:
            return self._forward(self.preprocessing.normalise(images), None)
        finally:
            handle.remove()

    def untrained(self, seed: int = 0) -> ModuleTarget:
        with seeded(seed):
            model = self._randomised().to(self.device)
        other = ModuleTarget(model, self.taps, self.preprocessing, self._grids)
        other.weights = "random"
        return other

    def _randomised(self) -> nn.Module:
        model = copy.deepcopy(self.model)
        for name, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            if own and not hasattr(module, "reset_parameters"):
                raise BacksightError(
                    f"{name or type(module).__name__} of {self.name} cannot be drawn anew (it has no "
                    "reset_parameters): make the untrained target yourself with module_target()."
                )
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return model


def module_target(
    module: nn.Module,
    taps: Sequence[str],
    preprocess: Preprocessing | None = None,
    image_size: Size | None = None,
    grids: Mapping[str, Size] | None = None,
) -> ModuleTarget:
    """Any nn.Module as a target; the module is put in eval mode and frozen.

    taps: names as in `module.named_modules()`; preprocess: mean, std and size (default: none, images in [0, 1]);
    image_size: (H, W), default that of `preprocess`, else (224, 224); grids: {tap: (h, w)} where a tap returns
    (B, N, C) tokens on no square grid, or with prefix tokens.
    Raises BacksightError on unknown taps, taps that never run or run repeatedly, and grids that do not fit.
    """
    if preprocess is None:
        size = image_size or DEFAULT_SIZE
        preprocess = Preprocessing((0.0,) * 3, (1.0,) * 3, size, square=size[0] == size[1])
    elif image_size is not None:
        preprocess = Preprocessing(
            preprocess.mean,
            preprocess.std,
            image_size,
            preprocess.interpolation,
            preprocess.crop_fraction,
            image_size[0] == image_size[1],
        )
    return ModuleTarget(module, taps, preprocess, grids or {})


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for part in parts:
        if isinstance(part, Tensor):
            return part
    raise BacksightError(f"A module returns a {type(output).__name__} without a tensor: tap another module.")
