"""The page over a folder of runs: self-contained, true to the tables, and plain about what is missing."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd
import pytest
import torch
from PIL import Image
from report_runs import DETR, VIT, FrameTarget, made_up_frames, rows, save_png, save_results, save_run

from backsight.app import report
from backsight.app.frames import save_frames, strips
from backsight.app.report import write_report
from backsight.errors import BacksightError


class Page(HTMLParser):
    """What the tests ask of the page: elements with attributes, text, and text by table cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "link", "br", "wbr", "input"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_results(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    path = write_report(folder)
    first = path.read_bytes()
    assert write_report(folder).read_bytes() == first  # the same runs, the same page
    assert path == folder / "index.html"
    return Page(first.decode("utf-8"))


def test_the_page_asks_no_other_host_for_anything(folder: Path, page: Page) -> None:
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    assert not [script for script in page.all("script") if "src" in script]
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert page.open == []
    assert not list(folder.glob(".*"))  # no temporary file stays


def test_figures_are_linked_and_frames_are_inside(folder: Path, page: Page) -> None:
    images = [image for image in page.all("img") if "src" in image]
    linked = [str(image["src"]) for image in images if not str(image["src"]).startswith("data:image/png;base64,")]
    assert len([attributes for _, attributes in page.elements if attributes.get("class") == "strip"]) == 6
    assert linked == [
        "quickstart/figures/scenes-vit.png",
        "quality-vit/figures/pictures-modular.png",
        "quality-vit/figures/psnr.png",
    ]
    for image in images:
        assert int(image["width"] or 0) > 0
        assert int(image["height"] or 0) > 0
        assert image["alt"]
    assert "Pictures modular, scenes." in page.text


def test_damaged_frames_are_told_and_the_page_is_made_all_the_same(tmp_path: Path) -> None:
    run = save_run(tmp_path / "quickstart", "00_quickstart", {"targets": [VIT]})
    lost = made_up_frames(run)["file"].iloc[0]
    (run / lost).unlink()
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Pictures by depth are missing" in page.text
    assert lost in page.text
    assert len([attributes for _, attributes in page.elements if attributes.get("class") == "strip"]) == 5


def test_frames_come_back_as_they_were_written(tmp_path: Path) -> None:
    table = made_up_frames(tmp_path / "run").assign(run="run")
    files = pd.concat([table["file"], table["input"]]).unique()
    assert sorted(path.relative_to(tmp_path / "run").as_posix() for path in tmp_path.rglob("*.png")) == sorted(files)
    first = table[(table["target"] == VIT) & (table["tap"] == "patch_embed") & (table["measure"] == "psnr")].iloc[0]
    # Nine tenths of the way from grey: the error is a tenth of the image's own.
    image = torch.linspace(0, 1, 2 * 768)[:768]
    expected = -10 * torch.log10((0.1 * (image - 0.5)).square().mean()).item()
    assert first["value"] == pytest.approx(expected, abs=1e-3)
    with Image.open(tmp_path / "run" / first["file"]) as picture:
        assert picture.size == (16, 16)
    told, problems = strips(tmp_path, table)
    assert not problems
    assert [(strip["target"], strip["family"], len(strip["steps"])) for strip in told[:1]] == [(VIT, "linear", 3)]
    assert {strip["picture"] for strip in told} == {"chelsea", "scene 22 hue 240"}
    assert len({step["image"] for strip in told for step in strip["steps"]}) == 2 * 3  # two families, and two targets


def test_frames_of_a_large_target_are_made_smaller(tmp_path: Path) -> None:
    images = torch.rand(1, 3, 300, 400)
    rows = save_frames(tmp_path, FrameTarget(VIT), ["chelsea"], images, {"linear": {"norm": images}}, seed=0)  # type: ignore[arg-type]
    sizes = [Image.open(path).size for path in tmp_path.rglob("*.png")]
    assert sizes == [(256, 192)] * 2
    assert rows[0]["value"] == 100  # dB, the most there is: of the reconstruction itself


def test_no_path_leads_out_of_the_runs_folder(tmp_path: Path) -> None:
    table = made_up_frames(tmp_path / "run").assign(run="run")
    save_png(tmp_path / "secret.png")
    _, problems = strips(tmp_path, table.assign(file="../secret.png"))
    assert problems
    assert all("secret" in problem for problem in problems)


def test_names_that_come_out_alike_get_files_of_their_own(tmp_path: Path) -> None:
    table = made_up_frames(tmp_path, ("scene 1", "scene 1 hue 0"))
    assert table["file"].nunique() * 2 == len(table)


def test_every_link_leads_somewhere(folder: Path, page: Page) -> None:
    anchors = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [str(link["href"]) for link in page.all("a")]
    assert "quality-vit/03_quality.ipynb" in links
    assert "quality-vit/metrics.csv" in links
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (folder / unquote(link)).is_file(), link


def test_tables_hold_the_rounded_numbers_of_the_quality_run(folder: Path, page: Page) -> None:
    cells = [" ".join(cell.split()) for cell in page.cells]
    start = cells.index("patch_embed")
    row = cells[start : start + 5]
    assert row == [
        "patch_embed",
        "31.8 31.4 to 32.2",
        "33.2 32.8 to 33.6",
        "33.6 33.2 to 34.0",
        "12.6 12.2 to 13.0",
    ]
    assert "<strong>33.6</strong>" in (folder / "index.html").read_text(encoding="utf-8")  # the best family of the row
    assert "<strong>33.2</strong>" not in (folder / "index.html").read_text(encoding="utf-8")
    assert "38.6" not in page.text  # the training run's validation scores are not mixed in
    assert "n = 500, training seeds: 1, data set photographs, split test, shipped weights" in page.text
    assert "mse" not in page.text


def test_a_name_with_markup_is_shown_and_not_executed(page: Page) -> None:
    assert DETR in page.text
    assert not page.all("b <b>")


def test_what_is_missing_is_said_and_nothing_of_it_is_shown(page: Page) -> None:
    words = " ".join(page.text.split())
    assert "Missing from this page: quality-detr (it was started and did not finish)" in words
    assert "quality-odd (its metrics.csv lacks the columns low)." in words
    assert "notes" not in words


def test_run_facts_are_told(page: Page) -> None:
    cells = [" ".join(cell.split()) for cell in page.cells]
    assert "2 min 05 s fit 1 min 01 s" in cells
    assert "quality-vit 2026-02-01 10:00:00 UTC commit 0123456789 + changes" in cells
    assert "Hardware: a processor, 2 cores, 16 GiB." in page.text


def test_metrics_of_all_runs_are_one_table(folder: Path, page: Page) -> None:
    table = pd.read_csv(folder / "metrics.csv")
    assert list(table.columns[:3]) == ["target", "weights", "dataset"]
    assert table.columns[-1] == "run"
    sizes = table.groupby("run").size().to_dict()
    assert sizes.pop("quickstart") == 2 * 2 * (3 + 3 + 2)
    assert sizes == dict.fromkeys(
        ("quality-vit", "quality-vit-photographs", "train-vit", "train-detr", "train-detr-again"), 24
    )


def test_nulls_of_several_families_count_once() -> None:
    """Every family brings its own shuffled and untrained nulls: a table shows those of the chain."""
    table = rows(VIT).assign(run="a", seeds=3, family=float("nan"))
    null = table[table.inverse == "linear"].assign(inverse="null_shuffled")
    nulls = [null.assign(family=family, value=null.value + place) for place, family in enumerate(["linear", "modular"])]
    for order in (nulls, nulls[::-1]):
        run = report.PageRun(folder=Path("a"), notebook="03_quality", table=pd.concat([table, *order]))
        shown = report._depth_rows(run, VIT)
        shown_nulls = shown.query("inverse == 'null_shuffled'")
        assert set(shown_nulls.family) == {"modular"}
        assert not shown_nulls.duplicated(["tap", "measure"]).any()
        assert len(shown) == len(table[table.measure != "mse"]) + len(shown_nulls)


def test_a_table_says_of_how_many_seeds_the_untrained_target_is() -> None:
    """The largest number of seeds stood above all columns, and an interval of one seed beside those of three."""
    table = rows(VIT).query("measure == 'psnr'").assign(seeds=3, run="a")
    untrained = table[table.inverse == "modular"].assign(inverse="null_untrained", seeds=1)
    facts = report._depth_table(pd.concat([table[table.inverse == "modular"], untrained]))["facts"]
    assert "training seeds: 3, of the untrained target: 1, data set" in facts


def test_claims_stand_beside_the_reference_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference run decides; what only one of the two measured is told as such."""
    known = {
        "claim": ["deep keeps shape"] * 2,
        "pictures": "scenes",
        "target": VIT,
        "tap": ["norm", "blocks.0"],
        "unit": "dB",
        "seeds": 1,
    }
    here = pd.DataFrame({**known, "value": [1.0, 2.0], "low": 0.5, "high": 3.0, "n": 24, "verdict": "cannot tell"})
    there = here.assign(value=[7.0, float("nan")], low=6.0, high=8.0, n=100, seeds=3, verdict="agreed")
    for name in ("here", "there"):
        save_run(tmp_path / name / "quality-vit", "03_quality", {"target": VIT}, rows(VIT))
    monkeypatch.setattr(report, "study_folder", lambda: tmp_path / "there")
    monkeypatch.setattr(report, "findings", lambda study: here if study.folder.name == "here" else there)
    cells = [" ".join(cell.split()) for cell in Page(write_report(tmp_path / "here").read_text()).cells]
    start = cells.index("deep keeps shape dB")
    assert cells[start + 1 : start + 4] == [
        f"{VIT} norm",
        "+1.00 [+0.50, +3.00] n = 24, training seeds: 1",
        "+7.00 [+6.00, +8.00] n = 100, training seeds: 3 agreed",
    ]
    assert cells[start + 7] == "not measured"
    assert "deep keeps shape" not in write_report(tmp_path / "there").read_text()
    (tmp_path / "there" / "quality-vit" / "run.json").unlink()  # just being remade
    assert "deep keeps shape" not in write_report(tmp_path / "here").read_text()


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BacksightError, match="is not a folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(BacksightError, match="holds no finished run"):
        write_report(tmp_path)
    save_run(tmp_path / "quickstart", "00_quickstart", {}, status=None)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    with pytest.raises(BacksightError, match="holds no finished run"):
        write_report(tmp_path)
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize(
    ("changed", "table"),
    [
        *(({"parameters": value}, {}) for value in ([1], "x")),
        *(({"weights": value}, {}) for value in (["a"], "a", {VIT: "a"})),
        *(({"seconds": value}, {}) for value in ([1], {"total": "long"})),
        *(({"hardware": "pc"}, {}), ({"versions": ["a"]}, {}), ({"commit": 5}, {})),
        *(({}, {column: "word"}) for column in ("value", "low", "high")),
    ],
)
def test_a_damaged_run_is_named_and_the_page_is_made_all_the_same(tmp_path: Path, changed: Any, table: Any) -> None:
    save_run(tmp_path / "whole", "03_quality", {"target": VIT}, rows(VIT))
    run = save_run(tmp_path / "damaged", "03_quality", {"target": VIT}, rows(VIT).astype(object).assign(**table))
    record = json.loads((run / "run.json").read_text()) | changed
    (run / "run.json").write_text(json.dumps(record))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "damaged" in text
    assert ("its run.json is damaged" in text) == bool(changed)
    assert ("its metrics.csv cannot be read" in text) == bool(table)


@pytest.mark.parametrize("changed", [{"hardware": {"cores": "x"}}])
def test_odd_words_in_a_record_do_not_cost_the_page(tmp_path: Path, changed: dict[str, Any]) -> None:
    run = save_run(tmp_path / "odd", "03_quality", {"target": VIT}, rows(VIT))
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | changed))
    assert "odd" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_damaged_run_of_the_figures_is_named_too(tmp_path: Path) -> None:
    save_run(tmp_path / "whole", "03_quality", {"target": VIT}, rows(VIT))
    save_run(tmp_path / "figures", "07_figures", [1])  # type: ignore[arg-type]
    assert "figures (its run.json is damaged)" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_table_without_a_value_is_no_table(tmp_path: Path) -> None:
    save_run(tmp_path / "quality", "03_quality", {"target": VIT}, rows(VIT).assign(value=float("nan")))
    assert write_report(tmp_path).is_file()


@pytest.mark.parametrize("name", ["index.html", "metrics.csv"])
def test_files_that_are_not_of_backsight_are_left_alone(tmp_path: Path, name: str) -> None:
    save_run(tmp_path / "quality", "03_quality", {"target": VIT}, rows(VIT))
    (tmp_path / name).write_text("mine")
    with pytest.raises(BacksightError, match=name):
        write_report(tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()
    assert write_report(tmp_path) == write_report(tmp_path)  # its own it replaces


def test_a_figure_belongs_to_the_longest_name_that_its_own_holds(tmp_path: Path) -> None:
    measured = pd.concat([rows("vit_base"), rows("org/vit_base.mae")])
    run = save_run(tmp_path / "both", "03_quality", {}, measured)
    save_png(run / "figures" / "psnr-org-vit_base.mae.png")
    (section,) = write_report(tmp_path).read_text(encoding="utf-8").split('id="target-org-vit_base.mae"')[1:]
    assert "both/figures/psnr-org-vit_base.mae.png" in section.split("</section>")[0]


def test_a_target_that_could_not_be_had_has_no_section(tmp_path: Path) -> None:
    save_run(tmp_path / "quickstart", "00_quickstart", {"targets": ["dinov2-small", VIT]}, rows(VIT))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert f'id="target-{VIT}"' in page
    assert 'id="target-dinov2-small"' not in page


def test_a_run_without_a_table_is_on_the_page(folder: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "quality", "03_quality", {"target": VIT}, rows(VIT))
    save_run(tmp_path / "targets", "18_targets", {})
    assert "18_targets.ipynb" in write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("notebook", "heading"),
    [
        ('{"cells": [{"source": ["# How much?\\n", "By this."]}]}', "How much?"),
        ("{", "03_quality"),
        ("{}", "03_quality"),
    ],
)
def test_a_section_is_called_by_the_question_of_its_notebook(tmp_path: Path, notebook: str, heading: str) -> None:
    run = save_run(tmp_path / "quality", "03_quality", {"target": VIT}, rows(VIT), {"psnr": ""})
    (run / "03_quality.ipynb").write_text(notebook)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert f'<h3 id="target-{VIT}-study-1">{heading}</h3>' in page
