"""Faults of the run graph: killed, it ends with the results of a run that nobody killed."""

import json
import multiprocessing
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from conftest import NotebookWriter

SNAKEMAKE = [sys.executable, "-m", "snakemake", "--rerun-incomplete", "--nolock"]
STEPS, KILLED_AFTER = 12, 5  # lines of the journal
# A training of STEPS steps with a checkpoint after each; what it has done is told in a journal outside its folder.
TRAIN = f"""\
import math, time
import numpy
from safetensors.numpy import save_file
from backsight.app.runs import open_run
from backsight.project import read_json, write_atomically, write_json
run = open_run("00_train", {{"out": out}})
checkpoint, journal = run.folder / "checkpoints" / "state.json", run.folder.parent / "journal.txt"
state = read_json(checkpoint) or {{"step": 0, "weight": 1.0}}
for step in range(state["step"], {STEPS}):
    state = {{"step": step + 1, "weight": math.cos(state["weight"] + step)}}
    time.sleep(0.05)
    write_json(checkpoint, state)
    with journal.open("a") as lines:
        lines.write(f"step {{step}}\\n")
weight = {{"weight": numpy.full(1000, state["weight"])}}
write_atomically(run.inverses / "inverse.safetensors", lambda path: save_file(weight, path))
write_atomically(run.folder / "metrics.partial.csv", lambda path: path.write_text(f"weight\\n{{state['weight']!r}}\\n"))
with journal.open("a") as lines:
    lines.write("trained\\n")
run.finish()
print(state["weight"])
"""
JUDGE = """\
import pathlib, time
from safetensors.numpy import load_file
from backsight.app.runs import open_run
from backsight.project import write_atomically
run = open_run("01_judge", {"out": out})
mean = load_file(pathlib.Path(results) / "train" / "inverses" / "inverse.safetensors")["weight"].mean()
with (run.folder.parent / "journal.txt").open("a") as lines:
    lines.write("judged\\n")
time.sleep(0.1)
write_atomically(run.folder / "metrics.partial.csv", lambda path: path.write_text(f"mean\\n{mean!r}\\n"))
run.finish()
print(mean)
"""
# What says when and how long, and nothing of the result.
OF_THE_MOMENT = ("files_digest", "started", "seconds", "hardware")


def run_snakemake(arguments: list[str], folder: str, log: str) -> None:
    """In a process of its own: a session whose whole group can be killed."""
    os.setsid()
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from snakemake.cli import main

    main(arguments)


def kill_all(process: multiprocessing.process.BaseProcess) -> None:
    """SIGKILL to the process group and, since a kernel has a group of its own, to every process below it."""
    assert process.pid is not None
    below = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):  # it may have ended by itself just now
        os.killpg(process.pid, signal.SIGKILL)
    for child in below:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(below, timeout=10)
    process.join()


