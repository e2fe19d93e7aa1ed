"""The strict runner: what it refuses before a kernel starts, and what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import NotebookWriter
from safetensors.numpy import save_file

from backsight.app.cli import main
from backsight.app.parameters import command_line_values, preset_values, read_notebook
from backsight.app.runner import NotebookError, plan_run, run_plan, tidy
from backsight.app.runs import check_folder, complete_run, open_run, start_run
from backsight.errors import BacksightError
from backsight.project import project_root, read_json, write_atomically, write_json

DECLARATIONS = """\
steps = 10  # optimiser steps
rate = 0.5
flag = False
text = "a"
names = ["a", "b"]
sizes = [1]
taps = "blocks"
out = ""
seed = 0
"""


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("steps=20", 20),
        ("steps=1e3", 1000),
        ("rate=2", 2.0),
        ("rate=1e-3", 0.001),
        ("flag=true", True),
        ("flag=False", False),
        ("text=3", "3"),
        ("text=a=b, c", "a=b, c"),
        ("names=[linear, direct]", ["linear", "direct"]),
        ("names=linear,direct", ["linear", "direct"]),
        ("sizes=0,1", [0, 1]),
        ("sizes=[1, 2]", [1, 2]),
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
        (["steps=many"], ["steps", "'many'", "10"]),
        (["steps=1.5"], ["steps", "1.5"]),
        (["steps=-1"], ["steps", "greater than or equal to 0"]),
        (["sizes=[1, -1]"], ["sizes", "greater than or equal to 0"]),
        (["rate=-0.5"], ["rate", "greater than or equal to 0"]),
        (["seed=18446744073709551616"], ["seed", "less than"]),
        (["rate=fast"], ["rate", "'fast'"]),
        (["rate=nan"], ["rate", "'nan'"]),
        (["rate=.inf"], ["rate", "finite"]),
        (["flag=1"], ["flag", "1", "False"]),
        (["names=[1]"], ["names", "['a', 'b']"]),
        (["names=[a"], ["names", "list"]),
        (["sizes=[a]"], ["sizes", "'a'"]),
        (["steps"], ["'steps' is not name=value"]),
        (["steps=1", "steps=2"], ["given twice"]),
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
        ("steps = 2 + 3 * x", "parameters cell"),
        ("import os", "is not `name = literal`"),
        ("steps = ", "invalid syntax"),
        ("steps: int = 1", "is not `name = literal`"),
    ],
)
def test_parameters_cells_that_cannot_be_checked(write_notebook: NotebookWriter, cell: str, words: str) -> None:
    with pytest.raises(BacksightError, match=words):
        read_notebook(write_notebook(cell))


def test_presets(write_notebook: NotebookWriter, tmp_path: Path) -> None:
    notebook = read_notebook(write_notebook(DECLARATIONS, name="02_tiny"))
    write_notebook("elsewhere = 1\nn = 2", name="03_other")
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
        "02_tiny: {steps: 1.5}": "steps = 1.5",
        "common: {flag: 'true'}": "flag = 'true'",
        "02_tinny: {steps: 1}": "no notebook is called '02_tinny'; nearest: 02_tiny",
        "comon: {steps: 1}\n02_tiny: {}": "no notebook is called 'comon'; nearest: common",
        "common: {stepz: 1}": "no notebook has a parameter 'stepz'",
        "02_tiny: {steps: 1, steps: 2}": "'steps' is given twice",
        "02_tiny: {steps: 1}\n02_tiny: {steps: 2}": "'02_tiny' is given twice",
        "[1, 2]": "not YAML with one mapping",
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
    notebook, out = write_notebook('n = 5\nout = ""', "1 + 1"), tmp_path / "results" / "run"
    (tmp_path / "file.txt").write_text("a file")
    for arguments, words in [
        (["-p", "n=many"], "'many'"),
        (["-p", "count=3"], "no parameter 'count'"),
        (["-f", "nosuch"], "no preset 'nosuch'"),
    ]:
        assert words in refused(capsys, notebook, "--out", out, *arguments)
    assert "no notebook" in refused(capsys, notebook.with_name("tiney.ipynb"), "--out", out)
    nearest = f"in {os.path.relpath(project_root() / 'notebooks')}, nearest: 03_quality.ipynb"
    assert nearest in refused(capsys, tmp_path / "03_qualty.ipynb", "--out", out)
    assert "file.txt" in refused(capsys, notebook, "--out", tmp_path / "file.txt" / "below")
    assert not out.parent.exists()


def test_parameters_are_refused_without_the_large_libraries(write_notebook: NotebookWriter) -> None:
    """Which take seconds to load."""
    notebook = write_notebook("steps = 1")
    program = (
        "import sys\n"
        "from backsight.app.cli import main\n"
        "code = main(['run', sys.argv[1], '-p', 'stepz=3'])\n"
        "print(code, {'torch', 'timm', 'transformers', 'pandas', 'papermill'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", program, str(notebook)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "2 set()\n"


def test_paths_of_the_command_line_are_the_callers(
    write_notebook: NotebookWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = write_notebook('images = "scenes"\ntarget = ""\npictures = ["china"]\nfamilies = ["linear"]\nout = ""')
    for name in ("mine", "leaves", "scenes-vit", "linear"):  # a name of ours is not the folder that is called so
        (tmp_path / name).mkdir()
    (tmp_path / "mine.pth").write_bytes(b"")
    (tmp_path / "cat.jpg").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    plan = plan_run(notebook, assignments=["images=mine", "pictures=[china, cat.jpg]", "families=linear", "out=here"])
    assert plan.values["images"] == str(tmp_path / "mine")
    assert plan.values["pictures"] == ["china", str(tmp_path / "cat.jpg")]
    assert plan.values["families"] == ["linear"]
    assert plan_run(notebook, assignments=["target=scenes-vit"]).values["target"] == "scenes-vit"
    assert plan_run(notebook, assignments=["images=leaves"]).values["images"] == "leaves"
    target = plan_run(notebook, assignments=["target=vit_tiny_patch16_224@mine.pth"]).values["target"]
    assert target == f"vit_tiny_patch16_224@{tmp_path / 'mine.pth'}"
    assert plan.folder == tmp_path / "here"
    assert plan_run(notebook).folder == Path(os.environ.get("BACKSIGHT_RESULTS", project_root() / "results")) / "tiny"


OPEN = 'from backsight.app.runs import open_run\nrun = open_run("tiny", {"out": out, "steps": steps})'
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
    notebook.write_text(json.dumps(json.loads(notebook.read_text()) | {"metadata": {}}))  # as some editors write it
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
    assert "an earlier run, of other steps, is removed" in captured.out
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
        run_plan(plan)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_run_of_another_notebook_is_left_alone(write_notebook: NotebookWriter, tmp_path: Path) -> None:
    start_run(tmp_path / "run", {"notebook": "other", "parameters": {}})
    with pytest.raises(BacksightError, match="a run of other"):
        plan_run(write_notebook("steps = 1", "steps"), out=tmp_path / "run")


def test_a_folder_of_the_user_is_left_alone(
    write_notebook: NotebookWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the notebooks' own, whose notebook the executed one would replace; in Lab too."""
    notebook = write_notebook("steps = 1", "steps")
    before = {path: path.read_bytes() for path in notebook.parent.iterdir()}
    with pytest.raises(BacksightError, match=notebook.name):
        plan_run(notebook, out=notebook.parent)
    monkeypatch.delenv("BACKSIGHT_RUN", raising=False)
    with pytest.raises(BacksightError, match=notebook.name):
        open_run("tiny", {"out": str(notebook.parent)})
    assert {path: path.read_bytes() for path in notebook.parent.iterdir()} == before
    start_run(notebook.parent, {"notebook": "tiny", "parameters": {}})  # as an executed one in its run's folder
    with pytest.raises(BacksightError, match="replace"):
        plan_run(notebook, out=notebook.parent)


