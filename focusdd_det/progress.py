"""One progress bar for all long work: a bar on a terminal, a line twice a minute in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, what: str, unit: str = "img") -> Any:
    """A tqdm bar with rate and estimate; `update(n)` moves it."""
    seconds = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, desc=what, unit=unit, smoothing=0.05, mininterval=seconds, maxinterval=2 * seconds)
