"""What a preset would take before it is run: time, memory and disk, from counted work and a short calibration.

    preset ──► run graph ──► work of every run (passes, steps, decodes, regressions, …)      counted here
                                   × seconds of a unit on this machine                        calibration.py
                                   ──► hours of every run ──► list scheduling on the cores ──► makespan

The counts follow the notebooks' loops from their parameters; what a loop does beside them (tables, figures) is an
allowance, and its share is shown. Every time is a range.
"""

from __future__ import annotations

import heapq
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pandas as pd

from backsight.app.calibration import Calibration, Operation, Survey, Wanted, calibrate
from backsight.app.parameters import preset_path, preset_values, read_notebook, read_preset
from backsight.app.runner import IMAGE_SOURCES, check_images
from backsight.errors import BacksightError
from backsight.inverses.families import SOLVED
from backsight.inverses.layouts import MAXIMUM_INPUTS, PIXELS, Pair
from backsight.project import available_cores, project_root, results_root
from backsight.studies.recolour import colour_perturbations
from backsight.targets import check_target
from backsight.training.fit import MOMENT_IMAGES, START_CONTEXT

Work = dict[Operation, float]

MACHINE = ""  # the target of operations that are of no target
RIDGE_IMAGES, VALIDATION_IMAGES = 1024, 128  # the defaults of fit_direct and fit_modular
VALIDATIONS = 11  # of a training: before the first step, and at every tenth
TRADEOFF_READERS = 3  # linear inverses fitted anew, trained along, and of the start
MAP_STEPS = 14  # of a MAP search: two of each of seven stages, about
HALF_STEP_SECONDS, CHAIN_SECONDS = 2.0, 1.5  # of one image: a half-step alone, a step of a whole chain
NULL_SHIFTS = 8  # colour_study.NULL_SHIFTS
GRADIENT = 3  # a pass with its gradient, in passes without
FACTOR_INPUTS = 704  # of a probe of the factor table, about (factors.Summary)
# Of what is not counted: seconds of 07_figures and of 09_your_model (their own headings), figures of each notebook,
# bytes of a run's executed notebook, tables and pictures (results/reference).
OTHER_SECONDS: Mapping[str, float] = {"07_figures": 60, "09_your_model": 120}
FIGURES: Mapping[str, int] = {
    "00_quickstart": 2,
    "01_targets": 7,
    "02_train_inverse": 3,
    "03_quality": 14,
    "04_cross_layer": 8,
    "05_colour": 8,
    "06_modular_vs_direct": 8,
    "07_figures": 0,
    "08_explorer": 1,
    "10_tradeoff": 6,
    "11_exact": 20,
}
OUTPUT_BYTES = 4 * 2**20
KEPT_SAMPLE = 256 * 2**20  # of validation images that a linear fit keeps for its intervals (linear.SAMPLE_BYTES)
KEPT_ACTIVATIONS = 8  # tensors that the gradient of half a block keeps, each as large as its tap, about
WEIGHT_BYTES = 4 * (1 + 1 + 2 + 1)  # of a trained number: itself, its gradient, the optimiser's, the best so far


@dataclass(frozen=True)
class Job:
    """One run of the graph. name: its folder; kind: "once", "train", "quality", a study's name or "last"; needs: the
    jobs before it; values: the parameters of its notebook; family: of a training."""

    name: str
    kind: str
    notebook: str
    target: str
    needs: tuple[str, ...]
    values: Mapping[str, Any]
    family: str = ""


