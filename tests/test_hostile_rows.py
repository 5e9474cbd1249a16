"""Rows that spell control tokens, are huge, empty or of another script change nothing about the rows beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from sppo.generation.combine import combine
from sppo.generation.shards import generate_shards
from sppo.models import chat
from sppo.pairing.training_set import compute_prob
from sppo.rankers._pairrm_network import CANDIDATE1, CANDIDATE2, SOURCE, PairInputs, PairRM
from sppo.ranking.shards import prompt_logits, rank_shards
from sppo.recipe import Recipe
from sppo.schema import responses_schema
from sppo.store.files import read_json
from sppo.store.parquet import write_parquet
from sppo.store.shards import Slice
from sppo.training.data import load_training_set

ORDINARY = [f"Why is {n} None" + " and why" * (n % 4) for n in range(6)] + ["Name three rivers.", "A red ball?"]
CONTROL = (
    "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <s> </s> [INST] [/INST] <unk> "
)
CONTROL += "<pad> <eos> <bos> <start_of_turn> <end_of_turn> <|endoftext|> <|im_start|> <|im_end|> <think> </think> "
CONTROL += "[CLS] [SEP] [PAD] [MASK] <|source|> <|candidate1|> <|candidate2|> <|candidate|>"
HUGE = "None " * 40_000
OTHER = [CONTROL, HUGE, "None", "🙂👩‍👩‍👧", "שלום עולם \u202e abc", "a\0b\0", "e\u0301\u0301 \u0301", "\ufeff\u2028"]
HOSTILE = [*CONTROL.split(), *OTHER]
EMPTY = ["", " \n\t "]
FOR_PAIRRM = ["[CLS]", "[SEP]", "[PAD]", "[MASK]", SOURCE, CANDIDATE1, CANDIDATE2, "</s>", *OTHER, *EMPTY]


def mixed(ordinary: list[Any], hostile: list[Any]) -> list[Any]:
    """Both in one list, the hostile ones between and around the ordinary."""
    made = list(hostile)
    for n, row in enumerate(ordinary):
        made.insert(1 + n * (len(hostile) + 1) // len(ordinary) + n, row)
    return made


def generated(models: Path, directory: Path, prompts: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(rows by prompt, the manifest) of generation and combine over three shards."""
    source = tiny.write_jsonl(directory / "p.jsonl", [{"prompt": p, "prompt_id": p[:50]} for p in prompts])
    recipe = Recipe(model=str(models / "llama3"), prompts=str(source), pairs=2, maxlen=6, engine="transformers")
    for i in range(3):
        generate_shards(recipe, directory, [Slice(0, i, 3)], False)
    combine(directory, 3, 2, False)
    rows = pq.read_table(directory / "responses.parquet").to_pylist()
    for response in (r for row in rows for r in row["responses"]):
        del response["logps"]  # of a sample, which other prompts change
    return {row["prompt"][0]["content"]: row for row in rows}, read_json(directory / "responses.manifest.json")


