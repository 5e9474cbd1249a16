"""responses.parquet, as the stages behind generation find it: ours, or another tool's."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sppo.command.errors import SPPOError
from sppo.schema import BESIDE, REQUIRED, as_messages, beyond_text, responses_schema
from sppo.store.manifest import await_written, read_manifest, refuse_changed
from sppo.store.parquet import holds_lists, holds_texts, open_parquet, read_rows
from sppo.store.shards import known_count

if TYPE_CHECKING:
    import pyarrow as pa


# In the counts of responses.parquet's manifest: how many of a prompt's responses are other models', the last ones.
EXTRA = "extra_responses_each"


class Count(NamedTuple):
    """How many responses each prompt should have."""

    drawn: int
    extra: int = 0

    @property
    def total(self) -> int:
        return self.drawn + self.extra

    def __str__(self) -> str:
        return f"--pairs {self.drawn}" + (f" and {self.extra} of --extra_responses" if self.extra else "")


def responses_each(output_dir: Path, pairs: int) -> Count:
    """How many responses each prompt of $DATA should have: --pairs, and those that combine put behind them."""
    manifest = output_dir / "responses.manifest.json"
    return Count(pairs, read_manifest(manifest)["counts"].get(EXTRA, 0) if manifest.exists() else 0)


def require_responses(output_dir: Path) -> Path:
    """$DATA/responses.parquet. Raises SPPOError where it is not there, or changed, with the command that makes it."""
    path = output_dir / "responses.parquet"
    manifest = output_dir / "responses.manifest.json"
    if await_written(path, manifest) or path.exists():
        refuse_changed(path, manifest, "Run combine_generate.py again, which makes it of its shards")
        return path
    count = known_count(output_dir / "responses")
    if not count:
        raise SPPOError(f"{path} does not exist; draw the responses first, with scripts/generate.py")
    command = shlex.join(["python", "scripts/combine_generate.py", "--output_dir", str(output_dir)])
    raise SPPOError(f"{path} does not exist; put its shards together first: {command} --numgpu {count}")


def responses_columns(path: Path) -> pa.Schema:
    """What is read of responses.parquet: our types of the columns it has.

    Raises SPPOError where one does not fit: numbers and lists are not made into texts, and a prompt's tools, tool calls
    and names are not left out.
    """
    import pyarrow as pa

    parquet = open_parquet(path, REQUIRED["responses"])
    found = parquet.schema_arrow
    names = found.field("prompt_id").type
    if not holds_texts(names) and not pa.types.is_integer(names):
        raise SPPOError(f"{path}: column prompt_id is {names}; it should be text or whole numbers")
    for name, parts in (("prompt", {"role", "content"}), ("responses", {"text"})):
        kind = found.field(name).type
        if (
            not holds_lists(kind)
            or not pa.types.is_struct(kind.value_type)
            or parts - {f.name for f in kind.value_type}
        ):
            raise SPPOError(f"{path}: column {name} is {kind}, not a list of {{{', '.join(sorted(parts))}}}")
        for part in sorted(parts):
            if not holds_texts(kind.value_type.field(part).type):
                raise SPPOError(f"{path}: {part} in column {name} is {kind.value_type.field(part).type}, not text")
    beside = [name for name in BESIDE if name in found.names]
    if beside or {f.name for f in found.field("prompt").type.value_type} - {"role", "content"}:
        for number, row in enumerate(read_rows(path, ["prompt", *beside])):
            if said := beyond_text(row):
                raise SPPOError(f"{path}, row {number}: {said}")
            try:
                messages = as_messages(row["prompt"])
            except ValueError as error:
                raise SPPOError(f"{path}, row {number}: prompt: {error}") from None
            if any("reasoning_content" in message for message in messages):
                raise SPPOError(
                    f"{path}, row {number}: prompt: a message has a thought, which belongs into a column "
                    "prompt_thoughts: a list with the thought of each turn, or null"
                )
    return pa.schema([f for f in responses_schema() if f.name in found.names])
