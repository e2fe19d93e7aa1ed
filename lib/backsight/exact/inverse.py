"""Exact inverses: y = x + f(x) solved for x, half-step by half-step, as far back as nothing is lost.

    tap ──► solve ──► solve ──► … ──► embedding ──► A⁺y + (1 − A⁺A) x_linear ──► image
            attention or MLP half       (patches)      what the patch embedding holds, and the linear
            of a block, float64                        inverse's word on what it does not hold

What is exact is what the model computes: x ↦ x + f(x) may take several x to one y (`studies.roots` lists them).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from backsight.data.images import ImageSource, batches
from backsight.errors import BacksightError
from backsight.exact.solver import Settings, Solution
from backsight.exact.starts import STAGES, Half
from backsight.exact.steps import ExactModel, NotInvertibleError, Step
from backsight.inverses.linear import fit_linear
from backsight.inverses.module import InverseHeader, Inverses, described, header_for, rebuilt
from backsight.representation import Representation, Tokens, concatenate
from backsight.targets.base import PIXELS, Target

SWEEPS = 3  # of a post-norm chain: each brings the norms' ε in more exactly, by a factor of about 1e-5


@dataclass(frozen=True)
class Trace:
    """values: (B, n, c) where it ended; steps, solutions: from the last to the first; squares: {stream behind a norm:
    mean square of û there}."""

    values: Tensor
    steps: Sequence[Step]
    solutions: Sequence[Solution]
    squares: Mapping[str, Tensor]

    @property
    def solved(self) -> Tensor:
        """(B,) every step on the way."""
        flags = [solution.solved for solution in self.solutions]
        return torch.stack(flags).all(0) if flags else torch.ones_like(self.values[:, 0, 0], dtype=torch.bool)


class ExactInverse(nn.Module):
    """The exact inverse of one tap: inverse(representation) -> images (B, 3, H, W) in [0, 1], in float32.

    halves: by the stream behind them, those that are fitted; completion: a linear inverse to pixels, of where exactness
    ends (`reached`). Raises `NotInvertibleError` where not even one step back from the tap is exact.
    """

    kind = family = "exact"
    destination = PIXELS
    batch_size = 32
    header: InverseHeader | None

    def __init__(
        self,
        model: ExactModel,
        tap: str,
        halves: Mapping[str, Half] | None = None,
        completion: Any = None,
        settings: Settings | None = None,
    ) -> None:
        super().__init__()
        (self.source,) = model.target.resolve_taps([tap])
        self.model, self.settings = model, settings or Settings()
        self.steps, self.reached = model.back_from(self.source)
        self.halves: Any = nn.ModuleList((halves or {}).get(step.destination, Half(step)) for step in self.steps)
        self.completion, self.header = completion, None

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        """What `.to()` calls: the float64 copy of the target goes along, and stays float64."""
        super()._apply(function, recurse)
        self.model = self.model.on(function(torch.empty(0, device=self.model.target.device)).device)
        self.steps, _ = self.model.back_from(self.source)
        for half, step in zip(self.halves, self.steps, strict=True):
            half.step = step
        return self

    def fitted(self) -> dict[str, Half]:
        return {half.step.destination: half for half in self.halves}

    def at(self, tap: str, settings: Settings | None = None) -> ExactInverse:
        """The inverse of a tap on its way, which shares what was fitted."""
        return ExactInverse(self.model, tap, self.fitted(), self.completion, settings or self.settings)

    def forward(self, representation: Representation) -> Tensor:
        return torch.cat([self._images(part) for part in parts_of(representation, self.batch_size)])

    def _images(self, representation: Representation) -> Tensor:
        values, embedding, images = self.trace(representation).values, self.model.embedding, None
        if self.completion is not None:
            images = self.completion.raw(representation.replace(values.float()))
        if embedding is not None and self.reached == self.model.target.available_taps[0]:
            images = embedding.pixels(values, images)
        if images is None:
            raise BacksightError(
                f"Exactness ends at {self.reached} of {self.model.target.name}, and there is no linear inverse "
                "from there to pixels: give one as `completion`."
            )
        return images.clamp(0, 1).float()

    def trace(self, representation: Representation, to: str | None = None) -> Trace:
        """Back to the tap `to` (default: as far as exactness goes). Raises BacksightError on other or padded tokens."""
        if not isinstance(representation, Tokens) or representation.padding is not None:
            raise BacksightError(f"The exact inverse of {self.source} reads unpadded tokens, not {representation}.")
        halves = list(self.halves)[::-1][: len(self.model.between(self.source, to or self.reached))]
        x, stripped = representation.values.double(), representation.values.dtype != torch.float64
        squares: dict[str, Tensor] = {}
        solutions: list[Solution] = []
        with torch.no_grad():
            for _ in range(SWEEPS if any(half.step.before is not None for half in halves) else 1):
                last, solutions, x = solutions, [], representation.values.double()
                for half, solution in zip(halves, last, strict=False):
                    if (norm := half.step.norm) is not None:  # the mean square of û that it leaves
                        hat = norm.normalised(half.step.forward(solution.x))
                        squares[half.step.destination] = hat.square().mean(-1, keepdim=True)
                for number, half in enumerate(halves):
                    starts = [last[number].x, x] if last else half.starts(x, self.settings.choose)
                    solutions.append(half.solve(x, starts, self.settings, squares.get(half.step.source), stripped))
                    x = solutions[-1].x
        return Trace(x, [half.step for half in halves], solutions, squares)

    def configuration(self) -> dict[str, Any]:
        end = None if self.completion is None else described(self.completion)
        return {"tap": self.source, "reached": self.reached, "settings": asdict(self.settings), "completion": end}

    @classmethod
    def build(cls, configuration: Mapping[str, Any], target: Target) -> Self:
        """An inverse without numbers. Raises BacksightError where the target's blocks are not those that were."""
        tap, reached, end = (configuration[name] for name in ("tap", "reached", "completion"))
        completion = None if end is None else rebuilt(end, target)
        inverse = cls(ExactModel.of(target), tap, None, completion, Settings(**configuration["settings"]))
        if inverse.reached != reached:
            raise BacksightError(
                f"The inverse leads from {tap} back to {reached}, and {target.name} is exact from there to "
                f"{inverse.reached} here (another version of its library?): fit it again."
            )
        return inverse


