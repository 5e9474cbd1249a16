"""What other tools write, and what users change, is read as it is: taken whole, or refused or counted with a reason."""

from __future__ import annotations

import datetime
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from test_agreement import worst_difference

from sppo.common import chat
from sppo.common.journal import Journal
from sppo.common.shards import Slice
from sppo.config import Recipe
from sppo.generation import shards
from sppo.generation.shards import generate_shards
from sppo.generation.source import Source

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
    run = lambda: generate_shards(recipe, out, [Slice(0, 0)], (0, 1), 1, False)  # noqa: E731 - short
    day(1)
    with monkeypatch.context() as patch:
        killed_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            run()
    stage = Source.of(recipe, (0, 1), out).stage(out, Slice(0, 0))
    journal = Journal(stage.journal, stage.identity)
    drawn = dict.fromkeys(journal.done)
    older = next(iter(drawn))  # an answer that an older version kept, without what the policy read
    journal.add(older, {"responses": journal.read(older)["responses"]})
    journal.close()
    day(2)
    run()
    rows = {row["prompt_id"]: row for row in pq.read_table(out / "responses.parquet").to_pylist()}
    days = {key: tokenizer.decode(row["prompt_token_ids"]).partition("Today: ")[2][:2] for key, row in rows.items()}
    assert days == {key: "01" if key in drawn and key != older else "02" for key in rows}
    assert Counter(days.values()) == {"01": 2, "02": 4}
    assert worst_difference(out / "responses.parquet", model) < 2e-5


def test_an_older_journal_is_kept_where_the_template_has_no_date(models: Path, tmp_path: Path) -> None:
    prompts = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Why?", "prompt_id": "p"}])
    recipe = Recipe(model=str(models / "llama3"), prompts=str(prompts), pairs=2, maxlen=4, engine="transformers")
    source = Source.of(recipe, (0, 1), tmp_path)
    stage = source.stage(tmp_path, Slice(0, 0))
    stage.begin()
    journal = Journal(stage.journal, stage.identity)
    kept = [{"text": "kept", "token_ids": [50, 51], "finish_reason": "length"}] * 2
    journal.add("p", {"responses": kept})
    journal.close()
    generate_shards(recipe, tmp_path, [Slice(0, 0)], (0, 1), 1, False)
    (row,) = pq.read_table(tmp_path / "responses.parquet").to_pylist()
    assert [r["text"] for r in row["responses"]] == ["kept", "kept"]
    assert row["prompt_token_ids"] == chat.prompt_ids(source.policy.tokenizer(), [{"role": "user", "content": "Why?"}])
