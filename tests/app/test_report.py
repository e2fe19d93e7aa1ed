"""The page over a folder of runs: self-contained, complete, true to the tables, and plain about what is missing."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd
import pytest
import torch
from PIL import Image
from report_runs import DETR, VIT, rows, save_frames, save_png, save_results, save_run

from backsight.app import report, report_tables
from backsight.app.frames import (
    FRAME_TABLE,
    frame_metrics,
    make_frames,
    read_frames,
    write_frames,
)
from backsight.app.report import write_report
from backsight.app.report_sources import read_lines
from backsight.errors import BacksightError

NUMBER = re.compile(r"[+−]?\d+(\.\d+)?")


class Page(HTMLParser):
    """What the tests ask of the page: elements with attributes, text by table cell, and the numbers with sources."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.numbers: list[tuple[dict[str, str | None], list[str]]] = []
        self.traced: list[bool] = []  # of each cell
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "link", "br", "wbr", "input"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
            self.traced.append(False)
        if tag == "a" and "data-rows" in dict(attrs):
            self.numbers.append((dict(attrs), []))
            self.traced[-1] = True

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        if self.numbers and self.open[-1] in ("b", "strong", "small") and "a" in self.open:
            self.numbers[-1][1].append(data)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "project_root", lambda: folder.parents[1])
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


def test_without_frames_the_first_picture_of_a_target_comes_first(tmp_path: Path) -> None:
    save_run(tmp_path / "quickstart", "00_quickstart", {"targets": [VIT]}, None, {VIT: "pictures of a cat"})
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert not [True for _, attributes in page.elements if attributes.get("id") == "player"]
    assert page.all("img")[0]["alt"] == "pictures of a cat"


def test_damaged_frames_are_told_and_the_page_is_made_all_the_same(tmp_path: Path) -> None:
    run = save_run(tmp_path / "quickstart", "00_quickstart", {"targets": [VIT]})
    (run / save_frames(run)[3].file).unlink()
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Pictures by depth are missing" in page.text
    assert "frames.csv, line 5: there is no file" in page.text


def recomputed(folder: Path, attributes: dict[str, Any], ledger: list[dict[str, Any]]) -> dict[str, float]:
    """{value, low, high} from the files themselves, by the lines that the page names."""

    def fields(cited: str) -> list[dict[str, str]]:
        found = []
        for each in cited.split():
            file, place = (int(part) for part in each.split(":"))
            path = folder / unquote(ledger[file]["link"])
            if path.suffix == ".json":
                entry = json.loads(path.read_text())["scores"][place - 1]
                found.append({key: str(value) for key, value in entry.items()})
            else:
                lines = path.read_text(encoding="utf-8").splitlines()
                header, line = (next(csv.reader([lines[at]])) for at in (0, place - 1))
                assert ledger[file]["rows"][str(place)] == line  # the page shows the row as it stands
                found.append(dict(zip(header, line, strict=True)))
        return found

    sources, minus = fields(attributes["data-rows"]), fields(attributes.get("data-minus") or "")
    column = attributes.get("data-column") or "value"

    def mean(part: list[dict[str, str]]) -> float:
        return sum(float(row[column]) for row in part) / len(part)

    result = {"value": mean(sources) - (mean(minus) if minus else 0.0)}
    for name, choose in (("low", min), ("high", max)):
        numbers = [float(row[name]) for row in sources if row.get(name)]
        result[name] = choose(numbers) if numbers else float("nan")
    return result