def fit_exact(
    target: Target,
    images: ImageSource | Tensor,
    validation: ImageSource | Tensor | None = None,
    *,
    taps: Sequence[str] | str | None = None,
    seed: int = 0,
    progress: bool = True,
    linear: Mapping[str, nn.Module] | None = None,
    count: int = 256,
    stages: int = STAGES,
) -> Inverses:
    """The exact inverse of every tap that has one; the others are left out with a warning.

    images: of which the first `count` fit the closed-form starts, of so many `stages`; linear: linear inverses to
    pixels, which complete what no step holds; those that are missing are fitted on all images. Raises BacksightError
    where no tap has an exact inverse.
    """
    names = target.taps if taps is None else target.resolve_taps(taps)
    model, ends, refused = ExactModel.of(target), {}, {}
    for tap in names:
        try:
            _, end = model.back_from(tap)
            if end == tap and model.embedding is None:
                model.between(tap, PIXELS)  # raises
            ends[tap] = end
        except NotInvertibleError as error:
            refused[tap] = str(error)
    tell_left_out("exact", target, refused, bool(ends))
    halves = _fitted(model, next(batches(images, count)), ends, stages)
    ending = completed(linear or {}, ends.values(), target, images, validation, seed=seed, progress=progress)
    inverses = {tap: ExactInverse(model, tap, halves, ending[end]) for tap, end in ends.items()}
    for tap, inverse in inverses.items():
        inverse.header = header_for(target, "exact", tap, PIXELS, images, seed)
    return Inverses(inverses)


def _fitted(model: ExactModel, images: Tensor, ends: Mapping[str, str], stages: int) -> dict[str, Half]:
    """{stream behind it: half-step} on all ways; two streams are held at once."""
    runs = {tap: end for tap, end in ends.items() if tap != end}
    halves: dict[str, Half] = {}
    parts = [model.target.record(part, list(set(runs.values()))) for part in images.double().split(64)] if runs else []
    for end in dict.fromkeys(runs.values()):
        tokens: Any = concatenate([part.pop(end) for part in parts])
        x, last = tokens.values, max(model.taps[tap] for tap in runs if runs[tap] == end)
        for number in range(model.taps[end] + 1, last + 1):
            half = Half(model.steps[number])
            with torch.no_grad():
                y = torch.cat([half.step(part) for part in x.split(64)])
                half.fit(x, y, tokens.prefix, stages)
            halves[half.step.destination], x = half, y
    return halves


def completed(given: Mapping[str, Any], taps: Iterable[str], target: Target, *images: Any, **options: Any) -> Any:
    """Inverses to pixels of these taps: the given ones, and linear ones, fitted here, of those that are missing."""
    missing = [tap for tap in dict.fromkeys(taps) if tap not in given]
    return {**given, **(fit_linear(target, *images, taps=missing, **options) if missing else {})}


def parts_of(representation: Representation, size: int) -> list[Representation]:
    every = torch.arange(representation.batch, device=representation.values.device)
    return [representation.index(part) for part in every.split(size)]


def tell_left_out(family: str, target: Target, refused: Mapping[str, str], some: bool) -> None:
    """Warn once of the taps that a family cannot read; raise BacksightError where it can read none."""
    taps, reason = ", ".join(refused), next(iter(refused.values()), "")
    if not some:
        raise BacksightError(f"{target.name} has no {family} inverse at any of its taps ({taps}). {reason}")
    if refused:
        warnings.warn(f"{target.name} has no {family} inverse at {taps}. {reason}", stacklevel=3)
