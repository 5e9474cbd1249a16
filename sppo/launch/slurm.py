"""The launcher inside a Slurm allocation: a job step a shard, one step over all nodes for training.

Slurm places the steps, gives each its GPUs, and ends them with the job. Outside an allocation see submit.py.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sppo.command.errors import SPPOError, UsageError
from sppo.command.search_path import ROOT
from sppo.launch.devices import CPU, groups
from sppo.launch.nodes import Answer
from sppo.launch.processes import environment, start, stop
from sppo.recipe import Recipe
from sppo.store.locks import SHARED

# A node may have its Python elsewhere: then the one that scripts/env.sh finds there does the work.
_ON_NODE = 'if [ ! -x "$1" ]; then unset PYTHON; . "$0/scripts/env.sh"; shift; set -- "$PYTHON" "$@"; fi; exec "$@"'


def in_allocation() -> bool:
    return bool(os.environ.get("SLURM_JOB_ID"))


def _gpus_on_node() -> int:
    """GPUs of each node, as Slurm says it in the one or the other variable; 0 where it says nothing."""
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        if number := re.search(r"(\d+)$", os.environ.get(name, "")):  # "8", or "h100:8"
            return int(number[1])
    return 0


class Launcher:
    """See watch.Launcher. Its tasks are srun's processes, which end with the code of what they run."""

    def __init__(self, recipe: Recipe) -> None:
        if not in_allocation():
            raise UsageError("--launcher slurm works inside an allocation (salloc, sbatch), and this is none")
        if not shutil.which("srun"):
            raise SPPOError("--launcher slurm: there is no srun here")
        os.environ[SHARED] = "1"
        nodes = int(os.environ.get("SLURM_JOB_NUM_NODES") or os.environ["SLURM_NNODES"])
        if recipe.nodes > nodes:
            raise UsageError(f"--nodes {recipe.nodes}: the allocation has {nodes}")
        self.nodes = recipe.nodes or nodes
        if recipe.gpus == "auto":
            count = _gpus_on_node()
            if not count:
                raise UsageError("this allocation has no GPUs (--gpus-per-node); --gpus none runs on its CPUs")
            self.gpus = [str(i) for i in range(count)]
        else:
            self.gpus = [CPU] * len(recipe.gpus.split(","))
        self.here = len(groups(self.gpus, recipe.world_size))  # slots of a node
        self.world_size = recipe.world_size
        if (cores := int(os.environ.get("SLURM_CPUS_ON_NODE", self.here))) < self.here:
            said = f"{cores} cores of a node for its {self.here} shards, so that they wait for each other"
            print(f'launch: warning: {said}; ask for more: --sbatch "--cpus-per-task=N"', flush=True)

    def slots(self) -> int:
        return self.nodes * self.here

    def _step(self, command: list[str], nodes: int, slots: int, gpus: int, log: Path) -> subprocess.Popen[bytes]:
        """A job step, one task on each of so many nodes. It gets its share of a node's cores, and all of its memory.

        What the job asked for is in srun's environment too, so that each number has to be said again.
        """
        on_cpu = self.gpus[0] == CPU
        cores = max(1, int(os.environ.get("SLURM_CPUS_ON_NODE", 1)) // slots)
        words = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--exact", "--mem=0"]
        words += [f"--cpus-per-task={cores}", "--kill-on-bad-exit=1", "--unbuffered", f"--job-name={log.stem}"]
        words += [] if on_cpu else [f"--gpus-per-node={gpus}"]
        words += ["bash", "-c", _ON_NODE, str(ROOT), *command]
        # srun, asked to end, ends what it runs; killed, it would leave it
        return start(words, CPU if on_cpu else None, log, dies_by=signal.SIGTERM)

    def start(self, command: list[str], slot: int, log: Path) -> subprocess.Popen[bytes]:
        return self._step(command, 1, self.here, self.world_size, log)

    def machines(self) -> tuple[int, list[str]]:
        return self.nodes, self.gpus

    def train(self, part: list[str], machines: int, log: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sppo.launch.machine", *part]  # Slurm tells it its rank and its peer
        return self._step(command, machines, 1, len(self.gpus), log)

    def survey(self, command: list[str], give_up: Callable[[], None]) -> list[Answer]:
        listed = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()[: self.nodes]
        where = ["srun", "--nodes=1", "--ntasks=1", "--overlap", "--mem=0", "--immediate=60", "--job-name=look"]

        def ask(rank: int, name: str) -> Answer:
            words = [*where, f"--nodelist={name}", "bash", "-c", _ON_NODE, str(ROOT), *command]
            words += ["--count", str(len(names)), "--rank", str(rank)]
            done = subprocess.run(words, capture_output=True, text=True, env=environment(None), check=False)
            if done.returncode:
                give_up()
            said = [line for line in done.stderr.splitlines() if not line.startswith("srun: error: ")]
            done.stderr = "\n".join(said) or done.stderr
            return Answer(name, done)

        with ThreadPoolExecutor(len(names)) as pool:
            return list(pool.map(ask, range(len(names)), names))

    def stop(self, tasks: list[subprocess.Popen[bytes]]) -> None:
        stop(tasks)
