"""Rankings looked up by prompt_id: any number of prompts, in any order, in bounded memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sppo.command.errors import SPPOError
from sppo.store.parquet import open_parquet, read_batches

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 1024  # rows read at once


def hash64(texts: Iterable[str]) -> NDArray[np.uint64]:
    """One 64-bit hash a text, the same on every machine."""
    return np.frombuffer(b"".join(blake2b(t.encode(), digest_size=8).digest() for t in texts), dtype="<u8")


def prompt_ids(batch: pa.RecordBatch, path: Path) -> list[str]:
    """The column prompt_id. Raises SPPOError where a row has none."""
    column = batch.column("prompt_id")
    if column.null_count:
        raise SPPOError(f"{path}: a row without a prompt_id; nothing can be joined to it")
    return column.to_pylist()


class Rankings:
    """The logits of every ranked prompt, by prompt_id.

    Memory holds 24 bytes a prompt: the sorted 64-bit hashes of the ids, their rows, and where each id ends. Ids and
    logits go through the shards once, into two scratch files in `directory` that have no name and vanish with this
    process: a look-up costs the same whatever the order and the row groups of the shards. Raises SPPOError for logits
    of another K, a prompt ranked twice, and a row without an id.
    """

    def __init__(self, shards: list[Path], pairs: int, directory: Path) -> None:
        self.pairs = pairs
        self._shards = shards
        sizes = [open_parquet(s, ["prompt_id", "logits"]).metadata.num_rows for s in shards]
        self._firsts = np.cumsum([0, *sizes])  # of each shard, among the rows of all
        self._ids = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - held until close()
        self._logits = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        hashes = np.empty(len(self), dtype=np.uint64)
        self._ends = np.zeros(len(self) + 1, dtype=np.int64)  # of row r's id: bytes [ends[r], ends[r + 1])
        row = 0
        for shard in shards:
            for ids, logits in _read(shard, pairs):
                first, row = row, row + len(ids)
                hashes[first:row] = hash64(ids)
                encoded = [i.encode() for i in ids]
                self._ends[first + 1 : row + 1] = self._ends[first] + np.cumsum([len(e) for e in encoded])
                self._ids.write(b"".join(encoded))
                self._logits.write(logits.tobytes())
        self._ids.flush()
        self._logits.flush()
        self._rows = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._rows]
        self._refuse_repeated()

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __enter__(self) -> Rankings:
        return self

    def __exit__(self, *_: object) -> None:
        self._ids.close()
        self._logits.close()

    def find(self, ids: list[str]) -> NDArray[np.int64]:
        """Row of each id, -1 where it is not ranked. The ids themselves are compared: equal hashes join nothing."""
        found = np.full(len(ids), -1, dtype=np.int64)
        hashes = hash64(ids)
        at = np.searchsorted(self._hashes, hashes)  # the first row with this hash, if there is one
        left = np.arange(len(ids))  # those still looked for
        while len(left := left[at[left] < len(self)]):
            left = left[self._hashes[at[left]] == hashes[left]]
            rows = self._rows[at[left]]
            same = np.array([i == ids[n] for n, i in zip(left, self.ids(rows), strict=True)], dtype=bool)
            found[left[same]] = rows[same]
            left = left[~same]
            at[left] += 1
        return found

    def ids(self, rows: NDArray[np.int64]) -> list[str]:
        """The prompt_ids of `rows`."""
        ids = []
        for _, first, count in _runs(rows):
            ends = (self._ends[first : first + count + 1] - self._ends[first]).tolist()
            content = os.pread(self._ids.fileno(), ends[-1], self._ends[first])
            ids += [content[a:b].decode() for a, b in zip(ends[:-1], ends[1:], strict=True)]
        return ids

    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """C of `rows`, (N,) -> (N, K, K)."""
        logits = np.empty((len(rows), self.pairs, self.pairs), dtype=np.float32)
        for place, first, count in _runs(rows):
            part = logits[place : place + count]
            if os.preadv(self._logits.fileno(), [part], int(first) * part[0].nbytes) != part.nbytes:
                raise OSError("a scratch file is shorter than what was written to it")
        return logits

    def _refuse_repeated(self) -> None:
        """Only ids whose hashes are equal can be equal, so only those are read."""
        equal = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        for first in equal[np.diff(equal, prepend=-2) > 1]:  # where runs of equal hashes begin
            stop = np.searchsorted(self._hashes, self._hashes[first], side="right")
            seen: set[str] = set()
            for row, prompt_id in zip(self._rows[first:stop], self.ids(self._rows[first:stop]), strict=True):
                if prompt_id in seen:
                    shard = self._shards[np.searchsorted(self._firsts, row, side="right") - 1]
                    raise SPPOError(f"{shard}: prompt {prompt_id} is ranked twice; remove the stale shard")
                seen.add(prompt_id)


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """(place, first row, count) of every run of consecutive rows: one read each, one in all where orders agree."""
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    counts = np.diff(starts, append=len(rows))
    yield from zip(starts.tolist(), rows[starts].tolist(), counts.tolist(), strict=True)


def _read(shard: Path, pairs: int) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
    """Batches of (prompt_ids, logits (N, K, K)). Raises SPPOError for another K. A null is NaN."""
    import pyarrow as pa

    schema = pa.schema([("prompt_id", pa.string()), ("logits", pa.list_(pa.list_(pa.float32())))])
    for batch in read_batches(shard, schema, _BATCH):
        ids, matrices = prompt_ids(batch, shard), batch.column("logits")
        lines = matrices.flatten()
        if not all((lists.value_lengths().fill_null(0).to_numpy() == pairs).all() for lists in (matrices, lines)):
            for prompt_id, matrix in zip(ids, matrices.to_pylist(), strict=True):
                shape = [len(line or []) for line in matrix or []]
                if shape != [pairs] * pairs:
                    found = f"({len(shape)}, {', '.join(map(str, sorted(set(shape))))})"
                    raise SPPOError(f"{shard}: prompt {prompt_id} has logits {found}, not ({pairs}, {pairs})")
        yield ids, lines.flatten().to_numpy(zero_copy_only=False).reshape(len(ids), pairs, pairs)
