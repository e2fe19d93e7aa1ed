"""What a notebook takes: typed parameters, and the values that a preset and the command line give them.

A notebook declares its parameters in the cell tagged `parameters`, one plain literal a line, with a comment:

    steps = 1500     # optimiser steps per inverse

The type is the default's. Everything here happens before a kernel is started.
"""

from __future__ import annotations

import ast
import io
import json
import math
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import yaml

from backsight.errors import BacksightError, nearest
from backsight.project import project_root, shown

if TYPE_CHECKING:
    import nbformat

# Sections of a preset that belong to no single notebook: values for all, and the run graph (Snakefile).
SHARED_SECTIONS = ("common", "graph")
# `taps` is a preset's name or a list of module paths, whatever its default in a notebook.
_KINDS_BY_NAME: Mapping[str, tuple[type, ...]] = {"taps": (str, list)}
_WORDS: Mapping[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    NoneType: "none",
}
_EXAMPLES: Mapping[Any, str] = {str: '["a", "b"]', int: "[1, 2]", float: "[0.1, 0.2]"}


@dataclass(frozen=True)
class Parameter:
    """One parameter: kinds are the types it may have (empty: any), element the type of a list's items."""

    name: str
    default: Any
    kinds: tuple[type, ...]
    element: type | None
    comment: str


@dataclass(frozen=True)
class Notebook:
    """A notebook file as it was read: text (nbformat 4), source of its code cells, declared parameters by name."""

    path: Path
    text: str
    code: tuple[str, ...]
    parameters: Mapping[str, Parameter]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def content(self) -> nbformat.NotebookNode:
        # Imported late: nbformat takes more than a second, and a wrong parameter is refused without it.
        import nbformat

        return nbformat.reads(self.text, as_version=4)


