"""The strict runner: what it refuses before a kernel starts, and what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import NotebookWriter
from safetensors.numpy import save_file

from backsight.app.checks import check_inverses
from backsight.app.cli import main
from backsight.app.parameters import command_line_values, preset_values, read_notebook
from backsight.app.runner import NotebookError, _tidy, plan_run, run_plan
from backsight.app.runs import complete_run, open_run, start_run
from backsight.errors import BacksightError
from backsight.project import project_root, read_json, write_atomically

DECLARATIONS = """\
steps = 10  # optimiser steps
rate = 0.5
flag = False
text = "a"
names = ["a", "b"]
sizes = [1]
anything = None
taps = "blocks"
out = ""
seed = 0
"""


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("steps=20", 20),
        ("rate=2", 2.0),
        ("rate=1e-3", 0.001),
        ("flag=true", True),
        ("flag=False", False),
        ("text=3", "3"),
        ("text=a=b, c", "a=b, c"),
        ("steps=1e3", 1000),
        ("names=[linear, direct]", ["linear", "direct"]),
        ("names=linear,direct", ["linear", "direct"]),
        ("sizes=0,1", [0, 1]),
        ("sizes=[1, 2]", [1, 2]),
        ("anything={a: 1}", {"a": 1}),
        ("taps=components", "components"),
        ("taps=[blocks.0, norm]", ["blocks.0", "norm"]),
    ],
)
def test_text_becomes_the_declared_type(write_notebook: NotebookWriter, assignment: str, value: object) -> None:
    notebook = read_notebook(write_notebook(DECLARATIONS))
    (parsed,) = command_line_values(notebook, [assignment]).values()
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["stepz=3"], ["no parameter 'stepz'", "nearest: steps"]),
        (["steps=many"], ["steps takes a whole number", "'many'"]),
        (["steps=1.5"], ["steps takes a whole number"]),
        (["rate=fast"], ["rate takes a number"]),
        (["rate=nan"], ["rate takes a number"]),
        (["flag=1"], ["flag takes true or false"]),
        (["names=[1]"], ["names takes a list", '["a", "b"]']),
        (["names=[a"], ["names takes a list"]),
        (["sizes=[a]"], ["sizes takes a list", "[1, 2]"]),
        (["steps"], ["'steps' is not name=value"]),
        (["steps=1", "steps=2"], ["steps is given twice"]),
    ],
)
def test_wrong_names_and_types_are_refused(
    write_notebook: NotebookWriter, assignments: list[str], words: list[str]
) -> None:
    notebook = read_notebook(write_notebook(DECLARATIONS))
    with pytest.raises(BacksightError) as refusal:
        command_line_values(notebook, assignments)
    message = str(refusal.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("steps = 2 + 3 * x", "computed default"),
        ("import os", "is not `name = literal`"),
        ("steps = ", "is not Python"),
        ("steps: int = 1", "is not `name = literal`"),
    ],
)
def test_parameters_cells_that_cannot_be_checked(write_notebook: NotebookWriter, cell: str, words: str) -> None:
    with pytest.raises(BacksightError, match=words):
        read_notebook(write_notebook(cell))


def test_presets(write_notebook: NotebookWriter, tmp_path: Path) -> None:
    notebook = read_notebook(write_notebook(DECLARATIONS, name="02_tiny"))
    preset = tmp_path / "mine.yaml"

    def said(text: str) -> dict[str, object]:
        preset.write_text(text)
        return preset_values(notebook, str(preset))

    assert said("common: {seed: 3, elsewhere: 1}\n02_tiny: {rate: 1, taps: [norm]}\n03_other: {n: 2}") == {
        "seed": 3,
        "rate": 1.0,
        "taps": ["norm"],
    }
    for text, words in {
        "02_tiny: {stepz: 1}": "no parameter 'stepz'",
        "02_tiny: {steps: 1.5}": "steps takes a whole number",
        "common: {flag: 'true'}": "flag takes true or false",
        "02_tinny: {steps: 1}": "no notebook is called '02_tinny'; nearest: 02_tiny",
        "[1, 2]": "must hold one mapping",
        "a: b: c": "not YAML",
    }.items():
        with pytest.raises(BacksightError, match=words):
            said(text)
    with pytest.raises(BacksightError, match="no preset 'smok'; nearest: smoke"):
        preset_values(notebook, "smok")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence with which `backsight run` refuses these arguments with exit 2."""
    assert main(["run", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("backsight: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_bad_input_exits_2_and_writes_nothing(
    write_notebook: NotebookWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = (
        'images = "scenes"\nn = 5\nfamilies = ["linear"]\nphotograph = "chelsea"\n'
        'retrain = ""\nsteps = 0\ninverses = ""\nseed = 0\nout = ""'
    )
    notebook, out = write_notebook(parameters, "1 + 1"), tmp_path / "results" / "run"
    empty, imageless, file = tmp_path / "empty", tmp_path / "imageless", tmp_path / "file.txt"
    empty.mkdir()
    imageless.mkdir()
    (imageless / "notes.txt").write_text("no picture")
    file.write_text("a file")
    for arguments, words in [
        (["-p", f"images={tmp_path / 'nowhere'}"], "nowhere"),
        (["-p", "images="], "images"),  # as from an unset variable of the shell
        (["-p", f"images={empty}"], str(empty)),
        (["-p", f"images={imageless}"], "no images"),
        (["-p", f"images={file}"], str(file)),
        (["-p", "n=0"], "n must be at least 1"),
        (["-p", "steps=-1"], "steps must be at least 1"),
        (["-p", "retrain=scenes-vti"], "nearest: scenes-vit"),
        (["-p", "seed=-1"], "-1"),
        (["-p", "seed=18446744073709551616"], "18446744073709551616"),
        (["-p", "families=[linaer]"], "nearest: linear"),
        (["-p", "families=[]"], "families is empty"),
        (["-p", "photograph=chelsae"], "nearest: chelsea"),
        (["-p", f"inverses={empty}"], "holds no inverses"),
        (["-p", f"inverses={tmp_path / 'nowhere'}"], "no folder"),
        (["-p", "count=3"], "no parameter 'count'"),
        (["-f", "nosuch"], "no preset 'nosuch'"),
    ]:
        assert words in refused(capsys, notebook, "--out", out, *arguments)
    assert "no notebook" in refused(capsys, notebook.with_name("tiney.ipynb"), "--out", out)
    assert "notebooks/00_quickstart.ipynb" in refused(capsys, tmp_path / "00_quickstart.ipynb", "--out", out)
    assert "cannot write results" in refused(capsys, notebook, "--out", file / "below")
    assert not out.parent.exists()


def test_absent_data_sets_say_what_to_download(write_notebook: NotebookWriter, root: Path) -> None:
    for name in ("coco", "imagenet"):
        if (root / "data" / name).exists():
            pytest.skip(f"data/{name} is there")
        with pytest.raises(BacksightError, match=f"download .* data/{name}/"):
            plan_run(write_notebook(f'images = "data/{name}"'))


def _write_inverse(folder: Path, weights_hash: str, seed: int = 0) -> Path:
    from backsight.inverses.files import FORMAT
    from backsight.inverses.module import InverseHeader

    header = InverseHeader("linear", "scenes-vit", "shipped", weights_hash, "norm", "pixels", seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {"weight": np.zeros(1)},
        folder / "linear--norm.safetensors",
        {"backsight": json.dumps({"format": FORMAT, "kind": "linear", "header": asdict(header)})},
    )
    return folder


def test_inverses_of_other_weights_are_refused(write_notebook: NotebookWriter, tmp_path: Path) -> None:
    """Before the kernel starts, although the name of the target is the same."""
    from backsight.targets import load_target

    own = load_target("scenes-vit").weights_hash
    _write_inverse(tmp_path / "own", own, seed=1)
    check_inverses(str(tmp_path / "own"), "scenes-vit")
    notebook = write_notebook('target = "scenes-vit"\ninverses = ""\nseed = 0')
    other = _write_inverse(tmp_path / "other", "0123456789abcdef")
    with pytest.raises(BacksightError, match=f"with the weights 0123456789abcdef, but scenes-vit has .* {own}"):
        plan_run(notebook, assignments=[f"inverses={other}"])
    _write_inverse(tmp_path / "seeds" / "0", own)
    _write_inverse(tmp_path / "seeds" / "1", "0123456789abcdef", seed=1)
    check_inverses(str(tmp_path / "seeds"), "scenes-vit", seed=0)
    with pytest.raises(BacksightError, match="other inverses"):
        check_inverses(str(tmp_path / "seeds"), "scenes-vit", seed=1)


def test_training_seeds_are_checked_before_the_kernel(write_notebook: NotebookWriter, tmp_path: Path) -> None:
    notebook = write_notebook('target = "scenes-vit"\ninverses = ""\nseeds = [0, 1, 2]\nseed = 0')
    for said in ("[]", "[0, 0]", "[-1]"):
        with pytest.raises(BacksightError, match=r"seeds must be a list of different whole numbers"):
            plan_run(notebook, assignments=[f"seeds={said}"])
    folder = _write_inverse(tmp_path, "0123456789abcdef", seed=1)
    with pytest.raises(BacksightError, match=r"the seeds \[1\], none with \[0, 2\]"):
        plan_run(notebook, assignments=[f"inverses={folder}"])


def test_parameters_are_refused_without_the_target_libraries(write_notebook: NotebookWriter) -> None:
    """Which take seconds to load."""
    notebook = write_notebook('steps = 1\nseeds = [0]\nout = ""')
    program = (
        "import sys\n"
        "from backsight.errors import BacksightError\n"
        "from backsight.app.runner import plan_run\n"
        "for assignment in sys.argv[2:]:\n"
        "    try:\n"
        "        plan_run(sys.argv[1], assignments=[assignment])\n"
        "    except BacksightError as error:\n"
        "        print(error)\n"
        "print({'torch', 'timm', 'transformers', 'nbformat'} & set(sys.modules))\n"
    )
    refused = {"stepz=3": "nearest: steps", "steps=many": "whole number", "seeds=[0, 0]": "different whole numbers"}
    command = [sys.executable, "-c", program, str(notebook), *refused]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[-1] == "set()"
    assert [words in line for line, words in zip(said, refused.values(), strict=False)] == [True] * len(refused)


def test_targets_taps_and_inverses_are_refused_before_the_kernel(
    write_notebook: NotebookWriter, tmp_path: Path
) -> None:
    notebook = write_notebook('target = "scenes-vit"\ntaps = "blocks"\ninverses = ""\nout = ""')
    foreign, cut = _write_inverse(tmp_path / "foreign", "0"), _write_inverse(tmp_path / "cut", "0")
    for file in cut.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    for assignments, words in (
        (["target=scenes-vitt"], "scenes-vit"),
        (["target="], "target is empty"),
        (["target=vit_base_patch16_225"], "vit_base_patch16_2"),
        (["taps=blocks.99"], "no tap 'blocks.99'; nearest: blocks."),
        (["taps=[norm, block.1]"], "no tap 'block.1'"),
        ([f"inverses={foreign}", "target=scenes-detr"], "are of scenes-vit, not of scenes-detr"),
        ([f"inverses={cut}"], "damaged"),
    ):
        with pytest.raises(BacksightError, match=words):
            plan_run(notebook, assignments=assignments)


def test_paths_of_the_command_line_are_the_callers(
    write_notebook: NotebookWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = write_notebook('images = "scenes"\nout = ""')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.JPG").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    plan = plan_run(notebook, assignments=["images=mine", "out=here"])
    assert plan.values["images"] == str(tmp_path / "mine")
    assert plan.folder == tmp_path / "here"
    assert plan_run(notebook).folder == Path(os.environ.get("BACKSIGHT_RESULTS", project_root() / "results")) / "tiny"


OPEN = 'from backsight.app.runs import open_run\nrun = open_run(out, "tiny", {"steps": steps})'
WORK = (
    "import os\n"
    "with run.phase('work'):\n"
    "    (run.folder / 'metrics.partial.csv').write_text(f'value\\n{steps}\\n')\n"
    "assert os.path.exists('pyproject.toml')"
)


def test_a_run_is_recorded_and_reused(
    write_notebook: NotebookWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = write_notebook('steps = 3\nseed = 7\nout = ""', OPEN, WORK, "run.finish()")
    out = tmp_path / "run {with braces}"
    command = ["run", str(notebook), "--out", str(out), "-p", "steps=4"]
    assert main(command) == 0
    record = read_json(out / "run.json")
    assert record is not None
    assert record["status"] == "complete"
    assert record["parameters"] == {"steps": 4, "seed": 7}
    assert record["seed"] == 7
    assert set(record["seconds"]) == {"work", "total"}
    assert {"versions", "commit", "hardware", "weights"} <= set(record)
    assert (out / "metrics.csv").read_text() == "value\n4\n"
    executed = nbformat.read(out / "tiny.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
    assert not list(out.glob("*partial*"))

    written = (out / "run.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 0
    assert "reused" in capsys.readouterr().out
    assert (out / "run.json").stat().st_mtime_ns == written
    (out / "metrics.csv").unlink()  # a run without its results is none
    assert main(command) == 0
    assert (out / "metrics.csv").read_text() == "value\n4\n"

    # Another run in the same folder, which fails: nothing of the finished one may remain as if it were its own.
    failing = write_notebook(
        'steps = 3\nseed = 7\nout = ""', OPEN, WORK, "raise ValueError('told you')", "run.finish()"
    )
    assert main(["run", str(failing), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert "held another run (with other steps)" in captured.out
    assert captured.err.count("\n") == 1
    assert "ValueError: told you" in captured.err
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock",
        "metrics.partial.csv",
        "started.json",
        "tiny.partial.ipynb",
    ]


def test_a_notebook_that_stops_early_is_not_complete(write_notebook: NotebookWriter, tmp_path: Path) -> None:
    # papermill takes SystemExit(0) for success.
    plan = plan_run(write_notebook("steps = 1", "import sys\nsys.exit(0)", "steps"), out=tmp_path / "run")
    with pytest.raises(NotebookError, match="stopped early"):
        run_plan(plan, say=lambda text: None)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_folder_of_the_user_is_left_alone(write_notebook: NotebookWriter, tmp_path: Path) -> None:
    """Such as the notebooks' own, whose notebook the executed one would replace."""
    notebook = write_notebook("steps = 1", "steps")
    before = {path: path.read_bytes() for path in notebook.parent.iterdir()}
    with pytest.raises(BacksightError, match=notebook.name):
        plan_run(notebook, out=notebook.parent)
    assert {path: path.read_bytes() for path in notebook.parent.iterdir()} == before


def test_only_the_same_run_is_resumed(
    write_notebook: NotebookWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted by other parameters, another notebook or other code: start afresh, without its checkpoints."""
    said: list[str] = []
    notebook = write_notebook("steps = 1\nout = ''", "steps")
    folder = tmp_path / "run"
    plan = plan_run(notebook, out=folder)
    monkeypatch.setattr("backsight.app.runner._execute", lambda plan, verbose: None)
    for change, words in [
        ({}, "resuming"),
        ({"parameters": {"steps": 2}}, "with other steps"),
        ({"notebook": "other"}, "of other"),
        ({"code_digest": "older"}, "of other code"),
    ]:
        start_run(folder, plan.identity | change)
        for name in ("checkpoints/step.pt", "figures/depth.png", "figures/notes.txt"):
            write_atomically(folder / name, lambda temporary: temporary.write_text(""))
        with pytest.raises(FileNotFoundError):  # nothing was executed: there is no notebook to check
            run_plan(plan, say=said.append)
        assert words in said[-2]
        assert (folder / "checkpoints").exists() == (folder / "figures" / "depth.png").exists() == (not change)
        assert (folder / "figures" / "notes.txt").exists()  # no run made it


def test_a_killed_run_is_resumed(write_notebook: NotebookWriter, tmp_path: Path) -> None:
    work = (
        "import os, time\n"
        "checkpoint = run.folder / 'checkpoint'\n"
        "if not checkpoint.exists():\n"
        "    checkpoint.write_text(str(os.getpid()))\n"
        "    time.sleep(300)"
    )
    notebook = write_notebook('steps = 1\nout = ""', OPEN, work, "run.finish()")
    out = tmp_path / "run"
    command = [sys.executable, "-m", "backsight.app.cli", "run", str(notebook), "--out", str(out)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: (out / "checkpoint").exists() and (out / "checkpoint").read_text() != "")
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "another run is writing" in second.stderr
    first.kill()
    first.communicate()
    assert not (out / "run.json").exists()
    kernel = Path("/proc") / (out / "checkpoint").read_text()
    if kernel.parent.is_dir():
        wait_until(lambda: not kernel.exists())  # an orphaned kernel must not go on writing
    resumed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resuming" in resumed.stdout
    record = read_json(out / "run.json")
    assert record is not None
    assert (record["status"], record["resumed"]) == ("complete", True)
    assert "WARNING" not in resumed.stderr


def wait_until(condition: object, seconds: float = 180) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_a_run_in_lab_completes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKSIGHT_RESULTS", str(tmp_path))
    monkeypatch.delenv("BACKSIGHT_RUN", raising=False)
    run = open_run("", "tiny", {"steps": 2, "seed": 1})
    with run.phase("work"), run.phase("work"):
        pass
    assert not (tmp_path / "tiny" / "run.json").exists()
    run.finish()
    record = read_json(tmp_path / "tiny" / "run.json")
    assert record is not None
    assert (record["status"], record["seed"]) == ("complete", 1)
    open_run("", "tiny", {"steps": 2, "seed": 1})
    assert not (tmp_path / "tiny" / "run.json").exists(), "a run that starts again is not complete"


def test_saved_tables_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    from backsight.tables.values import METRIC_COLUMNS

    monkeypatch.delenv("BACKSIGHT_RUN", raising=False)
    run = open_run(tmp_path / "run", "tiny", {})
    figure = Figure()
    figure.subplots().plot([1, 2])
    first = run.save_figure("depth", figure).read_bytes()
    assert run.save_figure("depth", figure).read_bytes() == first
    table = run.save_metrics([dict.fromkeys(METRIC_COLUMNS, 1) | {"extra": 2}])
    assert list(table.columns) == [*METRIC_COLUMNS, "extra"]
    with pytest.raises(BacksightError, match="lacks the columns"):
        run.save_metrics([{"value": 1}])
    complete_run(run.folder)
    assert (run.folder / "metrics.csv").is_file()


def test_write_atomically_leaves_all_or_nothing(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "deep" / "a.txt", lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_sigterm_is_an_interruption(write_notebook: NotebookWriter, tmp_path: Path) -> None:
    notebook = write_notebook("steps = 1", "import time\ntime.sleep(300)")
    out = tmp_path / "run"
    command = [sys.executable, "-m", "backsight.app.cli", "run", str(notebook), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (out / "tiny.partial.ipynb").exists())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "the same command resumes" in errors
    assert not (out / "run.json").exists()


def test_saved_notebooks_keep_no_progress_bar() -> None:
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "0"}}
    shown = [
        nbformat.v4.new_output("display_data", data={"text/plain": "scenes: 0%|  | 0/3 [00:00<?, ?it/s]", **view}),
        nbformat.v4.new_output("display_data", data={"text/plain": "IntSlider(value=3)", **view}),
        nbformat.v4.new_output("stream", name="stdout", text="1,024 images\n"),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=shown)])
    _tidy(notebook)
    assert [output.output_type for output in notebook.cells[0].outputs] == ["display_data", "stream"]
    assert "IntSlider" in notebook.cells[0].outputs[0].data["text/plain"]
