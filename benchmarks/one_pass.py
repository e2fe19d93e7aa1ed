"""Linear inverses of every tap of ViT-B/16 from one stream of images: what they cost beside the plain forward pass.

A minute on two cores; SIZE=full takes more images and counts the memory of more of them. Weights are random, which
changes no time. The floor is counted, not fitted: FLOPs of the pass, of the Gram and of the cross matrices.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
from table import Row, compare, interleaved, write
from torch import Tensor

from backsight.inverses.linear import fit_linear
from backsight.studies.efficiency import count_flops
from backsight.targets import load_target

FULL = os.environ.get("SIZE") == "full"
IMAGES = 64 if FULL else 8
BATCH = 16 if FULL else 8
REPEATS = 5


def matmul_peak(kind: torch.dtype, side: int = 0) -> float:
    """FLOP/s of a product of square matrices, by default of a size that fills the machine."""
    side = side or (4096 if torch.cuda.is_available() else 1536)
    matrix = torch.ones(side, side, dtype=kind, device="cuda" if torch.cuda.is_available() else "cpu")
    return 2 * side**3 / statistics.median(_seconds(lambda: matrix @ matrix) for _ in range(5))


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def stream() -> list[Row]:
    """The pass with all moments against the plain frozen pass over the same images."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = load_target("vit_base_patch16_224", pretrained=False).to(device)
    images = torch.rand(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def plain() -> None:
        for batch in images.split(BATCH):
            target(batch.to(device))

    taps = target.taps[:13]  # the patch embedding and twelve blocks
    cases: dict[str, Callable[[], object]] = {
        "plain": plain,
        "fit": lambda: fit_linear(target, images, taps=taps, batch_size=BATCH, progress=False),
    }
    seconds = interleaved(cases, REPEATS)
    forward = count_flops(lambda: target(images[:1].to(device)))
    tokens, inputs, outputs = 197, 768, 768
    gram, cross = 13 * 2 * tokens * inputs**2, 13 * 2 * (tokens - 1) * inputs * outputs
    floor = 1 + (0.5 * gram + cross) / forward
    case = f"ViT-B/16, 13 taps, {IMAGES} images of 224 px"
    rows = [
        compare(
            "one_pass", case, "seconds, fit of all taps / plain pass", seconds["fit"], "s", seconds["plain"], "<= 1.5"
        )
    ]
    rows.append(
        Row("one_pass", case, "counted floor: FLOPs of pass and moments / pass", floor, "1", 1.0, floor, "a floor")
    )
    peak = matmul_peak(torch.float32)
    rate = forward * IMAGES / seconds["plain"]
    rows.append(compare("one_pass", case, "FLOP/s of the plain pass / matmul peak", rate, "1/s", peak, "1"))
    return rows


def memory() -> list[Row]:
    """Peak resident memory of a fit on four times the images, which are made as they are read."""
    import resource

    from backsight.data.images import ImageSource

    class Made(ImageSource):
        def image(self, index: int) -> Tensor:
            return torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(index)).to(torch.uint8)

    target = load_target("scenes-vit", pretrained=False)
    peaks = []
    for count in (1000, 4000) if FULL else (400, 1600):
        source = Made("made", "train", (64, 64), [None] * count)  # type: ignore[list-item]
        fit_linear(target, source, progress=False)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return [compare("one_pass", "scenes-vit, 4 x the images", "peak memory", peaks[1], "B", peaks[0], "1")]


if __name__ == "__main__":
    write("one_pass", [*memory(), *stream()])
