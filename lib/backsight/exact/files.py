"""Exact and MAP inverses as files: what was fitted is stored, what the target itself tells is measured at loading.

    stored                                            measured again on the target
    exact   starts, lost degrees, priors and          its half-steps in float64 and float32, the patch embedding
            examples of the steps on this way,
            settings, the linear inverse at its end
    map     Wiener filter, ridge map, covariances,    that the tap still has the form that was fitted
            gain, noise, settings, the trained inverse

Rows that repeat (all grid tokens share one covariance) are stored once, with their counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.inverse import (
    ExactInverse,
    ExactModel,
    Examples,
    LostDegrees,
    Prior,
    Settings,
    StagedStart,
    measured_embedding,
)
from backsight.exact.map import Likelihood, MapInverse, MapSettings, Noise, Steadied
from backsight.exact.steps import NotInvertibleError, Walk, in_precision, walk
from backsight.inverses.files import _halved as halved
from backsight.inverses.linear import LinearInverse
from backsight.inverses.module import Chain, Inverse, InverseHeader, described, rebuilt
from backsight.representation import Queries, Representation, Tokens
from backsight.targets.base import PIXELS, Target

__all__ = ["Measured", "exact_refusal", "map_refusal", "packed", "unpacked"]

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Measured:
    """What exact and MAP inverses measure on a target, once for all of its files."""

    target: Target

    @cached_property
    def exact(self) -> ExactModel:
        """Half-steps and patch embedding, with nothing fitted. Raises BacksightError where images are padded."""
        double = in_precision(self.target, torch.float64)
        return ExactModel(double, walk(double), walk(self.target), {}, {}, {}, measured_embedding(double))

    @cached_property
    def recorded(self) -> dict[str, Representation]:
        """Of one random image, at every tap."""
        shape = (1, len(self.target.preprocessing.mean), *self.target.image_size)
        image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        return self.target.record(image, self.target.available_taps)


def exact_refusal(target: Target, walked: Walk, tap: str) -> str:
    """Why not even one step back from a tap is exact; "" where one is."""
    order = (PIXELS, *target.available_taps)
    try:
        walked.between(tap, order[order.index(tap)])  # the place before it
    except NotInvertibleError as error:
        return str(error)
    return ""


def map_refusal(tap: str, representation: Representation) -> str:
    """Why a MAP inverse cannot read this; "" where it can."""
    if not isinstance(representation, Tokens | Queries):
        return f"A MAP inverse reads tokens or queries, and {tap} holds {type(representation).__name__.lower()}."
    if isinstance(representation, Tokens) and representation.padding is not None:
        return f"A MAP inverse reads unpadded tokens, and those of {tap} are padded: crop or stretch images instead."
    return ""


def packed(inverse: ExactInverse | MapInverse, half: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what a file says of an inverse, its numbers), for `save_inverse`.

    half: float16 for the modules within, and for starts and examples, which only steer; covariances keep float32.
    """
    return _packed_exact(inverse, half) if isinstance(inverse, ExactInverse) else _packed_map(inverse, half)


def unpacked(
    path: Path | str,
    header: InverseHeader,
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    measured: Measured,
) -> ExactInverse | MapInverse:
    """The inverse that `packed` told of. Raises BacksightError on damage, and on a target that it does not fit."""
    target = measured.target
    with damage_told(path):
        size = tuple(description["image_size"])
        on_device = {key: tensor.to(target.device) for key, tensor in tensors.items()}
    if size != tuple(target.image_size):
        raise BacksightError(
            f"The inverse {path} was fitted on images of {' x '.join(map(str, size))} pixels, and {target.name} takes "
            f"{' x '.join(map(str, target.image_size))} here: load it at that size, or fit the inverse again."
        )
    unpack = _unpacked_exact if description["kind"] == "exact" else _unpacked_map
    return unpack(path, header, description, on_device, measured)


# Exact inverses


