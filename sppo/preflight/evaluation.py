"""The second judge and the user's measure, looked at before a run starts: the report needs them."""

from __future__ import annotations

from sppo.evaluation.match import judges
from sppo.evaluation.measures import ask, refuse_taken
from sppo.preflight.findings import Look, ok
from sppo.rankers import TRIAL, ask_trial
from sppo.rankers.function import FunctionRanker, load_function
from sppo.recipe import Recipe
from sppo.schema import prompt_text


def check_judge(recipe: Recipe) -> Look[None]:
    name = recipe.judge
    if not name:
        return
    judges(recipe)  # raises where it is called as the ranker is
    (answer,) = ask_trial(FunctionRanker(load_function(name, "--judge"), name), [TRIAL], f"--judge {name}")
    yield ok(f"--judge {name} answers a trial pair ({answer:.3g})")


def check_measure(recipe: Recipe) -> Look[None]:
    name = recipe.measure
    if not name:
        return
    prompt, answer, _ = TRIAL
    said = ask(load_function(name, "--measure"), name, prompt_text(prompt), answer)
    refuse_taken(said, name)
    yield ok(f"--measure {name} answers for a trial answer ({', '.join(said) or 'nothing'})")
