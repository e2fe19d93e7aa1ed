"""Measures: known values, any size, intervals that cover, and one-sentence errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from backsight.errors import BacksightError
from backsight.measures.pixels import psnr, ssim
from backsight.representation import Tokens
from backsight.studies.nulls import null_mean, shuffled
from backsight.tables.pool import bootstrap_interval, metrics_row, metrics_rows
from backsight.tables.values import METRIC_COLUMNS


def pair(batch: int = 3, height: int = 17, width: int = 23, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, height, width, generator=generator)
    disturbed = images + noise * torch.randn(images.shape, generator=generator)
    return images, disturbed.clamp(0, 1)


def test_psnr_and_mse_are_scikit_images() -> None:
    images, disturbed = pair()
    for index in range(3):
        expected = peak_signal_noise_ratio(images[index].numpy(), disturbed[index].numpy(), data_range=1)
        assert float(psnr(images, disturbed)[index]) == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(psnr(images, images), torch.full((3,), 100.0))


def test_psnr_inside_a_mask_sees_only_the_mask() -> None:
    images, disturbed = pair()
    masks = torch.zeros(3, 17, 23, dtype=torch.bool)
    masks[:, 4:9, 5:20] = True
    inside = psnr(images, disturbed, masks)
    torch.testing.assert_close(inside, psnr(images[:, :, 4:9, 5:20], disturbed[:, :, 4:9, 5:20]))
    outside = torch.where(masks[:, None], disturbed, 1 - disturbed)
    torch.testing.assert_close(psnr(images, outside, masks), inside)
    torch.testing.assert_close(psnr(images, disturbed, torch.ones_like(masks)), psnr(images, disturbed))


def test_ssim_is_scikit_images() -> None:
    images, disturbed = pair(2, 40, 37)
    for index in range(2):
        expected = structural_similarity(
            images[index].double().numpy(),
            disturbed[index].double().numpy(),
            data_range=1,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )[1].mean()
        assert float(ssim(images, disturbed)[index]) == pytest.approx(expected, abs=0.02)
    torch.testing.assert_close(ssim(images, images), torch.ones(2))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(3, 25), st.integers(3, 25))
def test_every_size_has_finite_values_that_do_not_depend_on_the_batch(batch: int, height: int, width: int) -> None:
    images, disturbed = pair(batch, height, width)
    for measure in (psnr, ssim):
        values = measure(images, disturbed)
        assert values.shape == (batch,)
        assert values.isfinite().all()
        assert float(values[0]) == pytest.approx(float(measure(images[:1], disturbed[:1])[0]), abs=1e-4)
    assert (values <= 1 + 1e-6).all()


def test_an_image_without_objects_has_no_value_inside_objects() -> None:
    images, disturbed = pair(2)
    masks = torch.zeros(2, 17, 23, dtype=torch.bool)
    masks[1, :5] = True
    values = psnr(images, disturbed, masks)
    assert values[0].isnan()
    row = metrics_rows(values, "psnr_objects")[0]
    assert row["n"] == 1
    assert row["value"] == pytest.approx(float(values[1]))
    assert math.isnan(metrics_rows(values[:1], "psnr_objects")[0]["value"])


def test_what_a_target_takes_can_be_measured() -> None:
    """Images that overshoot a little, as interpolation makes them; their targets record them."""
    images, disturbed = pair(3)
    images[0, 0, 0, 0], disturbed[0, 0, 0, 0] = 1.009, -0.009
    assert psnr(images, disturbed).isfinite().all()


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(generator.normal(size=60), seed=trial, resamples=200)
        covered += low <= 0 <= high
    assert 180 <= covered <= 199


def test_intervals_are_seeded_and_respect_clusters() -> None:
    generator = np.random.default_rng(0)
    seeds = np.repeat(np.arange(6), 50)
    values = generator.normal(size=6)[seeds] + 0.1 * generator.normal(size=300)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(torch.from_numpy(values), seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    plain, clustered = bootstrap_interval(values), bootstrap_interval(values, clusters=seeds)
    assert clustered[1] - clustered[0] > 3 * (plain[1] - plain[0])
    assert bootstrap_interval([2.5]) == (2.5, 2.5)
    low, high = bootstrap_interval([1.0, math.nan, 3.0])
    assert 1 <= low <= high <= 3
    narrow = bootstrap_interval(values, level=0.5)
    assert plain[0] < narrow[0] < narrow[1] < plain[1]


def test_rows_are_tidy() -> None:
    (row,) = metrics_rows(torch.tensor([1.0, 2.0, 3.0]), "psnr", seed=5, target="scenes-vit", tap="norm", hue=1)
    assert tuple(row)[: len(METRIC_COLUMNS)] == METRIC_COLUMNS
    assert (row["value"], row["n"], row["seed"], row["target"], row["hue"]) == (2.0, 3, 5, "scenes-vit", 1)
    assert row["low"] < 2 < row["high"]
    assert row["dataset"] is None
    assert metrics_row("r2", *(0.5, 0.4, 0.6), 7, tap="norm")["high"] == 0.6


def test_null_models() -> None:
    images, _ = pair(7)
    torch.testing.assert_close(null_mean(images, batch_size=3), images.mean(0))
    torch.testing.assert_close(null_mean((255 * images).byte(), batch_size=3), images.mean(0), atol=0.01, rtol=0)
    tokens = Tokens(torch.arange(7.0).reshape(7, 1, 1), ((1, 1),))
    for seed in range(20):
        for batch in (2, 3, 7):
            order = shuffled(tokens.index(range(batch)), torch.Generator().manual_seed(seed)).values.flatten()
            assert sorted(order.tolist()) == list(range(batch))
            assert (order != torch.arange(batch)).all()
    with pytest.raises(BacksightError, match="at least 2 images"):
        shuffled(tokens.index(0), torch.Generator())


def test_bad_input_is_refused_in_one_sentence() -> None:
    images, disturbed = pair()
    cases = [
        (lambda: psnr(images, disturbed[:2]), "one shape"),
        (lambda: psnr(images[0], disturbed[0]), "one shape"),
        (lambda: ssim(images * 255, disturbed), r"images need values in \[0, 1\], but lie in \[0"),
        (lambda: psnr(images, disturbed - 0.5), "reconstructions need values"),
        (lambda: psnr(images, torch.full_like(images, torch.nan)), "reconstructions need values"),
        (lambda: psnr(images.byte(), images.byte()), "divide by 255"),
        (lambda: ssim(images[..., :2], disturbed[..., :2]), "at least 3 x 3"),
        (lambda: bootstrap_interval([]), "at least one image"),
        (lambda: bootstrap_interval([1.0, 2.0], level=95), "level is 95"),
        (lambda: bootstrap_interval([1.0, 2.0], clusters=[1]), "one cluster for each value"),
    ]
    for call, words in cases:
        with pytest.raises(BacksightError, match=words):
            call()
