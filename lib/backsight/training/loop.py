"""The one training loop: it knows modules, losses and batches, and nothing of targets or images.

The order of the data is the caller's pure function of the step, and a checkpoint holds everything else, the random
state too: a training that was interrupted and resumed ends in the same weights, to the last digit on one machine.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from backsight.data.distributed import average, processes
from backsight.errors import BacksightError
from backsight.inverses.files import write_tensors
from backsight.targets.base import seeded
from backsight.training.muon import Group, default_group, optimizers, step_all

HISTORY_COLUMNS = ("step", "module", "split", "loss", "seconds")
LOGGED_POINTS = 200  # rows of each module in the history, however long the training


def autocast(device: torch.device, bfloat16: bool = False) -> AbstractContextManager[Any]:
    """bfloat16 where it is fast: on GPUs that have it, and, where asked for, on CPUs that have it.

    A CPU may emulate it, a hundred times slower.
    """
    fast = device.type == "cuda" and torch.cuda.is_available()
    fast = fast and torch.cuda.is_bf16_supported(including_emulation=False)
    if bfloat16 and device.type == "cpu":
        fast = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.autocast(device.type, torch.bfloat16) if fast else nullcontext()


def learning_rate_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then a cosine to one hundredth of the peak."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    modules: Mapping[str, nn.Module],
    losses: Callable[[Any, int], Iterable[tuple[str, Tensor]]],
    batch_at: Callable[[int], Any],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: float = 0.05,
    schedule: int | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    gradient_norm: float = 1.0,
    group: Callable[[str, Tensor], Group] = default_group,
    seed: int = 0,
    validate: Callable[[], Mapping[str, float]] | None = None,
    validate_every: int | None = None,
    together: bool = False,
    bfloat16: bool = False,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 200,
    identity: Mapping[str, Any] | None = None,
    title: str = "training",
    progress: bool = True,
) -> pd.DataFrame:
    """Train the modules side by side, where they are, with one gradient clip for each.

    losses(batch, step) yields (name, scalar): each goes backward before the next is computed, so that only one graph is
    held; the names are the same in every step. batch_at(step) is a pure function of the step. group(name, parameter):
    which optimizer takes it. schedule: steps over which the rate falls, if not `steps`.
    validate() -> {name: number}, the same on all processes, called before the first step, every `validate_every` steps
    (a tenth of the training by default) and at the end. Each module ends with the weights of its own best number, or,
    `together`, all with those of the step whose mean number is best; they may be those that they came with.
    bfloat16: see `autocast`.
    checkpoint: a file, written every `checkpoint_every` steps, resumed from where it exists, removed at the end;
    `identity` says what the training is, and a checkpoint of another one is refused.
    Under `accelerate launch` every process calls this with batches of its own; gradients and losses are means over all.
    On return the modules are in eval mode, and the global random state is as it was.

    Returns the history: step, module, split ("train": mean since the row before; or "validation"), loss, seconds.
    Raises BacksightError on a NaN or infinite loss or gradient (no weight has changed by it), and on a checkpoint that
    is damaged or of another training.
    """
    trained = {name: [p for p in module.parameters() if p.requires_grad] for name, module in modules.items()}
    trained = {name: parameters for name, parameters in trained.items() if parameters}
    whole = nn.ModuleList(modules.values()).eval()
    if not trained or steps < 1:
        return pd.DataFrame([], columns=list(HISTORY_COLUMNS))
    device, first = next(iter(trained.values()))[0].device, processes().is_main_process
    named = (pair for module in modules.values() for pair in module.named_parameters() if pair[1].requires_grad)
    stepping = optimizers(named, weight_decay, group, betas)
    identity = {
        **(identity or {}),
        "schedule": [steps, schedule, learning_rate, weight_decay, warmup, gradient_norm, validate_every, together],
        "seed": seed,
        "bfloat16": bfloat16,
        "processes": processes().num_processes,
        "modules": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
    }
    validate_every = validate_every or max(1, steps // 10)
    log_every = max(1, steps // LOGGED_POINTS)
    random = torch.cuda if device.type == "cuda" else torch  # whose state is kept; dropout draws where the modules are
    path = None if checkpoint is None else Path(checkpoint)
    # What a checkpoint holds besides modules and optimizers; recent: losses since the last row of the history.
    state = SimpleNamespace(step=0, seconds=0.0, history=[], recent={}, best={}, weights={})
    holders: list[Any] = [whole, *stepping]
    with seeded(seed, device):
        if path is not None and path.exists():
            content = _read(path, identity, device)
            vars(state).update(content["state"])
            for holder, held in zip(holders, content["holders"], strict=True):
                holder.load_state_dict(held)
            random.set_rng_state(content["random"].cpu())
        started = time.perf_counter() - state.seconds

        def log(split: str, numbers: Mapping[str, float]) -> None:
            state.seconds = time.perf_counter() - started
            state.history += [(state.step, name, split, number, state.seconds) for name, number in numbers.items()]

        def validated() -> None:
            """Keep the weights of every module whose number is a new best."""
            if validate is None:
                return
            whole.eval()
            with torch.no_grad(), autocast(device, bfloat16):
                numbers = dict(validate())
            log("validation", numbers)
            for name, number in ({"": sum(numbers.values()) / len(numbers)} if together else numbers).items():
                if number < state.best.get(name, math.inf):
                    state.best[name] = number
                    for module in modules if together else (name,):
                        state.weights[module] = copy.deepcopy(modules[module].state_dict())

        if state.step == 0:
            validated()
        hidden = not (progress and first)
        with tqdm(total=steps, initial=state.step, desc=title, unit="step", leave=False, disable=hidden) as bar:
            for step in range(state.step, steps):
                whole.train()
                numbers = _gradients(trained, losses(batch_at(step), step), device, bfloat16, gradient_norm, step)
                step_all(stepping, learning_rate_at(step, schedule or steps, learning_rate, warmup))
                state.step = step + 1
                bar.update()
                for name, number in numbers.items():
                    state.recent.setdefault(name, []).append(number)
                if state.step % log_every == 0 or state.step == steps:
                    means = {name: sum(values) / len(values) for name, values in state.recent.items()}
                    bar.set_postfix(loss=f"{sum(means.values()) / len(means):.4f}")
                    log("train", means)
                    state.recent.clear()
                if state.step % validate_every == 0 or state.step == steps:
                    validated()
                if path is not None and first and state.step % checkpoint_every == 0 and state.step < steps:
                    state.seconds = time.perf_counter() - started
                    held = [holder.state_dict() for holder in holders]
                    content = {"identity": identity, "state": vars(state), "holders": held}
                    tensors: dict[str, Tensor] = {}
                    described = _described(content | {"random": random.get_rng_state()}, tensors)
                    write_tensors(path, tensors, {"content": json.dumps(described)})
    for name, weights in state.weights.items():
        modules[name].load_state_dict(weights)
    whole.eval()
    processes().wait_for_everyone()
    if path is not None and first:
        for written in (path, *path.parent.glob(f".{path.stem}.????????{path.suffix}")):  # and what a kill left half
            written.unlink(missing_ok=True)
    return pd.DataFrame(state.history, columns=list(HISTORY_COLUMNS))


def _gradients(
    trained: Mapping[str, Sequence[nn.Parameter]],
    losses: Iterable[tuple[str, Tensor]],
    device: torch.device,
    bfloat16: bool,
    gradient_norm: float,
    step: int,
) -> dict[str, float]:
    """Backward loss by loss, and the clip of each module; the losses. Waits for the device once, at the end."""
    parameters = [parameter for listed in trained.values() for parameter in listed]
    for parameter in parameters:
        parameter.grad = None
    values, remaining = dict[str, Tensor](), iter(losses)
    while True:
        with autocast(device, bfloat16):
            name, loss = next(remaining, ("", None))
        if loss is None:
            break
        loss.backward()
        values[name] = loss.detach().float()
    if processes().num_processes > 1:
        # Means over the processes, each giving zeros for what its batch did not reach; what none reached stays None.
        reached = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        average([reached])
        average(gradients)
        for parameter, gradient, by in zip(parameters, gradients, reached.tolist(), strict=True):
            parameter.grad = gradient if by else None
    means = torch.stack(list(values.values()))
    average([means])
    norms = [nn.utils.clip_grad_norm_(listed, gradient_norm) for listed in trained.values()]
    numbers = torch.cat([means, torch.stack([norm.to(device) for norm in norms])]).tolist()
    for name, number in zip((*values, *trained), numbers, strict=True):
        if not math.isfinite(number):
            raise BacksightError(
                f"The loss or gradient of {name!r} became {number} at step {step}: lower the learning rate, or "
                "look at the images of this batch."
            )
    return dict(zip(values, numbers, strict=False))


def _read(path: Path, identity: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            content = _restored(json.loads(file.metadata()["content"]), file)
        other = content["identity"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BacksightError(f"{path} is a damaged checkpoint, or none ({error}): delete it.") from error
    here = json.loads(json.dumps(identity))
    for key in sorted(other.keys() | here.keys()):
        if other.get(key) != here.get(key):
            raise BacksightError(
                f"The checkpoint {path} belongs to another training ({key} is {other.get(key)} there and "
                f"{here.get(key)} here): delete it, or name another file."
            )
    return content


def _described(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of nested dictionaries and lists; their tensors go to `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name, "stride": value.stride()}  # sums come out the same in the same order alone
    if isinstance(value, Mapping):  # as pairs: keys may be numbers
        return {"pairs": [[key, _described(item, tensors)] for key, item in value.items()]}
    return [_described(item, tensors) for item in value] if isinstance(value, list | tuple) else value


def _restored(value: Any, file: Any) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            tensor = file.get_tensor(value["tensor"])
            return tensor.new_empty_strided(tensor.shape, value["stride"]).copy_(tensor)
        return {key: _restored(item, file) for key, item in value["pairs"]}
    return [_restored(item, file) for item in value] if isinstance(value, list) else value
