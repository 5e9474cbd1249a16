"""Processes: one a GPU for a stage's shards, or one training over all of them. Used by generate.sh and pipeline.sh.

    python -m sppo.launch shards --gpus 0,1 --logs LOGS --name generate -- python scripts/generate.py ...
    python -m sppo.launch train --gpus auto --logs LOGS -- recipe.yaml --model=... --dataset=... --output_dir=...

`shards` adds --data_frac <i> --numgpu <G> to the command for each of G processes, waits for each, stops the rest when
one fails, shows the end of its log and ends with its code. --gpus: a list (as CUDA_VISIBLE_DEVICES takes it: numbers,
UUIDs, MIG ids), auto (CUDA_VISIBLE_DEVICES as it stands, else every GPU, else none), or none (one process on the CPU;
none,none for two).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sppo.config import ROOT, read_yaml
from sppo.errors import UsageError, die_with_parent, run_main

_TAIL = 30  # lines of a failing log to show
_GRACE = 15  # seconds between asking a process to stop and killing it
_REPORT = 30  # seconds between two progress lines
_LEAST_FREE = 64 << 10  # bytes


def devices(gpus: str) -> list[str]:
    """The value of CUDA_VISIBLE_DEVICES for each process; an empty one is the CPU. Raises UsageError."""
    if gpus == "auto":
        standing = os.environ.get("CUDA_VISIBLE_DEVICES")
        if standing is None:
            standing = ",".join(map(str, range(_gpu_count())))
        found = [d for d in standing.split(",") if d.strip() not in ("", "-1")]
        return [d.strip() for d in found] or [""]
    names = [name.strip() for name in gpus.split(",")]
    if "" in names or ("none" in names and set(names) != {"none"}):
        raise UsageError(f"--gpus {gpus!r}: a list like 0,2,5, or auto, or none")
    real = [n for n in names if n != "none"]
    if len(set(real)) < len(real):
        raise UsageError(f"--gpus {gpus}: a GPU is named twice")
    return ["" if n == "none" else n for n in names]


def _gpu_count() -> int:
    if not shutil.which("nvidia-smi"):
        return 0
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def refuse_absent(names: list[str]) -> None:
    """Raise UsageError for GPUs that are not there: CUDA would pass over them, and the CPU would do the work."""
    count = _gpu_count()
    absent = [n for n in names if n.isdecimal() and int(n) >= count]
    if absent and not count and not shutil.which("nvidia-smi"):
        import torch

        absent = [] if torch.cuda.is_available() else absent
    if absent:
        there = f"this machine has {count}" if count else "this machine has no GPU; --gpus none runs on the CPU"
        raise UsageError(f"--gpus {','.join(names)}: GPU {', '.join(absent)} is not there; {there}")


def groups(names: list[str], world_size: int) -> list[str]:
    """GPUs in groups of `world_size` for models larger than one: ["0","1","2","3"], 2 -> ["0,1", "2,3"]."""
    if world_size < 1 or len(names) % world_size or (world_size > 1 and "" in names):
        raise UsageError(f"--world_size {world_size} does not divide {len(names)} GPUs")
    return [",".join(names[i : i + world_size]) for i in range(0, len(names), world_size)]


def flags(**values: object) -> list[str]:
    """["--key=value", ...] for a command of this project."""
    return [f"--{key}={value}" for key, value in values.items()]


def start(command: list[str], device: str | None, log: Path | None, shares: int = 1) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, on `device` (None: as the environment says), into a log."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    if device is not None:
        env["CUDA_VISIBLE_DEVICES"] = device
    if shares > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // shares)))
    output = open(log, "wb") if log else None  # noqa: SIM115 - closed below
    try:
        return subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    finally:
        if output:
            output.close()


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Stop the processes and everything they started: SIGTERM to their groups, SIGKILL after a while."""
    for signum, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, _GRACE)):
        for process in processes:
            try:
                os.killpg(process.pid, signum)
            except ProcessLookupError:
                continue
        # The second round also reaches what a leader that is gone had started.
        deadline = time.monotonic() + patience
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue


def new_log(directory: Path, name: str) -> Path:
    """A log file that does not exist yet: name.1.log, then name.2.log for the next try."""
    directory.mkdir(parents=True, exist_ok=True)
    number = 1
    while (directory / f"{name}.{number}.log").exists():
        number += 1
    return directory / f"{name}.{number}.log"


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of a log, progress bars reduced to their last state."""
    with open(log, "rb") as handle:
        handle.seek(0, os.SEEK_END)
        handle.seek(max(0, handle.tell() - 64 * 1024))
        text = handle.read().decode("utf-8", "replace")
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if line.strip()][-count:]


_BAR = re.compile(r"(\d+)/(\d+) \[[\d:]+<([\d:]+)(?:.* ([\d.]+) tok/s)?")


def overall(logs: list[Path]) -> str:
    """All shards' progress in one line, from the progress bars at the ends of their logs."""
    done, total, rate, left = 0, 0, 0.0, (0, "0:00")
    for log in logs:
        bars = [bar for line in last_lines(log, 5) if (bar := _BAR.search(line))]
        if bars:
            done, total = done + int(bars[-1][1]), total + int(bars[-1][2])
            rate += float(bars[-1][4] or 0)
            seconds = sum(int(n) * 60**i for i, n in enumerate(reversed(bars[-1][3].split(":"))))
            left = max(left, (seconds, bars[-1][3]))
    if not total:
        return (last_lines(logs[0], 1) or ["starting"])[0].strip()
    speed = f", {rate:.0f} tok/s" if rate else ""
    return f"{done} of {total} prompts, {len(logs)} shards{speed}, {left[1]} left"


