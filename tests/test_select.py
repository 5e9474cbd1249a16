"""Which response is the rejected one (--select), and which pairs are dropped for too small a margin (--min_margin)."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_pairing import Rows, rankings_of, responses_of, training_rows, write

from sppo.command.errors import SPPOError, UsageError
from sppo.method import winrates
from sppo.pairing.training_set import compute_prob, pairing_stage
from sppo.recipe import Recipe, load_recipe
from sppo.store.files import read_json
from sppo.training.settings import check_flags


def rankings_by_score(scores: np.ndarray) -> Rows:
    """Rankings of a reward model with these scores, (N, K)."""
    return [
        {"prompt_id": f"id{n}", "logits": (s[:, None] - s).tolist(), "scores": [0.0] * len(s)}
        for n, s in enumerate(scores)
    ]


def test_two_deviations_below_by_hand() -> None:
    """Ten scores of mean 0: eight within -1 and 1, an accident at -6, and the best at 6.

    Their squares sum to 80, so the deviation is sqrt(8) = 2.83 and the aim -5.66: the accident is nearest. With -10 and
    10 it is sqrt(20.8) = 4.56, the aim -9.12. Of 32 scores with an accident at -30 the aim is near -12, and so is one.
    """
    near = [1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    ten = np.array([[6.0, -6.0, *near], [10.0, -10.0, *near]])
    assert winrates.two_deviations_below(ten, np.array([0, 0])).tolist() == [1, 1]

    many = [-30.0, 10.0, -12.0, *[32 / 29] * 29]
    mean = sum(many) / 32
    aim = mean - 2 * (sum((x - mean) ** 2 for x in many) / 32) ** 0.5
    assert -13 < aim < -11
    assert winrates.two_deviations_below(np.array([many]), np.array([1])).tolist() == [2]
    assert winrates.best_and_worst(np.array([many]))[1].tolist() == [0]
    # neither the unit nor the zero of the scores matters
    assert winrates.two_deviations_below(7 * np.array([many]) + 100, np.array([1])).tolist() == [2]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_with_few_responses_the_nearest_is_the_worst(k: int) -> None:
    """The help and the documentation say so: no score of K <= 5 is more than two of its own deviations below."""
    scores = np.random.default_rng(k).standard_t(1.5, size=(500, k))
    best, worst = winrates.best_and_worst(scores)
    assert (winrates.two_deviations_below(scores, best) == worst).all()


def test_the_chosen_one_is_never_its_own_rejected() -> None:
    """Equal scores: the aim is everybody's score, the first of all, and that is the chosen one."""
    flat = np.zeros((1, 4))
    assert winrates.two_deviations_below(flat, np.array([0])).tolist() == [1]
    draws = np.arange(40, dtype=np.uint64)
    for w in range(4):
        found = winrates.random_other(np.full(40, w), draws, 4)
        assert Counter(found.tolist()) == {i: 40 // 3 + (i == min({0, 1, 2, 3} - {w})) for i in range(4) if i != w}


@pytest.mark.parametrize("estimator", ["paper", "released"])
@pytest.mark.parametrize("k", [3, 5])
def test_responses_that_beat_each_other_in_a_circle_are_equal(tmp_path: Path, k: int, estimator: str) -> None:
    """Each beats the next (k - 1) / 2. The same P summed in another order gave another last digit, and so a pair.

    A judge that only says A or B has few different logits, so that such circles are common.
    """
    strengths = np.random.default_rng(0).uniform(0.1, 9, 200)
    signs = np.array([[0 if i == j else 1 if (j - i) % k <= (k - 1) // 2 else -1 for j in range(k)] for i in range(k)])
    rankings = [
        {"prompt_id": f"id{n}", "logits": (signs * s).tolist(), "scores": [0.0] * k} for n, s in enumerate(strengths)
    ]
    # one prompt with a best: it beats all others, which go round in a circle behind it
    best = np.array([[0, 1, 1, 1], [-1, 0, 1, -1], [-1, -1, 0, 1], [-1, 1, -1, 0]]) * 0.7
    order = winrates.ordering_score(best[None], estimator)[0]
    assert (order.argmax(), order[1] == order[2] == order[3]) == (0, True)

    out = write(tmp_path / "d", responses_of(200, k), rankings)
    for select in ("best_worst", "best_random"):
        with pytest.raises(SPPOError, match="no pair is left to train on; dropped: {'equal scores': 200}"):
            compute_prob(Recipe(pairs=k, estimator=estimator, select=select), out, True)


@pytest.mark.parametrize(("logit", "shown"), [(5.0, "first"), (-5.0, "second")])
def test_a_ranker_that_looks_at_the_place_alone_is_told(tmp_path: Path, logit: float, shown: str) -> None:
    """Its win rates are all equal, which does not say why."""
    logits = (logit * (1 - np.eye(3))).tolist()
    rankings = [{"prompt_id": f"id{n}", "logits": logits, "scores": [0.0] * 3} for n in range(4)]
    out = write(tmp_path / "d", responses_of(4, 3), rankings)
    with pytest.raises(SPPOError, match=f"{{'equal scores': 4}}. The ranker nearly .* the response shown {shown}"):
        compute_prob(Recipe(pairs=3, estimator="paper"), out, True)


def test_a_random_rejected_one_follows_from_seed_and_prompt(tmp_path: Path) -> None:
    """Uniform over the others; the same in any order of rows and shards; another seed draws others."""
    responses, rankings = responses_of(300, 4), rankings_of(300, 4)
    recipe = Recipe(pairs=4, select="best_random", estimator="paper")
    out = write(tmp_path / "d", responses, rankings)
    compute_prob(recipe, out, False)
    rows = training_rows(out)
    assert read_json(out / "train.manifest.json")["settings"]["select"] == "best_random"

    places: Counter[int] = Counter()
    for row in rows:
        w, lose = row["chosen_index"], row["rejected_index"]
        digest = hashlib.blake2b(f"42 rejected {row['prompt_id']}".encode(), digest_size=8).digest()
        others = [i for i in range(4) if i != w]
        assert lose == others[int.from_bytes(digest, "little") % 3]
        places[others.index(lose)] += 1
        rates = [sum(line) / 4 for line in row["probability"]]
        assert rates[w] == max(rates)
        assert row["chosen_probs"] == row["probability"][w][lose]
        assert row["chosen_probs_lose"] == pytest.approx(rates[lose])
        assert row["rejected"][-1]["content"] == row["responses"][lose]["text"]
    assert min(places.values()) > 70  # of 300, 100 each on average

    turned = write(tmp_path / "e", responses[::-1], rankings[100:], rankings[:100])
    compute_prob(recipe, turned, False)
    assert sorted(training_rows(turned), key=str) == sorted(rows, key=str)
    compute_prob(replace(recipe, seed=7), out, True)
    assert sum(a["rejected_index"] != b["rejected_index"] for a, b in zip(training_rows(out), rows, strict=True)) > 100


def test_2sd_in_the_training_set_is_by_the_scores_and_its_win_rate_is_its_own(tmp_path: Path) -> None:
    """One accident far below among 12: best_worst rejects it, best_2sd the one before it, under both estimators."""
    scores = np.random.default_rng(0).normal(size=(20, 12)) / 10
    scores[:, 3] -= 9
    scores[:, 7] -= 5
    out = write(tmp_path / "d", responses_of(20, 12), rankings_by_score(scores))
    for estimator in ("paper", "released"):
        for select in ("best_worst", "best_2sd"):
            compute_prob(Recipe(pairs=12, estimator=estimator, select=select), out, True)
            for row, s in zip(training_rows(out), scores, strict=True):
                aim = s.mean() - 2 * s.std()
                expected = int(s.argmin()) if select == "best_worst" else int(np.abs(s - aim).argmin())
                assert row["rejected_index"] == expected
                assert row["chosen_index"] == s.argmax()
                assert row["chosen_probs_lose"] == pytest.approx(np.mean(row["probability"][expected]))
    assert {row["rejected_index"] for row in training_rows(out)} == {7}


def test_a_margin_drops_pairs_and_counts_them(tmp_path: Path) -> None:
    """K = 2, log-odds x: win rates (1/2 + P) / 2 and (3/2 - P) / 2, so the margin is P - 1/2."""
    scores = np.array([[x, 0.0] for x in np.log([1.5, 3.0, 9.0, 99.0])])  # P = 0.6, 0.75, 0.9, 0.99
    rankings = [*rankings_by_score(scores), {"prompt_id": "id4", "logits": [[0, 0], [0, 0]], "scores": [0, 0]}]
    out = write(tmp_path / "d", responses_of(5, 2), rankings)
    command = ["scripts/compute_prob.py", f"--output_dir={out}", "--pairs=2", "--estimator=paper"]
    tiny.succeed(*command, "--min_margin=0.3")
    assert [row["prompt_id"] for row in training_rows(out)] == ["id2", "id3"]
    counts = read_json(out / "train.manifest.json")["counts"]
    assert counts["dropped"] == {"equal scores": 1, "below --min_margin": 2}
    refused = tiny.run(*command, "--min_margin=0.2")
    assert refused.returncode == 1
    assert "settings.min_margin: 0.3 there, 0.2 now" in refused.stderr
    compute_prob(Recipe(pairs=2, estimator="paper", min_margin=0.2, keep_degenerate=True), out, True)
    assert len(training_rows(out)) == 3  # equal scores have no margin either
    with pytest.raises(SPPOError, match="no pair is left to train on; dropped: .*'below --min_margin': 4"):
        compute_prob(Recipe(pairs=2, estimator="paper", min_margin=0.6), out, True)


def test_which_pair_is_no_question_where_all_responses_are_trained_on() -> None:
    """It would only have decided which prompts are dropped for a tie."""
    for select in ("best_random", "best_2sd"):
        recipe = load_recipe(overrides={"select": select, "loss_type": "sppo_all"})
        with pytest.raises(UsageError, match=f"--select {select} is for losses of a pair; sppo_all trains on all"):
            check_flags(recipe)
        for loss_type in ("sppo", "sigmoid", "kto_pair"):
            check_flags(replace(recipe, loss_type=loss_type))
    check_flags(load_recipe(overrides={"min_margin": 0.1, "loss_type": "sppo_all"}))


def test_settings_at_their_defaults_are_no_change(tmp_path: Path) -> None:
    """A training set of before there were --select and --min_margin is still current."""
    out = write(tmp_path / "d", responses_of(5, 3), rankings_of(5, 3))
    recipe = Recipe(pairs=3, keep_degenerate=True)
    assert set(pairing_stage(recipe, out).settings) == {"pairs", "estimator", "test_size", "seed", "keep_degenerate"}
    for wrong in ({"select": "best_word"}, {"min_margin": 1.5}, {"min_margin": -0.1}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            load_recipe(overrides=wrong)
