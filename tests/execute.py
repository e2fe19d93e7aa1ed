"""Execute notebooks in place, as they are committed: python tests/execute.py notebooks/03_quality.ipynb …

What was executed is kept in the notebook's metadata as digests of its source cells and of the modules of backsight that
it imports, so that tests can tell outputs of other code (`test_notebooks.py`).
"""

import ast
import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def digests(cells: list[dict[str, Any]]) -> dict[str, str]:
    """cells: of the source of all cells; modules: of the modules of backsight that they import, less their comments."""
    sources = ["".join(cell["source"]) for cell in cells]
    code = "\n".join(s for s, cell in zip(sources, cells, strict=True) if cell["cell_type"] == "code")
    names = {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) and node.module}
    modules = []
    for name in sorted(name for name in names if name.startswith("backsight.")):
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        modules.append(ast.dump(ast.parse(Path(spec.origin).read_bytes())))
    parts = {"cells": sources, "modules": modules}
    return {name: hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16] for name, texts in parts.items()}


def execute(path: Path) -> None:
    """Run all cells with the defaults of the notebook; what stderr says, and timings, are not kept."""
    import nbformat
    from nbclient import NotebookClient

    from backsight.app.runner import tidy

    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.resolve().parent)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=place, record_timing=False).execute()
    tidy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
    notebook.metadata.setdefault("backsight", {})["executed"] = digests(notebook.cells)
    path.write_text(nbformat.writes(notebook).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        execute(Path(argument))
