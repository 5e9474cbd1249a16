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
import sys
from pathlib import Path

from sppo.common.errors import run_main
from sppo.launch.devices import devices, groups, refuse_absent
from sppo.launch.local import run_shards, run_training


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sppo.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=["shards", "train"])
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
    refuse_absent(gpus)
    if args.what == "shards":
        run_shards(names, args.logs, args.name, argv[split + 1 :])
    else:
        run_training(gpus, args.accelerate_config, args.logs, argv[split + 1 :])


if __name__ == "__main__":
    run_main(main)