@dataclass(frozen=True)
class PresetPlan:
    """runs: a row a job (run, kind, notebook, target, needs, counted, seconds, low, high, share, memory, disk; bytes,
    share: of the seconds that is counted); makespan: (low, middle, high) seconds on `cores`; memory: bytes of as many
    jobs at once; disk: bytes of results and cached scenes; features: bytes of a feature store, where one is used."""

    name: str
    cores: int
    runs: pd.DataFrame
    makespan: tuple[float, float, float]
    memory: int
    disk: int
    features: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def work(self) -> tuple[float, float, float]:
        """(low, middle, high) seconds of all runs, one after the other."""
        low, middle, high = (float(self.runs[column].sum()) for column in ("low", "seconds", "high"))
        return low, middle, high

    def table(self) -> pd.DataFrame:
        """A row for each kind of run and target, as people read it."""
        rows = []
        for (kind, target), group in self.runs.groupby(["kind", "target"], sort=False):
            low, middle, high = (float(group[column].sum()) for column in ("low", "seconds", "high"))
            first = group.iloc[int(group["seconds"].to_numpy().argmax())]
            rows.append(
                {
                    "runs": kind,
                    "target": target or "-",
                    "jobs": len(group),
                    "each": in_words(middle / len(group)),
                    "all": in_words(middle),
                    "range": f"{in_words(low)} - {in_words(high)}",
                    "counted": f"{(group['share'] * group['seconds']).sum() / max(middle, 1e-9):.0%}",
                    "memory": _size(int(group["memory"].max())),
                    "disk": _size(int(group["disk"].sum())),
                    "mostly": first["counted"],
                }
            )
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        lines = [self.table().to_string(index=False, justify="left"), ""]
        for said, (low, middle, high) in (
            ("all runs, one after the other", self.work),
            (f"on {self.cores} cores at once", self.makespan),
        ):
            lines.append(f"{said}: {in_words(middle)} ({in_words(low)} to {in_words(high)})")
        lines.append(f"memory: {_size(self.memory)} with {self.cores} jobs at once; disk: {_size(self.disk)}")
        lines.append(f"a feature store of the training images would take {_size(self.features)} more")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"WARNING: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def plan_preset(
    preset: str, cores: int | None = None, progress: bool = True, calibration: Calibration | None = None
) -> PresetPlan:
    """What the run graph of a preset would take on this machine.

    preset: a name in notebooks/presets or a YAML file; cores: that run jobs at once, default all of this machine;
    calibration: costs that are known already (default: measured now, about ten seconds a target).
    Raises BacksightError on an unknown preset, target or tap, and on a preset without a graph.
    """
    cores = cores or available_cores()
    if cores < 1:
        raise BacksightError(f"A plan needs at least one core, not {cores}.")
    jobs = run_graph(preset)
    known = calibration or calibrate(*_request(jobs), cores=cores, progress=progress)
    made: set[tuple[Any, ...]] = set()
    rows = [_row(job, jobs, known, made, cores) for job in jobs]
    runs = pd.DataFrame(rows)
    spans = tuple(makespan(runs, cores, column) for column in ("low", "seconds", "high"))
    memory = int(runs["memory"].nlargest(cores).sum())
    disk = int(runs["disk"].sum())
    features = sum(_features(job, known) for job in _first_of_sources(jobs))
    notes = [*known.notes, *_missing(jobs)]
    if _has_gpu():
        notes.append("jobs that run at once share the GPU: with several cores the makespan is too short.")
    return PresetPlan(
        preset_path(preset).stem,
        cores,
        runs,
        (spans[0], spans[1], spans[2]),
        memory,
        disk,
        features,
        tuple(notes),
        tuple(_warnings(memory, disk)),
    )


# ------------------------------------------------------------------------------------------------------------ the graph


def folder_name(name: str) -> str:
    """A target's or a data set's name as part of a run's name, as in the Snakefile."""
    return str(name).strip("/").replace("/", "-")


def run_graph(preset: str) -> list[Job]:
    """The jobs that the Snakefile makes of a preset, each after those that it needs."""
    sections = read_preset(preset)
    graph = sections.get("graph") or {}
    if missing := [key for key in ("targets", "families", "seeds", "once") if key not in graph]:
        raise BacksightError(
            f"The preset {preset} has no {missing[0]} in its section `graph`: there is nothing to run."
        )
    seeds, families = graph["seeds"], graph["families"]
    if solved := [family for family in families if family in SOLVED]:
        raise BacksightError(
            f"The graph of {preset} trains {solved[0]!r}, which is solved for every image and never trained: leave it "
            "out of `families`, and judge it with 11_exact among the studies."
        )

    @cache
    def parameters(notebook: str) -> Mapping[str, Any]:
        opened = read_notebook(project_root() / "notebooks" / f"{notebook}.ipynb")
        defaults = {parameter.name: parameter.default for parameter in opened.parameters.values()}
        return defaults | preset_values(opened, preset)

    def job(name: str, kind: str, notebook: str, needs: Sequence[str], family: str = "", **said: Any) -> Job:
        return Job(name, kind, notebook, said.get("target", ""), tuple(needs), {**parameters(notebook), **said}, family)

    once = [job(notebook.partition("_")[2], "once", notebook, ()) for notebook in graph["once"]]
    jobs, judged = list(once), []
    for target, entry in graph["targets"].items():
        name, common = folder_name(target), {"target": target}
        trained = []
        for weights, of_families, of_seeds in (
            ("", families, seeds),
            ("-untrained", [family for family in families if family != "linear"], graph.get("untrained", [])),
        ):
            trained += [
                job(
                    f"train-{name}{weights}-{family}-seed{seed}",
                    f"train {family}",
                    "02_train_inverse",
                    (),
                    family,
                    images=entry["train"],
                    families=[family],
                    pretrained=not weights,
                    seed=seed,
                    **common,
                )
                for family in of_families
                for seed in of_seeds
            ]
        needs = [each.name for each in trained]
        common |= {"trained_on": entry["train"], "inverses": "results", "seeds": seeds}
        for source in entry["quality"]:
            run = f"quality-{name}-{folder_name(source)}"
            judged.append(job(run, "quality", "03_quality", needs, images=source, **common))
        for notebook in entry.get("studies", []):
            study = notebook.partition("_")[2].replace("_", "-")
            judged.append(job(f"{study}-{name}", study, notebook, needs, images=entry["quality"][0], **common))
        jobs += trained
    before = [each.name for each in (*once, *judged)]
    last = [job(notebook.partition("_")[2], "last", notebook, before) for notebook in graph.get("last", [])]
    return [*jobs, *judged, *last]


