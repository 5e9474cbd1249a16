"""The first model and every iteration's against each other, on the answers to the held-out prompts.

    python scripts/win_matrix.py --run_dir runs/x

Reads   <run_dir>/iter<i>/eval/responses.parquet of all iterations, which a run with --eval_prompts has drawn, and the
        ranker. Settings are those of <run_dir>/iter1/recipe.yaml, unless --recipe or flags say otherwise.
Writes  <run_dir>/matrix.json, and <run_dir>/iter<i>/eval/against-iter<j>-*.parquet, each comparison once.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import SPPOError, run_main
from sppo.recipe import KEYS, load_recipe


def main() -> None:
    parser = cli.chain_parser(__doc__, KEYS["win_matrix"], output_dir="")
    args = parser.parse_args()
    run_dir = cli.require_dir("--run_dir", args.run_dir or "")
    if not run_dir.is_dir():
        raise SPPOError(f"--run_dir {run_dir}: no such directory")
    first = run_dir / "iter1" / "recipe.yaml"
    recipe = load_recipe(args.recipe or (first if first.exists() else None), cli.given(parser, args))
    from sppo.evaluation.matrix import print_matrix, win_matrix

    print_matrix(win_matrix(recipe, run_dir, args.overwrite))


if __name__ == "__main__":
    run_main(main)
