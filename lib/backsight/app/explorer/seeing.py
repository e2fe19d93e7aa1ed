"""What a view shows: the picture, the changed representation, the reconstruction, and what there is to say of it."""

from __future__ import annotations

import io
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import backsight
from backsight.app.explorer.pictures import Subject, subject
from backsight.app.explorer.view import Cells, Grid, View, carried, with_cells
from backsight.data.images import batches, open_images
from backsight.errors import BacksightError, nearest
from backsight.inverses.families import SOLVED, Reconstruct
from backsight.inverses.files import load, save, shipped_inverses
from backsight.inverses.linear import fit_linear
from backsight.inverses.rows import form_of
from backsight.measures.pixels import psnr, ssim
from backsight.measures.structure import bands, hue_errors, mean_hue, spectrum
from backsight.project import results_root, write_atomically
from backsight.representation import Predictions, Representation, Tokens
from backsight.studies.by_seed import fit_or_load
from backsight.studies.recolour import to_hsv
from backsight.targets import Target, load_target

REFERENCE_IMAGES = 64  # scenes that tell a representation's usual spread and mean
LEAST_CHROMA = 0.1  # of a pixel that counts for the hue error of a picture without a known object
HUE_OF_A_GUESS = 90.0  # degrees: the mean error of a random hue, counted where a reconstruction has none
HUES = 8  # all round the circle, over which the loss of hue is judged
HUE_KEPT = 30.0  # degrees: half the distance between two neighbouring main hues
CERTAIN = 0.5  # probability from which a query's box is drawn
ERROR_RANGE = 0.5  # RMS error, of the range of a pixel, at the end of the error map's colours
ENLARGED = 256  # pixels, the height of a picture in an exported PNG
TARGETS_KEPT = 4
RECORDS_KEPT = 32


@dataclass(frozen=True)
class Box:
    """An object of a detector's answer; place: centre x, centre y, width, height in [0, 1] of the picture."""

    query: int
    label: str
    probability: float
    place: tuple[float, float, float, float]


@dataclass(frozen=True)
class Answer:
    """What the model says of a picture. classes: five (name, probability); boxes: what a detector is certain of."""

    classes: tuple[tuple[str, float], ...] = ()
    boxes: tuple[Box, ...] = ()

    def in_words(self) -> str:
        if self.classes:
            name, probability = self.classes[0]
            return f"{name} ({probability:.0%})"
        if self.boxes:
            return ", ".join(f"{box.label} ({box.probability:.0%})" for box in self.boxes)
        return "no object"


@dataclass(frozen=True)
class Hue:
    """The object's colour in a picture: hue in degrees, chroma in [0, 1] (0: grey), mean colour, sRGB in [0, 1]."""

    degrees: float
    chroma: float
    colour: tuple[float, float, float]


@dataclass(frozen=True)
class Seen:
    """A view, computed. Images are (1, 3, H, W) in [0, 1].

    image: what the target was given; reconstruction: what the inverse made of the tap; mask: (1, H, W) of the main
    object, or None; errors: (rows, columns) RMS error of each patch; measures: psnr (dB), ssim, and hue_error (degrees;
    of the object, or of all coloured pixels where none is known); hues: of the object in both; spectra: (frequency in
    cycles an image, power of the image, of the reconstruction) an octave; remarks: what of the view could not be done
    here, and why; seconds: of the whole computation.
    """

    view: View
    tap: str
    image: Tensor
    reconstruction: Tensor
    mask: Tensor | None
    what: str
    errors: np.ndarray
    measures: Mapping[str, float]
    hues: tuple[Hue, Hue] | None
    spectra: Sequence[tuple[float, float, float]]
    answers: tuple[Answer, Answer]
    remarks: tuple[str, ...]
    seconds: float

    @property
    def difference(self) -> Tensor:
        """(1, 3, H, W) absolute difference."""
        return (self.image - self.reconstruction).abs()


