"""Training of inverses against the reference recipe, side by side: images a second, and time to one held-out error.

The reference recipe (Rathjens et al.) passes every batch through the frozen model again, in float32, and trains each
module with an Adam of its own; its module sizes are the paper's. Two to three minutes on two cores for ViT-Ti/16 and
DETR-R50 at a small image size; SIZE=full takes ViT-B/16 at batch 32 and DETR-R50 at 480 x 640. Weights of these targets
are random, which changes no time; errors are compared on the trained scenes-vit. The floors are counted FLOPs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
import torch.nn.functional as F
from table import Row, compare, interleaved, write
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import DetrConfig
from transformers.models.detr import modeling_detr

from backsight import fit_modular, load_target, open_images
from backsight.data.features import record_features
from backsight.data.images import batches, tensor
from backsight.inverses.linear import PIXELS, fit_linear_pairs
from backsight.inverses.module import Chain
from backsight.studies.efficiency import count_flops
from backsight.targets.base import Target
from backsight.training.loop import train

FULL = os.environ.get("SIZE") == "full"


# ------------------------------------------------------------------------------------------- the reference recipe


class ReferencePatch(nn.Module):
    """Tokens with a class token -> pixels: transposed convolutions of stride two, BatchNorm and ReLU between."""

    def __init__(self, channels: int, grid: tuple[int, int], doublings: int) -> None:
        super().__init__()
        self.grid = grid
        widths = [*[channels, 256, 64, 16][:doublings], 3]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.ConvTranspose2d(before, after, 2, 2), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-2], nn.Sigmoid())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens[:, 1:].transpose(1, 2).unflatten(2, self.grid))


class ReferenceBackbone(nn.Module):
    """(B, 256, h, w) -> pixels of 32 times the size: 78.8 million parameters, as the paper's."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        widths = [256, 2048, 1792, 1536, 1024, 512, 256, 128, 64, 3]
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(widths)):
            # The strides are not told; doubled are the five last but one, at the least cost.
            stride, kernel = (2, 3) if 3 <= number < 8 else (1, 1 if number == 0 else 3)
            padding = (kernel - 1) // 2
            layers.append(nn.ConvTranspose2d(before, after, kernel, stride, padding, output_padding=stride - 1))
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-2], nn.Sigmoid())

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class ReferenceDetrEncoder(nn.Module):
    """Six DETR encoder layers."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(modeling_detr.DetrEncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        for layer in self.layers:
            made = layer(x, attention_mask=None, spatial_position_embeddings=position)
            x = made if isinstance(made, Tensor) else made[0]
        return x


class ReferenceDetrDecoder(nn.Module):
    """Six DETR decoder layers: zeros with the map's positions ask, the object queries with an embedding answer."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(modeling_detr.DetrDecoderLayer(config) for _ in range(config.decoder_layers))
        self.embedding = nn.Parameter(torch.randn(1, config.num_queries, config.d_model))

    def forward(self, queries: Tensor, position: Tensor) -> Tensor:
        x = torch.zeros_like(position).expand(len(queries), -1, -1)
        for layer in self.layers:
            made = layer(
                x,
                attention_mask=None,
                object_queries_position_embeddings=position.expand(len(queries), -1, -1),
                spatial_position_embeddings=self.embedding.expand(len(queries), -1, -1),
                encoder_hidden_states=queries,
            )
            x = made if isinstance(made, Tensor) else made[0]
        return x


@dataclass
class Reference:
    """The reference recipe of one target: `step(images)` trains every module once; `chain(images)` reconstructs."""

    target: Target
    modules: dict[str, nn.Module]
    losses: Callable[[Tensor, Mapping[str, Any]], dict[str, Tensor]]
    chain: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        rates = {"patch": 1e-3, "backbone": 1e-3}
        self.optimizers = {
            name: torch.optim.Adam(module.parameters(), lr=rates.get(name, 1e-4))
            for name, module in self.modules.items()
        }

    def step(self, images: Tensor) -> None:
        for module in self.modules.values():
            module.train()
        recorded = self.target.record(images)
        for name, loss in self.losses(images, recorded).items():
            self.optimizers[name].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules[name].parameters(), 1.0)
            self.optimizers[name].step()


