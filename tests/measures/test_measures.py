"""Measures: known values, any size, intervals that cover, and one-sentence errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from backsight.errors import BacksightError
from backsight.measures.pixels import psnr, ssim
from backsight.studies.nulls import another, null_mean


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
    assert values[1].isfinite()


def test_what_a_target_takes_can_be_measured() -> None:
    """Images that overshoot a little, as interpolation makes them; their targets record them."""
    images, disturbed = pair(3)
    images[0, 0, 0, 0], disturbed[0, 0, 0, 0] = 1.009, -0.009
    assert psnr(images, disturbed).isfinite().all()


def test_null_models() -> None:
    images, _ = pair(7)
    torch.testing.assert_close(null_mean(images.repeat(40, 1, 1, 1)), images.mean(0))
    torch.testing.assert_close(null_mean((255 * images).byte()), images.mean(0), atol=0.01, rtol=0)
    for seed in range(20):
        for batch in (2, 3, 7):
            order = another(batch, torch.Generator().manual_seed(seed))
            assert sorted(order.tolist()) == list(range(batch))
            assert (order != torch.arange(batch)).all()


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
    ]
    for call, words in cases:
        with pytest.raises(BacksightError, match=words):
            call()
