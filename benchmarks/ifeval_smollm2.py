"""SmolLM2-135M-Instruct, trained by run_sppo_smollm2.sh, on IFEval and IFBench: each iteration, several seeds.

    python benchmarks/ifeval_smollm2.py --output_dir docs --seeds 42 43 44
    python benchmarks/ifeval_smollm2.py --output_dir docs --seeds 44           one more, beside those that are there

IFEval's prompts make two halves, every second prompt each. Only the first half may be looked at to choose settings of
recipes/sppo/smollm2.yaml. The second half says what they are worth.
Reads   SmolLM2-135M-Instruct, from the Hub or PyPI; the two suites' prompts, from the Hub, or --ifeval and --ifbench.
Writes  <output_dir>/ifeval-smollm2.json, the figures of all seeds so far, and ifeval-smollm2.md, the page about them,
        both anew after each evaluation; the runs in <work_dir>, where a stopped one goes on.
On two cores a seed takes about an hour.
Exit codes: 0 done, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml
from methods_smollm2 import run_command

from sppo.cli import flags
from sppo.command.errors import UsageError, run_main
from sppo.command.search_path import ROOT
from sppo.evaluation.suites.instructions import share
from sppo.models.policy import open_policy
from sppo.store.files import digest, read_json, write_json

SUITES = {"ifeval": 1280, "ifbench": 1280}  # longest answer; IFBench's package takes 4096, which loops would fill
RECIPE, ITERATIONS = ROOT / "recipes/sppo/smollm2.yaml", 3
PROMPTS = 320  # of an iteration, as the driver makes them
CARD = 29.9  # IFEval on the model's card: the mean of prompts and instructions
MEASURES = ("followed", "base_perplexity", "repeated", "cut", "mean_tokens")  # of the run's own held-out prompts
Figures = dict[str, Any]


def fast() -> dict[str, str]:
    """The precision of run_sppo_smollm2.sh on a CPU that multiplies bfloat16 fast. A GPU does so anyway."""
    about, cpu = Path("/proc/cpuinfo"), shutil.which("nvidia-smi") is None
    if cpu and about.exists() and {"amx_bf16", "avx512_bf16"} & set(about.read_text().split()):
        return {"dtype": "bfloat16", "accelerate_config": "cpu_bf16"}
    return {}


def train(run: Path, model: Path, seed: int) -> None:
    """One run. How long it took is in <run>/seconds.json, where nothing interrupted it."""
    began, started = run.exists(), time.monotonic()
    words = ["bash", "run_sppo_smollm2.sh", *flags(model=model, seed=seed, run_dir=run)]
    run_command(words, Path(f"{run}.log"))
    if not began:
        write_json(run / "seconds.json", {"train": time.monotonic() - started})


def evaluate(suite: str, model: Path, out: Path, questions: str) -> None:
    """The model's figures of a suite, in <out>/suites/<suite>."""
    words = ["bash", "scripts/evaluate.sh", *flags(suite=suite, model=model, output_dir=out, maxlen=SUITES[suite])]
    words += flags(dtype=fast().get("dtype", "auto"), **({"questions": questions} if questions else {}))
    out.mkdir(parents=True, exist_ok=True)
    run_command(words, out / f"{suite}.log")


