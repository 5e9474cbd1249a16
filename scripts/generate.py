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

from sppo import config
from sppo.common.errors import run_main


def main() -> None:
    parser = config.make_parser(__doc__, config.KEYS["generate"])
    config.add_shard_flags(parser)
    parser.add_argument(
        "--prompts_part", default="0/1", metavar="I/N", help="every N-th prompt from the I-th on (0/1: all)"
    )
    parser.add_argument("--world_size", type=int, default=1, help="GPUs that one model is spread over (vllm)")
    args, recipe = config.parse(parser)
    from sppo.common.shards import Slice
    from sppo.generation.shards import generate_shard

    part = config.parse_part(args.prompts_part)
    shard = Slice(args.frac_len, args.data_frac, args.numgpu)
    generate_shard(recipe, args.output_dir, shard, part, args.world_size, args.overwrite)


if __name__ == "__main__":
    run_main(main)
