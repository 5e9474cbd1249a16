"""What other tools write, and what users change, is read as it is: taken whole, or refused or counted with a reason."""

from __future__ import annotations

import contextlib
import csv
import datetime
import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import preferences
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from test_agreement import worst_difference

from sppo import run_sppo
from sppo.command.errors import SPPOError, UsageError
from sppo.evaluation.suites import alpaca_eval, mt_bench
from sppo.generation import shards
from sppo.generation.prompts import load_prompts
from sppo.generation.shards import generate_shards
from sppo.generation.source import Source
from sppo.generation.templating import to_requests
from sppo.models import chat, frames
from sppo.models.policy import open_policy
from sppo.pairing.training_set import compute_prob
from sppo.preflight.generation import check_template
from sppo.rankers import function
from sppo.ranking.shards import rank_shards
from sppo.recipe import Recipe
from sppo.schema import as_messages
from sppo.store.files import digest
from sppo.store.journal import Journal
from sppo.store.responses import responses_columns
from sppo.store.shards import Slice
from sppo.training.data import TrainingSet, load_training_set
from sppo.training.dataset import dataset_file

USER = {"role": "user", "content": "Why None?"}
RATES = {"chosen_probs": 0.9, "chosen_probs_win": 0.8, "chosen_probs_lose": 0.3}


def answer(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


IMAGE = {"type": "image", "image": "a.png"}
CALL = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]
NO_CALL: dict[str, Any] = {"tool_calls": None, "name": None, "reasoning_content": ""}


# conversations of any tool


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": parts("Why ", "None?")},
        {"role": "user", "content": [{"type": "text", "text": "Why None?", "image": None}]},  # as pyarrow fills in
        {"from": "human", "value": "Why None?"},
        {"role": "user", "content": "Why None?", **NO_CALL, "tool_calls": []},
        {"role": "user", "content": "Why None?", "language": "English", "toxic": False},  # nothing that templates read
    ],
)
def test_a_message_is_the_same_in_all_its_forms(turn: dict[str, Any]) -> None:
    assert as_messages([turn]) == [USER]


def test_sharegpt_is_a_conversation() -> None:
    turns = [("system", "Be brief."), ("human", "a"), ("gpt", "b"), ("human", "c")]
    found = as_messages([{"from": who, "value": text} for who, text in turns])
    assert [m["role"] for m in found] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in found] == ["Be brief.", "a", "b", "c"]


HANDS_ON = "which this pipeline does not hand on"
IN_A_TEMPLATE = [
    "<|im_start|>user<|im_sep|>a<|im_end|><|im_start|>assistant<|im_sep|>",
    "<|begin_of_text|><|header_start|>user<|header_end|>\n\na<|eot|><|header_start|>assistant<|header_end|>\n\n",
    "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]a[/INST]",
    "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n",
    "<|user|>\na</s>\n<|assistant|>\n",
    "[gMASK]<sop><|user|>\na<|assistant|>\n<think></think>",
    "<｜begin▁of▁sentence｜>Be brief.<｜User｜>a<｜Assistant｜><think>\n",
    "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>a<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "<|start|>system<|message|>You are.<|end|><|start|>user<|message|>a<|end|><|start|>assistant",
    "<|start_of_role|>user<|end_of_role|>a<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    "A chat between a curious user and an assistant. The assistant is polite. USER: a ASSISTANT:",
    "Below is an instruction that describes a task. Write a response.\n\n### Instruction:\na\n\n### Response:\n",
]
SKIPPED = [
    ([USER, answer("", tool_calls=CALL), USER], f"a message has tool_calls, {HANDS_ON}"),
    ([USER, answer(None, tool_calls=CALL), USER], f"a message has tool_calls, {HANDS_ON}"),
    ([{**USER, "name": "Anna"}], f"a message has name, {HANDS_ON}"),
    ([{**USER, "documents": [{"text": "a"}]}], f"a message has documents, {HANDS_ON}"),
    ([{**USER, "attachments": ["a.pdf"]}], f"a message has attachments, {HANDS_ON}"),
    ([USER, answer("b", reasoning_content="so"), USER], f"a message has reasoning_content, {HANDS_ON}"),
    ([{"role": "user", "content": [*parts("a"), IMAGE]}], "a message has parts that are not text"),
    ([{"role": "user", "content": [{"type": "text", "text": None}]}], "a message has parts that are not text"),
    ([{"role": "user", "content": ["a"]}], "a message has parts that are not text"),
    ([{"role": "user", "content": None}], "not text"),
    ("<s>[INST] Why None? [/INST]", "in a chat template already"),
    ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n", "in a chat template already"),
    ("<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>", "in a chat template already"),
    ("\n\nHuman: Why None?\n\nAssistant:", "in a chat template already"),
    *[(text, "in a chat template already") for text in IN_A_TEMPLATE],
    (json.dumps([USER]), "a conversation written as text, not as a list of messages"),
    (str([USER, answer("b"), USER]), "a conversation written as text, not as a list of messages"),
]


def test_prompts_that_cannot_be_taken_whole_are_skipped_with_their_reason(tmp_path: Path) -> None:
    values = [value for value, _ in SKIPPED]
    fine = ["What does <|im_start|>user mean?", "[INST]", '[{"a": 1}]', "[1, 2]", [USER], [{**USER, **NO_CALL}]]
    fine += [
        "[INST] as a literal token: what does [/INST] mean?",
        "<|im_start|>user\nWhat is this good for, and why not <|user|>?",
        "<|user|> and <|assistant|>: which model has them, and what for? Please name three, with their years.",
        "<start_of_turn>user is a token?",
        "What does DeepSeek make of <｜User｜>hi<｜Assistant｜>?",
        "<｜User｜> and <｜Assistant｜>: what are they?",
        "### Instruction: what does this heading mean?",
        "Human: I said hi.\nAssistant: Hi.\nWhat is wrong with this answer of the Assistant:",
        "USER: is what Vicuna begins with. What is ASSISTANT: for?",
        "A chat between friends: write one.",
    ]
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": value} for value in [*values, *fine]])
    found = load_prompts(str(path), Recipe())
    assert [p.skip for p in found] == [reason for _, reason in SKIPPED] + [""] * len(fine)


