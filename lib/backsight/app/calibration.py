"""What one unit of work costs on this machine: a short calibration, from which `plan` multiplies.

    any target       start of a notebook, moments and solutions of ridge regressions, an interval
    of each target   loading, a pass through it, a training step and a decode of each family, scores of a picture

Weights are random and images are noise, since neither changes the time. What would take too long to run here is
extrapolated: its FLOPs are counted on tensors without memory, at the rate of a part of it that was run.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from backsight.app.runner import IMAGE_SOURCES
from backsight.data.images import open_images
from backsight.errors import BacksightError
from backsight.inverses.families import as_reconstructions
from backsight.inverses.layouts import MAXIMUM_INPUTS, PIXELS, Form, Pair, area, form_of, plan_layout
from backsight.inverses.linear import MAXIMUM_ROWS, RANK, LinearInverse
from backsight.inverses.module import Inverse
from backsight.inverses.ridge import RidgeAccumulator
from backsight.measures.pixels import psnr
from backsight.measures.structure import Judged, detail, fast_ssim
from backsight.representation import Representation, Tokens
from backsight.scenes.render import write_coco
from backsight.studies.efficiency import without_context
from backsight.tables.pool import pooled_rows
from backsight.targets import load_target
from backsight.training.fit import fit_direct, fit_modular, stage_pairs

Operation = tuple[str, str]  # what is done, and by which target ("" where that does not matter)
How = Literal["measured", "extrapolated", "allowance"]

# What the range of a cost is widened by, down and up, beyond the spread of its measurements: a calibration is short and
# of one moment; FLOPs do not all take the same time; and an allowance is a guess.
MARGINS: Mapping[str, float] = {"measured": 1.3, "extrapolated": 2.0, "allowance": 2.0}
LONGEST_STEP = 4.0  # seconds a training step may take to be run here as a whole
MEASURED_STEPS = 2  # the first warms up
STARTS_NOTEBOOK = "scenes-vit"  # the target of the notebook whose start is measured, where it is there
SIDE, ROWS = 384, 2048  # of the regressions that are measured
JUDGED = 16  # pictures whose scores are measured at once
PHOTOGRAPH = (480, 640)  # of the files that stand for those of a folder


@dataclass(frozen=True)
class Cost:
    """Seconds of one unit of work; low, high: the range that the measurements and the method allow."""

    seconds: float
    low: float
    high: float
    how: How = "measured"

    @classmethod
    def of(cls, samples: Sequence[float], how: How = "measured") -> Cost:
        """The median, and the range of the samples widened by the margin of the method."""
        margin = MARGINS[how]
        return cls(median(samples), min(samples) / margin, max(samples) * margin, how)


@dataclass(frozen=True)
class Regression:
    """One ridge regression: rows an image, inputs and outputs of a row; low_rank: whether its map has RANK only."""

    rows: int
    inputs: int
    outputs: int
    low_rank: bool

    @property
    def moments(self) -> float:
        """GFLOPs an image."""
        return 2e-9 * self.rows * self.inputs * (self.inputs + self.outputs)

    @property
    def solution(self) -> float:
        """GFLOPs of the eigendecompositions, and of the matrix products around them (ridge.RidgePath)."""
        eigen = 9.0 * self.inputs**3 * (2 if self.low_rank else 1)
        return 1e-9 * (eigen + 4 * self.inputs**3 + 8 * self.inputs**2 * self.outputs)

    @property
    def bytes(self) -> int:
        """Of the moments (of both splits) and of one solution, in double precision."""
        return 8 * (2 * self.inputs * (self.inputs + self.outputs) + 3 * self.inputs**2)

    @property
    def numbers(self) -> int:
        """Of the map."""
        rank = min(RANK, self.inputs, self.outputs)
        return rank * (self.inputs + self.outputs) if self.low_rank else self.inputs * self.outputs


@dataclass(frozen=True)
class Trained:
    """What a family moves: numbers trained, bytes of activations an image, GFLOPs of forward and backward an image."""

    numbers: int
    activations: int
    gflops: float


@dataclass(frozen=True)
class Survey:
    """What is counted of a target: its forms at all taps, and the modules of each family at the chosen ones.

    taps: of the trainings; tap_sets: {"blocks" | "components" | "fine": taps}; forms: of all taps and of the pixels;
    stages: the pairs of a modular family; parameters: of the target; gflops: of a pass of one image.
    """

    name: str
    kind: str
    taps: tuple[str, ...]
    tap_sets: Mapping[str, tuple[str, ...]]
    forms: Mapping[str, Form]
    stages: tuple[Pair, ...]
    reduction: tuple[int, int]
    image_size: tuple[int, int]
    parameters: int
    gflops: float
    trained: Mapping[str, Trained] = field(default_factory=dict)

    def chosen(self, taps: str | Sequence[str]) -> tuple[str, ...]:
        """The taps that a notebook's parameter `taps` names."""
        return self.tap_sets.get(taps, self.taps) if isinstance(taps, str) else tuple(taps)

    def values(self, taps: Iterable[str]) -> int:
        """Numbers that these taps hold of one image."""
        return sum(_values(self.forms[tap]) for tap in taps)

    def regressions(
        self, pairs: Iterable[Pair], context: int = 1, maximum_inputs: int = MAXIMUM_INPUTS
    ) -> tuple[Regression, ...]:
        """The regressions of a linear fit of these pairs; maps that read the same rows share one (linear.py)."""
        found: dict[Any, Regression] = {}
        for pair in pairs:
            try:
                source, destination = (self.forms[end] for end in pair)
                layout = plan_layout(pair, source, destination, self.reduction, maximum_inputs, None, context)
            except BacksightError:
                continue  # no linear map is defined between these two
            for block in layout.blocks:
                on_grid = layout.rows == "patches" and block in layout.main
                grid = layout.row_grid(block) if on_grid else (1, 1)
                rows = layout.source.count if layout.rows == "queries" else min(area(grid), MAXIMUM_ROWS)
                key = (pair[0], layout.reading(block), grid)
                outputs = layout.outputs(block) + (found[key].outputs if key in found else 0)
                found[key] = Regression(rows, layout.inputs(block), outputs, layout.rows == "set")
        return tuple(found.values())


