"""Known answers: effects of known size, a floor, no effect, an effect in one seed only; how often verdicts err."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from backsight.errors import BacksightError
from backsight.tables.judge import AGREED, DISAGREED, FLOOR, UNDECIDED, Claim, compare, decide, holm, judge
from backsight.tables.pooling import differences, interval, pool
from backsight.tables.values import Values


class Target:
    name, weights = "toy-vit", "trained"

    def depth(self, tap: str) -> float:
        return {"blocks.0": 0.2, "blocks.1": 1.0}[tap]


def table(
    effect: float = 0.0, seeds: int = 3, images: int = 40, noise: float = 0.3, by_seed: tuple[float, ...] = (), seed=0
) -> pd.DataFrame:
    """PSNR of two families at two taps, with a null: direct varies by image; modular is it plus the effect."""
    draw = np.random.default_rng(seed)
    values = Values(Target(), "scenes", "test", range(images))  # type: ignore[arg-type]
    for tap, level in (("blocks.0", 25.0), ("blocks.1", 20.0)):
        easy = level + 2 * draw.normal(size=images)
        values.add("psnr", easy * 0 + 12, tap, "null_mean")
        direct = {s: easy + noise * draw.normal(size=images) for s in range(seeds)}
        more = by_seed or (effect,) * seeds
        values.add("psnr", direct, tap, "direct")
        values.add(
            "psnr", {s: v + more[s] + noise * draw.normal(size=images) for s, v in direct.items()}, tap, "modular"
        )
    return values.table()


def claim(**changes: Any) -> Claim:
    rows = {"measure": "psnr", "inverse": "modular"}
    return Claim("modular is better", "ours", rows, "", **{"against": {"inverse": "direct"}} | changes)


def verdict(values: pd.DataFrame, asked: Claim) -> str:
    (row,) = judge(values, [asked]).to_dict("records")
    return row["verdict"]


def test_paired_differences_see_what_unpaired_ones_cannot() -> None:
    values = table(effect=0.5)
    paired = pool(values[values.tap == "blocks.1"], ["inverse"], {"inverse": "direct"}).set_index("inverse")
    assert paired.loc["modular", "value"] == pytest.approx(0.5, abs=0.15)
    assert 0.2 < paired.loc["modular", "low"] < paired.loc["modular", "high"] < 0.8
    alone = pool(values[values.inverse == "modular"], ["tap"])
    assert (alone.high - alone.low > 0.9).all()
    assert alone[["n", "seeds", "photographs"]].to_numpy().tolist() == [[40, 3, 40]] * 2


def test_a_null_without_seeds_is_compared_with_every_seed() -> None:
    above = pool(table(), ["inverse", "tap"], {"inverse": "null_mean"})
    assert set(above.inverse) == {"direct", "modular"}
    assert above[above.tap == "blocks.0"].value.to_numpy() == pytest.approx([13, 13], abs=1.2)
    assert (above.seeds == 3).all()


@pytest.mark.parametrize(
    ("effect", "asked", "said"),
    [
        (0.5, claim(above=0.2), AGREED),
        (0.5, claim(above=0.8), DISAGREED),
        (0.0, claim(above=0.0), UNDECIDED),
        (0.0, claim(within=0.5), AGREED),
        (1.0, claim(within=0.5), DISAGREED),
        (-0.5, claim(below=-0.2), AGREED),
        (0.0, claim(against={"tap": "first"}, below=-3.0), AGREED),
        (0.0, claim(against={}, above=15.0, floor="null_mean"), AGREED),
        (-9.0, claim(against={}, above=5.0, floor="null_mean"), FLOOR),
    ],
)
def test_verdicts_of_known_effects(effect: float, asked: Claim, said: str) -> None:
    assert verdict(table(effect), asked) == said


def test_a_claim_that_names_no_inverse_reads_no_null() -> None:
    """The answers to another image's picture once counted in the cost of a tuning, and halved it."""
    values = table().query("tap == 'blocks.1' and inverse in ('modular', 'null_mean')").assign(t=0.5)
    other = values.assign(t=0.0, value=values["value"] - (values["inverse"] == "modular"))
    asked = replace(claim(against={"t": 0.0}, tap="", above=0.0), rows={"measure": "psnr", "t": 0.5})
    (row,) = judge(pd.concat([values, other], ignore_index=True), [asked]).to_dict("records")
    assert row["value"] == pytest.approx(1.0)


def test_an_effect_in_one_seed_only_decides_nothing() -> None:
    assert verdict(table(by_seed=(1.5, 0.0, 0.0)), claim(above=0.1)) == UNDECIDED


def test_too_few_seeds_decide_nothing() -> None:
    assert verdict(table(effect=1.0, seeds=1), claim(above=0.1)) == UNDECIDED
    assert verdict(table(effect=1.0, seeds=1), claim(above=0.1, trained=False)) == AGREED


def test_values_that_are_all_equal_decide_nothing() -> None:
    """Their bootstrap has no length: nobody knows how much other images would differ."""
    (row,) = judge(table(noise=0.0, effect=0.0), [claim(above=0.1)]).to_dict("records")
    assert (row["verdict"], row["p"]) == (UNDECIDED, 1.0)


