"""Logs of processes, wherever they run: their names, their ends, and what they tell of a stage's progress."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

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
# the trainer counts iterations, which are steps, and names its bar nothing; with a name ("Loading weights: 100%|") it
# is a library's bar of something else
_UNITS = {"it": "step"}
_NAMED = re.compile(r"[A-Za-z].*\d%\|")
_RANK = re.compile(r"^\[rank\d+\]:( |$)")  # torch puts it before each line of a rank's traceback
_OURS = re.compile(r"(generate|combine|preload|rank|train|eval)\b.*: ")  # else it is a library's warning


def _bar(line: str) -> re.Match[str] | None:
    """The progress bar of a stage of ours in a line, if there is one."""
    bar = _BAR.search(line)
    return None if bar and (bar[4] or bar[5]) in _UNITS and _NAMED.search(line[: bar.start()]) else bar


def overall(logs: list[Path]) -> str:
    """All shards' progress in one line, from the progress bars at the ends of their logs."""
    done, total, rate, left, unit = 0, 0, 0.0, (0, "0:00"), ""
    for log in logs:
        bars = [bar for line in last_lines(log, 5) if (bar := _bar(line))]
        if bars:
            bar = bars[-1]
            done, total = done + int(bar[1]), total + int(bar[2])
            rate += float(bar[6] or 0)
            unit = _UNITS.get(bar[4] or bar[5], bar[4] or bar[5])
            seconds = sum(int(n) * 60**i for i, n in enumerate(reversed(bar[3].split(":"))))
            left = max(left, (seconds, bar[3]))
    if not total:
        return last_words(logs[0]) or "starting"
    shards = f", {len(logs)} shards" if len(logs) > 1 else ""
    speed = f", {rate:.0f} tok/s" if rate else ""
    return f"{done} of {total} {unit}s{shards}{speed}, {left[1]} left"


def last_words(log: Path) -> str:
    """The last line of a log that a stage of ours has written; empty where there is none yet."""
    ours = [line.strip() for line in last_lines(log, 1000) if _OURS.match(line)]
    return ours[-1] if ours else ""


def show_ends(logs: list[Path], name: str) -> None:
    """The last words of every log of a stage that is done; of many, the last one's."""
    if len(logs) > _FEW:
        print(f"{name}: {len(logs)} processes are done; the last says:")
    for log in logs[-1:] if len(logs) > _FEW else logs:
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
