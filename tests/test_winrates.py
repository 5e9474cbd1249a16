"""The estimators against the released compute_prob.py and numbers worked by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny

from sppo import winrates


def test_released_estimator_is_the_released_scripts() -> None:
    rows = json.loads((tiny.GOLDEN / "compute_prob.json").read_text())["rows"]
    scores = np.array([r["scores"] for r in rows])
    p = winrates.released_probability(scores)
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
    p = winrates.probability(logits, estimator)
    np.testing.assert_allclose(p + p.swapaxes(1, 2), 1)
    np.testing.assert_allclose(p[:, range(k), range(k)], 0.5)


def test_a_circle_survives_the_paper_estimator_only() -> None:
    """Stone, paper, scissors: each beats the next by a logit of 4. Scores are all 0, so released sees ties."""
    c = np.array([[0, 4, -4], [-4, 0, 4], [4, -4, 0.0]])[None]
    paper, released = winrates.paper_probability(c), winrates.probability(c, "released")
    assert paper[0, 0, 1] == pytest.approx(1 / (1 + math.exp(-4)))
    assert winrates.intransitive_share(paper) == 1.0
    assert winrates.intransitive_share(released) == 0.0
    np.testing.assert_allclose(released, 0.5)


def test_position_bias() -> None:
    """A ranker that always prefers what it sees first has a bias above 0, an even one none."""
    even = np.array([[0, 1.0], [-1.0, 0]])[None]
    first = np.array([[0, 2.0], [2.0, 0]])[None]
    assert winrates.position_bias(even) == pytest.approx(0)
    assert winrates.position_bias(first) == pytest.approx(2 / (1 + math.exp(-2)) - 1)
