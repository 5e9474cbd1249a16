"""From P(y_i > y_j) to win rates against the policy, and to the best and the worst response of each prompt.

As in preference.py, C and P are (N, K, K) for N prompts with K responses each.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sppo.method import preference
from sppo.method.preference import Array, mean_scores, paper_probability

_DIGITS = 12  # of what responses are ordered by


class Compared(NamedTuple):
    """What is made of N prompts' logits: those of `among_answers`, P (N, K, K) both, and what responses are ordered by,
    (N, K): `ordering_score`, and -inf for a response without an answer.
    """

    logits: Array
    probability: Array
    order: Array


def compare(logits: Array, answered: NDArray[np.bool_], estimator: str) -> Compared:
    """P and the order of responses, of which those without an answer are behind all that have one.

    logits: (N, K, K); answered: (N, K), whether a response has an answer. estimator: released or paper.
    """
    logits = among_answers(logits, answered, estimator)
    probability = over_no_answer(preference.probability(logits, estimator), answered)
    return Compared(logits, probability, np.where(answered, ordering_score(logits, estimator), -np.inf))


def among_answers(logits: Array, answered: NDArray[np.bool_], estimator: str) -> Array:
    """Logits of which the estimator makes what it would make of a prompt's A responses with an answer alone.

    (N, K, K), answered (N, K) -> (N, K, K). 0 where one of two responses has none. The score of `released` is a mean
    over all K, so what is left is K / A times as large there.
    """
    both = answered[:, :, None] & answered[:, None, :]
    count = np.maximum(answered.sum(-1), 1)[:, None, None]  # A
    return np.where(both, logits, 0) * (answered.shape[-1] / count if estimator == "released" else 1)


def over_no_answer(probability: Array, answered: NDArray[np.bool_], others: NDArray[np.bool_] | None = None) -> Array:
    """P where some responses have no answer, because their thought did not end: (N, K, K), (N, K) -> (N, K, K).

    others: (N, M), the same of the responses that P, (N, K, M), compares with; None: they are the same responses.

    That an answer beats none is certain: P is 1, and 0 the other way round; of two without one it is 1/2. So all
    win rates stay between 0 and 1, P_ij + P_ji is 1, and a response without an answer is behind each that has one. P is
    set and no logit, so nothing is infinite, and neither a temperature nor a length penalty changes it.
    """
    first, second = answered[:, :, None], (answered if others is None else others)[:, None, :]
    certain = 0.5 + 0.5 * (first.astype(np.float64) - second)
    return np.where(first & second, probability, certain)


def win_rates(probability: Array) -> Array:
    """P(y_i > pi_t | x), estimated by (1/K) sum_j P(y_i > y_j), (N, K, K) -> (N, K): the paper, section 4.

    The K responses are draws from pi_t. The sum has j = i too, with 1/2.
    """
    return probability.mean(-1)


def ordering_score(logits: Array, estimator: str) -> Array:
    """The number by which the best and the worst response are picked, (N, K, K) -> (N, K).

    For `paper` it is the win rate. For `released` it is the score s_i: win rates put the responses into the same
    order, but where scores are far apart the sigmoids round to 1 and tie. Both as shares of the prompt's largest and
    without their last digits, in which a sum differs when its terms come in another order: rock, paper and scissors are
    equally good.
    """
    scores = mean_scores(logits) if estimator == "released" else win_rates(paper_probability(logits))
    largest = np.abs(scores).max(-1, keepdims=True)
    return (scores / np.where(largest > 0, largest, 1)).round(_DIGITS)


def best_and_worst(scores: Array) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The paper's y_w and y_l: indices (N,) of the highest and of the lowest of (N, K); the first one wins a tie."""
    return scores.argmax(-1), scores.argmin(-1)


def random_other(chosen: NDArray[np.intp], draws: NDArray[np.uint64], k: int) -> NDArray[np.intp]:
    """One of the K - 1 responses beside each prompt's chosen one, (N,). draws: (N,), random 64-bit numbers."""
    other = (draws % np.uint64(k - 1)).astype(np.intp)
    return other + (other >= chosen)


def two_deviations_below(scores: Array, chosen: NDArray[np.intp]) -> NDArray[np.intp]:
    """The response, not the chosen one, whose score is nearest to mean - 2 standard deviations: (N, K), (N,) -> (N,).

    arXiv 2502.16825: best against worst gets worse as K grows, because the worst of many is an accident. The
    deviation is that of the K scores themselves, so no score of K <= 5 is below it, and it picks the worst there. The
    unit and the zero of the scores do not matter. The first one wins a tie. A response without an answer has no score
    (NaN) and is picked where there is no other.
    """
    has_score = np.isfinite(scores)
    aim = scores.mean(-1, keepdims=True, where=has_score) - 2 * scores.std(-1, keepdims=True, where=has_score)
    apart = np.where(has_score, np.abs(scores - aim), np.finfo(np.float64).max)
    apart[np.arange(len(scores)), chosen] = np.inf
    return apart.argmin(-1)


def penalised(logits: Array, lengths: Array, penalty: float) -> Array:
    """Logits that hold a response's length against it; not in the paper. (N, K, K), (N, K) -> (N, K, K).

    C'_ij = C_ij - L (n_i - n_j) / n, with L for the penalty and n for the prompt's mean length. A pair's log-odds
    (C_ij - C_ji) / 2 fall by L for each mean length that i is longer than j, and PairRM's score s_i falls by
    2 L (n_i / n - 1), so one formula serves both estimators. Responses of equal length keep their preference, and the
    unit of length does not matter. A prompt whose responses are all empty keeps its logits.
    """
    mean = lengths.mean(-1)[:, None, None]  # (N, 1, 1)
    longer = (lengths[:, :, None] - lengths[:, None, :]) / np.where(mean > 0, mean, 1)  # (N, K, K)
    return logits - penalty * longer
