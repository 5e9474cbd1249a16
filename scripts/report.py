"""A run's report.html; with --iteration, held-out prompts answered by the base and an iteration's model, and who wins.

    python scripts/report.py --run_dir runs/x
    python scripts/report.py --recipe runs/x/iter2/recipe.yaml
    python scripts/report.py --compare runs/x runs/y --output comparison.html
    python scripts/report.py --run_dir runs/x --iteration 1 --base M --eval_prompts heldout.jsonl --ranker R

Reads   <run_dir>, as far as the run has come; it may be going on. With --iteration: <run_dir>/iter<i>/model, the base
        model, the ranker, and a second judge if one is named. Settings are those of <run_dir>/iter1/recipe.yaml, unless
        --recipe or flags say otherwise; so is the base, which is that recipe's model.
Writes  <run_dir>/report.html, one file that needs no network. With --iteration also <run_dir>/iter<i>/eval/,
        <run_dir>/iter0/eval/ (the base's answers, once) and <run_dir>/summary.json. With a second judge also
        <run_dir>/guard.json, which says whether the run ends there (--stop_when).
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import RUN, SPPOError, UsageError, run_main
from sppo.recipe import KEYS, Recipe, load_recipe


def main() -> None:
    parser = cli.chain_parser(__doc__, KEYS["report"], output_dir="")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="RUN", help="runs to put beside each other")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="--compare's page (%(default)s)")
    parser.add_argument("--base", default="", help="the model to compare with (default: the run's first)")
    args = parser.parse_args()
    from sppo.evaluation.page.page import write_comparison, write_page

    if args.compare:
        if args.run_dir or args.iteration is not None:
            raise UsageError("--compare takes runs; leave --run_dir and --iteration out")
        print(f"page: {write_comparison(args.compare, args.output)}")
        return
    recipe, has_first = _recipe(args, cli.given(parser, args))
    run_dir = cli.require_dir("--run_dir", recipe.run_dir)
    if recipe.iteration and (recipe.eval_prompts or not args.recipe):
        if args.recipe:
            _show_training(run_dir)
        _report(recipe, args.base or (recipe.model if has_first else ""), args.overwrite)
        _guard(recipe, cli.given(parser, args))
    print(f"page: {write_page(run_dir)}")


def _recipe(args: argparse.Namespace, given: dict[str, Any]) -> tuple[Recipe, bool]:
    """The settings, and whether the run has a first recipe, whose model and seed they then have.

    They are those of --recipe, else of the first recipe.
    """
    from sppo.iterations import of_run, path_of

    first = Path(args.run_dir or "") / "iter1" / "recipe.yaml"
    is_by_hand = args.run_dir and args.iteration is not None and not args.recipe
    recipe = load_recipe(args.recipe or (first if is_by_hand and first.exists() else None), given)
    if not recipe.iteration:
        return recipe, False
    own = {key: getattr(recipe, key) for key in ("model", "model_revision", "seed") if key in given}
    has_first = path_of(dataclasses.replace(recipe, iteration=1)).exists()
    return dataclasses.replace(of_run(recipe), **own), has_first


def _show_training(run_dir: Path) -> None:
    """Make the page of what is trained, to be looked at while the answers are drawn. The run goes on without it."""
    from sppo.evaluation.page.page import write_page

    try:
        print(f"page: {write_page(run_dir)}", flush=True)
    except SPPOError as error:
        print(f"report: no page yet; the run goes on ({error})", file=sys.stderr, flush=True)


def _report(recipe: Recipe, base: str, overwrite: bool) -> None:
    """Answer the held-out prompts with the base and the iteration's model, and compare."""
    if not base:
        raise UsageError("--base is missing: the model to compare with")
    if not recipe.eval_prompts:
        raise UsageError("--eval_prompts is missing: the held-out prompts to answer")
    from sppo.evaluation.report import report

    report(recipe, Path(recipe.run_dir), recipe.iteration, base, overwrite)


def _guard(recipe: Recipe, given: dict[str, Any]) -> None:
    """Write guard.json where there is a second judge, and say where the run ends."""
    from sppo.evaluation.guard import as_last_asked, print_guard, update_guard

    if found := update_guard(recipe if RUN in os.environ else as_last_asked(recipe, given)):
        print_guard(found)


if __name__ == "__main__":
    run_main(main)
