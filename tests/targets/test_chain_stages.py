"""Which stages a chain has, and that their closed-form starts do not blow up the errors of the stages above."""

import pytest
import torch

from backsight.errors import BacksightError
from backsight.inverses.linear import Request, fit_linear_pairs
from backsight.inverses.module import Chain
from backsight.targets import load_target
from backsight.training.fit import fit_modular
from backsight.training.starts import STAGE_FLOOR, stage_pairs

IMAGES = torch.rand(60, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def detr():
    return load_target("scenes-detr", ["backbone", "projection", "encoder.layers.0", "decoder.layers.0"])


def test_the_projection_belongs_to_the_backbone(detr):
    assert dict(stage_pairs(detr, detr.taps)) == {
        "backbone": "pixels",
        "projection": "pixels",
        "encoder.layers.0": "projection",
        "decoder.layers.0": "encoder.layers.0",
    }
    vit = load_target("scenes-vit")
    assert [end for _, end in stage_pairs(vit, vit.taps)] == ["pixels", *vit.taps[:-1]]


def test_a_floor_keeps_a_map_from_amplifying(detr):
    pair = ("encoder.layers.0", "projection")
    loose, request = Request(*pair, context=3), Request(*pair, context=3, floor=1e-1)
    free = fit_linear_pairs(detr, IMAGES, [loose], progress=False)[loose]
    held = fit_linear_pairs(detr, IMAGES, [request], progress=False)[request]
    assert held.maps["cells"].alpha >= 1e-1 >= STAGE_FLOOR
    assert held.maps["cells"].matrix.norm() <= free.maps["cells"].matrix.norm()


def test_every_tap_of_the_detr_has_a_chain_to_pixels(detr):
    modules = fit_modular(detr, IMAGES, steps=1, batch_size=4, ridge_images=60, progress=False).modules
    recorded = detr.record(IMAGES[:2])
    for tap in detr.taps:
        assert Chain(modules, tap)(recorded[tap]).shape == (2, 3, 64, 64)
    assert [m.source for m in Chain(modules, "encoder.layers.0")] == ["encoder.layers.0", "projection"]


@pytest.mark.parametrize("setting", [{"chain_fraction": 1.5}, {"image_share": -0.1}])
def test_shares_outside_zero_to_one_are_refused(detr, setting):
    with pytest.raises(BacksightError, match="from 0 to 1"):
        fit_modular(detr, IMAGES, steps=1, **setting)
