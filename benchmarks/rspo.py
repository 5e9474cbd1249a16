"""RSPO, which is SPPO with a divergence from the first model in its loss, beside SPPO: the demo and SmolLM2.

    python benchmarks/rspo.py --output_dir docs                                        the demo, about half an hour
    python benchmarks/rspo.py --output_dir docs --seeds --smollm2_seeds 42 --smollm2_regs reverse:0.5

Each run has three iterations, and --reg and --reg_coef as named (reverse:0.5). The demo has its own world for each
seed, and two of its runs go at a time. SmolLM2's are of smollm2-few.yaml, on all cores, up to 40 minutes each.
Reads   nothing for the demo; SmolLM2-135M-Instruct, from the Hub or PyPI; IFEval's prompts, from the Hub or --ifeval.
Writes  <output_dir>/rspo.json, the figures of all runs so far, and rspo.md, the page about them; the runs in
        <work_dir>, where a stopped one goes on.
Exit codes: 0 done, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow.parquet as pq
import yaml
from methods import HEALTH, RECIPE, driver, figures, judged, make_world, rows
from methods_smollm2 import PROMPTS, run_command, smollm2
from methods_smollm2 import RECIPE as SMOLLM2
from warm_python import share_first_answers, warm_python

from sppo.cli import flags
from sppo.command.errors import UsageError, run_main
from sppo.evaluation.step import distinct_2
from sppo.store.files import read_json, write_json

ITERATIONS = 3
IFEVAL_TOKENS = 512  # longest answer; ifeval_smollm2.py takes 1280
REGS = ("reverse:0.05", "reverse:0.5", "forward:0.1", "both:0.1")
COLUMNS = {
    "rule_win_rate": ("rule, %", True),
    "rule_controlled": ("rule at equal length, %", True),
    "ranker_win_rate": ("ranker, %", True),
    **HEALTH,
    "distinct_2": ("distinct-2, %", True),
    "kl": ("KL, nats", False),
    "train_seconds": ("training, s", False),
}
SMOLLM2_COLUMNS = {
    "followed": ("followed, %", True),
    "ranker_win_rate": ("wins, %", True),
    "controlled": ("wins at equal length, %", True),
    "ifeval": ("IFEval, instructions, %", False),
    **HEALTH,
    "distinct_2": ("distinct-2, %", True),
    "kl": ("KL, nats", False),
    "base_perplexity": ("perplexity", False),
    "train_seconds": ("training, s", False),
}
WINS = ("rule_win_rate", "ranker_win_rate")
Found = dict[str, dict[str, dict[str, Any]]]  # of each method (a --regs, or SPPO's empty one) and seed


def settings(reg: str) -> list[str]:
    """reverse:0.5 as flags."""
    kind, _, weight = reg.partition(":")
    return flags(reg=kind, reg_coef=weight) if reg else []


def name_of(reg: str) -> str:
    return f"rspo-{reg.replace(':', '-')}" if reg else "sppo"


def demo_run(python: str, work: Path, seed: int, reg: str) -> Path:
    """One run of the demo."""
    name, world = name_of(reg), work / f"world-{seed}"
    if reg:
        share_first_answers(work / f"{name_of('')}-{seed}", work / f"{name}-{seed}")
    own = [*flags(ranker=world / "ranker"), *settings(reg), *judged(work, seed), "--evaluate", "--base_perplexity"]
    return driver(python, work, name, seed, own)


def smollm2_run(work: Path, seed: int, reg: str) -> Path:
    """One run of SmolLM2."""
    run, prompts = work / f"smollm2-{name_of(reg)}-{seed}", work / f"prompts-{seed}"
    made = flags(output_dir=prompts, seed=seed, kinds="few", train=PROMPTS * ITERATIONS)
    run_command([sys.executable, "scripts/make_instructions.py", *made], Path(f"{prompts}.log"))
    first, model = work / f"smollm2-{name_of('')}-{seed}", work / "SmolLM2-135M-Instruct"
    return smollm2(run, first, model, prompts, [*settings(reg), *flags(seed=seed)])


def ifeval_of(model: Path, out: Path, questions: str) -> float:
    """The share of IFEval's instructions that a model follows strictly, in percent."""
    words = flags(suite="ifeval", model=model, output_dir=out, maxlen=IFEVAL_TOKENS)
    words += flags(questions=questions) if questions else []
    run_command(["bash", "scripts/evaluate.sh", *words], Path(f"{out}.ifeval.log"))
    return read_json(out / "suites/ifeval/figures.json")["figures"]["instruction_strict_percent"]


