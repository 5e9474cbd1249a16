"""The launcher of one machine: a process for each of its devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sppo.launch.cores import own
from sppo.launch.devices import CPU, devices, groups, refuse_absent
from sppo.launch.processes import start, stop
from sppo.recipe import Recipe


class Launcher:
    """See watch.Launcher. Its tasks are processes."""

    def __init__(self, recipe: Recipe) -> None:
        self.gpus = devices(recipe.gpus)
        self.groups = groups(self.gpus, recipe.world_size)
        refuse_absent(self.gpus)

    def slots(self) -> int:
        return len(self.groups)

    def start(self, command: list[str], slot: int, log: Path) -> subprocess.Popen[bytes]:
        count, device = len(self.groups), self.groups[slot]
        mine = own(slot, count) if count > 1 else []
        # on GPUs the cores are shared: which of them are near a GPU, the system knows better
        return start(command, device, log, len(mine), mine if device == CPU else None)

    def machines(self) -> tuple[int, list[str]]:
        return 1, self.gpus

    def train(self, part: list[str], machines: int, log: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sppo.launch.machine", "--rank", "0", "--peer", "127.0.0.1", *part]
        return start(command, ",".join(filter(None, self.gpus)), log)

    def stop(self, tasks: list[subprocess.Popen[bytes]]) -> None:
        stop(tasks)
