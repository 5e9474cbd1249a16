"""Processes: one a GPU for a stage's shards, or one training over all of them. Used by generate.sh and pipeline.sh.

    python -m sppo.launch shards --gpus 0,1 --logs LOGS --name generate -- python scripts/generate.py ...
    python -m sppo.launch train --gpus auto --logs LOGS -- recipe.yaml --model=... --dataset=... --output_dir=...

`shards` adds --data_frac <i> --numgpu <N> to the command for each of N processes, waits for each, stops the rest when
one fails, shows the end of its log and ends with its code. --gpus: a list (as CUDA_VISIBLE_DEVICES takes it: numbers,
UUIDs, MIG ids), auto (CUDA_VISIBLE_DEVICES as it stands, else every GPU, else none), or none (one process on the CPU;
none,none for two). --launcher slurm and ray do the same over the machines of a cluster.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from sppo.command.errors import UsageError, run_main
from sppo.launch.nodes import check_machines
from sppo.launch.resources import Place, add_place_flags
from sppo.launch.watch import Launcher, run_shards, run_training
from sppo.store.locks import alone


def open_launcher(place: Place, name: str) -> Launcher:
    """The launcher that a place names. Raises UsageError, or SPPOError where its cluster is not there."""
    return importlib.import_module(f"sppo.launch.{place.launcher}").Launcher(place, name)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sppo.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=["shards", "train"])
    add_place_flags(parser)
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="directory of the logs")
    parser.add_argument("--name", default="shard", help="name of the stage in messages and logs")
    parser.add_argument("--shards_dir", type=Path, help="where the shards appear: keeps how many there are")
    parser.add_argument("--accelerate_config", default="", help="a YAML, or a name in recipes/accelerate_configs")
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    args, command = parser.parse_args(argv[:split]), argv[split + 1 :]
    place = Place.of(args)
    launcher = open_launcher(place, "train" if args.what == "train" else args.name)
    if not command:
        raise UsageError("no command after --")
    if place.launcher != "local":
        check_machines(launcher, args.logs)
    if args.what == "shards":
        here = args.shards_dir
        doing = f"is at work on the shards in {here}"
        is_written = here and (not here.exists() or os.access(here, os.W_OK))  # else nobody can be making shards there
        with alone(here / "launch.lock", doing) if is_written else nullcontext():
            run_shards(launcher, place.shards, here, args.logs, args.name, command)
    else:
        run_training(launcher, args.accelerate_config, args.logs, command)


if __name__ == "__main__":
    run_main(main)
