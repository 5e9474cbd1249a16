"""Put the shards of generate.py together, after checking that they are one run's and hold every prompt once.

    python scripts/combine_generate.py --output_dir runs/x/iter1/data --numgpu 8

Reads   <output_dir>/responses/shard-*.parquet with their manifests.
Writes  <output_dir>/responses.parquet and its manifest.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import config
from sppo.errors import run_main


def main() -> None:
    parser = config.make_parser(__doc__, ["pairs"])
    config.add_data_flags(parser)
    parser.add_argument("--numgpu", type=int, default=1, help="how many shards there are")
    args, recipe = config.parse(parser)
    from sppo.generation import combine

    combine(args.output_dir, args.numgpu, recipe.pairs, args.overwrite)


if __name__ == "__main__":
    run_main(main)
