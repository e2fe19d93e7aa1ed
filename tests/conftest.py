"""What every test needs: no network, few threads, tiny notebooks, and the real photographs where they are."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
from xdist.scheduler import LoadFileScheduling

from backsight.project import project_root

# Tests run without a network: a forgotten download must fail at once, not after minutes of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two test processes share two cores; more threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

NotebookWriter = Callable[..., Path]
# What takes longest, in this order; a test process that starts one of these last would keep the other waiting.
LONGEST = (
    "test_notebook_runs.py",
    "test_explorer_page.py",
    "test_graph_faults.py",
    "test_families.py",
    "test_timm_zoo.py",
    "test_processes.py",
    "test_training_faults.py",
    "test_tradeoff.py",
    "test_noise.py",
    "test_efficiency.py",
    "test_explorer.py",
    "test_gallery.py",
    "test_profiles.py",
    "test_claims.py",
    "test_readme.py",
    "00_quickstart.ipynb",
)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return project_root()


@pytest.fixture(scope="session")
def coco_sample(root: Path) -> Path:
    """A COCO root with real photographs: data/coco in the project, or shared/data/coco_sample beside it."""
    for folder in (root / "data" / "coco", root.parent / "shared" / "data" / "coco_sample"):
        if (folder / "annotations").is_dir():
            return folder
    pytest.skip("no COCO photographs in data/coco nor in shared/data/coco_sample beside the project")


@pytest.fixture
def write_notebook(tmp_path: Path) -> NotebookWriter:
    """write_notebook(parameters, *cells, name="tiny") -> path of a notebook below tmp_path."""

    def write(parameters: str | None, *cells: str, name: str = "tiny", folder: Path | None = None) -> Path:
        notebook = nbformat.v4.new_notebook()
        notebook.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        notebook.metadata["language_info"] = {"name": "python"}
        if parameters is not None:
            notebook.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
        notebook.cells.extend(nbformat.v4.new_code_cell(cell) for cell in cells)
        path = (folder or tmp_path) / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
        return path

    return write


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test, and every fixture, draws the same numbers alone, in any order and on any worker."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


class FileByFile(LoadFileScheduling):
    """pytest-xdist gives a worker a file at a time, but each notebook's run by itself."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if "test_notebook_runs.py" in nodeid else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileByFile | None:
    return FileByFile(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first.

    nbval leaves out the notebooks that ask for it: test_notebook_runs executes them at smoke size.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    left_out = [item for item in items if item.path.suffix == ".ipynb" and validated_at_smoke_size(item.path)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def validated_at_smoke_size(notebook: Path) -> bool:
    """Whether the metadata says {"backsight": {"nbval": "smoke"}}: too long to be run twice as it is."""
    metadata = nbformat.read(notebook, as_version=4).metadata
    return metadata.get("backsight", {}).get("nbval") == "smoke"


def committed_notebooks() -> Sequence[Path]:
    """The project's notebooks, in the order of the story."""
    return sorted((project_root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))
