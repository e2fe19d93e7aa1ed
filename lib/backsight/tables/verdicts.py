"""What became of what a trained decoder does not read: lost, fragile, non-linearly coded, or not to be told.

From the tables of `restated.measure_restated` and `stability.measure_stability`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from backsight.errors import BacksightError
from backsight.tables.names import LEADING_FAMILIES, LOWER_IS_BETTER, MAP

SMALL_NOISES = ("int8", "gaussian 0.1")
HALVED = 0.5


@dataclass(frozen=True)
class Question:
    """name; allowed: how far MAP may fall below the shallowest tap before it counts as lost; least: gain that is worth
    telling; both in the measure's unit.
    """

    name: str
    allowed: float
    least: float


ANSWERS = ("lost", "fragile", "non-linearly coded", "cannot tell")
LOST, FRAGILE, CODED, CANNOT_TELL = ANSWERS
QUESTIONS: Mapping[str, Question] = {
    "psnr": Question("detail", 3.0, 0.5),
    "psnr_background": Question("background", 3.0, 0.5),
    "psnr_objects": Question("objects", 3.0, 0.5),
    "edge_f1": Question("edges", 0.1, 0.02),
    "texture_accuracy": Question("texture", 0.1, 0.02),
    "hue_error": Question("hue", 15.0, 2.0),
    "hue_shift_kept": Question("hue shift", 0.1, 0.02),
    "colour_follow": Question("hue shift, with its chroma", 0.1, 0.02),
    "cross_psnr": Question("another layer's state", 3.0, 0.5),
}


@dataclass(frozen=True)
class _Interval:
    value: float
    low: float
    high: float
    n: int
    seeds: int

    @classmethod
    def of(cls, row: pd.Series, sign: float = 1.0) -> _Interval:
        low, high = (row["low"], row["high"]) if sign > 0 else (-row["high"], -row["low"])
        seeds = 1 if pd.isna(row["seeds"]) else int(row["seeds"])
        return cls(sign * float(row["value"]), float(low), float(high), int(row["n"]), seeds)

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def verdicts(metrics: pd.DataFrame, stability: pd.DataFrame | None = None, met: float = math.inf) -> pd.DataFrame:
    """What became of what the trained decoder does not read: one row for each question, target and tap.

    metrics: of `measure_restated`; stability: metrics of `measure_stability`, for what small noise leaves of the gain.
    met: largest misfit at which a search counts as ended (1: the state is met as closely as its noise says).
    Rule, on 95 % intervals, all differences turned so that more is better, in this order:
      lost                 MAP here − MAP at the shallowest tap: the upper end is below −allowed (`QUESTIONS`: 3 dB; 0.1
                           of a share; 15° of hue), and the misfit here is at most `met` (by default any is).
                           Another layer's state: below MAP of that layer's own state.
      cannot tell          the gain, MAP − modular (else direct, else linear), has its lower end at or below `least`
                           (0.5 dB; 0.02 of a share; 2° of hue): the trained decoder reads as much.
      fragile              at int8 or at Gaussian noise 0.1 the gain's upper end is below half its lower end at float32.
      cannot tell          at one of these noises the gain's lower end is at or below 0.
      non-linearly coded   else: there is a gain, and small noise, where it was measured, leaves it.
    value, low, high: the interval that decided, `measured` says of what. Stability is measured in PSNR: it can call
    "detail" fragile and nothing else; `note` says where noise was not looked at, and how much of a loss is coded.
    "lost" means lost to a MAP inverse of float32 states: a search that did not end loses what is there, and its misfit
    is in the note.
    Raises BacksightError where the table holds no gain of MAP.
    """
    gains = metrics[(metrics["inverse"] == MAP) & metrics["measure"].isin([f"{each}_difference" for each in QUESTIONS])]
    if gains.empty:
        raise BacksightError("the table has no gain of MAP over a trained inverse: give metrics of measure_restated.")
    rows = []
    for measure, question in QUESTIONS.items():
        own = gains[gains["measure"] == f"{measure}_difference"]
        if measure == "cross_psnr":
            own = own[own["tap"].isna()]  # the mean over pairs
        for key, at in own.groupby(["target", "tap"], sort=False, dropna=False):
            against = next((name for name in LEADING_FAMILIES if (at["against"] == name).any()), at["against"].iloc[0])
            row = at[at["against"] == against].iloc[0]
            answer = _answer(measure, question, row, str(against), metrics[metrics["target"] == key[0]], stability, met)
            told = {"question": question.name, "target": key[0], "tap": row["tap"], "depth": row["depth"], **answer}
            rows.append(told)
    columns = ["question", "target", "tap", "depth", "measured", "value", "low", "high", "n", "seeds", "answer", "note"]
    return pd.DataFrame(rows, columns=columns)


def _answer(
    measure: str,
    question: Question,
    row: pd.Series,
    against: str,
    metrics: pd.DataFrame,
    stability: pd.DataFrame | None,
    met: float,
) -> dict[str, Any]:
    sign = -1.0 if measure in LOWER_IS_BETTER else 1.0
    gain = _Interval.of(row, sign)
    said = f"{measure}: map − {against}" if sign > 0 else f"{measure}: {against} − map"
    below, than = _below(measure, row["tap"], metrics, sign)
    misfit = _misfit(row["tap"], metrics)
    search = "" if math.isnan(misfit) else f"; misfit of the search {misfit:.3g} (1: it met the state)"
    unsure = ""
    if below is not None and below.high < -question.allowed:
        coded = ", so that part of it is coded" if gain.low > question.least else ""
        if measure == "cross_psnr":
            coded = "; its own inverse reads it, so that what is lost is the code, not the content"
        if not misfit > met:
            return _told(below, f"{measure}: map here − {than}", LOST, f"{said}: {gain}{coded}{search}")
        unsure = f"; below {than} by {below}, lost or not found{search}"
    if not gain.low > question.least:
        return _told(gain, said, CANNOT_TELL, f"the trained decoder reads as much, as far as can be told{unsure}")
    noisy = _at_small_noise(measure, row, against, stability)
    if not noisy:
        return _told(gain, said, CODED, f"at float32: small noise was not looked at{unsure}")
    for noise, left in noisy.items():
        if left.high < HALVED * gain.low:
            return _told(left, f"{said}, at {noise}", FRAGILE, f"at float32: {gain}{unsure}")
    for noise, left in noisy.items():
        if not left.low > 0:
            return _told(left, f"{said}, at {noise}", CANNOT_TELL, f"at float32: {gain}{unsure}")
    return _told(gain, said, CODED, "; ".join(f"at {noise}: {left}" for noise, left in noisy.items()) + unsure)


def _misfit(tap: Any, metrics: pd.DataFrame) -> float:
    found = metrics[(metrics["measure"] == "misfit") & (metrics["tap"] == tap)]
    return float(found["value"].iloc[0]) if len(found) else math.nan


def _below(measure: str, tap: Any, metrics: pd.DataFrame, sign: float) -> tuple[_Interval | None, str]:
    """How far MAP lies below where nothing was lost yet (negative), and where that is."""
    of_map = metrics[metrics["inverse"] == MAP]
    if measure == "cross_psnr":
        found, sign, than = of_map[(of_map["measure"] == "cross_loss") & of_map["tap"].isna()], -1.0, "its own state"
    else:
        found = of_map[(of_map["measure"] == "depth_cost") & (of_map["of"] == measure) & (of_map["tap"] == tap)]
        than = f"at {found['against'].iloc[0]}" if len(found) else ""
    return (_Interval.of(found.iloc[0], sign), than) if len(found) else (None, than)


def _at_small_noise(measure: str, row: pd.Series, against: str, stability: pd.DataFrame | None) -> dict[str, _Interval]:
    if stability is None or measure != "psnr":
        return {}
    at = stability[
        (stability["target"] == row["target"])
        & (stability["tap"] == row["tap"])
        & (stability["inverse"] == MAP)
        & (stability["measure"] == "psnr_difference")
        & (stability["against"] == against)
        & stability["noise"].isin(SMALL_NOISES)
    ]
    return {str(each["noise"]): _Interval.of(each) for _, each in at.iterrows()}


def _told(decided: _Interval, measured: str, answer: str, note: str) -> dict[str, Any]:
    told = {name: getattr(decided, name) for name in ("value", "low", "high", "n", "seeds")}
    return {"measured": measured, **told, "answer": answer, "note": note}
