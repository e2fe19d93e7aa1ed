"""Exact inverses: known roots are found, other roots and missing ones are said, and models come back to round-off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from targets.examples import small_detector, small_timm
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.inverse import (
    ExactInverse,
    Examples,
    NotInvertibleError,
    StagedStart,
    fit_exact,
    fit_prior,
    measured_embedding,
    solve_step,
    step_roots,
)
from backsight.exact.solver import Settings, derivative_product, difference_product, gmres, roots, solve
from backsight.exact.steps import Norm, Step, in_precision, residual_steps, walk
from backsight.exact.tokens import Search, newton, token_map, token_roots
from backsight.studies.amplification import amplification, chain_amplification
from backsight.targets import Target

NEWTON = Settings(anderson=0, restarts=0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def mixing(lipschitz: float, tokens: int = 3, channels: int = 4) -> Step:
    """x + f(x), f a two-layer network over all values of an image with this Lipschitz constant at most."""
    size = tokens * channels
    first, second = (torch.linalg.qr(normal(size, size, seed=seed)).Q for seed in (1, 2))
    return Step(
        "residual",
        "before",
        "after",
        lambda x: x + lipschitz * ((x.flatten(1) @ first).tanh() @ second).view_as(x),
    )


def cubic(x: Tensor) -> Tensor:
    return x + x**3


def cubic_root(y: Tensor) -> Tensor:
    """Cardano's real root of x³ + x = y."""
    half, root = y / 2, (y.square() / 4 + 1 / 27).sqrt()
    return (half + root).sign() * (half + root).abs() ** (1 / 3) + (half - root).sign() * (half - root).abs() ** (1 / 3)


def test_a_contraction_is_inverted_exactly_by_both_methods() -> None:
    step, x = mixing(0.5), normal(5, 3, 4, seed=3)
    for settings, method in ((Settings(anderson=60), 0), (NEWTON, 1)):
        found = solve(step.forward, step.forward(x), [torch.zeros_like(x)], settings)
        assert bool(found.solved.all())
        assert found.method.tolist() == [method] * 5
        assert relative(found.x, x) < 1e-12


def test_a_steep_block_is_inverted_to_its_analytic_inverse() -> None:
    y = 30 * normal(6, 2, 3)  # slopes up to 3 x², where a plain fixed-point iteration diverges
    found = solve(cubic, y, [y], Settings())
    assert bool(found.solved.all())
    assert relative(found.x, cubic_root(y)) < 1e-12


def test_both_roots_of_a_square_are_found_and_counted() -> None:
    x = normal(4, 1, 3).abs() + 0.5
    square = Tensor.square
    found = roots(square, x.square(), [x + 0.2, -x - 0.2, x + 0.1], NEWTON)
    assert found.count.tolist() == [2] * 4
    assert found.fresh.tolist() == [[True] * 4, [True] * 4, [False] * 4]
    assert relative(found.x[0], x) < 1e-10
    assert relative(found.x[1], -x) < 1e-10


def test_a_sample_without_a_root_is_marked_and_the_others_are_solved() -> None:
    y = torch.tensor([4.0, -1.0, 9.0], dtype=torch.float64).view(3, 1, 1)
    found = solve(Tensor.square, y, [torch.full_like(y, 1.7)], Settings(restarts=1))
    assert found.solved.tolist() == [True, False, True]
    assert found.residual[1] > 0.5
    assert torch.allclose(found.x[[0, 2], 0, 0].abs(), torch.tensor([2.0, 3.0], dtype=torch.float64))


def test_restarts_reach_what_the_first_start_does_not() -> None:
    y = torch.full((2, 1, 1), 4.0, dtype=torch.float64)
    flat = torch.zeros_like(y)  # the derivative of the square vanishes here
    without = solve(Tensor.square, y, [flat], NEWTON)
    assert not bool(without.solved.any())
    found = solve(Tensor.square, y, [flat, flat + 1], NEWTON)
    assert bool(found.solved.all())
    assert found.start.tolist() == [1, 1]


