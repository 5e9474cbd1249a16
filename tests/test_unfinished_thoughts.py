"""Rankers, judges, measures and pages see answers alone; a response whose thought did not end is behind all others."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import tiny_thinkers
from test_doctor import opened, value_of
from test_page import dump, make_run
from tiny_thinkers import MUSING, SAYING

from sppo.evaluation.health import health
from sppo.evaluation.match import Match, _blocks, _lengths, _Pairing
from sppo.evaluation.matrix import interval, length_controlled, mean_length
from sppo.evaluation.measures import measure
from sppo.evaluation.page.gather import gather
from sppo.evaluation.page.page import warnings, write_page
from sppo.generation.combine import unfinished_warning
from sppo.generation.shards import generate_shards
from sppo.hub.data_card import data_card
from sppo.method.winrates import among_answers, over_no_answer, two_deviations_below
from sppo.pairing.training_set import compute_prob
from sppo.preflight.generation import look_at_model, look_at_tokenizer
from sppo.rankers.function import FunctionRanker, load_function
from sppo.ranking.shards import rank_shards
from sppo.recipe import Recipe
from sppo.schema import NO_ANSWER, has_answer, responses_schema
from sppo.store.files import read_json
from sppo.store.parquet import write_parquet
from sppo.store.shards import Slice

# A ranker that fails where it sees a thought, or anything but an answer; longer answers are better.
STRICT = f"""
MUSING, SAYING = {set(MUSING)!r}, {set(SAYING)!r}

def check(*texts):
    for text in texts:
        words = set(text.split())
        if not words or words - SAYING:
            raise RuntimeError(f"no answer: {{text!r}}")

def longer(prompt, first, second):
    check(first, second)
    return (len(first) - len(second)) / 10

def colours(prompt, answer):
    check(answer)
    return {{"colours": float(len(answer.split()))}}
"""


@pytest.fixture
def strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`strict:longer` can be imported, here and in what is started with this directory in PYTHONPATH."""
    (tmp_path / "strict.py").write_text(STRICT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "strict", raising=False)
    return "strict:longer"


def said(text: str, thought_tokens: int | None = 2) -> dict[str, Any]:
    ids = [7] * ((thought_tokens or 0) + len(text.split()) + 1)
    return {"text": text, "token_ids": ids, "finish_reason": "stop", "thought": "hmm", "thought_tokens": thought_tokens}


UNFINISHED = {"text": "", "token_ids": [7] * 9, "finish_reason": "length", "thought": "hmm hmm", "thought_tokens": 9}


def world(data: Path) -> Path:
    """responses.parquet of three prompts: with one response of three, all, and two that did not end their thought."""
    answers = [
        [said("red red red red"), said("red red"), UNFINISHED],
        [UNFINISHED] * 3,
        [UNFINISHED, said("red"), UNFINISHED],
    ]
    rows = [
        {"prompt_id": f"p{i}", "prompt": [{"role": "user", "content": f"q{i}"}], "responses": responses}
        for i, responses in enumerate(answers)
    ]  # fmt: skip
    write_parquet(data / "responses.parquet", responses_schema(), rows)
    return data


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def train_rows(data: Path, **settings: Any) -> dict[str, dict[str, Any]]:
    compute_prob(Recipe(pairs=3, **settings), data, True)
    return {row["prompt_id"]: row for row in pq.read_table(data / "train.parquet").to_pylist()}


