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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from backsight.errors import BacksightError

INDEX_SUFFIX = ".index.json"  # of a checkpoint in several files: says which tensor lies in which of them
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".pt.tar", ".npz", INDEX_SUFFIX)
NAMES = ["model.safetensors", "pytorch_model.bin", "model.pth", "open_clip_model.safetensors"]
NAMES += [f"{name}{INDEX_SUFFIX}" for name in NAMES[:2]]
# Modules that wrap others anywhere in a model, under names that nobody gives to a layer.
TRANSPARENT = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
AVERAGED = re.compile(r"(?:^|[._])(?:ema|teacher)(?:[._]|$)")
_WORDS = r"state_dict|model|model_state_dict|net|network|weights|params|module|student|teacher|\w+_ema|ema\w*"
WRAPPERS = re.compile(rf"(?:(?:{_WORDS})\.)*")
DECISIVE = 0.2  # of a model's names under a prefix: no chance, even where others are named differently


class Choice(NamedTuple):
    """The part of a file that is the model. state: without its prefix; note: which averaged weights they are, where
    the plain ones are there too; unused: names that lie elsewhere, but for copies and optimizers; held: all keys."""

    state: dict[str, Tensor]
    note: str = ""
    unused: tuple[str, ...] = ()
    held: tuple[str, ...] = ("another model",)


def checkpoint_in(folder: Path) -> Path | None:
    """The weights in a folder: one of the usual names, else the only file that can be one."""
    if usual := [folder / name for name in NAMES if (folder / name).exists()]:
        return usual[0]
    others = [path for path in folder.glob("*") if path.name.endswith(SUFFIXES) and "--" not in path.name]
    return others[0] if len(others) == 1 else None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file. Raises BacksightError where it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise BacksightError(f"{path.parent.name}/{path.name} is no JSON object ({error}): replace it.") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor in a checkpoint, by its dotted name; never unpickles anything but tensors and plain containers.

    path: of the file, or of the index of a checkpoint in several files.
    Raises BacksightError on a corrupt, truncated, incomplete or unsafe file, and on one without tensors.
    """
    where = f"The checkpoint {path.name} in {path.parent.name}"
    try:
        if path.name.endswith(INDEX_SUFFIX):
            parts = sorted(set(read_object(path).get("weight_map", {}).values()))
            content: Any = {name: tensor for part in parts for name, tensor in read_tensors(path.parent / part).items()}
        elif path.suffix == ".safetensors":
            content = load_file(path)
        elif path.suffix == ".npz":
            content = {name: torch.from_numpy(value) for name, value in np.load(path, allow_pickle=False).items()}
        else:
            # Training scripts of DeiT and timm keep their arguments beside the weights; a Namespace holds only values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except BacksightError:
        raise
    except FileNotFoundError as error:
        raise BacksightError(f"{where} is not there.") from error
    except Exception as error:  # whatever a reader raises on a file that somebody else wrote is that file's fault
        raise BacksightError(f"{where} {_refusal(path, error)}") from error
    if tensors := {TRANSPARENT.sub("", name): tensor for name, tensor in _flat(content)}:
        return tensors
    held = f"only {_few([*map(str, content)])}" if isinstance(content, Mapping) else "no dictionary"
    raise BacksightError(f"{where} holds no weights, {held}: replace it.")


def _flat(content: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat(value, f"{prefix}{key}.")


def _refusal(path: Path, error: Exception) -> str:
    if named := re.findall(r"GLOBAL ([\w.]+)", str(error)):
        with contextlib.suppress(Exception):  # legacy files cannot be looked into
            named = torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) or named
        return (
            f"holds {_few(named)}, and only tensors and plain containers are read from a pickle: it is no safe weights "
            "file, so save the state dictionary alone, best as .safetensors."
        )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() or [type(error).__name__]
    said = next((line for line in lines if line.startswith("Unsupported")), lines[0].partition(" Re-running")[0])
    return f"is corrupt or no safe weights file ({said[:160]}): replace it, best by a .safetensors file."


def choose(tensors: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> Choice:
    """The part of a file that covers the model best. Of equal parts the averaged one (EMA, teacher) is taken.

    tensors: as read; model: the state dictionary, for names and shapes. Where a file names everything differently,
    as other projects do, the wrappers of training scripts are taken off and no more.
    """
    covered: dict[str, list[bool]] = {}  # by prefix: has this name the model's shape, too?
    for name, tensor in tensors.items():
        parts = [] if name.startswith("optim") else name.split(".")
        for start in range(len(parts)):
            if (own := model.get(".".join(parts[start:]))) is not None:
                prefix = "".join(f"{part}." for part in parts[:start])
                covered.setdefault(prefix, []).append(own.shape == tensor.shape)
    scores = {prefix: (len(shapes), sum(shapes)) for prefix, shapes in covered.items()}
    best = max(scores.values(), default=(0, 0))
    twins = [prefix for prefix in scores if scores[prefix] == best]
    if best[0] < DECISIVE * len(model):
        around = Counter(WRAPPERS.match(name)[0] for name in tensors if not name.startswith("optim"))  # type: ignore[index]
        common = [prefix for prefix in around if around[prefix] >= 0.4 * around.total()]
        twins = [max(common, key=lambda prefix: bool(AVERAGED.search(prefix)), default="")]
    prefix, *_ = sorted(twins, key=lambda twin: (not AVERAGED.search(twin), "student" in twin, len(twin)))
    averaged = len(twins) > 1 and AVERAGED.search(prefix)
    return Choice(
        {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)},
        f" (EMA weights, {prefix.strip('.')})" if averaged else "",
        tuple(name for name in tensors if not name.startswith((*twins, "optim"))),
        tuple(dict.fromkeys(name.split(".")[0] for name in tensors)),
    )


def fitted(name: str, path: Path, choice: Choice, state: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    """Raise BacksightError where the state does not fit the model called `name`; warn of what a file holds beside it.

    Names without a place are a reason by themselves only where they are of a layer that the model has not: checkpoints
    carry counters, buffers and further heads without which a model is whole.
    """
    missing, unexpected = sorted(model.keys() - state.keys()), sorted(state.keys() - model.keys())
    pairs = [(key, state[key], model[key]) for key in sorted(model.keys() & state.keys())]
    shapes = [f"{key} {tuple(v.shape)} instead of {tuple(own.shape)}" for key, v, own in pairs if v.shape != own.shape]
    # Quantised weights mean nothing without the scale that belongs to them.
    floats = [(key, v) for key, v, own in pairs if own.is_floating_point()]
    coded = [f"{key} {v.dtype}" for key, v in floats if not v.is_floating_point() or v.dtype.itemsize == 1]
    kinds = {re.sub(r"\.\d+\.", ".#.", key) for key in model}
    if missing or shapes or coded or any(re.sub(r"\.\d+\.", ".#.", key) in kinds for key in unexpected):
        words = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "of whole numbers": coded}
        told = ", ".join(f"{len(names)} {kind} ({_few(names)})" for kind, names in words.items() if names)
        raise BacksightError(
            f"{path.name} does not fit {name}: {told}; the file holds {_few(choice.held, 8)}: correct the "
            "configuration or the checkpoint."
        )
    if beside := [*choice.unused, *unexpected]:
        warnings.warn(f"{path.name}: {len(beside)} tensors are not the model's ({_few(beside)}).", stacklevel=4)


def _few(names: Sequence[str], count: int = 3) -> str:
    return ", ".join([*names[:count], *(["…"] if len(names) > count else [])])
