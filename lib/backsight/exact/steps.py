"""The half-steps of a model's residual blocks, as functions that an exact inverse can solve.

    stream ──► + attention ──► + MLP ──► stream           y = x + f(x)          pre-norm blocks (ViT, BEiT, Swin, …)
    stream ──► + attention ──► norm ──► + MLP ──► norm    y = norm(x + f(x))    post-norm layers (DETR)

They are found, not configured: one pass with hooks on the known block classes gives every block's input, output and
further arguments (rotary codes, shared biases, positional codes); a tap is placed by comparing what `target.record`
gives with these streams. Each half-step is checked against the model's own pass when it is built. What lies between
two taps and is no chain of such blocks (merging, pooling, projection, a pooled head) ends exactness: `Lost` says
where, and how many dimensions do not come through.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.representation import Tokens
from backsight.targets.base import PIXELS, Target
from backsight.targets.hooks import watching

AGREEMENT = 1e-4  # relative, between a half-step in float32 and the model's own pass
SAME = 1e-6  # relative, between two records of one stream

Kind = Literal["residual", "post_norm", "norm"]
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Norm:
    """A LayerNorm over the channels: û = (z − mean) / √(variance + ε), y = û · weight + bias."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    @classmethod
    def of(cls, module: nn.LayerNorm) -> Norm:
        size = module.normalized_shape[0]
        like = next(module.parameters(), torch.ones(()))
        weight = like.new_ones(size) if module.weight is None else module.weight.detach()
        bias = like.new_zeros(size) if module.bias is None else module.bias.detach()
        return cls(weight, bias, module.eps)

    def stripped(self, y: Tensor) -> Tensor:
        """û of y: (…, C) with mean 0."""
        return (y - self.bias) / self.weight

    def normalised(self, z: Tensor) -> Tensor:
        """û of z."""
        centred = z - z.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.epsilon).sqrt()

    def __call__(self, z: Tensor) -> Tensor:
        return self.normalised(z) * self.weight + self.bias

    def deviation(self, stripped: Tensor) -> Tensor:
        """√(variance + ε) of z (…, 1) from û, NaN where û's precision does not hold it.

        mean û² = variance / (variance + ε) falls short of 1 by ε / (variance + ε): LayerNorm keeps the scale in its
        last digits. They are there in float64 (relative error about 1e-16 · variance / ε), not in float32.
        """
        short = 1 - stripped.square().mean(-1, keepdim=True)
        found = (self.epsilon / short.clamp(min=torch.finfo(short.dtype).tiny)).sqrt()
        resolved = short > 1e3 * torch.finfo(short.dtype).eps
        return torch.where(resolved, found, torch.nan)


@dataclass(frozen=True)
class Step:
    """One half-step (or whole block), from the stream `source` to the stream `destination` behind it.

    forward: (B, n, c) -> (B, n, c), x + f(x); norm: applied behind it, or None; before: the norm whose output x is, or
    None; tokenwise: it acts on every token alone; jacobian: of `forward`, (T, c) tokens -> (T, c, c), in closed form
    where that is known. A "norm" step has no f.
    """

    kind: Kind
    source: str
    destination: str
    forward: Map
    norm: Norm | None = None
    before: Norm | None = None
    tokenwise: bool = False
    jacobian: Map | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """What the model makes of x."""
        made = self.forward(x)
        return made if self.norm is None else self.norm(made)


@dataclass(frozen=True)
class Lost:
    """Where exactness ends: going back from `tap` to `previous`, and what does not come through.

    dimension_in: values of an image at `previous`; dimension_out: at `tap`.
    """

    tap: str
    previous: str
    dimension_in: int
    dimension_out: int
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.tap} cannot be inverted exactly to {self.previous}: {self.reason} "
            f"({self.dimension_in} values an image before it, {self.dimension_out} behind it)."
        )


