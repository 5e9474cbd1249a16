"""What the preflight's looks say: findings, and numbers in words.

A look is a generator that yields Findings. It may return what later looks need.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

T = TypeVar("T")


@dataclass
class Finding:
    """What a look found. ok: as it should be; note: the run goes on, but look; no: the run would fail."""

    level: Literal["ok", "note", "no"]
    text: str


Look: TypeAlias = Generator[Finding, None, T]


def ok(text: str) -> Finding:
    return Finding("ok", text)


def note(text: str) -> Finding:
    return Finding("note", text)


def no(text: str) -> Finding:
    return Finding("no", text)


def fits(what: str, certain: float, more: float, room: float, parts: str, advice: str) -> Finding:
    """`no` where what is certain does not fit into `room`, `note` where the estimate on top does not. In bytes."""
    text = f"{what}: {size(certain)} of {parts.format(size(more))}; {size(room)} can be had"
    if certain > room:
        return no(f"{text}. {advice}")
    return note(f"{text}: it may not fit. {advice}") if certain + more > room else ok(text)


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def many(number: int, what: str) -> str:
    """1 step, 2 steps, 2 processes."""
    return f"{number} {what}" if number == 1 else f"{number} {what}{'es' if what.endswith('s') else 's'}"


def parameters_text(number: int) -> str:
    """A number of parameters for a person."""
    billions = number >= 5e7
    return f"{number / (1e9 if billions else 1e6):.3g} {'billion' if billions else 'million'} parameters"
