"""A row of train.parquet, or of anybody's preference data, as token ids and win rates.

What was generated is what is trained on: where a row holds token ids of this very tokenizer and its text is still the
text that they spell, those ids are used. Otherwise, and for other tools' data, one templating of the conversation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from sppo.models import chat
from sppo.models.frames import in_own_template, reads_as
from sppo.schema import BeyondTextError, Message, as_messages, beyond_text, with_own_system, written_out
from sppo.training.dataset import RATES, WITHOUT_RATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WANTED = "is not a conversation, each turn with its text, that ends with the assistant"
_ROUNDING = 1e-9  # by so much a mean of win rates may lie beyond 0 or 1


@dataclass
class Row:
    """A row before its budgets: [(prompt ids, response ids)], their win rates, p, and which are the pair.

    drawn: the engine's log-probs of each response's tokens, where the row has its token ids and they are known.
    """

    sides: list[tuple[list[int], list[int]]]
    rates: list[float]
    p: float
    pair: tuple[int, int] = (0, 1)
    drawn: list[list[float] | None] | None = None


@dataclass
class Answered:
    """The chosen or the rejected side of a row: its prompt, its answer's text, and the generated response if any."""

    prompt: list[Message]
    text: str
    response: dict[str, Any] | None


@dataclass
class Reading:
    """How rows become token ids, and what is counted on the way.

    tokenizer_identity: of `tokenizer`. as_written: whether the file is byte for byte what compute_prob.py wrote, so
    that text and token ids need not be compared.
    """

    tokenizer: PreTrainedTokenizerBase
    tokenizer_identity: str
    stop_ids: set[int]
    template_kwargs: dict[str, Any]
    as_written: bool
    counts: Counter[str]

    def row(self, values: dict[str, Any], loss_type: str) -> Row:
        """A row of the file for a loss.

        Raises BeyondTextError for a row that cannot be used whole, and ValueError for one that cannot be trained on.
        """
        if more := beyond_text(values):
            raise BeyondTextError(more)
        if loss_type == "sppo_all":
            return self._all_responses(values)
        try:
            rates = win_rates([values.get(c) for c in RATES])
        except ValueError:
            if loss_type not in WITHOUT_RATES:
                raise
            rates = [np.nan] * 3
        return self._pair(values, rates)

    def _pair(self, values: dict[str, Any], rates: list[float]) -> Row:
        """The chosen and the rejected response."""
        responses, indices = [None, None], [values.get(f"{column}_index") for column in ("chosen", "rejected")]
        if self._known(values) and None not in indices:
            responses = [values["responses"][i] for i in indices]
        if self.as_written and _have_ids(responses):
            sides, drawn = self._as_drawn(values, responses)
        else:
            chosen, rejected = (
                Answered(*_conversation(values, column), response)
                for column, response in zip(("chosen", "rejected"), responses, strict=True)
            )
            if chosen.prompt != rejected.prompt:
                raise ValueError("chosen and rejected answer different prompts")
            self.counts["pairs_of_equal_answers"] += chosen.text == rejected.text
            self.counts["empty_answers"] += sum(not side.text.strip() for side in (chosen, rejected))
            sides, drawn = self._compared(values, [chosen, rejected])
        return Row(sides, rates[1:], rates[0], drawn=drawn)

    def _all_responses(self, values: dict[str, Any]) -> Row:
        """All K responses with their win rates, the row means of `probability`."""
        responses, probability = values["responses"] or [], values["probability"]
        k = len(responses)
        if len(probability or []) != k or any(len(line) != k for line in probability):
            raise ValueError(f"{k} responses, and a probability that is not {k} x {k}")
        probability = [win_rates(line) for line in probability]
        rates = [sum(line) / k for line in probability]
        kept = [i for i, response in enumerate(responses) if (response["text"] or "").strip()]
        self.counts["empty_responses_left_out"] += k - len(kept)
        if not kept:
            return Row([], [], 0.5)
        own, drawn = [rates[i] for i in kept], [responses[i] for i in kept]
        if self.as_written and self._known(values) and _have_ids(drawn):
            sides, logps = self._as_drawn(values, drawn)
        else:
            prompt = with_own_system(_messages(values["prompt"], "prompt"), values)
            _refuse_edited_pair(values, prompt)
            known = self._known(values)
            sides, logps = self._compared(values, [Answered(prompt, r["text"], r if known else None) for r in drawn])
        pair = int(np.argmax(own)), int(np.argmin(own))
        return Row(sides, own, probability[kept[pair[0]]][kept[pair[1]]], pair, logps)

    def _known(self, values: dict[str, Any]) -> bool:
        """Whether the row holds its prompt's token ids, of this very tokenizer, and the responses."""
        is_ours = values.get("tokenizer") == self.tokenizer_identity
        return is_ours and bool(values.get("prompt_token_ids") and values.get("responses"))

    def _as_drawn(self, values: dict[str, Any], responses: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
        self.counts["rows_from_generated_ids"] += 1
        sides = [(values["prompt_token_ids"], response["token_ids"]) for response in responses]
        return sides, [response.get("logps") for response in responses]

    def _compared(self, values: dict[str, Any], answered: list[Answered]) -> tuple[list[Any], list[Any] | None]:
        """Token ids of each side: those that were generated where the text is still theirs, else the template's.

        Of an edited row only what was edited is templated, so that a cut response gets no end that it never had.
        """
        if not _have_ids([side.response for side in answered]):
            self.counts["rows_from_template"] += 1
            return [self._templated(side.prompt, side.text) for side in answered], None
        sides, drawn, prompts = [], [], {}
        for side in answered:
            generated = values["prompt_token_ids"], side.response["token_ids"]
            key = repr(side.prompt)
            if key not in prompts:
                prompts[key] = self._spells_prompt(generated[0], side.prompt)
            stands = prompts[key], self._spells_answer(side)
            if stands[0] and isinstance(values.get("prompt"), list) and as_messages(values["prompt"]) != side.prompt:
                raise ValueError("prompt was edited; this loss trains on chosen and rejected, so edit it there")
            if all(stands):
                sides.append(generated)
            elif stands[1]:
                messages = self._for_template(side.prompt)
                sides.append((chat.prompt_ids(self.tokenizer, messages, self.template_kwargs), generated[1]))
            else:
                prompt, response = self._templated(side.prompt, side.text)
                sides.append((generated[0] if stands[0] else prompt, response))
            drawn.append(side.response.get("logps") if all(stands) else None)
        as_drawn = [(values["prompt_token_ids"], side.response["token_ids"]) for side in answered]
        self.counts["rows_from_generated_ids" if sides == as_drawn else "rows_edited"] += 1
        return sides, drawn

    def _spells_prompt(self, ids: list[int], prompt: list[Message]) -> bool:
        """Whether the policy read this very prompt, perhaps on another day or with other arguments of the template."""
        try:
            messages = chat.with_system(self.tokenizer, prompt, "")
        except ValueError:
            return False
        return reads_as(self.tokenizer, ids, messages, self.template_kwargs)

    def _spells_answer(self, side: Answered) -> bool:
        """Whether the response's token ids spell the text.

        Raises ValueError where they do, but the response's own text is another: only that one was edited.
        """
        ids = side.response["token_ids"]
        ids = ids[:-1] if ids[-1] in self.stop_ids else ids
        same = self.tokenizer.decode(ids, skip_special_tokens=True) == side.text
        if same and side.response.get("text") not in (None, side.text):
            raise ValueError("responses was edited; this loss trains on chosen and rejected, so edit it there")
        return same

    def _for_template(self, prompt: list[Message]) -> list[Message]:
        """The prompt as the template takes it.

        Raises BeyondTextError for one that is in a template already, or ends with an assistant's turn.
        """
        if reason := in_own_template(self.tokenizer, prompt) or written_out(prompt):
            raise BeyondTextError(f"prompt: {reason}")
        if prompt[-1]["role"] == "assistant":  # trl continues that turn; a chat template would begin another
            raise BeyondTextError("prompt: it ends with an assistant's turn, which the answer would continue")
        return chat.with_system(self.tokenizer, prompt, "")

    def _templated(self, prompt: list[Message], answer: str) -> tuple[list[int], list[int]]:
        """(prompt ids, response ids) of one templating of the conversation."""
        messages = self._for_template(prompt)
        text = chat.without_end(self.tokenizer, answer, self.stop_ids)
        self.counts["ends_spelled_behind_answers"] += text != answer
        ids = chat.response_ids(self.tokenizer, messages, text, self.stop_ids, self.template_kwargs)
        self.counts["ends_spelled_within_answers"] += any(i in self.stop_ids for i in ids[1][:-1])
        return ids


def _have_ids(responses: list[dict[str, Any] | None]) -> bool:
    return all(response and response.get("token_ids") for response in responses)


def _conversation(values: dict[str, Any], column: str) -> tuple[list[Message], str]:
    """(prompt, answer) of `chosen` or `rejected`: a whole conversation, or what follows the column `prompt`.

    trl's data sets have either form. What follows a prompt is a text, where the prompt is one, or messages of which the
    first is the assistant's.
    """
    value, prompt = values[column], values.get("prompt")
    is_plain = isinstance(prompt, str)
    if is_plain and isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    messages = _messages(value, column)
    if prompt is not None and messages[0]["role"] == "assistant":
        before = _messages([{"role": "user", "content": prompt}] if is_plain else prompt, "prompt")
        messages = messages if messages[: len(before)] == before else before + messages
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"{column} {_WANTED}")
    return with_own_system(messages[:-1], values), messages[-1]["content"]


