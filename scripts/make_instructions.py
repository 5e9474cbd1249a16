"""Make the prompts of run_sppo_smollm2.sh: questions with constraints that a program can check.

    python scripts/make_instructions.py --output_dir runs/smollm2/prompts --seed 42
    python scripts/make_instructions.py --output_dir prompts --kinds few --train 288     for smollm2-few.yaml

Reads   nothing.
Writes  <output_dir>: train.jsonl, heldout.jsonl (the same for every seed; no topic is in both), and made.json, which
        says with what they were made. The directory appears when all of it is made.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import SPPOError, UsageError, run_main
from sppo.store.directories import appearing, target_of
from sppo.store.files import read_json

_MOST = 10_000  # so many different prompts are made quickly; far more there are not


def main() -> None:
    parser = cli.make_parser(__doc__, ["seed"])
    parser.add_argument("--output_dir", type=Path, required=True, help="where the directory appears")
    parser.add_argument("--train", type=int, default=960, help="prompts to train on, of all iterations (960)")
    parser.add_argument("--held_out", type=int, default=96, help="held-out prompts (96)")
    parser.add_argument("--kinds", choices=["few", "many"], default="many", help="kinds of constraint: 8, or 25 (many)")
    args, recipe = cli.parse(parser)
    if not (0 < args.train <= _MOST and 0 < args.held_out <= _MOST):
        raise UsageError(f"--train and --held_out are numbers from 1 to {_MOST}")
    wanted = {"seed": recipe.seed, "train": args.train, "held_out": args.held_out}
    if args.kinds != "few":  # as in made.json of older runs
        wanted["kinds"] = args.kinds
    written = args.output_dir / "made.json"
    if written.exists():
        if read_json(written) != wanted:
            made = " ".join(f"--{k} {v}" for k, v in read_json(written).items())
            raise SPPOError(f"{args.output_dir} was made with {made}; use another --run_dir or --output_dir")
        print(f"make_instructions: done: {args.output_dir}")
        return
    module = import_module("examples.smollm2.many_kinds" if args.kinds == "many" else "examples.smollm2.instructions")
    with appearing(target_of(args.output_dir)) as final:
        module.make_instructions(final, args.train, args.held_out, recipe.seed)
        (final / "made.json").write_text(json.dumps(wanted) + "\n")


if __name__ == "__main__":
    run_main(main)