def check_every_number(folder: Path) -> int:
    """Recompute each number of the page over `folder`; returns how many there were."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    found = re.search(r'<script type="application/json" id="ledger">(.*?)</script>', text, re.S)
    assert found is not None
    ledger = json.loads(found[1])
    numbers = [(attributes, texts) for attributes, texts in page.numbers if attributes["data-rows"]]
    for attributes, texts in numbers:
        result = recomputed(folder, attributes, ledger)
        shown = dict(zip(("low", "high"), texts[1].split(" to "), strict=True)) if len(texts) > 1 else {}
        for name, written in {"value": texts[0], **shown}.items():
            decimals = len(written.partition(".")[2])
            # Half a unit of the last digit, and what a float adds where the digit after it is a five.
            assert float(written.replace("−", "-")) == pytest.approx(result[name], abs=0.5001 * 10**-decimals), (
                attributes,
                texts,
            )
    for step in page.all("button"):
        if "data-rows" in step:
            for column in ("psnr", "ssim"):
                exact = recomputed(folder, {**step, "data-column": column}, ledger)["value"]
                written = str(step[f"data-{column}"]).replace("−", "-")
                assert float(written) == pytest.approx(exact, abs=0.5001 * 10 ** -len(written.partition(".")[2]))
    return len(numbers)


def test_every_number_is_that_of_the_lines_it_names(folder: Path, page: Page) -> None:
    assert check_every_number(folder) > 60
    how = [attributes for attributes, _ in page.numbers]
    assert any(attributes.get("data-minus") for attributes in how)
    assert any(len(str(attributes["data-rows"]).split()) > 1 for attributes in how)  # over seeds
    for attributes in how:
        assert attributes["title"]


def test_no_number_by_depth_is_without_its_lines(page: Page) -> None:
    """Cells of numbers alone; those of the runs' table are told by run.json and are no scores."""
    end = page.cells.index("run")
    untraced = [
        cell
        for cell, traced in zip(page.cells[:end], page.traced[:end], strict=True)
        if not traced and NUMBER.fullmatch(cell.split(" ")[0])
    ]
    assert untraced == []


def test_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    """A field with a line break counts as the lines that it fills; blank lines are no rows."""
    table = tmp_path / "metrics.csv"
    table.write_text('a,b\n1,"two\nlines"\n\n3,4\n')
    header, found = read_lines(table)
    assert header == ["a", "b"]
    assert found == {2: ["1", "two\nlines"], 5: ["3", "4"]}


def test_a_table_without_a_record_is_taken_as_it_is(tmp_path: Path) -> None:
    """As in the committed results/reference: no run.json, and the folder's name says which notebook made it."""
    for name in ("quality-scenes-vit-scenes", "train-scenes-vit-linear-seed0"):
        (tmp_path / name).mkdir()
        better = 5.0 if name.startswith("train") else 0.0
        rows(VIT, better=better).to_csv(tmp_path / name / "metrics.csv", index=False)
    save_png(tmp_path / "quality-scenes-vit-scenes" / "figures" / "grid.png", "pictures")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "33.6 33.2 to 34.0" in [" ".join(cell.split()) for cell in page.cells]
    assert "38.6" not in page.text
    assert "no record kept" in page.text
    assert "missing from this page" not in page.text
    assert "Grid, scenes." in page.text
    (tmp_path / "quality-scenes-vit-scenes" / "started.json").write_text("{}")  # a trace of a run that did not end
    assert "quality-scenes-vit-scenes: it never started" in " ".join(
        Page(write_report(tmp_path).read_text(encoding="utf-8")).text.split()
    )


