"""Make the demo's models and prompts: nothing is downloaded.

    python scripts/make_demo.py --output_dir runs/demo/world --seed 42

Reads   nothing.
Writes  <output_dir>/policy (a small Mistral), ranker (a small PairRM), train.jsonl and heldout.jsonl. The directory
        appears when all of it is made.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import SPPOError, run_main


def main() -> None:
    parser = cli.make_parser(__doc__, ["seed"])
    parser.add_argument("--output_dir", type=Path, required=True, help="where the demo's world appears")
    args, recipe = cli.parse(parser)
    made_from = args.output_dir / "seed.json"
    if made_from.exists():
        seed = json.loads(made_from.read_text())
        if seed != recipe.seed:
            raise SPPOError(f"{args.output_dir} was made with --seed {seed}, not {recipe.seed}; use another --run_dir")
        print(f"make_demo: done: {args.output_dir}")
        return
    from examples.demo import make_demo

    make_demo(args.output_dir, recipe.seed)


if __name__ == "__main__":
    run_main(main)
