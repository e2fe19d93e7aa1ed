"""Old home of rows.py, until all rooms have moved on."""

from backsight.inverses.rows import patchify, unpatchify

__all__ = ["patchify", "unpatchify"]
