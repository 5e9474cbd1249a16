"""A model's files: where they are (a directory here, or a snapshot from the Hub), their shapes, their fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from sppo.command.errors import SPPOError, first_line
from sppo.store.files import digest

# What belongs to a tokenizer, a processor or a chat template, by name: transformers' own names and the usual ones.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.*.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "*processor_config.json"),
    *("*vocab*.json", "*vocab*.txt", "merges.txt", "*.model", "*.model.v[0-9]*", "*.tiktoken", "*.spm", "*.bpe"),
    *("*.vocab", "*.tokenizer", "bpe.codes", "dict.txt", "emoji.json", "encoder.json", "byte_maps.json"),
    *("normalizer.json", "tekken.json", "word_shape.json", "word_pronunciation.json"),
)
_KNOWN_FILES = ("*.json", "*.jinja", "*.model", "*.txt")  # that have always been fetched, and counted by model_identity
_SMALL_FILES = (*_KNOWN_FILES, *_TOKENIZER_FILES)  # that are fetched from the Hub
_MODEL_FILES = ("*.safetensors", *_SMALL_FILES)
_CODE_FILES = ("*.py",)  # only with trust_remote_code
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def json_object(path: Path, *keys: str) -> dict[str, Any]:
    """A model's JSON file, which holds an object with `keys`. Raises SPPOError for any other."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise SPPOError(f"{path} is damaged ({error}); fetch the model again") from None
    missing = [key for key in keys if not isinstance(found, dict) or not found.get(key)]
    if missing or not isinstance(found, dict):
        raise SPPOError(f"{path} is damaged: no {', '.join(missing) or 'JSON object'} in it; fetch the model again")
    return found


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
        if not any((path / f).exists() for f in ("config.json", _ADAPTER_CONFIG)):
            hint = "; its training did not finish" if Path(f"{path}.partial").exists() else ""
            raise SPPOError(f"{path} is a directory without a config.json, so not a {what}{hint}")
        return path
    if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise SPPOError(f"{what} {name}: no such directory")
    files = (_MODEL_FILES if weights else _SMALL_FILES) + (_CODE_FILES if remote_code else ())
    return snapshot(name, revision, what, files)


def is_fetched(name: str, remote_code: bool) -> bool:
    """Whether `resolve` fetches the file of this name from the Hub."""
    return any(fnmatchcase(name, pattern) for pattern in _MODEL_FILES + (_CODE_FILES if remote_code else ()))


def is_adapter(directory: Path, what: str = "model", on_hub: Iterable[str] = ()) -> bool:
    """Whether a directory holds a LoRA adapter; if not, it holds a model. Decided here alone, from all its files.

    `on_hub`: files that belong to it and are not here yet. Raises SPPOError for a directory that is both, because
    transformers puts an adapter that lies beside a model on the model, and vLLM does not; and for one that is neither.
    """
    names = {path.name for path in directory.iterdir() if path.exists()} | set(on_hub)
    weights = names & {_WEIGHTS, _INDEX}
    adapter = sorted(name for name in names if name == _ADAPTER_CONFIG or name.startswith("adapter_model."))
    if "config.json" in names and weights and adapter:
        raise SPPOError(
            f"{what} {directory} holds a model and an adapter's files too ({', '.join(adapter)}), so it is not clear "
            "which of the two is meant. Move the adapter's files to a directory of their own: this one is then the "
            "model, and that one the adapter on the base that its adapter_config.json names"
        )
    wanted = _ADAPTER_WEIGHTS if _ADAPTER_CONFIG in names else _WEIGHTS
    if wanted not in names and not (wanted == _WEIGHTS and weights):
        if (directory / wanted).is_symlink():
            raise SPPOError(f"{what} {directory}: its {wanted} is a link to a file that is gone; fetch the model again")
        raise SPPOError(
            f"{what} {directory}: no {wanted} in it (pickled weights, and .safetensors of other names, are not read); "
            "convert it first"
        )
    if len(weights) == 2 and _WEIGHTS not in _indexed(directory):
        raise SPPOError(
            f"{what} {directory} has {_WEIGHTS} and an index of other files. transformers reads the first, vLLM the "
            f"others; remove {_WEIGHTS}, or {_INDEX} with the files that it names"
        )
    return _ADAPTER_CONFIG in names


def weight_files(directory: Path) -> list[Path]:
    """The files of a model's weights: those that its index names, else model.safetensors; none where there are none."""
    found = (directory / name for name in sorted(weight_names(directory)))
    return list(found) if (directory / _INDEX).exists() else [path for path in found if path.exists()]


def weight_names(directory: Path) -> set[str]:
    """The names of the files that a model's weights are read from, whether they are here or still on the Hub."""
    return _indexed(directory) if (directory / _INDEX).exists() else {_WEIGHTS}


def _indexed(directory: Path) -> set[str]:
    """Names of the files in a model's index. Raises SPPOError where it is damaged."""
    named = json_object(directory / _INDEX, "weight_map")["weight_map"]
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise SPPOError(f"{directory / _INDEX} is damaged: its weight_map names no files; fetch the model again")
    return set(named.values())