OF_THE_RUN = (
    *("figures/depth.png", "checkpoints/modular.safetensors", "inverses/linear--blocks.5.safetensors"),
    *("frames/scenes-vit/0-china--input.png", "metrics.partial.csv", "tiny.partial.ipynb"),
)
OF_THE_USER = (
    *("figures/thesis.png", "figures/notes.txt", "checkpoints/my_model.pth", "checkpoints/best.safetensors"),
    *("inverses/mine.txt", "inverses/mine.safetensors", "frames/holiday.png", "mine.ipynb"),
)


def test_only_the_same_run_is_resumed(
    write_notebook: NotebookWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Interrupted by other parameters, code or files: start afresh, without what it made; the user's files stay."""
    notebook = write_notebook("steps = 1\nout = ''", "steps")
    folder = tmp_path / "run"
    plan = plan_run(notebook, out=folder)

    def stopped(plan: object, verbose: bool) -> None:
        raise NotebookError

    monkeypatch.setattr("backsight.app.runner._execute", stopped)
    for change, words in [
        ({}, "resuming"),
        ({"parameters": {"steps": 2}}, "of other steps"),
        ({"code_digest": "older"}, "of other code"),
        ({"files_digest": "other"}, "of other code or files"),
    ]:
        start_run(folder, plan.identity | change)
        record = read_json(folder / "started.json") or {}
        write_json(folder / "started.json", record | {"figures": ["depth.png", "../../outside.png"]})
        for name in (*OF_THE_RUN, *OF_THE_USER, "../outside.png"):
            write_atomically(folder / name, lambda temporary: temporary.write_text(""))
        with pytest.raises(NotebookError):
            run_plan(plan)
        assert words in capsys.readouterr().out.splitlines()[-2]
        assert {(folder / name).exists() for name in OF_THE_RUN} == {not change}
        assert all((folder / name).exists() for name in (*OF_THE_USER, "../outside.png"))


def test_a_kill_while_an_earlier_run_is_removed_leaves_a_folder_that_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_run(tmp_path, {"notebook": "tiny", "parameters": {"n": 1}})
    complete_run(tmp_path)
    (tmp_path / "started.json").unlink()  # as it comes with a clone
    (tmp_path / "values.parquet").write_text("")

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == "values.parquet":
            raise KeyboardInterrupt
        if path.exists():
            os.unlink(path)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        start_run(tmp_path, {"notebook": "tiny", "parameters": {"n": 2}})
    monkeypatch.undo()
    check_folder(tmp_path, "tiny")
    assert "of other n" in start_run(tmp_path, {"notebook": "tiny", "parameters": {"n": 2}})
    assert [path.name for path in tmp_path.iterdir()] == ["started.json"]


@pytest.mark.parametrize(
    ("parameter", "value", "file"),
    [
        ("images", "{}", "a/cat.jpg"),
        ("images", "{}/@home", "@home/cat.jpg"),
        ("target", "{}", "model.safetensors"),
        ("target", "vit_tiny_patch16_224@{}/mine.pth", "mine.pth"),
        ("inverses", "{}", "train/inverses/linear--blocks.5.safetensors"),
        ("results", "{}", "quality/run.json"),
        ("photograph", "{}/cat.jpg", "cat.jpg"),
        ("pictures", ["china", "{}/cat.jpg"], "cat.jpg"),
    ],
)
def test_a_run_on_other_files_of_the_same_name_is_another_run(
    write_notebook: NotebookWriter, tmp_path: Path, parameter: str, value: str | list[str], file: str
) -> None:
    def folder(text: str) -> str:
        return text.format(tmp_path / "given")

    declared = [folder(text) for text in value] if isinstance(value, list) else folder(value)
    notebook = write_notebook(f"{parameter} = {declared!r}")
    path = tmp_path / "given" / file

    def identity() -> dict[str, object]:
        return plan_run(notebook, out=tmp_path / "given" / "run").identity

    write_atomically(path, lambda temporary: temporary.write_text("one"))
    first = identity()
    write_atomically(tmp_path / "given" / "run" / "figures" / "own.png", lambda temporary: temporary.write_text(""))
    start_run(tmp_path / "given" / "run", first)
    assert identity() == first  # what the run itself writes there is no input
    write_atomically(path, lambda temporary: temporary.write_text("two"))
    assert identity() != first


def test_images_behind_a_link_belong_to_a_run(write_notebook: NotebookWriter, tmp_path: Path) -> None:
    real, given = tmp_path / "real", tmp_path / "given"
    for folder in (real, given):
        folder.mkdir()
    (given / "link").symlink_to(real)
    (real / "loop").symlink_to(given)
    (real / "cat.jpg").write_text("one")
    notebook = write_notebook(f"images = {str(given)!r}")
    first = plan_run(notebook, out=tmp_path / "run").identity
    (real / "cat.jpg").write_text("another")
    assert plan_run(notebook, out=tmp_path / "run").identity != first


def test_inverses_of_another_target_do_not_make_another_run(write_notebook: NotebookWriter, tmp_path: Path) -> None:
    """Their training may end while a study is interrupted, which then resumes."""

    def trained(target: str, tap: str) -> None:
        path = tmp_path / "runs" / target / "inverses" / f"linear--{tap}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        header = json.dumps({"header": {"target": target}})
        save_file({"weight": np.zeros(1)}, path, metadata={"backsight": header})

    notebook = write_notebook(f"target = 'scenes-vit'\ninverses = {str(tmp_path / 'runs')!r}")
    trained("scenes-vit", "blocks.0")
    before = plan_run(notebook, out=tmp_path / "out").identity
    trained("scenes-detr", "backbone")
    assert plan_run(notebook, out=tmp_path / "out").identity == before
    trained("scenes-vit", "blocks.1")
    assert plan_run(notebook, out=tmp_path / "out").identity != before


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
    assert "another process writes" in second.stderr
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
    assert record["status"] == "complete"
    assert record["seconds"]["interrupted"] > 0
    assert "WARNING" not in resumed.stderr


def test_seconds_of_a_resumed_run_are_summed(tmp_path: Path) -> None:
    identity = {"notebook": "tiny", "parameters": {}}
    for _ in range(3):
        start_run(tmp_path, identity)
        started = (tmp_path / "started.json").stat().st_mtime
        checkpoint = write_atomically(tmp_path / "checkpoint", lambda temporary: temporary.write_text(""))
        os.utime(checkpoint, (started + 100, started + 100))  # killed 100 seconds later
    seconds = read_json(complete_run(tmp_path))["seconds"]  # type: ignore[index]
    assert seconds["total"] == pytest.approx(200, abs=10)
    assert seconds["total"] >= seconds["interrupted"] == pytest.approx(200, abs=10)


def test_a_result_made_anew_is_no_modified_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make study` had remade of the committed results was said to be other code than that of the commit."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "backsight"\n')
    for place in ("lib/code.py", "results/run/metrics.csv"):
        write_atomically(tmp_path / place, lambda file: file.write_text("before"))
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)

    def recorded() -> object:
        start_run(tmp_path / "new", {"notebook": "tiny", "parameters": {}})
        return (read_json(tmp_path / "new" / "started.json") or {})["modified"]

    (tmp_path / "results/run/metrics.csv").write_text("after")
    assert recorded() is False
    (tmp_path / "lib/code.py").write_text("after")
    assert recorded() is True


def wait_until(condition: object, seconds: float = 180) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_a_run_in_lab_completes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKSIGHT_RESULTS", str(tmp_path))
    monkeypatch.delenv("BACKSIGHT_RUN", raising=False)
    run = open_run("tiny", {"steps": 2, "seed": 1})
    with run.phase("work"), run.phase("work"):
        pass
    assert not (tmp_path / "tiny" / "run.json").exists()
    run.finish()
    record = read_json(tmp_path / "tiny" / "run.json")
    assert record is not None
    assert (record["status"], record["seed"]) == ("complete", 1)
    inverse = write_atomically(run.inverses / "linear--blocks.5.safetensors", lambda path: path.write_bytes(b""))
    open_run("tiny", {"steps": 2, "seed": 1})
    assert not (tmp_path / "tiny" / "run.json").exists(), "a run that starts again is not complete"
    assert inverse.exists()
    open_run("tiny", {"steps": 3, "seed": 1})
    assert not inverse.exists(), "what other parameters made would count as this run's"


def test_settings_are_parameters_in_one_dictionary(write_notebook: NotebookWriter, tmp_path: Path) -> None:
    cell = 'steps = 3\nout = ""\nsettings = {\n    "n": 100,  # images\n    "noises": ["float32", "0.1"],\n}'
    notebook = write_notebook(cell, OPEN, "print(steps, settings)", "run.finish()")
    plan = plan_run(notebook, assignments=["n=4", "noises=int8,bfloat16"], out=tmp_path / "run")
    assert plan.identity["parameters"] == {"steps": 3, "n": 4, "noises": ["int8", "bfloat16"]}
    run_plan(plan)
    executed = nbformat.read(tmp_path / "run" / notebook.name, as_version=4)
    printed = "".join(o.get("text", "") for cell in executed.cells for o in cell.get("outputs", []))
    assert "3 {'n': 4, 'noises': ['int8', 'bfloat16']}" in printed
    for wrong, said in (
        ("m=4", "no parameter 'm'"),
        ("n=many", "n = 'many'"),
        ("settings={}", "no parameter 'settings'"),
    ):
        with pytest.raises(BacksightError, match=said):
            plan_run(notebook, assignments=[wrong])
    with pytest.raises(BacksightError, match="twice"):
        read_notebook(write_notebook('n = 1\nsettings = {"n": 2}', OPEN))


def test_saved_tables_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    from backsight.tables.values import METRIC_COLUMNS

    monkeypatch.delenv("BACKSIGHT_RUN", raising=False)
    run = open_run("tiny", {"out": tmp_path / "run"})
    figure = Figure()
    figure.subplots().plot([1, 2])
    elsewhere = run.save_figure(f"{tmp_path}/org/model", figure)  # a target may be a path
    assert elsewhere.parent == run.figures
    first = run.save_figure("depth", figure).read_bytes()
    assert run.save_figure("depth", figure).read_bytes() == first
    table = run.save_metrics([dict.fromkeys(METRIC_COLUMNS, 1) | {"extra": 2}])
    assert list(table.columns) == [*METRIC_COLUMNS, "extra"]
    with pytest.raises(KeyError, match="tap"):
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
    notebook = write_notebook("steps = 1", "while True:\n    sum(range(1000))")
    out = tmp_path / "run"
    command = [sys.executable, "-m", "backsight.app.cli", "run", str(notebook), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (out / "tiny.partial.ipynb").exists())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 130
    assert errors == "backsight: stopped; the same command resumes a run or a fit.\n"
    assert not (out / "run.json").exists()


def test_saved_notebooks_keep_no_progress_bar() -> None:
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "0"}}
    shown = [
        nbformat.v4.new_output("display_data", data={"text/plain": "scenes: 0%|  | 0/3 [00:00<?, ?it/s]", **view}),
        nbformat.v4.new_output("display_data", data={"text/plain": "IntSlider(value=3)", **view}),
        nbformat.v4.new_output("stream", name="stdout", text="1,024 images\n"),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=shown)])
    tidy(notebook)
    assert [output.output_type for output in notebook.cells[0].outputs] == ["display_data", "stream"]
    assert "IntSlider" in notebook.cells[0].outputs[0].data["text/plain"]
