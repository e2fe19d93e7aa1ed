"""Cross-application: the diagonal is the plain reconstruction, slopes are exact, verdicts go either way."""

import numpy as np
import pytest
import torch

from backsight.errors import BacksightError
from backsight.inverses.linear import fit_linear
from backsight.measures.pixels import psnr
from backsight.representation import Queries, Tokens
from backsight.studies import cross_layer, layers
from backsight.studies.layers import cross_application, translated
from backsight.studies.nulls import null_mean
from backsight.tables.names import SLOPES
from backsight.tables.pooling import metrics
from backsight.tables.values import METRIC_COLUMNS, Values
from backsight.targets import load_target


@pytest.fixture(scope="module")
def images():
    """Smooth random pictures of 64 x 64 pixels: (60, 3, 64, 64)."""
    coarse = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=64, mode="bilinear")


@pytest.fixture(scope="module")
def vit():
    return load_target("scenes-vit", taps=["patch_embed", "blocks.0", "blocks.1", "norm"])


@pytest.fixture(scope="module")
def study(vit, images):
    """(linear inverses of two seeds, all rows of a small study)."""
    train, test = images[:40], images[40:]
    steps = layers.half_steps(vit)[:4]
    ends = [*vit.taps, *(tap for step in steps for tap in (step.before, step.after))]
    fitted = {s: fit_linear(vit, train[20 * s :][:20], taps=ends, seed=s, progress=False) for s in (0, 1)}
    linear = {s: {"linear": {tap: each[tap] for tap in vit.taps}} for s, each in fitted.items()}
    null = vit.untrained(0)
    untrained = {0: (null, {"linear": fit_linear(null, train, taps=null.taps, progress=False)})}
    moments = layers.tap_moments(vit, train, vit.taps)
    values = Values(vit, "smooth", "test", range(len(test)))
    cross_layer.add_cross(values, vit, test, linear, untrained, null_mean(train), moments)
    blocks = layers.block_steps(vit, vit.taps)
    cross_layer.add_similarity(values, vit, test, vit.taps, [*blocks, *steps])
    cross_layer.add_similarity(values, null, test, vit.taps, [*blocks, *steps], null=True)
    maps = cross_layer.fit_predictors(vit, {0: train[:20], 1: train[20:]}, vit.taps, steps)
    for inverse, shuffle in (("linear", False), ("null_shuffled", True)):
        errors = cross_layer.prediction_errors(vit, test, maps, shuffle=shuffle)
        cross_layer.add_predictability(values, vit, errors, inverse, vit.taps, steps, seeds=(0, 1))
    cross_layer.add_half_steps(values, vit, test, fitted, steps)
    return fitted, metrics(values.table())


def test_the_diagonal_is_the_plain_reconstruction_exactly(vit, images, study):
    fitted, _ = study
    test = images[40:]
    scores = cross_application(vit, test, fitted, batch_size=7)
    recorded = vit.record(test, vit.taps)
    for tap in vit.taps:
        for number, inverse in enumerate(fitted.values()):
            plain = psnr(test, inverse[tap](recorded[tap]))
            assert scores[tap, tap][number] == pytest.approx(plain.numpy(), abs=1e-3)
    whole = cross_application(vit, test, fitted, pairs=[("norm", "norm")], batch_size=20)
    exact = psnr(test, fitted[0]["norm"](recorded["norm"])).double().numpy()
    assert np.array_equal(whole["norm", "norm"][0], exact)
    standardised = cross_application(
        vit,
        test,
        fitted,
        [("norm", "norm")],
        "standardised",
        layers.tap_moments(vit, test, vit.taps),
        batch_size=20,
    )
    assert np.array_equal(standardised["norm", "norm"], whole["norm", "norm"])