def reference_vit(target: Target) -> Reference:
    """Patch embedding and encoder, the two components of the paper's ViT."""
    torch.manual_seed(0)
    model: Any = target.model
    channels, depth = model.embed_dim, len(model.blocks)
    heads, grid = model.blocks[0].attn.num_heads, model.patch_embed.grid_size
    doublings = int(target.reduction[0]).bit_length() - 1
    ratio = model.blocks[0].mlp.fc1.out_features / channels
    first, last = target.taps[0], target.taps[-1]
    modules = {
        "patch": ReferencePatch(channels, grid, doublings),
        "encoder": nn.Sequential(*(Block(channels, heads, ratio, qkv_bias=True) for _ in range(depth))),
    }

    def losses(images: Tensor, recorded: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            "patch": F.mse_loss(modules["patch"](recorded[first].values), images),
            "encoder": F.mse_loss(modules["encoder"](recorded[last].values), recorded[first].values),
        }

    def chain(images: Tensor) -> Tensor:
        return modules["patch"](modules["encoder"](target.record(images)[last].values))

    return Reference(target, modules, losses, chain)


def reference_detr(target: Target, size: tuple[int, int]) -> Reference:
    """Backbone, encoder and decoder, of the paper's sizes."""
    torch.manual_seed(0)
    model: Any = target.model
    config = model.config
    modules: dict[str, nn.Module] = {
        "backbone": ReferenceBackbone(size),
        "encoder": ReferenceDetrEncoder(config),
        "decoder": ReferenceDetrDecoder(config),
    }
    projected, encoded, decoded = target.taps[:3]

    def losses(images: Tensor, recorded: Mapping[str, Any]) -> dict[str, Tensor]:
        tokens = recorded[projected]
        position = recorded[encoded].position
        found = modules["backbone"](tokens.map())
        return {
            "backbone": F.mse_loss(found, F.interpolate(images, found.shape[2:])),
            "encoder": F.mse_loss(modules["encoder"](recorded[encoded].values, position), tokens.values),
            "decoder": F.mse_loss(modules["decoder"](recorded[decoded].values, position), recorded[encoded].values),
        }

    return Reference(target, modules, losses, lambda images: images)


# --------------------------------------------------------------------------------------------- images a second


def our_step(target: Target, images: Tensor, batch: int) -> tuple[Callable[[], object], int]:
    """One step of `fit_modular` from recorded features, through the real loop, and the FLOPs of its modules."""
    kept: dict[str, Any] = {}

    def keep(modules: Any, losses: Any, batch_at: Any, **settings: Any) -> pd.DataFrame:
        kept.update(modules=modules, losses=losses, batch=batch_at(0))
        return pd.DataFrame(columns=["module", "split", "loss", "step"])

    store = record_features(target, images, target.taps, progress=False)
    with patch("backsight.training.fit.train", keep):
        fit_modular(target, store, batch_size=batch, steps=1, progress=False, ridge_images=0)

    def step() -> None:
        train(kept["modules"], kept["losses"], lambda _: kept["batch"], steps=1, progress=False)

    def backward() -> None:
        for _, loss in kept["losses"](kept["batch"], 0):
            loss.backward()

    for module in kept["modules"].values():
        module.residual.requires_grad_(True)
    return step, count_flops(backward)


def rates() -> Iterator[Row]:
    """Images a second of a step, ours against the reference recipe."""
    name, batch = ("vit_base_patch16_224", 32) if FULL else ("vit_tiny_patch16_224", 16)
    vit = load_target(name, taps="components", pretrained=False)
    yield from _rate(vit, reference_vit(vit), (224, 224), batch, f"{name}, patch + 12 blocks, batch {batch}")
    size, batch = ((480, 640), 4) if FULL else ((128, 160), 2)
    detr = load_target("facebook/detr-resnet-50", taps="components", pretrained=False)
    detr = detr.select(detr.taps[:3])
    case = f"detr-resnet-50, backbone + 6 + 6 layers, {size[0]} x {size[1]}, batch {batch}"
    yield from _rate(detr, reference_detr(detr, size), size, batch, case)


