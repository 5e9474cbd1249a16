"""Put the shards of generate.py together, after checking that they are one run's and hold every prompt once.

    python scripts/combine_generate.py --output_dir runs/x/iter1/data --numgpu 8

Reads   <output_dir>/responses/shard-*.parquet with their manifests; with --extra_responses that file, and the tokenizer
        of --model (default: the model that drew the responses).
Writes  <output_dir>/responses.parquet and its manifest.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import run_main
from sppo.recipe import KEYS


def main() -> None:
    parser = cli.chain_parser(__doc__, KEYS["combine_generate"])
    parser.add_argument("--numgpu", type=int, help="how many shards there are (default: as many as were laid out)")
    parser.add_argument(
        "--gpu_ids", metavar="LIST", help="instead of --numgpu: as many shards as there are names in it"
    )
    args, recipe = cli.parse(parser)
    data_dir = cli.data_dir_of(recipe)
    from sppo.generation.combine import combine, refuse_other_prompts
    from sppo.store.shards import known_count

    shards = len(args.gpu_ids.split(",")) if args.gpu_ids else args.numgpu
    if shards is None:
        shards = known_count(data_dir / "responses") or 1
    combine(data_dir, shards, recipe.pairs, args.overwrite, args.frac_len, recipe)
    refuse_other_prompts(data_dir, cli.prompts_by_hand(parser, args))


if __name__ == "__main__":
    run_main(main)
