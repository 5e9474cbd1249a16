"""A user's own functions rank, and other tools' responses, rankings and questions are read or refused by name."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversations import HANDS_ON, LOGITS, USER, answer, others, parts

from sppo.command.errors import SPPOError, UsageError
from sppo.evaluation.suites import alpaca_eval, mt_bench
from sppo.pairing.training_set import compute_prob
from sppo.rankers import function
from sppo.ranking.shards import rank_shards
from sppo.recipe import Recipe
from sppo.store.files import digest
from sppo.store.shards import Slice

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
        assert function.fetch(recipe) == path
        ranker = function.load(recipe)
        if logit is not None:
            assert list(ranker.logits([([USER], "abc", "a")])) == [(0, logit)]
        with pytest.raises(SPPOError, match=f"the ranker's function callables:{name} (gave None|failed: TypeError)"):
            list(ranker.logits([([USER], "", "a")]))


def test_what_is_built_into_python_is_no_ranker() -> None:
    with pytest.raises(UsageError, match=r"--judge builtins:len: it is built into Python; name a function in a file"):
        function.source_file("builtins:len", "--judge")


def longer(prompt: str, first: str, second: str) -> float:
    return float(len(first) - len(second))


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
    recipe, data = Recipe(pairs=2, ranker="test_other_tools:longer"), others(tmp_path / "data", [change], LOGITS)
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
    recipe = Recipe(pairs=2, estimator="paper", ranker="test_other_tools:longer", ranker_prompt="text")
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
        suite.load_questions(SimpleNamespace(questions=str(path)))


def test_a_line_of_questions_ends_at_its_newline_only(tmp_path: Path) -> None:
    row = {"instruction": "a\u2028b\x85c", "output": "d"}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert alpaca_eval.load_questions(SimpleNamespace(questions=str(path))) == [{"generator": "reference", **row}]
