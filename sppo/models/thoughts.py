"""What a model thinks before it answers: the marks around a thought, and a response that is split at them.

The marks are asked of the chat template, by rendering conversations that hold a thought and with thinking switched off,
never of a model's name. They may be single tokens (Qwen3's <think> and </think>), plain text of several tokens, or
gpt-oss's channels, where a thought and an answer are messages of their own.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sppo.command.errors import SPPOError
from sppo.models import chat
from sppo.models.files import template_files
from sppo.schema import THOUGHT_FIELDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Contents of probes, which no template writes by itself.
_ASKED, _THOUGHT, _SAID = "turn0probe", "thought1probe", "turn1probe"
# Arguments that switch thinking off, as templates call them.
_OFF = (
    {"enable_thinking": False},
    {"thinking": False},
    {"reasoning_effort": "none"},
    {"reasoning_effort": "no_think"},
)
_MARK = r"(?:<[^<>\s][^<>]*>|\[[^\[\]]+\]|◁[^◁▷]+▷)"  # how templates mark things: <think>, [THINK], ◁think▷
# A mark of this name marks a thought; <|no_think|> marks none.
_THINKS = r"(?!\|?no[nt]?_?(?:think|thought|reason))[\w:|]*(?:think|thought|reason)[\w:|]*"
_END = 64  # tokens of a prompt's end, which hold any mark
_PAIR = re.compile(rf"<({_THINKS})>[^<]*</\1>|\[({_THINKS})\][^\[]*\[/\2\]", re.IGNORECASE)


@dataclass(frozen=True)
class Marks:
    """How a model marks its thoughts.

    open, close: the marks, as text without white space around. ending: all that the template writes between a thought
    and its answer, white space too. is_open: whether the prompt ends with `open`, so that the model does not write it;
    `of_prompt` says it of one prompt.
    header: for a model that marks its answers too (gpt-oss) what stands before each answer; else "". stop_ids: the
    tokens that end a response.
    """

    open: str
    close: str
    ending: str
    open_ids: tuple[int, ...]
    close_ids: tuple[int, ...]
    ending_ids: tuple[int, ...]
    is_open: bool = False
    header: str = ""
    stop_ids: frozenset[int] = frozenset()

    def of_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> Marks | None:
        """The marks in a response to this prompt; None where the prompt closes an empty thought.

        Some templates open or close a thought by what a turn says: /no_think.
        """
        if self.header:
            return self
        end = _decoded(tokenizer, list(prompt_ids[-_END:])).rstrip()
        return None if end.endswith(self.close) else replace(self, is_open=end.endswith(self.open))

    def __str__(self) -> str:
        return f"{self.open} … {self.close}" + (", opened in the prompt" if self.is_open else "")


class Split(NamedTuple):
    """A response told apart.

    thought: None where nothing is marked. thought_tokens: how many tokens come before the answer's first one: the
    thought, the marks, and the white space behind them; None where `thought` is. finished: whether there is an answer,
    be it an empty one. Else all tokens are the thought's, and `text` is "".
    """

    thought: str | None
    text: str
    thought_tokens: int | None
    finished: bool


@dataclass(frozen=True)
class Budget:
    """--thinking_budget: a thought that has not ended after `tokens` tokens of a response is ended there."""

    tokens: int
    marks: Marks
    tokenizer: PreTrainedTokenizerBase

    def ending(self, prompt_ids: Sequence[int], token_ids: Sequence[int], room: int) -> list[int]:
        """What is put behind a response of `tokens` tokens to end its thought. Nothing where it is in no thought.

        What the response has begun to write of the mark is finished, not repeated. room: the most tokens that the
        response may have. Nothing too where it leaves no room for an answer.
        """
        marks, ids = self.marks.of_prompt(self.tokenizer, prompt_ids), tuple(token_ids)
        if marks is None:
            return []
        whole = _decoded(self.tokenizer, list(ids))
        is_open = marks.is_open or marks.header or marks.open in whole
        if not is_open or (marks.header or marks.close) in whole or marks.stop_ids & {*ids}:
            return []
        ending = marks.ending_ids
        for n in range(len(marks.close_ids) - 1, 0, -1):
            if ids[-n:] == marks.close_ids[:n]:
                behind = marks.ending.partition(marks.close)[2]
                ending = (*marks.close_ids[n:], *_ids(self.tokenizer, behind))
                break
        return list(ending) if len(ids) + len(ending) < room else []


# Splitting


def split(marks: Marks, tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> Split:
    """A drawn response, whose stop token may be its last, as thought and answer.

    All before the first `close` is no answer, also where `open` is missing or stands later than at the beginning. A
    response that has an `open` and no `close` has no answer. A token that holds the end of the mark and the beginning
    of the answer is the answer's.
    """
    ids = list(token_ids)
    whole, mark = _decoded(tokenizer, ids), marks.header or marks.close
    if mark not in whole:
        if marks.is_open or marks.header or marks.open in whole:
            thought = whole.removesuffix(_decoded(tokenizer, ids[-1:])) if ids and ids[-1] in marks.stop_ids else whole
            return Split(_without_marks(marks, thought), "", len(ids), False)
        return Split(None, _answer(marks, tokenizer, ids), None, True)

    # the fewest tokens that hold the whole mark
    n = bisect_left(range(len(ids)), True, key=lambda n: mark in _decoded(tokenizer, ids[:n]))
    before, _, behind = _decoded(tokenizer, ids[:n]).partition(mark)
    thought = _without_marks(marks, before)
    if behind.strip():
        # decoded together, as one may hold half a character, and the first one's space be left out
        end = len(_decoded(tokenizer, ids[n - 1 : n])) - len(behind)  # of the mark, in characters
        return Split(thought, _answer(marks, tokenizer, ids[n - 1 :])[end:].lstrip(), n - 1, True)
    while n < len(ids) and not _decoded(tokenizer, ids[n : n + 1]).strip():
        n += 1
    return Split(thought, _answer(marks, tokenizer, ids[n:]).lstrip(), n, n < len(ids))


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _answer(marks: Marks, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of an answer's tokens, as generation writes it."""
    ids = ids[:-1] if ids and ids[-1] in marks.stop_ids else ids
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _without_marks(marks: Marks, text: str) -> str:
    """A thought without the mark that it begins with; of several messages (gpt-oss) the text of each."""
    between = marks.close.removesuffix(marks.header) if marks.header else ""
    messages = text.split(between) if between else [text]
    texts = [message.strip().removeprefix(marks.open).strip() for message in messages]
    return "\n\n".join(filter(None, texts))


