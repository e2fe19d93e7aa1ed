"""What becomes of an object's colour: the error of its hue, and does it revert to the hue typical of its class?

The colour of an object is the mean sRGB colour inside its mask, as one complex number: length is the HSV chroma
(largest minus smallest channel), angle the HSV hue. Textures that change brightness only leave it where it is. Below
MINIMUM_CHROMA a colour is grey and has no hue: a grey reconstruction is counted as grey, and has no hue error.

The reversion index reads a whole response curve: the hue shown goes round the circle while everything else stays. What
the reconstruction paints then falls apart into a part that turns with the hue shown (`follow`, in units of the chroma
shown: 1 for a perfect inverse) and a part that stays where it is. `pull` is the latter's component along the canonical
hue, less the same component in colour-free classes, which no prototype pulls anywhere: what is left depends on the
class. Then

    index = pull / (follow + |pull|):  0 for a perfect inverse, 1 for a painter of canonical colours,

with a denominator of at least LEAST_COLOUR, so that a picture without colour has the index 0 and noise does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from backsight.errors import BacksightError

MINIMUM_CHROMA = 0.08  # of the range: below it (20 of 255 levels) a colour is grey
TOLERANCE = 30.0  # degrees within which two hues count as the same
SEPARATION = 60.0  # degrees that shown and canonical hue are apart where reverting can be told from keeping
LEAST_COLOUR = 0.1  # of the chroma shown: the smallest denominator of the reversion index


def object_chroma(images: Tensor, masks: Tensor) -> np.ndarray:
    """(B,) complex: the mean colour inside the mask, chroma as length in [0, 1] and HSV hue as angle.

    images: (B, 3, H, W) sRGB in [0, 1]; masks: (B, H, W) bool, True = counted; NaN where a mask is empty. Raises
    BacksightError on shapes that do not fit.
    """
    if images.ndim != 4 or images.shape[1] != 3 or masks.shape != (images.shape[0], *images.shape[2:]):
        raise BacksightError(
            "the colour of an object needs images (batch, 3, height, width) and one mask for each, "
            f"not {tuple(images.shape)} and {tuple(masks.shape)}"
        )
    weights = masks.flatten(1).to(images.dtype)
    mean = (images.flatten(2) @ weights[:, :, None])[:, :, 0] / weights.sum(1, keepdim=True)  # 0 / 0 is NaN
    red, green, blue = mean.detach().double().cpu().numpy().T
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    chroma = np.where(chroma < 1e-6, 0.0, chroma)  # what rounding leaves of a grey is no colour
    divisor = np.where(chroma > 0, chroma, 1.0)
    sextant = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    return chroma * np.exp(1j * np.pi / 3 * sextant)


def hue_of(colours: np.ndarray) -> np.ndarray:
    """Hues in degrees [0, 360) of complex colours; NaN where they are grey."""
    return np.where(np.abs(colours) >= MINIMUM_CHROMA, np.degrees(np.angle(colours)) % 360, np.nan)


def hue_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Angle between two hues, degrees in [0, 180]; NaN where one of them is."""
    return np.abs((np.asarray(first, float) - second + 180) % 360 - 180)


def hue_scores(shown: np.ndarray, made: np.ndarray) -> dict[str, np.ndarray]:
    """{"hue_error": degrees in [0, 180], of those that have a hue; "share_grey": 1 where the object comes back grey}.

    shown, made: complex colours of `object_chroma`. NaN where the object shown has no hue.
    """
    hues, visible = hue_of(made), ~np.isnan(hue_of(shown)) & ~np.isnan(made)
    return {
        "hue_error": hue_distance(hue_of(shown), hues),
        "share_grey": np.where(visible, np.isnan(hues).astype(float), np.nan),
    }


def reverted(shown: np.ndarray, made: np.ndarray, canonical: np.ndarray) -> np.ndarray:
    """1 where an object shown in another hue comes back in the canonical one (degrees), 0 where not; NaN where the two
    hues are less than SEPARATION apart, or where there is no canonical one."""
    apart = hue_distance(hue_of(shown), canonical)
    hues = hue_of(made)
    back = (hue_distance(canonical, hues) <= TOLERANCE) & ~(hue_distance(hue_of(shown), hues) <= TOLERANCE)
    return np.where(apart >= SEPARATION - 1e-6, back.astype(float), np.nan)


def nearer(shown: np.ndarray, made: np.ndarray, natural: np.ndarray) -> np.ndarray:
    """1 where what comes back has a hue that lies nearer to the natural one (degrees) than to the one shown, 0 where
    not; NaN as of `reverted`."""
    apart, hues = hue_distance(hue_of(shown), natural), hue_of(made)
    back = hue_distance(natural, hues) < hue_distance(hue_of(shown), hues)
    return np.where(apart >= SEPARATION - 1e-6, back.astype(float), np.nan)