def test_what_has_no_answer_is_last_by_numbers_worked_out_by_hand(tmp_path: Path, strict: str) -> None:
    """Lengths 15 and 7 of the two answers: C_01 = 0.8, C_10 = -0.8. The third is not asked about."""
    data = world(tmp_path / "data")
    recipe = Recipe(pairs=3, ranker=strict, ranker_backend="function")
    rank_shards(recipe, data, [Slice(0, 0)], False)
    ranked = {row["prompt_id"]: row for row in pq.read_table(data / "ranking/shard-00000.parquet").to_pylist()}
    assert set(ranked) == {"p0", "p2"}
    np.testing.assert_allclose(ranked["p0"]["logits"], [[0, 0.8, 0], [-0.8, 0, 0], [0, 0, 0]], rtol=1e-6)
    assert ranked["p0"]["scores"] == [pytest.approx(0.8), pytest.approx(-0.8), None]
    assert (ranked["p2"]["logits"], ranked["p2"]["scores"]) == ([[0.0] * 3] * 3, [None, 0.0, None])
    counts = read_json(data / "ranking/shard-00000.manifest.json")["counts"]
    assert (counts["skipped"], counts["unfinished_thoughts"]) == ({NO_ANSWER: 1}, 6)

    # paper: sigmoid((0.8 + 0.8) / 2); released: s = +-(0.8 + 0.8) / 2 among two, so sigmoid(1.6)
    for estimator, p in (("paper", sigmoid(0.8)), ("released", sigmoid(1.6))):
        rows = train_rows(data, estimator=estimator)
        np.testing.assert_allclose(rows["p0"]["probability"], [[0.5, p, 1], [1 - p, 0.5, 1], [0, 0, 0.5]], rtol=1e-6)
        assert (rows["p0"]["chosen_index"], rows["p0"]["rejected_index"]) == (0, 2)
        assert rows["p0"]["chosen_probs"] == 1
        assert rows["p0"]["chosen_probs_win"] == pytest.approx((1.5 + p) / 3)
        assert rows["p0"]["chosen_probs_lose"] == pytest.approx(0.5 / 3)
        assert rows["p0"]["chosen"][-1] == {"role": "assistant", "content": "red red red red"}
        assert rows["p0"]["rejected"][-1] == {"role": "assistant", "content": ""}
        assert rows["p0"]["rm_scores"] == [pytest.approx(0.8), pytest.approx(-0.8), None]
        assert rows["p2"]["probability"] == [[0.5, 0, 0.5], [1, 0.5, 1], [0.5, 0, 0.5]]  # two without an answer: 1/2
        assert (rows["p2"]["chosen_index"], rows["p2"]["rejected_index"]) == (1, 0)
        assert (rows["p2"]["chosen_probs_win"], rows["p2"]["chosen_probs_lose"]) == (2.5 / 3, 1 / 3)
        counts = read_json(data / "train.manifest.json")["counts"]
        assert (counts["prompts"], counts["unfinished_thoughts"], counts["dropped"]) == (2, 3, {"not ranked": 1})
        assert counts["position_bias"] is None  # no prompt whose responses all have an answer


def test_neither_length_nor_temperature_nor_selection_puts_an_answer_behind_none(tmp_path: Path, strict: str) -> None:
    data = world(tmp_path / "data")
    rank_shards(Recipe(pairs=3, ranker=strict, ranker_backend="function"), data, [Slice(0, 0)], False)
    # the answers' mean length is 11, so L (15 - 7) / 11 = 0.8 takes all of C_01 away
    for estimator in ("paper", "released"):
        for penalty, p in ((1.1, 0.5), (100.0, 0.0)):
            found = train_rows(data, estimator=estimator, length_penalty=penalty)["p0"]["probability"]
            np.testing.assert_allclose(found, [[0.5, p, 1], [1 - p, 0.5, 1], [0, 0, 0.5]], atol=1e-6)
    found = train_rows(data, estimator="paper", ranker_temperature=1e9)["p0"]["probability"]
    np.testing.assert_allclose(found, [[0.5, 0.5, 1], [0.5, 0.5, 1], [0, 0, 0.5]], atol=1e-6)
    for select in ("best_worst", "best_random", "best_2sd"):
        for prompt, row in train_rows(data, estimator="paper", select=select).items():
            assert row["chosen_index"] == (0 if prompt == "p0" else 1)
    assert train_rows(data, estimator="paper", select="best_2sd")["p0"]["rejected_index"] == 1


def test_the_rules_themselves() -> None:
    """All have an answer: every number is the same to the last bit. None has: all is 1/2, and no number is lost."""
    rng = np.random.default_rng(0)
    logits, everybody = rng.normal(size=(4, 3, 3)), np.ones((4, 3), dtype=bool)
    for estimator in ("paper", "released"):
        assert (among_answers(logits, everybody, estimator) == logits).all()
        assert (among_answers(logits, ~everybody, estimator) == 0).all()
    assert (over_no_answer(logits, everybody) == logits).all()
    assert (over_no_answer(np.full((4, 3, 3), np.nan), ~everybody) == 0.5).all()
    p = over_no_answer(rng.random((4, 3, 3)), np.array([[True, False, True]] * 4))
    assert (p[:, 0, 1] == 1).all()
    assert (p[:, 1, 0] == 0).all()
    # mean 2, deviation 1, so 0 is aimed at: 1 is the nearest; without another the one without a score
    assert two_deviations_below(np.array([[3.0, 1.0, np.nan]]), np.array([0])).tolist() == [1]
    assert two_deviations_below(np.array([[3.0, np.nan]]), np.array([0])).tolist() == [1]


