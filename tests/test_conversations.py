"""A conversation of any tool is taken whole, or its row is skipped or refused with the reason."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from conversations import CALL, HANDS_ON, IMAGE, LOGITS, NO_CALL, RATES, USER, answer, ids, others, parts, read

from sppo.command.errors import SPPOError
from sppo.generation.prompts import load_prompts
from sppo.generation.source import Source
from sppo.generation.templating import to_requests
from sppo.models import chat
from sppo.recipe import Recipe
from sppo.schema import as_messages
from sppo.store.responses import responses_columns
from sppo.training.data import load_training_set


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
    ([USER, answer("b"), {**USER, "reasoning_content": "so"}], f"a message has reasoning_content, {HANDS_ON}"),
    ([USER, answer("b", thinking={"a": 1}), USER], f"a message has thinking, {HANDS_ON}"),
    (
        [USER, answer("b", thinking="a", reasoning="b"), USER],
        "a message has different thoughts in reasoning and thinking",
    ),
    (
        [USER, answer([*parts("b"), {"type": "thinking", "thinking": "a"}]), USER],
        "a message has parts that are not text",
    ),
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
        source = Source.of(recipe)
        tokenizer = source.policy.tokenizer()
        made = to_requests(recipe, source.policy, tokenizer, source.prompts[0:2])
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
    source = Source.of(recipe)
    made = to_requests(recipe, source.policy, tokenizer, source.prompts[0:5])
    requests, skipped = made.requests, made.skipped
    assert [s["reason"] for s in skipped] == ["in a chat template already"] * 2
    assert len(requests) == 3

    rows = [{"prompt": text, "chosen": "yes", "rejected": "no", **RATES} for text in [*texts, *fine, IN_A_TEMPLATE[0]]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    data = load_training_set(tmp_path / "t.parquet", tokenizer, {tokenizer.eos_token_id}, Recipe())
    assert (len(data), data.counts["rows_left_out (prompt: in a chat template already)"]) == (3, 3)
