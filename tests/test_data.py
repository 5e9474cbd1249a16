"""From responses and rankings to what is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sppo.command.errors import SPPOError, UsageError
from sppo.models import chat
from sppo.pairing.training_set import compute_prob
from sppo.recipe import Recipe
from sppo.store.files import digest, read_json, write_json
from sppo.training.batches import Batches, MicroBatch
from sppo.training.data import load_training_set

LOGITS = [[0.0, 2.0, -1.0], [-2.0, 0.0, 1.0], [3.0, 0.5, 0.0]]


def data_directory(out: Path, answers: list[list[str]], logits: Any = None) -> Path:
    """responses.parquet and ranking/ as another tool would write them: the documented columns and no more."""
    (out / "ranking").mkdir(parents=True)
    responses, rankings = [], []
    for n, texts in enumerate(answers):
        prompt = [{"role": "user", "content": f"prompt {n // 2}"}]  # each prompt twice
        responses.append({"prompt_id": f"id{n}", "prompt": prompt, "responses": [{"text": t} for t in texts]})
        rankings.append({"prompt_id": f"id{n}", "logits": logits or LOGITS, "scores": [0.0] * len(texts)})
    pq.write_table(pa.Table.from_pylist(responses), out / "responses.parquet")
    pq.write_table(pa.Table.from_pylist(rankings[::-1]), out / "ranking" / "theirs.parquet")  # never by position
    return out


@pytest.mark.parametrize("estimator", ["released", "paper"])
def test_pairs_by_hand(tmp_path: Path, estimator: str) -> None:
    out = data_directory(tmp_path / "d", [["a", "b", "c"]] * 4)
    compute_prob(Recipe(pairs=3, estimator=estimator), out, False)
    row = pq.read_table(out / "train.parquet").to_pylist()[0]
    c = np.array(LOGITS)
    s = (c - c.T).sum(1) / 3  # (0, -3.5/3, 3.5/3 ...): 0 - 1: 4, 0 - 2: -4, 1 - 2: .5
    np.testing.assert_allclose(s, [0, -3.5 / 3, 3.5 / 3])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    p = sigmoid(s[:, None] - s) if estimator == "released" else sigmoid((c - c.T) / 2)
    assert row["chosen"][-1] == {"role": "assistant", "content": "c"}
    assert row["rejected"][-1] == {"role": "assistant", "content": "b"}
    assert row["chosen_probs"] == pytest.approx(p[2, 1])
    assert row["chosen_probs_win"] == pytest.approx(p[2].mean())
    assert row["chosen_probs_lose"] == pytest.approx(p[1].mean())
    assert [r["prompt_id"] for r in pq.read_table(out / "train.parquet").to_pylist()] == ["id0", "id1", "id2", "id3"]


def test_pairs_without_a_preference_are_dropped_and_counted(tmp_path: Path) -> None:
    out = data_directory(tmp_path / "d", [["a", "b", "c"], ["x", "b", "b"], ["a", " ", "c"]])
    compute_prob(Recipe(pairs=3), out, False)
    counts = read_json(out / "train.manifest.json")["counts"]
    assert counts["train"] == 1
    assert counts["dropped"] == {"same text": 1, "empty response": 1}
    compute_prob(Recipe(pairs=3, keep_degenerate=True), out, True)
    assert read_json(out / "train.manifest.json")["counts"]["train"] == 3
    tied = data_directory(tmp_path / "t", [["a", "b", "c"]], [[0.0] * 3] * 3)
    with pytest.raises(SPPOError, match="no pair is left.*equal scores"):
        compute_prob(Recipe(pairs=3), tied, False)


def test_the_hold_out_is_seeded_and_shares_no_prompt(tmp_path: Path) -> None:
    out = data_directory(tmp_path / "d", [["a", "b", "c"]] * 20)
    held = []
    for seed in (1, 1, 2):
        compute_prob(Recipe(pairs=3, test_size=0.3, seed=seed), out, True)
        train, test = (
            {str(r["prompt"]) for r in pq.read_table(out / f"{split}.parquet").to_pylist()}
            for split in ("train", "test")
        )
        assert not train & test
        assert len(test) == 3
        held.append(test)
    assert held[0] == held[1] != held[2]
    with pytest.raises(UsageError, match="nothing to train on"):
        compute_prob(Recipe(pairs=3, test_size=10), out, True)


def test_a_join_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    out = data_directory(tmp_path / "d", [["a", "b", "c"]] * 2)
    with pytest.raises(SPPOError, match=r"not \(5, 5\)"):
        compute_prob(Recipe(pairs=5), out, False)
    stale = out / "ranking" / "stale.parquet"
    table = pq.read_table(out / "ranking" / "theirs.parquet")
    pq.write_table(table, stale)
    with pytest.raises(SPPOError, match="ranked twice"):
        compute_prob(Recipe(pairs=3), out, False)
    rows = [{**row, "prompt_id": "other" + row["prompt_id"]} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), stale)
    with pytest.raises(SPPOError, match="2 rankings have no row"):
        compute_prob(Recipe(pairs=3), out, False)
    assert not (out / "train.manifest.json").exists()


def training_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in a file that is as its manifest says, so that its token ids are trained on whatever they spell."""
    rates = {"chosen_probs": 0.9, "chosen_probs_win": 0.8, "chosen_probs_lose": 0.3}
    pq.write_table(pa.Table.from_pylist([{**rates, **row} for row in rows]), path)
    manifest = {"inputs": {}, "settings": {}, "outputs": {path.name: digest(path)}, "counts": {}}
    write_json(path.with_name("train.manifest.json"), manifest)
    return path


