"""One machine's part of a training: `accelerate launch` for its devices, which meet those of the other machines.

One process on a CPU starts at once: there is nothing to launch.

    python -m sppo.launch.machine --machines 4 --rank 2 --meeting FILE --devices 0,1 --accelerate_config C.yaml -- ...

Machine 0 finds a free port and writes its address into the meeting file, on the shared disk; the others wait for that.
Reads   the accelerate config, the meeting file.
Writes  the meeting file (machine 0); what sppo/run_sppo.py writes.
Exit codes: those of what it starts; 1 where machine 0 does not come.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from sppo.cli import flags
from sppo.command.errors import SPPOError, run_main
from sppo.command.search_path import ROOT
from sppo.launch.cores import own
from sppo.launch.devices import CPU
from sppo.launch.processes import environment
from sppo.store.files import read_json, write_json
from sppo.training.launching import training_config

_PATIENCE = 300  # seconds in which machine 0 must have come
# what a config for one process on a CPU may say and yet leave accelerate launch nothing to do
_PLAIN = {"compute_environment", "distributed_type", "num_machines", "num_processes", "mixed_precision", "use_cpu"}


def listening(peer: str) -> socket.socket:
    """A free port of this machine, at the address under which it reaches `peer`, and so is reached from there."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # no packet is sent
        address = probe.getsockname()[0]
    return socket.create_server((address, 0), family=family)


def meet(meeting: Path, rank: int, peer: str) -> tuple[str, int]:
    """(address, port) of machine 0. Raises SPPOError where it does not come."""
    if rank == 0:
        with listening(peer) as server:
            address, port = server.getsockname()[:2]
        write_json(meeting, {"address": address, "port": port})
    deadline = time.monotonic() + _PATIENCE
    while not meeting.exists():
        if time.monotonic() > deadline:
            raise SPPOError(f"machine 0 has not come within {_PATIENCE} s ({meeting} is not there)")
        time.sleep(0.2)
    place = read_json(meeting)
    return place["address"], place["port"]


def command(args: argparse.Namespace, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """(the command that trains on this machine, its environment)."""
    devices = args.devices.split(",")
    path, config, processes = training_config(devices, args.accelerate_config, args.machines)
    here = processes // args.machines
    train = [str(ROOT / "sppo" / "run_sppo.py"), *arguments]
    if config["distributed_type"] == "NO" and config.get("use_cpu") and config.keys() <= _PLAIN:
        return [sys.executable, *train], _alone(config)
    address, port = meet(args.meeting, args.rank, args.peer)
    if config["distributed_type"] == "MULTI_CPU":  # accelerate launch would start one process, without a word
        words = [sys.executable, "-m", "torch.distributed.run"]
        words += flags(nnodes=args.machines, node_rank=args.rank, nproc_per_node=here)
        words += flags(master_addr=address, master_port=port)
    else:
        words = [sys.executable, "-m", "accelerate.commands.launch"]
        words += flags(config_file=path, num_processes=processes, main_process_port=port)
        if args.machines > 1:
            words += flags(num_machines=args.machines, machine_rank=args.rank, main_process_ip=address)
    # behind "--", else the launcher takes a flag of the script for the beginning of one of its own
    return [*words, "--", *train], environment(None, len(own(0, here)) if CPU in devices and here > 1 else 0)


def _alone(config: dict[str, Any]) -> dict[str, str]:
    """The environment that accelerate launch gives to one process on a CPU, without its seconds of imports."""
    import psutil

    accelerate = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": str(config.get("mixed_precision", "no"))}
    return environment(None, psutil.cpu_count(logical=False) or 1) | accelerate


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sppo.launch.machine", description=__doc__, allow_abbrev=False)
    parser.add_argument("--machines", type=int, default=1)
    # in a step of Slurm: this node's number, and the address of the machine on which srun runs
    parser.add_argument("--rank", type=int, default=int(os.environ.get("SLURM_NODEID", 0)))
    parser.add_argument("--peer", default=os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"),
                        help="an address that all machines reach")  # fmt: skip
    parser.add_argument("--meeting", type=Path, required=True, help="a file on the shared disk")
    parser.add_argument("--devices", required=True, help="this machine's; empty: the CPU")
    parser.add_argument("--accelerate_config", required=True)
    split = sys.argv.index("--")
    args = parser.parse_args(sys.argv[1:split])
    words, env = command(args, sys.argv[split + 1 :])
    os.execvpe(words[0], words, env)  # noqa: S606 - signals reach it itself


if __name__ == "__main__":
    run_main(main)
