"""Look at a whole run before it starts: flags, preflight, each iteration's recipe. scripts/run.sh calls this first.

    python scripts/plan.py --model M --prompts prompts.jsonl --run_dir runs/x --iterations 3 --gpus auto --dry_run

Reads   the model, the prompts, the ranker, a recipe with all settings, and what is in the run's directory already.
Writes  <run_dir>/iter<i>/recipe.yaml of each iteration with work left, and logs/commands.log; nothing where the
        preflight says no, and with --dry_run. With --launcher slurm, outside an allocation, it submits the run as a
        job.
Exit codes: 0 the run may begin, 1 not ready, 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import run_main


def main() -> None:
    from sppo.plan import driver_parser, plan

    parser = driver_parser(__doc__)
    parser.add_argument("--plan", type=Path, help="for run.sh: a file for the run's directory and the recipes to run")
    args, recipe = cli.parse(parser)
    plan(recipe, args, sys.argv[1:])


if __name__ == "__main__":
    run_main(main)