def read_notebook(path: str | Path) -> Notebook:
    """Read a notebook and its parameters. Raises BacksightError where it is absent or not a notebook."""
    path = Path(path)
    if not path.is_file():
        known = {file.name: shown(file) for folder in (_notebooks(), path.parent) for file in folder.glob("*.ipynb")}
        advice = f"there is {known[path.name]}" if path.name in known else nearest(path.name, sorted(known))
        raise BacksightError(f"no notebook {path}; {advice}.")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if content["nbformat"] != 4:
            raise ValueError("not nbformat 4")
        sources = [(cell, "".join(cell["source"])) for cell in content["cells"]]
        code = tuple(source for cell, source in sources if cell["cell_type"] == "code")
        tagged = [source for cell, source in sources if "parameters" in cell["metadata"].get("tags", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BacksightError(f"{path} is not a notebook that can be read ({type(error).__name__}).") from error
    if len(tagged) > 1:
        raise BacksightError(f"{path} has {len(tagged)} cells tagged `parameters`; keep one.")
    declared = _declared(tagged[0], path) if tagged else []
    return Notebook(path, text, code, {parameter.name: parameter for parameter in declared})


def _notebooks() -> Path:
    return project_root() / "notebooks"


def _declared(source: str, path: Path) -> list[Parameter]:
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise BacksightError(
            f"the parameters cell of {path} is not Python (line {error.lineno}: {error.msg})."
        ) from error
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    parameters = []
    for statement in statements:
        match statement:
            case ast.Expr(value=ast.Constant()):
                continue
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                try:
                    default = ast.literal_eval(value)
                except ValueError as error:
                    raise BacksightError(
                        f"the parameter {name} in {path} has a computed default; write a plain literal."
                    ) from error
            case _:
                raise BacksightError(
                    f"line {statement.lineno} of the parameters cell of {path} is not `name = literal`."
                )
        comment = comments.get(statement.end_lineno or statement.lineno, "")
        parameters.append(Parameter(name, default, *_types(name, default), comment))
    return parameters


def _types(name: str, default: Any) -> tuple[tuple[type, ...], type | None]:
    """(kinds, element of a list) of a parameter, by its default."""
    if name in _KINDS_BY_NAME:
        return _KINDS_BY_NAME[name], str
    if default is None:
        return (), None
    items = {type(item) for item in default} if isinstance(default, list) else set()
    return (type(default),), items.pop() if len(items) == 1 else None


def _parameter(notebook: Notebook, name: str, origin: str) -> Parameter:
    """The notebook's parameter of that name. Raises BacksightError with the nearest names otherwise."""
    if name not in notebook.parameters:
        raise BacksightError(
            f"{origin}: {notebook.path.name} has no parameter {name!r}; {nearest(name, list(notebook.parameters))}."
        )
    return notebook.parameters[name]


def _from_text(parameter: Parameter, text: str, origin: str) -> Any:
    """The value that text on the command line stands for, by the parameter's type. Raises BacksightError."""
    kinds, stripped = parameter.kinds, text.strip()
    if list in kinds and str not in kinds and not stripped.startswith("["):
        stripped = f"[{stripped}]"  # linear,direct as in [linear, direct]
    value: Any = text
    try:
        if not kinds or (list in kinds and stripped.startswith("[")) or (dict in kinds and stripped.startswith("{")):
            value = yaml.safe_load(stripped)
            value = None if str(value).lower() == "none" else value
        elif bool in kinds:
            value = {"true": True, "false": False}.get(stripped.lower(), text)
        elif int in kinds:
            value = int(stripped) if stripped.lstrip("+-").isdigit() else float(stripped)
            value = int(value) if value == int(value) else value  # 1e3 is a whole number too
        elif float in kinds:
            value = float(stripped)
    except (ValueError, OverflowError, yaml.YAMLError):  # it is refused as the text that it is
        pass
    return _checked(parameter, value, origin)


def _checked(parameter: Parameter, value: Any, origin: str) -> Any:
    """The value itself, a whole number as float where a float is due. Raises BacksightError on a wrong type."""
    kinds = parameter.kinds
    if float in kinds and type(value) is int:
        value = float(value)
    fits = not kinds or type(value) in kinds
    if fits and isinstance(value, list) and parameter.element is not None:
        allowed = (float, int) if parameter.element is float else (parameter.element,)
        fits = all(type(item) in allowed for item in value)
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        words = [
            f"a list such as {_EXAMPLES.get(parameter.element, '[...]')}"
            if kind is list and parameter.element is not None
            else _WORDS[kind]
            for kind in kinds
        ]
        raise BacksightError(f"{origin}: {parameter.name} takes {' or '.join(words)}, not {value!r}.")
    return value


def preset_path(name: str) -> Path:
    """The file of a preset: a path to a YAML file, or the name of one in notebooks/presets/."""
    path = Path(name)
    if path.is_file():
        return path
    presets = sorted((_notebooks() / "presets").glob("*.yaml"))
    for preset in presets:
        if name in (preset.stem, preset.name):
            return preset
    raise BacksightError(f"no preset {name!r}; {nearest(name, [preset.stem for preset in presets])}.")


def read_preset(name: str) -> dict[str, Any]:
    """A preset's sections: one mapping of parameters for each notebook's name, `common`, and `graph`."""
    path = preset_path(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise BacksightError(f"{path} is not YAML that can be read ({type(error).__name__}{where}).") from error
    if not isinstance(content, dict) or not all(isinstance(section, dict | NoneType) for section in content.values()):
        raise BacksightError(f"{path} must hold one mapping of parameters for each notebook's name.")
    return {str(section): values or {} for section, values in content.items()}


def preset_values(notebook: Notebook, preset: str) -> dict[str, Any]:
    """What a preset says to one notebook: `common` values that the notebook has, then its own section."""
    sections = read_preset(preset)
    origin = f"preset {preset_path(preset).stem}"
    known = {file.stem for folder in (notebook.path.parent, _notebooks()) for file in folder.glob("*.ipynb")}
    for section in sections.keys() - known - set(SHARED_SECTIONS):
        # A misspelt section would silently leave this notebook at its defaults.
        if notebook.name not in sections and get_close_matches(section, [notebook.name], cutoff=0.8):
            raise BacksightError(f"{origin}: no notebook is called {section!r}; {nearest(section, sorted(known))}.")
    common = {name: value for name, value in sections.get("common", {}).items() if name in notebook.parameters}
    return {
        str(name): _checked(_parameter(notebook, str(name), origin), value, origin)
        for name, value in (common | sections.get(notebook.name, {})).items()
    }


def command_line_values(notebook: Notebook, assignments: Sequence[str]) -> dict[str, Any]:
    """What name=value arguments say. Raises BacksightError on an unknown or repeated name and a wrong type."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise BacksightError(f"-p {assignment!r} is not name=value.")
        if name in values:
            raise BacksightError(f"-p {name} is given twice.")
        values[name] = _from_text(_parameter(notebook, name, "-p"), text, f"-p {name}")
    return values


def describe_parameters(notebook: Notebook, values: Mapping[str, Any]) -> str:
    """One line for each parameter: its value, and the notebook's comment on it."""
    lines = {f"{name} = {values[name]!r}": parameter.comment for name, parameter in notebook.parameters.items()}
    width = max(map(len, lines), default=0)
    commented = [f"  {line:<{width}}  # {comment}" if comment else f"  {line}" for line, comment in lines.items()]
    return "\n".join([f"{shown(notebook.path)}:", *commented])
