"""What a view shows: the picture, the changed representation, the reconstruction, and what there is to say of it."""

from __future__ import annotations

import io
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import backsight
from backsight.app.explorer.judging import HUES, Answer, Hue, answer, hue_error, hue_of, mean, measures_of, spectra_of
from backsight.app.explorer.pictures import Subject, as_pixels, subject
from backsight.app.explorer.view import Cells, Grid, View, carried, with_cells
from backsight.data.images import batches, open_images
from backsight.errors import BacksightError, nearest
from backsight.inverses.families import SOLVED, Reconstruct
from backsight.inverses.files import load, save, shipped_inverses
from backsight.inverses.linear import fit_linear
from backsight.inverses.rows import form_of
from backsight.project import results_root, write_atomically
from backsight.representation import Predictions, Representation, Tokens
from backsight.studies.by_seed import fit_or_load
from backsight.targets import Target, load_target

REFERENCE_IMAGES = 64  # scenes that tell a representation's usual spread and mean
TARGETS_KEPT = 4
RECORDS_KEPT = 32
Inverses = Mapping[str, Reconstruct]  # by tap
Value = TypeVar("Value")


@dataclass(frozen=True)
class Seen:
    """A view, computed. Images are (1, 3, H, W) in [0, 1].

    image: what the target was given; reconstruction: what the inverse made of the tap; mask: (1, H, W) of the main
    object, or None; errors: (rows, columns) RMS error of each patch; measures: psnr (dB), ssim, and hue_error (degrees;
    of the object, or of all coloured pixels where none is known); hues: of the object in both; spectra: (frequency in
    cycles an image, power of the image, of the reconstruction) an octave; remarks: what of the view could not be done
    here, and why.
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
    families: Mapping[str, Inverses]
    spread: Mapping[str, Tensor]
    mean: Mapping[str, Representation]
    recorded: OrderedDict[Hashable, dict[str, Representation]] = field(default_factory=OrderedDict)
    curves: OrderedDict[Hashable, dict[str, float]] = field(default_factory=OrderedDict)

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
        if view.tap and view.tap not in self.taps:
            raise BacksightError(f"{self.target.name} has no inverse for {view.tap!r}; {nearest(view.tap, self.taps)}.")
        return view.tap or self.taps[0]

    def inverse(self, family: str, tap: str) -> Reconstruct:
        if family not in self.families:
            raise BacksightError(
                f"{self.target.name} has no {family!r} inverses here; there are: {', '.join(self.families)}."
            )
        if tap not in self.families[family]:
            raise BacksightError(
                f"{self.target.name} has no {family} inverse for {tap!r}: choose another tap or family."
            )
        return self.families[family][tap]

    def at_every_depth(self, view: View, recorded: Mapping[str, Representation]) -> Iterator[tuple[str, Tensor]]:
        """(tap, reconstructions) of the view's family, each tap by its own inverse."""
        inverses = self.families.get(view.family, {})
        for tap in (tap for tap in self.taps if tap in inverses):
            representation, _ = _changed(view, self, tap, recorded[tap])
            with torch.no_grad():
                yield tap, inverses[tap](representation)


