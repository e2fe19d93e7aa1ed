"""Two processes on one job, over gloo: what one process alone would have found.

`accelerate launch` starts GPUs and machines; CPU processes are started by torchrun, which accelerate then finds.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from backsight.data.distributed import average, share
from backsight.errors import BacksightError

JOB = Path(__file__).with_name("distributed_job.py")


def _free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """{"1-0": alone, "2-0" and "2-1": of two processes}: name -> tensor."""
    folder = tmp_path_factory.mktemp("processes")
    several = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", _free_port()]
    several += [str(JOB), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in ([sys.executable, str(JOB), str(folder)], several):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: load_file(path) for path in sorted(folder.glob("?-?.safetensors"))}


def test_both_processes_end_with_the_same(found: dict[str, dict[str, Tensor]]) -> None:
    assert set(found) == {"1-0", "2-0", "2-1"}
    for key, tensor in found["2-0"].items():
        assert torch.equal(tensor, found["2-1"][key]), key


def test_distributed_ridge_is_the_single_one_to_1e_9(found: dict[str, dict[str, Tensor]]) -> None:
    alone, together = found["1-0"], found["2-0"]
    for key in ("ridge/weight", "ridge/bias", "ridge/lonely"):
        assert alone[key].dtype == torch.float64
        assert (alone[key] - together[key]).norm() <= 1e-9 * alone[key].norm(), key
    assert int(together["ridge/count"]) == int(alone["ridge/count"]) == 37


def test_distributed_linear_inverses_are_the_single_ones(found: dict[str, dict[str, Tensor]]) -> None:
    """Held-out images of their own, and every fifth image held out: both are split alike; weights are float32."""
    keys = [key for key in found["1-0"] if key.startswith(("validation/", "own/"))]
    assert len(keys) == 8
    for key in keys:
        alone, together = found["1-0"][key].double(), found["2-0"][key].double()
        assert (alone - together).norm() <= 1e-5 * alone.norm(), key


def test_distributed_training_takes_the_steps_of_the_whole_batch(found: dict[str, dict[str, Tensor]]) -> None:
    alone, together = found["1-0"], found["2-0"]
    assert torch.allclose(alone["training/weight"], together["training/weight"], atol=1e-5)
    assert torch.allclose(alone["training/losses"], together["training/losses"], rtol=1e-4, atol=1e-6)
    assert alone["training/losses"][-1] < 0.7 * alone["training/losses"][0]


def test_modular_inverses_learn_on_two_processes(found: dict[str, dict[str, Tensor]]) -> None:
    """Other images in each batch than alone, but weights that have moved, and equal ones on both processes."""
    heads = [key for key in found["2-0"] if key.startswith("modular/") and key.endswith("head.weight")]
    assert heads
    assert all(found["2-0"][key].abs().max() > 0 for key in heads)


def test_alone_everything_is_ones_own() -> None:
    images = torch.rand(3, 2)
    assert share(images) is images
    kept = images.clone()
    average([images])
    assert torch.equal(images, kept)


def test_more_processes_than_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Crowd:
        num_processes, process_index = 4, 3

    monkeypatch.setattr("backsight.data.distributed.processes", Crowd)
    assert share(torch.arange(9)).tolist() == [3, 7]
    with pytest.raises(BacksightError, match="4 processes cannot share 3 images"):
        share(torch.arange(3))