WEATHER = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("name", "value", "left_out"),
    [
        ("tools", [json.dumps(WEATHER)], True),
        ("tools", [WEATHER], True),
        ("tools", WEATHER, True),
        ("tools", json.dumps(WEATHER), True),
        ("tools", "hammer", False),
        ("tools", ["hammer"], False),
        ("tools", [], False),
        ("tools", "", False),
        ("tools", [{"type": None, "function": None}], False),
        ("images", ["a.png"], True),
        ("documents", [{"title": "a", "text": "b"}], True),
        ("documents", "[]", False),
        ("chat_template_kwargs", {"enable_thinking": False}, True),
        ("chat_template_kwargs", {"enable_thinking": None}, False),
        ("images", [None], False),
    ],
)
def test_what_stands_beside_a_conversation_leaves_out_its_row(
    models: Path, tmp_path: Path, name: str, value: Any, left_out: bool
) -> None:
    said = f"the row has {name}, {HANDS_ON}" if left_out else ""
    rows = [{"prompt": "a", name: value}, {"prompt": "b", name: None}]
    path = tmp_path / "p.parquet"
    for file in (tiny.write_jsonl(tmp_path / "p.jsonl", rows), path):
        if file == path:
            pq.write_table(pa.Table.from_pylist(rows), path)
        assert [p.skip for p in load_prompts(str(file), Recipe())] == [said, ""]
    pairs = [{"chosen": "yes", "rejected": "no", **RATES, **row} for row in rows]
    data = read(models, path, pairs)
    assert (len(data), data.counts.get(f"rows_left_out ({said})", 0)) == (2 - left_out, int(left_out))
    others(tmp_path / "data", [{name: value}], LOGITS)
    with pytest.raises(SPPOError, match=said) if left_out else contextlib.nullcontext():
        responses_columns(tmp_path / "data" / "responses.parquet")


def test_a_column_system_is_the_system_turn(models: Path, tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [{"prompt": "Why None?", "system": text} for text in ("Be brief.", "Be kind.", "", None)]
    rows += [{"prompt": "[]", "system": None}]
    found = load_prompts(str(tiny.write_jsonl(tmp_path / "p.jsonl", rows)), Recipe())
    assert found[0].messages == [system, USER]
    assert [p.messages[0]["content"] for p in found] == ["Be brief.", "Be kind.", "Why None?", "Why None?", "[]"]
    assert len({p.prompt_id for p in found[:3]}) == 3
    pair = {"chosen": "yes", "rejected": "no", **RATES}
    whole = {"chosen": [system, USER, answer("yes")], "rejected": [system, USER, answer("no")], **RATES}
    expected = ids(read(models, tmp_path / "t.parquet", [whole]))
    assert ids(read(models, tmp_path / "t.parquet", [{**pair, **rows[0]}])) == expected
    listed = {"chosen": [USER, answer("yes")], "rejected": [USER, answer("no")], "system": "Be brief.", **RATES}
    assert ids(read(models, tmp_path / "t.parquet", [listed])) == expected
    assert ids(read(models, tmp_path / "t.parquet", [{**whole, "system": "Be kind."}])) == expected


def test_a_turn_that_a_template_would_leave_out_is_counted(models: Path, tmp_path: Path) -> None:
    model = shutil.copytree(models / "qwen3", tmp_path / "qwen3")
    template = model / "chat_template.jinja"
    conversation = [USER, answer("I ask."), {"role": "tool", "content": "blue"}, USER]
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": conversation}, {"prompt": "a"}])
    recipe = Recipe(model=str(model), prompts=str(path))
    for text, expected in (
        (template.read_text(), []),  # it renders any role
        (
            "{% for message in messages %}{% if message['role'] in ['user', 'assistant'] %}{{ message['content'] }}"
            "{% endif %}{% endfor %}",
            ["the chat template leaves out turns of a role that it does not know"],
        ),
    ):
        template.write_text(text)
        source = Source.of(recipe, (0, 1), tmp_path)
        tokenizer = source.policy.tokenizer()
        made = to_requests(recipe, source.policy, tokenizer, source.rows(0, 2))
        requests, skipped = made.requests, made.skipped
        assert [s["reason"] for s in skipped] == expected
        assert len(requests) == 2 - len(expected)
        if not expected:
            assert "blue" in tokenizer.decode(requests[0].token_ids)


ONLY_FIRST = (  # as Mistral's and older templates have it
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def test_a_later_system_turn_that_a_template_leaves_out_is_refused(models: Path) -> None:
    tokenizer = chat.load_tokenizer(models / "qwen3")
    system, later = {"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be kind."}
    for turns in ([USER, later, USER], [system, later, USER], [system, USER, answer("b"), later, USER]):
        assert chat.with_system(tokenizer, turns, "") == turns  # this template renders any turn
    other = chat.load_tokenizer(models / "qwen3")
    other.chat_template = ONLY_FIRST
    for turns in ([USER, later, USER], [system, later, USER], [system, USER, answer("b"), later, USER]):
        with pytest.raises(ValueError, match="leaves out a system turn that does not come first"):
            chat.with_system(other, turns, "")
    assert chat.with_system(other, [USER], "Be brief.") == [system, USER]
    with pytest.raises(ValueError, match="leaves out a system turn that does not come first"):
        chat.with_system(other, [USER, answer("b"), later, USER], "Be brief.")


def test_a_prompt_in_the_models_own_template_is_not_templated_again(models: Path, tmp_path: Path) -> None:
    """In generation and in training, also where nobody else has such a template."""
    model = shutil.copytree(models / "qwen3", tmp_path / "own")
    (model / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ '~' + message['role'] + '~ ' + message['content'] + ' ~~\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '~assistant~ ' }}{% endif %}"
    )
    tokenizer = chat.load_tokenizer(model)
    system = {"role": "system", "content": "Be brief."}
    texts = [chat.render(tokenizer, turns, True) for turns in ([USER], [system, USER])]
    fine = ["~user~ what does this mean?", "Why? ~~\n~assistant~ ", "~user~ ~~\n~assistant~ and ~~"]
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in [*texts, *fine]])
    recipe = Recipe(model=str(model), prompts=str(path))
    source = Source.of(recipe, (0, 1), tmp_path)
    made = to_requests(recipe, source.policy, tokenizer, source.rows(0, 5))
    requests, skipped = made.requests, made.skipped
    assert [s["reason"] for s in skipped] == ["in a chat template already"] * 2
    assert len(requests) == 3

    rows = [{"prompt": text, "chosen": "yes", "rejected": "no", **RATES} for text in [*texts, *fine, IN_A_TEMPLATE[0]]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    data = load_training_set(tmp_path / "t.parquet", tokenizer, {tokenizer.eos_token_id}, Recipe())
    assert (len(data), data.counts["rows_left_out (prompt: in a chat template already)"]) == (3, 3)


# directories and CSV files


@pytest.fixture
def usual_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def rewrite(path: Path, text: str) -> None:
    """Other content under the same name, with the same size and times."""
    was = path.stat()
    path.write_text(text)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)


