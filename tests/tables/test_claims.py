"""The verdicts follow from the values; the page is made from them and says nothing else."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from study_tables import REAL, tables, write_run, write_study

from backsight.app.cli import main
from backsight.tables.claims import UNMEASURED, findings, read_claims, render_findings
from backsight.tables.judge import AGREED, DISAGREED, UNDECIDED, Claim
from backsight.tables.read import Study, read_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return read_study(write_study(tmp_path_factory.mktemp("results")))


@pytest.fixture(scope="module")
def judged(study: Study) -> pd.DataFrame:
    return findings(study)


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        ("deep stages lose the texture", {"scenes-vit": AGREED, "scenes-detr": AGREED}),
        ("deep stages keep the shape", {"scenes-vit": AGREED, "scenes-detr": AGREED}),
        ("DETR discards more background than ViT", {"scenes-detr": AGREED}),
        ("DETR discards more object colour than ViT", {"scenes-detr": AGREED}),
        ("ViT's layers speak one code more than DETR's", {"scenes-detr": AGREED}),
        ("of what they show, ViT's layers share more than DETR's", {"scenes-detr": AGREED}),
        ("DETR is more robust to colour", {"scenes-detr": AGREED}),
        ("deep stages care less about the colour shown", {"scenes-vit": AGREED, "scenes-detr": AGREED}),
        ("recoloured objects revert to their class's colour", {"scenes-vit": DISAGREED, "scenes-detr": DISAGREED}),
        ("the modular chain is as good as direct decoders", {"scenes-vit": AGREED, "scenes-detr": AGREED}),
        ("the modular chain is more efficient", {"scenes-vit": AGREED, "scenes-detr": AGREED}),
        ("joint tuning makes a target more invertible", {"scenes-vit": AGREED, "scenes-detr": AGREED}),
        ("invertibility costs accuracy", {"scenes-vit": AGREED, "scenes-detr": AGREED}),
        ("what decoders do not show is lost", {"scenes-vit": DISAGREED, "scenes-detr": DISAGREED}),
    ],
)
def test_every_claim_finds_what_the_values_hold(judged: pd.DataFrame, claim: str, expected: dict[str, str]) -> None:
    rows = judged[(judged["claim"] == claim) & (judged["pictures"] == "scenes")]
    assert dict(zip(rows["target"], rows["verdict"], strict=True)) == expected, rows.T.to_string()


def test_all_claims_have_a_source_a_caution_and_one_border() -> None:
    for claim in read_claims():
        assert claim.source
        assert claim.caution
        assert claim.unit
        assert sum(border is not None for border in (claim.above, claim.below, claim.within)) == 1


def recomputed(values: pd.DataFrame, claim: Claim, target: str) -> float:
    """The number of a row of the page by other means: a table of images and seeds, and its mean."""
    rows = values[(values["notebook"] == claim.notebook) & values["measure"].isin(np.atleast_1d(claim.rows["measure"]))]
    rows = rows[rows["tap"] != "predictions"].astype({"value": float})  # they are stored as float32
    rows = rows.dropna(axis="columns", how="all").assign(**rows[["tap", "depth", "inverse"]])
    if "inverse" not in {*claim.rows, *claim.against}:
        rows = rows[~rows["inverse"].astype(str).str.startswith("null_")]
    for column, value in claim.rows.items():
        if column not in {*claim.against, "target"}:
            rows = rows[rows[column].isin(value if isinstance(value, list) else [value])]
    own, other = rows[rows["target"] == target], rows[rows["target"] == claim.against.get("target", target)]
    for column, value in claim.against.items():
        if column not in ("target", "tap"):
            own, other = own[own[column] == claim.rows[column]], other[other[column] == value]
    if "family" in other and str(claim.against.get("inverse", "")).startswith("null_"):  # of that very family
        other = other[other["family"].isna() | (other["family"] == claim.rows["inverse"])]
    taps = [part.sort_values("depth")["tap"].dropna().unique() for part in (own, other)]
    if claim.tap == "last":
        own = own[own["tap"] == taps[0][-1]]
        other = other[other["tap"] == taps[1][0 if claim.against.get("tap") else -1]]
    index = ["train_seed", "image", *({"hue_shift"} & set(claim.rows))]  # pairs are of the same colour, too
    tables = [part.pivot_table(index=index, values="value") for part in (own, other)]
    weights = own.pivot_table(index=index, values="weight")["weight"]  # of octaves: the power that the image has there
    if not claim.against:
        return float(np.average(tables[0]["value"], weights=weights))
    if (other["train_seed"] == -1).all():
        tables[1] = tables[1].droplevel("train_seed")
    differences = (tables[0]["value"] - tables[1]["value"]).dropna()
    return float(np.average(differences, weights=weights[differences.index]))


def test_real_pictures_are_judged_apart_by_rules_of_their_own(tmp_path: Path, judged: pd.DataFrame) -> None:
    """The rows of scenes, their p values too, are the same with and without them."""
    for run, notebook, values in tables(targets=("scenes-vit", "scenes-detr", *REAL)):
        write_run(tmp_path / run, notebook, values)
    study = read_study(tmp_path)
    table = findings(study)
    real = table[(table["pictures"] == "real") & (table["verdict"] != UNMEASURED)]
    assert set(real["target"]) == set(REAL)
    by_claim = real.set_index("claim")["verdict"]
    expected = {
        "deep stages lose the texture": AGREED,  # in the finest octave, by 0.9
        "deep stages keep the shape": DISAGREED,  # a tenth of a coarse octave, where a fifth is asked
        "of what they show, ViT's layers share more than DETR's": AGREED,  # of the real one alone: less than half lost
        "the modular chain is as good as direct decoders": AGREED,
        "what decoders do not show is lost": DISAGREED,
    }
    assert by_claim[list(expected)].to_dict() == expected
    of_scenes = [rows[rows["pictures"] == "scenes"].reset_index(drop=True) for rows in (table, judged)]
    pd.testing.assert_frame_equal(*of_scenes, check_dtype=False)
    page = render_findings(study, table)
    assert "| claim | source | scenes | real |" in page
    assert "of real pictures: error power over image power" in page
    measured = table[table["verdict"] != UNMEASURED].groupby(["claim", "pictures"])
    assert page.count("Do not conclude") == measured.ngroups  # of what nobody measured there is nothing to conclude
    for claim in (claim for claim in read_claims() if claim.pictures == "real"):
        for row in real[real["claim"] == claim.claim].itertuples():
            value = recomputed(study.values([claim.notebook]), claim, row.target)
            np.testing.assert_allclose(row.value, value, rtol=1e-6, atol=1e-6)


NAMES = [f"{claim.claim}, {claim.pictures}" for claim in read_claims()]


@pytest.mark.parametrize("claim", read_claims(), ids=NAMES)
def test_a_number_of_the_page_is_the_mean_of_stored_values(study: Study, judged: pd.DataFrame, claim: Claim) -> None:
    rows = judged[(judged["claim"] == claim.claim) & (judged["pictures"] == claim.pictures)].dropna(subset="value")
    for row in rows.itertuples():
        expected = recomputed(study.values([claim.notebook]), claim, row.target)
        np.testing.assert_allclose(row.value, expected, rtol=1e-6, atol=1e-6)


def test_an_image_counts_once_a_turn_of_its_hue(study: Study, judged: pd.DataFrame) -> None:
    """The row of all turns stood beside the single ones, and counted with them."""
    deepest = judged[judged["claim"] == "DETR discards more object colour than ViT"].iloc[0]
    assert deepest["value"] == pytest.approx(25.0 * 4 - 10.0 * 3, abs=1.5)


def test_a_claim_turns_when_the_values_turn(tmp_path: Path) -> None:
    for run, notebook, values in tables(("03_quality",)):
        swapped = values.assign(inverse=values["inverse"].replace({"modular": "direct", "direct": "modular"}))
        write_run(tmp_path / run, notebook, swapped)
    table = findings(read_study(tmp_path))
    as_good = table[table["claim"] == "the modular chain is as good as direct decoders"].dropna(subset="value")
    assert set(as_good["verdict"]) == {DISAGREED}


def test_one_training_seed_decides_nothing_of_trained_inverses(tmp_path: Path) -> None:
    for run, notebook, values in tables(("03_quality", "05_colour")):
        write_run(tmp_path / run, notebook, values[values["train_seed"] < 1])
    table = findings(read_study(tmp_path)).query("pictures == 'scenes'").set_index("claim")
    assert set(table.loc["deep stages keep the shape", "verdict"]) == {UNDECIDED}
    assert table.loc["DETR is more robust to colour", "verdict"] == AGREED  # no inverse is in it


def test_what_no_run_measured_says_so(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, ("10_tradeoff",)))
    table = findings(study)
    assert set(table[table["notebook"] != "10_tradeoff"]["verdict"]) == {UNMEASURED}
    assert "No run of `03_quality` measured it." in render_findings(study, table)


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "runs", ("10_tradeoff",))
    page = tmp_path / "FINDINGS.md"
    assert main(["findings", str(folder), str(page)]) == 0
    study = read_study(folder)
    assert page.read_text(encoding="utf-8") == render_findings(study, findings(study))


def test_the_committed_page_is_made_of_the_committed_values() -> None:
    root = Path(__file__).resolve().parents[2]
    study = read_study(root / "results" / "reference")
    table = findings(study)
    assert render_findings(study, table) == (root / "FINDINGS.md").read_text(encoding="utf-8")
    measured = table[table["verdict"] != UNMEASURED]
    assert len(measured)
    by_name = {(claim.claim, claim.pictures): claim for claim in read_claims()}
    measures = {measure for claim in by_name.values() for measure in np.atleast_1d(claim.rows["measure"])}
    values = study.values(set(measured["notebook"]), measures)
    for row in measured.itertuples():
        value = recomputed(values, by_name[row.claim, row.pictures], row.target)
        np.testing.assert_allclose(row.value, value, rtol=1e-6, atol=1e-6)