class Workbench:
    """Targets and inverses that are loaded once, and views of them.

    fit_images: scenes that linear inverses are fitted on where a target has none; seed: of that fit. One thread at a
    time may use it.
    """

    def __init__(self, fit_images: int = 2000, seed: int = 0) -> None:
        self.fit_images, self.seed = fit_images, seed
        self._benches: OrderedDict[Hashable, Bench] = OrderedDict()

    def is_loaded(self, target: str) -> bool:
        return target in self._benches

    def bench(self, name: str, say: Callable[[str], None] = lambda text: None) -> Bench:
        """The target with its inverses: shipped ones, those kept from an earlier time, else linear ones fitted here.

        say: told in a sentence what takes long. Raises BacksightError as `load_target`.
        """

        def made() -> Bench:
            say(f"Loading {name}.")
            target = load_target(name)
            return _measured(target, self._families(target, say))

        return _kept(self._benches, name, made, TARGETS_KEPT)

    def _families(self, target: Target, say: Callable[[str], None]) -> Mapping[str, Inverses]:
        if shipped_inverses(target) is not None:
            return fit_or_load(target)
        stem = "".join(c if c.isalnum() else "-" for c in Path(target.name).name)
        name = f"{stem}-{target.weights_hash}-{self.fit_images}-{self.seed}"
        kept = results_root() / "08_explorer" / "inverses" / name
        finished = kept / "complete"
        if not finished.exists():
            say(
                f"Fitting linear inverses of {len(target.taps)} layers of {target.name} on {self.fit_images} images, "
                "once: seconds for a small model, minutes for ViT-B/16."
            )
            images = open_images(_source(target), "train", target, self.fit_images, self.seed)
            save(fit_linear(target, images, seed=self.seed, progress=False), kept)
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
        bench = self.bench(view.target)
        tap = bench.tap_of(view)
        shown = given(view, bench)
        image, mask = shown.image, shown.mask
        recorded = _recorded(view, bench, shown)
        representation, remarks = _changed(view, bench, tap, recorded[tap])
        inverse = bench.inverse(view.family, view.inverse_tap or tap)
        _refuse_another_form(view, tap, recorded)
        with torch.no_grad():
            made = inverse(representation)
            answers = (answer(bench.target, image), answer(bench.target, made))
        return Seen(
            view=view,
            tap=tap,
            image=image,
            reconstruction=made,
            mask=mask,
            what=shown.what,
            errors=F.adaptive_avg_pool2d((image - made).square().mean(1, keepdim=True), bench.grid)[0, 0]
            .sqrt()
            .numpy(),
            measures=measures_of(image, made, mask),
            hues=None if mask is None else (hue_of(image, mask), hue_of(made, mask)),
            spectra=spectra_of(image, made),
            answers=answers,
            remarks=remarks,
        )

    def strip(self, view: View) -> list[Depth]:
        """The view at every depth of its family; `inverse_tap` is not used, since each tap has its own inverse here."""
        bench = self.bench(view.target)
        shown = given(view, bench)
        depths = []
        for tap, made in bench.at_every_depth(view, _recorded(view, bench, shown)):
            values = measures_of(shown.image, made, shown.mask)
            depths.append(Depth(tap, made[0], values["psnr"], values["hue_error"]))
        return depths

    def hues(self, view: View) -> dict[str, float]:
        """{tap: mean hue error in degrees} at every depth of the family, over HUES hues all round the circle.

        One hue alone tells little: an inverse that always paints the usual colour is right whenever it is met.
        """
        bench = self.bench(view.target)

        def curve() -> dict[str, float]:
            turned = [given(replace(view, hue_shift=360.0 * i / HUES), bench) for i in range(HUES)]
            recorded = bench.target.record(torch.cat([shown.image for shown in turned]))
            return {
                tap: mean([hue_error(shown.image, made[i : i + 1], shown.mask) for i, shown in enumerate(turned)])
                for tap, made in bench.at_every_depth(view, recorded)
            }

        return _kept(bench.curves, _without_place(view), curve)

    def knows_hues(self, view: View) -> bool:
        """Whether `hues` is at hand without computing anything."""
        return self.is_loaded(view.target) and _without_place(view) in self.bench(view.target).curves

    def png(self, view: View) -> bytes:
        """Input, reconstruction and difference side by side (a second row for `compare`), with the view inside.

        The PNG's text entries: `backsight` (the view as JSON), `measures`, `weights`, `version`, `Description`.
        """
        rows = [self.see(one) for one in (view, *([self.place(view, view.compare)] if view.compare else []))]
        panels = [(seen.image, seen.reconstruction, seen.difference) for seen in rows]
        strips = [np.concatenate([as_pixels(panel[0], enlarged=True) for panel in row], axis=1) for row in panels]
        width = max(strip.shape[1] for strip in strips)
        padded = [np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255) for strip in strips]
        measures = [
            {name: None if math.isnan(value) else round(value, 4) for name, value in seen.measures.items()}
            for seen in rows
        ]
        weights = {seen.view.target: self.bench(seen.view.target).target.weights_hash for seen in rows}
        said = "; ".join(f"{seen.view.target} {seen.tap} read by the {seen.view.family} inverse" for seen in rows)
        notes = PngInfo()
        notes.add_text("backsight", view.to_json())
        notes.add_text("measures", json.dumps(measures))
        notes.add_text("weights", json.dumps(weights))
        notes.add_text("version", backsight.__version__)
        notes.add_text("Description", f"Input, reconstruction, absolute difference: {said}")
        file = io.BytesIO()
        Image.fromarray(np.concatenate(padded)).save(file, "PNG", pnginfo=notes)
        return file.getvalue()


def _kept(store: OrderedDict[Hashable, Value], key: Hashable, make: Callable[[], Value], most: int = 0) -> Value:
    """What the store holds under the key, made where it does not; it keeps those that were asked for last."""
    if key not in store:
        store[key] = make()
        while len(store) > (most or RECORDS_KEPT):
            store.popitem(last=False)
    store.move_to_end(key)
    return store[key]


def _without_place(view: View) -> View:
    """What the curve of hues depends on."""
    return replace(view, tap="", inverse_tap="", hue_shift=0.0, compare="")


def _measured(target: Target, families: Mapping[str, Inverses]) -> Bench:
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
    if not (view.erased or view.shuffled):
        return shown
    before, image = shown.image, shown.image.clone()
    rows, columns = bench.grid
    height, width = size[0] // rows, size[1] // columns  # what is left at the rims belongs to no patch

    def patch(cell: int) -> tuple[slice, slice]:
        row, column = divmod(cell, columns)
        return slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)

    shuffled = [cell for cell in view.shuffled if cell < rows * columns]
    for cell, place in zip(shuffled, _derangement(len(shuffled)), strict=True):
        image[(..., *patch(cell))] = before[(..., *patch(shuffled[place]))]
    zero = torch.tensor(bench.target.preprocessing.mean).view(1, -1, 1, 1).clamp(0, 1)
    for cell in (cell for cell in view.erased if cell < rows * columns):
        image[(..., *patch(cell))] = zero
    return replace(shown, image=image)


def _derangement(count: int) -> list[int]:
    """An order of `count` places in which none keeps its own: a random circle, the same for the same count."""
    order = np.random.default_rng(count).permutation(count)
    taken = np.empty(count, int)
    taken[order] = np.roll(order, 1)
    return taken.tolist()


def _recorded(view: View, bench: Bench, shown: Subject) -> dict[str, Representation]:
    """All taps of one pass; the latest pictures' are kept, so that a move in depth computes no pass."""
    key = (view.picture, view.hue_shift, view.saturation, view.region, view.erased, view.shuffled)
    return _kept(bench.recorded, key, lambda: bench.target.record(shown.image))


def _changed(
    view: View, bench: Bench, tap: str, representation: Representation
) -> tuple[Representation, tuple[str, ...]]:
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
