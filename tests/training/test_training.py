"""The one loop: it learns, resumes to the last digit, keeps the best weights and stops where numbers end."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backsight.errors import BacksightError
from backsight.training.loop import HISTORY_COLUMNS, learning_rate_at, read_tensors, seeded, train, write_tensors

INPUTS = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
TRUTH = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 1.0, -1.0]])


def _modules() -> dict[str, nn.Module]:
    with seeded(0):
        return {
            "blocks.0": nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 2)),
            "blocks.1": nn.Linear(4, 2),
        }


def _batch_at(step: int) -> torch.Tensor:
    return INPUTS[torch.randperm(64, generator=torch.Generator().manual_seed(step))[:16]]


def _losses_of(modules: dict[str, nn.Module]):
    return lambda batch, step: {name: F.mse_loss(module(batch), batch @ TRUTH.T) for name, module in modules.items()}


def _validation_of(modules: dict[str, nn.Module]):
    return lambda: {name: F.mse_loss(m(INPUTS), INPUTS @ TRUTH.T).item() for name, m in modules.items()}


def test_all_modules_learn_and_the_history_says_so() -> None:
    modules = _modules()
    before = _validation_of(modules)()
    history = train(
        modules,
        _losses_of(modules),
        _batch_at,
        steps=150,
        learning_rate=0.2,
        validate=_validation_of(modules),
        progress=False,
    )
    after = _validation_of(modules)()
    assert all(after[name] < 0.3 * before[name] for name in modules)
    assert tuple(history.columns) == HISTORY_COLUMNS
    assert set(history["module"]) == set(modules)
    assert set(history["split"]) == {"train", "validation"}
    assert history.groupby("module")["step"].max().eq(150).all()
    assert not any(module.training for module in modules.values())


@pytest.mark.parametrize("broken_at", [7, 11])
def test_interrupted_and_resumed_is_uninterrupted_to_the_last_digit(tmp_path, broken_at: int) -> None:
    def run(stop: int | None) -> tuple[dict[str, nn.Module], list]:
        modules = _modules()
        losses = _losses_of(modules)

        def stopping(batch, step):
            if step == stop:
                raise KeyboardInterrupt
            return losses(batch, step)

        checkpoint = None if stop is None else tmp_path / "training.safetensors"
        settings = {
            "steps": 20,
            "seed": 3,
            "validate": _validation_of(modules),
            "validate_every": 4,
            "patience": 5,
            "checkpoint_every": 5,
            "progress": False,
            "checkpoint": checkpoint,
        }
        if checkpoint is not None:
            with pytest.raises(KeyboardInterrupt):
                train(modules, stopping, _batch_at, **settings)
            assert checkpoint.exists()
            modules = _modules()
            for module in modules.values():
                nn.init.constant_(next(module.parameters()), 9.0)  # what was in memory is lost
            settings["validate"] = _validation_of(modules)
        history = train(modules, _losses_of(modules), _batch_at, **settings)
        assert checkpoint is None or not checkpoint.exists()
        return modules, history.drop(columns="seconds").values.tolist()

    whole, history = run(None)
    resumed, resumed_history = run(broken_at)
    assert history == resumed_history
    for name, module in whole.items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, resumed[name].state_dict()[key]), (name, key)


def test_a_checkpoint_of_another_training_is_refused(tmp_path) -> None:
    path = tmp_path / "training.safetensors"
    modules = _modules()

    def broken(batch, step):
        if step == 3:
            raise KeyboardInterrupt
        return _losses_of(modules)(batch, step)

    settings = {"steps": 6, "checkpoint": path, "checkpoint_every": 2, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        train(modules, broken, _batch_at, **settings)
    with pytest.raises(BacksightError, match="seed is 0 there and 1 here"):
        train(modules, _losses_of(modules), _batch_at, seed=1, **settings)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BacksightError, match="damaged"):
        train(modules, _losses_of(modules), _batch_at, **settings)


def test_nan_stops_with_step_batch_and_module() -> None:
    modules = _modules()

    def losses(batch, step):
        found = dict(_losses_of(modules)(batch, step))
        if step == 4:
            found["blocks.1"] = found["blocks.1"] * math.nan
        return found

    with pytest.raises(BacksightError, match=r"'blocks\.1' became nan at step 4 on the batch of cats"):
        train(modules, losses, _batch_at, steps=9, describe_batch=lambda batch: "of cats", progress=False)


def test_an_infinite_gradient_stops_too() -> None:
    modules = {"root": nn.Linear(4, 2)}
    nn.init.zeros_(modules["root"].weight)
    nn.init.zeros_(modules["root"].bias)
    with pytest.raises(BacksightError, match="gradient of 'root'"):
        train(
            modules, lambda b, s: {"root": modules["root"](b).pow(2).sum().sqrt()}, _batch_at, steps=2, progress=False
        )


def test_best_weights_are_kept_for_each_module_and_patience_ends_the_training() -> None:
    modules = _modules()
    curves = {
        "blocks.0": iter([4.0, 3.0, 1.0, 2.0, 2.0, 2.0, 2.0]),
        "blocks.1": iter([5.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
    }
    seen: list[dict[str, torch.Tensor]] = []

    def validate():
        seen.append({name: next(m.parameters()).detach().clone() for name, m in modules.items()})
        return {name: next(curve) for name, curve in curves.items()}

    history = train(
        modules,
        _losses_of(modules),
        _batch_at,
        steps=60,
        validate=validate,
        validate_every=10,
        patience=2,
        progress=False,
    )
    assert history["step"].max() == 40  # 20 was the last better one, of blocks.0
    assert torch.equal(next(modules["blocks.0"].parameters()), seen[2]["blocks.0"])
    assert torch.equal(next(modules["blocks.1"].parameters()), seen[1]["blocks.1"])


def test_a_training_that_makes_things_worse_keeps_what_it_came_with() -> None:
    modules = _modules()
    before = {name: next(module.parameters()).detach().clone() for name, module in modules.items()}
    calls = iter(range(100))
    worse = train(
        modules,
        _losses_of(modules),
        _batch_at,
        steps=4,
        validate=lambda: dict.fromkeys(modules, float(next(calls))),
        progress=False,
    )
    assert worse.loc[worse["split"] == "validation", "step"].min() == 0
    assert all(torch.equal(before[name], next(module.parameters())) for name, module in modules.items())


def test_a_joint_loss_trains_all_modules() -> None:
    modules = {"first": nn.Linear(4, 4), "second": nn.Linear(4, 2)}
    before = {name: module.weight.detach().clone() for name, module in modules.items()}

    def losses(batch, step):
        return {"pixels": F.mse_loss(modules["second"](modules["first"](batch)), batch @ TRUTH.T)}

    train(
        modules,
        losses,
        _batch_at,
        steps=5,
        validate=lambda: {"pixels": losses(INPUTS, 0)["pixels"].item()},
        progress=False,
    )
    assert all(not torch.equal(module.weight, before[name]) for name, module in modules.items())


def test_the_global_random_state_is_left_alone() -> None:
    modules = _modules()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train(modules, _losses_of(modules), _batch_at, steps=2, progress=False)
    assert torch.equal(state, torch.get_rng_state())


def test_frozen_modules_and_no_steps_are_nothing_to_train() -> None:
    modules = _modules()
    assert train(modules, _losses_of(modules), _batch_at, steps=0).empty
    modules["blocks.0"].requires_grad_(False)
    before = next(modules["blocks.0"].parameters()).clone()
    train(
        modules, lambda b, s: {"blocks.1": modules["blocks.1"](b).square().mean()}, _batch_at, steps=2, progress=False
    )
    assert torch.equal(before, next(modules["blocks.0"].parameters()))


def test_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate_at(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.01, abs=0.01)


def test_files_are_whole_or_absent(tmp_path) -> None:
    path = write_tensors(tmp_path / "deep" / "x.safetensors", {"a": torch.arange(3)}, {"note": "yes"})
    tensors, metadata = read_tensors(path, "inverse")
    assert tensors["a"].tolist() == [0, 1, 2]
    assert metadata == {"note": "yes"}
    assert [each.name for each in path.parent.iterdir()] == ["x.safetensors"]
    with pytest.raises(BacksightError, match="no inverse at"):
        read_tensors(tmp_path / "none", "inverse")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(BacksightError, match="cannot be written"):
        write_tensors(tmp_path / "file" / "x.safetensors", {"a": torch.zeros(1)}, {})
