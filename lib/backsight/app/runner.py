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
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from backsight.app.parameters import Notebook, command_line_values, preset_values, read_notebook
from backsight.app.runs import RUN_VARIABLE, code_digest, complete_run, run_folder, start_run
from backsight.errors import BacksightError, nearest
from backsight.project import FINISHED, METRICS, PARTIAL_METRICS, STARTED, project_root, read_json, shown

if TYPE_CHECKING:
    import nbformat

_PROGRESS_BAR = re.compile(r"[^\r\n]*\d+%\|[^\r\n]*[\r\n]?|\r")

KERNEL = "python3"  # the kernel of this environment, whatever the notebook's metadata says
KERNEL_START_SECONDS = 180
IMAGE_SOURCES = ("scenes", "photographs")
# Parameters that hold a path; on the command line they are relative to the caller's folder.
PATHS = ("images", "trained_on", "inverses", "target", "photograph", "results")
# The least value with a meaning; a notebook's own default is allowed below it (steps = 0: the recipe's number).
MINIMA: Mapping[str, int] = {
    "seed": 0,
    "steps": 1,
    "n": 1,
    "train_images": 1,
    "validation_images": 1,
    "test_images": 1,
    "fit_images": 1,
    "null_images": 1,
    "evaluate": 1,
    "batch_size": 1,
    "scenes": 1,
}
WIDGET = "application/vnd.jupyter.widget-view+json"
# What to fetch when a preset names a data set that is not there; data/README.md says the same at length.
DOWNLOADS: Mapping[str, str] = {
    "data/coco": "download the train2017 and val2017 images and the instance annotations of COCO 2017 into "
    "data/coco/{train2017,val2017,annotations}, as data/README.md says",
    "data/imagenet": "download ILSVRC 2012 (train and validation) into data/imagenet/{train,val}/<class>/, "
    "as data/README.md says",
}


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
    check_writable(folder)
    return Plan(opened, values, folder)


def _relocated(name: str, value: Any) -> Any:
    """A path from the command line as the kernel, which works in the project's folder, has to read it."""
    if name not in PATHS or not isinstance(value, str) or value in IMAGE_SOURCES:
        return value
    path = Path(value).expanduser()
    # A target named org/model is also a relative path; it is one only where such a file exists.
    return shown(path.absolute()) if path.exists() else value


FEATURES = ("auto", "always", "never")  # families.Features, whose module takes seconds to import


