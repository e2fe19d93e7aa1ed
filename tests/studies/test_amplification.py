"""An error grows on its way back through half-steps as the derivative predicts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from backsight.exact.solver import Settings, solve
from backsight.exact.steps import Step
from backsight.studies.derivatives import amplification

PLAIN = Settings(restarts=0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixing(x: Tensor) -> Tensor:
    first, second = (torch.linalg.qr(normal(12, 12, seed=seed)).Q for seed in (1, 2))
    return x + 0.9 * ((x.flatten(1) @ first).tanh() @ second).view_as(x)


MIXING = Step("between", "after", mixing)
CUBIC = Step("before", "between", lambda x: x + x**3, tokenwise=True, jacobian=lambda x: torch.diag_embed(1 + 3 * x**2))


def test_noise_grows_along_a_chain_as_predicted() -> None:
    """Two steps, of tokens alone and of all together: noise behind both, solved back through both."""
    x = 0.5 * normal(2, 3, 4, seed=6)
    between = CUBIC(x)
    alone, chain = amplification([CUBIC, MIXING], x, probes=100)
    noise = 1e-6 * normal(300, *x.shape, seed=5)
    parts = solve(lambda x, _: mixing(x), (mixing(between) + noise).flatten(0, 1), [between.repeat(300, 1, 1)], PLAIN).x
    whole = solve(lambda x, _: CUBIC(x), parts, [x.repeat(300, 1, 1)], PLAIN).x
    for back, truth, predicted in ((parts, between, chain[1]), (whole, x, chain[0])):
        error = (back.view_as(noise) - truth).square().sum((0, 2, 3))
        assert torch.allclose((error / noise.square().sum((0, 2, 3))).sqrt(), predicted, rtol=0.1)
    assert torch.equal(alone[1], chain[1])
    assert not torch.allclose(alone[0], chain[0], rtol=0.1), "the two steps differ, or the chain is not tested"


def test_the_amplification_of_tokens_is_that_of_their_own_derivatives() -> None:
    x = normal(2, 3, 4)
    (alone,), _ = amplification([CUBIC], x)
    assert torch.allclose(alone, (1 / (1 + 3 * x.square()).square()).flatten(1).mean(1).sqrt())
    # The products agree, as far as sixty noises tell.
    (products,), _ = amplification([replace(CUBIC, jacobian=None)], x, probes=60)
    assert torch.allclose(products, alone, rtol=0.15)


def test_a_projection_has_no_inverse_from_there_on() -> None:
    basis = torch.linalg.qr(normal(12, 12)).Q[:, :9]
    flat = Step("before", "between", lambda x: (x.flatten(1) @ basis @ basis.T).view_as(x))
    alone, chain = amplification([flat, MIXING], normal(2, 3, 4), probes=2)
    assert bool(chain[1].isfinite().all())
    assert not bool(chain[0].isfinite().any())
    assert not bool(alone[0].isfinite().any())
