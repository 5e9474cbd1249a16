"""Prompts that are alike stay apart, and what cannot be used is skipped with its reason.

That every kind of file gives the same prompts is in test_properties.py, what a broken one says in test_bad_input.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from sppo.generation.prompts import load_prompts
from sppo.recipe import Recipe


def test_identical_prompts_stay_apart(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": t} for t in ("a", "b", "a", "a")])
    ids = [p.prompt_id for p in load_prompts(str(path), Recipe())]
    assert len(set(ids)) == 4
    assert [ids[2], ids[3]] == [f"{ids[0]}-2", f"{ids[0]}-3"]


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
