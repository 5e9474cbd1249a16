"""Where models are: a directory or the Hub, a LoRA adapter and its base, what identifies them, how they load."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo import chat
from sppo.config import Recipe
from sppo.errors import SPPOError, first_line, out_of_memory
from sppo.files import digest, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_MODEL_FILES = ("*.safetensors", *_SMALL_FILES)
_CODE_FILES = ("*.py",)  # only with trust_remote_code


@dataclass(frozen=True)
class Policy:
    """A chat model: its weights, a LoRA adapter on top of them or None, and where its tokenizer is.

    `remote_code`: whether the Python files that come with it may run.
    """

    weights: Path
    adapter: Path | None
    tokenizer_dir: Path
    remote_code: bool = False

    def identity(self) -> str:
        """A fingerprint of all that decides what the policy says."""
        own = model_identity(self.weights, self.remote_code)
        return own if self.adapter is None else f"{own}+{model_identity(self.adapter)}"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer. Raises SPPOError if it has none, or no chat template."""
        return chat.load_tokenizer(self.tokenizer_dir, self.remote_code)

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """Token ids that end a response."""
        return chat.stop_token_ids(self.weights, tokenizer)

    def bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(f.stat().st_size for f in self.weights.glob("*.safetensors"))

    def context(self) -> int | None:
        """The longest sequence, in tokens, that its config allows; None if it does not say."""
        return self._setting("max_position_embeddings")

    def check_tokens(self, highest: int) -> None:
        """Raise SPPOError where the embedding has no row for the token id `highest`."""
        rows = self._setting("vocab_size")
        if rows and highest >= rows:
            raise SPPOError(
                f"model {self.weights}: its embedding has {rows} rows and none for token {highest}; its tokenizer, or "
                "the data's, is another model's"
            )

    def _setting(self, name: str) -> int | None:
        config = _object(self.weights / "config.json")
        return config.get(name) or (config.get("text_config") or {}).get(name)


def open_policy(name: str, revision: str = "", remote_code: bool = False, weights: bool = True) -> Policy:
    """The policy of that name: a model, or a LoRA adapter whose base its adapter_config.json names.

    `weights`: False leaves on the Hub those that are not in the cache. Raises SPPOError for one that is nowhere or
    whose weights are pickled.
    """
    directory = resolve(name, revision, remote_code=remote_code, weights=weights)
    if (directory / "config.json").exists():
        _object(directory / "config.json")
        policy = Policy(directory, None, directory, remote_code)
    else:
        base = resolve(*adapter_base(directory), "base model", remote_code, weights)
        own = (directory / "tokenizer_config.json").exists()
        policy = Policy(base, directory, directory if own else base, remote_code)
    for part in filter(None, (policy.weights, policy.adapter) if weights else ()):
        if not any(part.glob("*.safetensors")):
            raise SPPOError(f"model {part}: no .safetensors in it (pickled weights are not read); convert it first")
    return policy


def adapter_base(directory: Path) -> tuple[str, str]:
    """(name, revision) of the model that a LoRA adapter belongs on."""
    config = _object(directory / "adapter_config.json", "base_model_name_or_path")
    return config["base_model_name_or_path"], config.get("revision") or ""


def _object(path: Path, *keys: str) -> dict[str, Any]:
    """A model's JSON file, which holds an object with `keys`. Raises SPPOError for any other."""
    found = read_json(path)
    missing = [key for key in keys if not isinstance(found, dict) or not found.get(key)]
    if missing or not isinstance(found, dict):
        raise SPPOError(f"{path} is damaged: no {', '.join(missing) or 'JSON object'} in it; fetch the model again")
    return found


@contextmanager
def loading(what: str) -> Iterator[None]:
    """SPPOError in the place of all that transformers and its readers raise for what is damaged, absent or unknown."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - every reader raises its own
        if isinstance(error, SPPOError) or out_of_memory(error):
            raise
        raise SPPOError(f"{what} cannot be loaded: {' '.join(str(error).split()) or type(error).__name__}") from None


def policy_of(recipe: Recipe) -> Policy:
    """The recipe's policy (see open_policy)."""
    return open_policy(recipe.model, recipe.model_revision, recipe.trust_remote_code)


