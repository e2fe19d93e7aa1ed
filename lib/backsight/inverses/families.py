"""The inverse families by name: fit one, save it, find it again, and turn it into images."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.distributed import first_process_first, is_first, wait_for_all
from backsight.data.features import features_or_images
from backsight.data.images import batches, open_images
from backsight.errors import BacksightError, nearest
from backsight.exact.files import Measured, exact_refusal, map_refusal
from backsight.exact.inverse import ExactInverse, fit_exact
from backsight.exact.map import MapInverse, Noise, fit_map
from backsight.exact.steps import walk
from backsight.inverses.files import load_inverse, read_header, save_inverse
from backsight.inverses.linear import LinearInverse, fit_linear
from backsight.inverses.module import Chain, Inverse, InverseHeader, header_for
from backsight.project import project_root
from backsight.representation import Representation
from backsight.targets import PIXELS, Target, load_target
from backsight.targets.shipped import inverse_files
from backsight.training.fit import fit_direct, fit_modular, fit_polish

Reconstruct = Callable[[Representation], Tensor]
FAMILIES = ("linear", "direct", "modular", "modular_polished", "exact", "map")
SOLVED = ("exact", "map")  # no training: a fit of starts and covariances, and a search for every image
Features = Literal["auto", "always", "never"]


def fit_family(
    family: str,
    target: Target,
    images: Any,
    validation: Any = None,
    *,
    steps: int = 400,
    batch_size: int = 16,
    seed: int = 0,
    chain_fraction: float = 0.25,
    modules: Mapping[str, Inverse] | None = None,
    linear: Mapping[str, LinearInverse] | None = None,
    checkpoint: Path | None = None,
    features: Features = "never",
    progress: bool = True,
) -> dict[str, Any]:
    """The inverses of one family at every tap of the target: {tap: inverse}; see `fit_linear`, `fit_direct`, ….

    modules: of a modular family that is there already, which "modular_polished" starts from (else it is trained
    first), and "map" too (else from linear inverses). linear: inverses to pixels that are there already, which "exact"
    ends with and "map" starts from (else they are fitted). checkpoint: a folder to resume an interrupted training
    from. features: whether what the frozen target makes of the training images is recorded on disk and read from
    there, "auto" where every image is shown twice or more; where the disk is too small, it is computed at every step
    after all.

    "exact" and "map" leave out, with a warning, the taps that they cannot read, and do not use steps, batch_size,
    chain_fraction, checkpoint and features. "map" is fitted for what float32 keeps, and measured on `validation`,
    which it needs. Raises BacksightError on an unknown family, and where "exact" or "map" can read no tap at all.
    """
    if family not in FAMILIES:
        raise BacksightError(f"There is no inverse family {family!r}; {nearest(family, FAMILIES)}.")
    if family in SOLVED:
        ready = {tap: each for tap, each in (linear or {}).items() if each.destination == PIXELS}
        if family == "exact":
            return dict(_fit_exact(target, images, validation, ready, seed, progress))
        return dict(_fit_map(target, images, validation, modules or {}, ready, seed, progress))
    often = family != "linear" and steps * batch_size >= 2 * len(images)
    if features == "always" or (features == "auto" and often):
        images = features_or_images(target, images, target.taps, progress=progress)
    common: dict[str, Any] = {"validation": validation, "seed": seed, "progress": progress}
    if family == "linear":
        return fit_linear(target, images, target.taps, **common)
    common |= {"steps": steps, "batch_size": batch_size}
    common["checkpoint"] = None if checkpoint is None else checkpoint / f"{family}.safetensors"
    if family == "direct":
        return fit_direct(target, images, target.taps, **common)
    if family == "modular":
        return fit_modular(target, images, target.taps, chain_fraction=chain_fraction, **common)
    if modules is None:
        first = common | {"checkpoint": None if checkpoint is None else checkpoint / "modular.safetensors"}
        modules = fit_modular(target, images, target.taps, chain_fraction=chain_fraction, **first)
    return fit_polish(target, images, modules, **common)


def _fit_exact(
    target: Target, images: Any, validation: Any, linear: Mapping[str, LinearInverse], seed: int, progress: bool
) -> dict[str, ExactInverse]:
    """With a linear inverse, given or fitted here, at every tap where exactness ends."""
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
    linear: Mapping[str, LinearInverse],
    seed: int,
    progress: bool,
) -> dict[str, MapInverse]:
    """From chains of the modules where they lead to pixels, else from linear inverses."""
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
    linear: Mapping[str, LinearInverse],
    taps: Sequence[str],
    seed: int,
    progress: bool,
) -> dict[str, LinearInverse]:
    """The linear inverses of these taps; those that are not there are fitted."""
    missing = [tap for tap in taps if tap not in linear]
    fitted = {}
    if missing:
        fitted = fit_linear(target, images, missing, validation=validation, seed=seed, progress=progress)
    return {tap: linear[tap] if tap in linear else fitted[tap] for tap in taps}


def _tell_left_out(family: str, target: Target, refused: Mapping[str, str]) -> None:
    """Warn once of the taps that a family cannot read; raise BacksightError where it can read none."""
    if not refused:
        return
    taps, reason = ", ".join(refused), next(iter(refused.values()))
    if set(target.taps) <= set(refused):
        raise BacksightError(f"{target.name} has no {family} inverse at any of its taps ({taps}). {reason}")
    warnings.warn(f"{target.name} has no {family} inverse at {taps}. {reason}", stacklevel=4)


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

    source: as `open_images` takes it; training: the other arguments of `fit_family`. Under `accelerate launch` all
    processes fit, each on its share of the images, and the first one opens what has to be made or recorded, and writes.
    Returns the files. Raises BacksightError as `open_images` and `fit_family` do.
    """
    with first_process_first():
        train = open_images(source, "train", target.image_size, train_images, seed)
        validation = open_images(source, "validation", target.image_size, validation_images, seed)
    fitted: dict[str, dict[str, Any]] = {}
    files: list[Path] = []
    for family in families:
        settings = {**training, "modules": fitted.get("modular"), "linear": fitted.get("linear"), "seed": seed}
        settings["checkpoint"] = out / "checkpoints"
        fitted[family] = fit_family(family, target, train, validation, **settings)
        if is_first():
            files += save_family(target, family, fitted[family], out, train, seed)
    wait_for_all()
    return files


