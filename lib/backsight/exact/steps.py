"""A target as equations: the half-steps of its residual blocks, as functions that an exact inverse can solve.

    stream ──► + attention ──► + MLP ──► stream           y = x + f(x)          pre-norm blocks (ViT, BEiT, Swin, …)
    stream ──► + attention ──► norm ──► + MLP ──► norm    y = norm(x + f(x))    post-norm layers (DETR)

One pass with hooks on the known block classes gives each block's input, output and further arguments; a tap is placed
by comparing what `target.record` gives with these streams.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backsight.errors import BacksightError
from backsight.inverses.rows import patchify, unpatchify
from backsight.representation import Tokens
from backsight.targets.base import PIXELS, Target
from backsight.targets.hooks import watching

AGREEMENT = 1e-4  # relative, between a half-step in float32 and the model's own pass
SAME = 1e-6  # relative, between two records of one stream
RANK_TOLERANCE = 1e-6  # singular values below this share of the largest one count as zero
WIDEST = 4096  # values of a patch up to which its embedding is measured

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Norm:
    """A LayerNorm over the channels: û = (z − mean) / √(variance + ε), y = û · weight + bias."""

    module: nn.LayerNorm

    def stripped(self, y: Tensor) -> Tensor:
        """û of y: (…, C) with mean 0."""
        y = y if self.module.bias is None else y - self.module.bias
        return y if self.module.weight is None else y / self.module.weight

    def normalised(self, z: Tensor) -> Tensor:
        return F.layer_norm(z, z.shape[-1:], eps=self.module.eps)

    def deviation(self, stripped: Tensor) -> Tensor:
        """√(variance + ε) of z (…, 1) from û, NaN where û's precision does not hold it.

        mean û² falls short of 1 by ε / (variance + ε): float64 holds the scale in û's last digits, float32 does not.
        """
        short = 1 - stripped.square().mean(-1, keepdim=True)
        deviation = (self.module.eps / short.clamp(min=torch.finfo(short.dtype).tiny)).sqrt()
        return torch.where(short > 1e3 * torch.finfo(short.dtype).eps, deviation, torch.nan)


@dataclass(frozen=True)
class Step:
    """One half-step, from the stream `source` to the stream `destination` behind it.

    forward: (B, n, c) -> (B, n, c), x + f(x); norm: applied behind it, or None; before: the norm whose output x is, or
    None; tokenwise: it acts on every token alone; jacobian: of `forward`, (T, c) tokens -> (T, c, c), in closed form
    where that is known; known: (P, c) the first tokens of x, where they are the same for every image.
    """

    source: str
    destination: str
    forward: Map
    norm: Norm | None = None
    before: Norm | None = None
    tokenwise: bool = False
    jacobian: Map | None = None
    known: Tensor | None = None

    @property
    def lossy(self) -> bool:
        """Whether it takes mean and scale of every token for good."""
        return self.norm is not None and self.before is None

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x) if self.norm is None else self.norm.module(self.forward(x))

    def slopes(self, x: Tensor) -> Tensor:
        """(T, c, c) derivatives of `forward` of a tokenwise step at tokens (T, c)."""
        if self.jacobian is not None:
            return self.jacobian(x)
        slope = torch.func.jacfwd(lambda token: self.forward(token[None, None])[0, 0])
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.vmap(slope, chunk_size=32)(x)


@dataclass(frozen=True)
class Embedding:
    """The patch embedding: tokens = patches @ matrix + bias, row-major, and the pixels back from them.

    matrix: (3 p q, C) on pixels in [0, 1]; bias: (n, C); rank; patch: (p, q); prefix: (P, C) the prefix tokens, which
    are the same for every image; size: (H, W).
    """

    matrix: Tensor
    bias: Tensor
    rank: int
    patch: tuple[int, int]
    prefix: Tensor
    size: tuple[int, int]

    def pixels(self, values: Tensor, start: Tensor | None = None) -> Tensor:
        """The images (B, 3, H, W) nearest to `start` (default: grey) of this embedding: start + A⁺(y − A start)."""
        if start is None:
            start = values.new_full((len(values), 3, *self.size), 0.5)
        patches = patchify(start.to(values), self.patch)
        missing = values[:, len(self.prefix) :] - self.bias - patches @ self.matrix
        inverse = torch.linalg.pinv(self.matrix, rtol=RANK_TOLERANCE)
        grid = (self.size[0] // self.patch[0], self.size[1] // self.patch[1])
        return unpatchify(patches + missing @ inverse, grid, self.patch)


class NotInvertibleError(BacksightError):
    """There is no exact way back from a tap to one before; the message says why."""


@dataclass(frozen=True, eq=False)
class ExactModel:
    """Every stream of one pass of a target, in forward order, and the steps between those that are joined.

    streams: names; taps: {tap: number of its stream}; steps: {number of the later stream: step}; sizes: {tap or
    "pixels": values an image}; embedding: of the first tap, None where it is no affine map; elsewhere: by device.
    """

    target: Target
    streams: tuple[str, ...]
    taps: dict[str, int]
    steps: dict[int, Step]
    sizes: dict[str, int]
    embedding: Embedding | None
    elsewhere: dict[torch.device, ExactModel] = field(default_factory=dict)

    @classmethod
    def of(cls, target: Target) -> ExactModel:
        """In float64, once for a target. Raises BacksightError as `walk` does, and where there is no float64."""
        if target.device.type == "mps":
            raise BacksightError(f'Exact inverses need float64, which mps lacks: load {target.name} with device="cpu".')
        if target not in _MEASURED:
            _MEASURED[target] = walk(in_precision(target, torch.float64))
        return _MEASURED[target].on(target.device)

    def on(self, device: torch.device) -> ExactModel:
        """The same on a device, walked anew: its steps hold tensors of the pass that found them."""
        if device == self.target.device:
            return self
        if device not in self.elsewhere:
            other = in_precision(self.target, torch.float64)
            other.model.to(device)
            self.elsewhere[device] = walk(other)
            self.elsewhere[device].elsewhere[self.target.device] = self
        return self.elsewhere[device]

    def gap(self, tap: str, previous: str) -> str:
        """Why the later `tap` does not lead back to `previous`, "" where steps do."""
        if previous == PIXELS and self.embedding is None:
            reason = "what lies between the pixels and the first tap is no affine map of patches"
        elif unknown := [name for name in (tap, previous) if name not in self.taps]:
            reason = f"no known residual block begins or ends at {unknown[0]}"
        elif missing := set(range(self.taps[previous] + 1, self.taps[tap] + 1)) - self.steps.keys():
            before, behind = self.streams[max(missing) - 1 : max(missing) + 1]
            reason = f"what lies between {before} and {behind} is no residual block"
        else:
            return ""
        sizes = f"{self.sizes[previous]} values an image before it, {self.sizes[tap]} behind it"
        return f"{tap} cannot be inverted exactly to {previous}: {reason} ({sizes})."

    def between(self, tap: str, previous: str) -> tuple[Step, ...]:
        """The steps from the tap `previous` to the later `tap`, in forward order. Raises `NotInvertibleError`."""
        if why := self.gap(tap, previous):
            raise NotInvertibleError(why)
        return tuple(self.steps[number] for number in range(self.taps[previous] + 1, self.taps[tap] + 1))

    def back_from(self, tap: str) -> tuple[tuple[Step, ...], str]:
        """The steps, in forward order, from the earliest tap to which exactness reaches back from `tap`, and that tap.

        Raises `NotInvertibleError` where not even one step leads back from a tap that is not the first.
        """
        order, number = self.target.available_taps, self.taps.get(tap, -1)
        while number in self.steps:
            number -= 1
        places = {tap: number} | self.taps
        earliest = min((name for name in places if places[name] >= number), key=places.__getitem__)
        if earliest == tap and tap != order[0]:
            earliest = order[order.index(tap) - 1]
        return self.between(tap, earliest) if earliest != tap else (), earliest


_MEASURED: WeakKeyDictionary[Target, ExactModel] = WeakKeyDictionary()


def measured_embedding(target: Target) -> Embedding | None:
    """The first tap as an affine map of patches, measured on single pixels; None where it is none."""
    tap, weights = target.available_taps[0], next(target.model.parameters())
    (height, width), patch = target.image_size, target.reduction
    count = len(target.preprocessing.mean) * patch[0] * patch[1]
    if height % patch[0] or width % patch[1] or count > WIDEST:
        return None
    grid = (height // patch[0], width // patch[1])
    cells = grid[0] * grid[1]

    def embedded(patches: Tensor) -> Any:
        tokens = target.record(unpatchify(patches.expand(-1, cells, -1), grid, patch), [tap])[tap]
        return tokens.replace(tokens.values.to(weights))  # a module's own target tells its values in float32

    blank = embedded(weights.new_zeros(1, 1, count))
    if not isinstance(blank, Tokens) or blank.grids != (grid,):
        return None
    lines = torch.eye(count).to(weights)[:, None].split(64)
    matrix = torch.cat([(embedded(part).patches - blank.patches)[:, 0] for part in lines])
    probe = torch.rand(2, cells, count, generator=torch.Generator().manual_seed(0)).to(weights)
    values = embedded(probe).patches
    if float((values - probe @ matrix - blank.patches).norm()) > 1e-4 * float(values.norm()):
        return None
    rank = int(torch.linalg.matrix_rank(matrix, rtol=RANK_TOLERANCE))
    return Embedding(matrix, blank.patches[0], rank, patch, blank.prefix_values[0], target.image_size)


def in_precision(target: Target, precision: torch.dtype) -> Target:
    """A copy of the target whose weights (and so passes) are of this precision; the original is left alone."""
    other = copy.copy(target)
    other.model = copy.deepcopy(target.model).to(precision)
    other.__dict__.pop("weights_hash", None)
    return other


@dataclass
class _Call:
    """Of a known block, or of a LayerNorm outside of them; streams are (1, n, c)."""

    path: str
    module: Any
    grid: tuple[int, ...]
    entering: Tensor
    leaving: Tensor
    arguments: Sequence[Any]
    named: dict[str, Any]


def walk(target: Target, embed: bool = True) -> ExactModel:
    """The half-steps of one pass; embed: with the embedding before them.

    Raises BacksightError where they disagree with the model, and on padded images.
    """
    shape = (1, len(target.preprocessing.mean), *target.image_size)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(next(target.model.parameters()))
    blocks: list[_Call] = []
    norms: list[_Call] = []
    # Norms inside known blocks belong to their half-steps.
    inside = tuple(f"{path}." for path, module in target.model.named_modules() if class_of(module) in BLOCKS)

    def seen(path: str, module: nn.Module, arguments: Sequence[Any], named: dict[str, Any], output: Any) -> None:
        known = class_of(module) in BLOCKS
        if not known and (not isinstance(module, nn.LayerNorm) or path.startswith(inside)):
            return
        stream, *others = arguments or (named["hidden_states"],)
        if stream.ndim in (3, 4):
            named = {name: value for name, value in named.items() if value is not stream}
            leaving = output[0] if isinstance(output, tuple) else output
            entering, leaving = stream.flatten(1, -2).clone(), leaving.flatten(1, -2).clone()
            calls = blocks if known else norms
            calls.append(_Call(path, module, stream.shape[1:-1], entering, leaving, others, named))

    with watching(target.model, seen):
        recorded = target.record(image, target.available_taps)
    with torch.no_grad():
        streams, values, steps = _joined(blocks, norms)
    sizes, taps, last = {PIXELS: image[0].numel()}, {}, -1
    for tap, representation in recorded.items():
        sizes[tap] = representation.values[0].numel()
        number = _placed(representation.values, values, after=last)
        if number is not None and isinstance(representation, Tokens):
            taps[tap] = last = number
            streams[number] = tap
    embedding, first = measured_embedding(target) if embed else None, target.available_taps[0]
    for number, step in steps.items():
        source, destination = streams[number - 1 : number + 1]
        known = embedding.prefix if embedding and len(embedding.prefix) and source == first else None
        steps[number] = replace(step, source=source, destination=destination, known=known)
    return ExactModel(target, tuple(streams), taps, steps, sizes, embedding)


def _joined(blocks: Sequence[_Call], norms: Sequence[_Call]) -> tuple[list[str], list[Tensor], dict[int, Step]]:
    streams: list[str] = []
    values: list[Tensor] = []
    steps: dict[int, Step] = {}
    for call in blocks:
        if not values or not _same(call.entering, values[-1], 0.0):
            streams.append(f"the input of {call.path}")
            values.append(call.entering)
        for suffix, half in zip((".attn", ""), _halves(call), strict=True):
            # The stream between two blocks is one; a post-norm block knows the norm that it comes from.
            last = steps.get(len(values) - 1)
            steps[len(values)] = step = replace(half, before=None if last is None else last.norm)
            values.append(step(values[-1]))
            streams.append(call.path + suffix)
        if not _same(call.leaving, values[-1], AGREEMENT):
            raise BacksightError(
                f"The half-steps of {call.path} do not give what the model gives: this version of its library "
                "computes the block in another way; use the other inverse families for it."
            )
        values[-1] = call.leaving
    for call in norms:
        if values and _same(call.entering, values[-1], 0.0):
            steps[len(values)] = Step("", "", lambda x: x, Norm(call.module), tokenwise=True)
            values.append(call.leaving)
            streams.append(call.path)
    return streams, values, steps


def _placed(tap: Tensor, streams: Sequence[Tensor], after: int) -> int | None:
    """The first stream behind number `after` that a tap holds, the nearest within round-off.

    Branches that are still zero leave several streams alike; taps come in forward order.
    """
    near = [number for number in range(after + 1, len(streams)) if _same(tap, streams[number], SAME)]
    return min(near, key=lambda number: float((tap - streams[number]).norm()), default=None)


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm())


def _halves(call: _Call) -> tuple[Step, Step]:
    block, (attention, mlp, *names) = call.module, BLOCKS[class_of(call.module)]
    norms: list[Any] = [Norm(getattr(block, name)) for name in names] or [None, None]

    def attended(x: Tensor) -> Tensor:
        on_grid = x if len(call.grid) == 1 else x.unflatten(1, call.grid)
        return x + attention(block, on_grid, call.arguments, call.named).reshape(x.shape)

    # What acts on tokens alone takes them in any arrangement, and needs no grid.
    tokens = Step("", "", lambda x: x + mlp(block, x), norms[1], tokenwise=True, jacobian=_mlp_jacobian(block))
    return Step("", "", attended, norms[0]), tokens


def _times(block: Any, name: str) -> Any:
    scale = getattr(block, name)
    return 1.0 if scale is None else scale


def _detr_attention(layer: Any, x: Tensor, arguments: Sequence[Any], named: dict[str, Any]) -> Tensor:
    mask = arguments[0] if arguments else named.get("attention_mask")
    code = named.get("spatial_position_embeddings", arguments[1] if len(arguments) > 1 else None)
    if mask is not None:
        raise BacksightError("Padded images have no exact inverse here: crop or stretch them instead of padding.")
    return layer.self_attn(hidden_states=x, attention_mask=None, position_embeddings=code)[0]


VIT = (
    lambda block, x, given, named: block.ls1(block.attn(block.norm1(x), *given, **named)),
    lambda block, x: block.ls2(block.mlp(block.norm2(x))),
)
SCALED = (
    lambda block, x, given, named: _times(block, "gamma_1") * block.attn(block.norm1(x), *given, **named),
    lambda block, x: _times(block, "gamma_2") * block.mlp(block.norm2(x)),
)
NORMED_BRANCH = (
    lambda block, x, given, named: block.norm1(block.attn(x, *given, **named)),
    lambda block, x: block.norm2(block.mlp(x)),
)
BLOCKS: dict[str, tuple[Any, ...]] = {  # class: (attention branch, MLP branch, names of the norms behind them)
    "timm.models.vision_transformer.Block": VIT,
    "timm.models.vision_transformer.ResPostBlock": NORMED_BRANCH,
    "timm.models.beit.Block": SCALED,
    "timm.models.eva.EvaBlock": SCALED,
    "timm.models.eva.EvaBlockPostNorm": NORMED_BRANCH,
    "timm.models.cait.LayerScaleBlock": SCALED,
    "timm.models.swin_transformer.SwinTransformerBlock": (
        lambda block, x, given, named: block._attn(block.norm1(x)),
        lambda block, x: block.mlp(block.norm2(x)),
    ),
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": (
        lambda block, x, given, named: block.norm1(block._attn(x)),
        lambda block, x: block.norm2(block.mlp(x)),
    ),
    "transformers.models.detr.modeling_detr.DetrEncoderLayer": (
        _detr_attention,
        lambda layer, x: layer.mlp(x),
        "self_attn_layer_norm",
        "final_layer_norm",
    ),
}


def class_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _mlp_jacobian(block: Any) -> Map | None:
    """The derivative of x + mlp(norm2(x)) of a usual ViT block in closed form (five times as fast), or None."""
    mlp, norm = block.mlp, getattr(block, "norm2", None)
    usual = class_of(block) == "timm.models.vision_transformer.Block" and class_of(mlp) == "timm.layers.mlp.Mlp"
    kinds = {"act": nn.GELU, "norm": nn.Identity, "fc1": nn.Linear}
    if not usual or any(not isinstance(getattr(mlp, name), kind) for name, kind in kinds.items()):
        return None
    if mlp.act.approximate != "none" or not isinstance(block.ls2, nn.Identity) or not isinstance(norm, nn.LayerNorm):
        return None

    def jacobian(x: Tensor) -> Tensor:
        first, second = mlp.fc1.weight.detach(), mlp.fc2.weight.detach()
        first = first if norm.weight is None else first * norm.weight.detach()
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        hidden = mlp.fc1(norm(x))
        density = torch.exp(-hidden.square() / 2) / (2 * torch.pi) ** 0.5
        slope = 0.5 * (1 + torch.erf(hidden / 2**0.5)) + hidden * density
        # One product for all tokens; what the norm takes (its mean, its length) has rank 2 and is taken out behind it.
        inner = (second * slope[:, None]) @ (first - first.mean(1, keepdim=True))
        normed = centred / deviation
        inner = (inner - (inner @ normed[:, :, None]) * (normed / x.shape[-1])[:, None]) / deviation[:, :, None]
        inner.diagonal(dim1=1, dim2=2).add_(1)
        return inner

    return jacobian
