"""One iteration of run_sppo_smollm2.sh against a script of vLLM and trl: IFEval of both, and minutes of both.

    python benchmarks/peer_smollm2.py --output_dir docs
    python benchmarks/peer_smollm2.py --output_dir docs --questions ifeval_input_data.jsonl    without the Hub

Both have the same first model, prompts, ranker, K, batches and learning rate. The peer is benchmarks/trl_smollm2.py:
vLLM draws once, and trl's DPOTrainer trains on these pairs, with `sppo_hard` and with `sigmoid`. scripts/evaluate.sh
gives the IFEval figures of all. It is for a CPU that does nothing else meanwhile.
Reads   SmolLM2-135M-Instruct, from the Hub or PyPI, or --model; IFEval's questions, and NLTK's data, which
        docs/evaluation.md is about.
Writes  <output_dir>/peer-smollm2.md; the models, the logs and the answers in <work_dir>. Stopped, the same command goes
        on: what is done is kept, and a part that was timed begins again.
It needs vLLM's CPU build, trl, and what IFEval needs: bash scripts/install.sh tests.
Exit codes: 0 done, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow.parquet as pq
from ifeval_smollm2 import PROMPTS, RECIPE
from methods_smollm2 import run_command
from trl_smollm2 import LOSSES, read_recipe

from sppo.cli import flags
from sppo.command.errors import UsageError, run_main
from sppo.models.policy import open_policy
from sppo.models.vllm import vllm_dtype
from sppo.recipe import Recipe
from sppo.store.files import digest, read_json, write_json
from sppo.store.manifest import version_of, versions

BFLOAT16 = {"accelerate_config": "cpu_bf16"}  # what --dtype bfloat16 brings along for our training
PACKAGES = ("trl", "lm_eval")  # beside those of every manifest
HEAD = (
    "| | IFEval, prompts, % | instructions, % | prompts, less the first model | generation, s | training, s "
    "| minutes in all | against ours | steps | pairs |"
)
NOTES = """\
- IFEval's shares are the strict ones, with a standard error. *Less the first model* has the error of the differences
  of the same prompts. None of the errors holds what another seed would change.
- Seconds are those of whole commands, with the start of Python. *Generation* holds ranking and pairing. Of this project
  the minutes also hold the preflight and the report. trl's two losses train on the same responses, which were drawn
  once; the seconds of that are in both rows.

## What the peer does

It is `benchmarks/trl_smollm2.py`: one call of vLLM's `LLM.chat`, which is `LLM.generate` behind the chat template; the
best and the worst response to each prompt, by the recipe's ranker; and trl's `DPOTrainer`. Besides the recipe's
settings and precision, four things are not the defaults. They are meant to help the peer:

- vLLM's engine runs in the script's own process. By default it is another process, which leaves one core idle.
- vLLM does not compile the model (`enforce_eager`), as in this project. By default it does that before it draws.
- vLLM may take 0.4 of the memory. It does not start with the default of 0.92 where less is free.
- trl computes the reference's log-probs before the training (`precompute_ref_log_probs`).

## What differs besides speed

- trl's `sppo_hard` takes the chosen response's win rate for 1 and the rejected one's for 0. With the log-ratios a and b
  of the two it is (a − 1 / (2 beta))² + (b + 1 / (2 beta))². Ours is ½ (a − (p − ½) / beta)² + ½ (b − (q − ½) / beta)²,
  where p and q are the win rates against all K responses of the policy.
- `sigmoid` is DPO. It has the recipe's beta, as in [methods-smollm2.md](methods-smollm2.md), so that the loss alone
  differs. trl's default is 0.1. Beta and the learning rate were chosen for `sppo`, and for neither of trl's losses.
- This project trains on the tokens that were drawn. trl tokenises the text again, and ends the turn behind each
  response, also behind one that was cut at the longest length.