def fit_or_load(
    target: Target, folder: str | Path = "", count: int = 2000, seed: int = 0, trained_on: str = "scenes"
) -> dict[str, dict[str, Reconstruct]]:
    """{family: {tap: reconstruction}} of the target's taps: from `folder`, else shipped, else linear ones fitted here.

    count, trained_on, seed: of the training images for such a fit.
    """
    found = Path(folder) if folder else shipped_inverses(target)
    if found is not None:
        families = load_families(found, target, seed)
        chosen = {f: {t: g for t, g in taps.items() if t in target.taps} for f, taps in families.items()}
        return {family: taps for family, taps in chosen.items() if taps}
    images = open_images(trained_on, "train", target.image_size, count, seed)
    return {"linear": dict(fit_linear(target, images, target.taps, seed=seed))}


def families_by_seed(
    target: Target,
    folder: str | Path = "",
    seeds: Sequence[int] = (0, 1, 2),
    count: int = 2000,
    trained_on: str = "scenes",
) -> dict[int, dict[str, dict[str, Reconstruct]]]:
    """{training seed: {family: {tap: reconstruction}}} of the target's taps, of the families that every seed has.

    folder: with the runs of 02_train_inverse for each of the seeds; "": linear inverses, fitted here once a seed on
    `count` training images of `trained_on`, others for every seed. Raises BacksightError as `load_families`, and
    where no family is there for all seeds.
    """
    by_seed = {}
    for seed in _distinct(seeds):
        found = load_families(folder, target, seed) if folder else _linear_family(target, count, seed, trained_on)
        chosen = {f: {t: taps[t] for t in target.taps if t in taps} for f, taps in found.items()}
        by_seed[seed] = {family: taps for family, taps in chosen.items() if taps}
    common = [family for family in by_seed[seeds[0]] if all(family in each for each in by_seed.values())]
    if not common:
        raise BacksightError(
            f"{folder} holds no inverse family of {target.name} at its chosen taps for all of the seeds {list(seeds)}: "
            "run 02_train_inverse with each of them."
        )
    return {seed: {family: families[family] for family in common} for seed, families in by_seed.items()}


def untrained_by_seed(
    target: Target,
    folder: str | Path = "",
    seeds: Sequence[int] = (0, 1, 2),
    count: int = 2000,
    trained_on: str = "scenes",
) -> dict[int, tuple[Target, dict[str, dict[str, Reconstruct]]]]:
    """{seed: (the architecture with random weights drawn anew, {family: {tap: reconstruction}})}: the null models.

    Linear inverses are fitted here where `folder` has none; trained families are there for the seeds whose runs of
    02_train_inverse with pretrained = false are in `folder`.
    """
    made: dict[int, tuple[Target, dict[str, dict[str, Reconstruct]]]] = {}
    for seed in _distinct(seeds):
        untrained = _untrained(target, folder, seed)
        families: dict[str, dict[str, Reconstruct]] = {}
        if folder and _headers(folder, untrained):
            families = {f: dict(taps) for f, taps in load_families(folder, untrained, seed).items()}
        if "linear" not in families:
            families = _linear_family(untrained, count, seed, trained_on) | families
        made[seed] = (untrained, families)
    return made


