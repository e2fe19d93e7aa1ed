"""Tables with the columns of each study, made up so that the answer to every claim is known."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

VIT_TAPS = ("patch_embed", "blocks.0", "blocks.1", "norm")
DETR_TAPS = ("backbone", "encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1")
TAPS = {"scenes-vit": VIT_TAPS, "scenes-detr": DETR_TAPS}
HALF = 0.2  # half of every interval


def row(target: str, tap: str | None, inverse: str, measure: str, value: float, **columns: Any) -> dict[str, Any]:
    """One tidy row of 50 images and 3 training seeds, whose interval is value ± HALF."""
    depth = TAPS[target].index(tap) if tap in TAPS[target] else None
    return {
        "target": target,
        "weights": "shipped",
        "dataset": "scenes",
        "split": "test",
        "tap": tap,
        "depth": depth,
        "inverse": inverse,
        "measure": measure,
        "value": value,
        "low": value - HALF,
        "high": value + HALF,
        "n": 50,
        "seed": 0,
        "seeds": 3,
    } | columns


def quality(target: str) -> list[dict[str, Any]]:
    """Scores that fall with depth, faster in the DETR; modular is 1 dB above direct."""
    steep = 2 if target == "scenes-detr" else 1
    rows = []
    for place, tap in enumerate(TAPS[target]):
        for family, extra in (("linear", -2), ("direct", 0), ("modular", 1)):
            for measure in ("psnr", "psnr_background"):
                rows.append(row(target, tap, family, measure, 30 + extra - 3 * steep * place))
            rows.append(row(target, tap, family, "hue_error", 5 + 10.0 * steep * place))
            rows.append(row(target, tap, family, "texture_accuracy", 20 - steep * place))
        for null in ("null_mean", "null_shuffled", "null_untrained"):
            for measure in ("psnr", "psnr_background", "hue_error", "texture_accuracy"):
                rows.append(row(target, tap, null, measure, 10.0))
        for factor, fall in (("texture", 3), ("hue", 3), ("shape", 0.1), ("background", 2)):
            of = {"factor": factor, "unit": "R2" if factor == "hue" else "accuracy", "seeds": 1}
            rows.append(row(target, tap, "probe", "factor_score", 20 - fall * steep * place, **of))
            rows.append(row(target, tap, "null_shuffled", "factor_score", 1.0, **of))
    return rows


def cross_layer(target: str) -> list[dict[str, Any]]:
    """The DETR's slope is the steeper one."""
    groups = {"blocks": 1.0} if target == "scenes-vit" else {"encoder": 3.0, "decoder": 4.0}
    rows = [
        row(target, None, "linear", "decay_slope", value, group=group, distance=2, component="block")
        for group, value in groups.items()
    ]
    for tap in TAPS[target]:
        for other in TAPS[target]:
            value = 1.0 if tap == other else 0.9 if target == "scenes-vit" else 0.1
            pair = {"source_tap": tap, "target_tap": other, "component": "block"}
            rows.append(
                row(target, tap, "features", "cka", value, low=value - 0.01, high=value + 0.01, seeds=1, **pair)
            )
    return rows


def colour(target: str) -> list[dict[str, Any]]:
    """The DETR keeps its accuracy, the ViT loses half of it; reconstructions keep the shown colour; no reversion."""
    score, kept = ("top1", 0.5) if target == "scenes-vit" else ("ap50", 1.0)
    near = {"n": 50, "seeds": 1}
    rows = []
    of: dict[str, Any]
    for change, factor in (("none", 1.0), ("set_hue", kept), ("hue_shift", kept)):
        value = 0.8 * factor
        of = {"perturbation": change, "region": "object", "category": "canonical"}
        if change == "hue_shift":
            of["hue_shift"] = of["amount"] = 15.0
        rows.append(row(target, None, "", score, value, low=value - 0.01, high=value + 0.01, **of, **near))
    for place, tap in enumerate(TAPS[target]):
        of = {"perturbation": "hue_shift", "region": "object", "category": "canonical"}
        rows.append(row(target, tap, "modular", "hue_error_shown", 5.0 + place, **of))
        rows.append(row(target, tap, "null_shuffled", "hue_error_shown", 90.0, **of))
        rows.append(row(target, tap, "modular", "reversion_index", 0.0, **of))
        rows.append(row(target, tap, "null_untrained", "reversion_index", 0.0, family="modular", **of))
        rows.append(row(target, tap, "modular", "hue_error_shown", 80.0, hue_shift=15.0, **of))
    return rows


