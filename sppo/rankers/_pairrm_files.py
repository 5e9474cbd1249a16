"""The files of a PairRM: its own directory, and the config and tokenizer of its base model."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sppo.models.files import model_identity, resolve, snapshot
from sppo.recipe import Recipe
from sppo.store.files import digest, read_json

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


def fetch_ranker(recipe: Recipe) -> Path:
    """The ranker's directory; its files and those of its base model are in the cache after this."""
    directory = resolve(recipe.ranker, recipe.ranker_revision, "ranker")
    ranker_base(directory)
    return directory


def ranker_identity(directory: Path) -> str:
    """A fingerprint of a ranker and of its base model's config and tokenizer."""
    own, base = model_identity(directory), ranker_base(directory)
    if base == directory:
        return own
    files = sorted(f for pattern in _BASE_FILES for f in base.glob(pattern))
    return f"{own}+{hashlib.sha256(''.join(f.name + digest(f) for f in files).encode()).hexdigest()}"
