"""PairRM (llm-blender) on plain transformers: which of two responses is better, and by how much.

Reads both published layouts: llm-blender/PairRM (ranker settings that name a base model, of which only the config and
the tokenizer are used) and llm-blender/PairRM-hf (one transformers directory).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.command.importing import import_networks
from sppo.models.files import model_identity, resolve, snapshot
from sppo.rankers import device_and_dtype, prompt_identity, prompt_renderer
from sppo.rankers._normalizer import mark
from sppo.recipe import Recipe
from sppo.store.files import digest, read_json

if TYPE_CHECKING:
    from sppo.rankers._pairrm_network import PairRM


def ranker_base(directory: Path) -> Path:
    """Config and tokenizer of the base model that a ranker's config.json names, without the base's weights.

    A copy in the cache is taken as it is, so that all shards read the same one. In the layout of llm-blender/PairRM-hf
    they are the ranker's own.
    """
    name = read_json(directory / "config.json").get("model_name")
    if name is None:
        return directory
    for local in (directory / name, Path(name)):
        if local.is_dir():
            return local.resolve()
    return snapshot(name, "", "the ranker's base model", ("*.json", "spm.model"), cached_first=True)


def fetch_ranker(name: str, revision: str) -> Path:
    """The ranker's directory, with what its base model has to give, in the cache after this."""
    directory = resolve(name, revision, "ranker")
    ranker_base(directory)
    return directory


def ranker_identity(directory: Path) -> str:
    """A fingerprint of a ranker and of its base model's config and tokenizer."""
    own, base = model_identity(directory), ranker_base(directory)
    if base == directory:
        return own
    files = sorted(f for pattern in ("*.json", "spm.model") for f in base.glob(pattern))
    return f"{own}+{hashlib.sha256(''.join(f.name + digest(f) for f in files).encode()).hexdigest()}"


def fetch(recipe: Recipe) -> str:
    """The ranker's directory, with what its base model has to give, in the cache after this."""
    return str(fetch_ranker(recipe.ranker, recipe.ranker_revision))


def identity(recipe: Recipe) -> dict[str, Any]:
    """Weights, config and tokenizer of the ranker, and what it reads as the prompt."""
    directory = fetch_ranker(recipe.ranker, recipe.ranker_revision)
    own = {"ranker": ranker_identity(directory), **mark(ranker_base(directory))}
    return {"backend": "pairrm", **own, **prompt_identity(recipe)}


def load(recipe: Recipe) -> PairRM:
    """PairRM, ready to answer, on the device and in the precision of device_and_dtype."""
    import_networks()
    from sppo.rankers._pairrm_network import PairRM

    directory = fetch_ranker(recipe.ranker, recipe.ranker_revision)
    device, dtype = device_and_dtype()
    return PairRM(directory, device, recipe.batch_tokens, dtype, prompt_renderer(recipe))