def conversation(answer: str, prompt: str = "Why None?") -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def test_generated_ids_are_trained_on_only_with_their_own_tokenizer(models: Path, tmp_path: Path) -> None:
    tokenizer = chat.load_tokenizer(models / "llama3")
    stops = chat.stop_token_ids(models / "llama3", tokenizer)
    row = {
        "chosen": conversation("yes"),
        "rejected": conversation("no"),
        "responses": [{"token_ids": [50, 51]}, {"token_ids": [60, 61, 62]}],
        "chosen_index": 1,
        "rejected_index": 0,
        "prompt_token_ids": [7, 8, 9],
    }
    mine = training_rows(tmp_path / "m.parquet", [{**row, "tokenizer": chat.tokenizer_identity(tokenizer)}])
    data = load_training_set(mine, tokenizer, stops, Recipe())
    assert [p.tolist() for p in data.prompts[0]] == [[7, 8, 9], [7, 8, 9]]
    assert [r.tolist() for r in data.responses[0]] == [[60, 61, 62], [50, 51]]
    other = training_rows(tmp_path / "o.parquet", [{**row, "tokenizer": "another"}])
    data = load_training_set(other, tokenizer, stops, Recipe())
    assert data.counts["rows_from_template"] == 1
    assert tokenizer.decode(data.responses[0][0]) == "yes<|eot_id|>"
    np.testing.assert_allclose(data.win_rates, [[0.9, 0.8, 0.3]], rtol=1e-6)


def test_budgets_have_no_cliff(models: Path, tmp_path: Path) -> None:
    """One token more in a response costs one label (it cost 461 in the release); a short rejected is not cut."""
    tokenizer = chat.load_tokenizer(models / "llama3")
    stops = chat.stop_token_ids(models / "llama3", tokenizer)
    identity = chat.tokenizer_identity(tokenizer)
    kept = []
    for length in (59, 60, 61, 80):
        row = {
            "chosen": conversation("y"),
            "rejected": conversation("n"),
            "responses": [{"token_ids": [50] * length}, {"token_ids": [60] * 10}],
            "chosen_index": 0,
            "rejected_index": 1,
            "prompt_token_ids": list(range(40)),
            "tokenizer": identity,
        }
        path = training_rows(tmp_path / "t.parquet", [row])
        data = load_training_set(path, tokenizer, stops, Recipe(max_prompt_length=50, max_length=100))
        kept.append(len(data.responses[0][0]))
        assert data.prompts[0][0].tolist() == list(range(40))
        assert len(data.responses[0][1]) == 10
    assert kept == [59, 60, 60, 60]
    assert data.counts["responses_cut"] == 1
    assert data.counts["response_tokens_cut"] == 20
    data = load_training_set(path, tokenizer, stops, Recipe(max_prompt_length=30, max_length=100))
    # on the left, only when it is too long, and behind its BOS (here 0), without which no policy reads
    assert data.prompts[0][0].tolist() == [0, *range(11, 40)]
    assert data.counts["prompts_cut"] == 2
    path = training_rows(tmp_path / "t.parquet", [{**row, "prompt_token_ids": list(range(1, 41))}])
    data = load_training_set(path, tokenizer, stops, Recipe(max_prompt_length=30, max_length=100))
    assert data.prompts[0][0].tolist() == list(range(11, 41))


def test_a_batch_holds_integers_only(models: Path, tmp_path: Path) -> None:
    """DeepSpeed in bfloat16 rounds every float of a batch."""
    tokenizer = chat.load_tokenizer(models / "mistral")
    stops = chat.stop_token_ids(models / "mistral", tokenizer)
    rows = [{"chosen": conversation("a longer answer"), "rejected": conversation("no")}] * 2
    data = load_training_set(training_rows(tmp_path / "t.parquet", rows), tokenizer, stops, Recipe())
    batch = Batches(data, pad_id=0).make(MicroBatch([1, 0]))
    assert not any(v.is_floating_point() for v in batch.values() if isinstance(v, torch.Tensor))
    assert batch["input_ids"].shape[0] == 4
    assert batch["sequences"].tolist() == [2, 3, 0, 1]
    assert batch["pair"].tolist() == [[0, 1], [2, 3]]
    width = batch["input_ids"].shape[1]
    predicted = [batch["input_ids"].view(-1)[q + 1] for q in batch["positions"] if q // width == 1]
    assert tokenizer.decode(torch.stack(predicted)) == "no</s>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen_probs": 1.5}, "between 0 and 1"),
        ({"chosen_probs_win": float("nan")}, "between 0 and 1"),
        ({"chosen": conversation("a")[:1]}, "ends with the assistant"),
        ({"chosen": []}, "ends with the assistant"),
    ],
)
def test_rows_that_cannot_be_trained_on(models: Path, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    tokenizer = chat.load_tokenizer(models / "llama3")
    rows = [{"chosen": conversation("a"), "rejected": conversation("b"), **row}]
    if row.get("chosen") == []:
        rows.insert(0, {"chosen": conversation("a"), "rejected": conversation("b")})
    with pytest.raises(SPPOError, match=message):
        load_training_set(training_rows(tmp_path / "t.parquet", rows), tokenizer, {1}, Recipe())
