"""The graph of a preset: what its runs need, and their seconds as they were measured."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from backsight.app import plan
from backsight.app.cli import main
from backsight.app.parameters import preset_path, read_notebook
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
    for run, made in runs.items():
        notebook = read_notebook(project_root() / "notebooks" / f"{made.notebook}.ipynb")
        for name, value in made.parameters.items():
            notebook.checked(name, value, run)
    for made in runs.values():  # a study waits for the trainings of its target, and for no others
        if made.kind in ("quality", "study"):
            target = made.parameters["target"]
            own = [run for run, one in runs.items() if one.kind == "train" and one.parameters["target"] == target]
            assert list(made.needs) == own


def test_one_training_a_target_and_seed_fits_what_is_not_shipped() -> None:
    trained = {run: made.parameters for run, made in plan.graph_runs("reference").items() if made.kind == "train"}
    assert len([run for run in trained if "scenes" in run]) == 8
    fitted = {run: parameters["families"] for run, parameters in trained.items() if "vit" in run}
    assert fitted == {
        "train-scenes-vit-seed0": ["direct"],
        "train-scenes-vit-seed1": ["linear", "direct", "modular"],
        "train-scenes-vit-seed2": ["linear", "direct", "modular"],
        "train-scenes-vit-untrained-seed0": ["direct", "modular"],
    }
    for target, own in yaml.safe_load(preset_path("reference").read_text())["graph"]["targets"].items():
        for family in own.get("shipped", []):
            assert list((project_root() / "data" / "weights" / target / "inverses").glob(f"{family}--*"))


def test_seconds_are_those_that_were_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("BACKSIGHT_RESULTS", str(tmp_path))
    monkeypatch.setattr(plan, "project_root", lambda: tmp_path)
    table = tmp_path / "notebooks" / "presets" / "seconds.csv"
    table.parent.mkdir(parents=True)
    old = ["tiny,quickstart,12,8,a processor", "other,quickstart,7,1,b"]
    table.write_text("\n".join(["preset,run,seconds,cores,processor", *old, ""]))
    preset = write_preset(tmp_path, GRAPH)
    record = {"seconds": {"total": 1234.5}, "hardware": {"cores": 2, "processor": "c"}}
    write_json(tmp_path / "tiny" / "colour-org-model" / FINISHED, record)
    assert main(["plan", preset, "--record"]) == 0
    assert table.read_text().splitlines()[1:] == [*old, "tiny,colour-org-model,1234,2,c"]  # what is not here stays
    printed = capsys.readouterr().out
    assert "1234" in printed
    assert "train-org-model-untrained-seed4" in printed
    assert "5 runs" in printed
    assert "3 not yet recorded" in printed


def test_runs_on_a_folder_that_is_absent_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the graph goes on, and the folder that a variable names is taken, under the same names."""
    other: dict[str, Any] = {
        "train": "PICTURES",
        "quality": [{"images": "PICTURES", "n": 3}],
        "studies": [{"05_colour": {"n": 4}}],
    }
    other["studies"].append({"06_modular_vs_direct": {"trained_on": "PICTURES+leaves"}})
    targets = GRAPH["targets"] | {"other": other}
    graph = GRAPH | {"folders": {"PICTURES": "nowhere/pictures"}, "targets": targets, "last": ["07_figures"]}
    preset = write_preset(tmp_path, graph)
    runs = plan.graph_runs(preset)
    (sentence,) = plan.missing_folders(runs)
    assert "nowhere/pictures" in sentence
    assert "PICTURES" in sentence
    assert {run for run, made in runs.items() if made.missing} == {run for run in runs if "-other" in run}
    assert runs["figures"].needs == ("quickstart", "quality-org-model-scenes", "colour-org-model")
    monkeypatch.setenv("PICTURES", str(tmp_path))
    runs = plan.graph_runs(preset)
    assert plan.missing_folders(runs) == []
    assert runs["train-other-seed0"].parameters["images"] == str(tmp_path)
    judged = runs["quality-other-pictures"].parameters
    assert (judged["images"], judged["trained_on"], judged["n"]) == (str(tmp_path), str(tmp_path), 3)
    assert runs["modular-vs-direct-other"].parameters["trained_on"] == f"{tmp_path}+leaves"
    assert runs["colour-other"].parameters["images"] == str(tmp_path)
    further = [{"images": "PICTURES+leaves", "families": ["direct"], "seeds": [0], "steps": 9}]
    other = {"train": {"images": "PICTURES", "families": ["linear"]}, "further": further} | {"quality": ["PICTURES"]}
    runs = plan.graph_runs(write_preset(tmp_path, graph | {"targets": {"other": other}}))
    trained = {run: made.parameters for run, made in runs.items() if made.kind == "train"}
    assert {*trained} == {
        "train-other-seed0",
        "train-other-direct-seed0",
    }  # untrained linear ones: where they are needed
    told = {"target": "other", "images": f"{tmp_path}+leaves", "steps": 9, "families": ["direct"], "seed": 0}
    assert trained["train-other-direct-seed0"] == told | {"pretrained": True}
    assert trained["train-other-seed0"]["families"] == ["linear"]
    assert "train-other-direct-seed0" in runs["quality-other-pictures"].needs


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"targets": {"scenes-vit": {"train": "scenes"}}}, "quality"),
        ({"targets": ["scenes-vit"]}, "graph"),
        ({"targets": {"scenes-vit": {"train": "scenes", "quality": ["scenes"], "studeis": []}}}, "studeis"),
        ({"seeds": [-1]}, "seeds"),
        ({"sedes": [1]}, "sedes"),
        ({"targets": {"a": {"train": "scenes", "quality": ["x/scenes", "y/scenes"]}}}, "twice for quality-a-scenes"),
        ({"targets": {"a": {"train": "scenes", "quality": ["scenes"], "studies": [{"x": {}, "y": {}}]}}}, "graph"),
    ],
)
def test_a_graph_that_cannot_run_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(BacksightError, match=named):
        plan.graph_runs(write_preset(tmp_path, GRAPH | change))
