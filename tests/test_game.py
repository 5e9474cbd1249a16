"""The game's exact updates, against numbers by hand and independent solutions: a wrong one would judge the methods."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import tiny
from scipy.optimize import minimize

sys.path.insert(0, str(tiny.ROOT / "benchmarks"))
import game
import model_game

from examples.demo import biased, circle, colour_class
from sppo.method.preference import sigmoid

RNG = np.random.default_rng(0)
CIRCLE = np.array([[0.5, 0.8, 0.2], [0.2, 0.5, 0.8], [0.8, 0.2, 0.5]])
POLICY = np.array([0.5, 0.3, 0.2])
LOGPS = np.log(POLICY)


def test_nothing_beats_the_middle_of_a_circle() -> None:
    middle = np.full(3, 1 / 3)
    assert game.gap(CIRCLE, middle) == pytest.approx(0)
    for step in (game.sppo, game.sppo_released, game.dpo, game.anchored):
        made = game.renormed(step(CIRCLE, np.log(middle), np.log(middle), RNG))
        np.testing.assert_allclose(made, middle, atol=1e-9)
    assert game.gap(CIRCLE, np.array([1.0, 0, 0])) == pytest.approx(0.6)  # the third answer wins 80%


def test_the_step_of_sppo_by_hand() -> None:
    rates = [0.25 + 0.24 + 0.04, 0.10 + 0.15 + 0.16, 0.40 + 0.06 + 0.10]
    odds = POLICY * np.exp(rates)
    np.testing.assert_allclose(game.renormed(game.sppo(CIRCLE, LOGPS, LOGPS, RNG)), odds / odds.sum())


def test_online_ipo_takes_the_same_step() -> None:
    """Its loss over pairs drawn from the policy, minimised numerically with tau = beta = 1."""

    def loss(h: np.ndarray) -> float:
        apart = h[:, None] - h[None, :]
        both = CIRCLE * (apart - 0.5) ** 2 + (1 - CIRCLE) * (-apart - 0.5) ** 2  # whichever of the two wins
        return float((POLICY[:, None] * POLICY[None, :] * both).sum())

    h = minimize(loss, np.zeros(3), tol=1e-12).x
    made = POLICY * np.exp(h)
    np.testing.assert_allclose(made / made.sum(), game.renormed(game.sppo(CIRCLE, LOGPS, LOGPS, RNG)), atol=1e-6)


def test_dpo_finds_the_scores_of_a_preference_that_has_some() -> None:
    scores = np.array([0.3, -1.0, 0.7])
    made = game.renormed(game.dpo(sigmoid(scores[:, None] - scores[None, :]), LOGPS, LOGPS, RNG))
    expected = POLICY * np.exp(scores)
    np.testing.assert_allclose(made, expected / expected.sum(), atol=1e-6)


def test_dpo_fits_a_circle_as_a_numerical_minimum_does() -> None:
    def loss(h: np.ndarray) -> float:
        fitted = np.log(sigmoid(h[:, None] - h[None, :]))
        return float(-(POLICY[:, None] * POLICY[None, :] * CIRCLE * fitted).sum())

    made = POLICY * np.exp(minimize(loss, np.zeros(3), tol=1e-12).x)
    np.testing.assert_allclose(game.renormed(game.dpo(CIRCLE, LOGPS, LOGPS, RNG)), made / made.sum(), atol=1e-6)


def test_the_anchored_step_ends_where_its_game_does() -> None:
    """At the end log pi = log pi_0 + (eta / A) P(y > pi) - log Z: the solution of the regularised game."""
    logps = LOGPS
    for _ in range(2000):
        logps = game.anchored(CIRCLE, logps, LOGPS, RNG)
    policy = game.renormed(logps)
    odds = POLICY * np.exp(game.ETA / game.ANCHOR * game.wins(CIRCLE, policy))
    np.testing.assert_allclose(policy, odds / odds.sum(), atol=1e-8)


def test_of_all_pairs_the_best_and_the_worst_are_trained_on() -> None:
    """With two answers every mixed set of five has both; the target is the share of the others, counted in the set."""
    better = np.array([[0.5, 0.9], [0.1, 0.5]])
    made = game.sppo_pairs(better, np.zeros(2), np.zeros(2), np.random.default_rng(1), draws=100_000)
    # a set with m of five better ones: targets 0.4 (5 - m) / 5 and -0.4 m / 5; without a mixture both targets are 0
    sets = {m: [1, 5, 10, 10, 5, 1][m] / 32 for m in range(6)}
    up = sum(p * 0.4 * (5 - m) / 5 for m, p in sets.items() if 0 < m < 5)
    pure = sets[5]
    expected = up / (1 - sets[0] - pure + 2 * pure)
    down = expected  # by symmetry
    assert made[0] - made[1] == pytest.approx(expected + down, abs=0.01)


def test_the_models_game_by_hand() -> None:
    """Answers by their leading colour: red is of the first kind, blue of the second, green of the third."""
    texts = ["Anna sees a red ball and a blue cat.", "a blue cat, red", "Green!", "a small dog", ""]
    assert [colour_class(text) for text in texts] == [0, 1, 2, 3, 3]
    assert circle("", texts[0], texts[1]) == -circle("", texts[1], texts[0]) == 2  # red beats blue
    assert circle("", texts[2], texts[0]) == 3  # green beats red
    assert all(circle("", text, "a dog") == 2 for text in texts[:3])
    assert biased("", "a red ball", "a ball") == 1.5
    p = model_game.PREFERENCE
    np.testing.assert_allclose(p + p.T, 1)
    assert model_game.gap(model_game.von_neumann()) == pytest.approx(0, abs=1e-6)
    assert model_game.gap(np.array([0, 0, 0, 1.0])) == pytest.approx(2 * (sigmoid(np.array(2.0)) - 0.5))
    # of two prompts, two iterates: always red; red and blue by turns
    shares = np.array([[[1, 0, 0, 0], [1, 0, 0, 0]], [[1, 0, 0, 0], [0, 1, 0, 0]]], dtype=float)
    matrix = model_game.Played(shares, shares[0]).matrix()
    assert matrix[0, 1] == pytest.approx((0.5 + p[0, 1]) / 2)
    np.testing.assert_allclose(matrix + matrix.T, 1)
    found = model_game.figures([model_game.Played(shares, shares[0])])
    np.testing.assert_allclose(found["mixture"][0, 1], model_game.gap(np.array([0.75, 0.25, 0, 0])))
    np.testing.assert_allclose(found["entropy"], [[0, np.log(2)]], atol=1e-6)
