"""Run SPPO: iterations of generate, rank, train, each feeding the next. The run_sppo_*.sh call this with their model.

    python scripts/run.py --model M --prompts prompts.jsonl --run_dir runs/x --iterations 3 --gpus auto

Before anything else scripts/doctor.py looks at all of it; --dry_run stops there and shows the commands.

Reads   the model, the prompts, the ranker, and a recipe with all settings.
Writes  the run's directory: iter1/data, iter1/model, iter1/logs, iter2/..., and with --eval_prompts summary.json.
        Started again, it goes on where it stopped. With --org the data, and with --push_model the models, are on the
        Hub too.
Exit codes: 0 done (also: nothing left to do), 1 not ready, or something could not be pushed (all else is done), 2 wrong
use, 130 interrupted, else that of the stage that failed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import run_main


def main() -> None:
    from sppo import loop

    args, recipe = cli.parse(loop.parser(__doc__))
    loop.run(recipe, args, sys.argv[1:])


if __name__ == "__main__":
    run_main(main)
