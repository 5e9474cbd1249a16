"""The game's exact updates, against numbers by hand and independent solutions: a wrong one would judge the methods."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import minimize

sys.path.insert(0, str(tiny.ROOT / "benchmarks"))
import game
import model_game
import rspo

from examples.demo import biased, circle, colour_class
from sppo.method.loss import divergence, sppo_all_loss
from sppo.method.preference import sigmoid
from sppo.store.files import read_json

RNG = np.random.default_rng(0)
CIRCLE = np.array([[0.5, 0.8, 0.2], [0.2, 0.5, 0.8], [0.8, 0.2, 0.5]])
POLICY = np.array([0.5, 0.3, 0.2])
LOGPS = np.log(POLICY)


def test_nothing_beats_the_middle_of_a_circle() -> None:
    middle = np.full(3, 1 / 3)
    assert game.gap(CIRCLE, middle) == pytest.approx(0)
    for step in (game.sppo, game.sppo_released, game.dpo, game.anchored, *map(game.rspo, game.REGS.values())):
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


PRICES = [game.Price(reverse=0.1), game.Price(forward=0.1), game.Price(0.06, 0.03)]


@pytest.mark.parametrize("price", PRICES[:2], ids=["reverse", "forward"])
def test_the_end_of_two_answers_in_closed_form(price: game.Price) -> None:
    """P(1 > pi) - P(2 > pi) is p - 1/2 for every policy. So with reverse the log-odds are the first policy's plus
    (p - 1/2) / tau. With forward tau (first_1 / x - first_2 / (1 - x)) + p - 1/2 = 0 is quadratic in x = pi_1."""
    p, first = 0.8, np.array([0.3, 0.7])
    preference = np.array([[0.5, p], [1 - p, 0.5]])
    if price.reverse:
        expected = sigmoid(np.log(first[0] / first[1]) + (p - 0.5) / price.reverse)
    else:
        tau, gain = price.forward, p - 0.5  # gain x^2 + (tau - gain) x - tau first_1 = 0
        expected = (gain - tau + np.sqrt((gain - tau) ** 2 + 4 * gain * tau * first[0])) / (2 * gain)
    assert game.equilibrium(preference, np.log(first), price)[0] == pytest.approx(expected, abs=1e-10)

    logps, step = np.log(first), game.rspo(game.Price(price.reverse * game.ETA / 2, price.forward * game.ETA))
    for _ in range(400):
        logps = step(preference, logps, np.log(first), RNG)
    assert game.renormed(logps)[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("price", PRICES, ids=["reverse", "forward", "both"])
def test_no_side_gains_by_leaving_the_equilibrium(price: game.Price) -> None:
    """The best policy against it, looked for by itself, is it: else the tables' distances would be to a wrong end."""
    end = game.equilibrium(CIRCLE, LOGPS, price)
    rates = game.wins(CIRCLE, end)

    def loses(logits: np.ndarray) -> float:
        logps = game.normed(logits)
        policy = np.exp(logps)
        pays = price.reverse * policy @ (logps - LOGPS) + price.forward * POLICY @ (LOGPS - logps)
        return float(pays - policy @ rates)

    best = game.renormed(minimize(loses, LOGPS, tol=1e-12).x)
    np.testing.assert_allclose(best, end, atol=1e-5)
    assert np.abs(end - POLICY).max() > 0.02  # neither the first policy, nor the circle's middle
    assert np.abs(end - 1 / 3).max() > 0.02


WEIGHTS = [game.Price(reverse=0.2), game.Price(forward=0.3), game.Price(0.1, 0.1)]


@pytest.mark.parametrize("weight", WEIGHTS, ids=["reverse", "forward", "both"])
def test_the_step_of_rspo_is_the_minimum_of_the_training_loss(weight: game.Price) -> None:
    """sppo_all's loss and the divergence, of responses weighed by how often the policy draws them."""
    reg = "both" if all(weight) else "reverse" if weight.reverse else "forward"
    logps = np.log([0.2, 0.5, 0.3])  # a step on from the first policy
    old, first, drawn = (torch.tensor(x) for x in (logps, LOGPS, np.exp(logps)))
    rates = torch.tensor(game.wins(CIRCLE, np.exp(logps)))
    alone = torch.arange(3)

    def loss(logits: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.tensor(logits, requires_grad=True)
        made = torch.log_softmax(at, -1)
        losses = sppo_all_loss(made - old, rates, alone, 3, 1 / game.ETA)
        value = drawn @ (losses + max(weight) * divergence(reg, made - first, alone, 3))
        value.backward()
        return value.item(), at.grad.numpy()

    expected = game.renormed(minimize(loss, LOGPS, jac=True, tol=1e-14).x)
    made = game.renormed(game.rspo(weight)(CIRCLE, logps, LOGPS, RNG))
    np.testing.assert_allclose(made, expected, atol=1e-6)
    assert np.abs(made - game.renormed(game.sppo(CIRCLE, logps, LOGPS, RNG))).max() > 0.01


@pytest.mark.parametrize("weight", WEIGHTS, ids=["reverse", "forward", "both"])
def test_rspo_ends_in_the_equilibrium_of_its_own_game(weight: game.Price) -> None:
    price = game.Price(2 * weight.reverse / game.ETA, weight.forward / game.ETA)
    found = game.play(game.rspo(weight), game.random_table(np.random.default_rng(1)), 1, price)
    assert found["apart"][0] > 0.05
    assert found["apart"][-1] < 1e-6
    ends = [game.equilibrium(CIRCLE, LOGPS, p) for p in (game.Price(0.1), game.PRICES["SPPO, anchored (0.1)"])]
    np.testing.assert_allclose(*ends)  # --reg reverse with A / 2 and --anchor A end in the same place


def test_how_small_a_weight_may_be_for_the_step() -> None:
    """Near the middle of this circle omega is 0.3 / sqrt(3), so 4 lambda (1 + lambda) = 0.03 at lambda = 0.00744."""
    middle = np.log(np.full(3, 1 / 3))
    near = np.log(game.renormed(np.array([1e-3, 0, 0])))

    def apart(weight: float) -> float:
        logps, step = near, game.rspo(game.Price(reverse=weight))
        for _ in range(300):
            logps = step(CIRCLE, logps, middle, RNG)
        return float(np.abs(game.renormed(logps) - 1 / 3).max() / np.abs(game.renormed(near) - 1 / 3).max())

    assert apart(0.009) < 0.8
    assert apart(0.006) > 1.2


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


def test_the_page_about_rspo_is_what_its_figures_make() -> None:
    """Else the next run of the benchmark would take away what somebody wrote into it by hand."""
    docs = tiny.ROOT / "docs"
    assert (docs / "rspo.md").read_text(encoding="utf-8") == rspo.page(read_json(docs / "rspo.json"))
