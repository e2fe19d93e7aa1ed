"""What lies in data/weights and in the files of inverses, read without torch, timm or transformers.

Those libraries take several seconds to load, and most mistakes in a command are seen without them. A check here
refuses only what it is sure of; `backsight.targets` decides the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backsight.errors import BacksightError
from backsight.project import project_root

SHIPPED = ("scenes-vit", "scenes-deit", "scenes-swin", "scenes-detr", "scenes-deformable-detr")
TAP_SETS = ("blocks", "components", "fine")
PLAIN_NAME = re.compile(r"[\w-]+(\.[\w-]+)?")  # no path, no hub repository: only a shipped or a timm name


@dataclass(frozen=True)
class MadeFor:
    """Which target an inverse file was made for, with which weights ("random": untrained), the seed of its training."""

    target: str
    weights: str
    weights_hash: str
    seed: int


def weights_folder() -> Path:
    """Where shipped targets lie, and downloaded weights may be put: data/weights of the project."""
    return project_root() / "data" / "weights"


def refuse_unknown_name(name: str) -> None:
    """Raise BacksightError, with the nearest names, on a plain name that is neither in data/weights nor in timm."""
    if not PLAIN_NAME.fullmatch(name) or name in SHIPPED or Path(name).exists() or (weights_folder() / name).exists():
        return
    if name.endswith((".safetensors", ".pth", ".pt", ".bin")):
        return
    sources = _timm_sources()
    if not sources or re.search(rf"\b{re.escape(name.partition('.')[0])}\b", sources):
        return
    placed = sorted(each.name for each in weights_folder().glob("*") if each.is_dir())
    known = dict.fromkeys([*SHIPPED, *placed, *re.findall(r"^def (\w+)\(pretrained", sources, re.MULTILINE)])
    raise BacksightError(
        f"There is no target {name!r}; {_nearest(name, list(known))} (`backsight targets` lists them)."
    )


@cache
def _timm_sources() -> str:
    """The text of timm's model files: each of its names is the name of a function there, or an old name's entry."""
    found = find_spec("timm")
    folders = [] if found is None else found.submodule_search_locations or []
    return "\n".join(
        file.read_text(encoding="utf-8", errors="replace")
        for folder in folders
        for file in sorted(Path(folder, "models").glob("*.py"))
    )


def refuse_unknown_taps(name: str, taps: str | Sequence[str]) -> None:
    """Raise BacksightError, with the nearest names, on a tap that the model card of a shipped target does not list."""
    known = _card(name).get("taps")
    if not isinstance(known, list) or taps in TAP_SETS:
        return
    for tap in [part.strip() for part in taps.split(",")] if isinstance(taps, str) else taps:
        if tap not in known:
            raise BacksightError(f"{name} has no tap {tap!r}; {_nearest(str(tap), known)}.")


def _card(name: str) -> Mapping[str, Any]:
    if not PLAIN_NAME.fullmatch(name):
        return {}
    try:
        card = json.loads((weights_folder() / name / "card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def inverse_files(folder: Path) -> list[Path]:
    """The inverses in a folder and its sub-folders, <family>--<tap>.safetensors, sorted."""
    return sorted(folder.rglob("*--*.safetensors"))


def made_for(path: Path) -> MadeFor:
    """What an inverse file says of its target. Raises BacksightError where it is damaged, cut short or no inverse."""
    try:
        header = _safetensors_header(path)
    except (OSError, ValueError) as error:
        raise BacksightError(
            f"The inverse {path} is damaged or is no safetensors file ({error}): delete it and make it again."
        ) from error
    try:
        said = json.loads(header["__metadata__"]["backsight"])["header"]
        return MadeFor(str(said["target"]), str(said["weights"]), str(said["weights_hash"]), int(said.get("seed", 0)))
    except (KeyError, TypeError, ValueError) as error:
        raise BacksightError(f"{path} holds no inverse of backsight: name a file that save_inverse() wrote.") from error


def _safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON at the head of a safetensors file, whose length the first 8 bytes say."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("its head is longer than the file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its head is no JSON object")
    if size != 8 + length + max(_ends(header), default=0):
        raise ValueError("it is cut short")
    return header


def _ends(header: Mapping[str, Any]) -> Iterator[int]:
    for name, tensor in header.items():
        if name != "__metadata__":
            try:
                yield int(tensor["data_offsets"][1])
            except (KeyError, TypeError, IndexError) as error:
                raise ValueError(f"it does not say where {name} lies") from error


def _nearest(name: str, known: Sequence[str]) -> str:
    if close := get_close_matches(name, known, n=3, cutoff=0.5):
        return f"nearest: {', '.join(close)}"
    return f"there are: {', '.join(known[:6])}{', …' if len(known) > 6 else ''}"