def figures_of(run: Path) -> dict[str, Any]:
    """The last iteration's row of summary.json, its wins at equal length and how varied its answers are."""
    found, matrix = figures(run), read_json(run / "matrix.json")
    found["controlled"] = matrix["length_controlled"][-1][0]
    if matrix["judge"]:
        found["rule_controlled"] = matrix["judge"]["length_controlled"][-1][0]
    answers = (
        pq.read_table(run / f"iter{ITERATIONS}/eval/responses.parquet", columns=["responses"]).column(0).to_pylist()
    )
    found["distinct_2"] = distinct_2([answer["text"] for row in answers for answer in row])
    kept = {key: found[key] for key in {**COLUMNS, **SMOLLM2_COLUMNS} if key in found}
    steps = read_json(run / "summary.json")
    return {**kept, "by_iteration": [{key: step[key] for key in (*WINS, "kl") if key in step} for step in steps]}


def table(found: Found, columns: dict[str, tuple[str, bool]]) -> list[str]:
    """A line a method: medians over its seeds."""
    return rows({_shown(reg): [*runs.values()] for reg, runs in found.items()}, columns)


def distances(found: Found) -> list[str]:
    """A line a method: of each iteration the win rate by the rule, or else by the ranker, and the KL; medians."""
    lines = [
        "| | " + " | ".join(f"iteration {i + 1}" for i in range(ITERATIONS)) + " |",
        "|---" * (ITERATIONS + 1) + "|",
    ]
    for reg, runs in found.items():
        cells = []
        for i in range(ITERATIONS):
            steps = [run["by_iteration"][i] for run in runs.values()]
            wins = WINS[0] if WINS[0] in steps[0] else WINS[1]
            win_rate, kl = (float(np.median([step[key] for step in steps])) for key in (wins, "kl"))
            cells.append(f"{100 * win_rate:.1f}% at {kl:.2f} nats")
        lines.append(f"| {_shown(reg)} | {' | '.join(cells)} |")
    return lines


def _shown(reg: str) -> str:
    return f"RSPO, {reg.replace(':', ' ')}" if reg else "SPPO"


def seeds_of(found: Found) -> str:
    """Which seeds each method has, where they are not the same ones."""
    all_seeds = [sorted(runs) for runs in found.values()]
    if all(seeds == all_seeds[0] for seeds in all_seeds):
        return f"Seeds: {' '.join(all_seeds[0])}."
    return " ".join(f"Seeds of {reg or 'SPPO'}: {' '.join(sorted(runs))}." for reg, runs in found.items())


WAY = (
    "Compare methods that have gone equally far, perhaps after different numbers of iterations.",
    "Win rates and KL by iteration, medians:",
)


PICTURE = (  # drawn by docs/figures.py
    "<picture>",
    '  <source media="(prefers-color-scheme: dark)" srcset="rspo-dark.svg">',
    '  <img alt="Wins by the rule over the KL divergence, by method" src="rspo-light.svg" width="430">',
    "</picture>",
)


def page(store: dict[str, Any]) -> str:
    """rspo.md, of what rspo.json holds."""
    made = """\
# RSPO beside SPPO

This page is for you if you think of adding `--reg` and `--reg_coef` to a run.
[method.md](method.md#a-pull-towards-the-first-model) says what they do.

Figures are medians over the seeds, of the third iteration's model.
In brackets are the lowest and the highest. Win rates are against the first model.
*Distinct-2* is the share of different ones among all pairs of neighbouring words.
*KL* is from the first model, in nats an answer.
"""
    if store["demo"]:
        made += _demo(store["demo"])
    if store["smollm2"]:
        made += _smollm2(store["smollm2"], store.get("first_ifeval"))
    return made


def _demo(found: Found) -> str:
    return f"""
## The demo

```bash
python benchmarks/rspo.py --regs {" ".join(reg for reg in found if reg)}
```

It is the demo's run with the two flags more: 150 held-out prompts, a trained ranker, the true rule.
Two runs shared two CPU cores, so seconds are noisy.

{seeds_of(found)}

{_lines(table(found, COLUMNS))}

A pull makes this run slower: it wins less, and it stays nearer to the first model.
{_lines(WAY)}

{_lines(distances(found))}

{_lines(PICTURE)}
"""


