"""Logs of processes, wherever they run: their names, their ends, and what they tell of a stage's progress."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

_TAIL = 30  # lines of a failing log to show
_LEAST_FREE = 64 << 10  # bytes
_FEW = 16  # logs whose last words are all shown


def new_log(directory: Path, name: str) -> Path:
    """A log file that does not exist yet: name.1.log, then name.2.log for the next try."""
    directory.mkdir(parents=True, exist_ok=True)
    number = 1
    while (directory / f"{name}.{number}.log").exists():
        number += 1
    return directory / f"{name}.{number}.log"


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of a log, progress bars reduced to their last state; none where there is no log yet."""
    try:
        with open(log, "rb") as handle:
            handle.seek(0, os.SEEK_END)
            handle.seek(max(0, handle.tell() - 64 * 1024))
            text = handle.read().decode("utf-8", "replace")
    except FileNotFoundError:  # another machine makes it, when its turn comes
        return []
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if line.strip()][-count:]


# a progress bar's done, total, time left, unit ("2.1prompt/s", or slower "3.2s/prompt") and tokens a second
_BAR = re.compile(r"(\d+)/(\d+) \[[\d:]+<([\d:]+), *(?:[\d.?]+s/([a-z]+)|[\d.?]+([a-z]+)/s)(?:.* ([\d.]+) tok/s)?")
# The Trainer's bar has no description, and its unit `it` is an optimiser step. A bar of `it` with a description
# ("Loading weights: 100%|"), or in another stage, is a library's.
_NAMED = re.compile(r"[A-Za-z].*\d%\|")
_RANK = re.compile(r"^\[rank\d+\]:( |$)")  # torch puts it before each line of a rank's traceback
_OURS = re.compile(r"(generate|combine|preload|rank|train|eval)\b.*: ")  # else it is a library's warning


class _Bar(NamedTuple):
    """A progress bar as it stands in a log. left: as tqdm writes it; tokens: a second."""

    done: int
    total: int
    left: str
    unit: str
    tokens: float

    @property
    def seconds_left(self) -> int:
        return sum(int(n) * 60**i for i, n in enumerate(reversed(self.left.split(":"))))


def _bar(line: str, stage: str) -> _Bar | None:
    """The progress bar of a stage of ours in a line, if there is one."""
    found = _BAR.search(line)
    if not found:
        return None
    unit = found[4] or found[5]
    if unit == "it":
        if stage != "train" or _NAMED.search(line[: found.start()]):
            return None
        unit = "step"
    return _Bar(int(found[1]), int(found[2]), found[3], unit, float(found[6] or 0))


def progress_line(logs: list[Path], stage: str) -> str:
    """How far a stage has come, in one line, from the progress bars at the ends of all its processes' logs."""
    last = [[bar for line in last_lines(log, 5) if (bar := _bar(line, stage))][-1:] for log in logs]
    bars = [bar for found in last for bar in found]
    if not bars:
        words = last_words(logs[0]).removeprefix(f"{stage}: ")
        return f"{stage}: {words or 'starting'}"

    done, total = sum(bar.done for bar in bars), sum(bar.total for bar in bars)
    slowest, tokens = max(bars, key=lambda bar: bar.seconds_left), sum(bar.tokens for bar in bars)
    parts = [f"{done} of {total} {slowest.unit}s"]
    if len(logs) > 1:
        parts.append(f"{len(logs)} shards")
    if tokens:
        parts.append(f"{tokens:.0f} tok/s")
    return f"{stage}: {', '.join(parts)}, {slowest.left} left"


def last_words(log: Path) -> str:
    """The last line of a log that a stage of ours has written; empty where there is none yet."""
    ours = [line.strip() for line in last_lines(log, 1000) if _OURS.match(line)]
    return ours[-1] if ours else ""


def show_ends(logs: list[Path], name: str) -> None:
    """The last words of every log of a stage that is done; of many, the last one's."""
    if len(logs) > _FEW:
        print(f"{name}: {len(logs)} processes are done; the last says:")
        logs = logs[-1:]
    for log in logs:
        print(last_words(log) or (last_lines(log, 1) or [f"{name}: done"])[0].strip(), flush=True)


def raised(lines: list[str]) -> list[str]:
    """Of each Python traceback in a log the last place and the exception, once each.

    Not of the launcher's own, which says no more than that a rank has failed.
    """
    found: dict[str, None] = {}
    place = None  # None: not inside a traceback
    for line in (_RANK.sub("", line) for line in lines):
        if line.startswith("Traceback (most recent call last)"):
            place = ""
        elif place is not None and line.startswith("  File "):
            place = line.strip()
        elif place is not None and not line.startswith(" "):
            if not line.startswith("torch.distributed.elastic.multiprocessing.errors.ChildFailedError"):
                found[f"{line} ({place})"] = None
            place = None
    return list(found)


def show_failure(what: str, reason: str, log: Path) -> None:
    """Say what failed and why, with the end of its log."""
    print(f"\n{what} {reason}; the end of {log}:", file=sys.stderr)
    print("\n".join(f"  | {line}" for line in last_lines(log, _TAIL)), file=sys.stderr)
    # with several ranks and a launcher, our own error line, or a rank's traceback, may stand far above the end
    lines = last_lines(log, 10000)
    said = dict.fromkeys(line for line in lines if line.startswith("error: "))
    print("\n".join([*raised(lines), *said]), file=sys.stderr, flush=True)
    if shutil.disk_usage(log.parent).free < _LEAST_FREE:  # then the log itself could not be written
        print(
            f"error: {log.parent}: the disk is full; make room and run the same command to go on",
            file=sys.stderr,
        )
