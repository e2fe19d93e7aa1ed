"""Whole chains: many half-steps solved at once come back to round-off, and what has not come back is told."""

from __future__ import annotations

import pytest
import torch
from targets.examples import small_timm
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.map import MapSettings
from backsight.inverses.linear import fit_linear
from backsight.studies.whole_chain import whole_chains
from backsight.tables.names import BACK
from backsight.tables.names import CHAIN_FATES as FATES
from backsight.tables.values import Values
from backsight.targets import Target


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


def test_what_no_chain_of_residual_steps_leads_back_from_is_refused(vit: Target) -> None:
    with pytest.raises(BacksightError, match="leave norm out"):
        whole_chains(Values(vit, "noise", "test", range(2)), vit, {}, ["norm"], pictures(vit, 2), pictures(vit, 8))


def test_the_fates_of_all_images_sum_to_one_and_the_null_is_judged_alike(vit: Target) -> None:
    linear = fit_linear(vit, pictures(vit, 60), taps=["patch_embed", "blocks.0"], progress=False)
    values = Values(vit, "noise", "test", range(5))
    shown = whole_chains(
        values, vit, {"linear": linear}, ["blocks.0"], pictures(vit, 5, seed=3), pictures(vit, 16, seed=4),
        MapSettings(stages=(1.0, 1e-3, 1e-5), steps=2, products=15), iterations=8,
    )  # fmt: skip
    table = values.table().pivot_table(index=["inverse", "image"], columns="measure", values="value")
    for inverse, count in (("exact", 5), ("null_shuffled", 2)):
        assert table.loc[inverse, list(FATES)].sum(1).tolist() == [1.0] * count
    exact = table.loc["exact"]
    assert (exact[BACK] == (exact["log10_error"] <= -5)).all()
    assert exact[BACK].mean() >= 0.8  # a random ViT of two blocks is easily undone
    assert exact["psnr"].mean() >= table.loc["linear", "psnr"].mean()
    assert set(shown["blocks.0"]) == {"linear", "map", "exact", "embedding"}
