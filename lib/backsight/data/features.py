"""The feature store: what a frozen target makes of the images, recorded once on disk and read as often as needed.

    images ──► target ──► taps ──► float16 and one scale an image ──► one file a tap, a row an image; images.bin;
                                                                       index.json, "complete" at the end
    store.passes(…) ◄── float32 ◄── rows of the mapped files, read ahead in a thread

A store's folder is named by a key of what decides about a representation (weights, preprocessing, taps, images), so
that every run finds it again. Rows are only ever appended: a recording that was killed goes on at the first batch that
is not whole in every file, and ends in the same bytes. To free the space, delete the folder.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, fields
from functools import cache
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import (
    ImageError,
    ImageSource,
    batches,
    index_batches,
    paying_workers,
    read_batches,
    unit_floats,
)
from backsight.errors import BacksightError, SourceError
from backsight.project import cache_folder, read_json, shown, write_json
from backsight.representation import Predictions, Queries, Representation, Tokens

FORMAT = 3  # part of the key: raise it whenever files are written, or representations made, in another way
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Tokens, Queries, Predictions)}
Recorded = dict[str, Representation]
Index = dict[str, Any]  # what index.json holds
Part = tuple[str, Sequence[int]]  # type and shape of a row


class Recordable(Protocol):
    """What is asked of a target."""

    name: str
    taps: tuple[str, ...]
    preprocessing: Any

    @property
    def weights_hash(self) -> str: ...
    def resolve_taps(self, taps: str | Sequence[str]) -> tuple[str, ...]: ...
    def record(self, images: Tensor, taps: Any = None) -> Recorded: ...


class StoreError(BacksightError):
    """A store that cannot be written here, for lack of space or of permission; recomputing still works."""


class FeatureStore:
    """A complete store; made by `record_features`, or opened by its folder.

    It stands where an ImageSource does (name, split, size, skipped, len, image(i), subset): `batches(store, …)` gives
    the batches of the images it was recorded from. An image that could not be read keeps its index, as in its source,
    and is left out of every batch. taps: in forward order; bytes: of all files; errors: {tap: relative RMS error of
    half precision}, of the first image, as record_features finds it. Raises BacksightError where the folder holds no
    complete store, or on reading a damaged file.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index = read_json(self.folder / "index.json") or {}
        if index.get("status") != "complete" or index.get("format") != FORMAT:
            raise BacksightError(
                f"{shown(self.folder)} holds no complete feature store of this version: call record_features with the "
                "same arguments again; it goes on from the last whole batch."
            )
        self.name, self.split, self.size = index["name"], index["split"], tuple(index["size"])
        self.target, self.weights_hash = index["target"], index["weights_hash"]
        self.errors: dict[str, float] = {}
        self._forms, self._parts, self._images = index["forms"], index["parts"], index["images"]
        self.taps = tuple(self._forms)
        self.bytes = self._images * sum(map(_row_bytes, self._parts.values()))
        self._missing = {i: (path, reason) for i, path, reason in index["missing"]}
        self.skipped = list(self._missing.values())
        self._own = np.arange(self._images)  # the images of this view of the store
        self._open: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._own)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # another process maps the files for itself

    def subset(self, which: slice | np.ndarray) -> FeatureStore:
        """These images of the store, in this order; nothing is copied."""
        part = copy.copy(self)
        part._own = self._own[which]
        return part

    def drawn(self, count: int, seed: int) -> FeatureStore:
        """`count` images, the first that a stream shuffled by the seed shows."""
        return self.subset(next(index_batches(len(self), count, seed, endless=True, start=0)))

    def check(self, target: Recordable) -> None:
        """Raise BacksightError where these are not the target's features."""
        if target.weights_hash != self.weights_hash:
            raise BacksightError(
                f"The feature store {shown(self.folder)} holds features of {self.target} with the weights "
                f"{self.weights_hash}, not of {target.name} with {target.weights_hash}: record them anew."
            )

    def skip(self, failures: Sequence[tuple[str, str]]) -> None:
        """As of an ImageSource; the store knows them from the recording."""

    def image(self, index: int) -> Tensor:
        """(3, H, W) as it was given, uint8 or float32. Raises ImageError for one that could not be read."""
        if (place := int(self._own[index])) in self._missing:
            raise ImageError(*self._missing[place])
        return torch.from_numpy(self._rows([index], ())["images"][0])

    def read(self, indices: Sequence[int] | np.ndarray, taps: Sequence[str] | None = None) -> tuple[Tensor, Recorded]:
        """Images (B, 3, H, W) float32 in [0, 1] and {tap: representation}, float32, both on the CPU.

        indices: of images, in any order; those that could not be read are left out. taps: default all.
        """
        taps = self._known(taps)
        return self._widened(self._rows(indices, taps), taps)

    def passes(
        self,
        batch_size: int,
        shuffle_seed: int | None = None,
        steps: int | None = None,
        start: int = 0,
        taps: Sequence[str] | None = None,
    ) -> Iterator[tuple[Tensor, Recorded]]:
        """(images, recorded) of the batches that `batches` gives for the same arguments, in the same order, as `read`.

        The next batch is read in a thread while the caller uses the one before.
        """
        taps = self._known(taps)
        stream = index_batches(len(self), batch_size, shuffle_seed, endless=steps is not None, start=start)
        readable = (chosen for chosen in stream if not self._missing.keys() >= set(self._own[chosen].tolist()))
        wanted = islice(readable, None if steps is None else max(0, steps - start))
        with ThreadPoolExecutor(1) as reader:
            reading = (reader.submit(self._rows, chosen, taps) for chosen in wanted)
            for rows, _ in pairwise(chain(reading, [None])):  # the pair is there when its second is submitted
                yield self._widened(rows.result(), taps)  # type: ignore[union-attr]

    def _known(self, taps: Sequence[str] | None) -> Sequence[str]:
        if unknown := set(taps or ()) - set(self.taps):
            raise BacksightError(f"{shown(self.folder)} has no tap {min(unknown)!r}; it has {', '.join(self.taps)}.")
        return self.taps if taps is None else taps

    def _rows(self, indices: Sequence[int] | np.ndarray, taps: Sequence[str]) -> dict[str, np.ndarray]:
        """The images' rows of the files, by numpy: torch's threads would take the cores that the training needs."""
        places = np.array([i for i in self._own[np.asarray(indices, dtype=int)].tolist() if i not in self._missing])
        if not len(places):
            raise BacksightError(f"None of the {len(indices)} images asked for is in {shown(self.folder)}.")
        names = [f"{tap}/{part}" for tap in taps for part in self._forms[tap]["parts"]]
        return {name: self._mapped(name)[places] for name in ("images", *names, *(f"{name}/scale" for name in names))}

    def _widened(self, rows: Mapping[str, np.ndarray], taps: Sequence[str]) -> tuple[Tensor, Recorded]:
        tensors = {name: torch.from_numpy(values).float() for name, values in rows.items() if name != "images"}
        recorded: Recorded = {}
        for tap in taps:
            form = self._forms[tap]
            parts = {part: _scaled(tensors[f"{tap}/{part}"], tensors[f"{tap}/{part}/scale"]) for part in form["parts"]}
            if form["positioned"]:
                parts["position"] = torch.from_numpy(np.load(self.folder / f"{tap}-position.npy"))
            settings = {  # JSON made lists of the grids
                name: tuple(map(tuple, value)) if isinstance(value, list) else value
                for name, value in form["settings"].items()
            }
            recorded[tap] = KINDS[form["kind"]](**parts, **settings)
        return unit_floats(torch.from_numpy(rows["images"])), recorded

    def _mapped(self, name: str) -> np.ndarray:
        """A file's rows: what is read of them comes from the disk, or from the system's cache of it."""
        if name not in self._open:
            path, (kind, shape) = self.folder / _file(name), self._parts[name]
            try:
                self._open[name] = np.asarray(np.memmap(path, kind, "r", shape=(self._images, *shape)))
            except (OSError, ValueError) as error:  # gone, or too short
                raise BacksightError(
                    f"The file {shown(path)} of a feature store is missing or damaged ({error}): call record_features "
                    "again, which mends it."
                ) from error
        return self._open[name]


