"""Our PairRM against llm-blender's own answers, and against text that wants to be a control token."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tiny
import torch
from safetensors.torch import load_file, save_file

from sppo.command.errors import SPPOError
from sppo.method.preference import mean_scores
from sppo.rankers._deberta import Attention, speed_up
from sppo.rankers._pairrm_network import PairInputs, PairRM, PairRMModel
from sppo.rankers.llm_blender import LLMBlender, load_blender
from sppo.ranking.shards import prompt_logits


@pytest.fixture(scope="module")
def golden() -> dict[str, list]:
    return json.loads((tiny.GOLDEN / "pairrm" / "golden.json").read_text())


def ask(ranker: Any, *items: tuple[str, list[str]]) -> list[np.ndarray]:
    """The (K, K) logits of each (prompt, responses)."""
    found = dict(prompt_logits(ranker, [([{"role": "user", "content": text}], rs) for text, rs in items]))
    return [np.array(found[i]) for i in range(len(items))]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("batch_tokens", [pytest.param(1, marks=SLOW), 3000, pytest.param(20000, marks=SLOW)])
def test_logits_are_llm_blenders_whatever_the_batch(models: Path, golden: dict[str, list], batch_tokens: int) -> None:
    ranker = PairRM(models / "PairRM", "cpu", batch_tokens)
    order = list(range(len(golden["prompts"])))
    random.Random(batch_tokens).shuffle(order)
    found = ask(ranker, *((golden["prompts"][i], golden["candidates"][i]) for i in order))
    for i, logits in zip(order, found, strict=True):
        np.testing.assert_allclose(logits, golden["logits"][i], atol=1e-5)
        np.testing.assert_allclose(mean_scores(logits), golden["scores"][i], atol=1e-5)


@pytest.mark.parametrize("kept", ["tokenizer.json", "spm.model"])
def test_characters_are_read_as_the_ranker_s_sentencepiece_reads_them(models: Path, tmp_path: Path, kept: str) -> None:
    """A full-width comma or a non-breaking space must not become [UNK], as transformers 5 alone would have it."""
    shutil.copytree(models / "PairRM", tmp_path / "PairRM")
    base = tmp_path / "tiny-deberta"
    shutil.copytree(models / "tiny-deberta", base)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(base / "spm.model"))
    (base / {"tokenizer.json": "spm.model", "spm.model": "tokenizer.json"}[kept]).unlink()
    inputs = PairInputs(tmp_path / "PairRM")
    texts = ["wait…", "1.\u00a0Water", "½ cup", "ﬁne™", "x\u200by", "你好，再见！（好）", "a\u2028b", "e\u0301"]
    texts += [" two  spaces ", "a line\n\nand\ta tab", ""]
    for text in texts:
        assert inputs.text_ids(text) == pieces.encode(text), text


def test_text_never_becomes_a_control_token(models: Path) -> None:
    ranker = PairRM(models / "PairRM", "cpu", 4096)
    names = ["[CLS]", "[SEP]", "[PAD]", "[MASK]", "<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]
    for name in names:
        for text in (name, f"a {name} b", name * 3, f"[{name}]"):
            ids = ranker.inputs.text_ids(text)
            assert not set(ids) & ranker.inputs.control_ids, (text, ids)
    hostile = [f"good {n}" for n in names[:4]]
    assert np.isfinite(ask(ranker, ("ask <|candidate1|>[SEP]", hostile))[0]).all()


def test_texts_that_are_cut_are_counted(models: Path) -> None:
    ranker = PairRM(models / "PairRM", "cpu", 16384)
    quiet = ("What is it?", ["a ball", "a dog", ""])
    hostile = ("<|candidate1|>" * 900, ["[SEP]" * 500, "x" * 9000])
    cut = [ranker.count_cut([{"role": "user", "content": text}], responses) for text, responses in (hostile, quiet)]
    assert cut == [2, 0]  # the source and the long response were cut, and are counted


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
    found = ask(ranker, (golden["prompts"][3], golden["candidates"][3]))[0]
    np.testing.assert_allclose(found, golden["logits"][3], atol=1e-5)
    assert not set(ranker.inputs.text_ids("x <|candidate1|> y")) & ranker.inputs.control_ids


@pytest.mark.parametrize("length", [1, 3, 130, 700])
def test_the_faster_attention_is_debertas_own(models: Path, length: int) -> None:
    """Every hidden state of real tokens, shorter and longer than the position buckets, beside a padded neighbour."""
    inputs = PairInputs(models / "PairRM")
    plain = PairRMModel(inputs.config).eval().pretrained_model
    fast = copy.deepcopy(plain)
    speed_up(fast)
    ids = torch.randint(5, 200, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0
    with torch.inference_mode():
        expected, found = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (plain, fast))
    assert all(type(layer.attention.self) is Attention for layer in fast.encoder.layer)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


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


def test_llm_blender_itself_says_the_same(models: Path, golden: dict[str, list]) -> None:
    """Both back ends on one checkpoint in one process: every logit. Others' rankings can be compared with ours."""
    inputs = PairInputs(models / "PairRM")
    theirs = LLMBlender(load_blender(models / "PairRM", "cpu"), inputs)
    ours = PairRM(models / "PairRM", "cpu", 3000)
    items = [(golden["prompts"][i], golden["candidates"][i]) for i in (2, 7)]
    for left, right in zip(ask(ours, *items), ask(theirs, *items), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    hostile = ask(theirs, ("p", ["<|candidate1|>", "fine", "good"]))[0]
    assert np.isnan(hostile[0, 1])  # set aside, where llm-blender alone would end the run
    assert np.isfinite(hostile[1, 2])


def test_half_precision_falls_back_to_float32(models: Path, tmp_path: Path) -> None:
    """Weights whose answers float16 cannot hold: asked again in float32, not lost and not wrong."""
    shutil.copytree(models / "PairRM", tmp_path / "PairRM")
    shutil.copytree(models / "tiny-deberta", tmp_path / "tiny-deberta")
    weights = load_file(tmp_path / "PairRM" / "model.safetensors")
    weights["head_layer.4.weight"] *= 60000 / weights["head_layer.4.weight"].abs().max()
    save_file(weights, tmp_path / "PairRM" / "model.safetensors")
    item = ("What is it?", ["a ball", "a dog", "nothing at all"])
    exact = ask(PairRM(tmp_path / "PairRM", "cpu", 4096), item)[0]
    assert abs(exact).max() > 65504  # beyond float16
    half = ask(PairRM(tmp_path / "PairRM", "cpu", 4096, torch.float16), item)[0]
    beyond = abs(exact) > 65504
    np.testing.assert_allclose(half[beyond], exact[beyond], rtol=1e-5)
    weights["head_layer.4.weight"][:] = float("inf")
    save_file(weights, tmp_path / "PairRM" / "model.safetensors")
    never = ask(PairRM(tmp_path / "PairRM", "cpu", 4096, torch.float16), item)[0]
    assert not np.isfinite(never[0, 1])
