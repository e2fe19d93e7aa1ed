"""What a view shows, without any widget: a picture, what a layer holds of it, and what an inverse makes of that."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import backsight
from backsight.app.explorer.view import CELLS, View
from backsight.app.pictures import Picture, open_picture
from backsight.data.images import batches, open_images
from backsight.errors import BacksightError, nearest
from backsight.inverses.families import Reconstruct
from backsight.inverses.files import save, shipped_inverses
from backsight.inverses.linear import fit_linear
from backsight.measures.hue import hue_scores, object_chroma
from backsight.measures.pixels import psnr, ssim
from backsight.project import cache_folder, write_atomically
from backsight.representation import Grid, Predictions, Representation, Tokens
from backsight.studies.by_seed import fit_or_load
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
    tap: str
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
    def taps(self) -> tuple[str, ...]:
        """Those that some inverse reads."""
        return tuple(tap for tap in self.target.taps if any(tap in inverses for inverses in self.families.values()))

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
        """The target with its inverses: shipped ones, those kept from an earlier time, else linear ones fitted here."""
        target = load_target(name)
        folder = shipped_inverses(target) or cache_folder() / "inverses" / f"{target.weights_hash}-{self.fit_images}"
        if not folder.exists():
            images = open_images("scenes", "train", target, self.fit_images)
            write_atomically(folder, lambda temporary: save(fit_linear(target, images), temporary))
        scenes = open_images("scenes", "validation", target, REFERENCE_IMAGES)
        recorded = target.record(torch.cat(list(batches(scenes, REFERENCE_IMAGES))))
        spread = {
            tap: representation.values[:, getattr(representation, "prefix", 0) :].flatten(0, 1).std(0)
            for tap, representation in recorded.items()
        }
        mean = {tap: representation.values.mean(0, keepdim=True) for tap, representation in recorded.items()}
        return Bench(target, fit_or_load(target, folder), spread, mean)

    def _record(self, view: View) -> tuple[Picture, Mapping[str, Representation]]:
        target, grid = self.bench(view.target).target, self.bench(view.target).grid
        picture = given(view, target.image_size, grid, target.preprocessing.mean)
        return picture, target.record(picture.image)

    def see(self, view: View) -> Seen:
        """Compute the view. Raises BacksightError where it names what is not there or does not fit."""
        bench = self.bench(view.target)
        tap = view.tap or bench.taps[0]
        reader = view.inverse_tap or tap
        inverses = bench.families.get(view.family, {})
        for name, known in ((tap, bench.taps), (view.family, bench.families), (reader, inverses)):
            if name not in known:
                raise BacksightError(f"{view.target} has no {name!r} with an inverse; {nearest(name, list(known))}.")
        # The latest pictures' passes are kept, so that a move in depth computes none.
        picture, recorded = self._recorded(_of_picture(view))
        representation, remarks = self._changed(view, tap, recorded[tap])
        with torch.no_grad():
            made = inverses[reader](representation)
            answers = answer(bench.target, picture.image), answer(bench.target, made)
        measures = {
            "psnr": float(psnr(picture.image, made)),
            "ssim": float(ssim(picture.image, made)),
        }
        colours = (object_chroma(image, picture.mask) for image in (picture.image, made))
        measures |= {name: float(value) for name, (value,) in hue_scores(*colours).items()}
        return Seen(view, tap, picture, made, answers, measures, remarks)

    def depths(self, view: View, *hues: float) -> dict[str, tuple[Tensor, dict[str, np.ndarray]]]:
        """{tap: (reconstructions (B, 3, H, W), their `hue_scores` (B,))}, of the view turned by B hues.

        Each tap is read by its own inverse. One hue alone tells little: an inverse that always paints the usual colour
        is right whenever it is met.
        """
        return self._depths(replace(view, tap="", inverse_tap="", hue_shift=0.0), hues)

    def _every_depth(self, view: View, hues: tuple[float, ...]) -> dict[str, tuple[Tensor, dict[str, np.ndarray]]]:
        bench = self.bench(view.target)
        turned = [self._recorded(_of_picture(replace(view, hue_shift=hue)))[0] for hue in hues]
        images, masks = (
            torch.cat([picture.image for picture in turned]),
            torch.cat([picture.mask for picture in turned]),
        )
        recorded, colours, depths = bench.target.record(images), object_chroma(images, masks), {}
        inverses = bench.families[view.family]
        for tap in (tap for tap in bench.taps if tap in inverses):
            with torch.no_grad():
                made = inverses[tap](self._changed(view, tap, recorded[tap])[0])
            depths[tap] = made, hue_scores(colours, object_chroma(made, masks))
        return depths

    def _changed(self, view: View, tap: str, representation: Representation) -> tuple[Representation, list[str]]:
        """The representation with the view's swap, removal and noise, and what of these could not be done here."""
        bench, remarks, values = self.bench(view.target), [], representation.values.clone()
        if view.swapped and isinstance(representation, Tokens):
            plain = View(view.target, picture=view.swap_picture)
            chosen = token_numbers(view.swapped, bench.grid, representation)
            values[:, chosen] = self._recorded(_of_picture(plain))[1][tap].values[:, chosen]
        elif view.swapped:
            remarks.append(f"{tap} holds object queries, which have no place: tokens are swapped at earlier layers.")
        if view.removed and isinstance(representation, Tokens):
            remarks.append(f"{tap} comes before the object queries: removing one changes later layers only.")
        elif view.removed:
            neutral = bench.mean[tap].clone()
            if isinstance(representation, Predictions):  # the mean box, and no class
                neutral[..., : representation.logits.shape[2]] = 0
                if representation.activation == "softmax":
                    neutral[..., representation.logits.shape[2] - 1] = 1
            removed = [query for query in view.removed if query < values.shape[1]]
            values[:, removed] = neutral[:, removed]
        if view.noise:
            generator = torch.Generator().manual_seed(0)
            values = values + view.noise * bench.spread[tap] * torch.randn(values.shape, generator=generator)
            values = values.clamp(0, 1) if isinstance(representation, Predictions) else values
        return representation.replace(values), remarks

    def png(self, view: View) -> bytes:
        """Input, reconstruction and difference side by side, as a file with the view and what it measures inside."""
        seen = self.see(view)
        weights = self.bench(view.target).target.weights_hash
        said = f"Input, reconstruction, absolute difference: {view.target} {seen.tap}, {view.family} inverse"
        measures = {name: round(value, 4) if value == value else None for name, value in seen.measures.items()}
        texts = {"backsight": json.dumps(asdict(view)), "measures": json.dumps(measures), "weights": weights}
        notes = PngInfo()
        for name, text in (texts | {"version": backsight.__version__, "Description": said}).items():
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

    def patch(cell: int) -> tuple[Any, ...]:
        row, column = divmod(cell, columns)
        return ..., slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)

    shuffled = [cell for cell in view.shuffled if cell < rows * columns]
    order = np.random.default_rng(len(shuffled)).permutation(len(shuffled))
    for place, other in zip(order, np.roll(order, 1), strict=True):  # a random circle: none keeps its place
        changed[patch(shuffled[place])] = image[patch(shuffled[other])]
    for cell in (cell for cell in view.erased if cell < rows * columns):
        changed[patch(cell)] = torch.tensor(zero).view(-1, 1, 1).clamp(0, 1)
    return Picture(changed, mask, words)


