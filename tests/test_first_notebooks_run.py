"""The first notebooks, from top to bottom at smoke size."""

from pathlib import Path

import pytest
from conftest import committed_notebooks
from notebook_runs import runs_at_smoke_size

HALF = (len(committed_notebooks()) + 1) // 2


@pytest.mark.parametrize("path", committed_notebooks()[:HALF], ids=lambda path: path.stem)
def test_runs_at_smoke_size(path: Path, tmp_path: Path) -> None:
    runs_at_smoke_size(path, tmp_path)