def _values(form: Form) -> int:
    places = form.count or form.prefix + sum(map(area, form.grids))
    return places * form.channels


@dataclass(frozen=True)
class Calibration:
    """costs: of a unit of each operation; surveys: of each target; crowding: how much longer a job may take when every
    core has one; batch_size: of the measured training steps; process: bytes of a process with its
    libraries; growth: bytes that an operation needs beyond what is counted; scene: bytes of a cached scene of each
    target; notes: what a reader should know."""

    costs: Mapping[Operation, Cost]
    surveys: Mapping[str, Survey]
    batch_size: int
    crowding: float = 1.0
    process: int = 700 * 2**20
    growth: Mapping[Operation, int] = field(default_factory=dict)
    scene: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# --------------------------------------------------------------------------------------------------------- measuring


def seconds_of(function: Callable[[], object], repeats: int = 3, warm: bool = True) -> list[float]:
    """Seconds of each call; warm: one more before them, which is not counted."""
    found = []
    for _ in range(repeats + warm):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return found[warm:]


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Inside, torch computes on so many threads, as a job of the run graph does."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def peak_growth(grown: list[int]) -> Iterator[None]:
    """Appends by how many bytes the peak of the resident memory exceeded what was there before.

    Where the system cannot forget an earlier peak, growth below it is not seen.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _resident()
    yield
    grown.append(max(0, _peak() - before))


def _resident() -> int:
    return _status("VmRSS") or _peak()


def _peak() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def machine_costs(cores: int) -> tuple[dict[Operation, Cost], float]:
    """The costs that are of no target, and the crowding on so many cores."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(ROWS, SIDE, generator=generator) for _ in range(2))
    regression = Regression(ROWS, SIDE, SIDE, False)
    moments = RidgeAccumulator()
    moments.update(x, y)

    def solve() -> None:
        moments.update(x[:1], y[:1])  # drops the eigendecomposition that is kept
        path = moments.path()
        path.errors(moments, [1e-3, 1e-2])
        path.weight(1e-2)

    values = np.random.default_rng(0).normal(size=(3, 100))
    costs = {
        ("start", ""): Cost.of([notebook_seconds()]),
        ("moments", ""): Cost.of([s / regression.moments for s in seconds_of(lambda: moments.update(x, y))]),
        ("solution", ""): Cost.of([s / regression.solution for s in seconds_of(solve, 2, warm=False)]),
        ("interval", ""): Cost.of(seconds_of(lambda: pooled_rows(values, "psnr"), 5)),
        ("figure", ""): Cost.of([1.0], "allowance"),
        ("seconds", ""): Cost.of([1.0], "allowance"),
    }
    return costs, crowding(cores)


