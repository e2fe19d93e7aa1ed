"""Small charts and tables of the explorer as SVG and HTML: drawn in a millisecond, and readable aloud."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from backsight.app.explorer.judging import HUE_KEPT, HUE_OF_A_GUESS, Answer, Hue
from backsight.app.explorer.seeing import Seen
from backsight.plots.style import FAMILY_COLOURS

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 380, 190, 46, 8, 34, 10
INPUT_COLOUR = "#949494"
OTHER_COLOUR = "#cc78bc"  # of a family that has none of its own


def measures_table(seen: Seen) -> str:
    """PSNR, SSIM, hue error, and the object's colour in both pictures."""
    error = seen.measures["hue_error"]
    of = "of the object" if seen.mask is not None else "of coloured pixels"
    rows = [
        ("PSNR", f"{seen.measures['psnr']:.1f} dB"),
        ("SSIM", f"{seen.measures['ssim']:.3f}"),
        (f"hue error {of}", "this picture has no hue" if math.isnan(error) else f"{error:.1f}°"),
    ]
    if seen.hues is not None:
        rows += [("object, input", _swatch(seen.hues[0])), ("object, reconstruction", _swatch(seen.hues[1]))]
    body = "".join(f"<tr><td>{name}</td><td class='number'>{value}</td></tr>" for name, value in rows)
    return f"<h2>How near it comes</h2><table class='backsight-measures'>{body}</table>"


def _swatch(hue: Hue) -> str:
    colour = "rgb({}, {}, {})".format(*(round(255 * channel) for channel in hue.colour))
    said = f"{hue.degrees:.0f}°" if hue.chroma > 0.02 else "grey"
    return f"<span class='backsight-swatch' style='background: {colour}'></span>{said}"


def answers_table(seen: Seen) -> str:
    """What the model says of the input and of the reconstruction, side by side."""
    before, after = seen.answers
    if before.boxes or after.boxes or not before.classes:
        wide = "<td style='white-space: normal; vertical-align: top'>"
        answers = (("input", before), ("reconstruction", after))
        verb = "finds"
        rows = [f"<tr>{wide}{name}</td>{wide}{escape(answer.in_words())}</td></tr>" for name, answer in answers]
    else:
        verb = "says"
        rows = ["<tr><th>of the input</th><th>of the reconstruction</th></tr>"]
        rows += [
            f"<tr><td>{_likely(before, place)}</td><td>{_likely(after, place)}</td></tr>"
            for place in range(len(before.classes))
        ]
    title = f"<h2>What {escape(seen.view.target)} {verb}</h2>"
    return f"{title}<table class='backsight-answers'>{''.join(rows)}</table>"


def _likely(answer: Answer, place: int) -> str:
    if place >= len(answer.classes):
        return ""
    name, probability = answer.classes[place]
    bar = f"<span class='backsight-bar' style='width: {3 * probability:.2f}rem'></span>"
    return f"{escape(name)} {probability:.0%} {bar}"


def _x(share: float) -> float:
    """Pixels of a share of the horizontal axis, from the left."""
    return LEFT + (WIDTH - LEFT - RIGHT) * share


def _y(share: float) -> float:
    """Pixels of a share of the vertical axis, from below."""
    return TOP + (HEIGHT - BOTTOM - TOP) * (1 - share)


def _line(points: Iterable[tuple[float, float]], colour: str, dash: str = "") -> str:
    """A line through points, both coordinates shares of the axes."""
    joined = " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in points)
    return f"<polyline points='{joined}' fill='none' stroke='{colour}' stroke-width='2' stroke-dasharray='{dash}'/>"


def _level(share: float, label: str, kind: str = "axis") -> str:
    """A horizontal line with its label at the left (an axis) or above its right end."""
    line = f"<line class='{kind}' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{_y(share):.1f}' y2='{_y(share):.1f}'/>"
    x, y = (LEFT - 5, _y(share) + 4) if kind == "axis" else (WIDTH - RIGHT, _y(share) - 4)
    return f"{line}<text x='{x}' y='{y:.1f}' text-anchor='end'>{label}</text>"


