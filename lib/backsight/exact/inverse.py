"""Exact inverses: y = x + f(x) solved for x, half-step by half-step, as far back as nothing is lost.

    tap ──► solve ──► solve ──► … ──► embedding ──► A⁺y + (1 − A⁺A) x_linear ──► image
            attention or MLP half       (patches)      what the patch embedding holds, and the linear
            of a block, float64                        inverse's word on what it does not hold

What is exact is what the model computes: a solved half-step has a residual at round-off. Whether that x is the one that
was there is another question: x ↦ x + f(x) may take several x to one y (`studies.second_roots` lists them). Starts
are closed-form (`StagedStart`); where an MLP half folds, a root that is unusual is doubted, and the most usual of those
that the starts lead to is kept. An unsolved sample is marked, and the chain goes on from its best.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from backsight.data.images import ImageSource, batches
from backsight.errors import BacksightError
from backsight.exact.solver import Score, Settings, Solution, solve
from backsight.exact.starts import (
    STAGES,
    Embedding,
    LostDegrees,
    Prior,
    StagedStart,
    fit_lost_degrees,
    fit_prior,
    fit_staged_start,
    measured_embedding,
    of_tokens,
)
from backsight.exact.steps import Lost, NotInvertibleError, Step, Walk, in_precision, walk
from backsight.inverses.linear import fit_linear
from backsight.inverses.module import InverseHeader, Inverses, described, header_for, rebuilt
from backsight.representation import Representation, Tokens
from backsight.targets.base import PIXELS, Target

DENSE = 256  # channels of a token up to which its derivative is factored, and no Krylov space is built
PARTS = {"starts": StagedStart, "degrees": LostDegrees, "priors": Prior}  # what is fitted of a step
SWEEPS = 3  # of a post-norm chain: each brings the norms' ε in more exactly, by a factor of about 1e-5


@dataclass(frozen=True, eq=False)
class ExactModel:
    """What the exact inverses of one target share, measured on it: target: in float64; embedding: or None."""

    target: Target
    walk: Walk
    embedding: Embedding | None

    @classmethod
    def of(cls, target: Target) -> ExactModel:
        """Raises BacksightError where images are padded, and where there is no float64."""
        if target.device.type == "mps":
            raise BacksightError(f'Exact inverses need float64, which mps lacks: load {target.name} with device="cpu".')
        if target not in _MEASURED:
            double = in_precision(target, torch.float64)
            _MEASURED[target] = cls(double, walk(double), measured_embedding(double))
        return _MEASURED[target]

    @cached_property
    def single(self) -> Walk:
        """The steps in float32, for directions."""
        return walk(in_precision(self.target, torch.float32))


_MEASURED: WeakKeyDictionary[Target, ExactModel] = WeakKeyDictionary()


@dataclass(frozen=True)
class Trace:
    """What an exact inverse did.

    values: (B, n, c) where it ended, at the tap `destination`; streams: {stream: (B, n, c)} on the way; solutions: of
    each step (x left out), from the last to the first, and steps these; squares: {stream behind a norm: mean square of
    û there}; prefix_error: (B,) relative distance of the prefix tokens from the constants that they are at the
    embedding, NaN elsewhere: it tells a wrong root without the truth; seconds of the batch.
    """

    values: Tensor
    destination: str
    streams: Mapping[str, Tensor]
    steps: tuple[Step, ...]
    solutions: tuple[Solution, ...]
    squares: Mapping[str, Tensor]
    prefix_error: Tensor
    seconds: float

    @property
    def solved(self) -> Tensor:
        """(B,) every step on the way."""
        flags = [solution.solved for solution in self.solutions]
        return torch.stack(flags).all(0) if flags else torch.ones_like(self.values[:, 0, 0], dtype=torch.bool)


class ExactInverse(nn.Module):
    """The exact inverse of one tap: inverse(representation) -> images (B, 3, H, W) in [0, 1], in float32.

    starts, degrees, priors: by the stream behind a step (`fit_exact`), all may be missing; completion: a linear inverse
    to pixels, of where exactness ends; `lost` says what does not come through. It computes where its target is.
    Raises `NotInvertibleError` where not even one step back from the tap is exact.
    """

    kind = family = "exact"
    destination = PIXELS
    precise = ("degrees.", "priors.")  # in files: covariances and what a norm took stay as they are

    def __init__(
        self,
        model: ExactModel,
        tap: str,
        fitted: Mapping[str, Mapping[str, nn.Module]] | None = None,
        completion: nn.Module | None = None,
        settings: Settings | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        (self.source,) = model.target.resolve_taps([tap])
        self.model, self.settings, self.batch_size = model, settings or Settings(), batch_size
        known, reached = model.target.available_taps, model.walk.exact_from(tap)
        if not reached and tap != known[0]:
            model.walk.between(tap, known[known.index(tap) - 1])  # raises, with the reason
        self.reached = reached[-1] if reached else tap
        self.steps = model.walk.between(tap, self.reached) if reached else ()
        names = [step.destination for step in self.steps]
        for part in PARTS:
            own = {_key(name): module for name, module in (fitted or {}).get(part, {}).items() if name in names}
            setattr(self, part, nn.ModuleDict(own))
        self.completion: Any = completion  # a LinearInverse
        self.header: InverseHeader | None = None
        self.lost = _losses(model, tap, self.reached)

    def fitted(self, part: str, step: Step) -> Any:
        """The `StagedStart`, `LostDegrees` or `Prior` (part: starts, degrees, priors) of a step, or None."""
        return dict(getattr(self, part).items()).get(_key(step.destination))

    def at(self, tap: str, settings: Settings | None = None) -> Self:
        """The inverse of a tap on its way, which shares what was fitted."""
        other = type(self)(self.model, tap, None, self.completion, settings or self.settings, self.batch_size)
        for part in PARTS:
            setattr(other, part, getattr(self, part))
        return other

    def forward(self, representation: Representation) -> Tensor:
        every = torch.arange(representation.batch, device=representation.values.device)
        parts = [representation.index(part) for part in every.split(self.batch_size)]
        return torch.cat([self.images(self.trace(part), part) for part in parts])

    def images(self, trace: Trace, representation: Representation) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of a trace that ends where exactness does."""
        linear = None
        if self.completion is not None:
            linear = self.completion.raw(representation.replace(trace.values.float()))
        if self.model.embedding is not None and trace.destination == self.model.target.available_taps[0]:
            linear = self.model.embedding.pixels(trace.values, linear)
        if linear is None:
            raise BacksightError(
                f"Exactness ends at {trace.destination} of {self.model.target.name}, and there is no linear inverse "
                "from there to pixels: give one as `completion`."
            )
        return linear.clamp(0, 1).float()

    def trace(self, representation: Representation, to: str | None = None) -> Trace:
        """Back to the tap `to` (default: as far as exactness goes). Raises BacksightError on padded or unfit tokens."""
        if not isinstance(representation, Tokens) or representation.padding is not None:
            raise BacksightError(f"The exact inverse of {self.source} reads unpadded tokens, not {representation}.")
        began, to = time.perf_counter(), to or self.reached
        steps = self.model.walk.between(self.source, to)[::-1] if to != self.source else ()
        y = representation.values.double()
        stripped = representation.values.dtype != torch.float64
        streams: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        solutions: list[Solution] = []
        with torch.no_grad():
            for _ in range(SWEEPS if any(step.kind == "post_norm" for step in steps) else 1):
                # Mean square of û where a norm ended, from the last sweep: variance / (variance + ε).
                behind = [step for step in steps if step.norm is not None and step.source in streams]
                squares = {s.destination: _mean_square(s.norm, s.forward(streams[s.source])) for s in behind}
                x, solutions, last, streams = y, [], streams, {}
                for step in steps:
                    solutions.append(self.solve(step, x, squares.get(step.source), last.get(step.source), stripped))
                    x = streams[step.source] = solutions[-1].x
        values = streams[to] if steps else y
        prefix_error, embedding = torch.full_like(values[:, 0, 0], torch.nan), self.model.embedding
        if embedding is not None and len(embedding.prefix) and to == self.model.target.available_taps[0]:
            away = values[:, : len(embedding.prefix)] - embedding.prefix
            prefix_error = away.flatten(1).norm(dim=1) / embedding.prefix.norm()
        return Trace(values, to, streams, steps, tuple(solutions), squares, prefix_error, time.perf_counter() - began)

    def solve(
        self, step: Step, y: Tensor, square: Tensor | None = None, last: Tensor | None = None, stripped: bool = False
    ) -> Solution:
        """x with step(x) = y; last: x of an earlier sweep; stripped: y has lost its last digits in float32."""
        degrees = None
        if step.norm is not None and step.before is None:
            degrees = self._degrees(step, y, stripped)
        if step.kind == "norm" and step.norm is not None and degrees is not None:
            x = step.norm.stripped(y) * degrees[1] + degrees[0]
            residual = (step(x) - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)
            nothing = torch.zeros_like(residual, dtype=torch.long)
            return Solution(x, residual, nothing, nothing + 1, residual < 1e-3)
        return solve_step(step, y, self.starts_of(step, y, last), self.settings, square, degrees, *self.choice(step, y))

    def starts_of(self, step: Step, y: Tensor, last: Tensor | None) -> list[Tensor]:
        """(B, n, c) guesses of x, in the order in which they are tried."""
        if last is not None:
            return [last, y]
        start = self.fitted("starts", step)
        if start is None:
            return [y]
        best, *others = start(step, y)
        prior = self.fitted("priors", step)
        further = [] if prior is None or not self._doubts(prior) else prior.further_starts(y, best)
        # The last and best stage, the first, which errs in another way, and those between.
        return [best, *others[-1:], *others[:-1], y, *further]

    def _doubts(self, prior: Prior) -> bool:
        return self.settings.choose and bool(prior.folding > 0)

    def choice(self, step: Step, y: Tensor) -> tuple[Score | None, Tensor | None]:
        """(score of a step's tokens, what is usual (B n,)) where the step folds; nowhere else is there a choice."""
        prior, tokens = self.fitted("priors", step), y.shape[1]
        if prior is None or not self._doubts(prior):
            return None, None
        return lambda x, which: prior.of_rows(x[:, 0], which % tokens), of_tokens(prior.usual, tokens).repeat(len(y))

    def _degrees(self, step: Step, y: Tensor, stripped: bool) -> tuple[Tensor, Tensor]:
        """(mean of x, deviation of x + f(x)) of tokens that a norm took them from."""
        assert step.norm is not None
        hat, guess = step.norm.stripped(y), self.fitted("degrees", step)
        mean, deviation = guess(hat) if guess is not None else (hat.new_zeros(1), torch.ones_like(hat[..., :1]))
        if not stripped:
            kept = step.norm.deviation(hat)
            deviation = torch.where(kept.isnan(), deviation, kept)
        return mean, deviation

    def configuration(self) -> dict[str, Any]:
        """All but the numbers, for a file."""
        fitted = {part: {name: _shapes(module) for name, module in getattr(self, part).items()} for part in PARTS}
        return {
            "source": self.source,
            "reached": self.reached,
            "image_size": list(self.model.target.image_size),
            "settings": asdict(self.settings),
            "batch_size": self.batch_size,
            "fitted": fitted,
            "completion": None if self.completion is None else described(self.completion),
        }

    @classmethod
    def build(cls, configuration: Mapping[str, Any], target: Target) -> Self:
        """An inverse with empty buffers. Raises BacksightError where the target is not what was fitted."""
        size = tuple(configuration["image_size"])
        if size != tuple(target.image_size):
            raise BacksightError(f"The inverse was fitted on images of {size}, but {target.name} takes another size.")
        model, fitted = ExactModel.of(target), {}
        for part, kind in PARTS.items():
            modules = configuration["fitted"][part].items()
            fitted[part] = {_name(name): kind(**_empty(shapes, target.device)) for name, shapes in modules}
        end = None if configuration["completion"] is None else rebuilt(configuration["completion"], target)
        settings = Settings(**configuration["settings"])
        inverse = cls(model, configuration["source"], fitted, end, settings, configuration["batch_size"])
        if inverse.reached != configuration["reached"]:
            raise BacksightError(
                f"The inverse leads from {inverse.source} back to {configuration['reached']}, and {target.name} is "
                f"exact from there to {inverse.reached} here (another version of its library?): fit it again."
            )
        return inverse