def strict_of(directory: Path) -> list[list[bool]]:
    """Of each of a suite's prompts, which of its instructions the model follows strictly."""
    lines = (directory / "checked.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["strict"] for line in lines]


def figures_of(out: Path, first: Figures | None) -> Figures:
    """What <out>/suites has of a model: of each suite its shares, by half too, and IFEval's kinds.

    first: the same of the first model; None where this is it. strict: of each prompt a digit an instruction, 1 where it
    is followed; it is kept of the first model alone. gain: see gain_over; it is kept of all others.
    """
    found: Figures = {}
    for suite in SUITES:
        directory = out / "suites" / suite
        if not (directory / "figures.json").exists():
            continue
        made, strict = read_json(directory / "figures.json"), strict_of(directory)
        of: Figures = {k: v for k, v in made["figures"].items() if "strict" in k}
        of |= {"prompts": len(strict), "instructions": sum(map(len, strict))}
        of["cut_percent"] = 100 * made["figures"]["cut_at_maxlen"] / len(strict)
        of |= {f"half_{1 + start}": share(strict[start::2]).percent for start in (0, 1)}
        if first is None:
            of["strict"] = " ".join("".join("01"[followed] for followed in prompt) for prompt in strict)
        else:
            of["gain"] = gain_over(first[suite]["strict"], strict)
        found[suite] = of
        if suite == "ifeval":
            found["kinds"] = {k: [of["instructions"], of["strict_percent"]] for k, of in made["kinds"].items()}
    return found


def gain_over(first: str, strict: list[list[bool]]) -> list[float | None]:
    """How many more percent of the instructions than the first model a model follows, and the standard error of that.

    first: a digit an instruction, as figures_of keeps it. Both answer the same prompts, so the error is that of the
    prompts' differences.
    """
    before = [[int(digit) for digit in prompt] for prompt in first.split()]
    apart = [[a - b for a, b in zip(*both, strict=True)] for both in zip(strict, before, strict=True)]
    return list(share(apart))


def read_run(run: Path, first: Figures) -> Figures:
    """A run's minutes and what each of its models reaches; of the first one, what its held-out answers are like."""
    summary = read_json(run / "summary.json")
    models = [{"measures": {k: summary[0]["base"][k] for k in MEASURES}}]
    for number, of in enumerate(summary, start=1):
        measures = {k: of[k] for k in (*MEASURES, "ranker_win_rate")}
        models.append({"measures": measures, **figures_of(run / f"iter{number}", first)})
    took = run / "seconds.json"
    return {"minutes": read_json(took)["train"] / 60 if took.exists() else None, "models": models}


# The page.

HEAD = ("seed", "model", "prompts, %", "instructions, %", "gain", "mean of both, %", "first half, %", "second half, %",
        "cut, %", "IFBench, %")  # fmt: skip
HELD_OUT = ("seed", "model", "followed, %", "wins, %", "tokens", "repeated, %", "cut, %", "perplexity")


def suite_cells(found: Figures) -> list[str]:
    """What a model reaches in the two suites; cells of what was not measured are empty."""
    of = found["ifeval"]
    shares = [_with_error(of, f"{kind}_strict") for kind in ("prompt", "instruction")]
    benched = _with_error(found["ifbench"], "instruction_strict") if "ifbench" in found else ""
    gain = f"{of['gain'][0]:+.1f} ± {of['gain'][1]:.1f}" if "gain" in of else ""
    rest = (_mean_of_both(of), of["half_1"], of["half_2"], of["cut_percent"])
    return [*shares, gain, *(f"{percent:.1f}" for percent in rest), benched]


def held_out_cells(of: Figures) -> list[str]:
    """What a model's answers to the run's own held-out prompts are like."""
    wins = f"{100 * of['ranker_win_rate']:.1f}" if "ranker_win_rate" in of else ""
    health = [f"{of['mean_tokens']:.0f}", f"{100 * of['repeated']:.1f}", f"{100 * of['cut']:.1f}"]
    return [f"{100 * of['followed']:.1f}", wins, *health, f"{of['base_perplexity']:.2f}"]


def _with_error(of: Figures, share: str) -> str:
    return f"{of[f'{share}_percent']:.1f} ± {of[f'{share}_standard_error']:.1f}"


def _mean_of_both(of: Figures) -> float:
    return (of["prompt_strict_percent"] + of["instruction_strict_percent"]) / 2


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    made = (f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))
    return "\n".join(line.replace("|  |", "| |").replace("|  |", "| |") for line in made)


MEANS = ("iteration", "IFEval, instructions", "IFEval, prompts", "IFBench", "wins over the first model", "perplexity")
SHARES = (("ifeval", "instruction"), ("ifeval", "prompt"), ("ifbench", "instruction"))


def means(store: Figures) -> str:
    """The table of README.md and docs/results.md: of each iteration the mean of the seeds."""
    runs = [run["models"] for run in store["seeds"].values() if "kinds" in run["models"][-1]]
    lines = []
    for number, models in enumerate(zip(*runs, strict=True)):
        models = models if number else [{**of, **store["first"]} for of in models]
        cells = [[of[suite][f"{share}_strict_percent"] for of in models if suite in of] for suite, share in SHARES]
        measures = [of["measures"] for of in models]
        cells += [[100 * of["ranker_win_rate"] for of in measures if "ranker_win_rate" in of]]
        shown = [f"{statistics.mean(values):.1f}%" if values else "" for values in cells]
        lines.append([str(number), *shown, f"{statistics.mean(of['base_perplexity'] for of in measures):.2f}"])
    return table(MEANS, lines)


def kinds_table(first: Figures, lasts: Sequence[Figures]) -> str:
    """Of each kind of IFEval's instructions: how often the first model and the last models follow it, on the mean."""
    lines = []
    for kind, (number, before) in first["kinds"].items():
        after = statistics.mean(one["kinds"][kind][1] for one in lasts)
        lines.append((after - before, [kind, str(number), f"{before:.0f}", f"{after:.0f}"]))
    head = ("kind", "instructions", "first model, %", "last model, %")
    return table(head, [line for _, line in sorted(lines, reverse=True)])


