"""The preflight that every driver runs first: will this run work, and what will it cost?

    python scripts/doctor.py --model M --prompts P --recipe R --run_dir D --gpus auto     the drivers' flags

Reads   the model's small files, the prompts, the ranker (fetched, if it is on the Hub), GPUs, memory, disk, versions,
        and with --org the Hub. On a run that has begun: only what the rest of it needs.
Writes  nothing but the Hub's cache (HF_HOME). Prints what was found, the plan in numbers, and `ready: yes` or
        `ready: no`.
Exit codes: 0 ready (also: nothing left to do), 1 not ready, 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import FAILED, run_main


def main() -> int:
    from sppo.iterations import opened
    from sppo.plan import driver_parser, preflight

    _, recipe = cli.parse(driver_parser(__doc__))
    return FAILED if preflight(opened(recipe)) else 0


if __name__ == "__main__":
    run_main(main)