@dataclass(frozen=True)
class Depth:
    """One layer in the strip of all depths: image (3, H, W), PSNR in dB, hue error in degrees (NaN: no hue)."""

    tap: str
    image: Tensor
    psnr: float
    hue_error: float


@dataclass
class Bench:
    """A loaded target with its inverses and, of each tap over reference scenes, the channels' spread and the mean."""

    target: Target
    families: Mapping[str, Mapping[str, Reconstruct]]
    spread: Mapping[str, Tensor]
    mean: Mapping[str, Representation]
    recorded: OrderedDict[Any, dict[str, Representation]] = field(default_factory=OrderedDict)
    curves: OrderedDict[View, dict[str, float]] = field(default_factory=OrderedDict)

    @property
    def taps(self) -> tuple[str, ...]:
        """Those that some inverse reads."""
        return tuple(tap for tap in self.target.taps if any(tap in inverses for inverses in self.families.values()))

    @property
    def grid(self) -> Grid:
        """(rows, columns) of patches on the picture."""
        (height, width), (down, across) = self.target.image_size, self.target.reduction
        return max(1, height // down), max(1, width // across)

    def tap_of(self, view: View) -> str:
        if not view.tap:
            return self.taps[0]
        if view.tap not in self.taps:
            raise BacksightError(f"{self.target.name} has no inverse for {view.tap!r}; {nearest(view.tap, self.taps)}.")
        return view.tap

    def inverse(self, family: str, tap: str) -> Reconstruct:
        if family not in self.families:
            there = ", ".join(self.families)
            raise BacksightError(f"{self.target.name} has no {family!r} inverses here; there are: {there}.")
        if tap not in self.families[family]:
            raise BacksightError(
                f"{self.target.name} has no {family} inverse for {tap!r}: choose another tap or family."
            )
        return self.families[family][tap]


class Workbench:
    """Targets and inverses that are loaded once, and views of them.

    fit_images: scenes that linear inverses are fitted on where a target has none; seed: of that fit. One thread at a
    time may use it.
    """

    def __init__(self, fit_images: int = 2000, seed: int = 0) -> None:
        self.fit_images, self.seed = fit_images, seed
        self._benches: OrderedDict[str, Bench] = OrderedDict()

    def is_loaded(self, target: str) -> bool:
        return target in self._benches

    def bench(self, name: str, say: Callable[[str], None] = lambda text: None) -> Bench:
        """The target with its inverses: shipped ones, those kept from an earlier time, else linear ones fitted here.

        say: told in a sentence what takes long. Raises BacksightError as `load_target`.
        """
        if name in self._benches:
            self._benches.move_to_end(name)
            return self._benches[name]
        say(f"Loading {name}.")
        target = load_target(name)
        families = self._families(target, say)
        made = _measured(target, families)
        self._benches[name] = made
        while len(self._benches) > TARGETS_KEPT:
            self._benches.popitem(last=False)
        return made

    def _families(self, target: Target, say: Callable[[str], None]) -> Mapping[str, Mapping[str, Reconstruct]]:
        if shipped_inverses(target) is not None:
            return fit_or_load(target)
        stem = "".join(c if c.isalnum() else "-" for c in Path(target.name).name)
        kept = (
            results_root() / "08_explorer" / "inverses" / f"{stem}-{target.weights_hash}-{self.fit_images}-{self.seed}"
        )
        finished = kept / "complete"
        if not finished.exists():
            say(
                f"Fitting linear inverses of {len(target.taps)} layers of {target.name} on {self.fit_images} images, "
                "once: seconds for a small model, minutes for ViT-B/16."
            )
            images = open_images(_source(target), "train", target, self.fit_images, self.seed)
            fitted = fit_linear(target, images, seed=self.seed, progress=False)
            save(fitted, kept)
            write_atomically(finished, lambda temporary: temporary.write_text("linear\n", encoding="utf-8"))
        return load(kept, target)

    def place(self, view: View, name: str) -> View:
        """The view on another target: the same relative depth and places; what does not exist there is let go."""
        before, after = self.bench(view.target), self.bench(name)
        depths = len(before.taps) - 1
        share = before.taps.index(before.tap_of(view)) / depths if depths else 0.0
        family = view.family if view.family in after.families else next(iter(after.families))
        moved = with_cells(view, before.grid, after.grid)
        tap = after.taps[round(share * (len(after.taps) - 1))]
        same = view.inverse_tap if view.inverse_tap in after.taps else ""
        return replace(moved, target=name, family=family, tap=tap, inverse_tap=same, compare="", removed=())

    def see(self, view: View) -> Seen:
        """Compute the view. Raises BacksightError where it names what is not there or does not fit."""
        start = time.perf_counter()
        bench = self.bench(view.target)
        tap = bench.tap_of(view)
        shown = given(view, bench)
        recorded = _recorded(view, bench, shown)
        representation, remarks = _changed(view, bench, tap, recorded[tap])
        inverse = bench.inverse(view.family, view.inverse_tap or tap)
        _refuse_another_form(view, tap, recorded)
        with torch.no_grad():
            made = inverse(representation)
            answers = (answer(bench.target, shown.image), answer(bench.target, made))
        hues = None if shown.mask is None else (_hue(shown.image, shown.mask), _hue(made, shown.mask))
        return Seen(
            view,
            tap,
            shown.image,
            made,
            shown.mask,
            shown.what,
            _errors(shown.image, made, bench.grid),
            _measures(shown.image, made, shown.mask),
            hues,
            _spectra(shown.image, made),
            answers,
            remarks,
            time.perf_counter() - start,
        )

    def strip(self, view: View) -> list[Depth]:
        """The view at every depth of its family; `inverse_tap` is not used, since each tap has its own inverse here."""
        bench = self.bench(view.target)
        shown = given(view, bench)
        recorded = _recorded(view, bench, shown)
        depths = []
        for tap in bench.taps:
            if tap in bench.families.get(view.family, {}):
                representation, _ = _changed(view, bench, tap, recorded[tap])
                with torch.no_grad():
                    made = bench.families[view.family][tap](representation)
                values = _measures(shown.image, made, shown.mask)
                depths.append(Depth(tap, made[0], values["psnr"], values["hue_error"]))
        return depths

    def hues(self, view: View) -> dict[str, float]:
        """{tap: mean hue error in degrees} at every depth of the family, over HUES hues all round the circle.

        One hue alone tells little: an inverse that always paints the usual colour is right whenever it is met.
        """
        bench, key = self.bench(view.target), _without_place(view)
        if key not in bench.curves:
            turned = [given(replace(view, hue_shift=360.0 * i / HUES), bench) for i in range(HUES)]
            images = torch.cat([each.image for each in turned])
            recorded = bench.target.record(images)
            errors = {}
            for tap in bench.taps:
                if tap in bench.families.get(view.family, {}):
                    representation, _ = _changed(view, bench, tap, recorded[tap])
                    with torch.no_grad():
                        made = bench.families[view.family][tap](representation)
                    each = [
                        _measures(images[i : i + 1], made[i : i + 1], turned[i].mask)["hue_error"] for i in range(HUES)
                    ]
                    errors[tap] = float(np.nanmean(each)) if np.isfinite(each).any() else float("nan")
            bench.curves[key] = errors
            while len(bench.curves) > RECORDS_KEPT:
                bench.curves.popitem(last=False)
        return bench.curves[key]

    def knows_hues(self, view: View) -> bool:
        """Whether `hues` is at hand without computing anything."""
        return self.is_loaded(view.target) and _without_place(view) in self.bench(view.target).curves

    def png(self, view: View) -> bytes:
        """Input, reconstruction and difference side by side (a second row for `compare`), with the view inside.

        The PNG's text entries: `backsight` (the view as JSON), `measures`, `weights`, `version`, `Description`.
        """
        views = [view, *([self.place(view, view.compare)] if view.compare else [])]
        rows = [self.see(each) for each in views]
        panels = [[each.image, each.reconstruction, each.difference] for each in rows]
        bands_ = [np.concatenate([_enlarged(panel) for panel in row], axis=1) for row in panels]
        width = max(band.shape[1] for band in bands_)
        padded = [np.pad(band, ((0, 0), (0, width - band.shape[1]), (0, 0)), constant_values=255) for band in bands_]
        notes = PngInfo()
        notes.add_text("backsight", view.to_json())
        notes.add_text("measures", json.dumps([{k: _number(v) for k, v in each.measures.items()} for each in rows]))
        notes.add_text(
            "weights", json.dumps({each.view.target: self.bench(each.view.target).target.weights_hash for each in rows})
        )
        notes.add_text("version", backsight.__version__)
        said = "; ".join(f"{each.view.target} {each.tap} read by the {each.view.family} inverse" for each in rows)
        notes.add_text("Description", f"Input, reconstruction, absolute difference: {said}")
        file = io.BytesIO()
        Image.fromarray(np.concatenate(padded)).save(file, "PNG", pnginfo=notes)
        return file.getvalue()


def _without_place(view: View) -> View:
    """What the curve of hues depends on."""
    return replace(view, tap="", inverse_tap="", hue_shift=0.0, compare="")


def _number(value: float) -> float | None:
    return None if value != value else round(value, 4)


def _enlarged(image: Tensor) -> np.ndarray:
    """(H', W', 3) uint8, every pixel a square, about ENLARGED pixels high."""
    pixels = (image[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    factor = max(1, ENLARGED // pixels.shape[0])
    return pixels.repeat(factor, 0).repeat(factor, 1)


def _measured(target: Target, families: Mapping[str, Mapping[str, Reconstruct]]) -> Bench:
    """The bench with its reference: the representations of validation images."""
    images = open_images(_source(target), "validation", target, REFERENCE_IMAGES, 0)
    recorded = target.record(torch.cat(list(batches(images, REFERENCE_IMAGES))))
    spread, mean = {}, {}
    for tap, representation in recorded.items():
        values = representation.values
        prefix = representation.prefix if isinstance(representation, Tokens) else 0
        spread[tap] = values[:, prefix:].flatten(0, 1).std(0)
        mean[tap] = representation.index(0).replace(values.mean(0, keepdim=True))
    return Bench(target, families, spread, mean)


def _source(target: Target) -> str:
    """Scenes are square; other targets are fitted on crops of the photographs."""
    return "scenes" if target.image_size[0] == target.image_size[1] else "photographs"


def given(view: View, bench: Bench) -> Subject:
    """The picture as the target is given it, with the view's erased and shuffled patches."""
    size = bench.target.image_size
    shown = subject(view, size)
    image = shown.image
    if view.erased or view.shuffled:
        image = image.clone()
        patches = _patches(bench.grid, size)
        erased = [cell for cell in view.erased if cell < len(patches)]
        shuffled = [cell for cell in view.shuffled if cell < len(patches)]
        moved = [shuffled[place] for place in _derangement(len(shuffled))]
        pieces = [image[..., patches[cell][0], patches[cell][1]].clone() for cell in moved]
        for cell, piece in zip(shuffled, pieces, strict=True):
            image[..., patches[cell][0], patches[cell][1]] = piece
        zero = torch.tensor(bench.target.preprocessing.mean).view(1, -1, 1, 1).clamp(0, 1)
        for cell in erased:
            image[..., patches[cell][0], patches[cell][1]] = zero
    return replace(shown, image=image)


def _patches(grid: Grid, size: tuple[int, int]) -> list[tuple[slice, slice]]:
    height, width = size[0] // grid[0], size[1] // grid[1]  # what is left at the rims belongs to no patch
    return [
        (slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
        for row in range(grid[0])
        for column in range(grid[1])
    ]


def _derangement(count: int) -> list[int]:
    """An order of `count` places in which none keeps its own: a random circle, the same for the same count."""
    order = np.random.default_rng(count).permutation(count)
    taken = np.empty(count, int)
    taken[order] = np.roll(order, 1)
    return taken.tolist()


def _recorded(view: View, bench: Bench, shown: Subject) -> dict[str, Representation]:
    """All taps of one pass; the latest pictures' are kept, so that a move in depth computes no pass."""
    key = (view.picture, view.hue_shift, view.saturation, view.region, view.erased, view.shuffled)
    if key not in bench.recorded:
        bench.recorded[key] = bench.target.record(shown.image)
        while len(bench.recorded) > RECORDS_KEPT:
            bench.recorded.popitem(last=False)
    bench.recorded.move_to_end(key)
    return bench.recorded[key]


def _changed(view: View, bench: Bench, tap: str, representation: Any) -> tuple[Any, tuple[str, ...]]:
    """The representation with the view's swap, removal and noise, and what of these could not be done here."""
    remarks = []
    values = representation.values.clone()
    if view.swapped:
        if isinstance(representation, Tokens):
            plain = replace(view, picture=view.swap_picture, erased=(), shuffled=(), hue_shift=0.0, saturation=1.0)
            other = _recorded(plain, bench, given(plain, bench))[tap]
            chosen = _token_numbers(view.swapped, bench.grid, representation)
            values[:, chosen] = other.values[:, chosen]
        else:
            remarks.append(
                f"{tap} holds object queries, which have no place: tokens are swapped at earlier layers only."
            )
    if view.removed:
        if isinstance(representation, Tokens):
            remarks.append(f"{tap} comes before the object queries: removing one changes later layers only.")
        else:
            removed = [query for query in view.removed if query < values.shape[1]]
            neutral = bench.mean[tap].values
            if isinstance(representation, Predictions):
                neutral = _no_object(representation, neutral)
            values[:, removed] = neutral[:, removed]
    if view.noise:
        generator = torch.Generator().manual_seed(view.noise_seed)
        values = values + view.noise * bench.spread[tap] * torch.randn(values.shape, generator=generator)
        if isinstance(representation, Predictions):
            values = values.clamp(0, 1)
    return representation.replace(values), tuple(remarks)


def _refuse_another_form(view: View, tap: str, recorded: Mapping[str, Representation]) -> None:
    """Inverse modules say what they read; those that solve for it would fail somewhere inside."""
    read = form_of(recorded[view.inverse_tap or tap])
    if view.family in SOLVED and form_of(recorded[tap]) != read:
        raise BacksightError(
            f"The {view.family} inverse of {view.inverse_tap!r} reads {read}, but {tap!r} holds "
            f"{form_of(recorded[tap])}: choose a layer of the same form."
        )


def _no_object(predictions: Predictions, mean: Tensor) -> Tensor:
    """The mean box, and no class."""
    classes = predictions.logits.shape[2]
    neutral = mean.clone()
    neutral[..., :classes] = 0
    if predictions.activation == "softmax":
        neutral[..., classes - 1] = 1
    return neutral


def _token_numbers(cells: Cells, grid: Grid, tokens: Tokens) -> list[int]:
    """The tokens that lie on these patches, on every level of the tap."""
    numbers, start = [], tokens.prefix
    for level in tokens.grids:
        numbers += [start + cell for cell in carried(cells, grid, level)]
        start += level[0] * level[1]
    return numbers


def answer(target: Target, image: Tensor) -> Answer:
    """The target's answer to one picture (1, 3, H, W); an empty one of a model without classes."""
    output = target(image)
    names = target.classes
    if isinstance(output, Predictions):
        probabilities, labels = output.objects[0].max(-1)
        sure = (probabilities > CERTAIN).nonzero().flatten().tolist()
        sure.sort(key=lambda query: -float(probabilities[query]))
        return Answer(
            boxes=tuple(
                Box(
                    query,
                    _class_name(names, int(labels[query])),
                    float(probabilities[query]),
                    tuple(output.boxes[0, query].tolist()),
                )
                for query in sure[:20]
            )
        )
    if not isinstance(output, Tensor) or output.ndim != 2:
        return Answer()
    best = output[0].softmax(0).topk(min(5, output.shape[1]))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Answer(tuple((_class_name(names, index), value) for index, value in pairs))


def _class_name(names: Sequence[str] | None, index: int) -> str:
    return names[index] if names is not None and index < len(names) else f"class {index}"


def _errors(image: Tensor, made: Tensor, grid: Grid) -> np.ndarray:
    square = (image - made).square().mean(1, keepdim=True)
    return F.adaptive_avg_pool2d(square, grid)[0, 0].sqrt().numpy()


def _measures(image: Tensor, made: Tensor, mask: Tensor | None) -> dict[str, float]:
    if mask is not None:
        error = float(hue_errors(mean_hue(image, mask), mean_hue(made, mask)))
    else:
        error = _pixel_hue_error(image, made)
    return {"psnr": float(psnr(image, made)), "ssim": float(ssim(image, made)), "hue_error": error}


def _pixel_hue_error(image: Tensor, made: Tensor) -> float:
    """Mean absolute hue error in degrees of the pixels that have a hue; NaN where there is none.

    A pixel that comes back grey counts as a guess.
    """
    before, after = to_hsv(image), to_hsv(made)
    coloured = (before[:, 1] * before[:, 2]) > LEAST_CHROMA
    if not coloured.any():
        return float("nan")
    apart = (before[:, 0] - after[:, 0]).abs() % 360
    error = torch.minimum(apart, 360 - apart)
    grey = (after[:, 1] * after[:, 2]) <= LEAST_CHROMA / 4
    return float(error.masked_fill(grey, HUE_OF_A_GUESS)[coloured].mean())


def _hue(image: Tensor, mask: Tensor) -> Hue:
    degrees, chroma = mean_hue(image, mask)
    colour = (image * mask[:, None]).flatten(2).sum(2)[0] / mask.sum()
    red, green, blue = colour.tolist()
    return Hue(float(degrees), float(chroma), (red, green, blue))


def _spectra(image: Tensor, made: Tensor) -> list[tuple[float, float, float]]:
    powers = [spectrum(each)[0] for each in (image, made)]
    octaves = bands(image.shape[2:])
    return [(centre, *(float(power[inside].mean()) for power in powers)) for centre, inside in octaves]  # type: ignore[misc]


def hue_in_words(curve: Mapping[str, float]) -> str:
    """Down to which depth the hue comes back within HUE_KEPT degrees, in one sentence. curve: of `Workbench.hues`."""
    known = {tap: error for tap, error in curve.items() if error == error}
    if not known:
        return "This picture has no hue to lose."
    mean = f"mean error over {HUES} hues"
    kept = [tap for tap, error in known.items() if error <= HUE_KEPT]
    lost = [tap for tap in known if tap not in kept]
    if not lost:
        return f"The hue comes back from every layer ({mean} at most {max(known.values()):.0f}°)."
    if not kept:
        return f"The hue comes back from no layer ({mean} at least {min(known.values()):.0f}°; a guess: 90°)."
    taps = list(known)
    if taps == kept + lost:
        return (
            f"The hue comes back down to {kept[-1]} ({known[kept[-1]]:.0f}°) and is lost from {lost[0]} on "
            f"({known[lost[0]]:.0f}°; {mean}, a guess: 90°)."
        )
    return f"The hue is lost at {', '.join(lost)} ({mean} above {HUE_KEPT:.0f}°) and comes back from the other layers."
