"""Does this installation work? Each finding is OK, NOTE (works with less) or FAIL, its subject, and what to do."""

import importlib.metadata
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from packaging.markers import Marker
from packaging.utils import canonicalize_name

from backsight.errors import BacksightError
from backsight.project import project_root, results_root, shown

FREE_DISK_GIB = 2
Findings = Iterator[tuple[str, str, str]]
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)\s*(?:;([^\\]+))?", flags=re.MULTILINE)


def locked_versions(lock: Path) -> dict[str, str]:
    """The pins of a requirements file that apply to this interpreter: canonical name -> version."""
    pins = _PIN.findall(lock.read_text(encoding="utf-8"))
    return {canonicalize_name(name): pin for name, pin, rule in pins if not rule or Marker(rule.strip()).evaluate()}


def examine() -> list[tuple[str, str, str]]:
    """(verdict, subject, text) of every check, in the order in which trouble is best mended."""
    root = project_root()
    return [*_packages(root / "requirements.lock"), *_torch(), *_kernel(), *_data(), *_machine(root)]


def _packages(lock: Path) -> Findings:
    differing = []
    for name, version in locked_versions(lock).items():
        installed = "absent"
        with suppress(importlib.metadata.PackageNotFoundError):
            installed = importlib.metadata.version(name).partition("+")[0]
        if installed != version:
            differing.append(f"{name} {installed} instead of {version}")
    if differing:
        yield "FAIL", "packages", f"{', '.join(differing)}; run `make clean-venv install`."
    else:
        yield "OK", "packages", "as in requirements.lock"


def _torch() -> Findings:
    try:
        import torch
        from torchvision.ops import nms

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as error:  # a torch of another build fails in many ways
        yield "FAIL", "torch", f"{type(error).__name__}: {error}; torch and torchvision do not fit together."
        return
    yield "OK", "torch", f"{torch.__version__}; torchvision's operators work"
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield "OK", "accelerator", f"{torch.cuda.get_device_name()}, {memory:.0f} GiB"
    else:
        yield "NOTE", "accelerator", "none; the shipped targets do not need one, the paper preset does"


def _kernel() -> Findings:
    from jupyter_client.manager import KernelManager

    from backsight.app.runner import KERNEL, KERNEL_START_SECONDS

    manager = KernelManager(kernel_name=KERNEL, transport_encryption="auto")
    try:
        manager.start_kernel()
        client = manager.blocking_client()
        client.start_channels()
        client.wait_for_ready(timeout=KERNEL_START_SECONDS)
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        yield "OK", "kernel", f"{KERNEL} starts"
    except Exception as error:  # kernel specs fail in many ways
        yield "FAIL", "kernel", f"{KERNEL} does not start ({type(error).__name__}: {error})."


def _data() -> Findings:
    from backsight.scenes.photographs import PHOTOGRAPHS, photograph_path
    from backsight.targets import SHIPPED, load_target

    for name in (*SHIPPED, *PHOTOGRAPHS):
        try:
            load_target(name, device="cpu") if name in SHIPPED else photograph_path(name)
            yield "OK", name, "shipped"
        except BacksightError as error:
            yield "FAIL", name, f"{error} Or restore it from git."


def _machine(root: Path) -> Findings:
    free, results = shutil.disk_usage(root).free / 2**30, results_root()
    yield "OK" if free >= FREE_DISK_GIB else "FAIL", "disk", f"{free:.0f} GiB free (a run needs {FREE_DISK_GIB})"
    place = next(folder for folder in (results, *results.parents) if folder.exists())
    writable = place.is_dir() and os.access(place, os.W_OK)
    yield "OK" if writable else "FAIL", "results", f"{shown(results)} can{'' if writable else 'not'} be written"
