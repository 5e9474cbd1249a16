"""A row of train.parquet, or of anybody's preference data, as token ids and win rates.

What was generated is what is trained on: where a row holds token ids of this very tokenizer and its text is still the
text that they spell, those ids are used. Otherwise, and for other tools' data, one templating of the conversation.

A response's token ids hold its thought, if it has one, and its answer; texts are of the answer alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sppo.models import chat
from sppo.models.frames import in_own_template, reads_as
from sppo.recipe import Recipe
from sppo.schema import (
    BeyondTextError,
    Message,
    as_messages,
    beyond_text,
    has_answer,
    together,
    with_own_system,
    written_out,
)
from sppo.training.dataset import RATES, WITHOUT_RATES
from sppo.training.thoughts import Answer, answer_start, as_template_takes, refuse_without_answer, rewritten, spells

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WANTED = "is not a conversation, each turn with its text, that ends with the assistant"
_ENDLESS = "a thought has no end, which only token ids of its own tokenizer can show"
_ROUNDING = 1e-9  # a mean of win rates may lie this far below 0 or above 1


class Tokens(NamedTuple):
    """The token ids of a prompt and of one response to it, before they are cut to their budgets."""

    prompt: list[int]
    response: list[int]
    logps: list[float] | None = None  # the engine's, one a response token; None where they are not known
    thought: int = 0  # how many of the response's come before its answer


@dataclass
class Row:
    """A row of the data set: two responses, chosen first, or for `sppo_all` up to K."""

    responses: list[Tokens]
    win_rates: list[float]  # P(response > policy) of each
    p: float  # P(chosen > rejected)
    pair: tuple[int, int] = (0, 1)  # which of the responses are the chosen and the rejected one


@dataclass
class Reading:
    """How rows become token ids, and what is counted on the way.

    as_written: whether the file is byte for byte what compute_prob.py wrote, so that text and token ids need not be
    compared.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    stop_ids: set[int]
    as_written: bool
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.tokenizer_identity = chat.tokenizer_identity(self.tokenizer)
        self.template_kwargs = self.recipe.chat_template_kwargs

    def row(self, values: dict[str, Any]) -> Row:
        """A row of the file for the recipe's loss. `values`: the row's columns.

        Raises BeyondTextError for a row that cannot be used whole, and ValueError for one that cannot be trained on.
        """
        if more := beyond_text(values):
            raise BeyondTextError(more)
        loss_type = self.recipe.loss_type
        if loss_type == "sppo_all":
            return self._all_responses(values)
        try:
            p, *rates = as_rates([values.get(column) for column in RATES])
        except ValueError:
            if loss_type not in WITHOUT_RATES:
                raise
            p, *rates = [np.nan] * 3
        pair = self._pair(values)
        for tokens in pair:
            self._refuse_without_answer(tokens)
        return Row(pair, rates, p)

    def _pair(self, values: dict[str, Any]) -> list[Tokens]:
        """The chosen and the rejected response."""
        drawn = _drawn_pair(values)
        generated = drawn if self._has_prompt_ids(values) else []
        if self.as_written and _have_ids(generated):
            return self._as_generated(values, generated)

        prompt, chosen = _conversation(values, "chosen")
        other_prompt, rejected = _conversation(values, "rejected")
        if prompt != other_prompt:
            raise ValueError("chosen and rejected answer different prompts")
        self.counts["pairs_of_equal_answers"] += chosen.text == rejected.text
        self.counts["empty_answers"] += (not chosen.text.strip()) + (not rejected.text.strip())
        answers = [chosen, rejected]
        if not _have_ids(generated) and any(map(_is_endless, drawn)):
            raise BeyondTextError(_ENDLESS)
        if drawn:  # their thoughts are beside the texts
            answers = [a._replace(thought=a.thought or _thought(r)) for a, r in zip(answers, drawn, strict=True)]
        return self._compared(values, prompt, answers, generated)

    def _all_responses(self, values: dict[str, Any]) -> Row:
        """All K responses with their win rates, the row means of `probability`. Those without a text are left out, but
        not a thought without an end, which teaches to end thoughts.
        """
        responses, probability = values["responses"] or [], values["probability"]
        k = len(responses)
        if len(probability or []) != k or any(len(line) != k for line in probability):
            raise ValueError(f"{k} responses, and a probability that is not {k} x {k}")
        probability = [as_rates(line) for line in probability]

        kept = [i for i, each in enumerate(responses) if (each["text"] or "").strip() or not has_answer(each)]
        self.counts["empty_responses_left_out"] += k - len(kept)
        if not kept:
            return Row([], [], 0.5)
        generated = [responses[i] for i in kept] if self._has_prompt_ids(values) else []
        if self.as_written and _have_ids(generated):
            tokens = self._as_generated(values, generated)
        else:
            prompt = _prompt(_messages(values["prompt"], "prompt"), values)
            _refuse_edited_pair(values, prompt)
            if not _have_ids(generated):  # a template would put an end behind it
                endless = [i for i in kept if _is_endless(responses[i])]
                self.counts.update([f"responses_left_out ({_ENDLESS})"] * len(endless))
                kept = [i for i in kept if i not in endless]
            answers = [Answer(responses[i]["text"], _thought(responses[i])) for i in kept]
            tokens = self._compared(values, prompt, answers, generated)

        answered = [n for n, each in enumerate(tokens) if self._has_answer(each)]
        tokens, kept = [tokens[n] for n in answered], [kept[n] for n in answered]
        if not kept:
            return Row([], [], 0.5)
        rates = [sum(probability[i]) / k for i in kept]
        best, worst = int(np.argmax(rates)), int(np.argmin(rates))
        return Row(tokens, rates, probability[kept[best]][kept[worst]], (best, worst))

    def _refuse_without_answer(self, tokens: Tokens) -> None:
        """Raise BeyondTextError where the answer alone is trained on, and there is none within the budgets."""
        if not self.recipe.train_thoughts:
            prompt = min(len(tokens.prompt), self.recipe.max_prompt_length)
            refuse_without_answer(tokens.thought, len(tokens.response), self.recipe.max_length - prompt)

    def _has_answer(self, tokens: Tokens) -> bool:
        """The same as an answer, and counted."""
        try:
            self._refuse_without_answer(tokens)
        except BeyondTextError as error:
            self.counts[f"responses_left_out ({error})"] += 1
            return False
        return True

    def _has_prompt_ids(self, values: dict[str, Any]) -> bool:
        """Whether the row holds its prompt's token ids, of this very tokenizer, and the responses."""
        is_ours = values.get("tokenizer") == self.tokenizer_identity
        return is_ours and bool(values.get("prompt_token_ids") and values.get("responses"))

    def _as_generated(self, values: dict[str, Any], responses: list[dict[str, Any]]) -> list[Tokens]:
        """The token ids that the policy read and wrote, without a look at any text."""
        self.counts["rows_from_generated_ids"] += 1
        return [self._drawn(values["prompt_token_ids"], response) for response in responses]

    def _drawn(self, prompt_ids: list[int], response: dict[str, Any]) -> Tokens:
        """A response as it was drawn. Raises ValueError where its `thought_tokens` cannot be."""
        before, ids = response.get("thought_tokens") or 0, response["token_ids"]
        if not 0 <= before <= len(ids):
            raise ValueError(f"a response has {before} thought_tokens and {len(ids)} token_ids")
        self.counts["responses_with_a_thought"] += before > 0
        return Tokens(prompt_ids, ids, response.get("logps"), before)

    def _compared(
        self, values: dict[str, Any], prompt: list[Message], answers: list[Answer], generated: list[dict[str, Any]]
    ) -> list[Tokens]:
        """Token ids of each answer: those that were generated where the text is still theirs, else the template's.

        generated: what generation wrote about each answer, where the row has that; else empty. Of an edited row only
        what was edited is templated, so that a cut response gets no end that it never had.
        """
        if not _have_ids(generated):
            self.counts["rows_from_template"] += 1
            return [self._templated(prompt, answer) for answer in answers]

        prompt_ids = values["prompt_token_ids"]
        is_prompt_kept = self._spells_prompt(prompt_ids, prompt)
        column = values.get("prompt")
        if is_prompt_kept and isinstance(column, list) and _prompt(as_messages(column), values) != prompt:
            raise ValueError("prompt was edited; this loss trains on chosen and rejected, so edit it there")

        read = prompt_ids
        if not is_prompt_kept:
            read = chat.prompt_ids(self.tokenizer, self._for_template(prompt), self.template_kwargs)
        tokens: list[Tokens] = []
        is_edited = False
        for answer, response in zip(answers, generated, strict=True):
            is_kept = spells(self.tokenizer, self.stop_ids, response, answer)
            if is_kept or response.get("thought_tokens"):
                made = self._drawn(read, response)
                if not is_prompt_kept:
                    made = made._replace(logps=None)
                if not is_kept:
                    text = self._without_end(answer.text)
                    was = response.get("text") or ""
                    ids = rewritten(self.tokenizer, self.stop_ids, made.response, made.thought, was, text)
                    made = made._replace(response=ids, logps=None)
            else:
                made = self._templated(prompt, answer)._replace(prompt=read)
            is_edited |= (made.prompt, made.response) != (prompt_ids, response["token_ids"])
            tokens.append(made)
        self.counts["rows_edited" if is_edited else "rows_from_generated_ids"] += 1
        return tokens

    def _spells_prompt(self, ids: list[int], prompt: list[Message]) -> bool:
        """Whether the policy read this very prompt, perhaps on another day or with other arguments of the template."""
        try:
            messages = chat.with_system(self.tokenizer, prompt, "")
        except ValueError:
            return False
        return reads_as(self.tokenizer, ids, messages, self.template_kwargs)

    def _for_template(self, prompt: list[Message]) -> list[Message]:
        """The prompt as the template takes it.

        Raises BeyondTextError for one that is in a template already, or ends with an assistant's turn.
        """
        if reason := in_own_template(self.tokenizer, prompt) or written_out(prompt):
            raise BeyondTextError(f"prompt: {reason}")
        if prompt[-1]["role"] == "assistant":  # trl continues that turn; a chat template would begin another
            raise BeyondTextError("prompt: it ends with an assistant's turn, which the answer would continue")
        return chat.with_system(self.tokenizer, prompt, "")

    def _templated(self, prompt: list[Message], answer: Answer) -> Tokens:
        """Token ids of one templating of the conversation.

        Raises BeyondTextError where the template does not render a thought of the prompt's or the answer's.
        """
        messages = self._for_template(prompt)
        answer = as_template_takes(self.tokenizer, messages, answer, self.template_kwargs)
        text = self._without_end(answer.text)
        turn = chat.answer_turn(text, answer.thought)
        ids = Tokens(*chat.response_ids(self.tokenizer, messages, turn, self.stop_ids, self.template_kwargs))
        self.counts["ends_spelled_within_answers"] += any(i in self.stop_ids for i in ids.response[:-1])

        # where the answer begins is only of interest where not all is trained on
        is_cut = min(len(ids.prompt), self.recipe.max_prompt_length) + len(ids.response) > self.recipe.max_length
        self.counts["responses_with_a_thought"] += answer.has_thought()
        if answer.has_thought() and (is_cut or not self.recipe.train_thoughts):
            start = answer_start(self.tokenizer, self.stop_ids, ids.response, answer.alone(text))
            if start is None and not self.recipe.train_thoughts:
                raise BeyondTextError("the chat template writes another answer behind the thought")
            ids = ids._replace(thought=start or 0)
        return ids

    def _without_end(self, answer: str) -> str:
        """An answer without the ends of turn that it spells behind itself, which are counted."""
        text = chat.without_end(self.tokenizer, answer, self.stop_ids)
        self.counts["ends_spelled_behind_answers"] += text != answer
        return text