def test_off_the_diagonal_it_is_the_other_inverse_on_this_representation(vit, images, study):
    fitted, _ = study
    test = images[40:]
    scores = cross_application(vit, test, fitted, [("blocks.0", "blocks.1")], batch_size=20)
    expected = psnr(test, fitted[1]["blocks.1"](vit.record(test, "blocks.0")["blocks.0"]))
    assert np.array_equal(scores["blocks.0", "blocks.1"][1], expected.double().numpy())


def test_other_images_are_fed_to_the_null_and_the_caller_keeps_the_random_state(vit, images, study):
    fitted, _ = study
    state = torch.get_rng_state()
    own = cross_application(vit, images[40:], fitted)
    other = cross_application(vit, images[40:], fitted, feed="shuffled", batch_size=19)
    assert torch.equal(state, torch.get_rng_state())
    assert all((own[tap, tap].mean() > other[tap, tap].mean()) for tap in vit.taps)
    again = cross_application(vit, images[40:], fitted, feed="shuffled", batch_size=19)
    assert all(np.array_equal(other[pair], again[pair]) for pair in other)


def test_only_taps_of_one_form_are_crossed():
    detector = load_target("scenes-detr")
    recorded = detector.record(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    pairs = layers.pairs_of_one_form(recorded)
    assert ("encoder.layers.0", "encoder.layers.2") in pairs
    assert ("decoder.layers.2", "decoder.layers.0") in pairs
    assert ("predictions", "predictions") in pairs
    assert not [pair for pair in pairs if len({tap.split(".")[0] for tap in pair} & {"encoder", "decoder"}) > 1]
    with pytest.raises(BacksightError, match="taps of one form"):
        translated(recorded, ("encoder.layers.0", "decoder.layers.0"))
    groups = [layers.layer_group(detector, tap) for tap in ("backbone", "projection", "decoder.layers.1")]
    assert groups == ["", "encoder", "decoder"]
    aligned = layers.aligned_pairs(recorded)
    assert ("decoder.layers.2", "predictions") in aligned
    assert ("encoder.layers.2", "decoder.layers.0") not in aligned
    assert layers.forms(pairs) == [
        ["backbone", "projection", "encoder.layers.0", "encoder.layers.1", "encoder.layers.2"],
        ["decoder.layers.0", "decoder.layers.1", "decoder.layers.2", "decoder.layernorm"],
    ]


def test_half_steps_have_their_component():
    detector = load_target("scenes-detr")
    found = {step.after: step.component for step in layers.half_steps(detector)}
    assert found["encoder.layers.0.attn"] == "attention"
    assert found["encoder.layers.0"] == "mlp"
    assert found["decoder.layers.1.cross_attn"] == "cross_attention"
    assert found["decoder.layers.1"] == "mlp"
    assert "decoder.layers.0.attn" not in found, "what is before the decoder is the encoder's output, of another form"
    assert layers.half_steps(load_target("scenes-swin")) == []


def test_stages_on_several_grids_share_one_decay(images):
    swin = load_target(
        "scenes-swin", taps=["patch_embed", "layers.0.blocks.0", "layers.0", "layers.1.blocks.0", "layers.1"]
    )
    values = Values(swin, "smooth", "test", range(16))
    cross_layer.add_similarity(values, swin, images[:16], swin.taps)
    rows = metrics(values.table())
    slope = rows[rows["measure"] == "cka_slope"].iloc[0]
    alike = rows[(rows["measure"] == "cka") & (rows["inverse"] == "features")]
    expected = (alike["distance"] * (1 - alike["value"])).sum() / (alike["distance"] ** 2).sum()
    assert slope["value"] == pytest.approx(expected)
    assert slope["pairs"] == len(alike) / 2 == 4


def test_standardising_undoes_a_change_of_scale_and_offset():
    values = torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(0))
    scaled = values * torch.tensor([1.0, 4.0, 0.5]) + torch.tensor([2.0, 0.0, -1.0])
    for prefix, grids in ((0, ((1, 5),)), (1, ((2, 2),))):
        recorded = {"a": Tokens(values, grids, prefix), "b": Tokens(scaled, grids, prefix)}

        class Model:
            device = torch.device("cpu")

            def record(self, images, taps, recorded=recorded):
                return recorded

        moments = layers.tap_moments(Model(), torch.zeros(8, 3, 2, 2), ["a", "b"])  # type: ignore[arg-type]
        assert translated(recorded, ("a", "b"), moments).values == pytest.approx(scaled.numpy(), abs=1e-4)
        assert torch.equal(translated(recorded, ("a", "b")).values, values)
    constant = {"a": Queries(torch.ones(2, 3, 4)), "b": Queries(torch.rand(2, 3, 4))}
    zero = torch.zeros(1, 4)
    moved = translated(constant, ("a", "b"), {"a": (zero + 1, zero), "b": (zero + 2, zero + 1)})
    assert torch.equal(moved.values, torch.full((2, 3, 4), 2.0))


