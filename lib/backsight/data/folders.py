"""Which images a folder on disk has of a split, whatever its layout.

    plain       images at any depth, cut 8:1:1 by a hash of their paths
    splits      train/, val/ (or valid/), test/, in any case, here or below images/: of images or of class folders
    COCO        these (also as train2017/) with annotations/instances_*.json, or _annotations.coco.json in each
    tar shards  train-*.tar, val-*.tar, or without a split in their names

Declared parts are kept: without a validation part a tenth of train is the validation split, by hash; without a test
part val is the test split.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from backsight.data.coco import Annotations, ImageObjects
from backsight.data.decode import READABLE, is_image
from backsight.data.tar import Member, index_shards
from backsight.errors import SourceError

SPLITS = ("train", "validation", "test")
_PLAIN = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}  # shares of the range of hashes
_WORD = "(train|validation|val|test)(?:ing|id|idate)?"
_SPLIT_FOLDER = re.compile(_WORD + r"[-_]?((?:19|20)\d\d)?", re.IGNORECASE)  # train, Valid, testing, val2017
_SPLIT_SHARD = re.compile(rf"(?:^|[^a-z]){_WORD}[^a-z]")  # train-0000.tar, imagenet1k-validation-07.tar
_NO_CLASSES = {"images", "labels", "annotations", "masks"}
# Images as well, but of kinds that are not read: named as skipped. All other files are told by their first bytes.
_UNREADABLE = (
    *(".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".xcf", ".exr", ".hdr", ".tga", ".eps", ".ico"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"),
)
_NO_IMAGES = (".txt", ".json", ".jsonl", ".xml", ".csv", ".yaml", ".yml", ".md", ".html", ".npy", ".pt", ".py", ".tar")


class Entry(NamedTuple):
    """One image of a source: its id (unique and stable), its file, and what is known about it.

    member: where it lies in a tar shard; `path` is then "shard.tar::name", to be read by people only.
    """

    id: str
    path: str
    label: int | None = None
    objects: ImageObjects | None = None
    member: Member | None = None


class Part(NamedTuple):
    """A declared part of a data set, or that share of it whose names hash into [low, high)."""

    name: str = ""
    low: float = 0.0
    high: float = 1.0

    def holds(self, name: str) -> bool:
        fraction = int.from_bytes(sha256(name.encode()).digest()[:6], "big") / 2**48  # the same on every machine
        return self.low <= fraction < self.high


@dataclass
class Found:
    """What a source has of a split. skipped: [(path, reason)]."""

    split: str
    entries: list[Entry] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, folder: Path, files: Mapping[str, Entry], annotations: Path | None, part: Part) -> None:
        """Add files of a folder, {path in it: entry}, with the objects that a COCO file, where one is given, has."""
        if annotations is None:
            self.entries += files.values()
            return
        source = Annotations(annotations)
        if self.classes not in ((), source.classes):
            raise SourceError(f"{annotations} lists other categories than the other part: open one split at a time")
        self.classes = source.classes
        self.skipped += source.notes
        records = source.match(list(files))
        for name, entry in files.items():
            if name in records:
                self.entries.append(entry._replace(objects=ImageObjects(source, records[name], entry.path)))
            else:
                self.skipped.append((entry.path, f"{annotations.name} does not list it"))
        for name in sorted(source.images.keys() - {record["file_name"] for record in records.values()}):
            if part.holds(_stem(name)) and not (folder / name).exists():
                self.skipped.append((str(folder / name), f"listed in {annotations.name}, but not on disk"))

    def search(self, folder: Path) -> list[str]:
        """Image files below a folder as sorted relative paths; those that cannot be read are skipped.

        Raises SourceError where there is none.
        """
        paths: list[str] = []
        others: Counter[str] = Counter()
        for path, child in _files(folder):
            extension = os.path.splitext(path)[1].lower()
            if not child.is_file():
                if extension in READABLE:
                    self.skipped.append((child.path, "no regular file, or a link to nothing"))
            elif extension in READABLE or (extension not in _NO_IMAGES and is_image(child.path)):
                paths.append(path)
            else:
                others[extension or "no extension"] += 1
                if extension in _UNREADABLE:
                    self.skipped.append((child.path, f"{extension} is not supported: convert it to PNG or JPEG"))
        if not paths:
            kinds = ", ".join(f"{kind} ({number})" for kind, number in others.most_common(5)) or "nothing"
            raise SourceError(f"the folder {folder} holds no images, only {kinds}: images are {' '.join(READABLE)}")
        return sorted(paths)


def folder_entries(root: Path, split: str | None, masks: bool) -> Found:
    """The images of a split, with masks those of COCO's annotations. Raises SourceError."""
    if not root.is_dir():
        raise SourceError(f"there is no folder {root}: give the folder that holds the images")
    if base := next((base for base in (root, root / "images") if base.is_dir() and _declared(base)), None):
        found = _split_folders(root, base, _declared(base), split or "test", masks)
    elif shards := [root / child.name for child in _children(root) if child.name.lower().endswith(".tar")]:
        found = _tar_shards(root, shards, split)
    else:
        found = Found(split or "all")
        part = Part("", *_PLAIN.get(found.split, (0.0, 1.0)))
        files = {path: Entry(path, str(root / path)) for path in found.search(root) if part.holds(path)}
        annotations = [*(root / "annotations").glob("instances_*.json")]
        found.add(root, files, annotations[0] if masks and len(annotations) == 1 else None, part)
    if not found.entries:
        raise SourceError(
            f"split {found.split!r} of {root} holds no image: add images, or choose another split (without declared "
            "ones, images are cut 8:1:1 by a hash of their names; split='all' has them all)"
        )
    return found


