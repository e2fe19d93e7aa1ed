"""The feature store: what a frozen target makes of the images, recorded once on disk and read as often as needed.

    images ──► target ──► taps ──► float16 ──► rows.bin: a row an image, with all it holds
    store.passes(…) ◄── float32 ◄── rows of the mapped file, read ahead in a thread

A store's folder is named by a key of what decides about a representation (weights, preprocessing, taps, images), so
that every run finds it again. Rows are only ever appended. To free the space, delete the folder.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import ImageSource, batches, index_batches, read_batches, unit_floats
from backsight.errors import BacksightError
from backsight.project import cache_folder, read_json, shown, write_json
from backsight.representation import Representation

FORMAT = 5  # part of the key: raise it whenever files are written, or representations made, in another way
Recorded = dict[str, Representation]


class Recordable(Protocol):
    """What is asked of a target."""

    name: str
    taps: tuple[str, ...]
    preprocessing: Any

    @property
    def weights_hash(self) -> str: ...
    def resolve_taps(self, taps: str | Sequence[str]) -> tuple[str, ...]: ...
    def record(self, images: Tensor, taps: Any = None) -> Recorded: ...


@dataclass(eq=False)
class FeatureStore:
    """A complete store, as `record_features` gives it.

    It stands where an ImageSource does (name, split, len, image(i), subset): `batches(store, …)` gives the images
    it was recorded from, but for those that could not be read (skipped: [(path, reason)]). row: columns of the file,
    images: its rows, own: those of this view; first: what the taps hold of one image; errors: {tap: relative RMS error
    of half precision}, of the first image.
    Raises BacksightError on reading a damaged file.
    """

    folder: Path
    name: str | None
    split: str | None
    images: int
    target: str
    weights_hash: str
    row: np.dtype
    first: Recorded
    own: np.ndarray
    skipped: list[tuple[str, str]]
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(self.first)

    def __len__(self) -> int:
        return len(self.own)

    def subset(self, which: slice | np.ndarray) -> FeatureStore:
        """These images of the store, in this order; nothing is copied."""
        part = copy.copy(self)
        part.own = self.own[which]
        return part

    def check(self, target: Recordable) -> None:
        """Raise BacksightError where these are not the target's features."""
        if target.weights_hash != self.weights_hash:
            raise BacksightError(
                f"The feature store {shown(self.folder)} holds features of {self.target} with the weights "
                f"{self.weights_hash}, not of {target.name} with {target.weights_hash}: record them anew."
            )

    def image(self, index: int) -> Tensor:
        """(3, H, W) as it was given, uint8 or float32."""
        return torch.from_numpy(np.array(self._file["images"][self.own[index]]))

    def read(self, indices: Sequence[int] | np.ndarray, taps: Sequence[str] | None = None) -> tuple[Tensor, Recorded]:
        """Images (B, 3, H, W) float32 in [0, 1] and {tap: representation}, float32, both on the CPU; taps: default all.

        Raises BacksightError on a tap that is not there.
        """
        return self._widened(self._rows(indices, taps))

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
        stream = index_batches(len(self), batch_size, shuffle_seed, endless=steps is not None, start=start)
        with ThreadPoolExecutor(1) as reader:
            left = islice(stream, None if steps is None else max(0, steps - start))
            reading = (reader.submit(self._rows, chosen, taps) for chosen in left)
            for rows, _ in pairwise(chain(reading, [None])):  # the pair is there when its second is submitted
                yield self._widened(rows.result())  # type: ignore[union-attr]

    def _rows(self, indices: Sequence[int] | np.ndarray, taps: Sequence[str] | None) -> dict[str, np.ndarray]:
        """{column: rows}, by numpy: torch's threads would take the cores that the training needs."""
        wanted = {"images", *(self.taps if taps is None else taps)}
        if unknown := wanted - {"images", *self.taps}:
            raise BacksightError(f"{shown(self.folder)} has no tap {min(unknown)!r}; it has {', '.join(self.taps)}.")
        names = [name for name in self.row.names or () if name.partition("/")[0] in wanted]
        return {name: self._file[name][self.own[indices]] for name in names}

    def _widened(self, rows: dict[str, np.ndarray]) -> tuple[Tensor, Recorded]:
        parts: dict[str, dict[str, Any]] = {tap: {} for tap in self.taps}
        for name, values in rows.items():
            if name != "images":
                tap, _, part = name.partition("/")
                parts[tap][part] = torch.from_numpy(values).float()
        recorded = {tap: replace(self.first[tap], **named) for tap, named in parts.items() if named}
        return unit_floats(torch.from_numpy(rows["images"])), recorded

    @cached_property
    def _file(self) -> np.ndarray:
        """What is read of it comes from the disk, or from the system's cache of it."""
        path = self.folder / "rows.bin"
        try:
            return np.asarray(np.memmap(path, self.row, "r", shape=(self.images,)))
        except (OSError, ValueError) as error:  # gone, or too short
            raise BacksightError(
                f"The file {shown(path)} of a feature store is missing or damaged ({error}): call record_features "
                "again, which mends it."
            ) from error


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
    each store has a folder of its own there. Numbers are kept in half precision, `store.errors` says what that costs;
    contexts (a detector's memory) are not kept.

    A recording that was killed, or whose disk was full, goes on from its last whole batch and ends in the same bytes;
    one that another process is writing is waited for. Raises BacksightError where the disk is too small, before
    anything is written, or the folder cannot be written, and on features that are not finite, padded or of several
    forms; SourceError without images.
    """
    taps = target.taps if taps is None else target.resolve_taps(taps)
    image = next(batches(images, 1, raw=True))
    first = {tap: _kept(held) for tap, held in target.record(unit_floats(image), taps).items()}
    columns: list[Any] = [("images", image.numpy().dtype.name, tuple(image.shape[1:]))]
    for tap, held in first.items():
        columns += [(f"{tap}/{part}", "float16", values.shape[1:]) for part, values in _parts(held).items()]
    row = np.dtype(columns)
    identity = [FORMAT, target.name, target.weights_hash, asdict(target.preprocessing), str(row)]
    identity += [repr(held.form) for held in first.values()] + [images_digest(images)]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    name, split = (None, None) if isinstance(images, Tensor) else (images.name, images.split)
    label = re.sub(r"[^\w.-]+", "-", "-".join(filter(None, (target.name, name, split, key))))
    place = Path(folder or cache_folder() / "features") / label
    needed = len(images) * row.itemsize
    try:
        existing = next(parent for parent in (place, *place.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        if needed > free and existing != place:
            raise OSError(f"it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free")
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / ".lock"):
            missing = _complete(place, row, first, target, images, batch_size, progress)
    except OSError as error:
        raise BacksightError(
            f"The feature store {shown(place)} cannot be written ({error}): make space, or set BACKSIGHT_CACHE to "
            "another folder; the next call goes on from there."
        ) from error
    own, skipped = np.delete(np.arange(len(images)), [n for n, *_ in missing]), [(p, why) for _, p, why in missing]
    store = FeatureStore(place, name, split, len(images), target.name, target.weights_hash, row, first, own, skipped)
    for tap, held in store.read([0])[1].items():  # what is in no key, as a user's code, shows in the first image
        values = first[tap].values
        store.errors[tap] = float((held.values - values).norm() / values.norm().clamp(min=1e-30))
        if store.errors[tap] > 0.01:
            raise BacksightError(
                f"{target.name} gives other features at {tap} than when {shown(place)} was recorded, with the same "
                "weights: its code or its settings have changed; delete this folder."
            )
    return store


def _complete(
    folder: Path,
    row: np.dtype,
    first: Recorded,
    target: Recordable,
    images: ImageSource | Tensor,
    batch_size: int,
    progress: bool,
) -> list[Any]:
    """Append the rows that are missing, in the same batches; [(row, path, reason)] of images that cannot be read."""
    path, number = folder / "rows.bin", len(images)
    index = read_json(folder / "index.json") or {}
    start = min(path.stat().st_size // row.itemsize, number) if index and path.is_file() else 0
    if index.get("status") == "complete" and start == number:
        return index["missing"]
    start -= start % batch_size if start < number else 0
    missing = [failure for failure in index.get("missing", ()) if failure[0] < start]
    index = {"format": FORMAT, "status": "recording", "target": target.name, "missing": missing}
    left = list(index_batches(number, batch_size, None, endless=False, start=-(-start // batch_size)))
    stream = read_batches(images, left, number - start)
    with (
        open(path, "ab") as file,
        tqdm(total=number - start, desc=f"features of {target.name}", leave=False, disable=not progress) as bar,
    ):
        file.truncate(start * row.itemsize)
        write_json(folder / "index.json", index)
        for indices, (read, failures) in zip(left, stream, strict=True):
            rows = np.zeros(len(indices), row)
            if failures:
                missing += [[place, failure.path, failure.reason] for place, failure in failures.items()]
                write_json(folder / "index.json", index)  # before the row that each has all the same
            if read is not None:
                readable = ~np.isin(indices, [*failures])
                rows["images"][readable] = read
                for tap, held in target.record(unit_floats(read), tuple(first)).items():
                    for part, values in _parts(_kept(held, first[tap], f"of {target.name} at {tap}")).items():
                        rows[f"{tap}/{part}"][readable] = values.half()
            file.write(rows.tobytes())
            file.flush()  # a kill then costs no more than this batch
            bar.update(len(indices))
    write_json(folder / "index.json", index | {"status": "complete"})
    return missing


def _kept(representation: Representation, first: Representation | None = None, where: str = "") -> Representation:
    """Float32 on the CPU, without context, with one positional code for all images; all of one form."""
    held: Any = representation.plain().to("cpu", torch.float32)
    if getattr(held, "padding", None) is not None:
        raise BacksightError("One store cannot hold padded representations: leave their taps out.")
    if getattr(held, "position", None) is not None:
        held = replace(held, position=held.position[:1].contiguous())
    if first is not None:
        code, known = (getattr(x, "position", None) for x in (held, first))
        alike = code is None or known is None or torch.allclose(code, known, rtol=1e-5, atol=1e-6)
        if held.form != first.form or not alike:
            raise BacksightError(
                f"Representations of several forms, {where}: one store cannot hold them, leave this tap out."
            )
        if not all(values.half().isfinite().all() for values in _parts(held).values()):
            raise BacksightError(f"The features {where} are not finite in half precision.")
    return held


def _parts(representation: Representation) -> dict[str, Tensor]:
    """Its numbers, (B, …) each."""
    named = {entry.name: getattr(representation, entry.name) for entry in fields(representation)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor) and name != "position"}


def images_digest(images: ImageSource | FeatureStore | Tensor) -> str:
    """A digest of which images these are: of a tensor its bytes, of a source its files' ids, sizes and times."""
    digest = hashlib.sha256()
    if isinstance(images, Tensor):
        digest.update(f"{tuple(images.shape)} {images.dtype}".encode())
        for piece in images.split(64):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
    elif isinstance(images, FeatureStore):
        digest.update(images.folder.name.encode() + images.own.tobytes())
    else:
        how = [images.name, images.split, images.size, images.interpolation, images.crop_fraction]
        digest.update(repr(how).encode())

        @cache  # a tar shard is looked at once, however many images it holds
        def state(file: Path) -> tuple[int, int]:
            return (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else (-1, -1)

        for entry in images.entries:
            file = Path(entry.path if entry.member is None else entry.member.shard)
            digest.update(repr((entry.id, *state(file))).encode())
    return digest.hexdigest()