def test_samples_do_not_depend_on_their_batch() -> None:
    step, x = mixing(3.0), normal(6, 3, 4, seed=5)
    y = step.forward(x)
    together = solve(step.forward, y, [y], NEWTON)
    for number in range(6):
        alone = solve(step.forward, y[number : number + 1], [y[number : number + 1]], NEWTON)
        assert bool(alone.solved[0]) == bool(together.solved[number])
        assert alone.iterations[0] == together.iterations[number]
        if alone.solved[0]:
            assert relative(alone.x[0], together.x[number]) < 1e-9


def test_gmres_agrees_with_the_dense_solution_for_every_sample() -> None:
    matrices = normal(5, 12, 12) / 12**0.5 + torch.eye(12, dtype=torch.float64) * torch.arange(1, 6).view(5, 1, 1)
    right = normal(5, 12, seed=1)
    right[3] = 0
    matrices[4] = 3 * torch.eye(12, dtype=torch.float64)

    def product(directions: Tensor, which: Tensor) -> Tensor:
        return torch.bmm(matrices[which], directions[:, :, None])[:, :, 0]

    found, used = gmres(product, right, torch.full((5,), 1e-12, dtype=torch.float64), 12)
    assert relative(found, torch.linalg.solve(matrices, right)) < 1e-9
    assert used.tolist()[3:] == [0, 1]
    assert 1 < used[0] <= 12


def test_products_by_differences_agree_with_the_derivative() -> None:
    step, x = mixing(2.0), normal(4, 3, 4)
    which, directions = torch.tensor([2, 0]), normal(2, 12, seed=9)
    exact = derivative_product(step.forward, x)(directions, which)
    assert relative(difference_product(step.forward, x, step.forward(x))(directions, which), exact) < 1e-6


def test_newton_steps_in_float32_end_where_float64_ends() -> None:
    step, x = mixing(0.9), normal(5, 3, 4, seed=3)
    first, second = (torch.linalg.qr(normal(12, 12, seed=seed)).Q.float() for seed in (1, 2))
    y = step.forward(x)
    settings = replace(NEWTON, products="derivative", precision=torch.float32)
    found = solve(
        step.forward, y, [y], settings, lambda v: v + 0.9 * ((v.flatten(1) @ first).tanh() @ second).view_as(v)
    )
    assert found.x.dtype == torch.float64
    assert bool(found.solved.all())
    assert relative(found.x, x) < 1e-12


def test_noise_grows_as_predicted() -> None:
    step, x = mixing(0.9), normal(3, 3, 4, seed=4)
    y = step.forward(x)
    predicted = amplification(step, x, probes=60, iterations=25)
    noise = 1e-6 * normal(300, *x.shape, seed=5)
    back = solve(step.forward, (y + noise).flatten(0, 1), [x.repeat(300, 1, 1)], NEWTON).x.view_as(noise)
    measured = ((back - x).square().sum((0, 2, 3)) / noise.square().sum((0, 2, 3))).sqrt()
    assert torch.allclose(measured, predicted.mean, rtol=0.1)
    for number in range(3):
        jacobian = torch.func.jacrev(lambda v: step.forward(v[None])[0])(x[number]).reshape(12, 12)
        values = torch.linalg.svdvals(jacobian.inverse())
        assert float(predicted.largest[number]) == pytest.approx(float(values[0]), rel=0.02)


def test_the_amplification_of_tokens_is_that_of_their_own_derivatives() -> None:
    x = normal(2, 3, 4)
    slope = 1 + 3 * x.square()
    step = Step(
        "residual", "a", "b", cubic, tokenwise=True, jacobian=lambda tokens: torch.diag_embed(1 + 3 * tokens**2)
    )
    found = amplification(step, x)
    assert torch.allclose(found.mean, (1 / slope.square()).flatten(1).mean(1).sqrt())
    assert torch.allclose(found.largest, (1 / slope).flatten(1).amax(1))
    # The products agree, as far as eight noises and ten iterations tell.
    products = amplification(replace(step, jacobian=None), x, probes=200, iterations=100)
    assert torch.allclose(products.largest, found.largest, rtol=0.02)
    assert torch.allclose(products.mean, found.mean, rtol=0.15)


