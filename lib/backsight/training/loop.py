"""The one training loop: it knows modules, losses and batches, and nothing of targets or images.

The order of the data is the caller's pure function of the step, and a checkpoint holds everything else, the
random state too: a training that was interrupted and resumed ends in the same weights, to the last digit on one
machine, as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed
from tqdm.auto import tqdm

from backsight.data.distributed import average, is_first, processes, wait_for_all
from backsight.errors import BacksightError
from backsight.targets.base import seeded
from backsight.training.muon import Optimizers

HISTORY_COLUMNS = ("step", "module", "split", "loss", "seconds")
LOGGED_POINTS = 200  # rows of each module in the history, however long the training
WIDE = 512  # rows and columns of a matrix from which bfloat16 pays on a CPU that has it
Precision = Literal["auto", "float32", "bfloat16"]
Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass
class _State:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    seconds: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    stale: dict[str, int] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0
    history: list[tuple[int, str, str, float, float]] = field(default_factory=list)


def training_device() -> torch.device:
    """This process's device, as accelerate finds it."""
    return processes().device


def faster_in_bfloat16(modules: Iterable[nn.Module] = ()) -> bool:
    """Whether bfloat16 autocast pays here: on a GPU that has it; on a CPU that has it, for wide modules.

    A CPU without AVX-512 BF16 or AMX emulates bfloat16, some hundred times slower (`make bench` shows it), so that it
    is asked and not timed: on a busy machine a timing of small products may say anything. With them matrix products
    were 3.9 times as fast, a training step of ViT-B/16 2.7 times, and one of modules of 128 channels no faster.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    wide = any(min(p.shape[0], p[0].numel()) >= WIDE for m in modules for p in m.parameters() if p.ndim > 1)
    return wide and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def learning_rate_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then a cosine to one hundredth of the peak."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    modules: Mapping[str, nn.Module],
    losses: Callable[[Any, int], Mapping[str, Tensor]],
    batch_at: Callable[[int], Any],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: float = 0.05,
    gradient_norm: float = 1.0,
    plain: Callable[[str], bool] = lambda name: False,
    seed: int = 0,
    validate: Callable[[], Mapping[str, float]] | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 200,
    identity: Mapping[str, Any] | None = None,
    parts: Callable[[Any], Sequence[Any]] = lambda batch: (batch,),
    precision: Precision = "auto",
    recompute: Callable[[nn.Module], bool] | None = None,
    describe_batch: Callable[[Any], str] = lambda batch: "of this step",
    title: str = "training",
    progress: bool = True,
) -> pd.DataFrame:
    """Train the modules side by side, with one gradient clip for each: matrices by Muon, the rest by AdamW.

    Muon (orthogonalised momentum) takes the weights of linear layers and convolutions, in which a short training
    learns about three times as much as AdamW does; `plain(name)` is true for those that AdamW takes all the same.
    Its steps are scaled to AdamW's, so that both have one learning rate: a warm-up, then a cosine.

    losses(batch, step) -> {name: scalar}: each name is a module (its own loss) or, if no name is one, a joint
    loss of all of them; the value may depend on nothing but the arguments, the weights and torch's random state.
    batch_at(step) is a pure function of the step. validate() -> {name: number} with the same names, called before
    the first step, every `validate_every` steps (a tenth of the training by default) and at the end: the modules
    end with their best validated weights, which may be those they came with, and training stops when no name has
    improved for `patience` validations.
    checkpoint: a safetensors file, written every `checkpoint_every` steps, resumed from where it exists, removed
    at the end; `identity` says what the training is, and a checkpoint of another one is refused.
    parts(batch): equal parts that go through the modules one after the other, their gradients added up, where a
    whole batch does not fit into memory; precision: "auto" takes bfloat16 autocast where it is faster; recompute: true
    for the layers whose activations are computed again on the way back instead of kept.
    Under `accelerate launch` every process calls this with batches of its own; gradients and losses are means over
    all processes, and the first one writes the checkpoint.
    On return the modules are on the training device, in eval mode, and the global random state is as it was.

    Returns the history: step, module, split ("train": mean since the row before; or "validation"), loss, seconds.
    Raises BacksightError on a NaN or infinite loss or gradient (naming step, batch and module), and on a
    checkpoint that is damaged or of another training.
    """
    if steps < 0:
        raise BacksightError(f"A training needs a number of steps of at least 0, not {steps}.")
    device = training_device()
    mixed = faster_in_bfloat16(modules.values()) if precision == "auto" else precision == "bfloat16"
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=mixed)
    for module in modules.values():
        module.to(device)
    trained = {name: [p for p in module.parameters() if p.requires_grad] for name, module in modules.items()}
    trained = {name: parameters for name, parameters in trained.items() if parameters}
    if not trained or steps == 0:
        _set_training(modules, False)
        return pd.DataFrame([], columns=list(HISTORY_COLUMNS))
    optimizers = Optimizers(modules, plain, learning_rate, weight_decay)
    identity = {
        **(identity or {}),
        "steps": steps,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "gradient_norm": gradient_norm,
        "seed": seed,
        "validate_every": validate_every,
        "patience": patience,
        "modules": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
    }
    validate_every = validate_every or max(1, steps // 10)
    log_every = max(1, steps // LOGGED_POINTS)
    state, best = _State(), dict[str, dict[str, Tensor]]()
    path = None if checkpoint is None else Path(checkpoint)
    with seeded(seed, device):
        if path is not None and is_first():
            _remove_unfinished(path)
        if path is not None and path.exists():
            state, best = _load_checkpoint(path, modules, optimizers, identity)
        started = time.perf_counter() - state.seconds
        if validate is not None and state.step == 0:
            _validate(state, best, modules, validate, autocast, started)
        bar = tqdm(
            total=steps, initial=state.step, desc=title, unit="step", leave=False, disable=not (progress and is_first())
        )
        try:
            while state.step < steps:
                _set_training(modules, True)
                batch = batch_at(state.step)
                for parameter in (each for parameters in trained.values() for each in parameters):
                    parameter.grad = None
                with recomputing(modules, recompute):
                    numbers = _add_gradients(losses, parts(batch), state.step, autocast)
                for name, number in numbers.items():
                    _finite(number, "loss", name, state.step, describe_batch(batch))
                average(p.grad for parameters in trained.values() for p in parameters if p.grad is not None)
                for name, parameters in trained.items():
                    norm = nn.utils.clip_grad_norm_(parameters, gradient_norm)
                    _finite(float(norm), "gradient", name, state.step, describe_batch(batch))
                optimizers.step(learning_rate_at(state.step, steps, learning_rate, warmup))
                state.step += 1
                bar.update()
                state.summed += 1
                for name, number in numbers.items():
                    state.sums[name] = state.sums.get(name, 0.0) + number
                if state.step % log_every == 0 or state.step == steps:
                    means = {name: total / state.summed for name, total in state.sums.items()}
                    bar.set_postfix(loss=f"{sum(means.values()) / len(means):.4f}")
                    _log(state, "train", means, started)
                    state.sums, state.summed = {}, 0
                if validate is not None and (state.step % validate_every == 0 or state.step == steps):
                    _validate(state, best, modules, validate, autocast, started)
                    if patience is not None and min(state.stale.values()) >= patience:
                        break
                if path is not None and state.step % checkpoint_every == 0 and state.step < steps:
                    state.seconds = time.perf_counter() - started
                    if is_first():
                        _save_checkpoint(path, modules, optimizers, state, best, identity)
        finally:
            bar.close()
    for kept in best.values():
        _load(modules, kept)
    _set_training(modules, False)
    wait_for_all()
    if path is not None and is_first():
        path.unlink(missing_ok=True)
    return pd.DataFrame(state.history, columns=list(HISTORY_COLUMNS))


def _add_gradients(
    losses: Callable[[Any, int], Mapping[str, Tensor]], parts: Sequence[Any], step: int, autocast: Autocast
) -> dict[str, float]:
    """Backward through every part; the losses of the batch, means over its parts and over all processes."""
    names: list[str] = []
    total = torch.empty(0)
    for part in parts:
        with autocast():
            values = losses(part, step)
        stacked = torch.stack(list(values.values()))
        names, total = list(values), stacked.detach() + (total if len(total) else 0.0)
        if torch.isfinite(stacked).all():  # else the caller says so, before any weight has changed
            (stacked.sum() / len(parts)).backward()
    total = total / len(parts)
    average([total])
    return dict(zip(names, total.tolist(), strict=True))


@contextmanager
def recomputing(modules: Mapping[str, nn.Module], layer: Callable[[nn.Module], bool] | None) -> Iterator[None]:
    """Inside, the layers of the modules for which layer(…) is true keep no activations between forward and backward."""
    chosen = [each for module in modules.values() for each in module.modules() if layer is not None and layer(each)]
    try:
        for each in chosen:
            each.forward = partial(checkpointed, each.forward, use_reentrant=False)
        yield
    finally:
        for each in chosen:
            del each.forward


def _set_training(modules: Mapping[str, nn.Module], training: bool) -> None:
    for module in modules.values():
        module.train(training)


def _weights(modules: Mapping[str, nn.Module], only: str | None = None) -> dict[str, Tensor]:
    """{number of the module/key: tensor} of all modules, or of the one that is named."""
    return {
        f"{number}/{key}": tensor
        for number, (name, module) in enumerate(modules.items())
        if only in (None, name)
        for key, tensor in module.state_dict().items()
    }


def _load(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    listed = list(modules.values())
    for number in sorted({int(key.partition("/")[0]) for key in weights}):
        listed[number].load_state_dict(
            {key.partition("/")[2]: t for key, t in weights.items() if key.startswith(f"{number}/")}
        )


def _finite(number: float, what: str, name: str, step: int, batch: str) -> None:
    if not math.isfinite(number):
        raise BacksightError(
            f"The {what} of {name!r} became {number} at step {step} on the batch {batch}: "
            "lower the learning rate, or look at these images."
        )


def _log(state: _State, split: str, losses: Mapping[str, float], started: float) -> None:
    seconds = time.perf_counter() - started
    state.history.extend((state.step, name, split, float(loss), seconds) for name, loss in losses.items())


def _validate(
    state: _State,
    best: dict[str, dict[str, Tensor]],
    modules: Mapping[str, nn.Module],
    validate: Callable[[], Mapping[str, float]],
    autocast: Autocast,
    started: float,
) -> None:
    """Keep the weights of every module (of all, for a joint loss) whose validation loss is a new best."""
    _set_training(modules, False)
    with torch.no_grad(), autocast():
        found = dict(validate())
    values = torch.tensor(list(found.values()), dtype=torch.float64)
    average([values])
    measured = dict(zip(found, values.tolist(), strict=True))
    _log(state, "validation", measured, started)
    for name, loss in measured.items():
        if loss < state.best.get(name, math.inf):
            state.best[name], state.stale[name] = loss, 0
            kept = _weights(modules, only=name if name in modules else None)
            best[name] = {key: tensor.clone() for key, tensor in kept.items()}
        else:
            state.stale[name] = state.stale.get(name, 0) + 1


def _save_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Optimizers,
    state: _State,
    best: Mapping[str, Mapping[str, Tensor]],
    identity: Mapping[str, Any],
) -> None:
    tensors = {f"weights/{key}": value for key, value in _weights(modules).items()}
    for number, kept in enumerate(best.values()):
        tensors.update({f"best/{number}/{key}": value for key, value in kept.items()})
    for number, moments in enumerate(optimizers.moments()):
        for key, value in moments.items():
            tensors[f"optimizer/{number}/{key}"] = value
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    metadata = {"state": asdict(state), "best": list(best), "identity": identity}
    write_tensors(path, tensors, {key: json.dumps(value) for key, value in metadata.items()})


def _remove_unfinished(path: Path) -> None:
    """What a kill in the middle of writing the checkpoint has left: our temporary file, or safetensors' own."""
    for stray in (*path.parent.glob(f".{path.name}.*.partial"), *path.parent.glob(".tmp??????")):
        stray.unlink(missing_ok=True)