class HubFile(NamedTuple):
    """A file of a model on the Hub."""

    size: int  # bytes
    is_missing: bool  # whether it is still to be downloaded


def files_on_hub(name: str, revision: str = "") -> dict[str, HubFile]:
    """The files of a model on the Hub, by their names; none for a directory here, or where the Hub is out of reach."""
    if Path(name).expanduser().is_dir():
        return {}
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        files = snapshot_download(name, revision=revision or None, allow_patterns=list(_MODEL_FILES), dry_run=True)
    except DryRunError:  # the Hub is out of reach; what is in the cache is used
        return {}
    return {f.filename: HubFile(f.file_size or 0, f.will_download) for f in files}


class StoredTensor(NamedTuple):
    """Where a tensor of a model is, and how it is stored."""

    file: Path
    dtype: str  # as safetensors names it: F32, BF16, ...
    shape: list[int]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Each tensor of a model by its name, from the headers of weight_files, each read once.

    Raises SPPOError where there are none, or one is missing or damaged.
    """
    files = weight_files(directory)
    if not files:
        raise SPPOError(f"{directory}: no {_WEIGHTS} in it (pickled weights are not read); convert it first")
    found: dict[str, StoredTensor] = {}
    for file in files:
        found |= tensors_of(file)
    return found


def tensors_of(file: Path) -> dict[str, StoredTensor]:
    """Each tensor of a safetensors file, from its header. Raises SPPOError where it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            return {name: StoredTensor(file, one.get_dtype(), one.get_shape()) for name, one in slices.items()}
    except (OSError, SafetensorError) as error:
        raise SPPOError(f"{file} is missing or damaged ({error}); fetch the model again") from None


def weight_shapes(directory: Path) -> dict[str, list[int]]:
    """Each tensor's shape. Raises SPPOError as stored_tensors does."""
    return {name: tensor.shape for name, tensor in stored_tensors(directory).items()}


def parameters(shapes: dict[str, list[int]]) -> int:
    """Numbers in a model of these shapes."""
    return sum(math.prod(shape) for shape in shapes.values())


def public_name(name: str) -> str:
    """The name of a model or data set that may be published: a Hub id as it is, of a local path the last part."""
    path = Path(name).expanduser()
    if name and path.exists():
        return path.resolve().name
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else path.name


def snapshot(name: str, revision: str, what: str, files: tuple[str, ...], cached_first: bool = False) -> Path:
    """The local directory of a model's `files` (patterns) from the Hub. Raises SPPOError where it cannot be had.

    `cached_first`: a copy in the cache is taken as it is, without asking the Hub.
    """
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


def commit_of(directory: Path) -> str:
    """The commit of a snapshot in the Hub's cache; empty for any other directory."""
    return directory.name if directory.parent.name == "snapshots" else ""


def model_identity(path: Path, code: bool = False) -> str:
    """One fingerprint of a model directory's weights, config, tokenizer and template, and of its `code`.

    README files and training logs do not count; new weights under the same path do.
    """
    sha = hashlib.sha256()
    skip = {"sppo_manifest.json", "trainer_state.json", "all_results.json", "train_results.json"}
    patterns = ("*.safetensors", *_KNOWN_FILES) + (_CODE_FILES if code else ())
    for file in sorted({f for pattern in patterns for f in path.glob(pattern)} | {*weight_files(path)}):
        if file.name not in skip and file.is_file():
            sha.update(f"{file.name}:{digest(file)}\n".encode())
    for name in tokenizer_files(path):
        if "/" in name or not any(fnmatchcase(name, pattern) for pattern in patterns):
            sha.update(f"{name}:{digest(path / name)}\n".encode())
    return sha.hexdigest()


def template_files(directory: Path, remote_code: bool = False) -> list[Path]:
    """The files that may hold a model's chat template; with remote code, which may write one, its Python files too."""
    names = [name for name in tokenizer_files(directory) if name.endswith((".jinja", "config.json", "template.json"))]
    return [*(directory / name for name in names), *(directory.glob("*.py") if remote_code else ())]


def tokenizer_files(directory: Path) -> list[str]:
    """The files of a model's tokenizer, processor and chat template, by their paths in the model's directory.

    Those of known names, and those that tokenizer_config.json names in vocab_file and the like. No other file is taken,
    because these are copied into each model that is trained and from there pushed to the Hub.
    """
    settings = directory / "tokenizer_config.json"
    named: list[Any] = []
    if settings.is_file():
        for key, value in json_object(settings).items():
            if key.endswith(("_file", "_files")):
                named += value if isinstance(value, list) else [value]
    paths = [*directory.iterdir(), *directory.glob("additional_chat_templates/*")]
    names = [path.relative_to(directory).as_posix() for path in paths if path.is_file() and path.name[0] != "."]
    return sorted(n for n in names if n in named or any(fnmatchcase(n, pattern) for pattern in _TOKENIZER_FILES))
