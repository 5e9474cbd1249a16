"""Every --loss_type and both estimators beside each other in the demo's world; the length penalty; DPO and trl's.

    python benchmarks/methods.py --output_dir docs

Each method is the demo with that flag: its own world for each seed, three iterations, held-out answers judged by the
demo's ranker and its rule. Each length penalty is the demo with a judge that likes length (examples.demo:biased).
The runs are by run_sppo_mistral.sh, two at a time.
Reads   nothing.
Writes  <output_dir>/methods.md; the runs in <work_dir>, where a stopped one goes on.
A run takes one to two minutes, on one core.
Exit codes: 0 done, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from warm_python import call, share_first_answers, warm_python

from examples.demo import colour_words
from sppo.cli import flags
from sppo.command.search_path import ROOT

LOSSES = ("sppo", "sppo_single", "sppo_all", "sigmoid", "hinge", "ipo", "ipo_mean", "kto_pair")
ESTIMATORS = ("paper", "released")
PENALTIES = (0, 4, 8, 16)
RECIPE = ROOT / "recipes" / "sppo" / "demo.yaml"


def make_world(python: str, work: Path, seed: int) -> Path:
    """The demo's model, ranker and prompts."""
    world = work / f"world-{seed}"
    call(python, [python, "scripts/make_demo.py", *flags(output_dir=world, seed=seed)], Path(f"{world}.log"))
    return world


def driver(python: str, work: Path, name: str, seed: int, more: list[str]) -> Path:
    """The demo with some flags more; the run's directory. Started again, it goes on."""
    world, run = work / f"world-{seed}", work / f"{name}-{seed}"
    words = ["bash", "run_sppo_mistral.sh", "--split_prompts", "--skip_preflight", "--gpus=none"]
    words += flags(recipe=RECIPE, seed=seed, name="demo", run_dir=run, model=world / "policy")
    call(python, [*words, *flags(prompts=world / "train.jsonl"), *more], Path(f"{run}.log"))
    return run


def judged(work: Path, seed: int) -> list[str]:
    """What answers are drawn to, and their second judge."""
    return flags(eval_prompts=work / f"world-{seed}" / "heldout.jsonl", judge="examples.demo:rule")


def method(python: str, work: Path, seed: int, loss: str, estimator: str) -> Path:
    """The run's directory."""
    name, first = f"{loss}-{estimator}", work / f"{LOSSES[0]}-{ESTIMATORS[0]}-{seed}"
    share_first_answers(first, work / f"{name}-{seed}")
    world = work / f"world-{seed}"
    own = flags(ranker=world / "ranker", loss_type=loss, estimator=estimator)
    run = driver(python, work, name, seed, own)
    words = [python, "scripts/report.py", "--gpus=none", *judged(work, seed)]  # of the last iteration alone
    words += flags(recipe=run / "iter3/recipe.yaml", run_dir=run, iteration=3, base=world / "policy", seed=seed)
    call(python, words, Path(f"{run}.log"))
    return run


def penalised(python: str, work: Path, seed: int, penalty: float) -> Path:
    own = flags(ranker="examples.demo:biased", length_penalty=penalty)
    return driver(python, work, f"penalty-{penalty:g}", seed, [*own, *judged(work, seed), "--evaluate"])


def figures(run: Path) -> dict[str, Any]:
    """The last iteration's row of summary.json, and how long its training took."""
    found = json.loads((run / "summary.json").read_text())[-1]
    log = Path(f"{run}.log").read_text()
    found["train_seconds"] = float(np.median([int(s) for s in re.findall(r"iteration \d: train: (\d+) s", log)]))
    return found


def penalty_figures(run: Path) -> dict[str, Any]:
    """The last model's answers: what their judges say, and how many colour words they have of how many words."""
    import pyarrow.parquet as pq

    found, matrix = figures(run), json.loads((run / "matrix.json").read_text())
    rows = pq.read_table(run / "iter3/eval/responses.parquet", columns=["responses"]).column(0).to_pylist()
    texts = [answer["text"] for row in rows for answer in row]
    paired = json.loads((run / "iter1/data/train.manifest.json").read_text())["counts"]
    found["controlled"] = matrix["length_controlled"][-1][0]
    found["rule_controlled"] = matrix["judge"]["length_controlled"][-1][0]
    found["colours"] = float(np.mean([colour_words(text) for text in texts]))
    found["correlation"] = paired["win_rate_length_correlation"]
    return found


