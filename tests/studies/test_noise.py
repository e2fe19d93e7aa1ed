"""The noise study: known answers on a linear target, the same noise for every inverse, and nulls."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from targets.examples import small_timm
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.exact.map import MapInverse, MapSettings
from backsight.exact.solver import Linearised
from backsight.inverses.linear import fit_linear
from backsight.inverses.rows import patchify
from backsight.studies.derivatives import measure_amplification, measure_recoverable, recoverable, spectrum
from backsight.studies.noise import disturbed, measure_noise, noise_name, noisy
from backsight.tables.pooling import metrics
from backsight.tables.values import Values
from backsight.targets import Target

HEIGHT, WIDTH, SIDE = 8, 6, 2
TAP = "patch_embed"
NOISES = ["float32", 0.05, 1.0]
QUICK = MapSettings(stages=(1.0, 1e-2, 0.0), steps=2, products=30)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_images(count: int, seed: int) -> Tensor:
    """Every pixel on its own, so that the prior of the images is white."""
    return torch.rand(count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def embedding() -> Tensor:
    """(12, 12) of pixels to channels: six singular values of 1, two of 0.01 and four of 0."""
    turns = [torch.linalg.qr(normal(12, 12, seed=seed)).Q.float() for seed in (1, 2)]
    return turns[0] @ torch.tensor([1.0] * 6 + [0.01] * 2 + [0.0] * 4).diag() @ turns[1]


@pytest.fixture(scope="module")
def target() -> Target:
    """A ViT whose patch embedding, its first tap, is known."""
    small = small_timm("ViT", img_size=(HEIGHT, WIDTH), patch_size=SIDE, embed_dim=12, depth=1, num_heads=2)
    small = small.select([TAP])
    deviation = torch.tensor(small.preprocessing.std)[:, None, None]  # the target divides pixels by it
    small.model.patch_embed.proj.weight.data = embedding().T.reshape(12, 3, SIDE, SIDE) * deviation
    return small


@pytest.fixture(scope="module")
def seen() -> dict[str, list[Tensor]]:
    """What each inverse read."""
    return {"direct": [], "linear": [], "map": []}


@pytest.fixture(scope="module")
def study(target: Target, seen: dict[str, list[Tensor]]) -> pd.DataFrame:
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

    values = Values(target, "noise", "test", range(4))
    images, held_out = noise_images(4, 4), noise_images(64, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MapInverse, "solve", spied)
        quick = {"map_seeds": [0, 1], "settings": QUICK, "checked": 0}
        shown = measure_noise(target, families, [TAP], NOISES, images, held_out, values, **quick)
    measure_recoverable(target, [TAP], NOISES[1:], images[:2], held_out, values, steps=8, probes=12)
    pictures, deviation = shown[TAP, "float32"]
    assert pictures["map"].shape == (3, 3, HEIGHT, WIDTH)
    assert deviation.shape == (3, HEIGHT, WIDTH)
    return metrics(values.table())


def value_of(table: pd.DataFrame, measure: str, **where: object) -> float:
    rows = table[table["measure"] == measure]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    assert len(rows) == 1, f"{len(rows)} rows of {measure} where {where}"
    return float(rows["value"].iloc[0])


def test_every_inverse_reads_the_same_noise(target: Target, study: pd.DataFrame, seen: dict[str, list[Tensor]]) -> None:
    clean = target.record(noise_images(4, 4), [TAP])[TAP]
    for noise in NOISES:
        y = disturbed(clean, TAP, noise).values
        for name, values in seen.items():
            assert any(torch.equal(read, y) for read in values if read.shape == y.shape), (name, noise)
    assert not torch.equal(disturbed(clean, TAP, 1.0, seed=1).values, disturbed(clean, TAP, 1.0).values)


def test_a_linear_target_s_directions_are_its_singular_values(target: Target, study: pd.DataFrame) -> None:
    # White images: every direction of the prior is alike, so that singular values are those of the matrix, times
    # the pixels' deviation over the values'. Those of 1 are above σ = 0.05, those of 0.01 are not.
    one = 12**-0.5 / float(target.record(noise_images(4, 4), [TAP])[TAP].values.std())
    assert 0.01 * one < 0.05 < one
    assert value_of(study, "recoverable", noise="gaussian 0.05") == pytest.approx(6 / 12, rel=0.1)


def test_map_finds_what_a_linear_target_holds_and_no_more(study: pd.DataFrame) -> None:
    """Of white images, four directions in twelve are lost and the prior's mean stands for them: 1/3 of the variance."""
    error = 10 ** (-value_of(study, "psnr", inverse="map", noise="float32") / 10)
    left = (patchify(noise_images(4, 4), (SIDE, SIDE)) - 0.5) @ torch.linalg.qr(normal(12, 12, seed=1)).Q[:, 8:].float()
    assert error == pytest.approx(float(left.square().sum(-1).mean() / 12), rel=0.1)  # 1/36 of endless images
    at_one = 10 ** (-value_of(study, "psnr", inverse="map", noise="gaussian 1") / 10)
    assert at_one > 1.5 * error
    mean = 10 ** (-value_of(study, "psnr", inverse="null_mean", noise="float32") / 10)
    assert mean == pytest.approx(1 / 12, rel=0.15)