# Finding the marks


class _Found(NamedTuple):
    open: str
    ending: str
    header: str = ""


def marks_of(
    tokenizer: PreTrainedTokenizerBase, stop_ids: set[int], template_kwargs: dict[str, Any], tags: str
) -> Marks | None:
    """The marks of --thinking_tags: `auto` asks the template, `off` is none, else they are OPEN,CLOSE.

    None where nothing is thought: the template has no marks, or with these arguments it closes an empty thought in the
    prompt. Raises SPPOError where generation would stop at what ends a thought.
    """
    prompt = _prompt(tokenizer, template_kwargs)
    if tags == "off" or not prompt:
        return None
    found = _found(tokenizer, template_kwargs, prompt)
    if tags != "auto" and not (found and [found.open, found.ending.strip()] == _given(tags)):
        found = _Found(*_given(tags))  # else the template's own, with the white space that it writes
    close = found.ending.strip() if found else ""
    if not found or not close or prompt.rstrip().endswith(close):
        return None
    opened, closed, ending = (_ids(tokenizer, text) for text in (found.open, close, found.ending))
    if ends := stop_ids & {*ending}:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(ends))))
        raise SPPOError(
            f"this model ends its thoughts with {close!r}, and generation stops at {names}, so it would never answer; "
            "take that out of eos_token_id in the model's generation_config.json, or pass --thinking_tags off"
        )
    is_open = prompt.rstrip().endswith(found.open)
    return Marks(found.open, close, found.ending, opened, closed, ending, is_open, found.header, frozenset(stop_ids))


def thinking_identity(
    tags: str, directory: Path, template_kwargs: dict[str, Any], remote_code: bool = False
) -> dict[str, list[str]]:
    """{"thinking": [open, close]}, for the identity of a stage that splits responses of the model in `directory`.

    {} where nothing is split, as in work of versions that split nothing. The tokenizer is only loaded where a file of
    the model may hold marks.
    """
    if tags != "auto":
        return {} if tags == "off" else {"thinking": _given(tags)}
    files = template_files(directory, remote_code)
    if not any(may_think(file.read_text(encoding="utf-8", errors="replace")) for file in files):
        return {}
    marks = marks_of(chat.load_tokenizer(directory, remote_code), set(), template_kwargs, tags)
    return {"thinking": [marks.open, marks.close]} if marks else {}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _given(tags: str) -> list[str]:
    return [mark.strip() for mark in tags.split(",")]


def _found(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], prompt: str) -> _Found | None:
    """The marks that the template shows. prompt: what it writes behind a user's question."""
    if not may_think(chat.template_source(tokenizer)):
        return None
    return (
        _of_a_written_thought(tokenizer, kwargs, prompt)
        or _of_an_empty_thought(tokenizer, kwargs, prompt)
        or _of_a_dropped_thought(tokenizer, kwargs)
        or _of_words(tokenizer, kwargs, prompt)
    )


def may_think(source: str) -> bool:
    """Whether a template's text has a word without which none of its marks would be found."""
    return bool(re.search("think|thought|reason", source, re.IGNORECASE))


def _behind(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], *turns: dict[str, Any], prompt: bool) -> str:
    """What the template writes behind a user's question, with `turns` behind it; "" where it refuses that."""
    messages: list[Any] = [{"role": "user", "content": _ASKED}, *turns]
    try:
        return chat.render(tokenizer, messages, prompt, kwargs).partition(_ASKED)[2]
    except ValueError:
        return ""


