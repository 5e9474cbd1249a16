"""The end of a run: its table, its page, and what could not be pushed. scripts/run.sh calls this last.

    python scripts/finish.py --model M --prompts prompts.jsonl --run_dir runs/x ...      the drivers' flags

Reads   <run_dir>: summary.json, matrix.json, and the notes of pushes that failed.
Writes  <run_dir>/report.html, where something is newer than it.
Exit codes: 0 done, 1 something could not be pushed (it names the commands), 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import SPPOError, run_main


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

    page = run_dir / "report.html"
    made = page.stat().st_mtime if page.exists() else 0.0
    if any(manifest.stat().st_mtime > made for manifest in run_dir.rglob("*manifest.json")):
        from sppo.evaluation.page.page import write_page

        write_page(run_dir)
    print(f"page: {page}")

    print(f"done: the last model is {run_dir / f'iter{run.iterations}' / 'model'}")
    if run.org and (left := unpushed(run_dir)):
        lines = ["all is made and here, but not all is on the Hub; to push the rest, run:", *left]
        raise SPPOError("\n  ".join(lines))


if __name__ == "__main__":
    run_main(main)
