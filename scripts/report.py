"""A run's report.html; with --iteration, held-out prompts answered by the base and an iteration's model, and who wins.

    python scripts/report.py --run_dir runs/x
    python scripts/report.py --compare runs/x runs/y --output comparison.html
    python scripts/report.py --run_dir runs/x --iteration 1 --base M --eval_prompts heldout.jsonl --ranker R

Reads   <run_dir>, as far as the run has come; it may be going on. With --iteration: <run_dir>/iter<i>/model, the base
        model, the ranker, and a second judge if one is named. Settings are those of <run_dir>/iter1/recipe.yaml, unless
        --recipe or flags say otherwise; so is the base, which is that recipe's model.
Writes  <run_dir>/report.html, one file that needs no network. With --iteration also <run_dir>/iter<i>/eval/,
        <run_dir>/iter0/eval/ (the base's answers, once) and <run_dir>/summary.json.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import UsageError, run_main
from sppo.launch.resources import Place, add_place_flags
from sppo.recipe import KEYS, load_recipe


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS["report"])
    parser.add_argument("--run_dir", type=Path, help="the run's directory")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="RUN", help="runs to put beside each other")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="--compare's page (%(default)s)")
    parser.add_argument("--iteration", type=int, help="compare this iteration's model with the base")
    parser.add_argument("--base", help="the model to compare with (default: the run's first)")
    parser.add_argument("--overwrite", action="store_true", help="compare again although another ranker or judge did")
    add_place_flags(parser)
    args = parser.parse_args()
    written = args.run_dir / "iter1" / "recipe.yaml" if args.run_dir and args.iteration is not None else None
    own = str(written) if written and written.exists() else None
    recipe = load_recipe(args.recipe or own, cli.given(parser, args))
    if args.compare:
        if args.run_dir or args.iteration is not None:
            raise UsageError("--compare takes runs; leave --run_dir and --iteration out")
        from sppo.evaluation.page.page import write_comparison

        print(f"report: {write_comparison(args.compare, args.output)}")
        return
    if not args.run_dir:
        raise UsageError("--run_dir is missing: the run's directory, or --compare RUN RUN")
    if args.iteration is not None:
        base = args.base or (recipe.model if own and not args.recipe else "")
        if not base:
            raise UsageError("--base is missing: the model to compare with")
        if not recipe.eval_prompts:
            raise UsageError("--eval_prompts is missing: the held-out prompts to answer")
        from sppo.evaluation.report import report

        report(recipe, args.run_dir, args.iteration, base, Place.of(args), args.overwrite)
    from sppo.evaluation.page.page import write_page

    print(f"report: {write_page(args.run_dir)}")


if __name__ == "__main__":
    run_main(main)
