"""The second judge and the user's measure, looked at before a run starts: the report needs them."""

from __future__ import annotations

from sppo.evaluation.match import judges, naming, shown
from sppo.evaluation.measures import ask, refuse_taken
from sppo.preflight.facts import Machines, Run
from sppo.preflight.findings import Look, ok
from sppo.preflight.ranking import fetch_ranker, try_ranker
from sppo.rankers import TRIAL
from sppo.rankers.function import load_function
from sppo.recipe import Recipe
from sppo.schema import prompt_text


def check_judge(run: Run, machines: Machines) -> Look[None]:
    """The same looks as at the ranker: it is fetched, and asked where that does not take long."""
    for judge in judges(run.recipe).values():
        if judge is not run.recipe:
            told = f"--judge {shown(judge)}"
            with naming(judge):
                found = yield from fetch_ranker(judge, told)
            yield from try_ranker(run, found, machines, told, told)


def check_measure(recipe: Recipe) -> Look[None]:
    name = recipe.measure
    if not name:
        return
    prompt, answer, _ = TRIAL
    said = ask(load_function(name, "--measure"), name, prompt_text(prompt), answer)
    refuse_taken(said, name)
    yield ok(f"--measure {name} answers for a trial answer ({', '.join(said) or 'nothing'})")