def efficiency(target: str) -> list[dict[str, Any]]:
    """Both families at two lengths; the chain is 2 dB ahead at equal steps and at equal cost."""
    rows = []
    for steps in (10, 20):
        for family, ahead in (("direct", 0.0), ("modular", 2.0)):
            of: dict[str, Any] = {"steps": steps, "start": "ours", "flops": steps, "seconds": steps}
            rows += [row(target, tap, family, "psnr", 15 + steps / 10 + ahead, **of) for tap in TAPS[target]]
        about: dict[str, Any] = {"start": "ours", "against": "direct"}
        rows.append(row(target, "all", "modular", "psnr_change", 2.0, steps=steps, **about))
    for cost in ("flops", "seconds"):
        rows.append(row(target, "all", "modular", f"psnr_at_equal_{cost}_change", 2.0, **about))
    rows += [row(target, tap, "null_mean", "psnr", 10.0) for tap in TAPS[target]]
    return rows


def tradeoff(target: str) -> list[dict[str, Any]]:
    """More t, more PSNR and less accuracy."""
    score = "top1" if target == "scenes-vit" else "ap50"
    rows = []
    for t in (0.0, 0.5, 0.9, 1.0):
        rows.append(row(target, None, "", score, 9 - 4 * t, t=t))
        rows.append(row(target, None, "", f"{score}_change", -4 * t, t=t, against="t = 0"))
        for tap in TAPS[target]:
            rows.append(row(target, tap, "linear", "psnr", 20 + 5 * t, t=t))
            rows.append(row(target, tap, "linear", "psnr_change", 5 * t, t=t, against="t = 0"))
            rows.append(row(target, tap, "null_mean", "psnr", 12.0, t=t))
    return rows


def exact(target: str) -> list[dict[str, Any]]:
    """Nearly no image returns."""
    return [row(target, TAPS[target][-1], "exact", "back", 0.1, study="whole")]


def noise(target: str) -> list[dict[str, Any]]:
    """Nearly nothing that decoders lose is got back."""
    deep = TAPS[target][-1]
    rows = []
    for kind, sigma in (("float32", 3e-8), ("int8", 0.01)):
        of = {"noise": kind, "sigma": sigma}
        rows.append(row(target, deep, "map", "psnr", 1.0, **of))
        rows += [row(target, deep, family, "psnr", 0.0, **of) for family in ("direct", "modular")]
    return rows


STUDIES = {
    "quality": quality,
    "cross_layer": cross_layer,
    "colour": colour,
    "modular_vs_direct": efficiency,
    "tradeoff": tradeoff,
    "exact": exact,
    "noise": noise,
}


def write_study(folder: Path, names: tuple[str, ...] = tuple(STUDIES)) -> Path:
    """One run folder with a metrics.csv for each study and target; returns `folder`."""
    for name, table in tables(names):
        (folder / name).mkdir(parents=True)
        table.to_csv(folder / name / "metrics.csv", index=False)
    return folder


def tables(names: tuple[str, ...] = tuple(STUDIES)) -> Iterator[tuple[str, pd.DataFrame]]:
    """(name of the run, its table) of each study and target."""
    for name in names:
        for target in TAPS:
            yield f"{name}-{target}", pd.DataFrame(STUDIES[name](target))
