"""The command `backsight`, thin. Exit 0: done; 1: a notebook or a check failed; 2: bad input."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from backsight.errors import BacksightError, nearest

PRESET: dict[str, Any] = {"metavar": "PRESET", "help": "quick, smoke, reference, paper or a YAML file"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors that a user can mend are one sentence on stderr."""
    options = vars(_parser().parse_args(arguments))
    try:
        return options.pop("command")(**options) or 0
    except BrokenPipeError:  # whoever read the output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (BacksightError, OSError) as error:  # OSError: of a path that is too long, a folder, not to be written
        print(f"backsight: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("backsight: stopped; the same command resumes.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="backsight", description="What a vision transformer still knows, layer by layer."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable[..., int | None], text: str) -> Callable[..., argparse.Action]:
        """A sub-command of the function's name, whose arguments are the function's: what adds one."""
        added = commands.add_parser(function.__name__.strip("_"), help=text)
        added.set_defaults(command=function)
        return added.add_argument

    run = command(_run, "run one notebook, strictly")
    run("notebook", metavar="NOTEBOOK", type=Path)
    run("-f", dest="preset", **PRESET)
    lists = "one parameter; lists as in -p 'families=[linear, direct]'"
    run("-p", dest="assignments", metavar="name=value", action="append", default=[], help=lists)
    run("--out", metavar="DIR", type=Path, help="the run's folder (default: results/<notebook>)")
    run("-v", "--verbose", action="store_true", help="print what the cells print")

    look = command(_look, "turn every layer of a model back into a picture, as one figure")
    look("picture", metavar="PICTURE", help="an image file, or chelsea, china, coffee, …")
    look("--target", default="dinov2-small", help="anything that load_target takes (default: dinov2-small)")
    look("--taps", default="blocks", help="blocks, components, fine, or names with commas")
    look("--out", metavar="FILE", type=Path, help="default: PICTURE-TARGET.png in the working folder")

    plan = command(_plan, "list the runs of a preset, with the seconds that they took")
    plan("preset", **PRESET)
    plan("--record", action="store_true", help="first record the seconds of those that are finished here")

    fit = command(_fit, "fit inverses without a notebook, also under `accelerate launch`")
    fit("target", metavar="TARGET", help="anything that load_target takes")
    fit("images", metavar="IMAGES", help="scenes, a folder, a COCO or ImageNet root")
    fit("out", metavar="OUT", type=Path, help="where the inverses go; 03_quality takes it as `inverses`")
    fit("--taps", default="blocks", help="blocks, components, fine, or names with commas")
    fit("--families", default="linear,modular", help="names with commas")
    fit("--steps", type=_from(1), default=400, help="of training")
    fit("--batch-size", type=_from(1), default=16, help="images of a step, of all processes together")
    fit("--train-images", type=_from(1), help="at most so many (default: all)")
    fit("--validation-images", type=_from(1), help="at most so many (default: all)")
    fit("--features", default="auto", choices=("auto", "always", "never"), help="record them on disk")
    fit("--seed", type=_from(0), default=0)
    fit("--random-weights", action="store_true", help="of the target, for a control")

    explore = command(_explore, "open the explorer alone in a browser (loopback only)")
    explore("--port", type=int, default=0, help="default: any free one")
    explore("--no-browser", dest="browser", action="store_false", help="only say the address")

    command(_targets, "list what can be inverted here and now")
    command(_doctor, "check the installation")
    command(_report, "write index.html over the runs in a folder")("folder", metavar="FOLDER", type=Path)

    findings = command(_findings, "write what the runs in a folder say of the paper's claims")
    findings("folder", metavar="FOLDER", type=Path, help="holds the runs, such as results/reference")
    findings("page", metavar="PAGE", type=Path, help="the Markdown file to write, such as FINDINGS.md")
    return parser


def _from(least: int) -> Callable[[str], int]:
    """The type of a whole number that is not below `least`, nor too large for a seed."""

    def number(text: str) -> int:
        if not least <= (value := int(text)) < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is no number from {least}")
        return value

    return number


def _run(notebook: Path, preset: str | None, assignments: Sequence[str], out: Path | None, verbose: bool) -> int | None:
    from backsight.app.runner import NotebookError, plan_run, run_plan

    plan = plan_run(notebook, preset, assignments, out)
    try:
        run_plan(plan, verbose)
    except NotebookError as error:
        print(f"backsight: {error}", file=sys.stderr)
        return 1
    return 0


def _look(picture: str, target: str, taps: str, out: Path | None) -> None:
    from backsight.app.look import look, save_look
    from backsight.app.runs import file_name

    name = f"{file_name(Path(picture).stem)}-{file_name(target)}.png"
    print(save_look(look(picture, target, taps), out or Path(name)))


def _plan(preset: str, record: bool) -> None:
    from backsight.app.plan import plan_preset

    print(plan_preset(preset, record))


def _fit(target: str, images: str, out: Path, taps: str, families: str, random_weights: bool, **training: Any) -> None:
    from backsight.app.runner import in_charge_of
    from backsight.data.distributed import processes
    from backsight.inverses.families import FAMILIES, fit_and_save
    from backsight.project import shown
    from backsight.targets import load_target

    first = processes().is_main_process  # asked before the target is loaded: each process has a GPU of its own
    chosen = [family.strip() for family in families.split(",")]
    for family in chosen:  # before the first of them is fitted
        if family not in FAMILIES:
            raise BacksightError(f"no inverse family {family!r}; {nearest(family, list(FAMILIES))}.")
    loaded = load_target(target, taps=taps, pretrained=not random_weights, seed=training["seed"])
    out.mkdir(parents=True, exist_ok=True)
    with in_charge_of(out) if first else nullcontext():
        files = fit_and_save(loaded, images, chosen, out, **training)
    if first:
        print(f"{len(files)} inverses in {shown(out)}")


def _explore(port: int, browser: bool) -> None:
    from backsight.app.explorer.serve import serve

    serve(port, browser)


def _targets() -> None:
    from backsight.targets import list_targets

    for row in list_targets():
        print(f"{row['name']:<44}{row['kind']:<12}{row['status']:<9}{row['needs']}".rstrip())


def _doctor() -> int:
    from backsight.app.doctor import examine

    findings = examine()
    for verdict, subject, text in findings:
        print(f"{verdict:<5} {subject}: {text}")
    return int(any(verdict == "FAIL" for verdict, *_ in findings))


def _report(folder: Path) -> None:
    from backsight.app.report import write_report

    print(write_report(folder))


def _findings(folder: Path, page: Path) -> None:
    from backsight.project import shown
    from backsight.tables.claims import write_findings

    print(shown(write_findings(folder, page)))


if __name__ == "__main__":
    sys.exit(main())
