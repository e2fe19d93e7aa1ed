"""Images in tar shards, as WebDataset lays them out, read in any order without unpacking.

    imagenet1k-train-0000.tar      n01440764_10026.jpg      an image: what its extension says
                                   n01440764_10026.cls      its class as a number, where it has one

A shard's index (where each image's bytes lie, and its class) is made once and kept in the cache folder.
"""

import json
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from backsight.data.decode import READABLE
from backsight.errors import SourceError
from backsight.project import cache_folder, read_json, write_json

FORMAT = 1  # part of the cache key: raise it whenever an index is made in another way


class Member(NamedTuple):
    """An image of a shard: its name, where its `size` bytes lie, and its class number or None."""

    shard: str
    name: str
    offset: int
    size: int
    label: int | None = None

    def read(self) -> bytes:
        """Its bytes. Raises OSError, and ValueError where the shard ends before."""
        with open(self.shard, "rb", buffering=0) as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError(f"the shard has {len(content)} of its {self.size} bytes: copy the shard again")
        return content


def members(shard: Path) -> list[Member]:
    """The images of a shard in the order of their names, from the cache where it knows the shard as it is.

    Raises SourceError for a shard that is cut short, compressed or no tar file, that holds no image, or whose class is
    no number; and where the index cannot be kept.
    """
    try:
        state = shard.stat()
        identity = [FORMAT, str(shard.resolve()), state.st_size, state.st_mtime_ns, sorted(READABLE)]
        key = sha256(json.dumps(identity).encode()).hexdigest()[:16]
        kept = cache_folder() / "shards" / f"{shard.stem}-{key}.json"
        if (index := read_json(kept)) is None:
            index = {"shard": shard.name, "images": _scanned(shard)}
            write_json(kept, index)
    except OSError as error:
        raise SourceError(f"cannot read {shard}, or keep its index ({error}): set BACKSIGHT_CACHE") from error
    return [Member(str(shard), *image) for image in index["images"]]


def _scanned(shard: Path) -> list[tuple[str, int, int, int | None]]:
    """(name, offset, size, label) of each image."""
    places: dict[str, tuple[int, int]] = {}  # of equal names the last counts, as when a tar file is unpacked
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in filter(tarfile.TarInfo.isreg, tar):
                key, extension = _key(member.name)
                if extension in READABLE:
                    places[member.name] = (member.offset_data, member.size)
                elif extension == ".cls":
                    labels[key] = int(Member(str(shard), member.name, member.offset_data, member.size).read())
            # tarfile takes a missing end, or a damaged header, for the end of the archive.
            if any(Member(str(shard), "end", tar.offset, tarfile.BLOCKSIZE).read()):
                raise ValueError(f"no header at byte {tar.offset}")
    except (tarfile.TarError, ValueError) as error:
        raise SourceError(
            f"the shard {shard} is cut short, damaged or compressed, or a class is no number ({error}): copy it again, "
            "as a plain tar file"
        ) from error
    if not places:
        raise SourceError(
            f"the shard {shard} holds no images (key.jpg, and key.cls): unpack tar files inside tar files first"
        )
    return [(name, *places[name], labels.get(_key(name)[0])) for name in sorted(places)]


def _key(name: str) -> tuple[str, str]:
    """What the files of one image share, and the extension: the name is cut at the first dot after the folders."""
    folder, _, file = name.rpartition("/")
    key, dot, extension = file.partition(".")
    return f"{folder}/{key}", (dot + extension).lower()
