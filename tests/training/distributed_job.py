"""What test_processes.py launches, alone and as two processes: the same job, with its results in a folder."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from backsight import fit_linear, load_target
from backsight.data.distributed import processes, share
from backsight.inverses.ridge import RidgeAccumulator
from backsight.training.fit import fit_modular
from backsight.training.loop import train

ROWS, INPUTS, OUTPUTS = 37, 5, 3
GLOBAL_BATCH = 8


def ridge(found: dict[str, torch.Tensor]) -> None:
    """Moments of rows with a large mean, of which the processes have unequal numbers."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, INPUTS, generator=generator) * torch.tensor([1.0, 10, 0.1, 5, 2]) + 30
    outputs = inputs @ torch.randn(INPUTS, OUTPUTS, generator=generator) + torch.randn(ROWS, 3, generator=generator)
    accumulator = RidgeAccumulator()
    accumulator.update(share(inputs), share(outputs))
    gathered = accumulator.gathered()
    weight, bias = gathered.solve(0.01)
    found |= {"ridge/weight": weight, "ridge/bias": bias, "ridge/count": torch.tensor(gathered.count)}
    # All rows on one process: the other has nothing but must take part.
    lonely = RidgeAccumulator()
    if processes().is_last_process:
        lonely.update(inputs, outputs)
    found["ridge/lonely"] = lonely.gathered().solve(0.01)[0]


def training(found: dict[str, torch.Tensor], folder: Path) -> None:
    """Each process takes its share of every batch: the mean of the gradients is the whole batch's."""
    torch.manual_seed(0)
    inputs, module = torch.randn(64, INPUTS), nn.Linear(INPUTS, OUTPUTS)
    module.seldom = nn.Linear(1, 1)  # only the first process ever reaches it, as after an unreadable image
    module.never = nn.Linear(1, 1)
    truth = torch.randn(INPUTS, OUTPUTS)

    def batch_at(step: int) -> torch.Tensor:
        return share(inputs.roll(step * GLOBAL_BATCH, 0)[:GLOBAL_BATCH])

    def losses(batch: torch.Tensor, step: int) -> Iterator[tuple[str, torch.Tensor]]:
        loss = F.mse_loss(module(batch), batch @ truth)
        yield "module", loss + 0.0 * module.seldom.weight.sum() if processes().is_main_process else loss

    history = train(
        {"module": module},
        losses,
        batch_at,
        steps=30,
        learning_rate=0.05,
        validate=lambda: {"module": float(F.mse_loss(module(inputs), inputs @ truth))},
        checkpoint=folder / "checkpoint.safetensors",
        checkpoint_every=7,
        progress=False,
    )
    found["training/weight"], found["training/never"] = module.weight.detach(), module.never.weight.detach()
    found["training/losses"] = torch.tensor(history["loss"].to_numpy())


def target(found: dict[str, torch.Tensor]) -> None:
    """Linear and modular inverses of a target, from shared images."""
    frozen = load_target("scenes-vit", taps="components", pretrained=False)
    images = torch.rand(23, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    held_out = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for validation, name in ((held_out, "validation"), (None, "own")):
        for tap, inverse in fit_linear(frozen, images, validation=validation, batch_size=4, progress=False).items():
            found[f"{name}/{tap}/weight"] = inverse.maps["cells"].matrix.clone()
            found[f"{name}/{tap}/alpha"] = torch.tensor(inverse.maps["cells"].alpha)
    modules = fit_modular(frozen, images, steps=3, batch_size=4, progress=False)
    for tap, module in modules.modules.items():
        for key, tensor in module.residual.state_dict().items():
            found[f"modular/{tap}/{key}"] = tensor


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results: dict[str, torch.Tensor] = {}
    ridge(results)
    training(results, folder)
    target(results)
    named = {key: value.clone().contiguous() for key, value in results.items()}
    save_file(named, folder / f"{processes().num_processes}-{processes().process_index}.safetensors")
