"""What a chat template writes around the contents of a conversation: its frame.

A prompt's token ids may differ from what the template makes of its messages now, for two reasons. The template wrote
another day, or had other arguments: then the ids are still right. Or somebody has edited the messages: then they are
not. The frame tells the two apart, also for files of other tools and of older versions.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.models import chat
from sppo.models.dates import CLOCK, asks_for_date
from sppo.models.files import template_files
from sppo.schema import Message, apart, only_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DAY = "day-probe"  # stands for a day, as a template writes it by strftime_now
_DAYS = datetime(2024, 7, 26), datetime(2025, 8, 27)  # of another year, month, day and weekday
_ASKED = [("user",), ("system", "user"), ("user", "assistant")]  # Mistral-Small's writes it without a system turn only
_MARK = r"<[^<>]*>|\[[^\[\]]*\]"  # how templates mark turns: <|im_end|>, <end_of_turn>, [/INST]
_EFFORTS = {"low", "medium", "high"}  # the usual values of reasoning_effort, which templates write out


def reads_as(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], messages: list[Message], template_kwargs: dict[str, Any]
) -> bool:
    """Whether `ids` are a prompt of just these messages, whatever the day was and whatever arguments the template had.

    Yes where the template makes these ids of the messages. Otherwise the text of the ids is compared: it must have the
    contents in order, each between the template's marks, and beside them only what the template itself writes. White
    space around a content does not count.
    """
    try:
        if chat.prompt_ids(tokenizer, messages, template_kwargs) == ids:
            return True
    except ValueError:
        pass  # perhaps these arguments are what it refuses
    text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    roles = tuple(m["role"] for m in messages)
    frames = [frame_of(tokenizer, roles, kwargs) for kwargs in ([template_kwargs, {}] if template_kwargs else [{}])]
    for shown in (messages, apart(messages).messages):  # templates leave out the thoughts of earlier turns
        contents = [m["content"].strip() for m in shown]
        if any(_is_framed(tokenizer, text, contents, frame) for frame in frames if frame):
            return True
    return False


def writes_date(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> bool:
    """Whether the template writes the date into some conversation with these arguments. Asked of it with two days."""

    def rendered(roles: tuple[str, ...], day: datetime) -> str:
        try:
            kwargs = {CLOCK: day.strftime, **template_kwargs}
            return chat.render(tokenizer, chat.probe_of(roles)[1], roles[-1] == "user", kwargs)
        except ValueError:
            return ""  # it refuses such a conversation, on any day

    return asks_for_date(tokenizer) and any(len({rendered(roles, day) for day in _DAYS}) > 1 for roles in _ASKED)


def date_identity(
    date: str, directory: Path, template_kwargs: dict[str, Any], remote_code: bool = False
) -> dict[str, str]:
    """{"date": date}, for the identity of a stage that reads prompts in the template of the model in `directory`.

    {} where that template writes no date, so that such work is the same on any day, and where no date is fixed. The
    tokenizer is only loaded where a file of the model asks for the date.
    """
    if not date:
        return {}
    if not any(CLOCK.encode() in file.read_bytes() for file in template_files(directory, remote_code)):
        return {}
    return {"date": date} if writes_date(chat.load_tokenizer(directory, remote_code), template_kwargs) else {}


def in_own_template(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """Why a conversation's only turn cannot be taken as a user's text: it is in this model's own chat template already.

    "" where it is not. schema.written_out knows the usual templates.
    """
    text, bos = only_text(messages), str(tokenizer.bos_token or "")
    for roles in (("user",), ("system", "user")):
        frame = frame_of(tokenizer, roles, {}) or ["", ""]
        before, behind = frame[0].strip().removeprefix(bos).strip(), frame[-1].strip()
        if before and behind and _DAY not in before + behind:
            begun = text.removeprefix(bos).strip()
            if begun.startswith(before) and begun.endswith(behind) and len(begun) >= len(before) + len(behind):
                return "in a chat template already"
    return ""


def frame_of(
    tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...], template_kwargs: dict[str, Any]
) -> list[str] | None:
    """What the template writes before, between and behind the contents of n messages: n + 1 texts.

    None where it refuses such roles, or does not write each content once and in order. Asked once for each sequence of
    roles.
    """
    known = tokenizer.__dict__.setdefault("_sppo_frames", {})
    key = roles, json.dumps(template_kwargs, sort_keys=True, default=str)
    if key not in known:
        texts, probe = chat.probe_of(roles)
        try:
            rendered = chat.render(tokenizer, probe, True, {**template_kwargs, CLOCK: lambda *_, **__: _DAY})
        except ValueError:
            rendered = ""
        split = re.split("(turn[0-9]+probe)", rendered)
        known[key] = split[::2] if split[1::2] == texts else None
    return known[key]


def _is_framed(tokenizer: PreTrainedTokenizerBase, text: str, contents: list[str], frame: list[str]) -> bool:
    """Whether `text` is the contents in this frame, for some day or other arguments."""
    place = 0
    for i, content in enumerate(contents):
        before, behind = re.escape(_last_mark(frame[i])), re.escape(_first_mark(frame[i + 1]))
        found = re.compile(rf"{before}(\s*){re.escape(content)}(?=\s*{behind})").search(text, place)
        if not found or not _is_written(tokenizer, text[place : found.start(1)], frame, i):
            return False
        place = found.end()
    return _is_written(tokenizer, text[place:], frame, len(contents))


def _is_written(tokenizer: PreTrainedTokenizerBase, text: str, frame: list[str], place: int) -> bool:
    """Whether the template writes `text` at this place of its frame, for some day or with other arguments.

    With other arguments it has the same marks of turns, and no word that the template does not have.
    """
    wanted = frame[place]
    day = r"\s*[^\n]{0,60}\s*".join(r"\s+".join(map(re.escape, part.split())) for part in wanted.split(_DAY))
    if re.fullmatch(day, text.strip()):
        return True
    edges = "".join(_last_mark(before) + _first_mark(behind) for before, behind in zip(frame, frame[1:], strict=False))
    turns = set(re.findall(_MARK, edges))
    marks, expected = ([m for m in re.findall(_MARK, t) if m in turns] for t in (text, wanted))
    source = chat.template_source(tokenizer).replace("\\n", "\n")
    return marks == expected and _words(text) <= _words(source + " ".join(frame)) | _EFFORTS


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def _first_mark(text: str) -> str:
    """The mark, or else the word, that comes first in a text of the template; "" for a day."""
    found = re.match(rf"{_MARK}|\S+", text.strip())
    return found[0] if found and _DAY not in found[0] else ""


def _last_mark(text: str) -> str:
    """The last marks and words without white space between them; "" for a day."""
    found = re.search(r"\S+$", text.strip())
    return found[0] if found and _DAY not in found[0] else ""
