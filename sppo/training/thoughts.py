"""A thought and an answer within one response: which token ids are whose, and what a chat template makes of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sppo.models import chat
from sppo.schema import BeyondTextError, Message, begins_a_thought, split_content, thought_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answer(NamedTuple):
    """What an assistant's turn says. `text` may have the thought in front, in marks; `thought` is one beside it."""

    text: str
    thought: str = ""

    def has_thought(self) -> bool:
        return bool(self.thought or split_content(self.text)[0])

    def alone(self, text: str) -> str:
        """The answer in `text`, which is its own without an end of turn."""
        return text if self.thought else split_content(text)[1]


def as_template_takes(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message], answer: Answer, template_kwargs: dict[str, Any]
) -> Answer:
    """The answer with its thought where the chat template takes it: beside the text if it takes it there.

    Raises BeyondTextError where the template does not render the thought, or one of the prompt's: what is trained on
    would be another response than the row's.
    """
    if not answer.thought and begins_a_thought(answer.text):
        raise BeyondTextError("a thought has no end, so there is no answer to train on")
    is_taken = bool(chat.thought_field(tokenizer))
    if not is_taken and (answer.thought or any("reasoning_content" in message for message in prompt)):
        raise BeyondTextError(chat.NO_THOUGHT)
    marked, alone = ("", answer.text) if answer.thought else split_content(answer.text)
    thought = answer.thought or thought_in(marked)
    if marked and is_taken:
        answer = Answer(alone, thought)

    def written(turn: Message) -> int:
        """How often the template writes the thought, once perhaps in the prompt."""
        return _words(chat.render(tokenizer, [*prompt, turn], False, template_kwargs)).count(_words(thought))

    if thought and written(chat.answer_turn(*answer)) <= written(chat.answer_turn(alone)):
        raise BeyondTextError(
            "the chat template leaves out the thought of the last turn; take one that writes it (as some are for "
            "training), or leave the thought out"
        )
    return answer


def answer_start(tokenizer: PreTrainedTokenizerBase, stop_ids: set[int], ids: list[int], answer: str) -> int | None:
    """How many of a response's token ids come before the first one of its answer.

    None where the ids do not end with this answer.
    """
    ids, wanted = _without_stop(ids, stop_ids), answer.strip()

    def spelled(start: int) -> str:
        return str(tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False)).strip()

    # the last start behind which there are as many characters as the answer has, by bisection
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high + 1) // 2
        if len(spelled(middle)) >= len(wanted):
            low = middle
        else:
            high = middle - 1
    # half a character counts as one, so it may lie a few tokens before
    return next((start for start in range(low, max(-1, low - 4), -1) if spelled(start) == wanted), None)


def spells(tokenizer: PreTrainedTokenizerBase, stop_ids: set[int], response: dict[str, Any], answer: Answer) -> bool:
    """Whether a drawn response's token ids, those behind its thought, spell the answer.

    Raises ValueError where they do, but the response's own text is another, and where its thought is: only those were
    edited.
    """
    before = response.get("thought_tokens") or 0
    ids = _without_stop(response["token_ids"], stop_ids)
    text, said = _text(tokenizer, ids[before:]), answer.text
    if before:  # white space between the two is neither's, and the first token may hold the end of a mark
        text, said = text.lstrip(), said.lstrip()
        if text.endswith(said) and len(text) - len(said) < len(_text(tokenizer, ids[before : before + 1]).lstrip()):
            text = said
    same = text == said
    own = response.get("text")
    if same and own is not None and (own.lstrip() if before else own) != said:
        raise ValueError("responses was edited; this loss trains on chosen and rejected, so edit it there")
    if before:
        drawn = _words(str(tokenizer.decode(ids[:before])))
        if any(_words(line) not in drawn for line in answer.thought.splitlines()):
            raise ValueError(
                "a thought was edited, and its token ids were not; take token_ids and thought_tokens out of that "
                "response to train on its texts"
            )
    return same


def rewritten(
    tokenizer: PreTrainedTokenizerBase, stop_ids: set[int], ids: list[int], before: int, was: str, answer: str
) -> list[int]:
    """A drawn response whose answer was edited: its first `before` token ids, the answer's, and an end.

    was: the answer before; what its first token holds of a mark stays.
    Raises ValueError where that does not spell the answer, and for a thought without an end.
    """
    if before >= len(ids):
        raise ValueError("an answer was written behind a thought that has no end; take that row out")
    text, was = _text(tokenizer, _without_stop(ids, stop_ids)[before:]).lstrip(), was.lstrip()
    if was and text.endswith(was):
        answer = text.removesuffix(was) + answer
    made = [*ids[:before], *tokenizer(answer, add_special_tokens=False)["input_ids"]]
    if _words(str(tokenizer.decode(made))) != _words(str(tokenizer.decode(ids[:before])) + answer):
        raise ValueError("the tokenizer does not write the edited answer behind the thought as it is")
    end = ids[-1] if ids[-1] in stop_ids else min(stop_ids, key=lambda i: (i != tokenizer.eos_token_id, i))
    return [*made, end]


def refuse_without_answer(thought: int, response: int, room: int) -> None:
    """Raise BeyondTextError where there is no token of the answer among a response's first `room` token ids.

    thought: how many of its `response` token ids come before the answer.
    """
    if thought >= response:
        raise BeyondTextError("a thought has no end, so there is no answer to train on")
    if thought >= room:
        raise BeyondTextError("a thought leaves its answer no room within --max_length")


def _without_stop(ids: list[int], stop_ids: set[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in stop_ids else ids


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _words(text: str) -> str:
    """A text without white space, which templates trim."""
    return "".join(text.split())
