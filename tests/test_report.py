"""The page over a folder of runs: self-contained, complete, true to the tables, and plain about what is missing."""

import json
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from backsight import report
from backsight.errors import BacksightError
from backsight.report import write_report

VIT, DETR = "scenes-vit", "a/detr <b>"
VALUES = {  # (tap, inverse): PSNR in dB
    ("patch_embed", "linear"): 31.84,
    ("patch_embed", "direct"): 33.21,
    ("patch_embed", "modular"): 33.62,
    ("patch_embed", "null_mean"): 12.6,
    ("norm", "linear"): 23.93,
    ("norm", "direct"): 25.81,
    ("norm", "modular"): 25.5,
    ("norm", "null_mean"): 12.6,
}


def rows(target: str, dataset: str = "scenes", split: str = "test", better: float = 0.0, seed: int = 0) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "target": target,
            "weights": "shipped",
            "dataset": dataset,
            "split": split,
            "tap": tap,
            "depth": ("patch_embed", "norm").index(tap),
            "inverse": inverse,
            "measure": measure,
            "value": scale * (value + better),
            "low": scale * (value + better - 0.4),
            "high": scale * (value + better + 0.4),
            "n": 500,
            "seed": seed,
        }
        for (tap, inverse), value in VALUES.items()
        for measure, scale in (("psnr", 1.0), ("ssim", 0.02), ("mse", 0.0001))
    )


def save_png(path: Path, description: str = "") -> None:
    told = PngInfo()
    if description:
        told.add_text("Title", "Each row is one image.")
        told.add_text("Comment", "pictures" if "picture" in description else "")
        told.add_text("Description", description)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (26, 10), (20, 90, 160)).save(path, pnginfo=told)


def save_run(
    folder: Path,
    notebook: str,
    parameters: dict[str, Any],
    metrics: pd.DataFrame | None = None,
    figures: dict[str, str] | None = None,
    status: str | None = "complete",
) -> Path:
    """A run folder as backsight.runs leaves it; status None: killed before its end."""
    folder.mkdir(parents=True)
    record = {
        "notebook": notebook,
        "parameters": parameters,
        "seed": 7,
        "started": "2026-02-01T10:00:00+00:00",
        "versions": {"python": "3.11.2", "torch": "2.15.0"},
        "commit": "0123456789abcdef",
        "modified": True,
        "hardware": {"processor": "a processor", "cores": 2, "memory_gib": 15.6, "gpu": None},
        "weights": {parameters["target"]: {"weights": "shipped", "hash": "feed"}} if "target" in parameters else {},
        "seconds": {"fit": 61.0, "total": 125.4},
    }
    (folder / "started.json").write_text(json.dumps(record))
    if status is not None:
        (folder / "run.json").write_text(json.dumps({"status": status, **record}))
    (folder / f"{notebook}{'.partial' if status is None else ''}.ipynb").write_text("{}")
    if metrics is not None:
        metrics.to_csv(folder / "metrics.csv", index=False)
    for stem, description in (figures or {}).items():
        save_png(folder / "figures" / f"{stem}.png", description)
    return folder


