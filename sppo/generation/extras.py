"""Answers of other models to the prompts of a run, for --extra_responses: read, checked, and as token ids.

The paper's first iteration ranked such answers beside its own (uclaml/SPPO, issue 27). They join a prompt's K drawn
responses where the shards are put together, behind them; from there on all K + E are one tournament.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sppo.command.errors import SPPOError
from sppo.generation.files import file_rows
from sppo.models import chat
from sppo.models.thoughts import Marks, split
from sppo.schema import Message, as_messages, is_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 5  # prompt ids in a message
_START = 80  # characters of a prompt in a message
_COLUMNS = ["prompt_id", "response", "responses", "prompt"]


def extras_file(name: str) -> Path:
    """The file of --extra_responses. Raises SPPOError where there is none."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise SPPOError(f"--extra_responses {name}: no such file")
    return path


class Answer(NamedTuple):
    """An answer of another model. is_cut: it was broken off, as finish_reason `length` says, so it has no end."""

    text: str
    is_cut: bool = False


class Extras:
    """The answers of one file, by prompt_id, in the file's order.

    A row holds one answer as `response`, or several as `responses`: texts, or records with a `text`, as in another
    run's responses.parquet. Raises SPPOError for a file that is not so.
    """

    def __init__(self, name: str) -> None:
        self.what = f"--extra_responses {name}"
        self.answers: dict[str, list[Answer]] = {}
        self._asked: dict[str, str] = {}  # by prompt_id: what the user says last, where the file has the prompts too
        for row in file_rows(extras_file(name), _COLUMNS, "--extra_responses"):
            if "prompt_id" not in row or {"response", "responses"}.isdisjoint(row):
                raise SPPOError(f"{self.what}: a row without the columns prompt_id, and response or responses")
            prompt_id = row["prompt_id"]
            if prompt_id in (None, ""):
                raise SPPOError(f"{self.what}: a row without a prompt_id; its answer can be joined to nothing")
            self.answers.setdefault(str(prompt_id), []).extend(self._answers(row))
            if asked := _last_turn(row.get("prompt")):
                self._asked[str(prompt_id)] = asked

    def _answers(self, row: dict[str, Any]) -> list[Answer]:
        one, several = row.get("response"), row.get("responses")
        if one is not None and several is not None:
            raise SPPOError(f"{self.what}: prompt {row['prompt_id']} has both response and responses; keep one of them")
        found = [one] if several is None else several
        answers: list[Answer] = []
        for answer in found if isinstance(found, list) else [None]:
            record = answer if isinstance(answer, dict) else {"text": answer}
            text = record.get("text")
            if not is_text(text):
                raise SPPOError(f"{self.what}: prompt {row['prompt_id']} has an answer that is no text")
            answers.append(Answer(text, record.get("finish_reason") == "length"))
        return answers

    def each(self, prompt_ids: Collection[str]) -> int:
        """E, the number of answers that each of these prompts has; 0 without a prompt.

        Raises SPPOError, which says how many prompts lack answers and which, where it is not the same for all.
        """
        counts = {prompt_id: len(self.answers.get(prompt_id, ())) for prompt_id in prompt_ids}
        how_often = Counter(counts.values())
        if not counts:
            return 0
        if len(how_often) == 1 and 0 not in how_often:
            return next(iter(how_often))
        said = []
        for count, times in sorted(how_often.items()):
            ids = [prompt_id for prompt_id, found in counts.items() if found == count][:_SHOWN]
            more = ", ..." if times > len(ids) else ""
            said.append(f"{times} of {len(counts)} prompts have {count or 'none'} ({', '.join(ids)}{more})")
        raise SPPOError(f"{self.what}: each prompt of the run needs the same number of answers, but {'; '.join(said)}")

    def refuse_other_prompt(self, prompt_id: str, messages: list[Message]) -> None:
        """Raise SPPOError where the file has another prompt under this id, as files of two prompt sets have.

        A chat template's marks, or a system prompt in front, make no other prompt.
        """
        there, here = self._asked.get(prompt_id, ""), _last_turn(messages)
        if there and there not in here and here not in there:
            raise SPPOError(
                f"{self.what}: its prompt {prompt_id} is {there[:_START]!r}, and the run's is {here[:_START]!r}. Take "
                "the answers to this run's prompts; if they are, leave out the column prompt"
            )


def _last_turn(prompt: Any) -> str:
    """The words of a prompt's last turn; "" for what is no prompt."""
    try:
        text = prompt if isinstance(prompt, str) else as_messages(prompt)[-1]["content"]
    except ValueError:
        return ""
    return " ".join(text.split())


class Templater:
    """Makes answers of other models into responses: token ids by the chat template, with its end unless cut off."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: set[int],
        template_kwargs: dict[str, Any],
        marks: Marks | None = None,
    ) -> None:
        self.tokenizer, self.stop_ids, self.template_kwargs, self.marks = tokenizer, stop_ids, template_kwargs, marks

    def response(self, prompt: list[Message], answer: Answer) -> dict[str, Any]:
        """As generation writes one, without log-probs, which only the policy's engine knows.

        prompt: as the template takes it. Raises ValueError where the template refuses the conversation.
        """
        text = chat.without_end(self.tokenizer, answer.text, self.stop_ids)
        prompt_ids, ids = chat.response_ids(self.tokenizer, prompt, text, self.stop_ids, self.template_kwargs)
        own = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        is_cut = answer.is_cut and bool(own)
        if is_cut:
            ids = own
        elif own == ids:  # a template that puts no end behind an answer
            ids = [*ids, min(self.stop_ids, key=lambda token: (token != self.tokenizer.eos_token_id, token))]
        marks = self.marks.of_prompt(self.tokenizer, prompt_ids) if self.marks else None
        found = split(marks, self.tokenizer, ids) if marks else None
        # a template may write an empty thought before an answer; a mark within the answer is the answer's
        thought = {}
        if found and found.finished and not found.thought:
            thought = {"thought": found.thought, "thought_tokens": found.thought_tokens}
        reason = "length" if is_cut else "stop"
        return {"text": text, "token_ids": ids, "finish_reason": reason, "logps": None, **thought}

    def has_end_within(self, response: dict[str, Any]) -> bool:
        """Whether a response spells an end of turn before its own end. What follows is trained on as a part of it."""
        return any(token in self.stop_ids for token in response["token_ids"][:-1])
