"""The matched comparison: counted costs, one score a tap and image, equal costs interpolated, known answers."""

import weakref

import numpy as np
import pandas as pd
import pytest
import torch

import backsight
from backsight.data.images import open_images
from backsight.errors import BacksightError
from backsight.inverses.files import shipped_inverses
from backsight.studies.efficiency import Taps, Training, add_scores, at_equal_cost, over_taps, taps_for, train_all
from backsight.tables.pooling import metrics, pool
from backsight.tables.values import Values
from backsight.targets import load_target


@pytest.fixture(scope="module")
def target():
    return load_target("scenes-vit")


def test_components_get_the_tap_in_the_middle_and_the_chain_every_block(target):
    taps = taps_for(target, "components")
    assert len(taps.judged) == 3
    assert set(taps.judged) < set(taps.chain)
    with pytest.raises(BacksightError, match=r"blocks\.99"):
        taps_for(target, ["blocks.99"])


def test_every_training_is_scored_and_costs_what_its_steps_cost(target):
    taps = taps_for(target, ["patch_embed", "blocks.1"])
    validation, test = (open_images("scenes", split, target, 6, 0) for split in ("validation", "test"))
    trained = train_all(
        target,
        taps,
        lambda seed: open_images("scenes", "train", target, 32, seed),
        validation,
        [0, 3],
        starts=["paper"],
        batch_size=4,
    )
    made: list[Training] = []
    values = Values(target, "scenes", "test", range(6))
    add_scores(values, target, (made.append(one) or one for one in trained), taps, test, torch.full((3, 64, 64), 0.5))
    assert len(made) == 3 * 2
    costs = {(one.method, one.steps): one.flops for one in made}
    for method in ("direct", "modular", "modular_components"):
        assert costs[method, 3] > costs[method, 0] > 0
    table = metrics(values.table())
    assert len(table) == 3 * 2 * 2 + 2
    assert (table.n == 6).all()
    assert set(table.steps.dropna()) == {0, 3}
    assert table.value.between(5, 40).all()


def test_trainings_are_judged_one_by_one_and_not_kept(target):
    kept: list[weakref.ref] = []

    def trainings():
        for seed in range(3):
            inverses = backsight.load(shipped_inverses(target), target)["linear"]
            assert sum(reference() is not None for reference in kept) <= 1  # the one before, until this one is there
            kept.append(weakref.ref(inverses))
            yield Training("direct", "ours", 1, seed, inverses, 1.0, 1.0)

    taps = Taps(("blocks.0",), ("blocks.0",))
    test = open_images("scenes", "test", target, 3, 0)
    values = Values(target, "scenes", "test", range(3))
    add_scores(values, target, trainings(), taps, test, torch.full((3, 64, 64), 0.5))
    assert len(kept) == 3


def test_a_chain_without_further_taps_is_trained_once(target):
    taps = taps_for(target, ["patch_embed", "blocks.0"])
    assert taps.judged == taps.chain
    images = open_images("scenes", "train", target, 32, 0)
    trained = train_all(target, taps, lambda seed: images, images, [0], starts=["paper"], batch_size=4)
    assert [one.method for one in trained] == ["direct", "modular"]


def made_up(levels: dict[str, dict[int, tuple[float, float]]]) -> pd.DataFrame:
    """Values of {method: {steps: (cost, PSNR)}} at one tap, 8 images that differ alike."""

    class Target:
        name, weights = "toy", "none"

        def depth(self, tap):
            return 0.0

    values = Values(Target(), "scenes", "test", range(8))
    for method, curve in levels.items():
        for steps, (cost, level) in curve.items():
            about = {"start": "ours", "steps": steps, "parameters": 1, "flops": cost, "seconds": cost / 2}
            for tap in ("a", "b"):
                values.add("psnr", {0: level + np.arange(8.0)}, tap, method, **about)
    return values.table()


def test_equal_cost_lies_on_both_curves():
    curves = {
        "direct": {10: (100.0, 20.0), 40: (400.0, 24.0)},
        "modular": {10: (50.0, 21.0), 40: (200.0, 23.0), 80: (800.0, 27.0)},
    }
    equal = at_equal_cost(made_up(curves), "flops")
    assert set(equal.budget) == {400.0}
    level = pool(equal, ["inverse"]).set_index("inverse").value - 3.5
    assert level["direct"] == pytest.approx(24.0)
    assert level["modular"] == pytest.approx(25.0)  # half-way from 200 to 800 on a logarithmic axis
    difference = pool(equal, ["inverse"], {"inverse": "direct"})
    assert difference[["value", "low", "high"]].to_numpy()[0] == pytest.approx(1.0)
    seconds = at_equal_cost(made_up(curves), "seconds")
    assert set(seconds.measure) == {"psnr_at_equal_seconds"}


def test_methods_of_other_cost_are_pairs_at_equal_steps():
    values = made_up({"direct": {10: (100.0, 20.0)}, "modular": {10: (50.0, 21.0)}})
    change = pool(values, ["steps", "inverse"], {"inverse": "direct"})
    assert change[["steps", "inverse", "value", "n"]].to_numpy().tolist() == [[10, "modular", 1.0, 8]]


def test_a_side_that_was_not_trained_so_far_is_no_comparison():
    curves = {"direct": {10: (100.0, 20.0)}, "modular": {10: (10.0, 21.0)}}
    with pytest.raises(BacksightError, match="more lengths"):
        at_equal_cost(made_up(curves))
    curves["direct"][0] = (5.0, 16.0)  # no step at all is no training
    with pytest.raises(BacksightError, match="more lengths"):
        at_equal_cost(made_up(curves))


def test_the_mean_over_taps_is_taken_image_by_image():
    values = made_up({"direct": {10: (100.0, 20.0)}})
    mean = over_taps(values)
    assert mean.tap.unique().tolist() == ["all"]
    assert sorted(mean.value) == pytest.approx(list(20 + np.arange(8.0)))