def _smollm2(found: Found, first_ifeval: float | None) -> str:
    first = "" if first_ifeval is None else f"\nOf the first model it is {first_ifeval:.1f}%."
    regs, seeds = " ".join(reg for reg in found if reg), " ".join(found[""])
    return f"""
## SmolLM2-135M-Instruct

```bash
python benchmarks/rspo.py --seeds --smollm2_regs {regs} --smollm2_seeds {seeds}
```

It is the run of `recipes/sppo/smollm2-few.yaml` with the two flags more: 96 held-out prompts, in float32.
The machine had other work at times, so seconds are noisy.
IFEval is the share of its instructions that the last model follows strictly, in answers of at most
{IFEVAL_TOKENS} tokens.{first}
What else the first model's answers are like is in
[experiments.md](experiments.md#three-iterations-three-seeds).

{seeds_of(found)}

{_lines(table(found, SMOLLM2_COLUMNS))}

KL is a measure of distance here, and no estimate of the divergence.
Answers drawn at temperature 0.7 are likelier than those of the model itself.
{_lines(WAY)}

{_lines(distances(found))}
"""


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def load_store(path: Path) -> dict[str, Any]:
    """The figures so far. Raises UsageError where they are of other recipes."""
    recipes = {of.name: yaml.safe_load(of.read_text(encoding="utf-8")) for of in (RECIPE, SMOLLM2)}
    store = read_json(path) if path.exists() else {"recipes": recipes, "demo": {}, "smollm2": {}}
    if store["recipes"] != recipes:
        raise UsageError(f"{path} has the figures of other recipes; move it away, or --output_dir")
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("docs"), help="%(default)s")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/rspo"), help="%(default)s")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(42, 47)), help="the demo's; %(default)s")
    parser.add_argument("--regs", nargs="+", default=REGS, help="the demo's; %(default)s")
    parser.add_argument("--smollm2_seeds", type=int, nargs="*", default=[], help="none")
    parser.add_argument("--smollm2_regs", nargs="*", default=[], help="of SmolLM2, beside SPPO")
    parser.add_argument("--ifeval", default="", help="a file of IFEval's prompts, where the Hub cannot be reached")
    args = parser.parse_args()
    work = args.work_dir.absolute()
    for directory in (work, args.output_dir):
        directory.mkdir(parents=True, exist_ok=True)
    written = args.output_dir / "rspo.json"
    store = load_store(written)

    def write() -> None:
        write_json(written, store)
        (args.output_dir / "rspo.md").write_text(page(store), encoding="utf-8")

    def keep(of: str, reg: str, seed: int, found: dict[str, Any]) -> None:
        store[of].setdefault(reg, {}).setdefault(str(seed), {}).update(found)  # its IFEval is kept until read again
        write()

    if args.seeds:
        with warm_python() as python, ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda seed: make_world(python, work, seed), args.seeds))
            for reg in ("", *args.regs):  # SPPO first: the others begin with what its runs leave
                runs = {seed: pool.submit(demo_run, python, work, seed, reg) for seed in args.seeds}
                for seed, run in runs.items():
                    keep("demo", reg, seed, figures_of(run.result()))
    if args.smollm2_seeds:
        model = work / "SmolLM2-135M-Instruct"
        run_command([sys.executable, "scripts/make_smollm2.py", *flags(output_dir=model)], work / "model.log")
    trained = {}
    for seed, reg in itertools.product(args.smollm2_seeds, ("", *args.smollm2_regs)):
        trained[seed, reg] = smollm2_run(work, seed, reg)
        keep("smollm2", reg, seed, figures_of(trained[seed, reg]))
    for (seed, reg), run in trained.items():
        last = run / f"iter{ITERATIONS}"
        keep("smollm2", reg, seed, {"ifeval": ifeval_of(last / "model", last, args.ifeval)})
    if trained and "first_ifeval" not in store:
        store["first_ifeval"] = ifeval_of(model, work / "first", args.ifeval)
        write()
    print(page(store))


if __name__ == "__main__":
    run_main(main)
