"""Inverse modules: from what one tap holds to what an earlier tap held, or to the image; chains and families of them.

Every trained module is  linear(x) + scale * residual(x):  a closed-form ridge map, kept as it is, and a network of
the kind of the stage it inverts (networks.py), whose last layer starts at zero. Before any training a module *is* the
ridge map (the mean, where no ridge map is defined), and training has only to learn the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn

from backsight.errors import BacksightError, nearest
from backsight.inverses.networks import RESIDUALS, Design
from backsight.inverses.rows import PIXELS, area, carried_padding, form_of
from backsight.representation import Form, Queries, Representation, Tokens

if TYPE_CHECKING:
    from backsight.inverses.linear import LinearInverse
    from backsight.targets.base import Target

LIBRARIES = ("backsight", "torch", "timm", "transformers")  # that decide what an inverse computes
version_of = cache(version)  # which reads a file


@dataclass(frozen=True)
class InverseHeader:
    """Where an inverse comes from; it is written into every file.

    family: of `families.FAMILIES`; source, destination: taps, or "pixels"; data: name and split of the training images;
    steps: trained, 0 for what is not trained; validation_loss: the error of the pictures from this tap, of a modular
    family those of the whole chain, as a share of their variance, or None.
    """

    family: str
    target: str
    weights: str
    weights_hash: str
    source: str
    destination: str
    data: str = "unknown"
    seed: int = 0
    steps: int = 0
    validation_loss: float | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: {name: version_of(name) for name in LIBRARIES})

    def replaces(self, other: InverseHeader) -> bool:
        """Whether both are of one target, training split and seed, so that one file may take the place of the other."""
        ours, theirs = ((h.target, h.weights_hash, h.seed, h.data.partition(",")[0]) for h in (self, other))
        return ours == theirs


NO_HEADER = InverseHeader("", "", "", "", "", "", versions={})  # of what is nested, or still to be read


def header_for(
    target: Target, family: str, source: str, destination: str, images: Any = None, seed: int = 0
) -> InverseHeader:
    """The header of an inverse of this target; images: what it was fitted on, an ImageSource or a tensor."""
    name, count = getattr(images, "name", None), 0 if images is None else len(images)
    data = f"{name} {images.split}, {count} images" if isinstance(name, str) else f"{count} images"
    return InverseHeader(family, target.name, target.weights, target.weights_hash, source, destination, data, seed)


class Moments(NamedTuple):
    """First and second moments of a representation, of which the residuals take their units.

    mean, deviation: (P + 1, C): each prefix token, then all grid tokens together; (1, C) for sets and for pixels.
    variance: of all values about these means, the unit of the losses.
    """

    mean: Tensor
    deviation: Tensor
    variance: float


class Inverse(nn.Module):
    """A map from one tap's representation to an earlier tap's, or to images; differentiable in the representation.

    inverse(representation) -> images (B, 3, H, W) in [0, 1], or a Representation. header: where it comes from;
    source_form, destination_form: what enters and leaves; any_grid: whether it reads grids of other sizes, too.
    A representation of another tap is accepted where its form agrees; else BacksightError is raised. Padded tokens are
    not looked at.
    """

    kind = ""
    any_grid, blank = False, torch.zeros(())  # blank: read in the place of padded tokens
    position: Tensor | None

    def __init__(
        self, header: InverseHeader, source_form: Form, destination_form: Form, position: Tensor | None
    ) -> None:
        """position: (B, N, C) of the destination, that of the first image is used where the source brings none."""
        super().__init__()
        self.header, self.source_form, self.destination_form = header, source_form, destination_form
        self.register_buffer("position", None if position is None else position[:1].clone())

    @property
    def source(self) -> str:
        return self.header.source

    @property
    def destination(self) -> str:
        return self.header.destination

    def forward(self, representation: Representation) -> Any:
        result = self.raw(representation)
        return result.clamp(0, 1) if isinstance(result, Tensor) else result

    def raw(self, representation: Representation) -> Any:
        """Like `forward`, but images are not clamped to [0, 1]."""
        given, read = form_of(representation), self.source_form
        if self.any_grid and len(given.grids) == len(read.grids):
            read = replace(read, grids=given.grids)
        if given != read:
            raise BacksightError(
                f"The inverse of {self.source!r} of {self.header.target} reads {self.source_form}, but was given "
                f"{given}: feed it a representation of the same form."
            )
        if isinstance(representation, Tokens) and representation.padding is not None:
            padding, values = F.pad(representation.padding, (given.prefix, 0))[..., None], representation.values
            representation = representation.replace(torch.where(padding, self.blank.to(values), values))
        return self.mapped(representation)

    def mapped(self, representation: Representation) -> Any:
        """What comes out of a representation of the right form."""
        raise NotImplementedError

    def code(self, representation: Representation) -> Tensor | None:
        """The positional code of the destination: the source's own where both are on the same grids."""
        if not isinstance(representation, Tokens) or representation.position is None:
            return self.position
        given, end = representation.form, self.destination_form
        return representation.position if (given.grids, given.channels) == (end.grids, end.channels) else self.position

    def configuration(self) -> dict[str, Any]:
        """Everything but the numbers in `state_dict()`, as JSON."""
        return {"position": None if self.position is None else list(self.position.shape)}


