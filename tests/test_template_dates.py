"""A chat template that writes the day, or has other arguments now: what the policy read is kept and trained on."""

from __future__ import annotations

import datetime
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from conversations import RATES, USER, answer, ids
from test_agreement import worst_difference

from sppo.command.errors import SPPOError
from sppo.generation import shards
from sppo.generation.shards import generate_shards
from sppo.generation.source import Source
from sppo.models import chat, frames
from sppo.models.policy import open_policy
from sppo.preflight.generation import check_template
from sppo.recipe import Recipe
from sppo.store.journal import Journal
from sppo.store.shards import Slice
from sppo.training.data import load_training_set

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
        generate_shards(recipe, out, [Slice(0, 0)], False)

    day(1)
    with monkeypatch.context() as patch:
        killed_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            run()
    stage = Source.of(recipe).stage(out, Slice(0, 0))
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
    stage = Source.of(recipe).stage(tmp_path, Slice(0, 0))
    journal = Journal(stage.journal, stage.identity)
    journal.add("p", {"responses": [{"text": "kept", "token_ids": [50, 51], "finish_reason": "length"}] * 2})
    journal.close()
    with pytest.raises(SPPOError, match="shard-00000.journal is of an older version; move it away"):
        generate_shards(recipe, tmp_path, [Slice(0, 0)], False)


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
    found = check_template(policy, policy.tokenizer(), kwargs)
    assert any("writes the day into each prompt" in finding.text for finding in found) == says


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
