"""Answers of other models to the prompts of a run, for --extra_responses: read, checked, and as token ids.

The paper's first iteration ranked such answers beside its own (uclaml/SPPO, issue 27). They join a prompt's K drawn
responses where the shards are put together, behind them; from there on all K + E are one tournament.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.command.errors import SPPOError
from sppo.generation.files import file_rows
from sppo.models import chat
from sppo.models.thoughts import Marks, split
from sppo.schema import Message, is_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 5  # prompt ids in a message


def extras_file(name: str) -> Path:
    """The file of --extra_responses. Raises SPPOError where there is none."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise SPPOError(f"--extra_responses {name}: no such file")
    return path


class Extras:
    """The answers of one file, by prompt_id, in the file's order.

    A row holds one answer as `response`, or several as `responses`: texts, or records with a `text`, as in another
    run's responses.parquet. Raises SPPOError for a file that is not so.
    """

    def __init__(self, name: str) -> None:
        self.what = f"--extra_responses {name}"
        self.answers: dict[str, list[str]] = {}
        rows = file_rows(extras_file(name), ["prompt_id", "response", "responses"], "--extra_responses")
        for row in rows:
            if "prompt_id" not in row or {"response", "responses"}.isdisjoint(row):
                raise SPPOError(f"{self.what}: a row without the columns prompt_id, and response or responses")
            prompt_id = row["prompt_id"]
            if prompt_id in (None, ""):
                raise SPPOError(f"{self.what}: a row without a prompt_id; its answer can be joined to nothing")
            self.answers.setdefault(str(prompt_id), []).extend(self._texts(row))

    def _texts(self, row: dict[str, Any]) -> list[str]:
        found = row["responses"] if row.get("responses") is not None else [row.get("response")]
        texts: list[str] = []
        for answer in found if isinstance(found, list) else [None]:
            text = answer.get("text") if isinstance(answer, dict) else answer
            if not is_text(text):
                raise SPPOError(f"{self.what}: prompt {row['prompt_id']} has an answer that is no text")
            texts.append(text)
        return texts

    def each(self, prompt_ids: Collection[str]) -> int:
        """E, the number of answers that each of these prompts has.

        Raises SPPOError, which says how many prompts lack answers and which, where it is not the same for all.
        """
        counts = {prompt_id: len(self.answers.get(prompt_id, ())) for prompt_id in prompt_ids}
        how_often = Counter(counts.values())
        (most, _), *others = how_often.most_common()
        if most and not others:
            return most
        said = []
        for count, times in sorted(how_often.items()):
            ids = [prompt_id for prompt_id, found in counts.items() if found == count][:_SHOWN]
            more = ", ..." if times > len(ids) else ""
            said.append(f"{times} of {len(counts)} prompts have {count or 'none'} ({', '.join(ids)}{more})")
        raise SPPOError(f"{self.what}: each prompt of the run needs the same number of answers, but {'; '.join(said)}")


class Templater:
    """Makes answers of other models into responses: their token ids are the chat template's, with a stop at the end."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: set[int],
        template_kwargs: dict[str, Any],
        marks: Marks | None = None,
    ) -> None:
        self.tokenizer, self.stop_ids, self.template_kwargs, self.marks = tokenizer, stop_ids, template_kwargs, marks

    def response(self, prompt: list[Message], answer: str) -> dict[str, Any]:
        """As generation writes one, without log-probs, which only the policy's engine knows.

        prompt: as the template takes it. Raises ValueError where the template refuses the conversation.
        """
        text = chat.without_end(self.tokenizer, answer, self.stop_ids)
        _, ids = chat.response_ids(self.tokenizer, prompt, text, self.stop_ids, self.template_kwargs)
        if not ids or ids[-1] not in self.stop_ids:  # a template that puts no end behind an answer
            ids = [*ids, min(self.stop_ids, key=lambda token: (token != self.tokenizer.eos_token_id, token))]
        found = split(self.marks, self.tokenizer, ids) if self.marks else None
        # a template may write an empty thought before an answer
        thought = {"thought": found.thought, "thought_tokens": found.thought_tokens} if found and found.finished else {}
        return {"text": text, "token_ids": ids, "finish_reason": "stop", "logps": None, **thought}
