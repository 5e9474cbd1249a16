"""A prompt's logits as win rates, the chosen and the rejected response, and whether the pair teaches anything."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sppo.method import preference, winrates
from sppo.method.preference import Array
from sppo.pairing.join import hash64
from sppo.recipe import Recipe


class Choice(NamedTuple):
    """Of N prompts with K responses each. rates: p, p_win and p_lose of the pair; odds: of the ranker alone."""

    odds: Array  # (N, K, K)
    probability: Array  # (N, K, K)
    win_rates: Array  # (N, K)
    chosen: NDArray[np.intp]  # (N,)
    rejected: NDArray[np.intp]  # (N,)
    rates: Array  # (3, N)
    is_equal: NDArray[np.bool_]  # (N,): both have the same score
    is_narrow: NDArray[np.bool_]  # (N,): their win rates are less than --min_margin apart


def choose(logits: Array, lengths: Array, answered: NDArray[np.bool_], ids: list[str], recipe: Recipe) -> Choice:
    """Win rates and pairs, by --estimator, --length_penalty and --select. logits: after --ranker_temperature.

    logits: (N, K, K), lengths: (N, K), of answers; answered: (N, K), whether a response has an answer: one that has
    none is behind all that have; ids: the prompts' ids. --estimator is not `auto` here.
    """
    row = np.arange(len(logits))
    if recipe.length_penalty:
        mean = lengths.mean(-1, keepdims=True, where=answered | ~answered.any(-1, keepdims=True))
        judged = winrates.penalised(logits, np.where(answered, lengths, mean), recipe.length_penalty)
    else:
        judged = logits
    judged, probability, order = winrates.compare(judged, answered, recipe.estimator)
    win_rates = winrates.win_rates(probability)
    w, l = winrates.best_and_worst(order)  # noqa: E741 - the paper's
    if recipe.select == "best_random":
        # by seed and prompt alone, so that shards and other prompts decide nothing
        draws = hash64(f"{recipe.seed} rejected {prompt_id}" for prompt_id in ids)
        l = winrates.random_other(w, draws, logits.shape[-1])  # noqa: E741
    elif recipe.select == "best_2sd":
        scores = np.where(answered | ~answered.any(-1, keepdims=True), preference.mean_scores(judged), np.nan)
        l = winrates.two_deviations_below(scores, w)  # noqa: E741

    rates = np.stack([probability[row, w, l], win_rates[row, w], win_rates[row, l]])
    is_equal = np.asarray(order[row, w] == order[row, l])
    is_narrow = np.asarray(rates[1] - rates[2] < recipe.min_margin)
    odds = preference.log_odds(logits, recipe.estimator)
    return Choice(odds, probability, win_rates, w, l, rates, is_equal, is_narrow)
