"""Lock a run's directory for the bash script that calls this, which has its lock file open as channel 9.

    exec 9>> runs/x/.lock; python scripts/hold.py --run_dir runs/x

The lock lasts until that script, and all that it has started itself, have ended, however they end. On a disk without
file locks it writes runs/x/.lock.owner, which names the script.
Exit codes: 0 locked, 1 another run has the lock, 2 wrong use, 130 interrupted.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import run_main
from sppo.store.files import hold_for_caller


def main() -> None:
    _, recipe = cli.parse(cli.make_parser(__doc__, ["run_dir"]))
    hold_for_caller(cli.require_dir("--run_dir", recipe.run_dir), channel=9, pid=os.getppid())


if __name__ == "__main__":
    run_main(main)
