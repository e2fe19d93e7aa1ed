"""Images in tar shards, as WebDataset lays them out, read in any order without unpacking.

Names are cut at their first dot: a.seg.png belongs to a.jpg and is no image. Where each image's bytes lie in a shard is
found once, and kept in the cache folder.
"""

import json
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from backsight.data.decode import READABLE
from backsight.errors import SourceError
from backsight.project import cache_folder, read_json, write_json

FORMAT = 2  # part of the cache key: raise it whenever an index is made in another way


class Member(NamedTuple):
    """An image of a shard: its name, and where its `size` bytes lie."""

    shard: str
    name: str
    offset: int
    size: int

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

    Raises SourceError for a shard that is cut short, compressed or no tar file, or holds no image; and where the index
    cannot be kept.
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


def _scanned(shard: Path) -> list[tuple[str, int, int]]:
    """(name, offset, size) of each image."""
    places: dict[str, tuple[int, int]] = {}  # of equal names the last counts, as when a tar file is unpacked
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in filter(tarfile.TarInfo.isreg, tar):
                if f".{Path(member.name).name.partition('.')[2]}".lower() in READABLE:
                    places[member.name] = (member.offset_data, member.size)
            # tarfile takes a missing end, or a damaged header, for the end of the archive.
            if any(Member(str(shard), "end", tar.offset, tarfile.BLOCKSIZE).read()):
                raise ValueError(f"no header at byte {tar.offset}")
    except (tarfile.TarError, ValueError) as error:
        raise SourceError(
            f"the shard {shard} is cut short, damaged or compressed ({error}): copy it again, as a plain tar file"
        ) from error
    if not places:
        raise SourceError(f"the shard {shard} holds no images (key.jpg …): unpack tar files inside tar files first")
    return [(name, *places[name]) for name in sorted(places)]
