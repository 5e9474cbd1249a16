"""Reward models: every logit is what transformers says of the two texts one by one, and nothing is loaded half."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from preferences import data_directory
from safetensors.torch import load_file, save_file

from sppo.command.errors import SPPOError
from sppo.rankers import reward_model
from sppo.rankers.reward_model import RewardModel
from sppo.ranking.shards import prompt_logits
from sppo.recipe import Recipe
from sppo.store.files import read_json

BERT_TEMPLATE = (
    "{{ '[CLS]' }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '[SEP]' }}{% endfor %}"
)
PROMPTS = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three rivers."}],
    [
        {"role": "user", "content": "What does Anna see?"},
        {"role": "assistant", "content": "A red ball."},
        {"role": "user", "content": "And a dog? " * 9},
    ],
]
RESPONSES = [["a", "It is blue. " * 4, ""], ["Elbe, Po, Rhine" * 2, "none", "none"], ["x" * 70, "yes", "No.<|eot_id|>"]]


def make(directory: Path, kind: str) -> Path:
    """A tiny reward model. `llama` has no pad token, in `llama-eos` it is the end token that every text ends with."""
    import transformers

    llama = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    gemma = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    torch.manual_seed(0)
    if kind == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        fast = tiny.tokenizer(special, "[CLS]", "[SEP]", "[PAD]", BERT_TEMPLATE)
        shape = tiny.shape(fast, num_labels=1)
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**shape))
    elif kind == "gemma2":
        fast = tiny.tokenizer(gemma, "<bos>", "<eos>", "<pad>", tiny.GEMMA_TEMPLATE)
        shape = tiny.shape(fast, num_labels=1, sliding_window=16, query_pre_attn_scalar=16, attn_logit_softcapping=0.5)
        model = transformers.Gemma2ForSequenceClassification(transformers.Gemma2Config(**shape))
    else:
        fast = tiny.tokenizer(llama, llama[0], "<|eot_id|>", "<|end_of_text|>", tiny.LLAMA3_TEMPLATE)
        pad = fast.eos_token_id if kind == "llama-eos" else None
        shape = tiny.shape(fast, num_labels=1, pad_token_id=pad)
        model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**shape))
    for parameter in model.parameters():  # wide enough that scores differ
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rewards")
    for kind in ("llama", "llama-eos", "gemma2", "bert"):
        make(root / kind, kind)
    return root


def one_by_one(directory: Path, prompt: list[dict[str, str]], responses: list[str]) -> np.ndarray:
    """(K, K) r_i - r_j by transformers alone: the rendered text, one forward each, no padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, attn_implementation="eager").eval()
    if "gemma2" in directory.name and prompt[0]["role"] == "system":
        joined = f"{prompt[0]['content']}\n\n{prompt[1]['content']}"
        prompt = [{"role": "user", "content": joined}, *prompt[2:]]
    scores = []
    for response in responses:
        text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": response}], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            scores.append(model(ids).logits.item())
    return np.array(scores)[:, None] - np.array(scores)


@pytest.mark.parametrize("kind", ["llama", "llama-eos", "gemma2", "bert"])
def test_logits_are_transformers_whatever_the_batch(rewards: Path, kind: str) -> None:
    """Padding, neighbours and order change nothing; a pad token that texts end with is not taken for padding."""
    items = list(zip(PROMPTS, RESPONSES, strict=True))
    expected = [one_by_one(rewards / kind, *item) for item in items]
    assert all(np.abs(e).max() > 0.05 for e in expected)  # the models tell the texts apart
    for batch_tokens in (1, 300, 20000):
        order = random.Random(batch_tokens).sample(range(3), 3)
        found = dict(prompt_logits(RewardModel(rewards / kind, "cpu", batch_tokens), [items[i] for i in order]))
        for place, i in enumerate(order):
            np.testing.assert_allclose(found[place], expected[i], atol=3e-5)  # float32, of sizes about 2


