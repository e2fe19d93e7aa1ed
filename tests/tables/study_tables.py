"""Runs with the values of each study, made up so that the answer to every claim is known."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from backsight.project import write_json
from backsight.tables.pooling import metrics
from backsight.tables.values import Values, write_values

VIT_TAPS = ("patch_embed", "blocks.0", "blocks.1", "norm")
DETR_TAPS = ("backbone", "encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1")
TAPS = {"scenes-vit": VIT_TAPS, "scenes-detr": DETR_TAPS, "dinov2-small": VIT_TAPS}
REAL = ("dinov2-small",)  # targets that saw photographs
IMAGES, SEEDS = 30, 3


class Target:
    weights = "shipped"

    def __init__(self, name: str) -> None:
        self.name = name

    def depth(self, tap: str) -> float:
        return float(TAPS[self.name].index(tap))


class Study:
    """Values of one target; `add` spreads a number over images, that vary together, and training seeds."""

    def __init__(self, name: str) -> None:
        self.name, self.taps = name, TAPS[name]
        self.draw = np.random.default_rng(len(name))
        self.easy = self.draw.normal(size=IMAGES)
        self.values = Values(Target(name), "photographs" if name in REAL else "scenes", "test", range(IMAGES))

    def add(
        self, measure: str, value: float, tap: str | None, inverse: str | None, spread: float = 0.0, **of: Any
    ) -> None:
        by_seed = {
            seed: value + spread * self.easy + 0.1 * spread * self.draw.normal(size=IMAGES) for seed in range(SEEDS)
        }
        seeded = inverse is not None and not inverse.startswith("null_")
        self.values.add(measure, by_seed if seeded else by_seed[0], tap, inverse, **of)


def quality(study: Study) -> None:
    """Scores that fall with depth, twice as fast in the DETR; modular is 1 dB above direct; outlines are kept, and of a
    coarse octave a tenth."""
    steep = 2 if study.name == "scenes-detr" else 1
    for place, tap in enumerate(study.taps):
        for family, more in (("linear", -2.0), ("direct", 0.0), ("modular", 1.0)):
            study.add("psnr", 30 + more - steep * place, tap, family, 2.0)
            study.add("psnr_background", 30 + more - steep * place, tap, family, 2.0)
            study.add("texture_accuracy", max(0.0, 1 - 0.3 * place), tap, family, 0.01)
            study.add("mask_iou", 0.7, tap, family, 0.1)
            study.add("band_error", 0.3 * place, tap, family, 0.01, band=45.3)
            study.add("band_error", 0.9, tap, family, 0.01, band=5.7)
        for null in ("null_mean", "null_shuffled"):
            for measure, value in (
                ("psnr", 12.0),
                ("psnr_background", 12.0),
                ("texture_accuracy", 0.2),
                ("mask_iou", 0.1),
            ):
                study.add(measure, value, tap, null, 0.01)
            for band in (5.7, 45.3):
                study.add("band_error", 1.0, tap, null, 0.01, band=band)
        study.add("factor_score", 0.9, tap, "probe", factor="shape")
        study.add("factor_score", 0.1, tap, "null_shuffled", factor="shape")


def colour(study: Study) -> None:
    """Both lose the hue with depth, the DETR more; it keeps more of its accuracy; no object reverts. The row of all
    turns (no hue_shift) is far off: no claim may read it beside the turns."""
    steep, kept = (25.0, 0.9) if study.name == "scenes-detr" else (10.0, 0.7)
    about = {"perturbation": "hue_shift", "region": "object"}
    study.add("accuracy_kept", kept, None, None, 0.05, **about | {"region": "objects", "category": "all"})
    for place, tap in enumerate(study.taps):
        for turn, more in ((0.0, -2.0), (30.0, 2.0)):
            study.add("hue_error_shown", 5 + more + steep * place, tap, "modular", 2.0, **about, hue_shift=turn)
        study.add("hue_error_shown", 150.0 - 50 * place, tap, "modular", 2.0, **about)
        study.add("hue_error_shown", 90.0, tap, "null_shuffled", 2.0, **about)
        study.add("reverted_above_deals", 0.0, tap, "modular", 0.05, **about, category="canonical")


def cross_layer(study: Study) -> None:
    """A step of depth costs the DETR more, which has fewer pairs of taps; by modular inverses it does not."""
    slope, pairs = (0.5, 2) if study.name == "scenes-detr" else (0.2, 6)
    for inverse, value in (("linear", slope), ("modular", 0.2), ("null_untrained", 0.2)):
        for measure, endpoints in product(("stitch_slope", "stitch_slope_r2"), ("with", "without")):
            study.add(measure, value, None, inverse, 0.05, endpoints=endpoints, pairs=pairs, family="linear")


def efficiency(study: Study) -> None:
    """At equal cost the chain is 2 dB ahead."""
    for tap in study.taps:
        for family, ahead in (("direct", 0.0), ("modular_components", 2.0)):
            study.add("psnr_at_equal_flops", 15 + ahead, tap, family, 1.0, start="paper")


def tradeoff(study: Study) -> None:
    """More t, more PSNR and less accuracy."""
    score = "top1" if study.name == "scenes-vit" else "ap50"
    for t in (0.0, 0.5, 1.0):
        study.add(score, 0.9 - 0.2 * t, None, "task", 0.01, t=t)
        for tap in study.taps:
            study.add("psnr", 20 + 2 * t, tap, "linear", 1.0, t=t)


def noise(study: Study) -> None:
    """MAP gains 5 dB where only rounding is noise, and 1 dB where there is more."""
    for name, gain in (("float32", 5.0), ("0.1", 1.0)):
        for family, more in (("steadied", 0.0), ("map", gain), ("null_mean", -9.0)):
            study.add("psnr", 18 + more, study.taps[-1], family, 1.0, noise=name)


STUDIES = {
    "03_quality": quality,
    "04_cross_layer": cross_layer,
    "05_colour": colour,
    "06_modular_vs_direct": efficiency,
    "10_tradeoff": tradeoff,
    "12_noise": noise,
}


def write_study(folder: Path, notebooks: tuple[str, ...] = tuple(STUDIES)) -> Path:
    """A finished run for each notebook and target; returns `folder`."""
    for run, notebook, values in tables(notebooks):
        write_run(folder / run, notebook, values)
    return folder


def write_run(folder: Path, notebook: str, values: pd.DataFrame) -> None:
    folder.mkdir(parents=True)
    write_values(folder / "values.parquet", values)
    metrics(values).to_csv(folder / "metrics.csv", index=False)
    write_json(folder / "run.json", {"notebook": notebook, "status": "complete"})


def tables(
    notebooks: tuple[str, ...] = tuple(STUDIES), targets: tuple[str, ...] = ("scenes-vit", "scenes-detr")
) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(name of the run, its notebook, its values) of each study and target."""
    for notebook in notebooks:
        for target in targets:
            study = Study(target)
            STUDIES[notebook](study)
            yield f"{notebook[3:]}-{target}", notebook, study.values.table()