def spread(values: list[float], percent: bool = False) -> str:
    """The median, and the lowest and the highest."""
    median, low, high = (100 * x if percent else x for x in (np.median(values), min(values), max(values)))
    return f"{median:.1f}" + (f" ({low:.1f} to {high:.1f})" if len(values) > 1 else "")


def rows(found: dict[str, list[dict[str, Any]]], columns: dict[str, tuple[str, bool]]) -> list[str]:
    """A line a method, of the columns {key: (head, whether it is a share)}; empty cells where no run has the key."""
    lines = ["| | " + " | ".join(head for head, _ in columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, runs in found.items():
        there = {k: [r[k] for r in runs if k in r] for k in columns}
        cells = [spread(there[k], share) if there[k] else "" for k, (_, share) in columns.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


HEALTH = {  # of answers, in every table of methods
    "mean_tokens": ("tokens", False),
    "empty": ("empty, %", True),
    "repeated": ("repeated, %", True),
    "cut": ("cut, %", True),
}
METHOD_COLUMNS = {
    "rule_win_rate": ("rule, %", True),
    "ranker_win_rate": ("ranker, %", True),
    **HEALTH,
    "train_seconds": ("training, s", False),
}
PENALTY_COLUMNS = {
    "mean_tokens": ("tokens", False),
    "colours": ("colour words", False),
    "ranker_win_rate": ("biased judge, %", True),
    "controlled": ("the same at equal length, %", True),
    "rule_win_rate": ("rule, %", True),
    "rule_controlled": ("rule at equal length, %", True),
    "correlation": ("win rate and length, correlation", False),
}


def dpo_against_trl(run: Path, world: Path, seed: int, scratch: Path) -> tuple[list[float], list[float]]:
    """Losses of the first iteration's steps of iterated DPO: ours, as the run logged them, and trl's DPOTrainer's.

    The same pairs, batches and order; trl draws its own order, so here it takes the rows as they come.
    """
    import datasets
    import trl
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sppo.recipe import load_recipe

    class Trainer(trl.DPOTrainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    recipe = load_recipe(RECIPE)
    path = str(run / "iter1" / "data" / "train.parquet")
    data = datasets.load_dataset(
        "parquet", data_files=path, split="train", columns=["chosen", "rejected"], cache_dir=str(scratch / "cache")
    )
    data = data.select(np.random.default_rng([seed, 0]).permutation(len(data)))  # as in training/data.py
    arguments = trl.DPOConfig(
        output_dir=str(scratch), loss_type=["sigmoid"], beta=recipe.beta, optim=recipe.optim, max_grad_norm=0.0,
        learning_rate=recipe.learning_rate, lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=recipe.warmup_ratio, per_device_train_batch_size=recipe.batch_size, num_train_epochs=1,
        gradient_checkpointing=False, bf16=False, use_cpu=True, save_strategy="no", logging_steps=1,
        report_to="none", max_length=recipe.max_length, seed=seed, disable_tqdm=True,
    )  # fmt: skip
    network, tokenizer = (kind.from_pretrained(world / "policy") for kind in (AutoModelForCausalLM, AutoTokenizer))
    trainer = Trainer(network.float(), args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    ours = [json.loads(line)["loss"] for line in (run / "iter1/model/metrics.jsonl").read_text().splitlines()]
    return ours, theirs


def table(
    methods: dict[str, list[dict[str, Any]]],
    penalties: dict[str, list[dict[str, Any]]],
    curves: tuple[list[float], list[float]],
    seeds: list[int],
    penalty_seeds: list[int],
    command: str,
) -> str:
    """methods.md."""
    apart = max(abs(a - b) for a, b in zip(*curves, strict=True))
    return "\n".join(
        [
            "# Methods beside each other",
            "",
            "This page is for you if you choose a `--loss_type` or an `--estimator`.",
            "",
            *("```bash", f"python benchmarks/methods.py {command}", "```"),
            "",
            f"Figures are medians over {len(seeds)} seeds. In brackets are the lowest and the highest.",
            "All is of the third iteration's model on 150 held-out prompts. Win rates are against the first model.",
            "",
            "The settings are the demo's (`recipes/sppo/demo.yaml`: beta 0.1, 12 steps an iteration).",
            "They were chosen for `sppo` with the paper's estimator, and not for each method.",
            "`ipo` sums a response's log-probs over its tokens, as the released trainer does.",
            "Its authors take the mean, which is `ipo_mean` ([method.md](method.md#other-losses)).",
            "*training, s* is of one iteration. It is noisy, since two runs shared 2 CPU cores.",
            "",
            *rows(methods, METHOD_COLUMNS),
            "",
            "## A length penalty",
            "",
            "The judge (`examples.demo:biased`) gives a logit of 1 for each colour word more, as the rule has it.",
            "It also gives 0.5 for each word more, whatever the word is. `--length_penalty L` works against that.",
            "A response loses L of log-odds for each mean length by which it is longer than the other one",
            "(`penalised` in `sppo/method/winrates.py`).",
            "",
            "*Correlation* is that of win rate and length in the first iteration's data, after the penalty.",
            f"Seeds: {' '.join(map(str, penalty_seeds))}.",
            "",
            *rows(penalties, PENALTY_COLUMNS),
            "",
            "## Iterated DPO and trl's DPOTrainer",
            "",
            f"`--loss_type sigmoid`, seed {seeds[0]}, first iteration: the loss of each step, on the same pairs.",
            f"The largest difference is {apart:.1e}.",
            "",
            "| step | " + " | ".join(str(n + 1) for n in range(len(curves[0]))) + " |",
            "|---" * (len(curves[0]) + 1) + "|",
            *(
                f"| {name} | {' | '.join(f'{x:.4f}' for x in losses)} |"
                for name, losses in zip(("here", "trl"), curves, strict=True)
            ),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("docs"), help="%(default)s")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/methods"), help="%(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(42, 47)), help="%(default)s")
    parser.add_argument("--penalty_seeds", type=int, nargs="+", default=[42], help="of the length penalty; %(default)s")
    parser.add_argument("--losses", choices=LOSSES, nargs="+", default=LOSSES, help="all; sppo is always there")
    parser.add_argument("--estimators", choices=ESTIMATORS, nargs="+", default=ESTIMATORS, help="%(default)s")
    args = parser.parse_args()
    work, seeds = args.work_dir.absolute(), args.seeds
    work.mkdir(parents=True, exist_ok=True)
    wanted = itertools.product(args.losses, args.estimators)
    # the first is what the others begin with; iterated DPO is compared with trl's
    names = list(dict.fromkeys([(LOSSES[0], ESTIMATORS[0]), *wanted, ("sigmoid", ESTIMATORS[0])]))
    with warm_python() as python, ThreadPoolExecutor(2) as pool:

        def each(one: Callable[..., Path], *options: Any, of: list[int] = seeds) -> list[Future[Path]]:
            return [pool.submit(one, python, work, seed, *options) for seed in of]

        # the others begin with what these leave
        for one in (each(make_world, of=sorted({*seeds, *args.penalty_seeds})), each(method, *names[0])):
            wait(one)
        runs = {f"`{a}`, {b}": each(method, a, b) for a, b in names}
        fined = {f"L = {x:g}": each(penalised, x, of=args.penalty_seeds) for x in PENALTIES}
        methods = {name: [figures(job.result()) for job in jobs] for name, jobs in runs.items()}
        penalties = {name: [penalty_figures(job.result()) for job in jobs] for name, jobs in fined.items()}
    run, world = work / f"sigmoid-{ESTIMATORS[0]}-{seeds[0]}", work / f"world-{seeds[0]}"
    curves = dpo_against_trl(run, world, seeds[0], work / "trl")
    asked = {"seeds": seeds, "penalty_seeds": args.penalty_seeds, "losses": args.losses, "estimators": args.estimators}
    command = " ".join(f"--{key} {' '.join(map(str, values))}" for key, values in asked.items())
    made = table(methods, penalties, curves, seeds, args.penalty_seeds, command)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "methods.md").write_text(made, encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