class TrainedInverse(Inverse):
    """A closed-form map and a trained residual.

    history: the training, if it was trained in this process (step, module, split, loss, seconds). What the fits return
    is frozen.
    """

    kind = "inverse"
    source_mean: Tensor
    source_deviation: Tensor
    destination_mean: Tensor
    destination_deviation: Tensor

    def __init__(
        self,
        header: InverseHeader,
        design: Design,
        linear: LinearInverse | None,
        source: Moments,
        destination: Moments,
        position: Tensor | None = None,
    ) -> None:
        super().__init__(header, design.source, design.destination, position)
        self.design, self.history = design, pd.DataFrame()
        self.any_grid = design.kind == "upsampling"  # convolutions do not mind
        self.linear = None if linear is None else linear.requires_grad_(False)
        self.residual = RESIDUALS[design.kind](design)
        self.variance = destination.variance
        for name, moments in (("source", source), ("destination", destination)):
            self.register_buffer(f"{name}_mean", moments.mean.clone())
            self.register_buffer(f"{name}_deviation", moments.deviation.clone())

    @property
    def blank(self) -> Tensor:  # type: ignore[override]
        return self.source_mean[-1]

    def mapped(self, representation: Representation) -> Any:
        x: Any = representation
        form, position = self.destination_form, self.code(x)
        result = _spread(self.destination_mean, form)
        with torch.autocast(x.values.device.type, enabled=False):
            mean, deviation = (_spread(part, x.form) for part in (self.source_mean, self.source_deviation))
            values = (x.values.float() - mean) / deviation
            if self.linear is not None:
                start = self.linear.raw(x)
                result = start if isinstance(start, Tensor) else start.values
        inputs = Tokens(values, x.grids, x.prefix) if isinstance(x, Tokens) else Queries(values)
        result = result + self.residual(inputs, position).float() * _spread(self.destination_deviation, form)
        if form.kind == PIXELS:
            return result
        if form.kind == "queries":
            return Queries(result)
        padding = carried_padding(x, form.grids) if isinstance(x, Tokens) else None
        return Tokens(result, form.grids, form.prefix, padding, position if self.design.positioned else None)

    def configuration(self) -> dict[str, Any]:
        linear = None if self.linear is None else described(self.linear)
        own = {"design": asdict(self.design), "linear": linear, "variance": self.variance}
        return {**super().configuration(), **own}

    @classmethod
    def build(cls, configuration: Mapping[str, Any], target: Target) -> TrainedInverse:
        design, linear, variance = (configuration[name] for name in ("design", "linear", "variance"))
        design = TypeAdapter(Design).validate_python(design)
        empty = [torch.ones(form.prefix + 1, form.channels) for form in (design.source, design.destination)]
        before, after = (Moments(each, each, variance) for each in empty)
        like: Any = None if linear is None else rebuilt(linear, target)
        return cls(NO_HEADER, design, like, before, after, empty_code(configuration))


def empty_code(configuration: Mapping[str, Any]) -> Tensor | None:
    """A positional code whose numbers are still to be loaded."""
    shape = configuration.get("position") or configuration.get("position_shape") or [0]  # the second in older files
    return torch.zeros(shape) if shape[0] else None


def _spread(moments: Tensor, form: Form) -> Tensor:
    """(P + 1, C) -> (P + N, C), one row for each token; (1, C) of a set as it is, (3, 1, 1) of pixels."""
    if form.kind == PIXELS:
        return moments[0][:, None, None]
    return torch.cat([moments[:-1], moments[-1:].expand(sum(map(area, form.grids)), -1)]) if form.grids else moments


