"""Prompts from every kind of source, and what is refused or skipped."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny

from sppo.command.errors import SPPOError
from sppo.generation.prompts import fingerprint, load_prompts
from sppo.recipe import Recipe

TEXTS = ["What is None?", "Zwei Sätze, bitte: 🙂", 'commas, "quotes"\nand lines']


def sources(directory: Path) -> dict[str, Path]:
    table = datasets.Dataset.from_dict({"prompt": TEXTS})
    made = {k: directory / f"p.{k}" for k in ("jsonl", "parquet", "csv")}
    tiny.write_jsonl(made["jsonl"], [{"prompt": t} for t in TEXTS])
    table.to_parquet(str(made["parquet"]))
    with open(made["csv"], "w", newline="") as handle:
        csv.writer(handle).writerows([["prompt"], *[[t] for t in TEXTS]])
    made["saved"] = directory / "saved"
    datasets.DatasetDict({"train": table}).save_to_disk(str(made["saved"]))
    made["folder"] = directory / "folder"
    made["folder"].mkdir()
    table.to_parquet(str(made["folder"] / "train.parquet"))
    return made


def test_every_source_gives_the_same_prompts(tmp_path: Path) -> None:
    found = {name: load_prompts(str(path), Recipe()) for name, path in sources(tmp_path).items()}
    assert len({fingerprint(prompts) for prompts in found.values()}) == 1, found
    assert [p.messages[0]["content"] for p in found["csv"]] == TEXTS


def test_identical_prompts_stay_apart(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": t} for t in ("a", "b", "a", "a")])
    ids = [p.prompt_id for p in load_prompts(str(path), Recipe())]
    assert len(set(ids)) == 4
    assert [ids[2], ids[3]] == [f"{ids[0]}-2", f"{ids[0]}-3"]


def test_parts_are_disjoint_and_complete(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": str(i)} for i in range(10)])
    whole = [p.prompt_id for p in load_prompts(str(path), Recipe())]
    parts = [p.prompt_id for i in range(3) for p in load_prompts(str(path), Recipe(), (i, 3))]
    assert sorted(parts) == sorted(whole)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        (None, "empty"),
        ([], "empty"),
        (7, "not text"),
        ({"role": "user"}, "not text"),
        ([{"role": "user", "content": 7}], "not text"),
        ("half a pair \ud83d", "not text"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "does not end with a user turn"),
    ],
)
def test_unusable_prompts_are_marked_with_their_reason(tmp_path: Path, value: Any, reason: str) -> None:
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": value}, {"prompt": "fine"}])
    bad, good = load_prompts(str(path), Recipe())
    assert bad.skip == reason
    assert good.skip == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
        ("p.jsonl", b'["a"]\n', "not an object"),
        ("p.jsonl", b"\xff\xfe\n", "not UTF-8"),
        ("p.jsonl", b"", "there are none"),
        ("p.jsonl", b'{"text": "a"}\n', "no column 'prompt'; it has text"),
        ("p.jsonl", b'{"prompt": "a", "prompt_id": "1"}\n{"prompt": "b", "prompt_id": "1"}\n', "two different prompts"),
        ("p.parquet", b"PAR1 not really", "not a readable Parquet"),
        ("p.csv", b"prompt\na,b\n", "more or fewer fields"),
        ("p.txt", b"a\n", "should end in"),
    ],
)
def test_a_broken_source_is_one_clear_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SPPOError, match=message):
        load_prompts(str(tmp_path / name), Recipe())


def test_a_source_that_is_nowhere(tmp_path: Path) -> None:
    for source in (str(tmp_path / "no.jsonl"), "no/such-dataset"):
        with pytest.raises(SPPOError, match="prompts"):
            load_prompts(source, Recipe())
