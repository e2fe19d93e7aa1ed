"""Weights in a file: whatever training scripts wrapped around them, they become a model's state dictionary.

A file is read as one flat {dotted name: tensor}, so that {"ema": {"module": {"norm.weight": …}}} and
{"ema.module.norm.weight": …} are the same, and a wrapper is only a prefix, as `module.` and `backbone.` are. The prefix
under which the file covers the model best is the right one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError

INDEX_SUFFIX = ".index.json"  # of a checkpoint in several files: says which tensor lies in which of them
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".pt.tar", ".npz", INDEX_SUFFIX)
NAMES = ("model.safetensors", "pytorch_model.bin", "model.pth", "open_clip_model.safetensors")
INDEX_NAMES = tuple(f"{name}{INDEX_SUFFIX}" for name in NAMES[:2])
# Modules that wrap others anywhere in a model, under names that nobody gives to a layer.
TRANSPARENT = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
AVERAGED = re.compile(r"(?:^|[._])(?:ema|teacher)(?:[._]|$)")
WRAPPERS = re.compile(
    r"(?:state_dict|model|model_state_dict|net|network|weights|params|module|student|teacher|\w+_ema|ema\w*)"
)
DECISIVE = 0.2  # of a model's names under a prefix: no chance, even where others are named differently
SHOWN = 3  # names of each kind, in a sentence


@dataclass(frozen=True)
class Choice:
    """The part of a file that is the model. state: without the prefix; averaged: rather than the plain weights that
    are there too; unused: names that lie elsewhere, other copies and optimizers left out; held: the file's own keys."""

    state: dict[str, Tensor]
    prefix: str
    averaged: bool
    unused: tuple[str, ...]
    held: tuple[str, ...]

    def label(self, label: str) -> str:
        """`Target.weights`: says when averaged weights were taken."""
        return f"{label} (EMA weights, {self.prefix.strip('.')})" if self.averaged else label


def checkpoint_in(folder: Path) -> Path | None:
    """The weights in a folder: one of the usual names, else the only file that can be one."""
    if usual := [folder / name for name in (*NAMES, *INDEX_NAMES) if (folder / name).exists()]:
        return usual[0]
    others = [path for path in folder.glob("*") if path.name.endswith(SUFFIXES) and "--" not in path.name]
    return others[0] if len(others) == 1 else None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file. Raises BacksightError where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise BacksightError(f"{path.parent.name}/{path.name} cannot be read as JSON ({error}): replace it.") from error
    if not isinstance(content, dict):
        raise BacksightError(f"{path.parent.name}/{path.name} is not a JSON object: replace it.")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor in a checkpoint, by its dotted name; never unpickles anything but tensors and plain containers.

    path: of the file, or of the index of a checkpoint in several files.
    Raises BacksightError on a corrupt, truncated, incomplete or unsafe file, and on one without tensors.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return {name: tensor for part in _parts(path) for name, tensor in read_tensors(part).items()}
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            # Training scripts of DeiT and timm keep their arguments beside the weights; a Namespace holds only values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a reader raises on a file that somebody else wrote is that file's fault
        raise BacksightError(f"The checkpoint {path.name} in {path.parent.name} {_refusal(path, error)}") from error
    tensors = {TRANSPARENT.sub("", name): tensor for name, tensor in _flat(content)}
    if not tensors:
        keys = f"only {_few([str(key) for key in content])}" if isinstance(content, Mapping) else "no dictionary"
        raise BacksightError(f"The checkpoint {path.name} in {path.parent.name} holds no weights, {keys}: replace it.")
    return tensors


