"""n responses to every prompt, and of each n the one that the ranker prefers.

    python scripts/best_of_n.py --model M --prompts P --n 16 --ranker llm-blender/PairRM --output_dir runs/best

Reads   the model, the prompts, the ranker.
Writes  <output_dir>: best.parquet, best.jsonl (prompt_id, prompt, response, its index and win rate), best.alpaca.json
        (what AlpacaEval takes: an entry for each prompt, with an empty output where there is no best response),
        best.manifest.json, which counts those by reason; and what they were made from: responses.parquet, ranking/,
        logs/.
The best is the one with the highest mean P against the others, of n(n-1)/2 comparisons; P is --estimator's, as for the
chosen response of the training set. --knockout makes n-1 comparisons: winners of rounds meet, by the pair's own P. It
finds a good response, not always the best; how often, a full comparison of 16 responses to each of 32 prompts tells.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import UsageError, run_main
from sppo.recipe import KEYS


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS["best_of_n"])
    parser.add_argument("--n", type=int, default=16, help="responses a prompt (%(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="where all of it is written")
    parser.add_argument("--knockout", action="store_true", help="n-1 comparisons a prompt, not n(n-1)/2")
    parser.add_argument("--overwrite", action="store_true", help="rank and choose again; the responses stay")
    parser.add_argument("--data_frac", help="play only these shards of the knock-outs (the launcher's flag)")
    parser.add_argument("--numgpu", type=int, default=1, help="with --data_frac: how many shards there are")
    args, recipe = cli.parse(parser)
    if args.n < 2:
        raise UsageError(f"--n {args.n}: at least 2 responses can be compared")
    recipe = dataclasses.replace(recipe, pairs=args.n)
    if args.data_frac is not None and not args.knockout:
        raise UsageError("--data_frac is for a shard of --knockout")
    from sppo.evaluation.best import best_of_n, play_shard
    from sppo.generation.prompts import load_prompts
    from sppo.store.shards import Slice, parse_shards

    if args.data_frac is not None:
        for number in parse_shards(args.data_frac):
            play_shard(recipe, args.output_dir, Slice(0, number, args.numgpu))
        return
    asked = lambda: {p.prompt_id: p.messages for p in load_prompts(recipe.prompts, recipe)}  # noqa: E731 - read late
    best_of_n(recipe, args.output_dir, args.knockout, args.overwrite, asked)


if __name__ == "__main__":
    run_main(main)
