"""Exact inverses: models come back to round-off as far as their blocks are residual, and say what they lose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from targets.examples import small_detector, small_timm
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.inverse import ExactInverse, fit_exact
from backsight.exact.solver import Settings
from backsight.exact.starts import Half
from backsight.exact.steps import (
    ExactModel,
    Norm,
    NotInvertibleError,
    Step,
    in_precision,
    measured_embedding,
    walk,
)
from backsight.inverses.files import read, save
from backsight.inverses.linear import fit_linear
from backsight.targets.base import Target


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def pictures(target: Target, count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, *target.image_size, generator=torch.Generator().manual_seed(seed))


def lively(target: Target, scale: float = 4.0) -> Target:
    """Random weights are small, and blocks near the identity are no test: the branches' matrices are blown up."""
    for name, parameter in target.model.named_parameters():
        if parameter.ndim == 2 and ("blocks" in name or "layers" in name) and "downsample" not in name:
            parameter.data.mul_(scale)
    return target


def fitted(target: Target, tap: str, count: int = 40) -> ExactInverse:
    inverse = fit_exact(target, pictures(target, count), taps=[tap], count=count, stages=2, progress=False)[tap]
    assert isinstance(inverse, ExactInverse)
    return inverse


@pytest.fixture(scope="module")
def vit() -> Target:
    return lively(small_timm("ViT", img_size=(32, 16)), 2.0)


@pytest.fixture(scope="module")
def inverse(vit: Target) -> ExactInverse:
    return fitted(vit, "blocks.1")


