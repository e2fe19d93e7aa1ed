"""The run graph of a preset: the runs that the Snakefile builds, and the seconds that each took where it was recorded.

The recorded seconds are one committed table, notebooks/presets/seconds.csv; `backsight plan PRESET --record` replaces
the rows of the preset's finished runs by those of this machine.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, NonNegativeInt, ValidationError

from backsight.app.parameters import preset_path, read_preset
from backsight.app.runs import file_name
from backsight.errors import BacksightError
from backsight.project import FINISHED, project_root, read_json, results_root, write_atomically

SHIPPED_SEED = 0  # of the inverses that are shipped


class Images(BaseModel, extra="allow"):
    """Images, and further parameters of the notebook that takes them."""

    images: str


def _images(given: Any) -> Any:
    return {"images": given} if isinstance(given, str) else given


On = Annotated[Images, BeforeValidator(_images)]
Study = Annotated[  # a notebook, or {notebook: parameters}
    dict[str, dict[str, Any]],
    BeforeValidator(lambda given: {given: {}} if isinstance(given, str) else given),
    Field(min_length=1, max_length=1),
]


class Training(Images):
    """Images to train on, and what is trained there: families and seeds, in the place of the graph's."""

    families: list[str] | None = None
    seeds: list[NonNegativeInt] | None = None


class Entry(BaseModel, extra="forbid"):
    """What a graph makes of one target, on which images. further: trainings beside `train`, of other families."""

    train: Annotated[Training, BeforeValidator(_images)]
    further: list[Training] = []
    quality: Annotated[list[On], Field(min_length=1)]
    studies: list[Study] = []
    shipped: list[str] = []


class Graph(BaseModel, extra="forbid"):
    """The section `graph` of a preset. folders: of images, by the environment variable that names another one."""

    folders: dict[str, str] = {}
    once: list[str]
    targets: dict[str, Entry]
    families: list[str]
    seeds: list[NonNegativeInt]
    untrained: list[NonNegativeInt] = []
    last: list[str] = []


@dataclass(frozen=True)
class GraphRun:
    """One run. kind: the rule that makes it; parameters: those that the graph sets; needs: the runs before it; missing:
    why it cannot run here, a sentence."""

    kind: str
    notebook: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    missing: str = ""


def graph_runs(preset: str, results: str = "") -> dict[str, GraphRun]:
    """The runs of a preset by the names of their folders, each after those that it needs.

    results: the folder that will hold them all, as the notebooks read it. One training fits all families of a target
    and seed, less the shipped ones of the seed 0; one of the target with random weights all but linear ones, which are
    fitted where they are needed. Raises BacksightError on a section `graph` that is not of its form.
    """
    try:
        graph = Graph.model_validate(read_preset(preset).get("graph", {}))
    except ValidationError as error:
        place, said = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"].lower()
        raise BacksightError(f"the section `graph` of the preset {preset}: {place}: {said}.") from error
    runs = {_question(notebook): GraphRun("once", notebook) for notebook in graph.once}

    def add(run: str, kind: str, notebook: str, parameters: dict[str, Any], needs: tuple[str, ...] = ()) -> None:
        if run in runs:
            raise BacksightError(f"the section `graph` of the preset {preset} asks twice for {run}.")
        missing = {runs[name].missing for name in needs}
        for key in ("images", "trained_on"):
            variable, *joined = str(parameters.get(key)).partition("+")
            if variable in graph.folders:
                folder = os.environ.get(variable) or graph.folders[variable]
                parameters[key] = folder + "".join(joined)
                if not (project_root() / folder).is_dir():
                    missing.add(f"no folder {folder}: what needs it is left out; {variable}=FOLDER names another.")
        runs[run] = GraphRun(kind, notebook, parameters, needs, max(missing, default=""))

    def images_name(images: Any) -> str:
        return file_name(Path(graph.folders.get(images, images)).name)

    for target, entry in graph.targets.items():
        name, trained = file_name(target), tuple[str, ...]()
        ways = [("", entry.train, False), ("-untrained", entry.train, True)]
        ways += [("-" + "-".join(train.families or ["further"]), train, False) for train in entry.further]
        for suffix, train, untrained in ways:
            families = graph.families if train.families is None else train.families
            for seed in graph.untrained if untrained else graph.seeds if train.seeds is None else train.seeds:
                left_out = ["linear"] if untrained else entry.shipped if seed == SHIPPED_SEED else []
                own = {"families": [it for it in families if it not in left_out], "seed": seed}
                if not own["families"]:
                    continue
                trained += (run := f"train-{name}{suffix}-seed{seed}",)
                parameters = {"target": target} | train.model_dump(exclude={"families", "seeds"}) | own
                add(run, "train", "02_train_inverse", parameters | {"pretrained": not untrained})
        # Without trainings the studies take the shipped inverses.
        inverses, seeds = (results, graph.seeds) if trained else ("", [SHIPPED_SEED])
        judging = {"target": target, "trained_on": entry.train.images, "inverses": inverses, "seeds": seeds}
        for on in entry.quality:
            add(f"quality-{name}-{images_name(on.images)}", "quality", "03_quality", judging | on.model_dump(), trained)
        for study in entry.studies:
            ((notebook, own),) = study.items()
            run = f"{_question(notebook).replace('_', '-')}-{name}"
            if "images" in own:
                run += f"-{images_name(own['images'])}"
            add(run, "study", notebook, judging | {"images": entry.quality[0].images} | own, trained)
    before = tuple(name for name, run in runs.items() if run.kind != "train" and not run.missing)
    missing = "" if before else max((run.missing for run in runs.values()), default="")
    return runs | {
        _question(last): GraphRun("last", last, {"results": results}, before, missing) for last in graph.last
    }


def _question(notebook: str) -> str:
    """A notebook's name without its number."""
    return notebook.partition("_")[2]


def plan_preset(preset: str, record: bool = False) -> str:
    """The runs of a preset as a table, with their recorded seconds, and the sum; record: first record what is here."""
    import pandas as pd

    name, runs, place = preset_path(preset).stem, graph_runs(preset), project_root() / "notebooks/presets/seconds.csv"
    table = pd.read_csv(place).set_index(["preset", "run"])
    if record:
        for run in runs:
            if done := read_json(results_root() / name / run / FINISHED):
                cores, processor = (done["hardware"][key] for key in ("cores", "processor"))
                table.loc[(name, run), :] = [round(done["seconds"]["total"]), cores, processor]
        write_atomically(place, lambda path: table.astype({"seconds": int, "cores": int}).to_csv(path))
    seconds = [table["seconds"].get((name, run)) for run in runs]
    rows = pd.DataFrame({"run": [*runs], "notebook": [run.notebook for run in runs.values()], "seconds": seconds})
    total = f"{len(runs)} runs, {rows['seconds'].sum() / 60:.0f} minutes one after the other"
    total += f", {rows['seconds'].isna().sum()} not yet recorded"
    return "\n".join([rows.to_string(index=False, na_rep="-"), "", total, *missing_folders(runs)])


def missing_folders(runs: Mapping[str, GraphRun]) -> list[str]:
    """Why some of these runs cannot be made here, a sentence a folder."""
    return sorted({run.missing for run in runs.values()} - {""})
