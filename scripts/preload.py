"""Fetch the ranker into the cache once, before one process a GPU wants it.

    python scripts/preload.py --ranker llm-blender/PairRM

Reads   the ranker from the Hub (a local directory is only checked).
Writes  the Hub's cache (HF_HOME).
Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import config
from sppo.errors import run_main


def main() -> None:
    parser = config.make_parser(__doc__, ["ranker", "ranker_revision"])
    _, recipe = config.parse(parser)
    from sppo.models import fetch_ranker

    print(f"preload: {recipe.ranker} is at {fetch_ranker(recipe.ranker, recipe.ranker_revision)}")


if __name__ == "__main__":
    run_main(main)
