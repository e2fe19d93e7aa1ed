"""The files of inverses of every family: one safetensors file each, with a JSON header in its metadata."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.files import Measured, packed, unpacked
from backsight.exact.inverse import ExactInverse
from backsight.exact.map import MapInverse
from backsight.inverses.linear import LinearInverse
from backsight.inverses.module import Chain, Inverse, InverseHeader, damage_told, described, rebuilt
from backsight.targets.base import Target
from backsight.training.loop import read_tensors, write_tensors

__all__ = ["load_inverse", "read_header", "save_inverse"]

FORMAT = 1


def save_inverse(
    inverse: Inverse | LinearInverse | Chain | ExactInverse | MapInverse,
    path: Path | str,
    half: bool = False,
    header: InverseHeader | None = None,
) -> Path:
    """Write an inverse of any family, or a chain, as one safetensors file with a JSON header in its metadata.

    half: store float16 (half the size; computing stays float32) wherever the values fit. header: of what holds
    none itself, a LinearInverse or a chain of them, an exact or a MAP inverse; see `header_for`.
    Raises BacksightError without a header, and where the file cannot be written.
    """
    if isinstance(inverse, Inverse | LinearInverse | Chain):
        said, tensors = described(inverse, half)
    else:
        said, tensors = packed(inverse, half)
    first = inverse.modules_in_order[0] if isinstance(inverse, Chain) else inverse
    if isinstance(first, Inverse):
        header = replace(first.header, destination=inverse.destination)
    if header is None:
        raise BacksightError(
            f"The {first.family} inverse of {inverse.source!r} does not know its target: save it with "
            f"header=header_for(target, {first.family!r}, source, destination, images)."
        )
    description = {"format": FORMAT, "header": asdict(header), **said}
    return write_tensors(path, tensors, {"backsight": json.dumps(description)})


def read_header(path: Path | str) -> InverseHeader:
    """The header of a file that `save_inverse` wrote, without its target. Raises BacksightError as it does."""
    return _read(path)[0]


def load_inverse(
    path: Path | str, target: Target, measured: Measured | None = None
) -> Inverse | LinearInverse | Chain | ExactInverse | MapInverse:
    """Read what `save_inverse` wrote, on the target's device.

    measured: what exact and MAP inverses measure on the target, to share it among its files (default: anew).
    Raises BacksightError where the file is missing, damaged or of another kind, and where it inverts another
    target (the weight hash decides, not the name).
    """
    header, description, tensors = _read(path)
    if header.weights_hash != target.weights_hash:
        raise BacksightError(
            f"The inverse {path} was made for {header.target} with the weights {header.weights_hash}, not for "
            f"{target.name} with {target.weights_hash}: load that target, or fit an inverse for this one."
        )
    with damage_told(path):
        if description["kind"] not in ("exact", "map"):
            return rebuilt(description, tensors, target)
    return unpacked(path, header, description, tensors, measured or Measured(target))


def _read(path: Path | str) -> tuple[InverseHeader, dict[str, Any], dict[str, Tensor]]:
    tensors, metadata = read_tensors(path, "inverse")
    try:
        description = json.loads(metadata["backsight"])
        return InverseHeader(**description["header"]), description, tensors
    except (KeyError, TypeError, ValueError) as error:
        raise BacksightError(f"{path} holds no inverse of backsight: name a file that save_inverse() wrote.") from error
