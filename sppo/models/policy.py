"""A policy: a chat model, or a LoRA adapter on one, with its tokenizer and its fingerprint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.command.errors import SPPOError
from sppo.models import chat
from sppo.models.files import (
    files_on_hub,
    is_adapter,
    is_fetched,
    json_object,
    model_identity,
    resolve,
    weight_files,
)
from sppo.models.frames import date_identity
from sppo.models.thoughts import thinking_identity
from sppo.recipe import Recipe
from sppo.store.files import changed, read_json
from sppo.store.manifest import MANIFEST

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Policy:
    """A chat model: its weights, a LoRA adapter on top of them or None, and where its tokenizer is.

    `remote_code`: whether the Python files that come with it may run. `date`: YYYY-MM-DD, which its chat template
    writes where it asks for today's; empty: today's.
    """

    weights: Path
    adapter: Path | None
    tokenizer_dir: Path
    remote_code: bool = False
    date: str = ""

    def identity(self) -> str:
        """A fingerprint of everything that decides the policy's responses.

        Raises SPPOError for a model of ours that is not what its training wrote.
        """
        for part in filter(None, (self.weights, self.adapter)):
            _refuse_changed(part, self.remote_code)
        own = model_identity(self.weights, self.remote_code)
        return own if self.adapter is None else f"{own}+{model_identity(self.adapter)}"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer. Raises SPPOError if it has none, or no chat template."""
        return chat.load_tokenizer(self.tokenizer_dir, self.remote_code, self.date)

    def date_identity(self, template_kwargs: dict[str, Any]) -> dict[str, str]:
        """{"date": its date} where its template writes that into prompts, else {}. For the identity of a stage."""
        return date_identity(self.date, self.tokenizer_dir, template_kwargs, self.remote_code)

    def thinking_identity(self, tags: str, template_kwargs: dict[str, Any]) -> dict[str, list[str]]:
        """The marks at which its responses are split, by --thinking_tags; {} where they are not. See thoughts.py."""
        return thinking_identity(tags, self.tokenizer_dir, template_kwargs, self.remote_code)

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """Token ids that end a response."""
        stops = chat.stop_token_ids(self.weights, tokenizer)
        self.check_tokens(max(stops))
        return stops

    def bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(f.stat().st_size for f in weight_files(self.weights))

    def context(self) -> int | None:
        """The longest sequence, in tokens, that its config allows; None if it does not say."""
        return self._setting("max_position_embeddings")

    def vocabulary(self) -> int | None:
        """How many tokens the embedding has rows for; None if its config does not say."""
        return self._setting("vocab_size")

    def check_tokens(self, highest: int) -> None:
        """Raise SPPOError where the embedding has no row for the token id `highest`."""
        rows = self.vocabulary()
        if rows and highest >= rows:
            raise SPPOError(
                f"model {self.weights}: its embedding has {rows} rows and none for token {highest}; its tokenizer, or "
                "the data's, is another model's"
            )

    def _setting(self, name: str) -> int | None:
        config = json_object(self.weights / "config.json")
        return config.get(name) or (config.get("text_config") or {}).get(name)


def open_policy(
    name: str, revision: str = "", remote_code: bool = False, weights: bool = True, date: str = ""
) -> Policy:
    """The policy of that name: a model, or a LoRA adapter whose base its adapter_config.json names.

    `weights`: False leaves on the Hub those that are not in the cache. `date`: see Policy. Raises SPPOError where
    there is no such model, where it is not clear whether it is a model or an adapter, and for pickled weights.
    """
    directory, has_adapter = _open(name, revision, "model", remote_code, weights)
    if not has_adapter:
        json_object(directory / "config.json")
        return Policy(directory, None, directory, remote_code, date)
    base, is_stacked = _open(*adapter_base(directory), "base model", remote_code, weights)
    if is_stacked:
        raise SPPOError(f"adapter {directory}: its base model {base} is an adapter too; merge it into its own base")
    own = (directory / "tokenizer_config.json").exists()
    return Policy(base, directory, directory if own else base, remote_code, date)


def _open(name: str, revision: str, what: str, remote_code: bool, weights: bool) -> tuple[Path, bool]:
    """(the directory of that name, whether it holds an adapter)."""
    directory = resolve(name, revision, what, remote_code, weights)
    found = is_adapter(directory, what, () if weights else files_on_hub(name, revision))
    if missing := [file.name for file in weight_files(directory) if weights and not file.exists()]:
        raise SPPOError(f"{what} {directory}: {missing[0]}, which its index names, is missing; fetch the model again")
    return directory, found


def _refuse_changed(directory: Path, remote_code: bool) -> None:
    """Raise SPPOError where a file in a model's directory is not what the manifest says. Older ones do not know all.

    Files that are not fetched from the Hub are not compared: the directory may be a model of ours that was.
    """
    manifest = directory / MANIFEST
    written = read_json(manifest) if manifest.exists() else {}
    if "others" not in written:
        return
    own = {
        name: sha
        for name, sha in written["outputs"].items()
        if is_fetched(name, remote_code) and not name.startswith("merged/")
    }
    if names := changed(directory, own):
        raise SPPOError(
            f"model {directory}: {', '.join(names)} changed since it was written, or is gone. The command that made "
            f"the model mends it. If the change is meant, copy the directory without {MANIFEST}, and name the copy"
        )


def adapter_base(directory: Path) -> tuple[str, str]:
    """(name, revision) of the model that a LoRA adapter belongs on. Raises SPPOError for another kind of adapter."""
    config = json_object(directory / "adapter_config.json", "base_model_name_or_path")
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise SPPOError(f"adapter {directory} is of the kind {kind}, and only LoRA is read; merge it into its base")
    return config["base_model_name_or_path"], config.get("revision") or ""


def policy_of(recipe: Recipe) -> Policy:
    """The recipe's policy (see open_policy)."""
    return open_policy(recipe.model, recipe.model_revision, recipe.trust_remote_code, date=recipe.date)
