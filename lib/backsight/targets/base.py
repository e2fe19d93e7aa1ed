"""The target protocol: a frozen model, its own preprocessing, and the taps where its forward pass is recorded.

A family of models is one file that implements the abstract methods of `Target` and offers one `Family`.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError, nearest
from backsight.representation import Predictions, Representation

if TYPE_CHECKING:
    from backsight.targets.sources import Source

PIXELS = "pixels"
TAP_SETS = ("blocks", "components", "fine")

StageKind = Literal[
    "patch_embedding", "backbone", "projection", "blocks", "convolution", "encoder", "decoder", "norm", "heads"
]
Kind = Literal["classifier", "detector", "module"]
Size = tuple[int, int]


@dataclass(frozen=True)
class Stage:
    """What lies between two taps.

    kind "blocks": transformer blocks; "convolution": convolutional, pooling or mixed blocks; depth: blocks in it (a
    part of a block counts as one); heads: attention heads; hidden: MLP width, 0 where there is none.
    """

    kind: StageKind
    depth: int
    heads: int
    hidden: int


@dataclass(frozen=True)
class Preprocessing:
    """How a target wants its images, as its own configuration says.

    mean, std: of each channel, for images in [0, 1]; size: (H, W); interpolation: of the resizing;
    crop_fraction: share of the shorter side that the centre crop keeps; square: one fixed square size.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: Size
    interpolation: str = "bicubic"
    crop_fraction: float = 1.0
    square: bool = True

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to the zero-centred images that the model was trained on."""
        mean = images.new_tensor(self.mean).view(1, -1, 1, 1)
        std = images.new_tensor(self.std).view(1, -1, 1, 1)
        return (images - mean) / std


@dataclass(frozen=True)
class Site:
    """Where a hook reads: a module's output or its first positional input, and what of it is kept."""

    module: nn.Module
    side: Literal["input", "output"] = "output"
    read: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Family:
    """A family of models, as the registry sees it.

    kind: what its targets are; claims: does this source belong here; skeleton: the target on the meta device, at
    once and without weights; load: the target itself (source, pretrained, seed); check: refuse a source that cannot
    be loaded here; listed: names for `backsight targets`, each with its hub repository; names: all it knows, for
    "nearest names".
    """

    name: str
    kind: Kind
    claims: Callable[[Source], bool]
    skeleton: Callable[[Source], Target]
    load: Callable[[Source, bool, int], Target]
    check: Callable[[Source], None]
    listed: Callable[[], dict[str, str]]
    names: Callable[[], list[str]]


