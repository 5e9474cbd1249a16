"""The 25 kinds of instruction: what an answer has to look like to count, and that nothing of IFEval is trained on."""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from examples.smollm2 import many_kinds as instructions
from examples.smollm2.instructions import words_of
from examples.smollm2.many_kinds import CONSTRAINTS, closeness, constraints_in, measures, preference
from sppo.evaluation.health import repeats

TASKS_SET = {task.format(topic) for task in instructions.TASKS for topic in instructions.TRAIN_TOPICS}
TASK = "Why do people like tea?"
LIST = "1. Warm\n2. Sweet\n3. Good"
# (prompt's sentence, an answer that follows it, one that does not)
CASES = [
    ("Write exactly two sentences.", "Tea is warm. People like it!", "Tea is warm and good."),
    ("Write exactly three sentences.", "Is it? It is. So be it.", "One. Two words. Three words. Four words."),
    ("Write exactly two sentences.", "Tea is warm.\nP.S. Drink it.", "Tea is warm.\nP.S. Drink it. Now."),
    ("Answer with a numbered list of three points, each on its own line.", f"Here you are:\n{LIST}", f"{LIST}\n4. Hot"),
    ("Write exactly two bullet points, each on a line that begins with *.", "So:\n* Warm\n* Sweet", "* Warm and sweet"),
    ("Use three bullets (* like this) and no more.", "* Warm\n* Sweet\n* Good", "* Warm\n* Sweet\n* Good\n* Hot"),
    ("Write two paragraphs with a line of *** between them.", "Tea is warm.\n***\nIt is.", "Tea is warm.\n\nIt is."),
    ("Make it three paragraphs, and put *** between any two.", "One.\n***\nTwo.\n***\nThree.", "One.\n***\nTwo is it."),
    ("Give two different answers with ****** between them.", "Tea.\n******\nWarm tea.", "Tea.\n***\nWarm tea."),
    ("I want two versions, and ****** between the two.", "Tea.\n******\nWarm tea.", "It is warm tea.\n******"),
    ("I want two versions, and ****** between the two.", "Tea.\n******\nWarm tea.", "Warm tea.\n******\nwarm tea!"),
    ("Use at most 15 words.", "a b c d e f g h i j k l m n o", "a b c d e f g h i j k l m n o p"),
    ("Keep it to 15 words or fewer.", "a b c d e f g h i j k l m n o", "a b c d e f g h i j k l m n o p"),
    ("Use at least 5 words.", "Tea is warm and good.", "Tea is warm, good."),
    ("It must be 5 words long or longer.", "Tea is warm and good.", "Tea is warm, good."),
    ("Write four sentences or more.", "One is it. Two. Three. Four. Five.", "One is it. Two. Three."),
    ("There must be at least five sentences.", "One is it. Two. Three. Four. Five.", "One is it. Two. Three. Four."),
    ("Write fewer than three sentences.", "Tea is warm. It is good.", "Tea is warm. It is good. So be it."),
    ("Stop before you have written four sentences.", "It is tea. So. So.", "Tea is it. So. So. So."),
    ("Do not use any commas.", "Tea is warm and sweet.", "Tea is warm, and sweet."),
    ("Write it without commas.", "Tea is warm and sweet.", "Tea is warm, and sweet."),
    ("Do not write the words the and is.", "Drink other tea often.", "Drink the tea often."),
    ('Leave out the words "very" and "many".', "Tea is warm.", "Tea is very warm."),
    ("Write in lower case letters only.", "tea is warm.", "Tea is warm."),
    ("no capital letters, please.", "tea is warm.", "tea is warm. It is."),
    ("WRITE IN CAPITAL LETTERS ONLY.", "TEA IS WARM.", "TEA IS warm."),
    ("Write two words or more in capital letters.", "TEA is so WARM today.", "TEA is warm. I like it."),
    ("Let at least three words stand in ALL CAPITALS.", "TEA IS so WARM.", "TEA is WARM."),
    ("End your answer with a question.", "Tea is warm. Do you like it?", "Is it warm? Tea is."),
    ('Your last words must be "and so it goes".', "Tea is warm, and so it goes.", "And so it goes with tea."),
    (
        'Close with the words "see you soon" and nothing behind them.',
        "It is tea. See you soon!",
        "See you soon at tea.",
    ),
    ("The last line is a P.S. with one more thought.", "Tea is warm.\nP.S. Drink it.", "Tea is warm. P.S."),
    ("Put a line with P.S. and an afterthought under it.", "Tea is warm.\n\nP.S. Drink it.", "Tea is warm. PS, drink."),
    ("The last line is a P.S. with one more thought.", "Tea is warm.\nP.S. Drink it.", "P.S. Tea is warm.\nDrink it."),
    ("The last line is a P.S. with one more thought.", "Tea is warm.\n\nP.S. Drink it.", "P.S. Tea is warm."),
    ("Use the word time.", "It is tea time.", "Sometimes it is tea."),
    ("Use the words time and old.", "It is old tea time.", "It is tea time."),
    ('Both "time" and "old" must occur.', "It is old tea time.", "It is old tea sometimes."),
    ("Write the word old two times or more.", "Old tea is old.", "Old tea is older."),
    ('Let "old" occur at least three times.', "Old, old and old tea.", "Old tea is old."),
    ("Use the letter w 3 times or more.", "We want warm tea.", "We want hot tea."),
    ("Let the letter w occur no fewer than 3 times.", "We want warm tea.", "We want hot tea."),
    ("Let the letter w occur no fewer than 3 times.", "We want warm tea.", "It is hot teawwww."),
    ("Begin your answer with the word today.", "Today I drink tea.", "I drink tea today."),
    (
        "Give it a title, and write the title in <<double angle brackets>>.",
        "<<Warm tea>>\nIt is.",
        "<Warm tea>\nIt is.",
    ),
    ("Start with a title like <<this one>>.", "<<Warm tea>>\nIt is.", "<< >>\nTea is warm."),
    ("Start with a title like <<this one>>.", "<<Warm tea>>\nIt is.", "It is <<warm tea>>"),
    ("Put your whole answer in double quotes.", '"Tea is warm."', '"Tea is" warm.'),
    ('Start with a " and end with a ".', '"Tea is warm."', 'Tea is warm."'),
    ("Highlight two parts or more with stars, *like this*.", "*Tea* is so *warm*.", "*Tea* is so * warm *."),
    ("Let at least two parts stand between *single stars*.", "*Tea* is so *warm*.", "*Tea is so warm*."),
    (
        "Leave two blanks or more in square brackets, such as [name].",
        "Dear [name], it is [day].",
        "Dear [name], tea [].",
    ),
    ("Put at least two gaps to fill in, like [date].", "Dear [name], it is [day].", "Dear [name], it is (day)."),
    ("Answer in a single sentence.", "Tea is a warm drink.", "Tea is warm. It is a drink."),
    ("Answer with a list of two points, each on its own line after a hyphen.", "- warm tea\n- sweet tea", LIST),
    ("Stay below 12 words.", "one two three four five six seven eight nine ten eleven", "a b c d e f g h i j k l"),
    ("Do not use the word the.", "Tea is other than a theme.", "Drink the tea."),
    ("End your answer with the word done.", "I drank it. Done!", "I have done it."),
]