def _shapes(module: nn.Module) -> dict[str, list[Any]]:
    return {name: [str(part.dtype).removeprefix("torch."), *part.shape] for name, part in module.named_buffers()}


def _empty(shapes: Mapping[str, Sequence[Any]], device: torch.device) -> dict[str, Tensor]:
    return {
        name: torch.zeros(shape, dtype=getattr(torch, dtype), device=device) for name, (dtype, *shape) in shapes.items()
    }


def _key(name: str) -> str:
    return name.replace(".", "/")  # module names hold no dots


def _name(key: str) -> str:
    return key.replace("/", ".")


def _mean_square(norm: Any, z: Tensor) -> Tensor:
    return norm.normalised(z).square().mean(-1, keepdim=True)


def _losses(model: ExactModel, tap: str, reached: str) -> tuple[Lost, ...]:
    walked, order, embedding = model.walk, model.target.available_taps, model.embedding
    losses = []
    for step in walked.between(tap, reached) if reached != tap else ():
        if step.norm is not None and step.before is None:
            size, tokens = walked.sizes[tap], walked.sizes[tap] // walked.channels[walked.taps[tap]]
            reason = "its norm takes the mean of every token (in float32 the scale too), and regression guesses it"
            losses.append(Lost(step.destination, step.source, size, size - tokens, reason))
    if reached != order[0] or embedding is None:
        before = PIXELS if reached == order[0] else order[order.index(reached) - 1]
        try:
            walked.between(reached, before)
        except NotInvertibleError as error:
            losses.append(error.lost)
    elif embedding.rank < len(embedding.matrix):
        count, reason = len(embedding.bias), "the patch embedding has no full rank, and the linear inverse completes it"
        losses.append(Lost(order[0], PIXELS, count * len(embedding.matrix), count * embedding.rank, reason))
    return tuple(losses)


