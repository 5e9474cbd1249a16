"""Files that are whole or absent: atomic writes, Parquet, and the journal that survives a kill."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sppo.errors import SPPOError

if TYPE_CHECKING:
    import pyarrow as pa

_WHOLE = 64 << 20  # bytes up to which a file is hashed whole
_ROW_GROUP = 32 << 20  # bytes of a row group in memory


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed, on failure removed."""
    with atomic_together([path]) as (temporary,):
        yield temporary


@contextmanager
def atomic_together(paths: list[Path]) -> Iterator[list[Path]]:
    """A temporary path beside each of `paths`: none is renamed unless all are whole and fsynced."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
    temporaries = [path.with_name(f".{path.name}.tmp-{os.getpid()}") for path in paths]
    try:
        yield temporaries
        for temporary in temporaries:
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
            sync_directory(path.parent)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """What writers of `path` that were killed have left: it may fill the disk."""
    for left in path.parent.glob(f".{path.name}.tmp-*"):
        try:
            os.kill(int(left.name.rpartition("-")[2]), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (PermissionError, ValueError):  # somebody else's process; not a name of ours
            continue


def sync_directory(path: Path) -> None:
    """fsync a directory, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SPPOError(f"{path} is damaged ({error}); delete it and run the stage again") from None


def digest(path: Path) -> str:
    """A fingerprint of a file: sha256 of all of it up to 64 MiB, beyond that of 4 KiB in every MiB.

    The sample keeps a 16 GB model cheap to recognise. Training moves all weights, so it cannot be missed.
    """
    sha = hashlib.sha256()
    size = path.stat().st_size
    sha.update(str(size).encode())
    with open(path, "rb") as handle:
        if size <= _WHOLE:
            while block := handle.read(1 << 20):
                sha.update(block)
        else:
            for offset in range(0, size, 1 << 20):
                handle.seek(offset)
                sha.update(handle.read(4096))
    return sha.hexdigest()


def changed(directory: Path, digests: dict[str, str]) -> list[str]:
    """Names in `directory` of the files that are missing or not what their digests say."""
    return [n for n, sha in digests.items() if not (directory / n).is_file() or digest(directory / n) != sha]


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


def open_parquet(path: Path, columns: Iterable[str]) -> Any:
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
    struct fields in another order or further ones) is converted. Raises SPPOError where that would lose something.
    """
    import pyarrow as pa

    for batch in open_parquet(path, schema.names).iter_batches(batch_size=rows, columns=schema.names):
        columns = []
        for field in schema:
            column = batch.column(field.name)
            try:
                columns.append(column if column.type == field.type else column.cast(field.type))
            except pa.ArrowException as error:
                raise SPPOError(f"{path}: column {field.name} ({column.type}) is not {field.type}: {error}") from None
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


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


class Journal:
    """Finished items of a shard, appended one line each, so that a kill costs only what was in flight.

    A line is a checksum, the item's key and its JSON. The first line holds the identity (inputs and settings)
    that the items were made under; it goes into every line's checksum, so an item of another identity never counts. A
    damaged line (the kill's last) is dropped, and its item made again. Only offsets are held in memory.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.done: dict[str, int] = {}
        self.dropped = 0
        self._salt = json.dumps(identity, sort_keys=True).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115 - held until close() or remove()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SPPOError(f"another process is writing {path}; wait for it or stop it") from None
        self._scan(identity)

    def _scan(self, identity: dict[str, Any]) -> None:
        self._file.seek(0)
        header, end = self._file.readline(), self._file.tell()
        for line in self._file:
            item = _decode(line, self._salt)
            if item is None:
                self.dropped += 1
            else:
                self.done[item["key"]] = end
            end += len(line)
        if not self.done and (_decode(header) or {}).get("identity") != identity:
            # nothing of use: another run's without work, or killed while the first line was written
            self._file.truncate(0)
            self._append({"identity": identity}, b"")
            return
        self._file.seek(-1, os.SEEK_END)
        if self._file.read(1) != b"\n":
            self._file.write(b"\n")  # close the line that the kill left open
        if self.dropped:
            print(f"{self.path}: {self.dropped} damaged lines are dropped and made again")

    def _append(self, item: dict[str, Any], salt: bytes) -> int:
        body = json.dumps(item, ensure_ascii=True, separators=(",", ":")).encode()
        self._file.seek(0, os.SEEK_END)
        offset = self._file.tell()
        self._file.write(_checksum(body, salt) + b" " + body + b"\n")
        self._file.flush()
        return offset

    def add(self, key: str, value: dict[str, Any]) -> None:
        self.done[key] = self._append({"key": key, "value": value}, self._salt)

    def read(self, key: str) -> dict[str, Any]:
        self._file.seek(self.done[key])
        item = _decode(self._file.readline(), self._salt)
        if item is None:
            raise SPPOError(f"{self.path} changed while it was read; run the stage again")
        return item["value"]

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def remove(self) -> None:
        """The shard exists under its final name: the journal has done its work."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def journal_identity(path: Path) -> dict[str, Any] | None:
    """What the items of a journal were made under; None where it holds none, or does not say."""
    with open(path, "rb") as handle:
        header, work = _decode(handle.readline()), handle.readline()
    return header["identity"] if header and work else None


def _checksum(body: bytes, salt: bytes) -> bytes:
    return hashlib.sha256(salt + body).hexdigest()[:16].encode()


def _decode(line: bytes, salt: bytes = b"") -> dict[str, Any] | None:
    """A line's item; None for a damaged one and for another identity's. `salt`: empty for the first line."""
    checksum, _, body = line.rstrip(b"\n").partition(b" ")
    return json.loads(body) if _checksum(body, salt) == checksum else None


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold a directory for this process: a second run in it is refused."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SPPOError(f"another run is at work in {directory}; wait for it, or use another --run_dir") from None
        yield
