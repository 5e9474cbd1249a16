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
from sppo.command.errors import SPPOError, run_main
from sppo.store.files import hold_for_caller


def main() -> None:
    parser = cli.make_parser(__doc__, ["run_dir"])
    parser.add_argument("--plan", type=Path, help="what plan.py has written: its recipes must still be there")
    args, recipe = cli.parse(parser)
    run_dir = cli.require_dir("--run_dir", recipe.run_dir)
    hold_for_caller(run_dir, channel=9, pid=os.getppid())
    if args.plan:
        from sppo.iterations import digest_of_recipes

        _, planned, *recipes = args.plan.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        if digest_of_recipes([Path(path) for path in recipes]) != planned:
            raise SPPOError(f"another start has planned {run_dir} otherwise meanwhile; run the same command again")


if __name__ == "__main__":
    run_main(main)
