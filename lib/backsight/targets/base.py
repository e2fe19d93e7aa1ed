"""The target protocol: a frozen model, its own preprocessing, and the taps where its forward pass is recorded.

A family of models is one file that implements the abstract methods of `Target`.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

from backsight.errors import BacksightError, nearest
from backsight.representation import Predictions, Representation, Tokens
from backsight.targets.hooks import Place, recording, seeded

if TYPE_CHECKING:
    import pandas as pd

PIXELS = "pixels"
TAP_SETS = ("blocks", "components", "fine")

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
Size = tuple[int, int]


@dataclass(frozen=True)
class Stage:
    """What lies between two taps.

    kind "blocks": transformer blocks; "convolution": convolutional, pooling or mixed blocks; depth: blocks in it (a
    part of a block counts as one); heads: attention heads; hidden: MLP width, 0 where there is none.
    """

    kind: Literal[
        "patch_embedding", "backbone", "projection", "blocks", "convolution", "encoder", "decoder", "norm", "heads"
    ]
    depth: int
    heads: int
    hidden: int


@dataclass(frozen=True)
class Preprocessing:
    """How a target wants its images, as its own configuration says.

    mean, std: of each channel, for images in [0, 1]; size: (H, W); interpolation: of the resizing;
    crop_fraction: share of the shorter side that the centre crop keeps.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: Size
    interpolation: str = "bicubic"
    crop_fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < len(self.mean) == len(self.std) or min(self.std) <= 0 or len(self.size) != 2 or min(self.size) < 1:
            raise BacksightError(
                f"A preprocessing has a mean and a positive std of each channel and a size (height, width), not {self}."
            )

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to the zero-centred images that the model was trained on."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


