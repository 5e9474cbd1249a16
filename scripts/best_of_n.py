"""n responses to every prompt, and of each n the one that the ranker prefers.

    python scripts/best_of_n.py --model M --prompts P --n 16 --ranker llm-blender/PairRM --output_dir runs/best

Reads   the model, the prompts, the ranker.
Writes  <output_dir>: best.parquet, best.jsonl (prompt_id, prompt, response, its index and win rate), best.alpaca.json
        (what AlpacaEval takes: an entry for each prompt, with an empty output where there is no best response),
        best.manifest.json, which counts those by reason; and what they were made from: responses.parquet, ranking/,
        logs/.
The best is the one with the highest mean P against the others, of n(n-1)/2 comparisons; P is --estimator's, as for the
chosen response of the training set.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import UsageError, run_main
from sppo.recipe import KEYS
from sppo.schema import Message


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS["best_of_n"])
    parser.add_argument("--n", type=int, default=16, help="responses a prompt (%(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="where all of it is written")
    parser.add_argument("--overwrite", action="store_true", help="rank and choose again; the responses stay")
    args, recipe = cli.parse(parser)
    if args.n < 2:
        raise UsageError(f"--n {args.n}: at least 2 responses can be compared")
    recipe = dataclasses.replace(recipe, pairs=args.n)
    from sppo.evaluation.best import best_of_n
    from sppo.generation.prompts import load_prompts

    def prompts() -> dict[str, list[Message]]:
        return {prompt.prompt_id: prompt.messages for prompt in load_prompts(recipe.prompts, recipe)}

    best_of_n(recipe, args.output_dir, args.overwrite, prompts)


if __name__ == "__main__":
    run_main(main)
