"""Real clusters on this machine: Slurm with several slurmd, Ray with several raylets. For tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny import wait_until

SLURM = ("slurmctld", "slurmd", "sbatch", "srun", "munged")


def why_no_slurm() -> str:
    """Why Slurm cannot be started here; empty where it can."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    absent = [name for name in SLURM if not shutil.which(name)]
    if absent:
        return f"no {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmctld and slurmd run as root"


def _ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


CONF = """ClusterName=t
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
SlurmctldPort={port}
StateSaveLocation={root}/ctl
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/ctl.pid
SlurmdPidFile={root}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={root}/prolog
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
ReturnToService=2
MpiDefault=none
SlurmdTimeout=4
KillWait=5
InactiveLimit=0
MinJobAge=300
GresTypes=gpu
SlurmdParameters=config_overrides
PartitionName=p Nodes=ALL Default=YES MaxTime=INFINITE State=UP PreemptMode=REQUEUE
"""


class Slurm:
    """Slurm on this machine. `env`: what its commands need."""

    def __init__(self, root: Path, nodes: int, gpus: int) -> None:
        self.root, self.names = root, [f"n{i}" for i in range(1, nodes + 1)]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.env = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        (root / "ctl").mkdir(parents=True)
        port, *ports = _ports(1 + nodes)
        host = socket.gethostname().partition(".")[0]
        lines = [CONF.format(host=host, root=root, port=port)]
        for name, own in zip(self.names, ports, strict=True):
            (root / name).mkdir()
            gres = f" Gres=gpu:{gpus}" if gpus else ""
            where = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={own}"
            lines.append(f"NodeName={name} {where} CPUs=4 RealMemory=4000{gres} State=UNKNOWN\n")
        (root / "slurm.conf").write_text("".join(lines))
        if gpus:
            devices = "".join(f"NodeName={n} Name=gpu File=/dev/tty[1-{gpus}]\n" for n in self.names)
            (root / "gres.conf").write_text(devices)
        # what a step's environment is on a node can be told in <root>/<node>.env
        (root / "prolog").write_text(f'#!/bin/sh\ncat "{root}/$SLURMD_NODENAME.env" 2> /dev/null\n:\n')
        (root / "prolog").chmod(0o755)
        (root / "key").write_bytes(os.urandom(1024))
        (root / "key").chmod(0o400)

    def daemon(self, name: str, *command: str) -> None:
        with open(self.root / f"{name}.log", "ab") as log:
            self.daemons[name] = subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True)

    def begin(self) -> None:
        files = {"key-file": "key", "socket": "munge.socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        own = [f"--{flag}={self.root}/{name}" for flag, name in files.items()]
        self.daemon("munged", "munged", "--foreground", "--force", *own)
        wait_until(lambda: (self.root / "munge.socket").exists(), 300)
        self.daemon("slurmctld", "slurmctld", "-D")
        for name in self.names:
            self.revive(name)
        wait_until(lambda: self.ask("sinfo", "-h", "-o", "%T %D").strip() == f"idle {len(self.names)}", 300)

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=False).stdout

    def revive(self, name: str) -> None:
        self.daemon(name, "slurmd", "-D", "-N", name)

    def kill(self, name: str) -> None:
        """A node dies: its slurmd, then what watches its steps (else that would report their end), then the steps."""
        self.daemons[name].kill()
        self.daemons[name].wait()
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        # another cluster's nodes may have the same names
        own = (f"SLURM_CONF={self.root}/".encode(), f"SLURMD_NODENAME={name}\0".encode())
        steps = [pid for pid in pids if all(word in _read(pid, "environ") for word in own)]
        states = [stat for pid in steps if (stat := _read(pid, "stat"))]
        watchers = {int(stat.rpartition(b")")[2].split()[1]) for stat in states}
        watchers = {pid for pid in watchers if _read(pid, "cmdline").startswith(b"slurmstepd")}
        for pid in (*watchers, *steps):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @contextmanager
    def allocation(self, nodes: int) -> Iterator[dict[str, str]]:
        """The environment of an allocation, as salloc's shell has it."""
        told = self.root / "allocation"
        inside = f"env > {told}.new; mv {told}.new {told}; sleep 36000"
        words = ["salloc", "--quiet", f"--nodes={nodes}", "--ntasks-per-node=1", "bash", "-c", inside]
        held = subprocess.Popen(words, env=self.env, start_new_session=True)
        try:
            wait_until(told.exists, 300)
            lines = [line for line in told.read_text().splitlines() if line.startswith("SLURM_")]
            yield {**self.env, **dict(line.split("=", 1) for line in lines)}
        finally:
            os.killpg(held.pid, signal.SIGKILL)
            held.wait()
            told.unlink()

    def end(self) -> None:
        self.ask("scancel", "--full", "--user=root")
        for daemon in reversed(self.daemons.values()):
            daemon.kill()
            daemon.wait()
        for pid in [int(path.name) for path in Path("/proc").glob("[0-9]*")]:
            if f"SLURM_CONF={self.root}/".encode() in _read(pid, "environ") and pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _read(pid: int, what: str) -> bytes:
    """A file of /proc; empty where the process has ended."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""


@contextmanager
def slurm(root: Path, nodes: int = 3, gpus: int = 0) -> Iterator[Slurm]:
    made = Slurm(root, nodes, gpus)
    try:
        made.begin()
        yield made
    finally:
        made.end()


@contextmanager
def ray(nodes: int = 3, **resources: Any) -> Iterator[Any]:
    """A Ray cluster: a head that does no work, and machines with one CPU each. Its `address` is for --ray_address."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_DISABLE_IMPORT_WARNING"] = "1"
    # A machine that died refuses to answer at once, and five such answers take some seconds: Ray's own half a minute
    # would be most of the time. One that only answers late, on a busy computer, lives.
    soon = {"health_check_period_ms": 1000, "health_check_timeout_ms": 60_000, "health_check_failure_threshold": 5}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, **resources)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


if __name__ == "__main__":  # a cluster to try things on by hand: python tests/cluster.py DIR
    with slurm(Path(sys.argv[1])) as here:
        print(f"export SLURM_CONF={here.root}/slurm.conf", flush=True)
        signal.pause()
