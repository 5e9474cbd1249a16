"""The main memory that this process may use."""

from __future__ import annotations

from pathlib import Path


def main_memory() -> int:
    """Bytes of main memory that can be had, by the kernel's count and the container's limit."""
    import psutil

    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(free, int(text)) if text.isdigit() else free
