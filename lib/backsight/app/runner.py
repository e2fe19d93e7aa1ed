"""Run one notebook by papermill, strictly: what can be refused is refused before its kernel starts.

papermill alone only warns about an unknown parameter, enforces no types, and leaves a plausible partial
notebook behind when it is killed. Here a wrong name, type, file, target or tap is a BacksightError before
anything is written; a cell that fails is a NotebookError, with the partial notebook kept; and a run counts as
complete only after every code cell has been seen to have run.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from backsight.app.checks import IMAGE_SOURCES, check_values, check_writable
from backsight.app.parameters import Notebook, command_line_values, preset_values, read_notebook
from backsight.app.runs import RUN_VARIABLE, code_digest, complete_run, run_folder, start_run
from backsight.errors import BacksightError
from backsight.project import FINISHED, METRICS, PARTIAL_METRICS, STARTED, project_root, read_json, shown

if TYPE_CHECKING:
    import nbformat

_PROGRESS_BAR = re.compile(r"[^\r\n]*\d+%\|[^\r\n]*[\r\n]?|\r")

KERNEL = "python3"  # the kernel of this environment, whatever the notebook's metadata says
KERNEL_START_SECONDS = 180
# Parameters that hold a path; on the command line they are relative to the caller's folder.
PATHS = ("images", "trained_on", "inverses", "target", "photograph", "results")
WIDGET = "application/vnd.jupyter.widget-view+json"


class NotebookError(Exception):
    """A cell failed, or the kernel died: one sentence with the cell, the error and the partial notebook."""


@dataclass(frozen=True)
class Plan:
    """A run that has been checked and may start: values are all parameters, folder is absolute."""

    notebook: Notebook
    values: Mapping[str, Any]
    folder: Path

    @property
    def identity(self) -> dict[str, Any]:
        """Two runs with equal identity have equal results: parameters (less the folder), notebook, code."""
        sources = "\0".join(self.notebook.code)
        return {
            "notebook": self.notebook.name,
            "parameters": {name: value for name, value in self.values.items() if name != "out"},
            "notebook_digest": hashlib.sha256(sources.encode()).hexdigest()[:16],
            "code_digest": code_digest(),
        }

    @property
    def executed(self) -> Path:
        return self.folder / f"{self.notebook.name}.ipynb"

    @property
    def partial(self) -> Path:
        return self.folder / f"{self.notebook.name}.partial.ipynb"


def plan_run(
    notebook: str | Path,
    preset: str | None = None,
    assignments: Sequence[str] = (),
    out: str | Path | None = None,
) -> Plan:
    """Check everything about a run without starting or writing anything.

    notebook: path; preset: name or YAML file; assignments: "name=value" of the command line, which win over
    the preset; out: the run's folder, relative to the caller's. Raises BacksightError on what cannot work.
    """
    opened = read_notebook(notebook)
    said = command_line_values(opened, assignments)
    values: dict[str, Any] = {name: parameter.default for name, parameter in opened.parameters.items()}
    values |= preset_values(opened, preset) if preset else {}
    values |= {name: _relocated(name, value) for name, value in said.items()}
    if out is not None and said.get("out"):
        raise BacksightError("the run's folder is given twice, by --out and by -p out=.")
    chosen = out if out is not None else said.get("out")
    folder = Path(chosen).absolute() if chosen else run_folder(values.get("out") or "", opened.name)
    if "out" in values:
        values["out"] = shown(folder)
    with chdir(project_root()):  # where the kernel will read relative paths from
        check_values(values, {name: parameter.default for name, parameter in opened.parameters.items()})
    _check_folder(folder)
    return Plan(opened, values, folder)


def _relocated(name: str, value: Any) -> Any:
    """A path from the command line as the kernel, which works in the project's folder, has to read it."""
    if name not in PATHS or not isinstance(value, str) or not value or value in IMAGE_SOURCES:
        return value
    path = Path(value).expanduser()
    # A target named org/model is also a relative path; it is one only where such a file exists.
    return shown(path.absolute()) if path.exists() else value


def run_plan(plan: Plan, fresh: bool = False, verbose: bool = False, say: Callable[[str], None] = print) -> Path:
    """Run a checked notebook, or reuse its finished run; returns the path of run.json.

    fresh: run again from the start even where a finished or interrupted equal run exists; verbose: print what
    the cells print. Raises NotebookError where a cell fails, BacksightError where the folder is in use.
    """
    name, place = plan.notebook.path.name, shown(plan.folder)
    check_writable(plan.folder)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with _in_charge_of(plan.folder):
        finished, started = read_json(plan.folder / FINISHED), read_json(plan.folder / STARTED)
        if not fresh and _is_complete(finished, plan):
            say(f"{name}: reused, {place} is a complete run with these parameters (--fresh runs it again)")
            return plan.folder / FINISHED
        resumed = not fresh and finished is None and _same(started, plan)
        if resumed:
            say(f"{name}: resuming the interrupted run in {place}")
        elif started is not None:
            if changes := _changes(started, plan):
                say(f"{name}: {place} held another run ({changes}); starting afresh")
            _clear(plan)
        start = time.perf_counter()
        start_run(plan.folder, plan.identity, resumed)
        say(f"{name} -> {place}")
        _execute(plan, verbose)
        _check_every_cell_ran(plan)
        os.replace(plan.partial, plan.executed)
        record = complete_run(plan.folder)
        say(f"{name}: complete in {time.perf_counter() - start:.0f} s, {shown(record)}")
        return record


