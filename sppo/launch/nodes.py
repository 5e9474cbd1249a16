"""One machine of a cluster, looked at: packages, code, the shared directory, GPUs, ports to the other machines.

    python -m sppo.launch.nodes --rank 2 --count 4 --meeting DIR [--measure]      on each machine, by a launcher

Reads   the packages' versions, the project's code, nvidia-smi, what the others write into the meeting directory.
Writes  a file with its address into the meeting directory, which is made for this on the run's disk; prints what it
        found as one line of JSON.
Exit codes: 0 looked (what it found may be bad), 1 failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo.command.errors import SPPOError, run_main
from sppo.command.memory import main_memory
from sppo.command.search_path import ROOT
from sppo.launch.devices import list_gpus
from sppo.launch.machine import listening
from sppo.store.files import read_json, write_json
from sppo.store.manifest import versions

_TRIES, _PAUSE = 5, 5  # of looking at machines some of which leave; seconds between two
_PATIENCE = 60  # seconds in which all machines must have come
_ABSENT = "absent"  # in the meeting directory: some machine will not come


@dataclass
class Answer:
    """What came of the look at one machine."""

    node: str
    done: subprocess.CompletedProcess[str]
    gone: bool = False  # it left the cluster meanwhile


def look(launcher: Any, directory: Path, measure: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """(what each machine of a launcher found, one line for each thing that is wrong).

    `directory`: on the shared disk. launcher.survey(command, give_up) runs a command with --count and --rank on each
    machine, gives its Answers, and calls give_up when one cannot. Where a machine leaves meanwhile, all are looked at
    again.
    """
    for _ in range(_TRIES):
        with tempfile.TemporaryDirectory(prefix=".nodes-", dir=directory, ignore_cleanup_errors=True) as meeting:
            Path(meeting).chmod(0o777)
            command = [sys.executable, "-m", "sppo.launch.nodes", "--meeting", meeting, *["--measure"] * measure]
            give_up = lambda here=meeting: (Path(here) / _ABSENT).touch()  # noqa: E731 - the others need not wait
            answers = launcher.survey(command, give_up)
        if not any(answer.gone for answer in answers):
            break
        time.sleep(_PAUSE)
    found, wrong = [], []
    for answer in answers:
        code, lines = answer.done.returncode, answer.done.stdout.strip().splitlines()
        if code or not lines:
            reason = (answer.done.stderr.strip().splitlines() or [f"code {code}"])[-1]
            if "sppo.launch" in reason or "No module named 'sppo'" in reason:
                reason = f"the project's directory {ROOT} is not there"
            wrong.append(f"{answer.node}: cannot be used: {reason}")
        else:
            found.append({"node": answer.node, **json.loads(lines[-1])})
    all_came = not wrong
    for one in found:
        wrong += [f"{one['node']}: {trouble}" for trouble in one["trouble"] if all_came or not one["waited"]]
    return found, wrong + _differences(found)


def _differences(found: list[dict[str, Any]]) -> list[str]:
    """What is not the same on all machines as on the first."""
    wrong = []
    for one in found[1:]:
        mine, first = one["versions"], found[0]["versions"]
        for name in sorted(mine.keys() | first.keys()):
            if mine.get(name) != first.get(name):
                there, here = mine.get(name) or "not installed", first.get(name) or "not installed"
                wrong.append(f"{one['node']}: {name} is {there}, and {here} on {found[0]['node']}; install one version")
        if one["code"] != found[0]["code"]:
            wrong.append(f"{one['node']}: the project's code differs from {found[0]['node']}'s; update it")
    return wrong


def check_machines(launcher: Any, directory: Path) -> None:
    """Raise SPPOError, with one line for each thing, unless all machines of a launcher can do the work."""
    directory.mkdir(parents=True, exist_ok=True)
    found, wrong = look(launcher, directory)
    if wrong:
        raise SPPOError("the machines are not ready:\n  " + "\n  ".join(wrong))
    print(f"launch: {len(found)} machines are ready", flush=True)


def _code() -> str:
    """One digest of the project's own files."""
    sha = hashlib.sha256()
    for path in sorted([*(ROOT / "sppo").rglob("*.py"), *(ROOT / "scripts").glob("*")]):
        if path.is_file():
            sha.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return sha.hexdigest()


def _gpus() -> list[list[Any]]:
    """[name, all bytes, free bytes] of each GPU; none where there is no nvidia-smi."""
    try:
        return [[gpu.name, gpu.memory, gpu.free] for gpu in list_gpus()]
    except SPPOError:
        return []


def meet_all(meeting: Path, rank: int, count: int, peer: str) -> tuple[list[str], bool]:
    """(what is wrong with the ways to the other machines, whether one did not come)."""
    with listening(peer) as server:
        server.listen(count)  # nobody accepts: the calls of all the others wait here
        address, port = server.getsockname()[:2]
        try:
            write_json(meeting / f"{rank}.json", {"address": address, "port": port, "host": platform.node()})
        except OSError as error:
            return [f"{meeting.parent} cannot be written to from there ({error.strerror or error})"], False
        absent = _await([meeting / f"{i}.json" for i in range(count)], meeting)
        if absent:
            return [f"{meeting.parent} does not show there what machine {absent[0].stem} writes into it"], True
        trouble = []
        for other in range(count):
            at = read_json(meeting / f"{other}.json")
            try:
                socket.create_connection((at["address"], at["port"]), 10).close()
            except OSError as error:
                trouble.append(f"cannot reach {at['host']} ({at['address']}) on port {at['port']}: {error}")
        (meeting / f"{rank}.done").touch()
        _await([meeting / f"{i}.done" for i in range(count)], meeting)  # the others may still want to connect
    return trouble, False


def _await(paths: list[Path], meeting: Path) -> list[Path]:
    """Wait for files; those that did not come."""
    deadline = time.monotonic() + _PATIENCE
    while absent := [path for path in paths if not path.exists()]:
        if time.monotonic() > deadline or (meeting / _ABSENT).exists():
            break
        time.sleep(0.05)
    return absent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sppo.launch.nodes", allow_abbrev=False)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--peer", default=os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
    parser.add_argument("--meeting", type=Path, required=True)
    parser.add_argument("--measure", action="store_true", help="the matrix rate too, which takes seconds")
    args = parser.parse_args()
    trouble, waited = [f"{args.meeting.parent} is not there, or not the same directory"], False
    if args.meeting.is_dir():
        trouble, waited = meet_all(args.meeting, args.rank, args.count, args.peer)
    found: dict[str, Any] = {
        "host": platform.node(),
        "versions": {"python": platform.python_version(), **versions()},
        "code": _code(),
        "gpus": _gpus(),
        "memory": main_memory(),
        "trouble": trouble,
        "waited": waited,
    }
    if args.measure:
        from sppo.launch.devices import matrix_rate

        found["rate"] = matrix_rate()
    print(json.dumps(found))


if __name__ == "__main__":
    run_main(main)
