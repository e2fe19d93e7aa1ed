"""The explorer alone, as a page of its own: voila over notebooks/08_explorer.ipynb, on this machine's loopback only."""

from __future__ import annotations

import os
import secrets
import socket
import webbrowser
from pathlib import Path

from backsight.errors import BacksightError
from backsight.project import project_root

LOOPBACK = "127.0.0.1"
SHARE = Path(__file__).resolve().parent / "share"


def served_alone() -> bool:
    """Whether this kernel was started for a page without a notebook around it."""
    return os.environ.get("SERVER_SOFTWARE", "").startswith("voila")


def serve(port: int = 0, browser: bool = True) -> None:
    """Serve the page until it is interrupted, for those who know the address that is printed: it holds a token.

    port: 0 for any free one. Raises BacksightError where it cannot be used.
    """
    try:
        with socket.create_server((LOOPBACK, port)) as probe:
            port = probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise BacksightError(f"Port {port} cannot be used ({error}): give another --port.") from error
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(SHARE), os.environ.get("JUPYTER_PATH")]))
    os.environ["JUPYTER_TOKEN"] = secrets.token_urlsafe(24)  # not an argument: other users see those of a process
    address = f"http://{LOOPBACK}:{port}/?token={os.environ['JUPYTER_TOKEN']}"
    print(f"The explorer: {address}   (Ctrl-C ends it)", flush=True)
    from voila.app import Voila  # reads the paths

    class Server(Voila):
        def launch_browser(self) -> None:
            webbrowser.open(address)  # voila's own opens the page without the token

    Server.launch_instance(
        [
            str(project_root() / "notebooks" / "08_explorer.ipynb"),
            *(f"--Voila.ip={LOOPBACK}", f"--port={port}", "--Voila.port_retries=0", "--Voila.auto_token=True"),
            # A page that was left takes its kernel along.
            *("--MappingKernelManager.cull_interval=60", "--MappingKernelManager.cull_idle_timeout=600"),
            *("--template=backsight", "--VoilaConfiguration.file_allowlist=^$", "--Voila.log_level=WARN"),
            *([] if browser else ["--no-browser"]),
        ],
        tornado_settings={"allow_remote_access": False},  # the Host of a request is checked
    )
