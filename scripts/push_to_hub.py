"""Push an iteration's data sets, its model, or both, to the Hub. Nothing else in this project uploads anything.

    python scripts/push_to_hub.py --output_dir runs/x/iter1/data --org my-org --name mistral-7b-instruct-sppo-iter1
    python scripts/push_to_hub.py --model_dir runs/x/iter1/model --org my-org --name mistral-7b-instruct-sppo-iter1

Reads   <output_dir>/train.parquet, test.parquet and the manifests; <model_dir>; HF_TOKEN or the stored login.
Writes  <org>/data-<name>_generated and <org>/synthetic_data_<name>_score, and <org>/<name> for the model, on the Hub:
        private unless --public, each one commit with a card and a tag (iter1 for a name that ends so, else the
        beginning of a digest; a tag that exists moves). Then <output_dir>/pushed.json, and pushed-<model's>.json
        beside the model: run again, it pushes only what changed.
Exit codes: 0 done (also: nothing left to do), 1 failed (nothing local is lost; it says what to run again),
2 wrong use, 130 interrupted.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import SPPOError, UsageError, run_main
from sppo.recipe import KEYS


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS["push_to_hub"])
    parser.add_argument("--output_dir", type=Path, help="the iteration's data directory, to push the data")
    parser.add_argument("--model_dir", type=Path, help="the iteration's model, to push the model")
    parser.add_argument("--name", required=True, help="the model's name and part of the data sets': mistral-sppo-iter1")
    args, recipe = cli.parse(parser)
    if not recipe.org:
        raise UsageError("--org is missing: the organisation or user to push to")
    if not (args.output_dir or args.model_dir):
        raise UsageError("--output_dir or --model_dir is missing: what to push")
    from sppo.hub.push import command, push_data, push_model

    what = (recipe.org, args.name, recipe.public)
    try:
        if args.output_dir:
            push_data(args.output_dir, *what)
        if args.model_dir:
            push_model(args.model_dir, *what)
    except UsageError:
        raise
    except SPPOError as error:
        again = shlex.join(command(*what, args.output_dir, args.model_dir))
        raise SPPOError(f"{error}\nNothing here is lost. To push it, run:\n  {again}") from None


if __name__ == "__main__":
    run_main(main)
