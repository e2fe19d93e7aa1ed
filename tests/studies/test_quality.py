"""Quality of inverses: nulls stand beside every score, files are found again, claims follow from the numbers."""

import numpy as np
import pytest
import torch

from backsight.errors import BacksightError
from backsight.inverses.families import fit
from backsight.inverses.files import load, save
from backsight.inverses.linear import fit_linear
from backsight.plots.style import with_nulls_of
from backsight.studies.nulls import mosaic, null_mean
from backsight.studies.quality import (
    CELLS,
    KEPT,
    evaluate_quality,
    gallery_images,
    quality_images,
)
from backsight.tables.pooling import metrics, pool
from backsight.tables.values import METRIC_COLUMNS, NO_SEED
from backsight.targets import load_target


@pytest.fixture(scope="module")
def images():
    """Smooth random pictures of 16 x 16 pixels: (80, 3, 16, 16)."""
    coarse = torch.rand(80, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")


@pytest.fixture(scope="module")
def target():
    import json
    import tempfile
    from pathlib import Path

    from safetensors.torch import save_file
    from timm.models.vision_transformer import VisionTransformer

    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 3}
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng():
        torch.manual_seed(1)
        folder = Path(name)
        save_file(VisionTransformer(**arguments).state_dict(), folder / "model.safetensors", {"format": "pt"})
        data = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 16, 16], "crop_pct": 1.0}
        config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "label_names": ["a", "b", "c"]}
        config |= {"pretrained_cfg": data}
        (folder / "config.json").write_text(json.dumps(config))
        yield load_target(str(folder))


@pytest.fixture(scope="module")
def quality(target, images):
    train, test = images[:60], images[60:]
    families = {
        "linear": fit_linear(target, train, taps=target.taps, progress=False),
        "direct": fit("direct", target, train, steps=1, batch_size=4, progress=False),
    }
    untrained = target.untrained(3)
    null = {3: (untrained, {"linear": fit_linear(untrained, train, taps=target.taps, progress=False)})}
    return evaluate_quality(target, test, {0: families}, null_mean(train), null, batch_size=7)


def test_every_tap_has_every_family_and_every_null(quality, target):
    table = metrics(quality.values.table())
    assert list(table.columns[: len(METRIC_COLUMNS)]) == list(METRIC_COLUMNS)
    inverses = {"linear", "direct", "null_mean", "null_shuffled", "null_untrained"}
    for tap in target.taps:
        at = table[table.tap == tap]
        assert set(at.inverse) == inverses
        assert set(at.measure) == {"psnr", "ssim", "r2"}
    assert ((table.low <= table.value) & (table.value <= table.high)).all()
    assert (table.n > 1).all()
    mean = table[(table.inverse == "null_mean") & (table.measure == "r2")]
    assert mean.value.abs().max() < 1e-6  # by definition


def test_a_representation_beats_the_nulls_and_a_shuffled_one_does_not(quality, target):
    psnr = metrics(quality.values.table()).query("measure == 'psnr'").set_index(["inverse", "tap"]).value
    for tap in target.taps:
        assert psnr["linear", tap] > psnr["null_mean", tap] + 2
        assert psnr["null_shuffled", tap] < psnr["null_mean", tap]


def test_kept_pictures_are_the_reconstructions_of_the_first_images(quality, target, images):
    assert torch.equal(quality.images, images[60 : 60 + KEPT])
    for taps in quality.reconstructions.values():
        assert list(taps) == list(target.taps)
        assert all(made.shape == (KEPT, 3, 16, 16) for made in taps.values())
    assert len(quality.values.table().query("inverse == 'linear' and measure == 'psnr'")) == 20 * len(target.taps)
    table = difference(quality, "direct", "linear")
    assert list(table.tap) == list(target.taps)
    assert (table.n == 20).all()


def difference(quality, first, second):
    values = quality.values.table()
    values = values[values.measure.eq("psnr") & values.inverse.isin([first, second])]
    return pool(values, ["tap"], {"inverse": second})


@pytest.fixture(scope="module")
def by_seed(target, images):
    """Two training seeds of two families, all nulls, a measure of its own and maps."""
    train, test = images[:60], images[60:]
    families, untrained = {}, {}
    for seed in (4, 7):
        part = train[: 40 + seed]
        linear = fit_linear(target, part, taps=target.taps, progress=False)
        families[seed] = {"linear": linear, "direct": dict(linear)}
        drawn = target.untrained(seed)
        untrained[seed] = drawn, {"linear": fit_linear(drawn, part, taps=target.taps, progress=False)}

    def places(judged):
        return lambda made: {("place", (("further", "x"),)): judged.places.float() + 0 * made.flatten(1).mean(1)}

    return evaluate_quality(
        target,
        test,
        families,
        null_mean(train),
        untrained,
        batch_size=7,
        shuffled_families=["linear", "direct"],
        measures=[places],
        measured=10,
        maps_of="linear",
    )


