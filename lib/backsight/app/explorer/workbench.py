"""What a view shows, without any widget: a picture, what a layer holds of it, and what an inverse makes of that."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import backsight
from backsight.app.explorer.view import View
from backsight.app.pictures import Picture, as_png, open_picture
from backsight.data.images import open_images, tensor
from backsight.errors import BacksightError, nearest
from backsight.inverses.families import Reconstruct, kept_inverses
from backsight.inverses.module import Inverses
from backsight.measures.hue import hue_scores, object_chroma
from backsight.measures.pixels import psnr, ssim
from backsight.representation import Grid, Predictions, Representation, Tokens
from backsight.studies.recolour import recoloured
from backsight.targets import Target, load_target

REFERENCE_IMAGES = 16  # scenes that tell a representation's usual spread and mean
CERTAIN = 0.5  # probability from which a query's box is drawn
ENLARGED = 256  # pixels a side of a picture that is sent or exported: enough that it is of use outside the page
Depths = dict[str, tuple[Tensor, dict[str, np.ndarray]]]  # {tap: (reconstruction (1, 3, H, W), its `hue_scores` (1,))}


class Answer(NamedTuple):
    """What a model says of a picture, in words, and the boxes of which a detector is certain.

    A box: query, label, and x, y, w, h, centre and size in [0, 1] of the picture.
    """

    words: str
    boxes: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Seen:
    """A view, computed. picture: as the target is given it; its mask is all of it where no object is known.

    reconstruction: (1, 3, H, W) in [0, 1]; answers: to the picture and to the reconstruction; measures: psnr (dB),
    ssim, and of the colour inside the mask hue_error (degrees) and share_grey (1: it comes back grey); remarks: what of
    the view cannot be done here, and why.
    """

    view: View
    picture: Picture
    reconstruction: Tensor
    answers: tuple[Answer, Answer]
    measures: Mapping[str, float]
    remarks: Sequence[str]

    @property
    def image(self) -> Tensor:
        """(1, 3, H, W) in [0, 1]."""
        return self.picture.image

    @property
    def difference(self) -> Tensor:
        """(1, 3, H, W), absolute."""
        return (self.image - self.reconstruction).abs()


@dataclass(frozen=True)
class Bench:
    """A target and its inverses by family."""

    target: Target
    families: Mapping[str, Inverses]

    @cached_property
    def usual(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{tap: each channel's standard deviation, the mean representation} over scenes, when it is first asked for."""
        scenes = tensor(open_images("scenes", "validation", self.target, REFERENCE_IMAGES))
        return {
            tap: (held.values[:, getattr(held, "prefix", 0) :].flatten(0, 1).std(0), held.values.mean(0, keepdim=True))
            for tap, held in self.target.record(scenes).items()
        }

    @property
    def taps(self) -> list[str]:
        """Those that some inverse reads."""
        return [tap for tap in self.target.taps if any(tap in inverses for inverses in self.families.values())]

    @property
    def grid(self) -> Grid:
        """(rows, columns) of patches on the picture."""
        (height, width), (down, across) = self.target.image_size, self.target.reduction
        return max(1, height // down), max(1, width // across)


class Workbench:
    """Targets and inverses that are loaded once, and views of them."""

    def __init__(self) -> None:
        self.bench = lru_cache(4)(self._bench)
        self._recorded = lru_cache(32)(self._record)
        self._depths = lru_cache(16)(self._every_depth)

    def _bench(self, name: str) -> Bench:
        return Bench(target := load_target(name), kept_inverses(target))

    def _record(self, view: View) -> tuple[Picture, Mapping[str, Representation]]:
        bench = self.bench(view.target)
        picture = given(view, bench.target.image_size, bench.grid, bench.target.preprocessing.mean)
        return picture, bench.target.record(picture.image)

    def completed(self, view: View) -> View:
        """The view with its family and tap named. Raises BacksightError where it names what is not there."""
        bench = self.bench(view.target)
        view = replace(view, tap=view.tap or bench.taps[0], family=view.family or [*bench.families][-1])
        inverses: Mapping[str, Reconstruct] = bench.families.get(view.family, {})
        reader = view.inverse_tap or view.tap
        for name, known in ((view.tap, bench.taps), (view.family, bench.families), (reader, inverses)):
            if name not in known:
                raise BacksightError(f"{view.target} has no {name!r} with an inverse; {nearest(name, list(known))}.")
        return view

    def see(self, view: View) -> Seen:
        """Compute the view. Raises BacksightError where it names what is not there or does not fit."""
        view, target = self.completed(view), self.bench(view.target).target
        # The latest pictures' passes are kept, so that a move in depth computes none.
        picture, recorded = self._recorded(_of_picture(view))
        representation, remarks = self._changed(view, recorded[view.tap])
        with torch.no_grad():
            made = self.bench(view.target).families[view.family][view.inverse_tap or view.tap](representation)
        colours = (object_chroma(image, picture.mask) for image in (picture.image, made))
        scores: dict[str, Any] = {"psnr": psnr(picture.image, made), "ssim": ssim(picture.image, made)}
        scores |= hue_scores(*colours)
        measures = {name: float(value[0]) for name, value in scores.items()}
        return Seen(view, picture, made, (answer(target, picture.image), answer(target, made)), measures, remarks)

    def depths(self, view: View) -> Depths:
        """What comes back from every tap, read by its own inverse of the view's family."""
        return self._depths(replace(self.completed(view), tap="", inverse_tap=""))

    def _every_depth(self, view: View) -> Depths:
        picture, recorded = self._recorded(_of_picture(view))
        colours, inverses = object_chroma(picture.image, picture.mask), self.bench(view.target).families[view.family]
        depths: Depths = {}
        for tap in (tap for tap in recorded if tap in inverses):
            with torch.no_grad():
                made = inverses[tap](self._changed(replace(view, tap=tap), recorded[tap])[0])
            depths[tap] = made, hue_scores(colours, object_chroma(made, picture.mask))
        return depths

    def _changed(self, view: View, representation: Representation) -> tuple[Representation, list[str]]:
        """The tap's representation with the view's swap, removal and noise, and what of these cannot be done here."""
        bench, remarks, values = self.bench(view.target), [], representation.values.clone()
        if view.swapped and isinstance(representation, Tokens):
            plain = View(view.target, picture=view.swap_picture)
            chosen = token_numbers(view.swapped, bench.grid, representation)
            values[:, chosen] = self._recorded(_of_picture(plain))[1][view.tap].values[:, chosen]
        elif view.swapped:
            remarks.append(
                f"{view.tap} holds object queries, which have no place: tokens are swapped at earlier layers."
            )
        if view.removed and isinstance(representation, Tokens):
            remarks.append(f"{view.tap} comes before the object queries: removing one changes later layers only.")
        elif view.removed:
            neutral = bench.usual[view.tap][1].clone()
            if isinstance(representation, Predictions):  # the mean box, and no class
                neutral[..., : representation.logits.shape[2]] = 0
                if representation.activation == "softmax":
                    neutral[..., representation.logits.shape[2] - 1] = 1
            removed = [query for query in view.removed if query < values.shape[1]]
            values[:, removed] = neutral[:, removed]
        if view.noise:
            generator = torch.Generator().manual_seed(0)
            values = values + view.noise * bench.usual[view.tap][0] * torch.randn(values.shape, generator=generator)
            values = values.clamp(0, 1) if isinstance(representation, Predictions) else values
        return representation.replace(values), remarks

    def png(self, view: View) -> bytes:
        """Input, reconstruction and difference side by side, as a file with the view and what it measures inside."""
        seen, notes = self.see(view), PngInfo()
        texts = {
            "backsight": json.dumps(asdict(view)),
            "measures": json.dumps({name: round(v, 4) if v == v else None for name, v in seen.measures.items()}),
            "weights": self.bench(view.target).target.weights_hash,
            "version": backsight.__version__,
        }
        for name, text in texts.items():
            notes.add_text(name, text)
        return as_png(torch.cat([seen.image, seen.reconstruction, seen.difference], 3)[0], ENLARGED, pnginfo=notes)


def _of_picture(view: View) -> View:
    """What of the view the picture depends on."""
    return replace(view, family="", tap="", noise=0.0, swapped=(), swap_picture="", inverse_tap="", removed=())


def given(view: View, size: tuple[int, int], grid: Grid, zero: Sequence[float]) -> Picture:
    """The picture as a target is given it: with the view's colours, its erased and its shuffled patches.

    A scene's object is rendered anew in its hue, which is exact; all else changes pixel by pixel. zero: the colour of
    erased patches.
    """
    is_exact = view.region == "object" and view.picture.startswith("scene ")
    image, mask, words = open_picture(view.picture, size, view.hue_shift if is_exact else 0.0)
    where = mask if view.region == "object" else torch.ones_like(mask)
    turn = 0.0 if is_exact else view.hue_shift
    if turn or view.saturation != 1:
        image = recoloured(image, where, turn, view.saturation)
    (rows, columns), changed = grid, image.clone()
    height, width = size[0] // rows, size[1] // columns  # what is left at the rims belongs to no patch
    before, after = (
        of[..., : rows * height, : columns * width].unflatten(-1, (columns, width)).unflatten(-3, (rows, height))
        for of in (image, changed)
    )  # (1, 3, row, height, column, width): `after` is a view of `changed`

    shuffled = np.array([cell for cell in view.shuffled if cell < rows * columns], int)
    order = np.random.default_rng(len(shuffled)).permutation(shuffled)
    (to_row, to_column), (row, column) = divmod(order, columns), divmod(np.roll(order, 1), columns)
    after[:, :, to_row, :, to_column] = before[:, :, row, :, column]  # a random circle: none keeps its place
    row, column = divmod(np.array([cell for cell in view.erased if cell < rows * columns], int), columns)
    after[:, :, row, :, column] = torch.tensor(zero).view(3, 1, 1).clamp(0, 1)
    return Picture(changed, mask, words)


def answer(target: Target, image: Tensor) -> Answer:
    """The target's answer to one picture (1, 3, H, W)."""
    if not target.answers:
        return Answer("nothing: it has no classes")
    output, classes = target(image), target.classes or ()

    def named(index: int, probability: float) -> str:
        return f"{classes[index] if index < len(classes) else f'class {index}'} {probability:.0%}"

    if isinstance(output, Predictions):
        probabilities, labels = output.objects[0].max(-1)
        best, queries = probabilities.sort(descending=True, stable=True)
        boxes: list[dict[str, Any]] = [
            {"query": query, "label": named(int(labels[query]), float(probabilities[query]))}
            | dict(zip("xywh", output.boxes[0, query].tolist(), strict=True))
            for query in queries[best > CERTAIN][:20].tolist()
        ]
        return Answer(", ".join(box["label"] for box in boxes) or "no object", boxes)
    values, indices = output[0].softmax(0).topk(min(5, output.shape[1]))
    return Answer(", ".join(map(named, indices.tolist(), values.tolist())))


def token_numbers(cells: Sequence[int], grid: Grid, tokens: Tokens) -> list[int]:
    """The tokens that lie on these patches of the picture's grid, on every level of the tap."""
    numbers, start = [], tokens.prefix
    for level in tokens.grids:
        numbers += [start + cell for cell in carried(cells, grid, level)]
        start += level[0] * level[1]
    return numbers


def carried(cells: Sequence[int], before: Grid, after: Grid) -> tuple[int, ...]:
    """Patches of one grid as those of another that cover the same places: every patch that shares area with one."""
    chosen = torch.zeros(before[0] * before[1])
    chosen[[cell for cell in cells if cell < len(chosen)]] = 1
    return tuple(F.adaptive_max_pool2d(chosen.view(1, *before), after).flatten().nonzero().flatten().tolist())
