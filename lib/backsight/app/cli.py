"""The command `backsight`, thin. Exit 0: done; 1: a notebook or a check failed; 2: bad input; 130: stopped."""

import re
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Exit, Option, Typer

from backsight.errors import BacksightError, nearest

PRESETS = "quick, smoke, reference, paper or a YAML file"
TARGETS = "a name that `backsight targets` lists, or another that load_target takes"
Runs = Annotated[Path, Argument(metavar="FOLDER", help="holds the folders of runs, such as results/reference")]


def listed(text: str) -> str:
    """Names with commas, also where they are written as a list."""
    return re.sub(r"""^\s*\[|\]\s*$|["']""", "", text)


Taps = Annotated[str, Option(parser=listed, metavar="NAMES", help="blocks, components, fine, or names with commas")]

app = Typer(
    help="What a vision transformer still knows, layer by layer.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors that a user can mend are one sentence on stderr."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        app(arguments, prog_name="backsight")
    except (BacksightError, OSError) as error:  # OSError: of a path that is too long, a folder, not to be written
        print(f"backsight: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except SystemExit as ended:
        if ended.code == 130:
            print("backsight: stopped; the same command resumes a run or a fit.", file=sys.stderr)
        return int(ended.code or 0)
    return 0


@app.command()
def run(
    notebook: Annotated[Path, Argument(metavar="NOTEBOOK", help="such as notebooks/03_quality.ipynb")],
    preset: Annotated[str | None, Option("-f", metavar="PRESET", help=PRESETS)] = None,
    assignments: Annotated[
        list[str] | None, Option("-p", metavar="NAME=VALUE", help="a parameter; lists as in -p 'seeds=[0, 1]'")
    ] = None,
    out: Annotated[Path | None, Option(metavar="DIR", help="the run's folder (default: results/<notebook>)")] = None,
    verbose: Annotated[bool, Option("--verbose", "-v", help="print what the cells print")] = False,
) -> None:
    """Run one notebook, strictly."""
    from backsight.app.runner import plan_run, run_plan

    run_plan(plan_run(notebook, preset, assignments or (), out), verbose)


@app.command()
def look(
    picture: Annotated[str, Argument(metavar="PICTURE", help="an image file, or chelsea, china, coffee, …")],
    target: Annotated[str, Option(help=TARGETS)] = "dinov2-small",
    taps: Taps = "blocks",
    families: Annotated[
        str | None, Option(metavar="F,F,…", help="(default: shipped, or linear); linear,map: minutes")
    ] = None,
    inverses: Annotated[
        Path | None, Option(metavar="FOLDER", help="of your own, as 02_train_inverse saves them")
    ] = None,
    out: Annotated[Path | None, Option(metavar="FILE", help="(default: PICTURE-TARGET.png)")] = None,
) -> None:
    """Turn every layer of a model back into a picture, as one figure."""
    from backsight.app.look import look, save_look
    from backsight.app.runs import check_file, file_name

    place = out or Path(f"{file_name(Path(picture).stem)}-{file_name(target)}.png")
    if place.exists() and Path(picture).exists() and place.samefile(picture):
        raise BacksightError(f"the figure would replace {picture} itself: give another file by --out.")
    check_file(place, "holds it, from every tap: PSNR in dB.")
    print(save_look(look(picture, target, taps, families.split(",") if families else None, inverses), place))


@app.command()
def plan(
    preset: Annotated[str, Argument(metavar="PRESET", help=PRESETS)],
    record: Annotated[bool, Option("--record", help="first record the seconds of those finished here")] = False,
) -> None:
    """List the runs of a preset, with the seconds that they took."""
    from backsight.app.plan import plan_preset

    print(plan_preset(preset, record))


@app.command()
def fit(
    target: Annotated[str, Argument(metavar="TARGET", help=TARGETS)],
    images: Annotated[str, Argument(metavar="IMAGES", help="scenes, leaves, a folder, a COCO or ImageNet root")],
    out: Annotated[Path, Argument(metavar="OUT", help="where the inverses go; 03_quality takes it as `inverses`")],
    taps: Taps = "blocks",
    families: Annotated[str, Option(parser=listed, metavar="NAMES", help="names with commas")] = "linear,modular",
    steps: Annotated[int, Option(min=1, help="of training")] = 400,
    batch_size: Annotated[int, Option(min=1, help="images of a step, of all processes together")] = 16,
    train_images: Annotated[int | None, Option(min=1, help="at most so many (default: all)")] = None,
    validation_images: Annotated[int | None, Option(min=1, help="at most so many (default: all)")] = None,
    features: Annotated[Literal["auto", "always", "never"], Option(help="record them on disk")] = "auto",
    seed: Annotated[int, Option(min=0, max=2**63 - 1, help="of weights, order and images")] = 0,
    random_weights: Annotated[bool, Option("--random-weights", help="of the target, for a control")] = False,
) -> None:
    """Fit inverses without a notebook, also under `accelerate launch`."""
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
    loaded = load_target(target, taps=taps, pretrained=not random_weights, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    with in_charge_of(out) if first else nullcontext():
        files = fit_and_save(
            *(loaded, images, chosen, out),
            train_images=train_images,
            validation_images=validation_images,
            steps=steps,
            batch_size=batch_size,
            features=features,
            seed=seed,
        )
    if first:
        print(f"{len(files)} inverses in {shown(out)}")


@app.command()
def explore(
    port: Annotated[int, Option(help="0: any free one")] = 0,
    browser: Annotated[bool, Option("--browser/--no-browser", help="open it, or only say the address")] = True,
) -> None:
    """Open the explorer alone in a browser (loopback only)."""
    from backsight.app.explorer.serve import serve

    serve(port, browser)


@app.command()
def targets() -> None:
    """List what can be inverted here and now."""
    from backsight.targets import list_targets

    for row in list_targets():
        print(f"{row['name']:<44}{row['kind']:<12}{row['status']:<9}{row['needs']}".rstrip())


@app.command()
def doctor() -> None:
    """Check the installation."""
    from backsight.app.doctor import examine

    findings = examine()
    for verdict, subject, text in findings:
        print(f"{verdict:<5} {subject}: {text}")
    raise Exit(int(any(verdict == "FAIL" for verdict, *_ in findings)))


@app.command()
def report(folder: Runs) -> None:
    """Write index.html over the runs in a folder."""
    from backsight.app.report import write_report

    print(write_report(folder))


@app.command()
def findings(
    folder: Runs,
    page: Annotated[Path, Argument(metavar="PAGE", help="the Markdown file to write, such as FINDINGS.md")],
) -> None:
    """Write what the runs in a folder say of the paper's claims."""
    from backsight.app.runs import check_file
    from backsight.project import shown
    from backsight.tables.claims import write_findings

    check_file(page, "Made by `backsight findings ")
    print(shown(write_findings(folder, page)))


if __name__ == "__main__":
    sys.exit(main())
