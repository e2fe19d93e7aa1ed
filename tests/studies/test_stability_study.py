"""The stability study: known answers on a linear target, the same noise for every inverse, nulls, and its figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pandas as pd
import pytest
import torch
from targets.examples import small_timm
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.exact.inverse import ExactInverse, fit_exact
from backsight.exact.map import MapInverse, MapSettings
from backsight.inverses.linear import fit_linear
from backsight.inverses.rows import patchify
from backsight.measures.pixels import psnr
from backsight.studies.stability import Noise, Probes, Stability, disturbed, measure_stability, parse_noises
from backsight.tables.values import METRIC_COLUMNS
from backsight.targets import Target

HEIGHT, WIDTH, SIDE, RANK = 8, 6, 2, 8
TAP = "patch_embed"
FEW = Probes(images=2, vectors=12, steps=8, directions=2, iterations=3, products=30, amplified=2)
QUICK = MapSettings(stages=(1.0, 1e-2, 0.0), steps=2, products=30)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise_images(count: int, seed: int) -> Tensor:
    """Every pixel on its own, so that the prior of the images is white."""
    return torch.rand(count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def embedding() -> Tensor:
    """(12, 12) of pixels to channels: six singular values of 1, two of 0.01 and four of 0."""
    size = 3 * SIDE**2
    turns = [torch.linalg.qr(normal(size, size, seed=seed)).Q for seed in (1, 2)]
    return turns[0] @ torch.tensor([1.0] * 6 + [0.01] * 2 + [0.0] * 4).diag() @ turns[1]


@pytest.fixture(scope="module")
def target() -> Target:
    """A ViT whose patch embedding, its first tap, is known."""
    found = small_timm("ViT", img_size=(HEIGHT, WIDTH), patch_size=SIDE, embed_dim=12, depth=1, num_heads=2)
    found = found.select([TAP])
    deviation = torch.tensor(found.preprocessing.std)[:, None, None]  # the target divides pixels by it
    found.model.patch_embed.proj.weight.data = embedding().T.reshape(12, 3, SIDE, SIDE) * deviation
    return found


@pytest.fixture(scope="module")
def seen() -> dict[str, list[Tensor]]:
    """What each inverse read."""
    return {"direct": [], "linear": [], "map": []}


@pytest.fixture(scope="module")
def study(target: Target, seen: dict[str, list[Tensor]]) -> Iterator[Stability]:
    linear = fit_linear(target, noise_images(200, 3), taps=[TAP], progress=False)[TAP]

    def read_by(name: str):
        def inverse(representation):
            seen[name].append(representation.values.clone())
            return linear(representation)

        return inverse

    families = {seed: {name: {TAP: read_by(name)} for name in ("linear", "direct")} for seed in (0, 1)}
    solve = MapInverse.solve

    def spied(self, representation):
        seen["map"].append(representation.values.clone())
        return solve(self, representation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MapInverse, "solve", spied)
        yield measure_stability(
            target,
            families,
            [TAP],
            ["float32", 0.05, 1.0],
            noise_images(4, 4),
            noise_images(64, 5),
            settings=QUICK,
            checked=0,
            probes=FEW,
            progress=False,
        )


def value_of(metrics: pd.DataFrame, measure: str, **where: object) -> float:
    rows = metrics[metrics["measure"] == measure]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    assert len(rows) == 1, f"{len(rows)} rows of {measure} where {where}"
    return float(rows["value"].iloc[0])


def test_every_inverse_reads_the_same_noise(target: Target, study: Stability, seen: dict[str, list[Tensor]]) -> None:
    clean = target.record(noise_images(4, 4), [TAP])[TAP]
    for noise in parse_noises(["float32", 0.05, 1.0]):
        wanted = disturbed(clean, TAP, noise).values
        for name, values in seen.items():
            assert any(torch.equal(each, wanted) for each in values if each.shape == wanted.shape), (name, noise)
    other = disturbed(clean, TAP, Noise("gaussian", 1.0), seed=1).values
    assert not torch.equal(other, disturbed(clean, TAP, Noise("gaussian", 1.0)).values)


def test_a_linear_target_s_directions_are_its_singular_values(target: Target, study: Stability) -> None:
    tokens = (HEIGHT // SIDE) * (WIDTH // SIDE)
    assert value_of(study.metrics, "dimensions") == 3 * HEIGHT * WIDTH
    assert value_of(study.metrics, "dimensions_embedded") == RANK * tokens
    # White images: every direction of the prior is alike, so that singular values are those of the matrix, times
    # the pixels' deviation over the values'. Those of 1 are above σ = 0.05 and below 1e6, those of 0.01 are not.
    values = target.record(noise_images(4, 4), [TAP])[TAP].values
    one = 12**-0.5 / float(values.std())
    assert 0.01 * one < 0.05 < one
    found = value_of(study.metrics, "recoverable", noise="gaussian 0.05")
    assert found == pytest.approx(6 * tokens, rel=0.1)


def test_map_finds_what_a_linear_target_holds_and_no_more(study: Stability) -> None:
    """Of white images, four directions in twelve are lost and the prior's mean stands for them: 1/3 of the variance."""
    error = 10 ** (-value_of(study.metrics, "psnr", inverse="map", noise="float32") / 10)
    left = (patchify(noise_images(4, 4), (SIDE, SIDE)) - 0.5) @ torch.linalg.qr(normal(12, 12, seed=1)).Q[:, 8:]
    assert error == pytest.approx(float(left.square().sum(-1).mean() / 12), rel=0.1)  # 1/36 of endless images
    at_one = 10 ** (-value_of(study.metrics, "psnr", inverse="map", noise="gaussian 1") / 10)
    assert at_one > 1.5 * error
    mean = 10 ** (-value_of(study.metrics, "psnr", inverse="null_mean", noise="float32") / 10)
    assert mean == pytest.approx(1 / 12, rel=0.15)
    # The least-seen directions lie where nothing shows, so that all of the prior's variance is left.
    patterns, left = study.directions[TAP]
    assert left.tolist() == pytest.approx([1, 1], abs=0.02)
    assert patterns.shape == (2, 3, HEIGHT, WIDTH)
    shares = [
        float((patchify(each, (SIDE, SIDE)) @ embedding()).norm() / each.norm())
        for each in (patterns, study.random_directions[TAP])
    ]
    assert shares[0] < 0.02
    assert shares[0] < 0.5 * shares[1]