@dataclass(frozen=True)
class Walk:
    """Every stream of one pass of a target, in forward order, and the steps between those that are joined.

    streams: names; taps: {tap: number of its stream}; steps: {number of the later stream: step}; image size.
    """

    streams: tuple[str, ...]
    taps: dict[str, int]
    steps: dict[int, Step]
    sizes: dict[str, int]
    channels: dict[str, int]

    def between(self, tap: str, previous: str) -> tuple[Step, ...]:
        """The steps from the tap `previous` to the later `tap`, in forward order. Raises `NotInvertibleError`."""
        for each in (tap, previous):
            if each not in self.taps:
                raise NotInvertibleError(self._lost(tap, previous, f"no known residual block begins or ends at {each}"))
        found = []
        for number in range(self.taps[tap], self.taps[previous], -1):
            if number not in self.steps:
                before, after = self.streams[number - 1], self.streams[number]
                raise NotInvertibleError(
                    self._lost(tap, previous, f"what lies between {before} and {after} is no residual block")
                )
            found.append(self.steps[number])
        if not found:
            raise NotInvertibleError(self._lost(tap, previous, "no residual block lies between them"))
        return tuple(reversed(found))

    def _lost(self, tap: str, previous: str, reason: str) -> Lost:
        return Lost(tap, previous, self.sizes[previous], self.sizes[tap], reason)

    def exact_from(self, tap: str) -> tuple[str, ...]:
        """The taps from which or to which exactness reaches back from `tap`, the latest first, `tap` left out."""
        reached = []
        order = sorted(self.taps, key=self.taps.__getitem__)
        for previous in reversed(order[: order.index(tap)] if tap in order else []):
            try:
                self.between(tap, previous)
            except NotInvertibleError:
                break
            reached.append(previous)
        return tuple(reached)


class NotInvertibleError(BacksightError):
    """A stage that has no exact inverse; `lost` says where and how much."""

    def __init__(self, lost: Lost) -> None:
        super().__init__(str(lost))
        self.lost = lost


def in_precision(target: Target, precision: torch.dtype) -> Target:
    """A copy of the target whose weights (and so passes) are of this precision; the original is left alone."""
    other = copy.copy(target)
    other.model = copy.deepcopy(target.model).to(precision)
    other.__dict__.pop("weights_hash", None)
    return other


def residual_steps(target: Target, tap: str, previous: str) -> tuple[Step, ...]:
    """The half-steps from the tap `previous` to `tap`, in forward order, each a function of (B, n, c) tokens.

    Raises `NotInvertibleError`, with what is lost, where something else lies between them.
    """
    return walk(target).between(tap, previous)


@dataclass
class _Seen:
    """A call of a known block: its halves, and the streams around it."""

    path: str
    halves: list[tuple[str, Step]]
    entering: Tensor
    leaving: Tensor


def walk(target: Target) -> Walk:
    """One pass of a random image, and the half-steps that it went through.

    Raises BacksightError where a half-step does not agree with the model's own pass.
    """
    weights = next(target.model.parameters())
    shape = (1, len(target.preprocessing.mean), *target.image_size)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(weights)
    seen: list[_Seen] = []
    norms: list[tuple[str, nn.LayerNorm, Tensor, Tensor]] = []

    # Norms inside known blocks belong to their half-steps.
    known = tuple(f"{path}." for path, module in target.model.named_modules() if _is_known(module))

    def look(path: str, module: nn.Module, given: Sequence[Any], named: dict[str, Any], output: Any) -> None:
        if _is_known(module):
            stream, *others = given if given else (named["hidden_states"],)
            named = {key: value for key, value in named.items() if value is not stream}
            halves = _halves(module, path, stream, others, named)
            leaving = output[0] if isinstance(output, tuple) else output
            seen.append(_Seen(path, halves, _flat(stream).clone(), _flat(leaving).clone()))
        elif isinstance(module, nn.LayerNorm) and not path.startswith(known) and given[0].ndim in (3, 4):
            norms.append((path, module, _flat(given[0]).clone(), _flat(output).clone()))

    with watching(target.model, look), torch.no_grad():
        recorded = target.record(image, target.available_taps)
    streams, values, steps = _joined(seen, norms)
    sizes, channels = {PIXELS: image[0].numel()}, {PIXELS: image.shape[1]}
    taps: dict[str, int] = {}
    for tap, representation in recorded.items():
        sizes[tap], channels[tap] = representation.values[0].numel(), representation.channels
        number = _placed(representation.values, values, after=max(taps.values(), default=-1))
        if number is not None and isinstance(representation, Tokens):
            taps[tap] = number
    names = {number: tap for tap, number in taps.items()}
    named = tuple(names.get(number, name) for number, name in enumerate(streams))
    renamed = {
        number: replace(step, source=named[number - 1], destination=named[number]) for number, step in steps.items()
    }
    return Walk(named, taps, renamed, sizes, channels)


