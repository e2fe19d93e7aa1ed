"""A run's folder: what was asked, on what machine, by which code, what came out, and whether it is finished.

    started.json  identity and progress, from the first second on (a resumed run compares itself with it)
    run.json      the same and "status": "complete"; written last: it exists only for a finished run
    <notebook>.ipynb executed; metrics.csv; figures/*.png; inverses/*.safetensors

Until then the table is metrics.partial.csv, the notebook <notebook>.partial.ipynb. A notebook opens its run with
open_run() and closes it with finish(); under `backsight run` (BACKSIGHT_RUN) the runner opens and completes it.
"""

import ast
import hashlib
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backsight.app.parameters import SETTINGS, read_notebook
from backsight.errors import BacksightError
from backsight.project import (
    FINISHED,
    METRICS,
    PARTIAL_METRICS,
    PARTIAL_VALUES,
    STARTED,
    VALUES,
    available_cores,
    project_root,
    read_json,
    results_root,
    shown,
    write_atomically,
    write_json,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

RUN_VARIABLE = "BACKSIGHT_RUN"
# What a folder may hold that no run made: traces of the run graph, and of an explorer that was used before.
BESIDE_RUNS = ("log.txt", "exports", "pictures")
# What a run makes, besides the figures that its record names: removed before another one starts in its folder, since
# results must not be mixed. What else lies there is the user's.
OF_A_RUN = (
    *(FINISHED, METRICS, PARTIAL_METRICS, VALUES, PARTIAL_VALUES),
    *("{notebook}.ipynb", "{notebook}.partial.ipynb", "frames/*/*--*.png", "inverses/**/*--*.safetensors"),
    *("checkpoints/direct.safetensors", "checkpoints/modular*.safetensors"),
)
# Of the project's files, those that make a result; results, which runs make anew, are under git as well.
WHAT_RUNS = ("lib", "notebooks", "data", "Snakefile", "pyproject.toml", "requirements.lock")
# What can change a number.
RECORDED_PACKAGES = (
    *("backsight", "torch", "torchvision", "timm", "transformers", "accelerate"),
    *("numpy", "scipy", "pandas", "pillow", "scikit-image", "papermill"),
)


def file_name(name: str) -> str:
    """A name, of a target or a data set or a figure, as the name of one file or folder on every system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "unnamed"


def run_folder(out: str | Path, notebook: str) -> Path:
    """The absolute folder of a run: `out` (relative to the project), or results/<notebook> where it is empty."""
    return project_root() / out if str(out) else results_root() / notebook


def _hardware() -> dict[str, Any]:
    """Of this machine, memory in GiB; the GPU where torch is loaded and sees one."""
    torch, information = sys.modules.get("torch"), Path("/proc/cpuinfo")
    processor = re.search(r"^model name\s*: (.+)$", information.read_text() if information.is_file() else "", re.M)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor[1] if processor else platform.machine(),
        "cores": available_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None,
    }


def _commit() -> dict[str, Any]:
    """The project's commit and whether WHAT_RUNS differs from it; None where git or a commit is absent."""
    git = ["git", "-C", str(project_root())]
    commands = ["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", *WHAT_RUNS]
    try:
        commit, changed = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True, timeout=20).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "modified": None}
    return {"commit": commit, "modified": bool(changed)}


def digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@cache
def code_digest() -> str:
    """Of the package's source, less comments: results made by other code are never taken for this code's."""
    package = Path(__file__).resolve().parent.parent
    return digest(
        f"{path.relative_to(package)} {ast.dump(ast.parse(path.read_bytes()))}"
        for path in sorted(package.rglob("*.py"))
    )


