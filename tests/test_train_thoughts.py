"""Thoughts in training: which tokens are trained on, data of other tools, prompts with thoughts in earlier turns."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import preferences
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conversations import LOGITS, RATES, USER, answer, ids, others, parts
from safetensors.torch import load_file
from test_data import training_rows
from test_doctor import opened

from sppo import run_sppo
from sppo.command.errors import SPPOError
from sppo.generation.combine import combine
from sppo.generation.extras import Answer, Templater
from sppo.generation.prompts import fingerprint, load_prompts
from sppo.generation.shards import generate_shards
from sppo.generation.source import Source
from sppo.generation.templating import to_requests
from sppo.models import chat
from sppo.models.dates import fix_date
from sppo.models.frames import reads_as
from sppo.models.loading import load_causal_lm
from sppo.models.policy import open_policy
from sppo.models.thoughts import marks_of
from sppo.pairing.training_set import compute_prob
from sppo.preflight.training import check_thoughts
from sppo.ranking.shards import rank_shards
from sppo.recipe import Recipe
from sppo.schema import apart, as_messages, prompt_text, split_content, together
from sppo.store.files import digest, read_json
from sppo.store.shards import Slice
from sppo.training.agreement import engine_agreement
from sppo.training.batches import Batches, MicroBatch
from sppo.training.data import TrainingSet, load_training_set
from sppo.training.logps import add_lean_forward, response_logps
from sppo.training.thoughts import answer_start

# Chat templates in the forms of 2026, as short as can be. What they do with a thought:
_TURN = "{{ '<|im_start|>' + m.role + '\n' }}"
_SPLIT = (  # Qwen-3's: from its field, else from the content
    "{% set t = m.reasoning_content if m.reasoning_content is string else '' %}{% set c = m.content %}"
    "{% if not t and '</think>' in c %}{% set t = c.split('</think>')[0].split('<think>')[-1] %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
_IS_LAST = "m.role == 'assistant' and loop.last"
# written in the last turn, left out in earlier ones
QWEN3 = (
    "{% for m in messages %}" + _TURN + _SPLIT + "{% if " + _IS_LAST + " %}"
    "{{ '<think>\n' + t.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# the same, and the prompt opens it: Qwen-3.5, Nemotron
OPENED = QWEN3.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
# written in every turn, from the field only: Qwen-3.8
KEPT = OPENED.replace(_IS_LAST, "m.role == 'assistant'").replace("if not t and", "if false and")
# left out of every turn, although the prompt opens one: DeepSeek-R1's distillations
R1 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<think>\n' }}{% endif %}"
)
# in a field of another name, in messages of its own: gpt-oss
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if 'thinking' in m and loop.last %}"
    "{{ '<|im_start|>assistant<think>' + m.thinking + '<|endoftext|>' }}{% endif %}"
    "{{ '<|im_start|>assistant</think>' + m.content + '<|im_end|>' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|endoftext|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
# in a part of the content: Magistral
MAGISTRAL = (
    "{% for m in messages %}" + _TURN + "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '<think>' + p.thinking + '</think>' if p.type == 'thinking' else p.text }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = tiny.QWEN3_TEMPLATE  # as it stands in the content: SmolLM3
THINKS = {"qwen3": QWEN3, "opened": OPENED, "kept": KEPT, "gpt-oss": GPT_OSS, "magistral": MAGISTRAL}


def tokenizer_of(models: Path, template: str) -> Any:
    tokenizer = chat.load_tokenizer(models / "qwen3")
    tokenizer.chat_template = template
    return tokenizer


def read(models: Path, path: Path, rows: list[dict[str, Any]], template: str = QWEN3, **settings: Any) -> TrainingSet:
    """The rows, in a file that nothing vouches for, as they are trained on by the tiny Qwen-3 with this template."""
    pq.write_table(pa.Table.from_pylist([{**RATES, **row} for row in rows]), path)
    tokenizer = tokenizer_of(models, template)
    stops = chat.stop_token_ids(models / "qwen3", tokenizer)
    return load_training_set(path, tokenizer, stops, Recipe(**settings))


# Which tokens are trained on


@pytest.fixture(scope="module")
def tokenizer(models: Path) -> Any:
    return tokenizer_of(models, QWEN3)


def drawn(tokenizer: Any, text: str, before: int | None, end: str = "<|im_end|>") -> dict[str, Any]:
    """A response as generation writes it; before: its thought_tokens."""
    token_ids = tokenizer(text + end, add_special_tokens=False)["input_ids"]
    is_finished = before is None or before < len(token_ids)
    inside = tokenizer.decode(token_ids[:before])
    thought = inside.replace("<think>", "").replace("</think>", "").strip() if before else None
    kept = tokenizer.decode(token_ids[before or 0 :], skip_special_tokens=True).lstrip() if is_finished else ""
    return {"text": kept, "token_ids": token_ids, "thought": thought, "thought_tokens": before}


def row_of(tokenizer: Any, *responses: dict[str, Any], prompt: str = "Why None?") -> dict[str, Any]:
    """A row of train.parquet; the first response is the best one, the last the worst."""
    user, k = {"role": "user", "content": prompt}, len(responses)
    return {
        "chosen": [user, answer(responses[0]["text"])],
        "rejected": [user, answer(responses[-1]["text"])],
        "prompt": [user],
        "responses": list(responses),
        "chosen_index": 0,
        "rejected_index": k - 1,
        "probability": [[0.5 + (j - i) / 10 for j in range(k)] for i in range(k)],
        "prompt_token_ids": chat.prompt_ids(tokenizer, [user]),
        "tokenizer": chat.tokenizer_identity(tokenizer),
    }


def two(tokenizer: Any) -> list[dict[str, Any]]:
    """Two responses, of 14 and 8 tokens, whose answers begin behind 11 and 3 of them."""
    made = [drawn(tokenizer, "<think>\nNone or\n</think>\n\nred", 11), drawn(tokenizer, "<think>x</think>blue dog", 3)]
    assert [(r["text"], r["thought"], len(r["token_ids"])) for r in made] == [
        ("red", "None or", 14),
        ("blue dog", "x", 8),
    ]
    return made


@pytest.mark.parametrize("as_written", [True, False])
def test_the_tokens_that_are_trained_on_by_hand(models: Path, tmp_path: Path, tokenizer: Any, as_written: bool) -> None:
    """All of a response, or the answer alone; the other tokens are there in both."""
    row = row_of(tokenizer, *two(tokenizer))
    path = training_rows(tmp_path / "t.parquet", [row])
    if not as_written:
        (tmp_path / "train.manifest.json").unlink()
    whole = [r["token_ids"] for r in row["responses"]]
    prompt = row["prompt_token_ids"]
    for train_thoughts, before in ((True, [0, 0]), (False, [11, 3])):
        data = load_training_set(path, tokenizer, {2, 0}, Recipe(train_thoughts=train_thoughts))
        assert ids(data)[0] == [(prompt + r[:n], r[n:]) for r, n in zip(whole, before, strict=True)]
        assert data.counts["responses_with_a_thought"] == 2
        assert data.counts["rows_from_generated_ids"] == 1
        batch = Batches(data, pad_id=0).make(MicroBatch([0]))
        width = len(prompt) + 14
        assert batch["input_ids"].tolist() == [prompt + whole[0], prompt + whole[1] + [0] * 6]
        places = [range(before[0], 14), range(before[1], 8)]  # of the response; each is predicted one place before
        expected = [n * width + len(prompt) + place - 1 for n in (0, 1) for place in places[n]]
        assert batch["positions"].tolist() == expected


def test_log_probs_of_an_answer_are_those_of_a_plain_forward(models: Path, tmp_path: Path, tokenizer: Any) -> None:
    """Of the answer's tokens alone, behind prompt and thought; also in groups by length, whose padding differs."""
    row = row_of(tokenizer, *two(tokenizer))
    path = training_rows(tmp_path / "t.parquet", [row])
    data = load_training_set(path, tokenizer, {2, 0}, Recipe(train_thoughts=False))
    network = load_causal_lm(open_policy(str(models / "qwen3")), torch.float32).eval()
    expected = []
    for response in row["responses"]:
        tokens = torch.tensor([row["prompt_token_ids"] + response["token_ids"]])
        with torch.no_grad():
            logps = torch.log_softmax(network(input_ids=tokens).logits[0, :-1], -1)
        each = logps.gather(-1, tokens[0, 1:, None])[:, 0]
        expected.append(each[-(len(response["token_ids"]) - response["thought_tokens"]) :].sum())

    batch: Any = Batches(data, 0, groups=2).make(MicroBatch([0]))
    with torch.no_grad():
        output = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        plain = response_logps(output.logits, batch["input_ids"], batch["positions"])
        assert add_lean_forward(network)
        names = ("input_ids", "positions", "groups", "widths")
        lean = network(**{name: batch[name] for name in names}, chunks=2)
    assert len(batch["groups"]) == 2
    torch.testing.assert_close(plain, torch.stack(expected), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(lean, torch.stack(expected), rtol=1e-5, atol=1e-4)


def test_a_thought_is_no_prompt_and_what_is_cut_is_counted(models: Path, tmp_path: Path, tokenizer: Any) -> None:
    """--max_prompt_length cuts no thought; a response loses its end, and where that is all of its answer it says so."""
    row = row_of(tokenizer, *two(tokenizer))
    path, prompt = training_rows(tmp_path / "t.parquet", [row]), row["prompt_token_ids"]
    first, second = (r["token_ids"] for r in row["responses"])

    def load(room: int, **settings: Any) -> TrainingSet:
        limits = {"max_prompt_length": 4, "max_length": 4 + room}
        return load_training_set(path, tokenizer, {2, 0}, Recipe(**limits, **settings))

    head = [prompt[0], *prompt[-3:]] if prompt[0] == tokenizer.bos_token_id else prompt[-4:]
    data = load(12, train_thoughts=False)
    assert ids(data)[0] == [(head + first[:11], first[11:12]), (head + second[:3], second[3:])]
    assert (data.counts["prompts_cut"], data.counts["responses_cut"]) == (2, 1)
    assert (data.counts["response_tokens_cut"], data.counts["responses_cut_before_the_answer"]) == (2, 0)
    whole = load(11)
    assert ids(whole)[0] == [(head, first[:11]), (head, second)]
    assert (whole.counts["responses_cut"], whole.counts["responses_cut_before_the_answer"]) == (1, 1)
    with pytest.raises(SPPOError, match="no rows to train on.*a thought leaves its answer no room within --max_length"):
        load(11, train_thoughts=False)


@pytest.mark.parametrize("loss_type", ["sppo", "sppo_all"])
def test_a_response_without_an_answer_has_nothing_to_train_on(
    models: Path, tmp_path: Path, tokenizer: Any, loss_type: str
) -> None:
    unfinished = drawn(tokenizer, "<think>x x x", 4, end="")
    assert (len(unfinished["token_ids"]), unfinished["text"]) == (4, "")
    long = drawn(tokenizer, "<think>" + "x" * 40 + "</think>red", 42)
    assert (len(long["token_ids"]), long["text"]) == (45, "red")
    best, worst = two(tokenizer)
    rows = [row_of(tokenizer, best, worst), row_of(tokenizer, best, unfinished, worst), row_of(tokenizer, best, long)]
    rows += [row_of(tokenizer, best, worst, unfinished)]
    path = training_rows(tmp_path / "t.parquet", rows)

    def load(train_thoughts: bool) -> TrainingSet:
        most = len(rows[0]["prompt_token_ids"]) + 30
        recipe = Recipe(max_length=most, max_prompt_length=most - 1, train_thoughts=train_thoughts)
        return load_training_set(path, tokenizer, {2, 0}, replace(recipe, loss_type=loss_type))

    whole, alone = load(True), load(False)
    assert whole.counts["responses_cut_before_the_answer"] == 1
    if loss_type == "sppo":
        assert [len(row) for row in whole.responses] == [2, 2, 2, 2]
        assert [[len(r) for r in row] for row in alone.responses] == [[3, 5]] * 2
        left_out = {key: count for key, count in alone.counts.items() if key.startswith("rows_left_out")}
        assert left_out == {
            "rows_left_out (a thought has no end, so there is no answer to train on)": 1,
            "rows_left_out (a thought leaves its answer no room within --max_length)": 1,
        }
    else:
        assert [len(row) for row in whole.responses] == [2, 3, 2, 3]
        assert alone.counts["responses_left_out (a thought has no end, so there is no answer to train on)"] == 2
        assert [[len(r) for r in row] for row in alone.responses] == [[3, 5], [3, 5], [3], [3, 5]]
        assert alone.counts["responses_left_out (a thought leaves its answer no room within --max_length)"] == 1
        assert [alone.pair[2], alone.sequence_rates.tolist()[4]] == [(0, 0), pytest.approx(0.55)]


def test_agreement_compares_the_tokens_that_are_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    row = row_of(tokenizer, *two(tokenizer))
    for response in row["responses"]:
        response["logps"] = [-float(2**n) for n in range(len(response["token_ids"]))]
    path = training_rows(tmp_path / "t.parquet", [row])
    whole = load_training_set(path, tokenizer, {2, 0}, Recipe())
    alone = load_training_set(path, tokenizer, {2, 0}, Recipe(train_thoughts=False))
    assert whole.drawn_logps.tolist() == [1 - 2.0**14, 1 - 2.0**8]
    assert alone.drawn_logps.tolist() == [2.0**11 - 2.0**14, 2.0**3 - 2.0**8]
    assert engine_agreement(torch.tensor(alone.drawn_logps), alone)["tokens"] == 3 + 5


# Text and token ids of a file that nothing vouches for


@pytest.mark.parametrize("train_thoughts", [True, False])
def test_an_edited_answer_keeps_its_thought_as_it_was_drawn(
    models: Path, tmp_path: Path, tokenizer: Any, train_thoughts: bool
) -> None:
    """Also with a template that would leave the thought out."""
    for template in (QWEN3, R1):
        made = tokenizer_of(models, template)
        row = row_of(made, *two(tokenizer))
        first, second = (r["token_ids"] for r in row["responses"])
        row["chosen"][-1] = answer("sky")
        data = read(models, tmp_path / "t.parquet", [row], template, train_thoughts=train_thoughts)
        assert (data.counts["rows_edited"], data.counts["responses_with_a_thought"]) == (1, 2)
        sky = [*made("sky", add_special_tokens=False)["input_ids"], 2]
        given = 0 if train_thoughts else 11
        assert ids(data)[0][0] == (row["prompt_token_ids"] + first[:given], (first[:11] + sky)[given:])
        given = 0 if train_thoughts else 3
        assert ids(data)[0][1] == (row["prompt_token_ids"] + second[:given], second[given:])


def test_an_edited_thought_is_refused_where_its_ids_are_trained_on(
    models: Path, tmp_path: Path, tokenizer: Any
) -> None:
    row = row_of(tokenizer, *two(tokenizer))
    row["responses"][0]["thought"] = "None and"
    with pytest.raises(SPPOError, match="row 0: a thought was edited, and its token ids were not; take token_ids"):
        read(models, tmp_path / "t.parquet", [row])
    for response in row["responses"]:
        response |= {"token_ids": None, "thought_tokens": None}
    data = read(models, tmp_path / "t.parquet", [row])
    assert tokenizer.decode(data.responses[0][0]) == "<think>\nNone and\n</think>\n\nred<|im_end|>"


def test_an_answer_behind_a_thought_without_an_end_is_refused(models: Path, tmp_path: Path, tokenizer: Any) -> None:
    """It would be trained on as a part of the thought."""
    row = row_of(tokenizer, two(tokenizer)[0], drawn(tokenizer, "<think>x x x", 4, end=""))
    assert len(read(models, tmp_path / "t.parquet", [row])) == 1
    row["rejected"][-1] = answer("sky")
    with pytest.raises(SPPOError, match="row 0: an answer was written behind a thought that has no end"):
        read(models, tmp_path / "t.parquet", [row])


def test_impossible_thought_tokens_are_one_clear_error(models: Path, tmp_path: Path, tokenizer: Any) -> None:
    row = row_of(tokenizer, *two(tokenizer))
    row["responses"][1]["thought_tokens"] = 9
    with pytest.raises(SPPOError, match="row 0: a response has 9 thought_tokens and 8 token_ids"):
        load_training_set(training_rows(tmp_path / "t.parquet", [row]), tokenizer, {2, 0}, Recipe())


@pytest.mark.parametrize("loss_type", ["sppo", "sppo_all"])
def test_thoughts_of_another_tokenizer_go_through_the_template_or_the_row_is_left_out(
    models: Path, tmp_path: Path, tokenizer: Any, loss_type: str
) -> None:
    """They stand beside the texts, and must not get lost."""
    row = {**row_of(tokenizer, *two(tokenizer)), "tokenizer": "another"}
    data = read(models, tmp_path / "t.parquet", [row], loss_type=loss_type)
    said = [tokenizer.decode(r) for _, r in ids(data)[0]]
    assert said == ["<think>\nNone or\n</think>\n\nred<|im_end|>", "<think>\nx\n</think>\n\nblue dog<|im_end|>"]
    for template in (CHATML, R1):
        with pytest.raises(
            SPPOError, match="no rows to train on.*the chat template reads no thought in reasoning_cont"
        ):
            read(models, tmp_path / "t.parquet", [row], template, loss_type=loss_type)


@pytest.mark.parametrize("train_thoughts", [True, False])
def test_a_thought_without_an_end_gets_none_from_the_template(
    models: Path, tmp_path: Path, tokenizer: Any, train_thoughts: bool
) -> None:
    """With another tokenizer its token ids are of no use. Templated it would be an empty answer, and that it ends."""
    best, worst = two(tokenizer)
    unfinished = drawn(tokenizer, "<think>x x x", 4, end="")
    rows = [row_of(tokenizer, best, worst), row_of(tokenizer, best, unfinished)]
    rows = [{**row, "tokenizer": "another"} for row in rows]
    why = "(a thought has no end, which only token ids of its own tokenizer can show)"
    data = read(models, tmp_path / "t.parquet", rows, train_thoughts=train_thoughts)
    assert (len(data), data.counts[f"rows_left_out {why}"]) == (1, 1)
    data = read(models, tmp_path / "t.parquet", rows, loss_type="sppo_all", train_thoughts=train_thoughts)
    assert [len(row) for row in data.responses] == [2, 1]
    assert data.counts[f"responses_left_out {why}"] == 1


@pytest.mark.parametrize("is_cut", [False, True])
def test_the_empty_thought_before_another_models_answer_is_its_thought(models: Path, is_cut: bool) -> None:
    """Also where that was cut off: else its marks would be trained on as a part of the answer, and make it longer."""
    tokenizer = tokenizer_of(models, QWEN3)
    marks = marks_of(tokenizer, {2}, {}, ",".join(("<think>", "</think>")))
    made = Templater(tokenizer, {2}, {}, marks).response([USER], Answer("red", is_cut))
    before, ids = made["thought_tokens"], made["token_ids"]
    assert (made["text"], made["thought"]) == ("red", "")
    assert tokenizer.decode(ids[:before]) == "<think>\n\n</think>\n\n"
    assert tokenizer.decode(ids[before:]) == ("red" if is_cut else "red<|im_end|>")
    assert made["finish_reason"] == ("length" if is_cut else "stop")
    # an answer about marks, where the template writes none
    made = Templater(tokenizer_of(models, CHATML), {2}, {}, marks).response([USER], Answer("no </think>red", is_cut))
    assert made["text"] == "no </think>red"
    assert made.get("thought_tokens") is None


# Data of other tools

FORMS = [
    {"content": "red", "reasoning_content": "None or"},
    {"content": "red", "reasoning": "None or", "reasoning_content": "None or"},
    {"content": "red", "thinking": "None or"},
    {"content": [{"type": "thinking", "thinking": "None or"}, {"type": "text", "text": "red"}]},
    {"content": "<think>\nNone or\n</think>\n\nred"},
    {"content": "None or\n</think>\n\nred"},  # as a model writes it whose template has opened the thought
]
RENDERED = {
    "qwen3": "<think>\nNone or\n</think>\n\nred<|im_end|>",
    "opened": "None or\n</think>\n\nred<|im_end|>",
    "kept": "None or\n</think>\n\nred<|im_end|>",
    "gpt-oss": "<think>None or<|endoftext|><|im_start|>assistant</think>red<|im_end|>",
    "magistral": "<think>None or</think>red<|im_end|>",
}


@pytest.mark.parametrize("name", list(THINKS))
def test_a_thought_of_any_form_is_trained_on_as_the_model_writes_it(models: Path, tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_of(models, THINKS[name])
    prompt_ids = chat.prompt_ids(tokenizer, [USER])
    for form in FORMS:
        is_list = isinstance(form["content"], list)  # then all contents of the file are
        user, no = ({"role": "user", "content": parts("Why None?")}, parts("no")) if is_list else (USER, "no")
        row = {"chosen": [user, {"role": "assistant", **form}], "rejected": [user, answer(no)]}
        for settings in ({}, {"train_thoughts": False}, {"loss_type": "sigmoid"}):
            data = read(models, tmp_path / "t.parquet", [row], THINKS[name], **settings)
            prompt, response = ids(data)[0][0]
            assert prompt[: len(prompt_ids)] == prompt_ids
            trained = "red<|im_end|>" if "train_thoughts" in settings else RENDERED[name]
            assert tokenizer.decode(response) == trained, (form, settings)
            assert tokenizer.decode([*prompt, *response][len(prompt_ids) :]) == RENDERED[name]
            assert data.counts["responses_with_a_thought"] == 1


def test_a_thought_that_the_template_does_not_write_leaves_its_row_out(models: Path, tmp_path: Path) -> None:
    """What is trained on would be another response than the row's. In the content it may be written."""
    field, content = ({"content": "red", "thinking": "None"}, {"content": "<think>None</think>red"})
    plain = {"chosen": [USER, answer("yes")], "rejected": [USER, answer("no")]}

    def rows(form: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**plain, "rejected": [USER, {"role": "assistant", **form}]}, plain]

    data = read(models, tmp_path / "t.parquet", rows(field), CHATML)
    assert (len(data), data.counts[f"rows_left_out ({chat.NO_THOUGHT})"]) == (1, 1)
    data = read(models, tmp_path / "t.parquet", rows(content), CHATML, train_thoughts=False)
    tokenizer = tokenizer_of(models, CHATML)
    assert [tokenizer.decode(r) for r in data.responses[0]] == ["yes<|im_end|>", "red<|im_end|>"]
    assert tokenizer.decode(data.prompts[0][1]).endswith("<think>None</think>")
    data = read(models, tmp_path / "t.parquet", rows({"content": "<think>\nNone"}), CHATML)
    assert (len(data), data.counts["rows_left_out (a thought has no end, so there is no answer to train on)"]) == (1, 1)
    drops = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    data = read(models, tmp_path / "t.parquet", rows(content), drops)
    said = "rows_left_out (the chat template leaves out the thought of the last turn"
    assert [key.startswith(said) for key in data.counts if key.startswith("rows_left_out")] == [True]
    assert len(data) == 1


def test_an_answers_start_is_found_behind_half_characters(tokenizer: Any) -> None:
    for thought, said in (("é", "éa"), ("a\n\n", "é"), ("", "ß ß"), ("red", "red"), ("x", "")):
        before = tokenizer(f"<think>{thought}</think>", add_special_tokens=False)["input_ids"]
        behind = tokenizer(f"{said}<|im_end|>", add_special_tokens=False)["input_ids"]
        assert answer_start(tokenizer, {2}, before + behind, said) == len(before)
    assert answer_start(tokenizer, {2}, before + behind, "blue") is None


def test_an_answer_that_the_template_changes_is_trained_on_with_its_thought_only(models: Path, tmp_path: Path) -> None:
    """Where the answer begins cannot be known then. Counting what is cut does not leave a row out."""
    bluer = QWEN3.replace("c + '<|im_end|>", "c.replace('red', 'blue') + '<|im_end|>")
    rows = [{"chosen": [USER, answer("red", thinking="None")], "rejected": [USER, answer("no")]}]
    limits = {"max_length": 14, "max_prompt_length": 10}
    whole = read(models, tmp_path / "t.parquet", rows, bluer, **limits)
    assert (whole.counts["responses_cut"], whole.counts["responses_with_a_thought"]) == (2, 1)
    with pytest.raises(SPPOError, match="no rows to train on.*writes another answer behind the thought"):
        read(models, tmp_path / "t.parquet", rows, bluer, train_thoughts=False)


REAL = {  # in trl, as published
    **{"qwen3": "reasoning_content", "qwen3_5_think": "reasoning_content", "qwen3_8": "reasoning_content"},
    **{"glm4moe": "reasoning_content", "nemotron_3_nano": "reasoning_content", "gptoss": "thinking"},
    **{"lfm2_2_5": "thinking", "deepseek_r1_distill": "", "qwen2_5": "", "llama3": "", "lfm2": "", "gemma": ""},
}


def test_real_templates_take_a_thought_where_they_say(tokenizer: Any) -> None:
    """A template that takes one writes it before the answer, behind the prompt that a model reads."""
    directory = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    for name, field in REAL.items():
        made = tiny.tokenizer(["<s>", "</s>"], "<s>", "</s>", "</s>", (directory / f"{name}.jinja").read_text())
        assert chat.thought_field(made) == field, name
        if field:
            prompt = chat.render(made, [USER], True)
            whole = chat.render(made, [USER, chat.answer_turn("red", "None or")], False)
            assert whole.startswith(prompt), name
            assert 0 < whole[len(prompt) :].index("None or") + 1 < whole[len(prompt) :].index("red")


# Prompts whose earlier turns have thoughts

TURNS = [USER, answer("Because.", reasoning_content="secret"), {"role": "user", "content": "And red?"}]
IN_CONTENT = [USER, answer("<think>\nsecret\n</think>\n\nBecause."), TURNS[2]]
SHOWN = [USER, answer("Because."), TURNS[2]]


def test_conversations_are_taken_apart_and_put_together_again() -> None:
    assert apart(SHOWN) == (SHOWN, None)
    assert apart(TURNS) == (SHOWN, [None, "secret", None])
    assert apart(IN_CONTENT) == (SHOWN, [None, "<think>\nsecret\n</think>\n\n", None])
    for turns in (SHOWN, TURNS, IN_CONTENT):
        assert together(*apart(turns)) == turns
        assert prompt_text(turns) == "USER: Why None?\nASSISTANT: Because.\nUSER: And red?"
    assert split_content("so</think>a") == ("so</think>", "a")
    assert split_content("[THINK]so[/THINK]a") == ("[THINK]so[/THINK]", "a")
    assert split_content("<think>'so'</think>a") == ("<think>'so'</think>", "a")
    for code in ("Use s.split('</think>')[-1].", "Models end thoughts with `</think>`.", 'Print "[/THINK]".'):
        assert apart([USER, answer(code)]) == ([USER, answer(code)], None)  # else a ranker would see its end alone
    for text in ("a <think>so</think>b", "<think>so", "a", ""):  # no thought at the beginning, or without an end
        assert split_content(text) == ("", text)
    with pytest.raises(ValueError, match="prompt_thoughts has 1 entries for a prompt of 3 turns"):
        together(SHOWN, ["secret"])


@pytest.mark.parametrize("turns", [TURNS, IN_CONTENT])
@pytest.mark.parametrize("name", list(THINKS))
def test_earlier_thoughts_are_templated_as_the_template_does_it(models: Path, turns: Any, name: str) -> None:
    tokenizer = tokenizer_of(models, THINKS[name])
    given = as_messages([{**turn, "thinking": None} for turn in turns])
    text = tokenizer.decode(chat.prompt_ids(tokenizer, given))
    is_kept = name in ("kept", "magistral") or (name == "gpt-oss" and turns is IN_CONTENT)  # it only reads its field
    assert ("secret" in text, "Because." in text) == (is_kept, True)
    assert reads_as(tokenizer, chat.prompt_ids(tokenizer, given), given, {})


def test_a_prompt_of_another_day_is_the_same_prompt_without_its_earlier_thoughts(models: Path) -> None:
    """Its token ids do not hold what the template rightly left out. An edited answer makes it another prompt."""
    tokenizer = tokenizer_of(models, "{{ strftime_now('%d %B %Y') }}\n" + QWEN3)
    for turns in (TURNS, IN_CONTENT):
        given = as_messages(turns)
        fix_date(tokenizer, "2026-11-02")
        token_ids = chat.prompt_ids(tokenizer, given)
        fix_date(tokenizer, "2026-11-29")
        assert chat.prompt_ids(tokenizer, given) != token_ids
        assert reads_as(tokenizer, token_ids, given, {})
        edited = [given[0], {**given[1], "content": given[1]["content"] + "!"}, given[2]]
        assert not reads_as(tokenizer, token_ids, edited, {})


def test_prompts_without_thoughts_are_as_they_were(tmp_path: Path) -> None:
    """A run of an older version goes on: its prompts have the same ids and the same fingerprint."""
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": SHOWN}, {"prompt": "Why?"}])
    prompts = load_prompts(str(path), Recipe())
    assert [prompt.prompt_id for prompt in prompts] == ["65e73ce3cbb85d7c", "499f097cf704535e"]
    assert fingerprint(prompts) == "b256f389831c4cc21c30cd5dd6740f03bcb2362e85738412a451a4c06ef3ec65"


def generated(models: Path, directory: Path, template: str, *prompts: Any) -> tuple[Recipe, Path]:
    """(the recipe, $DATA) of prompts that the tiny Qwen-3 has answered with this template."""
    model = shutil.copytree(models / "qwen3", directory / "model")
    (model / "chat_template.jinja").write_text(template)
    path = tiny.write_jsonl(directory / "p.jsonl", [{"prompt": prompt} for prompt in prompts])
    recipe = Recipe(model=str(model), prompts=str(path), pairs=3, maxlen=6, engine="transformers")
    generate_shards(recipe, directory / "data", [Slice(0, 0)], False)
    return recipe, directory / "data"


def blind(prompt: str, first: str, second: str) -> float:
    """A ranker that fails if it ever sees a thought."""
    assert "secret" not in prompt + first + second
    return float(len(first) - len(second)) + 0.5


def test_earlier_thoughts_stay_in_the_files_and_rankers_see_none(models: Path, tmp_path: Path) -> None:
    closed = KEPT.replace("assistant\n<think>\n' }}", "assistant\n' }}")  # its own answers are no thoughts
    recipe, data = generated(models, tmp_path, closed, TURNS, IN_CONTENT, SHOWN)
    rows = pq.read_table(data / "responses.parquet").to_pylist()
    assert [row["prompt"] for row in rows] == [SHOWN] * 3
    assert [row["prompt_thoughts"] for row in rows] == [apart(turns).thoughts for turns in (TURNS, IN_CONTENT, SHOWN)]
    tokenizer = chat.load_tokenizer(tmp_path / "model")
    read_by_policy = [tokenizer.decode(row["prompt_token_ids"]) for row in rows]
    assert ["secret" in text for text in read_by_policy] == [True, True, False]

    rank_shards(replace(recipe, ranker="test_train_thoughts:blind"), data, [Slice(0, 0)], False)
    compute_prob(replace(recipe, keep_degenerate=True), data, False)
    table = pq.read_table(data / "train.parquet")
    stops = chat.stop_token_ids(tmp_path / "model", tokenizer)
    as_made = load_training_set(data / "train.parquet", tokenizer, stops, recipe)
    (data / "train.manifest.json").rename(data / "t.json")  # now texts and ids are compared
    compared = load_training_set(data / "train.parquet", tokenizer, stops, recipe)
    assert ids(compared) == ids(as_made)
    assert compared.counts["rows_from_generated_ids"] == table.num_rows == 3


def test_a_prompt_with_a_thought_is_skipped_where_the_template_reads_none(models: Path, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": TURNS}, {"prompt": IN_CONTENT}])
    recipe = Recipe(model=str(models / "llama3"), prompts=str(path))
    source = Source.of(recipe)
    made = to_requests(recipe, source.policy, source.policy.tokenizer(), source.prompts)
    assert [one["reason"] for one in made.skipped] == [f"the chat template refuses it: {chat.NO_THOUGHT}"]
    assert len(made.requests) == 1  # in the content it is text


def test_responses_of_another_tool_keep_thoughts_of_prompts_in_their_column(tmp_path: Path) -> None:
    """A field in the prompt would be lost between the stages."""
    data = others(tmp_path / "data", [{"prompt": TURNS}], LOGITS)
    with pytest.raises(
        SPPOError, match="row 0: prompt: a message has a thought, which belongs into a column prompt_th"
    ):
        compute_prob(Recipe(pairs=2), data, False)
    data = others(tmp_path / "more", [{"prompt": SHOWN, "prompt_thoughts": [None, "secret", None]}], LOGITS)
    compute_prob(Recipe(pairs=2), data, False)
    (row,) = pq.read_table(data / "train.parquet").to_pylist()
    assert (row["prompt_thoughts"], row["chosen"][:-1]) == ([None, "secret", None], SHOWN)


def test_shards_of_an_older_version_are_put_together(models: Path, tmp_path: Path) -> None:
    """They know neither thoughts nor those of prompts."""
    recipe, data = generated(models, tmp_path, QWEN3, "Why?", "Red?")
    shard = data / "responses" / "shard-00000.parquet"
    before = pq.read_table(data / "responses.parquet").to_pylist()
    for row in before:
        row["responses"] = [{key: r[key] for key in ("text", "token_ids", "finish_reason")} for r in row["responses"]]
    old = [{key: value for key, value in row.items() if key != "prompt_thoughts"} for row in before]
    pq.write_table(pa.Table.from_pylist(old), shard)
    manifest = shard.with_suffix(".manifest.json")
    tiny.edit_json(manifest, outputs={shard.name: digest(shard)})
    combine(data, 1, recipe.pairs, True)
    again = pq.read_table(data / "responses.parquet").to_pylist()
    assert [row["responses"][0]["token_ids"] for row in again] == [row["responses"][0]["token_ids"] for row in old]
    assert [(row["prompt_thoughts"], row["responses"][0]["thought_tokens"]) for row in again] == [(None, None)] * 2


# Trainings


@pytest.fixture(scope="module")
def thoughtful(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """$DATA with 12 rows whose three responses have thoughts of different lengths."""
    rows = []
    for row in preferences.rows(12):
        made = []
        for n, response in enumerate(row["responses"]):
            thought = tokenizer("<think>" + "so " * (2 * n + 1) + "</think>", add_special_tokens=False)["input_ids"]
            made.append(drawn(tokenizer, tokenizer.decode(thought) + response["text"], len(thought)))
        indices = (next(i for i, r in enumerate(made) if r["text"] == row[c][-1]["content"]) for c in SIDES)
        whole = row_of(tokenizer, *made, prompt=row["prompt"][0]["content"])
        whole |= {key: row[key] for key in ("probability", "chosen", "rejected", *RATES)}
        rows.append(whole | dict(zip(("chosen_index", "rejected_index"), indices, strict=True)))
    return preferences.write(tmp_path_factory.mktemp("thoughtful"), rows)


SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def thinker(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen-3 with a chat template that thinks."""
    model = shutil.copytree(models / "qwen3", tmp_path_factory.mktemp("thinker") / "model")
    (model / "chat_template.jinja").write_text(QWEN3)
    return model


def trained(thinker: Path, data: Path, out: Path, *flags: str) -> list[dict[str, float]]:
    """The metrics of a training in this process, whose manifest says what it trained on."""
    asked = [f"--model={thinker}", f"--dataset={data}", f"--output_dir={out}", "--warmup_ratio=0", *flags]
    run_sppo.main([*preferences.SMALL, *asked])
    return preferences.metrics(out)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--loss_type=sppo_all", "--anchor=0.3"),
        pytest.param(("--loss_type=kto_pair",), marks=pytest.mark.slow),
        pytest.param(("--use_peft=true", "--gradient_checkpointing=true"), marks=pytest.mark.slow),
    ],
)
def test_a_training_on_answers_alone_begins_at_its_reference(
    models: Path, thinker: Path, thoughtful: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """Both tables are kept side by side: the same tokens, but other ones whose log-probs are summed."""
    more = (f"--anchor_model={models / 'qwen3'}",) if "--anchor=0.3" in flags else ()
    shutil.copytree(thoughtful, tmp_path / "data")
    lines = {
        name: trained(thinker, tmp_path / "data", tmp_path / name, *flags, *more, f"--train_thoughts={name}")
        for name in ("true", "false")
    }
    for name, found in lines.items():
        assert len(found) == 2
        assert abs(found[0]["rewards/chosen"]) < 1e-6, name
        assert abs(found[0]["rewards/rejected"]) < 1e-6, name
    assert all(lines["true"][0][key] < lines["false"][0][key] for key in ("logps/chosen", "logps/rejected"))
    assert len(list((tmp_path / "data" / "reference").glob("*.safetensors"))) == (4 if more else 2)
    settings = {name: read_json(tmp_path / name / "sppo_manifest.json")["settings"] for name in lines}
    assert "train_thoughts" not in settings["true"]  # as in manifests of older versions
    assert settings["false"]["train_thoughts"] is False


@pytest.mark.slow
def test_answers_alone_train_by_hand_as_a_user_starts_it(thinker: Path, thoughtful: Path, tmp_path: Path) -> None:
    """The command itself; the log-probs in its table are those of a plain forward over the answers' tokens."""
    data = shutil.copytree(thoughtful, tmp_path / "data")
    command = ["sppo/run_sppo.py", *preferences.SMALL, "--model", thinker, "--dataset", data]
    said = tiny.succeed(*command, "--output_dir", tmp_path / "model", "--train_thoughts", "false")
    assert "'responses_with_a_thought': 24" in said
    (path,) = (data / "reference").glob("*.safetensors")
    network = load_causal_lm(open_policy(str(thinker)), torch.float32).eval()
    expected = []
    for row in pq.read_table(data / "train.parquet").to_pylist():
        for side in SIDES:
            response = row["responses"][row[f"{side}_index"]]
            tokens = torch.tensor([row["prompt_token_ids"] + response["token_ids"]])
            answers = len(response["token_ids"]) - response["thought_tokens"]
            with torch.no_grad():
                logps = torch.log_softmax(network(input_ids=tokens).logits[0, :-1], -1)
            expected.append(logps.gather(-1, tokens[0, 1:, None])[-answers:].sum())
    torch.testing.assert_close(load_file(path)["logps"], torch.stack(expected), rtol=1e-5, atol=1e-4)


def test_data_without_thoughts_are_trained_on_whole_and_that_is_said(
    thinker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = preferences.write(tmp_path / "data", preferences.rows(8))
    trained(thinker, data, tmp_path / "model", "--train_thoughts=false")
    assert "warning: --train_thoughts false, and no response has a thought" in capsys.readouterr().out


def test_the_preflight_says_where_nothing_has_a_thought(
    models: Path, thinker: Path, thoughtful: Path, tmp_path: Path
) -> None:
    """Of data that are there already, and of a model that would draw them."""

    def said(model: Path, *flags: str) -> list[str]:
        run = opened(models, tmp_path, "--model", model, *flags)
        look = check_thoughts(run, chat.load_tokenizer(model))
        return [finding.text for finding in look]

    nothing = "nothing in the chat template or the vocabulary shows that this model thinks"
    assert [text.startswith(nothing) for text in said(models / "llama3", "--train_thoughts=false")] == [True]
    assert said(thinker, "--train_thoughts=false") == said(models / "llama3") == []
    data = tmp_path / "run" / "iter1" / "data"
    for source, count in ((thoughtful, 0), (preferences.write(tmp_path / "plain", preferences.rows(2)), 1)):
        shutil.copytree(source, data, dirs_exist_ok=True)
        (data / "train.manifest.json").touch()
        found = said(thinker, "--train_thoughts=false")
        assert [text.startswith(f"iteration 1: no response in {data}") for text in found] == [True] * count


@pytest.mark.slow
def test_two_processes_train_on_answers_alone_as_one_does(thinker: Path, thoughtful: Path, tmp_path: Path) -> None:
    found = []
    for config in ("cpu", "multi_cpu"):
        data, out = shutil.copytree(thoughtful, tmp_path / config / "data"), tmp_path / config
        command = ["scripts/pipeline.sh", "--model", thinker, "--iter", "1", "--dataset", data, "--num", "1"]
        command += ["--output_dir", out / "model", "--accelerate_config", config, "--gpus", "none"]
        tiny.succeed(*command, *preferences.SMALL, "--num_train_epochs=2", "--train_thoughts=false")
        found.append((preferences.metrics(out / "model"), load_file(out / "model" / "model.safetensors")))
    (one, before), (two, after) = found
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-4), (a["step"], name)
    assert all((before[name] - after[name]).abs().mean() < 1e-5 for name in before)
