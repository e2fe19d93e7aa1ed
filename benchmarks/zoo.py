"""The verified-models table: the smallest variant of every architecture module of timm, with random weights.

    python benchmarks/zoo.py                     every module, to results/reference/zoo.csv (half an hour on one core)
    python benchmarks/zoo.py --only swin_transformer --only xcit     these, whose rows are replaced in the table

A module works when it offers taps, `from_tap` agrees with the model at every one of them, and linear inverses of all of
them have been fitted on 64 small images. Each module has a process of its own, with limited memory and time, so that
one that fails takes no other with it. PSNRs are of random weights: they say that a fit has come about, not how well
the trained model can be inverted.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from backsight.data.images import open_images, tensor
from backsight.errors import BacksightError
from backsight.inverses.linear import fit_linear
from backsight.measures.pixels import psnr
from backsight.project import project_root
from backsight.targets import load_target
from backsight.targets.base import Target

IMAGES = 64
AGREEMENT = 1e-4  # of the output's own scale
SIZES = (64, 96, 112, 128, 224)  # the first that a model takes; small images keep a fit in seconds
MEMORY = 12 * 2**30  # bytes of data
SECONDS = 900  # for a module


@dataclass(frozen=True)
class Row:
    """A module of timm, by its smallest variant.

    works: taps, agreement and inverses; reason: why not; grids: at the three depths; worst_from_tap_error: over all
    taps, in the output's own scale; tap_first, tap_middle, tap_last: three depths, and psnr_… of their linear inverses
    on held-out images, in dB; seconds: of all of it; date, timm, torch: of the run.
    """

    module: str
    model: str
    parameters: int = 0
    height: int = 0
    width: int = 0
    offers_forward_intermediates: bool = False
    taps: int = 0
    grids: str = ""
    works: bool = False
    reason: str = ""
    worst_from_tap_error: float = float("nan")
    tap_first: str = ""
    tap_middle: str = ""
    tap_last: str = ""
    psnr_first: float = float("nan")
    psnr_middle: float = float("nan")
    psnr_last: float = float("nan")
    seconds: float = 0.0
    date: str = ""
    timm: str = ""
    torch: str = ""


def smallest(module: str) -> tuple[str, int, bool]:
    """(name, parameters, offers forward_intermediates) of the smallest variant."""
    import timm

    counted = []
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            model: Any = timm.create_model(name, pretrained=False)
        parameters = sum(each.numel() for each in model.parameters())
        counted.append((parameters, name, hasattr(model, "forward_intermediates")))
    parameters, name, offers = min(counted)
    return name, parameters, offers


def made(name: str) -> Target:
    """With random weights, at the smallest size that it takes. Raises BacksightError with the last reason."""
    refusal: BacksightError | None = None
    for size in (*SIZES, None):
        try:
            target = load_target(name, pretrained=False, image_size=size)
            scatter(target.model)
            return target
        except BacksightError as error:
            refusal = error
    assert refusal is not None
    raise refusal


def scatter(model: torch.nn.Module) -> None:
    """Random numbers for parameters that start as constants: a head of zeros would say nothing of the image."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def walked(module: str) -> Row:
    """One module's row."""
    start = time.perf_counter()
    name, parameters, offers = smallest(module)
    row: dict[str, Any] = {"module": module, "model": name, "parameters": parameters}
    row["offers_forward_intermediates"] = offers
    try:
        target = made(name)
        row |= {"height": target.image_size[0], "width": target.image_size[1], "taps": len(target.taps)}
        images = tensor(open_images("scenes", "train", target, IMAGES))
        row |= agreement(target, images[:2])
        inverses = fit_linear(target, images, progress=False)
        depths = {"first": target.taps[0], "middle": target.taps[len(target.taps) // 2], "last": target.taps[-1]}
        row |= {f"tap_{depth}": tap for depth, tap in depths.items()}
        shown = images[4::5]  # held out of the fit
        recorded = target.record(shown, list(depths.values()))
        row |= {f"psnr_{at}": float(psnr(shown, inverses[tap](recorded[tap])).mean()) for at, tap in depths.items()}
        error = row["worst_from_tap_error"]
        row["works"] = error <= AGREEMENT
        row["reason"] = "" if row["works"] else f"from_tap differs from the model by {error:.1e} of its output"
    except (BacksightError, RuntimeError, MemoryError) as error:
        row["reason"] = " ".join(str(error).split())[:200] or type(error).__name__
    made_by = {"date": time.strftime("%Y-%m-%d"), "timm": version("timm"), "torch": version("torch")}
    return Row(**row, **made_by, seconds=round(time.perf_counter() - start, 1))


def agreement(target: Target, images: Tensor) -> dict[str, Any]:
    """The largest difference of from_tap and model, over the taps, and the taps' grids.

    At every tap the representations of two images are swapped, and the outputs have to be swapped, too: a pass that
    did not read the tap would return them as they were. Raises BacksightError where both outputs are the same.
    """
    output, recorded = target(images), target.record(images)
    assert isinstance(output, Tensor)
    if torch.equal(output[0], output[1]) or not output.isfinite().all():
        raise BacksightError(f"the output of {target.name} with random weights says nothing of the image")
    scale, contrast = output.abs().max(), (output[0] - output[1]).abs().max()
    worst = 0.0
    for tap, representation in recorded.items():
        behind = target.from_tap(tap, representation.index([1, 0]))
        assert isinstance(behind, Tensor)
        difference = (behind - output.flip(0)).abs().max()
        if not difference < contrast / 2:
            raise BacksightError(f"the output of {target.name} does not follow a change at {tap}")
        worst = max(worst, float(difference / scale))
    taps = list(recorded.values())
    grids = [f"{h}x{w}" for each in (taps[0], taps[len(taps) // 2], taps[-1]) for h, w in each.grids]  # type: ignore[union-attr]
    return {"worst_from_tap_error": worst, "grids": " ".join(grids)}


def in_a_process(module: str) -> Row:
    """One module's row, from a process with limited memory and time (forked: the libraries are loaded already)."""
    start = time.perf_counter()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(module, sender))
    process.start()
    sender.close()
    row = None
    if receiver.poll(SECONDS):
        with contextlib.suppress(EOFError):
            row = receiver.recv()
    else:
        process.kill()
    process.join()
    if row is not None:
        return row
    ended = time.perf_counter() - start
    reason = f"not finished in {SECONDS} seconds" if ended >= SECONDS else f"its process ended with {process.exitcode}"
    return Row(module, "", reason=reason, seconds=round(ended, 1))


def _send(module: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    sender.send(walked(module))


def write(rows: Sequence[Row]) -> None:
    """The table, with these rows in the place of older ones of the same modules."""
    path = project_root() / "results" / "reference" / "zoo.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [each.name for each in fields(Row)]
    table = pd.DataFrame([asdict(row) for row in rows], columns=columns)
    if path.exists():
        older = pd.read_csv(path)
        table = pd.concat([older[~older["module"].isin(table["module"])], table])
    partial = path.with_suffix(".csv.partial")
    table.sort_values("module").to_csv(partial, index=False, float_format="%.3g")
    os.replace(partial, path)


def main() -> None:
    """Walk the modules, print their rows as they come, and write the table."""
    from timm.models import list_modules

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="a module of timm; may be given several times")
    given = parser.parse_args()
    modules = sorted(list_modules())
    if unknown := sorted(set(given.only or ()) - set(modules)):
        parser.error(f"timm has no module {', '.join(unknown)}; there are: {', '.join(modules)}")
    rows = []
    bar = tqdm(given.only or modules, desc="modules", leave=False)
    for module in bar:
        rows.append(row := in_a_process(module))
        said = f"{row.taps} taps, {row.worst_from_tap_error:.0e}" if row.works else row.reason
        bar.write(f"{'works  ' if row.works else 'refused'} {module:26} {row.model:34} {said} ({row.seconds:.0f} s)")
        write(rows)
    offering = [row for row in rows if row.offers_forward_intermediates]
    working = sum(row.works for row in offering)
    print(f"{working} of {len(offering)} modules that offer forward_intermediates work")


if __name__ == "__main__":
    main()
