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


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed, on failure removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
        parquet = pq.ParquetFile(path)
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


class Journal:
    """Finished items of a shard, appended one line each, so that a kill costs only what was in flight.

    A line is a checksum, the item's key and its JSON. The first line holds the identity (inputs and settings)
    that the items were made under; a journal of another identity is not read. A damaged line (the kill's
    last) is dropped, and its item made again. Only offsets are held in memory.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.done: dict[str, int] = {}
        self.dropped = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115 - held until close() or remove()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SPPOError(f"another process is writing {path}; wait for it or stop it") from None
        self._scan(identity)

    def _scan(self, identity: dict[str, Any]) -> None:
        self._file.seek(0)
        end = 0
        for line in self._file:
            item = _decode(line)
            if end == 0:
                if item is None or item.get("identity") != identity:
                    break  # nothing usable: another run's, or killed while the first line was written
            elif item is None:
                self.dropped += 1
            else:
                self.done[item["key"]] = end
            end += len(line)
        if end == 0:
            self._file.truncate(0)
            self._append({"identity": identity})
        else:
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")  # close the line that the kill left open

    def _append(self, item: dict[str, Any]) -> int:
        body = json.dumps(item, ensure_ascii=True, separators=(",", ":")).encode()
        self._file.seek(0, os.SEEK_END)
        offset = self._file.tell()
        self._file.write(hashlib.sha256(body).hexdigest()[:16].encode() + b" " + body + b"\n")
        self._file.flush()
        return offset

    def add(self, key: str, value: dict[str, Any]) -> None:
        self.done[key] = self._append({"key": key, "value": value})

    def read(self, key: str) -> dict[str, Any]:
        self._file.seek(self.done[key])
        item = _decode(self._file.readline())
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


def _decode(line: bytes) -> dict[str, Any] | None:
    checksum, _, body = line.rstrip(b"\n").partition(b" ")
    if hashlib.sha256(body).hexdigest()[:16].encode() != checksum:
        return None
    return json.loads(body)


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
