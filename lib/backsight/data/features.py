"""The feature store: what a frozen target makes of the images, recorded once on disk and read as often as needed.

    images ──► target ──► taps ──► float16 and one scale an image ──► shard-00000.safetensors, shard-00001 …
                                                                       index.json, "complete" at the end
    store.passes(…) ◄── float32 ◄── rows of the mapped shards, read ahead in a thread

A store's folder is named by a key of what decides about a representation (weights, preprocessing, taps, images), so
that every run finds it again. Each shard holds the images of one range of indices: a recording that was killed goes on
at the first shard that is not whole, and ends in the same bytes. To free the space, delete the folder.
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
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import ImageError, ImageSource, batches, index_batches, paying_workers, read_batches
from backsight.errors import BacksightError, SourceError
from backsight.project import cache_folder, read_json, shown, write_atomically, write_json
from backsight.representation import Predictions, Queries, Representation, Tokens

FORMAT = 2  # part of the key: raise it whenever shards are written, or representations made, in another way
SHARD_BYTES = 256 * 2**20
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Tokens, Queries, Predictions)}
Recorded = dict[str, Representation]
Index = dict[str, Any]  # what index.json holds


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
    and is left out of every batch. taps: in forward order; errors: {tap: relative RMS error of half precision}; bytes:
    of all shards. Raises BacksightError where the folder holds no complete store, or on reading a damaged shard.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index = read_json(self.folder / "index.json")
        if index is None or index.get("status") != "complete" or index.get("format") != FORMAT:
            raise BacksightError(
                f"{shown(self.folder)} holds no complete feature store of this version: call record_features with the "
                "same arguments again; it goes on from the last whole shard."
            )
        self.name, self.split, self.size = index["name"], index["split"], tuple(index["size"])
        self.target, self.weights_hash, self.errors = index["target"], index["weights_hash"], index["errors"]
        self._forms: dict[str, dict[str, Any]] = index["forms"]
        self.taps = tuple(self._forms)
        self._shards, self._shard_images = index["shards"], index["shard_images"]
        self.bytes = sum(shard["bytes"] for shard in self._shards)
        self._missing = {i: (path, reason) for shard in self._shards for i, path, reason in shard["missing"]}
        self.skipped = list(self._missing.values())
        self._own = np.arange(index["images"])  # the images of this view of the store
        self._open: dict[int, dict[str, np.ndarray]] = {}

    def __repr__(self) -> str:
        return f"FeatureStore({self.target}, {len(self.taps)} taps, {len(self)} images, {shown(self.folder)})"

    def __len__(self) -> int:
        return len(self._own)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # another process maps the shards for itself

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
        wanted = readable if steps is None else islice(readable, max(0, steps - start))
        with ThreadPoolExecutor(1, "read ahead") as reader:
            waiting = None
            for chosen in wanted:
                following = reader.submit(self._rows, chosen, taps)
                if waiting is not None:
                    yield self._widened(waiting.result(), taps)
                waiting = following
            if waiting is not None:
                yield self._widened(waiting.result(), taps)

    def _known(self, taps: Sequence[str] | None) -> Sequence[str]:
        if unknown := set(taps or ()) - set(self.taps):
            raise BacksightError(f"{shown(self.folder)} has no tap {min(unknown)!r}; it has {', '.join(self.taps)}.")
        return self.taps if taps is None else taps

    def _rows(self, indices: Sequence[int] | np.ndarray, taps: Sequence[str]) -> dict[str, np.ndarray]:
        """The images' rows of the shards, by numpy: torch's threads would take the cores that the training needs."""
        places = np.array([i for i in self._own[np.asarray(indices, dtype=int)].tolist() if i not in self._missing])
        if not len(places):
            raise BacksightError(f"None of the {len(indices)} images asked for is in {shown(self.folder)}.")
        names = [f"{tap}/{part}" for tap in taps for part in self._forms[tap]["parts"]]
        numbers, rows = places // self._shard_images, places % self._shard_images
        shards = {number: np.flatnonzero(numbers == number) for number in np.unique(numbers).tolist()}
        order = np.argsort(np.concatenate(list(shards.values())))

        def gathered(name: str) -> np.ndarray:
            pieces = [self._shard(number)[name][rows[which]] for number, which in shards.items()]
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)[order]

        return {name: gathered(name) for name in ("images", *names, *(f"{name}/scale" for name in names))}

    def _widened(self, rows: Mapping[str, np.ndarray], taps: Sequence[str]) -> tuple[Tensor, Recorded]:
        tensors = {name: torch.from_numpy(values).float() for name, values in rows.items()}
        images = tensors["images"]
        recorded: Recorded = {}
        for tap in taps:
            form = self._forms[tap]
            parts = {part: _scaled(tensors[f"{tap}/{part}"], tensors[f"{tap}/{part}/scale"]) for part in form["parts"]}
            if form["positioned"]:
                position = next(iter(self._open.values()))[f"{tap}/position"]
                parts["position"] = torch.from_numpy(position.copy())
            recorded[tap] = KINDS[form["kind"]](**parts, **_tuples(form["settings"]))
        return images.div_(255) if rows["images"].dtype == np.uint8 else images, recorded

    def _shard(self, number: int) -> dict[str, np.ndarray]:
        """The shard's arrays, mapped: what is read of them comes from the disk, or from the system's cache of it."""
        if number not in self._open:
            path, size = self.folder / self._shards[number]["file"], self._shards[number]["bytes"]
            try:
                if _size(path) != size:
                    raise OSError(f"{max(_size(path), 0)} of {size} bytes")
                with safe_open(path, framework="pt") as file:
                    self._open[number] = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise BacksightError(
                    f"The shard {shown(path)} of a feature store is missing or damaged ({error}): delete this file, "
                    "and record_features records it again."
                ) from error
        return self._open[number]


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
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> FeatureStore:
    """Record what the target makes of the images, or find it where it was recorded before.

    images: an ImageSource, or (N, 3, H, W) uint8 or float in [0, 1]; they are kept beside the features. taps: as
    `load_target` takes them, default the target's own. folder: of the stores, default "features" in the cache folder;
    each store has a folder of its own there. Numbers are kept to 11 binary digits of their own, `store.errors` says
    what that costs; contexts (a detector's memory) are not kept. shard_bytes: of one file; recording holds about twice
    as many in memory.

    A recording that was killed, or whose disk was full, goes on from its last whole shard; one that another process is
    writing is waited for. Raises StoreError where the disk is too small, before anything is written, or the folder
    cannot be written; BacksightError on features that are not finite or not of one form; SourceError without images.
    """
    taps = target.taps if taps is None else target.resolve_taps(taps)
    first = target.record(next(batches(images, 1)), taps)
    index = _index(target, images, first, batch_size, shard_bytes)
    identity = [
        FORMAT,
        target.name,
        target.weights_hash,
        asdict(target.preprocessing),
        index["forms"],
        images_digest(images),
    ]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    name = "-".join(filter(None, (target.name, index["name"], index["split"], key)))
    place = Path(folder or cache_folder() / "features") / re.sub(r"[^\w.-]+", "-", name)
    try:
        existing = next(parent for parent in (place, *place.parents) if parent.exists())
        if (size := index["row_bytes"] * len(images)) > (
            free := shutil.disk_usage(existing).free
        ) and existing != place:
            raise OSError(f"it takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} are free")
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / ".lock"):
            index = read_json(place / "index.json") or index
            whole = [shard for shard in index["shards"] if _size(place / shard["file"]) == shard["bytes"]]
            if index["status"] != "complete" or len(whole) < len(index["shards"]):
                _record(
                    target, images, place, index | {"status": "recording", "shards": whole}, first, batch_size, progress
                )
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"The feature store {shown(place)} cannot be written ({error}): make space, or set BACKSIGHT_CACHE to "
            "another folder; the next call goes on from there."
        ) from error
    store = FeatureStore(place)
    _, kept = store.read(next([i] for i in range(len(store)) if i not in store._missing))
    for tap, representation in first.items():  # what is in no key, as a user's code, shows in the first image
        values = representation.values.float().cpu()
        if (kept[tap].values - values).norm() > 0.01 * values.norm():
            raise BacksightError(
                f"{target.name} gives other features at {tap} than when {shown(place)} was recorded, with the same "
                "weights: its code or its settings have changed; delete this folder."
            )
    return store


def _index(
    target: Recordable, images: ImageSource | Tensor, first: Recorded, batch_size: int, shard_bytes: int
) -> Index:
    """Of a store without shards; shard_images: whole batches, where there is room for one."""
    forms = {tap: _form(representation) for tap, representation in first.items()}
    source = None if isinstance(images, Tensor) else images
    size = images.shape[2:] if isinstance(images, Tensor) else images.size
    numbers = sum(math.prod(shape) for form in forms.values() for shape in form["parts"].values())
    row_bytes = 2 * numbers + 3 * math.prod(size) * (images.element_size() if isinstance(images, Tensor) else 1)
    count = max(1, shard_bytes // row_bytes)
    return {
        "format": FORMAT,
        "status": "recording",
        "target": target.name,
        "weights_hash": target.weights_hash,
        "name": source and source.name,
        "split": source and source.split,
        "size": list(size),
        "images": len(images),
        "row_bytes": row_bytes,
        "shard_images": count - count % batch_size if count > batch_size else count,
        "forms": forms,
        "shards": [],
    }


def _record(
    target: Recordable,
    images: ImageSource | Tensor,
    place: Path,
    index: Index,
    first: Recorded,
    batch_size: int,
    progress: bool,
) -> None:
    """Write the shards that are not there, and then the index as complete."""
    for stray in place.glob(".[!l]*"):  # of a process that was killed as it wrote; .lock stays
        stray.unlink()
    done = {shard["file"]: shard for shard in index["shards"]}
    number, size = len(images), index["shard_images"]
    starts = {f"shard-{start // size:05}.safetensors": start for start in range(0, number, size)}
    lists = {
        file: np.split(own := np.arange(start, min(start + size, number)), range(batch_size, len(own), batch_size))
        for file, start in starts.items()
        if file not in done
    }
    wanted = [indices for parts in lists.values() for indices in parts]
    left = sum(map(len, wanted))
    stream = read_batches(images, wanted, paying_workers(left))
    with tqdm(total=left, desc=f"features of {target.name}", unit="image", leave=False, disable=not progress) as bar:
        for file, parts in lists.items():
            shard: Index = {"file": file, "missing": [], "lost": {}}
            pieces = []
            for indices in parts:
                read, failures = next(stream)
                shard["missing"] += failures
                if failures:  # an image that could not be read is a black one, which nobody asks for
                    whole = torch.zeros(len(indices), 3, *index["size"], dtype=torch.uint8)
                    if read is not None:
                        whole[~np.isin(indices, [failure[0] for failure in failures])] = read
                    read = whole
                pieces.append(_stored(target, read, first, index["forms"], shard["lost"]))
                bar.update(len(indices))
            tensors = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
            tensors |= {f"{tap}/position": code for tap, each in first.items() if (code := _position(each)) is not None}
            write_atomically(place / file, lambda path, tensors=tensors: _save(tensors, path))
            done[file] = shard | {"bytes": _size(place / file)}
            index["shards"] = [done[each] for each in sorted(done)]
            write_json(place / "index.json", index)
    if sum(len(shard["missing"]) for shard in index["shards"]) == number:
        raise SourceError(f"none of the {number} images can be read")
    sums = {tap: np.sum([shard["lost"][tap] for shard in index["shards"]], axis=0) for tap in index["forms"]}
    errors = {tap: math.sqrt(lost / max(whole, 1e-300)) for tap, (lost, whole) in sums.items()}
    write_json(place / "index.json", index | {"status": "complete", "errors": errors})


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read


def _stored(
    target: Recordable, images: Tensor | None, first: Recorded, forms: Mapping[str, Any], lost: dict[str, list[float]]
) -> dict[str, Tensor]:
    """{name in a shard: (B, …)} of a batch; to lost, {tap: [squared error, squared norm]}, it adds its own.

    Raises BacksightError for what a store does not keep: padding, numbers that are not finite, and a form or a
    positional code that changes with the image.
    """
    assert images is not None
    stored = {"images": images}
    unit = images.float().div(255) if images.dtype == torch.uint8 else images.float()
    for tap, representation in target.record(unit, tuple(forms)).items():
        position, known = _position(representation), _position(first[tap])
        alike = position is None or known is None or torch.allclose(position, known, rtol=1e-5, atol=1e-6)
        if _form(representation) != forms[tap] or not alike:
            raise BacksightError(
                f"{target.name} gives representations of several forms, or padded ones, at {tap}, which one store "
                "cannot hold: leave this tap out."
            )
        for part in forms[tap]["parts"]:
            values = getattr(representation, part).float().cpu().contiguous()
            norm = values.double().square().sum().item()
            if not math.isfinite(norm):
                raise BacksightError(f"The features of {target.name} at {tap} are not finite: look at its weights.")
            halves, scale = halved(values)
            stored |= {f"{tap}/{part}": halves, f"{tap}/{part}/scale": scale}
            error = (_scaled(halves.float(), scale) - values).double().square().sum().item()
            before = lost.get(tap, (0.0, 0.0))
            lost[tap] = [before[0] + error, before[1] + norm]
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
    settings = {
        name: value for name, value in named.items() if name != "context" and isinstance(value, int | str | tuple)
    }
    return {
        "kind": type(representation).__name__,
        "parts": {n: list(v.shape[1:]) for n, v in named.items() if isinstance(v, Tensor) and n != "position"},
        "positioned": named.get("position") is not None,
        "settings": json.loads(json.dumps(settings)),  # as they come back from the index
    }


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of lists, which JSON makes of tuples, as tuples again."""
    return {name: tuple(map(tuple, value)) if isinstance(value, list) else value for name, value in settings.items()}


def _position(representation: Representation) -> Tensor | None:
    """(1, N, C): the positional code, the same for all images."""
    code = getattr(representation, "position", None)
    return None if code is None else code[:1].float().cpu().contiguous()


def outdated_stores() -> list[Path]:
    """The stores in the cache that this version does not read, as `backsight doctor` tells them."""
    indices = sorted((cache_folder() / "features").glob("*/index.json"))
    return [path.parent for path in indices if (read_json(path) or {}).get("format") != FORMAT]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def images_digest(images: ImageSource | Tensor) -> str:
    """A digest of which images these are: of a tensor its bytes, of a source its files' ids, sizes and times."""
    digest = hashlib.sha256()
    if isinstance(images, Tensor):
        digest.update(f"{tuple(images.shape)} {images.dtype}".encode())
        for piece in images.split(64):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()
    digest.update(repr([images.name, images.split, images.size, images.interpolation, images.crop_fraction]).encode())
    states: dict[str, tuple[int, int]] = {}  # of a tar shard once, however many images it holds
    for entry in images.entries:
        file = entry.path if entry.member is None else entry.member.shard
        if file not in states:
            state = Path(file).stat() if Path(file).is_file() else None
            states[file] = (state.st_size, state.st_mtime_ns) if state else (-1, -1)
        digest.update(repr((entry.id, *states[file])).encode())
    return digest.hexdigest()
