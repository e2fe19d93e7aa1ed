"""Lost, fragile, coded or not to be told: every verdict with its borders."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from backsight.errors import BacksightError
from backsight.tables.verdicts import ANSWERS, QUESTIONS, verdicts


def made_row(measure: str, low: float, high: float, **columns: Any) -> dict[str, Any]:
    common = {"target": "t", "tap": "far", "depth": 5.0, "inverse": "map", "n": 9, "seeds": 1, "of": None}
    return common | {"measure": measure, "value": (low + high) / 2, "low": low, "high": high} | columns


def made_metrics(
    gain: tuple[float, float], cost: tuple[float, float] = (-1.0, -0.5), measure: str = "psnr"
) -> pd.DataFrame:
    return pd.DataFrame(
        [
            made_row(f"{measure}_difference", *gain, against="modular", of=measure),
            made_row(f"{measure}_difference", 50.0, 60.0, against="linear", of=measure),
            made_row("depth_cost", *cost, against="near", of=measure),
            made_row("depth_cost", -90.0, -80.0, against="near", of=measure, inverse="modular"),
            made_row("misfit", 1.0, 1.4),
        ]
    )


def made_stability(**gains: tuple[float, float]) -> pd.DataFrame:
    names = {"int8": "int8", "tenth": "gaussian 0.1", "one": "gaussian 1"}
    return pd.DataFrame(
        [made_row("psnr_difference", *gain, against="modular", noise=names[name]) for name, gain in gains.items()]
    )


@pytest.mark.parametrize(
    ("gain", "cost", "noisy", "answer"),
    [
        ((6, 8), (-9, -3.01), {}, "lost"),
        ((6, 8), (-9, -3.0), {}, "non-linearly coded"),  # on the border it is not lost
        ((-1, 1), (-9, -4), {}, "lost"),
        ((0.5, 8), (-1, 0), {}, "cannot tell"),  # on the border there is no gain
        ((0.51, 8), (-1, 0), {}, "non-linearly coded"),
        ((-2, -1), (-1, 0), {}, "cannot tell"),
        ((6, 8), (-1, 0), {"tenth": (0.5, 2.9)}, "fragile"),
        ((6, 8), (-1, 0), {"tenth": (0.5, 3.0)}, "non-linearly coded"),  # half of it is left
        ((6, 8), (-1, 0), {"int8": (-3.0, -1.0), "tenth": (4, 5)}, "fragile"),
        ((6, 8), (-1, 0), {"tenth": (0.0, 5.0)}, "cannot tell"),
        ((6, 8), (-1, 0), {"int8": (5, 6), "tenth": (4, 5)}, "non-linearly coded"),
        ((6, 8), (-1, 0), {"one": (-1, 0)}, "non-linearly coded"),  # not a small noise
        ((6, 8), (-9, -4), {"tenth": (-1, 0)}, "lost"),
    ],
)
def test_every_verdict_and_its_borders(gain: Any, cost: Any, noisy: dict[str, Any], answer: str) -> None:
    found = verdicts(made_metrics(gain, cost), made_stability(**noisy) if noisy else None)
    assert found["answer"].tolist() == [answer]
    assert found["answer"].isin(ANSWERS).all()
    assert found["question"].tolist() == ["detail"]
    assert found["n"].tolist() == [9]


def test_a_verdict_shows_the_interval_that_decided() -> None:
    lost = verdicts(made_metrics((6, 8), (-9, -4))).iloc[0]
    assert (lost["low"], lost["high"]) == (-9, -4)
    assert "part of it is coded" in lost["note"]
    assert "misfit" in lost["note"]
    fragile = verdicts(made_metrics((6, 8)), made_stability(int8=(5, 6), tenth=(0.5, 2.0))).iloc[0]
    assert (fragile["low"], fragile["high"]) == (0.5, 2.0)
    assert "gaussian 0.1" in fragile["measured"]
    coded = verdicts(made_metrics((6, 8))).iloc[0]
    assert (coded["low"], coded["high"]) == (6, 8)


def test_a_search_that_did_not_end_need_not_mean_lost() -> None:
    metrics = made_metrics((6, 8), (-9, -4))  # of a misfit of 1.2
    assert verdicts(metrics, met=1.2)["answer"].tolist() == ["lost"]
    unended = verdicts(metrics, met=1.1).iloc[0]
    assert unended["answer"] == "non-linearly coded"
    assert "lost or not found" in unended["note"]
    assert verdicts(made_metrics((-1, 1), (-9, -4)), met=1.1)["answer"].tolist() == ["cannot tell"]


def test_of_errors_less_is_better() -> None:
    found = verdicts(made_metrics((-30, -20), (5, 10), "hue_error")).iloc[0]
    assert (found["answer"], found["low"], found["high"]) == ("non-linearly coded", 20, 30)
    assert verdicts(made_metrics((20, 30), (5, 10), "hue_error"))["answer"].tolist() == ["cannot tell"]
    assert verdicts(made_metrics((-30, -20), (15.1, 40), "hue_error"))["answer"].tolist() == ["lost"]


def test_another_layers_state_is_judged_over_all_pairs() -> None:
    def told(gain: tuple[float, float], loss: tuple[float, float]) -> str:
        rows = [
            made_row("cross_psnr_difference", *gain, against="modular", tap=None),
            made_row("cross_psnr_difference", 1, 2, against="modular", source_tap="far", target_tap="near"),
            made_row("cross_loss", *loss, tap=None, against=None),
        ]
        found = verdicts(pd.DataFrame(rows))
        assert found["question"].tolist() == [QUESTIONS["cross_psnr"].name]
        return str(found["answer"].iloc[0])

    assert told((1, 2), (1, 2)) == "non-linearly coded"
    assert told((1, 2), (3.1, 9)) == "lost"
    assert told((-1, 2), (1, 2)) == "cannot tell"


def test_verdicts_need_a_gain() -> None:
    with pytest.raises(BacksightError, match="no gain of MAP"):
        verdicts(made_metrics((6, 8)).query("measure == 'depth_cost'"))
