"""Where the project and its results lie, and files that are written whole or not at all."""

import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from backsight.errors import BacksightError

# The files of a run's folder that others read; app/runs.py writes them.
STARTED, FINISHED = "started.json", "run.json"
METRICS, PARTIAL_METRICS = "metrics.csv", "metrics.partial.csv"
VALUES, PARTIAL_VALUES = "values.parquet", "values.partial.parquet"


def project_root() -> Path:
    """The folder whose pyproject.toml names backsight: above the working folder, else above this package.

    Under papermill the working folder is the caller's, in Lab and nbval the notebook's; this is always the same.
    Raises BacksightError where there is no such folder (an installed package without the project around it).
    """
    working_folder, package = Path.cwd(), Path(__file__).resolve().parent
    for folder in (working_folder, *working_folder.parents, *package.parents):
        file = folder / "pyproject.toml"
        if file.is_file() and '\nname = "backsight"' in file.read_text(encoding="utf-8", errors="replace"):
            return folder
    raise BacksightError(
        f"no backsight project (a pyproject.toml that names it) in or above {working_folder}; "
        "change into a clone of the project."
    )


def results_root() -> Path:
    """Where runs go by default: the folder named by BACKSIGHT_RESULTS (tests use it), else results/."""
    chosen = os.environ.get("BACKSIGHT_RESULTS")
    return Path(chosen).absolute() if chosen else project_root() / "results"


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


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Where made data is kept: $BACKSIGHT_CACHE, or data/cache of the project."""
    chosen = os.environ.get("BACKSIGHT_CACHE")
    return Path(chosen) if chosen else project_root() / "data" / "cache"
