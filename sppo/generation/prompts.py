"""Prompts: any of the usual sources, as a list of conversations that end with the user's turn."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo.command.errors import SPPOError, cause_line
from sppo.generation.files import SUFFIXES, file_rows
from sppo.recipe import Recipe
from sppo.schema import BESIDE, Message, as_messages, beyond_text, content_id, is_text, with_own_system, written_out


@dataclass
class Prompt:
    """A conversation to be continued. `skip` says why it cannot be (empty if it can)."""

    prompt_id: str
    messages: list[Message]
    skip: str = ""


def load_prompts(source: str, recipe: Recipe, part: tuple[int, int] = (0, 1)) -> list[Prompt]:
    """Every prompt of `source`, unusable ones marked, in the source's order.

    `part` (i, n) takes every n-th prompt from the i-th on: disjoint parts for n iterations. Of identical
    prompts each keeps its own row: the second gets `-2` behind its id. Raises SPPOError for a source that is
    not what it says, lacks the column, has no usable prompt, or uses one prompt_id for two different prompts.
    """
    prompts: list[Prompt] = []
    contents: dict[str, str] = {}  # by prompt_id
    times: Counter[str] = Counter()
    for row in _rows(source, recipe):
        if recipe.prompt_column not in row:
            raise SPPOError(
                f"prompts {source}: no column {recipe.prompt_column!r}; it has {', '.join(map(str, row))}. "
                "Pass --prompt_column."
            )
        value, system = row[recipe.prompt_column], row.get("system")
        content = content_id([system, value] if system else value)
        given = row.get("prompt_id")
        prompt_id = content if given in (None, "") else str(given)
        if not is_text(prompt_id):
            raise SPPOError(f"prompts {source}: prompt_id {ascii(prompt_id)} is half a character; give it another")
        if contents.setdefault(prompt_id, content) != content:
            raise SPPOError(f"prompts {source}: prompt_id {prompt_id!r} stands for two different prompts")
        times[prompt_id] += 1
        own_id = prompt_id if times[prompt_id] == 1 else f"{prompt_id}-{times[prompt_id]}"
        prompts.append(_prompt(own_id, row, value))
    _refuse_unusable(source, prompts)

    first, step = part
    mine = prompts[first::step]
    if not mine:
        raise SPPOError(f"prompts {source}: {len(prompts)} are too few for {step} parts; --prompts_part is empty")
    return mine


def _prompt(prompt_id: str, row: dict[str, Any], value: Any) -> Prompt:
    """A row's prompt, marked where it is not usable."""
    skip = beyond_text(row)
    if skip:
        return Prompt(prompt_id, [], skip)
    messages, skip = _messages(value)
    return Prompt(prompt_id, with_own_system(messages, row) if messages else [], skip)


def _refuse_unusable(source: str, prompts: list[Prompt]) -> None:
    """Raise SPPOError for a source without a usable prompt, and for ids that are given twice in the end."""
    if not prompts:
        raise SPPOError(f"prompts {source}: there are none in it")
    if all(p.skip for p in prompts):
        reasons = dict(Counter(p.skip for p in prompts))
        hint = "; is it another --prompt_column?" if {"empty", "not text"} & set(reasons) else ""
        raise SPPOError(f"prompts {source}: none can be answered ({reasons}){hint}")
    if len({p.prompt_id for p in prompts}) < len(prompts):
        raise SPPOError(f"prompts {source}: prompt_ids that end in -2, -3, ... clash with those of repeated prompts")


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """One hash over ids and contents, in order."""
    sha = hashlib.sha256()
    for prompt in prompts:
        sha.update(json.dumps([prompt.prompt_id, prompt.messages, prompt.skip]).encode())
    return sha.hexdigest()


def _messages(value: Any) -> tuple[list[Message], str]:
    """A prompt as messages, or the reason why it is none."""
    if value is None:
        return [], "empty"
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list):
        return [], "not text"
    try:
        messages = as_messages(turns)
    except ValueError as error:
        return [], str(error)
    if not messages[-1]["content"].strip():
        return [], "empty"
    if messages[-1]["role"] != "user":
        return [], "does not end with a user turn"
    reason = written_out(messages)
    return ([], reason) if reason else (messages, "")


def _rows(source: str, recipe: Recipe) -> Iterator[dict[str, Any]]:
    if not source:
        raise SPPOError("no prompts given; pass --prompts")
    path = Path(source).expanduser()
    if path.is_dir() or not path.exists():
        return _dataset_rows(source, path, recipe)
    return file_rows(path, _columns(recipe), "prompts")


def _columns(recipe: Recipe) -> list[str]:
    return [recipe.prompt_column, "prompt_id", "system", *BESIDE]


def _dataset_rows(source: str, path: Path, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """The rows of a directory or of a data set on the Hub, through `datasets`."""
    if not path.exists() and (source.startswith((".", "/", "~")) or path.suffix in SUFFIXES):
        raise SPPOError(f"prompts {source}: no such file or directory")
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            loaded: Any = datasets.load_from_disk(str(path))
            yield from loaded[recipe.prompt_split] if (path / "dataset_dict.json").exists() else loaded
        elif path.exists():
            yield from _directory_rows(path, recipe)
        else:
            revision = recipe.prompts_revision or None
            fetched: Any = datasets.load_dataset(source, split=recipe.prompt_split, revision=revision)
            yield from fetched
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        raise SPPOError(
            f"prompts {source}: no split {recipe.prompt_split!r} can be read from it, neither here nor from the Hub "
            f"({type(error).__name__}: {cause_line(error)}). Check --prompts, --prompt_split, HF_TOKEN and the network."
        ) from None


def _directory_rows(path: Path, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """The rows of a directory's files that belong to the split; `datasets` says which these are.

    Parquet, JSON lines and CSV are read as single files are. Other kinds go through `datasets`, with a cache of their
    own for this once: its usual cache tells files apart by name, size and time, not by their content.
    """
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        builder = datasets.load_dataset_builder(str(path), cache_dir=cache)
        files = [Path(name) for name in (builder.config.data_files or {}).get(recipe.prompt_split, ())]
        is_described = (path / "README.md").exists()  # a card may say how its files are to be read
        if files and not is_described and all(file.suffix in SUFFIXES for file in files):
            for file in files:
                yield from file_rows(file, _columns(recipe), "prompts")
        else:
            rows: Any = datasets.load_dataset(str(path), split=recipe.prompt_split, cache_dir=cache)
            yield from rows
