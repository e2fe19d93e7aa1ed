"""The one loop: it learns, resumes to the last digit, keeps the best weights and stops where numbers end."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.targets.base import seeded
from backsight.training.loop import HISTORY_COLUMNS, learning_rate_at, train

INPUTS = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
TRUTH = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 1.0, -1.0]])


def _modules() -> dict[str, nn.Module]:
    with seeded(0):
        return {
            "blocks.0": nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 2)),
            "blocks.1": nn.Linear(4, 2),
        }


def _batch_at(step: int) -> Tensor:
    return INPUTS[torch.randperm(64, generator=torch.Generator().manual_seed(step))[:16]]


def _losses_of(modules: dict[str, nn.Module]):
    return lambda batch, step: ((name, F.mse_loss(m(batch), batch @ TRUTH.T)) for name, m in modules.items())


def _validation_of(modules: dict[str, nn.Module]):
    return lambda: {name: F.mse_loss(m(INPUTS), INPUTS @ TRUTH.T).item() for name, m in modules.items()}


def _trained(modules: dict[str, nn.Module], losses=None, **settings):
    return train(modules, losses or _losses_of(modules), _batch_at, progress=False, **settings)


def test_all_modules_learn_and_the_history_says_so() -> None:
    modules = _modules()
    before = _validation_of(modules)()
    history = _trained(modules, steps=150, learning_rate=0.2, validate=_validation_of(modules))
    after = _validation_of(modules)()
    assert all(after[name] < 0.3 * before[name] for name in modules)
    assert tuple(history.columns) == HISTORY_COLUMNS
    assert set(history["module"]) == set(modules)
    assert set(history["split"]) == {"train", "validation"}
    assert history.groupby("module")["step"].max().eq(150).all()
    assert not any(module.training for module in modules.values())


def test_one_graph_is_held_at_a_time() -> None:
    """Each loss has gone backward before the next is computed."""
    modules = _modules()
    waiting: list[bool] = []

    def losses(batch: Tensor, step: int):
        for name, module in modules.items():
            waiting.append(all(p.grad is None for p in module.parameters()))
            yield name, module(batch).square().mean()
            waiting.append(all(p.grad is not None for p in module.parameters()))

    _trained(modules, losses, steps=1)
    assert waiting == [True] * 4


@pytest.mark.parametrize("broken_at", [7, 11])
def test_interrupted_and_resumed_is_uninterrupted_to_the_last_digit(tmp_path, broken_at: int) -> None:
    path = tmp_path / "training.safetensors"
    settings = {"steps": 20, "seed": 3, "validate_every": 4, "checkpoint_every": 5}
    whole, resumed = _modules(), _modules()
    history = _trained(whole, validate=_validation_of(whole), **settings)

    def stopping(batch: Tensor, step: int):
        if step == broken_at:
            raise KeyboardInterrupt
        yield from _losses_of(resumed)(batch, step)

    foreign = tmp_path / ".tmpabc123"
    foreign.write_text("what another process is writing")
    with pytest.raises(KeyboardInterrupt):
        _trained(resumed, stopping, validate=_validation_of(resumed), checkpoint=path, **settings)
    assert path.exists()
    for module in resumed.values():
        nn.init.constant_(next(module.parameters()), 9.0)  # what was in memory is lost
    found = _trained(resumed, validate=_validation_of(resumed), checkpoint=path, **settings)
    assert [file.name for file in tmp_path.iterdir()] == [foreign.name]
    assert history.drop(columns="seconds").equals(found.drop(columns="seconds"))
    for name, module in whole.items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, resumed[name].state_dict()[key]), (name, key)


def test_a_checkpoint_of_another_training_is_refused(tmp_path, monkeypatch) -> None:
    path = tmp_path / "training.safetensors"
    modules = _modules()

    def broken(batch: Tensor, step: int):
        if step == 3:
            raise KeyboardInterrupt
        yield from _losses_of(modules)(batch, step)

    settings = {"steps": 6, "checkpoint": path, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        _trained(modules, broken, identity={"data": "cats"}, **settings)
    with pytest.raises(BacksightError, match="seed"):
        _trained(modules, seed=1, identity={"data": "cats"}, **settings)
    with pytest.raises(BacksightError, match="dogs"):
        _trained(modules, identity={"data": "dogs"}, **settings)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BacksightError, match="damaged"):
        _trained(modules, **settings)


def test_nan_stops_with_step_and_module_before_a_weight_has_changed() -> None:
    modules = _modules()
    before: dict[str, Tensor] = {}

    def losses(batch: Tensor, step: int):
        if step == 4:
            before.update({name: next(m.parameters()).detach().clone() for name, m in modules.items()})
        for name, loss in _losses_of(modules)(batch, step):
            yield name, loss * math.nan if step == 4 and name == "blocks.1" else loss

    with pytest.raises(BacksightError, match=r"'blocks\.1' became nan at step 4"):
        _trained(modules, losses, steps=9)
    assert all(torch.equal(before[name], next(m.parameters())) for name, m in modules.items())


def test_an_infinite_gradient_stops_too() -> None:
    modules = {"root": nn.Linear(4, 2)}
    nn.init.zeros_(modules["root"].weight)
    nn.init.zeros_(modules["root"].bias)
    with pytest.raises(BacksightError, match="'root'"):
        _trained(modules, lambda b, s: [("root", modules["root"](b).pow(2).sum().sqrt())], steps=2)


@pytest.mark.parametrize("together", [False, True])
def test_best_weights_are_kept_for_each_module_or_for_all_of_one_step(together: bool) -> None:
    modules = _modules()
    curves = {"blocks.0": iter([4.0, 3.0, 1.0, 2.0, 2.0]), "blocks.1": iter([5.0, 1.0, 2.5, 2.0, 4.0])}
    seen: list[dict[str, Tensor]] = []

    def validate() -> dict[str, float]:
        seen.append({name: next(m.parameters()).detach().clone() for name, m in modules.items()})
        return {name: next(curve) for name, curve in curves.items()}

    _trained(modules, steps=4, validate=validate, validate_every=1, together=together)
    best = {"blocks.0": 2, "blocks.1": 2 if together else 1}
    for name, step in best.items():
        assert torch.equal(next(modules[name].parameters()), seen[step][name])


def test_a_training_that_makes_things_worse_keeps_what_it_came_with() -> None:
    modules = _modules()
    before = {name: next(module.parameters()).detach().clone() for name, module in modules.items()}
    calls = iter(range(100))
    _trained(modules, steps=4, validate=lambda: dict.fromkeys(modules, float(next(calls))))
    assert all(torch.equal(before[name], next(module.parameters())) for name, module in modules.items())


def test_a_joint_loss_trains_all_modules() -> None:
    modules = {"first": nn.Linear(4, 4), "second": nn.Linear(4, 2)}
    before = {name: module.weight.detach().clone() for name, module in modules.items()}

    def losses(batch: Tensor, step: int):
        yield "pixels", F.mse_loss(modules["second"](modules["first"](batch)), batch @ TRUTH.T)

    _trained(modules, losses, steps=5)
    assert all(not torch.equal(module.weight, before[name]) for name, module in modules.items())


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    _trained(_modules(), steps=2)
    assert torch.equal(state, torch.get_rng_state())


def test_frozen_modules_and_no_steps_are_nothing_to_train() -> None:
    modules = _modules()
    assert _trained(modules, steps=0).empty
    modules["blocks.0"].requires_grad_(False)
    before = next(modules["blocks.0"].parameters()).clone()
    _trained(modules, lambda b, s: [("blocks.1", modules["blocks.1"](b).square().mean())], steps=2)
    assert torch.equal(before, next(modules["blocks.0"].parameters()))


def test_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate_at(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.01, abs=0.01)
