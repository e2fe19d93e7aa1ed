"""The explorer alone, as a page of its own: voila over notebooks/08_explorer.ipynb, on this machine's loopback only."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from backsight.errors import BacksightError
from backsight.project import project_root

NOTEBOOK = Path("notebooks") / "08_explorer.ipynb"
LOOPBACK = "127.0.0.1"
SHARE = Path(__file__).resolve().parent / "share"


def served_alone() -> bool:
    """Whether this kernel was started for a page without a notebook around it."""
    return os.environ.get("SERVER_SOFTWARE", "").startswith("voila")


def free_port(wanted: int = 0) -> int:
    """`wanted` where it is free, 0 for any. Raises BacksightError where the wanted port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted))
        except (OSError, OverflowError) as error:
            raise BacksightError(f"Port {wanted} cannot be used ({error}): give another --port.") from error
        return int(probe.getsockname()[1])


def command(port: int, browser: bool = True) -> tuple[list[str], dict[str, str]]:
    """The command that serves the page at the port, and its environment."""
    notebook = project_root() / NOTEBOOK
    if not notebook.is_file():
        raise BacksightError(f"{NOTEBOOK} is not in this project: run this from a checkout of backsight.")
    options = [
        f"--Voila.ip={LOOPBACK}",
        f"--port={port}",
        "--Voila.port_retries=0",
        "--template=backsight",
        "--VoilaConfiguration.file_allowlist=^$",
        "--Voila.log_level=WARN",
        *([] if browser else ["--no-browser"]),
    ]
    environment = dict(os.environ)
    environment["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(SHARE), environment.get("JUPYTER_PATH", "")]))
    return [sys.executable, "-m", "voila", str(notebook), *options], environment


def serve(port: int = 0, browser: bool = True) -> int:
    """Serve the page until it is interrupted; says the address. Returns the server's exit status."""
    chosen = free_port(port)
    arguments, environment = command(chosen, browser)
    print(f"The explorer: http://{LOOPBACK}:{chosen}/   (Ctrl-C ends it)", flush=True)
    try:
        return subprocess.run(arguments, env=environment, check=False).returncode
    except KeyboardInterrupt:
        return 0