class Target(ABC):
    """A frozen model with its own preprocessing and an ordered list of taps.

    model: in eval(), no parameter requires a gradient; weights: "shipped", "pretrained", "random" or a path;
    taps: the selected ones in forward order; available_taps: all of them; classes: names, or None if unknown.
    """

    kind: ClassVar[Literal["classifier", "detector", "module"]]
    precision: Precision = "float32"
    reads_output: ClassVar[bool] = True  # else a pass that records ends with the last of its taps

    def __init__(
        self,
        model: nn.Module,
        name: str,
        preprocessing: Preprocessing,
        weights: str,
        classes: Sequence[str] | None = None,
        taps: str | Sequence[str] = "blocks",
    ) -> None:
        self.model, self.name, self.weights = self._put_to_rest(model), name, weights
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
    def _places(self, taps: Sequence[str]) -> dict[str, Place]:
        """What is read in the forward pass for these taps."""

    @abstractmethod
    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        """What the hooks have read, in canonical form."""

    def _forward(self, images: Tensor, padding: Tensor | None) -> Tensor | Predictions:
        """The model's own forward pass on normalised images."""
        self._refuse_padding(padding)
        return self.model(images)

    @abstractmethod
    def _rest(self, tap: str, representation: Any) -> Tensor | Predictions:
        """The forward pass behind the tap."""

    def _randomised(self) -> nn.Module:
        """The same architecture with random weights, drawn from the global generator (which the caller keeps)."""
        return _redrawn(self.model, self.name)

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
        places = self._places(wanted)
        stop = not self.reads_output and not self.model._forward_hooks  # as of a study that reads the answer beside
        reading, output = recording(self.model, places, stop), None
        with reading as seen, torch.set_grad_enabled(gradient), self._in_precision():
            output = self._forward(normalised, padding)
        if silent := sorted(places.keys() - seen.keys()):
            raise BacksightError(
                f"These taps of {self.name} never ran in this forward pass: {', '.join(silent)}; record others."
            )
        with torch.set_grad_enabled(gradient):
            recorded = self._canonical(wanted, seen, output, images, padding)
            return {tap: _wide(representation) for tap, representation in recorded.items()}

    def __call__(self, images: Tensor, padding: Tensor | None = None, gradient: bool = False) -> Tensor | Predictions:
        """The model's own output: logits (B, K) of a classifier, Predictions of a detector."""
        normalised, padding = self._prepared(images, padding)
        with torch.set_grad_enabled(gradient), self._in_precision():
            return _wide(self._forward(normalised, padding))

    def from_tap(self, tap: str, representation: Representation, gradient: bool = False) -> Tensor | Predictions:
        """The rest of the forward pass: from the representation at `tap` to the same output as __call__."""
        self._refuse_training()
        self._refuse_unknown(tap)
        with torch.set_grad_enabled(gradient), self._in_precision():
            return _wide(self._rest(tap, representation.to(self.device)))

    def select(self, taps: str | Sequence[str]) -> Self:
        """The same target with other selected taps."""
        other = copy.copy(self)
        other.taps = self.resolve_taps(taps)
        return other

    def untrained(self, seed: int = 0) -> Self:
        """The same architecture with random weights (the null of "what training has done"), drawn on the CPU."""
        other = copy.copy(self)
        with seeded(seed):
            other.model = self._randomised().eval().requires_grad_(False).to(self.device)
        other.weights = "random"
        other.__dict__.pop("weights_hash", None)
        return other

    def to(self, device: torch.device | str | None = None, precision: Precision | None = None) -> Self:
        """Move the model, and choose the arithmetic of its passes; returns the target itself.

        precision: "bfloat16" and "float16" are torch's autocast and "tf32" is for CUDA; weights stay as they are, and
        representations and outputs are handed out in float32.
        """
        if precision is not None and precision not in get_args(Precision):
            raise BacksightError(f"A target computes in {', '.join(get_args(Precision))}, not {precision!r}.")
        self.precision = precision or self.precision
        self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights. Where `precision` is "bfloat16" or "float16", products are computed in that."""
        return dtype_of(self.model)

    @contextmanager
    def _in_precision(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.precision in ("bfloat16", "float16"):
                stack.enter_context(torch.autocast(self.device.type, getattr(torch, self.precision)))
            elif self.precision == "tf32":
                stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                torch.set_float32_matmul_precision("high")
            yield

    @property
    def answers(self) -> bool:
        """Whether its output names classes or objects: that of a model without a head is features."""
        return self.kind == "detector" or self.classes is not None or getattr(self.model, "num_classes", 0) > 0

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
        self._refuse_unknown(tap)
        coarse, every = self.tap_set("blocks"), self.available_taps
        if tap in coarse:
            return coarse.index(tap)
        places = [-1, *(every.index(block) for block in coarse)]
        return float(np.interp(every.index(tap), places, range(-1, len(coarse))))

    def show_taps(self, taps: str | Sequence[str] | None = None) -> pd.DataFrame:
        """What the selected taps (or these) hold: tap, kind, shape, grid, prefix, depth. Runs one random image."""
        import pandas as pd

        rows = []
        for tap, held in self.record(torch.rand(1, len(self.preprocessing.mean), *self.image_size), taps).items():
            grids, prefix = (held.grids, held.prefix) if isinstance(held, Tokens) else ((), 0)
            shape, grid = times("B", *held.values.shape[1:]), ", ".join(times(*grid) for grid in grids)
            rows.append((tap, type(held).__name__.lower(), shape, grid, prefix, self.depth(tap)))
        return pd.DataFrame(rows, columns=["tap", "kind", "shape", "grid", "prefix", "depth"])

    def resolve_taps(self, taps: str | Sequence[str]) -> tuple[str, ...]:
        """Tap names in forward order from "blocks", "components", "fine", one name or a list of names.

        Raises BacksightError, with the nearest names, on a tap that the target does not have.
        """
        if isinstance(taps, str) and taps in TAP_SETS:
            return self.tap_set(taps)
        named = [part.strip() for part in taps.split(",")] if isinstance(taps, str) else list(taps)
        if not named:
            raise BacksightError(f"No tap of {self.name} is named: give taps, or one of {', '.join(TAP_SETS)}.")
        for tap in named:
            self._refuse_unknown(tap)
        return tuple(tap for tap in self.available_taps if tap in named)

    def check_images(self, images: Tensor, padding: Tensor | None = None) -> None:
        """Raise BacksightError if these are not (B, 3, H, W) float images in [0, 1] of a size the model takes."""
        channels = len(self.preprocessing.mean)
        if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
            raise BacksightError(
                f"{self.name} takes float images of shape (batch, {channels}, height, width) in [0, 1], not "
                f"{images.dtype} of shape {tuple(images.shape)}; of bytes, divide them by 255 first."
            )
        if images.device.type != "meta" and images.numel():
            low, high = torch.stack(images.detach().aminmax()).tolist()  # one wait for the device
            if low < -0.01 or high > 1.01:
                raise BacksightError(
                    f"{self.name} takes images in [0, 1], but these go from {low:.3g} to {high:.3g}: "
                    "give them unnormalised (the target normalises by itself)."
                )
        self.check_size((images.shape[2], images.shape[3]))
        shape = (images.shape[0], *images.shape[2:])
        if padding is not None and (padding.dtype != torch.bool or padding.shape != shape):
            raise BacksightError(
                f"The padding needs to be bool of shape {shape}, True = padding, not {padding.dtype} of shape "
                f"{tuple(padding.shape)}."
            )

    def _prepared(self, images: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self._refuse_training()
        self.check_images(images, padding)
        normalised = self.preprocessing.normalise(images.to(self.device, self.dtype))
        if padding is None:
            return normalised, None
        padding = padding.to(self.device)
        return normalised.masked_fill(padding[:, None], 0.0), padding

    def _refuse_padding(self, padding: Tensor | None) -> None:
        if padding is not None and bool(padding.any()):
            raise BacksightError(
                f"{self.name} has no attention mask, so padded pixels would count as picture: "
                "crop or stretch the images instead of padding them."
            )

    def _refuse_training(self) -> None:
        if any(module.training for module in self.model.modules()):
            raise BacksightError(
                f"The model of {self.name} is in training mode, where dropout and statistics are live: "
                "call target.model.eval() first."
            )

    def _refuse_unknown(self, tap: str) -> None:
        if tap not in self.available_taps:
            raise BacksightError(f"{self.name} has no tap {tap!r}; {nearest(tap, self.available_taps)}.")

    def _between(self, tap: str, previous: str) -> tuple[str, ...]:
        """The taps behind `previous` ("pixels" allowed), up to `tap`."""
        for known in {tap, previous} - {PIXELS}:
            self._refuse_unknown(known)
        order = (PIXELS, *self.available_taps)
        between = order[order.index(previous) + 1 : order.index(tap) + 1]
        if not between:
            raise BacksightError(f"In {self.name} the tap {previous!r} does not lie before {tap!r}: swap them.")
        return between


def times(*sides: object) -> str:
    """ "B × 16 × 48", for tables."""
    return " × ".join(map(str, sides))


def device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    return next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)


def _wide(value: Any) -> Any:
    """What half-precision passes return, in float32: tensors, and what holds them."""
    if not isinstance(value, Tensor):
        return value.apply(_wide)
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def hash_of(model: nn.Module) -> str:
    """First 16 hexadecimal digits of the SHA-256 over the names and bytes of a model's weights, names sorted."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(value))
    return digest.hexdigest()[:16]