def test_the_slope_of_a_synthetic_matrix_is_exact(vit):
    taps = ["patch_embed", "blocks.0", "blocks.1"]
    scores = {
        (i, j): np.full((2, 5), 30.0 - a - 2.5 * abs(a - b)) for a, i in enumerate(taps) for b, j in enumerate(taps)
    }
    distances = cross_layer.decay_pairs(vit, scores)["blocks"]
    assert sorted(distances.values()) == [1, 1, 1, 1, 2, 2]
    losses = [layers.loss(scores, pair) for pair in distances]
    slope = cross_layer.slope_through_origin(losses, list(distances.values()))
    assert slope.shape == (2, 5)
    assert slope == pytest.approx(2.5)


def test_every_row_has_its_interval_and_every_measure_its_nulls(study):
    _, table = study
    assert set(METRIC_COLUMNS) <= set(table.columns)
    assert table[["value", "low", "high", "n", "seeds", "group", "component"]].notna().all().all()
    assert (table["low"] <= table["value"] + 1e-9).all()
    assert (table["value"] <= table["high"] + 1e-9).all()
    found = table.groupby("measure")["inverse"].agg(set)
    assert found["cross_psnr"] == {"linear", "null_mean", "null_shuffled", "null_untrained"}
    assert found["cka"] == found["procrustes"] == {"features", "null_shuffled", "null_untrained"}
    assert found["predictability_r2"] == {"linear", "null_shuffled"}
    for name in SLOPES:
        rows = table[(table["measure"] == name) & ~table["inverse"].str.startswith("null_")]
        assert len(rows) == 1, "one number for each target and group"
        assert rows.iloc[0][["group", "distance"]].tolist() == ["blocks", 2]
    assert set(table.loc[table["measure"] == "step_loss", "component"]) == {"attention", "mlp"}
    assert set(table.loc[table["measure"] == "residual_update", "component"]) == {"block", "attention", "mlp"}


def test_a_tap_predicts_itself_moved_and_not_another_image(study):
    _, table = study
    rows = table[table["measure"] == "predictability_r2"]
    linear = rows[rows["inverse"] == "linear"]["value"].mean()
    assert linear > rows[rows["inverse"] == "null_shuffled"]["value"].mean() + 0.3
    slope = table[table["measure"] == "r2_slope"].iloc[0]
    near = rows[(rows["inverse"] == "linear") & (rows["component"] == "block") & (rows["group"] == "blocks")]
    expected = (near["distance"] * (1 - near["value"])).sum() / (near["distance"] ** 2).sum()
    assert slope["value"] == pytest.approx(expected)


def test_the_families_asked_for_are_taken_and_others_are_named():
    found = {0: {"linear": {"a": len, "b": len}, "direct": {"a": len}}}
    assert layers.chosen_families(found, ["linear", "modular"], ["a"]) == {0: {"linear": {"a": len}}}
    with pytest.raises(BacksightError, match="linear, direct"):
        layers.chosen_families(found, ["modular"], ["a"])