def resolve(
    name: str, revision: str = "", what: str = "model", remote_code: bool = False, weights: bool = True
) -> Path:
    """The local directory of a model: itself, or its snapshot from the Hub (safetensors only, no pickle).

    A local path never asks the Hub. `weights`: as for open_policy. Raises SPPOError for what is nowhere.
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
    files = (_MODEL_FILES if weights else _SMALL_FILES) + (_CODE_FILES if remote_code else ())
    return _snapshot(name, revision, what, files)


def files_to_fetch(name: str, revision: str = "") -> dict[str, tuple[int, bool]]:
    """(bytes, whether it is still to be downloaded) of each file of a model on the Hub; none for a directory here."""
    if Path(name).expanduser().is_dir():
        return {}
    from huggingface_hub import snapshot_download

    files = snapshot_download(name, revision=revision or None, allow_patterns=list(_MODEL_FILES), dry_run=True)
    return {f.filename: (f.file_size or 0, f.will_download) for f in files}


def weight_shapes(directory: Path) -> dict[str, list[int]]:
    """Each tensor's shape, from the headers of the safetensors files that the index names (without one: of all).

    Raises SPPOError where there are none, or one is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    index = directory / "model.safetensors.index.json"
    if index.exists():
        files = sorted({directory / name for name in read_json(index)["weight_map"].values()})
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise SPPOError(f"{directory}: no .safetensors in it (pickled weights are not read); convert it first")
    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(file, "numpy") as weights:
                shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise SPPOError(f"{file} is missing or damaged ({error}); fetch the model again") from None
    return shapes


def parameters(shapes: dict[str, list[int]]) -> int:
    """Numbers in a model of these shapes."""
    return sum(math.prod(shape) for shape in shapes.values())


def public_name(name: str) -> str:
    """What others may know of where something is: a Hub id as it is, of a local path its last component."""
    path = Path(name).expanduser()
    if name and path.exists():
        return path.resolve().name
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else path.name


