"""How a judge's answer is read: where its verdict stands, what the verdict names, and its log-probability.

A verdict is a match of a regex with one group, the last one in the answer. The group's text names the first response
(A, 1, first), the second (B, 2, second), or a tie (C, tie, equal), in capitals or not.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sppo.command.errors import UsageError
from sppo.rankers.chat_server import is_logprob

HARD = 10.0  # an answer without log-probs has this logit, or its negative
_UNLISTED = -9999.0  # what servers write where a token has no probability
_NAMES = (("a", "b"), ("1", "2"), ("first", "second"))
_TIES = ("c", "tie", "equal")
_BROKEN_OFF = ("length", "content_filter", "abort", "error")  # reasons for which an answer ends before its end


class Verdict(NamedTuple):
    """What a judge says of two responses.

    `logit`: above 0 where the first is better, 0 for a tie; NaN where it names neither, or gives log-probs that are not
    valid. `is_hard`: it comes from the words alone, without log-probs, and is HARD or -HARD. `is_cut`: the answer has
    no verdict because it had no room for one. `unknown`: what the regex's group holds, where it names nothing.
    """

    logit: float
    is_hard: bool = False
    is_cut: bool = False
    unknown: str = ""


def verdict_pattern(regex: str, flag: str) -> re.Pattern[str]:
    """The regex of a verdict. Raises UsageError, which names the flag, where it is none or has not one group."""
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UsageError(f"{flag} {regex}: not a regular expression of Python: {error}") from None
    if pattern.groups != 1:
        raise UsageError(
            f"{flag} {regex}: {pattern.groups} groups; it needs one pair of brackets around what names the better "
            r"response, as in \[\[([ABC])\]\], and (?:...) for all others"
        )
    return pattern


def read_choice(choice: dict[str, Any], pattern: re.Pattern[str], first: bool = False) -> Verdict:
    """The verdict of one choice of a chat completion; its logit is read at the token in which the group's text begins.

    A judge may quote a verdict that stands in a response, so the last match counts, behind its thoughts. An answer that
    was broken off, by its length or a filter, has not said its last word, and has no verdict. `first`: the first match
    counts, as soon as it is said.
    """
    answer, places = _answer(choice), (choice.get("logprobs") or {}).get("content") or []
    ended = choice.get("finish_reason")
    is_cut = ended == "length"
    standing = list(_standing(places, answer, pattern, first))
    found = standing[0][1] if first and standing else _match(pattern, answer, first)
    names = _names(found[1]) if found else ()
    if not found or not names or (ended in _BROKEN_OFF and not first):
        return Verdict(math.nan, is_cut=is_cut, unknown=found[1] if found and not names else "")
    if found[1] not in names:
        return Verdict(0.0)  # a tie

    for place, match in standing:
        if match[1] == found[1] == _spells(place["token"], names):
            logit = _logit_at(place, names)
            if logit is not None:
                return Verdict(logit)
    return Verdict(HARD if found[1] == names[0] else -HARD, is_hard=True)


def vote(verdicts: Iterable[Verdict]) -> float:
    """log((wins + 1/2) / (losses + 1/2)) of the first response; NaN where no verdict counts.

    A tie is half a win and half a loss. An answer without a verdict is no vote.
    """
    signs = [np.sign(verdict.logit) for verdict in verdicts if not math.isnan(verdict.logit)]
    wins, losses = (sum((1 + side * sign) / 2 for sign in signs) for side in (1, -1))
    return math.log((wins + 0.5) / (losses + 0.5)) if signs else math.nan


def _answer(choice: dict[str, Any]) -> str:
    """What the judge says behind its thoughts; servers that know a model's thoughts have taken them out already."""
    said = (choice.get("message") or {}).get("content") or ""
    said = said.rpartition("</think>")[2].strip()
    return "" if said.startswith("<think>") else said


def _match(pattern: re.Pattern[str], text: str, first: bool) -> re.Match[str] | None:
    """The first match, or the last; a group that takes no part, or is empty, names nothing."""
    found = [match for match in pattern.finditer(text) if match[1]]
    return found[0 if first else -1] if found else None


def _names(said: str) -> tuple[str, ...]:
    """The names of the first and the second response, written as in `said`; () where it names neither, nor a tie."""
    word = said.casefold()
    if word in _TIES:
        return _NAMES[0]
    for both in _NAMES:
        if word in both:
            written = str.upper if said.isupper() else str.title if said.istitle() else str.lower
            return tuple(map(written, both)) if written(word) == said else ()
    return ()


def _spells(token: str, names: tuple[str, ...]) -> str:
    """Which of the two names a token spells, or begins to: "A" for " A", "▁A", "ĠA" or "**A"; "" for neither.

    An "a" is no "A": it may be the article. What begins both names tells nothing.
    """
    letters = re.sub("[^A-Za-z0-9]", "", token)
    begun = [name for name in names if letters and name.startswith(letters)]
    return begun[0] if len(begun) == 1 else ""


def _standing(
    places: list[dict[str, Any]], answer: str, pattern: re.Pattern[str], first: bool
) -> Iterator[tuple[dict[str, Any], re.Match[str]]]:
    """(the token in which the verdict begins, the verdict), as far as the log-probs have it, the likeliest first.

    The tokens hold the thoughts too, and servers spell them in several ways; so the answer's start is looked for as it
    stands, else behind the thoughts, else at the start. `first`: a token is a verdict by itself, whatever is beside it.
    """
    if not answer or not places:
        return
    starts, joined = [], ""
    for place in places:
        starts.append(len(joined))
        joined += place["token"].translate({ord("▁"): " ", ord("Ġ"): " ", ord("Ċ"): "\n"})
    tokens = list(zip(starts, [*starts[1:], len(joined)], strict=True))
    for begin in (joined.rfind(answer), len(joined) - len(joined.rpartition("</think>")[2]), 0):
        pieces = [piece for piece in tokens if piece[1] > begin] if first else [(begin, len(joined))]
        for start, end in pieces if begin >= 0 else []:
            if match := _match(pattern, joined[start:end], first):
                yield places[bisect_right(starts, start + match.start(1)) - 1], match
                break


def _logit_at(place: dict[str, Any], names: tuple[str, ...]) -> float | None:
    """log P(first) - log P(second) at one token of an answer, each over all spellings of the name.

    A name that is not listed is taken to be as likely as the least likely token that is. None where the server lists
    no alternatives to what was said. NaN where one of its log-probs is not a valid number: without that token the rest
    would look like certainty.
    """
    tops = place.get("top_logprobs") or []
    if not all(is_logprob(top["logprob"]) for top in tops):
        return math.nan
    listed = [(_spells(top["token"], names), top["logprob"]) for top in tops if top["logprob"] > _UNLISTED]
    if len(listed) < 2:
        return None
    least = min(logp for _, logp in listed)
    first, second = ([logp for name, logp in listed if name == one] or [least] for one in names)
    return float(np.logaddexp.reduce(first) - np.logaddexp.reduce(second))
