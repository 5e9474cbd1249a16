"""One suite for one model: checks before the work, the suite itself, and its figures in the run's summary."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from pathlib import Path
from types import ModuleType

from sppo.command.errors import SPPOError, UsageError
from sppo.command.importing import is_installed
from sppo.evaluation.report import update_summary
from sppo.evaluation.suites.suite import Judge, Order, is_iteration
from sppo.models.policy import policy_of
from sppo.recipe import Recipe
from sppo.store.files import exclusive, read_json

_PACKAGE = {"alpaca_eval": "alpaca_eval", "mt_bench": "openai", "open_llm": "lm_eval"}


def _suite(args: argparse.Namespace) -> ModuleType:
    if not is_installed(_PACKAGE[args.suite]):
        raise SPPOError(f"--suite {args.suite} needs the package {_PACKAGE[args.suite]}: pip install '.[eval]'")
    return importlib.import_module(f"sppo.evaluation.suites.{args.suite}")


def _order(recipe: Recipe, args: argparse.Namespace, out: Path, judge: str) -> Order:
    recipe = dataclasses.replace(recipe, pairs=1)
    asked = (args.questions, args.judge_url, args.judge_model or judge)
    return Order(args.suite, recipe, out, *asked, args.overwrite, args.leaderboard, tuple(args.mixture))


def fetch(recipe: Recipe, args: argparse.Namespace) -> None:
    """Get the suite's questions into the Hub's cache, and nothing else."""
    suite = _suite(args)
    found = suite.questions(_order(recipe, args, Path(), suite.JUDGE))
    print(f"evaluate: the questions of {args.suite} are here ({len(found)}); HF_HOME says where")


def evaluate(recipe: Recipe, args: argparse.Namespace) -> None:
    """Run a suite, print its figures, and put them into the run's summary.json.

    Raises UsageError and SPPOError before any work for what can be known then: a model without a chat template, no
    place to write to, questions that lack something, a judge that is away.
    """
    if not recipe.model:
        raise UsageError("--model is missing: which model the suite is for")
    model = Path(recipe.model).absolute()
    if args.mixture and not args.output_dir:
        raise UsageError("--output_dir is missing: a mixture is no model of a run, beside which its figures would go")
    if not args.output_dir and not is_iteration(model):
        raise UsageError(f"--output_dir is missing: {recipe.model} is no model of a run (<run>/iter<i>/model)")
    home = args.output_dir or model.parent
    suite = _suite(args)
    order = _order(recipe, args, home / "suites" / args.suite, suite.JUDGE)
    for one in order.recipes:
        policy_of(one).tokenizer()
    asked = suite.questions(order)
    judge = Judge(order) if suite.JUDGE else None
    if judge:
        judge.refuse_another()
    figures = order.out / "figures.json"
    if judge and (order.overwrite or not figures.exists()):
        judge.server.check_serves(order.judge_model)
    order.out.mkdir(parents=True, exist_ok=True)
    with exclusive(order.out):
        suite.run(order, asked, judge)
    found = read_json(figures)
    print(f"\n{args.suite}, {order.name}" + (f", judged by {order.judge_model}" if judge else ""))
    for name, value in found["figures"].items():
        print(f"  {name}: {value:g}")
    print(f"  written: {figures}")
    if home == model.parent and not args.mixture:
        update_summary(home.parent)
