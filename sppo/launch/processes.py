"""Processes of this machine: started, and stopped with everything that they have started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from sppo.command.errors import die_with_parent
from sppo.command.search_path import search_path

GRACE = 15  # seconds between asking a process to stop and killing it


def environment(device: str | None, threads: int = 0) -> dict[str, str]:
    """What a stage's command needs: our library, its device (None: as it stands), how many threads (0: one a core)."""
    env = {**os.environ, **search_path()}
    if device is not None:
        env["CUDA_VISIBLE_DEVICES"] = device
    if threads:
        env.setdefault("OMP_NUM_THREADS", str(threads))
    return env


def start(
    command: list[str],
    device: str | None,
    log: Path,
    threads: int = 0,
    cores: list[int] | None = None,
    dies_by: int = signal.SIGKILL,
) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, on `device` (None: as the environment says), into a log.

    threads: how many PyTorch may use, if the environment does not say; 0: one a core. cores: the only ones it may use.
    dies_by: the signal that it gets when this process dies.
    """

    def prepare() -> None:
        die_with_parent(dies_by)
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)

    with open(log, "wb") as output:
        return subprocess.Popen(
            command,
            env=environment(device, threads),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=prepare,
        )


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Stop the processes and everything they started: SIGTERM to their groups, SIGKILL after a while."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            try:
                os.killpg(process.pid, signum)
            except ProcessLookupError:
                continue
        # The second round also reaches children whose parent has ended already.
        deadline = time.monotonic() + GRACE
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