def answer(target: Target, image: Tensor) -> Answer:
    """The target's answer to one picture (1, 3, H, W)."""
    output = target(image)

    def named(index: int, probability: float) -> str:
        classes = target.classes or ()
        return f"{classes[index] if index < len(classes) else f'class {index}'} {probability:.0%}"

    if isinstance(output, Predictions):
        probabilities, labels = (part.tolist() for part in output.objects[0].max(-1))
        order = sorted(range(len(labels)), key=lambda query: -probabilities[query])[:20]
        boxes: list[dict[str, Any]] = [
            {"query": query, "label": named(labels[query], probabilities[query])}
            | dict(zip("xywh", output.boxes[0, query].tolist(), strict=True))
            for query in order
            if probabilities[query] > CERTAIN
        ]
        return Answer(", ".join(box["label"] for box in boxes) or "no object", boxes)
    if not isinstance(output, Tensor) or output.ndim != 2:
        return Answer("nothing: it has no classes")
    values, indices = output[0].softmax(0).topk(min(5, output.shape[1]))
    return Answer(", ".join(named(*best) for best in zip(indices.tolist(), values.tolist(), strict=True)))


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


def on_grid(view: View, before: Grid, after: Grid) -> View:
    """The view with its patches carried to another target's grid."""
    moved: dict[str, Any] = {name: carried(getattr(view, name), before, after) for name in CELLS}
    return replace(view, **moved)


def as_png(image: Tensor, side: int = 0, **options: Any) -> bytes:
    """A PNG file of (3, H, W) in [0, 1], made fast; every pixel a square, so that the picture is about `side` high."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    factor, file = max(1, side // image.shape[1]), io.BytesIO()
    Image.fromarray(pixels.repeat(factor, 0).repeat(factor, 1)).save(file, "PNG", compress_level=1, **options)
    return file.getvalue()
