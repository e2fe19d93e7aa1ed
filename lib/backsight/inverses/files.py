"""The files of inverses of every family: one safetensors file a tap, `<family>--<tap>.safetensors`.

Its metadata holds one JSON object: {"format", "kind", "header", "configuration"}; see `module.described`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.inverses.module import InverseHeader, Inverses, described, rebuilt
from backsight.project import project_root, write_atomically
from backsight.targets.base import seeded

if TYPE_CHECKING:
    from backsight.targets.base import Target

FORMAT = 2
ORDER = ("linear", "direct", "modular", "modular_polished", "exact", "map")


def save(inverses: Inverses, folder: Path | str, half: bool = False) -> list[Path]:
    """Write a family, one file a tap; what is there under the same name is replaced.

    half: linear and trained modules as float16 wherever the values fit (half the size; computing stays float32).
    Raises BacksightError where a file cannot be written.
    """
    files = []
    for tap, module in inverses.modules.items():
        tensors = module.state_dict()
        if half and module.kind in ("linear", "inverse"):  # what is solved needs all of its digits
            halves = {key: tensor.half() for key, tensor in tensors.items() if tensor.dtype == torch.float32}
            tensors |= {key: tensor for key, tensor in halves.items() if torch.isfinite(tensor).all()}
        description = json.dumps({"format": FORMAT, **described(module)})
        path = Path(folder) / f"{inverses.family}--{tap}.safetensors"
        files.append(write_tensors(path, tensors, {"backsight": description}))
    return files


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file, whole or not at all. Raises BacksightError where the folder cannot be written."""
    owned = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    try:
        return write_atomically(path, lambda temporary: save_file(owned, temporary, dict(metadata)))
    except (OSError, SafetensorError) as error:
        raise BacksightError(
            f"{path} cannot be written ({error}): choose a folder that is writable and has space."
        ) from error


def read_header(path: Path | str) -> InverseHeader:
    """Where an inverse file comes from, without its target. Raises BacksightError as `read` does."""
    return _description(path)[0]


def _description(path: Path | str) -> tuple[InverseHeader, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})["backsight"])
        number = int(description["format"])
        if number == FORMAT:
            return InverseHeader(**description["header"]), description
    except FileNotFoundError as error:
        raise BacksightError(f"There is no inverse at {path}: check the path.") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BacksightError(
            f"{path} is damaged or holds no inverse of backsight ({error}): name a file that save() wrote."
        ) from error
    age, advice = ("a newer", "update backsight, or fit") if number > FORMAT else ("an older", "fit")
    raise BacksightError(
        f"The inverse {path} was made by {age} backsight (format {number}, not {FORMAT}): {advice} it again."
    )


def read(path: Path | str, target: Target) -> nn.Module:
    """Read what `save` wrote, on the target's device.

    Raises BacksightError where the file is missing, damaged, of another format or kind, or holds values that are not
    finite, and where it inverts another target (the weight hash decides, not the name).
    """
    header, description = _description(path)
    if header.weights_hash != target.weights_hash:
        raise BacksightError(
            f"The inverse {path} was made for {header.target} with the weights {header.weights_hash}, not for "
            f"{target.name} with {target.weights_hash}: load that target, or fit an inverse for this one."
        )
    try:
        tensors = load_file(path)
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"NaN or infinite values in {key!r}")
        with seeded(0):  # networks draw their first weights
            module = rebuilt(description, target)
        module.load_state_dict(tensors)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(part.strip() for part in str(error).splitlines()[:2])
        raise BacksightError(
            f"The inverse {path} does not fit its own header ({reason}): it is damaged or of another version, fit it "
            "again."
        ) from error
    return module.eval().requires_grad_(False).to(target.device)


def load(folder: Path | str, target: Target, seed: int | None = None) -> dict[str, Inverses]:
    """{family: Inverses} of every file for `target` in a folder and its sub-folders.

    Inverses of the same architecture with other weights are passed over. seed: whose to take where there are several
    training seeds. Raises BacksightError where there is no inverse of this target, or two for one tap.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BacksightError(f"{folder} is not a folder: give the run folder of 02_train_inverse as `inverses`")
    headers = headers_for(folder, target)
    if not headers:
        others = sorted({f"{each.target} ({each.weights_hash})" for each in map(read_header, inverse_files(folder))})
        raise BacksightError(
            f"no inverse for {target.name} with the weights {target.weights_hash} in {folder}, which has inverses of "
            f"{', '.join(others) or 'no target'}: load that target, or run notebooks/02_train_inverse.ipynb with this "
            "one"
        )
    seeds = sorted({header.seed for header in headers.values()})
    if len(seeds) > 1 and seed not in seeds:
        raise BacksightError(f"{folder} holds inverses of the seeds {seeds}: choose one of them as `seed`")
    families: dict[str, dict[str, nn.Module]] = {}

    def order(header: InverseHeader) -> tuple[int, int]:
        return ORDER.index(header.family), target.available_taps.index(header.source.rpartition("+")[2])

    for path, header in sorted(headers.items(), key=lambda item: order(item[1])):
        if len(seeds) > 1 and header.seed != seed:
            continue
        modules = families.setdefault(header.family, {})
        if header.source in modules:
            raise BacksightError(
                f"{folder} holds two {header.family} inverses for {header.source} of {target.name}: name one run folder"
            )
        modules[header.source] = read(path, target)
    return {family: Inverses(modules) for family, modules in families.items()}


def shipped_inverses(target: Target) -> Path | None:
    """The folder of the inverses that are shipped with a target and its weights, or None."""
    folder = project_root() / "data" / "weights" / target.name / "inverses"
    return folder if folder.is_dir() and headers_for(folder, target) else None


def inverse_files(folder: Path) -> Iterator[Path]:
    """The files of inverses in a folder and its sub-folders, in order of their names; checkpoints are none."""
    return (path for path in sorted(folder.rglob("*--*.safetensors")) if not path.name.startswith("."))


def headers_for(folder: Path | str, target: Target) -> dict[Path, InverseHeader]:
    """Of all inverses of this target, by name and weights, in a folder and its sub-folders."""
    headers = {path: read_header(path) for path in inverse_files(Path(folder))}
    own = (target.name, target.weights_hash)
    return {path: header for path, header in headers.items() if (header.target, header.weights_hash) == own}