def _joined(
    seen: Sequence[_Seen], norms: Sequence[tuple[str, nn.LayerNorm, Tensor, Tensor]]
) -> tuple[list[str], list[Tensor], dict[int, Step]]:
    """Streams by name and value, and the steps that lead to them."""
    streams: list[str] = []
    values: list[Tensor] = []
    steps: dict[int, Step] = {}
    for block in seen:
        if not values or not _same(block.entering, values[-1], 0.0):
            streams.append(f"the input of {block.path}")
            values.append(block.entering)
        # The stream between two blocks is one; a post-norm block knows the norm that it comes from.
        before = steps[len(values) - 1].norm if len(values) - 1 in steps else None
        x = block.entering
        for name, half in block.halves:
            step = replace(half, before=before)
            with torch.no_grad():
                x = step(x)
            streams.append(name)
            values.append(x)
            steps[len(values) - 1] = step
            before = step.norm
        if not _same(block.leaving, x, AGREEMENT):
            raise BacksightError(
                f"The half-steps of {block.path} do not make what the model makes: this version of its library "
                "computes the block in another way; use the other inverse families for it."
            )
        values[-1] = block.leaving
    for path, module, entering, leaving in norms:
        if values and _same(entering, values[-1], 0.0):
            norm = Norm.of(module)
            streams.append(path)
            values.append(leaving)
            steps[len(values) - 1] = Step("norm", "", "", lambda x: x, norm, tokenwise=True)
    return streams, values, steps


def _placed(tap: Tensor, streams: Sequence[Tensor], after: int) -> int | None:
    """The stream behind number `after` that a tap holds: the very same numbers, else the nearest within round-off.

    Branches that are still zero leave several streams alike; taps come in forward order, so the first is right.
    """
    rest = range(after + 1, len(streams))
    exact = next((number for number in rest if _same(tap, streams[number], 0.0)), None)
    near = [number for number in rest if _same(tap, streams[number], SAME)]
    if exact is not None or not near:
        return exact
    return min(near, key=lambda number: float((tap - streams[number]).norm()))


def _flat(stream: Tensor) -> Tensor:
    """(1, n, c) of (1, n, c) or (1, h, w, c)."""
    return stream.flatten(1, -2)


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    return bool((a - b).norm() <= tolerance * b.norm()) if tolerance else torch.equal(a, b)


# The block classes


def _known_classes() -> dict[type, Callable[..., list[Any]]]:
    from timm.models import beit, cait, eva, swin_transformer, swin_transformer_v2
    from timm.models import vision_transformer as vit
    from transformers.models.detr.modeling_detr import DetrEncoderLayer

    return {
        vit.Block: _vit,
        vit.ResPostBlock: _vit_normed_branch,
        vit.ParallelScalingBlock: _whole,
        vit.ParallelThingsBlock: _vit_things,
        beit.Block: _beit,
        eva.EvaBlock: _eva,
        eva.EvaBlockPostNorm: _eva_normed_branch,
        cait.LayerScaleBlock: _cait,
        swin_transformer.SwinTransformerBlock: _swin,
        swin_transformer_v2.SwinTransformerV2Block: _swin_normed_branch,
        DetrEncoderLayer: _detr,
    }


def _is_known(module: nn.Module) -> bool:
    return type(module) in _known_classes()


def _halves(
    module: nn.Module, path: str, stream: Tensor, others: Sequence[Any], named: dict[str, Any]
) -> list[tuple[str, Step]]:
    """(name of the stream behind it, step) for each half of a block, as functions of flat tokens (B, n, c)."""
    grid = tuple(stream.shape[1:-1])

    def flatly(function: Map) -> Map:
        if len(grid) == 1:
            return function
        return lambda x: function(x.unflatten(1, grid)).flatten(1, 2)

    found = []
    for suffix, function, tokenwise, norm, *slope in _known_classes()[type(module)](module, others, named):
        kind: Kind = "residual" if norm is None else "post_norm"
        # What acts on tokens alone takes them in any arrangement, and needs no grid.
        forward = function if tokenwise else flatly(function)
        step = Step(kind, "", "", forward, None if norm is None else Norm.of(norm), None, tokenwise, *slope)
        found.append((path + suffix, step))
    return found


def _vit(block: Any, others: Any, named: Any) -> list[Any]:
    return [
        (".attn", lambda x: x + block.ls1(block.attn(block.norm1(x), *others, **named)), False, None),
        ("", lambda x: x + block.ls2(block.mlp(block.norm2(x))), True, None, _mlp_jacobian(block)),
    ]


