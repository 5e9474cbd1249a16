"""The demo's world: the rule, the prompts, and a base model that can be read."""

from __future__ import annotations

import random

from examples import demo


def test_the_rule_counts_colour_words() -> None:
    one, two = "Anna sees a red ball.", "Anna sees a blue, no, a green ball."
    assert demo.colour_words(two) == 2
    assert demo.rule("?", two, one) == -demo.rule("?", one, two) > 0
    assert demo.rule("?", one, one.replace("red", "golden")) == 0


def test_training_and_held_out_prompts_are_disjoint() -> None:
    prompts = [q for q, _, _ in demo.all_prompts(random.Random(1))]
    assert len(set(prompts)) == len(prompts) >= 726


def test_answers_of_the_corpus_are_mixed() -> None:
    """The base must leave room: most answers have one colour word or none, and some have more."""
    rng = random.Random(2)
    counts = [demo.colour_words(demo.answer("Anna", "at school", rng)) for _ in range(2000)]
    assert 0.6 < sum(counts) / len(counts) < 1.2
    assert max(counts) >= 3