@pytest.mark.usefixtures("usual_cache")
@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv"])
def test_a_directory_is_read_as_it_is_now(tmp_path: Path, name: str) -> None:
    path = tmp_path / "prompts" / name
    path.parent.mkdir()
    path.with_stem("test").write_text('{"prompt": "held out"}\n' if "json" in name else "prompt\nheld out\n")
    text = '{"prompt": "first"}\n' if "json" in name else "prompt\nfirst\n"
    path.write_text(text)
    for word in ("first", "other"):
        if word != "first":
            rewrite(path, text.replace("first", word))
        assert [p.messages[0]["content"] for p in load_prompts(str(path.parent), Recipe())] == [word]
    held_out = load_prompts(str(path.parent), Recipe(prompt_split="test"))
    assert [p.messages[0]["content"] for p in held_out] == ["held out"]
    assert not list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.usefixtures("usual_cache")
def test_a_directory_of_several_files_is_all_of_them_in_order(tmp_path: Path) -> None:
    for name, word in (("b", "None"), ("a", "NA"), ("c", "null")):  # words that pandas takes for missing values
        (tmp_path / f"{name}.csv").write_text(f"prompt\n{word}\n")
    assert [p.messages[0]["content"] for p in load_prompts(str(tmp_path), Recipe())] == ["NA", "None", "null"]


@pytest.mark.usefixtures("usual_cache")
@pytest.mark.parametrize(
    ("name", "message"),
    [("b.jsonl", r"b\.jsonl, line 2: not JSON"), ("b.json", r"no split 'train' .*JSON"), ("b.csv", "begins at line 2")],
)
def test_a_broken_line_in_a_directory_is_one_clear_error(tmp_path: Path, name: str, message: str) -> None:
    good, broken = '{"prompt": "a"}\n', '{"prompt": "a"}\n{"prompt": \n'
    if name.endswith("csv"):
        good, broken = "prompt\na\n", 'prompt\n"a\nb\n'
    (tmp_path / name).with_stem("a").write_text(good)
    (tmp_path / name).write_text(broken)
    with pytest.raises(SPPOError, match=message):
        load_prompts(str(tmp_path), Recipe())


def test_a_quote_in_a_csv_file_ends_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    texts = ['two\nlines and a "quote"', 'a 5" screen', "plain"]
    with open(path, "w", newline="") as out:
        csv.writer(out).writerows([["prompt"], *[[text] for text in texts]])
        out.write('a 5" screen\n')  # a quote within a field without quotes is a character as any other
    assert [p.messages[0]["content"] for p in load_prompts(str(path), Recipe())] == [*texts, 'a 5" screen']
    for broken in ('prompt\na\n"open\nb\nc\n', 'prompt\na\n"open\nb\n"c"\n'):
        path.write_text(broken)
        with pytest.raises(SPPOError, match=r"the row that begins at line 3 is not CSV .*Is a quote not closed"):
            load_prompts(str(path), Recipe())


# a template with a date


DATED = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') "
    "+ '<|eot_id|>' }}" + tiny.LLAMA3_TEMPLATE.replace("{% set content = bos_token + content %}", "")
)


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """day(n): templates read the n-th of May."""
    from transformers.utils import chat_template_utils

    def turn(number: int) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime.datetime:
                return datetime.datetime(2026, 5, number)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return turn


def killed_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine dies when it has drawn for so many prompts."""
    whole = shards.finished_responses

    def some(*args: Any) -> Iterator[Any]:
        yield from itertools.islice(whole(*args), count)
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "finished_responses", some)


def test_what_the_policy_read_is_kept_with_what_it_said(
    models: Path, tmp_path: Path, day: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed on one day and started on the next: each row has the prompt that its responses were drawn from."""
    model = shutil.copytree(models / "llama3", tmp_path / "dated")
    (model / "chat_template.jinja").write_text(DATED)
    tokenizer = chat.load_tokenizer(model)
    prompts = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Why {n}?", "prompt_id": str(n)} for n in range(6)])
    recipe = Recipe(model=str(model), prompts=str(prompts), pairs=2, maxlen=4, engine="transformers")
    out = tmp_path / "data"

    def run() -> None:
        generate_shards(recipe, out, [Slice(0, 0)], (0, 1), 1, False)

    day(1)
    with monkeypatch.context() as patch:
        killed_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            run()
    stage = Source.of(recipe, (0, 1), out).stage(out, Slice(0, 0))
    journal = Journal(stage.journal, stage.identity)
    drawn = dict.fromkeys(journal.done)
    journal.close()
    day(2)
    run()
    rows = {row["prompt_id"]: row for row in pq.read_table(out / "responses.parquet").to_pylist()}
    days = {key: tokenizer.decode(row["prompt_token_ids"]).partition("Today: ")[2][:2] for key, row in rows.items()}
    assert days == {key: "01" if key in drawn else "02" for key in rows}
    assert Counter(days.values()) == {"01": 3, "02": 3}
    assert worst_difference(out / "responses.parquet", model) < 2e-5


def test_a_journal_without_what_the_policy_read_is_refused(models: Path, tmp_path: Path) -> None:
    """An older version's: the template may make other token ids of the prompt today."""
    prompts = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Why?", "prompt_id": "p"}])
    recipe = Recipe(model=str(models / "llama3"), prompts=str(prompts), pairs=2, maxlen=4, engine="transformers")
    stage = Source.of(recipe, (0, 1), tmp_path).stage(tmp_path, Slice(0, 0))
    journal = Journal(stage.journal, stage.identity)
    journal.add("p", {"responses": [{"text": "kept", "token_ids": [50, 51], "finish_reason": "length"}] * 2})
    journal.close()
    with pytest.raises(SPPOError, match="shard-00000.journal is of an older version; move it away"):
        generate_shards(recipe, tmp_path, [Slice(0, 0)], (0, 1), 1, False)


