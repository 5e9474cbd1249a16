"""Parquet files: written whole, read in batches of bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.command.errors import SPPOError
from sppo.store.files import atomic

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_ROW_GROUP = 32 << 20  # bytes of a row group in memory


def write_parquet(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]], batch: int = 512) -> int:
    """Stream `rows` into a Parquet file that appears whole; returns how many there were."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        pending: list[dict[str, Any]] = []
        for row in rows:
            pending.append(row)
            count += 1
            if len(pending) == batch:
                writer.write_table(pa.Table.from_pylist(pending, schema=schema))
                pending = []
        if pending:
            writer.write_table(pa.Table.from_pylist(pending, schema=schema))
    return count


def open_parquet(path: Path, columns: Iterable[str]) -> pq.ParquetFile:
    """An open ParquetFile that has `columns`; clear errors for what is missing, damaged or lacks one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise SPPOError(f"{path} does not exist; run the stage that writes it first")
    try:
        # pyarrow's default keeps the bytes of every row group it has passed
        parquet = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise SPPOError(f"{path} is not a readable Parquet file: {error}") from None
    missing = [c for c in columns if c not in parquet.schema_arrow.names]
    if missing:
        have = ", ".join(parquet.schema_arrow.names)
        raise SPPOError(f"{path} has no column {', '.join(missing)}; it has {have}")
    return parquet


def read_rows(path: Path, columns: list[str], start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows [start, stop) of a Parquet file, in batches, so that memory does not grow with the file."""
    parquet = open_parquet(path, columns)
    first = 0
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if first + rows > start and (stop is None or first < stop):
            position = first
            for batch in parquet.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    if position >= start and (stop is None or position < stop):
                        yield row
                    position += 1
        first += rows


def read_batches(path: Path, schema: pa.Schema, rows: int) -> Iterator[pa.RecordBatch]:
    """`schema`'s columns of a Parquet file, up to `rows` rows at a time, whatever its row groups.

    A column of the schema's type is passed on as it was read; one of another (large_string, other integer widths,
    struct fields in another order or further ones) is converted. Raises SPPOError where that would lose something, or
    make a text of a number or a number of a text.
    """
    import pyarrow as pa

    for batch in open_parquet(path, schema.names).iter_batches(batch_size=rows, columns=schema.names):
        columns = []
        for field in schema:
            column = batch.column(field.name)
            is_id = field.name == "prompt_id" and pa.types.is_integer(column.type)
            if not is_id and not _is_alike(column.type, field.type):
                raise SPPOError(f"{path}: column {field.name} is {column.type}, not {field.type}")
            if "list_view" in str(column.type):  # pyarrow 26 casts one to a list with wrong offsets
                column = pa.array(column.to_pylist())
            try:
                columns.append(column if column.type == field.type else column.cast(field.type))
            except pa.ArrowException as error:
                raise SPPOError(f"{path}: column {field.name} ({column.type}) is not {field.type}: {error}") from None
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def holds_texts(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts, or nothing at all."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    asked = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(is_kind(kind) for is_kind in asked)


def holds_lists(kind: pa.DataType) -> bool:
    from pyarrow import types

    asked = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(is_kind(kind) for is_kind in asked)


def _is_alike(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether texts are texts and numbers are numbers in both, in lists and structs too."""
    from pyarrow import types

    if holds_lists(wanted) and holds_lists(found):
        return _is_alike(found.value_type, wanted.value_type)
    if types.is_struct(wanted) and types.is_struct(found):
        both = {f.name for f in found} & {f.name for f in wanted}
        return all(_is_alike(found.field(name).type, wanted.field(name).type) for name in both)
    if holds_texts(wanted) or types.is_null(found):
        return holds_texts(found)
    is_number = types.is_integer(found) or types.is_floating(found) or types.is_decimal(found)
    return is_number and (types.is_integer(wanted) or types.is_floating(wanted))


class RowGroups:
    """Batches gathered into row groups of about 32 MiB: neither the batches nor the file's footer, which the writer
    holds until it closes, take much memory. Used in a `with` statement.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        import pyarrow.parquet as pq

        self.rows = 0
        self._pending: list[pa.RecordBatch] = []
        self._bytes = 0
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")

    def write(self, batch: pa.RecordBatch) -> None:
        self._pending.append(batch)
        self.rows += batch.num_rows
        self._bytes += batch.nbytes
        if self._bytes >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._bytes:
            self._writer.write_table(pa.Table.from_batches(self._pending, schema=self._schema))
        self._pending, self._bytes = [], 0

    def __enter__(self) -> RowGroups:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is None:
            self._flush()
        self._writer.close()
