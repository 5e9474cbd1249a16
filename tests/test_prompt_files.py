"""Prompts in directories and CSV files are read as they are now, all of them and in order."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import datasets
import pytest

from sppo.command.errors import SPPOError
from sppo.generation.prompts import load_prompts
from sppo.recipe import Recipe


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
