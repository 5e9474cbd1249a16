"""What all launchers have in common: shards handed out, everything watched, the first failure stops the rest.

A launcher (local.py, slurm.py, ray.py) is a class with the methods of `Launcher`: it places processes on machines
and knows nothing of what they do. Logs, progress, exit codes and the order of work stand here, once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sppo.command.errors import INTERRUPTED, SPPOError
from sppo.command.stopping import end_if_asked, stop_asked
from sppo.launch.devices import CPU
from sppo.launch.logs import new_log, overall, show_ends, show_failure
from sppo.launch.nodes import Answer
from sppo.recipe import Recipe
from sppo.store.directories import check_place, refuse_busy
from sppo.store.locks import SHARED
from sppo.store.manifest import OVERWRITE, await_written
from sppo.store.shards import end_overwriting, overwriting, shard_count, shard_paths
from sppo.training.launching import training_config
from sppo.training.settings import check_machine, prepare

_REPORT = 30  # seconds between two progress lines


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

    def count(self) -> int:
        """How many machines there are to look at."""
        ...

    def survey(self, command: list[str], give_up: Callable[[], None]) -> list[Answer]:
        """Run a command, with --rank, on each machine; give_up() as soon as one machine cannot."""
        ...

    def stop(self, tasks: list[Any]) -> None:
        """End the tasks and everything that they have started."""
        ...


@dataclass
class _Started:
    task: Task
    what: str  # as messages name it: "generate 3"
    log: Path


def run_shards(
    launcher: Launcher, wanted: int, shards_dir: Path | None, logs: Path, name: str, command: list[str]
) -> None:
    """Run `command --data_frac <numbers> --numgpu <count>` until all shards are done.

    wanted: how many shards there shall be; 0: as many as an earlier try in `shards_dir` made, else one a slot. With
    more shards than slots a process gets several, so that it loads its model once: first a half of what is left for
    all slots together, and less each time, so that a slow machine holds nobody up. Where `command` has --overwrite and
    was killed, it keeps the shards that it had already made again.
    """
    slots = launcher.slots()
    if not slots:
        raise SPPOError("no machine has room for a shard: each needs as many GPUs of one machine as --world_size says")
    count = wanted or slots
    if shards_dir and "--overwrite" in command:
        os.environ[OVERWRITE], count = overwriting(shards_dir, wanted, slots)
    elif shards_dir:
        count = shard_count(shards_dir, wanted, slots)
    waiting, running, shown = list(range(count)), {}, []

    def fill() -> None:
        slots = launcher.slots() if waiting else 0
        for slot in range(slots):
            if waiting and slot not in running:
                take = max(1, len(waiting) // (2 * slots))
                mine, waiting[:take] = waiting[:take], []
                shown.append(new_log(logs, f"{name}-{mine[0]}"))
                which = str(mine[0]) if take == 1 else f"{mine[0]} to {mine[-1]}"
                argv = [*command, "--data_frac", ",".join(map(str, mine)), "--numgpu", str(count)]
                running[slot] = _Started(launcher.start(argv, slot, shown[-1]), f"{name} {which}", shown[-1])

    _watch(launcher, running, fill, shown, name)
    if waiting:
        raise SPPOError(f"{name}: no machine is left for {len(waiting)} shards; the same command goes on from here")
    if shards_dir:
        _await_manifests(shards_dir, count)
        end_overwriting(shards_dir)
    show_ends(shown, name)


def run_training(launcher: Launcher, recipe: Recipe, overwrite: bool, logs: Path, arguments: list[str]) -> None:
    """`accelerate launch` sppo/run_sppo.py with `arguments`, which ask for `recipe`, over all devices of all machines.

    What is done is not launched, and wrong flags are refused here, before a process for each GPU loads anything.
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
    part = ["--machines", str(machines), "--devices", ",".join(names), "--accelerate_config", str(config.path)]
    part += ["--meeting", str(log.with_suffix(".meeting.json")), "--", *arguments]
    running: dict[int, _Started] = {}
    waiting = [part]

    def begin() -> None:
        if waiting:
            running[0] = _Started(launcher.train(waiting.pop(), machines, log), "train", log)

    try:
        _watch(launcher, running, begin, [log], "train", saves=True)
    finally:
        log.with_suffix(".meeting.json").unlink(missing_ok=True)
    show_ends([log], "train")


def _watch(
    launcher: Launcher,
    running: dict[int, _Started],
    fill: Callable[[], None],
    logs: list[Path],
    name: str,
    saves: bool = False,
) -> None:
    """Wait for all that runs; on the first failure stop the others and raise SystemExit with its code.

    `fill` starts what there is room for. A request to stop ends the work here, unless what runs `saves` and then ends
    by itself.
    """
    reported = time.monotonic()
    try:
        fill()
        while running:
            for slot, started in list(running.items()):
                code = started.task.poll()
                if code is not None:
                    del running[slot]
                if code:  # what it has started itself may live on, and hold a GPU
                    launcher.stop([started.task, *(other.task for other in running.values())])
                    _end(started, code)
            if not saves:
                end_if_asked()
            fill()
            if time.monotonic() - reported > _REPORT:
                reported = time.monotonic()
                print(f"{name}: {overall(logs)}", flush=True)
            time.sleep(0.1 if running else 0)
    except BaseException:
        launcher.stop([started.task for started in running.values()])
        raise


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
