"""From the ranker's logits to the probability that one response is preferred to another.

C is (N, K, K) for N prompts with K responses each: C_ij is the ranker's logit that i is better than j when i is shown
first. The two orders of a pair need not agree, so both estimators use the difference C_ij - C_ji.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def paper_probability(logits: Array) -> Array:
    """P(y_i > y_j) = sigmoid((C_ij - C_ji) / 2), (N, K, K) -> (N, K, K): the paper, section 4.

    Only the pair itself decides, so a circle (A beats B, B beats C, C beats A) stays one.
    """
    return sigmoid((logits - logits.swapaxes(-1, -2)) / 2)


def mean_scores(logits: Array) -> Array:
    """s_i = (1/K) sum_j (C_ij - C_ji), (N, K, K) -> (N, K): PairRM's own score of a response."""
    return (logits - logits.swapaxes(-1, -2)).sum(-1) / logits.shape[-1]


def released_probability(scores: Array) -> Array:
    """P(y_i > y_j) = sigmoid(s_i - s_j), (N, K) -> (N, K, K): the scripts that were released with the paper.

    A single score a response, as in the Bradley-Terry model: no circle is left.
    """
    return sigmoid(scores[..., :, None] - scores[..., None, :])


def probability(logits: Array, estimator: str) -> Array:
    """P of the named estimator, `released` or `paper`: (N, K, K) -> (N, K, K), with P_ii = 1/2 and P_ij + P_ji = 1."""
    return released_probability(mean_scores(logits)) if estimator == "released" else paper_probability(logits)


def log_odds(logits: Array, estimator: str) -> Array:
    """log P_ij / P_ji of the named estimator, (N, K, K) -> (N, K, K): also where P rounds to 0 or 1."""
    if estimator == "released":
        scores = mean_scores(logits)
        return scores[..., :, None] - scores[..., None, :]
    return (logits - logits.swapaxes(-1, -2)) / 2


def estimator_for(backend: str) -> str:
    """The estimator that suits a `ranker_backend`: `released` for a PairRM, `paper` for everything else.

    s_i is a mean of C_ij - C_ji, and a PairRM's users know it on that scale. But where C_ij = r_i - r_j, s_i - s_j is
    2 (r_i - r_j): twice the log-odds that a reward model was trained for.
    """
    return "released" if backend in ("pairrm", "llm-blender") else "paper"


def score_and_circle(logits: Array) -> tuple[Array, Array]:
    """The mean log-odds A_ij = (C_ij - C_ji) / 2 of a prompt as r_i - r_j + R_ij: r (N, K) and R (N, K, K).

    r is the least-squares fit of a score: the mean over j of A_ij. R is what no score explains. Its rows sum to 0, and
    all of it goes round in circles: on a complete graph this is the orthogonal split of Hodge theory (arXiv 0811.1067),
    so that |A|^2 = |r_i - r_j|^2 + |R|^2. A reward model has R = 0; rock, paper, scissors has r = 0.
    """
    odds = (logits - logits.swapaxes(-1, -2)) / 2
    scores = odds.mean(-1)
    return scores, odds - (scores[..., :, None] - scores[..., None, :])
