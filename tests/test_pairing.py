"""compute_prob as a whole: both estimators, the join, the hold-out, others' files, and what a failure leaves."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from sppo.command.errors import SPPOError, UsageError
from sppo.pairing import join
from sppo.pairing.training_set import compute_prob
from sppo.recipe import Recipe
from sppo.schema import ranking_schema, responses_schema
from sppo.store.files import atomic_together, digest, read_json
from sppo.store.parquet import read_batches

Rows = list[dict[str, Any]]


def responses_of(prompts: int, k: int) -> Rows:
    """Prompts of one to three messages, responses of all lengths, all columns that generate.py writes."""
    rng = np.random.default_rng(k)
    rows = []
    for n in range(prompts):
        system = [{"role": "system", "content": "be brief"}] * (n % 2)
        turns = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "so."}] * (n % 3 == 2)
        prompt = [*system, *turns, {"role": "user", "content": f"prompt {n}"}]
        responses = []
        for i in range(k):
            ids = rng.integers(0, 99, 1 + int(rng.integers(9))).tolist()
            logps = [-0.5] * len(ids) if n % 2 else None
            text = f"é{i} " + "x" * len(ids)
            response = {"text": text, "token_ids": ids, "finish_reason": "stop", "logps": logps}
            responses.append({**response, "thought": None, "thought_tokens": None})
        row = {"prompt_id": f"id{n}", "prompt": prompt, "responses": responses}
        rows.append({**row, "prompt_token_ids": [n, n + 1], "tokenizer": "t", "prompt_thoughts": None})
    return rows


def rankings_of(prompts: int, k: int) -> Rows:
    logits = np.random.default_rng(100 + k).normal(size=(prompts, k, k)).astype(np.float32) * 2
    logits[:, range(k), range(k)] = 0
    return [{"prompt_id": f"id{n}", "logits": c.tolist(), "scores": [0.0] * k} for n, c in enumerate(logits)]


def write(out: Path, responses: Rows, *shards: Rows) -> Path:
    (out / "ranking").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(responses, schema=responses_schema()), out / "responses.parquet")
    for number, rows in enumerate(shards):
        table = pa.Table.from_pylist(rows, schema=ranking_schema())
        pq.write_table(table, out / "ranking" / f"shard-{number:05d}.parquet", row_group_size=7)
    return out


def training_rows(out: Path, split: str = "train") -> Rows:
    return pq.read_table(out / f"{split}.parquet").to_pylist()


def by_hand(response: dict[str, Any], logits: list[list[float]], estimator: str) -> dict[str, Any]:
    """The row of train.parquet, one number after the other."""
    k = len(logits)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    scores = [sum(logits[i][j] - logits[j][i] for j in range(k)) / k for i in range(k)]
    p = [[0.5] * k for _ in range(k)]
    for i in range(k):
        for j in range(k):
            gap = scores[i] - scores[j] if estimator == "released" else (logits[i][j] - logits[j][i]) / 2
            p[i][j] = sigmoid(gap)
    rates = [sum(line) / k for line in p]
    order = scores if estimator == "released" else rates
    w, lose = order.index(max(order)), order.index(min(order))
    sides = {}
    for side, i in (("chosen", w), ("rejected", lose)):
        sides[side] = [*response["prompt"], {"role": "assistant", "content": response["responses"][i]["text"]}]
        sides[f"{side}_index"] = i
    sides.update(chosen_probs=p[w][lose], chosen_probs_win=rates[w], chosen_probs_lose=rates[lose])
    return {**response, **sides, "probability": p, "rm_scores": scores}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        if name in ("probability", "rm_scores") or name.startswith("chosen_probs"):
            np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_both_estimators_from_the_same_logits(tmp_path: Path, k: int) -> None:
    """Users try the other estimator without ranking again: the stored logits are read and left alone."""
    responses, rankings = responses_of(20, k), rankings_of(20, k)
    out = write(tmp_path / "d", responses, rankings[:9], rankings[:8:-1])
    before = tiny.contents(out / "ranking")
    compute_prob(Recipe(pairs=k, estimator="released"), out, False)
    for estimator in ("released", "paper"):
        if estimator == "paper":
            with pytest.raises(SPPOError, match=r"settings\.estimator"):
                compute_prob(Recipe(pairs=k, estimator="paper"), out, False)
            compute_prob(Recipe(pairs=k, estimator="paper"), out, True)
        rows = training_rows(out)
        assert len(rows) == 20
        for row, response, ranking in zip(rows, responses, rankings, strict=True):
            assert_same(row, by_hand(response, ranking["logits"], estimator))
        assert tiny.contents(out / "ranking") == before


def test_a_length_penalty_turns_the_pairs_of_a_ranker_that_likes_length(tmp_path: Path) -> None:
    """A ranker that only counts characters, and the penalty that takes all of it away: what is longer gains nothing."""
    responses, rankings = responses_of(30, 3), rankings_of(30, 3)
    for response, ranking in zip(responses, rankings, strict=True):
        n = [len(r["text"]) for r in response["responses"]]
        ranking["logits"] = [[2 * (a - b) / (sum(n) / 3) for b in n] for a in n]
    out = write(tmp_path / "d", responses, rankings)
    command = ["scripts/compute_prob.py", f"--output_dir={out}", "--pairs=3", "--estimator=paper", "--keep_degenerate"]
    tiny.succeed(*command)
    counts = read_json(out / "train.manifest.json")["counts"]
    assert min(counts["score_length_correlation"], counts["win_rate_length_correlation"]) > 0.95
    refused = tiny.run(*command, "--length_penalty=2")
    assert refused.returncode == 1
    assert "settings.length_penalty" in refused.stderr
    tiny.succeed(*command, "--length_penalty=2", "--overwrite")
    for row in training_rows(out):
        np.testing.assert_allclose(row["probability"], 0.5, atol=1e-6)
        assert max(row["rm_scores"]) > 0 or len({len(r["text"]) for r in row["responses"]}) == 1  # the ranker's own
    tiny.succeed(*command, "--length_penalty=4", "--overwrite")
    for row in training_rows(out):  # twice as much: the shortest is chosen
        lengths = [len(r["text"]) for r in row["responses"]]
        assert len(row["chosen"][-1]["content"]) == min(lengths)
        assert len(row["rejected"][-1]["content"]) == max(lengths)


def test_the_released_scripts_answers_come_out_of_the_whole_stage(tmp_path: Path) -> None:
    """Scores s come from logits (s_i - s_j) / 2, up to their mean, which no probability sees."""
    golden = json.loads((tiny.GOLDEN / "compute_prob.json").read_text())["rows"]
    responses, rankings = responses_of(len(golden), 5), rankings_of(len(golden), 5)
    for ranking, row in zip(rankings, golden, strict=True):
        ranking["logits"] = [[(a - b) / 2 for b in row["scores"]] for a in row["scores"]]
    out = write(tmp_path / "d", responses, rankings)
    compute_prob(Recipe(pairs=5, keep_degenerate=True), out, False)
    for found, row, response in zip(training_rows(out), golden, responses, strict=True):
        texts = [r["text"] for r in response["responses"]]
        assert found["chosen"][-1]["content"] == texts[row["chosen"]]
        assert found["rejected"][-1]["content"] == texts[row["rejected"]]
        for name in ("probability", "chosen_probs", "chosen_probs_win", "chosen_probs_lose"):
            np.testing.assert_allclose(found[name], row[name], atol=1e-6, err_msg=name)
    compute_prob(Recipe(pairs=5), out, True)  # of the forty, row 3 has five equal scores
    assert read_json(out / "train.manifest.json")["counts"]["dropped"] == {"equal scores": 1}


def test_the_order_and_the_row_groups_of_the_rankings_decide_nothing(tmp_path: Path) -> None:
    responses, rankings = responses_of(50, 3), rankings_of(50, 3)
    shuffled = [rankings[i] for i in np.random.default_rng(0).permutation(50)]
    tables = []
    for name, shards in (("a", [rankings]), ("b", [shuffled[:1], [], shuffled[1:30], shuffled[30:]])):
        out = write(tmp_path / name, responses, *shards)
        compute_prob(Recipe(pairs=3, test_size=0.2), out, False)
        tables.append([pq.read_table(out / f"{split}.parquet") for split in ("train", "test")])
    assert tables[0] == tables[1]
    assert [t.num_rows for t in tables[0]] == [40, 10]


def test_a_ranking_is_found_by_its_prompts_id_and_once(tmp_path: Path) -> None:
    rankings = rankings_of(40, 2)
    write(tmp_path, responses_of(1, 2), rankings[:20], rankings[20:])
    shards = sorted((tmp_path / "ranking").iterdir())
    found = join.Rankings(shards, 2)
    rows = found.find(["id39", "stranger", "id0", "id20", ""])
    assert rows.tolist() == [39, -1, 0, 20, -1]
    np.testing.assert_array_equal(found.logits[rows[0]], np.float32(rankings[39]["logits"]))
    write(tmp_path, responses_of(1, 2), rankings[:20], rankings[19:])
    with pytest.raises(SPPOError, match="shard-00001.*id19 is ranked twice"):
        join.Rankings(shards, 2)


def test_the_hold_out_has_exactly_the_prompts_asked_for(tmp_path: Path) -> None:
    """1500 rows, 600 contents: prompts asked two or three times stay together, unranked rows do not count."""
    responses, rankings = responses_of(1500, 2), rankings_of(1500, 2)
    for n, row in enumerate(responses):
        row["prompt"] = [{"role": "user", "content": f"content {n % 600}"}]
    unranked = {**responses[0], "prompt_id": "unranked", "prompt": [{"role": "user", "content": "another"}]}
    out = write(tmp_path / "d", [unranked, *responses], rankings)
    held_out = []
    for size, seed, expected in ((137, 42, 137), (0.25, 1, 150), (0.25, 1, 150), (0.25, 2, 150), (599, 42, 599)):
        compute_prob(Recipe(pairs=2, test_size=size, seed=seed), out, True)
        sides = [[r["prompt"][0]["content"] for r in training_rows(out, split)] for split in ("train", "test")]
        assert len(sides[0]) + len(sides[1]) == 1500
        assert not set(sides[0]) & set(sides[1])
        assert len(set(sides[1])) == expected
        assert len(set(sides[0])) == 600 - expected
        held_out.append(set(sides[1]))
    assert held_out[1] == held_out[2] != held_out[3]  # the seed decides which
    assert read_json(out / "train.manifest.json")["counts"]["dropped"] == {"not ranked": 1}
    with pytest.raises(UsageError, match="there are 600 prompts"):
        compute_prob(Recipe(pairs=2, test_size=600), out, True)


def test_others_types_and_row_groups_make_the_same_training_set(tmp_path: Path) -> None:
    """What pandas, polars or datasets write: 64-bit offsets and integers, fields in their own order, one row group."""
    responses, rankings = responses_of(30, 3), rankings_of(30, 3)
    ours, theirs = write(tmp_path / "ours", responses, rankings), tmp_path / "theirs"
    (theirs / "ranking").mkdir(parents=True)
    message = pa.struct([("content", pa.large_string()), ("name", pa.string()), ("role", pa.large_string())])
    ids = pa.large_list(pa.int64())
    logps = ("logps", pa.large_list(pa.float64()))
    response = pa.struct([("finish_reason", pa.string()), ("token_ids", ids), logps, ("text", pa.large_string())])
    schema = pa.schema(
        [
            ("extra", pa.int8()),
            ("tokenizer", pa.dictionary(pa.int32(), pa.string())),
            ("prompt_token_ids", pa.list_(pa.uint16(), 2)),
            ("responses", pa.list_(response, 3)),
            ("prompt", pa.large_list(message)),
            ("prompt_id", pa.large_string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(responses, schema=schema), theirs / "responses.parquet", row_group_size=11)
    matrix = pa.list_(pa.list_(pa.float64(), 3), 3)
    schema = pa.schema([("logits", matrix), ("prompt_id", pa.large_string())])
    pq.write_table(pa.Table.from_pylist(rankings, schema=schema), theirs / "ranking" / "all.parquet")
    for out in (ours, theirs):
        compute_prob(Recipe(pairs=3, test_size=3), out, False)
    for split in ("train", "test"):
        assert pq.read_table(theirs / f"{split}.parquet") == pq.read_table(ours / f"{split}.parquet")
    # the named columns and no more
    least = [{"prompt_id": r["prompt_id"], "prompt": r["prompt"]} for r in responses]
    least = [{**a, "responses": [{"text": x["text"]} for x in r["responses"]]} for a, r in zip(least, responses)]  # noqa: B905
    pq.write_table(pa.Table.from_pylist(least), theirs / "responses.parquet")
    compute_prob(Recipe(pairs=3, test_size=3), theirs, True)
    for found, row in zip(training_rows(theirs), training_rows(ours), strict=True):
        assert found["chosen"] == row["chosen"]
        assert found["probability"] == row["probability"]
        assert found["prompt_token_ids"] is found["tokenizer"] is found["responses"][0]["token_ids"] is None


def test_pairs_without_a_preference_by_reason(tmp_path: Path) -> None:
    """Row 0 is kept; then texts of other scripts' blanks, no text, equal texts, equal scores, a NaN, and no ranking."""
    responses, rankings = responses_of(7, 2), rankings_of(7, 2)
    for ranking in rankings:
        ranking["logits"] = [[0.0, 1.0], [-1.0, 0.0]]
    responses[1]["responses"][1]["text"] = "\u2003\u00a0\x1c\n"
    responses[2]["responses"][0]["text"] = None
    responses[3]["responses"][0]["text"] = responses[3]["responses"][1]["text"]
    rankings[4]["logits"] = [[0.0, 1.0], [1.0, 0.0]]
    rankings[5]["logits"] = [[0.0, float("nan")], [1.0, 0.0]]
    out = write(tmp_path / "d", responses, rankings[:6])
    compute_prob(Recipe(pairs=2), out, False)
    assert [r["prompt_id"] for r in training_rows(out)] == ["id0"]
    counts = read_json(out / "train.manifest.json")["counts"]
    assert counts["dropped"] == {
        "empty response": 2,
        "same text": 1,
        "equal scores": 1,
        "logits not finite": 1,
        "not ranked": 1,
    }
    assert counts["prompts"] == 5
    assert counts["tied_pairs"] == 1
    compute_prob(Recipe(pairs=2, keep_degenerate=True), out, True)
    counts = read_json(out / "train.manifest.json")["counts"]
    assert (counts["train"], counts["dropped"]) == (5, {"logits not finite": 1, "not ranked": 1})


