"""A run's folder: what was asked, on what machine, by which code, what came out, and whether it is finished.

    results/<run>/
        started.json      identity and progress, from the first second on (a resumed run compares itself with it)
        run.json          the same and "status": "complete"; written last: it exists only for a finished run
        <notebook>.ipynb  executed          metrics.csv     tidy table
        figures/*.png                       inverses/*.safetensors

Until a run is finished its table is called metrics.partial.csv and its notebook <notebook>.partial.ipynb.
A notebook opens its run with open_run() and closes it with finish(). Under `backsight run` the runner has
already opened the folder (environment variable BACKSIGHT_RUN) and it alone declares the run complete.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backsight.errors import BacksightError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# The tidy table of every run, in this order; a study adds columns of its own behind them.
METRIC_COLUMNS = (
    "target",
    "weights",
    "dataset",
    "split",
    "tap",
    "depth",
    "inverse",
    "measure",
    "value",
    "low",
    "high",
    "n",
    "seed",
)
RUN_VARIABLE = "BACKSIGHT_RUN"
RESULTS_VARIABLE = "BACKSIGHT_RESULTS"
STARTED, FINISHED = "started.json", "run.json"
METRICS, PARTIAL_METRICS = "metrics.csv", "metrics.partial.csv"

RECORDED_PACKAGES = (
    "backsight",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "accelerate",
    "numpy",
    "scipy",
    "pandas",
    "pillow",
    "scikit-image",
    "papermill",
)


def project_root() -> Path:
    """The folder whose pyproject.toml names backsight: above the working folder, else above this package.

    Under papermill the working folder is the caller's, in Lab and nbval the notebook's; this is always the same.
    Raises BacksightError where there is no such folder (an installed package without the project around it).
    """
    working_folder, package = Path.cwd(), Path(__file__).resolve().parent
    for folder in (working_folder, *working_folder.parents, *package.parents):
        if _names_backsight(folder / "pyproject.toml"):
            return folder
    raise BacksightError(
        f"no backsight project (a pyproject.toml that names it) in or above {working_folder}; "
        "change into a clone of the project."
    )


def _names_backsight(pyproject: Path) -> bool:
    try:
        with pyproject.open("rb") as file:
            return tomllib.load(file).get("project", {}).get("name") == "backsight"
    except (OSError, tomllib.TOMLDecodeError):
        return False


def results_root() -> Path:
    """Where runs go by default: the folder named by BACKSIGHT_RESULTS (tests use it), else results/."""
    override = os.environ.get(RESULTS_VARIABLE)
    return Path(override).absolute() if override else project_root() / "results"


def run_folder(out: str | Path, notebook: str) -> Path:
    """The absolute folder of a run: `out` (relative to the project), or results/<notebook> where it is empty."""
    return project_root() / out if str(out) else results_root() / notebook


def shown(path: Path) -> str:
    """A path as people and other machines should read it: relative to the project where it lies inside."""
    try:
        return path.absolute().relative_to(project_root()).as_posix() or "."
    except (ValueError, BacksightError):
        return str(path)


def write_atomically(path: str | Path, writer: Callable[[Path], object]) -> Path:
    """Let writer(temporary) fill a file beside `path`, then move it there: a reader sees all of it or none.

    The temporary name keeps the suffix, since many writers choose the format by it. Returns `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        writer(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write indented JSON atomically; NaN and what JSON cannot hold are refused."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: str | Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no file or it holds no object."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_hardware() -> dict[str, Any]:
    """System, processor, cores, memory in GiB, threads asked for; the GPU where torch is loaded and sees one."""
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    threads = os.environ.get("OMP_NUM_THREADS")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": available_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": int(threads) if threads and threads.isdecimal() else None,
        "gpu": gpu,
    }


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_commit() -> dict[str, Any]:
    """The project's commit and whether tracked files differ from it; None where git or a commit is absent."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(project_root()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "modified": None}


@cache
def code_digest() -> str:
    """sha256 over the package's source: results made by other code are never taken for this code's."""
    digest, package = hashlib.sha256(), Path(__file__).resolve().parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """One notebook's run: a folder, and the record of it in started.json (run.json once complete)."""

    folder: Path
    notebook: str
    parameters: Mapping[str, Any]
    in_runner: bool

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
            seconds = time.perf_counter() - start
            with self._record() as record:
                phases = record.setdefault("seconds", {})
                phases[name] = round(phases.get(name, 0.0) + seconds, 3)

    def note_weights(self, target: Any) -> None:
        """Record which weights the results come from: target.name, target.weights, target.weights_hash."""
        with self._record() as record:
            record.setdefault("weights", {})[target.name] = {
                "weights": target.weights,
                "hash": target.weights_hash,
            }

    def save_metrics(self, frame: "pd.DataFrame | list[dict[str, Any]]") -> "pd.DataFrame":
        """Save the run's tidy table (as metrics.partial.csv until the run is complete) and return it.

        frame: rows with at least METRIC_COLUMNS. Raises BacksightError where one is absent.
        """
        import pandas as pd

        table = pd.DataFrame(frame)
        if missing := [column for column in METRIC_COLUMNS if column not in table.columns]:
            raise BacksightError(f"the table of {self.notebook} lacks the columns {', '.join(missing)}.")
        table = table[[*METRIC_COLUMNS, *(c for c in table.columns if c not in METRIC_COLUMNS)]]
        write_atomically(self.folder / PARTIAL_METRICS, lambda temporary: table.to_csv(temporary, index=False))
        return table

    def save_figure(self, name: str, figure: "Figure") -> Path:
        """Save figures/<name>.png, 150 dots per inch, without the writer's name: equal figures are equal files."""
        return write_atomically(
            self.figures / f"{name}.png",
            lambda temporary: figure.savefig(temporary, dpi=200, bbox_inches="tight", metadata={"Software": None}),
        )

    def finish(self) -> None:
        """Declare the run complete; under `backsight run` the runner does that, after checking every cell."""
        with self._record() as record:
            record["hardware"] = describe_hardware()
        if not self.in_runner:
            complete_run(self.folder)

    @contextmanager
    def _record(self) -> Iterator[dict[str, Any]]:
        record = read_json(self.folder / STARTED) or {}
        yield record
        write_json(self.folder / STARTED, record)


def open_run(out: str | Path, notebook: str, parameters: Mapping[str, Any]) -> Run:
    """Open the folder of a notebook's run.

    out: the notebook's `out` parameter ("" means results/<notebook>); notebook: its file name without suffix;
    parameters: its parameters by name. Under `backsight run` the runner's folder and record are joined.
    """
    if folder := os.environ.get(RUN_VARIABLE):
        return Run(Path(folder), notebook, dict(parameters), in_runner=True)
    run = Run(run_folder(out, notebook), notebook, dict(parameters), in_runner=False)
    start_run(run.folder, identity={"notebook": notebook, "parameters": dict(parameters)})
    return run


def start_run(folder: Path, identity: Mapping[str, Any], resumed: bool = False) -> None:
    """Write started.json and withdraw an earlier run.json: from here on the folder is unfinished.

    identity: what must be equal for an earlier run to be reused or resumed, "notebook" and "parameters" among it.
    resumed: whether an interrupted run of the same identity goes on (only recorded).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FINISHED).unlink(missing_ok=True)
        write_json(
            folder / STARTED,
            {
                **identity,
                "seed": identity["parameters"].get("seed"),
                "resumed": resumed,
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": describe_versions(),
                **describe_commit(),
                "hardware": describe_hardware(),
                "weights": {},
                "seconds": {},
            },
        )
    except OSError as error:
        raise BacksightError(f"cannot write results to {shown(folder)}: {error.strerror}.") from error


def complete_run(folder: Path) -> Path:
    """Give the table its final name and write run.json with "status": "complete", last. Returns run.json."""
    record = read_json(folder / STARTED)
    if record is None:
        raise BacksightError(f"{shown(folder)} holds no {STARTED}: this run was never opened.")
    if (folder / PARTIAL_METRICS).exists():
        os.replace(folder / PARTIAL_METRICS, folder / METRICS)
    started = datetime.fromisoformat(record["started"])
    record["seconds"]["total"] = round((datetime.now(UTC) - started).total_seconds(), 3)
    return write_json(folder / FINISHED, {"status": "complete", **record})