def test_rows_are_tidy_and_paired(study: Stability) -> None:
    metrics = study.metrics
    assert list(metrics.columns[: len(METRIC_COLUMNS)]) == list(METRIC_COLUMNS)
    keys = ["tap", "inverse", "noise", "measure", "against"]
    assert not metrics.duplicated(keys).any()
    assert set(metrics.loc[metrics["measure"] == "psnr", "inverse"]) == {
        *("linear", "direct", "steadied", "map", "null_mean", "null_shuffled")
    }
    for noise in ("float32", "gaussian 1"):
        at = {"noise": noise}
        apart = value_of(metrics, "psnr", inverse="map", **at) - value_of(metrics, "psnr", inverse="direct", **at)
        assert value_of(metrics, "psnr_difference", against="best", **at) == pytest.approx(apart)
    assert metrics.loc[metrics["against"] == "best", "note"].eq("best: direct").all()
    of_map = metrics[(metrics["measure"] == "psnr") & (metrics["inverse"] == "map")]
    assert of_map["seeds"].eq(1).all()
    assert metrics.loc[(metrics["measure"] == "psnr") & (metrics["inverse"] == "direct"), "seeds"].eq(2).all()
    sigmas = metrics.drop_duplicates("noise").set_index("noise")["sigma"]
    assert sigmas["gaussian 1"] == pytest.approx(1, rel=0.1)
    assert 0 < sigmas["float32"] < 1e-6
    assert study.pictures[TAP, "float32"]["map"].shape == (3, 3, HEIGHT, WIDTH)
    assert study.deviations[TAP, "float32"][0].shape == (3, HEIGHT, WIDTH)