def drop_rankings(out: Path) -> None:
    for shard in (out / "ranking").iterdir():
        shard.unlink()


def replace_column(name: str, values: Callable[[Rows], list[Any]]) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        rows = responses_of(6, 3)
        table = pa.Table.from_pylist([{**row, name: v} for row, v in zip(rows, values(rows), strict=True)])
        pq.write_table(table, out / "responses.parquet")

    return change


def add_shard(rows: Callable[[Rows], Rows]) -> Callable[[Path], None]:
    return lambda out: pq.write_table(pa.Table.from_pylist(rows(rankings_of(6, 3))), out / "ranking" / "stale.parquet")


@pytest.mark.parametrize(
    ("break_it", "settings", "message"),
    [
        (drop_rankings, {}, "holds no ranking"),
        (lambda out: write(out, responses_of(6, 3), [], []), {}, "holds no ranking"),
        (lambda out: None, {"pairs": 5}, r"id0 has logits \(3, 3\), not \(5, 5\)"),
        (
            add_shard(lambda r: [{"prompt_id": "x", "logits": [[0.0, 1.0, 2.0], [1.0], [0.0] * 3]}]),
            {},
            "prompt x",
        ),
        (add_shard(lambda r: [{"prompt_id": "x", "logits": [[0.0, 1.0, 2.0], None, [0.0] * 3]}]), {}, "prompt x has"),
        (add_shard(lambda r: r[3:4]), {}, "stale.parquet: prompt id3 is ranked twice"),
        (add_shard(lambda r: [{**r[0], "prompt_id": "other"}]), {}, "1 rankings have no row in"),
        (add_shard(lambda r: [{**r[0], "prompt_id": None}]), {}, "without a prompt_id"),
        (replace_column("prompt_id", lambda r: ["id0", *[x["prompt_id"] for x in r[:5]]]), {}, "id0 is there twice"),
        (replace_column("prompt_id", lambda r: ["id0", None, "id2", "id3", "id4", "id5"]), {}, "without a prompt_id"),
        (replace_column("prompt", lambda r: ["a string"] * 6), {}, "column prompt is string, not a list of {content"),
        (replace_column("responses", lambda r: [[{"answer": "a"}] * 3] * 6), {}, r"not a list of \{text\}"),
        (lambda out: None, {"test_size": 6}, "nothing to train on: there are 6 prompts"),
        (lambda out: None, {"test_size": 0.99}, "nothing to train on"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_overwritten(
    tmp_path: Path, break_it: Callable[[Path], Any], settings: dict[str, Any], message: str
) -> None:
    """The set that was there stands as it was, manifest and all, even with --overwrite."""
    out = write(tmp_path / "d", responses_of(6, 3), rankings_of(6, 3)[:3], rankings_of(6, 3)[3:])
    compute_prob(Recipe(pairs=3), out, False)
    break_it(out)
    before = tiny.contents(out)
    assert "train.parquet" in before
    with pytest.raises(SPPOError, match=message):
        compute_prob(Recipe(**{"pairs": 3, "test_size": 0, **settings}), out, True)
    assert tiny.contents(out) == before


def test_a_ranking_of_earlier_responses_is_not_joined_to_new_ones(tmp_path: Path) -> None:
    """Drawn again, the prompts have the ids that they had; the old logits would choose among answers never compared."""
    out = write(tmp_path / "d", responses_of(6, 3), rankings_of(6, 3))
    manifest = out / "ranking" / "shard-00000.manifest.json"
    written = {"inputs": {"responses": digest(out / "responses.parquet")}, "settings": {}, "outputs": {}, "counts": {}}
    manifest.write_text(json.dumps(written))
    compute_prob(Recipe(pairs=3), out, False)
    manifest.write_text(json.dumps({**written, "inputs": {"responses": "of yesterday"}}))
    with pytest.raises(SPPOError, match=r"shard-00000.parquet ranks other responses than .*; run rank.py --overwrite"):
        compute_prob(Recipe(pairs=3), out, True)
    assert (out / "train.parquet").exists()


def test_a_failure_on_the_way_leaves_neither_file(tmp_path: Path) -> None:
    """The last of 1100 rows has a response too few: the two batches before it are not left as a training set."""
    responses = responses_of(1100, 2)
    responses[-1]["responses"].pop()
    out = write(tmp_path / "d", responses, rankings_of(1100, 2))
    with pytest.raises(SPPOError, match="id1099 has 1 responses, not --pairs 2"):
        compute_prob(Recipe(pairs=2, test_size=100), out, False)
    assert set(tiny.contents(out)) == {
        "responses.parquet",
        "ranking/shard-00000.parquet",
        "train.manifest.json.started",
    }


def test_two_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_together([tmp_path / "train", tmp_path / "test"]) as (train, _):
            train.write_text("whole")  # and test is never written

    with pytest.raises(FileNotFoundError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_kill_in_the_middle_is_made_again(tmp_path: Path) -> None:
    """SIGKILL while both files are being written: neither is there, and the same command makes both."""
    benchmark = [sys.executable, str(tiny.ROOT / "benchmarks" / "pairing.py")]
    out = tmp_path / "d"
    subprocess.run([*benchmark, f"--make={out}", "--prompts=20000"], check=True)
    command = [sys.executable, "scripts/compute_prob.py", f"--output_dir={out}", "--test_size=50"]
    process = tiny.start(*command, slow=out)
    tiny.wait_for(process, lambda: any(out.glob(".test.parquet.tmp-*")))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(out.glob("t*.parquet"))
    shown = tiny.succeed(*command)
    assert "train: 19950" in shown
    assert "test: 50" in shown
    assert pq.ParquetFile(out / "train.parquet").metadata.num_rows == 19950
    assert "compute_prob: done" in tiny.succeed(*command)


@pytest.mark.parametrize("row_group_size", [500, 20_000])
def test_reading_holds_a_batch_and_not_the_file(tmp_path: Path, row_group_size: int) -> None:
    """Twenty megabytes that do not compress, in one row group as pandas writes them, or in many."""
    texts = [os.urandom(500).hex() for _ in range(20_000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "f.parquet", row_group_size=row_group_size)
    before, peak = pa.total_allocated_bytes(), 0
    for batch in read_batches(tmp_path / "f.parquet", pa.schema([("text", pa.string())]), 256):
        assert batch.num_rows <= 256
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 8 << 20


def test_the_benchmark_prints_its_table() -> None:
    shown = tiny.succeed("benchmarks/pairing.py", "--prompts", "600", "--shuffle", "--test_size", "0.1")
    prompts, seconds, rate, peak = shown.splitlines()[-1].split()
    assert prompts == "600"
    assert float(rate) == pytest.approx(600 / float(seconds), rel=0.2)
    assert 50 < float(peak) < 1000