def watch(processes: list[subprocess.Popen[bytes]], logs: list[Path], name: str) -> None:
    """Wait for all; on the first failure stop the others and raise SystemExit with its code."""
    reported = time.monotonic()
    try:
        while True:
            codes = [process.poll() for process in processes]
            failed = next((i for i, code in enumerate(codes) if code), None)
            if failed is not None:
                stop(processes)
                _show_failure(name, failed, codes[failed] or 1, logs)
            if all(code == 0 for code in codes):
                break
            if time.monotonic() - reported > _REPORT:
                reported = time.monotonic()
                print(f"{name}: {overall(logs)}", flush=True)
            time.sleep(0.1)
    except BaseException:
        stop(processes)
        raise
    for log in logs:
        print((last_lines(log, 1) or [f"{name}: done"])[0].strip(), flush=True)


def _show_failure(name: str, index: int, code: int, logs: list[Path]) -> None:
    if code < 0:
        reason = f"was killed by {signal.Signals(-code).name}" + (
            " (out of memory?)" if code == -signal.SIGKILL else ""
        )
        code = 128 - code
    else:
        reason = f"ended with code {code}"
    print(f"\n{name} {index} {reason}; the end of {logs[index]}:", file=sys.stderr)
    print("\n".join(f"  | {line}" for line in last_lines(logs[index], _TAIL)), file=sys.stderr)
    # several ranks and their launcher may bury what one of them said
    said = dict.fromkeys(line for line in last_lines(logs[index], 10000) if line.startswith("error: "))
    print("\n".join(said), file=sys.stderr, flush=True)
    if shutil.disk_usage(logs[index].parent).free < _LEAST_FREE:  # the log itself may lack the words
        print(
            f"error: {logs[index].parent}: the disk is full; make room and run the same command to go on",
            file=sys.stderr,
        )
    raise SystemExit(code)


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
            processes.append(start(argv, device, paths[-1], shares=len(names)))
    except BaseException:
        stop(processes)
        raise
    watch(processes, paths, name)


def training_config(names: list[str], accelerate_config: str) -> tuple[Path, dict[str, Any], int]:
    """(accelerate config, what it says, how many processes train). Raises UsageError for one that does not fit."""
    cpu = "" in names
    chosen = accelerate_config or ("cpu" if cpu else "one_gpu" if len(names) == 1 else "zero3")
    path = Path(chosen) if chosen.endswith(".yaml") else ROOT / "recipes" / "accelerate_configs" / f"{chosen}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (ROOT / "recipes" / "accelerate_configs").glob("*.yaml")))
        raise UsageError(f"no accelerate config {path}; the project brings {known}")
    try:
        config = read_yaml(path.read_text(encoding="utf-8"))
        kind, stated = config["distributed_type"], int(config.get("num_processes", 1))
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is no accelerate config ({type(error).__name__}: {error})") from None
    if cpu and not config.get("use_cpu"):
        raise UsageError(f"{path} is for GPUs, and there is none; take cpu, multi_cpu, cpu_zero2 or cpu_zero3")
    # without GPUs to count, the config says how many processes there are
    count = stated if cpu and len(names) == 1 else len(names)
    return path, config, 1 if kind == "NO" else count


def run_training(names: list[str], accelerate_config: str, logs: Path, arguments: list[str]) -> None:
    """`accelerate launch` sppo/run_sppo.py over the devices, with a port that is free."""
    from sppo import run_sppo

    path, config, processes = training_config(names, accelerate_config)
    if run_sppo.prepare(arguments, processes).is_done():  # also: wrong use ends here, with its code
        return
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
    process = start(command, ",".join(filter(None, names)), log, shares=processes if "" in names else 1)
    watch([process], [log], "train")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sppo.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=["shards", "train", "count"])
    parser.add_argument("--gpus", default="auto", help="a list, auto, or none")
    parser.add_argument("--world_size", type=int, default=1, help="GPUs for one process")
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="directory of the logs")
    parser.add_argument("--name", default="shard", help="name of the stage in messages and logs")
    parser.add_argument("--accelerate_config", default="", help="a YAML, or a name in recipes/accelerate_configs")
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    gpus = devices(args.gpus)
    names = groups(gpus, args.world_size)
    if args.what == "count":
        print(len(names))
        return
    refuse_absent(gpus)
    if args.what == "shards":
        run_shards(names, args.logs, args.name, argv[split + 1 :])
    else:
        run_training(gpus, args.accelerate_config, args.logs, argv[split + 1 :])


if __name__ == "__main__":
    run_main(main)