def test_crops_of_one_photograph_are_not_independent() -> None:
    draw = np.random.default_rng(0)
    photographs = np.repeat(np.arange(8), 12)
    values = Values(Target(), "photographs", "test", range(96), photographs)  # type: ignore[arg-type]
    values.add("psnr", draw.normal(size=8)[photographs] + 0.1 * draw.normal(size=96), "blocks.0", "linear")
    clustered = pool(values.table()).iloc[0]
    alone = pool(values.table().assign(photograph=lambda t: t.image)).iloc[0]
    assert clustered.photographs == 8
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)


def test_weights_make_a_ratio_of_sums() -> None:
    error, total = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 12.0])
    values = Values(Target(), "scenes", "test", "abc")  # type: ignore[arg-type]
    values.add("r2", 1 - error / total, "blocks.0", "linear", weight=total)
    assert pool(values.table()).value[0] == pytest.approx(1 - 6 / 18)


def test_images_without_a_value_do_not_count() -> None:
    values = Values(Target(), "scenes", "test", range(4))  # type: ignore[arg-type]
    values.add("hue_error", [10.0, np.nan, 30.0, np.nan], "blocks.0", "linear")
    row = pool(values.table()).iloc[0]
    assert (row.value, row.n) == (20.0, 2)


def test_ambiguous_partners_are_refused() -> None:
    with pytest.raises(BacksightError, match="several values"):
        differences(pd.concat([table(), table()]), {"inverse": "direct"})
    with pytest.raises(BacksightError, match="noise"):
        differences(table(), {"noise": 1})


@pytest.mark.parametrize("images", [8, 24, 100])
@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_hold_the_truth(images: int, seeds: int) -> None:
    draw = np.random.default_rng(images + seeds)
    held = 0
    for _ in range(400):
        by_seed = 0.3 * draw.normal(size=(seeds, 1)) if seeds > 1 else 0.0
        scores = draw.normal(size=images) + by_seed + 0.2 * draw.normal(size=(seeds, images))
        _, low, high = interval(scores, np.ones_like(scores))
        held += low <= 0 <= high
    assert held / 400 >= 0.92


def test_shares_of_all_or_none_have_a_length() -> None:
    value, low, high = interval(np.ones((1, 20)), np.ones((1, 20)), cases=True)
    assert value == 1.0
    assert 0.8 < low < 0.9 < high <= 1.0


@pytest.mark.parametrize(
    ("measure", "share"),
    [("top1", True), ("edge_f1", False), ("roots", False), ("reverted_above_deals", True), ("top1 differs", True)],
)
def test_only_declared_shares_are_of_trials(measure: str, share: bool) -> None:
    """Any values that were all ones or zeros once had Wilson's interval, and then equal differences had none: none of
    67 objects that revert says that few do, and nothing of a correlation, or of how many roots a token has."""
    values = Values(Target(), "scenes", "test", range(20))  # type: ignore[arg-type]
    for inverse, number in (("linear", 1.0), ("direct", 0.0)):
        values.add(measure.removesuffix(" differs"), np.full(20, number), "blocks.0", inverse)
    against = {"inverse": "direct"} if measure.endswith("differs") else None
    row = pool(values.table(), against=against).iloc[0]
    assert row.value == 1
    assert (row.high - row.low > 0) == share
    if measure == "top1":
        assert row.high == 1
    elif share:  # as many of 20 as may be otherwise, each by 1 at most
        assert row.low == pytest.approx(1 - 1.96**2 / (20 + 1.96**2), abs=1e-3)


def test_differences_of_cases_are_never_surer_than_equal_ones() -> None:
    """Two answers of 450 that differ, one each way, once said more of 150 images than none that differs."""
    values = Values(Target(), "scenes", "test", range(150))  # type: ignore[arg-type]
    for inverse, wrong in (("linear", (0, 1, 2)), ("direct", (7, 1, 2))):  # one image a seed
        cases = {seed: (np.arange(150) != place).astype(float) for seed, place in enumerate(wrong)}
        values.add("top1", cases, "blocks.0", inverse)
    row = pool(values.table(), against={"inverse": "direct"}).iloc[0]
    assert row.value == 0
    assert row.high == -row.low >= 1.96**2 / (150 + 1.96**2) - 1e-4


def test_false_verdicts_are_rare() -> None:
    """200 pages of three claims, of values whose true effect lies on the border."""
    draw, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        rows = []
        for _ in range(3):
            values = draw.normal(size=12) + 0.2 * draw.normal(size=(3, 12)) + 0.1 * draw.normal(size=(3, 1))
            told = dict(zip(("value", "low", "high"), interval(values, np.ones_like(values)), strict=True))
            rows.append({**told, "seeds": 3, "floor": False, "few": False, **compare(claim(above=0.0), told)})
        wrong += decide(pd.DataFrame(rows))["verdict"].isin([AGREED, DISAGREED]).any()
    assert wrong / 200 <= 0.05


def test_holm() -> None:
    np.testing.assert_allclose(holm(pd.Series([0.01, 0.04, 0.03, 0.5])), [0.04, 0.09, 0.09, 0.5])


def test_the_interval_of_a_share_is_of_shares() -> None:
    """Student's t of three seeds once gave shares below 0."""
    values = Values(Target(), "scenes", "test", range(20))  # type: ignore[arg-type]
    values.add("share_grey", {s: np.full(20, x) for s, x in enumerate((0.0, 0.02, 0.2))}, "blocks.0", "linear")
    row = pool(values.table()).iloc[0]
    assert row.low == 0
    assert 0.2 < row.high < 1
