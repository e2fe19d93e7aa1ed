"""Whole chains: many half-steps solved at once come back to round-off, and what has not come back is told."""

from __future__ import annotations

import pytest
import torch
from targets.examples import small_timm
from torch import Tensor

from backsight.errors import BacksightError
from backsight.exact.map import MapSettings
from backsight.inverses.linear import fit_linear
from backsight.studies.joint import JointSettings
from backsight.studies.whole_chain import measure_whole_chains
from backsight.tables.names import ANOTHER_ROOT, BACK, LOST
from backsight.tables.names import CHAIN_FATES as FATES
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
        measure_whole_chains(vit, {}, ["norm"], pictures(vit, 2), pictures(vit, 8))


def test_the_fates_of_all_images_sum_to_one_and_the_null_is_judged_alike(vit: Target) -> None:
    linear = fit_linear(vit, pictures(vit, 60), taps=["patch_embed", "blocks.0"], progress=False)
    study = measure_whole_chains(
        vit, {"linear": linear}, ["blocks.0"], pictures(vit, 5, seed=3), pictures(vit, 16, seed=4),
        map_settings=MapSettings(stages=(1.0, 1e-3, 1e-5), steps=2, products=15),
        settings=JointSettings(iterations=8), fitted=16, batch_size=2, null_images=2, progress=False,
    )  # fmt: skip
    rows = study.metrics
    for inverse, count in (("exact", 5), ("null_shuffled", 2)):
        own = rows[rows["inverse"] == inverse].set_index("measure")
        assert own.loc[list(FATES), "value"].sum() == pytest.approx(1)
        assert set(own["n"]) == {count}
    exact = rows[rows["inverse"] == "exact"].set_index("measure")["value"]
    told = study.outcomes[study.outcomes["start"] == "map"]
    assert exact[BACK] == (told["error"] <= 1e-5).mean()
    assert exact[BACK] >= 0.8  # a random ViT of two blocks is easily undone
    assert (told["error"] < told["error_start"]).all()
    assert set(told["fate"]) <= {BACK, ANOTHER_ROOT, LOST, "near"}
    psnr = rows[rows["measure"] == "psnr"].set_index("inverse")["value"]
    assert psnr["exact"] >= psnr["linear"]
    assert set(study.pictures["blocks.0"]) == {"linear", "map", "exact", "embedding"}
