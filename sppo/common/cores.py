"""The CPU cores that this process may use: how many, which of them a shard gets, and whether others keep them busy.

vLLM and PyTorch bind a thread to each core and let it wait in a loop. Two processes on the same cores then take ten
times as long, not twice; so shards beside each other get cores of their own, and a busy machine is said.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

_BUSY = 0.25  # share of the cores that others use, above which it is said


def allowed() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def own(index: int, shards: int) -> list[int]:
    """The cores of shard `index` of so many: neighbours, and no other shard's; all, where there are fewer cores."""
    every = allowed()
    return every[index * len(every) // shards : (index + 1) * len(every) // shards] if len(every) >= shards else every


class Watch:
    """What other programs take of the allowed cores, from now on."""

    def __init__(self) -> None:
        self.began, self.used, self.own = time.monotonic(), _used(), time.process_time()

    def seconds(self) -> float:
        """How long it has watched."""
        return time.monotonic() - self.began

    def warning(self) -> str:
        """What to say where others keep more than a quarter of the cores busy; else, or unknown, nothing."""
        used = sum(after - before for after, before in zip(_used(), self.used, strict=True))
        count, own = len(self.used), time.process_time() - self.own
        taken = (used / os.sysconf("SC_CLK_TCK") - own) / max(self.seconds(), 1e-9)
        if not count or taken < _BUSY * count:
            return ""
        return f"other programs keep {min(taken, count):.1f} of {count} cores busy, so this may take many times as long"


def without_gpu() -> bool:
    """Whether this process sees no GPU; without asking CUDA, which a process that starts others must not touch."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not shutil.which("nvidia-smi")


def _used() -> list[int]:
    """Clock ticks that each allowed core has worked; nothing where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return []
    mine = {f"cpu{number}" for number in allowed()}
    rows = [line.split() for line in stat.read_text().splitlines()]
    # user, nice, system, idle, iowait, irq, softirq, steal
    return [sum(map(int, row[1:4])) + sum(map(int, row[6:8])) for row in rows if row and row[0] in mine]
