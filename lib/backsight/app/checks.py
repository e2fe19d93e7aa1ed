"""What a notebook's values have to be, judged before its kernel starts: by name, at the library's doors.

Every check raises BacksightError, names the parameter, and leaves nothing behind. Libraries that take seconds to load
are imported where a value needs them. Relative paths are relative to the working folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backsight.errors import BacksightError, nearest
from backsight.project import shown

IMAGE_SOURCES = ("scenes", "photographs")
# The least value with a meaning is 1; a notebook's own default is allowed below it (steps = 0: the recipe's number).
COUNTS = (
    *("steps", "n", "train_images", "validation_images", "test_images", "fit_images", "null_images"),
    *("evaluate", "batch_size", "scenes"),
)
LARGEST_SEED = 2**63 - 1  # torch takes no larger one
FEATURES = ("auto", "always", "never")  # families.Features, whose module takes seconds to import
# What to fetch when a preset names a data set that is not there; data/README.md says the same at length.
DOWNLOADS: Mapping[str, str] = {
    "data/coco": "download the train2017 and val2017 images and the instance annotations of COCO 2017 into "
    "data/coco/{train2017,val2017,annotations}, as data/README.md says",
    "data/imagenet": "download ILSVRC 2012 (train and validation) into data/imagenet/{train,val}/<class>/, "
    "as data/README.md says",
}


def check_values(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse values that no notebook can work with; the target libraries are asked last."""
    for name in COUNTS:
        value = values.get(name)
        if isinstance(value, int | float) and value < 1 and value != defaults.get(name):
            raise BacksightError(f"{name} must be at least 1, not {value}.")
    if isinstance(values.get("seed"), int):
        check_seed(values["seed"])
    if "seeds" in values:
        check_seeds(values["seeds"])
    if isinstance(families := values.get("families"), list):
        check_families(families)
    if (features := values.get("features", "auto")) not in FEATURES:
        raise BacksightError(f"features is {features!r}; it is one of {', '.join(FEATURES)}.")
    for name in ("images", "trained_on"):
        source = values.get(name)
        if isinstance(source, str) and (source or defaults.get(name)):
            check_images(source, name)
    if isinstance(photograph := values.get("photograph"), str):
        check_photograph(photograph)
    if isinstance(pictures := values.get("pictures"), list):
        from backsight.app.pictures import check_pictures

        check_pictures(pictures)
    if query := values.get("query"):
        from backsight.app.explorer.view import from_query

        from_query(query)
    if targets := _targets(values, defaults):
        from backsight.targets import check_target

        taps = "blocks" if values.get("taps") is None else values["taps"]
        for target in targets:
            check_target(target, taps, values.get("image_size"), bool(values.get("pretrained", True)))
    if isinstance(inverses := values.get("inverses"), str) and inverses:
        check_inverses(
            inverses,
            values.get("target"),
            values.get("seeds") or (),
            seed=values.get("seed"),
            weights=bool(values.get("pretrained", True)),
        )


def check_seeds(seeds: Any, name: str = "seeds") -> None:
    """Refuse seeds that are no distinct whole numbers from 0."""
    fine = isinstance(seeds, list) and seeds and all(type(seed) is int and 0 <= seed <= LARGEST_SEED for seed in seeds)
    if not fine or len(set(seeds)) < len(seeds):
        raise BacksightError(
            f"{name} must be a list of different whole numbers from 0, such as [0, 1, 2], and below 2^63, not {seeds}."
        )


def check_seed(seed: int, name: str = "seed") -> None:
    if not 0 <= seed <= LARGEST_SEED:
        raise BacksightError(f"{name} must be a whole number from 0 and below 2^63, not {seed}.")


def check_families(families: Sequence[Any], name: str = "families") -> None:
    """Refuse an unknown inverse family, and none."""
    from backsight.inverses.families import FAMILIES

    if not families:
        raise BacksightError(f"{name} is empty; name at least one of {', '.join(FAMILIES)}.")
    for family in families:
        if family not in FAMILIES:
            raise BacksightError(f"no inverse family {family!r} in {name}; {nearest(str(family), list(FAMILIES))}.")


