"""Prompts: any of the usual sources, as a list of conversations that end with the user's turn."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo.common.errors import SPPOError, first_line
from sppo.common.parquet import open_parquet
from sppo.config import Recipe
from sppo.formats import Message, content_id, is_text


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
    seen: dict[str, tuple[str, int]] = {}
    for row in _rows(source, recipe):
        if recipe.prompt_column not in row:
            raise SPPOError(
                f"prompts {source}: no column {recipe.prompt_column!r}; it has {', '.join(map(str, row))}. "
                "Pass --prompt_column."
            )
        value = row[recipe.prompt_column]
        content = content_id(value)
        given = row.get("prompt_id")
        prompt_id = str(given) if given not in (None, "") else content
        if not is_text(prompt_id):
            raise SPPOError(f"prompts {source}: prompt_id {ascii(prompt_id)} is half a character; give it another")
        first, count = seen.get(prompt_id, (content, 0))
        if first != content:
            raise SPPOError(f"prompts {source}: prompt_id {prompt_id!r} stands for two different prompts")
        seen[prompt_id] = (first, count + 1)
        messages, skip = _messages(value)
        prompts.append(Prompt(prompt_id if count == 0 else f"{prompt_id}-{count + 1}", messages, skip))
    if not prompts:
        raise SPPOError(f"prompts {source}: there are none in it")
    if all(p.skip for p in prompts):
        reasons = dict(Counter(p.skip for p in prompts))
        raise SPPOError(f"prompts {source}: none can be answered ({reasons}); is it another --prompt_column?")
    ids = {p.prompt_id for p in prompts}
    if len(ids) < len(prompts):
        raise SPPOError(f"prompts {source}: prompt_ids that end in -2, -3, ... clash with those of repeated prompts")
    mine = prompts[part[0] :: part[1]]
    if not mine:
        raise SPPOError(f"prompts {source}: {len(prompts)} are too few for {part[1]} parts; --prompts_part is empty")
    return mine


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
    messages = []
    for turn in turns:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if not (is_text(role) and is_text(content)):
            return [], "not text"
        messages.append({"role": role, "content": content})
    if not messages or not messages[-1]["content"].strip():
        return [], "empty"
    if messages[-1]["role"] != "user":
        return [], "does not end with a user turn"
    return messages, ""


def _rows(source: str, recipe: Recipe) -> Iterator[dict[str, Any]]:
    if not source:
        raise SPPOError("no prompts given; pass --prompts")
    path = Path(source).expanduser()
    if path.is_dir() or not path.exists():
        return _dataset_rows(source, path, recipe)
    readers = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}
    if path.suffix not in readers:
        raise SPPOError(f"prompts {source}: the name should end in .parquet, .jsonl or .csv")
    return readers[path.suffix](path, recipe.prompt_column)


def _parquet_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    parquet = open_parquet(path, [])
    wanted = [c for c in (column, "prompt_id") if c in parquet.schema_arrow.names]
    if column not in wanted:  # load_prompts names the columns there are
        wanted = parquet.schema_arrow.names
    for batch in parquet.iter_batches(columns=wanted):
        yield from batch.to_pylist()


def _jsonl_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig") as handle:
        try:
            for number, line in enumerate(handle, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:  # also: a number of thousands of digits, deep nesting
                    why = getattr(error, "msg", error)
                    raise SPPOError(f"prompts {path}, line {number}: not JSON ({why})") from None
                if not isinstance(row, dict):
                    raise SPPOError(f'prompts {path}, line {number}: not an object like {{"{column}": ...}}')
                yield row
        except UnicodeDecodeError:
            raise SPPOError(f"prompts {path}: not UTF-8 text") from None


def _csv_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8-sig", newline="") as handle:
        try:
            reader = csv.DictReader(handle)
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise SPPOError(f"prompts {path}: a column is there twice in {', '.join(names)}; rename one")
            for row in reader:
                if None in row or None in row.values():
                    raise SPPOError(f"prompts {path}: a row has more or fewer fields than the header")
                yield row
        except (UnicodeDecodeError, csv.Error) as error:
            raise SPPOError(f"prompts {path}: not a CSV file in UTF-8 ({error})") from None


def _dataset_rows(source: str, path: Path, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """A directory or a Hub data set, through `datasets`."""
    if not path.exists() and (source.startswith((".", "/", "~")) or path.suffix in (".parquet", ".jsonl", ".csv")):
        raise SPPOError(f"prompts {source}: no such file or directory")
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(path))
            loaded = loaded[recipe.prompt_split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(
                str(path) if path.exists() else source,
                split=recipe.prompt_split,
                revision=recipe.prompts_revision or None,
            )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise SPPOError(
            f"prompts {source}: no split {recipe.prompt_split!r} can be read from it, neither here nor from the Hub "
            f"({type(error).__name__}: {first_line(error)}). Check --prompts, --prompt_split, HF_TOKEN and the network."
        ) from None
    yield from loaded
