"""The world of run_sppo_smollm2.sh: what an answer has to look like to count, and that nothing leaks into training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny

from examples.smollm2 import instructions
from examples.smollm2.instructions import CONSTRAINTS, closeness, constraints_in, measures, preference
from sppo.evaluation.health import health, repeats
from sppo.store.files import read_json

LIST = "1. Warm\n2. Sweet\n3. Good"
# (prompt's sentence, an answer that follows it, one that does not)
CASES = [
    ("Write exactly two sentences.", "Tea is warm. People like it!", "Tea is warm and good."),
    ("Write exactly three sentences.", "Is it? It is. So be it.", "One. Two words. Three words. Four words."),
    ("Answer with a numbered list of three points, each on its own line.", f"Here you are:\n{LIST}", f"{LIST}\n4. Hot"),
    ("Use at most 15 words.", "a b c d e f g h i j k l m n o", "a b c d e f g h i j k l m n o p"),
    ("Do not use any commas.", "Tea is warm and sweet.", "Tea is warm, and sweet."),
    ("Write in lower case letters only.", "tea is warm.", "Tea is warm."),
    ("End your answer with a question.", "Tea is warm. Do you like it?", "Is it warm? Tea is."),
    ("Use the word time.", "It is tea time.", "Sometimes it is tea."),
    ("Begin your answer with the word today.", "Today I drink tea.", "I drink tea today."),
    ("Answer in a single sentence.", "Tea is a warm drink.", "Tea is warm. It is a drink."),
    ("Answer with a list of two points, each on its own line after a hyphen.", "- warm tea\n- sweet tea", LIST),
    ("Stay below 12 words.", "one two three four five six seven eight nine ten eleven", "a b c d e f g h i j k l"),
    ("WRITE IN CAPITAL LETTERS ONLY.", "TEA IS WARM.", "TEA IS warm."),
    ("Do not use the word the.", "Tea is other than a theme.", "Drink the tea."),
    ("End your answer with the word done.", "I drank it. Done!", "I have done it."),
]


@pytest.mark.parametrize(("sentence", "right", "wrong"), CASES)
def test_a_constraint_is_strict(sentence: str, right: str, wrong: str) -> None:
    prompt = f"Why do people like tea? {sentence}"
    (constraint,) = closeness(prompt, right)
    assert closeness(prompt, right)[constraint] == 1
    assert 0 <= closeness(prompt, wrong)[constraint] < 1
    assert preference(prompt, right, wrong) == -preference(prompt, wrong, right) > 1


def test_every_constraint_has_a_case_and_is_found_in_the_prompts_that_hold_it() -> None:
    """A constraint that is not read back would be ranked as if nobody had asked for it."""
    found = [constraints_in(sentence) for sentence, _, _ in CASES]
    assert {c.name for (constraint,) in found for c in constraint[:1]} == {c.name for c in CONSTRAINTS}
    for held_out in (False, True):
        for prompt in instructions.make_prompts(instructions.TRAIN_TOPICS, 200, held_out, random.Random(3)):
            inside = constraints_in(prompt)
            sentences = [c.phrase.format(parameter) for c, parameter in inside]
            assert 1 <= len(inside) <= 3
            assert len({c.group for c, _ in inside}) == len(inside)
            assert sum(map(len, sentences)) + len(sentences) + prompt.index("?" if "?" in prompt else ".") + 1 == len(
                prompt
            ), prompt


def test_saying_nothing_or_the_same_again_follows_nothing() -> None:
    prompt = "What is interesting about tea? Do not use any commas. Use at most 15 words."
    for answer in ("", "   ", "Tea.", "tea is good tea is good tea is good tea is good"):
        assert set(closeness(prompt, answer).values()) == {0.0}, answer
    assert preference(prompt, "Tea keeps people warm.", "") > 5


def test_ties_are_broken_by_nearness_and_then_by_the_topic() -> None:
    prompt = "Tell me something about gardens. Use at most 15 words."
    near, far = "word by word it goes on " * 3, "word by word it went on and further " * 4
    assert preference(prompt, "Every garden is a green place.", "Every place is a green place.") == 0.5
    assert closeness(prompt, "One by one the many men and women walk along it to an old town now.")
    assert 0 < preference(prompt, " ".join(f"a{i}" for i in range(18)), " ".join(f"a{i}" for i in range(40))) < 3
    assert repeats(near)
    assert repeats(far)


def test_measures_are_one_number_for_each_constraint_seen_and_unseen() -> None:
    prompt = "Explain tea to a child. Do not use any commas. Answer in a single sentence. Use the word old."
    said = measures(prompt, "Tea is old.")
    assert said == {"followed": [1, 1, 1], "followed_seen": [1, 1], "followed_unseen": [1]}
    assert measures(prompt, "Tea, old. And warm.")["followed_unseen"] == [0]


def test_held_out_prompts_share_no_topic_and_hold_what_training_never_sees(tmp_path: Path) -> None:
    assert not set(instructions.TRAIN_TOPICS) & set(instructions.HELD_OUT_TOPICS)
    command = [tiny.sys.executable, "scripts/make_instructions.py", "--output_dir", tmp_path / "p"]
    tiny.succeed(*command, "--seed", "7", "--train", "50", "--held_out", "20")
    train, held_out = ([json.loads(x)["prompt"] for x in (tmp_path / "p" / f"{n}.jsonl").read_text().splitlines()]
                       for n in ("train", "heldout"))  # fmt: skip
    assert (len(set(train)), len(set(held_out))) == (50, 20)
    assert not any(c.held_out for prompt in train for c, _ in constraints_in(prompt))
    assert sum(any(c.held_out for c, _ in constraints_in(prompt)) for prompt in held_out) == 10
    assert "done" in tiny.succeed(*command, "--seed", "7", "--train", "50", "--held_out", "20")
    refused = tiny.run(*command, "--seed", "8")
    assert refused.returncode == 1
    assert "--seed 7" in refused.stderr
    assert read_json(tmp_path / "p" / "made.json")["seed"] == 7


def test_health_by_hand() -> None:
    def response(text: str, tokens: int, how: str = "stop") -> dict[str, object]:
        return {"text": text, "token_ids": [1] * tokens, "finish_reason": how}

    loop = "I like it very much and I like it very much and I like it very much"
    found = health([response("Tea.", 3), response(" ", 1), response(loop, 20, "length"), response("A b c d e.", 8)])
    assert found == {"mean_tokens": 8.0, "empty": 0.25, "repeated": 0.25, "cut": 0.25}
    # four words that come back once in twelve are no repetition
    assert repeats("1. soap\n2. soap product\n3. soap\n4. soap soap\n5. soap soap\n6. soap")  # SmolLM2's own
    assert not repeats("I like tea a lot since in winter I like tea a lot")