def _load_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Optimizers,
    identity: Mapping[str, Any],
) -> tuple[_State, dict[str, dict[str, Tensor]]]:
    tensors, metadata = read_tensors(path, "checkpoint")
    if "state" not in metadata or "identity" not in metadata:
        raise BacksightError(f"{path} is not a checkpoint of backsight: delete it, or name another file.")
    found, wanted = json.loads(metadata["identity"]), json.loads(json.dumps(identity))
    for key in sorted(set(found) | set(wanted)):
        if found.get(key) != wanted.get(key):
            raise BacksightError(
                f"The checkpoint {path} belongs to another training ({key} is {found.get(key)} there and "
                f"{wanted.get(key)} here): delete it, or name another file."
            )
    state = _State(**json.loads(metadata["state"]))
    state.history = [tuple(row) for row in state.history]  # type: ignore[misc]
    weights: dict[str, Tensor] = {}
    best: dict[str, dict[str, Tensor]] = {name: {} for name in json.loads(metadata["best"])}
    for name, tensor in tensors.items():
        kind, _, key = name.partition("/")
        if kind == "weights":
            weights[key] = tensor
        elif kind == "best":
            number, _, key = key.partition("/")
            list(best.values())[int(number)][key] = tensor
        elif kind == "optimizer":
            number, _, key = key.partition("/")
            optimizers.set_moment(int(number), key, tensor)
    _load(modules, weights)
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    return state, best


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file, first under a temporary name: the file is whole or not there.

    Raises BacksightError where the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        owned = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        save_file(owned, temporary, dict(metadata))
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise BacksightError(
            f"{path} cannot be written ({error}): choose a folder that is writable and has space."
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()
    return path


def read_tensors(path: Path | str, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; `what` names it in the error.

    Raises BacksightError where there is no such file, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise BacksightError(f"There is no {what} at {path}: check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise BacksightError(
            f"The {what} {path} is damaged or is no safetensors file ({error}): delete it and make it again."
        ) from error
