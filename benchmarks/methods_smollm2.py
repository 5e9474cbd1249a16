"""Every --loss_type and both estimators beside each other on SmolLM2-135M-Instruct, one seed.

    python benchmarks/methods_smollm2.py --output_dir docs

Each method is one iteration of recipes/sppo/smollm2-few.yaml with that flag. The first model's held-out answers, the
first responses and their ranking do not depend on the method, and are made once.
Reads   SmolLM2-135M-Instruct, from the Hub or PyPI.
Writes  <output_dir>/methods-smollm2.md, a row as soon as its run has ended; the runs in <work_dir>, where a stopped one
        goes on.
A run takes some minutes, on two cores; `sppo_all` trains on all eight responses, and takes four times as long.
Exit codes: 0 done, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow.parquet as pq
from methods import ESTIMATORS, HEALTH, LOSSES, figures, rows
from warm_python import call, share_first_answers

from sppo.cli import flags
from sppo.command.search_path import ROOT
from sppo.store.files import read_json

# their losses read which response is preferred, and not by how much
ORDER_ONLY = ("sigmoid", "hinge", "ipo", "ipo_mean", "kto_pair")
RECIPE = ROOT / "recipes/sppo/smollm2-few.yaml"
PROMPTS = 96  # of an iteration
COLUMNS = {
    "followed": ("followed, %", True),
    "followed_seen": ("seen, %", True),
    "followed_unseen": ("unseen, %", True),
    "ranker_win_rate": ("win rate, %", True),
    **HEALTH,
    "base_perplexity": ("base perplexity", False),
    "train_seconds": ("training, s", False),
}


def run_command(words: list[str], log: Path) -> None:
    """Run a command of the project on all cores, with the Hub where there is one. Raises SystemExit where it fails."""
    threads, offline = str(len(os.sched_getaffinity(0))), os.environ.get("HF_HUB_OFFLINE", "0")
    call(sys.executable, words, log, OMP_NUM_THREADS=threads, HF_HUB_OFFLINE=offline)


def smollm2(run: Path, first: Path, model: Path, prompts: Path, more: list[str]) -> Path:
    """A run of smollm2-few.yaml with `more` flags; its directory. It begins with the answers of the run `first`."""
    share_first_answers(first, run)
    words = ["bash", "scripts/run.sh", "--split_prompts", "--evaluate", "--skip_preflight", *more]
    words += flags(recipe=RECIPE, name="smollm2", model=model, run_dir=run)
    words += flags(prompts=prompts / "train.jsonl", eval_prompts=prompts / "heldout.jsonl")
    run_command(words, Path(f"{run}.log"))
    return run


def method(work: Path, model: Path, loss: str, estimator: str, more: list[str]) -> Path:
    """One run; its directory."""
    run, first = work / f"{loss}-{estimator}", work / f"{LOSSES[0]}-{ESTIMATORS[0]}"
    return smollm2(run, first, model, work / "prompts", [*more, *flags(loss_type=loss, estimator=estimator)])


def same_pairs(run: Path, other: Path) -> bool:
    """Whether two runs' first data sets prefer the same responses."""
    sides = [pq.read_table(r / "iter1/data/train.parquet", columns=["chosen", "rejected"]) for r in (run, other)]
    return sides[0].equals(sides[1])


def table(found: dict[str, list[dict[str, Any]]], iterations: int, command: str, same: bool) -> str:
    """methods-smollm2.md."""
    both = [
        "",
        "The losses that read only which response is preferred have one row.",
        "Both estimators' data sets prefer the same responses, which was compared.",
    ]
    return "\n".join(
        [
            "# Methods beside each other on SmolLM2-135M-Instruct",
            "",
            "This page is for you if you choose a `--loss_type` and want to see more than the demo.",
            "",
            *("```bash", f"python benchmarks/methods_smollm2.py {command}", "```"),
            "",
            f"Iterations: {iterations}. It ran on a CPU, with one seed.",
            "",
            "The settings are those of `recipes/sppo/smollm2-few.yaml` ([experiments.md](experiments.md)).",
            "Learning rate and beta were chosen for `sppo` with the paper's estimator, and not for each method.",
            "All is of 96 held-out prompts with 4 answers each, so differences of some points are noise.",
            "",
            "Which prompts are trained on matters as much.",
            "The run in experiments.md has other prompts in the first iteration of seed 42, and then follows 42.4%.",
            *(both if same else []),
            "",
            *rows(found, COLUMNS),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("docs"), help="%(default)s")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/methods-smollm2"), help="%(default)s")
    parser.add_argument("--seed", type=int, default=42, help="%(default)s")
    parser.add_argument("--iterations", type=int, default=1, help="%(default)s")
    args = parser.parse_args()
    work = args.work_dir.absolute()
    for directory in (work, args.output_dir):
        directory.mkdir(parents=True, exist_ok=True)
    model, prompts = work / "SmolLM2-135M-Instruct", work / "prompts"
    run_command([sys.executable, "scripts/make_smollm2.py", *flags(output_dir=model)], work / "model.log")
    made = flags(output_dir=prompts, seed=args.seed, kinds="few", train=PROMPTS * args.iterations)
    run_command([sys.executable, "scripts/make_instructions.py", *made], work / "prompts.log")
    more = flags(seed=args.seed, iterations=args.iterations)
    found: dict[str, list[dict[str, Any]]] = {}
    paper, released = (method(work, model, LOSSES[0], estimator, more) for estimator in ESTIMATORS)
    base = read_json(paper / "summary.json")[0]
    found["first model"] = [base["base"]]
    # later iterations draw from policies that may differ
    same = args.iterations == 1 and same_pairs(paper, released)
    for loss in sorted(LOSSES, key=lambda name: name == "sppo_all"):  # which takes longest
        alone = same and loss in ORDER_ONLY
        for estimator in ESTIMATORS[:1] if alone else ESTIMATORS:
            name = f"`{loss}`, {'both' if alone else estimator}"
            found[name] = [figures(method(work, model, loss, estimator, more))]
            text = table(found, args.iterations, f"--seed {args.seed} --iterations {args.iterations}", same)
            (args.output_dir / "methods-smollm2.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
