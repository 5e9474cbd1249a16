"""Turn the ranker's logits into win rates and the training set. Cheap: run it again with the other estimator at will.

    python scripts/compute_prob.py --output_dir runs/x/iter1/data --estimator paper

Reads   <output_dir>/responses.parquet and <output_dir>/ranking/*.parquet, joined by prompt_id.
Writes  <output_dir>/train.parquet, test.parquet and their manifest; prints what the data set is like.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import CHILD, UsageError, run_main
from sppo.recipe import KEYS, require_pairs


def main() -> None:
    parser = cli.chain_parser(__doc__, KEYS["compute_prob"])
    args, recipe = cli.parse(parser)
    data_dir = cli.data_dir_of(recipe)
    require_pairs(recipe)
    # as the released script does with these flags; in the chain push_to_hub.py does it
    pushes = "org" in cli.given(parser, args) and CHILD not in os.environ
    if pushes and not recipe.name:
        raise UsageError("--org needs --name, the data sets' name on the Hub")
    from sppo.generation.combine import refuse_other_prompts
    from sppo.pairing.training_set import compute_prob

    refuse_other_prompts(data_dir, cli.prompts_by_hand(parser, args))
    compute_prob(recipe, data_dir, args.overwrite)
    if pushes:
        from sppo.hub.push import push_data

        push_data(data_dir, recipe.org, recipe.name, public=False)


if __name__ == "__main__":
    run_main(main)
