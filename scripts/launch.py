"""Run a script as processes: one a GPU for a stage's shards, or one training over all GPUs.

    python scripts/launch.py scripts/generate.py --recipe runs/x/iter1/recipe.yaml
    python scripts/launch.py scripts/rank.py --gpus 0,1 --output_dir runs/x/iter1/data
    python scripts/launch.py sppo/run_sppo.py --recipe runs/x/iter1/recipe.yaml

generate.py and rank.py get --data_frac and --numgpu on top of the flags. Each process is waited for. Where one fails,
the rest are stopped, the end of its log is shown, and this ends with its code. --gpus: a list (as CUDA_VISIBLE_DEVICES
takes it: numbers, UUIDs, MIG ids), auto (CUDA_VISIBLE_DEVICES as it stands, else every GPU, else none), or none (one
process on the CPU; none,none for two). --launcher slurm and ray do the same over the machines of a cluster.
Reads   what the script reads.
Writes  what the script writes, and a log for each process.
Exit codes: 0 done (also: nothing left to do), 2 wrong use, 130 interrupted, else that of the process that failed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo.command.errors import run_main


def main() -> None:
    from sppo.launch.script import launch

    launch(sys.argv[1:], __doc__)


if __name__ == "__main__":
    run_main(main)
