"""How the cost of inverting every block grows with the number of blocks L: four ways, one image, counted and timed.

    chains    a chain of inverse blocks from every block to the pixels, each trained by itself (end to end): O(L²)
    direct    one decoder of fixed size from every block to the pixels: O(L)
    modular   one module a block: O(L)
    linear    ridge maps from every block: one pass over the images; each further block adds its Gram matrices

Half a minute on two cores. FLOPs are counted; seconds are of one step from recorded features (of the pass, for linear,
beside the plain pass over the same images). The exponent is the slope of log cost over log L from the two largest L.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from table import Row, interleaved, write
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from backsight.inverses.linear import PIXELS, fit_linear
from backsight.studies.efficiency import count_flops
from backsight.targets import module_target
from backsight.targets.base import Target
from backsight.training.fit import fit_direct, fit_modular

DEPTHS = (2, 4, 8, 12, 24)
FULL = os.environ.get("SIZE") == "full"
WIDTH = 384 if FULL else 96
BATCH = 8
GOALS = {"chains": "2 in the long run", "direct": "1", "modular": "1", "linear": "0 passes more"}


def vit(depth: int) -> Target:
    """A ViT of 64 px with patches of 8 and `depth` blocks."""
    torch.manual_seed(0)
    model = VisionTransformer(64, 8, num_classes=10, embed_dim=WIDTH, depth=depth, num_heads=4, mlp_ratio=2).eval()
    taps = ["patch_embed_and_position", *(f"blocks.{number}" for number in range(depth))]
    return module_target(model, taps[1:], image_size=(64, 64))


def steps(depth: int) -> tuple[dict[str, Callable[[], object]], Callable[[], object], Callable[[], object]]:
    """{way: one step}, then the linear pass and the plain pass."""
    target = vit(depth)
    images = torch.rand(BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    recorded = target.record(images)
    taps = target.taps
    settings: dict[str, Any] = {"steps": 0, "ridge_images": 0, "progress": False}
    direct, modular = (fit(target, images, **settings).modules for fit in (fit_direct, fit_modular))
    chains = {
        tap: nn.Sequential(*(Block(WIDTH, 4, 2.0, qkv_bias=True) for _ in range(place)))
        for place, tap in enumerate(taps)
    }
    for inverse in (*direct.values(), *modular.values()):
        inverse.residual.requires_grad_(True)

    def train_direct() -> None:
        sum(F.mse_loss(inverse.raw(recorded[tap]), images) for tap, inverse in direct.items()).backward()  # type: ignore[union-attr]

    def train_modular() -> None:
        total = 0.0
        for tap, inverse in modular.items():
            ends = inverse.raw(recorded[tap]), recorded.get(inverse.destination, images)
            total = total + F.mse_loss(*(x if inverse.destination == PIXELS else x.values for x in ends))
        total.backward()  # type: ignore[attr-defined]

    def train_chains() -> None:
        for tap, blocks in chains.items():
            values = blocks(recorded[tap].values)
            made = direct[taps[0]].raw(recorded[taps[0]].replace(values))
            F.mse_loss(made, images).backward()

    def linear() -> None:
        fit_linear(target, images, taps=taps, progress=False)

    return {"chains": train_chains, "direct": train_direct, "modular": train_modular}, linear, lambda: target(images)


def main() -> None:
    write("depth", list(rows()))


def rows() -> Iterator[Row]:
    flops: dict[str, dict[int, float]] = {}
    seconds: dict[str, dict[int, float]] = {}
    for depth in DEPTHS:
        ways, linear, plain = steps(depth)
        for way, step in ways.items():
            flops.setdefault(way, {})[depth] = count_flops(step) / BATCH
        flops.setdefault("linear", {})[depth] = count_flops(linear) / BATCH
        timed = interleaved({**ways, "linear": linear, "plain": plain})
        for way, value in timed.items():
            seconds.setdefault(way, {})[depth] = value
    for way, counted in flops.items():
        for depth in DEPTHS:
            case = f"{way}, L = {depth}"
            per_block = counted[depth] / depth
            base = counted[DEPTHS[0]] / DEPTHS[0]
            yield Row("depth", case, "FLOPs an image and block", per_block, "1", base, per_block / base, "to L = 2")
            took, plain = seconds[way][depth], seconds["plain"][depth]
            yield Row("depth", case, "seconds / plain forward pass", took, "s", plain, took / plain, "")
        for name, table in (("FLOPs", counted), ("seconds", seconds[way])):
            before, after = DEPTHS[-2:]
            slope = math.log(table[after] / table[before]) / math.log(after / before)
            yield Row("depth", way, f"exponent of L, {name}", slope, "1", 1.0, slope, GOALS[way])


if __name__ == "__main__":
    main()
