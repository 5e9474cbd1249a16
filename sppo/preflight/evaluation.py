"""Checks before a run: the second judge and the user's measure, which the report needs."""

from __future__ import annotations

from sppo.evaluation.match import judges
from sppo.evaluation.measures import ask, refuse_taken
from sppo.preflight.facts import Run
from sppo.preflight.findings import Findings, ok
from sppo.rankers import TRIAL, ask_trial
from sppo.rankers.function import FunctionRanker, load_function
from sppo.schema import prompt_text


def check_judge(run: Run) -> Findings:
    """The second judge, where a report is asked for."""
    name = run.recipe.judge
    if not name or not any(i.report for i in run.left):
        return
    judges(run.recipe)  # raises where it is called as the ranker is
    (answer,) = ask_trial(FunctionRanker(load_function(name, "--judge"), name), [TRIAL], f"--judge {name}")
    yield ok(f"--judge {name} answers a trial pair ({answer:.3g})")


def check_measure(run: Run) -> Findings:
    """The user's measure, where a report is asked for."""
    name = run.recipe.measure
    if not name or not any(i.report for i in run.left):
        return
    prompt, answer, _ = TRIAL
    said = ask(load_function(name, "--measure"), name, prompt_text(prompt), answer)
    refuse_taken(said, name)
    yield ok(f"--measure {name} answers for a trial answer ({', '.join(said) or 'nothing'})")
