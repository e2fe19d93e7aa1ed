"""Targets: frozen models, their preprocessing and their taps.

    target = load_target("scenes-vit")
    representations = target.record(images)          # {tap: Representation}
    target.from_tap("blocks.2", representations["blocks.2"])

A new family of models is one file that implements `Target`, and one line in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Sequence

from backsight.errors import BacksightError, nearest
from backsight.targets import (
    conditional_detr,
    dab_detr,
    deformable_detr,
    detr,
    mask2former,
    rt_detr,
    sources,
    timm_models,
    yolos,
)
from backsight.targets.base import PIXELS, TAP_SETS, Family, Preprocessing, Size, Stage, Target
from backsight.targets.module import ModuleTarget, module_target, suggest_taps
from backsight.targets.sources import Source

__all__ = [
    "PIXELS",
    "TAP_SETS",
    "ModuleTarget",
    "Preprocessing",
    "Stage",
    "Target",
    "check_image_size",
    "check_taps",
    "check_target",
    "list_targets",
    "load_target",
    "module_target",
    "suggest_taps",
]

FAMILIES: tuple[Family, ...] = (
    timm_models.FAMILY,
    detr.FAMILY,
    conditional_detr.FAMILY,
    dab_detr.FAMILY,
    deformable_detr.FAMILY,
    rt_detr.FAMILY,
    yolos.FAMILY,
    mask2former.FAMILY,
)


def load_target(name: str, taps: str | Sequence[str] = "blocks", pretrained: bool = True, seed: int = 0) -> Target:
    """A frozen target with its own preprocessing.

    name: a shipped target ("scenes-vit", "scenes-detr"), a timm name ("vit_base_patch16_224", "hf_hub:owner/name"),
    a transformers id ("facebook/detr-resnet-50"), a local folder or checkpoint of either, or
    "timm_name@path/to/checkpoint"; taps: "blocks" (the default), "components", "fine" or tap names;
    pretrained=False: random weights from `seed`, recorded as weights="random".
    Raises BacksightError, with nearest names, on an unknown name or tap, and where weights are missing or corrupt.
    """
    source, family = _find(name)
    target = family.load(source, pretrained, seed)
    return target if taps is None else target.select(taps)


def list_targets() -> list[dict[str, str]]:
    """What can be inverted here and now: name, kind, status ("ready", "to fetch" or "missing") and what it needs.

    Any other timm name, DETR id, folder or checkpoint works too; these are the usual ones.
    """
    shipped = sources.shipped_names()
    rows = [_row(name, _find(name)[1].kind, "ready", "") for name in shipped]
    rows += [_row(n, "shipped", "missing", "notebooks/01_targets.ipynb") for n in sources.SHIPPED if n not in shipped]
    for family in FAMILIES:
        for name, repository in family.listed().items():
            ready = sources.is_local(name, repository)
            needs = "" if ready else f"the weights of {repository}, once"
            rows.append(_row(name, family.kind, "ready" if ready else "to fetch", needs))
    return rows


def _row(name: str, kind: str, status: str, needs: str) -> dict[str, str]:
    return {"name": name, "kind": kind, "status": status, "needs": needs}


def check_target(name: str) -> None:
    """Raise BacksightError if `name` cannot be loaded here, without building the model or reading its weights.

    Finds unknown names, missing or corrupt files, shapes that do not fit, weights that cannot be fetched.
    """
    source, family = _find(name)
    family.check(source)


def check_taps(target_name: str, taps: str | Sequence[str]) -> None:
    """Raise BacksightError, with the nearest names, on a tap that the target does not have."""
    source, family = _find(target_name)
    family.skeleton(source).resolve_taps(taps)


def check_image_size(target_name: str, size: int | Size) -> None:
    """Raise BacksightError, with the sizes allowed, if the target cannot take images of this size (side or (H, W))."""
    source, family = _find(target_name)
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise BacksightError(f"An image size is a side or (height, width) in pixels, not {size!r}.")
    family.skeleton(source).check_size((pair[0], pair[1]))


def _find(name: str) -> tuple[Source, Family]:
    source = sources.resolve(name)
    for family in FAMILIES:
        if family.claims(source):
            return source, family
    if source.config:
        families = ", ".join(family.name for family in FAMILIES)
        raise BacksightError(f"The config.json of {name} describes none of these families: {families}; correct it.")
    known = [*sources.SHIPPED, *(each for family in FAMILIES for each in family.names())]
    raise BacksightError(f"There is no target {name!r}; {nearest(name, known)} (`backsight targets` lists them).")
