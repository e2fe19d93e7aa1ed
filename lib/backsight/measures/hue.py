"""What becomes of an object's colour: hue errors, chroma kept, and does it revert to the colour typical of its class?

The colour of an object is the mean sRGB colour inside its mask, as one complex number: length is the HSV chroma
(largest minus smallest channel), angle the HSV hue. Textures that change brightness only leave it where it is.

The reversion index reads a whole response curve: the hue shown goes round the circle while everything else stays. What
the reconstruction paints then falls apart into a part that turns with the hue shown (`follow`, in units of the chroma
shown: 1 for a perfect inverse) and a part that stays where it is. `pull` is the latter's component along the canonical
hue, less the same component in colour-free classes, which no prototype pulls anywhere: what is left depends on the
class. Then

    index = pull / (follow + |pull|):  0 for a perfect inverse, 1 for a painter of canonical colours,

with a denominator of at least LEAST_COLOUR, so that a picture without colour has the index 0 and noise does not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backsight.errors import BacksightError

MINIMUM_CHROMA = 0.08  # of the range: below it (20 of 255 levels) a colour has no hue
TOLERANCE = 30.0  # degrees within which two hues count as the same
SEPARATION = 60.0  # degrees that shown and canonical hue are apart where reverting can be told from keeping
GREY_SHARE = 0.25  # of the chroma shown: an object that keeps less is grey
LEAST_COLOUR = 0.1  # of the chroma shown: the smallest denominator of the reversion index
OUTCOMES = ("keep", "revert", "grey", "other")


def object_chroma(images: Tensor, masks: Tensor) -> np.ndarray:
    """(B,) complex: the mean colour inside the mask, chroma as length in [0, 1] and HSV hue as angle.

    images: (B, 3, H, W) sRGB in [0, 1]; masks: (B, H, W) bool, True = counted. Raises BacksightError on shapes that
    do not fit and on an empty mask.
    """
    if images.ndim != 4 or images.shape[1] != 3 or masks.shape != (images.shape[0], *images.shape[2:]):
        raise BacksightError(
            "the colour of an object needs images (batch, 3, height, width) and one mask for each, "
            f"not {tuple(images.shape)} and {tuple(masks.shape)}"
        )
    weights = masks.flatten(1).to(images.dtype)
    areas = weights.sum(1)
    if (areas == 0).any():
        raise BacksightError(f"the mask of image {int((areas == 0).nonzero()[0, 0])} is empty: leave such images out")
    mean = torch.bmm(images.flatten(2), weights[:, :, None])[:, :, 0] / areas[:, None]
    red, green, blue = mean.double().cpu().numpy().T
    value, lowest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    chroma = value - lowest
    chroma = np.where(chroma < 1e-6, 0.0, chroma)  # what rounding leaves of a grey is no colour
    divisor = np.where(chroma > 0, chroma, 1.0)
    sextant = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    return chroma * np.exp(1j * np.pi / 3 * sextant)


def hue_of(colours: np.ndarray) -> np.ndarray:
    """Hues in degrees [0, 360) of complex colours; NaN where the chroma is below MINIMUM_CHROMA."""
    return np.where(np.abs(colours) >= MINIMUM_CHROMA, np.degrees(np.angle(colours)) % 360, np.nan)


def hue_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Angle between two hues, degrees in [0, 180]; NaN where one of them is."""
    return np.abs((np.asarray(first, float) - second + 180) % 360 - 180)


def hue_error(images: Tensor, reconstructions: Tensor, masks: Tensor) -> np.ndarray:
    """(B,) angle between the hues of the object in two pictures, degrees in [0, 180].

    images, reconstructions: (B, 3, H, W) sRGB in [0, 1]; masks: (B, H, W) bool. NaN where the chroma of one of them
    is too low for a hue to exist.
    """
    return hue_distance(hue_of(object_chroma(images, masks)), hue_of(object_chroma(reconstructions, masks)))


