"""Signs that a policy has gone wrong: answers that are empty, repeat themselves, or are cut."""

from __future__ import annotations

import re
from typing import Any

from sppo.schema import answer_tokens, has_answer

# Letters of scripts that put no space between words: Thai, Lao, Burmese, Khmer, kana, Chinese. Each counts as a word.
_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD, _LETTER = re.compile(rf"[{_ALONE}]|[^\s{_ALONE}]+"), re.compile(f"[{_ALONE}]")
_GRAM, _SHARE = 4, 0.25  # runs of so many words; the share of them that may have stood there before
_LETTERS = 16  # the same, of words that are letters: about as much text
_END, _FEWEST, _TIMES = 50, 6, 3  # the last words; how many there must be; how often each stands there on average


def repeats(text: str) -> bool:
    """Whether an answer repeats itself.

    Either more than a quarter of its runs of four words stood in it before (of 16 letters, where no spaces part words).
    Or its last 50 words are so few different ones that each stands there three times or more on average.
    """
    found = words(text)
    size = _LETTERS if 2 * len(_LETTER.findall(text)) > len(found) else _GRAM
    grams = [tuple(found[i : i + size]) for i in range(len(found) - size + 1)]
    if grams and 1 - len(set(grams)) / len(grams) > _SHARE:
        return True
    end = [word for word in re.findall(r"\w+", text.lower()) if not word.isdigit()][-_END:]  # no list's numbers
    return len(end) >= _FEWEST and len(end) >= _TIMES * len(set(end))


def words(text: str) -> list[str]:
    """A text's words, in small letters: what white space parts, and each letter of a script that does without."""
    return _WORD.findall(text.lower())


# Shares of the held-out answers above which a policy has gone wrong. Few answers of a chat model are empty or repeat
# themselves. Many may be cut where --maxlen is small, so that share may be larger.
BOUNDS = {"empty": 0.02, "repeated": 0.1, "cut": 0.2}


def signs(response: dict[str, Any]) -> dict[str, bool]:
    """Whether a response (text, token_ids, finish_reason) is empty, repeats itself, or is cut at maxlen.

    One without an answer, because its thought did not end, is neither empty nor repeats itself.
    """
    answered = has_answer(response)
    return {
        "empty": answered and not response["text"].strip(),
        "repeated": answered and repeats(response["text"]),
        "cut": response["finish_reason"] == "length",
    }


def health(responses: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the responses (text, token_ids, finish_reason) that are empty, repeat themselves, or are cut at
    maxlen, and their mean length in tokens.

    Of a model that thinks this is about its answers. Beside it stand its thoughts' mean length, marks and all, and the
    share of the responses whose thought did not end: they have no answer, so none that is empty.
    """
    count = len(responses)
    answers = [r for r in responses if has_answer(r)]
    found = {"mean_tokens": sum(map(answer_tokens, answers)) / max(len(answers), 1)}
    each = [signs(r) for r in responses]
    found |= {name: sum(of[name] for of in each) / count for name in BOUNDS}
    thoughts = [r["thought_tokens"] for r in responses if r.get("thought_tokens") is not None]
    if thoughts:
        found["mean_thought_tokens"] = sum(thoughts) / len(thoughts)
        found["unfinished_thoughts"] = 1 - len(answers) / count
    return found
