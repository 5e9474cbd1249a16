"""The launcher of one machine: one process a GPU for a stage's shards, or one training over all GPUs."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from sppo.common.cores import own
from sppo.common.errors import UsageError
from sppo.config import ROOT, flags
from sppo.launch.processes import new_log, start, stop, watch
from sppo.training.launching import training_config
from sppo.training.settings import check_machine, prepare


def run_shards(names: list[str], logs: Path, name: str, command: list[str]) -> None:
    """Run `command --data_frac i --numgpu G` once a device and watch."""
    if not command:
        raise UsageError("no command after --")
    processes: list[subprocess.Popen[bytes]] = []
    paths: list[Path] = []
    try:
        for i, device in enumerate(names):
            paths.append(new_log(logs, f"{name}-{i}"))
            argv = [*command, "--data_frac", str(i), "--numgpu", str(len(names))]
            mine = own(i, len(names)) if len(names) > 1 else []
            # on GPUs the cores are shared: which of them are near a GPU, the system knows better
            processes.append(start(argv, device, paths[-1], len(mine), mine if device == "" else None))
    except BaseException:
        stop(processes)
        raise
    watch(processes, paths, name)


def run_training(names: list[str], accelerate_config: str, logs: Path, arguments: list[str]) -> None:
    """`accelerate launch` sppo/run_sppo.py over the devices, with a port that is free.

    What is done is not launched, and wrong flags are refused here, before a process for each GPU loads anything.
    """
    path, config, processes = training_config(names, accelerate_config)
    training = prepare(arguments, processes)
    if training.is_done():
        return
    check_machine(training.recipe, gpu="" not in names)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if config["distributed_type"] == "MULTI_CPU":  # accelerate launch would start one process, without a word
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += flags(nproc_per_node=processes, master_addr="127.0.0.1", master_port=port)
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += flags(config_file=path, num_processes=processes, main_process_port=port)
    command += [str(ROOT / "sppo" / "run_sppo.py"), *arguments]
    log = new_log(logs, "train")
    threads = len(own(0, processes)) if "" in names and processes > 1 else 0
    process = start(command, ",".join(filter(None, names)), log, threads)
    watch([process], [log], "train")
