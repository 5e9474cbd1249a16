"""PairRM (llm-blender) on plain transformers: which of two responses is better, and by how much.

Reads both published layouts: llm-blender/PairRM (ranker settings that name a base model, of which only the config and
the tokenizer are used) and llm-blender/PairRM-hf (one transformers directory).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.command.importing import import_networks
from sppo.models import chat
from sppo.models.files import model_identity, resolve, snapshot
from sppo.models.policy import policy_of
from sppo.rankers._normalizer import normalizer_identity
from sppo.rankers.batching import device_and_dtype
from sppo.recipe import Recipe
from sppo.schema import Message, prompt_text
from sppo.store.files import digest, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sppo.rankers._pairrm_network import PairRM

_BASE_FILES = ("*.json", "spm.model")  # config and tokenizer; the base's weights are never read


def ranker_base(directory: Path) -> Path:
    """The directory with config and tokenizer of the base model that a ranker's config.json names.

    A copy in the cache is taken as it is, so that all shards read the same one. In the layout of llm-blender/PairRM-hf
    they are the ranker's own.
    """
    name = read_json(directory / "config.json").get("model_name")
    if name is None:
        return directory
    for local in (directory / name, Path(name)):
        if local.is_dir():
            return local.resolve()
    return snapshot(name, "", "the ranker's base model", _BASE_FILES, cached_first=True)


def prompt_renderer(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> Callable[[list[Message]], str]:
    """messages -> what a PairRM reads as the prompt: its text, or the policy's chat template around it.

    tokenizer: the policy's, where it is open already.
    """
    if recipe.ranker_prompt == "text":
        return prompt_text
    tokenizer = tokenizer or policy_of(recipe).tokenizer()
    return lambda messages: chat.render(tokenizer, messages, True, recipe.chat_template_kwargs)


def fetch(recipe: Recipe) -> Path:
    """The ranker's directory; its files and those of its base model are in the cache after this."""
    directory = resolve(recipe.ranker, recipe.ranker_revision, "ranker")
    ranker_base(directory)
    return directory


def identity(recipe: Recipe) -> dict[str, Any]:
    """Weights, config and tokenizer of the ranker, and what it reads as the prompt."""
    directory = fetch(recipe)
    base, own = ranker_base(directory), model_identity(directory)
    if base != directory:
        files = sorted(f for pattern in _BASE_FILES for f in base.glob(pattern))
        own += f"+{hashlib.sha256(''.join(f.name + digest(f) for f in files).encode()).hexdigest()}"
    decides = {"backend": "pairrm", "ranker": own, **normalizer_identity(base), "ranker_prompt": recipe.ranker_prompt}
    if recipe.ranker_prompt != "text":
        policy, kwargs = policy_of(recipe), recipe.chat_template_kwargs
        decides |= {"model": policy.identity(), "chat_template_kwargs": kwargs, **policy.date_identity(kwargs)}
    return decides


def load(recipe: Recipe) -> PairRM:
    """PairRM, ready to answer, on the device and in the precision of device_and_dtype."""
    import_networks()
    from sppo.rankers._pairrm_network import PairRM

    directory = fetch(recipe)
    device, dtype = device_and_dtype()
    return PairRM(directory, device, recipe.batch_tokens, dtype, prompt_renderer(recipe))
