"""Run one notebook by papermill, strictly.

papermill alone only warns about an unknown parameter, enforces no types, and leaves a plausible partial notebook behind
when it is killed. Here a wrong name or type is a BacksightError before anything is written; a cell that fails is a
NotebookError, with the partial notebook kept; a run is complete only after every code cell has been seen to have run.
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from backsight.app.parameters import Notebook, command_line_values, preset_values, read_notebook
from backsight.app.runs import RUN_VARIABLE, check_folder, code_digest, complete_run, digest, run_folder, start_run
from backsight.errors import BacksightError
from backsight.project import FINISHED, project_root, read_json, shown

KERNEL = "python3"  # the kernel of this environment, whatever the notebook's metadata says
KERNEL_START_SECONDS = 180
WIDGET = "application/vnd.jupyter.widget-view+json"
# Parameters that may hold paths; on the command line these are relative to the caller's folder.
PATHS = ("images", "trained_on", "inverses", "target", "targets", "photograph", "pictures", "results")
# What is read of a folder that a parameter names; by default every file. The page's folder holds the run itself.
READ = {"inverses": "**/[!.]*--*.safetensors", "results": f"*/{FINISHED}"}
NAMED = ("scenes", "scenes-on-leaves", "photographs", "leaves", "dinov2-small")  # no paths, whatever lies here


class NotebookError(BacksightError):
    """A cell failed, or the kernel died: one sentence with the cell, the error and the partial notebook."""

    exit_code = 1


@dataclass(frozen=True)
class Plan:
    """A run that has been checked and may start: values are all parameters, folder is absolute."""

    notebook: Notebook
    values: Mapping[str, Any]
    folder: Path

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Two runs with equal identity have equal results: parameters (less the folder), notebook, code, files read."""
        return {
            "notebook": self.notebook.name,
            "parameters": {name: value for name, value in self.values.items() if name != "out"},
            "notebook_digest": digest(self.notebook.code),
            "code_digest": code_digest(),
            "files_digest": digest(sorted(self._files())),
        }

    def _files(self) -> set[str]:
        """The files that parameters name (images, weights, inverses, runs): their paths, sizes and times."""
        states, places = set(), (project_root(), project_root() / "data" / "weights")
        for name in PATHS:
            given = self.values.get(name) or []
            texts = [given] if isinstance(given, str) else given
            words = {word for text in texts for word in (text, *re.split("[@+]", text)) if word}
            for root in [place / word for word in words for place in places]:
                files = [root] if root.is_file() else list(_below(root, READ.get(name, "**/[!.]*")))
                if name == "inverses":  # those of other targets may be in the making
                    files = [file for file in files if _target_of(file) in ("", self.values.get("target"))] or files
                for file in files:
                    if file.is_file() and self.folder not in file.parents:
                        states.add(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}")
        return states


def _below(root: Path, pattern: str) -> Iterator[Path]:
    """As root.glob(pattern), and for **/ through links to folders too, as images are read; each folder once."""
    if not pattern.startswith("**/"):
        yield from root.glob(pattern)
        return
    entered = set()
    for place, folders, _ in os.walk(root, followlinks=True):
        if (real := os.path.realpath(place)) in entered:
            folders.clear()
            continue
        entered.add(real)
        yield from Path(place).glob(pattern[3:])


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
    path = Path(os.path.expanduser(value))
    for sign in "@+":  # a target name@checkpoint, and FOLDER+leaves
        if sign in value and not path.exists():
            return sign.join(map(_relocated, value.rsplit(sign, 1)))
    # A target org/model is also a relative path; it is one only where such a file exists, and a shipped one never.
    named = not value or value in NAMED or (project_root() / "data" / "weights" / value).is_dir()
    return value if named or not path.exists() else shown(path.absolute())


def run_plan(plan: Plan, verbose: bool = False) -> None:
    """Run a checked notebook, or reuse its finished run.

    verbose: print what the cells print. Raises NotebookError where a cell fails, BacksightError where the folder is in
    use.
    """
    name, place = plan.notebook.path.name, shown(plan.folder)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with in_charge_of(plan.folder):
        finished = read_json(plan.folder / FINISHED) or {}
        files = [f"{plan.notebook.name}.ipynb", *finished.get("files", [])]
        if plan.identity.items() <= finished.items() and all((plan.folder / file).is_file() for file in files):
            print(f"{name}: reused, {place} is a complete run with these parameters")
            return
        start = time.perf_counter()
        if before := start_run(plan.folder, plan.identity):
            print(f"{name}: {before}")
        print(f"{name} -> {place}")
        _execute(plan, verbose)
        print(f"{name}: complete in {time.perf_counter() - start:.0f} s, {shown(complete_run(plan.folder))}")


@contextmanager
def in_charge_of(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when this process ends, however it ends."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise BacksightError(
            f"another process writes to {shown(folder)}: wait for it, or name another folder."
        ) from error


def _execute(plan: Plan, verbose: bool) -> None:
    """Run the notebook as <notebook>.partial.ipynb, take out what is noise, and give it its name. Raises NotebookError
    where a cell failed or, as after SystemExit, which passes for success, never ran."""
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    name, partial = plan.notebook.path.name, plan.folder / f"{plan.notebook.name}.partial.ipynb"
    where, environment = f"(the partial notebook is {shown(partial)})", dict(os.environ)
    os.environ[RUN_VARIABLE] = str(plan.folder)
    os.environ.pop("MPLBACKEND", None)  # which would take the figures away
    try:
        executed = papermill.execute_notebook(
            nbformat.reads(plan.notebook.text, as_version=4),
            str(partial).replace("{", "{{").replace("}", "}}"),  # papermill fills in {parameters}
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
    except RuntimeError as error:  # of nbclient: a kernel that is dead, or does not answer
        raise NotebookError(f"the kernel of {name} died or did not start: {error} {where}") from error
    finally:
        os.environ.clear()
        os.environ.update(environment)
    for index, cell in enumerate(executed.cells):
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            raise NotebookError(f"{name} stopped early: code in cell {index} never ran {where}")
    tidy(executed)
    nbformat.write(executed, partial)
    os.replace(partial, plan.folder / f"{plan.notebook.name}.ipynb")


def tidy(executed: Any) -> None:
    """Take out what is noise in a saved notebook: timings, progress bars, and of widgets all but their words."""
    for part in (executed, *executed.cells):
        for noise in ("papermill", "widgets", "execution"):
            part.metadata.pop(noise, None)
        for output in list(part.get("outputs", [])):
            data = output.get("data", {})
            is_widget, words = data.pop(WIDGET, None) is not None, str(data.get("text/plain", "")).strip()
            if is_widget and (not words or "%|" in words or "it/s" in words):  # a bar, or what is left of one
                part.outputs.remove(output)