def solve_step(
    step: Step,
    y: Tensor,
    starts: Sequence[Tensor],
    settings: Settings | None = None,
    square: Tensor | None = None,
    degrees: tuple[Tensor, Tensor] | None = None,
    score: Score | None = None,
    usual: Tensor | None = None,
) -> Solution:
    """x with step(x) = y, for a batch of streams (B, n, c); tokens that do not see one another are solved one by one.

    square: (B, n, 1) mean square of x̂ (1 where not known) of a post-norm step behind another norm; degrees: (mean of x,
    deviation of x + f(x)), each (B, n, 1), for a post-norm step behind none; score, usual: as in `solve`, of tokens.

    A norm's û = û(x + f(x)) holds C − 1 equations a token (and the scale only in its last digits). Where x itself left
    a norm, x̂ has the mean 0 and a known mean square: added along 1, which û never has, and along û, whose length is
    known. Without a norm before it, mean and scale have to be given.
    """
    norm, before, context = step.norm, step.before, []
    function: Callable[..., Tensor] = step.forward
    right = y
    if norm is not None and before is not None:
        right, context = norm.stripped(y), [torch.ones_like(y[..., :1]) if square is None else square]

        def function(x: Tensor, square: Tensor) -> Tensor:
            hat = before.stripped(x)
            excess = hat.square().mean(-1, keepdim=True) - square
            return norm.normalised(step.forward(x)) * (1 + excess) + hat.mean(-1, keepdim=True)

    elif norm is not None and degrees is not None:
        right = norm.stripped(y) * degrees[1] + degrees[0]

        def function(x: Tensor) -> Tensor:
            z = step.forward(x)
            return z - z.mean(-1, keepdim=True) + x.mean(-1, keepdim=True)

    elif norm is not None:
        raise ValueError(f"{step.destination} is normalised, and nothing says what mean and scale its tokens had")
    if not step.tokenwise:
        return solve(function, right, starts, settings, context)
    right, *rest = (values.reshape(-1, 1, values.shape[-1]) for values in (right, *context, *starts))
    jacobian = step.jacobian if norm is None and y.shape[2] <= DENSE else None
    context, starts = rest[: len(context)], rest[len(context) :]
    return solve(function, right, starts, settings, context, jacobian, score, usual).grouped(len(y))


