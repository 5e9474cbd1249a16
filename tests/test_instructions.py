"""The 8 kinds of instruction: what an answer has to look like to count, and that nothing leaks into training."""

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

QUESTIONS_ASKED = {q.format(topic) for q in instructions.QUESTIONS for topic in instructions.TRAIN_TOPICS}
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


def test_every_constraint_has_a_case() -> None:
    found = [constraint.name for sentence, _, _ in CASES for constraint, _ in constraints_in(sentence)]
    assert set(found) == {constraint.name for constraint in CONSTRAINTS}


@pytest.mark.parametrize("held_out", [False, True])
def test_the_constraints_of_a_prompt_are_read_back(held_out: bool) -> None:
    """A constraint that is not read back would be ranked as if nobody had asked for it."""
    for prompt in instructions.make_prompts(instructions.TRAIN_TOPICS, 200, held_out, random.Random(3)):
        inside = constraints_in(prompt)
        assert 1 <= len(inside) <= 3
        assert len({constraint.group for constraint, _ in inside}) == len(inside)
        # the question and the sentences of these constraints are the whole prompt
        rest = prompt
        for constraint, parameter in inside:
            sentence = f" {constraint.phrase.format(parameter)}"
            assert sentence in rest
            rest = rest.replace(sentence, "", 1)
        assert rest in QUESTIONS_ASKED


def test_saying_nothing_or_the_same_again_follows_nothing() -> None:
    prompt = "What is interesting about tea? Do not use any commas. Use at most 15 words."
    for answer in ("", "   ", "Tea.", "tea is good tea is good tea is good tea is good"):
        assert set(closeness(prompt, answer).values()) == {0.0}, answer
    assert preference(prompt, "Tea keeps people warm.", "") > 5


def test_of_two_answers_that_miss_a_limit_the_nearer_one_is_better() -> None:
    prompt = "Tell me something about gardens. Use at most 15 words."
    near, far = (" ".join(f"a{i}" for i in range(count)) for count in (18, 40))
    # by hand: 1.5 times the share of the words that are allowed
    assert preference(prompt, near, far) == pytest.approx(1.5 * (15 / 18 - 15 / 40))
    assert preference(prompt, far, near) == -preference(prompt, near, far)


def test_a_constraint_that_is_followed_counts_more_than_two_that_nearly_are() -> None:
    prompt = "Tell me something about gardens. Use at most 15 words. Do not use any commas."
    follows_one = "a1, a2, a3, a4, a5, a6"  # short enough, with five commas
    follows_none = " ".join(f"a{i}" for i in range(16)) + ","  # one word and one comma too much
    assert preference(prompt, follows_one, follows_none) > 0


def test_of_equally_good_answers_the_one_that_names_the_topic_is_better() -> None:
    prompt = "Tell me something about gardens. Use at most 15 words."
    named, other = "Every garden is a green place.", "Every place is a green place."
    assert set(closeness(prompt, named).values()) == set(closeness(prompt, other).values()) == {1}
    assert preference(prompt, named, other) == 0.5


def test_measures_are_one_number_for_each_constraint_seen_and_unseen() -> None:
    prompt = "Explain tea to a child. Do not use any commas. Answer in a single sentence. Use the word old."
    said = measures(prompt, "Tea is old.")
    assert said == {"followed": [1, 1, 1], "followed_seen": [1, 1], "followed_unseen": [1]}
    assert measures(prompt, "Tea, old. And warm.")["followed_unseen"] == [0]


def test_held_out_prompts_share_no_topic_and_hold_what_training_never_sees(tmp_path: Path) -> None:
    assert not set(instructions.TRAIN_TOPICS) & set(instructions.HELD_OUT_TOPICS)
    command = [tiny.sys.executable, "scripts/make_instructions.py", "--output_dir", tmp_path / "p", "--kinds", "few"]
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


def test_an_answer_repeats_itself_when_most_of_it_stood_there_before() -> None:
    assert repeats("word by word it goes on " * 3)
    assert repeats("word by word it went on and further " * 4)
    assert repeats("1. soap\n2. soap product\n3. soap\n4. soap soap\n5. soap soap\n6. soap")  # SmolLM2's own
    # four words that come back once in twelve are no repetition
    assert not repeats("I like tea a lot since in winter I like tea a lot")