@dataclass(frozen=True)
class Run:
    """One notebook's run: a folder, and the record of it in started.json (run.json once complete)."""

    folder: Path

    @property
    def figures(self) -> Path:
        return self.folder / "figures"

    @property
    def inverses(self) -> Path:
        return self.folder / "inverses"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes, also where it fails, to the record under `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._record() as record:
                spent = record["seconds"].get(name, 0.0) + time.perf_counter() - start
                record["seconds"][name] = round(spent, 3)

    def note_weights(self, target: Any) -> None:
        """Record which weights the results come from: target.name, target.weights, target.weights_hash."""
        with self._record() as record:
            record["weights"][target.name] = {"weights": target.weights, "hash": target.weights_hash}

    def save_metrics(self, rows: "pd.DataFrame | list[dict[str, Any]]") -> "pd.DataFrame":
        """Save the run's tidy table (as metrics.partial.csv until the run is complete), METRIC_COLUMNS first, and
        return it. Raises KeyError where it lacks one of them."""
        import pandas as pd

        from backsight.tables.values import METRIC_COLUMNS  # late: torch takes seconds, and a wrong parameter none

        table = pd.DataFrame(rows)
        table = table[[*METRIC_COLUMNS, *table.columns.difference([*METRIC_COLUMNS], sort=False)]]
        text = table.to_csv(index=False, float_format="%.6g")
        write_atomically(self.folder / PARTIAL_METRICS, lambda temporary: temporary.write_text(text))
        return table

    def save_values(self, values: "pd.DataFrame", seed: int = 0) -> "pd.DataFrame":
        """Save what was measured, a row an image (`tables.values`), pool it, save and return that as the tidy table."""
        from backsight.tables.pooling import metrics
        from backsight.tables.values import write_values

        return self.save_metrics(metrics(write_values(self.folder / PARTIAL_VALUES, values), seed))

    def save_figure(self, name: str, figure: "Figure") -> Path:
        """Save figures/<name>.png, 200 dots per inch, without the writer's name: equal figures are equal files."""
        path = write_atomically(
            self.figures / f"{file_name(name)}.png",
            lambda temporary: figure.savefig(temporary, dpi=200, bbox_inches="tight", metadata={"Software": None}),
        )
        with self._record() as record:
            record["figures"] = sorted({*record["figures"], path.name})
        return path

    def show(self, name: str, figure: "Figure", sentence: str = "") -> None:
        """Save a figure, display it, and under it the sentence that says what this run shows."""
        from IPython.display import display

        self.save_figure(name, figure)
        display(figure)
        self.say(sentence)

    def say(self, text: str) -> None:
        """Display Markdown."""
        from IPython.display import Markdown, display

        display(Markdown(text))

    def finish(self) -> None:
        """Declare the run complete; under `backsight run` the runner does that, after checking every cell."""
        with self._record() as record:
            record["hardware"] = _hardware()  # now torch is loaded and sees the GPU
        if RUN_VARIABLE not in os.environ:
            complete_run(self.folder)

    @contextmanager
    def _record(self) -> Iterator[dict[str, Any]]:
        record = read_json(self.folder / STARTED) or {}
        yield record
        write_json(self.folder / STARTED, record)


def open_run(notebook: str, parameters: Mapping[str, Any] | None = None) -> Run:
    """Open the folder of a notebook's run: what its parameter `out` says, or results/<notebook>.

    notebook: its file name without suffix; parameters: its parameters by name, by default as they are in the kernel.
    Under `backsight run` the runner's folder and record are joined; else a run with other parameters makes room.
    """
    if joined := os.environ.get(RUN_VARIABLE):
        return Run(Path(joined))
    if parameters is None:
        from IPython import get_ipython

        known, cells = read_notebook(project_root() / "notebooks" / f"{notebook}.ipynb"), get_ipython().user_ns
        parameters = {name: (cells[SETTINGS] if name in known.settings else cells)[name] for name in known.defaults}
    folder = run_folder(parameters.get("out", ""), notebook)
    check_folder(folder, notebook)
    start_run(folder, {"notebook": notebook, "parameters": {n: v for n, v in parameters.items() if n != "out"}})
    return Run(folder)


def check_file(path: Path, mark: str) -> None:
    """Raise BacksightError where a file is there that backsight did not write: it lacks the mark."""
    if path.exists() and not (path.is_file() and mark in path.read_text(encoding="utf-8", errors="replace")):
        raise BacksightError(f"{path} is not of backsight: move it away, or name another place.")


def check_folder(folder: Path, notebook: str) -> None:
    """Raise BacksightError where a folder holds a run of another notebook, or files that no run made."""
    held = (read_json(folder / FINISHED) or read_json(folder / STARTED) or {}).get("notebook")
    inside = sorted(path.name for path in folder.glob("[!.]*") if path.name not in BESIDE_RUNS)
    if held not in (None, notebook):
        raise BacksightError(f"{shown(folder)} holds a run of {held}. Give another folder by --out.")
    if held is None and inside:
        raise BacksightError(
            f"{shown(folder)} is no run's folder: it holds {', '.join(inside[:3])}. Give an empty one by --out."
        )


def start_run(folder: Path, identity: Mapping[str, Any]) -> str:
    """Write started.json and withdraw run.json: from here on the folder is unfinished.

    identity: what must be equal for an earlier run to be resumed, "notebook" and "parameters" among it. What another
    run made in the folder is removed, and nothing else. Of the same one, interrupted, the seconds until it stopped (as
    far as its files tell) are kept as "interrupted". Returns what became of an earlier run, in words.
    """
    finished, started = (read_json(folder / name) or {} for name in (FINISHED, STARTED))
    words, seconds, figures = "", {}, []
    if identity.items() <= started.items():
        figures = started["figures"]
        if not finished:
            stopped = max(path.stat().st_mtime for path in folder.rglob("*") if path.is_file())
            spent = max(0.0, stopped - datetime.fromisoformat(started["started"]).timestamp())
            seconds = {"interrupted": round(spent + started["seconds"].get("interrupted", 0.0), 3)}
            words = "resuming the interrupted run"
    elif held := finished or started:
        before, now = held.get("parameters") or {}, identity["parameters"]
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        words = f"other {', '.join(changed)}" if changed else "other code or files"
        words = f"starting afresh: an earlier run, of {words}, is removed"
        write_json(folder / STARTED, held)  # a kill before all is gone leaves the folder of a run
        for pattern in (*OF_A_RUN, *(f"figures/{Path(name).name}" for name in held.get("figures", []))):
            for path in list(folder.glob(pattern.format(notebook=held["notebook"]))):
                path.unlink()
    record = {
        **identity,
        "seed": identity["parameters"].get("seed"),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in RECORDED_PACKAGES}},
        **_commit(),
        "hardware": _hardware(),
        "weights": {},
        "seconds": seconds,
        "figures": figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINISHED).unlink(missing_ok=True)
    write_json(folder / STARTED, record)
    return words


def complete_run(folder: Path) -> Path:
    """Give the table its final name and write run.json with "status": "complete", last. Returns run.json."""
    record = read_json(folder / STARTED) or {}
    for partial, name in ((PARTIAL_METRICS, METRICS), (PARTIAL_VALUES, VALUES)):
        if (folder / partial).exists():
            os.replace(folder / partial, folder / name)
    kept = [folder / METRICS, folder / VALUES, *(folder / "inverses").rglob("*.safetensors")]
    record["files"] = sorted(path.relative_to(folder).as_posix() for path in kept if path.is_file())
    spent = (datetime.now(UTC) - datetime.fromisoformat(record["started"])).total_seconds()
    record["seconds"]["total"] = round(spent + record["seconds"].get("interrupted", 0.0), 3)
    return write_json(folder / FINISHED, {"status": "complete", **record})
