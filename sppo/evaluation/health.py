"""Signs that a policy has gone wrong: answers that are empty, repeat themselves, or are cut."""

from __future__ import annotations

import re
from typing import Any

from sppo.schema import answer_tokens, has_answer

_GRAM, _SHARE = 4, 0.25  # runs of so many words; the share of them that may have stood there before
_END, _FEWEST, _TIMES = 50, 6, 3  # the last words; how many there must be; how often each stands there on average


def repeats(text: str) -> bool:
    """Whether an answer repeats itself.

    Either more than a quarter of its runs of four words stood in it before. Or its last 50 words are so few different
    ones that each stands there three times or more on average.
    """
    words = text.lower().split()
    grams = [tuple(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1)]
    if grams and 1 - len(set(grams)) / len(grams) > _SHARE:
        return True
    end = [word for word in re.findall(r"\w+", text.lower()) if not word.isdigit()][-_END:]  # no list's numbers
    return len(end) >= _FEWEST and len(end) >= _TIMES * len(set(end))


def health(responses: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the responses (text, token_ids, finish_reason) that are empty, repeat themselves, or are cut at
    maxlen, and their mean length in tokens.

    Of a model that thinks this is about its answers. Beside it stand its thoughts' mean length, marks and all, and the
    share of the responses whose thought did not end: they have no answer, so none that is empty.
    """
    count = len(responses)
    answers = [r for r in responses if has_answer(r)]
    found = {
        "mean_tokens": sum(map(answer_tokens, answers)) / max(len(answers), 1),
        "empty": sum(not r["text"].strip() for r in answers) / count,
        "repeated": sum(repeats(r["text"]) for r in answers) / count,
        "cut": sum(r["finish_reason"] == "length" for r in responses) / count,
    }
    thoughts = [r["thought_tokens"] for r in responses if r.get("thought_tokens") is not None]
    if thoughts:
        found["mean_thought_tokens"] = sum(thoughts) / len(thoughts)
        found["unfinished_thoughts"] = 1 - len(answers) / count
    return found