@pytest.mark.parametrize(("sentence", "right", "wrong"), CASES)
def test_a_constraint_is_strict(sentence: str, right: str, wrong: str) -> None:
    prompt = f"{TASK} {sentence}"
    (constraint,) = closeness(prompt, right)
    assert closeness(prompt, right)[constraint] == 1
    assert 0 <= closeness(prompt, wrong)[constraint] < 1
    assert preference(prompt, right, wrong) == -preference(prompt, wrong, right) > 1


def test_every_constraint_has_a_case() -> None:
    """In each of its phrases."""
    for constraint in CONSTRAINTS:
        for phrase in constraint.phrases:
            alone = replace(constraint, phrases=(phrase,))
            assert any(alone.find(sentence) is not None for sentence, _, _ in CASES), phrase


@pytest.mark.parametrize("held_out", [False, True])
def test_the_constraints_of_a_prompt_are_read_back(held_out: bool) -> None:
    """A constraint that is not read back would be ranked as if nobody had asked for it."""
    for prompt in instructions.make_prompts(instructions.TRAIN_TOPICS, 200, held_out, random.Random(3)):
        inside = constraints_in(prompt)
        assert 1 <= len(inside) <= 3
        assert len({constraint.group for constraint, _ in inside}) == len(inside)
        # the question and the sentences of these constraints are the whole prompt
        rest = prompt
        for constraint, parameters in inside:
            (sentence,) = (s for p in constraint.phrases if (s := f" {p.format(*parameters)}") in rest)
            rest = rest.replace(sentence, "", 1)
        assert rest in TASKS_SET