def crowding(cores: int) -> float:
    """How much longer the same work takes on one core when all the others work as well (caches, hyper-threads)."""
    if cores < 2:
        return 1.0
    from concurrent.futures import ThreadPoolExecutor

    matrices = [torch.rand(512, 512) for _ in range(cores)]

    def work(matrix: Tensor) -> float:
        return seconds_of(lambda: [torch.softmax(matrix @ matrix, 1) for _ in range(30)], 1)[0]

    with ThreadPoolExecutor(cores) as pool:
        alone = median(work(matrices[0]) for _ in range(3))
        together = median(seconds for _ in range(3) for seconds in pool.map(work, matrices))
    return max(1.0, together / alone)


def notebook_seconds() -> float:
    """Of a notebook that loads a shipped target and ends: checks, kernel, imports, saving. Run once as jobs are run."""
    import nbformat

    cells = [
        nbformat.v4.new_code_cell(f'target = "{STARTS_NOTEBOOK}"\nout = ""', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "from backsight.inverses.families import fit_family\nfrom backsight.plots.style import depth_curves\n"
            "from backsight.studies.quality import evaluate_quality\nfrom backsight.app.runs import open_run\n"
            "from backsight.targets import load_target\n"
            'run = open_run(out, "start", {"target": target})\nload_target(target, pretrained=False)\nrun.finish()'
        ),
    ]
    with tempfile.TemporaryDirectory() as folder:
        notebook = Path(folder) / "start.ipynb"
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), notebook)
        command = [sys.executable, "-m", "backsight.app.cli", "run", str(notebook), "--out", str(Path(folder) / "out")]
        started = time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise BacksightError(f"The start of a notebook could not be measured ({last}): run `backsight doctor`.")
        return time.perf_counter() - started


# ------------------------------------------------------------------------------------------------------ of one target


@dataclass(frozen=True)
class Wanted:
    """What is asked of a target: taps of the trainings; sources of images; inverted: whether inverses are trained."""

    taps: str | tuple[str, ...] = "blocks"
    sources: tuple[str, ...] = ("scenes",)
    inverted: bool = True


