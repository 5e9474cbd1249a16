"""The scale of a ranker's logits: which estimator suits it, --ranker_temperature, certain and even pairs, circles."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_doctor import examined
from test_pairing import Rows, rankings_of, responses_of, training_rows, write
from test_reward_model import make, one_by_one

from sppo.command.errors import SPPOError, UsageError
from sppo.evaluation import best
from sppo.evaluation.match import _blocks, _Pairing, judges
from sppo.evaluation.page.gather import IterationRecord, RunRecord
from sppo.evaluation.page.page import _data_table
from sppo.method import preference
from sppo.pairing.scale import Scale
from sppo.pairing.statistics import Statistics
from sppo.pairing.training_set import compute_prob, pairing_stage
from sppo.rankers import function, reward_model
from sppo.rankers.reward_model import RewardModel
from sppo.ranking.shards import prompt_logits, rank_shards
from sppo.recipe import Recipe, load_recipe
from sppo.schema import ranking_schema
from sppo.store.files import digest, read_json, write_json
from sppo.store.manifest import Stage
from sppo.store.parquet import read_rows, write_parquet
from sppo.store.shards import Slice

STONE = np.array([[0, 4, -4], [-4, 0, 4], [4, -4, 0.0]])  # stone, paper, scissors: each beats the next by 4


def scores_as_logits(*scores: float) -> np.ndarray:
    """(K, K): C_ij = r_i - r_j, as a reward model's."""
    return np.array(scores)[:, None] - np.array(scores)


def statistics_of(logits: np.ndarray, estimator: str = "paper") -> dict[str, Any]:
    """The statistics of (N, K, K)."""
    gathered = Statistics()
    p = preference.probability(logits, estimator)
    gathered.add_ranked(logits, p, preference.mean_scores(logits), p.mean(-1), np.ones(logits.shape[:2]))
    gathered.scale.add(preference.log_odds(logits, estimator))
    return gathered.summary()


# circles


def test_a_score_has_no_circular_share_and_a_circle_nothing_else() -> None:
    assert statistics_of(scores_as_logits(23.0, 3.6, -7.25, 0.1)[None])["circular_share"] == 0
    assert statistics_of(STONE[None])["circular_share"] == 1
    assert statistics_of(np.zeros((2, 3, 3)))["circular_share"] is None
    always_first = np.ones((1, 3, 3)) - np.eye(3)  # likes what it sees first: no preference at all
    assert statistics_of(always_first)["circular_share"] is None


def test_a_mixture_of_score_and_circle_is_split_by_hand() -> None:
    """Scores 2, 0, -2 and a circle of 1, as log-odds A; what each order adds (0.5, to both) is no preference.

    A_12 = 2 + 1, A_13 = 4 - 1, A_23 = 2 + 1. |A|^2 = 2 (9 + 9 + 9) = 54, the scores' 2 (4 + 16 + 4) = 48, the rest 6.
    """
    odds = scores_as_logits(2.0, 0.0, -2.0) + STONE / 4
    np.testing.assert_allclose(odds, [[0, 3, 3], [-3, 0, 3], [-3, -3, 0]])
    logits = odds + 0.5 * (1 - np.eye(3))
    scores, circle = preference.score_and_circle(logits[None])
    np.testing.assert_allclose(scores, [[2, 0, -2]], atol=1e-12)
    np.testing.assert_allclose(circle[0], STONE / 4, atol=1e-12)
    assert statistics_of(logits[None])["circular_share"] == round(6 / 54, 5)
    # over prompts energies are added: (6 + 6 * 16) / (54 + 6 * 16)
    assert statistics_of(np.stack([logits, STONE]))["circular_share"] == round((6 + 96) / (54 + 96), 5)


def test_the_split_is_the_best_fit_of_a_score() -> None:
    """Against numpy's least squares, where the equations are written out: r_i - r_j = A_ij, sum of r = 0."""
    logits = np.random.default_rng(0).normal(size=(1, 5, 5)) * 3
    scores, circle = preference.score_and_circle(logits)
    odds = (logits[0] - logits[0].T) / 2
    rows, targets = [np.ones(5)], [0.0]
    for i in range(5):
        for j in range(i):
            rows.append(np.eye(5)[i] - np.eye(5)[j])
            targets.append(odds[i, j])
    fitted = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    np.testing.assert_allclose(scores[0], fitted, atol=1e-12)
    np.testing.assert_allclose(circle[0].sum(-1), 0, atol=1e-12)