def _rate(target: Target, reference: Reference, size: tuple[int, int], batch: int, case: str) -> Iterator[Row]:
    images = torch.rand(max(8, 2 * batch), 3, *size, generator=torch.Generator().manual_seed(0))
    steps: dict[str, Callable[[], object]] = {"reference": lambda: reference.step(images[:batch])}
    flops = {"reference": count_flops(steps["reference"])}
    steps["ours"], flops["ours"] = our_step(target, images, batch)
    seconds = interleaved(steps)
    ours, theirs = batch / seconds["ours"], batch / seconds["reference"]
    yield compare("training", case, "images/s, from features", ours, "1/s", theirs, ">= 4 on a CPU")
    counted = flops["reference"] / flops["ours"]
    measure = "counted: FLOPs of the reference step / of this one"
    yield Row("training", case, measure, counted, "1", 1.0, counted, "what one precision allows")
    rate = flops["reference"] / seconds["reference"]
    yield Row("training", case, "FLOP/s of the reference step", rate, "1/s", rate, 1.0, "for orientation")


# ------------------------------------------------------------------------------------------------ time to an error


def time_to_error() -> Iterator[Row]:
    """Seconds until the last stage's chain is as good on held-out scenes as the reference recipe after its time."""
    target = load_target("scenes-vit", taps="components")
    train_images = tensor(open_images("scenes", "train", target, 2000))
    held_out = tensor(open_images("scenes", "validation", target, 128))
    reference = reference_vit(target)
    budget = 600.0 if FULL else 45.0
    started, stream = time.perf_counter(), batches(train_images, 16, 0, steps=10**9)
    count = 0
    while time.perf_counter() - started < budget:
        reference.step(next(stream))
        count += 1
    spent = time.perf_counter() - started
    for module in reference.modules.values():
        module.eval()
    last = target.taps[-1]
    with torch.no_grad():
        theirs = float(F.mse_loss(reference.chain(held_out), held_out))
        first = reference.modules["patch"](target.record(held_out)[target.taps[0]].values)
        theirs_first = float(F.mse_loss(first, held_out))

    def linear() -> float:
        """A chain of ridge maps, nothing trained: the error."""
        maps = fit_linear_pairs(
            target, train_images[:1000], [(last, target.taps[0]), (target.taps[0], PIXELS)], held_out, progress=False
        )
        chain = Chain({source: inverse for (source, _), inverse in maps.items()}, last)
        with torch.no_grad():
            return float(F.mse_loss(chain(target.record(held_out)[last]), held_out))

    times = []
    for _ in range(3):
        start = time.perf_counter()
        error = linear()
        times.append(time.perf_counter() - start)
    case = f"scenes-vit, last block to pixels, after {count} reference steps of batch 16"
    yield compare(
        "training", case, "held-out squared error, chain of ridge maps / reference", error, "1", theirs, "<= 1"
    )
    yield compare(
        "training",
        case,
        "seconds to it, reference / chain of ridge maps",
        spent,
        "s",
        statistics.median(times),
        ">= 20",
    )
    steps = 200 if FULL else 40
    recorded = target.record(held_out)
    start = time.perf_counter()
    modules = fit_modular(target, train_images, held_out, steps=steps, ridge_images=512, progress=False)
    ours = time.perf_counter() - start
    with torch.no_grad():
        chained, first = (float(F.mse_loss(modules[tap](recorded[tap]), held_out)) for tap in (last, target.taps[0]))
    case = f"scenes-vit, modular from closed-form starts, {steps} steps in all"
    yield compare("training", case, "seconds, reference / ours", spent, "s", ours, "beside the errors below")
    measure = "held-out squared error, {}, ours / reference"
    yield compare("training", case, measure.format("last block"), chained, "1", theirs, "<= 1")
    yield compare("training", case, measure.format("patch embedding"), first, "1", theirs_first, "<= 1")


if __name__ == "__main__":
    write("training", [*rates(), *time_to_error()])
