"""Run one notebook by papermill, strictly.

papermill alone only warns about an unknown parameter, enforces no types, and leaves a plausible partial notebook behind
when it is killed. Here a wrong name or type is a BacksightError before anything is written; a cell that fails is a
NotebookError, with the partial notebook kept; a run is complete only after every code cell has been seen to have run.
"""

import fcntl
import hashlib
import json
import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from backsight.app.parameters import Notebook, command_line_values, preset_values, read_notebook
from backsight.app.runs import RUN_VARIABLE, check_folder, clear_run, code_digest, complete_run, run_folder, start_run
from backsight.errors import BacksightError
from backsight.project import FINISHED, STARTED, project_root, read_json, shown

KERNEL = "python3"  # the kernel of this environment, whatever the notebook's metadata says
KERNEL_START_SECONDS = 180
WIDGET = "application/vnd.jupyter.widget-view+json"
# Parameters that may hold paths; on the command line these are relative to the caller's folder.
PATHS = ("images", "trained_on", "inverses", "target", "targets", "photograph", "pictures", "results")
# What is read of a folder that a parameter names; by default every file. The page's folder holds the run itself.
READ = {"inverses": "**/*--*.safetensors", "results": f"*/{FINISHED}"}


class NotebookError(Exception):
    """A cell failed, or the kernel died: one sentence with the cell, the error and the partial notebook."""


@dataclass(frozen=True)
class Plan:
    """A run that has been checked and may start: values are all parameters, folder is absolute."""

    notebook: Notebook
    values: Mapping[str, Any]
    folder: Path

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Two runs with equal identity have equal results: parameters (less the folder), notebook, code, files read."""
        sources = "\0".join(self.notebook.code)
        return {
            "notebook": self.notebook.name,
            "parameters": {name: value for name, value in self.values.items() if name != "out"},
            "notebook_digest": hashlib.sha256(sources.encode()).hexdigest()[:16],
            "code_digest": code_digest(),
            "files_digest": self._files_digest(),
        }

    def _files_digest(self) -> str:
        """Of the files that parameters name (images, weights, inverses, runs): their paths, sizes and times."""
        states = set()
        for name in PATHS:
            given = self.values.get(name) or []
            for word in "@".join([given] if isinstance(given, str) else given).split("@"):
                for root in (project_root() / word, project_root() / "data" / "weights" / word) if word else ():
                    files = [root] if root.is_file() else list(root.glob(READ.get(name, "**/*")))
                    if name == "inverses":  # those of other targets may be in the making
                        files = [file for file in files if _target_of(file) in ("", self.values.get("target"))] or files
                    for file in files:
                        if file.is_file() and self.folder not in file.parents:
                            states.add((str(file), file.stat().st_size, file.stat().st_mtime_ns))
        return hashlib.sha256(repr(sorted(states)).encode()).hexdigest()[:16]

    @property
    def executed(self) -> Path:
        return self.folder / f"{self.notebook.name}.ipynb"

    @property
    def partial(self) -> Path:
        return self.folder / f"{self.notebook.name}.partial.ipynb"

    def is_of(self, record: Mapping[str, Any]) -> bool:
        """Whether a run's record is one of this very run."""
        return all(record.get(key) == value for key, value in self.identity.items())


def _target_of(file: Path) -> str:
    """The name of the target that an inverse was fitted to, read without torch; "" where the file does not say."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as inverse:
            return json.loads((inverse.metadata() or {})["backsight"])["header"]["target"]
    except (OSError, SafetensorError, LookupError, TypeError, ValueError):
        return ""


def plan_run(
    notebook: str | Path,
    preset: str | None = None,
    assignments: Sequence[str] = (),
    out: str | Path | None = None,
) -> Plan:
    """Check the parameters and the folder of a run without starting or writing anything.

    notebook: path; preset: name or YAML file; assignments: "name=value" of the command line, which win over the preset;
    out: the run's folder, relative to the caller's. Raises BacksightError on an unknown name, a value of the wrong type
    and a folder that is no run's.
    """
    opened = read_notebook(notebook)
    said = command_line_values(opened, assignments)
    values = {**opened.defaults, **(preset_values(opened, preset) if preset else {})}
    values |= {name: _relocated(value) if name in PATHS else value for name, value in said.items()}
    chosen = out or said.get("out")
    folder = Path(chosen).absolute() if chosen else run_folder(values.get("out") or "", opened.name)
    if "out" in values:
        values["out"] = shown(folder)
    check_folder(folder, opened.name)
    if opened.path.resolve().parent == folder.resolve():
        raise BacksightError(f"the result would replace {opened.path} itself. Give another folder by --out.")
    return Plan(opened, values, folder)


def _relocated(value: Any) -> Any:
    """A path from the command line, or a list of them, as the kernel, which works in the project's folder, reads it."""
    if isinstance(value, list):
        return [_relocated(item) for item in value]
    # A target org/model is also a relative path; it is one only where such a file exists, and a shipped one never.
    named = not value or value in ("scenes", "photographs") or (project_root() / "data" / "weights" / value).is_dir()
    path = Path(os.path.expanduser(value))
    return value if named or not path.exists() else shown(path.absolute())


