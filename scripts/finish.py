"""The end of a run: its table, its page, and what could not be pushed. scripts/run.sh calls this last.

    python scripts/finish.py --model M --prompts prompts.jsonl --run_dir runs/x ...      the drivers' flags

Reads   <run_dir>: summary.json, matrix.json, and the notes of pushes that failed.
Writes  <run_dir>/report.html, where something is newer than it. With a second judge <run_dir>/guard.json and the link
        <run_dir>/best to the best iteration's model.
Exit codes: 0 done, 1 something could not be pushed (it names the commands), 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import SPPOError, run_main
from sppo.recipe import Recipe


def main() -> None:
    from sppo.hub.push import unpushed
    from sppo.iterations import opened
    from sppo.plan import driver_parser
    from sppo.store.files import read_json

    _, recipe = cli.parse(driver_parser(__doc__))
    run = opened(recipe)
    run_dir = Path(run.run_dir)
    if run.eval_prompts:
        from sppo.evaluation.report import print_table

        print_table(read_json(run_dir / "summary.json"))
    if run.evaluate:
        from sppo.evaluation.matrix import print_matrix

        print_matrix(read_json(run_dir / "matrix.json"))

    guard = _guard(run)

    page = run_dir / "report.html"
    made = page.stat().st_mtime if page.exists() else 0.0
    if any(file.stat().st_mtime > made for file in (*run_dir.rglob("*manifest.json"), *run_dir.glob("guard.json"))):
        from sppo.evaluation.page.page import write_page

        write_page(run_dir)
    print(f"page: {page}")

    stopped_at, best = guard.get("stopped_at"), guard.get("best")
    if stopped_at is None or not best:
        print(f"done: the last model is {run_dir / f'iter{run.iterations}' / 'model'}")
    else:
        model = run_dir / best["model"] if best["iteration"] else best["model"]
        print(f"done: stopped after iteration {stopped_at}; the best model is {model}")
        print("to go on all the same, run the same command with --stop_when none")
    if run.org and (left := unpushed(run_dir)):
        lines = ["all is made and here, but not all is on the Hub; to push the rest, run:", *left]
        raise SPPOError("\n  ".join(lines))


def _guard(run: Recipe) -> dict[str, Any]:
    """Write, show and return guard.json, and link the best model; {} without a second judge.

    A run that goes on without its judge writes it too: what an earlier command had there may not be so any more.
    """
    from sppo.evaluation.guard import link_best, print_guard, update_guard

    found = update_guard(run)
    if found and run.judge:
        print_guard(found)
    link_best(Path(run.run_dir), found)
    return found


if __name__ == "__main__":
    run_main(main)
