"""The run graph: one preset's targets x families x seeds, then the studies, the figures and the page.

Every notebook goes through the strict runner.

    snakemake --cores 2 --config preset=default                      (make run)
    snakemake --profile profiles/slurm --config preset=paper         (a cluster: profiles/README.md)

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
backsight = f"{shlex.quote(sys.executable)} -m backsight.app.cli"
graph = yaml.safe_load(preset_file.read_text())["graph"]
notebooks = Path(config.get("notebooks", "notebooks"))
results = Path(config.get("results", "results")) / preset_file.stem


def folder_name(name):
    """A target's or a data set's name as part of a folder's name."""
    return str(name).strip("/").replace("/", "-")


targets = {folder_name(name): {"name": name, **entry} for name, entry in graph["targets"].items()}
seeds = graph["seeds"]
# Families trained on the same architectures with random weights, for these seeds: null models. Linear ones are fitted
# where they are needed, for every seed.
untrained = graph.get("untrained", [])
once = {notebook.partition("_")[2]: notebook for notebook in graph["once"]}
# Studies of one target, by the first part of their runs' names; `quality` is one, for each data set it is judged on.
studies = {
    notebook.partition("_")[2].replace("_", "-"): notebook
    for entry in targets.values()
    for notebook in entry.get("studies", [])
}
judgements = {(target, folder_name(name)): name for target, entry in targets.items() for name in entry["quality"]}
# What comes after everything else, from its tables alone.
last = {notebook.partition("_")[2]: notebook for notebook in graph.get("last", [])}


def trained(target):
    """The training runs of a target: every family and seed, then those of the untrained target."""
    own = [f"train-{target}-{family}-seed{seed}" for family in graph["families"] for seed in seeds]
    nulls = [family for family in graph["families"] if family != "linear"]
    return own + [f"train-{target}-untrained-{family}-seed{seed}" for family in nulls for seed in untrained]


train_runs = [run for target in targets for run in trained(target)]
quality_runs = [f"quality-{target}-{judgement}" for target, judgement in judgements]
study_runs = [
    f"{study}-{target}"
    for target, entry in targets.items()
    for study, notebook in studies.items()
    if notebook in entry.get("studies", [])
]


def finished(runs):
    return [results / run / "run.json" for run in runs]


wildcard_constraints:
    run="|".join(once) or "none",
    study="|".join(studies) or "none",
    last="|".join(last) or "none",
    target="|".join(map(re.escape, targets)),
    weights="|-untrained",
    family="|".join(graph["families"]),
    seed=r"\d+",
    judgement="|".join(re.escape(judgement) for _, judgement in judgements),


# The folder of a rule's outputs, in its shell command. With a storage provider (profiles/kubernetes) a rule's files are
# copies, in a folder of their own, that snakemake fetches and stores. A run's folder holds more than its rule names, so
# it lies on a volume that all jobs see, and what the rule names is then copied to where snakemake expects it.
folder, hand_over = '"$(dirname {output[0]:q})"', ""
where = workflow.storage_settings
if where.default_storage_provider is not None:
    place = str(where.default_storage_prefix).strip("/")
    copies = f"{where.local_storage_prefix / where.default_storage_provider / place}/"
    folder = f'"$(dirname {{output[0]:q}} | cut -c {len(copies) + 1}-)"'
    hand_over = f' && for file in {{output:q}}; do cp {folder}/"$(basename "$file")" "$file"; done'


def strict_run(notebook, **parameters):
    """The shell command of one notebook: its parameters, then its folder from the rule's first output."""
    values = " ".join(f"-p {name}={{params.{name}:q}}" for name in parameters)
    return (
        "OMP_NUM_THREADS={threads} "
        f"{backsight} run {notebook} -f {shlex.quote(str(preset_file))} {values} "
        f"--out {folder} 2>&1 | tee {{log:q}}{hand_over}"
    )


rule page:
    input:
        finished([*once, *train_runs, *quality_runs, *study_runs, *last]),
    output:
        results / "index.html",
    message:
        f"page of {results}"
    shell:
        f"{backsight} report {shlex.quote(str(results))}{hand_over}"


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
        results / "train-{target}{weights}-{family}-seed{seed}" / "run.json",
        results / "train-{target}{weights}-{family}-seed{seed}" / "metrics.csv",
    log:
        results / "train-{target}{weights}-{family}-seed{seed}" / "log.txt",
    params:
        target=lambda wildcards: targets[wildcards.target]["name"],
        images=lambda wildcards: targets[wildcards.target]["train"],
        families=lambda wildcards: json.dumps([wildcards.family]),
        pretrained=lambda wildcards: "false" if wildcards.weights else "true",
        seed=lambda wildcards: wildcards.seed,
    message:
        "train {wildcards.family} inverses of {wildcards.target}{wildcards.weights}, seed {wildcards.seed}"
    shell:
        strict_run("{input[0]:q}", target=..., images=..., families=..., pretrained=..., seed=...)


rule quality:
    input:
        notebooks / "03_quality.ipynb",
        lambda wildcards: finished(trained(wildcards.target)),
    output:
        results / "quality-{target}-{judgement}" / "run.json",
        results / "quality-{target}-{judgement}" / "metrics.csv",
    log:
        results / "quality-{target}-{judgement}" / "log.txt",
    params:
        target=lambda wildcards: targets[wildcards.target]["name"],
        images=lambda wildcards: judgements[wildcards.target, wildcards.judgement],
        trained_on=lambda wildcards: targets[wildcards.target]["train"],
        inverses=results,
        seeds=json.dumps(seeds),
    message:
        "quality of {wildcards.target} on {wildcards.judgement}"
    shell:
        strict_run("{input[0]:q}", target=..., images=..., trained_on=..., inverses=..., seeds=...)


rule study:
    input:
        lambda wildcards: notebooks / f"{studies[wildcards.study]}.ipynb",
        lambda wildcards: finished(trained(wildcards.target)),
    output:
        results / "{study}-{target}" / "run.json",
        results / "{study}-{target}" / "metrics.csv",
    log:
        results / "{study}-{target}" / "log.txt",
    params:
        target=lambda wildcards: targets[wildcards.target]["name"],
        images=lambda wildcards: targets[wildcards.target]["quality"][0],
        trained_on=lambda wildcards: targets[wildcards.target]["train"],
        inverses=results,
        seeds=json.dumps(seeds),
    message:
        "{wildcards.study} of {wildcards.target}"
    shell:
        strict_run("{input[0]:q}", target=..., images=..., trained_on=..., inverses=..., seeds=...)


rule last:
    input:
        lambda wildcards: notebooks / f"{last[wildcards.last]}.ipynb",
        finished([*once, *quality_runs, *study_runs]),
    output:
        results / "{last}" / "run.json",
    log:
        results / "{last}" / "log.txt",
    params:
        results=results,
    message:
        "{wildcards.last}"
    shell:
        strict_run("{input[0]:q}", results=...)
