"""What a training set is like, for its manifest: ties, circles, the ranker's biases, and the spread of win rates.

C and P are (N, K, K) for N prompts with K responses each, as in sppo/method/preference.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppo.method.preference import Array, paper_probability, score_and_circle, sigmoid
from sppo.pairing.scale import Scale

_STEPS = 10_000  # of the histograms of p, p_win and p_lose
_ONE_SIDED = 0.9  # of position_bias: 1 is a ranker that always prefers what is shown first
_QUANTILES = (0, 0.25, 0.5, 0.75, 1)


def intransitive_triples(logits: Array) -> Array:
    """How many of a prompt's K(K-1)(K-2)/6 triples go round in a circle, i > j > k > i: (N, K, K) -> (N,).

    i > j means that the paper's estimator gives P_ij > 1/2, whichever estimator makes the win rates: the released one
    orders responses by a score, so it never has a circle.
    """
    beats = (paper_probability(logits) > 0.5).astype(np.float64)
    # the trace of beats^3 counts each circle from its three starts
    return ((beats @ beats) * beats.swapaxes(-1, -2)).sum((-1, -2)) / 3


def position_bias(logits: Array) -> Array:
    """Mean over pairs of sigmoid(C_ij) + sigmoid(C_ji) - 1, (N, K, K) -> (N,); above 0 what is shown first wins."""
    k = logits.shape[-1]
    first = np.where(np.eye(k, dtype=bool), 0.0, sigmoid(logits))
    return 2 * first.sum((-1, -2)) / (k * (k - 1)) - 1


class Statistics:
    """What a training set is like, gathered batch by batch in memory that does not grow.

    Ties, circles, scale, position bias and the correlations with length are of every ranked prompt; p, p_win and p_lose
    are of the pairs that are kept.
    """

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.scale = Scale()
        self.thinks = False  # whether any response has a thought
        self._energies = np.zeros(2)  # of the mean log-odds: of what goes in circles, of all
        self._sums: Counter[str] = Counter()
        # of (score, length) and (win rate, length), each less the prompt's mean: sums of x^2, y^2, xy
        self._moments = {"score": np.zeros(3), "win_rate": np.zeros(3)}
        self._rate_sums = np.zeros(3)  # of p, p_win, p_lose
        self._histograms = np.zeros((3, _STEPS + 1), dtype=np.int64)  # of the same, at multiples of 1/_STEPS

    def add_responses(self, answered: NDArray[np.bool_], thinks: bool) -> None:
        """Which responses of N ranked prompts have an answer (N, K), and whether any of them has a thought."""
        self._sums["not judged"] += int((~answered.all(-1)).sum())
        self._sums["unfinished"] += int((~answered).sum())
        self.thinks |= thinks

    def add_ranked(self, logits: Array, probability: Array, scores: Array, win_rates: Array, lengths: Array) -> None:
        """C and P (N, K, K), scores, win rates and lengths in characters (N, K). C: after --ranker_temperature.

        Of prompts whose responses all have an answer: of the others the ranker has not seen all.
        """
        n, k, _ = logits.shape
        upper = np.triu_indices(k, 1)
        self._sums["prompts"] += n
        self._sums["pairs"] += n * k * (k - 1)
        self._sums["ties"] += int((probability[:, upper[0], upper[1]] == 0.5).sum())
        self._sums["triples"] += n * k * (k - 1) * (k - 2) // 6
        self._sums["circles"] += round(intransitive_triples(logits).sum())
        self._sums["bias"] += position_bias(logits).sum()
        _, circular = score_and_circle(logits)
        self._energies += [(circular**2).sum(), ((logits - logits.swapaxes(-1, -2)) ** 2).sum() / 4]
        y = lengths - lengths.mean(-1, keepdims=True)
        for name, values in (("score", scores), ("win_rate", win_rates)):
            x = values - values.mean(-1, keepdims=True)
            self._moments[name] += [(x * x).sum(), (y * y).sum(), (x * y).sum()]

    def add_pairs(self, rates: Array) -> None:
        """p, p_win, p_lose of the pairs that are kept, (3, N)."""
        self._rate_sums += rates.sum(-1)
        for histogram, steps in zip(self._histograms, np.rint(rates * _STEPS).astype(np.int64), strict=True):
            histogram += np.bincount(steps, minlength=_STEPS + 1)

    def summary(self) -> dict[str, Any]:
        """For the manifest. Means are exact, quantiles those of the values rounded to 1/_STEPS; None without data.

        prompts: ranked; pairs: ordered comparisons, K(K-1) a prompt; tied_pairs: {i, j} with P_ij = 1/2;
        certain_pairs, even_pairs: shares of {i, j} with P beyond 0.99 or below 0.01, and within 0.01 of 1/2;
        intransitive_triples: their share of all triples; circular_share: the share of the mean log-odds, squared, that
        no score explains (see preference.score_and_circle).
        """
        sums = self._sums
        circular, energy = self._energies
        kept = int(self._histograms[0].sum())
        rates = {}
        for name, total, histogram in zip(("p", "p_win", "p_lose"), self._rate_sums, self._histograms, strict=True):
            rates[name] = {
                "mean": round(float(total) / kept, 4) if kept else None,
                "quantiles": [round(q, 4) for q in _histogram_quantiles(histogram)] if kept else [],
            }

        correlations = {}
        for name, (xx, yy, xy) in self._moments.items():
            is_known = xx > 0 and yy > 0
            correlations[f"{name}_length_correlation"] = round(float(xy / np.sqrt(xx * yy)), 4) if is_known else None

        return {
            "prompts": sums["prompts"] + sums["not judged"],
            "pairs": sums["pairs"],
            "dropped": {k: v for k, v in self.dropped.items() if v},
            **({"unfinished_thoughts": sums["unfinished"]} if self.thinks else {}),
            "tied_pairs": sums["ties"],
            **self.scale.shares(),
            "intransitive_triples": round(sums["circles"] / sums["triples"], 5) if sums["triples"] else None,
            "circular_share": round(float(circular / energy), 5) if energy else None,
            "position_bias": round(float(sums["bias"]) / sums["prompts"], 5) if sums["prompts"] else None,
            **correlations,
            **rates,
        }

    def one_sided(self) -> str:
        """What to say of a ranker whose position_bias alone decides; "" where the responses do too."""
        bias = self._sums["bias"] / max(self._sums["prompts"], 1)
        side = "first" if bias > 0 else "second"
        return f". The ranker nearly always prefers the response shown {side}" if abs(bias) > _ONE_SIDED else ""


def _histogram_quantiles(histogram: NDArray[np.int64]) -> list[float]:
    """numpy's quantiles (linear between neighbours) of the values that `histogram` counts."""
    up_to = histogram.cumsum()
    at = np.array(_QUANTILES) * (up_to[-1] - 1)
    low, high = (np.searchsorted(up_to, np.array([np.floor(at), np.ceil(at)]), side="right")) / _STEPS
    return (low + (at - np.floor(at)) * (high - low)).tolist()
