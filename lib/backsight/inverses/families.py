"""The inverse families by name: where the function of each lies, and one call for all of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.distributed import processes
from backsight.data.features import features_or_images
from backsight.data.images import batches, open_images
from backsight.errors import BacksightError, nearest
from backsight.inverses.files import save
from backsight.inverses.module import Chain, Inverses, header_for
from backsight.representation import Representation
from backsight.targets.base import PIXELS

if TYPE_CHECKING:
    from backsight.data.features import FeatureStore
    from backsight.data.images import ImageSource
    from backsight.targets.base import Target

Reconstruct = Callable[[Representation], Tensor]
FAMILIES = {
    "linear": "backsight.inverses.linear:fit_linear",
    "direct": "backsight.training.fit:fit_direct",
    "modular": "backsight.training.fit:fit_modular",
    "modular_polished": "backsight.training.fit:fit_polish",
    "exact": "backsight.exact.inverse:fit_exact",
    "map": "backsight.exact.map:fit_map",
}  # later rooms are loaded by name, when they are needed
SOLVED = ("exact", "map")  # no training: a fit of starts and covariances, and a search for every image
Features = Literal["auto", "always", "never"]


def fit(
    family: str,
    target: Target,
    images: ImageSource | Tensor | FeatureStore,
    validation: ImageSource | Tensor | FeatureStore | None = None,
    *,
    taps: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    features: Features = "never",
    checkpoint: Path | None = None,
    **arguments: Any,
) -> Inverses:
    """The inverses of one family at the taps of the target; see `fit_linear`, `fit_direct`, ….

    arguments: of the family's function, those that it does not take are left out, so that all families can be fitted
    by the same call: steps, batch_size, chain_fraction, linear (the Inverses of `fit_linear` that are there already),
    modules (those of `fit_modular`, from which "modular_polished" and "map" start; else they are trained, or linear
    ones fitted). features: whether what the target makes of the training images is recorded on disk and read from
    there, "auto" where every image is shown twice or more. checkpoint: a folder to resume an interrupted training from.
    Raises BacksightError on an unknown family, and where it can read no tap at all.
    """
    function = _function(family)
    taken = inspect.signature(function).parameters
    trained = "steps" in taken
    common = {"taps": taps, "seed": seed, "progress": progress, "features": features, "checkpoint": checkpoint}
    if family == "modular_polished" and arguments.get("modules") is None:
        arguments["modules"] = fit("modular", target, images, validation, **common, **arguments)
    if trained:
        often = arguments.get("steps", 400) * arguments.get("batch_size", 16) >= 2 * len(images)
        if features == "always" or (features == "auto" and often):
            images = features_or_images(target, images, target.taps, progress=progress)
        if checkpoint is not None:
            arguments["checkpoint"] = checkpoint / f"{family}.safetensors"
    if family in SOLVED:  # until exact
        return _solved(
            family, target if taps is None else target.select(taps), images, validation, seed, progress, arguments
        )
    passed = {name: value for name, value in arguments.items() if name in taken}
    if "taps" in taken:
        passed["taps"] = taps
    return function(target, images, validation, seed=seed, progress=progress, **passed)


def _function(family: str) -> Callable[..., Any]:
    if family not in FAMILIES:
        raise BacksightError(f"There is no inverse family {family!r}; {nearest(family, list(FAMILIES))}.")
    home, _, name = FAMILIES[family].partition(":")
    return getattr(import_module(home), name)


def fit_and_save(
    target: Target,
    source: str,
    families: Sequence[str],
    out: Path,
    *,
    train_images: int | None = None,
    validation_images: int | None = None,
    seed: int = 0,
    **training: Any,
) -> list[Path]:
    """Fit families on a source's training split, and write them to `out`; an interrupted training resumes.

    source: as `open_images` takes it; training: the other arguments of `fit`. Under `accelerate launch` all processes
    fit, each on its share of the images, and the first one opens what has to be made or recorded, and writes.
    Returns the files. Raises BacksightError as `open_images` and `fit` do.
    """
    with processes().main_process_first():
        train = open_images(source, "train", target.image_size, train_images, seed)
        validation = open_images(source, "validation", target.image_size, validation_images, seed)
    fitted: dict[str, Inverses] = {}
    files: list[Path] = []
    for family in families:
        given = {"modules": fitted.get("modular"), "linear": fitted.get("linear"), "checkpoint": out / "checkpoints"}
        fitted[family] = fit(family, target, train, validation, seed=seed, **given, **training)
        if processes().is_main_process:
            files += save(fitted[family], out)
    processes().wait_for_everyone()
    return files


# Until exact: what a whole target's exact and MAP inverses are


def _solved(family, target, images, validation, seed, progress, arguments):
    linear, modules = dict(arguments.get("linear") or {}), arguments.get("modules")
    if family == "exact":
        fitted = _fit_exact(target, images, validation, linear, seed, progress)
    else:
        fitted = _fit_map(target, images, validation, modules.modules if modules else {}, linear, seed, progress)
    for tap, inverse in fitted.items():
        object.__setattr__(inverse, "header", header_for(target, family, tap, inverse.destination, images, seed))
    return Inverses(fitted)


def _fit_exact(
    target: Target, images: Any, validation: Any, linear: Mapping[str, Any], seed: int, progress: bool
) -> dict[str, Any]:
    """With a linear inverse, given or fitted here, at every tap where exactness ends."""
    from backsight.exact.files import exact_refusal
    from backsight.exact.inverse import ExactInverse, fit_exact
    from backsight.exact.steps import walk

    found = fit_exact(target, images, target.taps)
    # Without a measured patch embedding, the first tap's image would be the linear inverse's alone.
    found = {tap: each for tap, each in found.items() if each.reached != tap or each.model.embedding is not None}
    walked = next(iter(found.values())).model.walk if found else walk(target)
    _tell_left_out(
        "exact", target, {tap: exact_refusal(target, walked, tap) for tap in target.taps if tap not in found}
    )
    ends = list(dict.fromkeys(each.reached for each in found.values()))
    completion = _with_linear(target, images, validation, linear, ends, seed, progress)
    model = replace(next(iter(found.values())).model, completion=completion)
    return {tap: ExactInverse(model, tap) for tap in found}


def _fit_map(
    target: Target,
    images: Any,
    validation: Any,
    modules: Mapping[str, Any],
    linear: Mapping[str, Any],
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """From chains of the modules where they lead to pixels, else from linear inverses."""
    from backsight.exact.files import map_refusal
    from backsight.exact.map import Noise, fit_map

    if validation is None:
        raise BacksightError(
            "A MAP inverse is measured on held-out images: give `validation`, images that nothing was fitted on."
        )
    recorded = target.record(next(batches(validation, 1)), target.taps)
    refused = {tap: map_refusal(tap, each) for tap, each in recorded.items()}
    _tell_left_out("map", target, {tap: reason for tap, reason in refused.items() if reason})
    taps = [tap for tap in target.taps if not refused[tap]]
    chains = {tap: Chain(modules, tap) for tap in taps if tap in modules}
    bases: dict[str, Any] = {tap: chain for tap, chain in chains.items() if chain.destination == PIXELS}
    without = [tap for tap in taps if tap not in bases]
    bases |= _with_linear(target, images, validation, linear, without, seed, progress)
    return {
        tap: fit_map(target, tap, bases[tap], validation, Noise("float32"), seed=seed)
        for tap in tqdm(taps, leave=False, disable=not progress, desc="MAP inverses")
    }


def _with_linear(
    target: Target,
    images: Any,
    validation: Any,
    linear: Mapping[str, Any],
    taps: Sequence[str],
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """The linear inverses of these taps; those that are not there are fitted."""
    from backsight.inverses.linear import fit_linear

    missing = [tap for tap in taps if tap not in linear]
    fitted = {}
    if missing:
        fitted = fit_linear(target, images, validation, taps=missing, seed=seed, progress=progress)
    return {tap: linear[tap] if tap in linear else fitted[tap] for tap in taps}


def _tell_left_out(family: str, target: Target, refused: Mapping[str, str]) -> None:
    """Warn once of the taps that a family cannot read; raise BacksightError where it can read none."""
    if not refused:
        return
    taps, reason = ", ".join(refused), next(iter(refused.values()))
    if set(target.taps) <= set(refused):
        raise BacksightError(f"{target.name} has no {family} inverse at any of its taps ({taps}). {reason}")
    warnings.warn(f"{target.name} has no {family} inverse at {taps}. {reason}", stacklevel=4)