# which estimator


def test_the_released_estimator_doubles_a_reward_models_differences() -> None:
    """Rewards 1 and 0 mean log-odds of 1, P = 0.731. `released` makes 2 of them, 0.881; `auto` does not."""
    logits = scores_as_logits(1.0, 0.0, 0.5)[None]
    for estimator, odds in (("released", 2.0), ("paper", 1.0), (preference.estimator_for("reward-model"), 1.0)):
        assert preference.log_odds(logits, estimator)[0, 0, 1] == pytest.approx(odds)
        assert preference.probability(logits, estimator)[0, 0, 1] == pytest.approx(1 / (1 + math.exp(-odds)))
    assert [preference.estimator_for(name) for name in ("pairrm", "llm-blender", "judge", "function", "gpm")] == [
        *["released"] * 2,
        *["paper"] * 3,
    ]


def ranked_by(out: Path, backend: str) -> None:
    """Manifests of rank.py beside the rankings."""
    ranker = {"backend": backend, "ranker": "r"}
    for path in (out / "ranking").glob("*.parquet"):
        inputs = {"responses": digest(out / "responses.parquet"), "ranker": ranker}
        Stage("rank", path.with_suffix(".manifest.json"), [path], inputs, {}).finish({}, ranker="r")


@pytest.mark.parametrize(("backend", "used"), [("reward-model", "paper"), ("pairrm", "released")])
def test_auto_is_decided_by_what_ranked_and_recorded(tmp_path: Path, backend: str, used: str) -> None:
    """The manifest names the estimator of the numbers. One asked for by name afterwards finds its own work done."""
    out = write(tmp_path / "d", responses_of(20, 3), rankings_of(20, 3))
    ranked_by(out, backend)
    tiny.succeed("scripts/compute_prob.py", f"--output_dir={out}", "--pairs=3", "--estimator=auto")
    assert read_json(out / "train.manifest.json")["settings"]["estimator"] == used
    found = training_rows(out)
    assert "done" in tiny.succeed("scripts/compute_prob.py", f"--output_dir={out}", "--pairs=3", f"--estimator={used}")
    compute_prob(Recipe(pairs=3, estimator=used), out, True)
    assert found == training_rows(out)


def test_auto_is_refused_for_rankings_that_do_not_say_what_made_them(tmp_path: Path) -> None:
    """Other tools' files: a guess would double log-odds, or halve them, silently."""
    out = write(tmp_path / "d", responses_of(4, 3), rankings_of(4, 3))
    for _ in range(2):
        refused = tiny.run("scripts/compute_prob.py", f"--output_dir={out}", "--pairs=3", "--estimator=auto")
        assert refused.returncode == 2
        assert "has no manifest that names its ranker" in refused.stderr
        assert "--estimator paper" in refused.stderr
        assert not list(out.glob("train*"))
        write_json(
            out / "ranking" / "shard-00000.manifest.json", {"inputs": {}, "settings": {}, "outputs": {}, "counts": {}}
        )
    compute_prob(
        Recipe(pairs=3, estimator="released", keep_degenerate=True),
        write(tmp_path / "e", responses_of(4, 3), rankings_of(4, 3)),
        False,
    )


# the temperature


def test_a_temperature_divides_the_logits_and_leaves_the_ranking_alone(tmp_path: Path) -> None:
    """With T = 4 the training set is that of logits a quarter as large, but for the ranker's own scores."""
    responses, rankings = responses_of(20, 4), rankings_of(20, 4)
    quarter: Rows = [{**row, "logits": (np.array(row["logits"]) / 4).tolist()} for row in rankings]
    out, other = write(tmp_path / "d", responses, rankings), write(tmp_path / "e", responses, quarter)
    before = tiny.contents(out / "ranking")
    for estimator in ("paper", "released"):
        recipe = Recipe(pairs=4, estimator=estimator, length_penalty=0.3)
        compute_prob(replace(recipe, ranker_temperature=4.0), out, True)
        compute_prob(recipe, other, True)
        for row, expected, ranking in zip(training_rows(out), training_rows(other), rankings, strict=True):
            np.testing.assert_allclose(row.pop("probability"), expected.pop("probability"), rtol=1e-6)
            c = np.array(ranking["logits"])
            np.testing.assert_allclose(row.pop("rm_scores"), (c - c.T).sum(-1) / 4, rtol=1e-5)
            expected.pop("rm_scores")
            for name in ("chosen_probs", "chosen_probs_win", "chosen_probs_lose"):
                assert row.pop(name) == pytest.approx(expected.pop(name), rel=1e-6)
            assert row == expected
        mine, its = (read_json(d / "train.manifest.json") for d in (out, other))
        assert mine["counts"] == its["counts"]  # also the position bias
        assert mine["settings"].pop("ranker_temperature") == 4
        assert mine["settings"] == its["settings"]  # which does not name what it does not use
    assert tiny.contents(out / "ranking") == before