def page(store: Figures) -> str:
    """ifeval-smollm2.md, of what ifeval-smollm2.json holds."""
    lines, held_out, lasts, first = [], [], [], store["first"]
    for seed, run in store["seeds"].items():
        for number, model in enumerate(run["models"]):
            names = ["", f"iteration {number}"] if number else [seed, "first model"]
            held_out.append([*names, *held_out_cells(model["measures"])])
            if not number or "ifeval" in model:
                lines.append([*names, *suite_cells(model if number else first)])
        if "kinds" in run["models"][-1]:
            lasts.append(run["models"][-1])
    minutes, took = "", [run["minutes"] for run in store["seeds"].values() if run["minutes"]]
    if took:
        median = f"the median of {len(took)}, " if len(took) > 1 else ""
        minutes = f"A run takes {statistics.median(took):.0f} minutes, {median}without the two suites."
    of, bench = first["ifeval"], first["ifbench"]
    return f"""\
# SmolLM2-135M-Instruct on IFEval and IFBench

This page is for you if you want to know what a run does to a benchmark that others use too.

```bash
python benchmarks/ifeval_smollm2.py --seeds {" ".join(store["seeds"])}
```

It trains SmolLM2-135M-Instruct with `recipes/sppo/{RECIPE.name}` and several seeds, and lets each model answer
IFEval and IFBench: greedily, with at most {SUITES["ifeval"]} tokens an answer. All shares are strict.

{table(HEAD, lines)}

- *prompts*: of IFEval's {of["prompts"]}, the share of which all instructions are followed. *instructions*: of all
  {of["instructions"]} single ones. Errors are standard errors.
- *gain*: of instructions, over the first model, with the standard error of the prompts' differences. It does not hold
  what another seed would change.
- *first half*, *second half*: the share of instructions of every second prompt. Only the first half was looked at to
  choose settings.
- *cut*: IFEval's answers that reached {SUITES["ifeval"]} tokens. Most of them say the same thing again and again.
- *IFBench*: of {bench["prompts"]} prompts, the share of the {bench["instructions"]} instructions. Neither IFEval nor
  the training prompts have their kinds.

The answers to the run's own held-out prompts, 96 with 4 answers each, with the columns of [results.md](results.md):

{table(HELD_OUT, held_out)}

The model's card says {CARD}, the mean of prompts and instructions; here it is {_mean_of_both(of):.1f}.
{store["origin"]}

{minutes}

## By kind of instruction

Strict, {"of one seed" if len(lasts) == 1 else f"the mean of {len(lasts)} seeds"}.

{kinds_table(first, lasts) if lasts else ""}
"""


def load_store(path: Path, model: Path, questions: dict[str, str]) -> Figures:
    """The figures so far. Raises UsageError where they are of another recipe, precision or first model, of other
    training prompts or rules of what is better, or of other `questions`: a file for each suite, empty for the suite's.
    """
    mine = {
        "recipe": yaml.safe_load(RECIPE.read_text(encoding="utf-8")),
        "prompts": PROMPTS,
        "model": open_policy(str(model)).identity(),
        "questions": {suite: digest(Path(file)) if file else "" for suite, file in questions.items()},
        "precision": fast(),
        "rules": digest(ROOT / "examples/smollm2/many_kinds.py"),
    }
    store = read_json(path) if path.exists() else {**mine, "seeds": {}}
    if differ := [key for key, value in mine.items() if store.get(key) != value]:
        raise UsageError(f"{path} has the figures of another {' and '.join(differ)}; move it away, or --output_dir")
    source = model / "source.json"
    came = read_json(source)["from"] if source.exists() else ""
    store["origin"] = f"These weights come from {came}." if came else ""
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("docs"), help="%(default)s")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/ifeval-smollm2"), help="%(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], help="%(default)s")
    parser.add_argument("--ifeval", default="", help="a file of IFEval's prompts, where the Hub cannot be reached")
    parser.add_argument("--ifbench", default="", help="the same of IFBench's (the package has them)")
    args = parser.parse_args()
    work, questions = args.work_dir.absolute(), {"ifeval": args.ifeval, "ifbench": args.ifbench}
    for directory in (work, args.output_dir):
        directory.mkdir(parents=True, exist_ok=True)
    model = work / "SmolLM2-135M-Instruct"
    run_command([sys.executable, "scripts/make_smollm2.py", *flags(output_dir=model)], work / "model.log")
    written = args.output_dir / "ifeval-smollm2.json"
    store = load_store(written, model, questions)

    if "first" not in store:
        for suite in SUITES:
            evaluate(suite, model, work / "first", questions[suite])
        store["first"] = figures_of(work / "first", None)
    for seed in args.seeds:
        run = work / str(seed)
        train(run, model, seed)
        for number in range(ITERATIONS, 0, -1):  # the last model first: it says most
            for suite in SUITES if number == ITERATIONS else ("ifeval",):
                evaluate(suite, run / f"iter{number}/model", run / f"iter{number}", questions[suite])
            store["seeds"][str(seed)] = read_run(run, store["first"])
            write_json(written, store)
            (args.output_dir / "ifeval-smollm2.md").write_text(page(store), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
