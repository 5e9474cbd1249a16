"""General Preference Models: every logit is the published formula, and rock, paper, scissors stays a circle."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_reward_model import PROMPTS, RESPONSES

from sppo.command.errors import SPPOError
from sppo.method.preference import probability
from sppo.pairing.statistics import intransitive_triples
from sppo.rankers import gpm
from sppo.rankers.gpm import GPM, Point, skew
from sppo.ranking.shards import prompt_logits
from sppo.recipe import Recipe
from sppo.store.files import read_json

KINDS = {"plain": ("llama3", 2, False), "prompt-head": ("llama3", 6, True), "gemma": ("gemma2", 4, True)}


def make(source: Path, directory: Path, d: int, prompt_head: bool) -> Path:
    """A tiny GPM: a causal LM with the heads beside it in one safetensors file, as the published ones."""
    shutil.copytree(source, directory)
    weights = load_file(directory / "model.safetensors")
    torch.manual_seed(1)
    weights["value_head.weight"] = torch.randn(d, 64) / 8
    if prompt_head:
        weights["prompt_head.weight"] = torch.randn(d // 2, 64) / 8
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def gpms(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gpms")
    for name, (family, d, prompt_head) in KINDS.items():
        make(models / family, root / name, d, prompt_head)
    return root


def one_by_one(directory: Path, prompt: list[dict[str, str]], responses: list[str]) -> np.ndarray:
    """(K, K) s_ij / 0.1 as GPMPipeline computes it: a text at a time, the tokenizer's plain call, a matrix R."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    weights = load_file(directory / "model.safetensors")
    if "gemma" in directory.name and prompt[0]["role"] == "system":
        prompt = [{"role": "user", "content": f"{prompt[0]['content']}\n\n{prompt[1]['content']}"}, *prompt[2:]]
    asked = tokenizer(tokenizer.apply_chat_template(prompt, tokenize=False))["input_ids"]
    d, points, matrix = len(weights["value_head.weight"]), [], None
    for response in responses:
        text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": response}], tokenize=False)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        ids[:, -1] = tokenizer.eos_token_id
        with torch.inference_mode():
            hidden = model.model(ids).last_hidden_state[0]
        points.append(torch.nn.functional.normalize(hidden[-1] @ weights["value_head.weight"].T, dim=-1))
        head = weights.get("prompt_head.weight")
        blocks = torch.ones(d // 2) if head is None else torch.softmax(hidden[len(asked) - 1] @ head.T, -1)
        matrix = torch.zeros(d, d)
        for k in range(d // 2):
            matrix[2 * k, 2 * k + 1], matrix[2 * k + 1, 2 * k] = -blocks[k], blocks[k]
    assert matrix is not None
    return np.array([[float(i @ matrix.T @ j) / 0.1 for j in points] for i in points])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_published_formula_whatever_the_batch(gpms: Path, kind: str) -> None:
    """Else win rates would be of another model. Padding, neighbours and order change nothing; swapping changes a sign.

    The tiny tokenizer's plain call adds a BOS, and Gemma's template ends in a line break that EOS is written over.
    """
    items = list(zip(PROMPTS, RESPONSES, strict=True))
    expected = [one_by_one(gpms / kind, *item) for item in items]
    assert all(np.abs(e).max() > 0.5 for e in expected)  # the models tell the texts apart
    for batch_tokens in (1, 300, 20000):
        order = random.Random(batch_tokens).sample(range(3), 3)
        found = dict(prompt_logits(GPM(gpms / kind, "cpu", batch_tokens), [items[i] for i in order]))
        for place, i in enumerate(order):
            np.testing.assert_allclose(found[place], expected[i], atol=2e-4)  # float32, of sizes to 10
            assert (np.array(found[place]) == -np.array(found[place]).T).all()  # to the last bit


def test_a_response_takes_one_forward(gpms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K and not K(K - 1): that is what makes a GPM cheap."""
    ranker = GPM(gpms / "plain", "cpu", 300)
    forward, seen = ranker._forward, []
    monkeypatch.setattr(ranker, "_forward", lambda net, texts: seen.extend(texts) or forward(net, texts))
    dict(prompt_logits(ranker, [(PROMPTS[0], [f"answer {i}" for i in range(7)])]))
    assert len(seen) == 7


def on_circle(turns: float, weight: float = 1.0) -> Point:
    """A point of d = 2, so many whole turns round the circle."""
    return Point(np.array([math.cos(math.tau * turns), math.sin(math.tau * turns)]), np.array([weight]))


def test_three_answers_on_the_circle_are_rock_paper_scissors() -> None:
    """s = sin of the angle between two: each beats the next by sin 120 degrees = 0.866, and is beaten by the other.

    C = s / 0.1 = 8.66. The paper's estimator gives sigmoid(8.66), for which a GPM is trained; the released one gives
    1/2, as every s_i is 0. The authors' own table gives sigmoid(C_ij - C_ji) = sigmoid(17.3), twice the log-odds.
    """
    points = [on_circle(i / 3) for i in range(3)]
    logits = np.array([[[skew(i, j) / gpm.TEMPERATURE for j in points] for i in points]])
    beats = 10 * math.sqrt(3) / 2
    np.testing.assert_allclose(logits[0], beats * np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]]), atol=1e-12)
    assert intransitive_triples(logits).tolist() == [1]  # of 1
    trained_for = 1 / (1 + math.exp(-beats))
    assert probability(logits, "paper")[0, 0, 1] == pytest.approx(trained_for)
    np.testing.assert_allclose(probability(logits, "released")[0], 0.5)
    np.testing.assert_allclose(probability(logits, "paper").mean(-1)[0], 0.5)  # the win rates: no answer is best


def test_the_estimators_of_two_answers() -> None:
    """s = 0.06: paper sigmoid(0.6), what a GPM is trained for. released with K = 2 the same, with K = 3 it is scaled.

    With a third answer that ties with both, s_i - s_j = (2 * 0.6 + 2 * 0.6) / 3 = 0.8, and not 0.6.
    """
    i, j = Point(np.array([1.0, 0.0]), np.ones(1)), Point(np.array([math.sqrt(1 - 0.06**2), 0.06]), np.ones(1))
    c = skew(i, j) / gpm.TEMPERATURE
    assert c == pytest.approx(0.6)
    two, three = np.array([[[0, c], [-c, 0]]]), np.array([[[0, c, 0], [-c, 0, 0], [0, 0, 0]]])
    sigmoid = {x: 1 / (1 + math.exp(-x)) for x in (0.6, 0.8, 1.2)}
    assert probability(two, "paper")[0, 0, 1] == pytest.approx(sigmoid[0.6])
    assert probability(two, "released")[0, 0, 1] == pytest.approx(sigmoid[1.2])
    assert probability(three, "paper")[0, 0, 1] == pytest.approx(sigmoid[0.6])
    assert probability(three, "released")[0, 0, 1] == pytest.approx(sigmoid[0.8])


def test_skew_with_weights_by_hand() -> None:
    """d = 4: 0.25 * (1*4 - 2*3) + 0.75 * (5*8 - 6*7) = -2, and rounding of lambda does not part the two orders."""
    i = Point(np.array([1.0, 2, 5, 6]), np.array([0.2, 0.7]))
    j = Point(np.array([3.0, 4, 7, 8]), np.array([0.3, 0.8]))
    assert skew(i, j) == pytest.approx(-2) == -skew(j, i)


def test_what_is_too_long_is_cut_on_the_left_and_counted(gpms: Path) -> None:
    """The context is 512 with the BOS more. Without its prompt's end a response has no weights: it is set aside."""
    long = [{"role": "user", "content": "Why? " * 400}]
    for kind, can in (("plain", True), ("prompt-head", False)):
        ranker = GPM(gpms / kind, "cpu", 4096)
        assert [ranker.count_cut(p, ["a", "b"]) for p in (PROMPTS[0], long)] == [0, 1]
        text = ranker._read(json.dumps(long), "a")
        assert text is not None
        assert len(text.ids) == 512
        whole = ranker.tokenizer.apply_chat_template([*long, {"role": "assistant", "content": "a"}])["input_ids"]
        assert text.ids == [whole[0], whole[0], *whole[-510:]]
        asked = ranker.tokenizer.apply_chat_template(long)["input_ids"]
        if kind == "prompt-head":  # the prompt's last tokens, up to its end, and then the answer's header
            assert text.ids[2 : text.prompt_end + 1] == asked[-(text.prompt_end - 1) :]
            assert text.ids[text.prompt_end + 1] == ranker.tokenizer.convert_tokens_to_ids("<|start_header_id|>")
        found = dict(prompt_logits(ranker, [(long, ["a", "q" * 600])]))[0]
        assert np.isfinite(found[0][1]) == can


def test_half_precision_asks_again_what_overflows(gpms: Path, tmp_path: Path) -> None:
    shutil.copytree(gpms / "plain", tmp_path / "plain")
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e6  # beyond float16
    save_file(weights, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    found = dict(GPM(tmp_path / "plain", "cpu", 4096, torch.float16).logits([(PROMPTS[0], "a", "b")]))[0]
    assert found == pytest.approx(one_by_one(tmp_path / "plain", PROMPTS[0], ["a", "b"])[0, 1], abs=1e-3)


def spoil_weights(directory: Path, change: Any) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("value_head.weight"), "no value_head.weight in its weights, so it is no GPM"),
        (lambda w: w.update({"value_head.weight": torch.zeros(1, 64)}), "Bradley-Terry"),
        (lambda w: w.update({"value_head.weight": torch.zeros(0, 64)}), r"is \[0, 64\], and \[2, 64\] would fit"),
        (lambda w: w.update({"value_head.weight": torch.tensor(1.0)}), r"is \[\], and \[2, 64\] would fit"),
        (lambda w: w.update({"value_head.weight": torch.zeros(3, 64)}), r"is \[3, 64\], and \[4, 64\] would fit"),
        (lambda w: w.update({"value_head.weight": torch.zeros(6, 32)}), r"is \[6, 32\], and \[6, 64\] would fit"),
        (lambda w: w.update({"prompt_head.weight": torch.zeros(2, 64)}), r"is \[2, 64\], and \[3, 64\] would fit"),
        (lambda w: w.update({"value_head.bias": torch.zeros(6)}), "unexpected keys.*value_head.bias"),
        (lambda w: w.pop("model.norm.weight"), "missing keys.*norm.weight"),
    ],
)
def test_what_is_no_gpm_is_refused(gpms: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    """A head that is not there would be random; a head of another shape would be read askew."""
    shutil.copytree(gpms / "prompt-head", tmp_path / "spoilt")
    spoil_weights(tmp_path / "spoilt", spoil)
    with pytest.raises(SPPOError, match=message):
        gpm.load(Recipe(ranker=str(tmp_path / "spoilt")))


def test_a_chat_model_and_a_pairrm_are_refused_before_anything_loads(models: Path) -> None:
    with pytest.raises(SPPOError, match="so it is no GPM"):
        gpm.fetch(Recipe(ranker=str(models / "llama3")))
    with pytest.raises(SPPOError, match="--ranker_backend pairrm"):
        gpm.fetch(Recipe(ranker=str(models / "PairRM")))


def kinds_of(tokenizer: Any, texts: list[str]) -> np.ndarray:
    """(K,) rock, paper, scissors: 0, 1, 2 by an answer's last token. Each is beaten by the next."""
    return np.array([tokenizer(f"x{text}", add_special_tokens=False)["input_ids"][-1] % 3 for text in texts])


def train(source: Path, directory: Path) -> Path:
    """A GPM of d = 2 that has learned from random answers to put each kind on a place of its own on the circle."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, steps, rng = AutoTokenizer.from_pretrained(source), 400, random.Random(0)
    torch.manual_seed(0)
    model, head = AutoModelForCausalLM.from_pretrained(source), torch.nn.Linear(64, 2, bias=False)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter *= 0.2 if parameter.dim() > 1 else 1  # the tiny models' weights are too wide to be trained
    optimizer = torch.optim.AdamW([*model.model.parameters(), *head.parameters()])
    words = range(5, len(tokenizer))  # as the tiny policies draw them, half of the bytes no whole letters
    for step in range(steps):
        texts = [tokenizer.decode(rng.choices(words, k=rng.randint(1, 12))) for _ in range(96)]
        asked = [f"prompts {rng.randrange(99)}?" for _ in texts]
        turns = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            for question, text in zip(asked, texts, strict=True)
        ]
        rendered = [tokenizer.apply_chat_template(each, tokenize=False) for each in turns]
        given = tokenizer(rendered, padding=True, padding_side="right", return_tensors="pt")
        hidden = model.model(input_ids=given["input_ids"]).last_hidden_state  # (96, T, 64)
        last = hidden[torch.arange(96), given["attention_mask"].sum(1) - 1]
        turn = torch.tensor(kinds_of(tokenizer, texts)) * torch.pi * 2 / 3
        wanted = torch.stack([turn.cos(), turn.sin()], -1)
        loss = ((torch.nn.functional.normalize(head(last), dim=-1) - wanted) ** 2).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 30) * (1 - step / steps)
        optimizer.step()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    spoil_weights(directory, lambda w: w.update({"value_head.weight": head.weight.detach()}))
    return directory


@pytest.mark.slow
def test_a_loop_with_a_gpm_of_rock_paper_scissors_reports_its_circles(models: Path, tmp_path: Path, warm: str) -> None:
    """Else a GPM would be no better than a score: of three answers of three kinds nearly all go in a circle.

    The manifest counts them. Two answers of a kind make no circle, whichever is the better.
    """
    from transformers import AutoTokenizer

    ranker = train(models / "mistral", tmp_path / "gpm")
    tokenizer = AutoTokenizer.from_pretrained(ranker)
    for name, count in (("prompts", 24), ("held", 4)):
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}?"} for i in range(count)])
    said = tiny.succeed(
        *("scripts/run.sh", "--model", models / "mistral", "--prompts", tmp_path / "prompts.jsonl", "--ranker", ranker),
        *("--ranker_backend=gpm", "--estimator=paper", "--recipe=recipes/sppo/demo.yaml", "--maxlen=12", "--pairs=4"),
        *("--iterations=1", "--gpus=none", "--engine=transformers", "--run_dir", tmp_path / "run"),
        *("--eval_prompts", tmp_path / "held.jsonl", "--learning_rate=1e-4"),
        PYTHON=warm,
    )
    assert "it loads and answers a trial pair" in said
    shown = (tmp_path / "run" / "report.html").read_text()
    assert "share of triples that go in a circle" in shown
    data = tmp_path / "run" / "iter1" / "data"
    ranked = {
        row["prompt_id"]: np.array(row["logits"])
        for row in pq.read_table(data / "ranking" / "shard-00000.parquet").to_pylist()
    }
    circles: dict[bool, list[float]] = {True: [], False: []}  # by whether a triple has all three kinds
    for row in pq.read_table(data / "responses.parquet").to_pylist():
        kinds, logits = kinds_of(tokenizer, [a["text"] for a in row["responses"]]), ranked[row["prompt_id"]]
        for three in map(list, itertools.combinations(range(4), 3)):
            is_mixed = len({*kinds[three]}) == 3
            circles[is_mixed].append(intransitive_triples(logits[np.ix_(three, three)][None])[0])
    assert np.mean(circles[True]) > 0.5  # about 1, as far as so small a model learns it
    assert np.mean(circles[False]) < 0.3
    share = read_json(data / "train.manifest.json")["counts"]["intransitive_triples"]
    assert share == pytest.approx(np.mean(circles[True] + circles[False]), abs=1e-5)
    assert share > 0.1
