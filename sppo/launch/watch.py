"""What all launchers have in common: shards handed out, everything watched, the first failure stops the rest.

A launcher (local.py, slurm.py, ray.py) is a class with the methods of `Launcher`: it places processes on machines
and knows nothing of what they do. Logs, progress, exit codes and the order of work stand here, once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from sppo.command.errors import INTERRUPTED, SPPOError
from sppo.command.stopping import end_if_asked, stop_asked
from sppo.launch.devices import CPU
from sppo.launch.logs import new_log, progress_line, show_ends, show_failure
from sppo.recipe import Recipe
from sppo.store.directories import check_place, refuse_busy
from sppo.store.locks import SHARED
from sppo.store.manifest import OVERWRITE, await_written
from sppo.store.shards import end_overwriting, overwriting, shard_count, shard_paths
from sppo.training.launching import training_config
from sppo.training.settings import check_machine, prepare

_REPORT = 30  # seconds between two progress lines
_PAUSE = 0.1  # seconds between two looks at what runs


class Task(Protocol):
    """Something that a launcher has started: a process here, a job step, a task of Ray."""

    def poll(self) -> int | None:
        """Its exit code, below 0 for a signal; None while it runs."""
        ...


class Launcher(Protocol):
    """Places processes on machines."""

    def slots(self) -> int:
        """How many shards can be at work beside each other: a device or group of devices each. May change."""
        ...

    def start(self, command: list[str], slot: int, log: Path) -> Any:
        """Start a shard's command on a slot, its output into the log; returns a Task."""
        ...

    def machines(self) -> tuple[int, list[str]]:
        """(how many machines train together, the devices of each: as devices.devices gives them)."""
        ...

    def train(self, part: list[str], machines: int, log: Path) -> Any:
        """Start `python -m sppo.launch.machine <part>` on each machine, with --rank and --peer; returns a Task."""
        ...

    def stop(self, tasks: list[Any]) -> None:
        """End the tasks and everything that they have started."""
        ...


@dataclass
class _Started:
    task: Task
    what: str  # as messages name it: "generate 3"
    log: Path


class _Watch:
    """What a launcher has started for a stage. The first failure stops the rest, and so does leaving with an error."""

    def __init__(self, launcher: Launcher, stage: str) -> None:
        self.launcher, self.stage = launcher, stage
        self.running: dict[int, _Started] = {}  # by slot
        self.logs: list[Path] = []
        self._told, self._line = time.monotonic(), ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            self.launcher.stop([started.task for started in self.running.values()])

    def add(self, slot: int, task: Task, what: str, log: Path) -> None:
        self.running[slot] = _Started(task, what, log)
        self.logs.append(log)

    def look(self) -> None:
        """Take note of what has ended, and tell how far the rest is. Raises SystemExit for a process that failed."""
        for slot, started in list(self.running.items()):
            code = started.task.poll()
            if code is not None:
                del self.running[slot]
            if code:  # what it has started itself may live on, and hold a GPU
                self.launcher.stop([started.task, *(other.task for other in self.running.values())])
                _end(started, code)
        if time.monotonic() - self._told > _REPORT:
            before, self._line = self._line, progress_line(self.logs, self.stage)
            self._told = time.monotonic()
            if self._line != before:
                print(self._line, flush=True)


def run_shards(
    launcher: Launcher, wanted: int, shards_dir: Path | None, logs: Path, stage: str, command: list[str]
) -> None:
    """Run `command --data_frac <numbers> --numgpu <count>` until all shards are done.

    wanted: how many shards there are; 0: as many as an earlier try in `shards_dir` made, else one per slot. Where
    `command` has --overwrite and was killed, it keeps the shards that it had already made again.
    """
    slots = launcher.slots()
    if not slots:
        raise SPPOError("no machine has room for a shard: each needs as many GPUs of one machine as --world_size says")
    count = wanted or slots
    if shards_dir and "--overwrite" in command:
        os.environ[OVERWRITE], count = overwriting(shards_dir, wanted, slots)
    elif shards_dir:
        count = shard_count(shards_dir, wanted, slots)

    waiting = list(range(count))
    with _Watch(launcher, stage) as watch:
        while waiting or watch.running:
            watch.look()
            end_if_asked()
            slots = launcher.slots() if waiting else 0
            for slot in range(slots):
                if waiting and slot not in watch.running:
                    # many shards at first: a process loads its model once for all of its own. Then fewer and fewer, so
                    # that a slow machine keeps nobody waiting at the end
                    take = max(1, len(waiting) // (2 * slots))
                    group, waiting = waiting[:take], waiting[take:]
                    log = new_log(logs, f"{stage}-{group[0]}")
                    which = str(group[0]) if len(group) == 1 else f"{group[0]} to {group[-1]}"
                    argv = [*command, "--data_frac", ",".join(map(str, group)), "--numgpu", str(count)]
                    watch.add(slot, launcher.start(argv, slot, log), f"{stage} {which}", log)
            if waiting and not watch.running:
                left = len(waiting)
                raise SPPOError(f"{stage}: no machine is left for {left} shards; the same command goes on from here")
            time.sleep(_PAUSE)

    if shards_dir:
        _await_manifests(shards_dir, count)
        end_overwriting(shards_dir)
    show_ends(watch.logs, stage)


def run_training(launcher: Launcher, recipe: Recipe, overwrite: bool, logs: Path, arguments: list[str]) -> None:
    """`accelerate launch` sppo/run_sppo.py with `arguments`, which ask for `recipe`, over all devices of all machines.

    What is done is not launched, and wrong flags are refused here, before a process for each GPU loads anything. A
    request to stop is the training's own to hear: it saves and ends.
    """
    machines, names = launcher.machines()
    config = training_config(names, recipe.accelerate_config, machines)
    training = prepare(recipe, config.processes, overwrite)
    if training.is_done():
        return
    refuse_busy(training.output_dir)
    if training.is_done():  # by the process that was waited for
        return
    check_place(training.output_dir)
    check_machine(training.recipe, gpu=CPU not in names)

    log = new_log(logs, "train")
    meeting = log.with_suffix(".meeting.json")
    part = ["--machines", str(machines), "--devices", ",".join(names), "--accelerate_config", str(config.path)]
    part += ["--meeting", str(meeting), "--", *arguments]
    try:
        with _Watch(launcher, "train") as watch:
            watch.add(0, launcher.train(part, machines, log), "train", log)
            while watch.running:
                watch.look()
                time.sleep(_PAUSE)
    finally:
        meeting.unlink(missing_ok=True)
    show_ends([log], "train")


def _end(started: _Started, code: int) -> None:
    """Raise SystemExit for a process that failed, after saying what is known of it."""
    if stop_asked():
        print(f"{started.what}: stopped, as asked; the same command goes on from here", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED)
    reason = f"ended with code {code}"
    if code < 0:
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        reason, code = f"was killed by {signal.Signals(-code).name}{memory}", 128 - code
    show_failure(started.what, reason, started.log)
    raise SystemExit(code)


def _await_manifests(directory: Path, count: int) -> None:
    """Wait until all shards are seen here as they were written: a shared disk may show them late. Raises SPPOError."""
    for number in range(count):
        path, manifest, _ = shard_paths(directory, number)
        seen = await_written(path, manifest, may_lack=False) if SHARED in os.environ else manifest.exists()
        if not seen:
            raise SPPOError(
                f"{path} is not seen here as it was written, although the process that wrote it has ended well; is "
                f"{directory} the same directory on all machines?"
            )