def test_a_match_of_answers_and_none_by_hand(tmp_path: Path, strict: str) -> None:
    """Two against two: P by the judge for the two answers, 1, 0, and 1/2. Means of 5/8 and so on, nothing is lost."""
    ranker = FunctionRanker(load_function(strict, "--ranker"), strict)
    prompt = [{"role": "user", "content": "q"}]
    first = _Pairing("p", prompt, [said("red red"), UNFINISHED], [UNFINISHED, said("red")])
    both = _Pairing("q", prompt, [UNFINISHED, UNFINISHED], [said("red"), said("blue")])
    blocks = list(_blocks(ranker, [first, both], 1.0))
    p = sigmoid(0.4)  # 7 characters and 3
    np.testing.assert_allclose(blocks, [[[1, p], [0.5, 0]], [[0, 0], [0, 0]]])
    assert interval(np.array(blocks)).rate == pytest.approx((1.5 + p) / 8)

    lengths = _lengths([each.challenger for each in (first, both)]), _lengths([each.opponent for each in (first, both)])
    np.testing.assert_array_equal(lengths[0], [[3, np.nan], [np.nan, np.nan]])  # two words and the end
    assert (mean_length(lengths[0]), mean_length(lengths[1])) == (3.0, 2.0)
    assert mean_length(np.full((1, 2), np.nan)) == 0.0
    assert length_controlled(Match(np.array(blocks), *lengths)) == pytest.approx(p, abs=1e-3)  # of the one pair


def test_health_is_that_of_answers() -> None:
    found = health([said("red red"), said(""), UNFINISHED, said("red", None)])
    # tokens of answers: 3, 1, none, 2; of thoughts: 2, 2, 9
    assert found == {
        "mean_tokens": 2.0,
        "empty": 0.25,
        "repeated": 0.0,
        "cut": 0.25,
        "mean_thought_tokens": pytest.approx(13 / 3),
        "unfinished_thoughts": 0.25,
    }
    assert set(health([said("red", None)])) == {"mean_tokens", "empty", "repeated", "cut"}


def test_five_percent_are_warned_of() -> None:
    counts = {"responses": 100, "unfinished_thoughts": 5}
    assert unfinished_warning(counts) == ""
    assert "6 of 100 responses have no answer" in unfinished_warning({**counts, "unfinished_thoughts": 6})
    assert unfinished_warning({"responses": 100}) == ""


def test_the_preflight_warns_of_iterations_that_are_drawn(models: Path, tmp_path: Path) -> None:
    """It draws nothing itself, but a run that goes on may be stopped in time."""
    run = opened(models, tmp_path, "--iterations=2")

    def said() -> list[str]:
        looked = look_at_tokenizer(run, value_of(look_at_model(run)))
        return [finding.text for finding in looked if "no answer" in finding.text]

    assert said() == []
    counts = {"responses": 100, "unfinished_thoughts": 6}
    manifest = {"inputs": {}, "settings": {}, "outputs": {}, "counts": counts}
    (run.run_dir / "iter2/data").mkdir(parents=True)
    dump(run.run_dir / "iter2/data/responses.manifest.json", manifest)
    assert [text.startswith("iteration 2: 6 of 100 responses have no answer") for text in said()] == [True]