def _parts(declared: Iterable[str], split: str, root: Path) -> list[Part]:
    """The parts that make up a split; declared: which of train, val, validation and test there are."""
    place = {name: name for name in declared}
    if "val" in place:
        place.setdefault("validation" if "test" in place else "test", place.pop("val"))
    if split == "all":
        return [Part(place[name]) for name in SPLITS if name in place]
    if "train" in place and "validation" not in place and split != "test":
        return [Part(place["train"], *((0.0, 0.9) if split == "train" else (0.9, 1.0)))]
    if split not in place:
        raise SourceError(
            f"{root} has neither images nor shards for split {split!r} (it has {', '.join(declared)}): add "
            f"{'val' if split == 'test' else 'train'}, or unpack the zip file and the annotations of COCO there"
        )
    return [Part(place[split])]


def _declared(base: Path) -> dict[str, str]:
    """{"train", "val", "validation" or "test": the folder of that part}; {} where the folder is not cut into splits."""
    children = _children(base)
    declared: dict[str, str] = {}
    for child in children:
        if child.is_dir() and (word := _SPLIT_FOLDER.fullmatch(child.name)):
            if (part := word[1].lower()) in declared:
                raise SourceError(f"{base} has both {declared[part]} and {child.name}: move one of them elsewhere")
            declared[part] = child.name
    nothing_else = all(child.name in declared.values() for child in children)
    return declared if nothing_else or declared.keys() & {"train", "val", "validation"} else {}


def _split_folders(root: Path, base: Path, declared: dict[str, str], split: str, masks: bool) -> Found:
    found = Found(split, skipped=_stray(base))
    annotations: dict[str, Path] = {}
    for split_name, name in declared.items():
        usual = [root / "annotations" / f"instances_{stem}.json" for stem in (split_name, name)]
        for path in (base / name / "_annotations.coco.json", *usual):
            if path.is_file():
                annotations[split_name] = path
    coco = bool(annotations) or any(name[-4:].isdigit() for name in declared.values())
    if coco:
        unlabelled = "test" not in annotations and declared.get("test", "")[-4:].isdigit()  # COCO's own test images
    else:
        classes = {part: _class_folders(base / name) for part, name in declared.items()}
        found.classes = tuple(sorted(set().union(*classes.values())))
        unlabelled = bool(found.classes) and not classes.get("test", True)  # ImageNet's own test images
    if unlabelled:
        declared = {part: name for part, name in declared.items() if part != "test"}
    numbers = {name: index for index, name in enumerate(found.classes)}
    for part in _parts(declared, split, root):
        folder = base / declared[part.name]
        if masks and coco and part.name not in annotations:
            raise SourceError(
                f"masks need annotations/instances_{folder.name}.json in {root}, which is missing: unpack COCO's "
                "annotations there, or open it with masks=False"
            )
        paths = found.search(folder)
        if coco:
            files = {path: Entry(_stem(path), str(folder / path)) for path in paths if part.holds(_stem(path))}
        else:
            files = {
                path: Entry(f"{folder.name}/{path}", str(folder / path), numbers.get(path.split("/")[0]))
                for path in paths
                if part.holds(path)
            }
        found.add(folder, files, annotations[part.name] if masks and coco else None, part)
    return found


def _class_folders(folder: Path) -> set[str]:
    """Names of the folders inside that hold something."""
    names = {child.name for child in _children(folder) if child.is_dir()} - _NO_CLASSES
    return {name for name in names if _children(folder / name)}


def _tar_shards(root: Path, paths: Iterable[Path], split: str | None) -> Found:
    shards: dict[str, list[Path]] = {}
    for path in paths:
        word = _SPLIT_SHARD.search(path.name.lower())
        shards.setdefault(word[1].replace("validation", "val") if word else "", []).append(path)
    found = Found(split or ("all" if "" in shards else "test"), skipped=_stray(root))
    if "" in shards and len(shards) > 1:
        raise SourceError(f"{root} holds {shards[''][0].name} beside shards of named splits: call it train-… or val-…")
    if {"train", "test"} <= shards.keys():
        labels = {name: index_shards(shards[name][:1], READABLE)[0][0].label for name in ("train", "test")}
        if labels["train"] is not None and labels["test"] is None:
            del shards["test"]  # ImageNet's own test images come without classes
    plain = Part("", *_PLAIN.get(found.split, (0.0, 1.0)))
    for part in [plain] if "" in shards else _parts(shards, found.split, root):
        for shard, members in zip(shards[part.name], index_shards(shards[part.name], READABLE), strict=True):
            for member in members:
                if part.holds(id := f"{shard.stem}/{member.name}"):
                    found.entries.append(Entry(id, f"{shard}::{member.name}", member.label, member=member))
    return found


def _stem(path: str) -> str:
    """The path without its last extension."""
    return os.path.splitext(path)[0]


def _stray(folder: Path) -> list[tuple[str, str]]:
    images = [child for child in _children(folder) if child.is_file() and child.name.lower().endswith(READABLE)]
    return [(child.path, "it lies beside the declared splits") for child in images]


def _children(folder: Path) -> list[os.DirEntry[str]]:
    """What is visible in a folder, by name."""
    try:
        with os.scandir(folder) as children:
            return sorted((c for c in children if c.name[0] != "." and c.name != "__MACOSX"), key=lambda c: c.name)
    except OSError as error:
        raise SourceError(f"cannot look into {folder}: {error.strerror}") from error


def _files(
    folder: Path, inside: str = "", above: frozenset[str] = frozenset()
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """(relative path, file) of everything below a folder; links that lead back up are not followed."""
    real = os.path.realpath(folder / inside)
    if real in above:
        return
    for child in _children(folder / inside):
        path = f"{inside}/{child.name}" if inside else child.name
        if child.is_dir():
            yield from _files(folder, path, above | {real})
        else:
            yield path, child