def test_training_seeds_are_pooled_into_one_row(by_seed, target):
    table = metrics(by_seed.values.table())
    assert not table.duplicated(["inverse", "family", "tap", "measure", "row", "column"]).any()
    rows = table[table.measure == "psnr"]
    assert (rows.seeds == np.where(rows.inverse == "null_mean", 1, 2)).all()
    assert (rows.n == 20).all() or set(rows[rows.n < 20].inverse) == {"null_shuffled"}
    nulls = rows[rows.inverse.isin(["null_shuffled", "null_untrained"])]
    assert set(zip(nulls.inverse, nulls.family, strict=True)) == {
        ("null_shuffled", "linear"),
        ("null_shuffled", "direct"),
        ("null_untrained", "linear"),
    }
    assert rows[rows.inverse == "null_mean"].family.isna().all()
    values = by_seed.values.table().query("measure == 'psnr'")
    linear = values.query("inverse == 'linear'").groupby("tap").value.mean()
    pooled = rows[rows.inverse == "linear"].set_index("tap").value
    assert pooled.to_dict() == pytest.approx(linear.to_dict(), rel=1e-5)
    assert set(values.train_seed) == {4, 7, NO_SEED}


def test_further_measures_see_the_first_images_and_of_untrained_targets_the_first_seed(by_seed):
    rows = metrics(by_seed.values.table()).query("measure == 'place'")
    assert (rows.n == 10).all()
    assert (rows.value == 4.5).all()  # the mean place of ten
    assert (rows.further == "x").all()
    one_seed = rows.inverse.isin(["null_untrained", "null_mean"])
    assert (rows[~one_seed].seeds == 2).all()
    assert (rows[rows.inverse == "null_untrained"].seeds == 1).all()


def test_maps_are_the_picture_in_parts(by_seed, target):
    maps = metrics(by_seed.values.table()).query("measure == 'patch_r2'")
    assert set(maps.inverse) == {"linear"}
    for tap in target.taps:
        at = maps[maps.tap == tap]
        assert set(zip(at.row, at.column, strict=True)) == {(r, c) for r in range(CELLS) for c in range(CELLS)}
    whole = metrics(by_seed.values.table()).query("measure == 'r2' and inverse == 'linear'").set_index("tap").value
    assert maps.groupby("tap").value.max().gt(whole - 1e-6).all()


def test_one_family_s_nulls_are_chosen_for_curves(by_seed, target):
    from backsight.plots.depth import by_depth

    with pytest.raises(BacksightError, match="several values"):
        by_depth(metrics(by_seed.values.table()), "psnr")
    chosen = with_nulls_of(metrics(by_seed.values.table()), "direct")
    by_depth(chosen, "psnr")
    psnr = chosen[chosen.measure == "psnr"]
    assert dict(psnr[psnr.inverse.str.startswith("null_")].groupby("inverse").family.first().dropna()) == {
        "null_shuffled": "direct",
        "null_untrained": "linear",  # the only one there is
    }
    table = difference(by_seed, "linear", "direct")
    assert (table.value == 0).all()  # the same inverses
    assert (table.n == 20).all()
    null = difference(by_seed, "linear", "null_mean")
    assert (null.value > 2).all()


def test_a_gallery_holds_the_judged_images_first_and_no_image_twice():
    judged, *_ = quality_images("photographs", (16, 16), 4, seed=0)
    among = gallery_images("photographs", (16, 16), judged, 30, seed=0)
    assert torch.equal(among[:4], judged)
    assert len(among) <= 30
    assert len(torch.unique((among * 255).round().flatten(1), dim=0)) == len(among)
    few = gallery_images("photographs", (16, 16), judged, 2, seed=0)
    assert torch.equal(few, judged)


def test_families_are_saved_and_found_again_as_chains(tmp_path, target, images, quality):
    for family in ("linear", "modular"):
        modules = fit(family, target, images[:60], steps=1, batch_size=4, progress=False)
        save(modules, tmp_path / family)
    families = load(tmp_path, target)
    assert list(families) == ["linear", "modular"]
    recorded = target.record(images[:2])
    for taps in families.values():
        assert list(taps) == list(target.taps)
        for tap, inverse in taps.items():
            assert inverse(recorded[tap]).shape == (2, 3, 16, 16)
    save(fit_linear(target, images[:60], taps=["norm"], progress=False), tmp_path / "again")
    with pytest.raises(BacksightError, match="two linear inverses for norm"):
        load(tmp_path, target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BacksightError, match="02_train_inverse"):
        load(tmp_path / "empty", target)
    for seed in (0, 1):
        save(fit_linear(target, images[:60], taps=["norm"], seed=seed, progress=False), tmp_path / "seeds" / str(seed))
    assert list(load(tmp_path / "seeds", target, seed=1)["linear"]) == ["norm"]
    with pytest.raises(BacksightError, match=r"seeds \[0, 1\]"):
        load(tmp_path / "seeds", target, seed=7)
    with pytest.raises(BacksightError, match="not a folder"):
        load(tmp_path / "absent", target)


def test_quality_images_are_never_training_images():
    crops, name, split, cut_from = quality_images("photographs", (24, 24), 6, seed=0)
    assert (len(crops), name, split) == (6, "photographs", "test")
    assert len(cut_from) == 6
    assert len(set(cut_from)) > 1
    again, *_ = quality_images("photographs", (24, 24), 4, seed=0)
    assert torch.equal(crops[:2], again[:2])


def test_one_image_is_refused(target, images):
    with pytest.raises(BacksightError, match="at least two"):
        evaluate_quality(target, images[:1], {0: {}}, images.mean(0))


def test_a_mosaic_shows_the_mean_colours_of_its_parts() -> None:
    picture = torch.arange(6.0)[None, None, None].expand(2, 3, 4, 6)
    assert torch.equal(mosaic(picture, 1), torch.full((2, 3, 4, 6), 2.5))
    assert mosaic(picture, 2)[0, 0, 0].tolist() == [1, 1, 1, 4, 4, 4]