def _flat(content: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat(value, f"{prefix}{key}.")


def _refusal(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is not there."
    if named := re.findall(r"GLOBAL ([\w.]+)", str(error)):
        with contextlib.suppress(Exception):  # legacy files cannot be looked into
            named = torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) or named
        return (
            f"holds {_few(named)}, and only tensors and plain containers are read from a pickle: it is no safe weights "
            "file, so save the state dictionary alone, best as .safetensors."
        )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() or [type(error).__name__]
    return f"is corrupt or no safe weights file ({lines[0][:160]}): replace it, best by a .safetensors file."


def _parts(index: Path) -> list[Path]:
    """The files that the index of a checkpoint names. Raises BacksightError where it names none, or one is missing."""
    content = read_object(index).get("weight_map")
    names = sorted(set(map(str, content.values()))) if isinstance(content, Mapping) else []
    if not names:
        raise BacksightError(f"{index.name} in {index.parent.name} names no files of weights: replace it.")
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise BacksightError(
            f"The checkpoint {index.name} in {index.parent.name} lacks {len(absent)} of its {len(names)} files "
            f"({_few(absent)}): put them beside it."
        )
    return [index.parent / name for name in names]


def choose(tensors: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> Choice:
    """The part of a file that covers the model best. Of equal parts the averaged one (EMA, teacher) is taken.

    tensors: as read; model: the state dictionary, for names and shapes. Where a file names everything differently,
    as other projects do, the wrappers of training scripts are taken off and no more.
    """
    names: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        start = 0
        while not name.startswith("optim"):
            if (own := model.get(name[start:])) is not None:
                names[name[:start]] += 1
                shapes[name[:start]] += own.shape == tensor.shape
            if not (start := name.find(".", start) + 1):
                break
    best = max(names, key=lambda prefix: (names[prefix], shapes[prefix]), default="")
    if names[best] < DECISIVE * len(model):
        twins = [_unwrapped(tensors)]
    else:
        twins = [prefix for prefix in names if (names[prefix], shapes[prefix]) == (names[best], shapes[best])]
    twins.sort(key=lambda prefix: (not AVERAGED.search(prefix), "student" in prefix, len(prefix)))
    state = {name.removeprefix(twins[0]): value for name, value in tensors.items() if name.startswith(twins[0])}
    unused = tuple(name for name in tensors if not name.startswith((*twins, "optim")))
    held = tuple(dict.fromkeys(name.split(".")[0] for name in tensors))
    return Choice(state, twins[0], len(twins) > 1 and AVERAGED.search(twins[0]) is not None, unused, held)


def _unwrapped(tensors: Mapping[str, Tensor]) -> str:
    """The prefix of wrappers that training scripts put around a state dictionary."""
    prefix = ""
    while True:
        inside = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        parts = Counter(name.split(".")[0] for name in inside if "." in name and not name.startswith("optim"))
        wrappers = [part for part in parts if WRAPPERS.fullmatch(part) and parts[part] >= 0.4 * sum(parts.values())]
        if not wrappers:
            return prefix
        prefix += max(wrappers, key=lambda part: (AVERAGED.search(part) is not None, parts[part])) + "."


def misfit(state: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> str:
    """Which names of a checkpoint differ from the model's, in words, or "" where it fits.

    Names without a place are a reason by themselves only where they are of a layer that the model has not: checkpoints
    carry counters, buffers and further heads without which a model is whole.
    """
    missing, unexpected = sorted(model.keys() - state.keys()), sorted(state.keys() - model.keys())
    pairs = [(name, state[name], model[name]) for name in sorted(model.keys() & state.keys())]
    shapes = [f"{n} {tuple(v.shape)} instead of {tuple(own.shape)}" for n, v, own in pairs if v.shape != own.shape]
    coded = [f"{name} {value.dtype}" for name, value, own in pairs if _coded(value, own)]
    kinds = {re.sub(r"\.\d+\.", ".#.", name) for name in model}
    deeper = [name for name in unexpected if re.sub(r"\.\d+\.", ".#.", name) in kinds]
    if not missing and not shapes and not coded and not deeper:
        return ""
    words = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "of whole numbers": coded}
    return ", ".join(f"{len(names)} {kind} ({_few(names)})" for kind, names in words.items() if names)


def _coded(value: Tensor, own: Tensor) -> bool:
    """Quantised weights mean nothing without the scale that belongs to them."""
    return own.is_floating_point() and (not value.is_floating_point() or value.dtype.itemsize == 1)


def unfit(name: str, path: Path, words: str, choice: Choice | None) -> BacksightError:
    """The refusal of a checkpoint; words: what `misfit` says of it."""
    held = _few(choice.held, 8) if choice else "another model"
    return BacksightError(
        f"{path.name} does not fit {name}: {words}; the file holds {held}: correct the configuration or the checkpoint."
    )


def warn_of_unused(path: Path, names: Sequence[str]) -> None:
    """One warning that names what a file holds beside the model."""
    if names:
        warnings.warn(f"{path.name}: {len(names)} tensors are not the model's ({_few(names)}).", stacklevel=4)


def unique(model: nn.Module) -> dict[str, Tensor]:
    """The state without its second names: a weight that two modules share lies once in a checkpoint."""
    state = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: tensor for name, tensor in state.items() if first[id(tensor)] == name}


def _few(names: Sequence[str], count: int = SHOWN) -> str:
    return ", ".join([*names[:count], *(["…"] if len(names) > count else [])])
