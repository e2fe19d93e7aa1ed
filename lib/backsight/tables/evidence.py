"""What the runs of a study say on each claim of claims.yaml: numbers with their intervals, one target or pair a row.

Every number is read from the metrics.csv of a run, or is the difference of two such numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from backsight.tables.estimates import Estimate, difference, estimate_of, flipped, log_ratio
from backsight.tables.names import ALL_TAPS, LEADING_FAMILIES, SLOPES
from backsight.tables.read import COLOUR, CROSS_LAYER, EFFICIENCY, EXACT, NOISE, QUALITY, TRADEOFF, Study, fullest_run

HALF_OF_IT = 0.5  # share of images: more of them have to be out of reach to count as lost
HIDDEN = 3.0  # dB: what MAP gains on the best decoder where a picture counts as hidden from decoders, not lost
AS_GOOD = 0.5  # dB: a chain this little below the direct decoder still counts as as good
_PROBE = "probe"


@dataclass(frozen=True)
class Evidence:
    """What one target (or pair of targets) says on a claim: the claim holds where `estimate` is above `border`.

    trained: whether inverses were trained for it, so that their seeds count.
    """

    target: str
    measured: str
    unit: str
    estimate: Estimate
    trained: bool = True
    border: float = 0.0


# ---------------------------------------------------------------------------------------------------- choosing the rows


def _targets(rows: pd.DataFrame) -> list[str]:
    """The targets of the rows; a name with a space is a variant made for a check inside of a run, and left out."""
    return sorted(name for name in set(rows["target"].dropna()) if " " not in name) if len(rows) else []


def _by_target(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    return ((name, rows[rows["target"] == name]) for name in _targets(rows))


def _pairs(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """(ViT, DETR) pairs among the targets of the rows: what the paper compares."""
    names = _targets(rows)
    vits = [name for name in names if "vit" in name.lower()]
    return [(vit, detr) for vit in vits for detr in names if "detr" in detr.lower()]


def _has(rows: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """The rows whose columns have these values; none where a column is absent."""
    for column, value in wanted.items():
        if column not in rows:
            return rows.iloc[:0]
        rows = rows[rows[column] == value]
    return rows


def shallowest(rows: pd.DataFrame) -> str:
    """The tap of the smallest depth."""
    return str(rows.sort_values("depth", kind="stable")["tap"].iloc[0])


def deep_taps(rows: pd.DataFrame) -> dict[str, str]:
    """{stage: tap} of the deepest taps: of a detector the ends of encoder and decoder, else the last tap."""
    ordered = rows.dropna(subset=["depth", "tap"]).sort_values("depth", kind="stable")
    taps = list(dict.fromkeys(ordered["tap"].astype(str)))
    ends = {}
    for stage in ("encoder", "decoder"):
        if inside := [tap for tap in taps if tap.startswith(stage)]:
            ends[f"{stage} end"] = inside[-1]
    return ends or ({"last tap": taps[-1]} if taps else {})


def _main_family(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the family that speaks for the layers."""
    present = set(rows["inverse"]) if len(rows) else set()
    family = next((name for name in LEADING_FAMILIES if name in present), "")
    return rows[rows["inverse"] == family]


def _family(rows: pd.DataFrame) -> str:
    return str(rows["inverse"].iloc[0])


def _quality(study: Study, measure: str) -> pd.DataFrame:
    return fullest_run(_scenes_first(study.rows(QUALITY, measure)))