def _below(share: float, label: str, anchor: str = "middle", y: int = HEIGHT - 17) -> str:
    return f"<text x='{_x(share):.1f}' y='{y}' text-anchor='{anchor}'>{label}</text>"


def _chart(title: str, said: str, axis: str, *parts: str) -> str:
    """said: the whole chart in words, for a screen reader."""
    return (
        f"<h2>{title}</h2><svg class='backsight-chart' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' "
        f"aria-label='{escape(said, quote=True)}'>{''.join(parts)}{_below(0.5, axis, y=HEIGHT - 3)}</svg>"
    )


def hue_chart(curve: Mapping[str, float], chosen: str, family: str, hues: int) -> str:
    """Mean hue error by depth, with the error of a guess and the bound from which a hue counts as kept."""
    taps = list(curve)
    known = [
        (place / max(1, len(taps) - 1), tap, error)
        for place, (tap, error) in enumerate(curve.items())
        if not math.isnan(error)
    ]
    if not known:
        return ""
    colour = FAMILY_COLOURS.get(family, OTHER_COLOUR)
    points = [(x, min(error, 120) / 120) for x, _, error in known]
    dots = "".join(
        f"<circle cx='{_x(x):.1f}' cy='{_y(y):.1f}' r='{6 if tap == chosen else 3.5}' fill='{colour}'>"
        f"<title>{escape(tap)}: {error:.0f}°</title></circle>"
        for (x, y), (_, tap, error) in zip(points, known, strict=True)
    )
    return _chart(
        f"Hue error, mean over {hues} hues",
        f"Hue error in degrees by depth, kept up to {HUE_KEPT:.0f}: "
        + "; ".join(f"{tap} {error:.0f}" for _, tap, error in known),
        "depth",
        *(_level(degrees / 120, f"{degrees}°") for degrees in (0, 30, 60, 90, 120)),
        _level(HUE_OF_A_GUESS / 120, "a guess", "guess"),
        _line(points, colour),
        dots,
        _below(0, escape(taps[0]), "start"),
        _below(1, escape(taps[-1]), "end"),
    )


def spectrum_chart(spectra: Sequence[tuple[float, float, float]], family: str) -> str:
    """Power by octave of spatial frequency, of the input and of the reconstruction, both axes logarithmic."""
    shown = [octave for octave in spectra if octave[1] > 0 and octave[2] > 0]
    if len(shown) < 2:
        return ""
    powers = [math.log10(power) for octave in shown for power in octave[1:]]
    low, high = math.floor(min(powers)), math.ceil(max(powers))
    first, last = math.log2(shown[0][0]), math.log2(shown[-1][0])
    shares = [(math.log2(octave[0]) - first) / (last - first) for octave in shown]

    def curve(index: int, colour: str, dash: str = "") -> str:
        heights = [(math.log10(octave[index]) - low) / max(high - low, 1) for octave in shown]
        return _line(zip(shares, heights, strict=True), colour, dash)

    return _chart(
        "Spectrum",
        "Power of the reconstruction by spatial frequency: "
        + "; ".join(f"at {f:.3g} cycles {after / before:.0%} of the power" for f, before, after in shown),
        "cycles an image (dashed: input)",
        *(
            _level((power - low) / max(high - low, 1), f"10<tspan dy='-4' font-size='8'>{power}</tspan>")
            for power in range(low, high + 1, max(1, math.ceil((high - low) / 4)))
        ),
        curve(1, INPUT_COLOUR, "6 3"),
        curve(2, FAMILY_COLOURS.get(family, OTHER_COLOUR)),
        *(_below(share, f"{octave[0]:.3g}") for share, octave in zip(shares, shown, strict=True)),
    )
