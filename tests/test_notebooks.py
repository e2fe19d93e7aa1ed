"""The committed notebooks: executed, clean, and with parameters that the presets fit; notebook_runs.py runs them."""

import json
from pathlib import Path

import nbformat
import pytest
from conftest import committed_notebooks
from execute import digests

from backsight.app.parameters import read_notebook, read_preset
from backsight.app.runner import plan_run
from backsight.project import project_root

NOTEBOOKS = committed_notebooks()
HOW = "execute it again: python tests/execute.py NOTEBOOK"
PRESETS = sorted(path.stem for path in (project_root() / "notebooks" / "presets").glob("*.yaml"))
LARGEST_BYTES = 5_000_000

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_is_committed_executed_and_clean(path: Path, root: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    # A stripped notebook passes nbval vacuously, so that it ran is checked here.
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "not run from top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "shows no picture"
    text = path.read_text(encoding="utf-8")
    assert str(root) not in text, "holds a path of the machine that ran it"
    assert len(text) < LARGEST_BYTES
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    noise = {"papermill", "execution"} & {key for cell in notebook.cells for key in cell.metadata}
    assert not noise | ({"papermill"} & set(notebook.metadata)), "metadata of a run"
    assert not [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]


@each_notebook
def test_outputs_are_of_the_cells_that_are_committed(path: Path) -> None:
    assert executed(path)["cells"] == digests(json.loads(path.read_text(encoding="utf-8"))["cells"])["cells"], HOW


@pytest.mark.slow
@each_notebook
def test_outputs_are_of_the_code_that_is_committed(path: Path) -> None:
    assert executed(path).get("modules") == digests(json.loads(path.read_text(encoding="utf-8"))["cells"])["modules"], (
        HOW
    )


def executed(path: Path) -> dict[str, str]:
    """Digests of what was executed when the outputs were made."""
    return dict(json.loads(path.read_text(encoding="utf-8"))["metadata"].get("backsight", {}).get("executed", {}))


@each_notebook
def test_declares_its_parameters(path: Path) -> None:
    notebook = read_notebook(path)
    assert notebook.defaults["out"] == ""
    assert notebook.defaults["seed"] == 0
    assert len(notebook.defaults) - len(notebook.settings) <= 8, "put what few people change into settings"
    cells = nbformat.read(path, as_version=4).cells
    (declared,) = (cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    lines = [line for line in declared.splitlines() if line not in ("settings = {", "}")]
    silent = [line for line in lines if "  # " not in line and not line.startswith("seed")]
    assert not silent, f"parameters without a comment: {silent}"


@each_notebook
def test_fits_the_presets(path: Path) -> None:
    for preset in PRESETS:
        plan_run(path, preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_notebooks_that_exist(preset: str) -> None:
    assert set(read_preset(preset)) - {"common", "graph"} <= {path.stem for path in NOTEBOOKS}
