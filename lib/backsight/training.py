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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.progress import progress_bar

HISTORY_COLUMNS = ("step", "module", "split", "loss", "seconds")
LOGGED_POINTS = 200  # rows of each module in the history, however long the training


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


class _Optimizers:
    """Muon for matrices and kernels, AdamW for everything else, as one.

    torch's Muon takes matrices only: a kernel (outputs, inputs, h, w) is stepped through a matrix that shares its
    memory.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        plain: Callable[[str], bool],
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        named = [(n, p) for module in modules.values() for n, p in module.named_parameters() if p.requires_grad]
        kernels = [p for n, p in named if p.ndim in (2, 4) and not plain(n)]
        others = [p for n, p in named if not (p.ndim in (2, 4) and not plain(n))]
        self.matrices = [(nn.Parameter(_as_matrix(kernel.detach(), kernel)), kernel) for kernel in kernels]
        self.parts: list[torch.optim.Optimizer] = []
        if kernels:
            matrices = [matrix for matrix, _ in self.matrices]
            muon = torch.optim.Muon(
                matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self.parts.append(muon)
        if others:
            self.parts.append(
                torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
            )

    def step(self, learning_rate: float) -> None:
        for matrix, kernel in self.matrices:
            matrix.grad = None if kernel.grad is None else _as_matrix(kernel.grad, kernel)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()

    def moments(self) -> list[dict[str, Tensor]]:
        """What the optimizers remember of each parameter, in a fixed order."""
        return [part.state[parameter] for part, parameter in self._parameters()]

    def set_moment(self, number: int, key: str, tensor: Tensor) -> None:
        """Put back what `moments` gave, in the memory layout in which the optimizer would have made it."""
        part, parameter = self._parameters()[number]
        like = parameter.detach() if tensor.shape == parameter.shape else tensor.to(parameter.device)
        part.state[parameter][key] = torch.empty_like(like).copy_(tensor)

    def _parameters(self) -> list[tuple[torch.optim.Optimizer, nn.Parameter]]:
        return [(part, p) for part in self.parts for group in part.param_groups for p in group["params"]]


def _as_matrix(kernel: Tensor, like: Tensor) -> Tensor:
    """(outputs, everything else), columns in the memory order of `like`, of which this is a view."""
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        kernel = kernel.permute(0, 2, 3, 1)
    return kernel.reshape(len(kernel), -1)


def accelerator() -> Accelerator:
    """The device and precision of every training: bfloat16 autocast on a GPU that has it, float32 elsewhere.

    Raises BacksightError under a multi-process launcher, which the loop does not support.
    """
    mixed = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    made = Accelerator(mixed_precision="bf16" if mixed else "no")
    if made.num_processes > 1:
        raise BacksightError(
            f"This training was launched as {made.num_processes} processes, but it runs in one: "
            "start it without a launcher."
        )
    return made


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """A seeded random state inside; the caller's own is put back on leaving."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


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
    On return the modules are on the training device, in eval mode, and the global random state is as it was.

    Returns the history: step, module, split ("train": mean since the row before; or "validation"), loss, seconds.
    Raises BacksightError on a NaN or infinite loss or gradient (naming step, batch and module), and on a
    checkpoint that is damaged or of another training.
    """
    if steps < 0:
        raise BacksightError(f"A training needs a number of steps of at least 0, not {steps}.")
    machine = accelerator()
    for module in modules.values():
        module.to(machine.device)
    trained = {name: [p for p in module.parameters() if p.requires_grad] for name, module in modules.items()}
    trained = {name: parameters for name, parameters in trained.items() if parameters}
    if not trained or steps == 0:
        _set_training(modules, False)
        return pd.DataFrame([], columns=list(HISTORY_COLUMNS))
    optimizers = _Optimizers(modules, plain, learning_rate, weight_decay)
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
    with seeded(seed, machine.device):
        if path is not None and path.exists():
            state, best = _load_checkpoint(path, modules, optimizers, identity)
        started = time.perf_counter() - state.seconds
        if validate is not None and state.step == 0:
            _validate(state, best, modules, validate, machine, started)
        bar = progress_bar(total=steps, initial=state.step, desc=title, unit="step", show=progress)
        try:
            while state.step < steps:
                _set_training(modules, True)
                batch = batch_at(state.step)
                with machine.autocast():
                    values = losses(batch, state.step)
                numbers = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
                for name, number in numbers.items():
                    _finite(number, "loss", name, state.step, describe_batch(batch))
                for parameter in (each for parameters in trained.values() for each in parameters):
                    parameter.grad = None
                machine.backward(torch.stack(list(values.values())).sum())
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
                    _validate(state, best, modules, validate, machine, started)
                    if patience is not None and min(state.stale.values()) >= patience:
                        break
                if path is not None and state.step % checkpoint_every == 0 and state.step < steps:
                    state.seconds = time.perf_counter() - started
                    _save_checkpoint(path, modules, optimizers, state, best, identity)
        finally:
            bar.close()
    for kept in best.values():
        _load(modules, kept)
    _set_training(modules, False)
    if path is not None:
        path.unlink(missing_ok=True)
    return pd.DataFrame(state.history, columns=list(HISTORY_COLUMNS))


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
    machine: Accelerator,
    started: float,
) -> None:
    """Keep the weights of every module (of all, for a joint loss) whose validation loss is a new best."""
    _set_training(modules, False)
    with torch.no_grad(), machine.autocast():
        measured = dict(validate())
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
    optimizers: _Optimizers,
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


def _load_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizers: _Optimizers,
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
