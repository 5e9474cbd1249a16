"""The CPU cores that this process may use, and which of them each of several shards gets.

vLLM and PyTorch bind a thread to each core and let it wait in a loop. Two processes on the same cores then take ten
times as long, not twice. So each of the shards of one machine gets cores of its own.
"""

from __future__ import annotations

import os


def allowed() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def own(index: int, shards: int) -> list[int]:
    """The cores of shard `index` of so many: neighbours, and no other shard's; all, where there are fewer cores."""
    every = allowed()
    return every[index * len(every) // shards : (index + 1) * len(every) // shards] if len(every) >= shards else every
