"""The plan of a preset: its graph is the Snakefile's, its counts are right, and more cores never take longer."""

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from backsight.app import calibration, plan
from backsight.app.calibration import Calibration, Cost, Regression, TargetCalibration, Wanted
from backsight.app.cli import main
from backsight.errors import BacksightError
from backsight.inverses.layouts import PIXELS
from backsight.inverses.linear import fit_linear
from backsight.project import project_root

PRESETS = sorted(path.stem for path in (project_root() / "notebooks" / "presets").glob("*.yaml"))
TRAINING = {"taps": "components", "steps": 20, "train_images": 200, "validation_images": 32, "test_images": 16}
GRAPH: dict[str, Any] = {
    "once": [],
    "targets": {"scenes-vit": {"train": "scenes", "quality": ["scenes"], "studies": []}},
    "families": ["linear", "direct", "modular"],
    "seeds": [0],
}
OPERATIONS = ("load", "forward", "render", "read scene", "read photograph", "score", "detail", "linear decode")
OPERATIONS += ("direct step", "direct decode", "modular step", "modular decode")


@pytest.fixture(scope="module")
def vit() -> calibration.Survey:
    """What is counted of the small ViT; nothing of it is trained."""
    torch.set_num_threads(1)
    return TargetCalibration("scenes-vit", Wanted("components", inverted=False), (), 2).survey


@pytest.fixture
def known(vit: calibration.Survey) -> Calibration:
    """Every operation takes a second."""
    second = Cost(1.0, 0.5, 2.0)
    machine = {(name, ""): second for name in ("start", "moments", "solution", "interval")}
    machine |= {(name, ""): Cost(1.0, 0.5, 2.0, "allowance") for name in ("figure", "seconds")}
    trained = {"direct": calibration.Trained(1000, 10**6, 1.0), "modular": calibration.Trained(500, 10**5, 0.5)}
    survey = dataclasses.replace(vit, trained=trained)
    costs = machine | {(name, "scenes-vit"): second for name in OPERATIONS}
    return Calibration(costs, {"scenes-vit": survey}, 16, scene={"scenes-vit": 7000})


def write_preset(folder: Path, graph: dict[str, Any] | None = None, **training: Any) -> str:
    path = folder / "tiny.yaml"
    sections = {"02_train_inverse": TRAINING | training, "graph": GRAPH if graph is None else graph}
    path.write_text(yaml.safe_dump(sections))
    return str(path)


