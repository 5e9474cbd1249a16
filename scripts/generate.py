"""Draw K responses for every prompt of a shard.

    python scripts/generate.py --model M --prompts prompts.jsonl --output_dir runs/x/iter1/data

Reads   the model (Hub id or directory) and the prompts (Hub id, directory, .parquet, .jsonl or .csv).
Writes  <output_dir>/responses/shard-<data_frac>.parquet and its manifest; while it works, a journal beside them,
        from which a killed run goes on. A shard that holds all prompts needs no combine_generate.py: then
        <output_dir>/responses.parquet is written too.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import UsageError, run_main
from sppo.recipe import KEYS, require_pairs


def main() -> None:
    parser = cli.chain_parser(__doc__, KEYS["generate"])
    cli.add_shard_flags(parser)
    parser.add_argument(
        "--only_prompts",
        action="store_true",
        help="only check the flags of generate.sh and read the prompts, before shards want them",
    )
    args, recipe = cli.parse(parser)
    data_dir = cli.data_dir_of(recipe)
    if args.only_prompts:
        require_pairs(recipe)
        if recipe.org and not recipe.name:
            raise UsageError("--org needs --name, the data sets' name on the Hub")
    from sppo.generation.shards import generate_shards
    from sppo.generation.source import Source, as_begun
    from sppo.store.shards import Slice, parse_shards

    if args.only_prompts:
        source = Source.of(as_begun(recipe, data_dir, args.overwrite))
        if not args.overwrite:
            source.refuse_others(data_dir, args.frac_len)
        source.check_extras()
        source.check_dtype()
        print(f"generate: {len(source.prompts)} prompts")
        return
    shards = [Slice(args.frac_len, number, args.numgpu) for number in parse_shards(args.data_frac)]
    generate_shards(recipe, data_dir, shards, args.overwrite)


if __name__ == "__main__":
    run_main(main)
