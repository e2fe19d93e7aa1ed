"""Inverses by training seed, of trained and of untrained targets: what studies compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from backsight.data.images import GENERATORS, open_images
from backsight.errors import BacksightError
from backsight.inverses.families import Reconstruct
from backsight.inverses.files import ORDER, headers_for, inverse_files, load, read_header, shipped_inverses
from backsight.inverses.linear import fit_linear
from backsight.studies.nulls import Families
from backsight.tables.names import LEADING_FAMILIES
from backsight.targets import load_target
from backsight.targets.base import Target


def families_by_seed(
    target: Target, folder: str | Path, seeds: Sequence[int], count: int = 2000, trained_on: str = "scenes"
) -> dict[int, Families]:
    """{training seed: those of the target's taps}, of the families that every seed has.

    folder: with the runs of 02_train_inverse for each of the seeds; shipped inverses stand in for families that only
    other seeds have there. "": those shipped with the target, of one seed; else linear inverses, fitted here once a
    seed on `count` training images of `trained_on`, others for every seed.
    Raises BacksightError as `load`, and where no family is there for all seeds.
    """
    shipped = shipped_inverses(target)
    own = {header.seed for header in headers_for(shipped, target).values()} if shipped else set()
    if not folder and shipped and own & set(seeds):
        folder, seeds = shipped, [seed for seed in seeds if seed in own]
    by_seed = {
        seed: _at_taps(target, load(folder, target, seed) if folder else linear_family(target, count, seed, trained_on))
        for seed in _distinct(seeds)
    }
    named = {family for families in by_seed.values() for family in families}
    for seed in own & by_seed.keys():
        if shipped and named - by_seed[seed].keys():
            others = _at_taps(target, load(shipped, target, seed))
            by_seed[seed] = {f: taps for f, taps in others.items() if f in named} | by_seed[seed]
    common = [family for family in ORDER if all(family in families for families in by_seed.values())]
    if not common:
        raise BacksightError(
            f"{folder} holds no inverse family of {target.name} at its chosen taps for all of the seeds {list(seeds)}: "
            "run 02_train_inverse with each of them."
        )
    return {seed: {family: families[family] for family in common} for seed, families in by_seed.items()}


def training_source(target: Target, folder: str | Path, images: str) -> str:
    """What the inverses that `families_by_seed` reads were trained on, by their own files.

    They name a folder of images by its last part alone: `images` it is, where that is called so. Without inverses,
    images are scenes for "scenes", else leaves. Raises BacksightError where the files name several sources, or one that
    cannot be opened by that name.
    """
    shipped = shipped_inverses(target)
    headers = (headers_for(folder, target) if folder else {}) or (headers_for(shipped, target) if shipped else {})
    if not headers:
        return "scenes" if images == "scenes" else "leaves"
    names = sorted({header.data.partition(",")[0].rpartition(" ")[0] for header in headers.values()})
    judged = Path(images).expanduser()
    if names == [judged.resolve().name] and judged.is_dir():
        return images
    if len(names) > 1 or names[0] not in GENERATORS:
        raise BacksightError(
            f"the inverses of {target.name} were trained on {', '.join(names) or 'images'}: say where these are by "
            "trained_on = …"
        )
    return names[0]


def _at_taps(target: Target, families: Families) -> dict[str, Mapping[str, Reconstruct]]:
    """The families that read any of the target's taps, at these."""
    chosen = {f: {tap: taps[tap] for tap in target.taps if tap in taps} for f, taps in families.items()}
    return {family: taps for family, taps in chosen.items() if taps}


def untrained_by_seed(
    target: Target, folder: str | Path, seeds: Sequence[int], count: int = 2000, trained_on: str = "scenes"
) -> dict[int, tuple[Target, Families]]:
    """{seed: (the architecture with random weights drawn anew, its families)}: the null models.

    Linear inverses are fitted here where `folder` has none; trained families are there for the seeds whose runs of
    02_train_inverse with pretrained = false are in `folder`.
    """
    headers = [read_header(path) for path in inverse_files(Path(folder))] if folder else []
    trained = {header.seed for header in headers if (header.target, header.weights) == (target.name, "random")}
    nulls: dict[int, tuple[Target, Families]] = {}
    for seed in _distinct(seeds):
        untrained = target.untrained(seed)
        if seed in trained and not headers_for(folder, untrained):  # 02_train_inverse builds the model anew
            untrained = load_target(target.name, target.taps, pretrained=False, seed=seed)
        families: Families = load(folder, untrained, seed) if seed in trained else {}
        if "linear" not in families:
            families = linear_family(untrained, count, seed, trained_on) | {**families}
        nulls[seed] = untrained, families
    return nulls


def _distinct(seeds: Sequence[int]) -> Sequence[int]:
    if not seeds or len(set(seeds)) < len(seeds):
        raise BacksightError(f"seeds = {list(seeds)}: give at least one training seed, and each of them once.")
    return seeds


def linear_family(target: Target, count: int, seed: int, trained_on: str) -> dict[str, Mapping[str, Reconstruct]]:
    """{"linear": {tap: reconstruct}}, fitted here on `count` training images, others for every seed."""
    images = open_images(trained_on, "train", target, count, seed)
    return {"linear": fit_linear(target, images, seed=seed, progress=False)}


def map_base(families: Families, tap: str) -> Reconstruct:
    """The inverse that a MAP inverse of this tap starts from: of a leading family, else of any other."""
    return next(families[f][tap] for f in (*LEADING_FAMILIES, *families) if tap in families.get(f, {}))
