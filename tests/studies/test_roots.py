"""Roots of half-steps: all of a token's are found, their signs sum to one, and an error grows as predicted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from targets.examples import small_timm
from torch import Tensor

from backsight.exact.inverse import ExactInverse
from backsight.exact.solver import Settings
from backsight.exact.starts import Half
from backsight.exact.steps import ExactModel, Step
from backsight.studies.continuation import signs, token_roots
from backsight.studies.roots import RootChoosing, judged
from backsight.studies.tidy_rows import wilson_interval

PLAIN = Settings(restarts=0)
ZERO = 1.9150080481545  # the outer roots of x = 2 tanh x lie on either side of 0


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kinked(x: Tensor) -> Tensor:
    """Folds at ±0.8814, where it is ∓0.5328; between these values it has three roots, signs +, −, +."""
    return x - 2 * x.tanh()


KINKED = Step("a", "b", kinked, tokenwise=True, jacobian=lambda x: torch.diag_embed(2 * x.tanh().square() - 1))


def mixing(x: Tensor, lipschitz: float = 0.9) -> Tensor:
    first, second = (torch.linalg.qr(normal(12, 12, seed=seed)).Q for seed in (1, 2))
    return x + lipschitz * ((x.flatten(1) @ first).tanh() @ second).view_as(x)


MIXING = Step("before", "after", mixing)
CUBIC = Step("a", "b", lambda x: x + x**3, tokenwise=True, jacobian=lambda x: torch.diag_embed(1 + 3 * x**2))


@pytest.mark.parametrize("single", [False, True])
def test_all_roots_of_tokens_are_found_and_their_signs_sum_to_one(single: bool) -> None:
    y = torch.zeros(3, 2, dtype=torch.float64)
    starts = [torch.tensor([[a, b]], dtype=torch.float64).expand(3, 2) for a in (-2, 0.1, 2) for b in (-2, 0.1, 2)]
    roots = token_roots(KINKED, y, [*starts, *starts], single=KINKED if single else None)
    assert roots.count.tolist() == [9] * 3
    assert roots.degree.tolist() == [1.0] * 3
    assert roots.token.tolist() == sorted(roots.token.tolist())
    known = torch.tensor([-ZERO, 0.0, ZERO], dtype=torch.float64)
    assert float((roots.x[..., None] - known).abs().amin(-1).max()) < 1e-9
    assert torch.equal(roots.sign, torch.where(roots.x.abs() < 1, -1.0, 1.0).prod(1).to(roots.sign))


def test_a_curve_around_the_folds_leads_from_one_root_to_the_others() -> None:
    y = torch.tensor([[0.5], [0.5], [0.7]], dtype=torch.float64)
    middle = torch.tensor([[-0.7], [-0.7], [3.0]], dtype=torch.float64)
    alone = token_roots(KINKED, y, [middle], rounds=0)
    assert alone.degree.tolist() == [-1.0, -1.0, 1.0]  # which says that a root of the first two is missing
    roots = token_roots(KINKED, y, [middle], rounds=1)
    assert roots.count.tolist() == [3, 3, 1]
    assert float((kinked(roots.x) - y[roots.token]).abs().max()) < 1e-12


def test_near_a_fold_both_roots_are_found_and_beyond_it_none() -> None:
    fold = kinked(torch.tensor([[0.881373587019543]], dtype=torch.float64))
    roots = token_roots(KINKED, fold + 1e-6, [torch.full((1, 1), 0.87, dtype=torch.float64)])
    near = roots.x[roots.x > 0]
    assert (roots.count.tolist(), roots.degree.tolist()) == ([3], [1.0])
    # g is fold + (x − fold)² · g″ / 2, and g″ = 4 tanh sech² = √2 there.
    assert float(near.max() - near.min()) == pytest.approx(2 * (2e-6 / 2**0.5) ** 0.5, rel=1e-3)
    y = torch.tensor([[4.0], [-1.0]], dtype=torch.float64)
    square = Step("a", "b", Tensor.square, tokenwise=True, jacobian=lambda x: torch.diag_embed(2 * x))
    roots = token_roots(square, y, [torch.full_like(y, 0.5)], rounds=0)
    assert roots.count.tolist() == [1, 0]
    assert roots.best(roots.x[:, 0]).tolist() == [0, -1]


@pytest.mark.parametrize("width", [1, 5, 192])
def test_signs_are_those_of_the_determinants(width: int) -> None:
    matrices = normal(9, width, width)
    assert torch.equal(signs(matrices), torch.stack([torch.linalg.slogdet(matrix).sign for matrix in matrices]))
    assert signs(torch.zeros(1, width, width)).tolist() == [0.0]


@pytest.mark.parametrize(("sign", "met"), [(1.0, False), (-1.0, True)])
def test_another_root_is_told_from_the_right_one_and_from_an_error_that_grew(sign: float, met: bool) -> None:
    """A model whose last half-step squares: the start decides which of the two roots is found."""
    target = small_timm("ViT", img_size=(32, 16))
    model = ExactModel.of(target)
    number = model.taps["blocks.1"]
    half = Half(replace(model.steps[number], forward=Tensor.square, jacobian=lambda x: torch.diag_embed(2 * x)))
    model = replace(model, steps={**model.steps, number: half.step})
    half.put(stage0=torch.zeros(2, 17, 16))
    half.stage0[:, -1] = sign
    inverse = ExactInverse(model, "blocks.1", {"blocks.1": half})
    images = torch.rand(3, 3, 32, 16, generator=torch.Generator().manual_seed(0)).double()
    recorded = model.target.record(images, ["blocks.1.attn"])["blocks.1.attn"]
    x = recorded.replace(recorded.values.abs() + 0.5)
    for scale in (1.0, 1.01):
        y = x.replace(scale * x.values.square())
        trace = inverse.trace(y, "blocks.1.attn")
        table = judged(inverse, trace, y, {"blocks.1.attn": x})
        assert table["solved"].all()
        assert table["another_root"].tolist() == [met] * 3
        assert (table["error"] > 1e-3).all() == (met or scale > 1)
    oracle = RootChoosing.of(inverse, near={"blocks.1.attn": x.values})
    found = oracle.trace(x.replace(x.values.square()), "blocks.1.attn").values
    assert torch.allclose(found, x.values, rtol=1e-10)


def test_wilsons_interval_is_the_known_one_and_never_without_length() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 20)[1] == pytest.approx(1.959964**2 / (20 + 1.959964**2))
