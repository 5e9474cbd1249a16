"""The main memory that this process may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_GROUPS, _MOUNTS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def main_memory() -> int:
    """Bytes of main memory that can be had, by the kernel's count and the limits of a container or a job."""
    import psutil

    return min([psutil.virtual_memory().available, *_limits(_GROUPS, _MOUNTS)])


def _limits(groups: Path, mounts: Path) -> Iterator[int]:
    """The limits of the process's control groups: its own, as Slurm makes one for a job, and those that hold it.

    A container sees its own at the top, whatever `groups` says. There are two versions of control groups.
    """
    lines = groups.read_text().splitlines() if groups.exists() else []
    for number, controllers, path in (line.split(":", 2) for line in lines):
        if number == "0":
            top, name = mounts, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = mounts / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = top / path.strip("/")
        for group in (own, *own.parents):
            text = (group / name).read_text().strip() if (group / name).is_file() else ""
            if text.isdecimal():  # not "max"
                yield int(text)
            if group == top:
                break