class Target(ABC):
    """A frozen model with its own preprocessing and an ordered list of taps.

    model: in eval(), no parameter requires a gradient; weights: "shipped", "pretrained", "random" or a path;
    taps: the selected ones in forward order; available_taps: all of them; classes: names, or None if unknown.
    """

    kind: ClassVar[Kind]

    def __init__(
        self,
        model: nn.Module,
        name: str,
        preprocessing: Preprocessing,
        weights: str,
        classes: Sequence[str] | None = None,
        taps: str | Sequence[str] = "blocks",
    ) -> None:
        self.model = self._put_to_rest(model)
        self.name = name
        self.weights = weights
        self.preprocessing = preprocessing
        self.classes = None if classes is None else tuple(classes)
        self.taps = self.resolve_taps(taps)

    def _put_to_rest(self, model: nn.Module) -> nn.Module:
        """For good; a target of a user's own model does it for the time of a pass only."""
        return model.eval().requires_grad_(False)

    # What a family says of itself.

    @property
    @abstractmethod
    def available_taps(self) -> tuple[str, ...]:
        """Every tap, in forward order."""

    @abstractmethod
    def tap_set(self, name: str) -> tuple[str, ...]:
        """The taps of "blocks", "components" or "fine". Raises BacksightError where the model has no such set."""

    @property
    @abstractmethod
    def reduction(self) -> Size:
        """Pixels a token covers, down and across."""

    @abstractmethod
    def check_size(self, size: Size) -> None:
        """Raise BacksightError, with the sizes allowed, if the model cannot take (H, W) images."""

    @abstractmethod
    def stage(self, tap: str, previous: str) -> Stage:
        """What lies between the tap `previous` ("pixels" allowed) and the later tap `tap`."""

    @abstractmethod
    def _sites(self, taps: Sequence[str]) -> dict[str, Site]:
        """Where the hooks read for these taps."""

    @abstractmethod
    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        """What the hooks have read, in canonical form."""

    @abstractmethod
    def _forward(self, images: Tensor, padding: Tensor | None) -> Tensor | Predictions:
        """The model's own forward pass on normalised images."""

    @abstractmethod
    def _rest(self, tap: str, representation: Any) -> Tensor | Predictions:
        """The forward pass behind the tap."""

    @abstractmethod
    def _randomised(self) -> nn.Module:
        """The same architecture with random weights, drawn from the global generator (which the caller keeps)."""

    # What every target does.

    def record(
        self,
        images: Tensor,
        taps: str | Sequence[str] | None = None,
        padding: Tensor | None = None,
        gradient: bool = False,
    ) -> dict[str, Representation]:
        """The representations at `taps` (default: the selected ones), all from one forward pass.

        images: (B, 3, H, W) float RGB in [0, 1]; padding: (B, H, W) bool, True = padding, or None.
        The pass leaves no hook behind and changes neither parameters nor the random state.
        Raises BacksightError on an unknown tap, unfit images, a model in training mode or a tap that never ran.
        """
        wanted = self.taps if taps is None else self.resolve_taps(taps)
        normalised, padding = self._prepared(images, padding)
        return self._recorded(images, normalised, wanted, padding, gradient)

    def _recorded(
        self, images: Tensor, normalised: Tensor, wanted: Sequence[str], padding: Tensor | None, gradient: bool
    ) -> dict[str, Representation]:
        """`record` of images that are normalised already."""
        sites = self._sites(wanted)
        with recording(sites) as seen, torch.set_grad_enabled(gradient):
            output = self._forward(normalised, padding)
            if silent := sorted(sites.keys() - seen.keys()):
                raise BacksightError(
                    f"These taps of {self.name} never ran in this forward pass: {', '.join(silent)}; record others."
                )
            return self._canonical(wanted, seen, output, images, padding)

    def __call__(self, images: Tensor, padding: Tensor | None = None, gradient: bool = False) -> Tensor | Predictions:
        """The model's own output: logits (B, K) of a classifier, Predictions of a detector."""
        normalised, padding = self._prepared(images, padding)
        with torch.set_grad_enabled(gradient):
            return self._forward(normalised, padding)

    def from_tap(self, tap: str, representation: Representation, gradient: bool = False) -> Tensor | Predictions:
        """The rest of the forward pass: from the representation at `tap` to the same output as __call__."""
        self._refuse_training()
        if tap not in self.available_taps:
            raise BacksightError(self._unknown_tap(tap))
        with torch.set_grad_enabled(gradient):
            return self._rest(tap, representation)

    def select(self, taps: str | Sequence[str]) -> Self:
        """The same target with other selected taps."""
        other = copy.copy(self)
        other.taps = self.resolve_taps(taps)
        return other

    def untrained(self, seed: int = 0) -> Self:
        """The same architecture with random weights (the null of "what training has done")."""
        other = copy.copy(self)
        with seeded(seed):
            other.model = self._randomised().eval().requires_grad_(False).to(self.device)
        other.weights = "random"
        other.__dict__.pop("weights_hash", None)
        return other

    def to(self, device: torch.device | str) -> Self:
        """Move the model; returns the target itself."""
        self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def image_size(self) -> Size:
        """(H, W) of the images the target wants."""
        return self.preprocessing.size

    @cached_property
    def weights_hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 over the names and bytes of the weights, names sorted."""
        return hash_of(self.model)

    def depth(self, tap: str) -> float:
        """Place of a tap in forward order, for plots: 0 is the first tap, "pixels" is -1.

        Steps inside a block lie evenly between the blocks (`blocks.1.attn` of a ViT: 1.5).
        """
        if tap == PIXELS:
            return -1
        if tap not in self.available_taps:
            raise BacksightError(self._unknown_tap(tap))
        coarse = self.tap_set("blocks")
        if tap in coarse:
            return coarse.index(tap)
        position = self.available_taps.index(tap)
        places = {self.available_taps.index(each): depth for depth, each in enumerate(coarse)}
        before = max((place for place in places if place < position), default=-1)
        after = min(place for place in places if place > position)
        start = places.get(before, -1)
        return start + (places[after] - start) * (position - before) / (after - before)

    def resolve_taps(self, taps: str | Sequence[str]) -> tuple[str, ...]:
        """Tap names in forward order from "blocks", "components", "fine", one name or a list of names.

        Raises BacksightError, with the nearest names, on a tap that the target does not have.
        """
        if isinstance(taps, str) and taps in TAP_SETS:
            return self.tap_set(taps)
        named = [part.strip() for part in taps.split(",")] if isinstance(taps, str) else list(taps)
        if not named:
            raise BacksightError(
                f"No tap of {self.name} is named: give one of {', '.join(TAP_SETS)} or a list of taps."
            )
        for tap in named:
            if tap not in self.available_taps:
                raise BacksightError(self._unknown_tap(tap))
        return tuple(tap for tap in self.available_taps if tap in named)

    def check_images(self, images: Tensor, padding: Tensor | None = None) -> None:
        """Raise BacksightError if these are not (B, 3, H, W) float images in [0, 1] of a size the model takes."""
        if images.ndim != 4 or images.shape[1] != len(self.preprocessing.mean):
            raise BacksightError(
                f"{self.name} takes images of shape (batch, {len(self.preprocessing.mean)}, height, width), "
                f"not {tuple(images.shape)}."
            )
        if not images.is_floating_point():
            raise BacksightError(
                f"{self.name} takes float images in [0, 1], not {images.dtype}: divide them by 255 first."
            )
        if images.device.type != "meta" and images.numel():
            low, high = (float(bound) for bound in images.detach().aminmax())
            if low < -0.01 or high > 1.01:
                raise BacksightError(
                    f"{self.name} takes images in [0, 1], but these go from {low:.3g} to {high:.3g}: "
                    "give them unnormalised (the target normalises by itself)."
                )
        self.check_size((images.shape[2], images.shape[3]))
        if padding is not None and (
            padding.dtype != torch.bool or padding.shape != (images.shape[0], *images.shape[2:])
        ):
            raise BacksightError(
                f"The padding needs to be bool of shape {(images.shape[0], *images.shape[2:])}, True = padding, "
                f"not {padding.dtype} of shape {tuple(padding.shape)}."
            )

    def _prepared(self, images: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self._refuse_training()
        self.check_images(images, padding)
        images = images.to(self.device)
        padding = None if padding is None else padding.to(self.device)
        normalised = self.preprocessing.normalise(images)
        if padding is not None:
            normalised = normalised.masked_fill(padding[:, None], 0.0)
        return normalised, padding

    def _refuse_training(self) -> None:
        if any(module.training for module in self.model.modules()):
            raise BacksightError(
                f"The model of {self.name} is in training mode, where dropout and statistics are live: "
                "call target.model.eval() first."
            )

    def _unknown_tap(self, tap: str) -> str:
        return f"{self.name} has no tap {tap!r}; {nearest(tap, self.available_taps)}."

    def _refuse_order(self, tap: str, previous: str) -> None:
        if previous != PIXELS and previous not in self.available_taps:
            raise BacksightError(self._unknown_tap(previous))
        if tap not in self.available_taps:
            raise BacksightError(self._unknown_tap(tap))
        if previous != PIXELS and self.available_taps.index(previous) >= self.available_taps.index(tap):
            raise BacksightError(f"In {self.name} the tap {previous!r} does not lie before {tap!r}: swap them.")


def hash_of(model: nn.Module) -> str:
    """First 16 hexadecimal digits of the SHA-256 over the names and bytes of a model's weights, names sorted."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def recording(sites: Mapping[str, Site]) -> Iterator[dict[str, Any]]:
    """Hooks on these sites, for the time of one forward pass; a site that runs again keeps its last value."""
    seen: dict[str, Any] = {}
    handles = []
    try:
        for name, site in sites.items():
            if site.side == "output":
                handles.append(site.module.register_forward_hook(_keep_output(seen, name, site.read)))
            else:
                handles.append(site.module.register_forward_pre_hook(_keep_input(seen, name, site.read)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keep_output(seen: dict[str, Any], name: str, read: Callable[[Any], Any]) -> Callable[[nn.Module, Any, Any], None]:
    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen[name] = read(output)

    return keep


def _keep_input(seen: dict[str, Any], name: str, read: Callable[[Any], Any]) -> Callable[[nn.Module, Any], None]:
    def keep(_module: nn.Module, inputs: Any) -> None:
        seen[name] = read(inputs[0])

    return keep


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global CPU generator set to `seed` inside, as it was before outside: model constructors draw from it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