def _snapshot(name: str, revision: str, what: str, files: tuple[str, ...], cached_first: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    options = {"revision": revision or None, "allow_patterns": list(files)}
    if cached_first or re.fullmatch(r"[0-9a-f]{40}", revision):  # a commit does not move
        try:
            return Path(snapshot_download(name, local_files_only=True, **options))
        except LocalEntryNotFoundError:
            pass
    try:
        return Path(snapshot_download(name, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SPPOError(
            f"{what} {name}: not a directory here, and the Hub does not give it "
            f"({type(error).__name__}: {first_line(error)}). "
            "Check the name and revision; for a gated one accept its terms and set HF_TOKEN."
        ) from None


def ranker_base(directory: Path) -> Path:
    """Config and tokenizer of the base model that a ranker's config.json names, without the base's weights.

    A copy in the cache is taken as it is, so that all shards read the same one.
    """
    name = read_json(directory / "config.json")["model_name"]
    for local in (directory / name, Path(name)):
        if local.is_dir():
            return local.resolve()
    return _snapshot(name, "", "the ranker's base model", ("*.json", "spm.model"), cached_first=True)


def fetch_ranker(name: str, revision: str) -> Path:
    """The ranker's directory, with what its base model has to give, in the cache after this."""
    directory = resolve(name, revision, "ranker")
    if "model_name" in read_json(directory / "config.json"):
        ranker_base(directory)
    return directory


def ranker_identity(directory: Path) -> str:
    """A fingerprint of a ranker and of its base model's config and tokenizer."""
    own = model_identity(directory)
    if "model_name" not in read_json(directory / "config.json"):
        return own
    base = ranker_base(directory)
    files = sorted(f for pattern in ("*.json", "spm.model") for f in base.glob(pattern))
    return f"{own}+{hashlib.sha256(''.join(f.name + digest(f) for f in files).encode()).hexdigest()}"


def pinned(recipe: Recipe, data_dir: Path) -> Recipe:
    """The recipe with the ranker's revision that preload.py wrote into $DATA/ranker.json, if it did.

    A branch may move while shards, or iterations, are made; a commit does not.
    """
    path = data_dir / "ranker.json"
    if not path.exists():
        return recipe
    pin = read_json(path)
    if not isinstance(pin, dict) or not {"ranker", "asked", "revision"} <= set(pin):
        raise SPPOError(f"{path} is damaged; delete it and run preload.py again")
    if pin["ranker"] != recipe.ranker or recipe.ranker_revision not in (pin["asked"], pin["revision"]):
        return recipe
    return dataclasses.replace(recipe, ranker_revision=pin["revision"])


def commit_of(directory: Path) -> str:
    """The commit of a snapshot in the Hub's cache; empty for any other directory."""
    return directory.name if directory.parent.name == "snapshots" else ""


def model_identity(path: Path, code: bool = False) -> str:
    """One fingerprint of a model directory's weights, config, tokenizer and template, and of its `code`.

    README files and training logs do not count; new weights under the same path do.
    """
    sha = hashlib.sha256()
    skip = {"sppo_manifest.json", "trainer_state.json", "all_results.json", "train_results.json"}
    patterns = _MODEL_FILES + (_CODE_FILES if code else ())
    for file in sorted({f for pattern in patterns for f in path.glob(pattern)}):
        if file.name not in skip and file.is_file():
            sha.update(f"{file.name}:{digest(file)}\n".encode())
    return sha.hexdigest()


def load_config(policy: Policy) -> Any:
    """The policy's config. Raises SPPOError where it cannot be read, or needs code that may not run."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(policy.weights, trust_remote_code=policy.remote_code)
    except (OSError, ValueError, KeyError) as error:
        hint = "; --trust_remote_code runs the code that comes with it" if "trust_remote_code" in str(error) else ""
        raise SPPOError(f"model {policy.weights}: its config cannot be loaded: {first_line(error)}{hint}") from None


def load_causal_lm(
    policy: Policy, dtype: Any, attn_implementation: str = "", merge: bool = True, quantization: Any = None
) -> Any:
    """The policy's network, from safetensors only. `merge`: with its adapter merged in, else without it.

    Gemma-2 gets eager attention, the one that honours its soft caps everywhere (scaled-dot-product ignores them).
    """
    from transformers import AutoModelForCausalLM

    config = load_config(policy)
    if not attn_implementation and getattr(config, "attn_logit_softcapping", None):
        attn_implementation = "eager"
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if quantization is not None:
        options["quantization_config"] = quantization
    with loading(f"model {policy.weights}"):
        network, report = AutoModelForCausalLM.from_pretrained(
            policy.weights,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=policy.remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them
            **options,
        )
        absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        if absent:  # they would be random
            raise SPPOError(f"model {policy.weights}: weights missing or of another shape: {', '.join(absent[:4])}")
    if policy.adapter is None or not merge:
        return network
    return _adapted(network, policy.adapter).merge_and_unload()


def _adapted(network: Any, adapter: Path, is_trainable: bool = False) -> Any:
    """`network` with the adapter on top. A weight missing is an error: peft only warns, and the base would answer."""
    with loading(f"adapter {adapter}"), warnings.catch_warnings():
        from peft import PeftModel

        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(network, adapter, is_trainable=is_trainable)


def add_adapter(network: Any, policy: Policy, rank: int, alpha: int, target_modules: str) -> Any:
    """`network` with the LoRA adapter to train: the policy's own where it is one, else a new one that changes nothing.

    Either way the policy before its first step is the reference. Without dropout, for the same reason. Raises
    SPPOError for modules that the network does not have.
    """
    from peft import LoraConfig, get_peft_model

    if policy.adapter is not None:
        return _adapted(network, policy.adapter, is_trainable=True)
    modules = target_modules if target_modules == "all-linear" else [m.strip() for m in target_modules.split(",")]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, lora_dropout=0.0, task_type="CAUSAL_LM")
    try:
        return get_peft_model(network, config)
    except ValueError as error:
        raise SPPOError(f"--lora_target_modules {target_modules}: {' '.join(str(error).split())}") from None
