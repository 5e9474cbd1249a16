"""What the cards of models and of data sets share."""

from __future__ import annotations

from typing import Any

PAPER = "Self-Play Preference Optimization (SPPO, arXiv 2405.00675)"


def table(name: str, values: dict[str, Any]) -> list[str]:
    """The lines of a Markdown table with two columns: a name and its value."""
    cells = {k: "" if v is None else str(v).replace("|", "\\|").replace("\n", " ") for k, v in values.items()}
    return [f"| {name} | |", "|---|---|", *(f"| {k} | {v} |" for k, v in cells.items()), ""]