def fit_exact(
    target: Target,
    images: ImageSource | Tensor,
    validation: ImageSource | Tensor | None = None,
    *,
    taps: Sequence[str] | str | None = None,
    seed: int = 0,
    progress: bool = True,
    linear: Inverses | None = None,
    count: int = 256,
    settings: Settings | None = None,
    stages: int = STAGES,
) -> Inverses:
    """The exact inverse of every tap that has one; the others are left out with a warning.

    images: of which the first `count` fit the closed-form starts, of so many `stages`; linear: linear inverses to
    pixels, which complete what no step holds; those that are missing are fitted on all images. Raises BacksightError
    where no tap has an exact inverse.
    """
    names = target.taps if taps is None else target.resolve_taps(taps)
    model = ExactModel.of(target)
    ends = {tap: (tap, *model.walk.exact_from(tap))[-1] for tap in names}
    kept = [tap for tap in names if ends[tap] != tap or (tap == target.available_taps[0] and model.embedding)]
    tell_left_out("exact", target, {tap: _refusal(model, tap) for tap in names if tap not in kept}, bool(kept))
    missing = list(dict.fromkeys(ends[tap] for tap in kept if ends[tap] not in (linear or {})))
    completion = dict(linear or {})
    if missing:
        completion |= fit_linear(target, images, validation, taps=missing, seed=seed, progress=progress)
    inverses = exact_inverses(target, images, kept, completion, count, settings, stages)
    for tap, inverse in inverses.items():
        inverse.header = header_for(target, "exact", tap, PIXELS, images, seed)
    return Inverses(inverses)


