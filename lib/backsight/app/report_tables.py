"""The page's tables: quality by depth of each target, the same at a glance, and the scores of the models themselves.

Every number knows the lines of the files that it is made of (report_sources).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd

from backsight.app.report_sources import Source, Traced, sources_of
from backsight.errors import BacksightError
from backsight.plots.cards import card_scores
from backsight.plots.style import (
    INVERSE_NAMES,
    MEASURE_NAMES,
    family_colour,
    inverse_order,
    over_seeds,
    taps_in_order,
    target_colour,
)
from backsight.tables.read import span

# Tables are read from the first of these notebooks that measured a target; the rest stays in metrics.csv.
TABLE_NOTEBOOKS = ("03_quality", "02_train_inverse", "00_quickstart")
NULL_FAMILIES = ("modular", "linear", "direct")  # whose nulls a table shows: the first that is there
TABLE_MEASURES: Mapping[str, int] = {"psnr": 1, "psnr_objects": 1, "ssim": 3, "r2": 3}  # decimals
DATASET_ORDER = ("scenes", "photographs")
GROUP = ["weights", "dataset", "split"]
CARD_COLUMNS = ("rule", "measure", "classes", "value", "low", "high", "n")
CARD_CLASSES = {"all": "all classes", "canonical": "classes with a typical hue", "colour-free": "colour-free classes"}


@dataclass(frozen=True)
class Cell(Traced):
    """One number of a table; share: 0 to 1, its place between the mean image and the best."""

    best: bool = False
    share: float | None = None


@dataclass(frozen=True)
class Column:
    title: str
    colour: str
    is_null: bool


@dataclass(frozen=True)
class Table:
    """A measure by depth (rows) and inverse (columns) of one target on one data set."""

    title: str
    facts: str
    columns: Sequence[Column]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    has_difference: bool


@dataclass(frozen=True)
class Group:
    """What one table or glance is made of: the depth rows of one target on one data set and split."""

    target: str
    weights: str
    dataset: str
    split: str
    rows: pd.DataFrame


def depth_groups(metrics: pd.DataFrame, notebooks: Mapping[str, str], target: str) -> list[Group]:
    """The rows of a target that have a tap, by weights, data set and split; test splits and scenes first.

    notebooks: {run: notebook}. Only rows of the first of TABLE_NOTEBOOKS that measured this target are taken. Where
    two runs give the same number of the same seed, the run that comes last by name counts.
    """
    measured = metrics["measure"].isin(list(TABLE_MEASURES))
    rows = metrics[(metrics["target"] == target) & metrics["tap"].notna() & measured]
    made_by = rows["run"].map(notebooks)
    chosen = next((name for name in TABLE_NOTEBOOKS if (made_by == name).any()), None)
    if chosen is None:
        return []
    rows = _one_null_each(rows[made_by == chosen])
    rows[GROUP] = rows[GROUP].astype(object).fillna("unnamed").astype(str)
    rows = rows.sort_values("run", kind="stable")
    rows = rows.drop_duplicates([*GROUP, "tap", "inverse", "measure", "seed"], keep="last")
    groups = [
        Group(target, str(weights), str(dataset), str(split), part)
        for (weights, dataset, split), part in rows.groupby(GROUP, sort=False)
    ]
    return sorted(groups, key=lambda g: (g.split != "test", dataset_rank(g.dataset), g.dataset, g.weights))


def _one_null_each(rows: pd.DataFrame) -> pd.DataFrame:
    """A copy with the nulls of one inverse family, the first of NULL_FAMILIES that has them, where several have."""
    if "family" not in rows:
        return rows.copy()
    families = rows["family"].where(rows["inverse"].map(is_null))
    rank = families.map({family: place for place, family in enumerate(NULL_FAMILIES)}).fillna(len(NULL_FAMILIES))
    keys = [rows[name] for name in (*GROUP, "tap", "inverse", "measure")]
    least = rank.groupby(keys, dropna=False).transform("min")
    return rows[families.isna() | (rank == least)].copy()


def dataset_rank(dataset: str) -> int:
    return DATASET_ORDER.index(dataset) if dataset in DATASET_ORDER else len(DATASET_ORDER)


def is_null(inverse: str) -> bool:
    return inverse.startswith("null_")


def depth_tables(group: Group) -> list[Table]:
    """One table for each measure that the group has."""
    return [
        _depth_table(group, measure, rows)
        for measure in TABLE_MEASURES
        if len(rows := group.rows[group.rows["measure"] == measure])
    ]


Numbers = dict[tuple[str, str], tuple[float, float, float, tuple[Source, ...]]]


def _numbers(rows: pd.DataFrame) -> Numbers:
    """{(tap, inverse): (value, low, high, sources)} over seeds, of rows of one measure; those that have a value."""
    sources = {key: sources_of(part) for key, part in rows.groupby(["tap", "inverse"], sort=False)}
    table = over_seeds(rows).dropna(subset="value")
    columns = table[["tap", "inverse", "value", "low", "high"]].itertuples(index=False, name=None)
    return {
        (str(tap), str(inverse)): (value, low, high, sources[tap, inverse])
        for tap, inverse, value, low, high in columns
    }


def _depth_table(group: Group, measure: str, rows: pd.DataFrame) -> Table:
    decimals = TABLE_MEASURES[measure]
    inverses = inverse_order(list(rows["inverse"]))
    families = [name for name in inverses if not is_null(name)]
    nulls = [name for name in inverses if is_null(name)]
    numbers = _numbers(rows)
    floor = min((number[0] for (_, name), number in numbers.items() if name == "null_mean"), default=0.0)
    ceiling = max((number[0] for (_, name), number in numbers.items() if name in families), default=floor)
    has_difference = measure.startswith("psnr") and {"modular", "direct"} <= set(families)

    def cell(tap: str, inverse: str) -> Cell:
        if (tap, inverse) not in numbers:
            return Cell("–")
        value, low, high, places = numbers[tap, inverse]
        text, interval = written(value, decimals), _interval(low, high, decimals)
        if inverse in nulls:
            return Cell(text, interval, places)
        best = max(numbers[tap, name][0] for name in families if (tap, name) in numbers)
        share = min(max((value - floor) / (ceiling - floor), 0.0), 1.0) if ceiling > floor else None
        is_best = len(families) > 1 and round(value, decimals) == round(best, decimals)
        return Cell(text, interval, places, best=is_best, share=share)

    def difference(tap: str) -> Cell:
        if (tap, "modular") not in numbers or (tap, "direct") not in numbers:
            return Cell("–")
        chain, direct = numbers[tap, "modular"], numbers[tap, "direct"]
        return Cell(written(chain[0] - direct[0], decimals, sign=True), sources=chain[3], minus=direct[3])

    columns = [Column(INVERSE_NAMES.get(name, name), family_colour(name), False) for name in families]
    columns += [Column("chain minus direct (dB)", "", False)] if has_difference else []
    columns += [Column(INVERSE_NAMES.get(name, name).removeprefix("null: "), "", True) for name in nulls]
    body = []
    for tap in taps_in_order(rows):
        middle = [difference(tap)] if has_difference else []
        body.append((tap, [*(cell(tap, name) for name in families), *middle, *(cell(tap, name) for name in nulls)]))
    return Table(MEASURE_NAMES.get(measure, measure), _facts(group, rows), columns, body, has_difference)


def _facts(group: Group, rows: pd.DataFrame) -> str:
    images = "image" if rows["n"].max() == 1 else "images"
    if "seeds" in rows and rows["seeds"].notna().any():
        seeds = plural(int(rows["seeds"].max()), "training seed")
    else:
        numbers = sorted(int(seed) for seed in rows["seed"].dropna().unique())
        seeds = f"{plural(len(numbers), 'seed')} ({', '.join(map(str, numbers))})"
    return (
        f"n = {span(rows['n'])} {images}, {seeds}, data set {group.dataset}, split {group.split}, "
        f"{group.weights} weights"
    )


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def written(value: float, decimals: int, sign: bool = False) -> str:
    value = round(float(value), decimals) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{value:{'+' if sign and value else ''}.{decimals}f}".replace("-", "−")


def _interval(low: float, high: float, decimals: int) -> str:
    return "" if math.isnan(low) else f"{written(low, decimals)} to {written(high, decimals)}"


def glance(group: Group) -> dict[str, Any] | None:
    """The best family's PSNR at the first and last tap, and the step that costs most of it; None without any PSNR."""
    rows = group.rows[group.rows["measure"] == "psnr"]
    numbers = _numbers(rows)
    best: dict[str, tuple[float, str, tuple[Source, ...]]] = {}  # value, family, sources
    for tap in taps_in_order(rows):
        known = [(n[0], family, n[3]) for (at, family), n in numbers.items() if at == tap and not is_null(family)]
        if known:
            best[tap] = max(known, key=lambda number: number[:2])
    if not best:
        return None
    taps = list(best)
    first, last = best[taps[0]], best[taps[-1]]
    step, step_value = "–", Traced("")
    if steps := [(best[after][0] - best[before][0], before, after) for before, after in pairwise(taps)]:
        change, before, after = min(steps)
        step = f"{before} → {after}"
        step_value = Traced(written(change, 1, sign=True), sources=best[after][2], minus=best[before][2])
    means = rows[(rows["inverse"] == "null_mean") & rows["value"].notna()]
    mean_image = Traced("–")
    if len(means):
        mean_image = Traced(written(means["value"].mean(), 1), sources=sources_of(means))
    return {
        "target": group.target,
        "colour": target_colour(group.target),
        "data": f"{group.dataset}, {group.split}",
        "first": taps[0],
        "first_value": Traced(written(first[0], 1), sources=first[2]),
        "last": taps[-1],
        "last_value": Traced(written(last[0], 1), sources=last[2]),
        "last_family": INVERSE_NAMES.get(last[1], last[1]),
        "step": step,
        "step_value": step_value,
        "mean_image": mean_image,
    }


