"""From the ranker's logits to win rates: the two estimators, and what they say about a data set.

Everything is vectorised over prompts: C and P are (N, K, K), row i against column j.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mean_scores(logits: Array) -> Array:
    """s_i = (1/K) sum_j (C_ij - C_ji), (N, K, K) -> (N, K): PairRM's own score of a response."""
    return (logits - logits.swapaxes(-1, -2)).sum(-1) / logits.shape[-1]


def released_probability(scores: Array) -> Array:
    """P_ij = sigmoid(s_i - s_j), (N, K) -> (N, K, K): the released scripts' estimator, transitive by construction."""
    return sigmoid(scores[..., :, None] - scores[..., None, :])


def paper_probability(logits: Array) -> Array:
    """P_ij = sigmoid((C_ij - C_ji) / 2), (N, K, K) -> (N, K, K): from the pair alone, as in the paper, section 4.

    Keeps preferences that go round in a circle.
    """
    return sigmoid((logits - logits.swapaxes(-1, -2)) / 2)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def probability(logits: Array, estimator: str) -> Array:
    """P of the named estimator: `released` or `paper`. The diagonal is 1/2 and P + P^T = 1."""
    return released_probability(mean_scores(logits)) if estimator == "released" else paper_probability(logits)


def best_and_worst(win_rates: Array) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(N, K) -> indices (N,) of the highest and lowest win rate; the first wins a tie."""
    return win_rates.argmax(-1), win_rates.argmin(-1)


def intransitive_share(probability: Array) -> float:
    """Share of the triples of responses with i > j > k > i, over all (N, K, K). NaN if K < 3 or N = 0."""
    n, k, _ = probability.shape
    triples = n * k * (k - 1) * (k - 2) // 6
    beats = (probability > 0.5).astype(np.float64)
    cycles = np.trace(beats @ beats @ beats, axis1=-2, axis2=-1).sum() / 3  # each circle is counted from its 3 starts
    return float(cycles / triples) if triples else float("nan")


def position_bias(logits: Array) -> float:
    """Mean of sigmoid(C_ij) + sigmoid(C_ji) - 1 over pairs: above 0, the ranker favours what it is shown first."""
    k = logits.shape[-1]
    off = ~np.eye(k, dtype=bool)
    both = sigmoid(logits) + sigmoid(logits.swapaxes(-1, -2)) - 1
    return float(both[..., off].mean()) if logits.size else float("nan")