def run_plan(plan: Plan, verbose: bool = False) -> Path:
    """Run a checked notebook, or reuse its finished run; returns the path of run.json.

    verbose: print what the cells print. Raises NotebookError where a cell fails, BacksightError where the folder is in
    use.
    """
    name, place = plan.notebook.path.name, shown(plan.folder)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with in_charge_of(plan.folder):
        finished, started = (read_json(plan.folder / name) or {} for name in (FINISHED, STARTED))
        files = [plan.executed, *(plan.folder / name for name in finished.get("files", []))]
        if plan.is_of(finished) and all(file.is_file() for file in files):
            print(f"{name}: reused, {place} is a complete run with these parameters")
            return plan.folder / FINISHED
        resumed = not finished and plan.is_of(started)
        if resumed:
            print(f"{name}: resuming the interrupted run in {place}")
        elif held := finished or started:
            print(f"{name}: {place} held {_difference(held, plan)}; starting afresh")
            clear_run(plan.folder, held)
        start = time.perf_counter()
        start_run(plan.folder, plan.identity, resumed)
        print(f"{name} -> {place}")
        _execute(plan, verbose)
        os.replace(plan.partial, plan.executed)
        record = complete_run(plan.folder)
        print(f"{name}: complete in {time.perf_counter() - start:.0f} s, {shown(record)}")
        return record


def _difference(record: Mapping[str, Any], plan: Plan) -> str:
    """The run that a folder held, by what makes it another one than that which starts there."""
    before, now = record.get("parameters") or {}, plan.identity["parameters"]
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return f"another run (with other {', '.join(changed)})" if changed else "a run of other code or files, or not whole"


@contextmanager
def in_charge_of(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when this process ends, however it ends."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BacksightError(
                f"another process writes to {shown(folder)}: wait for it, or name another folder."
            ) from error
        yield


@contextmanager
def _kernel_environment(folder: Path) -> Iterator[None]:
    """BACKSIGHT_RUN set; MPLBACKEND unset, since it would take the figures away; SIGTERM as Ctrl-C."""

    def interrupt(*_: Any) -> None:
        logging.disable()  # what the kernel's client says of a kernel that is gone
        raise KeyboardInterrupt

    before = dict(os.environ)
    handler = signal.signal(signal.SIGTERM, interrupt)
    os.environ[RUN_VARIABLE] = str(folder)
    os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        os.environ.clear()
        os.environ.update(before)


def _execute(plan: Plan, verbose: bool) -> None:
    """Run the notebook into <notebook>.partial.ipynb, and take out what is noise. Raises NotebookError where a cell
    failed or, as after SystemExit, which passes for success, never ran."""
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    name, where = plan.notebook.path.name, f"(the partial notebook is {shown(plan.partial)})"
    with _kernel_environment(plan.folder):
        try:
            executed = papermill.execute_notebook(
                nbformat.reads(plan.notebook.text, as_version=4),
                str(plan.partial).replace("{", "{{").replace("}", "}}"),  # papermill fills in {parameters}
                parameters=plan.notebook.injected(plan.values),
                kernel_name=KERNEL,
                language="python",
                cwd=project_root(),
                progress_bar=verbose,
                log_output=verbose,
                start_timeout=KERNEL_START_SECONDS,
                extra_arguments=["--log-level=50"],  # what the kernel says of a client that is gone
                # The kernel listens on this machine's ports: nobody else on it may read or run code.
                config=Config({"KernelManager": {"transport_encryption": "auto"}}),
            )
        except PapermillExecutionError as error:
            reason = f"{error.ename}: {error.evalue}".strip().splitlines()[0]
            raise NotebookError(f"{name} failed in cell {error.exec_count}: {reason} {where}") from error
        except (DeadKernelError, CellTimeoutError, RuntimeError) as error:
            raise NotebookError(f"the kernel of {name} died or did not start: {error} {where}") from error
    for index, cell in enumerate(executed.cells):
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            raise NotebookError(f"{name} stopped early: code in cell {index} never ran {where}")
    _tidy(executed)
    nbformat.write(executed, plan.partial)


def _tidy(executed: Any) -> None:
    """Take out what is noise in a saved notebook: timings in the metadata, progress bars, widgets without a kernel."""
    for part in (executed, *executed.cells):
        for noise in ("papermill", "widgets", "execution"):
            part.metadata.pop(noise, None)
        if "outputs" in part:
            part.outputs = [output for output in part.outputs if not _is_progress_bar(output.get("data", {}))]
            for output in part.outputs:  # what is left of a widget without its kernel: its words
                output.get("data", {}).pop(WIDGET, None)


def _is_progress_bar(data: Mapping[str, Any]) -> bool:
    """A bar in a notebook is a widget whose plain text is the bar; once gone, an empty widget."""
    plain = str(data.get("text/plain", "")).strip()
    return WIDGET in data and (not plain or "%|" in plain or "it/s" in plain)