def test_another_temperature_is_refused_and_1_is_no_change(tmp_path: Path) -> None:
    out = write(tmp_path / "d", responses_of(6, 3), rankings_of(6, 3))
    compute_prob(Recipe(pairs=3), out, False)
    assert pairing_stage(Recipe(pairs=3, ranker_temperature=1.0), out).is_current()
    with pytest.raises(SPPOError, match=r"settings\.ranker_temperature"):
        compute_prob(Recipe(pairs=3, ranker_temperature=2.0), out, False)
    for wrong in ("0", "-1", "nan", "1e200"):  # whose squares are no numbers
        with pytest.raises(UsageError, match="ranker_temperature"):
            load_recipe(overrides={"ranker_temperature": wrong})


def test_best_of_n_and_the_reports_comparisons_have_the_temperature_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the answers 0, 8 and -8 the best beats the others by log-odds of 8 and 16: P is sigmoid(8 / T) and so on."""
    (tmp_path / "by_number.py").write_text("def logit(prompt, a, b):\n    return float(a) - float(b)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    texts = ["0", "8", "-8"]
    row = {"prompt_id": "p", "prompt": [{"role": "user", "content": "q"}]}
    out = tmp_path / "d"
    write(out, [{**row, "responses": [{"text": t} for t in texts]}])
    recipe = Recipe(
        pairs=3, ranker="by_number:logit", ranker_temperature=8.0, estimator="auto", judge="by_number:logit"
    )
    rank_shards(recipe, out, [Slice(0, 0)], False)
    rows = list(read_rows(out / "responses.parquet", ["prompt_id", "responses"]))
    found = best._choose(recipe, out, rows)["p"]
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert (found.index, found.win_rate) == (1, pytest.approx((sigmoid(1) + sigmoid(2)) / 2))
    assert best.best_stage(recipe, out).settings == {
        "n": 3, "method": "full comparison", "seed": 42, "estimator": "paper", "ranker_temperature": 8.0
    }  # fmt: skip

    pairing = _Pairing("p", row["prompt"], [{"text": "8"}], [{"text": "0"}, {"text": "-8"}])
    (block,) = _blocks(function.load(recipe), [pairing], recipe.ranker_temperature)
    np.testing.assert_allclose(block, [[sigmoid(1), sigmoid(2)]])
    assert judges(recipe)["logit"].ranker_temperature == 1  # the second judge has a scale of its own


# certain and even pairs


def test_certain_and_even_pairs_are_counted_by_hand() -> None:
    """K = 3 of two prompts. 0.995 and 0.004 are beyond, 0.985 is not; 0.505 and 0.5 are even, 0.52 is not."""
    odds = [math.log(p / (1 - p)) for p in (0.995, 0.985, 0.505, 0.52, 0.004, 0.5)]
    logits = np.zeros((2, 3, 3))
    for (n, i, j), x in zip([(n, i, j) for n in range(2) for i, j in ((0, 1), (0, 2), (1, 2))], odds, strict=True):
        logits[n, i, j], logits[n, j, i] = x, -x
    found = statistics_of(logits)
    assert (found["certain_pairs"], found["even_pairs"]) == (round(2 / 6, 4), round(2 / 6, 4))
    empty = Statistics().summary()
    assert (empty["certain_pairs"], empty["even_pairs"]) == (None, None)


def test_a_pair_counts_alike_whichever_of_the_two_is_named_first() -> None:
    """P = 0.01 was certain, and P = 0.99 was not: 1 - 0.99 is a little more than 0.01."""
    for p in (0.99, 0.01):
        assert scale_of(np.array([math.log(p / (1 - p))])).certain == 0
    assert [scale_of(np.array([sign * math.log(0.991 / 0.009)])).certain for sign in (1, -1)] == [1, 1]


def scale_of(odds: np.ndarray) -> Scale:
    """Of pairs of K = 2, (N,)."""
    logits = np.zeros((len(odds), 2, 2))
    logits[:, 0, 1], logits[:, 1, 0] = odds, -odds
    made = Scale()
    made.add(preference.log_odds(logits, "paper"))
    return made


def test_a_scale_that_teaches_nothing_is_told_with_a_temperature_that_does() -> None:
    """Half of 101 log-odds are beyond 20: divided by 20 / log 3 they are beyond 3/4."""
    hard = scale_of(np.linspace(10, 30, 101))
    assert hard.shares() == {"certain_pairs": 1.0, "even_pairs": 0.0}
    said = hard.warning(1.0)
    assert "100% of the pairs" in said
    assert "hard label" in said
    suggested = float(said.split("--ranker_temperature ")[1].split()[0])
    assert suggested == pytest.approx(20 / math.log(3), rel=0.05)
    assert scale_of(np.linspace(10, 30, 101) / suggested).warning(suggested) == ""
    assert float(hard.warning(3.0).split("--ranker_temperature ")[1].split()[0]) == pytest.approx(
        3 * suggested, rel=0.05
    )

    flat = scale_of(np.linspace(0.001, 0.021, 101))
    said = flat.warning(1.0)
    assert "nothing to learn" in said
    assert float(said.split("--ranker_temperature ")[1].split()[0]) == pytest.approx(0.011 / math.log(3), rel=0.05)
    assert "No --ranker_temperature changes that" in scale_of(np.zeros(10)).warning(1.0)

    assert scale_of(np.array([10.0] * 90 + [1.0] * 10)).warning(1.0) == ""  # 90% are not yet nearly all
    assert scale_of(np.array([10.0] * 91 + [1.0] * 9)).warning(1.0) != ""
    assert Scale().warning(1.0) == ""


def test_compute_prob_warns_and_the_manifest_has_the_shares(tmp_path: Path) -> None:
    """Rewards as far apart as Skywork's, 23 against 3.6: all at 0 and 1. With the suggested temperature no warning."""
    rng = np.random.default_rng(0)
    rankings = [
        {"prompt_id": f"id{n}", "logits": scores_as_logits(*rng.normal(10, 40, 3)).tolist(), "scores": [0.0] * 3}
        for n in range(30)
    ]
    out = write(tmp_path / "d", responses_of(30, 3), rankings)
    command = ["scripts/compute_prob.py", f"--output_dir={out}", "--pairs=3", "--estimator=paper"]
    said = tiny.succeed(*command)
    assert "compute_prob: warning: 9" in said
    counts = read_json(out / "train.manifest.json")["counts"]
    assert counts["certain_pairs"] > 0.9
    assert counts["circular_share"] == 0
    temperature = said.split("--ranker_temperature ")[1].split()[0]
    again = tiny.succeed(*command, f"--ranker_temperature={temperature}", "--overwrite")
    assert "warning" not in again
    assert read_json(out / "train.manifest.json")["counts"]["certain_pairs"] < 0.5
    help_text = tiny.succeed("scripts/compute_prob.py", "--help")
    read, _ = help_text.split("settings that other scripts read")
    assert "--ranker_temperature" in read
    assert "auto|released|paper" in read


