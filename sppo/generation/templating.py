"""From prompts to what an engine gets: token ids, a seed, and how long the response may be."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sppo.generation.engines import Request, prompt_seed
from sppo.generation.prompts import Prompt
from sppo.models import chat
from sppo.models.frames import in_own_template
from sppo.models.policy import Policy
from sppo.recipe import Recipe
from sppo.schema import Message, apart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Templated:
    """Prompts in the policy's chat template."""

    requests: list[Request] = field(default_factory=list)
    # by prompt_id: as the template got them, but without the thoughts of earlier turns, for all that reads them later
    conversations: dict[str, list[Message]] = field(default_factory=dict)
    thoughts: dict[str, list[str | None]] = field(default_factory=dict)  # of those conversations that have some
    skipped: list[dict[str, str]] = field(default_factory=list)  # prompt_id, and the reason


def to_requests(recipe: Recipe, policy: Policy, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> Templated:
    """A request for each prompt that can be answered, and why the others cannot."""
    context = policy.context()
    made = Templated()
    for prompt in prompts:
        try:
            messages, ids = _templated(recipe, tokenizer, prompt)
            if context and len(ids) >= context:
                raise ValueError("too long for the model's context")
        except ValueError as error:
            made.skipped.append({"prompt_id": prompt.prompt_id, "reason": str(error)})
            continue
        room = min(recipe.maxlen, context - len(ids)) if context else recipe.maxlen
        seed = prompt_seed(recipe.seed, prompt.prompt_id)
        made.requests.append(Request(prompt.prompt_id, array("i", ids), seed, room))
        made.conversations[prompt.prompt_id], thoughts = apart(messages)
        if thoughts:
            made.thoughts[prompt.prompt_id] = thoughts
    return made


def _templated(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[list[Message], list[int]]:
    """(the conversation as the template gets it, its token ids). Raises ValueError with the reason to skip it."""
    if reason := prompt.skip or in_own_template(tokenizer, prompt.messages):
        raise ValueError(reason)
    messages = chat.with_system(tokenizer, prompt.messages, recipe.system_prompt)
    ids = chat.prompt_ids(tokenizer, messages, recipe.chat_template_kwargs)
    if not ids:
        raise ValueError("the chat template makes nothing of it")
    return messages, ids
