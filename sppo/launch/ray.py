"""The launcher on a Ray cluster: a task with num_gpus a shard, and for training a task on each of some machines.

Ray places the tasks. One whose machine dies is started again here; shards' journals then keep what was done. A training
that loses a machine is started again as a whole, and goes on from its newest checkpoint.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sppo.command.errors import SPPOError, UsageError, first_line
from sppo.command.importing import is_installed
from sppo.command.search_path import search_path
from sppo.launch.devices import CPU
from sppo.launch.nodes import Answer
from sppo.launch.processes import GRACE
from sppo.recipe import Recipe
from sppo.store.locks import SHARED

_TRIES = 5  # of a task whose machine dies
_NOTICED = 30.0  # seconds after a rank's failure in which Ray would tell that another rank's machine has died
# variables that a task gets from here; all others are its machine's own
_TRAVEL = ("SPPO_", "HF_", "OMP_", "MKL_", "NCCL_", "GLOO_", "TORCH_", "VLLM_", "TOKENIZERS_", "WANDB_", "OPENAI_")


def run_command(argv: list[str], env: dict[str, str], log: str, directory: str) -> subprocess.CompletedProcess[str]:
    """On a machine of the cluster: a command in a directory to its end, into a log if it has one, else returned.

    It travels to the machine as it stands here, so it uses nothing of this project. The command ends with this task,
    and for GPUs it sees those that Ray gave the task.
    """
    import contextlib
    import ctypes
    import os
    import signal
    import subprocess
    import sys

    def die_with_task() -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    if not os.path.exists(argv[0]):
        argv = [sys.executable, *argv[1:]]  # a machine may have its Python elsewhere
    theirs = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # an empty entry is this directory
    path = os.pathsep.join([env["PYTHONPATH"], *theirs])
    own = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}  # Ray sets it to num_cpus
    environment = {**own, **env, "PYTHONPATH": path}
    with open(log or os.devnull, "ab") as file:
        try:
            process = subprocess.Popen(
                argv,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file if log else subprocess.PIPE,
                stderr=file if log else subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                preexec_fn=die_with_task,
            )
        except OSError as error:
            file.write(f"error: {error}; is the project in the same directory on this machine?\n".encode())
            return subprocess.CompletedProcess(argv, 127, "", str(error))
        try:
            out, err = process.communicate()
        except BaseException:  # cancelled
            for signum in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signum)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            raise
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


class Tasks:
    """A watch.Task: a shard, or a training's part on each machine. Where a machine dies all of it is started again.

    The other ranks of a training may fail of a machine's death before Ray tells of it.
    """

    def __init__(self, begin: Callable[[], list[Any]]) -> None:
        self.begin, self.tries = begin, 1
        self.refs, self.failed = begin(), 0.0

    def poll(self) -> int | None:
        import ray
        from ray.exceptions import RayError, RayTaskError

        done, running = ray.wait(self.refs, num_returns=len(self.refs), timeout=0)
        try:
            codes = [ray.get(ref).returncode for ref in done]
        except RayTaskError as error:  # the task itself: its log cannot be written, say
            _cancel(running)
            print(f"launch: Ray gives the task up: {first_line(error)}", file=sys.stderr, flush=True)
            return 1
        except RayError as error:
            return self._again(first_line(error))
        failure = next(filter(None, codes), 0)
        if failure and running:
            self.failed = self.failed or time.monotonic()
            if time.monotonic() < self.failed + _NOTICED:
                return None
            _cancel(running)
        return failure if failure or not running else None

    def _again(self, why: str) -> int | None:
        if self.tries == _TRIES:
            print(f"launch: Ray gives the task up: {why}", file=sys.stderr, flush=True)
            return 1
        self.tries += 1
        print(f"launch: a machine is lost ({why}); its work starts again from what is kept", flush=True)
        _cancel(self.refs)
        self.refs, self.failed = self.begin(), 0.0
        return None


class Launcher:
    """See watch.Launcher. Its tasks are Tasks."""

    def __init__(self, recipe: Recipe) -> None:
        if not is_installed("ray"):
            raise SPPOError("--launcher ray: Ray is not installed; pip install '.[ray]'")
        import ray
        from ray._private import worker

        os.environ[SHARED] = "1"
        self.recipe, self.cpu = recipe, recipe.gpus != "auto"
        address = recipe.ray_address
        host, _, port = address.rpartition(":")
        try:
            if host and port.isdecimal():  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), 10).close()
            ray.init(
                address or None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None if address else False,
            )
            # else the last words of raylets come here, whatever log_to_driver says
            worker._worker_logs_enabled = False
        except (OSError, RuntimeError, ValueError) as error:
            raise SPPOError(f"--ray_address {address}: no Ray cluster ({first_line(error)}); `ray start` one") from None
        if not self._nodes():
            need = "CPUs" if self.cpu else "GPUs; --gpus none runs on its CPUs"
            raise UsageError(f"--launcher ray: the cluster has no {need}")

    def _nodes(self) -> list[dict[str, Any]]:
        """The machines of the cluster that can do work, as Ray describes them."""
        import ray

        kind = "CPU" if self.cpu else "GPU"
        alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind, 0) >= 1]
        return sorted(alive, key=lambda node: node["NodeID"])

    def slots(self) -> int:
        if self.cpu:
            return len(self._nodes()) * len(self.recipe.gpus.split(","))
        return sum(int(node["Resources"]["GPU"]) // self.recipe.world_size for node in self._nodes())

    def _submit(self, argv: list[str], log: Path | None, **options: Any) -> Any:
        """Let Ray run a command. A machine's death ends it: Tasks starts it again."""
        import ray
        from ray import cloudpickle

        env = {key: value for key, value in os.environ.items() if key.startswith(_TRAVEL)}
        env |= search_path()
        env |= {"CUDA_VISIBLE_DEVICES": ""} if self.cpu else {}
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        remote = ray.remote(run_command).options(name=log.stem if log else "look", max_retries=0, **options)
        return remote.remote(argv, env, str(log.absolute()) if log else "", os.getcwd())

    def start(self, command: list[str], slot: int, log: Path) -> Tasks:
        gpus = 0 if self.cpu else self.recipe.world_size
        return Tasks(lambda: [self._submit(command, log, num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD")])

    def machines(self) -> tuple[int, list[str]]:
        nodes = self.recipe.nodes or len(self._nodes())
        if self.cpu:
            return nodes, [CPU] * len(self.recipe.gpus.split(","))
        return nodes, [str(i) for i in range(min(int(node["Resources"]["GPU"]) for node in self._nodes()))]

    def train(self, part: list[str], machines: int, log: Path) -> Tasks:
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        gpus = 0 if self.cpu else len(self.machines()[1])
        share: dict[str, float] = {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}
        meeting = Path(part[part.index("--meeting") + 1])
        peer = ray.util.get_node_ip_address()
        groups: list[Any] = []  # this try's

        def begin() -> list[Any]:
            meeting.unlink(missing_ok=True)
            if groups:
                remove_placement_group(groups.pop())
            groups.append(placement_group([share] * machines, strategy="STRICT_SPREAD"))
            if not groups[0].wait(2):
                print(f"train: waiting for {machines} machines with {share}", flush=True)
            refs = []
            for rank in range(machines):
                where = PlacementGroupSchedulingStrategy(groups[0], placement_group_bundle_index=rank)
                words = [sys.executable, "-m", "sppo.launch.machine", "--rank", str(rank), "--peer", peer, *part]
                name = log if rank == 0 else log.with_suffix(f".machine{rank}.log")
                refs.append(self._submit(words, name, num_cpus=1, num_gpus=gpus, scheduling_strategy=where))
            return refs

        return Tasks(begin)

    def survey(self, command: list[str], give_up: Callable[[], None]) -> list[Answer]:
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        peer, nodes, refs = ray.util.get_node_ip_address(), self._nodes(), {}
        gpus = 1 if "--measure" in command and not self.cpu else 0
        for rank, node in enumerate(nodes):
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            words = [*command, "--count", str(len(nodes)), "--rank", str(rank), "--peer", peer]
            refs[self._submit(words, None, num_cpus=0, num_gpus=gpus, scheduling_strategy=where)] = node
        answers, waiting = {}, list(refs)
        while waiting:
            (done,), waiting = ray.wait(waiting)
            name = f"{refs[done]['NodeManagerHostname']} ({refs[done]['NodeManagerAddress']})"
            try:
                answers[done] = Answer(name, ray.get(done))
            except RayError as error:
                answers[done] = Answer(name, subprocess.CompletedProcess([], 1, "", first_line(error)), gone=True)
            if answers[done].done.returncode:
                give_up()
        return [answers[ref] for ref in refs]

    def stop(self, tasks: list[Tasks]) -> None:
        _cancel([ref for task in tasks for ref in task.refs])


def _cancel(refs: list[Any]) -> None:
    """End tasks: first asked, then by force."""
    import ray

    for by_force in (False, True):
        for ref in refs:
            ray.cancel(ref, force=by_force)
        _, refs = ray.wait(refs, num_returns=len(refs), timeout=GRACE) if refs else ([], [])
        if not refs:
            return