def test_scores_of_the_models_come_from_the_run_that_measured_them(folder: Path, tmp_path: Path) -> None:
    scores = (
        rows(VIT)
        .head(4)
        .assign(
            tap=None,
            depth=None,
            inverse=None,
            measure="top1",
            value=[0.9785, 0.9, 0.8, 0.7],
            low=None,
            high=None,
            rule=["mixed", "uniform", "mixed", "uniform"],
            classes=["all", "all", "disc", "disc"],
        )
    )
    save_run(tmp_path / "targets", "01_targets", {"targets": [VIT]}, scores)
    write_report(tmp_path)
    assert check_every_number(tmp_path) == 4
    assert "targets/metrics.csv, line 2" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_frames_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = save_frames(tmp_path)
    found = read_frames(tmp_path)
    assert [frame.file for frame in found] == [frame.file for frame in written]
    assert len({frame.file.lower() for frame in found}) == len(found)
    first, second = found[:2]
    assert (first.family, first.tap, first.depth) == ("input", "pixels", None)
    # Nine tenths of the way from grey: the error is a tenth of the image's own.
    image = torch.linspace(0, 1, 2 * 768)[:768]
    expected = -10 * torch.log10((0.1 * (image - 0.5)).square().mean()).item()
    assert second.psnr == pytest.approx(expected, abs=1e-3)
    with Image.open(tmp_path / first.file) as picture:
        assert picture.size == (16, 16)
    table = pd.DataFrame(frame_metrics(found, {VIT: "shipped", DETR: "shipped"}, seed=3))
    assert len(table) == 2 * len([frame for frame in found if not frame.is_input])
    assert set(table["dataset"]) == {"chelsea", "scene 22 hue 240"}
    again = save_frames(tmp_path, ("china",))  # a run in the same folder leaves nothing of the one before
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")) == sorted(
        frame.file for frame in again
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("psnr", "much"), "line 3: psnr is 'much', not a number"),
        (("file", "../outside.png"), "line 3: '../outside.png' is no PNG below the run's folder"),
        (("file", "frames/none.png"), r"line 3: there is no file frames/none\.png"),
        (("picture", "another"), "'another' of scenes-vit has no input frame"),
        (("tap", "blocks.0"), r"line 4: .*blocks\.0"),
        (("depth", ""), r"line 3: .*depth"),
    ],
)
def test_wrong_frames_are_refused_by_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    save_frames(tmp_path)
    table = pd.read_csv(tmp_path / FRAME_TABLE, dtype=str, keep_default_na=False)
    table.loc[1, change[0]] = change[1]
    table.to_csv(tmp_path / FRAME_TABLE, index=False)
    with pytest.raises(BacksightError, match=message):
        read_frames(tmp_path)
    table.drop(columns="picture").to_csv(tmp_path / FRAME_TABLE, index=False)
    with pytest.raises(BacksightError, match="picture"):
        read_frames(tmp_path)


def test_a_frame_of_another_size_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 16)).save(tmp_path / save_frames(tmp_path)[1].file)
    with pytest.raises(BacksightError, match=r"line 3: .* 8 x 16 pixels"):
        read_frames(tmp_path)


def test_names_that_come_out_alike_get_files_of_their_own(tmp_path: Path) -> None:
    images = torch.rand(1, 3, 16, 16)
    frames = make_frames("a/b", {"x": 0}, ["china"], images, {"linear": {"x": images}})
    frames += make_frames("a-b", {"x": 0}, ["china"], images, {"linear": {"x": images}})
    written = write_frames(tmp_path, frames)
    assert len({frame.file for frame in written}) == 4
    assert all(frame.psnr == 100 for frame in written if not frame.is_input)


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
    row = cells[start : start + 6]
    assert row == [
        "patch_embed",
        "31.8 31.4 to 32.2",
        "33.2 32.8 to 33.6",
        "33.6 33.2 to 34.0",
        "+0.4",
        "12.6 12.2 to 13.0",
    ]
    assert "−0.3" in cells  # chain minus direct at the norm
    assert "<strong>33.6</strong>" in (folder / "index.html").read_text(encoding="utf-8")  # the best family of the row
    assert "<strong>33.2</strong>" not in (folder / "index.html").read_text(encoding="utf-8")
    assert "38.6" not in page.text  # the training run's validation scores are not mixed in
    assert "n = 500 images, 1 seed (0), data set photographs, split test, shipped weights" in page.text
    assert "mse" not in page.text


def test_a_target_without_quality_run_shows_its_training_scores(page: Page) -> None:
    assert "Quality by depth: scenes, validation" in page.text
    assert DETR in page.text  # a name with markup is shown, not executed
    assert not page.all("b <b>")


def test_what_is_missing_is_said_and_nothing_of_it_is_shown(page: Page) -> None:
    words = " ".join(page.text.split())
    assert "4 of 10 runs are missing from this page: quality-detr, quality-failed, quality-odd, targets." in words
    assert "quality-detr: it was started and did not finish. Its notebook as far as it came" in words
    assert "quality-odd: its metrics.csv lacks the columns low." in words
    assert "quality-failed: its status is 'failed', not 'complete'." in words
    assert "targets: it never started." in words
    assert "notes" not in words


