"""The run graph: what it would build, and that it builds, reuses and resumes with tiny notebooks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import NotebookWriter

from backsight.project import project_root

SNAKEMAKE = [sys.executable, "-m", "snakemake", "--rerun-incomplete", "--nolock"]
TRAIN = """\
import json, time
import numpy
from safetensors.numpy import save_file
from backsight.app.runs import open_run
run = open_run(out, "02_train_inverse", {"target": target, "images": images, "families": families})
header = {"family": "linear", "target": str(target), "weights": "", "weights_hash": "", "source": "norm"}
metadata = {"backsight": json.dumps({"header": {**header, "destination": "pixels"}})}
run.inverses.mkdir(exist_ok=True)
save_file({"weight": numpy.zeros(1)}, run.inverses / "linear--norm.safetensors", metadata)
if not (run.folder / "again").exists():
    (run.folder / "again").touch()
    time.sleep(600)
(run.folder / "metrics.partial.csv").write_text(f"families\\n{families[0]}\\n")
run.finish()
"""
QUALITY = """\
from pathlib import Path
from backsight.app.runs import open_run
run = open_run(out, "03_quality", {"target": target, "images": images})
found = sorted(path.parent.parent.name for path in Path(inverses).rglob("*.safetensors"))
(run.folder / "metrics.partial.csv").write_text("\\n".join(["run", *found]) + "\\n")
run.finish()
"""


def dry_run(root: Path, *arguments: str) -> str:
    command = [*SNAKEMAKE, *arguments, "--cores", "2", "--dry-run", "--quiet", "host"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


PRESETS = sorted(path.stem for path in (project_root() / "notebooks" / "presets").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_graph(root: Path, write_notebook: NotebookWriter, tmp_path: Path, preset: str) -> None:
    """Every target, family and seed, every study; no notebook needs to be finished for the graph to be right."""
    graph = yaml.safe_load((root / "notebooks" / "presets" / f"{preset}.yaml").read_text())["graph"]
    targets, seeds, families = graph["targets"].values(), len(graph["seeds"]), len(graph["families"])
    studies = [study for target in targets for study in target.get("studies", [])]
    nulls = len(graph.get("untrained", [])) * (families - ("linear" in graph["families"]))
    expected = {
        "once": len(graph["once"]),
        "train": len(targets) * (families * seeds + nulls),
        "quality": sum(len(target["quality"]) for target in targets),
        "study": len(studies),
        "last": len(graph.get("last", [])),
        "page": 1,
    }
    for name in {*graph["once"], "02_train_inverse", "03_quality", *studies, *graph.get("last", [])}:
        write_notebook("seed = 0", name=name)
    planned = dry_run(root, "--config", f"preset={preset}", f"notebooks={tmp_path}", f"results={tmp_path}/results")
    counts = dict(line.split()[:2] for line in planned.splitlines() if len(line.split()) == 2)
    found = {rule: int(counts.get(rule, 0)) for rule in expected}
    assert found == expected, planned
    if preset in ("default", "study", "paper"):
        assert seeds >= 3, "one training seed says nothing of how training varies"


def test_the_graph_is_built_and_resumed(root: Path, write_notebook: NotebookWriter, tmp_path: Path) -> None:
    notebooks, results = tmp_path / "notebooks", tmp_path / "results"
    # Targets and images under names that the runner leaves unchecked, to spare the test their libraries.
    write_notebook(
        'target = None\nimages = "scenes"\nfamilies = ["linear"]\npretrained = True\nseed = 0\nout = ""',
        TRAIN,
        name="02_train_inverse",
        folder=notebooks,
    )
    write_notebook(
        'target = None\nimages = "scenes"\ntrained_on = "scenes"\ninverses = ""\nseeds = [0]\nout = ""',
        QUALITY,
        name="03_quality",
        folder=notebooks,
    )
    preset = tmp_path / "tiny.yaml"
    graph = {
        "once": [],
        "targets": {"17": {"train": "scenes", "quality": ["photographs"]}},
        "families": ["linear"],
        "seeds": [0],
    }
    preset.write_text(yaml.safe_dump({"graph": graph}))
    quality, train = results / "tiny" / "quality-17-photographs", results / "tiny" / "train-17-linear-seed0"
    command = [
        *SNAKEMAKE,
        str(quality / "run.json"),
        *("--config", f"preset={preset}", f"notebooks={notebooks}", f"results={results}"),
        *("--cores", "2"),
    ]
    log = (tmp_path / "first.txt").open("w")
    first = subprocess.Popen(command, cwd=root, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 180
    while not (train / "again").exists():
        assert time.monotonic() < deadline, (tmp_path / "first.txt").read_text()
        assert first.poll() is None, (tmp_path / "first.txt").read_text()
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (train / "run.json").exists()

    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (train / "metrics.csv").read_text() == "families\nlinear\n"
    assert (quality / "metrics.csv").read_text() == "run\ntrain-17-linear-seed0\n"
    assert "complete in" in (quality / "log.txt").read_text()
    assert "Nothing to be done" in dry_run(root, *command[len(SNAKEMAKE) : -2])
