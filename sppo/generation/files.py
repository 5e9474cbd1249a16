"""The rows of a .parquet, .jsonl or .csv file: prompts, or answers of other models."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sppo.command.errors import SPPOError
from sppo.store.parquet import open_parquet

SUFFIXES = (".parquet", ".jsonl", ".csv")


def file_rows(path: Path, columns: Sequence[str], what: str) -> Iterator[dict[str, Any]]:
    """The rows of a file, with `columns` at least as far as it has them, but with all where it lacks the first.

    what: the file is called so in messages. Raises SPPOError for a file that is not what its name says.
    """
    if path.suffix not in SUFFIXES:
        raise SPPOError(f"{what} {path}: the name should end in .parquet, .jsonl or .csv")
    if not os.access(path, os.R_OK):
        raise SPPOError(f"{what} {path} cannot be read; see to its permissions")
    read = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}[path.suffix]
    return read(path, columns, what)


def _parquet_rows(path: Path, columns: Sequence[str], _: str) -> Iterator[dict[str, Any]]:
    parquet = open_parquet(path, [])
    wanted = [c for c in columns if c in parquet.schema_arrow.names]
    if columns[0] not in wanted:  # who asks names the columns there are
        wanted = parquet.schema_arrow.names
    for batch in parquet.iter_batches(columns=wanted):
        yield from batch.to_pylist()


def _jsonl_rows(path: Path, columns: Sequence[str], what: str) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig") as handle:
        try:
            for number, line in enumerate(handle, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:  # also: a number of thousands of digits, deep nesting
                    why = getattr(error, "msg", error)
                    raise SPPOError(f"{what} {path}, line {number}: not JSON ({why})") from None
                if not isinstance(row, dict):
                    raise SPPOError(f'{what} {path}, line {number}: not an object like {{"{columns[0]}": ...}}')
                yield row
        except UnicodeDecodeError:
            raise SPPOError(f"{what} {path}: not UTF-8 text") from None


def _csv_rows(path: Path, _: Sequence[str], what: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 30)
    first = 1  # the line at which the row that is read begins
    with open(path, encoding="utf-8-sig", newline="") as handle:
        try:
            reader = csv.DictReader(handle, strict=True)  # without it, an open quote holds the rest of the file
            names = reader.fieldnames or []
            first = reader.line_num + 1
            if len(set(names)) < len(names):
                raise SPPOError(f"{what} {path}: a column is there twice in {', '.join(names)}; rename one")
            for row in reader:
                if None in row or None in row.values():
                    raise SPPOError(f"{what} {path}: a row has more or fewer fields than the header")
                yield row
                first = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise SPPOError(f"{what} {path}: not a CSV file in UTF-8 ({error})") from None
        except csv.Error as error:
            raise SPPOError(
                f"{what} {path}: the row that begins at line {first} is not CSV ({error}). Is a quote not closed? "
                "Within a field in quotes a quote is written twice"
            ) from None
