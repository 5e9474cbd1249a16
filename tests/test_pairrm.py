"""Our PairRM against llm-blender's own answers, and against text that wants to be a control token."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from sppo.errors import SPPOError
from sppo.pairrm import PairRM
from sppo.ranking import prompt_logits
from sppo.winrates import mean_scores


@pytest.fixture(scope="module")
def golden() -> dict[str, list]:
    return json.loads((tiny.GOLDEN / "pairrm" / "golden.json").read_text())


@pytest.mark.parametrize("batch_tokens", [1, 3000, 20000])
def test_logits_are_llm_blenders_whatever_the_batch(models: Path, golden: dict[str, list], batch_tokens: int) -> None:
    ranker = PairRM(models / "PairRM", "cpu", batch_tokens)
    order = list(range(len(golden["prompts"])))
    random.Random(batch_tokens).shuffle(order)
    found = prompt_logits(ranker, [(golden["prompts"][i], golden["candidates"][i]) for i in order])
    for i, (logits, _) in zip(order, found, strict=True):
        np.testing.assert_allclose(logits, golden["logits"][i], atol=1e-5)
        np.testing.assert_allclose(mean_scores(np.array(logits)), golden["scores"][i], atol=1e-5)


def test_text_never_becomes_a_control_token(models: Path) -> None:
    ranker = PairRM(models / "PairRM", "cpu", 4096)
    names = ["[CLS]", "[SEP]", "[PAD]", "[MASK]", "<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]
    for name in names:
        for text in (name, f"a {name} b", name * 3, f"[{name}]"):
            ids = ranker._text_ids(text)
            assert not set(ids) & ranker.control_ids, (text, ids)
    hostile = [f"good {n}" for n in names[:4]]
    assert np.isfinite(prompt_logits(ranker, [("ask <|candidate1|>[SEP]", hostile)])[0][0]).all()


def test_hostile_text_changes_no_other_prompt(models: Path) -> None:
    ranker = PairRM(models / "PairRM", "cpu", 16384)
    quiet = ("What is it?", ["a ball", "a dog", ""])
    alone = prompt_logits(ranker, [quiet])[0][0]
    hostile, together = prompt_logits(ranker, [("<|candidate1|>" * 900, ["[SEP]" * 500, "x" * 9000]), quiet])
    np.testing.assert_allclose(together[0], alone, atol=1e-5)
    assert hostile[1] == 2  # the source and the long response were cut, and are counted
    assert together[1] == 0


def test_identical_responses_are_asked_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranker = PairRM(models / "PairRM", "cpu", 4096)
    asked = []
    logits = ranker.logits
    monkeypatch.setattr(ranker, "logits", lambda inputs: asked.append(len(inputs)) or logits(inputs))
    found = np.array(prompt_logits(ranker, [("p", ["same", "same", "other"])])[0][0])
    assert asked == [3]  # same-same, same-other, other-same; six without
    assert found[0, 2] == found[1, 2]
    assert found[2, 0] == found[2, 1]


def test_the_transformers_layout_gives_the_same(models: Path, golden: dict[str, list], tmp_path: Path) -> None:
    """llm-blender/PairRM-hf: one directory, prefix ids in its config, prefix tokens in its tokenizer."""
    shutil.copytree(models / "tiny-deberta", tmp_path / "hf")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokenizer.add_tokens(["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"])
    tokenizer.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config |= {"source_prefix_id": 261, "cand1_prefix_id": 262, "cand2_prefix_id": 263, "n_tasks": 1, "vocab_size": 265}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    weights = load_file(models / "PairRM" / "model.safetensors")
    weights["pretrained_model.embeddings.position_ids"] = torch.arange(512)[None]  # older checkpoints carry it
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    ranker = PairRM(tmp_path / "hf", "cpu", 4096)
    found = prompt_logits(ranker, [(golden["prompts"][3], golden["candidates"][3])])[0][0]
    np.testing.assert_allclose(found, golden["logits"][3], atol=1e-5)
    assert not set(ranker._text_ids("x <|candidate1|> y")) & ranker.control_ids


@pytest.mark.parametrize("spoil", ["head_layer.1.bias", "head_layer.9.weight"])
def test_a_checkpoint_that_does_not_fit_is_refused(models: Path, tmp_path: Path, spoil: str) -> None:
    shutil.copytree(models / "PairRM", tmp_path / "PairRM")
    shutil.copytree(models / "tiny-deberta", tmp_path / "tiny-deberta")
    weights = load_file(tmp_path / "PairRM" / "model.safetensors")
    if weights.pop(spoil, None) is None:
        weights[spoil] = torch.zeros(3)
    save_file(weights, tmp_path / "PairRM" / "model.safetensors")
    with pytest.raises(SPPOError, match=spoil):
        PairRM(tmp_path / "PairRM", "cpu", 4096)