def _request(jobs: Sequence[Job]) -> tuple[dict[str, Wanted], list[str], int]:
    """What has to be calibrated for these jobs: targets, families, and the batch size of the trainings."""
    trainings = [job for job in jobs if job.family]
    wanted: dict[str, Wanted] = {}
    for job in trainings:
        taps = job.values["taps"]
        own = [each.values for each in jobs if each.target == job.target]
        sources = {values["images"] for values in own}
        if any(values.get("inverse_rule") == "both" for values in own):
            sources.add("scenes")  # whose hues tell nothing
        wanted[job.target] = Wanted(taps if isinstance(taps, str) else tuple(taps), tuple(sorted(sources)))
    for job in jobs:
        for name in job.values.get("targets", []):  # of 00_quickstart and 01_targets, which show and judge scenes
            known = wanted.get(name, Wanted(inverted=False))
            wanted[name] = replace(known, sources=tuple({*known.sources, "scenes"}))
    families = list(dict.fromkeys(job.family for job in trainings))
    return wanted, families, max((job.values["batch_size"] for job in trainings), default=16)


def makespan(runs: pd.DataFrame, cores: int, column: str = "seconds") -> float:
    """Seconds from the first to the last job on so many cores: whatever is ready starts, the longest first.

    runs: with the columns run, needs and `column`. More cores can make such a list longer; as many are used as help.
    """
    return min(_list_schedule(runs, used, column) for used in range(1, min(cores, max(1, len(runs))) + 1))


def _list_schedule(runs: pd.DataFrame, cores: int, column: str) -> float:
    seconds = dict(zip(runs["run"], runs[column].astype(float), strict=True))
    waiting = {run: set(needs) & set(seconds) for run, needs in zip(runs["run"], runs["needs"], strict=True)}
    running: list[tuple[float, str]] = []
    now = 0.0
    while waiting or running:
        ready = sorted((run for run, needs in waiting.items() if not needs), key=lambda run: -seconds[run])
        for run in ready[: cores - len(running)]:
            heapq.heappush(running, (now + seconds[run], run))
            del waiting[run]
        now, done = heapq.heappop(running)
        for needs in waiting.values():
            needs.discard(done)
    return now


# ------------------------------------------------------------------------------------------------------- counted work


@dataclass
class Count:
    """The work of one job, as it is added up. of: its target's survey, None for jobs of no single target."""

    job: Job
    of: Survey | None
    batch_size: int
    work: Work = field(default_factory=dict)
    sources: set[tuple[Any, ...]] = field(default_factory=set)

    def __getitem__(self, name: str) -> Any:
        return self.job.values[name]

    @property
    def survey(self) -> Survey:
        assert self.of is not None
        return self.of

    @property
    def taps(self) -> tuple[str, ...]:
        return self.survey.chosen(self["taps"])

    def add(self, operation: str, number: float, target: str | None = None) -> None:
        name = self.job.target if target is None else target
        self.work[operation, name] = self.work.get((operation, name), 0.0) + number

    def read(
        self, source: str, split: str, count: int, seed: int = 0, rule: str = "", opened: int | None = None
    ) -> None:
        """`count` images read of a source that is opened with `opened` of them (default: as many)."""
        if source == "scenes":
            self.sources.add((split, opened or count, seed, max(self.survey.image_size), rule))
        self.add("read scene" if source in IMAGE_SOURCES else "read photograph", count)

    def linear(
        self, images: float, pairs: Sequence[Pair], context: int = 1, maximum_inputs: int = MAXIMUM_INPUTS
    ) -> None:
        """One fit of linear maps in one pass over the images; a fifth or so of them is scored."""
        self.add("forward", images)
        self.regress(images, pairs, context, maximum_inputs)

    def regress(
        self, images: float, pairs: Sequence[Pair], context: int = 1, maximum_inputs: int = MAXIMUM_INPUTS
    ) -> None:
        """The linear maps of pairs, in a pass that is counted elsewhere."""
        regressions = self.survey.regressions(pairs, context, maximum_inputs)
        self.add("moments", images * sum(each.moments for each in regressions), MACHINE)
        self.add("solution", sum(each.solution for each in regressions), MACHINE)
        self.add("linear decode", 0.4 * images * len(pairs) / len(self.survey.taps))
        self.add("interval", 2 * len(pairs), MACHINE)

    def steps(self, family: str, number: float, batch_size: int, share: float = 1.0) -> None:
        """Training steps; share: of the taps that the measured steps train. A larger batch than the measured one adds
        passes and gradients; the optimiser's part stays."""
        self.add(f"{family.partition('_')[0]} step", number * share)
        if (more := number * (batch_size - self.batch_size)) > 0:
            self.add("forward", more)
            self.modules(family, GRADIENT * more, share)

    def modules(self, family: str, images: float, share: float = 1.0) -> None:
        """Every module once for each image: a chain decodes through most of its modules from many taps."""
        often = 1.0 if family == "direct" else (len(self.survey.taps) + 1) / 2
        self.add(f"{family.partition('_')[0]} decode", images * share / often)

    def validate(self, family: str, times: float, images: int, share: float = 1.0) -> None:
        """The validations of so many trainings."""
        self.add("forward", times * images)  # then they are kept
        self.modules(family, VALIDATIONS * times * images, share)

    def decode(self, family: str, images: float, taps: float | None = None) -> None:
        """Reconstructions of so many images from each of `taps` taps."""
        share = (len(self.taps) if taps is None else taps) / len(self.survey.taps)
        self.add(f"{family.partition('_')[0]} decode", images * share)

    def train(self, family: str, images: int, steps: int, batch_size: int, validation: int, seed: int) -> None:
        """fit_direct, fit_modular or fit_polish: closed-form starts, then steps, with their validations."""
        direct = family == "direct"
        pairs = [(tap, PIXELS) for tap in self.survey.taps] if direct else list(self.survey.stages)
        source, sample = self["images"], min(RIDGE_IMAGES, images)
        held_out = min(VALIDATION_IMAGES, validation)
        self.read(source, "train", sample + steps * batch_size, seed, opened=images)
        self.read(source, "validation", held_out, seed, opened=validation)
        self.add("forward", min(MOMENT_IMAGES, images))
        if family == "modular_polished":
            self.train("modular", images, steps, batch_size, validation, seed)
        else:
            self.linear(sample + held_out, pairs, START_CONTEXT)
            if ends := [] if direct else [(end, PIXELS) for end in dict.fromkeys(e for _, e in pairs) if end != PIXELS]:
                self.regress(sample + held_out, ends)  # in the same pass
        self.steps(family, steps, batch_size)
        self.validate(family, 1, held_out)


