"""Where a target's architecture and weights come from: shipped folder, local folder or checkpoint, cache, network.

The network is asked once and briefly, and only when a file is neither shipped nor cached, because the hub client
retries for most of a minute before it gives up.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backsight.errors import BacksightError
from backsight.targets.shipped import SHIPPED, weights_folder

INDEX_SUFFIX = ".index.json"  # of a checkpoint in several files: says which tensor lies in which of them
CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", INDEX_SUFFIX)
CHECKPOINT_NAMES = ("model.safetensors", "pytorch_model.bin", "model.pth")
INDEX_NAMES = tuple(f"{name}{INDEX_SUFFIX}" for name in CHECKPOINT_NAMES[:2])
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # keys of training scripts, the best weights first
PREFIXES = ("module.", "_orig_mod.", "model.")  # of data parallel, compiled and Lightning models
LAYER_LISTS = ("layer", "layers", "blocks", "stages")
NAMED_KEYS = 3  # of each kind, in an error about weights that do not fit
HUB_PREFIXES = ("hf_hub:", "hf-hub:")
NETWORK_TIMEOUT = 3.0  # seconds; a hub that answers does so in a fraction of one


@dataclass(frozen=True)
class Source:
    """What a name stands for on this machine.

    name: as the user wrote it; label: what `Target.weights` says once the weights are loaded;
    architecture: a timm name or hub id when the name says so; config: the folder's config.json, empty if none;
    folder, checkpoint: where the files are, if they are local; of a checkpoint in several files, its index.
    """

    name: str
    label: str
    architecture: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    checkpoint: Path | None = None


def shipped_names() -> tuple[str, ...]:
    """The shipped targets that are there: the folders of data/weights with a model card."""
    return tuple(sorted(card.parent.name for card in weights_folder().glob("*/card.json")))


def working_names() -> str:
    """For error messages: the targets that need nothing."""
    names = shipped_names()
    return f"these work now: {', '.join(names)}" if names else "no shipped target is made yet"


def resolve(name: str) -> Source:
    """Find what a name stands for, without reading weights.

    Raises BacksightError on a path that is not there, a folder without config.json or a broken one.
    """
    if not isinstance(name, str) or not name.strip():
        raise BacksightError("A target needs a name: `backsight targets` lists them.")
    placed = weights_folder() / name
    if not name.startswith((".", "/", "~")) and placed.is_dir():
        label = "shipped" if (placed / "card.json").exists() else "pretrained"
        architecture = None if (placed / "config.json").exists() else name
        return _local(name, label, placed, _checkpoint_in(placed), architecture)
    if name in SHIPPED:
        raise BacksightError(
            f"The shipped target {name} is not in data/weights: restore the folder data/weights/{name} from the "
            f"repository or make it with notebooks/01_targets.ipynb ({working_names()})."
        )
    architecture, separator, rest = name.partition("@")
    if separator and not name.startswith(HUB_PREFIXES) and (_path(rest).exists() or _is_path(rest)):
        return _from_path(name, _path(rest), architecture)
    if _path(name).exists() or _is_path(name):
        return _from_path(name, _path(name), None)
    return Source(name, "pretrained", architecture=name)


def _from_path(name: str, path: Path, architecture: str | None) -> Source:
    if path.is_dir():
        return _local(name, name, path, _checkpoint_in(path), architecture)
    if not path.exists():
        raise BacksightError(f"There is no file or folder {str(path)!r}: check the path of the target.")
    if not path.name.endswith(CHECKPOINT_SUFFIXES):
        raise BacksightError(
            f"{path.name} is not a checkpoint: a target is a folder with config.json or a file ending in "
            f"{', '.join(CHECKPOINT_SUFFIXES)}."
        )
    return _local(name, name, path.parent, path, architecture)


def _local(name: str, label: str, folder: Path, checkpoint: Path | None, architecture: str | None) -> Source:
    config = {} if architecture is not None else read_json(folder / "config.json")
    if architecture is None and not config:
        if checkpoint is None:
            raise BacksightError(
                f"The folder {folder.name} has neither config.json nor a checkpoint, so it is no target."
            )
        raise BacksightError(
            f"{checkpoint.name} says nothing of its architecture: put config.json beside it or name the target "
            "timm_name@path/to/checkpoint."
        )
    return Source(name, label, architecture, config, folder, checkpoint)


def _checkpoint_in(folder: Path) -> Path | None:
    return next((folder / each for each in (*CHECKPOINT_NAMES, *INDEX_NAMES) if (folder / each).exists()), None)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _is_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.endswith(CHECKPOINT_SUFFIXES)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file. Raises BacksightError where it is not valid JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BacksightError(f"{path.parent.name}/{path.name} cannot be read as JSON ({error}): replace it.") from error
    if not isinstance(content, dict):
        raise BacksightError(f"{path.parent.name}/{path.name} is not a JSON object: replace it.")
    return content


# Checkpoints


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dictionary in a checkpoint; never unpickles anything but tensors and plain containers.

    path: of the file, or of the index of a checkpoint in several files. Wrappers of training scripts (`model`,
    `state_dict`, …) and prefixes that all names have (`module.`, …) are taken off.
    Raises BacksightError on a corrupt, truncated, incomplete or unsafe file.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return {name: tensor for part in _parts(path) for name, tensor in read_checkpoint(part).items()}
    with _checkpoint_errors(path):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return _unwrapped(path, _load_pickled_tensors(path))


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a checkpoint, from its header where the format has one.

    Raises BacksightError on a corrupt, truncated, incomplete or unsafe file.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return {name: shape for part in _parts(path) for name, shape in read_shapes(part).items()}
    with _checkpoint_errors(path):
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return shapes_of(_unwrapped(path, _load_pickled_tensors(path)))


def _parts(index: Path) -> list[Path]:
    """The files that the index of a checkpoint names. Raises BacksightError where it names none, or one is missing."""
    content = read_json(index).get("weight_map")
    names = sorted(set(map(str, content.values()))) if isinstance(content, Mapping) else []
    if not names:
        raise BacksightError(f"{index.name} in {index.parent.name} names no files of weights: replace it.")
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise BacksightError(
            f"The checkpoint {index.name} in {index.parent.name} lacks {len(absent)} of its {len(names)} files "
            f"({_first_few(absent)}): put them beside it."
        )
    return [index.parent / name for name in names]


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a state dictionary."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def compare_shapes(source: Source, expected: Mapping[str, Tensor], renamed: bool = False) -> None:
    """Refuse a checkpoint whose tensors do not fit the architecture, from names and shapes alone.

    renamed: the loader renames tensors, so that a tensor of the right shape under any name counts.
    """
    assert source.checkpoint is not None
    if words := misfit(read_shapes(source.checkpoint), shapes_of(expected), renamed):
        raise BacksightError(does_not_fit(source.name, source.checkpoint, words))


def does_not_fit(name: str, checkpoint: Path, words: str) -> str:
    """The sentence that refuses a checkpoint; words: what `misfit` says of it."""
    return f"{checkpoint.name} does not fit {name}: {words}; correct the configuration or the checkpoint."


def misfit(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], renamed: bool = False) -> str:
    """Which keys of a checkpoint differ from the architecture's, or "" where it fits.

    found, wanted: shapes by name; renamed: names that differ may mean the same tensor if the shapes agree.
    Keys without a place are a reason by themselves only where they are of a layer that the architecture has not:
    checkpoints carry counters, buffers and further heads without which a model is whole.
    """
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    further = _further_layers(unexpected, wanted)
    other = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    if renamed:
        missing, unexpected = _unpaired(missing, wanted, unexpected, found)
    if not missing and not other and not further:
        return ""
    differing = [f"{name} {found[name]} instead of {wanted[name]}" for name in other]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": differing}
    return ", ".join(f"{len(keys)} {kind} ({_first_few(keys)})" for kind, keys in kinds.items() if keys)


def _unpaired(
    missing: list[str],
    wanted: Mapping[str, tuple[int, ...]],
    unexpected: list[str],
    found: Mapping[str, tuple[int, ...]],
) -> tuple[list[str], list[str]]:
    """The names left over on both sides when each missing tensor is given an unexpected one of its shape."""
    lacking = Counter(wanted[name] for name in missing) - Counter(found[name] for name in unexpected)
    spare = Counter(found[name] for name in unexpected) - Counter(wanted[name] for name in missing)
    return [name for name in missing if lacking[wanted[name]]], [name for name in unexpected if spare[found[name]]]


def _further_layers(unexpected: Sequence[str], wanted: Mapping[str, Any]) -> list[str]:
    """The names that belong to `blocks.12` where the architecture has `blocks.0` and others, but not this one."""
    layers = {layer for name in wanted for layer in _layers(name)}
    lists = {layer.rpartition(".")[0] for layer in layers}
    return [
        name
        for name in unexpected
        if any(layer not in layers and layer.rpartition(".")[0] in lists for layer in _layers(name))
    ]


def _layers(name: str) -> list[str]:
    """ "layers.0" and "layers.0.blocks.1" of "layers.0.blocks.1.norm.bias"."""
    found = re.finditer(rf"(?:^|\.)(?:{'|'.join(LAYER_LISTS)})\.\d+(?=\.)", name)
    return [name[: match.end()] for match in found]


def _first_few(names: Sequence[str]) -> str:
    return ", ".join([*names[:NAMED_KEYS], *(["…"] if len(names) > NAMED_KEYS else [])])


@contextmanager
def _checkpoint_errors(path: Path) -> Iterator[None]:
    """Whatever a reader raises on a file that somebody else wrote is that file's fault; say so in one sentence."""
    try:
        yield
    except BacksightError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise BacksightError(
            f"The checkpoint {path.name} in {path.parent.name} is corrupt or no safe weights file ({reason}): "
            "replace it, best by a .safetensors file."
        ) from error


