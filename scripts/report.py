"""Answer held-out prompts with the base model and an iteration's model, and report who wins.

    python scripts/report.py --run_dir runs/x --iteration 1 --base M --eval_prompts heldout.jsonl --ranker R

Reads   <run_dir>/iter<i>/model, the base model, the ranker, and a second judge if one is named.
Writes  <run_dir>/iter<i>/eval/, <run_dir>/iter0/eval/ (the base's answers, once) and <run_dir>/summary.json.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import config
from sppo.common.errors import UsageError, run_main


def main() -> None:
    parser = config.make_parser(__doc__, config.KEYS["report"])
    parser.add_argument("--run_dir", type=Path, required=True, help="the run's directory")
    parser.add_argument("--iteration", type=int, required=True, help="which iteration's model to report on")
    parser.add_argument("--base", required=True, help="the model to compare with: the run's first")
    parser.add_argument("--gpus", default="auto", help="0,2,5 or auto (default) or none")
    parser.add_argument("--world_size", type=int, default=1, help="GPUs that one model is spread over (vllm)")
    args, recipe = config.parse(parser)
    if not recipe.eval_prompts:
        raise UsageError("--eval_prompts is missing: the held-out prompts to answer")
    from sppo.evaluation.report import report

    report(recipe, args.run_dir, args.iteration, args.base, args.gpus, args.world_size)


if __name__ == "__main__":
    run_main(main)
