"""The launcher on a Ray cluster: a task with num_gpus a shard, and for training a task on each of some machines.

Ray places the tasks and starts one again when its machine dies; shards' journals then keep what was done. A training
that loses a machine is started again as a whole, and goes on from its newest checkpoint.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sppo.command.errors import SPPOError, UsageError
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
_FRESH = 5.0  # seconds for which what the cluster has is not asked again


def run_command(argv: list[str], env: dict[str, str], log: str, directory: str) -> tuple[int, str, str]:
    """On a machine of the cluster: a command in a directory to its end, into a log or, without one, into what is
    returned.

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
    with contextlib.ExitStack() as opened:
        out: Any = opened.enter_context(open(log, "ab")) if log else subprocess.PIPE
        try:
            process = subprocess.Popen(
                argv, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT if log else subprocess.PIPE, start_new_session=True, preexec_fn=die_with_task,
            )  # fmt: skip
        except OSError as error:
            if log:
                out.write(f"error: {error}; is the project in the same directory on this machine?\n".encode())
            return 127, "", str(error)
        try:
            texts = process.communicate()
        except BaseException:  # cancelled
            for signum in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signum)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            raise
    said = [(text or b"").decode("utf-8", "replace") for text in texts]
    return process.returncode, said[0], said[1]


class Shard:
    """A Task: what Ray runs once, on whatever machine."""

    def __init__(self, ref: Any) -> None:
        self.refs = [ref]

    def poll(self) -> int | None:
        import ray
        from ray.exceptions import RayError

        done, _ = ray.wait(self.refs, timeout=0)
        if not done:
            return None
        try:
            return ray.get(done[0])[0]
        except RayError as error:
            print(f"launch: Ray gives the task up: {str(error).strip().splitlines()[0]}", file=sys.stderr, flush=True)
            return 1


class Training:
    """A Task: one part on each machine. Where a machine dies all parts are started again.

    The other ranks may fail of its death before Ray tells of it.
    """

    def __init__(self, begin: Callable[[], list[Any]], end: Callable[[list[Any]], None]) -> None:
        self.begin, self.end, self.tries = begin, end, 1
        self.refs, self.failed = begin(), 0.0

    def poll(self) -> int | None:
        import ray
        from ray.exceptions import RayError

        done, running = ray.wait(self.refs, num_returns=len(self.refs), timeout=0)
        try:
            codes = [ray.get(ref)[0] for ref in done]
        except RayError as error:
            return self._again(str(error).strip().splitlines()[0])
        failure = next(filter(None, codes), 0)
        if failure and running:
            self.failed = self.failed or time.monotonic()
            if time.monotonic() < self.failed + _NOTICED:
                return None
            self.end(running)
        return failure if failure or not running else None

    def _again(self, why: str) -> int | None:
        if self.tries == _TRIES:
            return 1
        self.tries += 1
        print(f"train: a machine is lost ({why}); training starts again from its newest checkpoint", flush=True)
        self.end(self.refs)
        self.refs, self.failed = self.begin(), 0.0
        return None


