"""Preference models behind one small interface: a logit for each (prompt, a, b). One module each.

`--ranker_backend reward-model` is the module reward_model.py in here. A further backend is one further file, and one
further choice of `ranker_backend` in sppo/recipe.py. It has

    fetch(recipe) -> Path | str    gets what it needs (weights into the cache, a server's word), says where that is
    identity(recipe) -> dict       what decides its logits; a ranking made under another identity is not kept
    load(recipe) -> Ranker         ready to answer
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol, TypeVar

import numpy as np

from sppo.command.errors import SPPOError
from sppo.command.stopping import end_if_asked, heard
from sppo.method.preference import Array, estimator_for
from sppo.recipe import Recipe, backend_name
from sppo.schema import Message, Pair
from sppo.store.rankings import backend_of

Row = TypeVar("Row")

# what a ranker is asked to see whether it answers
TRIAL: Pair = ([{"role": "user", "content": "What is two plus two?"}], "Four.", "I do not like questions.")


class Ranker(Protocol):
    """A preference model that is ready to answer.

    `batched`: it answers pairs in batches, so that a logit's last bits depend on the pairs beside it.
    """

    batched: bool

    def logits(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float]]:
        """(index in `pairs`, logit) of every pair, in the order in which the answers come.

        The logit is above 0 where the response shown first is better; it is not finite where there is no answer.
        """
        ...

    def count_cut(self, prompt: list[Message], responses: Sequence[str]) -> int:
        """How many texts, of the prompt and its responses, the ranker reads only in part."""
        ...


def backend(recipe: Recipe) -> ModuleType:
    """The module that the recipe's ranker_backend names."""
    return importlib.import_module(f"sppo.rankers.{backend_name(recipe).replace('-', '_')}")


def estimator_of(recipe: Recipe, rankings: list[Path]) -> str:
    """--estimator; for `auto` the one that suits what made the rankings. Raises UsageError as backend_of."""
    return estimator_for(backend_of(rankings)) if recipe.estimator == "auto" else recipe.estimator


def ask_trial(ranker: Ranker, pairs: list[Pair], which: str) -> list[float]:
    """The ranker's logits of trial pairs. Raises SPPOError, which names `which`, where one is not a finite number."""
    try:
        answers = dict(ranker.logits(pairs))
    except SPPOError as error:
        raise SPPOError(f"{which} fails on a trial pair: {error}") from None
    if not all(map(math.isfinite, answers.values())):
        raise SPPOError(f"{which} gives {list(answers.values())} for a trial pair, not finite numbers")
    return [answers[i] for i in range(len(pairs))]


def pending_chunks(
    rows: Iterable[Row], is_done: Callable[[Row], bool], size: int, load: Callable[[], Ranker]
) -> Iterator[tuple[Ranker, list[Row]]]:
    """(the ranker, rows to ask it about), chunk by chunk of `size` rows. The ranker is loaded for the first of them.

    Rows that are done are left out. But a partly done chunk is asked again whole for rankers that batch: neighbours in
    a batch change a logit's last bits, and after a kill the logits are to be the same as without it.
    Raises KeyboardInterrupt between two chunks where the run is asked to stop.
    """
    ranker, left = None, iter(rows)
    while chunk := list(itertools.islice(left, size)):
        end_if_asked()
        missing = [row for row in chunk if not is_done(row)]
        if missing:
            if ranker is None:
                with heard():
                    ranker = load()
            yield ranker, chunk if ranker.batched else missing


def log_odds(ranker: Ranker, pairs: Sequence[Pair]) -> Array:
    """Log-odds that the first of each pair beats the second, (n,): half the difference of the logits of both orders.

    0 without asking where the two are the same text, NaN where an answer is not finite.
    """
    # each pair of different texts, and behind it the same pair the other way round
    asked = [i for i, (_, a, b) in enumerate(pairs) if a != b]
    both_orders: list[Pair] = []
    for i in asked:
        prompt, a, b = pairs[i]
        both_orders += [(prompt, a, b), (prompt, b, a)]

    logits = np.full(len(both_orders), np.nan)
    for index, logit in ranker.logits(both_orders):
        logits[index] = logit if math.isfinite(logit) else math.nan
    found = np.zeros(len(pairs))
    found[asked] = (logits[0::2] - logits[1::2]) / 2
    return found
