"""The verdicts follow from the intervals; the page is made from the tables and says nothing else."""

import math
from pathlib import Path

import pandas as pd
import pytest
from study_tables import DETR_TAPS, tables, write_study

from backsight.app.cli import main
from backsight.tables.claims import (
    AGREED,
    CLAIMS,
    DISAGREED,
    FINDING_COLUMNS,
    UNDECIDED,
    UNMEASURED,
    findings,
    render_findings,
    verdict,
)
from backsight.tables.estimates import Estimate, difference, log_ratio
from backsight.tables.evidence import AS_GOOD, deep_taps, shallowest
from backsight.tables.read import Study, read_study


def estimate(value: float, half: float = 1.0, seeds: int = 3) -> Estimate:
    return Estimate(value, value - half, value + half, 50, seeds, ("run",))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return read_study(write_study(tmp_path_factory.mktemp("results")))


@pytest.fixture(scope="module")
def found(study: Study) -> pd.DataFrame:
    return findings(study)


def claim_rows(table: pd.DataFrame, key: str) -> pd.DataFrame:
    rows = table[table["claim"] == key]
    assert len(rows), f"no claim {key}"
    return rows


def test_a_difference_of_equal_intervals_is_wider_by_the_root_of_two() -> None:
    found = difference(estimate(5), estimate(2))
    assert found is not None
    assert found.value == 3
    assert found.low == pytest.approx(3 - math.sqrt(2))
    assert found.high == pytest.approx(3 + math.sqrt(2))
    assert difference(estimate(5), None) is None


def test_a_difference_has_the_fewer_seeds_and_both_runs() -> None:
    second = Estimate(1, 0, 2, 20, 1, ("other",))
    found = difference(estimate(5), second)
    assert found is not None
    assert (found.n, found.seeds, found.runs) == (20, 1, ("run", "other"))


def test_ratios_need_positive_intervals() -> None:
    assert log_ratio(estimate(0.5), estimate(4)) is None
    found = log_ratio(estimate(8), estimate(4))
    assert found is not None
    assert found.value == pytest.approx(1)
    assert found.low < 1 < found.high


@pytest.mark.parametrize(
    ("value", "half", "seeds", "trained", "expected"),
    [
        (3, 1, 3, True, AGREED),
        (-3, 1, 3, True, DISAGREED),
        (0.5, 1, 3, True, UNDECIDED),
        (3, 1, 1, True, UNDECIDED),
        (3, 1, 1, False, AGREED),
        (3, math.nan, 3, True, UNDECIDED),
        (1, 1, 3, True, UNDECIDED),  # an interval that touches the border decides nothing
    ],
)
def test_the_verdict_is_the_intervals(value: float, half: float, seeds: int, trained: bool, expected: str) -> None:
    assert verdict(estimate(value, half, seeds), trained=trained)[0] == expected


def test_a_border_below_zero_grants_equality() -> None:
    assert verdict(estimate(0, 0.3), border=-0.5)[0] == AGREED
    assert verdict(estimate(0, 0.3))[0] == UNDECIDED


def test_a_detector_ends_twice() -> None:
    rows = pd.DataFrame({"tap": list(reversed(DETR_TAPS)), "depth": list(reversed(range(len(DETR_TAPS))))})
    assert deep_taps(rows) == {"encoder end": "encoder.layers.1", "decoder end": "decoder.layers.1"}
    assert shallowest(rows) == "backbone"
    assert deep_taps(pd.DataFrame({"tap": ["blocks.0", "norm"], "depth": [0, 1]})) == {"last tap": "norm"}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("shallow layers keep texture and colour", {AGREED}),
        ("deep layers keep shape", {AGREED}),
        ("DETR discards more detail than ViT", {AGREED}),
        ("ViT's layers correlate more than DETR's", {AGREED}),
        ("DETR is more robust to colour", {AGREED}),
        ("reconstructions revert to the prototype's colour", {UNDECIDED}),
        ("the modular chain is as good as direct decoders", {AGREED}),
        ("the modular chain is more efficient", {AGREED}),
        ("joint fine-tuning makes a target more invertible", {AGREED}),
        ("invertibility costs accuracy", {AGREED}),
        ("what decoders lose with depth is lost", {AGREED}),
    ],
)
def test_every_claim_finds_what_the_tables_hold(found: pd.DataFrame, key: str, expected: set[str]) -> None:
    rows = claim_rows(found, key)
    assert set(rows["verdict"]) == expected, rows[["measured", "value", "low", "high", "verdict"]].to_string()