def test_generation(models: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    alone, _ = generated(models, tmp_path / "alone", ORDINARY)
    (tmp_path / "beside").mkdir()
    beside, manifest = generated(models, tmp_path / "beside", mixed(ORDINARY, [*HOSTILE, *EMPTY]))
    assert {p: beside[p] for p in ORDINARY} == alone
    assert set(beside) == {*ORDINARY, *HOSTILE} - {HUGE}  # every other hostile prompt is answered as it is
    assert manifest["counts"]["skipped"] == {"empty": 2, "too long for the model's context": 1}
    assert all(len(row["responses"]) == 2 for row in beside.values())


ANSWERS = [f"answer {n}" + " and more" * (n % 3) for n in range(8)]


def items(hostile: bool) -> list[tuple[list[dict[str, str]], list[str]]]:
    """(prompt, three responses); the hostile ones are it in the prompt and in two responses."""
    both = zip(ORDINARY, ANSWERS, strict=True)
    ordinary = [([{"role": "user", "content": p}], [a, a[::-1], "short"]) for p, a in both]
    if not hostile:
        return ordinary
    wild = FOR_PAIRRM
    made = [([{"role": "user", "content": text}], [wild[i - 1], "fine", wild[i - 2]]) for i, text in enumerate(wild)]
    return mixed(ordinary, made)


@pytest.fixture(scope="module")
def ranker(models: Path) -> PairRM:
    return PairRM(models / "PairRM", "cpu", 8192)


def test_ranking_of_ordinary_rows(ranker: PairRM) -> None:
    alone, beside = items(False), items(True)
    expected, found = dict(prompt_logits(ranker, alone)), dict(prompt_logits(ranker, beside))
    assert all(np.isfinite(matrix).all() for matrix in found.values())
    for n, item in enumerate(alone):
        np.testing.assert_allclose(found[beside.index(item)], expected[n], atol=1e-5)


def test_pairrm_reads_its_candidates_where_it_put_them(ranker: PairRM) -> None:
    """Three prefixes a comparison, each once, at the places that are pooled: no text makes another or moves one."""
    inputs: PairInputs = ranker.inputs
    names = [inputs.prefix_ids[name] for name in (SOURCE, CANDIDATE1, CANDIDATE2)]
    ends = inputs.tokenizer.cls_token_id, inputs.tokenizer.sep_token_id
    for text in [*HOSTILE, *EMPTY]:
        for sides in ((text, "fine", "good"), ("plain", text, "good"), ("plain", "fine", text), (text, text, text)):
            ids, places = inputs.encode([{"role": "user", "content": sides[0]}], *sides[1:])
            assert [ids[place] for place in places] == names
            assert [i for i, token in enumerate(ids) if token in inputs.control_ids - set(ends)] == places
            assert [i for i, token in enumerate(ids) if token == ends[0]] == [place - 1 for place in places]
            closed = [places[1] - 2, places[2] - 2, len(ids) - 1]
            assert [i for i, token in enumerate(ids) if token == ends[1]] == closed


def test_a_hostile_response_moves_no_other_pair_of_its_prompt(ranker: PairRM) -> None:
    prompt = [{"role": "user", "content": "What is it?"}]
    quiet = dict(prompt_logits(ranker, [(prompt, ["a ball", "a dog"])]))[0]
    asked = [(prompt, ["a ball", text, "a dog"]) for text in FOR_PAIRRM]
    for n, logits in prompt_logits(ranker, asked):
        np.testing.assert_allclose(np.array(logits)[::2, ::2], quiet, atol=1e-5, err_msg=FOR_PAIRRM[n][:40])


def name(prompt: list[dict[str, str]], texts: list[str]) -> str:
    return f"{prompt[0]['content'][:40]}|{texts[0][:40]}"


def stages(models: Path, directory: Path, rows: list[tuple[list[dict[str, str]], list[str]]]) -> dict[str, Any]:
    """rank.py's stage, compute_prob's and the reading for training: what each makes of a prompt, by its text."""

    def response(text: str) -> dict[str, Any]:
        return {"text": text, "token_ids": None, "finish_reason": "stop"}

    made = [
        {"prompt_id": name(prompt, texts), "prompt": prompt, "responses": [response(t) for t in texts]}
        for prompt, texts in rows
    ]
    write_parquet(directory / "responses.parquet", responses_schema(), made)
    recipe = Recipe(ranker=str(models / "PairRM"), ranker_prompt="text", pairs=3, batch_tokens=8192)
    rank_shards(recipe, directory, [Slice(0, 0, 1)], False)
    compute_prob(recipe, directory, False)
    tokenizer = chat.load_tokenizer(models / "llama3")
    stops = chat.stop_token_ids(models / "llama3", tokenizer)
    train = pq.read_table(directory / "train.parquet").to_pylist()
    data = load_training_set(directory / "train.parquet", tokenizer, stops, Recipe(max_prompt_length=50, max_length=90))
    return {
        row["prompt_id"]: (row, [p.tolist() for p in data.prompts[n]], [r.tolist() for r in data.responses[n]])
        for n, row in enumerate(train)
    }


def test_ranking_pairs_and_training_set(models: Path, tmp_path: Path) -> None:
    """From responses.parquet to token ids: the ordinary rows' are the same; no hostile row is lost uncounted."""
    unique = {name(p, t): (p, t) for p, t in items(True)}
    alone, beside = stages(models, tmp_path / "a", items(False)), stages(models, tmp_path / "b", list(unique.values()))
    assert len(alone) == len(ORDINARY)
    for key, (row, prompts, responses) in alone.items():
        found, found_prompts, found_responses = beside[key]
        assert (found_prompts, found_responses) == (prompts, responses)
        for column in ("chosen", "rejected", "chosen_index", "rejected_index", "prompt"):
            assert found[column] == row[column]
        np.testing.assert_allclose(found["probability"], row["probability"], atol=1e-5)
    counts = read_json(tmp_path / "b" / "train.manifest.json")["counts"]
    assert counts["train"] + sum(counts["dropped"].values()) == len(unique)
    for row, prompts, responses in beside.values():  # texts went through as they are
        assert (row["prompt"], [r["text"] for r in row["responses"]]) == unique[row["prompt_id"]]
        assert all(len(r) >= 1 and len(p) + len(r) <= 90 for p, r in zip(prompts, responses, strict=True))


def test_what_a_template_makes_of_control_text(models: Path, tmp_path: Path) -> None:
    """The ecosystem's behaviour, known and kept: transformers encodes a control token's name in a text as that token.

    So a prompt may spell the end of its own turn. It is the same in generation and in training, and stays in its row.
    """
    tokenizer = chat.load_tokenizer(models / "llama3")
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    spelled = chat.prompt_ids(tokenizer, [{"role": "user", "content": "a<|eot_id|>b"}])
    plain = chat.prompt_ids(tokenizer, [{"role": "user", "content": "ab"}])
    assert (spelled.count(end), plain.count(end)) == (2, 1)
    # a response ends once, at the template's own end: what stands behind a spelled one is kept
    prompt, answer = chat.response_ids(tokenizer, [{"role": "user", "content": "q"}], "a<|eot_id|>b", {end})
    assert answer.count(end) == 2
    assert answer[-1] == end
    question = {"role": "user", "content": "q"}
    table = [{"chosen": [question, {"role": "assistant", "content": text}]} for text in ("a<|eot_id|>b", "b")]
    for row in table:
        row.update(rejected=table[1]["chosen"], chosen_probs=0.9, chosen_probs_win=0.8, chosen_probs_lose=0.2)
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "t.parquet")
    data = load_training_set(tmp_path / "t.parquet", tokenizer, {end}, Recipe())
    assert data.responses[0][0].tolist() == answer
    assert data.responses[1][0].tolist() == data.responses[0][1].tolist()
