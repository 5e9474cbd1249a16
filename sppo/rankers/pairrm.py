"""PairRM (llm-blender) on plain transformers: which of two responses is better, and by how much.

Reads both published layouts: llm-blender/PairRM (ranker settings that name a base model, of which only the config and
the tokenizer are used) and llm-blender/PairRM-hf (one transformers directory).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sppo.command.importing import import_networks
from sppo.models import chat
from sppo.models.policy import policy_of
from sppo.rankers._normalizer import normalizer_identity
from sppo.rankers._pairrm_files import fetch_ranker, ranker_base, ranker_identity
from sppo.rankers.batching import device_and_dtype
from sppo.recipe import Recipe
from sppo.schema import Message, prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sppo.rankers._pairrm_network import PairRM


def prompt_renderer(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> Callable[[list[Message]], str]:
    """messages -> what a PairRM reads as the prompt: its text, or the policy's chat template around it.

    tokenizer: the policy's, where it is open already.
    """
    if recipe.ranker_prompt == "text":
        return prompt_text
    tokenizer = tokenizer or policy_of(recipe).tokenizer()
    return lambda messages: chat.render(tokenizer, messages, True, recipe.chat_template_kwargs)


def prompt_identity(recipe: Recipe) -> dict[str, Any]:
    """The part of a ranker's identity that decides what prompt_renderer gives."""
    if recipe.ranker_prompt == "text":
        return {"ranker_prompt": "text"}
    model = {"model": policy_of(recipe).identity(), "chat_template_kwargs": recipe.chat_template_kwargs}
    return {"ranker_prompt": "templated", **model}


def fetch(recipe: Recipe) -> str:
    """The ranker's directory; its files and those of its base model are in the cache after this."""
    return str(fetch_ranker(recipe))


def identity(recipe: Recipe) -> dict[str, Any]:
    """Weights, config and tokenizer of the ranker, and what it reads as the prompt."""
    directory = fetch_ranker(recipe)
    return {
        "backend": "pairrm",
        "ranker": ranker_identity(directory),
        **normalizer_identity(ranker_base(directory)),
        **prompt_identity(recipe),
    }


def load(recipe: Recipe) -> PairRM:
    """PairRM, ready to answer, on the device and in the precision of device_and_dtype."""
    import_networks()
    from sppo.rankers._pairrm_network import PairRM

    directory = fetch_ranker(recipe)
    device, dtype = device_and_dtype()
    return PairRM(directory, device, recipe.batch_tokens, dtype, prompt_renderer(recipe))