@pytest.mark.parametrize("held_out", [False, True])
def test_no_prompt_contradicts_itself(held_out: bool) -> None:
    """One in fifty did: no answer could follow all of it."""
    for prompt in instructions.make_prompts(instructions.TRAIN_TOPICS, 3000, held_out, random.Random(5)):
        asked = {constraint.name: parameters for constraint, parameters in constraints_in(prompt)}
        counts = asked.keys() & {"sentences", "one_sentence", "sentences_at_least", "sentences_fewer"}
        assert len(counts) <= 1, prompt
        (ending,) = asked.get("ends_with_phrase", ("",))
        assert not set(words_of(ending)) & {*asked.get("avoids_words", ()), *asked.get("avoids_word", ())}, prompt
        if "lower_case" in asked:
            assert ending == ending.lower(), prompt
        if "postscript" in asked:  # P.S. has capitals, stands behind the list, and goes on with a sentence
            assert not asked.keys() & {"lower_case", "numbered", "hyphens", "one_sentence"}, prompt
    names = {constraint.name for constraint in CONSTRAINTS}
    assert all(len(pair) == 2 and pair <= names for pair in instructions.APART)


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


def test_of_equally_good_answers_the_one_that_comes_to_an_end_is_better() -> None:
    prompt = "Tell me something about gardens. Use at most 15 words."
    assert preference(prompt, "Every garden is a green place.", "Every garden is a green place and") == 1
    loop = "Every garden is green and every garden is green and every garden is green."
    assert repeats(loop)
    assert preference(prompt, loop, loop[:-1]) == 0  # the end of a loop is no end


def test_measures_are_one_number_for_each_constraint_seen_and_unseen() -> None:
    prompt = "Explain tea to a child. Do not use any commas. Answer in a single sentence. Use the word old."
    said = measures(prompt, "Tea is old.")
    assert said == {"followed": [1, 1, 1], "followed_seen": [1, 1], "followed_unseen": [1]}
    assert measures(prompt, "Tea, old. And warm.")["followed_unseen"] == [0]


def test_the_command_makes_prompts_of_these_kinds(tmp_path: Path) -> None:
    command = [tiny.sys.executable, "scripts/make_instructions.py", "--output_dir", tmp_path / "p", "--kinds", "many"]
    tiny.succeed(*command, "--seed", "7", "--train", "50", "--held_out", "20")
    train, held_out = ([json.loads(x)["prompt"] for x in (tmp_path / "p" / f"{n}.jsonl").read_text().splitlines()]
                       for n in ("train", "heldout"))  # fmt: skip
    assert (len(set(train)), len(set(held_out))) == (50, 20)
    assert all(constraints_in(prompt) for prompt in train)
    assert not any(c.held_out for prompt in train for c, _ in constraints_in(prompt))
    assert sum(any(c.held_out for c, _ in constraints_in(prompt)) for prompt in held_out) == 10
    refused = tiny.run(*command[:-1], "few", "--seed", "7", "--train", "50", "--held_out", "20")
    assert refused.returncode == 1
    assert "--kinds many" in refused.stderr


def eight_grams(text: str) -> set[int]:
    """Each eight words in a row, as a number of 64 bits."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    grams = (" ".join(words[i : i + 8]) for i in range(len(words) - 7))
    return {int.from_bytes(hashlib.sha256(gram.encode()).digest()[:8], "big") for gram in grams}


def test_no_eight_words_of_a_prompt_of_ifeval_stand_in_a_training_prompt() -> None:
    """Else the figures of IFEval would be those of prompts that the model has been trained on.

    tests/data/ifeval_8grams.npy has the numbers of all eight_grams of IFEval's 541 prompts.
    """
    published = set(np.load(tiny.ROOT / "tests/data/ifeval_8grams.npy").tolist())
    assert len(published) == 15313
    known = "add a postscript that starts with p s"  # of IFEval, and of an earlier version of ours
    assert eight_grams(known) <= published
    for seed in range(10):
        for prompt in instructions.make_prompts(instructions.TRAIN_TOPICS, 1000, False, random.Random(seed)):
            assert not eight_grams(prompt) & published, prompt