def _train(count: Count, families: Mapping[str, int]) -> None:
    values = count.job.values
    family, images, seed = count.job.family, values["train_images"], values["seed"]
    count.add("load", 1)
    if family == "linear":
        count.read(values["images"], "train", images, seed)
        count.read(values["images"], "validation", values["validation_images"], seed)
        pairs = [(tap, PIXELS) for tap in count.survey.taps]
        count.linear(images + values["validation_images"], pairs)
    else:
        steps, batch_size = values["steps"], values["batch_size"]
        count.train(family, images, steps, batch_size, values["validation_images"], seed)
    judged = values["test_images"]
    count.read(values["images"], "test", judged, seed)
    count.read(values["images"], "train", min(images, 2000), seed, opened=images)  # their mean image
    count.add("forward", judged)
    count.decode(family, 2 * judged)
    count.add("score", 3 * judged * len(count.taps))
    count.add("interval", 3 * len(count.taps) * 5, MACHINE)


def _quality(count: Count, families: Mapping[str, int]) -> None:
    """families: {family: of how many seeds it has an untrained null}."""
    values, taps = count.job.values, len(count.taps)
    images, judged, source = values["n"], min(values["measured"], values["n"]), values["images"]
    seeds, nulls = len(values["seeds"]), min(values["null_seeds"], len(values["seeds"]))
    null_images, many = values["null_images"], len(families)
    count.add("load", 1 + nulls)
    count.read(source, "test", images + values["candidates"])
    count.read(values["trained_on"], "train", null_images, values["seed"])
    for seed in values["seeds"][:nulls]:
        count.read(values["trained_on"], "train", null_images, seed)
        count.linear(null_images, [(tap, PIXELS) for tap in count.taps])
    count.add("forward", images * (1 + nulls))
    made = 1 + many * (seeds + nulls) + sum(nulls if f == "linear" else min(nulls, n) for f, n in families.items())
    for family, untrained in families.items():
        count.decode(family, images * (seeds + nulls + (nulls if family == "linear" else min(nulls, untrained))))
    count.add("score", images * taps * made)
    detailed = 1 + many * (seeds + 2)
    count.add("detail", judged * taps * detailed)
    count.add("forward", judged * taps * detailed)  # each reconstruction goes through the target once (cycle.py)
    main = next((family for family in ("modular", "direct") if family in families), "linear")
    for family in dict.fromkeys(("linear", main)):
        count.decode(family, seeds * values["noise_images"] * len(values["noises"]))
    count.add("interval", taps * (1 + 3 * many) * (14 + taps) + 64 * taps, MACHINE)
    if count.survey.kind == "detector":  # average precisions of resampled images, in python
        count.add("seconds", 0.02 * images * detailed * taps / 10, MACHINE)
    if source == "scenes":
        count.add("render", values["probe_images"] + judged)
        if held := values["factor_images"]:
            train = values["factor_train"]
            for split, number in (("validation", held), ("test", held), ("train", held)):
                count.read("scenes", split, number, values["seed"])
            for seed in values["seeds"]:
                count.read("scenes", "train", train, seed)
            count.add("forward", 3 * held + seeds * (2 * train + 3 * held))
            gflops = 1e-9 * (13 * FACTOR_INPUTS**3 + 4 * train * FACTOR_INPUTS**2)
            count.add("solution", seeds * (2 * taps + 1) * 2 * gflops, MACHINE)
            count.add("interval", 5 * 4 * taps, MACHINE)


