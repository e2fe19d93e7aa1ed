"""A notebook from top to bottom at smoke size. Two files of tests share the notebooks, so that two processes can."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import validated_at_smoke_size

from backsight.app.runner import plan_run, run_plan
from backsight.project import read_json


def runs_at_smoke_size(path: Path, tmp_path: Path) -> None:
    """The run is complete, and, where the committed outputs are of a longer run, it comes out the same twice."""
    run_plan(plan_run(path, "smoke", out=tmp_path / path.stem))
    record = read_json(tmp_path / path.stem / "run.json")
    assert record is not None
    assert record["status"] == "complete"
    if validated_at_smoke_size(path):
        # Too long to be run again as committed: its smoke run has to come out the same twice.
        nbval = ["--nbval", "--nbval-sanitize-with", "tests/nbval.cfg", "--nbval-cell-timeout", "300", "-q"]
        executed = tmp_path / path.stem / path.name
        _allow_as_committed(executed)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *nbval, "-p", "no:cacheprovider", "-p", "no:xdist", str(executed)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:]


def _allow_as_committed(executed: Path) -> None:
    """Take the mark off an executed copy, which would leave it out of nbval."""
    content = json.loads(executed.read_text(encoding="utf-8"))
    content["metadata"].pop("backsight", None)
    executed.write_text(json.dumps(content), encoding="utf-8")
