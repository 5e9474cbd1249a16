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
    of_model = "--what=model" in sys.argv
    parser = cli.chain_parser(__doc__, KEYS["push_to_hub"], "model_dir" if of_model else "data_dir")
    parser.add_argument(
        "--what", choices=["data", "model"], help="in the chain: push this, if --org (--push_model) asks"
    )
    args, recipe = cli.parse(parser)
    given = cli.given(parser, args)
    if args.what:
        is_asked = bool(recipe.org) if args.what == "data" else recipe.push_model
        if not is_asked:
            return
        places = {f"{args.what}_dir"}
    else:
        places = {"data_dir", "model_dir"} & given.keys()
        if not recipe.org:
            raise UsageError("--org is missing: the organisation or user to push to")
        if not places:
            raise UsageError("--output_dir or --model_dir is missing: what to push")
    if not recipe.name:
        raise UsageError("--name is missing: the name on the Hub")
    from sppo.hub.push import command, note_push, push_data, push_model

    data_dir = Path(recipe.data_dir) if "data_dir" in places else None
    model_dir = Path(recipe.model_dir) if "model_dir" in places else None
    what = (recipe.org, recipe.name, recipe.public)
    again = shlex.join(command(*what, data_dir, model_dir))
    note_push([data_dir, model_dir], again)
    try:
        if data_dir:
            push_data(data_dir, *what)
        if model_dir:
            push_model(model_dir, *what)
    except UsageError:
        raise
    except SPPOError as error:
        raise SPPOError(f"{error}\nNothing here is lost. To push it, run:\n  {again}") from None
    note_push([data_dir, model_dir], "")


if __name__ == "__main__":
    run_main(main)