def _cross_layer(count: Count, families: Mapping[str, int]) -> None:
    values, survey, taps = count.job.values, count.survey, count.taps
    images, seeds, nulls = values["n"], values["seeds"], len(values["null_seeds"])
    trained_on, train, paired = values["trained_on"], values["train_images"], values["pair_images"]
    same = Counter(survey.forms[tap] for tap in taps)
    crossed = sum(number**2 for number in same.values())  # pairs of one form, the diagonal among them
    half = [tap for tap in survey.tap_sets.get("fine", ()) if survey.forms[tap].kind == "tokens"]
    half = half if len(half) > len(taps) else []
    count.add("load", 1 + nulls)
    count.read(values["images"], "test", images)
    for seed in seeds:
        count.read(trained_on, "train", train + paired, seed, opened=train)
        if half:
            count.linear(train, [(tap, PIXELS) for tap in half])
    for _ in range(nulls):
        count.linear(train, [(tap, PIXELS) for tap in taps])
    tokens = [tap for tap in taps if survey.forms[tap].kind == "tokens"]
    sets = [tap for tap in taps if survey.forms[tap].kind == "queries"]
    pairs = [(i, j) for group in (tokens, sets) for i in group for j in group if i != j]
    for _ in range(len(seeds) + 1):
        count.linear(paired, pairs)
    count.add("forward", images * (10 + 2 * nulls) + paired)
    reference = "linear" if "linear" in values["families"] else values["families"][0]
    for family in values["families"]:
        if family in families:
            judged = images if family == reference else min(images, values["trained_images"])
            count.decode(family, judged * len(seeds), crossed)
    count.decode(reference, images * (2 * len(seeds) + nulls), crossed)
    count.decode(reference, images * len(seeds), 2 * len(half))
    count.add("score", 0.3 * images * crossed * (3 * len(seeds) + nulls))  # PSNR alone
    count.decode("linear", 3 * images * (2 * len(seeds) + 1), len(pairs))  # errors of the maps between taps
    channels = max((survey.forms[tap].channels for tap in taps), default=1)
    rotations = 3 * (len(pairs) / 2 + len(half))
    count.add("solution", 1e-9 * rotations * 12 * channels**3, MACHINE)  # Procrustes
    count.add("interval", 2 * (crossed * (len(values["families"]) + 4) + 3 * len(pairs)), MACHINE)


def _colour(count: Count, families: Mapping[str, int]) -> None:
    values, taps = count.job.values, len(count.taps)
    images, seeds, fit = values["n"], len(values["seeds"]), values["fit_images"]
    nulls = min(values["null_seeds"], seeds)
    shown = len(colour_perturbations(values["shifts"]))
    chosen = {family: n for family, n in families.items() if family in values["families"]}
    uniform = nulls if values.get("inverse_rule", "both") == "both" else 0
    count.add("load", 1 + nulls)
    count.read(values["images"], "test", 4 * images)  # of which those with an object large enough are kept
    count.read(values["trained_on"], "train", fit, values["seed"])
    for seed in values["seeds"][:nulls]:
        count.read(values["trained_on"], "train", fit, seed)
        count.linear(fit, [(tap, PIXELS) for tap in count.taps])
        if uniform:
            count.read("scenes", "train", fit, seed, "uniform")
            count.linear(fit, [(tap, PIXELS) for tap in count.taps])
    sparse = min(NULL_SHIFTS, values["shifts"])
    count.add("forward", images * (shown + sparse * (1 + nulls)))
    for family, untrained in chosen.items():
        more = nulls if family == "linear" else min(nulls, untrained)
        count.decode(family, images * (seeds * (shown + sparse) + sparse * more))
    count.decode("linear", images * shown * uniform)
    made = images * taps * seeds * shown * (len(chosen) + bool(uniform))
    count.add("score", 0.5 * made)
    count.add("interval", taps * (len(chosen) + bool(uniform)) * shown * 8, MACHINE)
    count.add("interval", 10 * shown, MACHINE)
    if steps := values["sanity_steps"]:  # two small ViTs are trained, and judged as the target is
        count.add("render", 64 * steps / 4)
        count.add("forward", 2 * GRADIENT * 64 * steps)
        for _ in range(2 * seeds):
            count.linear(fit, [(tap, PIXELS) for tap in count.taps])
        count.decode("linear", 4 * images * values["shifts"] * seeds)


