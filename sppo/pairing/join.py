"""Rankings looked up by prompt_id, in any order."""

from __future__ import annotations

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
    """The logits of every ranked prompt, by prompt_id, whatever the order of the shards and of their rows.

    All are in memory: for K = 5 about 300 bytes a prompt. Raises SPPOError for logits of another K, a prompt ranked
    twice, and a row without an id.
    """

    def __init__(self, shards: list[Path], pairs: int) -> None:
        total = sum(open_parquet(shard, ["prompt_id", "logits"]).metadata.num_rows for shard in shards)
        self.logits = np.empty((total, pairs, pairs), dtype=np.float32)  # C, (N, K, K)
        self._rows: dict[str, int] = {}
        for shard in shards:
            for ids, logits in _read(shard, pairs):
                first = len(self._rows)
                self.logits[first : first + len(ids)] = logits
                for row, prompt_id in enumerate(ids, first):
                    if self._rows.setdefault(prompt_id, row) != row:
                        raise SPPOError(f"{shard}: prompt {prompt_id} is ranked twice; remove the stale shard")

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, ids: list[str]) -> NDArray[np.int64]:
        """The row in `logits` of each id, -1 where it is not ranked."""
        return np.array([self._rows.get(prompt_id, -1) for prompt_id in ids], dtype=np.int64)


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
