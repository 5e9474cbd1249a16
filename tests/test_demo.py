"""The demo's world: the rule, the prompts, and a base model that can be read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny

from examples import demo


def test_the_rule_counts_colour_words() -> None:
    one, two = "Anna sees a red ball.", "Anna sees a blue, no, a green ball."
    assert demo.colour_words(two) == 2
    assert demo.rule("?", two, one) == -demo.rule("?", one, two) > 0
    assert demo.rule("?", one, one.replace("red", "golden")) == 0


def test_nothing_is_trained_on_a_held_out_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the loop, whose prompts are train.jsonl; nor the base model and the ranker, which are made before."""
    seen: dict[str, set[str]] = {}

    def note(directory: Path, prompts: list[tuple[str, str, str]], rng: random.Random) -> None:
        seen[directory.name] = {question for question, _, _ in prompts}

    monkeypatch.setattr(demo, "train_policy", note)
    monkeypatch.setattr(demo, "train_ranker", note)
    demo.make_demo(tmp_path / "demo", seed=1)

    held_out, train = (tiny.read_jsonl(tmp_path / "demo" / f"{name}.jsonl") for name in ("heldout", "train"))
    held_out, train = ([row["prompt"] for row in rows] for rows in (held_out, train))
    assert (len(set(held_out)), len(set(train))) == (len(held_out), len(train)) == (150, 576)
    assert set(seen) == {"policy", "ranker"}
    for prompts in (train, seen["policy"], seen["ranker"]):
        assert not set(held_out) & set(prompts)


def test_answers_of_the_corpus_are_mixed() -> None:
    """The base must leave room: most answers have one colour word or none, and some have more."""
    rng = random.Random(2)
    counts = [demo.colour_words(demo.answer("Anna", "at school", rng)) for _ in range(2000)]
    assert 0.6 < sum(counts) / len(counts) < 1.2
    assert max(counts) >= 3