def exact_inverses(
    target: Target,
    images: ImageSource | Tensor,
    taps: Sequence[str],
    completion: Mapping[str, nn.Module] | None = None,
    count: int = 256,
    settings: Settings | None = None,
    stages: int = STAGES,
) -> dict[str, ExactInverse]:
    """`fit_exact` of those of the taps that have an exact inverse, completed only by what `completion` holds."""
    model = ExactModel.of(target)
    places, first = model.walk.taps, target.available_taps[0]
    reached = {tap: model.walk.exact_from(tap) for tap in target.resolve_taps(taps)}
    ends = {tap: way[-1] if way else tap for tap, way in reached.items() if way or tap == first}
    deepest: dict[str, int] = {}
    for tap, end in ends.items():
        if end != tap:
            deepest[end] = max(deepest.get(end, 0), places[tap])
    fitted: dict[str, dict[str, nn.Module]] = {"starts": {}, "degrees": {}, "priors": {}}
    with torch.no_grad():
        for x, prefix, steps in _runs(model, images, deepest, count):
            _fit_run(steps, x, prefix, stages, fitted)
    completion = completion or {}
    return {tap: ExactInverse(model, tap, fitted, completion.get(end), settings) for tap, end in ends.items()}


def _runs(
    model: ExactModel, images: ImageSource | Tensor, deepest: Mapping[str, int], count: int
) -> Iterator[tuple[Tensor, int, list[Step]]]:
    """(first stream (B, n, c), its prefix, the steps from there on) of every run of steps that is needed."""
    recorded: dict[str, list[Tokens]] = {tap: [] for tap in deepest}
    seen = 0
    for batch in batches(images, 64) if deepest else ():
        for tap, tokens in model.target.record(batch[: count - seen].double(), list(deepest)).items():
            assert isinstance(tokens, Tokens)
            recorded[tap].append(tokens)
        seen += len(batch)
        if seen >= count:
            break
    for tap, last in deepest.items():
        numbers = range(model.walk.taps[tap] + 1, last + 1)
        x = torch.cat([tokens.values for tokens in recorded[tap]])
        yield x, recorded.pop(tap)[0].prefix, [model.walk.steps[number] for number in numbers]


def _fit_run(
    steps: Sequence[Step], x: Tensor, prefix: int, stages: int, fitted: Mapping[str, dict[str, nn.Module]]
) -> None:
    """Step by step: no more than the streams on either side of one step are held."""
    for step in steps:
        y = torch.cat([step(part) for part in x.split(64)])
        if step.norm is not None and step.before is None:
            fitted["degrees"][step.destination] = fit_lost_degrees(step, x)
        if step.kind != "norm":
            start = fitted["starts"][step.destination] = fit_staged_start(step, x, y, prefix, stages)
            if step.jacobian is not None and x.shape[2] <= DENSE:
                fitted["priors"][step.destination] = fit_prior(step, x, y, start, prefix)
        x = y


def _refusal(model: ExactModel, tap: str) -> str:
    """Why not even one step back from a tap is exact."""
    order = (PIXELS, *model.target.available_taps)
    try:
        model.walk.between(tap, order[order.index(tap)])  # the place before it
    except NotInvertibleError as error:
        return str(error)
    return ""


def tell_left_out(family: str, target: Target, refused: Mapping[str, str], some: bool) -> None:
    """Warn once of the taps that a family cannot read; raise BacksightError where it can read none."""
    if not refused:
        return
    taps, reason = ", ".join(refused), next(iter(refused.values()))
    if not some:
        raise BacksightError(f"{target.name} has no {family} inverse at any of its taps ({taps}). {reason}")
    warnings.warn(f"{target.name} has no {family} inverse at {taps}. {reason}", stacklevel=3)
