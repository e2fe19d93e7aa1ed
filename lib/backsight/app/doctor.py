"""Does this installation work? Each finding is OK, NOTE (works with less) or FAIL, and says what to do."""

import importlib.metadata
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.markers import Marker
from packaging.utils import canonicalize_name

from backsight.errors import BacksightError
from backsight.project import available_cores, project_root, read_json, results_root, shown

Verdict = Literal["OK", "NOTE", "FAIL"]
FREE_DISK_GIB = 2
_PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)\s*(?:;(?P<marker>[^\\]+))?")


@dataclass(frozen=True)
class Finding:
    verdict: Verdict
    subject: str
    text: str


def locked_versions(lock: Path) -> dict[str, str]:
    """The pins of a requirements file that apply to this interpreter: canonical name -> version."""
    pins = (_PIN.match(line) for line in lock.read_text(encoding="utf-8").splitlines())
    return {
        canonicalize_name(pin["name"]): pin["version"]
        for pin in pins
        if pin and (pin["marker"] is None or Marker(pin["marker"].strip()).evaluate())
    }


def examine() -> list[Finding]:
    """Every check, in the order in which trouble is best mended. Raises BacksightError outside a project."""
    root = project_root()
    checks = (_versions, _operators, _kernel, _data, _machine)
    return [finding for check in checks for finding in check(root)]


def _versions(root: Path) -> Iterator[Finding]:
    differing = []
    for name, version in locked_versions(root / "requirements.lock").items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "absent"
        if installed.partition("+")[0] != version:
            differing.append(f"{name} {installed} instead of {version}")
    if not differing:
        yield Finding("OK", "packages", "as in requirements.lock")
        return
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    yield Finding("FAIL", "packages", f"{', '.join(differing[:5])}{more}; run `make clean-venv install`.")


def _operators(root: Path) -> Iterator[Finding]:
    try:
        import timm
        import torch
        import transformers
        from torchvision.ops import nms

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as error:  # a torch of another build fails in many ways
        yield Finding("FAIL", "torch", f"{type(error).__name__}: {error}; torch and torchvision do not fit together.")
        return
    libraries = f"torch {torch.__version__}, timm {timm.__version__}, transformers {transformers.__version__}"
    yield Finding("OK", "torch", f"{libraries}; torchvision's operators work")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Finding("OK", "accelerator", f"{torch.cuda.get_device_name()}, {memory:.0f} GiB")
    else:
        yield Finding("NOTE", "accelerator", "none; the shipped targets do not need one, the paper preset does")


def _kernel(root: Path) -> Iterator[Finding]:
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
    except Exception as error:  # kernel specs fail in many ways
        yield Finding("FAIL", "kernel", f"{KERNEL} does not start ({type(error).__name__}: {error}).")
    else:
        yield Finding("OK", "kernel", f"{KERNEL} starts")


def _data(root: Path) -> Iterator[Finding]:
    from backsight.scenes.photographs import PHOTOGRAPHS, photograph_path
    from backsight.targets import SHIPPED, check_target

    for name in SHIPPED:
        try:
            check_target(name)
            if (read_json(root / "data" / "weights" / name / "card.json") or {}).get("target") != name:
                raise BacksightError(f"The card.json of {name} is not its own.")
            yield Finding("OK", name, f"shipped in data/weights/{name}")
        except BacksightError as error:
            yield Finding("FAIL", name, f"{error} Or restore data/weights/{name} from git.")
    try:
        for photograph in PHOTOGRAPHS:
            photograph_path(photograph)
        yield Finding("OK", "photographs", f"{len(PHOTOGRAPHS)} embedded")
    except BacksightError as error:
        yield Finding("FAIL", "photographs", str(error))
    for name in ("coco", "imagenet"):
        if (root / "data" / name).is_dir():
            yield Finding("OK", name, f"data/{name} is there")
        else:
            yield Finding("NOTE", name, f"no data/{name}; only the paper preset needs it (data/README.md)")


def _machine(root: Path) -> Iterator[Finding]:
    from backsight.app.checks import check_writable
    from backsight.data.features import outdated_stores

    yield Finding("OK", "cores", str(available_cores()))
    free = shutil.disk_usage(root).free / 2**30
    enough: Verdict = "OK" if free >= FREE_DISK_GIB else "FAIL"
    yield Finding(enough, "disk", f"{free:.0f} GiB free (a default run needs {FREE_DISK_GIB})")
    if outdated := outdated_stores():
        size = sum(file.stat().st_size for store in outdated for file in store.iterdir()) / 1e9
        text = f"{len(outdated)} of another version in {shown(outdated[0].parent)} take {size:.1f} GB: delete them"
        yield Finding("NOTE", "feature stores", text)
    try:
        check_writable(results_root())
        yield Finding("OK", "results", f"{shown(results_root())} can be written")
    except BacksightError as error:
        yield Finding("FAIL", "results", str(error))
