"""Does this installation work? Each finding is OK or FAIL, its subject, and what to do."""

import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

from packaging.markers import Marker
from packaging.utils import canonicalize_name

from backsight.project import project_root

_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)\s*(?:;([^\\]+))?", flags=re.MULTILINE)


def examine() -> list[tuple[str, str, str]]:
    """(verdict, subject, text) of every check, in the order in which trouble is best mended."""
    checks = {"packages": _packages, "torch": _torch, "kernel": _kernel}
    return [*(_tried(subject, check) for subject, check in checks.items()), *shipped()]


def shipped() -> list[tuple[str, str, str]]:
    """The findings on the targets that come with backsight."""
    from backsight.targets import SHIPPED

    return [_tried(name, partial(_target, name)) for name in SHIPPED]


def _tried(subject: str, check: Callable[[], str]) -> tuple[str, str, str]:
    try:
        return "OK", subject, check()
    except Exception as error:  # torch of another build, kernel specs and damaged files fail in many ways
        return "FAIL", subject, f"{type(error).__name__}: {error}"


def locked_versions(lock: Path) -> dict[str, str]:
    """The pins of a requirements file that apply to this interpreter: canonical name -> version."""
    pins = _PIN.findall(lock.read_text(encoding="utf-8"))
    return {canonicalize_name(name): pin for name, pin, rule in pins if not rule or Marker(rule.strip()).evaluate()}


def _packages() -> str:
    pins = locked_versions(project_root() / "requirements.lock")
    own = dict.fromkeys(pins, "absent")
    own |= {canonicalize_name(package.name): package.version.partition("+")[0] for package in distributions()}
    if differing := [f"{name} {own[name]} instead of {pin}" for name, pin in pins.items() if own[name] != pin]:
        raise RuntimeError(f"{', '.join(differing)}; run `make clean-venv install`.")
    return "as in requirements.lock"


def _torch() -> str:
    import torch
    from torchvision.ops import nms

    nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # fails where torch and torchvision do not fit together
    without = "no accelerator: the shipped targets do not need one, the paper preset does"
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else without
    return f"{torch.__version__}; torchvision's operators work; {accelerator}"


def _kernel() -> str:
    from jupyter_client.manager import start_new_kernel

    from backsight.app.runner import KERNEL, KERNEL_START_SECONDS

    manager, client = start_new_kernel(KERNEL_START_SECONDS, KERNEL, extra_arguments=["--log-level=50"])
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    return f"{KERNEL} starts"


def _target(name: str) -> str:
    from backsight.targets import load_target

    return load_target(name, device="cpu").weights