def test_a_length_penalty_is_no_part_of_the_rankers_scale(tmp_path: Path) -> None:
    """No --ranker_temperature would help: it divides the logits, and the penalty comes behind it."""
    logits = scores_as_logits(0.3, 0.0, -0.3).tolist()
    rankings = [{"prompt_id": f"id{n}", "logits": logits, "scores": [0.0] * 3} for n in range(30)]
    out = write(tmp_path / "d", responses_of(30, 3), rankings)
    command = ["scripts/compute_prob.py", f"--output_dir={out}", "--pairs=3", "--estimator=paper", "--overwrite"]
    shares = []
    for penalty in (0, 100):
        assert "warning" not in tiny.succeed(*command, f"--length_penalty={penalty}")
        counts = read_json(out / "train.manifest.json")["counts"]
        shares.append((counts["certain_pairs"], counts["even_pairs"]))
    assert shares == [(0, 0), (0, 0)]
    assert counts["p"]["mean"] > 0.95


def test_the_preflight_says_what_released_does_and_looks_at_what_is_ranked(models: Path, tmp_path: Path) -> None:
    def notes(*more: str) -> str:
        return "\n".join(text for level, text in examined(models, tmp_path, *more) if level == "note")

    assert "doubles the differences" in notes("--estimator=released")
    assert "doubles" not in notes("--estimator=auto")
    pairrm = f"--ranker={models / 'PairRM'}"
    assert "doubles" not in notes("--estimator=released", pairrm)

    # a run that has begun: iteration 1 is ranked
    rows = [
        {"prompt_id": f"p{n}", "logits": scores_as_logits(30, 0, -30).tolist(), "scores": [0.0] * 3} for n in range(9)
    ]
    write_parquet(tmp_path / "run" / "iter1" / "data" / "ranking" / "shard-00000.parquet", ranking_schema(), rows)
    assert "of 27 pairs that iteration 1 has ranked: 100% of the pairs have a preference beyond 0.99" in notes()
    assert "iteration 1 has ranked" not in notes("--ranker_temperature=30")

    # damaged, it is made again, so that nothing is wrong with the run
    path = tmp_path / "run" / "iter1" / "data" / "ranking" / "shard-00000.parquet"
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[:40] + bytes(400) + whole[440:]):
        path.write_bytes(damaged)
        assert not [text for level, text in examined(models, tmp_path) if level == "no"]
        assert "iteration 1 has ranked" not in notes()