def shares(shown: np.ndarray, made: np.ndarray, canonical: np.ndarray) -> dict[str, np.ndarray]:
    """{"share_keep" | "share_revert" | "share_grey" | "share_other": 0 or 1 for each object}.

    keep: within TOLERANCE of the hue shown; else revert: within TOLERANCE of the canonical one (degrees; nothing
    reverts where that is NaN); grey: no hue; else other. NaN where the shown and the canonical hue are less than
    SEPARATION apart. They add up to 1 for each object.
    """
    grey = hue_scores(shown, made)["share_grey"]
    known = ~np.isnan(canonical)
    judged = np.where(known, hue_distance(hue_of(shown), canonical) >= SEPARATION - 1e-6, ~np.isnan(grey))
    keep = (hue_distance(hue_of(shown), hue_of(made)) <= TOLERANCE).astype(float)
    revert = np.where(known, reverted(shown, made, canonical), 0.0)
    codes = {"keep": keep, "revert": revert, "grey": grey, "other": 1 - keep - revert - grey}
    return {f"share_{name}": np.where(judged, share, np.nan) for name, share in codes.items()}


def permutation_p(hits: np.ndarray, own: np.ndarray, labels: np.ndarray, deals: int, seed: int = 0) -> float:
    """How likely so many objects revert to their class's hue where the hues are dealt to the classes anew: p of a
    permutation test, one-sided.

    hits: (N, H) share of an object's cases that come back in each of H hues; own: (N,) which of them its class has;
    labels: (N,) classes. Source: Phipson & Smyth, Permutation p-values should never be zero, 2010.
    """
    classes, first, group = np.unique(labels, return_index=True, return_inverse=True)
    deck = own[first]
    sums = np.stack([hits[group == place].sum(0) for place in range(len(classes))])
    dealt = np.random.default_rng(seed).permuted(np.tile(deck, (deals, 1)), axis=1)
    chance = sums[np.arange(len(classes)), dealt].sum(1)
    return float((1 + (chance >= sums[np.arange(len(classes)), deck].sum() - 1e-9).sum()) / (deals + 1))


# ------------------------------------------------------------------------------------------------ reversion index


@dataclass(frozen=True)
class Response:
    """A response curve taken apart, for each image: see `respond`.

    follow: real, 1 where the colour turns with the hue shown; still: complex, the part that does not turn, as chroma of
    the range; level: (N,) mean chroma shown.
    """

    follow: np.ndarray
    still: np.ndarray
    level: np.ndarray


def respond(shown: np.ndarray, made: np.ndarray) -> Response:
    """The turning and the still part of the colours made under hue shifts that go round the circle evenly.

    shown: (K, N) complex; made: (…, K, N) complex. Least squares of `made = follow · shown + still` over the K
    shifts, follow real. NaN where the object shown has no hue. Raises BacksightError for fewer than three shifts.
    """
    if shown.shape[0] < 3 or made.shape[-2:] != shown.shape:
        raise BacksightError(
            f"a response needs the colours of at least three hue shifts, not {made.shape} for {shown.shape}"
        )
    centre = shown.mean(0)
    turning = shown - centre
    power = (np.abs(turning) ** 2).sum(0)
    level = np.abs(shown).mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        follow = np.real((made - made.mean(-2, keepdims=True)) * turning.conj()).sum(-2) / power
        still = made.mean(-2) - follow * centre
    seen = level >= MINIMUM_CHROMA
    return Response(np.where(seen, follow, np.nan), np.where(seen, still, np.nan), level)


def reversion_index(
    response: Response, hues: np.ndarray, labels: np.ndarray, canonical: np.ndarray, members: np.ndarray
) -> Callable[[np.ndarray], np.ndarray] | None:
    """The reversion index of some images as a statistic of how often each of N images counts: (R, N) -> (R,).

    response: follow, still (N,); hues: (N,) canonical (or placebo) hue in degrees; labels: (N,) classes; canonical:
    (N,) bool, False for the colour-free classes that calibrate; members: (N,) bool, the images whose index is wanted.
    None where no member has hues. Images of a class never calibrate themselves; without any calibration nothing is
    subtracted.
    """
    known = ~np.isnan(hues) & ~np.isnan(response.follow)
    members = members & known
    if not members.any():
        return None
    still, follow = np.where(known, response.still, 0), np.where(known, response.follow * response.level, 0)
    away = np.exp(-1j * np.radians(np.where(known, hues, 0)))
    classes, group = np.unique(labels, return_inverse=True)
    one_hot = np.eye(len(classes))[group]  # (N, classes)

    def index(weights: np.ndarray) -> np.ndarray:
        free, chosen = weights * (known & ~canonical), weights * members
        sums, counts = (free * still) @ one_hot, free @ one_hot
        others = counts.sum(1, keepdims=True) - counts
        with np.errstate(divide="ignore", invalid="ignore"):
            common = np.where(others > 0, (sums.sum(1, keepdims=True) - sums) / others, 0)  # (R, classes)
            pulls, total = np.real((still - common[:, group]) * away), chosen @ response.level
            pull, turning = (chosen * pulls).sum(1) / total, (chosen @ follow) / total
        return pull / np.maximum(np.maximum(turning, 0) + np.abs(pull), LEAST_COLOUR)

    return index