def _load_pickled_tensors(path: Path) -> Any:
    # Training scripts of DeiT and timm keep their arguments beside the weights; a Namespace holds only values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _unwrapped(path: Path, content: Any) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    state = (
        {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not state:
        raise BacksightError(f"The checkpoint {path.name} in {path.parent.name} holds no weights: replace it.")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


# The hub


def hub_split(identifier: str) -> tuple[str, str | None]:
    """(repository, revision) of "owner/name" or "owner/name@revision"."""
    repository, _, revision = identifier.partition("@")
    return repository, revision or None


def cached_file(identifier: str, filenames: Sequence[str]) -> Path | None:
    """The first of these files of a hub repository that lies in the cache, else None. Asks no network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, revision = hub_split(identifier)
    for filename in filenames:
        try:
            found = try_to_load_from_cache(repository, filename, revision=revision)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found)
    return None


def is_local(name: str, identifier: str) -> bool:
    """Do the weights of a hub repository lie in data/weights/<name> or in the cache?"""
    if _checkpoint_in(weights_folder() / name) is not None:
        return True
    return cached_file(identifier, CHECKPOINT_NAMES) is not None


def hub_file(name: str, identifier: str, filenames: Sequence[str]) -> Path:
    """The first of these files of a hub repository, from the cache or else from the network.

    Raises BacksightError that says what is missing, how to get it and which targets work now.
    """
    if found := cached_file(identifier, filenames):
        return found
    refuse_unreachable(name, identifier, filenames[0])
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    repository, revision = hub_split(identifier)
    for filename in filenames:
        try:
            return Path(hf_hub_download(repository, filename, revision=revision))
        except LocalEntryNotFoundError as error:
            raise BacksightError(missing_weights(name, identifier, filename)) from error
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:160]
            raise BacksightError(
                f"{filenames[0]} of {name} could not be fetched from the hub repository {repository} ({reason}): "
                f"check the name or its access; {working_names()}."
            ) from error
    raise BacksightError(
        f"The hub repository {repository} of {name} holds none of {', '.join(filenames)}: it is of another kind."
    )


def refuse_unreachable(name: str, identifier: str, filename: str) -> None:
    """Raise BacksightError at once where a file is not local and the hub does not answer."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or not answers(constants.ENDPOINT):
        raise BacksightError(missing_weights(name, identifier, filename))


def missing_weights(name: str, identifier: str, filename: str) -> str:
    repository = hub_split(identifier)[0]
    folder = f"data/weights/{name.removeprefix(HUB_PREFIXES[0]).removeprefix(HUB_PREFIXES[1])}"
    return (
        f"{filename} of {name} is neither in {folder} nor in the Hugging Face cache, and the network does not "
        f"answer: on a machine with network run `hf download {repository} --local-dir {folder}` and bring the folder "
        f"here (or use pretrained=False for random weights); {working_names()}."
    )


def answers(address: str) -> bool:
    """Does a server answer, whatever it says, within a few seconds?"""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=NETWORK_TIMEOUT):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
