"""Errors that a user can cause and mend; the command line prints them as one sentence and exits with 2."""


class BacksightError(Exception):
    """One sentence that says what is wrong, where, and what to do."""


class SourceError(BacksightError):
    """A source of images, a split or an option that gives none; the sentence says what to do."""