def _scenes_first(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each target the rows on one data set only: scenes where there are any, else the first by name."""
    if rows.empty:
        return rows
    kept = []
    for _, group in rows.groupby("target", sort=True):
        names = sorted(set(group["dataset"].dropna()), key=lambda name: (name != "scenes", name))
        kept.append(group[group["dataset"] == names[0]] if names else group)
    return pd.concat(kept, ignore_index=True)


# ------------------------------------------------------------------------------------ 1. texture, colour, shape, detail

_BETTER_UP = {"texture_accuracy": "share of objects", "psnr_background": "dB", "psnr": "dB"}


def shallow_keep(study: Study) -> Iterator[Evidence]:
    """Shallowest minus deepest tap: texture and colour, by a probe on the layer and in the reconstruction."""
    for factor in ("texture", "hue"):
        rows = _has(fullest_run(_scenes_first(study.rows(QUALITY, "factor_score"))), inverse=_PROBE, factor=factor)
        yield from _lost_with_depth(rows, f"{factor} by a probe", trained=False)
    yield from _lost_with_depth(_main_family(_quality(study, "texture_accuracy")), "texture in the reconstruction")
    yield from _lost_with_depth(_main_family(_quality(study, "hue_error")), "hue error of the reconstruction", -1)


def _lost_with_depth(rows: pd.DataFrame, what: str, sign: int = 1, trained: bool = True) -> Iterator[Evidence]:
    for target, of in _by_target(rows):
        first = shallowest(of)
        unit = _unit(of)
        for tap in deep_taps(of).values():
            ends = estimate_of(of[of["tap"] == first]), estimate_of(of[of["tap"] == tap])
            change = difference(*(ends if sign > 0 else ends[::-1]))
            if change is not None and tap != first:
                shown_change = f"{first} minus {tap}" if sign > 0 else f"{tap} minus {first}"
                yield Evidence(target, f"{what}{_by(of)}: {shown_change}", unit, change, trained)


def _unit(rows: pd.DataFrame) -> str:
    measure = str(rows["measure"].iloc[0])
    if "unit" in rows and isinstance(rows["unit"].iloc[0], str):
        return {"R2": "R²"}.get(rows["unit"].iloc[0], rows["unit"].iloc[0])
    if measure.startswith("hue_error"):
        return "degrees"
    return "dB" if "psnr" in measure else _BETTER_UP.get(measure, measure)


def _by(rows: pd.DataFrame) -> str:
    family = _family(rows)
    return "" if family == _PROBE else f" ({family})"


def deep_keep_shape(study: Study) -> Iterator[Evidence]:
    """Shape by a probe at the deepest taps against its best null; and whether shape is lost less than texture."""
    rows = fullest_run(_scenes_first(study.rows(QUALITY, "factor_score")))
    for target, of in _by_target(_has(rows, factor="shape")):
        probes = _has(of, inverse=_PROBE)
        if probes.empty:
            continue
        for tap in deep_taps(probes).values():
            nulls = of[of["inverse"].str.startswith("null_") & (of["tap"] == tap) & of["value"].notna()]
            if nulls.empty:
                continue
            name = str(nulls.sort_values("value", kind="stable")["inverse"].iloc[-1])
            ends = estimate_of(probes[probes["tap"] == tap]), estimate_of(nulls[nulls["inverse"] == name])
            if (above := difference(*ends)) is not None:
                yield Evidence(target, f"shape by a probe at {tap}, above {name}", _unit(probes), above, False)
        texture = _has(rows, target=target, inverse=_PROBE, factor="texture")
        first = shallowest(probes)
        for tap in deep_taps(probes).values() if len(texture) else ():
            lost = [
                difference(estimate_of(part[part["tap"] == first]), estimate_of(part[part["tap"] == tap]))
                for part in (texture, probes)
            ]
            more = difference(*lost)
            if more is not None and tap != first:
                what = f"accuracy lost from {first} to {tap}, by a probe: texture minus shape"
                yield Evidence(target, what, "accuracy", more, False)


def detr_discards(study: Study) -> Iterator[Evidence]:
    """Last tap of a ViT against the ends of a DETR's encoder and decoder; above zero: the DETR keeps less."""
    measures = {
        "psnr_background": ("PSNR of the background", 1),
        "hue_error": ("hue error inside the object", -1),
        "psnr": ("PSNR of all pixels", 1),
    }
    for measure, (what, sign) in measures.items():
        yield from _vit_against_detr(_quality(study, measure), what, sign)
    factors = fullest_run(_scenes_first(study.rows(QUALITY, "factor_score")))
    for factor in ("background", "hue"):
        rows = _has(factors, inverse=_PROBE, factor=factor)
        yield from _vit_against_detr(rows, f"{factor} by a probe", 1, trained=False)


def _vit_against_detr(rows: pd.DataFrame, what: str, sign: int, trained: bool = True) -> Iterator[Evidence]:
    """sign: 1 where more is kept by a larger number, −1 where by a smaller one."""
    if trained and len(rows):
        rows = _shared_family(rows)
    for vit, detr in _pairs(rows):
        theirs = rows[rows["target"] == detr]
        ours = rows[rows["target"] == vit]
        last = list(deep_taps(ours).values())[-1]
        kept = estimate_of(ours[ours["tap"] == last])
        for tap in deep_taps(theirs).values():
            other = estimate_of(theirs[theirs["tap"] == tap])
            less = difference(kept, other) if sign > 0 else difference(other, kept)
            if less is not None:
                order = (f"{vit} {last}", f"{detr} {tap}")
                sides = " minus ".join(order if sign > 0 else order[::-1])
                yield Evidence(f"{detr} / {vit}", f"{what}{_by(ours)}: {sides}", _unit(ours), less, trained)


def _shared_family(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first family that every target has: two targets are compared by the same kind of inverse."""
    per_target = [set(rows.loc[rows["target"] == name, "inverse"]) for name in _targets(rows)]
    family = next((name for name in LEADING_FAMILIES if all(name in names for names in per_target)), "")
    return rows[rows["inverse"] == family]


# --------------------------------------------------------------------------------------------- 2. correlation of layers


def layers_correlate(study: Study) -> Iterator[Evidence]:
    """What a layer of distance costs, detector minus ViT; above zero, the ViT's layers correlate more. Of each slope
    by the leading family, over the largest distance that both targets have on the same images."""
    rows = fullest_run(_scenes_first(study.rows(CROSS_LAYER, list(SLOPES))))
    rows = rows[~rows["inverse"].str.startswith("null_")]
    if rows.empty or not {"group", "distance"} <= set(rows):
        return
    keys = ["dataset", "split", "measure", "inverse", "distance"]
    for vit, detr in _pairs(rows):
        ours = rows[(rows["target"] == vit) & (rows["group"] == "blocks")]
        theirs = rows[(rows["target"] == detr) & rows["group"].isin(["encoder", "decoder"])]
        both = ours.merge(theirs, on=keys, suffixes=("", "_other"))
        for (stage, measure), found in both.groupby(["group_other", "measure"], sort=True):
            names = set(found["inverse"])
            family = next((name for name in LEADING_FAMILIES if name in names), sorted(names)[0])
            one = found[found["inverse"] == family].sort_values("distance").iloc[-1]
            same = rows[(rows[keys] == one[keys]).all(axis=1)]
            sides = [(detr, stage), (vit, "blocks")]
            ends = [estimate_of(same[(same["target"] == name) & (same["group"] == group)]) for name, group in sides]
            if (numbers := difference(*ends)) is None:
                continue
            what = f"{measure} ({family}), up to {one['distance']:g} layers apart: {detr} {stage} minus {vit}"
            numbers = replace(numbers, runs=numbers.runs[::-1])
            yield Evidence(f"{detr} / {vit}", what, SLOPES[str(measure)], numbers, str(measure).startswith("decay"))


# ------------------------------------------------------------------------------------------------------------ 3. colour

_COLOUR_CHANGES = ("set_hue", "hue_shift", "grey", "channels")


def detr_robust(study: Study) -> Iterator[Evidence]:
    """The share of its accuracy that a target keeps when colours change; log2 ratio, DETR against ViT."""
    rows = fullest_run(_scenes_first(study.rows(COLOUR, ["top1", "ap50"])))
    for vit, detr in _pairs(rows):
        for region in sorted(set(_column(rows, "region").dropna())):
            for change in _COLOUR_CHANGES:
                kept = [_accuracy_kept(rows[rows["target"] == name], change, region) for name in (detr, vit)]
                more = difference(*kept)
                if more is not None:
                    what = f"log2 of the share of accuracy kept under {change} ({region}): {detr} minus {vit}"
                    yield Evidence(f"{detr} / {vit}", what, "log2 ratio", more, trained=False)


def _column(rows: pd.DataFrame, name: str) -> pd.Series:
    return rows[name] if name in rows else pd.Series(dtype=object)


def _accuracy_kept(rows: pd.DataFrame, change: str, region: str) -> Estimate | None:
    changed = _has(rows, perturbation=change, region=region)
    untouched = _has(rows, perturbation="none")
    same_region = _has(untouched, region=region)
    return log_ratio(estimate_of(changed), estimate_of(same_region if len(same_region) else untouched))


def _pooled_shifts(rows: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """The rows that pool the whole response curve of the object's hue, the shift that no row of a single one names."""
    rows = _has(rows, perturbation="hue_shift", region="object", **wanted)
    return rows[rows["hue_shift"].isna()] if "hue_shift" in rows else rows


def deep_care_less(study: Study) -> Iterator[Evidence]:
    """Hue error to the shown colour, deepest minus shallowest tap; and of a DETR minus of a ViT."""
    rows = _pooled_shifts(fullest_run(_scenes_first(study.rows(COLOUR, "hue_error_shown"))))
    for category in sorted(set(_column(rows, "category").dropna())):
        of = rows[rows["category"] == category]
        what = f"hue error to the shown colour, {category.replace('_', '-')} classes"
        for target in _targets(of):
            yield from _lost_with_depth(_main_family(of[of["target"] == target]), what, -1)
        yield from _vit_against_detr(of, what, -1)


def reverts(study: Study) -> Iterator[Evidence]:
    """The prototype-reversion index of classes that own a hue, at the deepest taps, above its placebo: the size of the
    index of colour-free classes for a hue that was dealt to them. And above what an inverse of the untrained target
    makes; and by inverses that were fitted on uniform hues, which know no prototype."""
    every = fullest_run(_scenes_first(study.rows(COLOUR, "reversion_index")))
    rows, free = _pooled_shifts(every, category="canonical"), _pooled_shifts(every, category="colour_free")
    for target, of in _by_target(rows):
        main = _main_family(of)
        if main.empty:
            continue
        nulls = _has(of, inverse="null_untrained", family=_family(main))
        placebos = _has(free[free["target"] == target], inverse=str(main["inverse"].iloc[0]))
        uniform, uniform_placebos = (_has(each, target=target, inverse="linear_uniform") for each in (rows, free))
        for tap in deep_taps(main).values():
            what = f"prototype-reversion index at {tap}"
            found = estimate_of(main[main["tap"] == tap])
            for said, index, placebo in (
                (f"{_by(main)}, above the size of its placebo", found, _size(placebos, tap)),
                (f"{_by(main)}, above null_untrained", found, estimate_of(nulls[nulls["tap"] == tap])),
                (
                    " (linear, fitted on uniform hues), above the size of its placebo",
                    estimate_of(uniform[uniform["tap"] == tap]),
                    _size(uniform_placebos, tap),
                ),
            ):
                if (above := difference(index, placebo)) is not None:
                    yield Evidence(target, what + said, "index", above)


def _size(rows: pd.DataFrame, tap: str) -> Estimate | None:
    """The estimate at a tap without its sign."""
    found = estimate_of(rows[rows["tap"] == tap])
    if found is None or found.value >= 0:
        return found
    return flipped(found)


# ------------------------------------------------------------------------------------------------ 4. modular and direct


def as_good(study: Study) -> Iterator[Evidence]:
    """PSNR of the chain minus the direct decoder's, at the same steps and images; above −AS_GOOD: as good."""
    for target, of in _by_target(_quality(study, "psnr")):
        yield from _modular_minus_direct(target, of, border=-AS_GOOD)
    rows = study.rows(EFFICIENCY, "psnr_change")
    if len(rows):
        longest = rows[(rows["start"] == "ours") & (rows["steps"] == rows["steps"].max())]
        yield from _paired(longest, "the same steps and images", border=-AS_GOOD)


def more_efficient(study: Study) -> Iterator[Evidence]:
    """PSNR of the chain minus the direct decoder's, at equal cost in FLOPs and in seconds."""
    for cost in ("flops", "seconds"):
        rows = study.rows(EFFICIENCY, f"psnr_at_equal_{cost}_change")
        for start in sorted(set(rows["start"])) if len(rows) else ():
            yield from _paired(rows[rows["start"] == start], f"equal {cost}, start: {start}")


def _paired(rows: pd.DataFrame, where: str, border: float = 0.0) -> Iterator[Evidence]:
    """The paired differences of the chain against direct decoders, over all judged taps."""
    for target, of in _by_target(fullest_run(_has(rows, inverse="modular", against="direct", tap=ALL_TAPS))):
        if (better := estimate_of(of)) is not None:
            what = f"PSNR, modular minus direct, mean over the judged taps, {where} ({EFFICIENCY})"
            yield Evidence(target, what, "dB", better, border=border)


def _modular_minus_direct(target: str, rows: pd.DataFrame, border: float) -> Iterator[Evidence]:
    families = {name: rows[rows["inverse"] == name] for name in ("modular", "direct")}
    everywhere = set(families["modular"]["tap"]) & set(families["direct"]["tap"])
    taps = [tap for tap in deep_taps(rows).values() if all((part["tap"] == tap).any() for part in families.values())]
    scopes: list[tuple[str, set[str]]] = [(tap, {tap}) for tap in taps]
    if len(everywhere) > 1:
        scopes.append((f"mean of {len(everywhere)} taps", everywhere))
    for name, chosen in scopes:
        better = difference(*(estimate_of(part[part["tap"].isin(chosen)]) for part in families.values()))
        if better is not None:
            what = f"PSNR, modular minus direct, {name}, the same steps and images ({QUALITY})"
            yield Evidence(target, what, "dB", better, border=border)


# --------------------------------------------------------------------------------------------------------- 5. trade-off


def joint_gains(study: Study) -> Iterator[Evidence]:
    """Paired change of PSNR at the largest t below 1 against t = 0, inverses fitted anew: above zero, it is easier to
    invert."""
    rows = _changes(study, ["psnr_change"])
    rows = rows[rows["inverse"] == "linear"]
    for target in _targets(rows):
        of = _largest_t(rows[rows["target"] == target])
        for tap in deep_taps(of).values():
            found = estimate_of(of[of["tap"] == tap])
            if found is not None:
                what = f"change of PSNR at {tap} (linear, fitted anew): t = {of['t'].iloc[0]:g} minus 0"
                yield Evidence(target, what, "dB", found)


def joint_costs(study: Study) -> Iterator[Evidence]:
    """Paired change of the task's score at the largest t below 1 against t = 0, turned round: above zero, it falls."""
    rows = _changes(study, ["top1_change", "ap50_change"])
    for target in _targets(rows):
        of = _largest_t(rows[rows["target"] == target])
        found = estimate_of(of)
        if found is not None:
            score = str(of["measure"].iloc[0]).removesuffix("_change")
            yield Evidence(target, f"{score} lost: t = 0 minus {of['t'].iloc[0]:g}", "share", flipped(found))


def _changes(study: Study, measures: list[str]) -> pd.DataFrame:
    """The rows that say what a t below 1 changed against t = 0, paired image by image."""
    rows = fullest_run(_scenes_first(_has(study.rows(TRADEOFF, measures), against="t = 0")))
    return rows[(rows["t"] > 0) & (rows["t"] < 1)] if len(rows) else rows


def _largest_t(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["t"] == rows["t"].max()]


# --------------------------------------------------------------------------------------------- 12. lost, or only hidden


def lost_for_good(study: Study) -> Iterator[Evidence]:
    """What decoders do not read: how much of it the model's own inverse gets back, at which noise, and how exactly."""
    rows = study.rows(NOISE, "psnr")
    rows = fullest_run(rows[rows["sigma"].notna()] if len(rows) else rows)
    for target, of in _by_target(rows):
        of = of[of["tap"] == list(deep_taps(of).values())[-1]].sort_values("sigma")
        for noise in dict.fromkeys(of["noise"]):
            at = of[of["noise"] == noise]
            decoders = at[at["inverse"].isin(LEADING_FAMILIES)]
            found = estimate_of(_has(at, inverse="map"))
            if found is None or decoders.empty:
                continue
            name = decoders.loc[decoders["value"].idxmax(), "inverse"]
            best = estimate_of(decoders[decoders["inverse"] == name])
            behind = difference(best, found)
            if behind is not None and best is not None:
                # Seeds are those of the decoder's training: MAP is searched, from the picture of one of them.
                said = f"PSNR at {at['tap'].iloc[0]}, {noise}: best decoder ({name}) minus MAP"
                yield Evidence(target, said, "dB", replace(behind, seeds=best.seeds), border=-HIDDEN)
    rows = fullest_run(_has(study.rows(EXACT, "back"), study="whole", inverse="exact"))
    for target in _targets(rows):
        of = rows[rows["target"] == target].sort_values("depth")
        for tap in dict.fromkeys(of["tap"]):
            found = estimate_of(of[of["tap"] == tap])
            if found is not None:
                said = f"images not back to round-off from {tap}, all half-steps solved together"
                yield Evidence(target, said, "share", flipped(found, 1), trained=False, border=HALF_OF_IT)
