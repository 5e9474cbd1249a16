"""Train one iteration: $DATA -> $MODEL.

    accelerate launch --config_file recipes/accelerate_configs/zero3.yaml --num_processes 8 \\
        sppo/run_sppo.py recipes/sppo/released.yaml --model=M --dataset=runs/x/iter1/data \\
        --output_dir=runs/x/iter1/model

Reads   the policy (Hub id or directory) and the data set (train.parquet, its directory, or a Hub data set).
Writes  --output_dir: weights (with --use_peft an adapter), config, the policy's own tokenizer files, metrics.jsonl,
        a model card and the manifest. It appears when it is whole. Until then everything is in <output_dir>.partial,
        and a killed run goes on from the newest checkpoint there. The reference's log-probs are kept in reference/
        beside the data set, for any later run with the same policy and data.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo.command.errors import DONE, die_with_parent, leave, run_main


def main(argv: list[str] | None = None) -> None:
    from sppo import cli
    from sppo.recipe import KEYS
    from sppo.training.settings import prepare

    parser = cli.chain_parser(__doc__, KEYS["train"], "model_dir")
    parser.add_argument("recipe_file", nargs="?", help="the recipe, as a first argument instead of --recipe")
    args, recipe = cli.parse(parser, argv)
    training = prepare(recipe, int(os.environ.get("WORLD_SIZE", 1)), args.overwrite)
    if training.is_done():
        return
    from sppo.training.train import train

    with training.at_work() as is_left:
        if not is_left:
            print(f"train: done: {training.output_dir}")
            return
        train(training)
    if training.processes > 1 and "WORLD_SIZE" in os.environ:
        leave(DONE)  # gloo's threads may abort a rank in the interpreter's own end, when its work is done


if __name__ == "__main__":
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & set(os.environ):
        die_with_parent()  # a launcher that is killed must not leave its ranks training
    run_main(main)