def test_a_claim_turns_when_the_numbers_turn(tmp_path: Path) -> None:
    for name, table in tables(("quality", "modular_vs_direct")):
        swapped = table.assign(inverse=table["inverse"].replace({"modular": "direct", "direct": "modular"}))
        (tmp_path / name).mkdir()
        swapped.to_csv(tmp_path / name / "metrics.csv", index=False)
    as_good = claim_rows(findings(read_study(tmp_path)), "the modular chain is as good as direct decoders")
    assert set(as_good["verdict"]) == {DISAGREED}


def test_what_the_model_itself_gives_back_was_never_lost(tmp_path: Path) -> None:
    for name, table in tables(("exact", "noise")):
        (tmp_path / name).mkdir()
        gained = table.assign(value=table["value"].replace({0.1: 0.9, 1.0: 8.0}))
        moved = gained["value"] - table["value"]
        gained = gained.assign(low=table["low"] + moved, high=table["high"] + moved)
        gained.to_csv(tmp_path / name / "metrics.csv", index=False)
    rows = claim_rows(findings(read_study(tmp_path)), "what decoders lose with depth is lost")
    assert set(rows["verdict"]) == {DISAGREED}
    assert len(rows) == 2 * (2 + 1)


def test_the_two_targets_can_agree_on_colour_and_differ_in_depth(found: pd.DataFrame) -> None:
    rows = claim_rows(found, "deep stages care less about the shown colour")
    assert set(rows.loc[rows["target"] == "scenes-vit", "verdict"]) == {AGREED}
    against = rows[rows["target"] == "scenes-detr / scenes-vit"].set_index("measured")
    assert list(against["value"].round(6)) == [2 - 3, 4 - 3]


def test_what_no_run_measured_says_so(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, ("quality",)))
    table = findings(study)
    assert list(table.columns) == list(FINDING_COLUMNS)
    rows = table[table["claim"] == "ViT's layers correlate more than DETR's"]
    assert list(rows["verdict"]) == [UNMEASURED]
    assert "04_cross_layer" in rows["why"].iloc[0]
    assert "**not measured**: no run of `04_cross_layer`" in render_findings(study)


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    for name, table in tables(("quality",)):
        (tmp_path / name).mkdir()
        table.drop(columns="seeds").to_csv(tmp_path / name / "metrics.csv", index=False)
    rows = claim_rows(findings(read_study(tmp_path)), "the modular chain is as good as direct decoders")
    assert set(rows["verdict"]) == {UNDECIDED}
    assert rows["why"].str.contains("1 training seed").all()


def test_the_page_names_every_claim_run_and_caution(study: Study) -> None:
    text = render_findings(study)
    for claim in CLAIMS:
        assert claim.text in text
        assert f"**Do not conclude:** {claim.caution}" in text
    for run in ("quality-scenes-vit", "cross_layer-scenes-detr", "tradeoff-scenes-vit"):
        assert f"`{run}`" in text
    assert "nan" not in text


def test_no_result_is_typed(tmp_path: Path) -> None:
    text = render_findings(read_study(write_study(tmp_path, ("tradeoff",))), claims=CLAIMS[:9])
    body = text.split("## 1.", 1)[1]
    for unit in (" dB", " degrees", "R²", " accuracy |"):
        assert unit not in body.replace(f"{AS_GOOD} dB", ""), "a number stands in a claim that no run measured"


def test_the_command_writes_or_says_what_is_wrong(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["findings", str(study.folder), str(tmp_path / "FINDINGS.md")]) == 0
    assert (tmp_path / "FINDINGS.md").read_text(encoding="utf-8").startswith("# Findings")
    assert main(["findings", str(tmp_path / "absent"), str(tmp_path / "x.md")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_the_committed_page_is_what_the_reference_tables_give(root: Path) -> None:
    page = root / "FINDINGS.md"
    assert render_findings(read_study(root / "results" / "reference")) == page.read_text(encoding="utf-8")
