"""What a view shows, without any widget: a picture, what a layer holds of it, and what an inverse makes of that."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import backsight
from backsight.app.explorer.view import View
from backsight.app.pictures import Picture, as_png, open_picture
from backsight.data.images import batches, open_images
from backsight.errors import BacksightError, nearest
from backsight.inverses.families import Reconstruct, kept_inverses
from backsight.measures.hue import hue_scores, object_chroma
from backsight.measures.pixels import psnr, ssim
from backsight.representation import Grid, Predictions, Representation, Tokens
from backsight.studies.recolour import recoloured
from backsight.targets import Target, load_target

REFERENCE_IMAGES = 64  # scenes that tell a representation's usual spread and mean
CERTAIN = 0.5  # probability from which a query's box is drawn
ENLARGED = 256  # pixels a side of a picture that is sent or exported: enough that it is of use outside the page


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
    """A target and its inverses {family: {tap: inverse}}; each tap's standard deviation and mean over scenes."""

    target: Target
    families: Mapping[str, Mapping[str, Reconstruct]]
    spread: Mapping[str, Tensor]
    mean: Mapping[str, Tensor]

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
    """Targets and inverses that are loaded once, and views of them.

    fit_images: scenes that linear inverses are fitted on where a target has none.
    """

    def __init__(self, fit_images: int = 2000) -> None:
        self.fit_images = fit_images
        self.bench = lru_cache(4)(self._bench)
        self._recorded = lru_cache(32)(self._record)
        self._depths = lru_cache(32)(self._every_depth)

    def _bench(self, name: str) -> Bench:
        target, spread, mean = load_target(name), {}, {}
        scenes = open_images("scenes", "validation", target, REFERENCE_IMAGES)
        for tap, representation in target.record(torch.cat(list(batches(scenes, REFERENCE_IMAGES)))).items():
            spread[tap] = representation.values[:, getattr(representation, "prefix", 0) :].flatten(0, 1).std(0)
            mean[tap] = representation.values.mean(0, keepdim=True)
        return Bench(target, kept_inverses(target, "scenes", self.fit_images), spread, mean)

    def _record(self, view: View) -> tuple[Picture, Mapping[str, Representation]]:
        bench = self.bench(view.target)
        picture = given(view, bench.target.image_size, bench.grid, bench.target.preprocessing.mean)
        return picture, bench.target.record(picture.image)

    def see(self, view: View) -> Seen:
        """Compute the view. Raises BacksightError where it names what is not there or does not fit."""
        bench = self.bench(view.target)
        view = replace(view, tap=view.tap or bench.taps[0])
        reader, inverses = view.inverse_tap or view.tap, bench.families.get(view.family, {})
        for name, known in ((view.tap, bench.taps), (view.family, bench.families), (reader, inverses)):
            if name not in known:
                raise BacksightError(f"{view.target} has no {name!r} with an inverse; {nearest(name, list(known))}.")
        # The latest pictures' passes are kept, so that a move in depth computes none.
        picture, recorded = self._recorded(_of_picture(view))
        representation, remarks = self._changed(view, recorded[view.tap])
        with torch.no_grad():
            made = inverses[reader](representation)
            answers = answer(bench.target, picture.image), answer(bench.target, made)
        colours = (object_chroma(image, picture.mask) for image in (picture.image, made))
        scores: dict[str, Any] = {"psnr": psnr(picture.image, made), "ssim": ssim(picture.image, made)}
        scores |= hue_scores(*colours)
        measures = {name: float(value[0]) for name, value in scores.items()}
        return Seen(view, picture, made, answers, measures, remarks)

    def depths(self, view: View, *hues: float) -> dict[str, tuple[Tensor, dict[str, np.ndarray]]]:
        """{tap: (reconstructions (B, 3, H, W), their `hue_scores` (B,))}, of the view turned by B hues.

        Each tap is read by its own inverse. One hue alone tells little: an inverse that always paints the usual colour
        is right whenever it is met.
        """
        return self._depths(replace(view, tap="", inverse_tap="", hue_shift=0.0), hues)

    def _every_depth(self, view: View, hues: tuple[float, ...]) -> dict[str, tuple[Tensor, dict[str, np.ndarray]]]:
        bench = self.bench(view.target)
        turned = [self._recorded(_of_picture(replace(view, hue_shift=hue)))[0] for hue in hues]
        images, masks = (torch.cat(parts) for parts in ([one.image for one in turned], [one.mask for one in turned]))
        recorded, colours, depths = bench.target.record(images), object_chroma(images, masks), {}
        inverses = bench.families[view.family]
        for tap in (tap for tap in bench.taps if tap in inverses):
            with torch.no_grad():
                made = inverses[tap](self._changed(replace(view, tap=tap), recorded[tap])[0])
            depths[tap] = made, hue_scores(colours, object_chroma(made, masks))
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
            neutral = bench.mean[view.tap].clone()
            if isinstance(representation, Predictions):  # the mean box, and no class
                neutral[..., : representation.logits.shape[2]] = 0
                if representation.activation == "softmax":
                    neutral[..., representation.logits.shape[2] - 1] = 1
            removed = [query for query in view.removed if query < values.shape[1]]
            values[:, removed] = neutral[:, removed]
        if view.noise:
            generator = torch.Generator().manual_seed(0)
            values = values + view.noise * bench.spread[view.tap] * torch.randn(values.shape, generator=generator)
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
    if not isinstance(output, Tensor) or output.ndim != 2:
        return Answer("nothing: it has no classes")
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
