"""From a training set's file to the token ids that are trained on, and their batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sppo.models import chat
from sppo.recipe import Recipe
from sppo.store.files import digest, write_json
from sppo.training.batches import Batches, MicroBatch
from sppo.training.data import load_training_set


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
