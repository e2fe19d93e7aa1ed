"""What a model is made of, as one observed pass shows it: its blocks, and the tensors between that are worth a tap.

Those are cuts that hold a picture: what enters the first block, every block and end of a stage, and what follows the
last block. Blocks are told by their place: numbered modules with modules of their own. Of a model without any, it is
all cuts, one of those in a row on the same grid.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from backsight.targets.hooks import Found

NUMBERED = re.compile(r"(\w*layer_)?\d+")
NUMBERED_AT_THE_TOP = re.compile(r"(?i)(block|stage|layer|level|cell|mixed)\w*\d\w*")
NO_BLOCKS = re.compile(r"(?i)stem|embed|downsample|head|pool|classifier")  # parts of these are no blocks
DEEPEST = 2  # numbers in a block's path: of its stage and its own


@dataclass(frozen=True)
class Outline:
    """taps: in forward order, one name for each tensor; blocks: when each ends; final: the last tap lies behind all."""

    taps: list[Found]
    blocks: dict[str, float]
    final: bool = False


def outline(model: nn.Module, found: Sequence[Found], featured: Collection[str] = ()) -> Outline:
    """featured: modules that the model itself names as the ends of stages, under which they are known."""
    outputs = _outputs(found)
    ends = {one.place.module: one.order for one in found if one.place.side == "output"}
    parts = {path for path in ends if _is_part(model, path)}
    blocks = {path for path in parts & outputs.keys() if not _inside(parts & outputs.keys(), path)}
    # Parts that are no cuts, as CaiT's class attention beside the tokens: no taps, but they count as depth.
    beside = {p for p in parts - outputs.keys() if not _inside(blocks, p) and not is_inside(p, blocks)}
    counted = {path: ends[path] for path in blocks | {path for path in beside if not is_inside(path, beside)}}
    featured = outputs.keys() & featured
    units = blocks | featured | {path for path in outputs if 0 < _inside(blocks, path) < len(blocks)}
    inner = [ends[path] for path in ends if path in (blocks or featured) or is_inside(path, blocks or featured)]
    if not inner:
        return Outline(_without_blocks(found), counted)
    entering = [tensors[0].order for tensors in outputs.values() if tensors[0].order < min(inner)][-1:]
    groups: dict[tuple[int, ...], list[str]] = {}  # the modules that return the same tensors
    for path, tensors in outputs.items():
        groups.setdefault(tuple(one.same for one in tensors), []).append(path)

    taps, last, final = list[Found](), -1.0, False
    for paths in groups.values():
        orders, unit = [outputs[path][0].order for path in paths], not units.isdisjoint(paths)
        behind = orders[0] > max(inner) and not unit
        if not (unit or behind or any(order in entering for order in orders)):
            continue
        path = min(paths, key=lambda path: (path not in featured, path not in blocks, path.count(".")))
        tensor = next((one for one in outputs[path] if one.axes is not None), None)
        if tensor is None or (behind and not tensor.is_picture):
            continue
        ended = any(last < end <= orders[-1] for end in counted.values())
        if behind and final:  # of several pictures behind the last block the last: it is pooled
            taps.pop()
        elif taps and not ended and _permutes(found, taps[-1], tensor):
            # A stage that only permutes what its last block returns: the model's own name is kept.
            if taps[-1].place.module in featured and path not in featured:
                continue
            taps.pop()
        taps.append(tensor)
        last, final = orders[-1], behind
    return Outline(taps, counted, final)


def _outputs(found: Sequence[Found]) -> dict[str, list[Found]]:
    """For each module that runs once: the first tensor that is a cut, or, where only all together are one, all."""
    by_module: dict[str, list[Found]] = {}
    for one in found:
        if one.place.side == "output" and one.place.module:  # what the model itself returns is no representation
            by_module.setdefault(one.place.module, []).append(one)
    outputs = {}
    for path, returned in by_module.items():
        single = next((one.same for one in returned if one.cut), None)
        together = [o for o in returned if (o.with_companions and o.used if single is None else o.same == single)]
        if together and not any(one.place.call for one in returned):
            outputs[path] = [*{one.same: one for one in reversed(together)}.values()][::-1]
    return outputs


def _without_blocks(found: Sequence[Found]) -> list[Found]:
    """What modules are given counts where no module with parts returns a cut."""
    cuts = [one for one in found if one.cut and one.is_picture and one.place.module]
    if any(not one.leaf and one.place.side == "output" for one in cuts):
        cuts = [one for one in cuts if one.place.side == "output"]
    outermost: dict[int, Found] = {}
    for one in sorted(cuts, key=lambda one: one.place.module.count(".")):
        outermost.setdefault(one.same, one)
    cuts = sorted(outermost.values(), key=lambda one: one.order)
    steps = []  # of several: a convolution, then its norm …
    for one, after in pairwise(cuts):
        step = one.leaf and (after.leaf or is_inside(one.place.module, [after.place.module]))
        same = one.axes and after.axes and one.axes.grid == after.axes.grid
        steps.append(step and same and one.place.side == "output")
    return [one for one, step in zip(cuts, [*steps, False], strict=False) if not step]


def _permutes(found: Sequence[Found], before: Found, after: Found) -> bool:
    """The same tokens on other axes: no module but those around it has run since."""
    between = {one.place.module for one in found if before.order < one.order <= after.order and one.same != before.same}
    one, two = before.axes, after.axes
    if one is None or two is None or (one.grid, one.prefix, before.channels) != (two.grid, two.prefix, after.channels):
        return False
    moved = (one, before.shape) != (two, after.shape)
    return moved and all(is_inside(before.place.module, [path]) for path in between)


def _is_part(model: nn.Module, path: str) -> bool:
    """Is it a block by its place: a numbered one among others, with modules of its own, outside of stem and head?

    Not one that lies deeper than a stage's blocks, nor one between plain layers, which make a block with it.
    """
    first, *inner = path.split(".")
    top = bool(NUMBERED_AT_THE_TOP.fullmatch(first))
    if not path or NO_BLOCKS.search(path) or not any(model.get_submodule(path).children()):
        return False
    if not inner:
        return top
    container = model.get_submodule(path.rpartition(".")[0])
    if not NUMBERED.fullmatch(inner[-1]) or not isinstance(container, (nn.ModuleList, nn.Sequential)):
        return False
    siblings = [any(each.children()) for each in container.children()]
    return top + sum(each.isdigit() for each in inner) <= DEEPEST and 2 * sum(siblings) >= len(siblings)


def is_inside(path: str, others: Collection[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)


def _inside(others: Collection[str], path: str) -> int:
    """How many of them lie inside."""
    return sum(other.startswith(f"{path}.") for other in others)
