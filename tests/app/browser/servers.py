"""Servers for the browser tests: the explorer alone (voila), and JupyterLab over a folder of notebooks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from backsight.app.explorer.serve import LOOPBACK

STARTING = 120  # seconds that a server may take


@contextmanager
def explorer_server() -> Iterator[str]:
    """The address of the explorer's page, with its token: further entries of a query follow after "&"."""
    with _running([sys.executable, "-m", "backsight.app.cli", "explore", "--no-browser"], os.environ) as server:
        assert server.stdout is not None
        address = server.stdout.readline().decode().split()[2]
        _await(server, address.partition("?")[0] + "static/")
        yield address


@contextmanager
def lab_server(folder: Path) -> Iterator[str]:
    """The address of a JupyterLab over this folder, without a token, with settings of its own."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    arguments = [
        *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"),
        *(f"--ServerApp.ip={LOOPBACK}", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"),
        *("--IdentityProvider.token=", f"--ServerApp.root_dir={folder}", "--LabApp.news_url="),
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    own = {
        "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".workspaces"),
    }
    with _running(arguments, os.environ | own) as server:
        _await(server, f"http://{LOOPBACK}:{port}/api")
        yield f"http://{LOOPBACK}:{port}/"


@contextmanager
def _running(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    server = subprocess.Popen(
        arguments, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield server
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()


def _await(server: subprocess.Popen[bytes], address: str) -> None:
    limit = time.monotonic() + STARTING
    while not _answers(address):
        if server.poll() is not None or time.monotonic() > limit:
            server.kill()
            said = server.stdout.read().decode(errors="replace")[-2000:] if server.stdout else ""
            raise AssertionError(f"the server did not start:\n{said}")
        time.sleep(0.2)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True  # it answers, if only with a refusal
    except OSError:
        return False
