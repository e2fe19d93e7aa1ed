"""Whole chains: many half-steps solved at once come back to round-off, and what has not come back is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from targets.examples import small_timm
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.inverse import ChainSettings, ExactInverse
from backsight.exact.joint import solve_chain, through
from backsight.exact.map import MapSettings
from backsight.exact.steps import Step
from backsight.inverses.linear import fit_linear
from backsight.studies.whole_chain import ANOTHER_ROOT, BACK, FATES, LOST, chain_model, measure_whole_chains
from backsight.targets import Target


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(target: Target, count: int, seed: int = 0) -> Tensor:
    return torch.rand((count, 3, *target.image_size), generator=torch.Generator().manual_seed(seed))


def lively(target: Target) -> Target:
    for name, parameter in target.model.named_parameters():
        if parameter.ndim == 2 and "blocks" in name:
            parameter.data.mul_(4.0)
    return target


@pytest.fixture(scope="module")
def vit() -> Target:
    return lively(small_timm("ViT"))


def squares() -> list[Step]:
    """x ↦ x²: every value has two roots, and a derivative in closed form."""
    return [
        Step(
            "residual", "a", "b", Tensor.square, tokenwise=True, jacobian=lambda x: torch.diag_embed(2 * x)
        )
    ]  # fmt: skip


def test_a_chain_of_many_half_steps_comes_back_to_round_off(vit: Target) -> None:
    model = chain_model(vit)
    inverse = ExactInverse(model, "blocks.1")
    images = pictures(vit, 3, seed=1)
    truth = model.target.record(images.double(), ["patch_embed", "blocks.1"])
    start = images + 0.05 * normal(*images.shape).float()
    told: list[int] = []
    trace = inverse.whole(truth["blocks.1"], start, truth, progress=lambda number, _: told.append(number))
    report = trace.reports[0]
    assert bool(report.solution.solved.all())
    assert float(report.error.max()) < 1e-9
    assert not bool(report.another_root.any())
    assert told == list(range(int(report.solution.iterations.max())))
    assert torch.equal(trace.values[:, :1], truth["patch_embed"].values[:, :1])  # the class token stays what it is


def test_one_image_alone_ends_where_it_ends_among_others(vit: Target) -> None:
    model = chain_model(vit)
    inverse, images = ExactInverse(model, "blocks.0"), pictures(vit, 3, seed=2)
    truth = model.target.record(images.double(), ["blocks.0"])["blocks.0"]
    start = images + 0.02 * normal(*images.shape).float()
    together = inverse.whole(truth, start).values
    alone = inverse.whole(truth.index(torch.tensor([1])), start[1:2]).values
    assert float((alone[0] - together[1]).norm() / alone.norm()) < 1e-9


@pytest.mark.parametrize(("sign", "where"), [(1.0, "the root at the start"), (-1.0, "the other root")])
def test_the_start_decides_between_roots_and_known_tokens_rule_one_out(sign: float, where: str) -> None:
    truth = normal(2, 3, 4).abs() + 1
    y, start = truth.square(), sign * truth * 1.05
    found = solve_chain(squares(), squares(), y, start, 0, ChainSettings(precision=torch.float64))
    assert bool(found.solved.all())
    assert torch.allclose(found.x, sign * truth, atol=1e-8)
    kept = start.clone()
    kept[:, :1] = truth[:, :1]
    held = solve_chain(squares(), squares(), y, kept, 1, ChainSettings(precision=torch.float64))
    assert torch.equal(held.x[:, :1], truth[:, :1])


def test_what_cannot_be_reached_is_not_called_solved() -> None:
    y = -normal(2, 3, 4).abs()  # no square
    found = solve_chain(squares(), squares(), y, torch.ones_like(y), 0, ChainSettings(iterations=5))
    assert not bool(found.solved.any())
    assert bool((found.residual > 0.1).all())
    assert bool((found.history.diff(dim=0) <= 0).all())  # no step raises the residual


def test_through_gives_every_stream() -> None:
    steps = [*squares(), *squares()]
    streams = through(steps, torch.full((1, 1, 1), 3.0))
    assert [float(each) for each in streams] == [3.0, 9.0, 81.0]


def test_unfit_starts_and_chains_are_refused(vit: Target) -> None:
    model = chain_model(vit)
    with pytest.raises(BacksightError, match="start"):
        solve_chain(squares(), squares(), torch.ones(1, 3, 4), torch.ones(1, 2, 4))
    first = model.target.record(pictures(vit, 1).double(), ["patch_embed"])["patch_embed"]
    with pytest.raises(BacksightError, match="patch_embed"):
        ExactInverse(model, "patch_embed").whole(first, pictures(vit, 1))
    with pytest.raises(BacksightError, match="leave norm out"):
        measure_whole_chains(vit, {}, ["norm"], pictures(vit, 2), pictures(vit, 8))
    step = squares()[0]
    with pytest.raises(BacksightError, match="norms"):
        solve_chain([replace(step, norm=object())], [step], torch.ones(1, 3, 4), torch.ones(1, 3, 4))  # type: ignore[arg-type]


def test_the_fates_of_all_images_sum_to_one_and_the_null_is_judged_alike(vit: Target) -> None:
    linear = fit_linear(vit, pictures(vit, 60), taps=["patch_embed", "blocks.0"], progress=False)
    study = measure_whole_chains(
        vit, {"linear": linear}, ["blocks.0"], pictures(vit, 5, seed=3), pictures(vit, 16, seed=4),
        map_settings=MapSettings(stages=(1.0, 1e-3, 1e-5), steps=2, products=15),
        settings=ChainSettings(iterations=8), fitted=16, batch_size=2, null_images=2, progress=False,
    )  # fmt: skip
    rows = study.metrics
    for inverse, count in (("exact", 5), ("null_shuffled", 2)):
        own = rows[rows["inverse"] == inverse].set_index("measure")
        assert own.loc[list(FATES), "value"].sum() == pytest.approx(1)
        assert set(own["n"]) == {count}
    exact = rows[rows["inverse"] == "exact"].set_index("measure")["value"]
    told = study.outcomes[study.outcomes["start"] == "map"]
    assert exact[BACK] == (told["error"] <= 1e-5).mean()
    assert exact[BACK] >= 0.8  # a random ViT of two blocks is easily undone
    assert (told["error"] < told["error_start"]).all()
    assert set(told["fate"]) <= {BACK, ANOTHER_ROOT, LOST, "near"}
    assert len(study.histories["blocks.0"][0]) == 5
    psnr = rows[rows["measure"] == "psnr"].set_index("inverse")["value"]
    assert psnr["exact"] >= psnr["linear"]
    assert set(study.pictures["blocks.0"]) == {"linear", "map", "exact", "embedding"}
