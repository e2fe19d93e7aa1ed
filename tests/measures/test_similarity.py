"""Similarity of layers: answers that are known, and never NaN."""

import numpy as np
import pytest
import torch

from backsight.errors import BacksightError
from backsight.measures.similarity import (
    TokenSample,
    cka_from_products,
    cka_products,
    frechet_distance,
    residual_update,
    shuffled_rows,
    token_cosine,
)
from backsight.representation import Queries, Tokens


def linear_cka(first, second):
    return float(cka_from_products(cka_products([first, second]))[0, 1])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def features():
    """(6, 60, 12): minibatches of rows whose channels differ in size and have an offset."""
    return normal(6, 60, 12) * torch.linspace(0.2, 3, 12) + 5


@pytest.fixture(scope="module")
def rotation():
    return torch.linalg.qr(normal(12, 12, seed=1)).Q


def test_identical_rotated_scaled_and_shifted_features_score_one(features, rotation):
    assert linear_cka(features, features) == pytest.approx(1, abs=1e-9)
    assert linear_cka(features, 7 * features @ rotation - 2) == pytest.approx(1, abs=1e-9)


def test_cka_of_independent_features_is_zero_on_average():
    values = [linear_cka(normal(8, 60, 30, seed=2 * s), normal(8, 60, 20, seed=2 * s + 1)) for s in range(20)]
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 5 * error + 1e-3
    assert abs(np.mean(values)) < 0.05


def test_few_rows_inflate_plain_cka_but_not_the_debiased_one():
    first, second = normal(40, 10, 100), normal(40, 10, 100, seed=1)
    centred = [each - each.mean(1, keepdim=True) for each in (first, second)]
    grams = [each @ each.transpose(1, 2) for each in centred]
    plain = (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())
    assert plain > 0.5
    assert abs(linear_cka(first, second)) < 0.2


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e6])
def test_constant_features_are_like_nothing_and_never_nan(features, value):
    constant = torch.full((6, 60, 5), value)
    assert linear_cka(features, constant) == 0
    assert linear_cka(constant, constant) == 0


def test_the_formula_of_debiased_cka():
    """HSIC_1 of Song et al. (2012), equation 5, written out for one minibatch."""
    x, y = normal(9, 4), normal(9, 3, seed=1) + normal(9, 4)[:, :3]

    def hsic(first, second):
        k, m = (each @ each.T for each in (first, second))
        k.fill_diagonal_(0)
        m.fill_diagonal_(0)
        n, one = len(k), torch.ones(len(k), dtype=k.dtype)
        mixed = one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
        return (torch.trace(k @ m) + mixed - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))

    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    assert linear_cka(x, y) == pytest.approx(float(expected), abs=1e-9)


def test_rows_that_do_not_match_are_refused(features):
    with pytest.raises(BacksightError, match="the same rows"):
        linear_cka(features, features[:, :50])
    with pytest.raises(BacksightError, match="at least 4 rows"):
        linear_cka(features[:, :3], features[:, :3])
    with pytest.raises(BacksightError, match="NaN"):
        linear_cka(features, features * torch.nan)


def test_cosine_and_residual_update_by_hand():
    before = Tokens(torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), ((1, 2),))
    after = before.replace(torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]))
    assert token_cosine(before, after).tolist() == [pytest.approx(0.5)]
    assert residual_update(before, after).tolist() == [pytest.approx(2**0.5 / 2)]
    zeros = Queries(torch.zeros(1, 3, 2))
    assert residual_update(zeros, Queries(torch.ones(1, 3, 2))).isnan().all()
    padded = Tokens(before.values, ((1, 2),), padding=torch.tensor([[False, True]]))
    assert residual_update(padded, after).tolist() == [0]
    with pytest.raises(BacksightError, match="channels"):
        token_cosine(before, Tokens(torch.zeros(1, 2, 3), ((1, 2),)))


def test_the_sample_takes_the_same_tokens_at_every_layer_and_no_prefix():
    values = torch.arange(24 * 10, dtype=torch.float32).reshape(24, 10, 1)
    one = Tokens(values, ((3, 3),), prefix=1)
    sample = TokenSample(tokens=5, seed=2)
    for start in range(0, 24, 7):
        which = slice(start, start + 7)
        sample.add({"a": one.index(which), "b": one.replace(10 * values).index(which)})
    rows = sample.minibatches()
    assert sample.images_in_minibatch() == 6
    assert rows["a"].shape == (4, 30, 1)
    assert torch.equal(rows["b"], 10 * rows["a"])
    assert not set((rows["a"] % 10).flatten().tolist()) & {0.0}, "the first of ten tokens is the prefix"
    places = (rows["a"] % 10).unflatten(1, (6, 5))
    assert (places == places[:1, :1]).all(), "places differ between images"


def test_shuffled_rows_keep_places_and_change_images():
    rows = torch.arange(24).reshape(2, 12, 1)
    moved = shuffled_rows(rows, 3)
    assert torch.equal(moved % 4, rows % 4)
    assert (moved != rows).all()
    assert torch.equal(moved.sort(1).values, rows)
    assert (shuffled_rows(rows, 1) != rows).all()


def test_the_frechet_distance_of_known_sets():
    """Of axis-aligned Gaussians it is the squared distance of the means and of the deviations."""
    ortho = torch.linalg.qr(torch.cat([torch.ones(40, 1, dtype=torch.float64), normal(40, 3)], 1)).Q[:, 1:]
    unit = ortho * 39**0.5  # mean 0 and covariance 1, exactly
    deviation, moved = torch.tensor([2.0, 3.0, 0.5]).double(), torch.tensor([1.0, -2.0, 0.0]).double()
    assert frechet_distance(unit, unit @ torch.linalg.qr(normal(3, 3, seed=1)).Q) == pytest.approx(0, abs=1e-9)
    expected = float((deviation - 1).square().sum() + moved.square().sum())
    assert frechet_distance(unit, unit * deviation + moved) == pytest.approx(expected)
    assert frechet_distance(unit * deviation + moved, unit) == pytest.approx(expected)


def test_the_frechet_distance_is_that_of_the_covariances_also_of_fewer_images_than_channels():
    for count in (50, 8):
        first, second = normal(count, 12), normal(count + 5, 12, seed=1) * torch.linspace(0.5, 2, 12) + 0.3
        covariances = [np.cov(rows.numpy().T) for rows in (first, second)]
        product = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)
        spread = sum(np.trace(matrix) for matrix in covariances) - 2 * np.sqrt(product).sum()
        expected = float((first.mean(0) - second.mean(0)).square().sum()) + spread
        assert frechet_distance(first.float(), second.float()) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(BacksightError, match="one width"):
        frechet_distance(normal(1, 12), normal(9, 12))
