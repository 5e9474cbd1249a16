"""What a ranker's logits mean: the score of a response, and the probability behind a logit.

Everything is vectorised over prompts: C is (N, K, K), row i against column j, i shown first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mean_scores(logits: Array) -> Array:
    """s_i = (1/K) sum_j (C_ij - C_ji), (N, K, K) -> (N, K): PairRM's own score of a response."""
    return (logits - logits.swapaxes(-1, -2)).sum(-1) / logits.shape[-1]


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def paper_probability(logits: Array) -> Array:
    """P_ij = sigmoid((C_ij - C_ji) / 2), (N, K, K) -> (N, K, K): from the pair alone, as in the paper, section 4.

    Keeps preferences that go round in a circle.
    """
    return sigmoid((logits - logits.swapaxes(-1, -2)) / 2)


def released_probability(scores: Array) -> Array:
    """P_ij = sigmoid(s_i - s_j), (N, K) -> (N, K, K): the released scripts' estimator, transitive by construction."""
    return sigmoid(scores[..., :, None] - scores[..., None, :])


def probability(logits: Array, estimator: str) -> Array:
    """P of the named estimator: `released` or `paper`. The diagonal is 1/2 and P + P^T = 1."""
    return released_probability(mean_scores(logits)) if estimator == "released" else paper_probability(logits)


def strength(logits: Array, estimator: str) -> Array:
    """What the best response has most of, and the worst least, (N, K, K) -> (N, K).

    Win rates; with the released estimator its scores, which put responses into the same order: sigmoids saturate,
    scores do not.
    """
    return mean_scores(logits) if estimator == "released" else paper_probability(logits).mean(-1)