def check_values(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse values that no notebook can work with: BacksightError, before weights or images are read.

    Relative paths are relative to the working folder.
    """
    for name, least in MINIMA.items():
        value = values.get(name)
        if isinstance(value, int | float) and value < least and value != defaults.get(name):
            raise BacksightError(f"{name} must be at least {least}, not {value}.")
    if isinstance(families := values.get("families"), list):
        check_families(families)
    if (features := values.get("features", "auto")) not in FEATURES:
        raise BacksightError(f"features is {features!r}; it is one of {', '.join(FEATURES)}.")
    if "seeds" in values:
        check_seeds(values["seeds"])
    for name in ("images", "trained_on"):
        if isinstance(source := values.get(name), str):
            check_images(source, name)
    if isinstance(photograph := values.get("photograph"), str):
        check_photograph(photograph)
    if isinstance(pictures := values.get("pictures"), list):
        from backsight.app.frames import check_pictures

        check_pictures(pictures)
    if isinstance(query := values.get("query"), str) and query:
        from backsight.app.explorer.view import from_query

        from_query(query)
    targets = _named_targets(values)
    inverses = values.get("inverses")
    if isinstance(inverses, str) and inverses:
        check_inverses(inverses, values.get("target"), values.get("seeds", ()))
    _check_targets(targets, values)
    if isinstance(inverses, str) and inverses and values.get("pretrained", True):
        for seed in values.get("seeds") or [values.get("seed")]:
            check_weights(inverses, values.get("target"), seed)


def check_families(families: Sequence[Any]) -> None:
    """Refuse an unknown inverse family, and none."""
    from backsight.inverses.families import FAMILIES

    if not families:
        raise BacksightError(f"families is empty; name at least one of {', '.join(FAMILIES)}.")
    for family in families:
        if family not in FAMILIES:
            raise BacksightError(f"no inverse family {family!r} in families; {nearest(str(family), FAMILIES)}.")


def check_images(source: str, name: str = "images") -> None:
    """Refuse an image source that is neither a known name nor a folder with images somewhere inside."""
    from backsight.data.decode import READABLE, is_image

    if source in IMAGE_SOURCES:
        return
    folder = Path(source).expanduser()
    if not folder.exists():
        if download := DOWNLOADS.get(source.rstrip("/")):
            raise BacksightError(f"there is no {source}: {download}.")
        raise BacksightError(
            f"{name}: no folder {source!r}; give a folder of images or one of {', '.join(IMAGE_SOURCES)}."
        )
    if not folder.is_dir():
        raise BacksightError(f"{name}: {source} is a file; give the folder that holds the images.")
    try:
        if not any(folder.iterdir()):
            raise BacksightError(f"{name}: the folder {source} is empty.")
    except OSError as error:
        raise BacksightError(f"{name}: the folder {source} cannot be read: {error.strerror}.") from error
    if not any(
        file.lower().endswith((*READABLE, ".tar")) or is_image(os.path.join(inside, file))
        for inside, _, files in os.walk(folder, followlinks=True)
        for file in files
    ):
        raise BacksightError(f"{name}: the folder {source} holds no images ({' '.join(READABLE)}).")


def check_photograph(photograph: str) -> None:
    """Refuse a photograph that is neither one of the embedded ones nor a file."""
    from backsight.scenes.photographs import PHOTOGRAPHS

    if photograph not in PHOTOGRAPHS and not Path(photograph).expanduser().is_file():
        raise BacksightError(
            f"no photograph {photograph!r}: give an image file or one of the embedded ones; "
            f"{nearest(photograph, PHOTOGRAPHS)}."
        )


def _named_targets(values: Mapping[str, Any]) -> list[str]:
    """The targets that a run reads, less the one that it makes itself."""
    named = values.get("targets") if isinstance(values.get("targets"), list) else []
    if "targets" in values and named == []:
        raise BacksightError("targets is empty; name at least one (`backsight targets` lists them).")
    targets = [name for name in [values.get("target"), *(named or [])] if isinstance(name, str) and name]
    if retrained := values.get("retrain"):
        from backsight.scenes.train import RECIPES

        if retrained not in RECIPES:
            raise BacksightError(f"retrain: no recipe for {retrained!r}; {nearest(str(retrained), list(RECIPES))}.")
    return [target for target in targets if target != retrained]


def _taps(values: Mapping[str, Any]) -> Any:
    return "blocks" if values.get("taps") is None else values["taps"]


def _check_targets(targets: Sequence[str], values: Mapping[str, Any]) -> None:
    """Refuse targets, taps and sizes that cannot work, with the target libraries."""
    if not targets:
        return
    from backsight.targets import check_target

    for target in targets:
        check_target(target, _taps(values), values.get("image_size"), bool(values.get("pretrained", True)))


def check_seeds(seeds: Any) -> None:
    """Refuse training seeds that are no distinct whole numbers from 0."""
    fine = isinstance(seeds, list) and seeds and all(type(each) is int and each >= 0 for each in seeds)
    if not fine or len(set(seeds)) < len(seeds):
        raise BacksightError(f"seeds must be a list of different whole numbers from 0, such as [0, 1, 2], not {seeds}.")


def check_inverses(source: str, target: Any, seeds: Sequence[int] = ()) -> None:
    """Refuse a folder (searched to the bottom) without inverses, with a damaged one, or with none of the target.

    seeds: training seeds of which the target has to have inverses.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise BacksightError(f"inverses: no folder {source!r}; give the folder of a finished training run.")
    from backsight.inverses.files import inverse_files, read_header

    files = list(inverse_files(folder))
    if not files:
        raise BacksightError(f"inverses: the folder {source} holds no inverses (<family>--<tap>.safetensors).")
    made = [read_header(path) for path in files]
    names = sorted({each.target for each in made})
    if isinstance(target, str) and not Path(target).exists() and target not in names:
        raise BacksightError(f"inverses: those in {source} are of {', '.join(names)}, not of {target}.")
    there = sorted({each.seed for each in made if each.target == target and each.weights != "random"})
    if there and (missing := [seed for seed in seeds if seed not in there]):
        raise BacksightError(
            f"inverses: those of {target} in {source} were trained with the seeds {there}, none with {missing}: "
            "train them with 02_train_inverse, or set seeds to those that are there."
        )


def check_weights(source: str, target: Any, seed: Any = None) -> None:
    """Refuse inverses that were made for a target of the same name with other weights; seed: whose to judge.

    Only where the target's weights lie in a folder of this machine: to compare them they have to be read.
    """
    if not isinstance(target, str):
        return
    from backsight.inverses.files import inverse_files, read_header

    files = {path: read_header(path) for path in inverse_files(Path(source).expanduser())}
    # Inverses of an untrained target may lie beside those of the trained one: they are null models.
    files = {path: each for path, each in files.items() if each.target == target and each.weights != "random"}
    if len({each.seed for each in files.values()}) > 1:  # the notebook takes those of its own seed
        files = {path: each for path, each in files.items() if each.seed == seed}
    from backsight.targets.load import load_target
    from backsight.targets.names import resolve

    if not files or resolve(target).checkpoint is None:
        return
    weights_hash = load_target(target).weights_hash
    for path, each in files.items():
        if each.weights_hash != weights_hash:
            raise BacksightError(
                f"inverses: {shown(path)} was made for {target} with the weights {each.weights_hash}, but {target} "
                f"has the weights {weights_hash} now: give other inverses, or train new ones with 02_train_inverse."
            )


def check_writable(folder: Path) -> None:
    """Refuse a results folder that cannot be made or written; leaves nothing behind."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(0, f"{shown(existing)} is a file")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise BacksightError(f"cannot write results to {shown(folder)}: {error.strerror}; use --out.") from error


def run_plan(plan: Plan, fresh: bool = False, verbose: bool = False, say: Callable[[str], None] = print) -> Path:
    """Run a checked notebook, or reuse its finished run; returns the path of run.json.

    fresh: run again from the start even where a finished or interrupted equal run exists; verbose: print what
    the cells print. Raises NotebookError where a cell fails, BacksightError where the folder is in use.
    """
    name, place = plan.notebook.path.name, shown(plan.folder)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BacksightError(f"cannot write results to {place}: {error.strerror}.") from error
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
    complete = record is not None and record.get("status") == "complete"
    return complete and _same(record, plan) and plan.executed.is_file()


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
    for folder in ("figures", FRAMES, "inverses", "checkpoints"):
        shutil.rmtree(plan.folder / folder, ignore_errors=True)


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

    before = {name: os.environ.get(name) for name in (RUN_VARIABLE, "MPLBACKEND")}
    handler = signal.signal(signal.SIGTERM, interrupt)
    os.environ[RUN_VARIABLE] = str(folder)
    os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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