def features_or_images(
    target: Recordable, images: ImageSource | Tensor, taps: str | Sequence[str] | None = None, progress: bool = True
) -> FeatureStore | ImageSource | Tensor:
    """`record_features`, or the images themselves, with a warning, where the store cannot be written."""
    try:
        return record_features(target, images, taps, progress=progress)
    except StoreError as error:
        warnings.warn(f"{error} Until then features are computed anew at every step.", stacklevel=2)
        return images


def record_features(
    target: Recordable,
    images: ImageSource | Tensor,
    taps: str | Sequence[str] | None = None,
    folder: Path | str | None = None,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> FeatureStore:
    """Record what the target makes of the images, or find it where it was recorded before.

    images: an ImageSource, or (N, 3, H, W) uint8 or float in [0, 1]; they are kept beside the features. taps: as
    `load_target` takes them, default the target's own. folder: of the stores, default "features" in the cache folder;
    each store has a folder of its own there. Numbers are kept to 11 binary digits of their own, `store.errors` says
    what that costs; contexts (a detector's memory) are not kept.

    A recording that was killed, or whose disk was full, goes on from its last whole batch; one that another process is
    writing is waited for. Raises StoreError where the disk is too small, before anything is written, or the folder
    cannot be written; BacksightError on features that are not finite or not of one form; SourceError without images.
    """
    taps = target.taps if taps is None else target.resolve_taps(taps)
    first = target.record(next(batches(images, 1)), taps)
    forms = {tap: _form(representation) for tap, representation in first.items()}
    size: tuple[int, ...]
    if isinstance(images, Tensor):
        name, split, size, kind = None, None, images.shape[2:], "uint8" if images.dtype == torch.uint8 else "float32"
    else:
        name, split, size, kind = images.name, images.split, images.size, "uint8"
    parts: dict[str, Part] = {"images": (kind, [3, *size])}
    for tap, form in forms.items():
        for part, shape in form["parts"].items():
            parts |= {f"{tap}/{part}": ("float16", shape), f"{tap}/{part}/scale": ("float32", [])}
    index: Index = {
        **{"format": FORMAT, "status": "recording", "target": target.name, "weights_hash": target.weights_hash},
        **{"name": name, "split": split, "size": list(size), "images": len(images), "missing": []},
        **{"forms": forms, "parts": parts},
    }
    identity = [FORMAT, target.name, target.weights_hash, asdict(target.preprocessing), forms, images_digest(images)]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    label = re.sub(r"[^\w.-]+", "-", "-".join(filter(None, (target.name, name, split, key))))
    place = Path(folder or cache_folder() / "features") / label
    try:
        existing = next(parent for parent in (place, *place.parents) if parent.exists())
        free, needed = shutil.disk_usage(existing).free, len(images) * sum(map(_row_bytes, parts.values()))
        if needed > free and existing != place:
            raise OSError(f"it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free")
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / ".lock"):
            known = read_json(place / "index.json")
            rows = min(_size(place / _file(name)) // _row_bytes(part) for name, part in parts.items()) if known else 0
            if known is None or known["status"] != "complete" or rows < len(images):
                _record(target, images, place, known or index, first, min(rows, len(images)), batch_size, progress)
    except OSError as error:
        raise StoreError(
            f"The feature store {shown(place)} cannot be written ({error}): make space, or set BACKSIGHT_CACHE to "
            "another folder; the next call goes on from there."
        ) from error
    store = FeatureStore(place)
    _, kept = store.read(next([i] for i in range(len(store)) if i not in store._missing))
    for tap, representation in first.items():  # what is in no key, as a user's code, shows in the first image
        values = representation.values.float().cpu()
        store.errors[tap] = float((kept[tap].values - values).norm() / values.norm().clamp(min=1e-30))
        if store.errors[tap] > 0.01:
            raise BacksightError(
                f"{target.name} gives other features at {tap} than when {shown(place)} was recorded, with the same "
                "weights: its code or its settings have changed; delete this folder."
            )
    return store


def _record(
    target: Recordable,
    images: ImageSource | Tensor,
    place: Path,
    index: Index,
    first: Recorded,
    rows: int,
    batch_size: int,
    progress: bool,
) -> None:
    """Append what is missing behind the first `rows`, in the same batches, and then write the index as complete."""
    start = rows if rows == len(images) else rows - rows % batch_size
    index |= {"status": "recording", "missing": [entry for entry in index["missing"] if entry[0] < start]}
    write_json(place / "index.json", index)
    for tap, representation in first.items():
        if (code := _position(representation)) is not None:
            np.save(place / f"{tap}-position.npy", code.numpy())
    left = list(index_batches(len(images), batch_size, None, endless=False, start=math.ceil(start / batch_size)))
    stream = read_batches(images, left, paying_workers(len(images) - start))
    with (
        ExitStack() as opened,
        tqdm(total=len(images) - start, desc=f"features of {target.name}", leave=False, disable=not progress) as bar,
    ):
        files = {name: opened.enter_context(open(place / _file(name), "ab")) for name in index["parts"]}
        for name, file in files.items():
            file.truncate(start * _row_bytes(index["parts"][name]))
        for indices, (read, failures) in zip(left, stream, strict=True):
            whole = read
            if failures:  # an image that could not be read is a black one, which nobody asks for
                index["missing"] += failures
                write_json(place / "index.json", index)  # before its row
                whole = torch.zeros(len(indices), 3, *index["size"], dtype=torch.uint8)
                if read is not None:
                    whole[~np.isin(indices, [failure[0] for failure in failures])] = read
            assert whole is not None
            for name, values in _stored(target, whole, first, index["forms"]).items():
                files[name].write(values.cpu().contiguous().numpy().data)
                files[name].flush()  # a kill then costs no more than this batch
            bar.update(len(indices))
    if len(index["missing"]) == len(images):
        raise SourceError(f"none of the {len(images)} images can be read")
    write_json(place / "index.json", index | {"status": "complete"})


def _stored(target: Recordable, images: Tensor, first: Recorded, forms: Mapping[str, Any]) -> dict[str, Tensor]:
    """{name of a part: (B, …)} of a batch.

    Raises BacksightError for what a store does not keep: padding, numbers that are not finite, and a form or a
    positional code that changes with the image.
    """
    unit = unit_floats(images)
    stored = {"images": images if images.dtype == torch.uint8 else unit}
    for tap, representation in target.record(unit, tuple(forms)).items():
        position, known = _position(representation), _position(first[tap])
        alike = position is None or known is None or torch.allclose(position, known, rtol=1e-5, atol=1e-6)
        if _form(representation) != forms[tap] or not alike:
            raise BacksightError(
                f"{target.name} gives representations of several forms, or padded ones, at {tap}, which one store "
                "cannot hold: leave this tap out."
            )
        for part in forms[tap]["parts"]:
            values = getattr(representation, part).float().cpu()
            if not values.isfinite().all():
                raise BacksightError(f"The features of {target.name} at {tap} are not finite: look at its weights.")
            stored[f"{tap}/{part}"], stored[f"{tap}/{part}/scale"] = halved(values)
    return stored


def halved(values: Tensor) -> tuple[Tensor, Tensor]:
    """(B, …) as float16 and a power of two for each image, (B,), whose product is the values again.

    The largest number of an image comes to lie in [2^14, 2^15): none overflows, and what is less than 2^-28 of it
    begins to lose digits.
    """
    exponent = torch.frexp(values.flatten(1).abs().amax(1)).exponent.clamp(min=-100) - 15
    scale = torch.ldexp(torch.ones(len(values)), exponent)
    return _scaled(values.clone(), 1 / scale).half(), scale


def _scaled(values: Tensor, scale: Tensor) -> Tensor:
    """Each image's numbers times its own, in place."""
    return values.mul_(scale.view(-1, *[1] * (values.ndim - 1)))


def _form(representation: Representation) -> dict[str, Any]:
    """All of a representation but its numbers and its context; parts: {name: shape of one image's numbers}."""
    named = {entry.name: getattr(representation, entry.name) for entry in fields(representation)}
    settings = {name: value for name, value in named.items() if isinstance(value, int | str | tuple)}
    return {
        "kind": type(representation).__name__,
        "parts": {n: list(v.shape[1:]) for n, v in named.items() if isinstance(v, Tensor) and n != "position"},
        "positioned": named.get("position") is not None,
        "settings": json.loads(json.dumps(settings)),  # as they come back from the index
    }


def _position(representation: Representation) -> Tensor | None:
    """(1, N, C): the positional code, the same for all images."""
    code = getattr(representation, "position", None)
    return None if code is None else code[:1].float().cpu().contiguous()


def outdated_stores() -> list[Path]:
    """The stores in the cache that this version does not read, as `backsight doctor` tells them."""
    indices = sorted((cache_folder() / "features").glob("*/index.json"))
    return [path.parent for path in indices if (read_json(path) or {}).get("format") != FORMAT]


def _file(part: str) -> str:
    return part.replace("/", "-") + ".bin"


def _row_bytes(part: Part) -> int:
    return np.dtype(part[0]).itemsize * math.prod(part[1])


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def images_digest(images: ImageSource | Tensor) -> str:
    """A digest of which images these are: of a tensor its bytes, of a source its files' ids, sizes and times."""
    digest = hashlib.sha256()
    if isinstance(images, Tensor):
        digest.update(f"{tuple(images.shape)} {images.dtype}".encode())
        for piece in images.split(64):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()
    digest.update(repr([images.name, images.split, images.size, images.interpolation, images.crop_fraction]).encode())

    @cache  # a tar shard is looked at once, however many images it holds
    def state(file: Path) -> tuple[int, int]:
        return (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else (-1, -1)

    for entry in images.entries:
        file = Path(entry.path if entry.member is None else entry.member.shard)
        digest.update(repr((entry.id, *state(file))).encode())
    return digest.hexdigest()
