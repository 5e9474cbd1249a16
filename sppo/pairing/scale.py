"""Whether a ranker's logits are on a scale that SPPO can learn from: neither all at 0 and 1, nor all at 1/2."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sppo.method.preference import Array, sigmoid

CERTAIN, EVEN = 0.99, 0.01  # P beyond this, or 1 - P; how near to 1/2
_NEARLY_ALL = 0.9  # of the pairs
_USUAL = math.log(3)  # the log-odds of P = 3/4, where half of the pairs should be beyond, and half below
_PER_DOUBLING, _DOUBLINGS = 16, 40  # bins of the histogram of |log-odds|, from 2^-40 to 2^40


class Scale:
    """How far P of all pairs {i, j} is from 0, 1/2 and 1, gathered batch by batch in memory that does not grow."""

    def __init__(self) -> None:
        self.pairs = self.certain = self.even = 0
        self._tied = 0  # pairs with log-odds of 0
        self._sizes = np.zeros(2 * _DOUBLINGS * _PER_DOUBLING + 1, dtype=np.int64)  # of the others: |log-odds|

    def add(self, odds: Array) -> None:
        """The ranker's log-odds, (N, K, K), without --length_penalty, which no temperature changes."""
        first, second = np.triu_indices(odds.shape[-1], 1)
        sizes = np.abs(odds[:, first, second])
        p = sigmoid(sizes)  # of the better one
        self.pairs += p.size
        self.certain += int((p > CERTAIN).sum())
        self.even += int((p - 0.5 < EVEN).sum())
        self._tied += int((sizes == 0).sum())
        self._sizes += _counted(sizes[sizes > 0])

    def shares(self) -> dict[str, float | None]:
        """For the manifest: certain_pairs and even_pairs, None without a pair."""
        found = {"certain_pairs": self.certain, "even_pairs": self.even}
        return {name: round(count / self.pairs, 4) if self.pairs else None for name, count in found.items()}

    def warning(self, temperature: float) -> str:
        """What is wrong with the scale under this --ranker_temperature, and what to do; "" where nothing is."""
        if self.certain > _NEARLY_ALL * self.pairs:
            return (
                f"{self.certain / self.pairs:.0%} of the pairs have a preference beyond {CERTAIN} or below "
                f"{1 - CERTAIN:.2f}. Win rates then say who is better and not by how much: SPPO becomes a hard label. "
                f"{self._advice(temperature)}"
            )
        if self.even > _NEARLY_ALL * self.pairs:
            return (
                f"{self.even / self.pairs:.0%} of the pairs have a preference within {EVEN} of 1/2: there is nearly "
                f"nothing to learn. {self._advice(temperature)}"
            )
        return ""

    def _advice(self, temperature: float) -> str:
        """The temperature under which half of the pairs that are no ties are beyond P = 3/4."""
        if self._tied > _NEARLY_ALL * self.pairs:
            return "No --ranker_temperature changes that: the ranker does not tell most responses apart"
        middle = np.searchsorted(self._sizes.cumsum(), (self.pairs - self._tied) / 2)
        median = 2.0 ** (int(middle) / _PER_DOUBLING - _DOUBLINGS)
        better = float(f"{temperature * median / _USUAL:.2g}")
        return f"With --ranker_temperature {better:g} half of the pairs that are no ties would be beyond 3/4"


def _counted(sizes: Array) -> NDArray[np.int64]:
    """How many of the numbers, which are above 0, are in each bin."""
    bins = np.rint(np.clip(np.log2(sizes), -_DOUBLINGS, _DOUBLINGS) * _PER_DOUBLING).astype(np.int64)
    return np.bincount(bins + _DOUBLINGS * _PER_DOUBLING, minlength=2 * _DOUBLINGS * _PER_DOUBLING + 1)