# ------------------------------------------------------------------------------------------------------- model cards


def card_name(target: str) -> str:
    return f"data/weights/{target}/card.json"


def card_tables(card: Mapping[str, Any], target: str, measured: pd.DataFrame | None) -> dict[str, Any] | None:
    """The scores of a model itself as rows (classes, measure, typical hue, any hue): all classes, and class by class.

    measured: the rows of a run that scored it; without them the scores of the model's card.
    """
    if measured is None:
        try:
            scores = card_scores(card)
        except BacksightError:
            return None
        places = [(Source(card_name(target), place),) for place in range(1, len(scores) + 1)]
    else:
        scores = measured[measured["value"].notna()].reset_index(drop=True)
        places = [(source,) for source in sources_of(scores)]
    scores = scores.assign(place=pd.Series(places, index=scores.index, dtype=object))
    overall: list[dict[str, Any]] = []
    single: list[dict[str, Any]] = []
    for (classes, measure), part in scores.groupby(["classes", "measure"], sort=False):
        title = CARD_CLASSES.get(str(classes), str(classes))
        row: dict[str, Any] = {"classes": title, "measure": MEASURE_NAMES.get(str(measure), str(measure))}
        for rule in ("mixed", "uniform"):
            row[rule] = Traced("–")
            for score in part[part["rule"] == rule].head(1).dropna(subset="value").to_dict("records"):
                interval = _interval(score["low"], score["high"], 3)
                row[rule] = Traced(written(score["value"], 3), interval, score["place"])
        (overall if classes in CARD_CLASSES else single).append(row)
    counts = scores.loc[scores["classes"] == "all", "n"].dropna()
    return {"overall": overall, "single": single, "n": span(counts) if len(counts) else "unknown"}


def card_facts(card: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the card says about the training, as far as it says it."""
    if parameters := card.get("parameters"):
        yield "size", f"{parameters / 1e6:.2f} million parameters"
    if data := card.get("data"):
        yield "trained on", f"{data.get('dataset')}, split {data.get('split')}"
    if recipe := card.get("recipe"):
        steps = [f"{recipe['steps']:,} steps"] if recipe.get("steps") else []
        yield "training", ", ".join([*steps, f"seed {recipe.get('seed')}"])
    if minutes := card.get("minutes"):
        yield "minutes", ", ".join(f"{name} {value}" for name, value in minutes.items())