def _messages(value: Any, column: str) -> list[Message]:
    """as_messages, whose errors name the column."""
    try:
        return as_messages(value)
    except BeyondTextError as error:
        raise BeyondTextError(f"{column}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{column} {_WANTED} ({error})") from None


def _refuse_edited_pair(values: dict[str, Any], prompt: list[Message]) -> None:
    """Raise ValueError where the pair was edited and the responses, which sppo_all trains on, were not."""
    for column in ("chosen", "rejected"):
        index = values.get(f"{column}_index")
        if not values.get(column) or index is None:
            continue
        drawn = prompt, values["responses"][index]["text"] or ""
        if _conversation(values, column) != drawn:
            raise ValueError(
                f"{column} was edited; sppo_all trains on responses, so edit prompt or responses[{index}] too"
            )


def win_rates(values: list[Any]) -> list[float]:
    """Win rates as floats. Raises ValueError for what is no number from 0 to 1."""
    are_numbers = all(isinstance(v, (int, float, Decimal)) and not isinstance(v, bool) for v in values)
    if not are_numbers or not all(-_ROUNDING <= v <= 1 + _ROUNDING for v in values):
        raise ValueError(f"win rates {values} are not {len(values)} numbers between 0 and 1")
    return [min(1.0, max(0.0, float(v))) for v in values]
