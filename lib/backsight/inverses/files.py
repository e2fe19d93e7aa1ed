"""The files of inverses of every family: one safetensors file a tap, `<family>--<tap>.safetensors`.

Its metadata holds one JSON object: {"format", "kind", "header", "configuration"}; see `module.described`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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

    half: float16 wherever the values fit, but for what a module keeps as it is (half the size; computing stays
    float32). Raises BacksightError where a module does not know its target, or a file cannot be written.
    """
    return [
        write(module, Path(folder) / f"{inverses.family}--{tap}.safetensors", half)
        for tap, module in inverses.modules.items()
    ]


def write(module: nn.Module, path: Path | str, half: bool = False) -> Path:
    """Write one module of any kind, or a chain; see `save`."""
    if module.header is None:
        raise BacksightError(f"The inverse of {module.source!r} does not know its target: set its header (header_for).")
    tensors = module.state_dict()
    if half:
        precise = tuple(
            f"{name}.{prefix}".lstrip(".")
            for name, part in module.named_modules()
            for prefix in getattr(part, "precise", ())
        )
        tensors = {key: tensor if key.startswith(precise) else _halved(tensor) for key, tensor in tensors.items()}
    return write_tensors(path, tensors, {"backsight": json.dumps({"format": FORMAT, **described(module)})})


def read_header(path: Path | str) -> InverseHeader:
    """Where an inverse file comes from, without its target. Raises BacksightError as `read` does."""
    return _description(path)[0]


def read(path: Path | str, target: Target) -> nn.Module:
    """Read what `write` wrote, on the target's device.

    Raises BacksightError where the file is missing, damaged, of another format or kind, or holds values that are not
    finite, and where it inverts another target (the weight hash decides, not the name).
    """
    header, description = _description(path)
    if header.weights_hash != target.weights_hash:
        raise BacksightError(
            f"The inverse {path} was made for {header.target} with the weights {header.weights_hash}, not for "
            f"{target.name} with {target.weights_hash}: load that target, or fit an inverse for this one."
        )
    tensors, _ = read_tensors(path, "inverse")
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BacksightError(f"The inverse {path} holds NaN or infinite values in {key!r}: fit it again.")
    try:
        with seeded(0):  # networks draw their first weights
            module = rebuilt(description, target)
        module.load_state_dict(tensors)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
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
        _refuse_without_inverses(folder, target)
    seeds = sorted({header.seed for header in headers.values()})
    if len(seeds) > 1:
        if seed not in seeds:
            raise BacksightError(f"{folder} holds inverses of the seeds {seeds}: choose one of them as `seed`")
        headers = {path: header for path, header in headers.items() if header.seed == seed}
    families: dict[str, dict[str, nn.Module]] = {}
    for path, header in headers.items():
        modules = families.setdefault(header.family, {})
        if header.source in modules:
            raise BacksightError(
                f"{folder} holds two {header.family} inverses for {header.source} of {target.name}: name one run folder"
            )
        modules[header.source] = read(path, target)
    depth = {tap: place for place, tap in enumerate(target.available_taps)}
    families = dict(sorted(families.items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else len(ORDER)))
    return {
        family: Inverses({tap: modules[tap] for tap in sorted(modules, key=depth.__getitem__)})
        for family, modules in families.items()
    }


def shipped_inverses(target: Target) -> Path | None:
    """The folder of the inverses that are shipped with a shipped target, or None."""
    folder = project_root() / "data" / "weights" / target.name / "inverses"
    return folder if target.weights == "shipped" and folder.is_dir() else None


def inverse_files(folder: Path) -> Iterator[Path]:
    """The files of inverses in a folder and its sub-folders, in order of their names; checkpoints are none."""
    return (path for path in sorted(folder.rglob("*--*.safetensors")) if not path.name.startswith("."))


def headers_for(folder: Path | str, target: Target) -> dict[Path, InverseHeader]:
    """Of all inverses of this target, by name and weights, in a folder and its sub-folders."""
    headers = {path: read_header(path) for path in inverse_files(Path(folder))}
    own = (target.name, target.weights_hash)
    return {path: header for path, header in headers.items() if (header.target, header.weights_hash) == own}


def _refuse_without_inverses(folder: Path, target: Target) -> None:
    headers = [read_header(path) for path in inverse_files(folder)]
    for header in headers:
        if header.target == target.name:
            raise BacksightError(
                f"the inverses in {folder} were made for {target.name} with the weights {header.weights_hash}, not "
                f"{target.weights_hash}: load that target, or fit inverses for this one."
            )
    names = sorted({header.target for header in headers})
    hint = f"; it has inverses of {', '.join(names)}" if names else ""
    raise BacksightError(
        f"no inverse for {target.name} in {folder}{hint}: run notebooks/02_train_inverse.ipynb with this target"
    )


def _description(path: Path | str) -> tuple[InverseHeader, dict[str, Any]]:
    _, metadata = read_tensors(path, "inverse", names=())
    try:
        description = json.loads(metadata["backsight"])
        number = int(description["format"])
        if number == FORMAT:
            return InverseHeader(**description["header"]), description
    except (KeyError, TypeError, ValueError) as error:
        raise BacksightError(
            f"{path} holds no inverse of backsight ({error}): name a file that save() wrote."
        ) from error
    advice = "update backsight, or fit it again" if number > FORMAT else "fit it again"
    age = "a newer" if number > FORMAT else "an older"
    raise BacksightError(f"The inverse {path} was made by {age} backsight (format {number}, not {FORMAT}): {advice}.")


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file, first under a temporary name: the file is whole or not there.

    Raises BacksightError where the folder cannot be written.
    """
    owned = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    try:
        return write_atomically(path, lambda temporary: save_file(owned, temporary, dict(metadata)))
    except (OSError, SafetensorError) as error:
        raise BacksightError(
            f"{path} cannot be written ({error}): choose a folder that is writable and has space."
        ) from error


def read_tensors(
    path: Path | str, what: str, names: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (all, or those of these names) and metadata of a safetensors file; `what` names it in the error.

    Raises BacksightError where there is no such file, or it is damaged.
    """
    if not Path(path).is_file():
        raise BacksightError(f"There is no {what} at {path}: check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            chosen = file.keys() if names is None else names
            return {key: file.get_tensor(key) for key in chosen}, dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError) as error:
        raise BacksightError(
            f"The {what} {path} is damaged or is no safetensors file ({error}): delete it and make it again."
        ) from error


def _halved(tensor: Tensor) -> Tensor:
    """A float32 tensor as float16 where all of its values fit, others as they are."""
    half = tensor.half() if tensor.dtype == torch.float32 else tensor
    return half if bool(torch.isfinite(half).all()) else tensor