def _bytes(value: Any) -> bytes:
    """Of a tensor, or of what quantised modules keep beside tensors."""
    if isinstance(value, (tuple, list)):
        return b"".join(_bytes(part) for part in value)
    if not isinstance(value, Tensor):
        return repr(value).encode()
    value = value.full_tensor() if hasattr(value, "full_tensor") else value.detach()  # of a sharded model: all of it
    value = value.dequantize() if value.is_quantized else value
    return value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _redrawn(model: nn.Module, name: str) -> nn.Module:
    """A copy, on the CPU, with new weights by what the model, or each module, offers for that.

    Raises BacksightError where that has left one as it was, which is seen because all of them are NaN before;
    persistent buffers count too, but for single numbers and the three of an image's channels, which are no weights.
    """
    copied: Any = copy.deepcopy(model).cpu()
    state = {key: t for key, t in copied.state_dict().items() if isinstance(t, Tensor) and t.is_floating_point()}
    parameters = dict(copied.named_parameters())
    weights = {key: tensor for key, tensor in state.items() if key in parameters or tensor.numel() not in (0, 1, 3)}
    with torch.no_grad():
        for tensor in weights.values():
            tensor.fill_(torch.nan)
        if "needs_reset" in inspect.signature(getattr(copied, "init_weights", lambda: None)).parameters:  # timm's
            copied.init_weights(needs_reset=True)
        for module in copied.modules():
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            if any(bool(tensor.isnan().any()) for tensor in own):
                # nn.MultiheadAttention has the method under a private name.
                getattr(module, "reset_parameters", getattr(module, "_reset_parameters", lambda: None))()
        after = {**parameters, **copied.state_dict()}
    if trained := [key for key in weights if key in after and bool(after[key].isnan().any())]:
        raise BacksightError(
            f"{', '.join(trained[:3])} of {name} cannot be drawn anew (nothing that its modules offer for that reaches "
            f"{'it' if len(trained) == 1 else 'them'}): build an untrained model and give it to target.with_model()."
        )
    return copied
