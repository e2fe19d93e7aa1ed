"""Stitching: known answers for codes that are affine images of each other, for other images, and of a known loss."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from backsight.errors import BacksightError
from backsight.inverses.linear import fit_linear
from backsight.representation import Tokens
from backsight.studies import cross_layer, layers
from backsight.studies.nulls import null_mean
from backsight.tables.pooling import metrics, pool
from backsight.tables.values import METRIC_COLUMNS, Values
from backsight.targets import load_target

TAPS = ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]


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
    """All rows of a small study with linear inverses of two seeds."""
    train, test, mean = images[:40], images[40:], null_mean(images[:40])
    samples = {0: train[:20], 1: train[20:]}
    values = Values(vit, "smooth", "test", range(len(test)))
    null = vit.untrained(0)
    for target, named in ((vit, ("linear", "null_shuffled")), (null, ("null_untrained",))):
        inverses = {s: fit_linear(target, each, taps=vit.taps, seed=s, progress=False) for s, each in samples.items()}
        maps = cross_layer.fit_maps(target, samples)
        for inverse in named:
            cross_layer.add_stitching(values, target, test, inverses, maps, mean, inverse, "linear")
            cross_layer.add_predictability(values, target, test, maps, inverse)
    layers.add_similarity(values, vit, test)
    layers.add_similarity(values, null, test, null=True)
    return metrics(values.table())


class Model:
    """A stack of four taps; `codes` makes of images (B, 3, H, W) the tokens of each, one a picture."""

    name, weights, weights_hash, device = "model", "none", "0", torch.device("cpu")
    taps, available_taps, reduction = TAPS, TAPS, None

    def __init__(self, codes):
        self.codes = codes

    def tap_set(self, name):
        return TAPS

    def stage(self, tap, before):
        return SimpleNamespace(kind="blocks")

    def depth(self, tap):
        return TAPS.index(tap)

    def record(self, images, taps):
        return {tap: self.codes[tap](Tokens(images.flatten(1)[:, None], ((1, 1),))) for tap in taps}


def picture(representation):
    return representation.values.unflatten(2, (3, 4, 4))[:, 0]


def pictures(seed=0):
    """(30, 3, 4, 4) pictures, far from 0 and 1, and their mean."""
    drawn = 0.3 + 0.4 * torch.rand(30, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return drawn, drawn.mean(0)


def affine(matrix, offset):
    return lambda representation: representation.replace(representation.values @ matrix + offset)


def stitched(model, images, inverses, maps, mean, inverse="linear"):
    values = Values(model, "drawn", "test", range(len(images)))
    cross_layer.add_stitching(values, model, images, {0: inverses}, {0: maps}, mean, inverse, "linear")
    return values.table()


def test_an_affine_image_of_a_code_reads_as_well_as_the_code_itself_and_another_image_not_at_all():
    shown, mean = pictures()
    draw = torch.Generator().manual_seed(1)
    matrices = {tap: torch.linalg.qr(torch.randn(48, 48, generator=draw)).Q * 3 for tap in TAPS}
    model = Model({tap: affine(matrices[tap], 2.0) for tap in TAPS})
    keeps = {tap: (torch.arange(48) >= 6 * place).float() for place, tap in enumerate(TAPS)}
    lossy = {tap: affine(torch.diag(kept), (1 - kept) * mean.flatten()) for tap, kept in keeps.items()}
    undo = {tap: (lambda x, m=m: x.replace((x.values - 2) @ torch.linalg.inv(m))) for tap, m in matrices.items()}
    inverses = {tap: lambda x, tap=tap: picture(lossy[tap](undo[tap](x))) for tap in TAPS}  # each loses other pixels
    maps = {(i, j): lambda x, i=i, j=j: affine(matrices[j], 2.0)(undo[i](x)) for i in TAPS for j in TAPS if i != j}
    table = pool(stitched(model, shown, inverses, maps, mean))
    rows = table[table["measure"] == "stitch_r2"].set_index(["source_tap", "target_tap"])["value"]
    own = {tap: rows[tap, tap] for tap in TAPS}
    assert len(rows) == 16
    assert len({round(value, 3) for value in own.values()}) == 4
    for i, j in maps:
        assert rows[i, j] == pytest.approx(own[j], abs=1e-5)
    other = pool(stitched(model, shown, inverses, maps, mean, "null_shuffled"))
    assert set(other["measure"]) == {"stitch_r2"}
    assert (other["value"] == 0).all(), "worse than the mean image counts as the mean image"


def test_the_slope_of_a_known_loss_is_that_loss_a_whole_stack():
    shown, mean = pictures()
    model = Model({tap: lambda x: x for tap in TAPS})
    inverses = dict.fromkeys(TAPS, picture)

    def loses(share):
        kept, centre = 1 - share**0.5, mean.flatten()
        return lambda x: x.replace(centre + kept * (x.values - centre))

    maps = {(i, j): loses(0.6 * abs(model.depth(i) - model.depth(j)) / 3) for i in TAPS for j in TAPS if i != j}
    table = pool(stitched(model, shown, inverses, maps, mean)).set_index(["measure", "endpoints"])
    for measure in ("stitch_slope", "stitch_slope_r2"):  # all that is there is shown: R² of 1
        assert table.loc[(measure, "with"), ["value", "pairs"]].tolist() == [pytest.approx(0.6, abs=1e-5), 12]
        assert table.loc[(measure, "without"), ["value", "pairs"]].tolist() == [pytest.approx(0.6, abs=1e-5), 2]
    dim = dict.fromkeys(TAPS, lambda x: mean + 0.5 * (picture(x) - mean))  # own R² 0.75, and (1 - share) of less
    blind = dim | {"blocks.2": lambda x: picture(x) * 0}
    values = stitched(model, shown, blind, maps, mean)
    slopes = pool(values[values["measure"] == "stitch_slope"])
    assert slopes["endpoints"].tolist() == ["with"], "a tap that shows nothing is in no pair, and one is left between"
    assert slopes["pairs"].tolist() == [6]
    assert 0 < slopes["value"].iloc[0] < 1


def test_slopes_of_two_targets_with_other_numbers_of_layers_are_compared_image_by_image():
    shown, mean = pictures()
    model = Model({tap: lambda x: x for tap in TAPS})
    maps = {(i, j): lambda x: x for i in TAPS for j in TAPS if i != j}
    one = stitched(model, shown, dict.fromkeys(TAPS, picture), maps, mean)
    other = stitched(model, shown, dict.fromkeys(TAPS[:3], picture), maps, mean).assign(target="other")
    both = [rows[(rows["measure"] == "stitch_slope") & (rows["endpoints"] == "with")] for rows in (one, other)]
    assert [rows["pairs"].iloc[0] for rows in both] == [12, 6]
    difference = pool(pd.concat(both), ["target"], against={"target": "other"})
    assert difference[["value", "n"]].to_numpy().tolist() == [[pytest.approx(0, abs=1e-6), 30]]


def test_taps_are_compared_within_their_stack():
    detector = load_target("scenes-detr")
    assert layers.stacks(detector) == {
        "encoder": ["projection", "encoder.layers.0", "encoder.layers.1", "encoder.layers.2"],
        "decoder": ["decoder.layers.0", "decoder.layers.1", "decoder.layers.2"],
    }
    row = layers.between(detector, ("encoder.layers.2", "encoder.layers.0"))
    assert [row[name] for name in ("distance", "relative")] == [2, pytest.approx(2 / 3)]
    with pytest.raises(BacksightError, match="in one stack"):
        layers.stack_pairs(detector.select(["backbone", "projection", "decoder.layers.1"]))


def test_half_steps_have_their_component():
    known = {
        step.after: step.component for step in layers.steps(load_target("scenes-detr")) if step.component != "block"
    }
    assert known["encoder.layers.0.attn"] == "attention"
    assert known["encoder.layers.0"] == "mlp"
    assert known["decoder.layers.1.cross_attn"] == "cross_attention"
    assert known["decoder.layers.1"] == "mlp"
    assert "decoder.layers.0.attn" not in known, "what is before the decoder is the encoder's output, of another form"
    assert {step.component for step in layers.steps(load_target("scenes-swin"))} == {"block"}


def test_stages_on_several_grids_are_stitched_and_only_equal_tokens_are_alike(images):
    swin = load_target("scenes-swin", taps=["patch_embed", "layers.0.blocks.0", "layers.1.blocks.0", "layers.1"])
    inverses = {0: fit_linear(swin, images[:40], progress=False)}
    maps = cross_layer.fit_maps(swin, {0: images[:40]})
    values = Values(swin, "smooth", "test", range(20))
    cross_layer.add_stitching(values, swin, images[40:], inverses, maps, null_mean(images[:40]), "linear", "linear")
    layers.add_similarity(values, swin, images[40:])
    rows = metrics(values.table()).groupby("measure")["value"].agg(list)
    assert len(rows["stitch_r2"]) == 16
    assert max(rows["stitch_r2"]) > 0.9
    assert len(rows["cka"]) == 8, "two pairs on equal grids, both ways, and their null"


def test_every_row_has_its_interval_and_every_measure_its_nulls(study):
    assert set(METRIC_COLUMNS) <= set(study.columns)
    assert study[["value", "low", "high", "n", "seeds"]].notna().all().all()
    assert (study["low"] <= study["value"] + 1e-9).all()
    assert (study["value"] <= study["high"] + 1e-9).all()
    nulls = study.groupby("measure")["inverse"].agg(set)
    assert nulls["stitch_r2"] == nulls["predictability_r2"] == {"linear", "null_shuffled", "null_untrained"}
    assert nulls["cka"] == {"features", "null_shuffled", "null_untrained"}
    assert nulls["stitch_slope"] == {"linear", "null_untrained"}
    assert set(study.loc[study["measure"] == "residual_update", "component"]) == {"block", "attention", "mlp"}


def test_a_tap_reads_another_and_not_another_image(study):
    for measure in ("stitch_r2", "predictability_r2"):
        rows = study[study["measure"] == measure].groupby("inverse")["value"].mean()
        assert rows["linear"] > rows["null_shuffled"] + 0.3


def test_no_way_reads_a_tap_better_than_its_own_linear_inverse(study):
    rows = study[(study["measure"] == "stitch_r2") & (study["inverse"] == "linear")]
    rows = rows.set_index(["source_tap", "target_tap"])["value"]
    for i, j in rows.index:
        assert rows[i, j] < rows[i, i] + 0.01


def test_pictures_are_those_that_are_scored(vit, images):
    train, test = images[:40], images[40:]
    inverses = fit_linear(vit, train, taps=vit.taps, progress=False)
    maps = cross_layer.fit_maps(vit, {0: train})
    made = cross_layer.cross_pictures(vit, test, inverses, maps[0])
    values = Values(vit, "smooth", "test", range(len(test)))
    cross_layer.add_stitching(values, vit, test, {0: inverses}, maps, null_mean(train), "linear", "linear")
    rows = pool(values.table()).set_index(["source_tap", "target_tap", "measure"])["value"]
    total = (test - null_mean(train)).square().sum()
    for pair in (("blocks.0", "blocks.0"), ("blocks.1", "patch_embed")):
        r2 = 1 - (test - made[pair]).square().sum() / total
        assert rows[(*pair, "stitch_r2")] == pytest.approx(float(r2), abs=1e-4)
    raw = cross_layer.cross_pictures(vit, test, inverses)
    assert torch.equal(raw["blocks.0", "blocks.1"], inverses["blocks.1"](vit.record(test)["blocks.0"]).clamp(0, 1))


def test_a_layer_adds_what_deeper_ones_do_not_hold():
    """Of 48 values of a picture the deepest tap holds 20, the middle one 10 of these, the first one the others."""
    shown = torch.rand(300, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    parts = {"blocks.0": slice(20, 48), "blocks.1": slice(0, 10), "blocks.2": slice(0, 20)}
    model = Model({tap: lambda x, part=part: x.replace(x.values[..., part]) for tap, part in parts.items()})
    values = Values(model, "noise", "test", range(50))
    layers.add_marginal_gain(values, model, {0: shown[:200], 1: shown[:190]}, shown[250:], list(parts), shown[200:250])
    by = ["tap", "inverse", "measure"]
    gains = pool(values.table(), by, against={"inverse": "linear_deeper"}).set_index("tap")["value"]
    assert list(gains.index) == ["blocks.0", "blocks.1"]
    assert gains["blocks.0"] > 20
    assert abs(gains["blocks.1"]) < 0.2
