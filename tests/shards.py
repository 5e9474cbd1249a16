"""Any command as shards: what scripts/launch.py does with generate.py and rank.py. For tests and benchmarks.

python tests/shards.py --gpus=none,none --logs=LOGS --stage=x [--shards_dir=DIR] -- command ...
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import run_main
from sppo.launch.nodes import check_machines
from sppo.launch.script import open_launcher
from sppo.launch.watch import run_shards
from sppo.recipe import KEYS
from sppo.store.locks import alone


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS["launch"])
    parser.add_argument("--logs", type=Path, default=Path("logs"))
    parser.add_argument("--stage", default="shard")
    parser.add_argument("--shards_dir", type=Path)
    split = sys.argv.index("--")
    args, recipe = cli.parse(parser, sys.argv[1:split])
    launcher = open_launcher(recipe)
    if recipe.launcher != "local":
        check_machines(launcher, args.logs)
    here = args.shards_dir
    with alone(here / "launch.lock", "is at work") if here else nullcontext():
        run_shards(launcher, recipe.shards, here, args.logs, args.stage, sys.argv[split + 1 :])


if __name__ == "__main__":
    run_main(main)
