"""Templating: what goes into the engine and what is trained on, for the three families' templates."""

from __future__ import annotations

from pathlib import Path

import pytest

from sppo.command.errors import SPPOError
from sppo.models import chat

FAMILIES = ["llama3", "mistral", "gemma2", "qwen3"]
TURNS = [
    {"role": "user", "content": "def f(x): return None"},
    {"role": "assistant", "content": "None of it is wrong."},
    {"role": "user", "content": "Why None?"},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_ids_are_the_templates_with_one_bos(models: Path, family: str) -> None:
    tokenizer = chat.load_tokenizer(models / family)
    for messages in (TURNS[:1], TURNS):
        ids = chat.prompt_ids(tokenizer, messages)
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == expected
        if family != "qwen3":  # which has no BOS
            assert ids.count(tokenizer.bos_token_id) == 1
        text = tokenizer.decode(ids)
        assert all(m["content"] in text for m in messages)  # the released scripts cut at "None"


@pytest.mark.parametrize(
    ("family", "end"), [("llama3", "<|eot_id|>"), ("mistral", "</s>"), ("gemma2", "<end_of_turn>")]
)
def test_a_response_ends_once_and_has_no_header(models: Path, family: str, end: str) -> None:
    """The released training labels held the assistant's header, and EOS twice."""
    tokenizer = chat.load_tokenizer(models / family)
    stops = chat.stop_token_ids(models / family, tokenizer)
    prompt, response = chat.response_ids(tokenizer, TURNS[:1], "It is None.", stops)
    assert prompt == chat.prompt_ids(tokenizer, TURNS[:1])
    assert tokenizer.decode(response).strip() == f"It is None.{end}"
    assert sum(token in stops for token in response) == 1
    assert response[-1] in stops


def test_a_system_turn_is_kept_or_folded(models: Path) -> None:
    """Llama-3 and Qwen3 render a system turn; Gemma-2 and Mistral refuse one, so it goes into the first user turn."""
    for family in FAMILIES:
        tokenizer = chat.load_tokenizer(models / family)
        messages = chat.with_system(tokenizer, TURNS, "Be brief.")
        assert messages[0]["role"] == ("system" if family in ("llama3", "qwen3") else "user")
        assert "Be brief." in tokenizer.decode(chat.prompt_ids(tokenizer, messages))
        assert messages[-1] == TURNS[-1]
        own = [{"role": "system", "content": "Mine."}, TURNS[0]]
        assert "Be brief." not in str(chat.with_system(tokenizer, own, "Be brief."))


def test_template_arguments_reach_the_template(models: Path) -> None:
    tokenizer = chat.load_tokenizer(models / "qwen3")
    quiet = chat.prompt_ids(tokenizer, TURNS, {"enable_thinking": False})
    assert tokenizer.decode(quiet).endswith("<think>\n\n</think>\n\n")
    assert quiet != chat.prompt_ids(tokenizer, TURNS)


def test_roles_that_do_not_alternate_are_a_value_error(models: Path) -> None:
    tokenizer = chat.load_tokenizer(models / "gemma2")
    with pytest.raises(ValueError, match="alternate"):
        chat.prompt_ids(tokenizer, [TURNS[0], TURNS[0]])


def test_a_base_model_says_what_to_do(models: Path, tmp_path: Path) -> None:
    tokenizer = chat.load_tokenizer(models / "llama3")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SPPOError, match=r"instruct version.*chat_template\.jinja"):
        chat.load_tokenizer(tmp_path)


def test_tokenizer_identity_sees_the_template(models: Path) -> None:
    tokenizer = chat.load_tokenizer(models / "llama3")
    before = chat.tokenizer_identity(tokenizer)
    assert before == chat.tokenizer_identity(chat.load_tokenizer(models / "llama3"))
    assert before != chat.tokenizer_identity(chat.load_tokenizer(models / "mistral"))
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "model")
    assert before != chat.tokenizer_identity(tokenizer)