def check_images(source: str, name: str = "images") -> None:
    """Refuse an image source that is neither a known name nor a folder with images somewhere inside."""
    from backsight.data.folders import folder_entries

    if source in IMAGE_SOURCES:
        return
    folder = Path(source).expanduser()
    if not folder.exists() and source.rstrip("/") in DOWNLOADS:
        raise BacksightError(f"there is no {source}: {DOWNLOADS[source.rstrip('/')]}.")
    if not source.strip() or not folder.is_dir():
        raise BacksightError(
            f"{name}: no folder {source!r}; give a folder of images or one of {', '.join(IMAGE_SOURCES)}."
        )
    try:
        folder_entries(folder, "all", masks=False)
    except BacksightError as error:
        raise BacksightError(f"{name}: {error}") from error


def check_photograph(photograph: str) -> None:
    """Refuse a photograph that is neither one of the embedded ones nor a file."""
    from backsight.scenes.photographs import PHOTOGRAPHS

    if photograph not in PHOTOGRAPHS and not Path(photograph).expanduser().is_file():
        raise BacksightError(
            f"no photograph {photograph!r}: give an image file or one of the embedded ones; "
            f"{nearest(photograph, list(PHOTOGRAPHS))}."
        )


def _targets(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """The targets that a run reads, less the one that it makes itself."""
    targets = values.get("targets")
    if targets == []:
        raise BacksightError("targets is empty; name at least one (`backsight targets` lists them).")
    if values.get("target") == "" != defaults.get("target"):
        raise BacksightError("target is empty; name one (`backsight targets` lists them).")
    if retrained := values.get("retrain"):
        from backsight.scenes.train import RECIPES

        if retrained not in RECIPES:
            raise BacksightError(f"retrain: no recipe for {retrained!r}; {nearest(str(retrained), list(RECIPES))}.")
    named = [values.get("target"), *(targets if isinstance(targets, list) else [])]
    return [name for name in named if isinstance(name, str) and name and name != retrained]


def check_inverses(
    source: str, target: str | None = None, seeds: Sequence[int] = (), *, seed: int | None = None, weights: bool = True
) -> None:
    """Refuse a folder (searched to the bottom) without inverses, with a damaged one, or with none of the target.

    seeds: training seeds of which the target has to have inverses; seed: of the notebook, which takes those of this
    seed where there are several; weights: also compare the target's weights with those that the inverses were made
    for, where these lie in a folder of this machine (they have to be read).
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise BacksightError(f"inverses: no folder {source!r}; give the folder of a finished training run.")
    from backsight.inverses.files import inverse_files, read_header

    headers = {path: read_header(path) for path in inverse_files(folder)}
    if not headers:
        raise BacksightError(f"inverses: the folder {source} holds no inverses (<family>--<tap>.safetensors).")
    if not isinstance(target, str):
        return
    names = sorted({header.target for header in headers.values()})
    if not Path(target).exists() and target not in names:
        raise BacksightError(f"inverses: those in {source} are of {', '.join(names)}, not of {target}.")
    # Inverses of an untrained target may lie beside those of the trained one: they are null models.
    own = {path: header for path, header in headers.items() if header.target == target and header.weights != "random"}
    known = sorted({header.seed for header in own.values()})
    if known and (missing := [number for number in seeds if number not in known]):
        raise BacksightError(
            f"inverses: those of {target} in {source} were trained with the seeds {known}, none with {missing}: "
            "train them with 02_train_inverse, or set seeds to those that are there."
        )
    if len(known) > 1:
        chosen: Sequence[int | None] = seeds or [seed]
        own = {path: header for path, header in own.items() if header.seed in chosen}
    if weights and own:
        from backsight.targets.load import load_target
        from backsight.targets.names import resolve

        if resolve(target).checkpoint is None:
            return
        weights_hash = load_target(target).weights_hash
        for path, header in own.items():
            if header.weights_hash != weights_hash:
                raise BacksightError(
                    f"inverses: {shown(path)} was made for {target} with the weights {header.weights_hash}, but "
                    f"{target} has the weights {weights_hash} now: give other inverses, or train new ones with "
                    "02_train_inverse."
                )


def check_writable(folder: Path) -> None:
    """Refuse a results folder that cannot be made or written; leaves nothing behind."""
    existing = folder
    try:
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(0, f"{shown(existing)} is a file")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise BacksightError(
            f"cannot write results to {shown(folder)}: {error.strerror}; choose another folder."
        ) from error
