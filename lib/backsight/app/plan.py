"""The run graph of a preset: its runs, which the Snakefile builds, and how long each took when it was last run here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from backsight.app.parameters import preset_path, read_preset
from backsight.app.runs import file_name
from backsight.errors import BacksightError
from backsight.project import FINISHED, read_json, results_root


@dataclass(frozen=True)
class GraphRun:
    """One run. kind: the rule that makes it; parameters: those that the graph sets; needs: the runs before it."""

    kind: str
    notebook: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


def graph_runs(preset: str, results: str = "") -> dict[str, GraphRun]:
    """The runs of a preset by the names of their folders, each after those that it needs.

    results: the folder that will hold them all, as the notebooks read it. Linear inverses of untrained targets are
    fitted where they are needed; other families get runs of their own. Raises BacksightError on a section `graph` that
    is not of its form.
    """
    graph = read_preset(preset).get("graph", {})
    try:
        seeds, families, untrained = graph["seeds"], graph["families"], graph.get("untrained", [])
        runs = {_question(notebook): GraphRun("once", notebook) for notebook in graph["once"]}
        for target, entry in graph["targets"].items():
            name, training = file_name(target), {"target": target, "images": entry["train"]}
            trained = {}
            for family in families:
                for suffix, numbers in (("", seeds), ("-untrained", untrained if family != "linear" else [])):
                    for seed in numbers:
                        own = training | {"families": [family], "pretrained": not suffix, "seed": seed}
                        run = f"train-{name}{suffix}-{family}-seed{seed}"
                        trained[run] = GraphRun("train", "02_train_inverse", own)
            inverses = results if families else ""  # the shipped ones
            judging = {"target": target, "trained_on": entry["train"], "inverses": inverses, "seeds": seeds}
            judged = [(f"quality-{name}-{file_name(images)}", "03_quality", images) for images in entry["quality"]]
            judged += [
                (f"{_question(notebook).replace('_', '-')}-{name}", notebook, entry["quality"][0])
                for notebook in entry.get("studies", [])
            ]
            runs |= trained
            for run, notebook, images in judged:
                kind = "quality" if notebook == "03_quality" else "study"
                runs[run] = GraphRun(kind, notebook, judging | {"images": images}, tuple(trained))
        before = tuple(run for run, made in runs.items() if made.kind != "train")
        for notebook in graph.get("last", []):
            runs[_question(notebook)] = GraphRun("last", notebook, {"results": results}, before)
        return runs
    except (KeyError, TypeError, AttributeError) as error:
        raise BacksightError(
            f"the section `graph` of the preset {preset} is incomplete or not of its form ({error}): it needs once, "
            "seeds, families and targets, each with train and quality."
        ) from error


def _question(notebook: str) -> str:
    """A notebook's name without its number."""
    return notebook.partition("_")[2]


def plan_preset(preset: str) -> str:
    """The runs of a preset as a table, with the seconds that they last took on this machine, and the sum."""
    import pandas as pd

    folder, rows = results_root() / preset_path(preset).stem, []
    for run, made in graph_runs(preset).items():
        record = read_json(folder / run / FINISHED) or {}
        rows.append((run, made.notebook, record.get("seconds", {}).get("total")))
    runs = pd.DataFrame(rows, columns=["run", "notebook", "seconds"]).astype({"seconds": float})
    total = f"{len(runs)} runs, {runs['seconds'].sum() / 60:.0f} minutes one after the other"
    if unknown := int(runs["seconds"].isna().sum()):
        total += f", {unknown} not yet measured"
    return f"{runs.to_string(index=False, na_rep='-')}\n\n{total}"
