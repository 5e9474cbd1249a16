"""A Python that starts at once, with torch, transformers and the trainer imported: for benchmarks of many small runs.

A tiny run spends most of its time on imports. Here one process imports them once; each command is a fork of it, with
the caller's words, environment, directory, cores and files, so that the drivers and scripts run as they are:

    with warm_python() as python:
        subprocess.run(["bash", "run_sppo_mistral.sh", ...], env={**os.environ, "PYTHON": python})
"""

from __future__ import annotations

import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sppo.command.importing import import_networks
from sppo.command.search_path import ROOT

# a core for each command: two commands of two threads each would wait for each other. Read when torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
# what stands in for python: it hands everything over, and ends as the fork ends
CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
channels = [number for number in (0, 1, 2, 9) if os.path.exists(f"/proc/self/fd/{{number}}")]  # 9: a run's lock
env = {{name: value for name, value in os.environ.items() if name != "SPPO_PARENT"}}  # the fork has another parent
told = {{"argv": sys.argv[1:], "env": env, "cwd": os.getcwd(), "channels": channels}}
told["cores"] = sorted(os.sched_getaffinity(0))
told = json.dumps(told).encode()
socket.send_fds(server, [len(told).to_bytes(8, "big")], channels)
server.sendall(told)
code = server.recv(4)
sys.exit(int.from_bytes(code, "big", signed=True) if code else 1)
"""
MODULES = (
    "transformers.trainer transformers.models.mistral.modeling_mistral transformers.models.deberta_v2 pyarrow.parquet "
    "accelerate.commands.launch scipy.optimize sppo.plan examples.demo sppo.generation.shards sppo.ranking.shards "
    "sppo.generation.engines.transformers sppo.rankers._pairrm_network sppo.pairing.training_set sppo.training.train "
    "sppo.training.trainer sppo.training.average sppo.evaluation.report sppo.evaluation.page.page"
).split()


@contextmanager
def warm_python() -> Iterator[str]:
    """The path of a command that takes python's place."""
    scratch = tempfile.mkdtemp()  # no TemporaryDirectory: each fork would delete it at its end
    client, address = Path(scratch, "python"), str(Path(scratch, "socket"))
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    server = os.fork()
    if not server:
        _serve(listener, str(client))
    try:
        yield str(client)
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        shutil.rmtree(scratch)


def call(python: str, words: list[str], log: Path, **more: str) -> None:
    """Run a command of the project with that Python, into the end of a log. Raises SystemExit where it fails.

    On one thread and without the Hub, unless `more`, which goes into the environment, says otherwise.
    """
    environment = {**os.environ, "PYTHON": python, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
    with open(log, "ab") as out:
        done = subprocess.run(words, cwd=ROOT, env=environment, stdout=out, stderr=out, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed; see {log}")


def _serve(listener: socket.socket, client: str) -> None:
    """Fork for each caller, until killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers leave nothing behind
    os.environ.pop("PYTHON", None)
    import_networks(*MODULES)
    while True:
        caller, _ = listener.accept()
        if not os.fork():
            listener.close()
            _keep(caller, client)
        caller.close()


def _keep(caller: socket.socket, client: str) -> None:
    """Run one command in a fork, and tell the caller its exit code; killed, where the caller has gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, _, _ = socket.recv_fds(caller, 8, 4)
    told = json.loads(caller.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    child = os.fork()
    if not child:
        caller.close()
        _become(told, files, client)
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, caller], [], [])
    if ended not in ready:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with suppress(OSError):
        caller.sendall((os.waitstatus_to_exitcode(status) % 256).to_bytes(4, "big"))
    os._exit(0)


def _become(told: dict, files: list[int], client: str) -> None:
    """Do what `python argv...` does."""
    os.setsid()
    for number, file in zip(told["channels"], files, strict=True):
        os.dup2(file, number)
    own = [open(number, mode, buffering=1, closefd=False) for number, mode in enumerate("rww")]  # noqa: SIM115 - kept
    sys.stdin, sys.stdout, sys.stderr = own
    os.environ.clear()
    os.environ.update(told["env"])
    os.chdir(told["cwd"])
    os.sched_setaffinity(0, told["cores"])
    sys.executable = client
    argv = told["argv"][1:] if told["argv"][0] in ("-u", "-S") else told["argv"]
    paths = told["env"].get("PYTHONPATH", "").split(os.pathsep)
    code: object = 0
    try:
        if argv[0] == "-m":
            sys.argv, sys.path[:0] = argv[1:], [os.getcwd(), *paths]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        elif argv[0] == "-c":
            sys.argv, sys.path[:0] = ["-c", *argv[2:]], ["", *paths]
            exec(argv[1], {"__name__": "__main__"})  # noqa: S102 - as python does
        else:
            sys.argv, sys.path[:0] = argv, [str(Path(argv[0]).resolve().parent), *paths]
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    except BaseException:  # noqa: BLE001 - as python does
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


def share_first_answers(run: Path, other: Path, answers: str = "iter0") -> None:
    """Copy what does not depend on the method from one run to another that has not begun: the first model's held-out
    answers (a directory of the run), the first responses and their rankings."""
    if other == run or other.exists():
        return
    data = other.with_name(f"{other.name}.new") / "iter1" / "data"
    shutil.rmtree(data.parents[1], ignore_errors=True)
    data.mkdir(parents=True)
    shutil.copytree(run / answers, data.parents[1] / answers)
    for path in (run / "iter1" / "data").iterdir():
        if path.name.split(".")[0] in ("responses", "ranking", "ranker"):
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, data / path.name)
    data.parents[1].rename(other)