@pytest.mark.parametrize(
    ("template", "kwargs", "says"),
    [
        (DATED, {}, True),
        (DATED.replace("strftime_now('%d %b %Y')", "(day or strftime_now('%d'))"), {"day": "1 May"}, False),
        (tiny.LLAMA3_TEMPLATE, {}, False),
    ],
)
def test_the_preflight_says_where_a_template_writes_the_day(
    models: Path, tmp_path: Path, template: str, kwargs: dict[str, str], says: bool
) -> None:
    model = shutil.copytree(models / "llama3", tmp_path / "dated")
    (model / "chat_template.jinja").write_text(template)
    policy = open_policy(str(model))
    facts = SimpleNamespace(
        model=SimpleNamespace(policy=policy),
        tokenizer=policy.tokenizer(),
        recipe=Recipe(chat_template_kwargs=kwargs),
    )
    assert any("writes the day into each prompt" in finding.text for finding in check_template(facts)) == says


# the training set: other tools' rows


def read(models: Path, path: Path, rows: list[dict[str, Any]] | pa.Table, **settings: Any) -> TrainingSet:
    """The rows as they are trained on by the tiny Llama-3."""
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path)
    tokenizer = chat.load_tokenizer(models / "llama3")
    return load_training_set(path, tokenizer, chat.stop_token_ids(models / "llama3", tokenizer), Recipe(**settings))


def ids(data: TrainingSet) -> list[list[tuple[list[int], list[int]]]]:
    """Each row's (prompt ids, response ids)."""
    sides = zip(data.prompts, data.responses, strict=True)
    return [[(p.tolist(), r.tolist()) for p, r in zip(*row, strict=True)] for row in sides]


def test_every_form_of_a_pair_trains_the_same_tokens(models: Path, tmp_path: Path) -> None:
    pair = {"chosen": [USER, answer("yes")], "rejected": [USER, answer("no")], **RATES}
    path = tmp_path / "t.parquet"
    expected = ids(read(models, path, [pair]))
    tokenizer = chat.load_tokenizer(models / "llama3")
    assert [tokenizer.decode(r) for _, r in expected[0]] == ["yes<|eot_id|>", "no<|eot_id|>"]
    user = {"role": "user", "content": parts("Why ", "None?")}
    for form in (
        {"chosen": [user, answer(parts("yes"))], "rejected": [user, answer(parts("n", "o"))]},
        {"prompt": [USER], "chosen": [answer("yes")], "rejected": [answer("no")]},  # trl's explicit prompt
        {"prompt": "Why None?", "chosen": "yes", "rejected": "no"},
        {"prompt": "Why None?", "chosen": pair["chosen"], "rejected": pair["rejected"]},  # UltraFeedback's
        {"chosen": [USER, answer("yes", tool_calls=None)], "rejected": [USER, answer("no", tool_calls=None)]},
    ):
        assert ids(read(models, path, [{**RATES, **form}])) == expected, form


def test_a_prompt_stands_before_answers_of_several_turns(models: Path, tmp_path: Path) -> None:
    """trl's explicit prompt: what follows it begins with the assistant, and may go on."""
    path, more = tmp_path / "t.parquet", [answer("x"), {"role": "user", "content": "y"}]
    whole = {"chosen": [USER, *more, answer("yes")], "rejected": [USER, *more, answer("no")], **RATES}
    expected = ids(read(models, path, [whole]))
    for prompt in ([USER], "Why None?"):
        form = {"prompt": prompt, "chosen": [*more, answer("yes")], "rejected": [*more, answer("no")], **RATES}
        assert ids(read(models, path, [form])) == expected, form
    greeted = {"prompt": [answer("Hi."), USER], **RATES}
    parts_of = [
        {**greeted, "chosen": [*start, answer("yes")], "rejected": [*start, answer("no")]}
        for start in ([], greeted["prompt"])
    ]
    one, other = (ids(read(models, path, [row])) for row in parts_of)
    assert one == other  # the prompt is there already
    begun = {"prompt": [USER, answer("The")], "chosen": [answer(" sky")], "rejected": [answer(" sea")], **RATES}
    begun |= {"responses": [{"text": "a"}, {"text": "b"}], "probability": [[0.5, 0.9], [0.1, 0.5]]}
    with pytest.raises(SPPOError, match="no rows to train on; .*which the answer would continue"):
        read(models, path, [{**begun, "chosen": None, "rejected": None}], loss_type="sppo_all")
    data = read(models, path, [begun, {"prompt": None, **whole}])
    said = "prompt: it ends with an assistant's turn, which the answer would continue"
    assert len(data) == data.counts[f"rows_left_out ({said})"] == 1


@pytest.mark.parametrize("left_out", ["responses", "chosen_index", "prompt_token_ids"])
def test_a_pair_needs_none_of_the_generated_columns(models: Path, paired: Path, tmp_path: Path, left_out: str) -> None:
    table = pq.read_table(paired / "train.parquet").drop_columns([left_out])
    data = read(models, tmp_path / "t.parquet", table)
    assert data.counts["rows_from_template"] == 6
    assert [row[0][0] for row in ids(data)] == [row[0][0] for row in ids(unedited(models, paired))]


