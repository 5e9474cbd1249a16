"""Fetch the ranker into the cache once, before one process a GPU wants it, and pin its revision.

    python scripts/preload.py --ranker llm-blender/PairRM --output_dir runs/x/iter1/data

Reads   the ranker from the Hub (a local directory, function or judge's server is only checked).
Writes  the Hub's cache (HF_HOME); <output_dir>/ranker.json: the commit that rank.py then reads, should the branch move.
Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import run_main
from sppo.recipe import KEYS


def main() -> None:
    args, recipe = cli.parse(cli.chain_parser(__doc__, KEYS["preload"]))
    from sppo.rankers.pinning import preload

    preload(recipe, Path(recipe.data_dir) if recipe.data_dir else None, args.overwrite)


if __name__ == "__main__":
    run_main(main)