def test_noise_grows_along_a_chain_as_predicted() -> None:
    """Two steps, of tokens alone and of all together: noise behind both, solved back through both."""
    x = 0.5 * normal(2, 3, 4, seed=6)
    first = Step(
        "residual", "a", "b", cubic, tokenwise=True, jacobian=lambda tokens: torch.diag_embed(1 + 3 * tokens**2)
    )
    second = mixing(0.9)
    between = first(x)
    y = second.forward(between)
    last, both = chain_amplification([first, second], x, probes=300)
    noise = 1e-6 * normal(300, *x.shape, seed=5)
    parts = solve(second.forward, (y + noise).flatten(0, 1), [between.repeat(300, 1, 1)], NEWTON).x
    whole = solve(first.forward, parts, [x.repeat(300, 1, 1)], NEWTON).x
    for found, there, predicted in ((parts, between, last), (whole, x, both)):
        error = (found.view_as(noise) - there).square().sum((0, 2, 3))
        assert torch.allclose((error / noise.square().sum((0, 2, 3))).sqrt(), predicted, rtol=0.1)
    assert not torch.allclose(last, both, rtol=0.1), "the two steps differ, or the chain is not tested"


def test_a_chain_through_a_projection_has_no_inverse_from_there_on() -> None:
    basis = torch.linalg.qr(normal(12, 12)).Q[:, :9]
    flat = Step("residual", "before", "after", lambda x: (x.flatten(1) @ basis @ basis.T).view_as(x))
    x = normal(2, 3, 4)
    last, first = chain_amplification([flat, mixing(0.5)], x, probes=2)
    assert bool(last.isfinite().all())
    assert bool(first.isinf().all())


def test_a_projection_has_no_inverse() -> None:
    basis = torch.linalg.qr(normal(12, 12)).Q[:, :9]
    step = Step("residual", "before", "after", lambda x: (x.flatten(1) @ basis @ basis.T).view_as(x))
    x = normal(2, 3, 4)
    assert torch.isinf(amplification(step, x, probes=2, iterations=2).mean).all()
    found = solve(step.forward, x, [x], Settings())  # x does not lie in the plane that is projected on
    assert not bool(found.solved.any())


def test_what_lies_between_the_stages_of_a_pyramid_is_refused_with_its_dimensions() -> None:
    target = small_timm("Swin")
    with pytest.raises(NotInvertibleError, match="no residual block") as refused:
        residual_steps(target, "layers.1", "layers.0")
    assert (refused.value.lost.dimension_in, refused.value.lost.dimension_out) == (256 * 16, 64 * 32)
    with pytest.raises(NotInvertibleError):
        residual_steps(small_timm("ConvNeXt"), *reversed(small_timm("ConvNeXt").available_taps[1:3]))


def test_unfit_starts_and_values_are_refused() -> None:
    y = normal(2, 3, 4)
    with pytest.raises(BacksightError, match="at least one start"):
        solve(cubic, y, [])
    with pytest.raises(BacksightError, match="shape"):
        solve(cubic, y, [y[:1]])
    with pytest.raises(BacksightError, match="not all finite"):
        solve(cubic, y * torch.nan, [y])


# Models