def test_a_pair_with_tool_calls_is_left_out_and_counted(models: Path, tmp_path: Path) -> None:
    called = [USER, answer("", tool_calls=CALL), {"role": "tool", "content": "blue"}, answer("yes")]
    plain = {"chosen": [USER, answer("yes")], "rejected": [USER, answer("no")], **RATES}
    rows = [{**plain, "chosen": called}, plain, {**plain, "rejected": called}]
    data = read(models, tmp_path / "t.parquet", rows)
    assert len(data) == data.counts["rows"] == 1
    for column in ("chosen", "rejected"):
        assert data.counts[f"rows_left_out ({column}: a message has tool_calls, {HANDS_ON})"] == 1
    with pytest.raises(SPPOError, match=r"no rows to train on; .*tool_calls"):
        read(models, tmp_path / "t.parquet", rows[:1])
    shown = [{"role": "user", "content": [*parts("Why None?"), IMAGE]}, answer(parts("yes"))]
    texts = [{"role": "user", "content": parts("Why None?")}, answer(parts("no"))]
    rows = [{"chosen": shown, "rejected": texts, **RATES}, {"chosen": texts, "rejected": texts, **RATES}]
    data = read(models, tmp_path / "t.parquet", rows)
    assert len(data) == data.counts["rows_left_out (chosen: a message has parts that are not text)"] == 1
    tools = [{"function": {"name": "weather"}}]
    data = read(models, tmp_path / "t.parquet", [{**plain, "tools": tools}, {**plain, "tools": None}])
    assert len(data) == data.counts[f"rows_left_out (the row has tools, {HANDS_ON})"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": [USER, answer(["yes"])]}, "row 1: chosen is not .*parts that are not text"),
        ({"rejected": [USER, answer(7)]}, "row 1: rejected is not .*not text"),
        ({"rejected": [USER, answer(None)]}, "row 1: rejected is not .*not text"),
        ({"chosen": "yes", "prompt": [USER]}, "row 1: chosen is not .*no list of messages"),
        ({"chosen": [answer("yes")]}, "row 1: chosen is not .*ends with the assistant"),
        ({"chosen": [USER]}, "row 1: chosen is not .*ends with the assistant"),
        ({"chosen": []}, "row 1: chosen is not .*ends with the assistant"),
        ({"chosen_probs_win": float("nan")}, "row 1: win rates .*between 0 and 1"),
        ({"chosen_probs": "0.9"}, "row 1: win rates .*between 0 and 1"),
        ({"chosen_probs": True}, "row 1: win rates .*between 0 and 1"),
        ({"chosen_probs_win": 1.001}, "row 1: win rates .*between 0 and 1"),
    ],
)
def test_what_is_no_text_or_no_number_is_refused_with_row_and_column(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    from sppo.training import data

    good = {"chosen": [USER, answer("yes")], "rejected": [USER, answer("no")], **RATES}
    path = tmp_path / "t.parquet"
    read(models, path, [good])
    # a Parquet file holds one type a column: rows of two types as they come out of two files
    monkeypatch.setattr(data, "read_rows", lambda *_: [good, {**good, **change}])
    tokenizer = chat.load_tokenizer(models / "llama3")
    with pytest.raises(SPPOError, match=message):
        load_training_set(path, tokenizer, {4}, Recipe())


@pytest.mark.parametrize("loss_type", ["sppo", "sppo_all"])
def test_win_rates_are_numbers_of_any_kind(models: Path, tmp_path: Path, loss_type: str) -> None:
    made = {"chosen": [USER, answer("yes")], "rejected": [USER, answer("no")], "prompt": [USER]}
    made["responses"] = [{"text": "yes"}, {"text": "no"}]
    for p, win, lose, expected in (
        (Decimal("1.000"), Decimal("0.750"), Decimal("0.250"), [1, 0.75, 0.25]),
        (1, 1, 0, [1, 1, 0]),
        (1.0000000000000002, 0.75, -1e-17, [1, 0.75, 0]),
    ):
        rates = {"chosen_probs": p, "chosen_probs_win": win, "chosen_probs_lose": lose}
        half = type(p)(1) if isinstance(p, int) else type(p)("0.5")
        row = {**made, **rates, "probability": [[half, p], [1 - p, half]]}
        found = read(models, tmp_path / "t.parquet", [row], loss_type=loss_type).win_rates[0].tolist()
        if loss_type == "sppo":
            assert found == expected
        else:
            assert found == [1, *([1, 0.5] if isinstance(p, int) else [0.75, 0.25])]


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "kto_pair"])
def test_losses_of_plain_pairs_ask_for_no_win_rates(models: Path, tmp_path: Path, loss_type: str) -> None:
    pair = {"chosen": [USER, answer("yes")], "rejected": [USER, answer("no")]}
    path = tmp_path / "t.parquet"
    assert ids(read(models, path, [pair], loss_type=loss_type)) == ids(read(models, path, [{**pair, **RATES}]))
    assert read(models, path, [{**pair, **RATES}], loss_type=loss_type).win_rates.tolist() == [
        pytest.approx([0.9, 0.8, 0.3])
    ]
    assert read(models, path, [{**pair, **RATES, "chosen_probs": "?"}], loss_type=loss_type).win_rates.isnan().all()
    for needs in ("sppo", "sppo_single"):
        with pytest.raises(SPPOError, match="no column chosen_probs, chosen_probs_win, chosen_probs_lose"):
            read(models, path, [pair], loss_type=needs)


@pytest.mark.slow
def test_pairs_without_win_rates_train(models: Path, tmp_path: Path) -> None:
    """DPO's first loss is log 2, and the metrics have no targets, which are made of win rates."""
    rows = [{k: row[k] for k in ("chosen", "rejected")} for row in preferences.rows(8)]
    data = preferences.write(tmp_path / "data", rows)
    flags = [f"--model={models / 'llama3'}", f"--dataset={data}", f"--output_dir={tmp_path / 'model'}"]
    run_sppo.main([*preferences.SMALL, *flags, "--loss_type=sigmoid"])
    (line,) = preferences.metrics(tmp_path / "model")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert all(math.isfinite(value) for value in line.values())
    assert "rewards/margins" in line
    assert "rewards/chosen_target" not in line


def test_an_end_that_the_tokenizer_does_not_know_spells_nothing(models: Path) -> None:
    """Embeddings are padded: a model may name an end of which its tokenizer has no token."""
    tokenizer = chat.load_tokenizer(models / "llama3")
    stops = {*chat.stop_token_ids(models / "llama3", tokenizer), len(tokenizer) + 5}
    assert chat.without_end(tokenizer, "yes \n", stops) == "yes \n"
    assert chat.without_end(tokenizer, "yes \n<|eot_id|>\n", stops) == "yes \n"


@pytest.mark.parametrize("spelled", ["yes<|eot_id|>", "yes<|eot_id|>\n", "yes<|eot_id|><|end_of_text|>", "yes"])
def test_an_answer_ends_once(models: Path, tmp_path: Path, spelled: str) -> None:
    rows = [{"chosen": [USER, answer(spelled)], "rejected": [USER, answer("no")], **RATES}]
    data = read(models, tmp_path / "t.parquet", rows)
    tokenizer = chat.load_tokenizer(models / "llama3")
    assert [tokenizer.decode(r) for _, r in ids(data)[0]] == ["yes<|eot_id|>", "no<|eot_id|>"]
    assert data.counts["ends_spelled_behind_answers"] == (spelled != "yes")
    assert data.counts["ends_spelled_within_answers"] == 0
    rows[0]["rejected"] = [USER, answer("n<|eot_id|>o")]
    assert read(models, tmp_path / "t.parquet", rows).counts["ends_spelled_within_answers"] == 1


