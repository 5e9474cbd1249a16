"""What a person sees in the terminal: a progress bar with rate and time left, quiet enough for a log; columns."""

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


def columns(lines: list[list[str]]) -> list[str]:
    """Lines of cells as text, the cells under each other; a line may have fewer cells than the first."""
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(lines[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=False)) for line in lines]