def _packed_exact(inverse: ExactInverse, half: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model, end = inverse.model, inverse.reached
    steps = model.walk.between(inverse.source, end) if end != inverse.source else ()
    tensors: dict[str, Tensor] = {}
    starts, degrees, folding = {}, [], {}
    for step in steps:
        name = step.destination
        if (start := model.starts.get(name)) is not None:
            starts[name] = [len(stage) for stage in start.maps]
            for number, stage in enumerate(start.maps):
                for group, (weight, bias) in enumerate(stage):
                    tensors[f"start.{name}.{number}.{group}.weight"] = weight
                    tensors[f"start.{name}.{number}.{group}.bias"] = bias
        if (lost := model.degrees.get(name)) is not None:
            degrees.append(name)
            tensors |= {f"degrees.{name}.weight": lost.weight, f"degrees.{name}.bias": lost.bias}
        if name in model.folding:
            folding[name] = model.folding[name]
    # Among roots there is a choice only where a step folds: elsewhere priors and examples are never read.
    priors = sorted({step.source for step in steps if folding.get(step.destination)} & model.priors.keys())
    examples = [name for name, share in folding.items() if share and name in model.examples]
    for name in priors:
        tensors |= {f"prior.{name}.{part}": tensor for part, tensor in _parts_of(model.priors[name]).items()}
    for name in examples:
        tensors |= {f"examples.{name}.{part}": tensor for part, tensor in _parts_of(model.examples[name]).items()}
    tensors = {key: _smaller(key, tensor, half) for key, tensor in tensors.items()}
    settings = asdict(inverse.settings)
    if inverse.settings.precision is not None:
        settings["precision"] = str(inverse.settings.precision).removeprefix("torch.")
    completion = model.completion.get(end)
    said: dict[str, Any] = {
        "kind": "exact",
        "image_size": list(model.target.image_size),
        "reached": end,
        "settings": settings,
        "batch_size": inverse.batch_size,
        "starts": starts,
        "degrees": degrees,
        "priors": priors,
        "examples": examples,
        "folding": folding,
        "completion": None,
    }
    if completion is not None:
        said["completion"], numbers = _within(completion, "completion", half, inverse.source)
        tensors |= numbers
    return said, tensors


def _parts_of(fitted: Prior | Examples) -> dict[str, Tensor]:
    """Its tensors by name."""
    return dict(vars(fitted))


def _smaller(key: str, tensor: Tensor, half: bool) -> Tensor:
    """As it is stored: what a norm has taken is guessed in float64, and its error goes into the image."""
    if key.startswith("degrees."):
        return tensor
    single = tensor.float()
    return halved(single) if half and key.startswith(("start.", "examples.")) else single


def _unpacked_exact(
    path: Path | str,
    header: InverseHeader,
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    measured: Measured,
) -> ExactInverse:
    with damage_told(path):
        said = dict(description["settings"])
        if said["precision"] is not None:
            said["precision"] = PRECISIONS[said["precision"]]
        settings = Settings(**said)
        double = {key: tensor.double() for key, tensor in tensors.items() if not key.startswith("completion.")}

        def named(prefix: str, *parts: str) -> dict[str, Tensor]:
            return {part: double[f"{prefix}.{part}"] for part in parts}

        starts = {}
        for name, groups in description["starts"].items():
            stages = [
                tuple(
                    (double[f"start.{name}.{number}.{group}.weight"], double[f"start.{name}.{number}.{group}.bias"])
                    for group in range(count)
                )
                for number, count in enumerate(groups)
            ]
            starts[name] = StagedStart(tuple(stages))
        degrees = {name: LostDegrees(**named(f"degrees.{name}", "weight", "bias")) for name in description["degrees"]}
        priors = {name: Prior(**named(f"prior.{name}", "mean", "precision", "usual")) for name in description["priors"]}
        examples = {name: Examples(**named(f"examples.{name}", "y", "error")) for name in description["examples"]}
        folding = {str(name): float(share) for name, share in description["folding"].items()}
        end, batch_size, completion = str(description["reached"]), int(description["batch_size"]), {}
        if description["completion"] is not None:
            completion[end] = _filled(description["completion"], _below("completion", tensors), measured.target)
    model = replace(
        measured.exact,
        starts=starts,
        degrees=degrees,
        priors=priors,
        completion=completion,
        examples=examples,
        folding=folding,
    )
    inverse = ExactInverse(model, header.source, settings, batch_size)  # raises where no step is exact
    if inverse.reached != end:
        raise BacksightError(
            f"The inverse {path} leads from {header.source} back to {end}, and {measured.target.name} is exact from "
            f"there to {inverse.reached} here (another version of its library?): fit it again."
        )
    return inverse


# MAP inverses


def _packed_map(inverse: MapInverse, half: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    start = inverse.start
    base, tensors = _within(start.base, "base", half, inverse.source)
    rows = {"mean": start.mean, "wiener": start.wiener, "noise": inverse.likelihood.noise}
    if inverse.likelihood.spread is not None:
        rows["spread"] = inverse.likelihood.spread
    for name, values in rows.items():
        tensors[name], tensors[f"{name}.counts"] = torch.unique_consecutive(values, return_counts=True, dim=0)
    for name in ("factor", "basis", "gain", "shares"):
        tensors[name] = getattr(inverse, name)
    tensors |= {"weight": start.weight, "bias": start.bias}
    said = {
        "kind": "map",
        "image_size": list(inverse.target.image_size),
        "patch": list(start.patch),
        "noise": asdict(inverse.noise),
        "settings": asdict(inverse.settings),
        "batch_size": inverse.batch_size,
        "base": base,
    }
    return said, tensors


def _unpacked_map(
    path: Path | str,
    header: InverseHeader,
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    measured: Measured,
) -> MapInverse:
    target = measured.target
    (tap,) = target.resolve_taps([header.source])
    there = measured.recorded[tap]
    if reason := map_refusal(tap, there):
        raise BacksightError(f"The inverse {path} cannot be used: {reason}")
    with damage_told(path):
        said = dict(description["settings"])
        if said["stages"] is not None:
            said["stages"] = tuple(float(stage) for stage in said["stages"])
        settings, noise = MapSettings(**said), Noise(**description["noise"])
        rows = {
            name: tensors[name].repeat_interleave(tensors[f"{name}.counts"], dim=0)
            for name in ("mean", "wiener", "noise", "spread")
            if name in tensors
        }
        _check_rows(rows, there.values)
        down, across = description["patch"]
        base = _filled(description["base"], _below("base", tensors), target)
        start = Steadied(base, (down, across), rows["mean"], rows["wiener"], tensors["weight"], tensors["bias"])
        likelihood = Likelihood(rows["noise"], rows.get("spread"))
        return MapInverse(
            target,
            tap,
            noise,
            start,
            tensors["factor"],
            tensors["basis"],
            tensors["gain"],
            likelihood,
            settings,
            tensors["shares"],
            int(description["batch_size"]),
        )


def _check_rows(rows: Mapping[str, Tensor], values: Tensor) -> None:
    """Raise ValueError where rows are not one, or one a token, of the channels that the tap has."""
    tokens, channels = values.shape[1:]
    for name, given in rows.items():
        shapes = [(channels,)] if name == "mean" else [(channels, channels)]
        wanted = [(count, *shape) for count in (1, tokens) for shape in shapes]
        if name in ("noise", "spread"):
            wanted += shapes  # one for all tokens
        if tuple(given.shape) not in wanted:
            raise ValueError(f"{name} has the shape {tuple(given.shape)}, and the tap {tokens} tokens of {channels}")


# Modules within


def _within(module: Any, name: str, half: bool, source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(description, numbers) of the module that an inverse starts or ends with."""
    if not isinstance(module, LinearInverse | Inverse | Chain):
        raise BacksightError(
            f"The inverse of {source!r} rests on {type(module).__name__}, which no file can hold: fit it on a linear "
            "inverse, an inverse module or a chain of them, and save that."
        )
    tensors = {f"{name}.{key}": halved(tensor) if half else tensor for key, tensor in module.state_dict().items()}
    return described(module), tensors


def _filled(description: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Any:
    module = rebuilt(description, target)
    module.load_state_dict(tensors)
    return module.eval().requires_grad_(False).to(target.device)


@contextmanager
def damage_told(path: Path | str) -> Iterator[None]:
    """What goes wrong within, where a file is turned into an inverse, is the file's damage."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise BacksightError(
            f"The inverse {path} does not fit its own header ({reason}): it is damaged, fit it again."
        ) from error


def _below(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The numbers of the module that was stored under this name."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
