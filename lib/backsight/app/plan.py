"""What a preset will run, and how long each of its runs took when it was last run.

A run's seconds are those in its own run.json on this machine; else those of the committed table
results/reference/seconds.csv, which names the machine they were measured on.
"""

from __future__ import annotations

import pandas as pd

from backsight.app.checks import check_families, check_seeds
from backsight.app.parameters import preset_path, read_preset
from backsight.errors import BacksightError
from backsight.inverses.families import SOLVED
from backsight.project import FINISHED, project_root, read_json, results_root

MEASURED = "results/reference/seconds.csv"  # columns: preset, run, seconds, machine


def folder_name(name: str) -> str:
    """A target's or a data set's name as part of a run's name, as in the Snakefile."""
    return name.strip("/").replace("/", "-")


def graph_runs(preset: str) -> pd.DataFrame:
    """The runs that the Snakefile makes of a preset, in its order: run, notebook, target, needs (runs before it).

    Raises BacksightError on an unknown preset, an incomplete section `graph` and what no run can have.
    """
    graph = read_preset(preset).get("graph") or {}
    try:
        targets = {name: (entry["quality"], entry.get("studies", [])) for name, entry in graph["targets"].items()}
        seeds, families, once = list(graph["seeds"]), list(graph["families"]), list(graph["once"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BacksightError(
            f"The section `graph` of the preset {preset} is incomplete or not of its form ({error}): it needs targets "
            "(each with quality), families, seeds and once."
        ) from error
    check_families(families, f"{preset}: graph.families")
    if solved := [family for family in families if family in SOLVED]:
        raise BacksightError(
            f"{preset}: {solved[0]!r} is solved for every image and never trained: leave it out of graph.families."
        )
    check_seeds(seeds, f"{preset}: graph.seeds")
    runs: list[tuple[str, str, str, tuple[str, ...]]]
    runs = [(notebook.partition("_")[2], notebook, "", ()) for notebook in once]
    for target, (sources, studies) in targets.items():
        name = folder_name(target)
        trained = [f"train-{name}-{family}-seed{seed}" for family in families for seed in seeds]
        nulls = [family for family in families if family != "linear"]
        trained += [f"train-{name}-untrained-{family}-seed{s}" for family in nulls for s in graph.get("untrained", [])]
        runs += [(run, "02_train_inverse", target, ()) for run in trained]
        runs += [(f"quality-{name}-{folder_name(source)}", "03_quality", target, tuple(trained)) for source in sources]
        for notebook in studies:
            study = notebook.partition("_")[2].replace("_", "-")
            runs.append((f"{study}-{name}", notebook, target, tuple(trained)))
    before = tuple(run for run, notebook, *_ in runs if notebook != "02_train_inverse")
    runs += [(notebook.partition("_")[2], notebook, "", before) for notebook in graph.get("last", [])]
    return pd.DataFrame(runs, columns=["run", "notebook", "target", "needs"])


def plan_preset(preset: str) -> str:
    """The runs of a preset as a table, with their seconds where they are known, and the sum."""
    runs, name = graph_runs(preset), preset_path(preset).stem
    table = project_root() / MEASURED
    committed = pd.read_csv(table) if table.is_file() else pd.DataFrame(columns=["preset", "run", "seconds", "machine"])
    committed = committed[committed["preset"] == name].set_index("run")
    rows = []
    for run, notebook in zip(runs["run"], runs["notebook"], strict=True):
        record = read_json(results_root() / name / run / FINISHED) or {}
        seconds, measured = record.get("seconds", {}).get("total"), "here"
        if seconds is None and run in committed.index:
            seconds, measured = committed.loc[run, "seconds"], str(committed.loc[run, "machine"])
        rows.append((run, notebook, seconds, measured if seconds is not None else "not yet measured"))
    plan = pd.DataFrame(rows, columns=["run", "notebook", "seconds", "measured"])
    known = plan["seconds"] = plan["seconds"].astype(float)
    unknown = int(known.isna().sum())
    total = f"{len(plan)} runs, {known.sum() / 60:.0f} minutes one after the other"
    return f"{plan.to_string(index=False, na_rep='-')}\n\n{total}" + (
        f" and {unknown} not yet measured" if unknown else ""
    )
