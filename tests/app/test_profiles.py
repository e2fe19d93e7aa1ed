"""The run graph on a cluster: what each profile would ask it for, without the cluster."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

PLUGINS = {
    "slurm": ["snakemake_executor_plugin_slurm"],
    "kubernetes": ["snakemake_executor_plugin_kubernetes", "snakemake_storage_plugin_fs"],
}
# snakemake, telling of every job what a rule with a message of its own keeps from the screen.
TELLING = """\
import json, sys
from snakemake.cli import main
from snakemake.logging import LogEvent, logger
def tell(record):
    if getattr(record, "event", None) is LogEvent.JOB_INFO:
        resources = {name: value for name, value in record.resources.items() if isinstance(value, int | str)}
        job = {"rule": record.rule_name, "threads": record.threads, "resources": resources, "shell": record.shellcmd}
        print("JOB", json.dumps(job))
    return True
logger.addFilter(tell)
main(sys.argv[1:])
"""


@pytest.fixture(scope="module", params=list(PLUGINS))
def planned(request: pytest.FixtureRequest, root: Path) -> tuple[str, list[dict[str, Any]]]:
    """A profile's name and the jobs of the preset `paper` under it: rule, threads, resources, shell command."""
    if missing := [plugin for plugin in PLUGINS[request.param] if find_spec(plugin) is None]:
        pytest.skip(f"{', '.join(missing)} is not installed: install the extra `cluster` (requirements.lock has it)")
    # The volume is where the clone is; cores: what the cluster would have.
    here = ["--directory", str(root), "--default-storage-prefix", str(root)] if request.param == "kubernetes" else []
    arguments = ["--profile", f"profiles/{request.param}", "--config", "preset=paper", "--dry-run", "--cores", "64"]
    command = [sys.executable, "-c", TELLING, *arguments, *here, "--forceall", "--quiet", "rules"]
    images = dict.fromkeys(("BACKSIGHT_IMAGENET", "BACKSIGHT_COCO"), str(root))  # some folder that is there
    environment = os.environ | images
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return request.param, [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("JOB ")]


def test_every_job_asks_for_what_its_profile_says(planned: tuple[str, list[dict[str, Any]]], root: Path) -> None:
    name, jobs = planned
    profile = yaml.safe_load((root / "profiles" / name / "config.yaml").read_text())
    graph = yaml.safe_load((root / "notebooks" / "presets" / "paper.yaml").read_text())["graph"]
    counts = Counter(job["rule"] for job in jobs)
    assert counts["quality"] == sum(len(target["quality"]) for target in graph["targets"].values())
    assert counts["train"] == len(graph["targets"]) * (len(graph["seeds"]) + len(graph["untrained"]))
    assert counts["page"] == 1
    for job in jobs:
        asked = profile["default-resources"] | profile["set-resources"].get(job["rule"], {})
        assert {resource: job["resources"].get(resource) for resource in asked} == asked, job
        assert job["threads"] == profile["set-threads"].get(job["rule"], 1), job
    gpus = {job["rule"]: job["resources"].get("gres", job["resources"].get("gpu")) for job in jobs}
    assert {rule for rule, gpu in gpus.items() if gpu in ("gpu:1", 1)} == {"train", "quality", "study"}


def test_the_heavy_rules_ask_for_more(root: Path) -> None:
    for name in PLUGINS:
        profile = yaml.safe_load((root / "profiles" / name / "config.yaml").read_text())
        assert profile["executor"] == name
        assert profile["retries"] >= 1
        assert profile["rerun-incomplete"] is True
        for rule in ("train", "quality", "study"):
            assert profile["set-resources"][rule]["mem_mb"] > profile["default-resources"]["mem_mb"]
            assert profile["set-threads"][rule] > 1


def test_a_job_writes_into_the_shared_results(planned: tuple[str, list[dict[str, Any]]], root: Path) -> None:
    """Also where snakemake's own outputs are copies elsewhere: the run's whole folder has to outlive its pod."""
    _, jobs = planned
    folders = set()
    for job in jobs:
        if job["rule"] != "page":
            assert f"OMP_NUM_THREADS={job['threads']} " in job["shell"]
            out = re.search(r'--out ("\$\(.*?\)") 2>&1', job["shell"])
            assert out, job["shell"]
            folders.add(subprocess.run(["bash", "-c", f"echo {out[1]}"], capture_output=True, text=True).stdout.strip())
    assert len(folders) == len(jobs) - 1
    assert {str(Path(folder).parent) for folder in folders} == {"results/paper"}
