"""A training that is killed, or whose disk is full, loses at most one checkpoint interval, and ends the same."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from killed_training import EVERY, PAUSE, run
from safetensors.torch import load_file
from torch import nn

from backsight.errors import BacksightError
from backsight.inverses import files
from backsight.training.loop import train

JOB = Path(__file__).with_name("killed_training.py")


def _killed_at(folder: Path, last: int | None, delay: float) -> tuple[int, int | None]:
    """(first step shown, step at which it was killed, or None where it came to its end)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(JOB), str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        first = None
        for line in process.stdout:
            first = int(line) if first is None else first
            if last is not None and int(line) >= last:
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                process.wait()
                return first, int(line)
        assert process.wait() == 0
    assert first is not None
    return first, None


def test_killed_while_it_may_be_writing_it_ends_in_the_same_weights(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole)
    first, at = _killed_at(killed, 4 * EVERY - 1, PAUSE)
    assert (first, at) == (0, 4 * EVERY - 1)
    assert not (killed / "finished.safetensors").exists()
    first, at = _killed_at(killed, None, 0)
    assert at is None
    assert first >= 3 * EVERY, "more than one interval was lost"
    assert first % EVERY == 0
    assert sorted(path.name for path in killed.iterdir()) == ["finished.safetensors"]
    uninterrupted, resumed = (load_file(folder / "finished.safetensors") for folder in (whole, killed))
    for name, tensor in uninterrupted.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = files.save_file
    path = tmp_path / "checkpoint.safetensors"

    def full(*arguments: Any) -> None:
        if path.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        written(*arguments)

    def go(folder_is_full: bool) -> list[int]:
        torch.manual_seed(0)
        module, seen = nn.Linear(3, 2), []
        monkeypatch.setattr(files, "save_file", full if folder_is_full else written)

        def batch_at(step: int) -> torch.Tensor:
            seen.append(step)
            return torch.ones(4, 3)

        train(
            {"module": module},
            lambda batch, step: [("module", F.mse_loss(module(batch), torch.ones(4, 2)))],
            batch_at,
            steps=9,
            checkpoint=path,
            checkpoint_every=3,
            progress=False,
        )
        return seen

    with pytest.raises(BacksightError, match="cannot be written"):
        go(folder_is_full=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.name]
    assert go(folder_is_full=False) == [3, 4, 5, 6, 7, 8]