# a system turn

PROMPT = [{"role": "system", "content": "Answer in German."}, {"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("reward") / "llama", "llama")


def test_a_system_turn_is_left_out_of_what_a_reward_model_reads(reward: Path) -> None:
    """Skywork-Reward-V2's card forbids one. Against transformers alone, with and without the turn in the prompt."""
    answers = ["It scatters.", "Weil es streut.", "No."]
    whole, bare = one_by_one(reward, PROMPT, answers), one_by_one(reward, PROMPT[1:], answers)
    assert np.abs(whole - bare).max() > 0.01
    for system, expected in (("keep", whole), ("drop", bare)):
        recipe = Recipe(ranker=str(reward), ranker_backend="reward-model", ranker_system=system)
        found = dict(prompt_logits(reward_model.load(recipe), [(PROMPT, answers)]))[0]
        np.testing.assert_allclose(found, expected, atol=3e-5)


def test_a_prompt_of_a_system_turn_alone_has_no_score(reward: Path) -> None:
    """Another tool's. Its prompt is set aside, and the others keep theirs."""
    ranker = RewardModel(reward, "cpu", 4096, system="drop")
    found = dict(prompt_logits(ranker, [(PROMPT[:1], ["a", "b"]), (PROMPT, ["a", "b"])]))
    assert np.isnan(found[0][0][1])
    assert np.isfinite(found[1]).all()
    assert ranker.count_cut(PROMPT[:1], ["a", "b"]) == 0


def test_drop_is_in_the_identity_and_keep_is_not(reward: Path) -> None:
    """A ranking from before there was the setting goes on."""
    keep = Recipe(ranker=str(reward), ranker_backend="reward-model")
    assert set(reward_model.identity(keep)) == {"backend", "ranker"}
    dropped = reward_model.identity(replace(keep, ranker_system="drop"))
    assert dropped == {**reward_model.identity(keep), "ranker_system": "drop"}


@pytest.mark.parametrize("backend", ["auto", "pairrm", "llm-blender", "judge", "function"])
def test_drop_is_refused_for_a_ranker_that_would_not_heed_it(backend: str) -> None:
    asks = "pairrm" if backend == "auto" else backend
    with pytest.raises(UsageError, match=f"--ranker_system drop is for .*reward-model.*; {asks} does not"):
        load_recipe(overrides={"ranker_system": "drop", "ranker_backend": backend})
    load_recipe(overrides={"ranker_system": "drop", "ranker_backend": "reward-model"})


def test_a_manifest_of_before_has_no_shares_on_the_page() -> None:
    """report.html of an older run: rows without a number are left out, and none fails."""
    old = IterationRecord(1, compared={}, paired={"intransitive_triples": 0.1, "pairs": 6, "tied_pairs": 0, "train": 1})
    new = IterationRecord(
        2, compared={}, paired={**old.paired, "certain_pairs": 0.5, "even_pairs": 0, "circular_share": 0.25}
    )
    run = RunRecord("r", {}, [old, new], {}, None, [], {}, [], {}, [])
    rows = {row[0]: row[1:] for row in _data_table(run)}
    assert rows["pairs beyond 0.99 or below 0.01, %"] == ["", "50"]
    assert rows["share of the log-odds that goes in circles"] == ["", "0.25"]
