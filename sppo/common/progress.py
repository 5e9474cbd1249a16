"""A progress bar with rate and time left, quiet enough for a log file."""

from __future__ import annotations

import sys
from typing import Any


def progress(total: int, label: str, unit: str, initial: int = 0) -> Any:
    """tqdm on a terminal; one line every ten seconds in a log."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total, initial=initial, desc=label, unit=unit, mininterval=0.2 if terminal else 10, dynamic_ncols=terminal
    )
