"""The run graph: one preset's targets x families x seeds, then the studies, the figures and the page.

Every notebook goes through the strict runner.

    snakemake --cores 2 --config preset=quick                        (make run)
    snakemake --profile profiles/slurm --config preset=paper         (a cluster: profiles/README.md)

A job is finished when its run.json is there, and made again when the preset's values for its notebook, the notebook or
the library changed; what came with the clone is made anew. The runner locks each run's folder, so snakemake's own lock,
which a kill leaves behind, is not needed (--nolock). Other notebooks or another place: --config notebooks=DIR
results=DIR.
"""

import json
import re
import shlex
import sys
from pathlib import Path

from backsight.app.parameters import preset_path, read_preset
from backsight.app.plan import graph_runs, missing_folders
from backsight.app.runs import code_digest

preset = config.get("preset", "quick")
preset_file = preset_path(preset)
sections = read_preset(preset)
backsight = f"{shlex.quote(sys.executable)} -m backsight.app.cli"
notebooks = Path(config.get("notebooks", "notebooks"))
results = Path(config.get("results", "results")) / preset_file.stem
graph = graph_runs(preset, str(results))
runs = {run: graph[run] for run in graph if not graph[run].missing}
for sentence in missing_folders(graph) if workflow.is_main_process else []:
    print(sentence, file=sys.stderr)

# From when on runs are made here: what is older came with the clone.
here = results / ".here"
if not here.exists():
    here.parent.mkdir(parents=True, exist_ok=True)
    here.touch()

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
# Of a folder without the record of a run, what git can give back; where more lies in it, the runner refuses it.
committed = "git ls-files -z 2> /dev/null | xargs -0 -r rm -f --"
without_committed = f"(cd {folder} && {committed} && find . -mindepth 1 -type d -empty -delete)"
page = f"{backsight} report {shlex.quote(str(results))}"


def command_line(parameters):
    """-p name=value for each parameter, lists and truth values as JSON has them."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in parameters.items()}
    return " ".join(f"-p {shlex.quote(f'{name}={text}')}" for name, text in texts.items())


rule page:
    input:
        [results / run / "run.json" for run in runs],
    output:
        results / "index.html",
    message:
        f"page of {results}"
    shell:
        f"{page}{hand_over}"


# One failed job does not cost the page of all others.
onerror:
    shell(f"{page} || true")


# A rule for each kind of run, so that a profile can say what each asks for. What is made once, the quickstart above all,
# comes first, and the page is there from then on.
for kind in ("once", "train", "quality", "study", "last"):

    rule:
        name:
            kind
        wildcard_constraints:
            run="|".join(re.escape(run) for run in runs if runs[run].kind == kind) or "none",
        input:
            here,
            lambda wildcards: notebooks / f"{runs[wildcards.run].notebook}.ipynb",
            lambda wildcards: [results / run / "run.json" for run in runs[wildcards.run].needs],
        output:
            results / "{run}" / "run.json",
        log:
            results / "{run}" / "log.txt",
        params:
            values=lambda wildcards: command_line(runs[wildcards.run].parameters),
            preset=lambda wildcards: json.dumps([sections.get("common"), sections.get(runs[wildcards.run].notebook)]),
            code=code_digest(),
            then=f"&& ({page} || true)" if kind == "once" else "",
        message:
            "{wildcards.run}"
        priority: int(kind == "once")
        shell:
            f"test -e {folder}/started.json || {without_committed} || true; mkdir -p {folder}; OMP_NUM_THREADS={{threads}} "
            f"{backsight} run {{input[1]:q}} -f {shlex.quote(str(preset_file))} {{params.values}} --out {folder} "
            f"2>&1 | tee {{log:q}}{hand_over} {{params.then}}"
