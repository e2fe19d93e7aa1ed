"""Roots of half-steps: all of a token's are found, their signs sum to one, and an error grows as predicted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from targets.examples import small_timm
from torch import Tensor

from backsight.exact.inverse import ExactInverse
from backsight.exact.solver import determinant_signs
from backsight.exact.starts import Half
from backsight.exact.steps import ExactModel, Step
from backsight.studies.exact import Case, taken_back
from backsight.studies.roots import token_roots

ZERO = 1.9150080481545  # the outer roots of x = 2 tanh x lie on either side of 0


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kinked(x: Tensor) -> Tensor:
    """Folds at ±0.8814, where it is ∓0.5328; between these values it has three roots, signs +, −, +."""
    return x - 2 * x.tanh()


def count(x: Tensor) -> list[int]:
    return x[..., 0].isfinite().sum(1).tolist()


KINKED = Step("a", "b", kinked, tokenwise=True, jacobian=lambda x: torch.diag_embed(2 * x.tanh().square() - 1))


def test_all_roots_of_tokens_are_found_and_their_signs_sum_to_one() -> None:
    y = torch.zeros(3, 2, dtype=torch.float64)
    starts = [torch.tensor([[a, b]], dtype=torch.float64).expand(3, 2) for a in (-2, 0.1, 2) for b in (-2, 0.1, 2)]
    x, sign = token_roots(KINKED, y, [*starts, *starts])
    assert count(x) == [9] * 3
    assert sign.sum(1).tolist() == [1.0] * 3
    known, x = torch.tensor([-ZERO, 0.0, ZERO], dtype=torch.float64), x[sign != 0]
    assert float((x[..., None] - known).abs().amin(-1).max()) < 1e-9
    assert torch.equal(sign[sign != 0], torch.where(x.abs() < 1, -1.0, 1.0).prod(1).to(sign))


def test_a_curve_around_the_folds_leads_from_one_root_to_the_others() -> None:
    y = torch.tensor([[0.5], [0.5], [0.7]], dtype=torch.float64)
    middle = torch.tensor([[-0.7], [-0.7], [3.0]], dtype=torch.float64)
    _, sign = token_roots(KINKED, y, [middle], curves=False)
    assert sign.sum(1).tolist() == [-1.0, -1.0, 1.0]  # which says that a root of the first two is missing
    x, _ = token_roots(KINKED, y, [middle])
    assert count(x) == [3, 3, 1]
    assert float((kinked(x) - y[:, None]).abs().nan_to_num(0).max()) < 1e-12


def test_near_a_fold_both_roots_are_found_and_beyond_it_none() -> None:
    fold = kinked(torch.tensor([[0.881373587019543]], dtype=torch.float64))
    x, sign = token_roots(KINKED, fold + 1e-6, [torch.full((1, 1), 0.87, dtype=torch.float64)])
    near = x[x > 0]  # NaN: no root
    assert (count(x), sign.sum(1).tolist()) == ([3], [1.0])
    # g is fold + (x − fold)² · g″ / 2, and g″ = 4 tanh sech² = √2 there.
    assert float(near.max() - near.min()) == pytest.approx(2 * (2e-6 / 2**0.5) ** 0.5, rel=1e-3)
    y = torch.tensor([[4.0], [-1.0]], dtype=torch.float64)
    square = Step("a", "b", Tensor.square, tokenwise=True, jacobian=lambda x: torch.diag_embed(2 * x))
    x, _ = token_roots(square, y, [torch.full_like(y, 0.5)], curves=False)
    assert count(x) == [1, 0]


@pytest.mark.parametrize("width", [1, 5, 192])
def test_signs_are_those_of_the_determinants(width: int) -> None:
    matrices = normal(9, width, width)
    assert torch.equal(
        determinant_signs(matrices), torch.stack([torch.linalg.slogdet(matrix).sign for matrix in matrices])
    )
    assert determinant_signs(torch.zeros(1, width, width)).tolist() == [0.0]


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
    case = Case(inverse, {"blocks.1": x, "blocks.1.attn": x})  # y is given
    for scale in (1.0, 1.01):
        fates, _ = taken_back(case, "blocks.1", "blocks.1.attn", x.replace(scale * x.values.square()))
        right = "error_grown" if scale > 1 else "back"
        assert fates.tolist() == ["another_root" if met else right] * 3
