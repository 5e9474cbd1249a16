"""The estimators against the released compute_prob.py and numbers worked by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny

from sppo.method import preference, winrates
from sppo.pairing.statistics import Statistics, intransitive_triples, position_bias


def test_released_estimator_is_the_released_scripts() -> None:
    rows = json.loads((tiny.GOLDEN / "compute_prob.json").read_text())["rows"]
    scores = np.array([r["scores"] for r in rows])
    p = preference.released_probability(scores)
    w, lose = winrates.best_and_worst(scores)
    n = np.arange(len(rows))
    np.testing.assert_allclose(p, [r["probability"] for r in rows], atol=1e-6)
    assert w.tolist() == [r["chosen"] for r in rows]
    assert lose.tolist() == [r["rejected"] for r in rows]
    for name, values in (
        ("chosen_probs", p[n, w, lose]),
        ("chosen_probs_win", p.mean(-1)[n, w]),
        ("chosen_probs_lose", p.mean(-1)[n, lose]),
    ):
        np.testing.assert_allclose(values, [r[name] for r in rows], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("estimator", ["released", "paper"])
@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_a_probability_matrix_whatever_k(estimator: str, k: int) -> None:
    logits = np.random.default_rng(k).normal(size=(20, k, k)) * 3
    logits[:, range(k), range(k)] = 0
    p = preference.probability(logits, estimator)
    np.testing.assert_allclose(p + p.swapaxes(1, 2), 1)
    np.testing.assert_allclose(p[:, range(k), range(k)], 0.5)


STONE = np.array([[0, 4, -4], [-4, 0, 4], [4, -4, 0.0]])  # stone, paper, scissors: each beats the next


def test_a_circle_survives_the_paper_estimator_only() -> None:
    """Each beats the next by a logit of 4. Scores are all 0, so released sees ties."""
    paper, released = preference.paper_probability(STONE[None]), preference.probability(STONE[None], "released")
    assert paper[0, 0, 1] == pytest.approx(1 / (1 + math.exp(-4)))
    np.testing.assert_allclose(released, 0.5)


def test_circles_are_counted_in_triples() -> None:
    """Four responses have 4 triples; the fourth loses to all, so 1 of them is a circle. A ranking by score has none."""
    four = np.zeros((4, 4))
    four[:3, :3] = STONE
    four[:3, 3] = 1.0
    score = np.array([3.0, 1.0, 2.0, 0.0])
    ordered = score[:, None] - score
    tied = np.zeros((4, 4))  # sigmoid(0) is not above 1/2
    assert intransitive_triples(np.stack([four, four.T, ordered, tied])).tolist() == [1, 1, 0, 0]
    assert intransitive_triples(STONE[None]).tolist() == [1]
    assert intransitive_triples(np.ones((2, 2, 2))).tolist() == [0, 0]


def test_position_bias() -> None:
    """A ranker that always prefers what it sees first has a bias above 0, an even one none; the diagonal is no pair."""
    even = np.array([[0, 1.0], [-1.0, 0]])
    first = np.array([[0, math.log(3)], [math.log(3), 0]])  # sigmoid(log 3) = 3/4, twice, less 1
    last = np.array([[0, -math.log(3)], [0, 0]])  # 1/4 + 1/2 - 1
    np.testing.assert_allclose(position_bias(np.stack([even, first, last])), [0, 0.5, -0.25], atol=1e-12)
    # (0, 1) and (1, 0): 3/4 each; the other four: 1/2. Mean 7/12, twice, less 1
    three = np.zeros((3, 3))
    three[:2, :2] = first
    assert position_bias(three[None])[0] == pytest.approx(1 / 6)


def statistics(estimator: str) -> Statistics:
    """Two prompts, K = 3: the circle, and scores 1, 0, -1."""
    s = np.array([1.0, 0.0, -1.0])
    logits = np.stack([STONE, (s[:, None] - s) / 2])
    gathered = Statistics()
    for n, lengths in enumerate(([5.0, 3.0, 1.0], [10.0, 40.0, 10.0])):
        c = logits[n : n + 1]
        p = preference.probability(c, estimator)
        gathered.add_ranked(c, p, preference.mean_scores(c), p.mean(-1), np.array([lengths]))
    return gathered


@pytest.mark.parametrize(("estimator", "ties"), [("released", 3), ("paper", 0)])
def test_what_is_counted_of_every_prompt(estimator: str, ties: int) -> None:
    """2 prompts of 3 * 2 comparisons; the circle is 1 of 2 triples whatever the estimator, 3 ties to released alone."""
    summary = statistics(estimator).summary()
    assert summary["prompts"] == 2
    assert summary["pairs"] == 12
    assert summary["tied_pairs"] == ties
    assert summary["intransitive_triples"] == 0.5
    assert summary["position_bias"] == 0
    assert summary["p"] == {"mean": None, "quantiles": []}


def test_score_and_length_are_correlated_within_prompts() -> None:
    """Less the prompt's mean: scores 1 0 -1 twice, lengths 2 0 -2 and 8 -16 8. xx = 4, yy = 8 + 384, xy = 4 + 0.

    About the mean of all lengths it would be another number: the second prompt's are longer and score the same.
    """
    c = np.array([[0, 0.5, 1.0], [-0.5, 0, 0.5], [-1.0, -0.5, 0]])
    logits, lengths = np.stack([c, c]), np.array([[5.0, 3.0, 1.0], [108.0, 84.0, 108.0]])
    scores = preference.mean_scores(logits)
    np.testing.assert_allclose(scores, [[1, 0, -1], [1, 0, -1]])
    gathered = Statistics()
    probability = preference.paper_probability(logits)
    gathered.add_ranked(logits, probability, scores, probability.mean(-1), lengths)
    assert gathered.summary()["score_length_correlation"] == round(4 / math.sqrt(4 * 392), 4) == 0.101


def test_a_length_penalty_by_hand() -> None:
    """Lengths 10, 30, 20, mean 20, L = 1: the second loses 1 of log-odds to the first and 1/2 to the third.

    The ranker likes it best, by log-odds of 0.8: over the first it now is -0.2, over the third 0.3.
    """
    logits = np.array([[[0, -0.8, 0], [0.8, 0, 0.8], [0, -0.8, 0.0]]])
    lengths = np.array([[10.0, 30.0, 20.0]])
    judged = winrates.penalised(logits, lengths, 1.0)
    p = preference.paper_probability(judged)[0]
    np.testing.assert_allclose(np.log(p / (1 - p)), [[0, 0.2, 0.5], [-0.2, 0, 0.3], [-0.5, -0.3, 0]], atol=1e-12)
    # the released estimator's scores: 2/3 of each sum of log-odds
    np.testing.assert_allclose(preference.mean_scores(judged), [[2 / 3 * 0.7, 2 / 3 * 0.1, -2 / 3 * 0.8]])
    np.testing.assert_allclose(winrates.penalised(logits, 7 * lengths, 1.0), judged)  # whatever the unit
    np.testing.assert_allclose(winrates.penalised(logits, np.full((1, 3), 5.0), 9.0), logits)  # no one is longer
    np.testing.assert_allclose(winrates.penalised(logits, np.zeros((1, 3)), 9.0), logits)


def test_means_and_quantiles_of_the_pairs() -> None:
    """Over .5 .6 .7 .9: mean .675; a quarter of the way, at position .75, .575; half .65; at 2.25, .75."""
    gathered = Statistics()
    lose = [0.1, 0.10004, 0.10004, 0.10004]
    rates = np.array([[0.9, 0.5, 0.7, 0.6], [1.0, 1.0, 1.0, 0.0], lose])
    gathered.add_pairs(rates[:, :1])
    gathered.add_pairs(rates[:, 1:])
    gathered.add_pairs(rates[:, :0])
    summary = gathered.summary()
    assert summary["p"] == {"mean": 0.675, "quantiles": [0.5, 0.575, 0.65, 0.75, 0.9]}
    assert summary["p_win"] == {"mean": 0.75, "quantiles": [0, 0.75, 1, 1, 1]}
    assert summary["p_lose"] == {"mean": 0.1, "quantiles": [0.1] * 5}
    many = np.random.default_rng(0).beta(2, 5, size=(3, 1001))
    gathered = Statistics()
    for part in np.array_split(many, 7, axis=1):
        gathered.add_pairs(part)
    for name, values in zip(("p", "p_win", "p_lose"), many, strict=True):
        found = gathered.summary()[name]
        assert found["mean"] == round(float(values.mean()), 4)
        np.testing.assert_allclose(found["quantiles"], np.quantile(values, [0, 0.25, 0.5, 0.75, 1]), atol=1.001e-4)