def chroma_kept(shown: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Chroma of the reconstruction over the chroma shown; NaN where the object shown has no hue."""
    visible = np.abs(shown) >= MINIMUM_CHROMA
    return np.where(visible, np.abs(made) / np.where(visible, np.abs(shown), 1), np.nan)


def outcomes(shown: np.ndarray, made: np.ndarray, canonical: np.ndarray) -> np.ndarray:
    """What became of each object: the index into OUTCOMES, from its complex colours and canonical hue in degrees.

    grey: chroma below MINIMUM_CHROMA or below GREY_SHARE of the chroma shown. Else keep: within TOLERANCE of the hue
    shown. Else revert: within TOLERANCE of the canonical hue. Else other.
    """
    grey = np.abs(made) < np.maximum(MINIMUM_CHROMA, GREY_SHARE * np.abs(shown))
    keep = hue_distance(hue_of(shown), hue_of(made)) <= TOLERANCE
    revert = hue_distance(canonical, hue_of(made)) <= TOLERANCE
    return np.select([grey, keep, revert], [2, 0, 1], 3)


def separated(shown: np.ndarray, canonical: np.ndarray) -> np.ndarray:
    """Whether keeping and reverting are two things: the hue shown is SEPARATION degrees from the canonical one.

    An object shown grey is so too: whatever colour it gets was not shown.
    """
    distance = hue_distance(hue_of(shown), canonical)
    return (distance >= SEPARATION - 1e-6) | (np.isnan(hue_of(shown)) & ~np.isnan(canonical))


def shares(shown: np.ndarray, made: np.ndarray, canonical: np.ndarray) -> dict[str, np.ndarray]:
    """{"share_keep" | "share_revert" | "share_grey" | "share_other": 0 or 1 for each object}.

    NaN where the shown and the canonical hue are less than SEPARATION apart. They add up to 1 for each object.
    """
    found, judged = outcomes(shown, made, canonical), separated(shown, canonical)
    return {f"share_{name}": np.where(judged, found == code, np.nan) for code, name in enumerate(OUTCOMES)}


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


Weighted = Callable[[np.ndarray], np.ndarray]  # (R, N) how often each image counts in each of R draws -> (R,)


def reversion(
    response: Response, hues: np.ndarray, labels: np.ndarray, canonical: np.ndarray, members: np.ndarray
) -> dict[str, Weighted]:
    """The reversion index of some images and its two parts, as statistics of how often each of N images counts.

    response: follow, still (N,); hues: (N,) canonical (or placebo) hue in degrees; labels: (N,) classes; canonical:
    (N,) bool, False for the colour-free classes that calibrate; members: (N,) bool, the images whose index is wanted.
    Returns {"reversion_index", "hue_follow", "prototype_pull"}, {} where no member has hues. Images of a class never
    calibrate that class, so that the placebo of the colour-free classes is judged as honestly as the canonical ones.
    Where no colour-free image is left, nothing is subtracted. Chroma is averaged before it is divided by the chroma
    shown: divided image by image, one constant picture would pull pale and vivid objects differently, and so seem to
    know their classes.
    """
    known = ~np.isnan(hues) & ~np.isnan(response.follow)
    members = members & known
    if not members.any():
        return {}
    still, follow = np.where(known, response.still, 0), np.where(known, response.follow * response.level, 0)
    away = np.exp(-1j * np.radians(np.where(known, hues, 0)))
    classes, group = np.unique(labels, return_inverse=True)
    one_hot = np.eye(len(classes))[group]  # (N, classes)

    def parts(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        free, chosen = weights * (known & ~canonical), weights * members
        sums, counts = (free * still) @ one_hot, free @ one_hot
        others = counts.sum(1, keepdims=True) - counts
        with np.errstate(divide="ignore", invalid="ignore"):
            common = np.where(others > 0, (sums.sum(1, keepdims=True) - sums) / others, 0)  # (R, classes)
            pulls, total = np.real((still - common[:, group]) * away), chosen @ response.level
            return (chosen * pulls).sum(1) / total, (chosen * follow).sum(1) / total

    def index(weights: np.ndarray) -> np.ndarray:
        pull, turning = parts(weights)
        return pull / np.maximum(np.maximum(turning, 0) + np.abs(pull), LEAST_COLOUR)

    return {
        "reversion_index": index,
        "hue_follow": lambda weights: parts(weights)[1],
        "prototype_pull": lambda weights: parts(weights)[0],
    }
