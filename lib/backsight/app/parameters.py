"""What a notebook takes: typed parameters, and the values that a preset and the command line give them.

A notebook declares them in the cell tagged `parameters`, one plain literal a line with a comment:

    steps = 1500  # optimiser steps per inverse

The type is the default's. What few people change stands there in one dictionary, `settings`, whose keys are named as
parameters are. All of this happens before a kernel is started.
"""

import ast
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from backsight.errors import BacksightError, nearest
from backsight.project import project_root

# Sections of a preset that belong to no single notebook: values for all, and the run graph (app.plan).
SHARED_SECTIONS = ("common", "graph")
SETTINGS = "settings"  # the parameter that holds further ones
TAPS = str | list[str]  # a preset's name or module paths, whichever of them is the default of `taps`
STRICT = ConfigDict(strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Notebook:
    """A notebook as it was read: its text (nbformat 4), the source of its code cells, its parameters' defaults, and
    which of them are keys of its `settings`."""

    path: Path
    text: str
    code: Sequence[str]
    defaults: Mapping[str, Any]
    settings: Sequence[str] = ()

    @property
    def name(self) -> str:
        return self.path.stem

    def injected(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values as the parameters cell has them: settings in their dictionary."""
        plain = {name: value for name, value in values.items() if name not in self.settings}
        return plain | ({SETTINGS: {name: values[name] for name in self.settings}} if self.settings else {})

    def checked(self, name: str, value: Any, origin: str) -> Any:
        """The value that may be passed for a parameter. Raises BacksightError on an unknown name and a wrong type."""
        if name not in self.defaults:
            known = nearest(name, list(self.defaults))
            raise BacksightError(f"{origin}: {self.path.name} has no parameter {name!r}; {known}.")
        try:
            return TypeAdapter(self.kind(name), config=STRICT).validate_python(value)
        except ValidationError as error:
            said = error.errors()[0]["msg"].lower()
            raise BacksightError(f"{origin}: {name} = {value!r}: {said}, as in {self.defaults[name]!r}.") from error

    def kind(self, name: str) -> Any:
        """The type of a parameter: its default's, of a list the items' too where they have one type. Counts, rates and
        seeds are not below 0, or below a default that is."""
        default = self.defaults[name]
        if name == "taps":
            return TAPS
        values = default if isinstance(default, list) else [default]
        if len(kinds := {type(value) for value in values}) != 1:
            return type(default)
        kind: Any = kinds.pop()
        if kind in (int, float):
            kind = Annotated[kind, Field(ge=min([0, *values]), lt=2**63)]
        return list[kind] if default is values else kind


def read_notebook(path: str | Path) -> Notebook:
    """Read a notebook and its parameters. Raises BacksightError where it is absent or not a notebook."""
    path, defaults = Path(path), {}
    if not path.is_file():
        known = nearest(path.name, sorted(file.name for file in _notebooks().glob("*.ipynb")))
        raise BacksightError(f"no notebook {path}; in {os.path.relpath(_notebooks())}, {known}.")
    try:
        text = path.read_text(encoding="utf-8")
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        code = ["".join(cell["source"]) for cell in cells]
        tagged = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BacksightError(f"{path} is not a notebook that can be read ({type(error).__name__}).") from error
    try:
        for statement in ast.parse("\n".join(tagged)).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    defaults[name] = ast.literal_eval(value)
                case _:
                    raise ValueError(f"{ast.unparse(statement)!r} is not `name = literal`")
    except (SyntaxError, ValueError) as error:
        raise BacksightError(f"the parameters cell of {path}: {error}.") from error
    settings = defaults.pop(SETTINGS, {})
    if twice := sorted(settings.keys() & defaults.keys()):
        raise BacksightError(f"the parameters cell of {path} has {twice[0]} twice: outside and inside of {SETTINGS}.")
    return Notebook(path, text, code, {**defaults, **settings}, tuple(settings))


def _notebooks() -> Path:
    return project_root() / "notebooks"


def preset_path(name: str) -> Path:
    """The file of a preset: a path to a YAML file, or the name of one in notebooks/presets/."""
    if Path(name).is_file():
        return Path(name)
    presets = {path.stem: path for path in sorted((_notebooks() / "presets").glob("*.yaml"))}
    if name not in presets:
        raise BacksightError(f"no preset {name!r}; {nearest(name, list(presets))}.")
    return presets[name]


class _Once(yaml.SafeLoader):
    """YAML in which no key is given twice: the last one would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if len({*keys}) < len(keys):
            raise ValueError(f"{max(keys, key=keys.count)!r} is given twice")
        return super().construct_mapping(node, deep)


def read_preset(name: str) -> dict[str, dict[str, Any]]:
    """A preset's sections: one mapping of parameters for each notebook's name, `common`, and `graph`."""
    path = preset_path(name)
    try:
        sections = yaml.load(path.read_text(encoding="utf-8"), _Once) or {}
        return {str(section): dict(values or {}) for section, values in sections.items()}
    except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise BacksightError(
            f"{path} is not YAML with one mapping of values for each notebook's name: {said}."
        ) from error


def preset_values(notebook: Notebook, preset: str) -> dict[str, Any]:
    """What a preset says to one notebook: `common` values that the notebook has, then its own section."""
    sections, origin = read_preset(preset), f"preset {preset_path(preset).stem}"
    paths = [path for folder in (_notebooks(), notebook.path.parent) for path in folder.glob("*.ipynb")]
    known, common = {*SHARED_SECTIONS, *(path.stem for path in paths)}, sections.get("common", {})
    for section in sorted(sections.keys() - known):  # a misspelt name would silently leave this notebook at its default
        raise BacksightError(f"{origin}: no notebook is called {section!r}; {nearest(section, sorted(known))}.")
    for name in common.keys() - notebook.defaults.keys():
        if not any(name in read_notebook(path).defaults for path in paths):
            raise BacksightError(f"{origin}: no notebook has a parameter {name!r}, which stands in common.")
    values = {name: value for name, value in common.items() if name in notebook.defaults}
    values |= sections.get(notebook.name, {})
    return {str(name): notebook.checked(str(name), value, origin) for name, value in values.items()}


def command_line_values(notebook: Notebook, assignments: Sequence[str]) -> dict[str, Any]:
    """What name=value arguments say. Raises BacksightError on an unknown or repeated name and a wrong type."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name in values:
            raise BacksightError(f"-p {assignment!r} is {'given twice' if equals else 'not name=value'}.")
        value = _value_of(text, notebook.kind(name)) if name in notebook.defaults else text
        values[name] = notebook.checked(name, value, "-p")
    return values


def _value_of(text: str, kind: Any) -> Any:
    """What the text of an argument stands for; the text itself where it is meant as one, or stands for nothing else."""
    opened = text.strip().startswith("[")
    if kind is str or (kind == TAPS and not opened):
        return text
    literal = text.strip() if opened or "list" not in str(kind) else f"[{text}]"  # linear,direct as [linear, direct]
    for read in (ast.literal_eval, yaml.safe_load):  # YAML knows [a, b] and true, but takes 1e-3 for a text
        with suppress(ValueError, SyntaxError, yaml.YAMLError):
            value = read(literal)
            whole = getattr(kind, "__origin__", None) is int and isinstance(value, float) and value.is_integer()
            return int(value) if whole else value  # 1e3 steps
    return text
