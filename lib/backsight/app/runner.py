"""Run one notebook by papermill, strictly.

papermill alone only warns about an unknown parameter, enforces no types, and leaves a plausible partial notebook behind
when it is killed. Here a wrong name or type is a BacksightError before anything is written; a cell that fails is a
NotebookError, with the partial notebook kept; a run is complete only after every code cell has been seen to have run.
"""

import fcntl
import hashlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

from backsight.app.parameters import Notebook, command_line_values, preset_values, read_notebook
from backsight.app.runs import RUN_VARIABLE, check_folder, code_digest, complete_run, run_folder, start_run
from backsight.errors import BacksightError
from backsight.project import (
    FINISHED,
    METRICS,
    PARTIAL_METRICS,
    PARTIAL_VALUES,
    STARTED,
    VALUES,
    project_root,
    read_json,
    shown,
)

KERNEL = "python3"  # the kernel of this environment, whatever the notebook's metadata says
KERNEL_START_SECONDS = 180
WIDGET = "application/vnd.jupyter.widget-view+json"
# Parameters that may hold paths; on the command line these are relative to the caller's folder.
PATHS = ("images", "trained_on", "inverses", "target", "targets", "photograph", "pictures", "results")
# What a run makes, besides the figures that its record names: removed before another one starts in its folder, since
# results must not be mixed. What else lies there is the user's.
OF_A_RUN = (
    *(FINISHED, STARTED, METRICS, PARTIAL_METRICS, VALUES, PARTIAL_VALUES),
    *("frames/*/*--*.png", "inverses/**/*--*.safetensors", "checkpoints/direct.safetensors"),
    *("checkpoints/modular*.safetensors", "checkpoints/.*.partial"),
)
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
            for word in (word for item in ([given] if isinstance(given, str) else given) for word in item.split("@")):
                for root in (project_root() / word, project_root() / "data" / "weights" / word) if word else ():
                    for file in [root] if root.is_file() else root.glob(READ.get(name, "**/*")):
                        if file.is_file() and self.folder not in file.parents:
                            states.add((str(file), file.stat().st_size, file.stat().st_mtime_ns))
        return hashlib.sha256(repr(sorted(states)).encode()).hexdigest()[:16]

    @property
    def executed(self) -> Path:
        return self.folder / f"{self.notebook.name}.ipynb"

    @property
    def partial(self) -> Path:
        return self.folder / f"{self.notebook.name}.partial.ipynb"

    def is_of(self, record: Mapping[str, Any] | None) -> bool:
        """Whether a run's record is one of this very run."""
        return record is not None and all(record.get(key) == value for key, value in self.identity.items())


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


def run_plan(plan: Plan, verbose: bool = False, say: Callable[[str], None] = print) -> Path:
    """Run a checked notebook, or reuse its finished run; returns the path of run.json.

    verbose: print what the cells print. Raises NotebookError where a cell fails, BacksightError where the folder is in
    use.
    """
    name, place = plan.notebook.path.name, shown(plan.folder)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with in_charge_of(plan.folder):
        finished, started = read_json(plan.folder / FINISHED), read_json(plan.folder / STARTED)
        if _is_complete(finished, plan):
            say(f"{name}: reused, {place} is a complete run with these parameters")
            return plan.folder / FINISHED
        resumed = finished is None and plan.is_of(started)
        if resumed:
            say(f"{name}: resuming the interrupted run in {place}")
        elif held := finished or started:
            say(f"{name}: {place} held {_difference(held, plan)}; starting afresh")
            _clear(plan, held)
        start = time.perf_counter()
        start_run(plan.folder, plan.identity, resumed)
        say(f"{name} -> {place}")
        _execute(plan, verbose)
        _check_every_cell_ran(plan)
        os.replace(plan.partial, plan.executed)
        record = complete_run(plan.folder)
        say(f"{name}: complete in {time.perf_counter() - start:.0f} s, {shown(record)}")
        return record


def _is_complete(record: Mapping[str, Any] | None, plan: Plan) -> bool:
    if record is None or not plan.is_of(record):
        return False
    return all((plan.folder / name).is_file() for name in (plan.executed.name, *record["files"]))


def _difference(record: Mapping[str, Any], plan: Plan) -> str:
    """The run that a folder held, by what makes it another one than that which starts there."""
    before, now = record.get("parameters") or {}, plan.identity["parameters"]
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return f"another run (with other {', '.join(changed)})" if changed else "a run of other code or files, or not whole"


def _clear(plan: Plan, record: Mapping[str, Any]) -> None:
    """Remove what an earlier run made, and nothing else."""
    figures = [plan.folder / "figures" / Path(name).name for name in record.get("figures", [])]
    patterns = (*OF_A_RUN, plan.executed.name, plan.partial.name)
    for path in [*figures, *(path for pattern in patterns for path in plan.folder.glob(pattern))]:
        path.unlink(missing_ok=True)


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

    def interrupt(number: int, frame: FrameType | None) -> None:
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
    """Run the notebook into <notebook>.partial.ipynb. Raises NotebookError."""
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    where = f"the partial notebook is {shown(plan.partial)}"
    with _kernel_environment(plan.folder):
        try:
            papermill.execute_notebook(
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
            said = f"{plan.notebook.path.name} failed in cell {error.exec_count}: {reason} ({where})"
            raise NotebookError(said) from error
        except (DeadKernelError, CellTimeoutError, RuntimeError) as error:
            said = f"the kernel of {plan.notebook.path.name} died or did not start: {error} ({where})"
            raise NotebookError(said) from error


def _check_every_cell_ran(plan: Plan) -> None:
    """Refuse a notebook with a code cell that never ran (SystemExit passes for success); strip what is noise."""
    import nbformat

    executed = nbformat.read(plan.partial, as_version=4)
    for index, cell in enumerate(executed.cells):
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            raise NotebookError(
                f"{plan.notebook.path.name} stopped early: code in cell {index} never ran "
                f"(the partial notebook is {shown(plan.partial)})"
            )
    _tidy(executed)
    nbformat.write(executed, plan.partial)


def _tidy(executed: Any) -> None:
    """Take out what is noise in a saved notebook: timings in the metadata, progress bars, widgets without a kernel."""
    for noise in ("papermill", "widgets"):
        executed.metadata.pop(noise, None)
    for cell in executed.cells:
        for noise in ("papermill", "execution"):
            cell.metadata.pop(noise, None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress_bar(output.get("data", {}))]
            for output in cell.outputs:  # what is left of a widget without its kernel: its words
                output.get("data", {}).pop(WIDGET, None)


def _is_progress_bar(data: Mapping[str, Any]) -> bool:
    """A bar in a notebook is a widget whose plain text is the bar; once gone, an empty widget."""
    plain = str(data.get("text/plain", "")).strip()
    return WIDGET in data and (not plain or "%|" in plain or "it/s" in plain)
