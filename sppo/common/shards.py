"""Shards: which rows of a stage's work one process does, and where it puts them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sppo.common.errors import UsageError


@dataclass
class Slice:
    """Which rows of N are this shard's: [data_frac * frac_len, (data_frac + 1) * frac_len), 0 meaning all.

    Without a frac_len, `numgpu` shards share them evenly: frac_len = ceil(N / numgpu).
    """

    frac_len: int
    data_frac: int
    numgpu: int = 1

    def bounds(self, total: int) -> tuple[int, int]:
        if self.data_frac < 0 or self.frac_len < 0 or self.numgpu < 1:
            raise UsageError("--frac_len and --data_frac are 0 or more, --numgpu 1 or more")
        length = self.frac_len or -(-total // self.numgpu)
        if not self.frac_len and self.data_frac >= self.numgpu:
            raise UsageError(f"--data_frac {self.data_frac} is beyond --numgpu {self.numgpu}; the first is 0")
        return min(self.data_frac * length, total), min((self.data_frac + 1) * length, total)


def shard_paths(directory: Path, shard: int) -> tuple[Path, Path, Path]:
    """(Parquet, manifest, journal) of a shard."""
    stem = f"shard-{shard:05d}"
    return directory / f"{stem}.parquet", directory / f"{stem}.manifest.json", directory / f"{stem}.journal"
