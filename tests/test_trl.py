"""Our train.parquet in trl: a user of trl.DPOTrainer trains on the file as it is, and on the same tokens as here."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import trl
from preferences import rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from sppo.models.policy import open_policy
from sppo.pairing.training_set import compute_prob
from sppo.recipe import Recipe
from sppo.schema import ranking_schema, responses_schema
from sppo.store.parquet import write_parquet
from sppo.training.data import load_training_set


def our_data(directory: Path) -> Path:
    """train.parquet as compute_prob.py writes it, of 8 prompts with 3 responses each."""
    made = [
        {"prompt_id": str(i), "prompt": row["prompt"], "responses": row["responses"]} for i, row in enumerate(rows(8))
    ]
    write_parquet(directory / "responses.parquet", responses_schema(), made)
    rng = np.random.default_rng(0)
    logits = [(rng.normal(size=(3, 3)) * (1 - np.eye(3))).tolist() for _ in made]
    ranked = [
        {"prompt_id": row["prompt_id"], "logits": c, "scores": [0.0] * 3} for row, c in zip(made, logits, strict=True)
    ]
    write_parquet(directory / "ranking" / "shard-00000.parquet", ranking_schema(), ranked)
    compute_prob(Recipe(pairs=3), directory, False)
    return directory / "train.parquet"


def trainer(model: Path, data: datasets.Dataset, out: Path) -> trl.DPOTrainer:
    settings = trl.DPOConfig(
        output_dir=str(out), loss_type=["sppo_hard"], beta=0.1, learning_rate=1e-3, per_device_train_batch_size=2,
        num_train_epochs=1, gradient_checkpointing=False, bf16=False, use_cpu=True, save_strategy="no",
        logging_steps=1, report_to="none",
    )  # fmt: skip
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    return trl.DPOTrainer(network, args=settings, train_dataset=data, processing_class=tokenizer)


def test_trl_trains_on_our_train_parquet(models: Path, tmp_path: Path) -> None:
    """The two columns that DPOTrainer wants, straight from the file; it finds the prompt that they share.

    With the column `prompt` beside them it would put the prompt in front of whole conversations, so twice.
    """
    path, model = our_data(tmp_path / "data"), models / "llama3"
    data = datasets.load_dataset(
        "parquet",
        data_files=str(path),
        split="train",
        columns=["chosen", "rejected"],
        cache_dir=str(tmp_path / "cache"),
    )
    theirs = trainer(model, data, tmp_path / "out")
    policy = open_policy(str(model))
    tokenizer = policy.tokenizer()
    ours = load_training_set(path, tokenizer, policy.stop_ids(tokenizer), Recipe())
    for row, prompts, responses in zip(theirs.train_dataset, ours.prompts, ours.responses, strict=True):
        for side, prompt, response in zip(("chosen", "rejected"), prompts, responses, strict=True):
            assert row["prompt_ids"] == prompt.tolist()
            assert row[f"{side}_ids"] == response.tolist()
    before = {name: p.detach().clone() for name, p in theirs.model.named_parameters()}
    theirs.train()
    losses = [line["loss"] for line in theirs.state.log_history if "loss" in line]
    assert len(losses) == 4, json.dumps(losses)
    unchanged = [name for name, p in theirs.model.named_parameters() if p.equal(before[name])]
    assert not unchanged
