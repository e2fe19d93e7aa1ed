"""Which images a folder on disk has of a split, whatever its layout.

    plain       images at any depth, cut 8:1:1 by a hash of their paths
    splits      train/, val/ (or valid/), test/, in any case, here or below images/: of images or of class folders
    COCO        these (also as train2017/) with annotations/instances_*.json, or _annotations.coco.json in each
    tar shards  train-*.tar, val-*.tar, or without a split in their names

Without a test part val is the test split; then, or without val, a tenth of train is the validation split, by hash.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from PIL import Image

from backsight.data.coco import ImageObjects, of_files, read_annotations
from backsight.data.decode import OTHERS, READABLE, refusal
from backsight.data.tar import Member, members
from backsight.errors import SourceError

SPLITS = ("train", "validation", "test")
_WORD = "(train|val|test)(?:ing|id|idate|idation)?"
# train, Valid, test_images, val2017, training_set, test1, seg_train, x_test
_SPLIT_FOLDER = re.compile(
    rf"(?:(?:seg|x|images?|imgs?|data(?:set)?)[-_])?{_WORD}[-_ ]?(?:(?:19|20)\d\d|\d|images?|imgs?|set|data|split)?",
    re.IGNORECASE,
)
_SPLIT_SHARD = re.compile(rf"(?:^|[^a-z]){_WORD}[^a-z]", re.IGNORECASE)  # train-0000.tar, imagenet1k-validation-07.tar
_NO_CLASSES = ("images", "labels", "annotations", "masks")
# All other files are told by their first bytes.
_NO_IMAGES = (".txt", ".json", ".jsonl", ".xml", ".csv", ".yaml", ".yml", ".md", ".html", ".npy", ".pt", ".py", ".tar")

Parts = dict[str, list[Path]]  # "train", "val", "test", or "" where nothing is declared: its folders or tar shards


class Entry(NamedTuple):
    """One image of a source: its id (unique and stable), its file, and what is known about it.

    member: where it lies in a tar shard; `path` is then "shard.tar::name", to be read by people only. draw: of an image
    without a file: (H, W) -> uint8 (H, W, 3). part: the seed of a random part of the image, which stands for it.
    """

    id: str
    path: str
    label: int | None = None
    objects: ImageObjects | None = None
    member: Member | None = None
    draw: Callable[[tuple[int, int]], np.ndarray] | None = None
    part: tuple[int, ...] | None = None


@dataclass
class Found:
    """What a source has of a split. skipped: [(path, reason)]; to_size: of the size asked for, never cropped."""

    split: str
    entries: list[Entry] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    skipped: list[tuple[str, str]] = field(default_factory=list)
    to_size: bool = False

    def add(self, files: dict[str, Entry], annotations: Path | None) -> None:
        """Add {path in its folder: entry}, with the objects that a COCO file, where one is given, has of it."""
        if annotations is not None:
            objects, classes = read_annotations(annotations)
            if self.classes not in ((), classes):
                raise SourceError(f"{annotations} lists other categories than the other part: open one split at a time")
            known, self.classes = of_files(objects, files), classes
            reason = f"{annotations.name} does not list it"
            self.skipped += [(entry.path, reason) for path, entry in files.items() if path not in known]
            files = {path: files[path]._replace(objects=objects) for path, objects in known.items()}
        self.entries += files.values()


def folder_entries(root: Path, split: str | None, masks: bool) -> Found:
    """The images of a split, with masks those of COCO's annotations. Raises SourceError."""
    if not root.is_dir():
        raise SourceError(f"there is no folder {root}: give the folder that holds the images")
    base, parts = next(((base, parts) for base in (root, root / "images") if (parts := _declared(base))), (root, {}))
    annotations: dict[Path, Path] = {}
    for part, place in ((part, place) for part, places in parts.items() for place in places):
        usual = [root / "annotations" / f"instances_{name}.json" for name in (part, place.name)]
        if file := next((file for file in (place / "_annotations.coco.json", *usual) if file.is_file()), None):
            annotations[place] = file
    classes = {} if annotations else {part: _class_folders(places) for part, places in parts.items()}
    labelled = {part for part, places in parts.items() if classes.get(part) or annotations.keys() & {*places}}
    if labelled and "test" not in labelled:
        parts.pop("test", None)  # the test images of ImageNet and COCO come without
    if not parts:
        parts = {"": [root]}
        listed = [*(root / "annotations").glob("instances_*.json")]
        if split not in (None, "all") and len(listed) > 1:
            raise SourceError(
                f"{root / 'annotations'} declares the splits of images that lie in one folder: put those of each file "
                "into a folder of its own (train, val, test), or open split='all'"
            )
        annotations = {root: listed[0]} if len(listed) == 1 else {}
    found = Found(split or ("all" if "" in parts else "test"), classes=tuple(sorted(set().union(*classes.values()))))
    if parts != {"": [root]}:
        known = {path for places in parts.values() for path in places}
        for path in (path for path in _children(base) if path not in known):
            folder = path.is_dir() and path.name not in _NO_CLASSES and not _SPLIT_FOLDER.fullmatch(path.name)
            if folder or (path.is_file() and path.suffix.lower() in (*READABLE, ".tar")):
                found.skipped.append((str(path), "it lies beside the declared splits or shards"))
    for part, low, high in _shares(parts, found.split, root):
        for place in parts[part]:
            shard = place.suffix.lower() == ".tar"
            files: dict[str, Entry] = {}
            for name, entry in _of_shard(place) if shard else _of_folder(place, root, found):
                if part == "" and found.split != "all" and any(map(_SPLIT_FOLDER.fullmatch, name.split("/")[:-1])):
                    raise SourceError(  # what is held out there may not enter the training part
                        f"{root} has declared splits further down, as that of {name}: open the folder in which train, "
                        "val and test lie side by side, or split='all'"
                    )
                key = os.path.splitext(name)[0] if place in annotations else name
                fraction = int.from_bytes(sha256(key.encode()).digest()[:6], "big") / 2**48  # equal on every machine
                if low <= fraction < high:
                    files[name] = entry
            found.add(files, annotations.get(place) if masks else None)
    if not found.entries:
        raise SourceError(
            f"split {found.split!r} of {root} holds no image: add images (without declared splits they are cut 8:1:1 "
            "by a hash of their names; split='all' has them all)"
        )
    return found


