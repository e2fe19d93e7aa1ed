"""The run graph: what it would build; that it builds and resumes is test_graph_faults."""

import subprocess
import sys
from pathlib import Path

import yaml
from conftest import NotebookWriter

SNAKEMAKE = [sys.executable, "-m", "snakemake", "--rerun-incomplete", "--nolock"]


def dry_run(root: Path, *arguments: str) -> str:
    command = [*SNAKEMAKE, *arguments, "--cores", "2", "--dry-run", "--quiet", "host"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_the_long_preset_is_a_graph(root: Path, write_notebook: NotebookWriter, tmp_path: Path) -> None:
    """Every target, family and seed, every study; no notebook needs to be finished for the graph to be right."""
    preset = "long"
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
    assert seeds >= 3, "one training seed says nothing of how training varies"