FAMILIES = {
    "ViT": {"init_values": 0.1},
    "DeiT, distilled": {},
    "BEiT": {"init_values": 0.5},
    "EVA": {},
    "CaiT": {"init_values": 0.5},
    "Swin": {},
    "Swin V2": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_come_back_to_round_off_as_far_as_blocks_are_residual(family: str) -> None:
    target = lively(small_timm(family, **FAMILIES[family]))
    tap = "layers.0" if family.startswith("Swin") else "blocks.1"
    inverse = fitted(target, tap)
    assert inverse.reached == "patch_embed"
    truth = inverse.model.target.record(pictures(target, 2, seed=1).double(), ["patch_embed", tap])
    trace = inverse.trace(truth[tap])
    assert bool(trace.solved.all())
    assert relative(trace.values, truth["patch_embed"].values) < 1e-8
    if family != "Swin V2":  # whose branches end in norms that start at zero
        assert relative(truth[tap].values, truth["patch_embed"].values) > 0.02


def test_one_image_alone_and_a_tap_on_the_way(vit: Target, inverse: ExactInverse) -> None:
    truth = inverse.model.target.record(pictures(vit, 3, seed=1).double(), ["blocks.0", "blocks.1"])
    together = inverse.trace(truth["blocks.1"], "blocks.0")
    alone = inverse.trace(truth["blocks.1"].index(torch.tensor([2])), "blocks.0")
    assert relative(alone.values[0], together.values[2]) < 1e-9
    assert relative(together.values, truth["blocks.0"].values) < 1e-8
    earlier = inverse.at("blocks.0", Settings(newton=7))
    assert earlier.settings.newton == 7
    assert bool(earlier.trace(truth["blocks.0"]).solved.all())
    assert [step.destination for step in earlier.steps] == ["blocks.0.attn", "blocks.0"]


def test_what_is_no_residual_block_is_refused_with_its_dimensions() -> None:
    with pytest.raises(NotInvertibleError, match="no residual block") as refused:
        walk(small_timm("Swin")).between("layers.1", "layers.0")
    assert f"{256 * 16} values an image before it, {64 * 32} behind it" in str(refused.value)
    convolutional = small_timm("ConvNeXt")
    with pytest.raises(NotInvertibleError):
        walk(convolutional).between(*reversed(convolutional.available_taps[1:3]))


def test_every_known_block_is_checked_against_the_model() -> None:
    target = small_timm("ViT")
    block = target.model.blocks[1]
    usual = block.forward
    block.forward = lambda x, *others, **named: 1.5 * usual(x, *others, **named)
    with pytest.raises(BacksightError, match=r"half-steps of blocks\.1"):
        walk(target)


def test_dense_derivatives_in_closed_form_agree_with_the_differentiated_ones(vit: Target) -> None:
    step = walk(in_precision(vit, torch.float64)).between("blocks.1", "blocks.0")[-1]
    assert step.jacobian is not None
    x = normal(5, 16)
    assert relative(step.jacobian(x), replace(step, jacobian=None).slopes(x)) < 1e-13


@pytest.mark.parametrize("near", [True, False])
def test_a_root_with_another_class_token_than_every_image_s_is_none(near: bool) -> None:
    """x³ − 3 x just above its summit at −1: the last root is near 2, and Newton's method stalls beside the summit."""
    known = torch.full((1, 4), -1.0, dtype=torch.float64)
    step = Step("a", "b", lambda x: x**3 - 3 * x, known=known if near else None)
    truth = torch.cat([known.expand(2, 1, 4), -1 + 0.1 * normal(2, 3, 4)], dim=1)
    y = torch.full_like(truth, 2.01)
    solution = Half(step).solve(y, [truth, y], Settings(restarts=1))
    assert bool(solution.solved.all()) != near
    assert (relative(solution.x, truth) < 0.5) == near
    assert bool((solution.residual < 0.1).all())


# Norms


def test_the_final_norm_loses_one_degree_a_token_and_keeps_it_lost_all_the_way() -> None:
    target = small_timm("ViT")  # as it is drawn: a livelier one has a token with another root
    inverse = fitted(target, "norm")
    assert [step.destination for step in inverse.steps if step.lossy] == ["norm"]
    truth = inverse.model.target.record(pictures(target, 3, seed=1).double(), ["patch_embed", "norm"])
    values, there = inverse.trace(truth["norm"]).values, truth["patch_embed"].values
    # Pre-norm blocks do not see the mean of a token, so that it passes from one end to the other.
    centred = [stream - stream.mean(-1, keepdim=True) for stream in (values, there)]
    assert relative(*centred) < 1e-5
    assert relative(values, there) > 1e-3


def test_a_norm_keeps_the_scale_in_its_last_digits_and_in_float32_loses_it() -> None:
    z = normal(2, 5, 16)
    norm = Norm(torch.nn.LayerNorm(16))
    deviation = (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(norm.deviation(norm.normalised(z)), deviation, rtol=1e-8)
    assert norm.deviation(norm.normalised(z).float()).isnan().all()


def test_a_post_norm_layer_behind_a_norm_is_inverted_in_full() -> None:
    target = in_precision(small_detector(), torch.float64)
    steps = walk(target).between("encoder.layers.1", "encoder.layers.0")
    assert all(step.norm is not None and step.before is not None for step in steps)
    x = target.record(pictures(target, 2, seed=2).double(), ["encoder.layers.0"])["encoder.layers.0"].values
    y, before = steps[0](x), steps[0].before
    assert before is not None
    solution = Half(steps[0]).solve(y, [y], square=before.stripped(x).square().mean(-1, keepdim=True))
    assert bool(solution.solved.all())
    assert relative(solution.x, x) < 1e-9
    # With 1 for the mean square, the norm's ε is left out, and the error is of its size.
    assert 1e-9 < relative(Half(steps[0]).solve(y, [y]).x, x) < 1e-3


def test_detr_comes_back_to_its_first_layer_and_says_what_the_first_norm_took() -> None:
    target = small_detector()
    inverse = fitted(target, "encoder.layers.1")
    assert inverse.reached == "projection"
    assert [step.destination for step in inverse.steps if step.lossy] == ["encoder.layers.0.attn"]
    truth = inverse.model.target.record(pictures(target, 2, seed=1).double(), "fine")
    trace = inverse.trace(truth["encoder.layers.1"])
    assert bool(trace.solved.all())
    solved = zip(trace.steps, trace.solutions, strict=True)
    errors = {step.source: relative(solution.x, truth[step.source].values) for step, solution in solved}
    assert errors["encoder.layers.0"] < 1e-9
    # The norm that it left is the last to be known: within its ε of 1e-5, as far as that token's variance is guessed.
    assert 1e-12 < errors["encoder.layers.0.attn"] < 1e-5
    assert errors["projection"] > 1e-3


# Starts, and the choice among roots


def kinked(x: Tensor) -> Tensor:
    """Folds at ±0.8814, where it is ∓0.5328; between these values it has three roots, at 0 the outer ones ±1.915."""
    return x - 2 * x.tanh()


def test_where_a_step_folds_the_most_usual_root_is_kept(vit: Target) -> None:
    """A model whose last half-step folds: the last stage of the start leads to the root on the other side."""
    model = ExactModel.of(vit)
    number, slope = model.taps["blocks.1"], lambda x: torch.diag_embed(1 - 2 / x.cosh().square())
    half = Half(replace(model.steps[number], forward=kinked, jacobian=slope))
    model = replace(model, steps={**model.steps, number: half.step})
    recorded = model.target.record(pictures(vit, 8).double(), ["blocks.1.attn"])["blocks.1.attn"]
    truth = -1.915 + 0.3 * recorded.values.tanh()
    half.fit(truth + 0.1 * normal(*truth.shape), kinked(truth), 1, 2)
    half.folding.fill_(0.5)
    half.errors.copy_((truth - 2.5).flatten(0, 1)[: len(half.errors)])
    for stage, guess in ((half.stage0, -2.5), (half.stage1, 2.5)):
        stage.zero_()
        stage[:, -1] = guess
    parts = {"blocks.1": half}
    y, to = recorded.replace(kinked(truth)), "blocks.1.attn"
    assert relative(ExactInverse(model, "blocks.1", parts).trace(y, to).values, truth) < 1e-10
    first = ExactInverse(model, "blocks.1", parts, settings=Settings(choose=False)).trace(y, to)
    assert bool(first.solved.all())
    assert bool((first.values > 0).all()), "the first start leads to the other side"
    half.stage0[:, -1] = 2.5  # then only the errors of training tokens lead back: of guesses at 2.5, tokens at −1.9
    assert relative(ExactInverse(model, "blocks.1", parts).trace(y, to).values, truth) < 1e-10


def test_the_fit_says_where_a_model_folds() -> None:
    target = lively(small_timm("ViT"), 1.0)
    parameters = dict(target.model.named_parameters())
    for name in ("fc1", "fc2"):
        parameters[f"blocks.1.mlp.{name}.weight"].data.mul_(40)
    halves = fitted(target, "blocks.1").fitted()
    assert float(halves["blocks.0"].folding) == 0.0
    assert float(halves["blocks.1"].folding) > 0.1


def test_a_linear_step_is_guessed_by_the_first_stage(vit: Target) -> None:
    matrix = torch.eye(8, dtype=torch.float64) + 0.3 * normal(8, 8)
    step = Step("a", "b", lambda x: x @ matrix, tokenwise=True)
    x = normal(30, 5, 8, seed=1)
    half = Half(step)
    half.fit(x, step(x), prefix=1, stages=2)
    assert half.stage0.shape == (2, 9, 8)  # of the prefix token and of the grid, whatever the grid
    for guess in half.guesses(step(x)):
        assert relative(guess, x) < 1e-3


# Pixels


def test_a_patch_embedding_of_full_rank_gives_the_pixels_back() -> None:
    target = in_precision(small_timm("ViT", patch_size=4, embed_dim=64, img_size=(32, 16)), torch.float64)
    embedding = measured_embedding(target)
    assert embedding is not None
    assert (embedding.rank, embedding.matrix.shape) == (48, (48, 64))
    images = pictures(target, 2).double()
    values = target.record(images, ["patch_embed"])["patch_embed"].values
    assert relative(embedding.pixels(values), images) < 1e-6


def test_a_lossy_patch_embedding_is_completed_by_the_given_image(vit: Target) -> None:
    target = in_precision(vit, torch.float64)
    embedding = measured_embedding(target)
    assert embedding is not None
    assert embedding.rank == 16
    images = pictures(target, 2).double()
    near = images + 0.05 * normal(*images.shape)
    values = target.record(images, ["patch_embed"])["patch_embed"].values
    completed = embedding.pixels(values, near)
    shares = ((completed - images).square().sum() / (near - images).square().sum()).item()
    assert shares == pytest.approx(1 - 16 / 192, abs=0.02)


def test_an_inverse_makes_images_of_a_recorded_tap_without_any_fit() -> None:
    target = small_timm("ViT", patch_size=4, embed_dim=64)
    inverse = ExactInverse(ExactModel.of(target), "blocks.1")
    images = pictures(target, 2, seed=1)
    made = inverse(target.record(images, ["blocks.1"])["blocks.1"])  # in float32
    assert (made.shape, made.dtype) == (images.shape, torch.float32)
    assert relative(made, images) < 1e-3


# The whole family, and its files


def test_a_whole_target_is_fitted_saved_and_read_back(vit: Target, tmp_path: Path) -> None:
    images = pictures(vit, 40)
    linear = fit_linear(vit, images, taps=["patch_embed"], progress=False)
    inverses = fit_exact(vit, images, linear=linear, count=20, stages=2, progress=False)
    assert list(inverses) == ["blocks.0", "blocks.1"] if "patch_embed" not in vit.taps else True
    assert inverses["blocks.1"].completion is linear["patch_embed"]
    recorded = vit.record(pictures(vit, 2, seed=2))["blocks.1"]
    made = inverses["blocks.1"](recorded)
    for half, tolerance in ((False, 1e-5), (True, 0.02)):
        files = {path.name: path for path in save(inverses, tmp_path / str(half), half)}
        path = files["exact--blocks.1.safetensors"]
        loaded = read(path, vit)
        assert isinstance(loaded, ExactInverse)
        assert (loaded.reached, loaded.settings) == ("patch_embed", Settings())
        torch.testing.assert_close(loaded(recorded), made, atol=tolerance, rtol=0)
        assert load_file(path)["halves.1.precision"].dtype == torch.float64
    other = small_timm("ViT", img_size=(32, 16))
    with pytest.raises(BacksightError, match="load that target"):
        read(path, other)


def test_buffers_do_not_grow_with_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backsight.exact.starts.EXAMPLES", 64)
    sizes = set()
    for side in (32, 64):
        halves = fitted(small_timm("ViT", img_size=side), "blocks.1").halves
        sizes.add(sum(buffer.numel() * buffer.element_size() for buffer in halves.buffers()))
    assert len(sizes) == 1


def test_only_the_beginnings_of_runs_are_recorded(vit: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, record = set(), type(vit).record

    def spied(self: Target, images: Tensor, taps: object = None, *others: object) -> object:
        if len(images) > 1:
            asked.update(taps)
        return record(self, images, taps, *others)

    ExactModel.of(vit)
    monkeypatch.setattr(type(vit), "record", spied)
    linear = {"patch_embed": torch.nn.Identity()}
    fit_exact(vit, pictures(vit, 10), taps=["blocks.0", "blocks.1"], linear=linear, count=10, stages=1, progress=False)
    assert asked == {"patch_embed"}


def test_taps_without_a_step_back_are_left_out_and_told(tmp_path: Path) -> None:
    target = small_detector().select(["encoder.layers.1", "decoder.layers.1"])
    images = pictures(target, 10)
    with pytest.warns(UserWarning, match=r"no exact inverse at decoder\.layers\.1\. .*cannot be inverted exactly"):
        inverses = fit_exact(target, images, stages=1, progress=False)
    assert list(inverses) == ["encoder.layers.1"]
    with pytest.raises(BacksightError, match=r"has no exact inverse at any of its taps .*cannot be inverted exactly"):
        fit_exact(target, images, taps=["decoder.layers.1"], progress=False)