def _drawn_pair(values: dict[str, Any]) -> list[dict[str, Any]]:
    """What generation wrote about the chosen and the rejected response; [] where the row does not have both."""
    drawn = values.get("responses") or []
    indices = [values.get("chosen_index"), values.get("rejected_index")]
    pair = [drawn[i] for i in indices if i is not None and 0 <= i < len(drawn) and isinstance(drawn[i], dict)]
    return pair if len(pair) == len(indices) else []


def _have_ids(responses: list[dict[str, Any]]) -> bool:
    """Whether there are responses, each with the token ids that were generated."""
    return bool(responses) and all(response and response.get("token_ids") for response in responses)


def _is_endless(response: dict[str, Any]) -> bool:
    """Whether a response is a thought without an end."""
    return not has_answer(response) and not (response.get("text") or "").strip()


def _thought(response: dict[str, Any]) -> str:
    return response.get("thought") or ""


def _prompt(messages: list[Message], values: dict[str, Any]) -> list[Message]:
    """A row's prompt, with what stands beside it: the thoughts of its turns, and a system turn."""
    return with_own_system(together(messages, values.get("prompt_thoughts")), values)


def _conversation(values: dict[str, Any], column: str) -> tuple[list[Message], Answer]:
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
    answer = Answer(messages[-1]["content"], messages[-1].get("reasoning_content", ""))
    return _prompt(messages[:-1], values), answer


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
        other_prompt, answer = _conversation(values, column)
        if (other_prompt, answer.text) != (prompt, values["responses"][index]["text"] or ""):
            raise ValueError(
                f"{column} was edited; sppo_all trains on responses, so edit prompt or responses[{index}] too"
            )


def as_rates(values: list[Any]) -> list[float]:
    """Win rates as floats. Raises ValueError for what is no number from 0 to 1."""
    are_numbers = all(isinstance(v, (int, float, Decimal)) and not isinstance(v, bool) for v in values)
    if not are_numbers or not all(-_ROUNDING <= v <= 1 + _ROUNDING for v in values):
        raise ValueError(f"win rates {values} are not {len(values)} numbers between 0 and 1")
    return [min(1.0, max(0.0, float(v))) for v in values]
