"""Shards: which rows of a stage's work one process does, and where it puts them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sppo.common.errors import SPPOError, UsageError
from sppo.common.files import read_json

COUNT = "shards.json"  # beside the shards: how many there are


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


def parse_shards(text: str) -> list[int]:
    """--data_frac: one number, or several with commas between them. Raises UsageError."""
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text):
        raise UsageError(f"--data_frac {text}: a number like 0, or several like 0,1,2")
    numbers = [int(number) for number in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"--data_frac {text}: a shard is named twice")
    return numbers


def known_count(directory: Path) -> int:
    """How many shards an earlier start laid out in a directory; 0 where none did."""
    return int(read_json(directory / COUNT)["shards"]) if (directory / COUNT).exists() else 0


def begun_shards(directory: Path) -> list[int]:
    """The numbers of the shards of which there is any file; one may be there several times."""
    return [int(p.name[6:11]) for p in directory.glob("shard-[0-9][0-9][0-9][0-9][0-9].*")]


def shard_count(directory: Path, wanted: int, slots: int, overwrite: bool = False) -> int:
    """How many shards a stage has: as many as it began with, else `wanted`, else a slot each.

    So a run goes on with other GPUs than it began with. Raises SPPOError where other shards are wanted than there are.
    """
    known = 0 if overwrite else known_count(directory)
    if wanted and known not in (0, wanted):
        raise SPPOError(f"{directory} is made in {known} shards; leave --shards out, or pass --overwrite")
    if known or wanted:
        return known or wanted
    # begun by a version that kept no count: it started a shard on each device, all at once
    begun = [] if overwrite else begun_shards(directory)
    return max([slots, *(number + 1 for number in begun)])


def shard_paths(directory: Path, shard: int) -> tuple[Path, Path, Path]:
    """(Parquet, manifest, journal) of a shard."""
    stem = f"shard-{shard:05d}"
    return directory / f"{stem}.parquet", directory / f"{stem}.manifest.json", directory / f"{stem}.journal"
