"""Draw K responses for every prompt of a shard.

    python scripts/generate.py --model M --prompts prompts.jsonl --output_dir runs/x/iter1/data

Reads   the model (Hub id or directory) and the prompts (Hub id, directory, .parquet, .jsonl or .csv).
Writes  <output_dir>/responses/shard-<data_frac>.parquet and its manifest; while it works, a journal beside them,
        from which a killed run goes on. A shard that holds all prompts needs no combine_generate.py: then
        <output_dir>/responses.parquet is written too. Of 20,000 prompts or more in a file, <output_dir>/prompts.parquet
        keeps them, so that each shard reads its own alone.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import run_main
from sppo.recipe import KEYS


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS["generate"])
    cli.add_shard_flags(parser)
    parser.add_argument(
        "--prompts_part", default="0/1", metavar="I/N", help="every N-th prompt from the I-th on (0/1: all)"
    )
    parser.add_argument("--world_size", type=int, default=1, help="GPUs that one model is spread over (vllm)")
    parser.add_argument("--only_prompts", action="store_true", help="only read the prompts, before shards want them")
    args, recipe = cli.parse(parser)
    from sppo.generation.shards import generate_shards
    from sppo.generation.source import Source
    from sppo.store.shards import Slice, parse_shards

    part = cli.parse_part(args.prompts_part)
    if args.only_prompts:
        source = Source.of(recipe, part, args.output_dir)
        if not args.overwrite:
            source.refuse_others(args.output_dir, args.frac_len)
        source.keep(args.output_dir)
        print(f"generate: {source.total} prompts")
        return
    shards = [Slice(args.frac_len, number, args.numgpu) for number in parse_shards(args.data_frac)]
    generate_shards(recipe, args.output_dir, shards, part, args.world_size, args.overwrite)


if __name__ == "__main__":
    run_main(main)