def test_run_facts_and_card_are_told(page: Page) -> None:
    cells = [" ".join(cell.split()) for cell in page.cells]
    assert "2 min 05 s fit 61 s" in cells
    assert "quality-vit 2026-02-01 10:00:00 UTC commit 0123456789 + changes" in cells
    assert "Hardware: a processor, 2 cores, 16 GiB." in page.text
    assert "1.10 million parameters" in page.text
    assert "0.934 0.924 to 0.944" in cells
    assert "0.821 0.811 to 0.831" in cells


def test_a_newcomer_gets_the_numbers_at_a_glance(page: Page) -> None:
    cells = [" ".join(cell.split()) for cell in page.cells]
    start = cells.index(VIT)
    assert cells[start : start + 6] == [
        VIT,
        "scenes, test",
        "33.6 dB patch_embed",
        "25.8 dB norm, direct",
        "−7.8 dB patch_embed → norm",
        "12.6 dB",
    ]


def test_metrics_of_all_runs_are_one_table(folder: Path, page: Page) -> None:
    table = pd.read_csv(folder / "metrics.csv")
    assert list(table.columns[:3]) == ["target", "weights", "dataset"]
    assert table.columns[-1] == "run"
    assert table.groupby("run").size().to_dict() == dict.fromkeys(
        ("quality-vit", "quality-vit-photographs", "train-vit", "train-detr", "train-detr-again"), 24
    )


def test_nulls_of_several_families_count_once() -> None:
    """Every family brings its own shuffled and untrained nulls: a table shows those of the chain."""
    table = rows(VIT).assign(run="a", seeds=3, family=float("nan"))
    null = table[table.inverse == "linear"].assign(inverse="null_shuffled")
    nulls = [null.assign(family=family, value=null.value + place) for place, family in enumerate(["linear", "modular"])]
    for order in (nulls, nulls[::-1]):
        groups = report_tables.depth_groups(pd.concat([table, *order]), {"a": "03_quality"}, VIT)
        shown_nulls = groups[0].rows.query("inverse == 'null_shuffled'")
        assert set(shown_nulls.family) == {"modular"}
        assert not shown_nulls.duplicated(["tap", "measure"]).any()
        assert len(groups[0].rows) == len(table[table.measure != "mse"]) + len(shown_nulls)
        assert "3 training seeds" in report_tables.depth_tables(groups[0])[0].facts


def test_several_seeds_are_averaged_and_their_intervals_joined() -> None:
    both = pd.concat([rows(VIT).assign(run="a"), rows(VIT, better=1, seed=1).assign(run="b")])
    again = pd.concat([both, rows(VIT, better=9).assign(run="c")])  # seed 0 once more: the last run counts
    for metrics, value, interval in ((both, "32.3", "31.4 to 33.2"), (again, "36.8", "32.4 to 41.2")):
        (group,) = report_tables.depth_groups(metrics, dict.fromkeys("abc", "03_quality"), VIT)
        table = report_tables.depth_tables(group)[0]
        tap, cells = table.rows[0]
        assert (tap, cells[0].text, cells[0].interval) == ("patch_embed", value, interval)
        assert "2 seeds (0, 1)" in table.facts


def test_a_folder_without_a_complete_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BacksightError, match="is not a folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(BacksightError, match="holds no complete run: run a notebook"):
        write_report(tmp_path)
    save_run(tmp_path / "quickstart", "00_quickstart", {}, status=None)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    with pytest.raises(BacksightError, match=r"no complete run \(unfinished: quickstart, broken\)"):
        write_report(tmp_path)
    assert not (tmp_path / "index.html").exists()


def test_a_run_without_table_or_pictures_still_makes_a_page(tmp_path: Path) -> None:
    save_run(tmp_path / "targets", "01_targets", {})
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "None of these runs saved pictures." in text
    assert "01_targets.ipynb" in text