class TargetCalibration:
    """Measures one target: `survey`, `costs` (without the target's name), `growth`, `scene` and `notes` afterwards."""

    def __init__(self, name: str, wanted: Wanted, families: Sequence[str], batch_size: int) -> None:
        started = time.perf_counter()
        self.target = load_target(name, wanted.taps, pretrained=False)
        self.costs: dict[str, Cost] = {"load": Cost.of([time.perf_counter() - started])}
        self.growth: dict[str, int] = {}
        self.notes: list[str] = []
        self.scene = 0
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(0)
        shape = (max(2, batch_size), 3, *self.target.image_size)
        self.noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        self.recorded, self.survey = self._survey()
        self._passes()
        self._pictures(wanted.sources)
        if not wanted.inverted:
            return
        self._decodes("linear", self._linear())
        for family in dict.fromkeys(family.partition("_")[0] for family in families if family != "linear"):
            modules = self._fit(family, self.noise[:2], steps=0)
            counted = self._counted(modules)
            self.survey = replace(self.survey, trained={**self.survey.trained, family: _together(counted.values())})
            if self._is_short(family):
                self._steps(family)
                self._decodes(family, as_reconstructions(modules))
            else:
                self._extrapolate(family, modules, counted)

    def _survey(self) -> tuple[dict[str, Representation], Survey]:
        target, sets = self.target, {}
        for name in ("blocks", "components", "fine"):
            try:
                sets[name] = target.tap_set(name)
            except BacksightError:
                continue  # the model has no such set
        every = target.resolve_taps(
            list(dict.fromkeys([*target.taps, *(tap for each in sets.values() for tap in each)]))
        )
        image = self.noise[:1].float() / 255
        with FlopCounterMode(display=False) as counter:
            recorded = {tap: without_context(each) for tap, each in target.record(image, every).items()}
        forms = {PIXELS: form_of(image)} | {tap: form_of(each) for tap, each in recorded.items()}
        survey = Survey(
            target.name,
            target.kind,
            target.taps,
            sets,
            forms,
            tuple(stage_pairs(target, target.taps, {tap: forms[tap] for tap in target.taps})),
            target.reduction,
            target.image_size,
            sum(parameter.numel() for parameter in target.model.parameters()),
            counter.get_total_flops() / 1e9,
        )
        return {tap: recorded[tap] for tap in target.taps}, survey

    def _passes(self) -> None:
        """A pass of one image, in batches of as many as a second allows."""
        image = self.noise[:1].float() / 255
        first = seconds_of(lambda: self.target.record(image), 1)[0]
        count = max(1, min(len(self.noise), int(0.5 / first)))
        batch = self.noise[:count].float() / 255
        self.costs["forward"] = Cost.of([s / count for s in seconds_of(lambda: self.target.record(batch))])

    def _pictures(self, sources: Sequence[str]) -> None:
        """Reading and rendering, and the scores of a picture."""
        size = self.target.image_size
        with tempfile.TemporaryDirectory() as folder:
            if set(sources) & set(IMAGE_SOURCES):
                count, root = 24, Path(folder) / "scenes"
                rendering = seconds_of(lambda: write_coco(root, "train", count, 0, max(size)), 1, warm=False)
                self.costs["render"] = Cost.of([s / count for s in rendering])
                self.scene = sum(each.stat().st_size for each in root.rglob("*") if each.is_file()) // count
                images = open_images(root, "all", size)
                self.costs["read scene"] = Cost.of(seconds_of(lambda: images.image(0), 5))
            if set(sources) - set(IMAGE_SOURCES):
                pixels = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
                photograph = Image.fromarray(pixels).resize(PHOTOGRAPH[::-1], Image.Resampling.BICUBIC)
                photograph.save(Path(folder) / "photograph.jpg", quality=90)
                images = open_images(folder, "all", size)
                self.costs["read photograph"] = Cost.of(seconds_of(lambda: images.image(len(images) - 1), 5))
        shown = self.noise[:JUDGED].float() / 255
        made = shown.flip(0)
        inside = torch.zeros(len(shown), *size, dtype=torch.bool)
        inside[:, size[0] // 4 : size[0] // 2, size[1] // 4 : size[1] // 2] = True
        judge = detail(Judged(shown, inside, inside, torch.arange(len(shown)), {}))
        scored = seconds_of(lambda: (psnr(shown, made), fast_ssim(shown, made)))
        self.costs["score"] = Cost.of([s / len(shown) for s in scored])
        self.costs["detail"] = Cost.of([s / len(shown) for s in seconds_of(lambda: judge(made))])

    def _linear(self) -> dict[str, Any]:
        """Linear inverses of zeros: as fast as fitted ones."""
        found = {}
        for tap in self.target.taps:
            layout = plan_layout(
                (tap, PIXELS), self.survey.forms[tap], self.survey.forms[PIXELS], self.survey.reduction
            )
            ranks = {
                block: min(RANK, layout.inputs(block), layout.outputs(block)) if layout.rows == "set" else None
                for block in layout.blocks
            }
            found[tap] = LinearInverse(tap, PIXELS, layout, ranks)
        return found

    def _fit(self, family: str, images: Tensor, **options: Any) -> dict[str, Inverse]:
        """Modules without closed-form starts, whose solutions are counted instead."""
        taps = options.get("taps", self.target.taps)
        if family == "direct":
            return fit_direct(
                self.target, images, linear=dict.fromkeys((tap, PIXELS) for tap in taps), progress=False, **options
            )
        return fit_modular(
            self.target, images, linear=dict.fromkeys(self.survey.stages), image_share=0, progress=False, **options
        )

    def _counted(self, modules: Mapping[str, Inverse]) -> dict[str, Trained]:
        """Of each module, on tensors without memory."""
        found = {}
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            for tap, module in modules.items():
                given = self.recorded[tap].apply(mode.from_tensor)
                wanted = self.recorded.get(module.destination)
                layout = wanted.apply(mode.from_tensor) if isinstance(wanted, Tokens) else None
                module.requires_grad_(True)
                saved: dict[int, int] = {}  # bytes of each storage: a tensor that two operations keep counts once

                def note(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
                    saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
                    return tensor

                hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
                with hooks, FlopCounterMode(display=False) as counter:
                    module.raw(given, layout).sum().backward()
                for parameter in module.parameters():
                    parameter.grad = None
                module.requires_grad_(False)
                numbers = sum(parameter.numel() for parameter in module.parameters())
                found[tap] = Trained(numbers, sum(saved.values()), counter.get_total_flops() / 1e9)
        return found

    def _is_short(self, family: str) -> bool:
        """Whether a training step can be run here as a whole."""
        rate = self.survey.gflops / self.costs["forward"].seconds
        return self.batch_size * (self.survey.trained[family].gflops + self.survey.gflops) / rate < LONGEST_STEP

    def _steps(self, family: str) -> None:
        """Training steps at the batch size."""
        grown: list[int] = []
        with peak_growth(grown):
            made = self._fit(family, self.noise, steps=MEASURED_STEPS, batch_size=self.batch_size)
        self.costs[f"{family} step"] = Cost.of(_step_seconds(made))
        self.growth[f"{family} step"] = grown[0]

    def _decodes(self, family: str, reconstructions: Mapping[str, Any]) -> None:
        """One image from every tap."""
        count = len(self.noise) if self.survey.gflops < 1 else 1
        batch = self.noise[:count].float() / 255
        recorded = {tap: without_context(each) for tap, each in self.target.record(batch, self.target.taps).items()}

        def decode() -> None:
            with torch.no_grad():
                for tap, reconstruct in reconstructions.items():
                    reconstruct(recorded[tap])

        self.costs[f"{family} decode"] = Cost.of([s / count for s in seconds_of(decode, 2)])

    def _extrapolate(self, family: str, modules: Mapping[str, Inverse], counted: Mapping[str, Trained]) -> None:
        """Steps and decodes from counted FLOPs."""
        a_gflop, a_number = self._module_rates
        whole, forward = self.survey.trained[family], self.costs["forward"].seconds
        seconds = self.batch_size * (whole.gflops * a_gflop + forward) + whole.numbers * a_number
        self.costs[f"{family} step"] = Cost.of([seconds], "extrapolated")
        ends = {tap: module.destination for tap, module in modules.items()}
        passed = 0.0  # GFLOPs of the modules that an image runs through from every tap; a third of a step is forward
        for tap in modules:
            while tap in ends:
                passed += counted[tap].gflops / 3
                tap = ends[tap]
        self.costs[f"{family} decode"] = Cost.of([passed * a_gflop], "extrapolated")
        said = f"{self.survey.name}: steps and decodes are extrapolated from counted FLOPs at the rate of one module."
        if said not in self.notes:
            self.notes.append(said)

    @cached_property
    def _module_rates(self) -> tuple[float, float]:
        """(seconds a GFLOP of forward and backward, seconds a number of the optimiser), from steps of the direct module
        of the middle tap on batches of one and of two images."""
        taps = [self.target.taps[len(self.target.taps) // 2]]
        forward = self.costs["forward"].seconds
        steps = []
        for batch in (1, 2):
            made = self._fit("direct", self.noise[:2], taps=taps, steps=MEASURED_STEPS, batch_size=batch)
            steps.append(median(_step_seconds(made)))
        module = _together(self._counted(made).values())
        an_image = max(steps[1] - steps[0] - forward, 0.1 * steps[1])
        return an_image / module.gflops, max(0.0, steps[0] - an_image - forward) / module.numbers


def calibrate(
    wanted: Mapping[str, Wanted], families: Sequence[str], batch_size: int, cores: int, progress: bool = True
) -> Calibration:
    """Measure this machine, on one thread as the run graph's jobs have, and every target that is wanted.

    wanted: by the target's name. Raises BacksightError on an unknown target or tap.
    """
    surveys: dict[str, Survey] = {}
    growth: dict[Operation, int] = {}
    scene: dict[str, int] = {}
    notes: list[str] = []
    with (
        on_threads(1),
        tqdm(total=1 + len(wanted), desc="calibrating", unit="target", leave=False, disable=not progress) as bar,
    ):
        measured: list[TargetCalibration] = []
        for name, request in wanted.items():
            bar.set_postfix_str(name)
            measured.append(TargetCalibration(name, request, families, batch_size))
            bar.update()
        bar.set_postfix_str("this machine")
        process = _resident()
        costs, crowded = machine_costs(cores)
        bar.update()
    for name, each in zip(wanted, measured, strict=True):
        surveys[name] = each.survey
        costs |= {(operation, name): cost for operation, cost in each.costs.items()}
        growth |= {(operation, name): grown for operation, grown in each.growth.items()}
        scene[name] = each.scene
        notes += each.notes
    return Calibration(costs, surveys, batch_size, crowded, process, growth, scene, tuple(notes))


def _together(modules: Iterable[Trained]) -> Trained:
    listed = list(modules)
    return Trained(
        sum(each.numbers for each in listed),
        sum(each.activations for each in listed),
        sum(each.gflops for each in listed),
    )


def _step_seconds(made: Mapping[str, Inverse]) -> list[float]:
    """Of every step but the first."""
    history = next(iter(made.values())).history
    seconds = history.loc[history["split"] == "train", "seconds"].drop_duplicates().diff().dropna()
    return seconds.tolist()
