"""What real widths cost, in frozen passes of the same images: closed-form starts, a training step, products of MAP.

scenes-vit alone, two minutes; SIZE=real: ViT-S/14 (384 channels) and ViT-B/16 (768) at 224 px as well, with random
weights, half an hour. The processor time of one thread: other work beside it does not count.
"""

import os
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from table import Row, compare, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from training import our_step

from backsight.exact.map import fit_map_tap, pixel_forward, way_back
from backsight.exact.solver import Linearised
from backsight.inverses.linear import fit_linear
from backsight.inverses.passes import recorded_batches
from backsight.inverses.rows import patchify
from backsight.targets import Target, load_target
from backsight.training.fit import RIDGE_IMAGES, fit_starts

WIDTHS = {"scenes-vit": 1024, "vit_small_patch14_dinov2": 192, "vit_base_patch16_224": 192}  # images that are passed
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mkldnn_convolution", "convolution_backward", "_scaled_dot_product")


def seconds(function: Callable[[], object]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def measured(target: Target, images: Tensor) -> Iterator[Row]:
    row = partial(compare, "real", f"{target.name}, {target.image_size[0]} px, {len(target.taps)} taps")
    few = images[:16]
    passing = seconds(lambda: [None for _ in recorded_batches(target, images, target.taps, 64)])
    for family in ("direct", "modular"):  # of fewer images a start reads more rows each, about as many in all
        how = {"families": [family], "ridge_images": len(images), "progress": False}
        own = seconds(partial(fit_starts, target, images, few, **how)) - passing
        whole = passing * RIDGE_IMAGES / len(images)
        yield row(f"seconds of {family} starts / of recording {RIDGE_IMAGES} images", own, "s", whole, "<= 1")
    step, _ = our_step(target, few, len(few))
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        own = seconds(step)
    once = passing / len(images)
    yield row("seconds of a step of fit_modular, 16 images / of their pass", own, "s", 16 * once, "")
    parts = [(part.key.removeprefix("aten::"), part.self_cpu_time_total / 1e6) for part in profiled.key_averages()]
    products = sum(time for name, time in parts if name.startswith(PRODUCTS))
    yield row("share of products in a step", products, "s", sum(time for _, time in parts), ">= 0.7")
    forward = pixel_forward(target, target.taps[-1], (8, 8), (images.shape[2] // 8, images.shape[3] // 8))
    here = Linearised(forward, patchify(images[:1], (8, 8)))
    pair = seconds(lambda: here.transposed(here.product(here.at.detach())))
    yield row("seconds of a pair of products of MAP / of a pass", pair, "s", once, "")
    tap = [name for name in target.taps if name.startswith("blocks")][-1]
    way = way_back(target, tap, target.taps)
    needed = [tap, *(step.source for step in way[:1])]
    bases = fit_linear(target, images[:64], few, taps=needed, progress=False)
    inverse = fit_map_tap(target, tap, bases, few[:8], checked=2)
    recorded = target.record(few[:1], [tap])[tap]
    own = seconds(lambda: inverse(recorded))
    yield row(f"seconds of MAP from {tap}, one image / of its pass", own, "s", once, "")
    yield row(f"seconds of MAP from {tap}, one image / 60 s", own, "s", 60.0, "<= 1")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the widest model comes last
    yield row("peak memory so far / 6 GB", peak, "B", 6e9, "<= 1")


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name, count in WIDTHS.items() if os.environ.get("SIZE") in ("real", "full") else [("scenes-vit", 1024)]:
        target = load_target(name, pretrained=False, **({} if name == "scenes-vit" else {"image_size": 224}))
        shape = (count, 3, *target.image_size)
        rows += measured(target, torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    write("real", rows)
