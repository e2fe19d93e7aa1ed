"""The skeleton: requirements held in step, commands that exist, imports that touch nothing."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from backsight.app.doctor import locked_versions


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def test_every_requirement_is_pinned_by_the_lock(root: Path, project: dict) -> None:
    pins = locked_versions(root / "requirements.lock")
    wanted = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    for text in wanted:
        requirement = Requirement(text)
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement} is not in requirements.lock: compile it again"
        assert requirement.specifier.contains(pin, prereleases=True), f"requirements.lock has {pin} for {requirement}"


@pytest.mark.parametrize(
    ("folders", "extras"), [(["lib"], []), (["tests", "benchmarks"], ["dev"])], ids=["lib", "tests and benchmarks"]
)
def test_every_import_is_a_requirement(root: Path, project: dict, folders: list[str], extras: list[str]) -> None:
    """And does not merely come with another one, which may do without it tomorrow."""
    files = [file for folder in folders for file in (root / folder).rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_bytes()))]
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    distributions = packages_distributions()
    imported = {canonicalize_name(own) for name in names for own in distributions.get(name.partition(".")[0], ())}
    wanted = chain(project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras))
    assert not imported - {"backsight"} - {canonicalize_name(Requirement(text).name) for text in wanted}


def test_the_lock_is_hashed_and_names_no_host(root: Path) -> None:
    lock = (root / "requirements.lock").read_text()
    pins = re.split(r"^(?=\w)", lock, flags=re.MULTILINE)[1:]
    assert pins
    assert all("--hash=sha256:" in pin for pin in pins)
    assert "://" not in lock
    assert not re.search(r"^\s*-", re.sub(r"^\s+--hash=.*$", "", lock, flags=re.MULTILINE), flags=re.MULTILINE)


def test_conda_delegates_to_the_lock(root: Path, project: dict) -> None:
    environment = yaml.safe_load((root / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.lock"]}
    assert conda == [f"python {project['requires-python']}", "pip"], "packages other than Python come from the lock"


@pytest.mark.parametrize("target", ["run", "test", "lab", "lint", "bench", "clean"])
def test_make_knows(root: Path, target: str) -> None:
    subprocess.run(["make", "--dry-run", "--silent", target], cwd=root, check=True, capture_output=True)


def test_ci_is_make_test(root: Path) -> None:
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("exec make test </dev/null")


def test_hooks_are_the_tools_of_make_lint(root: Path) -> None:
    hooks = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repository["repo"] for repository in hooks} == {"local"}, "a hook of another repository needs the network"
    assert {hook["entry"].split()[0] for hook in hooks[0]["hooks"]} == {".venv/bin/ruff", ".venv/bin/mypy"}


def test_pages_are_made_without_torch() -> None:
    """Which takes seconds to load, and a page is made again and again."""
    program = "import sys, backsight.app.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_touches_nothing(root: Path) -> None:
    """No network, no file written, no GPU and no random state: in a process of its own, the libraries loaded before."""
    program = """
import importlib, os, pkgutil, random, sys
import matplotlib.figure, numpy, sklearn, skimage, torch, torchvision, timm, transformers
import backsight
states = lambda: (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist())
before, threads, root = states(), torch.get_num_threads(), sys.argv[1]

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        raise RuntimeError(f"import does {event} {arguments}")
    if event == "open" and isinstance(arguments[0], str):
        writes = set(str(arguments[1] or "")) & set("wax+") or arguments[2] & (os.O_WRONLY | os.O_RDWR)
        ours = os.path.abspath(arguments[0]).startswith((root + "/data", root + "/results"))
        if ours or (writes and os.path.abspath(arguments[0]).startswith(root)):
            raise RuntimeError(f"import opens {arguments[0]}")

sys.addaudithook(watch)
names = [module.name for module in pkgutil.walk_packages(backsight.__path__, "backsight.")]
for name in names:
    importlib.import_module(name)
assert states() == before, "random state changed"
assert torch.get_num_threads() == threads, "number of threads changed"
assert not torch.cuda.is_initialized(), "GPU touched"
print(len(names))
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, str(root)],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert int(done.stdout) >= 5
