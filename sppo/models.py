"""Where models are: a directory or the Hub, a LoRA adapter and its base, what identifies them, how they load."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo import chat
from sppo.errors import SPPOError
from sppo.files import digest, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Policy:
    """A chat model: its weights, a LoRA adapter on top of them or None, and where its tokenizer is."""

    weights: Path
    adapter: Path | None
    tokenizer_dir: Path

    def identity(self) -> str:
        """A fingerprint of all that decides what the policy says."""
        own = model_identity(self.weights)
        return own if self.adapter is None else f"{own}+{model_identity(self.adapter)}"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer. Raises SPPOError if it has none, or no chat template."""
        return chat.load_tokenizer(self.tokenizer_dir)

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """Token ids that end a response."""
        return chat.stop_token_ids(self.weights, tokenizer)

    def bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(f.stat().st_size for f in self.weights.glob("*.safetensors"))

    def context(self) -> int | None:
        """The longest sequence, in tokens, that its config allows; None if it does not say."""
        config = read_json(self.weights / "config.json")
        return config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")


def open_policy(name: str, revision: str = "") -> Policy:
    """The policy of that name: a model, or a LoRA adapter whose base its adapter_config.json names."""
    directory = resolve(name, revision)
    if (directory / "config.json").exists():
        return Policy(directory, None, directory)
    config = read_json(directory / "adapter_config.json")
    base = resolve(config["base_model_name_or_path"], config.get("revision") or "", "base model")
    return Policy(base, directory, directory if (directory / "tokenizer_config.json").exists() else base)


def resolve(name: str, revision: str = "", what: str = "model") -> Path:
    """The local directory of a model: itself, or its snapshot from the Hub (safetensors only, no pickle).

    A local path never asks the Hub. Raises SPPOError for what is nowhere.
    """
    if not name:
        raise SPPOError(f"no {what} given; pass --{what}")
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / f).exists() for f in ("config.json", "adapter_config.json")):
            hint = "; its training did not finish" if Path(f"{path}.partial").exists() else ""
            raise SPPOError(f"{path} is a directory without a config.json, so not a {what}{hint}")
        return path
    if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise SPPOError(f"{what} {name}: no such directory")
    return _snapshot(name, revision, what, _MODEL_FILES)


def _snapshot(name: str, revision: str, what: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SPPOError(
            f"{what} {name}: not a directory here, and the Hub does not give it ({type(error).__name__}: {first}). "
            "Check the name and revision; for a gated one accept its terms and set HF_TOKEN."
        ) from None


def ranker_base(directory: Path) -> Path:
    """Config and tokenizer of the base model that a ranker's config.json names, without the base's weights."""
    name = read_json(directory / "config.json")["model_name"]
    for local in (directory / name, Path(name)):
        if local.is_dir():
            return local.resolve()
    return _snapshot(name, "", "the ranker's base model", ("*.json", "spm.model"))


def fetch_ranker(name: str, revision: str) -> Path:
    """The ranker's directory, with what its base model has to give, in the cache after this."""
    directory = resolve(name, revision, "ranker")
    if "model_name" in read_json(directory / "config.json"):
        ranker_base(directory)
    return directory


def model_identity(path: Path) -> str:
    """One fingerprint of a model directory's weights, config, tokenizer and template.

    README files and training logs do not count; new weights under the same path do.
    """
    sha = hashlib.sha256()
    skip = {"sppo_manifest.json", "trainer_state.json", "all_results.json", "train_results.json"}
    for file in sorted({f for pattern in _MODEL_FILES for f in path.glob(pattern)}):
        if file.name not in skip and file.is_file():
            sha.update(f"{file.name}:{digest(file)}\n".encode())
    return sha.hexdigest()


def load_causal_lm(policy: Policy, dtype: Any, attn_implementation: str = "") -> Any:
    """The policy's network, an adapter merged into it: safetensors only, no remote code.

    Gemma-2 gets eager attention, the one that honours its soft caps everywhere (scaled-dot-product ignores them).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(policy.weights)
    if not attn_implementation and getattr(config, "attn_logit_softcapping", None):
        attn_implementation = "eager"
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        network = AutoModelForCausalLM.from_pretrained(policy.weights, dtype=dtype, use_safetensors=True, **options)
        if policy.adapter is None:
            return network
        from peft import PeftModel

        return PeftModel.from_pretrained(network, policy.adapter).merge_and_unload()
    except (OSError, ValueError) as error:
        raise SPPOError(
            f"model {policy.adapter or policy.weights} cannot be loaded: {' '.join(str(error).split())}"
        ) from None