def pictures(target: Target, count: int, seed: int = 0) -> Tensor:
    shape = (count, 3, *target.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


FAMILIES = {
    "ViT": ("ViT", {}),
    "DeiT, distilled": ("DeiT, distilled", {}),
    "ViT, layer scale": ("ViT", {"init_values": 0.1}),
    "BEiT": ("BEiT", {"init_values": 0.5}),
    "EVA": ("EVA", {}),
    "CaiT": ("CaiT", {"init_values": 0.5}),
    "Swin": ("Swin", {}),
    "Swin V2": ("Swin V2", {}),
}


def lively(target: Target, scale: float = 4.0) -> Target:
    """Random weights are small, and blocks near the identity are no test: the branches' matrices are blown up."""
    for name, parameter in target.model.named_parameters():
        if parameter.ndim == 2 and ("blocks" in name or "layers" in name) and "downsample" not in name:
            parameter.data.mul_(scale)
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_models_come_back_to_round_off_as_far_as_blocks_are_residual(family: str) -> None:
    name, changes = FAMILIES[family]
    target = lively(small_timm(name, **changes))
    taps = {"Swin": "layers.0", "Swin V2": "layers.0"}.get(family, "blocks.1")
    inverse = fit_exact(target, pictures(target, 40), [taps], count=40, stages=2)[taps]
    assert inverse.reached == "patch_embed"
    truth = inverse.model.target.record(pictures(target, 4, seed=1).double(), inverse.model.target.available_taps)
    trace = inverse.trace(truth[taps], truth)
    assert bool(trace.solved.all())
    assert relative(trace.values, truth["patch_embed"].values) < 1e-8
    moved = relative(truth[taps].values, truth["patch_embed"].values)
    if family != "Swin V2":  # whose branches end in norms that start at zero
        assert moved > 0.02
    table = trace.table()
    assert set(table["step"]) == {step.destination for step in inverse.model.walk.between(taps, "patch_embed")}
    assert not table["another_root"].any()


@pytest.mark.parametrize(("sign", "met"), [(1.0, False), (-1.0, True)])
def test_another_root_is_told_from_the_right_one(sign: float, met: bool) -> None:
    """A model whose last half-step squares: the start decides which of the two roots is found."""
    target = small_timm("ViT")
    model = fit_exact(target, pictures(target, 20), ["blocks.1"], count=20, stages=1)["blocks.1"].model
    number = model.walk.taps["blocks.1"]
    changed = replace(model.walk.steps[number], forward=Tensor.square, jacobian=None)
    steps = {**model.walk.steps, number: changed}
    near = (torch.zeros(16, 16, dtype=torch.float64), torch.full((16,), sign, dtype=torch.float64))
    model = replace(model, walk=replace(model.walk, steps=steps), starts={"blocks.1": StagedStart(((near, near),))})
    recorded = model.target.record(pictures(target, 3).double(), ["blocks.1.attn"])["blocks.1.attn"]
    x = recorded.replace(recorded.values.abs() + 0.5)
    inverse = ExactInverse(model, "blocks.1", Settings(alternatives=0))
    trace = inverse.trace(x.replace(x.values.square()), {"blocks.1.attn": x}, to="blocks.1.attn")
    table = trace.table()
    assert table["solved"].all()
    assert table["another_root"].tolist() == [met] * 3
    assert relative(trace.values, sign * x.values) < 1e-10
    # An error of y that has grown is not another root.
    moved = inverse.trace(x.replace(1.01 * x.values.square()), {"blocks.1.attn": x}, to="blocks.1.attn").table()
    assert (moved["error"] > 1e-3).all()
    assert moved["another_root"].tolist() == [met] * 3


def kinked(x: Tensor) -> Tensor:
    """Folds at ±0.8814, where it is ∓0.5328; between these values it has three roots, signs +, −, +."""
    return x - 2 * x.tanh()


KINKED_ZERO = 1.9150080481545  # beside 0 and its mirror image, by bisection


@pytest.mark.parametrize("single", [False, True])
def test_all_roots_of_tokens_are_found_and_their_signs_sum_to_one(single: bool) -> None:
    y = torch.zeros(3, 2, dtype=torch.float64)
    starts = [torch.tensor([[a, b]], dtype=torch.float64).expand(3, 2) for a in (-2, 0.1, 2) for b in (-2, 0.1, 2)]
    tokens = token_map(kinked)
    found = token_roots(tokens, y, [*starts, *starts], Search(), tokens if single else None)
    assert found.count.tolist() == [9] * 3
    assert found.degree.tolist() == [1.0] * 3
    assert found.token.tolist() == sorted(found.token.tolist())
    assert float(found.residual.max()) < 1e-10 or float(kinked(found.x).abs().max()) < 1e-12
    known = torch.tensor([-KINKED_ZERO, 0.0, KINKED_ZERO], dtype=torch.float64)
    assert float((found.x[..., None] - known).abs().amin(-1).max()) < 1e-9
    assert torch.equal(found.sign, torch.where(found.x.abs() < 1, -1.0, 1.0).prod(1).to(found.sign))


def test_a_curve_around_the_folds_leads_from_one_root_to_the_others() -> None:
    y = torch.tensor([[0.5], [0.5], [0.7]], dtype=torch.float64)
    middle = torch.tensor([[-0.7], [-0.7], [3.0]], dtype=torch.float64)
    alone = token_roots(token_map(kinked), y, [middle], Search(rounds=0))
    assert alone.degree.tolist() == [-1.0, -1.0, 1.0]  # which says that a root of the first two is missing
    found = token_roots(token_map(kinked), y, [middle], Search(rounds=1))
    assert found.count.tolist() == [3, 3, 1]
    assert found.degree.tolist() == [1.0] * 3
    assert float((kinked(found.x) - y[found.token]).abs().max()) < 1e-12


def test_a_start_on_a_fold_is_left_along_the_curve() -> None:
    fold = torch.full((1, 1), 0.881373587019543, dtype=torch.float64)
    y = torch.full((1, 1), -2.0, dtype=torch.float64)
    assert float(newton(token_map(kinked), y, fold + 1e-9)[1]) > 0.1
    found = token_roots(token_map(kinked), y, [fold])
    assert found.count.tolist() == [1]
    assert float((kinked(found.x) - y).abs().max()) < 1e-12


def test_near_a_fold_both_roots_are_found_and_beyond_it_none() -> None:
    fold = kinked(torch.tensor([[0.881373587019543]], dtype=torch.float64))
    found = token_roots(token_map(kinked), fold + 1e-6, [torch.full((1, 1), 0.87, dtype=torch.float64)], Search())
    near = found.x[found.x > 0]
    assert (found.count.tolist(), found.degree.tolist()) == ([3], [1.0])
    # g is fold + (x − fold)² · g″ / 2, and g″ = 4 tanh sech² = √2 there.
    assert float(near.max() - near.min()) == pytest.approx(2 * (2e-6 / 2**0.5) ** 0.5, rel=1e-3)
    y = torch.tensor([[4.0], [-1.0]], dtype=torch.float64)
    found = token_roots(token_map(Tensor.square), y, [torch.full_like(y, 0.5)], Search(rounds=0))
    assert found.count.tolist() == [1, 0]
    assert found.best(found.x[:, 0]).tolist() == [0, -1]


def test_dense_derivatives_in_closed_form_agree_with_the_differentiated_ones() -> None:
    target = in_precision(lively(small_timm("ViT")), torch.float64)
    step = residual_steps(target, "blocks.1", "blocks.0")[-1]
    assert step.jacobian is not None
    x = normal(5, 16)
    assert relative(step.jacobian(x), token_map(step.forward).jacobian(x)) < 1e-13


def test_roots_of_steps_that_mix_tokens_are_refused() -> None:
    with pytest.raises(BacksightError, match="mixes tokens"):
        step_roots(mixing(0.5), normal(2, 3, 4), [normal(2, 3, 4)])
    with pytest.raises(BacksightError, match="shape of y"):
        token_roots(token_map(kinked), normal(2, 3), [])


@pytest.mark.parametrize("oracle", [False, True])
def test_the_right_root_of_several_is_chosen_by_the_usual_and_by_the_truth(oracle: bool) -> None:
    """A model whose last half-step folds: the closed-form start leads to the root on the other side."""
    target = small_timm("ViT")
    model = fit_exact(target, pictures(target, 20), ["blocks.1"], count=20, stages=1)["blocks.1"].model
    number = model.walk.taps["blocks.1"]
    changed = replace(model.walk.steps[number], forward=kinked, jacobian=None)
    wrong = (torch.zeros(16, 16, dtype=torch.float64), torch.full((16,), 2.5, dtype=torch.float64))
    recorded = model.target.record(pictures(target, 2).double(), ["blocks.1.attn"])["blocks.1.attn"]
    there = -KINKED_ZERO + 0.3 * recorded.values.tanh()
    model = replace(
        model,
        walk=replace(model.walk, steps={**model.walk.steps, number: changed}),
        starts={"blocks.1": StagedStart(((wrong, wrong),))},
        examples={"blocks.1": Examples(normal(3, 16), torch.full((3, 16), -4.5, dtype=torch.float64))},
        folding={"blocks.1": 0.5},
        priors={"blocks.1.attn": fit_prior(there + normal(*there.shape), 1)},
    )
    x, y = recorded.replace(there), recorded.replace(kinked(there))
    truth = {"blocks.1.attn": x}
    first = ExactInverse(model, "blocks.1", Settings(alternatives=0)).trace(y, truth, "blocks.1.attn")
    assert first.table()["another_root"].tolist() == [True, True]
    chosen = ExactInverse(model, "blocks.1", Settings(alternatives=1)).trace(y, truth, "blocks.1.attn", oracle=oracle)
    assert relative(chosen.values, there) < 1e-10
    assert not chosen.table()["another_root"].any()
    with pytest.raises(BacksightError, match="truth"):
        ExactInverse(model, "blocks.1").trace(y, oracle=True)


def test_the_fit_says_where_a_model_folds() -> None:
    target = lively(small_timm("ViT"), 1.0)
    folding = fit_exact(target, pictures(target, 20), ["blocks.1"], count=20, stages=1)["blocks.1"].model.folding
    assert folding == {"blocks.0": 0.0, "blocks.1": 0.0}
    parameters = dict(target.model.named_parameters())
    for name in ("fc1", "fc2"):
        parameters[f"blocks.1.mlp.{name}.weight"].data.mul_(40)
    folding = fit_exact(target, pictures(target, 20), ["blocks.1"], count=20, stages=1)["blocks.1"].model.folding
    assert folding["blocks.0"] == 0.0
    assert folding["blocks.1"] > 0.1


def test_a_class_token_that_no_image_has_tells_a_wrong_stream() -> None:
    target = lively(small_timm("ViT"))
    inverse = fit_exact(target, pictures(target, 40), ["blocks.1"], count=40, stages=1)["blocks.1"]
    truth = inverse.model.target.record(pictures(target, 3, seed=1).double(), ["blocks.1"])["blocks.1"]
    assert float(inverse.trace(truth).prefix_error.max()) < 1e-8
    values = truth.values.clone()
    values[0, 0] += 1.0
    wrong = inverse.trace(truth.replace(values))
    assert bool(wrong.solved.all())
    assert float(wrong.prefix_error[0]) > 0.1


def test_float32_newton_steps_and_float64_meet_at_the_same_stream() -> None:
    target = lively(small_timm("ViT"))
    inverse = fit_exact(target, pictures(target, 40), ["blocks.1"], count=40, stages=1)["blocks.1"]
    truth = inverse.model.target.record(pictures(target, 3, seed=1).double(), ["patch_embed", "blocks.1"])
    refined = ExactInverse(inverse.model, "blocks.1", Settings(products="derivative", precision=torch.float32))
    trace = refined.trace(truth["blocks.1"], truth)
    assert bool(trace.solved.all())
    assert relative(trace.values, truth["patch_embed"].values) < 1e-8


def test_the_final_norm_loses_one_degree_a_token_and_keeps_it_lost_all_the_way() -> None:
    target = small_timm("ViT")  # as it is drawn: a livelier one has a token with another root
    inverse = fit_exact(target, pictures(target, 40), ["norm"], count=40, stages=2)["norm"]
    size, tokens = 17 * 16, 17
    assert (inverse.lost[0].dimension_in, inverse.lost[0].dimension_out) == (size, size - tokens)
    truth = inverse.model.target.record(pictures(target, 3, seed=1).double(), ["patch_embed", "norm"])
    found = inverse.trace(truth["norm"]).values
    there = truth["patch_embed"].values
    # Pre-norm blocks do not see the mean of a token, so that it passes from one end to the other.
    centred = [each - each.mean(-1, keepdim=True) for each in (found, there)]
    assert relative(*centred) < 1e-5
    assert relative(found, there) > 1e-3


def test_a_norm_keeps_the_scale_in_its_last_digits_and_in_float32_loses_it() -> None:
    z = normal(2, 5, 16)
    norm = Norm(torch.ones(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64), 1e-5)
    deviation = (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(norm.deviation(norm.normalised(z)), deviation, rtol=1e-8)
    assert norm.deviation(norm.normalised(z).float()).isnan().all()


def test_a_post_norm_layer_behind_a_norm_is_inverted_in_full() -> None:
    target = in_precision(small_detector(), torch.float64)
    steps = residual_steps(target, "encoder.layers.1", "encoder.layers.0")
    assert [step.kind for step in steps] == ["post_norm", "post_norm"]
    taps = ["encoder.layers.0", "encoder.layers.0.attn", "encoder.layers.1"]
    truth = target.record(pictures(target, 3, seed=2).double(), taps)
    x = truth["encoder.layers.0"].values
    step = steps[0]
    z = step.forward(x)
    assert step.norm is not None
    y = step.norm(z)
    before = step.before
    assert before is not None
    square = before.stripped(x).square().mean(-1, keepdim=True)
    found = solve_step(step, y, [y], square=square)
    assert bool(found.solved.all())
    assert relative(found.x, x) < 1e-9
    # With 1 for the mean square, the norm's ε is left out, and the error is of its size.
    assert 1e-9 < relative(solve_step(step, y, [y]).x, x) < 1e-3


def test_detr_comes_back_to_its_first_layer_and_says_what_the_first_norm_took() -> None:
    target = small_detector()
    inverse = fit_exact(target, pictures(target, 40), ["encoder.layers.1"], count=40, stages=2)["encoder.layers.1"]
    assert inverse.reached == "projection"
    assert "mean of every token" in inverse.lost[0].reason
    truth = inverse.model.target.record(pictures(target, 3, seed=1).double(), "fine")
    trace = inverse.trace(truth["encoder.layers.1"], truth)
    assert bool(trace.solved.all())
    errors = trace.table().groupby("to")["error"].max()
    assert errors["encoder.layers.0"] < 1e-9
    # The norm that it left is the last to be known: within its ε of 1e-5, as far as that token's variance is guessed.
    assert 1e-12 < errors["encoder.layers.0.attn"] < 1e-5
    assert errors["projection"] > 1e-3


def test_every_known_block_is_checked_against_the_model() -> None:
    target = small_timm("ViT")
    block = target.model.blocks[1]
    usual = block.forward
    block.forward = lambda x, *others, **named: 1.5 * usual(x, *others, **named)
    with pytest.raises(BacksightError, match=r"half-steps of blocks\.1"):
        walk(target)


# Pixels


def test_a_patch_embedding_of_full_rank_gives_the_pixels_back() -> None:
    target = in_precision(small_timm("ViT", patch_size=4, embed_dim=64), torch.float64)
    embedding = measured_embedding(target)
    assert embedding is not None
    assert (embedding.rank, embedding.matrix.shape) == (48, (48, 64))
    images = pictures(target, 2).double()
    values = target.record(images, ["patch_embed"])["patch_embed"].values
    assert relative(embedding.pixels(values), images) < 1e-6


def test_a_lossy_patch_embedding_is_completed_by_the_given_image() -> None:
    target = in_precision(small_timm("ViT"), torch.float64)
    embedding = measured_embedding(target)
    assert embedding is not None
    assert embedding.rank == 16
    images = pictures(target, 2).double()
    near = images + 0.05 * normal(*images.shape)
    values = target.record(images, ["patch_embed"])["patch_embed"].values
    completed = embedding.pixels(values, near)
    # It holds what the embedding says, and is nearer to the truth than the guess by what that is.
    again = target.record(completed.clamp(0, 1), ["patch_embed"])["patch_embed"].values
    assert relative(again, values) < 0.05
    shares = ((completed - images).square().sum() / (near - images).square().sum()).item()
    assert shares == pytest.approx(1 - 16 / 192, abs=0.01)


def test_an_inverse_makes_images_of_a_recorded_tap() -> None:
    target = small_timm("ViT", patch_size=4, embed_dim=64)
    inverse = fit_exact(target, pictures(target, 40), ["blocks.1"], count=40, stages=1)["blocks.1"]
    images = pictures(target, 3, seed=1)
    made = inverse(target.record(images, ["blocks.1"])["blocks.1"])  # in float32
    assert made.shape == images.shape
    assert made.dtype == torch.float32
    assert relative(made, images) < 1e-3
    assert inverse.lost == ()
