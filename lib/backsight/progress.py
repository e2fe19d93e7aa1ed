"""Progress bars of long work: on the screen while it runs, in no saved notebook."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, *, show: bool = True, **settings: Any) -> Any:
    """tqdm's bar for here (terminal or notebook), gone when the work is done.

    show=False, or TQDM_DISABLE in the environment: no bar. settings: of tqdm (total, desc, initial, unit).
    """
    hidden = not show or bool(os.environ.get("TQDM_DISABLE"))
    return tqdm(iterable, leave=False, disable=hidden, **settings)