class Launcher:
    """See watch.Launcher. Its tasks are Shard and Training."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        if not is_installed("ray"):
            raise SPPOError("--launcher ray: Ray is not installed; pip install '.[ray]'")
        import ray
        from ray._private import worker

        os.environ[SHARED] = "1"
        self.recipe, self.name, self.cpu = recipe, name, recipe.gpus != "auto"
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
            why = str(error).splitlines()[0]
            raise SPPOError(f"--ray_address {address}: no Ray cluster ({why}); `ray start` one") from None
        self.asked, self.known = 0.0, []
        if not self._nodes():
            need = "CPUs" if self.cpu else "GPUs; --gpus none runs on its CPUs"
            raise UsageError(f"--launcher ray: the cluster has no {need}")

    def _nodes(self) -> list[dict[str, Any]]:
        """The machines of the cluster that can do work, as Ray describes them."""
        import ray

        if time.monotonic() - self.asked > _FRESH:
            kind = "CPU" if self.cpu else "GPU"
            alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind, 0) >= 1]
            self.known = sorted(alive, key=lambda node: node["NodeID"])
            self.asked = time.monotonic()
        return self.known

    def _of_a_node(self) -> int:
        """Slots of the machine that has the fewest."""
        if self.cpu:
            return len(self.recipe.gpus.split(","))
        return min(int(node["Resources"]["GPU"]) for node in self._nodes()) // self.recipe.world_size

    def slots(self) -> int:
        if self.cpu:
            return len(self._nodes()) * self._of_a_node()
        return sum(int(node["Resources"]["GPU"]) // self.recipe.world_size for node in self._nodes())

    def _submit(self, argv: list[str], log: str, **options: Any) -> Any:
        import ray
        from ray import cloudpickle

        env = {key: value for key, value in os.environ.items() if key.startswith(_TRAVEL)}
        env |= search_path()
        env |= {"CUDA_VISIBLE_DEVICES": ""} if self.cpu else {}
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        remote = ray.remote(run_command).options(name=self.name, **options)
        return remote.remote(argv, env, log, os.getcwd())

    def start(self, command: list[str], slot: int, log: Path) -> Shard:
        share = {"num_cpus": 1} if self.cpu else {"num_gpus": self.recipe.world_size, "num_cpus": 1}
        return Shard(
            self._submit(command, str(log.absolute()), **share, max_retries=_TRIES - 1, scheduling_strategy="SPREAD")
        )

    def machines(self) -> tuple[int, list[str]]:
        nodes = self.recipe.nodes or len(self._nodes())
        if self.cpu:
            return nodes, [CPU] * len(self.recipe.gpus.split(","))
        return nodes, [str(i) for i in range(min(int(node["Resources"]["GPU"]) for node in self._nodes()))]

    def train(self, part: list[str], machines: int, log: Path) -> Training:
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        gpus = 0 if self.cpu else len(self.machines()[1])
        share: dict[str, float] = {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}
        meeting = Path(part[part.index("--meeting") + 1])
        peer = ray.util.get_node_ip_address()
        groups: list[Any] = []

        def begin() -> list[Any]:
            meeting.unlink(missing_ok=True)
            groups.append(placement_group([share] * machines, strategy="STRICT_SPREAD"))
            if not groups[-1].wait(2):
                print(f"train: waiting for {machines} machines with {share}", flush=True)
            refs = []
            for rank in range(machines):
                where = PlacementGroupSchedulingStrategy(groups[-1], placement_group_bundle_index=rank)
                words = [sys.executable, "-m", "sppo.launch.machine", "--rank", str(rank), "--peer", peer, *part]
                name = log if rank == 0 else log.with_suffix(f".machine{rank}.log")
                need = {"num_cpus": 1, "num_gpus": gpus} if gpus else {"num_cpus": 1}
                refs.append(self._submit(words, str(name.absolute()), **need, max_retries=0, scheduling_strategy=where))
            return refs

        def end(refs: list[Any]) -> None:
            _cancel(refs)
            remove_placement_group(groups[-1])

        return Training(begin, end)

    def count(self) -> int:
        return len(self._nodes())

    def survey(self, command: list[str], give_up: Callable[[], None]) -> list[Answer]:
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        peer, refs = ray.util.get_node_ip_address(), {}
        for rank, node in enumerate(self._nodes()):
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            need = {} if self.cpu else {"num_gpus": 1 if "--measure" in command else 0}
            words = [*command, "--rank", str(rank), "--peer", peer]
            refs[self._submit(words, "", num_cpus=0, **need, max_retries=0, scheduling_strategy=where)] = node
        answers, waiting = {}, list(refs)
        while waiting:
            (done,), waiting = ray.wait(waiting)
            name = f"{refs[done]['NodeManagerHostname']} ({refs[done]['NodeManagerAddress']})"
            try:
                answers[done] = Answer(name, *ray.get(done))
            except RayError as error:
                answers[done] = Answer(name, 1, "", str(error).strip().splitlines()[0], gone=True)
                self.asked = 0.0
            if answers[done].code:
                give_up()
        return [answers[ref] for ref in refs]

    def stop(self, tasks: list[Shard | Training]) -> None:
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
