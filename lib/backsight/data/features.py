"""The feature store: what a frozen target makes of the images, recorded once on disk and read as often as needed.

    images ──► target ──► taps ──► float16 and one scale an image ──► shard-00000.safetensors, shard-00001 …
                                                                       index.json, "complete" at the end
    store.passes(…) ◄── float32 ◄── rows of the mapped shards, read ahead in a thread

A store's folder is named by a key of everything that decides about a representation (weights, preprocessing, taps,
data, precision, code, versions), so that it is found again by every run that needs the same one, and never taken for
another. Each shard holds the images of one range of indices: a recording that was killed goes on at the first shard
that is not whole, and ends in the same bytes. To free the space, delete the folder.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import math
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import ImageError, ImageSource, SourceError, batches, index_batches
from backsight.errors import BacksightError
from backsight.project import available_cores, cache_folder, read_json, shown, write_atomically, write_json
from backsight.representation import Predictions, Queries, Representation, Tokens
from backsight.targets.base import Target

Precision = Literal["float16", "float32"]
Recorded = dict[str, Representation]

FORMAT = 1  # part of the key: raise it whenever shards are written in another way
INDEX, LOCK = "index.json", ".lock"
IMAGES = "images"  # the images' own name in a shard
SHARD_BYTES = 256 * 2**20
SPARED = 0.1  # share of the free disk that is left to others
HEADER = 4096  # bytes of a shard's header, about
KEY_PACKAGES = ("torch", "timm", "transformers", "pillow")


class StoreError(BacksightError):
    """A store that cannot be written here, for lack of space or of permission; recomputing still works."""


@dataclass(frozen=True)
class StoreEstimate:
    """How large a store will be.

    images: how many; bytes: of the whole store; free: on its disk, what the store holds already among them; limit:
    bytes that it may take, at most nine tenths of `free`; folder: where.
    """

    images: int
    bytes: int
    free: int
    limit: int
    folder: Path

    @property
    def fits(self) -> bool:
        return self.bytes <= self.limit

    def __str__(self) -> str:
        return (
            f"features of {self.images} images: {_in_words(self.bytes)} in {shown(self.folder)}, where "
            f"{_in_words(self.free)} are free and {_in_words(self.limit)} may be used"
        )


def _in_words(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


# -------------------------------------------------------------------------------------- what is kept of a tap


@dataclass(frozen=True)
class _Form:
    """All of a representation but its numbers; parts: {name: shape of one image's numbers}."""

    kind: Literal["tokens", "queries", "predictions"]
    parts: Mapping[str, list[int]]
    grids: list[list[int]] = field(default_factory=list)
    prefix: int = 0
    activation: Literal["softmax", "sigmoid"] = "softmax"
    positioned: bool = False

    @classmethod
    def of(cls, representation: Representation) -> _Form:
        parts = {name: list(values.shape[1:]) for name, values in _parts(representation).items()}
        if isinstance(representation, Tokens):
            grids = [list(grid) for grid in representation.grids]
            positioned = representation.position is not None
            return cls("tokens", parts, grids, representation.prefix, positioned=positioned)
        if isinstance(representation, Queries):
            return cls("queries", parts)
        return cls("predictions", parts, activation=representation.activation)

    def representation(self, parts: Mapping[str, Tensor], position: Tensor | None) -> Representation:
        if self.kind == "tokens":
            grids = tuple((height, width) for height, width in self.grids)
            return Tokens(parts["values"], grids, self.prefix, None, position)
        if self.kind == "queries":
            return Queries(parts["values"])
        return Predictions(parts["logits"], parts["boxes"], self.activation, parts.get("masks"))


def _parts(representation: Representation) -> dict[str, Tensor]:
    if not isinstance(representation, Predictions):
        return {"values": representation.values}
    parts = {"logits": representation.logits, "boxes": representation.boxes}
    return parts if representation.masks is None else parts | {"masks": representation.masks}


def _halved(values: Tensor) -> tuple[Tensor, Tensor]:
    """(B, …) as float16 and a power of two for each image, (B,), whose product is the values again.

    The largest number of an image comes to lie in [2^14, 2^15): none overflows, and what is less than 2^-28 of it
    begins to lose digits.
    """
    largest = torch.linalg.vector_norm(values.flatten(1), ord=math.inf, dim=1)
    exponent = torch.frexp(largest).exponent.clamp(min=-100) - 15
    scale = _power_of_two(exponent)
    return (values * _as_column(_power_of_two(-exponent), values)).half(), scale


def _power_of_two(exponent: Tensor) -> Tensor:
    """Exact on every device, as torch.ldexp need not be: float32 with this exponent (int32) and no fraction."""
    return (exponent + 127 << 23).view(torch.float32)


def _as_column(scale: Tensor, values: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (values.ndim - 1))


def _unhalved(halves: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float16 (B, …) times (B,) as float32, exact.

    The bits of a half, moved to where float32 has sign, exponent and fraction, are the number times 2^-112. That is
    six times as fast as numpy's conversion; torch's would fight the training for its threads.
    """
    bits = halves.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70002000)  # 0x8fffe000: the sign that the shift has repeated counts once
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)
    values *= scale.reshape(-1, *[1] * (values.ndim - 1))
    return values


# --------------------------------------------------------------------------------------------------- the store


class FeatureStore:
    """A complete store; made by `record_features`, or opened by its folder.

    It stands where an ImageSource does: name, split, size, fit, skipped, len(store), store.image(i), so that
    `data.batches(store, …)` gives the batches of the images it was recorded from. An image that could not be read
    keeps its index, as in its source, and is left out of every batch. name, split, fit: None for a tensor of images.

    taps: in forward order; folder; weights_hash: of the target; errors: {tap: relative RMS error of the stored
    precision}; bytes: of all shards. A shard's checksum is verified when a process first reads it.
    Raises BacksightError where the folder holds no complete store, and on reading a shard that is missing or damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index = read_json(self.folder / INDEX)
        if index is None or index.get("status") != "complete" or index.get("format") != FORMAT:
            raise BacksightError(
                f"{shown(self.folder)} holds no complete feature store: call record_features with the same "
                "arguments again, it goes on from the last whole shard."
            )
        self.name: str | None = index["name"]
        self.split: str | None = index["split"]
        self.fit: str | None = index["fit"]
        self.size: tuple[int, int] = (index["size"][0], index["size"][1])
        self.target: str = index["target"]
        self.weights_hash: str = index["weights_hash"]
        self.dtype: Precision = index["dtype"]
        self.errors: dict[str, float] = index["errors"]
        self._forms = {tap: _Form(**form) for tap, form in index["forms"].items()}
        self.taps = tuple(self._forms)
        self._length: int = index["images"]
        self._shard_images: int = index["shard_images"]
        self._shards: list[dict[str, Any]] = index["shards"]
        self._skipped = {path: reason for path, reason in index["skipped"]}
        self._open: dict[int, dict[str, np.ndarray]] = {}
        self._own = np.arange(self._length)  # the images of this view of the store

    def __repr__(self) -> str:
        return (
            f"FeatureStore({self.target}, {len(self.taps)} taps, {len(self)} images, {self.dtype}, "
            f"{_in_words(self.bytes)} in {shown(self.folder)})"
        )

    def __len__(self) -> int:
        return len(self._own)

    def subset(self, which: slice | np.ndarray) -> FeatureStore:
        """These images of the store, in this order; nothing is copied."""
        part = copy.copy(self)
        part._own = self._own[which]
        return part

    def drawn(self, count: int, seed: int) -> FeatureStore:
        """`count` images, the first that a stream shuffled by the seed shows."""
        return self.subset(next(index_batches(len(self), count, seed, endless=True, start=0)))

    def check(self, target: Target) -> None:
        """Raise BacksightError where these are not the target's features."""
        if target.weights_hash != self.weights_hash:
            raise BacksightError(
                f"The feature store {shown(self.folder)} holds features of {self.target} with the weights "
                f"{self.weights_hash}, not of {target.name} with {target.weights_hash}: record them anew."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # another process maps the shards for itself

    @property
    def bytes(self) -> int:
        return sum(shard["bytes"] for shard in self._shards)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """[(path, reason)] of the images that could not be read."""
        return list(self._skipped.items())

    def skip(self, failures: Sequence[tuple[str, str]]) -> None:
        """As of an ImageSource; the store knows them from the recording."""
        self._skipped.update(failures)

    def image(self, index: int) -> Tensor:
        """(3, H, W), uint8, or float32 where the store was recorded from a tensor of floats.

        Raises ImageError for one that could not be read.
        """
        number, row = self._place(index)
        if row < 0:
            raise ImageError(*self._failures[int(self._own[index])])
        return torch.from_numpy(self._shard(number)[IMAGES][row].copy())

    def read(self, indices: Sequence[int] | np.ndarray, taps: Sequence[str] | None = None) -> tuple[Tensor, Recorded]:
        """Images (B, 3, H, W) float32 in [0, 1] and {tap: representation}, float32, both on the CPU.

        indices: of images, in any order; those that could not be read are left out. taps: of the store, default all.
        Raises BacksightError on an index or tap that is not there, where none of the images could be read, and for a
        shard that is missing or damaged.
        """
        chosen = self._chosen(taps)
        places = [self._place(int(index)) for index in indices]
        places = [(number, row) for number, row in places if row >= 0]
        if not places:
            raise BacksightError(f"None of the {len(indices)} images asked for is in {shown(self.folder)}.")
        numbers, rows = np.array(places).T
        groups = [(self._shard(int(number)), np.flatnonzero(numbers == number)) for number in np.unique(numbers)]

        def gathered(name: str) -> np.ndarray:
            pieces = [shard[name][rows[which]] for shard, which in groups]
            if len(pieces) == 1:
                return pieces[0]
            result = np.empty((len(rows), *pieces[0].shape[1:]), pieces[0].dtype)
            for (_, which), piece in zip(groups, pieces, strict=True):
                result[which] = piece
            return result

        images = gathered(IMAGES)
        if images.dtype == np.uint8:
            # By numpy: torch would start threads of its own for the reading thread, which wait for work on the cores
            # that the training needs (a step took 1.4 times as long on two).
            images = np.divide(images, np.float32(255), dtype=np.float32)
        recorded: Recorded = {}
        for tap in chosen:
            form = self._forms[tap]
            parts = {}
            for part in form.parts:
                values = gathered(f"{tap}/{part}")
                if self.dtype == "float16":
                    values = _unhalved(values, gathered(f"{tap}/{part}/scale"))
                parts[part] = torch.from_numpy(values)
            position = torch.from_numpy(groups[0][0][f"{tap}/position"].copy()) if form.positioned else None
            recorded[tap] = form.representation(parts, position)
        return torch.from_numpy(images), recorded

    def passes(
        self,
        batch_size: int,
        shuffle_seed: int | None = None,
        steps: int | None = None,
        start: int = 0,
        taps: Sequence[str] | None = None,
    ) -> Iterator[tuple[Tensor, Recorded]]:
        """(images, recorded) of the batches that `data.batches` gives for the same arguments, in the same order.

        The next batch is read in a thread while the caller uses the one before. Raises BacksightError as `read`, and
        SourceError as `batches`.
        """
        stand_in: Any = self
        batches(stand_in, batch_size, shuffle_seed, steps=steps, start=start)  # refuses what is no size or step
        return self._passes(batch_size, shuffle_seed, steps, start, self._chosen(taps))

    def _passes(
        self, batch_size: int, shuffle_seed: int | None, steps: int | None, start: int, taps: Sequence[str]
    ) -> Iterator[tuple[Tensor, Recorded]]:
        stream = index_batches(len(self), batch_size, shuffle_seed, endless=steps is not None, start=start)
        readable = (chosen for chosen in stream if any(self._place(int(index))[1] >= 0 for index in chosen))
        wanted = readable if steps is None else islice(readable, max(0, steps - start))
        with ThreadPoolExecutor(1, "read ahead") as reader:
            waiting = None
            for chosen in wanted:
                following = reader.submit(self.read, chosen, taps)
                if waiting is not None:
                    yield waiting.result()
                waiting = following
            if waiting is not None:
                yield waiting.result()

    def _chosen(self, taps: Sequence[str] | None) -> Sequence[str]:
        if taps is not None and (absent := [tap for tap in taps if tap not in self._forms]):
            raise BacksightError(
                f"The feature store {shown(self.folder)} has no tap {absent[0]!r}; it has {', '.join(self.taps)}."
            )
        return self.taps if taps is None else taps

    @cached_property
    def _failures(self) -> dict[int, tuple[str, str]]:
        """{index: (path, reason)} of the images that could not be read."""
        return {index: (path, reason) for shard in self._shards for index, path, reason in shard["missing"]}

    @cached_property
    def _rows(self) -> np.ndarray:
        """(images,) row of each image in its shard, -1 where it could not be read."""
        rows = np.arange(self._length) % self._shard_images
        for index in sorted(self._failures):
            last = (index // self._shard_images + 1) * self._shard_images
            rows[index:last] -= 1
        rows[list(self._failures)] = -1
        return rows

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise BacksightError(f"The feature store {shown(self.folder)} has no image {index}: it has {len(self)}.")
        index = int(self._own[index])
        return index // self._shard_images, int(self._rows[index])

    def _shard(self, number: int) -> dict[str, np.ndarray]:
        """The shard's arrays, mapped: what is read of them comes from the disk, or from the system's cache of it."""
        if number not in self._open:
            entry = self._shards[number]
            path = self.folder / entry["file"]
            try:
                found = path.stat()
                whole = found.st_size == entry["bytes"]
                if whole and _digest(path, found.st_size, found.st_mtime_ns) == entry["sha256"]:
                    with safe_open(path, framework="pt") as file:
                        self._open[number] = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
                    return self._open[number]
                reason = "its checksum is wrong" if whole else f"{found.st_size} of {entry['bytes']} bytes"
            except (OSError, SafetensorError) as error:
                reason = str(error)
            raise BacksightError(
                f"The shard {shown(path)} of a feature store is missing or damaged ({reason}): delete this file, and "
                "record_features records it again."
            )
        return self._open[number]


@cache
def _digest(path: Path, _size: int, _changed: int) -> str:
    """The file's SHA-256; a process computes it once for each state of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------- recording


def estimate(
    target: Target,
    images: ImageSource | Tensor,
    taps: str | Sequence[str] | None = None,
    folder: Path | str | None = None,
    dtype: Precision = "float16",
    limit: int | None = None,
) -> StoreEstimate:
    """The size of the store that `record_features` would write for these arguments, from one recorded image."""
    recorder = _Recorder(target, images, taps, dtype)
    return recorder.estimate(_place_of(recorder, folder), limit, SHARD_BYTES)


def features_or_images(
    target: Target, images: ImageSource | Tensor, taps: str | Sequence[str] | None = None, **how: Any
) -> FeatureStore | ImageSource | Tensor:
    """`record_features`, or the images themselves, with a warning, where the store cannot be written."""
    try:
        return record_features(target, images, taps, **how)
    except StoreError as error:
        warnings.warn(f"{error} Until then features are computed anew at every step.", stacklevel=2)
        return images


def record_features(
    target: Target,
    images: ImageSource | Tensor,
    taps: str | Sequence[str] | None = None,
    folder: Path | str | None = None,
    *,
    dtype: Precision = "float16",
    batch_size: int = 32,
    shard_bytes: int = SHARD_BYTES,
    limit: int | None = None,
    progress: bool = True,
) -> FeatureStore:
    """Record what the target makes of the images, or find it where it was recorded before.

    images: an ImageSource, or (N, 3, H, W) uint8 or float in [0, 1], without padding; both are kept, uint8 or float32,
    beside the features. taps: as `load_target` takes them, default the target's own. folder: of the stores, default
    "features" in the cache folder; each store has a folder of its own there. dtype: "float16" keeps each number to 11
    binary digits of its own, `store.errors` says what that costs; "float32" keeps all. Of queries the encoder's output
    is not kept, nor is `Tokens.context`. batch_size: images a forward pass; shard_bytes: of one file, and about what
    the recording holds in memory; limit: bytes that the store may take. progress: say how large the store will be,
    before it is written, and show a bar.

    A recording that was killed, or whose disk was full, goes on from its last whole shard; one that another process is
    writing is waited for. Shards that are missing or cut are recorded again.
    Raises StoreError where the disk or the limit is too small, before anything is written, or the folder cannot be
    written; BacksightError on padded images, and features that are not finite or not of one form; SourceError where
    there are no images.
    """
    recorder = _Recorder(target, images, taps, dtype)
    place = _place_of(recorder, folder)
    if _is_whole(place):
        return recorder.found(place, progress)
    estimated = recorder.estimate(place, limit, shard_bytes)
    _say(str(estimated), progress)
    if not estimated.fits:
        raise StoreError(
            f"The features of {estimated.images} images of {target.name} take {_in_words(estimated.bytes)}, and "
            f"{_in_words(estimated.limit)} may be used in {shown(place.parent)}: make space, raise the limit, or name "
            "another folder."
        )
    with _recording_alone(place, progress):
        if _is_whole(place):
            return recorder.found(place, progress)
        _record(recorder, place, batch_size, shard_bytes, progress)
    return FeatureStore(place)


def _say(text: str, progress: bool) -> None:
    if progress:
        print(text, file=sys.stderr, flush=True)


class _Recorder:
    """A target, images and taps, and what one image has shown of them."""

    def __init__(
        self, target: Target, images: ImageSource | Tensor, taps: str | Sequence[str] | None, dtype: Precision
    ) -> None:
        if dtype not in get_args(Precision):
            raise BacksightError(f"Features are stored as {' or '.join(get_args(Precision))}, not as {dtype!r}.")
        if getattr(images, "fit", None) == "pad":
            raise BacksightError(
                f"The images {getattr(images, 'name', '')!r} are padded, and inverses are trained on whole images: "
                "open them with fit='crop' or fit='stretch'."
            )
        batches(images, 1)  # refuses what are no images
        self.target, self.images, self.dtype = target, images, dtype
        self.taps = target.taps if taps is None else target.resolve_taps(taps)

    @cached_property
    def first(self) -> Recorded:
        """The first image that can be read."""
        return self._forward(next(batches(self.images, 1)))

    @cached_property
    def forms(self) -> dict[str, _Form]:
        return {tap: _Form.of(representation) for tap, representation in self.first.items()}

    @cached_property
    def positions(self) -> dict[str, Tensor]:
        """{tap/position: (1, N, C)} of the taps that have a positional code."""
        return {
            f"{tap}/position": each.position[:1].float().cpu().contiguous()
            for tap, each in self.first.items()
            if isinstance(each, Tokens) and each.position is not None
        }

    @property
    def labels(self) -> dict[str, str | None]:
        """What the images are called; a tensor has no name."""
        source = None if isinstance(self.images, Tensor) else self.images
        return {name: getattr(source, name, None) for name in ("name", "split", "fit")}

    @property
    def image_type(self) -> torch.dtype:
        floats = isinstance(self.images, Tensor) and self.images.is_floating_point()
        return torch.float32 if floats else torch.uint8

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.images.shape[2:] if isinstance(self.images, Tensor) else self.images.size
        return height, width

    @property
    def row_bytes(self) -> int:
        """Of one image, in a shard."""
        numbers = [math.prod(shape) for form in self.forms.values() for shape in form.parts.values()]
        features = 2 * sum(numbers) + 4 * len(numbers) if self.dtype == "float16" else 4 * sum(numbers)
        return features + 3 * math.prod(self.image_size) * self.image_type.itemsize

    def shard_images(self, shard_bytes: int, batch_size: int) -> int:
        """Images a shard: of whole batches, where there is room for one."""
        count = max(1, shard_bytes // self.row_bytes)
        return count - count % batch_size if count > batch_size else count

    def estimate(self, place: Path, limit: int | None, shard_bytes: int) -> StoreEstimate:
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(existing).free + sum(shard.stat().st_size for shard in place.glob("shard-*"))
        allowed = int(free * (1 - SPARED))
        shards = math.ceil(len(self.images) / self.shard_images(shard_bytes, 1))
        constant = HEADER + sum(position.nbytes for position in self.positions.values())
        size = len(self.images) * self.row_bytes + shards * constant
        return StoreEstimate(len(self.images), size, free, allowed if limit is None else min(limit, allowed), place)

    def found(self, place: Path, progress: bool) -> FeatureStore:
        """The store that is there already.

        Its first image is passed once more and compared: what is in no key (a user's own code, a changed setting of a
        checkpoint with the same weights) is seen there.
        """
        store = FeatureStore(place)
        index = min(set(range(len(store))) - set(store._failures))
        _, kept = store.read([index])
        for tap, representation in self.first.items():
            values = representation.values.float().cpu()
            same = _Form.of(representation) == store._forms[tap]
            if not same or (kept[tap].values - values).norm() > 0.01 * values.norm():
                raise BacksightError(
                    f"{self.target.name} gives other features at {tap} now than when {shown(place)} was recorded, "
                    "with the same weights: its code or its settings have changed; delete this folder."
                )
        _say(f"features of {len(store)} images: reused from {shown(place)}", progress)
        return store

    def parts(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, tuple[float, float]]]:
        """{name in a shard: (B, …)} of a batch, and {tap/part: squared error, squared norm}.

        images: (B, 3, H, W), uint8 or float.
        """
        stored = {IMAGES: images.to(self.image_type)}
        sums: dict[str, tuple[float, float]] = {}
        recorded = self._forward(images.float().div(255) if images.dtype == torch.uint8 else images.float())
        for tap, representation in recorded.items():
            self._check(tap, representation)
            for part, values in _parts(representation).items():
                name, values = f"{tap}/{part}", values.float()
                norm = torch.linalg.vector_norm(values.flatten(1), dim=1).double().square().sum().item()
                if not math.isfinite(norm):
                    raise BacksightError(
                        f"The features of {self.target.name} at {tap} are not finite, or beyond 1e18: look at its "
                        "weights and images."
                    )
                if self.dtype == "float32":
                    stored[name], sums[name] = values, (0.0, norm)
                    continue
                stored[name], stored[f"{name}/scale"] = _halved(values)
                lost = stored[name].float() * _as_column(stored[f"{name}/scale"], values) - values
                error = torch.linalg.vector_norm(lost.flatten(1), dim=1).double().square().sum().item()
                sums[name] = (error, norm)
        return stored, sums

    def _forward(self, images: Tensor) -> Recorded:
        with torch.autocast(self.target.device.type, enabled=False):
            return self.target.record(images, self.taps)

    def _check(self, tap: str, representation: Representation) -> None:
        """Refuse what a store does not keep: padding, and a form or positional code that changes with the image."""
        if _Form.of(representation) != self.forms[tap]:
            raise BacksightError(
                f"{self.target.name} gives representations of several forms at {tap}, which one store cannot hold: "
                "leave this tap out."
            )
        if not isinstance(representation, Tokens):
            return
        if representation.padding is not None:
            raise BacksightError(f"{self.target.name} gives padded tokens at {tap}: leave this tap out of the store.")
        if representation.position is not None:
            position, known = representation.position.float().cpu(), self.positions[f"{tap}/position"]
            # Of several images it may differ in the last digit from that of one.
            if not torch.allclose(position, known.expand_as(position), rtol=1e-5, atol=1e-6):
                raise BacksightError(
                    f"The positional code of {self.target.name} at {tap} changes with the image, and a store keeps one "
                    "for all: leave this tap out."
                )


def _record(recorder: _Recorder, place: Path, batch_size: int, shard_bytes: int, progress: bool) -> None:
    """Write the shards that are not there, and then the index as complete."""
    if batch_size < 1:
        raise BacksightError(f"batch_size is {batch_size}; it is a number of images from 1.")
    for stray in place.glob(".*"):  # of a process that was killed as it wrote
        if stray.name != LOCK:
            stray.unlink()
    images = recorder.images
    index = read_json(place / INDEX) or {
        "format": FORMAT,
        "status": "recording",
        "target": recorder.target.name,
        "weights_hash": recorder.target.weights_hash,
        "dtype": recorder.dtype,
        **recorder.labels,
        "size": recorder.image_size,
        "images": len(images),
        "shard_images": recorder.shard_images(shard_bytes, batch_size),
        "forms": {tap: asdict(form) for tap, form in recorder.forms.items()},
        "shards": [],
    }
    whole = {shard["file"]: shard for shard in index["shards"] if _shard_is_whole(place, shard)}
    bar = tqdm(
        total=len(images),
        desc=f"features of {recorder.target.name}",
        unit="image",
        unit_scale=True,
        leave=False,
        disable=not progress,
    )
    try:
        with bar, ThreadPoolExecutor(available_cores(), "images") as threads:
            for number, first in enumerate(range(0, len(images), index["shard_images"])):
                last = min(first + index["shard_images"], len(images))
                file = f"shard-{number:05}.safetensors"
                if file not in whole:
                    shard = _Shard(last - first, recorder)
                    for batch, missing in _read_ahead(images, first, last, batch_size, threads):
                        shard.add(batch, missing)
                        bar.update(len(missing) + (0 if batch is None else len(batch)))
                    whole[file] = shard.write(place / file)
                    index["shards"] = [whole[each] for each in sorted(whole)]
                    index["status"] = "recording"
                    write_json(place / INDEX, index)
                else:
                    bar.update(last - first)
        if not any(shard["images"] for shard in index["shards"]):
            raise SourceError(f"none of the {len(images)} images can be read")
        index |= {"skipped": getattr(images, "skipped", []), "errors": _errors(index), "status": "complete"}
        write_json(place / INDEX, index)
    except (OSError, SafetensorError) as error:
        done = sum(shard["images"] for shard in whole.values())
        raise StoreError(
            f"The feature store {shown(place)} cannot be written ({error}) after {done} of {len(images)} images: make "
            "space, or name another folder; the next call goes on from there."
        ) from error


class _Shard:
    """The images of one range of indices, filled batch by batch."""

    def __init__(self, capacity: int, recorder: _Recorder) -> None:
        self.capacity, self.recorder = capacity, recorder
        self.filled = 0
        self.tensors: dict[str, Tensor] = {}
        self.missing: list[tuple[int, str, str]] = []
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, images: Tensor | None, missing: Sequence[tuple[int, str, str]]) -> None:
        """A batch (B, 3, H, W), or None, and (index, path, reason) of those that could not be read."""
        self.missing.extend(missing)
        if images is None:
            return
        stored, sums = self.recorder.parts(images)
        for name, values in stored.items():
            if name not in self.tensors:
                self.tensors[name] = torch.empty(self.capacity, *values.shape[1:], dtype=values.dtype)
            self.tensors[name][self.filled : self.filled + len(images)] = values
        for name, (error, norm) in sums.items():
            before = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (before[0] + error, before[1] + norm)
        self.filled += len(images)

    def write(self, path: Path) -> dict[str, Any]:
        """The file, and its entry in the index."""
        tensors = {name: values[: self.filled] for name, values in self.tensors.items()} | self.recorder.positions
        digests = []

        def save(temporary: Path) -> None:
            save_file(tensors, temporary)
            temporary.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read
            with temporary.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())

        write_atomically(path, save)
        return {
            "file": path.name,
            "images": self.filled,
            "bytes": path.stat().st_size,
            "sha256": digests[0],
            "missing": self.missing,
            "sums": self.sums,
        }


def _read_ahead(
    images: ImageSource | Tensor, first: int, last: int, batch_size: int, threads: ThreadPoolExecutor
) -> Iterator[tuple[Tensor | None, list[tuple[int, str, str]]]]:
    """The images from `first` to `last` in batches, and (index, path, reason) of those that cannot be read.

    The threads read the next batch while the caller uses the one before.
    """
    if isinstance(images, Tensor):
        for start in range(first, last, batch_size):
            yield images[start : min(start + batch_size, last)], []
        return
    ranges = [range(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]
    following = [threads.submit(images.image, index) for index in ranges[0]]
    for number, indices in enumerate(ranges):
        reading = following
        if number + 1 < len(ranges):
            following = [threads.submit(images.image, index) for index in ranges[number + 1]]
        read, missing = [], []
        for index, each in zip(indices, reading, strict=True):
            try:
                read.append(each.result())
            except ImageError as error:
                missing.append((index, error.path, error.reason))
        images.skip([(path, reason) for _, path, reason in missing])
        yield (torch.stack(read) if read else None), missing


def _errors(index: Mapping[str, Any]) -> dict[str, float]:
    """{tap: relative RMS error}; of predictions the largest of logits, boxes and masks."""
    errors = {}
    for tap, form in index["forms"].items():
        found = []
        for part in form["parts"]:
            sums = [shard["sums"][f"{tap}/{part}"] for shard in index["shards"] if shard["images"]]
            error, norm = (math.fsum(each) for each in zip(*sums, strict=True))
            found.append(math.sqrt(error / norm) if norm else 0.0)
        errors[tap] = max(found)
    return errors


def _is_whole(place: Path) -> bool:
    """Whether a complete store is there, with every shard in its full size."""
    index = read_json(place / INDEX)
    complete = index is not None and index.get("status") == "complete"
    return index is not None and complete and all(_shard_is_whole(place, shard) for shard in index["shards"])


def _shard_is_whole(place: Path, shard: Mapping[str, Any]) -> bool:
    path = place / shard["file"]
    return path.is_file() and path.stat().st_size == shard["bytes"]


@contextmanager
def _recording_alone(place: Path, progress: bool) -> Iterator[None]:
    """The store's lock, which the system takes from a process that dies; waits where another process records."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say(f"another process records {shown(place)}: waiting for it", progress)
            lock.acquire()
    except OSError as error:
        raise StoreError(
            f"The feature store {shown(place)} cannot be written ({error}): name another folder, or set "
            "BACKSIGHT_CACHE to one that can be written."
        ) from error
    try:
        yield
    finally:
        lock.release()


# -------------------------------------------------------------------------------------------------------- the key


def _place_of(recorder: _Recorder, folder: Path | str | None) -> Path:
    """The store's own folder: <target>-<images>-<key>."""
    target, images = recorder.target, recorder.images
    preprocessing = target.preprocessing
    identity = {
        "format": FORMAT,
        "target": [target.name, target.kind, target.weights_hash],
        "preprocessing": [preprocessing.mean, preprocessing.std, preprocessing.size],
        "taps": recorder.taps,
        "images": _identity(images),
        "dtype": recorder.dtype,
        "code": _code_digest(),
        "versions": {package: importlib.metadata.version(package) for package in KEY_PACKAGES},
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    name = "-".join(filter(None, (target.name, recorder.labels["name"], recorder.labels["split"], key)))
    return Path(folder or cache_folder() / "features") / re.sub(r"[^\w.-]+", "-", name)


def _identity(images: ImageSource | Tensor) -> str:
    """A digest of which images these are: of a tensor its bytes, of a source its files' ids, sizes and times."""
    digest = hashlib.sha256()
    if isinstance(images, Tensor):
        digest.update(f"{tuple(images.shape)} {images.dtype}".encode())
        for piece in images.split(64):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()
    digest.update(repr([images.name, images.split, images.size, images.fit, images.interpolation]).encode())
    for entry in images.entries:
        file = entry.path if entry.member is None else entry.member.shard
        try:
            found = Path(file).stat()
            state = (found.st_size, found.st_mtime_ns)
        except OSError:
            state = (-1, -1)
        digest.update(repr((entry.id, *state)).encode())
    return digest.hexdigest()


@cache
def _code_digest() -> str:
    """Of the code that decides what a representation is."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    modules = [package / name for name in ("data/images.py", "data/tar.py", "representation.py")]
    for path in (*modules, *sorted((package / "targets").glob("*.py"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
