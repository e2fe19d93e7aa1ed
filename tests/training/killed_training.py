"""What test_training_faults.py starts and kills: a training that says where it is, and writes its result."""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from backsight.inverses.files import write_tensors
from backsight.training.loop import train

STEPS, EVERY = 60, 5
PAUSE = 0.01  # seconds of a step, so that a kill can meet any of them


def run(folder: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 8))
    inputs, truth = torch.randn(64, 64), torch.randn(64, 8)

    def batch_at(step: int) -> torch.Tensor:
        print(step, flush=True)
        time.sleep(PAUSE)
        return inputs.roll(step, 0)[:16]

    history = train(
        {"module": module},
        lambda batch, step: [("module", F.mse_loss(module(batch), batch @ truth))],
        batch_at,
        steps=STEPS,
        validate=lambda: {"module": float(F.mse_loss(module(inputs), inputs @ truth))},
        checkpoint=folder / "checkpoint.safetensors",
        checkpoint_every=EVERY,
        progress=False,
    )
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    tensors["losses"] = torch.tensor(history["loss"].to_numpy())
    write_tensors(folder / "finished.safetensors", tensors, {})


if __name__ == "__main__":
    run(Path(sys.argv[1]))
