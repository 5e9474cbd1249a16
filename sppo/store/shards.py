"""Shards: which rows of a stage's work one process does, and where it puts them."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from sppo.command.errors import SPPOError, UsageError
from sppo.store.files import read_json, write_json
from sppo.store.journal import identity_of

COUNT = "shards.json"  # beside the shards: how many there are, and how they share the rows
OVERWRITING = "overwrite.json"  # beside the shards, while --overwrite makes them again: its name, their number, its day
_SUFFIXES = (".parquet", ".manifest.json", ".manifest.json.started", ".journal")  # of a shard's files


@dataclass
class Slice:
    """Which rows of N are this shard's: [data_frac * frac_len, (data_frac + 1) * frac_len).

    Without a frac_len, the n = `numgpu` shards share them evenly: [i * N // n, (i + 1) * N // n).
    """

    frac_len: int
    data_frac: int
    numgpu: int = 1

    def bounds(self, total: int) -> tuple[int, int]:
        if self.data_frac < 0 or self.frac_len < 0 or self.numgpu < 1:
            raise UsageError("--frac_len and --data_frac are 0 or more, --numgpu 1 or more")
        if not self.frac_len and self.data_frac >= self.numgpu:
            raise UsageError(f"--data_frac {self.data_frac} is beyond --numgpu {self.numgpu}; the first is 0")
        length, i = self.frac_len, self.data_frac
        if length:
            return min(i * length, total), min((i + 1) * length, total)
        return i * total // self.numgpu, (i + 1) * total // self.numgpu

    def count(self, total: int) -> int:
        """How many shards there are. By hand, --frac_len comes without --numgpu."""
        return max(self.numgpu, -(-total // self.frac_len)) if self.frac_len else self.numgpu


def parse_shards(text: str) -> list[int]:
    """--data_frac: one number, or several with commas between them. Raises UsageError."""
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text):
        raise UsageError(f"--data_frac {text}: a number like 0, or several like 0,1,2")
    numbers = [int(number) for number in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"--data_frac {text}: a shard is named twice")
    return numbers


def known_count(directory: Path) -> int:
    """How many shards an earlier start laid out in a directory; 0 where none did.

    Raises SPPOError where the note of it is damaged, or an older version's, which shared the rows in another way.
    """
    path = directory / COUNT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except ValueError:  # no JSON, or no text
        found = None
    if isinstance(found, dict) and found.get("even") and isinstance(found.get("shards"), int) and found["shards"] >= 1:
        return found["shards"]
    count = max(begun_shards(directory), default=0) + 1
    raise SPPOError(
        f"{path} is damaged, or another version's. There seem to be {count} shards: more only if the logs say so. "
        f'Write {{"shards": {count}, "even": true}} into it, or make the shards again with --overwrite'
    )


def begun_shards(directory: Path) -> set[int]:
    """The numbers of the shards of which there is any file."""
    return {int(path.name[6:11]) for path in directory.glob("shard-[0-9][0-9][0-9][0-9][0-9].*")}


def begun_identities(directory: Path) -> list[dict[str, Any]]:
    """The identity (inputs, settings) of each shard that is made or begun, as far as its files say it."""
    found = []
    for number in sorted(begun_shards(directory)):
        _, manifest, journal = shard_paths(directory, number)
        identity = read_json(manifest) if manifest.exists() else identity_of(journal)
        if isinstance(identity, dict) and all(isinstance(identity.get(key), dict) for key in ("inputs", "settings")):
            found.append(identity)
    return found


def lay_out(directory: Path, count: int, overwrite: bool = False) -> None:
    """Note how many shards there are, before the first one begins.

    overwrite: what an earlier layout has beyond them is deleted. Raises SPPOError where there are more or fewer.
    """
    begun = begun_shards(directory)
    if begun and not overwrite:
        if (known := known_count(directory)) not in (0, count):
            raise SPPOError(
                f"{directory} is made in {known} shards, not in {count}; pass --numgpu {known}, or --overwrite"
            )
        return
    for number in begun:
        if number >= count:
            for suffix in _SUFFIXES:
                (directory / f"shard-{number:05d}{suffix}").unlink(missing_ok=True)
    write_json(directory / COUNT, {"shards": count, "even": True})


def shard_count(directory: Path, wanted: int, slots: int) -> int:
    """How many shards a stage has: as many as it began with, else `wanted`, else a slot each.

    So a run goes on with other GPUs than it began with. Raises SPPOError where other shards are wanted than there are.
    """
    known = known_count(directory) if begun_shards(directory) else 0
    if wanted and known not in (0, wanted):
        raise SPPOError(f"{directory} is made in {known} shards; leave --shards out, or pass --overwrite")
    return known or wanted or slots


def overwriting(directory: Path, wanted: int, slots: int) -> tuple[str, int]:
    """(the name of the --overwrite that is under way, how many shards it makes): one that was killed, or a new one.

    The shards carry its name, so that those which it had finished are kept where it goes on. It ends with
    end_overwriting, when all shards stand.
    """
    path = directory / OVERWRITING
    if path.exists():
        found = read_json(path)
        if wanted in (0, found["shards"]):
            return found["name"], found["shards"]
    name, count = uuid.uuid4().hex, wanted or slots
    write_json(path, {"name": name, "shards": count, "date": datetime.now().strftime("%Y-%m-%d")})
    return name, count


def overwriting_since(directory: Path) -> str:
    """The day on which the --overwrite that is under way began, YYYY-MM-DD; "" where none is, and in an older one."""
    path = directory / OVERWRITING
    return read_json(path).get("date", "") if path.exists() else ""


def end_overwriting(directory: Path) -> None:
    """All shards stand: another --overwrite makes all of them again."""
    (directory / OVERWRITING).unlink(missing_ok=True)


class ShardPaths(NamedTuple):
    """The files of one shard."""

    parquet: Path
    manifest: Path
    journal: Path


def shard_paths(directory: Path, shard: int) -> ShardPaths:
    """Where the files of a shard are."""
    stem = f"shard-{shard:05d}"
    return ShardPaths(*(directory / f"{stem}{suffix}" for suffix in (".parquet", ".manifest.json", ".journal")))
