"""The graph of a preset: what its runs need, and their seconds as they were measured."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from backsight.app import plan
from backsight.app.cli import main
from backsight.errors import BacksightError
from backsight.project import FINISHED, project_root, write_json

PRESETS = sorted(path.stem for path in (project_root() / "notebooks" / "presets").glob("*.yaml"))
GRAPH: dict[str, Any] = {
    "once": ["00_quickstart"],
    "targets": {"org/model": {"train": "scenes", "quality": ["scenes"], "studies": ["05_colour"]}},
    "families": ["linear", "direct"],
    "seeds": [0],
    "untrained": [4],
}


def write_preset(folder: Path, graph: Any) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"graph": graph}))
    return str(path)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_run_comes_after_what_it_needs(preset: str) -> None:
    before: set[str] = set()
    runs = plan.graph_runs(preset, "results")
    for run, made in runs.items():
        assert before.issuperset(made.needs), run
        before.add(run)
    for made in runs.values():  # a study waits for the trainings of its target, and for no others
        if made.kind in ("quality", "study"):
            target = made.parameters["target"]
            own = [run for run, one in runs.items() if one.kind == "train" and one.parameters["target"] == target]
            assert list(made.needs) == own


def test_seconds_are_those_of_the_last_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("BACKSIGHT_RESULTS", str(tmp_path))
    preset = write_preset(tmp_path, GRAPH)
    write_json(tmp_path / "tiny" / "colour-org-model" / FINISHED, {"seconds": {"total": 1234.5}})
    assert main(["plan", preset]) == 0
    printed = capsys.readouterr().out
    assert "1234.5" in printed
    assert "train-org-model-untrained-direct-seed4" in printed
    assert "6 runs" in printed
    assert "5 not yet measured" in printed


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"targets": {"scenes-vit": {"train": "scenes"}}}, "quality"),
        ({"targets": ["scenes-vit"]}, "graph"),
    ],
)
def test_a_graph_that_cannot_run_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(BacksightError, match=named):
        plan.graph_runs(write_preset(tmp_path, GRAPH | change))
