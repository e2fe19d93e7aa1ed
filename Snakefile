"""The run graph: one preset's targets x families x seeds, each notebook through the strict runner, then the page.

    snakemake --cores 2 --config preset=default      (make run)

A job is finished when its run.json is there. The runner locks each run's folder, so snakemake's own lock, which a
kill leaves behind, is not needed (--nolock). Other notebooks or another place: --config notebooks=DIR results=DIR.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import yaml

preset = config.get("preset", "default")
preset_file = Path(preset) if Path(preset).suffix else Path("notebooks/presets") / f"{preset}.yaml"
backsight = f"{shlex.quote(sys.executable)} -m backsight.cli"
graph = yaml.safe_load(preset_file.read_text())["graph"]
notebooks = Path(config.get("notebooks", "notebooks"))
results = Path(config.get("results", "results")) / preset_file.stem


def folder_name(name):
    """A target's or a data set's name as part of a folder's name."""
    return str(name).strip("/").replace("/", "-")


targets = {folder_name(name): {"name": name, **entry} for name, entry in graph["targets"].items()}
# What a target is judged on: images and, where there are several seeds, each seed's inverses by themselves.
judgements = {
    (target, folder_name(name) + (f"-seed{seed}" if len(graph["seeds"]) > 1 else "")): {"images": name, "seed": seed}
    for target, entry in targets.items()
    for name in entry["quality"]
    for seed in graph["seeds"]
}
quality_runs = [f"quality-{target}-{judgement}" for target, judgement in judgements]
train_runs = {
    (target, seed): [f"train-{target}-{family}-seed{seed}" for family in graph["families"]]
    for target in targets
    for seed in graph["seeds"]
}
once = {notebook.partition("_")[2]: notebook for notebook in graph["once"]}


wildcard_constraints:
    run="|".join(once) or "none",
    target="|".join(map(re.escape, targets)),
    family="|".join(graph["families"]),
    seed=r"\d+",
    judgement="|".join(re.escape(judgement) for _, judgement in judgements),


def strict_run(notebook, **parameters):
    """The shell command of one notebook: its parameters, then its folder from the rule's first output."""
    values = " ".join(f"-p {name}={{params.{name}:q}}" for name in parameters)
    return (
        "OMP_NUM_THREADS={threads} "
        f"{backsight} run {notebook} -f {shlex.quote(str(preset_file))} {values} "
        '--out "$(dirname {output[0]:q})" 2>&1 | tee {log:q}'
    )


def judged(wildcards):
    """The images and the seed of a quality run."""
    return judgements[wildcards.target, wildcards.judgement]


rule page:
    input:
        [results / run / "run.json" for run in [*once, *sum(train_runs.values(), []), *quality_runs]],
    output:
        results / "index.html",
    message:
        f"page of {results}"
    shell:
        f"{backsight} report {shlex.quote(str(results))}"


rule once:
    input:
        lambda wildcards: notebooks / f"{once[wildcards.run]}.ipynb",
    output:
        results / "{run}" / "run.json",
    log:
        results / "{run}" / "log.txt",
    message:
        "{wildcards.run}"
    shell:
        strict_run("{input[0]:q}")


rule train:
    input:
        notebooks / "02_train_inverse.ipynb",
    output:
        results / "train-{target}-{family}-seed{seed}" / "run.json",
        results / "train-{target}-{family}-seed{seed}" / "metrics.csv",
    log:
        results / "train-{target}-{family}-seed{seed}" / "log.txt",
    params:
        target=lambda wildcards: targets[wildcards.target]["name"],
        images=lambda wildcards: targets[wildcards.target]["train"],
        families=lambda wildcards: json.dumps([wildcards.family]),
        seed=lambda wildcards: wildcards.seed,
    message:
        "train {wildcards.family} inverses of {wildcards.target}, seed {wildcards.seed}"
    shell:
        strict_run("{input[0]:q}", target=..., images=..., families=..., seed=...)


rule quality:
    input:
        notebooks / "03_quality.ipynb",
        lambda wildcards: [
            results / run / "run.json" for run in train_runs[wildcards.target, judged(wildcards)["seed"]]
        ],
    output:
        results / "quality-{target}-{judgement}" / "run.json",
        results / "quality-{target}-{judgement}" / "metrics.csv",
    log:
        results / "quality-{target}-{judgement}" / "log.txt",
    params:
        target=lambda wildcards: targets[wildcards.target]["name"],
        images=lambda wildcards: judged(wildcards)["images"],
        trained_on=lambda wildcards: targets[wildcards.target]["train"],
        inverses=results,
        seed=lambda wildcards: judged(wildcards)["seed"],
    message:
        "quality of {wildcards.target} on {wildcards.judgement}"
    shell:
        strict_run("{input[0]:q}", target=..., images=..., trained_on=..., inverses=..., seed=...)