class Chain(nn.Sequential):
    """Inverse modules, one after the other: from `start` down to where no module goes on.

    modules: {tap: its inverse}, modular or linear; those that `start` does not lead to are left out.
    chain(representation) -> images, or the representation where the last module ends.
    Raises BacksightError where the ends do not meet: no module for `start`, other forms, other weights.
    """

    kind = "chain"

    def __init__(self, modules: Mapping[str, Any], start: str) -> None:
        if start not in modules:
            raise BacksightError(f"The chain has no module for its start {start!r}; {nearest(start, list(modules))}.")
        path = [modules[start]]
        while (tap := path[-1].destination) in modules:
            before, after = path[-1], modules[tap]
            if before.destination_form != after.source_form:
                raise BacksightError(
                    f"The chain breaks at {tap!r}: the inverse of {before.source!r} makes {before.destination_form}, "
                    f"and the next reads {after.source_form}; fit both for the same taps and image size."
                )
            if before.header.weights_hash != after.header.weights_hash:
                raise BacksightError(
                    f"The chain breaks at {tap!r}: its modules invert different weights; fit both anew."
                )
            path.append(after)
        super().__init__(*path)
        self.source, self.destination = start, path[-1].destination

    @property
    def header(self) -> InverseHeader:
        """That of the first module, with the chain's own destination."""
        first: Any = self[0]
        return replace(first.header, destination=self.destination)

    def configuration(self) -> dict[str, Any]:
        return {"path": [described(module) for module in self]}

    @classmethod
    def build(cls, configuration: Mapping[str, Any], target: Target) -> Chain:
        path: list[Any] = [rebuilt(description, target) for description in configuration["path"]]
        return cls({module.source: module for module in path}, path[0].source)


class Inverses(Mapping[str, nn.Module]):
    """The inverses of one family: {tap: module that gives an image (B, 3, H, W) in [0, 1]}.

    modules: {tap: the stage alone}. A stage that does not end in pixels (of the modular families: it ends at the tap
    before) is followed by those below it; `module(tap)` gives it alone. family, target, weights_hash: of the headers.
    Raises KeyError on a tap that has no inverse.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules: dict[str, Any] = dict(modules.modules if isinstance(modules, Inverses) else modules)  # of KINDS
        headers = [module.header for module in self.modules.values()]
        names = ("family", "target", "weights_hash")
        self.family, self.target, self.weights_hash = (getattr(headers[0], n) if headers else "" for n in names)

    def module(self, tap: str) -> nn.Module:
        """The stage alone, from this tap to its own destination."""
        if tap not in self.modules:
            raise KeyError(f"there is no {self.family} inverse of {tap!r}; {nearest(tap, list(self.modules))}")
        return self.modules[tap]

    def __getitem__(self, tap: str) -> nn.Module:
        stage: Any = self.module(tap)
        return stage if stage.destination == PIXELS else Chain(self.modules, tap)

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def to(self, device: torch.device | str) -> Inverses:
        """Move all modules; returns self."""
        for stage in self.modules.values():
            stage.to(device)
        return self

    def __repr__(self) -> str:
        return f"Inverses({self.family!r} of {self.target}: {', '.join(self.modules)})"


# What files say of modules

KINDS = {
    "linear": "backsight.inverses.linear:LinearInverse",
    "inverse": "backsight.inverses.module:TrainedInverse",
    "chain": "backsight.inverses.module:Chain",
    "exact": "backsight.exact.inverse:ExactInverse",
    "map": "backsight.exact.map:MapInverse",
}  # every one has kind, header, configuration() and build(configuration, target); later rooms are loaded by name


def named(place: str) -> Any:
    """What is at "module:name"."""
    home, _, name = place.partition(":")
    return getattr(import_module(home), name)


def described(module: nn.Module) -> dict[str, Any]:
    """All but the numbers in `state_dict()`, as JSON; nested modules describe theirs the same way."""
    own: Any = module  # of one of KINDS
    header = None if own.header is None else asdict(own.header)
    return {"kind": own.kind, "header": header, "configuration": own.configuration()}


def rebuilt(description: Mapping[str, Any], target: Target) -> nn.Module:
    """The module that `described` told of, its numbers still to come by `load_state_dict`.

    Raises KeyError on an unknown kind, and what torch and Python do where a description does not fit.
    """
    module = named(KINDS[description["kind"]]).build(description["configuration"], target)
    if description["kind"] != "chain" and description["header"] is not None:
        module.header = InverseHeader(**description["header"])
    return module
