"""Turn the ranker's logits into win rates and the training set. Cheap: run it again with the other estimator at will.

    python scripts/compute_prob.py --output_dir runs/x/iter1/data --estimator paper

Reads   <output_dir>/responses.parquet and <output_dir>/ranking/*.parquet, joined by prompt_id.
Writes  <output_dir>/train.parquet, test.parquet and their manifest; prints what the data set is like.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import UsageError, run_main
from sppo.recipe import KEYS, require_pairs


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS["compute_prob"])
    cli.add_data_flags(parser)
    parser.add_argument("--org", help="push the data sets to this Hub organisation when they are written")
    parser.add_argument("--name", help="with --org: name of the data sets on the Hub")
    cli.add_prompts_check(parser)
    args, recipe = cli.parse(parser)
    require_pairs(recipe)
    if args.org and not args.name:
        raise UsageError("--org needs --name, the data sets' name on the Hub")
    from sppo.generation.combine import check_prompts
    from sppo.pairing.training_set import compute_prob

    check_prompts(args.output_dir, args.prompts)
    compute_prob(recipe, args.output_dir, args.overwrite)
    if args.org:
        from sppo.hub.push import push_data

        push_data(args.output_dir, args.org, args.name, public=False)


if __name__ == "__main__":
    run_main(main)