def works(preset: str, known: Calibration) -> dict[str, plan.Work]:
    jobs, made = plan.run_graph(preset), set()  # type: ignore[var-annotated]
    return {job.name: plan.count_work(job, jobs, known, made) for job in jobs}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_graph_is_the_snakefiles(root: Path, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Snakefile's own names, from the Python in front of its first rule."""
    monkeypatch.chdir(root)
    python = (root / "Snakefile").read_text().partition("wildcard_constraints:")[0]
    names: dict[str, Any] = {"config": {"preset": preset}}
    exec(compile(python, "Snakefile", "exec"), names)
    jobs = plan.run_graph(preset)
    trained = {job.name for job in jobs if job.family}
    assert trained == set(names["train_runs"])
    rest = [*names["once"], *names["quality_runs"], *names["study_runs"], *names["last"]]
    assert sorted(job.name for job in jobs) == sorted([*trained, *rest])
    for target in names["targets"]:  # a study waits for the trainings of its target, and for no others
        needed = {job.needs for job in jobs if job.target == names["targets"][target]["name"] and not job.family}
        assert needed == {tuple(names["trained"](target))}


def test_a_jobs_parameters_are_those_of_its_run(tmp_path: Path) -> None:
    jobs = {job.name: job for job in plan.run_graph(write_preset(tmp_path, GRAPH | {"untrained": [4]}))}
    untrained = jobs["train-scenes-vit-untrained-direct-seed4"]
    assert (untrained.values["pretrained"], untrained.values["seed"], untrained.values["steps"]) == (False, 4, 20)
    assert jobs["quality-scenes-vit-scenes"].values["seeds"] == [0]


def test_a_family_that_is_solved_is_not_trained(tmp_path: Path) -> None:
    with pytest.raises(BacksightError, match="'map', which is solved"):
        plan.run_graph(write_preset(tmp_path, GRAPH | {"families": ["linear", "map"]}))


def test_training_is_counted(tmp_path: Path, known: Calibration) -> None:
    found = works(write_preset(tmp_path), known)
    direct, linear = (found[f"train-scenes-vit-{family}-seed0"] for family in ("direct", "linear"))
    assert direct["direct step", "scenes-vit"] == 20
    assert ("modular step", "scenes-vit") not in direct
    # 200 for the moments, 200 + 32 for the start, 32 of the validations, which are kept, and 16 test images
    assert direct["forward", "scenes-vit"] == 200 + 232 + 32 + 16
    assert linear["forward", "scenes-vit"] == 232 + 16
    # every tap's Gram and cross moments for every image
    taps = known.surveys["scenes-vit"].taps
    expected = sum(each.moments for each in known.surveys["scenes-vit"].regressions([(tap, PIXELS) for tap in taps]))
    assert linear["moments", ""] == pytest.approx(232 * expected)
    # the first job renders its scenes, later ones find them
    assert linear["render", "scenes-vit"] == 200 + 32 + 16
    assert direct.get(("render", "scenes-vit"), 0) == 0


def test_twice_the_steps_or_images_is_twice_the_work(tmp_path: Path, known: Calibration) -> None:
    once = works(write_preset(tmp_path), known)
    steps = works(write_preset(tmp_path, steps=40), known)
    images = works(write_preset(tmp_path, train_images=400), known)
    for family in ("direct", "modular"):
        run, operation = f"train-scenes-vit-{family}-seed0", (f"{family} step", "scenes-vit")
        assert steps[run][operation] == 2 * once[run][operation]
        assert images[run][operation] == once[run][operation]
    run = "train-scenes-vit-linear-seed0"
    more = images[run]["forward", "scenes-vit"] - once[run]["forward", "scenes-vit"]
    assert more == 200
    assert steps[run] == once[run]


@pytest.mark.parametrize("preset", ["default", "smoke"])
def test_every_study_is_counted(known: Calibration, preset: str) -> None:
    names = {name for job in plan.run_graph(preset) for name in [job.target, *job.values.get("targets", [])] if name}
    costs = {op: cost for op, cost in known.costs.items() if not op[1]}
    costs |= {(name, target): Cost(1e-3, 1e-3, 1e-3) for name in OPERATIONS for target in names}
    survey = known.surveys["scenes-vit"]
    everything = dataclasses.replace(known, costs=costs, surveys=dict.fromkeys(names, survey))
    made = plan.plan_preset(preset, 2, calibration=everything)
    assert (made.runs["seconds"] > 0).all()
    assert (made.runs["low"] <= made.runs["seconds"]).all()
    assert (made.runs["seconds"] <= made.runs["high"]).all()
    assert made.runs["share"].between(0, 1).all()
    low, middle, high = made.work
    assert low <= middle <= high
    assert made.makespan[1] <= middle


def test_regressions_are_those_of_a_fit(vit: calibration.Survey) -> None:
    """The numbers of the maps are the buffers of the inverses that a fit makes."""
    target = plan_target()
    images = torch.rand(10, 3, *target.image_size, generator=torch.Generator().manual_seed(0))
    fitted = fit_linear(target, images, ["norm"], progress=False)["norm"]
    held = sum(buffer.numel() for name, buffer in fitted.named_buffers() if name.endswith("matrix"))
    assert sum(each.numbers for each in vit.regressions([("norm", PIXELS)])) == held
    assert Regression(10, 3, 5, False).moments == pytest.approx(2e-9 * 10 * 3 * 8)


def plan_target() -> Any:
    from backsight.targets import load_target

    return load_target("scenes-vit", "components", pretrained=False)


def test_list_scheduling() -> None:
    runs = pd.DataFrame(
        {"run": ["a", "b", "c", "d"], "needs": [(), (), (), ("a", "b", "c")], "seconds": [3.0, 2.0, 2.0, 1.0]}
    )
    assert [plan.makespan(runs, cores) for cores in (1, 2, 3, 9)] == [8.0, 5.0, 4.0, 4.0]


def test_more_cores_never_take_longer() -> None:
    """Graham's anomaly: a greedy list takes 12 on three machines and 15 on four (Graham 1969)."""
    needs = {"i": ("a",), **dict.fromkeys("efgh", ("d",))}
    seconds = dict(zip("abcdefghi", [3.0, 2.0, 2.0, 2.0, 4.0, 4.0, 4.0, 4.0, 9.0], strict=True))
    runs = pd.DataFrame([{"run": r, "needs": needs.get(r, ()), "seconds": s} for r, s in seconds.items()])
    spans = [plan.makespan(runs, cores) for cores in range(1, 8)]
    assert spans == sorted(spans, reverse=True)
    assert spans[0] == sum(seconds.values())
    assert spans[2] >= 12


def test_disk_memory_and_words(tmp_path: Path, known: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = write_preset(tmp_path)
    one, two = (plan.plan_preset(preset, cores, calibration=known) for cores in (1, 2))
    assert two.memory > one.memory
    assert two.disk == one.disk
    survey = known.surveys["scenes-vit"]
    assert one.features == 2 * 200 * survey.values(survey.taps)
    assert not one.warnings
    text = str(one)
    assert "train direct" in text
    assert "on 1 cores at once" in text
    monkeypatch.setattr(plan.os, "sysconf", lambda name: 1000)
    assert "memory" in plan.plan_preset(preset, 1, calibration=known).warnings[0]
    assert [plan.in_words(s) for s in (4.0, 600.0, 7200.0, 3e5, 1e8)] == [
        "4.0 s",
        "10 min",
        "2.0 h",
        "3.5 days",
        "3.2 years",
    ]


def test_what_is_missing_is_named(tmp_path: Path, known: Calibration) -> None:
    graph = GRAPH | {"targets": {"scenes-vit": {"train": "data/no-such-set", "quality": ["data/no-such-set"]}}}
    made = plan.plan_preset(write_preset(tmp_path, graph), 1, calibration=known)
    assert sum("data/no-such-set" in note for note in made.notes) == 1


def test_unknown_presets_and_presets_without_a_graph(tmp_path: Path) -> None:
    with pytest.raises(BacksightError, match="nearest: default"):
        plan.plan_preset("defualt")
    with pytest.raises(BacksightError, match="has no targets"):
        plan.plan_preset(write_preset(tmp_path, {"once": [], "families": [], "seeds": [0]}))
    with pytest.raises(BacksightError, match="at least one core"):
        plan.plan_preset("smoke", cores=-1)


def test_long_steps_are_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too long to run is counted, and says so."""
    monkeypatch.setattr(calibration, "LONGEST_STEP", 0.0)
    torch.set_num_threads(1)
    measured = TargetCalibration("scenes-vit", Wanted(("patch_embed", "norm")), ["direct"], 2)
    assert measured.costs["direct step"].how == "extrapolated"
    assert measured.costs["direct step"].seconds > 0
    assert "extrapolated" in measured.notes[0]
    trained = measured.survey.trained["direct"]
    assert trained.gflops > 0
    assert trained.numbers > 10_000


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny preset from end to end: all is really measured but the start of a notebook, which takes half a minute."""
    monkeypatch.setattr(calibration, "notebook_seconds", lambda: 20.0)
    graph = GRAPH | {"families": ["linear", "direct", "modular"]}
    preset = write_preset(tmp_path, graph, taps=["patch_embed", "norm"], batch_size=2)
    assert main(["plan", preset, "--cores", "2"]) == 0
    text = capsys.readouterr().out
    for said in ("train linear", "train direct", "train modular", "quality", "on 2 cores at once", "memory", "disk"):
        assert said in text
    assert main(["plan", "smokee"]) == 2
    assert "nearest: smoke" in capsys.readouterr().err