def _same(record: Mapping[str, Any] | None, plan: Plan) -> bool:
    return record is not None and all(record.get(key) == value for key, value in plan.identity.items())


def _is_complete(record: Mapping[str, Any] | None, plan: Plan) -> bool:
    if record is None or record.get("status") != "complete" or not _same(record, plan):
        return False
    return all((plan.folder / name).is_file() for name in (plan.executed.name, *record.get("files", ())))


# Of the run graph, and of an explorer that was used before its notebook was run.
BESIDE_RUNS = (".lock", "log.txt", "exports", "pictures")


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written, and one of somebody's that is no run's: a run replaces what it holds."""
    check_writable(folder)
    if not folder.is_dir() or (folder / FINISHED).exists() or (folder / STARTED).exists():
        return
    if others := sorted(path.name for path in folder.iterdir() if path.name not in BESIDE_RUNS):
        raise BacksightError(
            f"{shown(folder)} is no run's folder: it holds {', '.join(others[:3])}. "
            "Give an empty or a new one by --out."
        )


def _changes(record: Mapping[str, Any], plan: Plan) -> str:
    """What differs between the run that a folder held and the one that starts there, for a person."""
    before, now = record.get("parameters") or {}, plan.identity["parameters"]
    changed = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
    if record.get("notebook") != plan.identity["notebook"]:
        return f"of {record.get('notebook')}"
    if changed:
        return f"with other {', '.join(sorted(changed))}"
    return "of other code" if not _same(record, plan) else ""


def _clear(plan: Plan) -> None:
    """Remove what an earlier run made, and nothing else: its results must not be mixed with the new ones."""
    from backsight.app.frames import FRAME_TABLE, FRAMES

    for file in (FINISHED, STARTED, METRICS, PARTIAL_METRICS, FRAME_TABLE, plan.executed.name, plan.partial.name):
        (plan.folder / file).unlink(missing_ok=True)
    for folder in (FRAMES, "checkpoints"):
        shutil.rmtree(plan.folder / folder, ignore_errors=True)
    for pattern in ("figures/*.png", "figures/*.svg", "inverses/**/*.safetensors"):
        for path in plan.folder.glob(pattern):
            path.unlink()


@contextmanager
def _in_charge_of(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when this process ends, however it ends."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BacksightError(f"another run is writing to {shown(folder)}; wait for it or use --out.") from error
        yield


@contextmanager
def _kernel_environment(folder: Path) -> Iterator[None]:
    """BACKSIGHT_RUN set; MPLBACKEND unset, since it would take the figures away; SIGTERM as Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
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
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    where = f"the partial notebook is {shown(plan.partial)}"
    with _kernel_environment(plan.folder):
        try:
            papermill.execute_notebook(
                plan.notebook.content,
                str(plan.partial).replace("{", "{{").replace("}", "}}"),  # papermill fills in {parameters}
                parameters=dict(plan.values),
                kernel_name=KERNEL,
                cwd=project_root(),
                progress_bar=verbose,
                log_output=verbose,
                start_timeout=KERNEL_START_SECONDS,
                # The kernel listens on this machine's ports: nobody else on it may read or run code.
                config=Config({"KernelManager": {"transport_encryption": "auto"}}),
            )
        except PapermillExecutionError as error:
            reason = f"{error.ename}: {error.evalue}".strip().splitlines()[0]
            raise NotebookError(
                f"{plan.notebook.path.name} failed in cell {error.exec_count}: {reason} ({where})"
            ) from error
        except (DeadKernelError, CellTimeoutError, RuntimeError) as error:
            raise NotebookError(
                f"the kernel of {plan.notebook.path.name} died or did not start: {error} ({where})"
            ) from error


def _check_every_cell_ran(plan: Plan) -> None:
    """Refuse a notebook with a code cell that never ran or shows an error; strip what is noise."""
    import nbformat

    executed = nbformat.read(plan.partial, as_version=4)
    for index, cell in enumerate(executed.cells):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        failed = any(output.output_type == "error" for output in cell.outputs)
        if cell.execution_count is None or failed:
            state = "failed" if failed else "never ran"
            raise NotebookError(
                f"{plan.notebook.path.name} stopped early: code in cell {index} {state} "
                f"(the partial notebook is {shown(plan.partial)})"
            )
    _tidy(executed)
    nbformat.write(executed, plan.partial)


def _tidy(executed: nbformat.NotebookNode) -> None:
    """Take out what is noise in a saved notebook: timings in the metadata, progress bars, widgets without a kernel."""
    for noise in ("papermill", "widgets"):
        executed.metadata.pop(noise, None)
    for cell in executed.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            for output in cell.outputs:
                if output.output_type == "stream" and output.name == "stderr":
                    output.text = _PROGRESS_BAR.sub("", output.text).lstrip("\n")
            cell.outputs = [
                output for output in cell.outputs if output.get("text") != "" and not _is_progress_bar(output)
            ]
            for output in cell.outputs:  # what is left of a widget without its kernel: its words
                output.get("data", {}).pop(WIDGET, None)


def _is_progress_bar(output: Any) -> bool:
    """A bar in a notebook is a widget whose plain text is the bar; once gone, an empty widget."""
    data = output.get("data", {})
    plain = str(data.get("text/plain", "")).strip()
    return WIDGET in data and (not plain or "%|" in plain or "it/s" in plain)
