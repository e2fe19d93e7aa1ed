"""Linear inverses: the closed form is the textbook's, from one pass, and measures what is linearly there."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.inverses.layouts import join
from backsight.inverses.linear import (
    ALPHAS,
    LinearInverse,
    RidgeAccumulator,
    fit_linear,
    fit_linear_pairs,
    form_of,
    pack_destination,
    plan_layout,
)
from backsight.inverses.patches import patchify, unpatchify
from backsight.representation import Predictions, Queries, Representation, Tokens

SIZE, PATCH = (8, 12), (4, 4)  # non-square: a grid of 2 x 3 tokens of 48 values
GRID = (2, 3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


class FakeTarget:
    """Known linear maps of the pixels at every tap; counts its forward passes."""

    name = "fake"
    available_taps = ("mixed", "lossy", "unrelated", "encoder", "levels", "decoder", "predictions", "halved")
    taps = ("mixed", "lossy")
    reduction = PATCH

    def __init__(self, pad: float | None = None) -> None:
        self.model = nn.Linear(1, 1)
        self.seen: list[int] = []
        self.pad = pad
        self.rotation = torch.linalg.qr(normal(48, 48)).Q.float()
        self.reader = normal(3 * 8 * 12, 4 * 6, seed=1).float()
        self.code = normal(1, 6, 48, seed=2).float()

    def record(self, images: Tensor, taps: list[str]) -> dict[str, Representation]:
        self.seen.append(len(images))
        tokens = patchify(images, PATCH)
        prefix = tokens.mean(1, keepdim=True)
        mixed = torch.cat([prefix, tokens], dim=1) @ self.rotation
        padding = None
        if self.pad is not None:
            padding = torch.zeros(len(images), 6, dtype=torch.bool)
            padding[:, 4:] = True
            mixed[:, 5:] = self.pad
        halves = images.mean((1, 2, 3))[:, None, None].expand(-1, 1, 48)
        queries = (images.flatten(1) @ self.reader).reshape(-1, 4, 6)
        every: dict[str, Representation] = {
            "mixed": Tokens(mixed, (GRID,), 1, padding, self.code),
            "lossy": Tokens(mixed[..., :16], (GRID,), 1, padding),
            "unrelated": Tokens(torch.sin(1e5 * mixed), (GRID,), 1),
            "encoder": Tokens(tokens @ self.rotation, (GRID,), 0, None, self.code),
            "levels": Tokens(torch.cat([mixed[:, 1:], halves[:, :1], halves[:, :1]], 1), (GRID, (1, 2))),
            "decoder": Queries(queries, Tokens(mixed, (GRID,), 1)),
            "predictions": Predictions(queries[..., :3], queries[..., 2:].sigmoid()),
            "halved": Tokens(mixed[:, :3], ((1, 2),), 1),
        }
        return {tap: every[tap] for tap in taps}


def accumulated(x: Tensor, *ys: Tensor, pieces: int = 3) -> RidgeAccumulator:
    accumulator = RidgeAccumulator()
    for rows in zip(x.chunk(pieces), *(y.chunk(pieces) for y in ys), strict=True):
        accumulator.update(*rows)
    return accumulator


# ------------------------------------------------------------------------------------------------- patches
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 13), st.integers(1, 13), st.integers(1, 5), st.integers(1, 5))
def test_patches_return_every_pixel(batch: int, height: int, width: int, rows: int, columns: int) -> None:
    images = torch.rand(batch, 3, height, width)
    grid = (-(-height // rows), -(-width // columns))
    tokens = patchify(images, (rows, columns))
    assert tokens.shape == (batch, grid[0] * grid[1], 3 * rows * columns)
    assert torch.equal(unpatchify(tokens, grid, (rows, columns), (height, width)), images)


def test_patches_are_in_the_order_of_unfold_and_refuse_another_grid() -> None:
    images = pictures(2)
    assert torch.equal(patchify(images, PATCH), nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2))
    with pytest.raises(BacksightError, match="grid of 3 x 3"):
        unpatchify(patchify(images, PATCH), (3, 3), PATCH)
    with pytest.raises(BacksightError, match="no multiple of 5 x 5"):
        unpatchify(patchify(images, PATCH), GRID, (5, 5))


# --------------------------------------------------------------------------------------------------- ridge
@pytest.mark.parametrize("alpha", [1e-6, 0.01, 3.0])
def test_closed_form_is_scikit_learns(alpha: float) -> None:
    x = normal(60, 7) @ normal(7, 7, seed=1) * torch.logspace(-3, 3, 7) + 50
    y = x @ normal(7, 4, seed=2) + normal(60, 4, seed=3)
    weight, bias = accumulated(x, y).solve(alpha)
    scaler = StandardScaler().fit(x)
    reference = Ridge(alpha=alpha * len(x)).fit(scaler.transform(x), y)
    expected = reference.predict(scaler.transform(x))
    np.testing.assert_allclose(x @ weight + bias, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())
    np.testing.assert_allclose(weight, reference.coef_.T / scaler.scale_[:, None], rtol=1e-8, atol=1e-10)


def test_the_path_of_strengths_equals_separate_solves() -> None:
    x, y = normal(50, 9), normal(50, 3, seed=1)
    together = accumulated(x, y).solve_path(ALPHAS)
    for alpha, (weight, bias) in zip(ALPHAS, together, strict=True):
        centred, scale = x - x.mean(0), x.std(0, unbiased=False)
        gram = (centred / scale).T @ (centred / scale) / 50 + alpha * torch.eye(9, dtype=torch.float64)
        expected = torch.linalg.solve(gram, (centred / scale).T @ y / 50) / scale[:, None]
        torch.testing.assert_close(weight, expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(bias, y.mean(0) - x.mean(0) @ expected, rtol=1e-8, atol=1e-8)


def test_validation_errors_from_moments_are_the_errors_of_the_rows() -> None:
    x, y = normal(80, 6) + 4, normal(80, 5, seed=1)
    new_x, new_y = 2 * normal(30, 6, seed=2) - 1, normal(30, 5, seed=3) + 7
    training, validation = accumulated(x, y), accumulated(new_x, new_y)
    path = training.path()
    errors = path.errors(validation, ALPHAS)
    for alpha, error in zip(ALPHAS, errors, strict=True):
        weight, bias = training.solve(alpha)
        direct = float((new_x @ weight + bias - new_y).square().mean())
        assert error == pytest.approx(direct, rel=1e-10)
        assert validation.mse(weight, bias) == pytest.approx(direct, rel=1e-10)
    left, right = path.low_rank(0.1, 2)
    bias = path.output_mean - path.spectrum.mean @ left @ right
    direct = float((new_x @ left @ right + bias - new_y).square().mean())
    assert validation.mse((left, right), bias) == pytest.approx(direct, rel=1e-10)
    assert validation.total_variance(y.mean(0)) == pytest.approx(float((new_y - y.mean(0)).square().mean()))


def test_accumulators_add() -> None:
    x, y, z = normal(90, 5) + 3, normal(90, 4, seed=1), normal(90, 2, seed=2)
    whole = accumulated(x, y, z, pieces=1)
    parts = [accumulated(*rows) for rows in zip(x.split(40), y.split(40), z.split(40), strict=True)]
    total = RidgeAccumulator() + parts[0] + parts[1] + parts[2] + RidgeAccumulator()
    assert total.count == whole.count
    for part in (0, 1):
        for found, expected in zip(total.solve(0.01, part), whole.solve(0.01, part), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
        assert total.mse(*whole.solve(1.0, part), part) == pytest.approx(whole.mse(*whole.solve(1.0, part), part))


def test_several_outputs_share_one_eigendecomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(1) or original(matrix))
    accumulator = accumulated(normal(40, 5), normal(40, 3, seed=1), normal(40, 2, seed=2))
    for part in (0, 1):
        accumulator.solve_path(ALPHAS, part)
        accumulator.path(part).errors(accumulator, ALPHAS, part)
    assert len(calls) == 1


def test_low_rank_is_the_projection_of_the_fitted_values() -> None:
    x, y = normal(100, 8), normal(100, 8, seed=1) @ normal(8, 6, seed=2)
    path = accumulated(x, y).path()
    fitted = (x - x.mean(0)) @ path.weight(0.2)
    left, right = path.low_rank(0.2, 3)
    assert left.shape == (8, 3)
    assert right.shape == (3, 6)
    axes = torch.linalg.svd(fitted, full_matrices=False).Vh[:3]
    torch.testing.assert_close((x - x.mean(0)) @ left @ right, fitted @ axes.T @ axes, rtol=1e-8, atol=1e-8)
    left, right = path.low_rank(0.2, 6)
    torch.testing.assert_close(left @ right, path.weight(0.2), rtol=1e-8, atol=1e-8)


def test_double_precision_keeps_what_single_loses() -> None:
    """Huge means, channels 1e-2 to 1e4 and a decisive direction of relative spread 1e-4: all in float32 features."""
    base = normal(4000, 6)
    base[:, 1] = base[:, 0] + 1e-4 * base[:, 1]
    x = (base * torch.logspace(-2, 4, 6) + torch.tensor([10, 1e2, -1e3, 1e4, 1e5, 1e6])).float()
    scaled = StandardScaler().fit_transform(x.double())
    y = torch.from_numpy(scaled[:, :1] - scaled[:, 1:2]) * 1e4 + torch.from_numpy(scaled[:, 5:])
    weight, bias = accumulated(x, y, pieces=16).solve(1e-13)
    error = float((x.double() @ weight + bias - y).square().mean() / y.var())
    assert error < 1e-5
    single = (x - x.mean(0)) / x.std(0)
    gram = single.T @ single / len(x) + 1e-13 * torch.eye(6)
    wrong = torch.linalg.solve(gram, single.T @ (y - y.mean(0)).float() / len(x))
    lost = float((single @ wrong - (y - y.mean(0))).square().mean() / y.var())
    assert lost > 100 * error


def test_constant_channels_and_bad_input() -> None:
    x, y = normal(40, 3), normal(40, 2, seed=1)
    x[:, 1] = 1e7
    weight, _ = accumulated(x, y).solve(1e-6)
    assert torch.equal(weight[1], torch.zeros(2, dtype=torch.float64))
    with pytest.raises(BacksightError, match="above 0"):
        accumulated(x, y).solve(0.0)
    with pytest.raises(BacksightError, match="without rows"):
        RidgeAccumulator().solve(1.0)
    with pytest.raises(BacksightError, match="started with 3 inputs"):
        accumulated(x, y).update(normal(5, 4), normal(5, 2))
    x[3, 0] = torch.nan
    with pytest.raises(BacksightError, match="not finite"):
        accumulated(x, y).solve(1.0)


# ----------------------------------------------------------------------------------------------------- fit
def test_all_taps_take_one_pass() -> None:
    target = FakeTarget()
    inverses = fit_linear(target, pictures(70), validation=pictures(20, 1), batch_size=32, progress=False)
    assert list(inverses) == ["mixed", "lossy"]
    assert target.seen == [32, 32, 6, 20]
    held_out = FakeTarget()
    pairs = [("mixed", "pixels"), ("lossy", "mixed"), ("decoder", "pixels"), ("decoder", "encoder")]
    fit_linear_pairs(held_out, pictures(70), pairs, batch_size=32, progress=False)
    assert held_out.seen == [32, 32, 6]


def test_an_invertible_tap_is_inverted_and_an_unrelated_one_is_not() -> None:
    new = pictures(16, 9)
    target = FakeTarget()
    inverses = fit_linear(
        target, pictures(200), ["mixed", "lossy", "unrelated"], validation=pictures(60, 1), progress=False
    )
    score = inverses["mixed"].score
    assert score.r2 > 1 - 1e-6
    assert score.images == 60
    assert score.psnr is not None
    assert score.psnr_low is not None
    assert score.psnr_high is not None
    assert 60 < score.psnr_low <= score.psnr <= score.psnr_high
    assert 0.2 < inverses["lossy"].score.r2_low < inverses["lossy"].r2 < inverses["lossy"].score.r2_high < 0.45
    assert abs(inverses["unrelated"].r2) < 0.05
    found = inverses["mixed"](target.record(new, ["mixed"])["mixed"])
    torch.testing.assert_close(found, new, atol=1e-3, rtol=0)


def test_shuffled_images_leave_nothing_to_find() -> None:
    class Shuffled(FakeTarget):
        def record(self, images: Tensor, taps: list[str]) -> dict[str, Representation]:
            return {
                tap: each.index(torch.arange(len(images)).roll(1)) for tap, each in super().record(images, taps).items()
            }

    fitted = fit_linear(Shuffled(), pictures(200), ["mixed"], validation=pictures(60, 1), progress=False)
    assert abs(fitted["mixed"].r2) < 0.02


def test_the_fit_is_the_regression_of_the_stored_features() -> None:
    images, target = pictures(50), FakeTarget()
    inverse = fit_linear(
        target, images, "lossy", validation=pictures(20, 1), alphas=[0.1], batch_size=16, progress=False
    )["lossy"]
    features = target.record(images, ["lossy"])["lossy"]
    assert isinstance(features, Tokens)
    weight, bias = accumulated(features.patches.flatten(0, 1), patchify(images, PATCH).flatten(0, 1)).solve(0.1)
    torch.testing.assert_close(inverse.weight.double(), weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(inverse.bias.double(), bias, rtol=1e-4, atol=1e-5)
    expected = unpatchify((features.patches.double() @ weight + bias).float(), GRID, PATCH)
    torch.testing.assert_close(inverse.raw(features), expected, rtol=1e-4, atol=1e-5)
    assert inverse(features).min() >= 0
    new = pictures(20, 1)
    mean_patch = patchify(images, PATCH).mean((0, 1))
    error = (inverse.raw(target.record(new, ["lossy"])["lossy"]) - new).square().sum()
    assert inverse.r2 == pytest.approx(1 - float(error / (patchify(new, PATCH) - mean_patch).square().sum()), abs=1e-5)


def test_tokens_to_tokens_carry_what_travels_with_them() -> None:
    target = FakeTarget()
    pairs = [("mixed", "lossy"), ("lossy", "mixed"), ("encoder", "mixed"), ("mixed", "encoder")]
    fitted = fit_linear_pairs(target, pictures(300), pairs, progress=False)
    given = target.record(pictures(4, 5), ["mixed", "lossy", "encoder"])
    forward = fitted["mixed", "lossy"](given["mixed"])
    assert fitted["mixed", "lossy"].layout.blocks == ("patches", "prefix_0")
    assert fitted["mixed", "lossy"].r2 > 1 - 1e-6
    assert forward.signature == given["lossy"].signature
    torch.testing.assert_close(forward.values, given["lossy"].values, atol=1e-3, rtol=0)
    assert forward.position is None
    back = fitted["lossy", "mixed"](given["lossy"])
    assert back.signature == given["mixed"].signature
    assert torch.equal(back.position, target.code)  # the source has none: kept from the fit
    # The prefix token is the mean of the others, and where the source has none it is found from their mean.
    gained = fitted["encoder", "mixed"]
    assert gained.r2 > 1 - 1e-6
    torch.testing.assert_close(gained(given["encoder"]).values, given["mixed"].values, atol=1e-3, rtol=0)
    carried = fitted["mixed", "encoder"](given["mixed"])
    assert carried.prefix == 0
    assert carried.position is given["mixed"].position


def test_padded_tokens_are_neither_fitted_nor_predicted() -> None:
    fits = []
    for garbage in (0.0, 1e6):
        target = FakeTarget(pad=garbage)
        fitted = fit_linear(target, pictures(60), "mixed", validation=pictures(30, 1), progress=False)["mixed"]
        result = fitted(target.record(pictures(2, 3), ["mixed"])["mixed"])
        fits.append((fitted, result))
    torch.testing.assert_close(fits[0][1], fits[1][1])
    torch.testing.assert_close(fits[0][0].weight, fits[1][0].weight)
    assert fits[1][0].score.r2_low > 0.999
    mean = fits[0][0].maps["patches"].get_buffer("bias")
    torch.testing.assert_close(patchify(fits[0][1], PATCH)[0, 5], mean)


def test_several_grids_are_read_together() -> None:
    target = FakeTarget()
    inverse = fit_linear(target, pictures(200), "levels", validation=pictures(50, 1), progress=False)["levels"]
    assert inverse.layout.inputs("patches") == 96
    assert inverse.r2 > 0.99
    assert inverse(target.record(pictures(1), ["levels"])["levels"]).shape == (1, 3, *SIZE)


def test_sets_to_pixels_tokens_and_queries() -> None:
    target = FakeTarget()
    pairs = [
        ("decoder", "pixels"),
        ("decoder", "encoder"),
        ("decoder", "mixed"),
        ("predictions", "decoder"),
        ("predictions", "pixels"),
    ]
    fitted = fit_linear_pairs(target, pictures(400), pairs, validation=pictures(100, 1), rank=20, progress=False)
    given = target.record(pictures(3, 8), ["decoder", "mixed", "encoder", "predictions"])
    whole = fitted["decoder", "pixels"]
    assert whole(given["decoder"]).shape == (3, 3, *SIZE)
    assert whole.maps["set"].rank == 20
    assert 0.03 < whole.r2 < 24 / 288  # 24 numbers of 288 independent pixels, 20 of them kept
    tokens = fitted["decoder", "encoder"](given["decoder"])
    assert tokens.signature == given["encoder"].signature
    assert torch.equal(tokens.position, target.code)
    assert fitted["decoder", "mixed"](given["decoder"]).signature == given["mixed"].signature
    queries = fitted["predictions", "decoder"](given["predictions"])
    assert queries.signature == given["decoder"].signature
    assert queries.context is None
    assert fitted["predictions", "decoder"].r2 > 0.6
    with pytest.raises(BacksightError, match="No linear map from tokens"):
        fit_linear(target, pictures(10), "mixed", to="decoder", progress=False)


def test_a_long_set_is_projected_and_a_large_map_is_pooled() -> None:
    target = FakeTarget()
    pair = ("decoder", "pixels")
    arguments = {"maximum_inputs": 16, "maximum_outputs": 100, "progress": False, "seed": 3}
    first = fit_linear_pairs(target, pictures(200), [pair], **arguments)[pair]
    again = fit_linear_pairs(target, pictures(200), [pair], **arguments)[pair]
    assert (first.layout.projected, first.layout.pooling, first.layout.outputs("set")) == (4, 2, 72)
    projection = first.get_buffer("projection")
    torch.testing.assert_close(projection.T @ projection, torch.eye(4))
    images = first(target.record(pictures(2), ["decoder"])["decoder"])
    assert images.shape == (2, 3, *SIZE)
    assert torch.equal(images, again(target.record(pictures(2), ["decoder"])["decoder"]))
    assert first.score.r2_low < first.score.r2 < first.score.r2_high
    large = plan_layout(pair, form_of(Queries(torch.zeros(1, 100, 256))), form_of(torch.zeros(1, 3, 480, 640)))
    assert (large.projected, large.pooling) == (40, 16)


@pytest.mark.parametrize("pair", [("mixed", "pixels"), ("lossy", "mixed"), ("decoder", "pixels"), ("decoder", "mixed")])
def test_a_saved_inverse_is_the_same_inverse(pair: tuple[str, str]) -> None:
    target = FakeTarget()
    fitted = fit_linear_pairs(target, pictures(60), [pair], rank=8, maximum_inputs=16, progress=False)[pair]
    configuration = json.loads(json.dumps(fitted.configuration()))
    loaded = LinearInverse.from_configuration(configuration)
    loaded.load_state_dict(fitted.state_dict())
    assert loaded.score == fitted.score
    assert (loaded.source, loaded.destination, loaded.family) == (*pair, "linear")
    given = target.record(pictures(3, 4), [pair[0]])[pair[0]]
    for one, other in [(fitted(given), loaded(given))]:
        if isinstance(one, Tensor):
            assert torch.equal(one, other)
        else:
            assert torch.equal(one.values, other.values)
            assert torch.equal(one.position, other.position)


def test_gradients_reach_the_representation_and_other_grids_are_read() -> None:
    target = FakeTarget()
    inverse = fit_linear(target, pictures(60), "mixed", progress=False)["mixed"]
    values = torch.rand(2, 21, 48, requires_grad=True)
    images = inverse.raw(Tokens(values, ((4, 5),), 1))
    assert images.shape == (2, 3, 16, 20)
    images.sum().backward()
    assert values.grad is not None
    assert values.grad[:, 1:].abs().min() > 0
    with pytest.raises(BacksightError, match="reads tokens on 2 x 3 with 1 prefix tokens and 48 channels"):
        inverse(Tokens(torch.rand(1, 6, 16), (GRID,)))
    with pytest.raises(BacksightError, match="was given 4 queries"):
        inverse(Queries(torch.rand(1, 4, 6)))
    with pytest.raises(BacksightError, match="no block 'prefix_0'"):
        inverse.affine("prefix_0")


def test_image_sides_that_are_no_multiple_of_the_patch() -> None:
    images = torch.rand(2, 3, 7, 10)
    source = Tokens(torch.zeros(2, 6, 5), (GRID,))
    layout = plan_layout(("a", "pixels"), form_of(source), form_of(images), PATCH)
    assert layout.patch == PATCH
    assert unpatchify(pack_destination(images, layout, "patches").unflatten(0, (2, 6)), GRID, PATCH, (7, 10)).equal(
        images
    )
    # Seven columns of ten pixels: no whole patch makes seven, so that patches overlap, and their mean is the image.
    layout = plan_layout(("a", "pixels"), form_of(Tokens(torch.zeros(1, 49, 2), ((7, 7),))), form_of(images), PATCH)
    assert layout.patch == (1, 2)
    rows = pack_destination(images, layout, "patches").unflatten(0, (2, 49))
    torch.testing.assert_close(join(rows, (7, 7), layout.patch, (7, 10)), images)


def test_user_errors_are_one_sentence() -> None:
    target = FakeTarget()
    with pytest.raises(BacksightError, match=r"no tap 'mixd' to map from; nearest: mixed"):
        fit_linear(target, pictures(10), ["mixd"], progress=False)
    with pytest.raises(BacksightError, match=r"no tap 'pixel' to map to; nearest: pixels"):
        fit_linear(target, pictures(10), ["mixed"], to="pixel", progress=False)
    with pytest.raises(BacksightError, match="identity"):
        fit_linear(target, pictures(10), ["mixed"], to="mixed", progress=False)
    with pytest.raises(BacksightError, match="at least one tap"):
        fit_linear(target, pictures(10), [], progress=False)
    with pytest.raises(BacksightError, match="alphas is"):
        fit_linear(target, pictures(10), alphas=[0.0], progress=False)
    with pytest.raises(BacksightError, match="at least 5 images"):
        fit_linear(target, pictures(4), progress=False)
    assert target.seen == [4]  # all but the last one are refused before the first image is seen


def test_a_fit_leaves_the_random_state_alone() -> None:
    target = FakeTarget()
    before = torch.get_rng_state()
    fit_linear(target, pictures(20), "decoder", progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_context_is_a_convolution_in_closed_form() -> None:
    """A blur of the neighbouring tokens is found exactly with context 3, and not from single tokens."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, 1 + 4 * 6, 5, generator=generator)
    tokens = Tokens(values, ((4, 6),), prefix=1)
    blurred = (
        torch.nn.functional.avg_pool2d(tokens.map(), 3, stride=1, padding=1) + tokens.prefix_values[:, 0, :, None, None]
    )
    wanted = Tokens(torch.cat([values[:, :1], blurred.flatten(2).transpose(1, 2)], 1), ((4, 6),), prefix=1)
    images = torch.rand(60, 3, 8, 12, generator=generator)

    class Blurring:
        name, taps, reduction, model = "blurring", ("before", "after"), (2, 2), torch.nn.Identity()
        done = 0

        def record(self, batch: Tensor, taps: list[str]) -> dict[str, Tokens]:
            chosen = torch.arange(self.done, self.done + len(batch)) % 60
            self.done += len(batch)
            return {"before": tokens.index(chosen), "after": wanted.index(chosen)}

    pair = ("before", "after")
    wide, narrow = (
        fit_linear_pairs(Blurring(), images, [pair], context=context, progress=False)[pair] for context in (3, 1)
    )
    assert wide.r2 > 0.9999 > 0.9 > narrow.r2
    found = wide(tokens)
    assert torch.allclose(found.values, wanted.values, atol=1e-2)
    copy = LinearInverse.from_configuration(wide.configuration())
    copy.load_state_dict(wide.state_dict())
    assert torch.equal(copy(tokens).values, found.values)
    with pytest.raises(BacksightError, match="odd number"):
        fit_linear_pairs(Blurring(), images, [pair], context=2, progress=False)
