"""A conversation as a reward model or the like reads it: in its own chat template, cut to its context."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from sppo.command.errors import SPPOError
from sppo.models import chat
from sppo.models.dates import fix_date
from sppo.recipe import Recipe
from sppo.schema import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Reading(NamedTuple):
    """A conversation as token ids. `ids`: None where the chat template refuses the conversation."""

    ids: list[int] | None
    prompt_cut: bool = False
    response_cut: bool = False


class Reader:
    """Reads conversations for a ranker, each once.

    name: of the ranker, for messages. context: tokens that fit. rows: of its embedding. date: YYYY-MM-DD, which the
    template writes where it asks for today's; empty: today's. system: whether it reads the system turns of a prompt, or
    they are left out.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        rows: int,
        date: str = "",
        system: Literal["keep", "drop"] = "keep",
    ) -> None:
        fix_date(tokenizer, date)
        self.name, self.tokenizer, self.context, self.rows, self.system = name, tokenizer, context, rows, system
        self.read = lru_cache(maxsize=2048)(self._read)  # count_cut and logits both want it

    def _read(self, prompt: str, response: str) -> Reading:
        """The whole conversation. `prompt`: its messages as JSON.

        What the context has no room for goes from the left, behind the first token (BOS, an encoder's [CLS]).
        """
        try:
            messages = self.messages(json.loads(prompt))
            answered = [*messages, {"role": "assistant", "content": response}]
            ids = chat.conversation_ids(self.tokenizer, answered, False)
            if max(ids) >= self.rows:
                raise SPPOError(
                    f"{self.name}: its tokenizer gives token {max(ids)}, its embedding has {self.rows} rows"
                )
            if len(ids) <= self.context:
                return Reading(ids)
            own = len(ids) - len(chat.prompt_ids(self.tokenizer, messages))  # the response and its end
            return Reading(ids[:1] + ids[1 - self.context :], prompt_cut=True, response_cut=own > self.context - 1)
        except ValueError:
            return Reading(None)

    def messages(self, prompt: list[Message]) -> list[Message]:
        """The prompt as the template takes it. Raises ValueError where nothing of it is left."""
        turns = prompt if self.system == "keep" else [turn for turn in prompt if turn["role"] != "system"]
        if not turns:
            raise ValueError("nothing but a system turn")
        return chat.with_system(self.tokenizer, turns, "")

    def count_cut(self, prompt: list[Message], responses: Sequence[str]) -> int:
        """How many of the texts do not fit the context: the prompt, where any response leaves it too little room."""
        found = [self.read(json.dumps(prompt), response) for response in responses]
        return any(reading.prompt_cut for reading in found) + sum(reading.response_cut for reading in found)


def system_identity(recipe: Recipe) -> dict[str, str]:
    """What --ranker_system adds to a ranker's identity: nothing where system turns are kept, as they always were."""
    return {} if recipe.ranker_system == "keep" else {"ranker_system": recipe.ranker_system}


def context_of(config: object, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that a model reads at once, by its config's max_position_embeddings and its tokenizer."""
    longest = tokenizer.model_max_length
    return min(getattr(config, "max_position_embeddings", None) or longest, longest)