def test_one_image_alone_and_what_is_refused(target: Target) -> None:
    families = {0: {"linear": {TAP: lambda each: torch.full((each.batch, 3, HEIGHT, WIDTH), 0.5)}}}
    settings = {"settings": replace(QUICK, products=5), "checked": 0, "progress": False, "probes": FEW}
    arguments = (target, families, TAP, [0.1], noise_images(1, 6), noise_images(16, 5))
    found = measure_stability(*arguments, **settings)
    assert set(found.metrics.loc[found.metrics["measure"] == "psnr", "inverse"]) == {
        *("linear", "steadied", "map", "null_mean")
    }
    assert found.images.shape == (1, 3, HEIGHT, WIDTH)
    assert found.metrics.loc[found.metrics["against"] == "best", "note"].eq("best: linear").all()
    with pytest.raises(BacksightError, match="No inverse family reads patch_embed"):
        measure_stability(target, {0: {"linear": {}}}, *arguments[2:], **settings)


@pytest.mark.parametrize(
    ("noises", "told"),
    [
        (["floot32"], "nearest: float32"),
        ([0], "not 0"),
        ([math.nan], "nan"),
        ([0.1, "0.1"], "gaussian 0.1"),
        ("int8", "int8"),
    ],
)
def test_bad_noises_are_refused(noises: list[str | float], told: str) -> None:
    with pytest.raises(BacksightError, match=told):
        parse_noises(noises)


def test_noises_by_name_and_size() -> None:
    found = parse_noises(["float32", "int8", 0.1, "0.01"])
    assert found == [Noise("float32"), Noise("int8"), Noise("gaussian", 0.1), Noise("gaussian", 0.01)]


@pytest.fixture(scope="module")
def vit() -> Target:
    return small_timm("ViT", img_size=(16, 24)).select(["blocks.0"])


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(44, 3, 4, 6, generator=generator)
    return nn.functional.interpolate(coarse, (16, 24), mode="bilinear")


@pytest.fixture(scope="module")
def exact(vit: Target, pictures: Tensor) -> dict[str, ExactInverse]:
    return dict(fit_exact(vit, pictures[:32], taps=["blocks.0"], stages=1, progress=False))


@pytest.fixture(scope="module")
def with_exact(vit: Target, pictures: Tensor, exact: dict[str, ExactInverse]) -> Stability:
    """Of a small ViT with random weights: exact solves, their crossing, and how half-steps amplify."""
    linear = fit_linear(vit, pictures[:32], taps=["blocks.0"], progress=False)
    return measure_stability(
        vit,
        {0: {"linear": linear}},
        ["blocks.0"],
        ["float32", 0.1, 1.0],
        pictures[32:34],
        pictures[34:],
        exact=exact,
        exact_images=1,
        settings=MapSettings(stages=(1.0,), steps=1, products=3),
        checked=0,
        probes=replace(FEW, vectors=1, steps=4, products=3, iterations=1),
        progress=False,
    )


def test_exact_solves_are_judged_beside_the_others(
    vit: Target, pictures: Tensor, exact: dict[str, ExactInverse], with_exact: Stability
) -> None:
    metrics = with_exact.metrics
    assert value_of(metrics, "solved", noise="float32") == 1
    assert metrics.loc[(metrics["measure"] == "psnr") & (metrics["inverse"] == "exact"), "n"].eq(1).all()
    clean = vit.record(pictures[32:34], ["blocks.0"])["blocks.0"]
    made = exact["blocks.0"](disturbed(clean, "blocks.0", Noise("gaussian", 0.1)).index(torch.arange(1)))
    wanted = float(psnr(pictures[32:33], made))
    assert value_of(metrics, "psnr", inverse="exact", noise="gaussian 0.1") == pytest.approx(wanted, abs=1e-3)
    steps = metrics[metrics["measure"] == "amplification_mean"]
    assert list(steps["step"]) == ["blocks.0.attn", "blocks.0"]
    largest = metrics[metrics["measure"] == "amplification_largest"]
    assert (largest["value"].to_numpy() >= 0.9 * steps["value"].to_numpy()).all()
    chain = metrics[metrics["measure"] == "amplification_chain"]
    assert list(chain["step"]) == ["blocks.0.attn", "blocks.0"]
    assert set(chain["against"]) == {"blocks.0"}
    # The last step's own growth is that of a chain of one step, up to the noise that was drawn.
    alone = float(steps.loc[steps["step"] == "blocks.0", "value"].iloc[0])
    assert float(chain.loc[chain["step"] == "blocks.0", "value"].iloc[0]) == pytest.approx(alone, rel=0.25)
    assert with_exact.pictures["blocks.0", "float32"]["exact"].shape == (1, 3, 16, 24)
