"""Errors that a user can cause and mend; the command line prints them as one sentence and exits with 2."""

from collections.abc import Sequence
from difflib import get_close_matches


class BacksightError(Exception):
    """One sentence that says what is wrong, where, and what to do."""


class SourceError(BacksightError):
    """A source of images, a split or an option that gives none; the sentence says what to do."""


class WeightsError(BacksightError):
    """Weights that cannot be had here and now; the sentence says from where they could."""


def nearest(name: str, known: Sequence[str]) -> str:
    """ "nearest: a, b" or, where nothing is near, the first few names there are."""
    if close := get_close_matches(name, known, n=3, cutoff=0.5):
        return f"nearest: {', '.join(close)}"
    shown = ", ".join(list(known)[:6])
    return f"there are: {shown}{', …' if len(known) > 6 else ''}"
