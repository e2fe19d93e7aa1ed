"""The inverse families by name: where the function of each lies, and one call for all of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from backsight.data.distributed import processes
from backsight.data.features import FeatureStore, record_features
from backsight.data.images import open_images
from backsight.data.leaves import VERSION
from backsight.errors import BacksightError, nearest
from backsight.inverses.files import headers_for, load, read_header, save, shipped_inverses
from backsight.inverses.module import Inverses, header_for, named
from backsight.inverses.passes import Images
from backsight.project import cache_folder
from backsight.representation import Representation

if TYPE_CHECKING:
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


def fit(
    family: str,
    target: Target,
    images: Images,
    validation: Images | None = None,
    *,
    features: str = "never",
    checkpoint: Path | None = None,
    **arguments: Any,
) -> Inverses:
    """The inverses of one family at the taps of the target; see `fit_linear`, `fit_direct`, ….

    arguments: of the family's function, those that it does not take are left out, so that all families can be fitted
    by the same call: taps, seed, progress, steps, batch_size, chain_fraction, linear (the Inverses of `fit_linear` that
    are there already), modules (those of `fit_modular`, from which "modular_polished" and "map" start; else they are
    trained, or linear ones fitted). features: whether what the target makes of the training images is recorded on disk
    and read from there: "never", "always", or "auto" where every image is shown twice or more. checkpoint: a folder to
    resume an interrupted training from.
    Raises BacksightError on an unknown family, and where it can read no tap at all.
    """
    if family not in FAMILIES:
        raise BacksightError(f"There is no inverse family {family!r}; {nearest(family, list(FAMILIES))}.")
    function: Any = named(FAMILIES[family])
    taken = inspect.signature(function).parameters
    if others := set(arguments) - set(taken):
        known = {name for place in FAMILIES.values() for name in inspect.signature(named(place)).parameters}
        if unknown := sorted(others - known):
            raise TypeError(f"no inverse family takes {unknown[0]!r}; {nearest(unknown[0], sorted(known))}")
    if family == "modular_polished" and arguments.get("modules") is None:
        both: dict[str, Any] = {"features": features, "checkpoint": checkpoint}
        arguments["modules"] = fit("modular", target, images, validation, **both, **arguments)
    if "steps" in taken:
        shown = (arguments.get("steps") or 400) * arguments.get("batch_size", 16) / len(images)
        often = features == "always" or (features == "auto" and (arguments.get("epochs") or shown) >= 2)
        if often and not isinstance(images, FeatureStore):
            try:
                images = record_features(target, images, target.taps, progress=arguments.get("progress", True))
            except BacksightError as error:
                if features == "always":
                    raise
                warnings.warn(f"{error} Until then features are computed anew at every step.", stacklevel=2)
        if checkpoint is not None:
            arguments["checkpoint"] = checkpoint / f"{family}.safetensors"
    passed = {name: value for name, value in arguments.items() if name in taken}
    return function(target, images, validation, **passed)


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
        train = open_images(source, "train", target, train_images, seed)
        validation = open_images(source, "validation", target, validation_images, seed)
    own = header_for(target, "", "", "", train, seed)
    for path in (out / f"{family}--{tap}.safetensors" for family in families for tap in target.taps):
        if path.exists() and not own.replaces(held := read_header(path)):
            raise BacksightError(
                f"{path} is an inverse of {held.target} with the weights {held.weights_hash}, trained on {held.data} "
                f"with seed {held.seed}: name another folder (03_quality reads all that lie below its `inverses`)."
            )
    names = (f"{family}--{tap}.safetensors" for family in families for tap in target.taps)
    if old := [name for name in names if (out / name).exists()]:
        warnings.warn(f"{out} holds {', '.join(old)} of an earlier fit: replaced.", stacklevel=2)
    fitted: dict[str, Inverses] = {}
    files: list[Path] = []
    for family in families:
        training |= {"modules": fitted.get("modular"), "linear": fitted.get("linear"), "seed": seed}
        fitted[family] = fit(family, target, train, validation, checkpoint=out / "checkpoints", **training)
        if processes().is_main_process:
            files += save(fitted[family], out)
    processes().wait_for_everyone()
    return files


def kept_inverses(target: Target, count: int = 400, asked: Sequence[str] = ()) -> dict[str, Inverses]:
    """{family: Inverses} at the target's taps: shipped ones, else linear ones kept in the cache, else fitted and kept.

    count: of the leaves of such a fit; asked: further families, which are kept or fitted where they are not shipped.
    Raises BacksightError as `fit` does.
    """
    shipped = shipped_inverses(target)
    families = load(shipped, target) if shipped else {}
    known = {tap for inverses in families.values() for tap in inverses.modules}
    if lacking := [tap for tap in target.taps if tap not in known]:
        own = dict(families["linear"].modules) if shipped else {}
        families["linear"] = Inverses(own | dict(_kept("linear", target.select(lacking), count).modules))
    for family in asked:
        if family not in families:
            families[family] = _kept(family, target, count, families.get("linear"))
    return families


def _kept(family: str, target: Target, count: int, linear: Inverses | None = None) -> Inverses:
    """Those of the cache; taps that it lacks are fitted on leaves first."""
    size, own = "x".join(map(str, target.image_size)), "" if family == "linear" else f"-{family}"
    folder = cache_folder() / "inverses" / f"{target.weights_hash}-leaves-{VERSION}-{count}-{size}{own}"
    kept = {header.source for header in headers_for(folder, target).values()}
    if new := [tap for tap in target.taps if tap not in kept]:
        part = target.select(new)
        held_out = open_images("leaves", "validation", part, max(32, count // 8)) if own else None
        save(fit(family, part, open_images("leaves", "train", part, count), held_out, linear=linear), folder)
    return load(folder, target)[family]
