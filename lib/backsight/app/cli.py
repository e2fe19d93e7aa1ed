"""The command `backsight`, thin. Exit 0: done; 1: a notebook or a check failed; 2: bad input."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from backsight.errors import BacksightError, nearest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors that a user can mend are one sentence on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except BacksightError as error:
        print(f"backsight: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # of a path that was given: too long, a folder, not to be written
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

    def command(function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        """A sub-command of the function's name."""
        added = commands.add_parser(function.__name__.strip("_"), help=text)
        added.set_defaults(command=function)
        return added

    run = command(_run, "run one notebook, strictly")
    run.add_argument("notebook", metavar="NOTEBOOK", type=Path)
    run.add_argument("-f", dest="preset", metavar="PRESET", help="quick, smoke, reference, paper or a YAML file")
    lists = "one parameter; lists as in -p 'families=[linear, direct]'"
    run.add_argument("-p", dest="assignments", metavar="name=value", action="append", default=[], help=lists)
    run.add_argument("--out", metavar="DIR", type=Path, help="the run's folder (default: results/<notebook>)")
    run.add_argument("-v", "--verbose", action="store_true", help="print what the cells print")

    look = command(_look, "turn every layer of a model back into a picture, as one figure")
    look.add_argument("picture", metavar="PICTURE", help="an image file, or chelsea, china, coffee, …")
    look.add_argument(
        "--target", default="dinov2-small", help="anything that load_target takes (default: dinov2-small)"
    )
    look.add_argument("--taps", default="blocks", help="blocks, components, fine, or names with commas")
    look.add_argument("--out", metavar="FILE", type=Path, help="default: PICTURE-TARGET.png in the working folder")

    plan = command(_plan, "list the runs of a preset, with the seconds that they took")
    plan.add_argument("preset", metavar="PRESET", help="quick, smoke, reference, paper or a YAML file")

    plan.add_argument("--record", action="store_true", help="first record the seconds of those that are finished here")

    fit = command(_fit, "fit inverses without a notebook, also under `accelerate launch`")
    fit.add_argument("target", metavar="TARGET", help="anything that load_target takes")
    fit.add_argument("images", metavar="IMAGES", help="scenes, a folder, a COCO or ImageNet root")
    fit.add_argument("out", metavar="OUT", type=Path, help="where the inverses go; 03_quality takes it as `inverses`")
    fit.add_argument("--taps", default="blocks", help="blocks, components, fine, or names with commas")
    fit.add_argument("--families", default="linear,modular", help="names with commas")
    fit.add_argument("--steps", type=_from(1), default=400, help="of training")
    fit.add_argument("--batch-size", type=_from(1), default=16, help="images of a step, of all processes together")
    fit.add_argument("--train-images", type=_from(1), help="at most so many (default: all)")
    fit.add_argument("--validation-images", type=_from(1), help="at most so many (default: all)")
    fit.add_argument("--features", default="auto", choices=("auto", "always", "never"), help="record them on disk")
    fit.add_argument("--seed", type=_from(0), default=0)
    fit.add_argument("--random-weights", action="store_true", help="of the target, for a control")

    explore = command(_explore, "open the explorer alone in a browser (loopback only)")
    explore.add_argument("--port", type=int, default=0, help="default: any free one")
    explore.add_argument("--no-browser", action="store_true", help="only say the address")

    command(_targets, "list what can be inverted here and now")
    command(_doctor, "check the installation")

    report = command(_report, "write index.html over the runs in a folder")
    report.add_argument("folder", metavar="FOLDER", type=Path)

    findings = command(_findings, "write what the runs in a folder say of the paper's claims")
    findings.add_argument("folder", metavar="FOLDER", type=Path, help="holds the runs, such as results/reference")
    findings.add_argument("page", metavar="PAGE", type=Path, help="the Markdown file to write, such as FINDINGS.md")
    return parser


def _from(least: int) -> Callable[[str], int]:
    """The type of a whole number that is not below `least`, nor too large for a seed."""

    def number(text: str) -> int:
        if not least <= (value := int(text)) < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is no number from {least}")
        return value

    return number


def _run(options: argparse.Namespace) -> int:
    from backsight.app.runner import NotebookError, plan_run, run_plan

    plan = plan_run(options.notebook, options.preset, options.assignments, options.out)
    try:
        run_plan(plan, options.verbose)
    except NotebookError as error:
        print(f"backsight: {error}", file=sys.stderr)
        return 1
    return 0


def _look(options: argparse.Namespace) -> int:
    from backsight.app.look import look, save_look
    from backsight.app.runs import file_name

    name = f"{file_name(Path(options.picture).stem)}-{file_name(options.target)}.png"
    print(save_look(look(options.picture, options.target, options.taps), options.out or Path(name)))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from backsight.app.plan import plan_preset

    print(plan_preset(options.preset, options.record))
    return 0


def _fit(options: argparse.Namespace) -> int:
    from backsight.app.runner import in_charge_of
    from backsight.data.distributed import processes
    from backsight.inverses.families import FAMILIES, fit_and_save
    from backsight.project import shown
    from backsight.targets import load_target

    first = processes().is_main_process  # asked before the target is loaded: each process has a GPU of its own
    families = [family.strip() for family in options.families.split(",")]
    for family in families:  # before the first of them is fitted
        if family not in FAMILIES:
            raise BacksightError(f"no inverse family {family!r}; {nearest(family, list(FAMILIES))}.")
    target = load_target(options.target, taps=options.taps, pretrained=not options.random_weights, seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    names = ("train_images", "validation_images", "steps", "batch_size", "features", "seed")
    training = {name: getattr(options, name) for name in names}
    with in_charge_of(options.out) if first else nullcontext():
        files = fit_and_save(target, options.images, families, options.out, **training)
    if first:
        print(f"{len(files)} inverses in {shown(options.out)}")
    return 0


def _explore(options: argparse.Namespace) -> int:
    from backsight.app.explorer.serve import serve

    return serve(options.port, not options.no_browser)


def _targets(options: argparse.Namespace) -> int:
    from backsight.targets import list_targets

    for row in list_targets():
        print(f"{row['name']:<44}{row['kind']:<12}{row['status']:<9}{row['needs']}".rstrip())
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from backsight.app.doctor import examine

    findings = examine()
    for verdict, subject, text in findings:
        print(f"{verdict:<5} {subject}: {text}")
    return int(any(verdict == "FAIL" for verdict, *_ in findings))


def _report(options: argparse.Namespace) -> int:
    from backsight.app.report import write_report

    print(write_report(options.folder))
    return 0


def _findings(options: argparse.Namespace) -> int:
    from backsight.project import shown
    from backsight.tables.claims import write_findings

    print(shown(write_findings(options.folder, options.page)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
