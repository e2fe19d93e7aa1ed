"""Who may import whom: an import that leads back makes rooms that cannot be understood, or changed, one by one."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import backsight

PACKAGE = Path(backsight.__file__).parent
ROOT = {""}  # the files beside the rooms
ALLOWED = {
    "": ROOT,
    "targets": ROOT,
    "data": ROOT,
    "measures": ROOT,
    "tables": ROOT,
    "plots": ROOT | {"tables"},
    "inverses": ROOT | {"targets", "data", "measures"},
    "training": ROOT | {"targets", "data", "inverses"},
    "exact": ROOT | {"targets", "data", "inverses"},
    "scenes": ROOT | {"targets", "data", "inverses", "training", "measures"},
}
ALLOWED["studies"] = {*ALLOWED}
ALLOWED["app"] = {*ALLOWED}
# What several studies share, and instruments in files of their own: no other module of the studies may be imported by
# one.
SHARED_BY_STUDIES = {"by_seed", "exact", "joint", "layers", "nulls", "objects", "recolour", "tuning"}
# Arrows that still lead back: none is to be added, and every one is to go.
OWED: set[tuple[str, str]] = set()


def modules() -> dict[str, Path]:
    """{dotted name below the package: file}."""
    named = {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
    }
    return {name.removesuffix("__init__").removesuffix("."): path for name, path in named.items()}


def imported(known: set[str], path: Path, top_level: bool) -> set[str]:
    """The modules of the package that a file imports, for typing or not; top_level: not inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "backsight":
            module = (node.module or "").removeprefix("backsight").removeprefix(".")
            below = {f"{module}.{alias.name}".removeprefix(".") for alias in node.names}
            names |= (below & known) or {module}
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.removeprefix("backsight.") for alias in node.names if alias.name.startswith("backsight.")
            }
    return names & known


def room(module: str) -> str:
    first = module.partition(".")[0]
    return first if (PACKAGE / first).is_dir() else ""


def test_no_arrow_leads_back() -> None:
    known = modules()
    arrows = {(name, other) for name, path in known.items() for other in imported(set(known), path, top_level=False)}
    across = {(name, other) for name, other in arrows if room(name) != room(other)}
    back = {(name, other) for name, other in across if room(other) not in ALLOWED[room(name)]}
    assert not back - OWED


def test_no_study_imports_another() -> None:
    known = modules()
    shared = {f"studies.{name}" for name in SHARED_BY_STUDIES}
    arrows = {
        (name, other)
        for name, path in known.items()
        for other in imported(set(known), path, top_level=False)
        if room(name) == room(other) == "studies" and name != other != "studies" and other not in shared
    }
    assert not arrows


def test_no_module_imports_itself_through_others() -> None:
    known = modules()
    graph = {name: imported(set(known), path, top_level=True) - {name} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