def contents(folder: Path) -> dict[str, object]:
    """Every file of the runs in a folder, less times: temporary and partial files, locks and logs left out."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith(".") or path.name in ("log.txt", "journal.txt"):
            continue
        if ".partial." in path.name:  # what a kill leaves of it is anything, an empty file too, and its name says so
            continue
        content: object = path.read_bytes()
        if path.suffix == ".json":
            content = {key: value for key, value in json.loads(path.read_text()).items() if key not in OF_THE_MOMENT}
        elif path.suffix == ".ipynb":
            cells = nbformat.read(path, as_version=4).cells
            content = [(cell.source, cell.execution_count, cell.outputs) for cell in cells]
        found[str(path.relative_to(folder))] = content
    return found


def nothing_looks_whole_that_is_not(folder: Path, whole: dict[str, object]) -> None:
    """A run.json, a final table or a final notebook is there as in the uninterrupted run, or not at all."""
    for name, content in contents(folder).items():
        if Path(name).name in ("run.json", "metrics.csv", "inverse.safetensors") or name.endswith(".ipynb"):
            assert content == whole[name], name


@pytest.fixture
def graph(write_notebook: NotebookWriter, tmp_path: Path) -> list[str]:
    """The arguments of snakemake for one training, what judges it, and a run beside them, whose results came with the
    clone."""
    write_notebook('out = ""', TRAIN, name="00_train", folder=tmp_path / "notebooks")
    write_notebook('out = ""\nresults = ""', JUDGE, name="01_judge", folder=tmp_path / "notebooks")
    write_notebook('out = ""', "1 + 1", name="02_beside", folder=tmp_path / "notebooks")
    preset = tmp_path / "tiny.yaml"
    jobs = {"once": ["00_train", "02_beside"], "targets": {}, "families": [], "seeds": [0], "last": ["01_judge"]}
    preset.write_text(yaml.safe_dump({"graph": jobs}))
    old = tmp_path / "results" / "tiny" / "beside"
    old.mkdir(parents=True)
    (old / "metrics.csv").write_text("old")
    (old / "run.json").write_text('{"notebook": "02_beside"}')
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    results = tmp_path / "results"
    return [
        *SNAKEMAKE[3:],
        str(results / "tiny" / "judge" / "run.json"),
        *("--config", f"preset={preset}", f"notebooks={tmp_path / 'notebooks'}", f"results={results}"),
        *("--cores", "1", "--quiet", "host"),
    ]


def test_a_killed_graph_ends_as_if_uninterrupted(graph: list[str], root: Path, tmp_path: Path) -> None:
    # Snakemake is loaded once, in the server that the graph's processes are forked from.
    context = multiprocessing.get_context("forkserver")
    plugins = [module.name for module in pkgutil.iter_modules() if module.name.startswith("snakemake_executor_plugin_")]
    context.set_forkserver_preload(["snakemake.cli", "snakemake.persistence.file", *plugins])
    results, log = tmp_path / "results" / "tiny", tmp_path / "log.txt"
    journal = results / "journal.txt"

    def start() -> multiprocessing.process.BaseProcess:
        process = context.Process(target=run_snakemake, args=(graph, str(root), str(log)))
        process.start()
        return process

    def done() -> list[str]:
        return journal.read_text().splitlines() if journal.exists() else []

    uninterrupted = start()
    uninterrupted.join()
    assert uninterrupted.exitcode == 0, log.read_text()
    whole, everything = contents(results), done()
    assert everything == [*(f"step {step}" for step in range(STEPS)), "trained", "judged"]
    assert {"train/metrics.csv", "judge/metrics.csv", "judge/run.json", "beside/run.json"} < whole.keys()
    assert "beside/metrics.csv" not in whole
    for made in (results / "train", results / "judge"):
        shutil.rmtree(made)
    journal.unlink()

    killed = start()
    deadline = time.monotonic() + 120
    while len(done()) < KILLED_AFTER and killed.is_alive():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)
    assert killed.is_alive(), log.read_text()
    kill_all(killed)
    nothing_looks_whole_that_is_not(results, whole)

    last = start()
    last.join()
    assert last.exitcode == 0, log.read_text()
    assert contents(results) == whole
    # Of what was done before a kill, only the step after the last checkpoint is done again.
    steps = [line for line in done() if line.startswith("step")]
    assert len(steps) == len(set(steps)) >= STEPS - 1
    assert "resuming the interrupted run" in log.read_text()

    preset = tmp_path / "tiny.yaml"  # what was made with other values is stale, and what depends on it
    preset.write_text(f"{preset.read_text()}\n00_train: {{out: elsewhere}}\n")
    command = [*SNAKEMAKE, *graph[2:], "--dry-run"]
    planned = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^Job \d+: (\w+)", planned, flags=re.MULTILINE)) == {"train", "judge"}


def test_a_failed_job_does_not_cost_the_page(root: Path, write_notebook: NotebookWriter, tmp_path: Path) -> None:
    fine = """\
from backsight.app.runs import open_run
from backsight.tables.values import METRIC_COLUMNS
run = open_run("00_fine", {"out": out})
run.save_metrics([dict.fromkeys(METRIC_COLUMNS) | {"target": "scenes-vit"}])
run.finish()
"""
    write_notebook('out = ""', fine, name="00_fine", folder=tmp_path / "notebooks")
    write_notebook('out = ""', "1 / 0", name="01_fails", folder=tmp_path / "notebooks")
    preset, results = tmp_path / "tiny.yaml", tmp_path / "results"
    jobs = {"once": ["00_fine", "01_fails"], "targets": {}, "families": [], "seeds": [0]}
    preset.write_text(yaml.safe_dump({"graph": jobs}))
    places = (f"preset={preset}", f"notebooks={tmp_path / 'notebooks'}", f"results={results}")
    command = [*SNAKEMAKE, "--cores", "1", "--keep-going", "--config", *places]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout.count(str(results / "tiny" / "index.html")) == 2  # once the first run was there, and at the end
    page = (results / "tiny" / "index.html").read_text(encoding="utf-8")
    assert "fails (it was started and did not finish)" in " ".join(page.split())
