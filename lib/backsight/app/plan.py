"""The run graph of a preset: the runs that the Snakefile builds, and the seconds that each took where it was recorded.

The recorded seconds are one committed table, notebooks/presets/seconds.csv; `backsight plan PRESET --record` replaces
the rows of the preset's finished runs by those of this machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from backsight.app.parameters import preset_path, read_preset
from backsight.app.runs import file_name
from backsight.errors import BacksightError
from backsight.project import FINISHED, project_root, read_json, results_root, write_atomically

SHIPPED_SEED = 0  # of the inverses that are shipped
Study = str | Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=1)]  # or {notebook: parameters}


class Entry(BaseModel, extra="forbid"):
    """What a graph makes of one target: images to train on and to judge on; families: in the place of the graph's."""

    train: str
    quality: Annotated[list[str], Field(min_length=1)]
    studies: list[Study] = []
    families: list[str] | None = None
    shipped: list[str] = []


class Graph(BaseModel, extra="forbid"):
    """The section `graph` of a preset."""

    once: list[str]
    targets: dict[str, Entry]
    families: list[str]
    seeds: list[NonNegativeInt]
    untrained: list[NonNegativeInt] = []
    last: list[str] = []


@dataclass(frozen=True)
class GraphRun:
    """One run. kind: the rule that makes it; parameters: those that the graph sets; needs: the runs before it."""

    kind: str
    notebook: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


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
    for target, entry in graph.targets.items():
        families = graph.families if entry.families is None else entry.families
        name, common, trained = file_name(target), {"target": target, "images": entry.train}, {}
        for suffix, seeds in (("", graph.seeds), ("-untrained", graph.untrained)):
            for seed in seeds if families else []:
                left_out = ["linear"] if suffix else entry.shipped if seed == SHIPPED_SEED else []
                own = {"families": [it for it in families if it not in left_out], "seed": seed}
                run = f"train-{name}{suffix}-seed{seed}"
                trained[run] = GraphRun("train", "02_train_inverse", common | own | {"pretrained": not suffix})
        runs |= trained
        # Without trainings the studies take the shipped inverses.
        inverses, seeds = (results, graph.seeds) if trained else ("", [SHIPPED_SEED])
        judging = {"target": target, "trained_on": entry.train, "inverses": inverses, "seeds": seeds}
        for images in entry.quality:
            run = f"quality-{name}-{file_name(images)}"
            runs[run] = GraphRun("quality", "03_quality", judging | {"images": images}, tuple(trained))
        for study in entry.studies:
            ((notebook, own),) = study.items() if isinstance(study, dict) else [(study, {})]
            run = f"{_question(notebook).replace('_', '-')}-{name}"
            runs[run] = GraphRun("study", notebook, judging | {"images": entry.quality[0]} | own, tuple(trained))
    before = tuple(name for name, run in runs.items() if run.kind != "train")
    return runs | {_question(last): GraphRun("last", last, {"results": results}, before) for last in graph.last}


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
    return f"{rows.to_string(index=False, na_rep='-')}\n\n{total}, {rows['seconds'].isna().sum()} not yet recorded"