def _declared(base: Path) -> Parts:
    """The folders, or else the tar shards, of each part; {} where there are none."""
    children = _children(base)
    folders: Parts = {}
    shards: Parts = {}
    for path in children:
        if path.is_dir() and (word := _SPLIT_FOLDER.fullmatch(path.name)):
            folders.setdefault(word[1].lower(), []).append(path)
        elif path.suffix.lower() == ".tar" and path.is_file():  # no named pipe, which would be waited for
            word = _SPLIT_SHARD.search(path.name)
            shards.setdefault(word[1].lower() if word else "", []).append(path)
    if folders.keys() & {"train", "val"} or sum(map(len, folders.values())) == len(children):
        return folders
    return {part: places for part, places in shards.items() if part} or shards


def _shares(parts: Parts, split: str, root: Path) -> list[tuple[str, float, float]]:
    """(part, low, high) of what makes up a split: those images of the part whose hash lies in [low, high)."""
    if split == "all":
        return [(part, 0.0, 1.0) for part in ("", "train", "val", "test") if part in parts]
    if "" in parts:
        return [("", *{"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}[split])]
    validated = {"val", "test"} <= parts.keys()
    share = {
        "train": ("train", 0.0, 1.0 if validated else 0.9),
        "validation": ("val", 0.0, 1.0) if validated else ("train", 0.9, 1.0),
        "test": ("test" if "test" in parts else "val", 0.0, 1.0),
    }[split]
    if share[0] not in parts:
        raise SourceError(f"{root} has nothing for split {split!r} (it has {', '.join(parts)}): add {share[0]}")
    return [share]


def _of_folder(folder: Path, root: Path, found: Found) -> Iterator[tuple[str, Entry]]:
    """(relative path, entry) of the image files below a folder, in order; others are skipped, or none of its business.

    Raises SourceError where there is none.
    """
    paths: list[str] = []
    others: Counter[str] = Counter()
    for inside, name in _files(folder):
        path, extension = os.path.join(folder, inside, name), os.path.splitext(name)[1].lower()
        reason = None
        if extension not in READABLE:
            reason = "" if extension in _NO_IMAGES else refusal(path)
        if reason is None:
            paths.append(f"{inside}/{name}".lstrip("/"))
        elif reason.removeprefix("it is ") in OTHERS.values() or extension in Image.registered_extensions():
            found.skipped.append((path, reason))
        else:
            others[extension or "no extension"] += 1
    if not paths:
        kinds = ", ".join(f"{kind} ({number})" for kind, number in others.most_common(5)) or "nothing"
        raise SourceError(f"the folder {folder} holds no images, only {kinds}: images are {' '.join(READABLE)}")
    numbers = {name: number for number, name in enumerate(found.classes)}
    for path in sorted(paths):
        id = path if folder == root else f"{folder.name}/{path}"
        yield path, Entry(id, str(folder / path), numbers.get(path.split("/")[0]))


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """(folder inside, name) of what is visible below a folder; links that lead back up are not followed."""
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        above, below = f"{os.path.realpath(place)}/", [name for name in folders if _visible(name)]
        folders[:] = [name for name in below if not above.startswith(f"{os.path.realpath(f'{place}/{name}')}/")]
        inside = place[len(str(folder)) + 1 :].replace(os.sep, "/")
        yield from ((inside, name) for name in files if _visible(name))


def _of_shard(shard: Path) -> Iterator[tuple[str, Entry]]:
    for member in members(shard):
        id = f"{shard.stem}/{member.name}"
        yield id, Entry(id, f"{shard}::{member.name}", member=member)


def _class_folders(places: Sequence[Path]) -> set[str]:
    """Names of the folders inside that hold something."""
    inside = [path for place in places if place.is_dir() for path in _children(place)]
    return {path.name for path in inside if path.is_dir() and path.name not in _NO_CLASSES and any(path.iterdir())}


def _children(folder: Path) -> list[Path]:
    """What is visible in a folder, by name; nothing where there is no folder."""
    try:
        return sorted(path for path in folder.iterdir() if _visible(path.name)) if folder.is_dir() else []
    except OSError as error:
        _refuse(error)


def _visible(name: str) -> bool:
    return name[0] != "." and name != "__MACOSX"


def _refuse(error: OSError) -> NoReturn:
    raise SourceError(f"cannot look into {error.filename}: {error.strerror}") from error