- Each draws its own responses, with seeds of its own. So the pairs are others, and so may be their number. Both leave
  out a prompt whose responses are all equally good, or whose best or worst one is blank.
"""


@dataclass
class Trained:
    """A model after one iteration, and what that took."""

    name: str  # as the table says it
    model: Path
    generation: float  # seconds of drawing, ranking and pairing, with the start of the processes
    training: float  # seconds, with the start of the process
    seconds: float  # in all
    steps: int
    pairs: int


def measured(words: list[str], directory: Path) -> float:
    """Seconds that the command takes that makes this directory; it is run where they are not known yet.

    What a stopped try has left is deleted, so that the seconds are those of one try.
    """
    known, log = directory / "seconds.json", Path(f"{directory}.log")
    if not known.exists():
        print(f"peer_smollm2: {directory.name}; its log is {log}", flush=True)
        shutil.rmtree(directory, ignore_errors=True)
        log.unlink(missing_ok=True)
        began = time.monotonic()
        run_command(words, log)
        write_json(known, {"seconds": time.monotonic() - began})
    return read_json(known)["seconds"]


def ours(work: Path, common: dict[str, Any], prompts: Path) -> Trained:
    """One iteration of this project, by its own command."""
    run = work / "ours"
    words = ["bash", "scripts/run.sh", *flags(**common, prompts=prompts, iterations=1, split_prompts="false")]
    words += flags(evaluate="false", eval_prompts="", measure="", gpus="none", run_dir=run)
    words += flags(**(BFLOAT16 if common["dtype"] == "bfloat16" else {}))
    seconds = measured(words, run)
    log = Path(f"{run}.log").read_text(encoding="utf-8")
    stages = [re.findall(rf"=== iteration 1: {stage}: (\d+) s", log)[-1] for stage in ("generate", "train")]
    metrics = (run / "iter1/model/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Trained(
        name="this project, `sppo`",
        model=run / "iter1/model",
        generation=float(stages[0]),
        training=float(stages[1]),
        seconds=seconds,
        steps=json.loads(metrics[-1])["step"],
        pairs=pq.read_metadata(run / "iter1/data/train.parquet").num_rows,
    )


def theirs(work: Path, common: dict[str, Any], prompts: Path) -> list[Trained]:
    """The same by vLLM and trl: one drawing, and a training for each loss."""
    script, drawn = [sys.executable, "benchmarks/trl_smollm2.py"], work / "trl-pairs"
    generation = measured([*script, "draw", *flags(**common, prompts=prompts, output_dir=drawn)], drawn)
    pairs = drawn / "pairs.jsonl"
    made = []
    for loss in LOSSES:
        model = work / f"trl-{loss}"
        words = [*script, "train", *flags(**common, pairs=pairs, loss=loss, output_dir=model)]
        training = measured(words, model)
        made.append(
            Trained(
                name=f"vLLM and trl, `{loss}`",
                model=model,
                generation=generation,
                training=training,
                seconds=generation + training,
                steps=read_json(model / "trainer_state.json")["global_step"],
                pairs=len(pairs.read_text(encoding="utf-8").splitlines()),
            )
        )
    return made


def ifeval(work: Path, name: str, model: Path, args: argparse.Namespace) -> Path:
    """The directory with a model's IFEval figures and checked answers; evaluate.sh goes on where it was stopped."""
    out = work / "ifeval" / name
    found = out / "suites" / "ifeval"
    if not (found / "figures.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        print(f"peer_smollm2: IFEval of {name}; its log is {out}.log", flush=True)
        # the recipe is named, because of a run's model its own would be taken
        words = ["bash", "scripts/evaluate.sh", *flags(suite="ifeval", model=model, recipe=args.recipe, output_dir=out)]
        words += flags(gpus="none", dtype=args.dtype, **({"questions": args.questions} if args.questions else {}))
        run_command(words, Path(f"{out}.log"))
    return found


def followed(found: Path) -> np.ndarray:
    """Of each prompt, 1 where its answer follows all instructions strictly, else 0: (N,)."""
    lines = (found / "checked.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([float(all(json.loads(line)["strict"])) for line in lines])


def paired(found: Path, other: Path) -> str:
    """How many points more of the prompts one model follows than another, with the standard error of the difference.

    Both have answered the same prompts, so the error is that of the mean of the prompts' differences.
    """
    apart = 100 * (followed(found) - followed(other))  # (N,)
    error = apart.std(ddof=1) / np.sqrt(len(apart)) if len(apart) > 1 else np.nan
    return f"{apart.mean():+.1f} ± {error:.1f}"


def line(name: str, found: Path, first: Path, own: Trained | None, base: Trained) -> str:
    """A model's row. own: None for the first model; base: what minutes are compared with."""
    figures = read_json(found / "figures.json")["figures"]
    shares = [f"{figures[f'{kind}_strict_percent']:.1f}{_error(figures, kind)}" for kind in ("prompt", "instruction")]
    cells = [name, *shares, "" if own is None else paired(found, first)]
    if own is None:
        return f"| {' | '.join([*cells, *[''] * 6])} |"
    counts = [f"{own.generation:.0f}", f"{own.training:.0f}", f"{own.seconds / 60:.1f}"]
    counts += ["" if own is base else f"{own.seconds / base.seconds:.2f} ×", str(own.steps), str(own.pairs)]
    return f"| {' | '.join([*cells, *counts])} |"


def _error(figures: dict[str, float], kind: str) -> str:
    error = figures.get(f"{kind}_strict_standard_error")  # of one prompt there is none
    return "" if error is None else f" ± {error:.1f}"


def page(rows: list[str], command: str, origin: str, prompts: int, questions: int, recipe: Recipe) -> str:
    """peer-smollm2.md. rows: of the table; prompts, questions: how many there are."""
    known = {**versions(), **{name: version_of(name) for name in PACKAGES}}
    precision = "bfloat16" if recipe.dtype == "bfloat16" else "float32"
    named = "Versions: " + ", ".join(f"{name} {version}" for name, version in known.items() if version) + "."
    return "\n".join(
        [
            "# One iteration, against vLLM and trl",
            "",
            "This page is for you if you ask what this project does that a script of vLLM and trl does not.",
            "",
            *("```bash", command, "```"),
            "",
            f"SmolLM2-135M-Instruct, {prompts} prompts, K = {recipe.pairs}, up to {recipe.maxlen} tokens a response,",
            f"on {len(os.sched_getaffinity(0))} CPU cores, in {precision}, with one seed ({recipe.seed}).",
            *([f"The first model is from {origin}."] if origin else []),
            f"Batches of {recipe.global_batch_size} pairs, learning rate {recipe.learning_rate:g}, {recipe.optim}, and",
            f"beta {recipe.beta:g} for all losses. IFEval has {questions} prompts. `scripts/evaluate.sh` asks them and",
            "checks the answers in the same way for all models.",
            "",
            *(HEAD, "|---" * HEAD.count(" | ") + "|---|", *rows),
            "",
            NOTES,
            textwrap.fill(named, 120, break_on_hyphens=False),
            "",
        ]
    )


def make_prompts(work: Path, recipe: Recipe) -> Path:
    """The prompts of that seed's first iteration in benchmarks/ifeval_smollm2.py, as --split_prompts takes them."""
    made = [sys.executable, "scripts/make_instructions.py", *flags(output_dir=work / "prompts", seed=recipe.seed)]
    made += flags(kinds="many", train=PROMPTS * recipe.iterations)
    run_command(made, work / "prompts.log")
    lines = (work / "prompts/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path = work / "prompts-1.jsonl"
    path.write_text("".join(lines[:: recipe.iterations]), encoding="utf-8")
    return path


def refuse_others(work: Path, asked: dict[str, Any]) -> None:
    """Raise UsageError where the work directory holds what was made with something else: the two would be mixed."""
    known = work / "asked.json"
    if not known.exists():
        write_json(known, asked)
    if differ := [key for key, value in asked.items() if read_json(known).get(key) != value]:
        raise UsageError(f"--work_dir {work} holds work with another {', '.join(differ)}; name another directory")


def shown(args: argparse.Namespace) -> str:
    """The command, with the flags that change what is measured; of files the names alone."""
    recipe = None if args.recipe.resolve() == RECIPE else args.recipe
    given = {"recipe": recipe, "model": args.model, "prompts": args.prompts, "questions": args.questions}
    words = [f"--{key} {path.name}" for key, path in given.items() if path]
    return " ".join(["python benchmarks/peer_smollm2.py", *words, f"--dtype {args.dtype} --seed {args.seed}"])


def compare(args: argparse.Namespace, recipe: Recipe) -> str:
    """Everything that is not done yet; the page."""
    work = args.work_dir.absolute()
    work.mkdir(parents=True, exist_ok=True)
    first: Path = args.model or work / "SmolLM2-135M-Instruct"
    if not args.model:
        make = [sys.executable, "scripts/make_smollm2.py", *flags(output_dir=first)]
        run_command(make, work / "model.log")
    policy = open_policy(str(first))
    if args.dtype == "auto" and vllm_dtype(policy, cpu=True) != "float32":
        raise UsageError(f"--model {first} is not stored in float32: ours would draw in its precision, and the peer in "
                         "float32; pass --dtype bfloat16")  # fmt: skip
    prompts: Path = args.prompts or make_prompts(work, recipe)
    files = {"recipe": args.recipe, "prompts": prompts, "questions": args.questions}
    asked = {"seed": args.seed, "dtype": args.dtype, "model": policy.identity()}
    refuse_others(work, {**asked, **{key: digest(path) if path else "" for key, path in files.items()}})

    common = {"recipe": args.recipe, "model": first, "seed": args.seed, "dtype": args.dtype}
    made = [ours(work, common, prompts), *theirs(work, common, prompts)]
    models = {"first": first, "ours": made[0].model, **{one.model.name: one.model for one in made[1:]}}
    found = [ifeval(work, name, model, args) for name, model in models.items()]
    rows = [line("first model", found[0], found[0], None, made[0])]
    rows += [line(one.name, of, found[0], one, made[0]) for one, of in zip(made, found[1:], strict=True)]
    source = first / "source.json"
    return page(
        rows=rows,
        command=shown(args),
        origin=read_json(source)["from"] if source.exists() else "",
        prompts=len(prompts.read_text(encoding="utf-8").splitlines()),
        questions=len(followed(found[0])),
        recipe=recipe,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("docs"), help="%(default)s")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/peer-smollm2"), help="%(default)s")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="of both; %(default)s")
    parser.add_argument("--model", type=Path, help="the first model's directory (made: SmolLM2-135M-Instruct)")
    parser.add_argument("--prompts", type=Path, help="a .jsonl, all of it for the one iteration (made: those of the "
                        "first iteration of ifeval_smollm2.py)")  # fmt: skip
    parser.add_argument("--questions", type=Path, help="IFEval's questions, a .jsonl (the Hub's)")
    parser.add_argument("--seed", type=int, default=42, help="%(default)s")
    parser.add_argument("--dtype", choices=["auto", "bfloat16"], default="auto", help="of all (auto: float32)")
    args = parser.parse_args()
    for name in ("recipe", "model", "prompts", "questions"):
        if path := getattr(args, name):
            if not path.exists():
                raise UsageError(f"--{name} {path} is not there")
            setattr(args, name, path.absolute())
    made = compare(args, read_recipe(args.recipe, args.seed, args.dtype))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "peer-smollm2.md").write_text(made, encoding="utf-8")
    print(made)


if __name__ == "__main__":
    run_main(main)