def test_every_value_has_its_seed_and_its_noise(study: pd.DataFrame) -> None:
    scores = study[study["measure"] == "psnr"]
    assert set(scores["inverse"]) == {"linear", "direct", "steadied", "map", "null_mean", "null_shuffled"}
    assert scores.loc[scores["inverse"] != "null_mean", "seeds"].eq(2).all()
    sigmas = scores.drop_duplicates("noise").set_index("noise")["sigma"]
    assert sigmas["gaussian 1"] == pytest.approx(1, rel=0.1)
    assert 0 < sigmas["float32"] < 1e-6
    assert not study.duplicated(["tap", "inverse", "noise", "measure", "bin"]).any()
    assert set(study.loc[study["measure"] == "calibration_error", "inverse"]) == {"map", "null_constant"}


def test_one_image_alone_and_what_is_refused(target: Target) -> None:
    families = {0: {"linear": {TAP: lambda read: torch.full((read.batch, 3, HEIGHT, WIDTH), 0.5)}}}
    values = Values(target, "noise", "test", [0])
    rest = [TAP], [0.1], noise_images(1, 6), noise_images(16, 5), values
    measure_noise(target, families, *rest, settings=QUICK, checked=0)
    table = values.table()
    assert set(table.loc[table["measure"] == "psnr", "inverse"]) == {"linear", "steadied", "map", "null_mean"}
    with pytest.raises(BacksightError, match="No inverse family reads patch_embed"):
        measure_noise(target, {0: {"linear": {}}}, *rest)


@pytest.mark.parametrize(("noise", "told"), [("floot32", "nearest: float32"), (0, "no noise 0"), (math.nan, "nan")])
def test_bad_noises_are_refused(noise: str | float, told: str) -> None:
    with pytest.raises(BacksightError, match=told):
        noise_name(noise)


def test_half_steps_amplify_down_to_where_exactness_ends() -> None:
    vit, tap = small_timm("ViT", img_size=(16, 24)).select(["blocks.0"]), "blocks.0"
    values = Values(vit, "noise", "test", range(2))
    measure_amplification(vit, tap, torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)), values, 2)
    table = metrics(values.table())
    assert list(table.loc[table["measure"] == "amplification", "step"]) == ["blocks.0.attn", "blocks.0"]
    # The last step's own growth is that of a chain of one step, up to the noise that was drawn.
    alone, chain = (value_of(table, f"amplification{way}", step="blocks.0") for way in ("", "_chain"))
    assert chain == pytest.approx(alone, abs=0.1)


def with_values(values: Tensor, rows: int, seed: int = 0) -> Tensor:
    """(len(values), rows) matrix with these singular values."""
    left, right = (torch.linalg.qr(normal(size, size, seed=seed + k)).Q for k, size in enumerate((len(values), rows)))
    return left @ nn.functional.pad(values.diag(), (0, rows - len(values))) @ right


def linearised(matrix: Tensor, batch: int = 2) -> Linearised:
    shape = (batch, 3, len(matrix) // 3)
    return Linearised(lambda z: (z.flatten(1) @ matrix).view(len(z), 1, -1), normal(*shape, seed=9))


def test_directions_above_the_noise_are_counted() -> None:
    values = torch.cat([torch.full((10,), 1.0), torch.full((14,), 1e-2), torch.full((6,), 1e-5)]).double()
    density = [part.view(80, 2, -1) for part in spectrum(linearised(with_values(values, 40), 160), steps=6)]
    assert torch.allclose(density[1].sum(-1), torch.ones(80, 2, dtype=torch.float64))
    assert torch.allclose(recoverable(*density, 30, 1e-1), torch.full((2,), 10.0, dtype=torch.float64), rtol=0.1)
    assert torch.allclose(recoverable(*density, 30, 1e-3), torch.full((2,), 24.0, dtype=torch.float64), rtol=0.1)
    assert float(recoverable(*density, 30, 2.0).max()) == 0
    assert math.isclose(float(density[0].amax()), 1.0, rel_tol=1e-6)
    few = [part.view(2, 2, -1) for part in spectrum(linearised(with_values(values, 40), 4), steps=2)]
    assert bool(recoverable(*few, 30, 1e-6).isnan().all())  # two products do not reach the small ones


def test_a_full_run_of_products_gives_the_singular_values() -> None:
    matrix = normal(12, 15, seed=3)
    density = spectrum(linearised(matrix, 1), steps=12)
    assert torch.allclose(density[0][0].sqrt(), torch.linalg.svdvals(matrix).flip(0), rtol=1e-6)


def test_noises_are_of_the_size_they_say() -> None:
    values = 3 * normal(4, 50, 40, seed=36).float()
    size = (noisy(values, 0.1) - values).square().mean().sqrt() / values.std()
    assert float(size) == pytest.approx(0.1, rel=0.05)
    assert torch.equal(noisy(values, "float32"), values)
    # Uniform rounding: half a unit in the last place of 8 and of 11 bits, over √3 and over the octave.
    for kind, bits in (("bfloat16", 8), ("float16", 11)):
        relative = ((noisy(values, kind) - values) / values).square().mean().sqrt()
        assert 0.3 < float(relative) * 2.0**bits < 0.6
    step = values.flatten(1).abs().amax(1) / 127
    rounding = (noisy(values, "int8") - values).flatten(1).square().mean(1).sqrt()
    assert torch.allclose(rounding, step / 12**0.5, rtol=0.1)
