"""Processes of this machine: started, watched, stopped; their logs and their progress."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from sppo.common.errors import die_with_parent
from sppo.config import ROOT

_TAIL = 30  # lines of a failing log to show
_GRACE = 15  # seconds between asking a process to stop and killing it
_REPORT = 30  # seconds between two progress lines
_LEAST_FREE = 64 << 10  # bytes


def start(
    command: list[str], device: str | None, log: Path | None, threads: int = 0, cores: list[int] | None = None
) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, on `device` (None: as the environment says), into a log.

    threads: how many PyTorch may use, if the environment does not say; 0: one a core. cores: the only ones it may use.
    """
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    if device is not None:
        env["CUDA_VISIBLE_DEVICES"] = device
    if threads:
        env.setdefault("OMP_NUM_THREADS", str(threads))

    def prepare() -> None:
        die_with_parent()
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)

    output = open(log, "wb") if log else None  # noqa: SIM115 - closed below
    try:
        return subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
            preexec_fn=prepare,
        )
    finally:
        if output:
            output.close()


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Stop the processes and everything they started: SIGTERM to their groups, SIGKILL after a while."""
    for signum, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, _GRACE)):
        for process in processes:
            try:
                os.killpg(process.pid, signum)
            except ProcessLookupError:
                continue
        # The second round also reaches children whose parent has ended already.
        deadline = time.monotonic() + patience
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue


def new_log(directory: Path, name: str) -> Path:
    """A log file that does not exist yet: name.1.log, then name.2.log for the next try."""
    directory.mkdir(parents=True, exist_ok=True)
    number = 1
    while (directory / f"{name}.{number}.log").exists():
        number += 1
    return directory / f"{name}.{number}.log"


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of a log, progress bars reduced to their last state."""
    with open(log, "rb") as handle:
        handle.seek(0, os.SEEK_END)
        handle.seek(max(0, handle.tell() - 64 * 1024))
        text = handle.read().decode("utf-8", "replace")
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if line.strip()][-count:]


# a progress bar's done, total, time left, unit ("2.1prompt/s", or slower "3.2s/prompt") and tokens a second
_BAR = re.compile(r"(\d+)/(\d+) \[[\d:]+<([\d:]+), *(?:[\d.?]+s/([a-z]+)|[\d.?]+([a-z]+)/s)(?:.* ([\d.]+) tok/s)?")
_UNITS = {"it": "step"}  # transformers' trainer counts iterations, which are steps
_OURS = re.compile(r"(generate|combine|preload|rank|train|eval)\b.*: ")  # else it is a library's warning


def overall(logs: list[Path]) -> str:
    """All shards' progress in one line, from the progress bars at the ends of their logs."""
    done, total, rate, left, unit = 0, 0, 0.0, (0, "0:00"), ""
    for log in logs:
        bars = [bar for line in last_lines(log, 5) if (bar := _BAR.search(line))]
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


def watch(processes: list[subprocess.Popen[bytes]], logs: list[Path], name: str) -> None:
    """Wait for all; on the first failure stop the others and raise SystemExit with its code."""
    reported = time.monotonic()
    try:
        while True:
            codes = [process.poll() for process in processes]
            failed = next((i for i, code in enumerate(codes) if code), None)
            if failed is not None:
                stop(processes)
                _show_failure(name, failed, codes[failed] or 1, logs)
            if all(code == 0 for code in codes):
                break
            if time.monotonic() - reported > _REPORT:
                reported = time.monotonic()
                print(f"{name}: {overall(logs)}", flush=True)
            time.sleep(0.1)
    except BaseException:
        stop(processes)
        raise
    for log in logs:
        print(last_words(log) or (last_lines(log, 1) or [f"{name}: done"])[0].strip(), flush=True)


def _show_failure(name: str, index: int, code: int, logs: list[Path]) -> None:
    if code < 0:
        reason = f"was killed by {signal.Signals(-code).name}" + (
            " (out of memory?)" if code == -signal.SIGKILL else ""
        )
        code = 128 - code
    else:
        reason = f"ended with code {code}"
    print(f"\n{name} {index} {reason}; the end of {logs[index]}:", file=sys.stderr)
    print("\n".join(f"  | {line}" for line in last_lines(logs[index], _TAIL)), file=sys.stderr)
    # with several ranks and a launcher, our own error line may stand far above the end
    said = dict.fromkeys(line for line in last_lines(logs[index], 10000) if line.startswith("error: "))
    print("\n".join(said), file=sys.stderr, flush=True)
    if shutil.disk_usage(logs[index].parent).free < _LEAST_FREE:  # then the log itself could not be written
        print(
            f"error: {logs[index].parent}: the disk is full; make room and run the same command to go on",
            file=sys.stderr,
        )
    raise SystemExit(code)