def _modular_vs_direct(count: Count, families: Mapping[str, int]) -> None:
    values, survey = count.job.values, count.survey
    seeds, batch_size, images = len(values["seeds"]), values["batch_size"], values["train_images"]
    chain = list(survey.chosen(values["taps"]))
    judged = max(3, len(survey.chosen(values["judged"])))
    few = judged / len(survey.taps)
    starts = [(tap, PIXELS) for tap in chain] * 2 + list(survey.stages)
    count.add("load", 1 + seeds)
    for seed in values["seeds"]:
        count.read(values["trained_on"], "train", 2 * images, seed, opened=images)
    count.read(values["images"], "validation", values["validation_images"])
    count.read(values["images"], "test", values["n"])
    for size in [images, *(size for size in values["sizes"] if size < images)] * seeds:
        count.linear(size, list(dict.fromkeys(starts)))
    # A direct family has a decoder a tap; modules of any number of taps go through the whole model once.
    methods = (("direct", few, judged), ("modular", 1.0, len(chain)), ("modular", 1.0, judged))

    def trainings(number: float, steps: float, polish: float = 0) -> None:
        for family, share, taps in methods:
            count.steps(family, number * steps, batch_size, share)
            count.validate(family, number, values["validation_images"], share)
            count.decode(family, number * values["n"], taps)
        ends = [(end, PIXELS) for end in dict.fromkeys(end for _, end in survey.stages) if end != PIXELS]
        for _ in range(round(number)):
            count.linear(256, ends)  # how much of a picture an error is, before every modular training
        count.steps("modular", number * polish, batch_size)

    rates = len(values["rates"])
    again = len(values["closed_form_rates"])
    trainings(rates + again, values["search_steps"], values["search_steps"])
    for length in values["steps"]:
        trainings(seeds, length, values["polish_steps"])
    longest = max(values["steps"])
    trainings(seeds * (sum(size < images for size in values["sizes"]) + bool(values["from_random"])), longest)
    trainings(7, 1)  # FLOPs are counted in the code itself
    count.add("forward", 2 * GRADIENT * 2 * values["optimised_images"] * values["optimised_steps"])
    count.add("interval", 200 * seeds, MACHINE)
    for _ in range(seeds):
        count.linear(256, [(tap, PIXELS) for tap in chain])  # of random weights


def _tradeoff(count: Count, families: Mapping[str, int]) -> None:
    values, taps = count.job.values, len(count.taps)
    images, seeds, ts = values["n"], values["seeds"], len(values["ts"])
    train, fit = values["train_images"], values["fit_images"]
    trained = [family for family in families if family != "linear"]
    pairs = [(tap, PIXELS) for tap in count.taps]
    scenes = values["trained_on"] == "scenes"
    count.add("load", 1 + len(seeds))
    for _ in seeds:
        count.add("render" if scenes else "read photograph", train + fit)
        for _ in range(ts + 2):
            count.linear(fit, pairs, 1, values["set_inputs"])
        count.add("forward", min(256, train) + GRADIENT * ts * values["steps"] * values["batch_size"])
        count.decode("linear", GRADIENT * ts * values["steps"] * values["batch_size"] + 256)
        for readers in [1, 1, *[TRADEOFF_READERS] * ts]:
            count.add("forward", images * 3 + fit + images)
            count.decode("linear", images * (readers + 2))
            count.add("score", images * taps * (readers + 2))
        for family in trained:
            count.decode(family, images * (1 + ts))
            count.add("score", images * taps * (1 + ts))
    count.add("render" if scenes else "read photograph", 2 * images)
    count.add("interval", (3 + len(trained)) * (ts + 2) * taps * 9, MACHINE)
    if count.survey.kind == "detector":
        count.add("seconds", 0.02 * images * len(seeds) * (ts + 2), MACHINE)


def _exact(count: Count, families: Mapping[str, int]) -> None:
    values = count.job.values
    held, fit, half = values["calibration_images"], values["fit_images"], values["half_step_images"]
    jobs, few = len(values["taps"]) * len(values["noises"]), len(values["taps"])
    count.add("load", 2 + len(values["untrained_seeds"]))
    count.read(values["trained_on"], "train", fit, values["seed"])
    count.read(values["trained_on"], "validation", held, values["seed"])
    noise_images, asked = values["noise_images"], values["question_images"]
    count.read(values["images"], "test", max(noise_images, asked, values["chain_images"]))
    # A pair of products is some four passes; MAP_STEPS of them a search, for images and for those that fit its gain.
    solved = (jobs * (noise_images + 8) + 3 * few * (asked + 8)) * values["products"]
    solved += len(values["whole_taps"]) * values["whole_images"] * values["whole_products"]
    count.add("forward", 4 * MAP_STEPS * solved)
    for family in families:
        count.decode(family, jobs * (noise_images + held) + few * (asked + held), few)
    # What the solvers of half-steps and whole chains take is an allowance, of shipped sizes.
    count.add(
        "seconds",
        HALF_STEP_SECONDS * (12 * half * (1 + len(values["untrained_seeds"])) + values["chain_images"]),
        MACHINE,
    )
    count.add(
        "seconds", CHAIN_SECONDS * len(values["whole_taps"]) * values["whole_images"] * values["iterations"], MACHINE
    )
    count.add("seconds", 30 * (len(values["root_steps"]) or 6) * values["root_images"], MACHINE)
    count.add("interval", 40 * jobs, MACHINE)