def _mlp_jacobian(block: Any) -> Map | None:
    """The derivative of x + mlp(norm2(x)) in closed form, where the MLP is the usual one (five times as fast)."""
    from timm.layers import Mlp

    mlp, norm = block.mlp, block.norm2
    plain = type(mlp) is Mlp and type(mlp.act) is nn.GELU and mlp.act.approximate == "none"
    plain = plain and isinstance(mlp.norm, nn.Identity) and isinstance(block.ls2, nn.Identity)
    plain = (
        plain and isinstance(mlp.fc1, nn.Linear) and isinstance(mlp.fc2, nn.Linear) and isinstance(norm, nn.LayerNorm)
    )
    if not plain:
        return None

    def jacobian(x: Tensor) -> Tensor:
        first, second = mlp.fc1.weight.detach(), mlp.fc2.weight.detach()
        if norm.weight is not None:
            first = first * norm.weight.detach()
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        hidden = mlp.fc1(norm(x))
        slope = (
            0.5 * (1 + torch.erf(hidden / 2**0.5)) + hidden * torch.exp(-hidden.square() / 2) / (2 * torch.pi) ** 0.5
        )
        # One product for all tokens; what the norm takes (its mean, its length) has rank 2 and is taken out behind it.
        inner = (second * slope[:, None]) @ (first - first.mean(1, keepdim=True))
        normed = centred / deviation
        inner = inner - (inner @ normed[:, :, None]) * (normed / x.shape[-1])[:, None]
        made = inner / deviation[:, :, None]
        made.diagonal(dim1=1, dim2=2).add_(1)
        return made

    return jacobian


def _vit_normed_branch(block: Any, others: Any, named: Any) -> list[Any]:
    return [
        (".attn", lambda x: x + block.norm1(block.attn(x, *others, **named)), False, None),
        ("", lambda x: x + block.norm2(block.mlp(x)), True, None),
    ]


def _vit_things(block: Any, others: Any, named: Any) -> list[Any]:
    return [
        (".attn", lambda x: x + sum(each(x, *others, **named) for each in block.attns), False, None),
        ("", lambda x: x + sum(each(x) for each in block.ffns), True, None),
    ]


def _whole(block: Any, others: Any, named: Any) -> list[Any]:
    """Attention and MLP side by side: one step."""
    return [("", lambda x: block(x, *others, **named), False, None)]


def _beit(block: Any, others: Any, named: Any) -> list[Any]:
    bias = named.get("shared_rel_pos_bias", others[0] if others else None)
    first, second = (1.0 if gamma is None else gamma for gamma in (block.gamma_1, block.gamma_2))
    return [
        (".attn", lambda x: x + first * block.attn(block.norm1(x), shared_rel_pos_bias=bias), False, None),
        ("", lambda x: x + second * block.mlp(block.norm2(x)), True, None),
    ]


def _eva(block: Any, others: Any, named: Any) -> list[Any]:
    first, second = (1.0 if gamma is None else gamma for gamma in (block.gamma_1, block.gamma_2))
    return [
        (".attn", lambda x: x + first * block.attn(block.norm1(x), *others, **named), False, None),
        ("", lambda x: x + second * block.mlp(block.norm2(x)), True, None),
    ]


def _eva_normed_branch(block: Any, others: Any, named: Any) -> list[Any]:
    return _vit_normed_branch(block, others, named)


def _cait(block: Any, others: Any, named: Any) -> list[Any]:
    return [
        (".attn", lambda x: x + block.gamma_1 * block.attn(block.norm1(x)), False, None),
        ("", lambda x: x + block.gamma_2 * block.mlp(block.norm2(x)), True, None),
    ]


def _swin(block: Any, others: Any, named: Any) -> list[Any]:
    return [
        (".attn", lambda x: x + block._attn(block.norm1(x)), False, None),
        ("", lambda x: x + block.mlp(block.norm2(x)), True, None),
    ]


def _swin_normed_branch(block: Any, others: Any, named: Any) -> list[Any]:
    return [
        (".attn", lambda x: x + block.norm1(block._attn(x)), False, None),
        ("", lambda x: x + block.norm2(block.mlp(x)), True, None),
    ]


def _detr(layer: Any, others: Any, named: Any) -> list[Any]:
    mask = others[0] if others else named.get("attention_mask")
    code = named.get("spatial_position_embeddings", others[1] if len(others) > 1 else None)
    if mask is not None:
        raise BacksightError("Padded images have no exact inverse here: crop or stretch them instead of padding.")

    def attended(x: Tensor) -> Tensor:
        return x + layer.self_attn(hidden_states=x, attention_mask=None, position_embeddings=code)[0]

    return [
        (".attn", attended, False, layer.self_attn_layer_norm),
        ("", lambda x: x + layer.mlp(x), True, layer.final_layer_norm),
    ]