def test_a_data_set_of_the_hub_that_cannot_be_read_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:  # what lives on the Hub: a data set with a broken line
        try:
            raise ValueError("JSON parse error: Invalid value. in row 1")
        except ValueError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SPPOError, match="the Hub does not give it: JSON parse error"):
        dataset_file("some/data", Recipe())


# the training set: our own rows, edited


@pytest.fixture(scope="module")
def paired(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$DATA of six prompts, drawn and paired."""
    out = tmp_path_factory.mktemp("paired")
    prompts = tiny.write_jsonl(out / "p.jsonl", [{"prompt": f"Why is {n} None?"} for n in range(6)])
    recipe = Recipe(model=str(models / "llama3"), prompts=str(prompts), pairs=3, maxlen=12, engine="transformers")
    generate_shards(recipe, out, [Slice(0, 0)], (0, 1), 1, False)
    names = [row["prompt_id"] for row in pq.read_table(out / "responses.parquet").to_pylist()]
    (out / "ranking").mkdir()
    logits = [[0.0, 2.0, -1.0], [-2.0, 0.0, 1.0], [3.0, 0.5, 0.0]]
    rankings = [{"prompt_id": name, "logits": logits} for name in names]
    pq.write_table(pa.Table.from_pylist(rankings), out / "ranking" / "theirs.parquet")
    compute_prob(recipe, out, False)
    return out


@pytest.fixture
def edited(models: Path, paired: Path, tmp_path: Path) -> Callable[..., TrainingSet]:
    """The training set after `change` has edited the first row in a copy of the file, the manifest beside it."""

    def run(change: Callable[[dict[str, Any]], Any], **settings: Any) -> TrainingSet:
        table = pq.read_table(paired / "train.parquet")
        rows = table.to_pylist()
        change(rows[0])
        shutil.copy(paired / "train.manifest.json", tmp_path)
        return read(models, tmp_path / "train.parquet", pa.Table.from_pylist(rows, schema=table.schema), **settings)

    return run


def unedited(models: Path, paired: Path, **settings: Any) -> TrainingSet:
    tokenizer = chat.load_tokenizer(models / "llama3")
    stops = chat.stop_token_ids(models / "llama3", tokenizer)
    return load_training_set(paired / "train.parquet", tokenizer, stops, Recipe(**settings))


@pytest.mark.parametrize("loss_type", ["sppo", "sppo_all"])
def test_a_file_written_again_trains_what_was_generated(
    models: Path, paired: Path, edited: Callable[..., TrainingSet], loss_type: str
) -> None:
    before = unedited(models, paired, loss_type=loss_type)
    after = edited(lambda row: row.update(rm_scores=None), loss_type=loss_type)
    assert ids(after) == ids(before)
    assert after.counts["rows_from_generated_ids"] == before.counts["rows_from_generated_ids"] == 6
    np.testing.assert_array_equal(after.drawn_logps, before.drawn_logps)
    assert np.isfinite(after.drawn_logps).all()


def test_an_edited_text_is_trained_on(models: Path, paired: Path, edited: Callable[..., TrainingSet]) -> None:
    before = ids(unedited(models, paired))
    tokenizer = chat.load_tokenizer(models / "llama3")

    def check(data: TrainingSet, prompts: list[str], answers: list[str | None]) -> None:
        """Of the first row: prompts as they are read, and answers; None: as it was generated."""
        for (prompt, response), was, text, said in zip(ids(data)[0], before[0], prompts, answers, strict=True):
            assert prompt == chat.prompt_ids(tokenizer, [{"role": "user", "content": text}])
            assert response == was[1] if said is None else tokenizer.decode(response) == f"{said}<|eot_id|>"
        assert ids(data)[1:] == before[1:]
        assert (data.counts["rows_edited"], data.counts["rows_from_generated_ids"]) == (1, 5)

    as_it_was = "Why is 0 None?"
    check(edited(lambda row: row["chosen"][-1].update(content="red")), [as_it_was] * 2, ["red", None])
    check(edited(lambda row: row["rejected"][-1].update(content="")), [as_it_was] * 2, [None, ""])

    def prompt(row: dict[str, Any]) -> None:
        for column in ("chosen", "rejected", "prompt"):
            row[column][0]["content"] = "Why?"

    check(edited(prompt), ["Why?"] * 2, [None, None])

    def flip(row: dict[str, Any]) -> None:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]

    texts = [
        side[-1]["content"]
        for side in map(pq.read_table(paired / "train.parquet").to_pylist()[0].get, ("rejected", "chosen"))
    ]
    check(edited(flip), [as_it_was] * 2, texts)


def test_an_edited_response_is_trained_on_by_sppo_all(
    models: Path, paired: Path, edited: Callable[..., TrainingSet]
) -> None:
    before = ids(unedited(models, paired, loss_type="sppo_all"))
    tokenizer = chat.load_tokenizer(models / "llama3")

    def middle(row: dict[str, Any]) -> int:
        return ({0, 1, 2} - {row["chosen_index"], row["rejected_index"]}).pop()

    data = edited(lambda row: row["responses"][middle(row)].update(text="red"), loss_type="sppo_all")
    found = ids(data)
    assert found[1:] == before[1:]
    changed = [i for i in range(3) if found[0][i] != before[0][i]]
    assert [tokenizer.decode(found[0][i][1]) for i in changed] == ["red<|eot_id|>"]
    assert data.counts["rows_edited"] == 1


def test_an_edit_that_a_loss_does_not_read_is_refused(edited: Callable[..., TrainingSet]) -> None:
    with pytest.raises(SPPOError, match=r"row 0: chosen was edited; sppo_all trains on responses"):
        edited(lambda row: row["chosen"][-1].update(content="red"), loss_type="sppo_all")
    with pytest.raises(SPPOError, match=r"row 0: responses was edited; this loss trains on chosen and rejected"):
        edited(lambda row: row["responses"][row["chosen_index"]].update(text="red"))
    with pytest.raises(SPPOError, match=r"row 0: prompt was edited; this loss trains on chosen and rejected"):
        edited(lambda row: row["prompt"][0].update(content="red"))


# the training set: our own rows, without their manifest, on another day or with other arguments of the template


WITH_DEFAULT = (  # as Qwen-2.5: a system turn of the template's own where a conversation has none
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}" + tiny.QWEN3_TEMPLATE
)
HEAR = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is it None? Say all."}]
SAID = [*HEAR[1:], answer("It is."), {"role": "user", "content": "Is it?"}]
THINK = {"enable_thinking": False}


def prompts_of_a_row(
    tokenizer: Any, path: Path, drawn: list[int], edited: list[dict[str, str]], kwargs: dict[str, Any]
) -> tuple[list[list[int]], dict[str, int]]:
    """The trained prompts of a row that was drawn for `drawn` and whose conversation is now `edited`; the counts."""
    end = tokenizer.eos_token_id
    said = [{"text": t, "token_ids": [*tokenizer(t, add_special_tokens=False)["input_ids"], end]} for t in ("a", "b")]
    row = {"chosen": [*edited, answer("a")], "rejected": [*edited, answer("b")], "prompt": edited, **RATES}
    row |= {"responses": said, "chosen_index": 0, "rejected_index": 1, "prompt_token_ids": drawn}
    pq.write_table(pa.Table.from_pylist([{**row, "tokenizer": chat.tokenizer_identity(tokenizer)}]), path)
    data = load_training_set(path, tokenizer, {end}, Recipe(chat_template_kwargs=kwargs))
    assert [r for _, r in ids(data)[0]] == [r["token_ids"] for r in said]
    return [p for p, _ in ids(data)[0]], data.counts


EDITS = [
    lambda turns: [*turns[:-1], {**turns[-1], "content": turns[-1]["content"][:-4]}],  # shorter at the end
    lambda turns: [*turns[:-1], {**turns[-1], "content": turns[-1]["content"][4:]}],  # at the start
    lambda turns: [*turns[:-1], {**turns[-1], "content": f"{turns[-1]['content']} Now"}],
    lambda turns: [*turns[:-1], {**turns[-1], "content": ""}],
    lambda turns: [*turns, answer("yes"), USER],
    lambda turns: turns[1:] or [USER],  # a turn less, the system's or the first
    lambda turns: turns[-1:] if len(turns) > 2 else [USER],
    lambda turns: [answer(turns[0]["content"]), *turns[1:]],
]


@pytest.mark.parametrize(
    ("template", "drawn_with", "now_with"),
    [
        (None, THINK, {}),
        (None, {}, THINK),
        (WITH_DEFAULT, THINK, {}),
        (DATED, {}, {}),
        (DATED.replace("strftime_now('%d %b %Y')", "(day or strftime_now('%d %b'))"), {"day": "1 May"}, {}),
        (DATED.replace("strftime_now('%d %b %Y')", "(day or strftime_now('%d %b'))"), {}, {"day": "1 May"}),
    ],
)
@pytest.mark.parametrize("turns", [HEAR, HEAR[1:], SAID], ids=["system", "one", "several"])
def test_what_the_policy_read_trains_whatever_the_template_would_write_now(
    models: Path,
    tmp_path: Path,
    day: Callable[[int], None],
    template: str | None,
    drawn_with: dict[str, Any],
    now_with: dict[str, Any],
    turns: list[dict[str, str]],
) -> None:
    tokenizer = chat.load_tokenizer(models / ("llama3" if template and "start_header" in template else "qwen3"))
    tokenizer.chat_template = template or tokenizer.chat_template
    day(1)
    drawn = chat.prompt_ids(tokenizer, turns, drawn_with)
    day(2)
    assert chat.prompt_ids(tokenizer, turns, now_with) != drawn
    assert frames.reads_as(tokenizer, drawn, turns, now_with)
    for number, change in enumerate(EDITS):
        assert not frames.reads_as(tokenizer, drawn, change(turns), now_with), number
    prompts, counts = prompts_of_a_row(tokenizer, tmp_path / "t.parquet", drawn, turns, now_with)
    assert (prompts, counts["rows_from_generated_ids"]) == ([drawn] * 2, 1)
    edited = EDITS[0](turns)
    prompts, counts = prompts_of_a_row(tokenizer, tmp_path / "t.parquet", drawn, edited, now_with)
    assert (prompts, counts["rows_edited"]) == ([chat.prompt_ids(tokenizer, edited, now_with)] * 2, 1)


# the user's own functions


CALLABLES = """
import functools
import math

class Longer:
    def __call__(self, prompt, first, second):
        return len(first) - len(second) if first else None

def scaled(scale, prompt, first, second):
    return scale * (len(first) - len(second)) if first else None

whole = Longer()
double = functools.partial(scaled, 2)
c = math.hypot
"""


def test_all_that_can_be_called_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "callables.py"
    path.write_text(CALLABLES)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, logit in (("whole", 2.0), ("double", 4.0), ("c", None)):
        recipe = Recipe(ranker=f"callables:{name}")
        assert function.identity(recipe)["source"] == digest(path)
        assert function.fetch(recipe) == str(path)
        ranker = function.load(recipe)
        if logit is not None:
            assert list(ranker.logits([([USER], "abc", "a")])) == [(0, logit)]
        with pytest.raises(SPPOError, match=f"the ranker's function callables:{name} (gave None|failed: TypeError)"):
            list(ranker.logits([([USER], "", "a")]))


def test_what_is_built_into_python_is_no_ranker() -> None:
    with pytest.raises(UsageError, match=r"--judge builtins:len: it is built into Python; name a function in a file"):
        function.source_file("builtins:len", "--judge")


# responses and questions of other tools


def longer(prompt: str, first: str, second: str) -> float:
    return float(len(first) - len(second))


def others(directory: Path, rows: list[dict[str, Any]], logits: Any) -> Path:
    """$DATA with responses and a ranking of other tools."""
    (directory / "ranking").mkdir(parents=True)
    good = {"prompt_id": "p", "prompt": [USER], "responses": [{"text": "a"}, {"text": "bc"}]}
    pq.write_table(pa.Table.from_pylist([{**good, **row} for row in rows]), directory / "responses.parquet")
    ranking = [{"prompt_id": row.get("prompt_id", "p"), "logits": logits} for row in rows]
    pq.write_table(pa.Table.from_pylist(ranking), directory / "ranking" / "theirs.parquet")
    return directory


LOGITS = [[0.0, 1.0], [-1.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": [{"role": "user", "content": 7}]}, "content in column prompt is int64, not text"),
        ({"prompt": [{"role": "user", "content": parts("a")}]}, "content in column prompt is list.*, not text"),
        ({"responses": [{"text": 7}, {"text": 8}]}, "text in column responses is int64, not text"),
        ({"prompt": [{"role": "user", "content": "a", "name": "Anna"}]}, f"prompt: a message has name, {HANDS_ON}"),
        ({"prompt_id": 1.5}, "column prompt_id is double"),
    ],
)
def test_responses_of_another_tool_are_texts(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    recipe, data = Recipe(pairs=2, ranker="test_reading:longer"), others(tmp_path / "data", [change], LOGITS)
    with pytest.raises(SPPOError, match=message):
        rank_shards(recipe, data, [Slice(0, 0, 1)], False)
    with pytest.raises(SPPOError, match=message):
        compute_prob(recipe, data, False)


@pytest.mark.parametrize(
    ("change", "logits", "message"),
    [
        ({}, [["0", "1"], ["-1", "0"]], "column logits is .*string.*, not .*float"),
        ({}, [[False, True], [False, False]], "column logits is .*bool.*, not .*float"),
        ({"prompt_token_ids": ["1"]}, LOGITS, "column prompt_token_ids is .*string.*, not .*int32"),
        ({"responses": [{"text": "a", "token_ids": ["1"]}] * 2}, LOGITS, "column responses is .*token_ids.*string"),
        ({"tokenizer": 7}, LOGITS, "column tokenizer is int64, not string"),
    ],
)
def test_a_number_is_no_text_and_a_text_no_number(
    tmp_path: Path, change: dict[str, Any], logits: Any, message: str
) -> None:
    with pytest.raises(SPPOError, match=message):
        compute_prob(Recipe(pairs=2), others(tmp_path / "data", [change], logits), False)


@pytest.mark.parametrize(("kind", "inner"), [(pa.list_view, pa.list_view), (pa.large_list_view, pa.large_list)])
def test_views_of_lists_are_lists(tmp_path: Path, kind: Any, inner: Any) -> None:
    data = others(tmp_path / "data", [{"prompt_id": "p"}, {"prompt_id": "q"}], LOGITS)
    for path, column in ((data / "responses.parquet", "prompt"), (data / "ranking" / "theirs.parquet", "logits")):
        table = pq.read_table(path)
        found = table.schema.field(column).type.value_type
        wanted = kind(inner(pa.float64()) if column == "logits" else found)
        made = pa.array(table[column].to_pylist(), wanted)
        pq.write_table(table.drop_columns([column]).append_column(column, made), path)
        assert pq.read_schema(path).field(column).type == wanted
    compute_prob(Recipe(pairs=2, ranker_prompt="text"), data, False)
    rows = pq.read_table(data / "train.parquet").to_pylist()
    assert [row["chosen"] for row in rows] == [[USER, answer("a")]] * 2


def test_ids_that_are_numbers_join_and_logits_may_be_decimals(tmp_path: Path) -> None:
    logits = [[Decimal("0.0"), Decimal("2.5")], [Decimal("-2.5"), Decimal("0.0")]]
    data = others(tmp_path / "data", [{"prompt_id": 7}, {"prompt_id": 12}], logits)
    recipe = Recipe(pairs=2, estimator="paper", ranker="test_reading:longer", ranker_prompt="text")
    compute_prob(recipe, data, False)
    rows = pq.read_table(data / "train.parquet").to_pylist()
    assert [(row["prompt_id"], row["chosen"][-1]["content"]) for row in rows] == [("7", "a"), ("12", "a")]
    assert rows[0]["chosen_probs"] == pytest.approx(1 / (1 + np.exp(-2.5)))
    rank_shards(recipe, data, [Slice(0, 0, 1)], False)
    ranked = pq.read_table(data / "ranking" / "shard-00000.parquet").to_pylist()
    assert [(row["prompt_id"], row["logits"][0][1]) for row in ranked] == [("7", -1.0), ("12", -1.0)]


MARKS = {"question_id": 1, "category": "writing", "turns": ["a", "b"]}


@pytest.mark.parametrize(
    ("suite", "name", "content", "message"),
    [
        (mt_bench, "q.jsonl", {**MARKS, "category": ["writing"]}, "its category .* is none of"),
        (mt_bench, "q.jsonl", {**MARKS, "turns": ["a", parts("b")]}, "its turns must be a list of two texts"),
        (mt_bench, "q.jsonl", {**MARKS, "category": "math", "reference": [1, 2]}, "its reference must be a list"),
        (alpaca_eval, "q.jsonl", {"instruction": parts("a"), "output": 7}, "no instruction and no output"),
        (alpaca_eval, "q.jsonl", "[" * 100_000, "not JSON"),
        (alpaca_eval, "q.parquet", "no table", "not a readable Parquet file"),
    ],
)
def test_questions_of_a_suite_are_texts(tmp_path: Path, suite: Any, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SPPOError, match=message):
        suite.questions(SimpleNamespace(questions=str(path)))


def test_a_line_of_questions_ends_at_its_newline_only(tmp_path: Path) -> None:
    row = {"instruction": "a\u2028b\x85c", "output": "d"}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert alpaca_eval.questions(SimpleNamespace(questions=str(path))) == [{"generator": "reference", **row}]


def test_a_pair_of_two_prompts_is_refused_and_senseless_pairs_are_counted(models: Path, tmp_path: Path) -> None:
    """Another tool's file may hold them; what is trained on is said."""
    path, other = tmp_path / "t.parquet", {"role": "user", "content": "Why?"}
    pairs = [("yes", "no"), ("yes", "yes"), ("", "no")]
    rows = [{"chosen": [USER, answer(good)], "rejected": [USER, answer(bad)]} for good, bad in pairs]
    counts = read(models, path, rows, loss_type="sigmoid").counts
    assert (counts["pairs_of_equal_answers"], counts["empty_answers"]) == (1, 1)
    with pytest.raises(SPPOError, match="row 0: chosen and rejected answer different prompts"):
        read(models, path, [{"chosen": [USER, answer("yes")], "rejected": [other, answer("no")]}], loss_type="sigmoid")