def test_the_page_folds_thoughts_away(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    evil = {**said("red <b>"), "thought": "</details><script>alert(1)</script>"}
    row = {"prompt_id": "p", "prompt": [{"role": "user", "content": "Why?"}], "responses": [evil, UNFINISHED]}
    for i in range(3):
        write_parquet(run / f"iter{i}/eval/responses.parquet", responses_schema(), [row])
    manifest = read_json(run / "iter1/data/responses.manifest.json")
    manifest["counts"] |= {"unfinished_thoughts": 1, "thought_tokens": 8, "thoughts_cut_at_budget": 3}
    dump(run / "iter1/data/responses.manifest.json", manifest)
    text = write_page(run).read_text()
    assert text.count('<details class="thought"><summary>thought</summary>') == 6
    assert "&lt;/details&gt;&lt;script&gt;" in text
    assert "</details><script>" not in text
    assert text.count("no answer: the thought did not end</em>") == 3
    assert "<td>responses without an answer: the thought did not end, %</td><td>25</td>" in text
    assert "<td>thoughts ended by --thinking_budget</td><td>3</td>" in text
    assert any("Iteration 1: 25% of the responses have no answer" in line for line in warnings(gather(run)))


def test_the_chain_and_the_card_show_answers_alone(tmp_path: Path, strict: str) -> None:
    """A ranker that fails if it ever sees a thought; the user's measure too. The counts are on the card."""
    model = tiny_thinkers.thinker(tmp_path / "model", "special")
    prompts = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Why {n}?"} for n in range(12)])
    recipe = Recipe(
        model=str(model), prompts=str(prompts), pairs=3, maxlen=12, engine="transformers", temperature=1.0, top_p=1.0,
        ranker=strict, ranker_backend="function", measure="strict:colours",
    )  # fmt: skip
    data = tmp_path / "data"
    generate_shards(recipe, data, [Slice(0, 0)], False)
    rank_shards(recipe, data, [Slice(0, 0)], False)
    compute_prob(recipe, data, False)
    rows = pq.read_table(data / "train.parquet").to_pylist()
    unfinished = sum(not has_answer(r) for row in rows for r in row["responses"])
    assert unfinished > 0
    for row in rows:
        chosen, rejected = (row["responses"][row[f"{side}_index"]] for side in ("chosen", "rejected"))
        assert (row["chosen"][-1]["content"], row["rejected"][-1]["content"]) == (chosen["text"], rejected["text"])
        assert has_answer(chosen)
        assert has_answer(rejected) == all(map(has_answer, row["responses"]))  # the worst

    found = measure(recipe, data, "")
    answers = [r for row in pq.read_table(data / "responses.parquet").to_pylist() for r in row["responses"]]
    answers = [r for r in answers if has_answer(r)]
    assert found["colours"] == pytest.approx(sum(len(r["text"].split()) for r in answers) / len(answers), rel=1e-4)

    card = data_card("o/n", "t", ["train", "test"], data)
    assert "thought_tokens (how many of token_ids come before" in card
    assert "| thinking | ['<think>', '</think>'] |" in card or '["<think>", "</think>"]' in card
    counts = read_json(data / "responses.manifest.json")["counts"]
    assert f"| responses without an answer, because the thought did not end | {counts['unfinished_thoughts']} |" in card


@pytest.mark.slow
def test_every_command_shows_a_ranker_the_answers_alone(tmp_path: Path, strict: str) -> None:
    """generate, rank, compute_prob, report with a win matrix, and best_of_n, as a user types them."""
    model, there = tiny_thinkers.thinker(tmp_path / "model", "opened"), {"PYTHONPATH": str(tmp_path)}
    prompts = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Why {n}?"} for n in range(8)])
    run = tmp_path / "run"
    data = run / "iter1" / "data"
    drawing = [f"--model={model}", f"--prompts={prompts}", "--maxlen=12", "--engine=transformers", "--temperature=1"]
    ranking = [f"--ranker={strict}", "--ranker_backend=function"]
    tiny.succeed("scripts/generate.py", *drawing, "--pairs=3", f"--output_dir={data}", **there)
    tiny.succeed("scripts/rank.py", *ranking, "--pairs=3", f"--output_dir={data}", **there)
    shown = tiny.succeed("scripts/compute_prob.py", "--pairs=3", "--estimator=paper", f"--output_dir={data}", **there)
    assert "unfinished_thoughts: " in shown

    shutil.copytree(model, run / "iter1" / "model")
    (run / "iter1/model/sppo_manifest.json").write_text(json.dumps({"loss": 2.0, "beta2_loss": 0.02}))
    asked = [f"--run_dir={run}", "--iteration=1", f"--base={model}", f"--eval_prompts={prompts}", "--gpus=none"]
    asked += ["--measure=strict:colours", "--base_perplexity", *drawing[2:], *ranking]
    tiny.succeed("scripts/report.py", *asked, **there)
    tiny.succeed("scripts/win_matrix.py", f"--run_dir={run}", *ranking, **there)
    (row,) = read_json(run / "summary.json")
    assert row["unfinished_thoughts"] > 0
    assert row["ranker_win_rate"] == pytest.approx(0.5, abs=1e-4)  # the same model with the same seeds
    assert '<details class="thought">' in (run / "report.html").read_text()

    best = tmp_path / "best"
    tiny.succeed("scripts/best_of_n.py", *drawing, *ranking, "--n=4", f"--output_dir={best}", "--gpus=none", **there)
    assert all(set(row["response"].split()) <= {*SAYING} for row in pq.read_table(best / "best.parquet").to_pylist())
    assert read_json(best / "best.manifest.json")["counts"]["unfinished thoughts"] > 0
