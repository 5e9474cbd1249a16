"""Signs that a policy has gone wrong: answers that are empty, repeat themselves, or are cut."""

from __future__ import annotations

from typing import Any

_GRAM = 4
_SHARE = 0.25


def repeats(text: str) -> bool:
    """Whether an answer repeats itself: more than a quarter of its runs of four words stood in it before."""
    words = text.lower().split()
    grams = [tuple(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1)]
    return bool(grams) and 1 - len(set(grams)) / len(grams) > _SHARE


def health(responses: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the responses (text, token_ids, finish_reason) that are empty, repeat themselves, or are cut at
    maxlen, and their mean length in tokens.
    """
    count = len(responses)
    return {
        "mean_tokens": sum(len(r["token_ids"]) for r in responses) / count,
        "empty": sum(not r["text"].strip() for r in responses) / count,
        "repeated": sum(repeats(r["text"]) for r in responses) / count,
        "cut": sum(r["finish_reason"] == "length" for r in responses) / count,
    }