def test_each_text_is_scored_once(rewards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranker = RewardModel(rewards / "llama", "cpu", 300)
    forward, seen = ranker._forward, []
    monkeypatch.setattr(ranker, "_forward", lambda net, inputs: seen.extend(map(tuple, inputs)) or forward(net, inputs))
    twice = [(PROMPTS[0], RESPONSES[0]), (list(PROMPTS[0]), RESPONSES[0]), (PROMPTS[1], RESPONSES[1])]
    assert len(dict(prompt_logits(ranker, twice))) == 3
    assert len(seen) == len(set(seen)) == 3 + 2  # RESPONSES[1] holds one text twice


def test_a_pair_is_answered_as_soon_as_both_its_texts_are_scored(
    rewards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All came when the last batch of 64 prompts was scored: progress stood still, for hours with a large model."""
    ranker = RewardModel(rewards / "llama", "cpu", 1)  # a text a batch
    forward, batches = ranker._forward, [0]

    def counted(*args: Any) -> list[float]:
        batches[0] += 1
        return forward(*args)

    monkeypatch.setattr(ranker, "_forward", counted)
    texts = ["a", "It is so.", "It is so, and it is more than that, I say."]
    pairs = [(PROMPTS[0], a, b) for a, b in itertools.product(texts, repeat=2)]
    found = [(batches[0], index) for index, _ in ranker.logits(pairs)]
    assert Counter(count for count, _ in found) == {1: 1, 2: 3, 3: 5}  # the pairs of the texts that are scored so far
    assert sorted(index for _, index in found) == list(range(9))  # each once, a text against itself too


def test_what_is_too_long_is_cut_on_the_left_and_counted(rewards: Path) -> None:
    """The tiny models' context is 512 tokens. What is read last, the response and its end, stays."""
    ranker = RewardModel(rewards / "llama", "cpu", 4096)
    long = [{"role": "user", "content": "Why? " * 400}]
    assert [ranker.count_cut(p, ["a", "b"]) for p in (PROMPTS[0], long)] == [0, 1]
    assert ranker.count_cut(PROMPTS[0], ["a", "q" * 600]) == 2  # the prompt had to go, and the response is cut itself
    whole = ranker.reader.tokenizer.apply_chat_template([*long, {"role": "assistant", "content": "a"}])["input_ids"]
    ids, *_ = ranker.reader.read(json.dumps(long), "a")
    assert ids == whole[:1] + whole[-511:]
    with torch.inference_mode():
        scores = [ranker.model(torch.tensor([ranker.reader.read(json.dumps(long), r)[0]])).logits.item() for r in "ab"]
    found = dict(prompt_logits(ranker, [(long, ["a", "b"])]))[0]
    assert found[0][1] == pytest.approx(scores[0] - scores[1], abs=1e-5)


def test_a_conversation_that_the_template_refuses_costs_only_itself(rewards: Path) -> None:
    ranker = RewardModel(rewards / "gemma2", "cpu", 4096)
    twice = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    found = dict(prompt_logits(ranker, [(twice, ["a", "b"]), (PROMPTS[0], ["a", "b"])]))
    assert np.isnan(found[0][0][1])
    assert np.isfinite(found[1]).all()


def test_half_precision_keeps_differences_and_asks_again_what_overflows(
    rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = RewardModel(rewards / "llama", "cpu", 4096, torch.bfloat16)
    scores = torch.tensor([*dict(ranker._scores([(json.dumps(PROMPTS[0]), r) for r in "abcdef"])).values()])
    assert not torch.equal(scores, scores.bfloat16().float())  # the last layer did not round them
    pairs = [(PROMPTS[0], "a", "b")]
    expected = dict(RewardModel(rewards / "llama", "cpu", 4096).logits(pairs))[0]
    assert dict(ranker.logits(pairs))[0] == pytest.approx(expected, rel=0.2, abs=0.2)
    shutil.copytree(rewards / "llama", tmp_path / "big")
    weights = load_file(tmp_path / "big" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e6  # beyond float16
    save_file(weights, tmp_path / "big" / "model.safetensors", metadata={"format": "pt"})
    found = dict(RewardModel(tmp_path / "big", "cpu", 4096, torch.float16).logits(pairs))[0]
    assert found == pytest.approx(one_by_one(tmp_path / "big", PROMPTS[0], ["a", "b"])[0, 1], abs=1e-5)


@pytest.mark.slow
def test_from_responses_to_pairs_on_the_command_line(rewards: Path, tmp_path: Path) -> None:
    texts = [["a", "a longer answer", "no"], ["It is blue.", "Elbe", "yes, a dog"]]
    out = data_directory(tmp_path / "data", texts)
    shutil.rmtree(out / "ranking")
    command = ["--output_dir", out, "--pairs=3", "--ranker", rewards / "llama"]
    done = tiny.succeed(
        "scripts/preload.py", *command[:2], "--ranker", rewards / "llama", "--ranker_backend=reward-model"
    )
    assert str(rewards / "llama") in done
    tiny.succeed("scripts/rank.py", *command, "--ranker_backend=reward-model")
    prompts = [row["prompt"] for row in pq.read_table(out / "responses.parquet").to_pylist()]
    expected = [one_by_one(rewards / "llama", p, r) for p, r in zip(prompts, texts, strict=True)]
    found = pq.read_table(out / "ranking" / "shard-00000.parquet").to_pylist()
    np.testing.assert_allclose([row["logits"] for row in found], expected, atol=1e-5)
    tiny.succeed("scripts/compute_prob.py", "--output_dir", out, "--pairs=3")
    for row, logits, answers in zip(pq.read_table(out / "train.parquet").to_pylist(), expected, texts, strict=True):
        best, worst = logits.sum(1).argmax(), logits.sum(1).argmin()
        assert row["chosen"][-1]["content"] == answers[best]
        assert row["rejected"][-1]["content"] == answers[worst]
    make_other = tmp_path / "other"
    shutil.copytree(rewards / "llama", make_other)
    (make_other / "chat_template.jinja").write_text(tiny.LLAMA3_TEMPLATE + " ")
    refused = tiny.run("scripts/rank.py", *command, "--ranker_backend=reward-model", "--ranker", make_other)
    assert refused.returncode == 1  # another template decides other scores
    assert "inputs.ranker.ranker" in refused.stderr


def spoil_weights(directory: Path, change: Any) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def spoil_config(directory: Path, **values: Any) -> None:
    config = read_json(directory / "config.json") | values
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: spoil_weights(d, lambda w: w.pop("score.weight")), "missing keys.*score.weight"),
        (lambda d: spoil_weights(d, lambda w: w.update(head=torch.zeros(2))), "unexpected keys.*head"),
        (
            lambda d: spoil_weights(d, lambda w: w.update({"score.weight": torch.zeros(2, 64)})),
            "mismatched keys.*score.weight",
        ),
        (lambda d: spoil_config(d, id2label={"0": "bad", "1": "good"}), "one label; this one .* has 2"),
        (lambda d: spoil_config(d, auto_map={"AutoModelForSequenceClassification": "x.Y"}), "code that comes with"),
        (lambda d: spoil_config(d, model_type="unheard-of"), "config or tokenizer cannot be loaded"),
        (lambda d: spoil_config(d, source_prefix_id=5), "--ranker_backend pairrm"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "no model.safetensors in it"),
        (lambda d: (d / "chat_template.jinja").unlink(), "no chat template"),
        (lambda d: (d / "config.json").rename(d / "adapter_config.json"), "merge a LoRA adapter"),
    ],
)
def test_what_is_no_reward_model_is_refused(rewards: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    """transformers itself would warn about a missing head and score with a random one."""
    shutil.copytree(rewards / "llama", tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    with pytest.raises(SPPOError, match=message):
        reward_model.load(Recipe(ranker=str(tmp_path / "spoilt")))


def test_a_pairrm_and_a_chat_model_are_refused_before_anything_loads(models: Path) -> None:
    with pytest.raises(SPPOError, match="--ranker_backend pairrm"):
        reward_model.fetch(Recipe(ranker=str(models / "PairRM")))
    with pytest.raises(SPPOError, match="LlamaForCausalLM"):
        reward_model.fetch(Recipe(ranker=str(models / "llama3")))