def _quickstart(count: Count, families: Mapping[str, int]) -> None:
    for name in count["targets"]:
        count.add("load", 1, name)
        count.add("forward", 1, name)
        count.add("seconds", 3, MACHINE)  # inverses are loaded, and one picture is made at every tap


def _targets(count: Count, families: Mapping[str, int]) -> None:
    for name in count["targets"]:
        count.add("load", 1, name)
        for operation in ("forward", "render"):
            count.add(operation, 2 * count["evaluate"], name)
        count.add("seconds", 0.003 * count["evaluate"], MACHINE)  # average precisions, intervals


def _explorer(count: Count, families: Mapping[str, int]) -> None:
    for name in count["targets"]:
        count.add("load", 1, name)
        count.add("forward", 8 * count["scenes"], name)  # eight hues of each (explorer.seeing.HUES)
        count.add("seconds", 0.03 * 8 * count["scenes"], MACHINE)  # they come back from every tap, by two families


COUNTS: Mapping[str, Callable[[Count, Mapping[str, int]], None]] = {
    "00_quickstart": _quickstart,
    "01_targets": _targets,
    "02_train_inverse": _train,
    "03_quality": _quality,
    "04_cross_layer": _cross_layer,
    "05_colour": _colour,
    "06_modular_vs_direct": _modular_vs_direct,
    "08_explorer": _explorer,
    "10_tradeoff": _tradeoff,
    "11_exact": _exact,
}


def count_work(job: Job, jobs: Sequence[Job], calibration: Calibration, made: set[tuple[Any, ...]]) -> Work:
    """How often a job does what, with the scenes it is the first to render (added to `made`)."""
    count = Count(job, calibration.surveys.get(job.target), calibration.batch_size)
    own = [each for each in jobs if each.family and each.target == job.target]
    families = {
        family: sum(each.family == family and not each.values["pretrained"] for each in own)
        for family in dict.fromkeys(each.family for each in own)
    }
    if job.notebook in COUNTS:
        COUNTS[job.notebook](count, families)
    count.add("start", 1, MACHINE)
    count.add("figure", FIGURES.get(job.notebook, 3), MACHINE)
    count.add("seconds", OTHER_SECONDS.get(job.notebook, 0 if job.notebook in COUNTS else 60), MACHINE)
    for source in count.sources - made:
        count.add("render", source[1])
    made |= count.sources
    return count.work


def _row(job: Job, jobs: Sequence[Job], known: Calibration, made: set[tuple[Any, ...]], cores: int) -> dict[str, Any]:
    before = set(made)
    work = count_work(job, jobs, known, made)
    spent = {operation: number * known.costs[operation].seconds for operation, number in work.items() if number}
    total = sum(spent.values())
    allowed = sum(seconds for operation, seconds in spent.items() if known.costs[operation].how == "allowance")
    crowd = known.crowding if cores > 1 else 1.0
    rendered = sum(source[1] for source in made - before)
    return {
        "run": job.name,
        "kind": job.kind,
        "notebook": job.notebook,
        "target": job.target,
        "needs": job.needs,
        "counted": _mostly(work, spent),
        "seconds": total,
        "low": sum(number * known.costs[operation].low for operation, number in work.items()),
        "high": crowd * sum(number * known.costs[operation].high for operation, number in work.items()),
        "share": 1 - allowed / total if total else 1.0,
        "memory": _memory(job, known),
        "disk": OUTPUT_BYTES + _inverse_bytes(job, known) + rendered * known.scene.get(job.target, 0),
    }


def _mostly(work: Work, spent: Mapping[Operation, float]) -> str:
    """The operations that take most of the time, with their numbers."""
    units = {"moments": "GFLOP of moments", "solution": "GFLOP of solutions", "seconds": "s allowed"}
    first = sorted(spent, key=lambda operation: -spent[operation])[:3]
    return ", ".join(f"{_rounded(work[operation])} {units.get(operation[0], operation[0])}" for operation in first)


# ----------------------------------------------------------------------------------------------------- memory and disk