class Page(HTMLParser):
    """What the tests ask of the page: its elements with their attributes, and its text by table cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "link", "br"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("project")
    card = {
        "target": VIT,
        "parameters": 1_100_000,
        "minutes": {"training": 41.0},
        "scores": [
            {
                "rule": rule,
                "measure": "top1",
                "classes": name,
                "value": value,
                "low": value - 0.01,
                "high": value + 0.01,
            }
            for rule, value in (("mixed", 0.9344), ("uniform", 0.8211))
            for name in ("all", "canonical", "disc")
        ],
    }
    (project / "data" / "weights" / VIT).mkdir(parents=True)
    (project / "data" / "weights" / VIT / "card.json").write_text(json.dumps(card))
    results = project / "results" / "default"
    targets = {"targets": [VIT, DETR], "photograph": "chelsea"}
    save_run(results / "quickstart", "00_quickstart", targets, None, {VIT: "pictures of a cat, ever more blurred"})
    quality = {"target": VIT, "images": "scenes"}
    save_run(results / "quality-vit", "03_quality", quality, rows(VIT), {"pictures-modular": "pictures", "psnr": ""})
    other = {"target": VIT, "images": "/somewhere/photographs"}
    save_run(results / "quality-vit-photographs", "03_quality", other, rows(VIT, "photographs"))
    save_run(results / "train-vit", "02_train_inverse", {"target": VIT}, rows(VIT, split="validation", better=5))
    save_run(results / "train-detr", "02_train_inverse", {"target": DETR}, rows(DETR, split="validation"))
    save_run(results / "quality-detr", "03_quality", {"target": DETR}, rows(DETR), {"grid": ""}, status=None)
    save_run(results / "quality-odd", "03_quality", {"target": DETR}, rows(DETR).drop(columns="low"))
    save_run(results / "quality-failed", "03_quality", {"target": DETR}, rows(DETR), status="failed")
    (results / "targets").mkdir()
    (results / "targets" / "log.txt").write_text("killed")
    (results / "notes").mkdir()  # no run: not named at all
    (results / "quality-vit" / "figures" / "broken_picture.png").write_text("no PNG")
    return results


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "project_root", lambda: folder.parents[1])
        path = write_report(folder)
        first = path.read_bytes()
        assert write_report(folder).read_bytes() == first  # the same runs, the same page
    assert path == folder / "index.html"
    return Page(first.decode("utf-8"))


def test_the_page_is_one_file_that_asks_for_nothing(folder: Path, page: Page) -> None:
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    assert not page.all("script")
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert page.open == []
    assert not list(folder.glob(".*"))  # no temporary file stays


def test_every_picture_is_inside_and_has_words(page: Page) -> None:
    images = page.all("img")
    assert len(images) == 4  # the hero, a grid, a plot, and the page's own curves
    for image in images:
        assert str(image["src"]).startswith("data:image/png;base64,")
        assert image["alt"]
        assert int(image["width"] or 0) > 0
        assert int(image["height"] or 0) > 0
    assert images[0]["alt"] == "pictures of a cat, ever more blurred"  # the hero comes first, in its own words
    assert "Curves of PSNR" in str(images[1]["alt"])
    assert images[2]["alt"] == "pictures"
    assert images[3]["alt"] == "PSNR, scenes of scenes-vit (run quality-vit)."
    assert "Chelsea. Each row is one image." in page.text
    assert "Pictures modular, scenes." in page.text


def test_every_link_leads_somewhere(folder: Path, page: Page) -> None:
    anchors = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [str(link["href"]) for link in page.all("a")]
    assert "quality-vit/03_quality.ipynb" in links
    assert "quality-vit/metrics.csv" in links
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (folder / unquote(link)).is_file(), link


def test_tables_hold_the_rounded_numbers_of_the_quality_run(page: Page) -> None:
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
    assert "38.6" not in page.text  # the training run's validation scores are not mixed in
    assert "n = 500 images, 1 seed (0), data set photographs, split test, shipped weights" in page.text
    assert "mse" not in page.text


def test_the_best_family_of_each_row_is_bold(folder: Path, page: Page) -> None:
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "<strong>33.6</strong>" in text
    assert "<strong>25.8</strong>" in text
    assert "<strong>33.2</strong>" not in text
    assert "<strong>12.6</strong>" not in text


def test_a_target_without_quality_run_shows_its_training_scores(page: Page) -> None:
    assert "Quality by depth: scenes, validation" in page.text
    assert DETR in page.text  # a name with markup is shown, not executed
    assert not page.all("b <b>")


def test_what_is_missing_is_said_and_nothing_of_it_is_shown(page: Page) -> None:
    words = " ".join(page.text.split())
    assert "4 of 9 runs are missing from this page: quality-detr, quality-failed, quality-odd, targets." in words
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
        ("quality-vit", "quality-vit-photographs", "train-vit", "train-detr"), 24
    )


def test_nulls_of_several_families_count_once() -> None:
    """Every family brings its own shuffled and untrained nulls: a table shows those of the chain."""
    table = rows(VIT).assign(run="a", seeds=3, family=float("nan"))
    null = table[table.inverse == "linear"].assign(inverse="null_shuffled")
    nulls = [null.assign(family=family, value=null.value + place) for place, family in enumerate(["linear", "modular"])]
    for order in (nulls, nulls[::-1]):
        groups = report.depth_groups(pd.concat([table, *order]), {"a": "03_quality"}, VIT)
        shown_nulls = groups[0].rows.query("inverse == 'null_shuffled'")
        assert set(shown_nulls.family) == {"modular"}
        assert not shown_nulls.duplicated(["tap", "measure"]).any()
        assert len(groups[0].rows) == len(table[table.measure != "mse"]) + len(shown_nulls)
        assert "3 training seeds" in report.depth_tables(groups[0])[0].facts


def test_several_seeds_are_averaged_and_their_intervals_joined() -> None:
    both = pd.concat([rows(VIT).assign(run="a"), rows(VIT, better=1, seed=1).assign(run="b")])
    again = pd.concat([both, rows(VIT, better=9).assign(run="c")])  # seed 0 once more: the last run counts
    for metrics, value, interval in ((both, "32.3", "31.4 to 33.2"), (again, "36.8", "32.4 to 41.2")):
        (group,) = report.depth_groups(metrics, dict.fromkeys("abc", "03_quality"), VIT)
        table = report.depth_tables(group)[0]
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


def test_the_template_belongs_to_the_package() -> None:
    assert (files("backsight") / report.TEMPLATE).is_file()