def _prompt(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> str:
    return _behind(tokenizer, kwargs, prompt=True)


def _last_mark(text: str) -> str:
    """The mark that a text ends with, and a word that may stand behind it: <|channel>thought."""
    found = re.search(rf"{_MARK}\w*$", text.rstrip())
    return found[0] if found else ""


def _of_a_written_thought(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], prompt: str) -> _Found | None:
    """From an answer with a thought in a field or in a part of its own."""
    parts = [{"type": "thinking", "thinking": _THOUGHT}, {"type": "text", "text": _SAID}]
    turns: list[dict[str, Any]] = [{"content": _SAID, name: _THOUGHT} for name in THOUGHT_FIELDS]
    for turn in [*turns, {"content": parts}]:
        written = _behind(tokenizer, kwargs, {"role": "assistant", **turn}, prompt=False)
        if chat.is_printed(_THOUGHT, written):
            continue
        before, is_thought, rest = written.partition(_THOUGHT)
        ending, is_said, _ = rest.partition(_SAID)
        if is_thought and is_said and ending.strip():
            own = before.removeprefix(prompt).strip() if before.startswith(prompt) else ""
            opened = own or _last_mark(before)
            # what stands around the answer, as <answer>, is the answer's
            thought_ends = re.match(rf"\s*{re.escape(opened[:1] + '/' + opened[1:])}\s*", ending)
            ending = thought_ends[0] if thought_ends else ending
            return _Found(opened, ending, _header(tokenizer, kwargs, prompt, ending)) if opened else None
    return None


def _header(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], prompt: str, ending: str) -> str:
    """What the template writes before an answer without a thought, where that is also how `ending` ends (gpt-oss)."""
    written = _behind(tokenizer, kwargs, {"role": "assistant", "content": _SAID}, prompt=False)
    header = written.removeprefix(prompt).partition(_SAID)[0].strip() if written.startswith(prompt) else ""
    close = ending.strip()
    return header if header != close and close.endswith(header) else ""


def _of_an_empty_thought(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], prompt: str) -> _Found | None:
    """From what the template adds to the prompt, or writes instead, when thinking is switched off."""
    for off in _OFF:
        closed = _prompt(tokenizer, {**kwargs, **off})
        added = closed.removeprefix(prompt.rstrip()).strip() if closed.startswith(prompt.rstrip()) else ""
        close = re.search(rf"{_MARK}$", added)
        if close:
            opened = added[: close.start()].strip() or _last_mark(prompt)
        else:  # another mark in its place, as DeepSeek-V3.1's
            opened, instead = _last_mark(prompt), _last_mark(closed)
            same = prompt.rstrip().removesuffix(opened) == closed.rstrip().removesuffix(instead)
            close = re.search(_MARK, instead) if same and instead.replace("/", "", 1) == opened != instead else None
        if close and opened:
            return _Found(opened, close[0])
    return None


def _of_a_dropped_thought(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> _Found | None:
    """From an earlier answer whose text holds a thought in marks, which the template leaves out."""
    for opened, close in _candidates(chat.template_source(tokenizer)):
        said = {"role": "assistant", "content": f"{opened}{_THOUGHT}{close}{_SAID}"}
        written = _behind(tokenizer, kwargs, said, {"role": "user", "content": _ASKED}, prompt=True)
        if _SAID in written and _THOUGHT not in written:
            return _Found(opened, close)
    return None


def _candidates(source: str) -> Iterator[tuple[str, str]]:
    """The pairs of marks that a template's source could mean by a mark that closes a thought."""
    for name, word in sorted(set(re.findall(r"<\|(\w+)>(\w*)", source)), key=lambda pair: pair[1], reverse=True):
        if f"<{name}|>" in source:  # Gemma-4's <|channel>thought before <|channel>
            yield f"<|{name}>{word}", f"<{name}|>"
    for name in dict.fromkeys(re.findall(rf"</({_THINKS})>", source, re.IGNORECASE)):
        yield f"<{name}>", f"</{name}>"
    for name in dict.fromkeys(re.findall(rf"\[/({_THINKS})\]", source, re.IGNORECASE)):
        yield f"[{name}]", f"[/{name}]"


def _of_words(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], prompt: str) -> _Found | None:
    """From a mark of a thought that the prompt ends with, or from a pair of them that the template tells the model."""
    for pattern in (rf"<({_THINKS})>$", rf"\[({_THINKS})\]$"):
        if found := re.search(pattern, prompt.rstrip(), re.IGNORECASE):
            return _Found(found[0], f"{found[0][0]}/{found[0][1:]}")
    try:
        told = chat.render(tokenizer, [{"role": "user", "content": _ASKED}], True, kwargs).partition(_ASKED)[0]
    except ValueError:
        return None
    if found := _PAIR.search(told):
        name = found[1] or found[2]
        return _Found(f"<{name}>", f"</{name}>") if found[1] else _Found(f"[{name}]", f"[/{name}]")
    return None
