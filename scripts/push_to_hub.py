"""Push an iteration's data sets to the Hub. Nothing else in this project uploads anything.

    python scripts/push_to_hub.py --output_dir runs/x/iter1/data --org my-org --name mistral-7b-instruct-sppo-iter1

Reads   <output_dir>/train.parquet, test.parquet and their manifest; HF_TOKEN or the stored login.
Writes  <org>/data-<name>_generated and <org>/synthetic_data_<name>_score on the Hub, private unless --public.
Exit codes: 0 done, 1 failed (nothing local is lost: run it again), 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import config
from sppo.errors import UsageError, run_main


def main() -> None:
    parser = config.make_parser(__doc__, ["org"])
    parser.add_argument("--output_dir", type=Path, required=True, help="the iteration's data directory")
    parser.add_argument(
        "--name", required=True, help="name of the data sets, for example mistral-7b-instruct-sppo-iter1"
    )
    parser.add_argument("--public", action="store_true", help="let everybody see them")
    args, recipe = config.parse(parser)
    if not recipe.org:
        raise UsageError("--org is missing: the organisation or user to push to")
    from sppo.hub import push

    for repo in push(args.output_dir, recipe.org, args.name, args.public):
        print(f"push_to_hub: {repo}")


if __name__ == "__main__":
    run_main(main)