def _untrained(target: Target, folder: str | Path, seed: int) -> Target:
    """The target with random weights: those of the folder's inverses, where it has some for this seed."""
    drawn = target.untrained(seed)
    if not folder or _headers(folder, drawn):
        return drawn
    headers = [read_header(path) for path in inverse_files(Path(folder))]
    if any((each.target, each.weights, each.seed) == (target.name, "random", seed) for each in headers):
        built = load_target(target.name, target.taps, pretrained=False, seed=seed)  # as 02_train_inverse does
        return built if _headers(folder, built) else drawn
    return drawn


def _distinct(seeds: Sequence[int]) -> Sequence[int]:
    if not seeds or len(set(seeds)) < len(seeds):
        raise BacksightError(f"seeds = {list(seeds)}: give at least one training seed, and each of them once.")
    return seeds


def _linear_family(target: Target, count: int, seed: int, trained_on: str) -> dict[str, dict[str, Reconstruct]]:
    images = open_images(trained_on, "train", target.image_size, count, seed)
    return {"linear": dict(fit_linear(target, images, target.taps, seed=seed, progress=False))}


def _headers(folder: str | Path, target: Target) -> dict[Path, InverseHeader]:
    """Of all inverses of this target, by name and weights, in a folder and its sub-folders."""
    headers = {path: read_header(path) for path in inverse_files(Path(folder))}
    return {
        path: header
        for path, header in headers.items()
        if (header.target, header.weights_hash) == (target.name, target.weights_hash)
    }


def load_families(folder: str | Path, target: Target, seed: int | None = None) -> dict[str, dict[str, Any]]:
    """{family: {tap: inverse to pixels}} of every inverse for `target` in a folder and its sub-folders.

    Modules of a modular family become chains that end in pixels; inverses of the same architecture with other weights
    are passed over. seed: whose inverses to take where the folder holds inverses of several training seeds. Raises
    BacksightError where the folder holds no inverse of this target, or two for one tap.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BacksightError(f"{folder} is not a folder: give the run folder of 02_train_inverse as `inverses`")
    headers = _headers(folder, target)
    if not headers:
        _refuse_without_inverses(folder, target)
    seeds = sorted({header.seed for header in headers.values()})
    if len(seeds) > 1:
        if seed not in seeds:
            raise BacksightError(f"{folder} holds inverses of the seeds {seeds}: choose one of them as `seed`")
        headers = {path: header for path, header in headers.items() if header.seed == seed}
    found: dict[str, dict[str, Any]] = {}
    measured = Measured(target)
    for path, header in headers.items():
        modules = found.setdefault(header.family, {})
        if header.source in modules:
            raise BacksightError(
                f"{folder} holds two {header.family} inverses for {header.source} of {target.name}: name one run folder"
            )
        modules[header.source] = load_inverse(path, target, measured)
    order = {tap: place for place, tap in enumerate(target.available_taps)}
    return {
        family: as_reconstructions({tap: found[family][tap] for tap in sorted(found[family], key=order.__getitem__)})
        for family in sorted(found, key=_family_order)
    }


def _refuse_without_inverses(folder: Path, target: Target) -> None:
    others = [read_header(path) for path in inverse_files(folder)]
    for header in others:
        if header.target == target.name:
            raise BacksightError(
                f"the inverses in {folder} were made for {target.name} with the weights {header.weights_hash}, not "
                f"{target.weights_hash}: load that target, or fit inverses for this one."
            )
    names = sorted({header.target for header in others})
    hint = f"; it has inverses of {', '.join(names)}" if names else ""
    raise BacksightError(
        f"no inverse for {target.name} in {folder}{hint}: run notebooks/02_train_inverse.ipynb with this target"
    )


def shipped_inverses(target: Target) -> Path | None:
    """The folder of the inverses that are shipped with a shipped target, or None."""
    folder = project_root() / "data" / "weights" / target.name / "inverses"
    return folder if target.weights == "shipped" and folder.is_dir() else None


def _family_order(family: str) -> tuple[int, str]:
    known = ("linear", "direct", "modular", "exact", "map")
    first = family.split("_")[0]
    return (known.index(first) if first in known else len(known), family)


def save_family(
    target: Target,
    family: str,
    inverses: Mapping[str, Inverse | LinearInverse | ExactInverse | MapInverse],
    folder: str | Path,
    images: Any = None,
    seed: int = 0,
    half: bool = False,
) -> list[Path]:
    """One safetensors file for each module, `<family>--<tap>.safetensors`; images: what they were fitted on."""
    files = []
    for tap, inverse in inverses.items():
        header = getattr(inverse, "header", None) or header_for(target, family, tap, inverse.destination, images, seed)
        files.append(save_inverse(inverse, Path(folder) / f"{family}--{tap}.safetensors", half, header))
    return files


def as_reconstructions(modules: Mapping[str, Any]) -> dict[str, Reconstruct]:
    """{tap: images from that tap}: the modules themselves where they end in pixels, else chains of them."""
    if all(module.destination == PIXELS for module in modules.values()):
        return dict(modules)
    return {tap: Chain(modules, tap) for tap in modules}