def _inverse_bytes(job: Job, known: Calibration) -> int:
    """Of the files of a training's inverses, float32: trained numbers, and closed-form maps."""
    if not job.family:
        return 0
    survey = known.surveys[job.target]
    stages = job.family.startswith("modular")
    pairs = list(survey.stages) if stages else [(tap, PIXELS) for tap in survey.taps]
    linear = sum(each.numbers for each in survey.regressions(pairs, 1 if job.family == "linear" else START_CONTEXT))
    trained = survey.trained.get(job.family.partition("_")[0])
    return 4 * (linear + (trained.numbers if trained and job.family != "linear" else 0))


def _memory(job: Job, known: Calibration) -> int:
    """Bytes at the peak: runner and kernel, the target, and the largest of fit, training step and recording."""
    base = 2 * known.process
    if job.target not in known.surveys:
        return base
    survey = known.surveys[job.target]
    taps = survey.chosen(job.values["taps"])
    phases = [50 * 4 * survey.values(taps)]  # representations of a batch
    if job.family in ("", "linear"):
        phases.append(sum(each.bytes for each in survey.regressions([(tap, PIXELS) for tap in taps])) + KEPT_SAMPLE)
    else:
        direct = job.family == "direct"
        pairs = [(tap, PIXELS) for tap in survey.taps] if direct else list(survey.stages)
        phases.append(sum(each.bytes for each in survey.regressions(pairs, START_CONTEXT)) + KEPT_SAMPLE)
        family = job.family.partition("_")[0]
        trained = survey.trained[family]
        step = trained.numbers * WEIGHT_BYTES + trained.activations * job.values["batch_size"]
        phases.append(max(step, known.growth.get((f"{family} step", job.target), 0)))
        phases.append(MOMENT_IMAGES * 4 * survey.values(survey.taps))
    if job.notebook == "06_modular_vs_direct":
        steps = [
            each.numbers * WEIGHT_BYTES + each.activations * job.values["batch_size"]
            for each in survey.trained.values()
        ]
        phases += steps
    if job.notebook == "10_tradeoff":  # every weight of the target is trained
        activations = KEPT_ACTIVATIONS * 4 * survey.values(survey.tap_sets.get("fine", taps))
        phases.append(survey.parameters * WEIGHT_BYTES + activations * job.values["batch_size"])
    copies = 1 if job.family else 3  # a study holds untrained and tuned copies
    return base + copies * 4 * survey.parameters + max(phases)


def _first_of_sources(jobs: Sequence[Job]) -> list[Job]:
    """One training for each target, its weights and its images: those share a feature store."""
    found: dict[tuple[Any, ...], Job] = {}
    for job in jobs:
        if job.family:
            found.setdefault((job.target, job.values["seed"], job.values["pretrained"]), job)
    return list(found.values())


def _features(job: Job, known: Calibration) -> int:
    """Bytes of the training images' representations in half precision."""
    survey = known.surveys[job.target]
    return 2 * survey.values(survey.taps) * int(job.values["train_images"])


def _missing(jobs: Sequence[Job]) -> list[str]:
    """A note for each target whose weights, and each data set that, are not here."""
    notes = []
    sources = [
        job.values[name] for job in jobs for name in ("images", "trained_on") if job.target and name in job.values
    ]
    names = [name for job in jobs for name in (job.target, *job.values.get("targets", [])) if name]
    checks: list[tuple[Callable[[str], None], str]] = []
    checks += [(check_images, _placed(str(source))) for source in dict.fromkeys(sources)]
    checks += [(check_target, str(name)) for name in dict.fromkeys(names)]
    for check, each in checks:
        try:
            check(each)
        except BacksightError as error:
            notes.append(f"missing here: {error}")
    return notes


def _placed(source: str) -> str:
    """A data set's folder from where the notebooks look for it, the project's folder."""
    placed = project_root() / source
    return source if source in IMAGE_SOURCES or not placed.exists() else str(placed)


def _warnings(memory: int, disk: int) -> list[str]:
    warnings = []
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory > here:
        warnings.append(f"this machine has {_size(here)} of memory, and {_size(memory)} are needed: use fewer --cores.")
    folder = results_root()
    free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free
    if disk > free:
        warnings.append(f"{_size(free)} of the disk are free, and {_size(disk)} are needed: make room first.")
    return warnings


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# ------------------------------------------------------------------------------------------------------------- in words


def in_words(seconds: float) -> str:
    """A time as people say it: "40 s", "12 min", "3.4 h", "5 days", "3 years"."""
    for unit, length in (("years", 365 * 86400), ("days", 2 * 86400), ("h", 5400), ("min", 120)):
        if seconds >= length:
            each = {"years": 365 * 86400, "days": 86400, "h": 3600, "min": 60}[unit]
            return f"{_rounded(seconds / each)} {unit}"
    return f"{_rounded(seconds)} s"


def _rounded(number: float) -> str:
    return f"{number:.1f}" if number < 10 else f"{number:,.0f}"


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
