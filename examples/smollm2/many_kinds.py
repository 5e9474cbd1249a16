"""Instructions of 25 kinds that a program can check: the prompts, the preference and the measures of IFEval's kinds.

A prompt is a task about a topic and one to three constraints:

    Write a letter to a friend about chess. Use at most 40 words. Write it without commas.

The preference finds the constraints in the prompt and counts how many of them an answer follows, as that of
instructions.py does. It checks the form of an answer, and not whether it is true.

Most kinds are those of IFEval (arXiv 2311.07911), in other words. tests/test_many_kinds.py sees to it that no eight
words in a row stand in a prompt of IFEval too.

To read it from top to bottom: how to count in a text, the checks, the constraints, the preference, the prompts.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from examples.smollm2.instructions import HELD_OUT_TOPICS, TRAIN_TOPICS, points_of, sentences_of, words_of
from sppo.evaluation.health import repeats

TASKS = (
    "What is interesting about {}?",
    "Why do people like {}?",
    "Explain {} to a child.",
    "Tell me something about {}.",
    "What should everybody know about {}?",
    "Give me some advice about {}.",
    "Write a short story about {}.",
    "Write a poem about {}.",
    "Write a letter to a friend about {}.",
    "Write an advertisement for {}.",
    "Describe {} to somebody from another planet.",
    "What would a teacher say about {}?",
)
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "eight": 8}


# Counting in a text; instructions.py has more.


def parts_of(text: str, mark: str) -> int:
    """How many parts a text has between lines, or places, of `mark`; 0 where one of them is empty."""
    parts = [part.strip() for part in text.split(mark)]
    return len(parts) if all(map(words_of, parts)) else 0


def _sentences_in(text: str) -> int:
    """How many sentences a text has; the P.S. before one is none."""
    return sentences_of(re.sub(r"P\.\s?S\.", "", text))


def _number(word: str) -> int:
    return NUMBERS.get(word) or int(word)


def _near(found: int, wanted: int) -> float:
    """1 where the counts are equal, and less the further they are apart."""
    return 1 / (1 + abs(found - wanted))


def _enough(found: int, wanted: int) -> float:
    """1 where there are as many as wanted or more, and else the share of them."""
    return min(1.0, found / wanted)


def _few(found: int, most: int) -> float:
    """1 where there are as many as allowed or fewer, and less the more there are."""
    return min(1.0, most / max(found, 1))


# The checks: (the constraint's parameters, the answer) -> how nearly the answer follows it, 1 exactly when it does.

Check = Callable[[tuple[str, ...], str], float]


def _sentences(of: tuple[str, ...], answer: str) -> float:
    return _near(_sentences_in(answer), _number(of[0]))


def _sentences_at_least(of: tuple[str, ...], answer: str) -> float:
    return _enough(_sentences_in(answer), _number(of[0]))


def _sentences_fewer(of: tuple[str, ...], answer: str) -> float:
    return _few(_sentences_in(answer), _number(of[0]) - 1)


def _one_sentence(_of: tuple[str, ...], answer: str) -> float:
    return _near(_sentences_in(answer), 1)


def _numbered_points(of: tuple[str, ...], answer: str) -> float:
    return _near(points_of(answer, r"\d+[.)]"), _number(of[0]))


def _hyphen_points(of: tuple[str, ...], answer: str) -> float:
    return _near(points_of(answer, "[-–]"), _number(of[0]))


def _star_points(of: tuple[str, ...], answer: str) -> float:
    found = re.findall(r"(?m)^\s*[*-]\s*[^*\s]", answer)
    return _near(len(found), _number(of[0]))


def _at_most(of: tuple[str, ...], answer: str) -> float:
    return _few(len(words_of(answer)), int(of[0]))


def _fewer(of: tuple[str, ...], answer: str) -> float:
    return _few(len(words_of(answer)), int(of[0]) - 1)


def _at_least(of: tuple[str, ...], answer: str) -> float:
    return _enough(len(words_of(answer)), int(of[0]))


def _paragraphs(of: tuple[str, ...], answer: str) -> float:
    return _near(parts_of(answer, "***"), _number(of[0]))


def _two_answers(_of: tuple[str, ...], answer: str) -> float:
    first, *others = map(words_of, answer.split("******"))
    return 0.5 if others == [first] else _near(parts_of(answer, "******"), 2)


def _no_commas(_of: tuple[str, ...], answer: str) -> float:
    return 1 / (1 + answer.count(","))


def _no_capitals(_of: tuple[str, ...], answer: str) -> float:
    return 1 / (1 + len(re.findall("[A-Z]", answer)))


def _only_capitals(_of: tuple[str, ...], answer: str) -> float:
    return 1 / (1 + len(re.findall("[a-z]", answer)))


def _capital_words(of: tuple[str, ...], answer: str) -> float:
    return _enough(len(re.findall(r"\b[A-Z]{2,}\b", answer)), _number(of[0]))


def _ends_with_question(_of: tuple[str, ...], answer: str) -> float:
    if answer.rstrip("\"'”) \n").endswith("?"):
        return 1.0
    return 0.5 if "?" in answer else 0.0


def _contains(of: tuple[str, ...], answer: str) -> float:
    words = set(words_of(answer))
    return sum(word in words for word in of) / len(of)


def _frequency(of: tuple[str, ...], answer: str) -> float:
    return _enough(words_of(answer).count(of[0]), _number(of[1]))


def _letters(of: tuple[str, ...], answer: str) -> float:
    text = re.sub(r"(.)\1{2,}", r"\1\1", answer.lower())  # wwww is two of them
    return _enough(text.count(of[0]), int(of[1]))


def _avoids(of: tuple[str, ...], answer: str) -> float:
    words = words_of(answer)
    return 1 / (1 + sum(words.count(word) for word in of))


def _begins_with(of: tuple[str, ...], answer: str) -> float:
    words = words_of(answer)
    return 1.0 if words[:1] == [of[0]] else 0.5 * (of[0] in words)


def _ends_with(of: tuple[str, ...], answer: str) -> float:
    words, wanted = words_of(answer), words_of(of[0])
    if words[-len(wanted) :] == wanted:
        return 1.0
    return 0.5 * (f" {' '.join(wanted)} " in f" {' '.join(words)} ")


def _title(_of: tuple[str, ...], answer: str) -> float:
    if re.match(r"[\s\"'#*]*<<[^\n<>]*\w[^\n<>]*>>", answer):  # at the start
        return 1.0
    return 0.5 * ("<" in answer)


def _quoted(_of: tuple[str, ...], answer: str) -> float:
    text = answer.strip()
    return (text.startswith('"') + text.endswith('"')) / 2 if len(text) > 1 else 0.0


def _highlights(of: tuple[str, ...], answer: str) -> float:
    return _enough(len(re.findall(r"\*[^\s*][^\n*]*\*", answer)), _number(of[0]))


def _blanks(of: tuple[str, ...], answer: str) -> float:
    return _enough(len(re.findall(r"\[[^\[\]\n]+\]", answer)), _number(of[0]))


def _postscript(_of: tuple[str, ...], answer: str) -> float:
    if re.search(r"(?s)\w.*\n\s*P\.\s?S\.\s*\S[^\n]*\s*\Z", answer):  # at the end, under something
        return 1.0
    return 0.5 * ("P.S." in answer)


# The constraints.


@dataclass(frozen=True)
class Constraint:
    """A sentence of a prompt, and the check of whether an answer follows it.

    A prompt has at most one constraint of each `group`, and none beside one of APART, so that they do not contradict
    each other.
    """

    name: str
    group: str
    phrases: tuple[str, ...]  # the sentence, in several ways; each {} stands for a parameter
    check: Check
    choices: tuple[tuple[str, ...], ...] = ((),)  # of the parameters
    held_out: bool = False  # only in held-out prompts: training never sees it

    def find(self, prompt: str) -> tuple[str, ...] | None:
        """The parameters of the sentence in a prompt that holds it, else None."""
        for phrase in self.phrases:
            pattern = (
                re.escape(phrase).replace(re.escape('"{}"'), '"([^"]+)"').replace(re.escape("{}"), "([A-Za-z0-9]+)")
            )
            if match := re.search(pattern, prompt):
                return match.groups()
        return None


def _each(*values: str) -> tuple[tuple[str, ...], ...]:
    return tuple((value,) for value in values)


def _all(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple((a, b) for a in first for b in second if a != b)


_COUNTS = ("two", "three", "four")
_LIST = "Answer with a numbered list of {} points, each on its own line."
_STARS = (
    "Write exactly {} bullet points, each on a line that begins with *.",
    "Use {} bullets (* like this) and no more.",
)
_HYPHENS = "Answer with a list of {} points, each on its own line after a hyphen."
_WORDS = ("water", "people", "time", "world", "small", "beautiful", "old", "light", "friend", "always")
_PLAIN = ("the", "is", "and", "very", "many", "good", "it", "they")
_FIRST, _LAST = ("today", "well", "listen", "yes"), ("done", "friend", "always")
_ENDS = ("that is all I know", "and so it goes", "what do you think", "thank you for reading", "see you soon")

CONSTRAINTS = (
    Constraint("sentences", "shape", ("Write exactly {} sentences.",), _sentences, _each(*_COUNTS)),
    Constraint("numbered", "shape", (_LIST,), _numbered_points, _each(*_COUNTS)),
    Constraint("bullets", "shape", _STARS, _star_points, _each("two", "three", "four", "five")),
    Constraint(
        "paragraphs",
        "shape",
        ("Write {} paragraphs with a line of *** between them.", "Make it {} paragraphs, and put *** between any two."),
        _paragraphs,
        _each(*_COUNTS),
    ),
    Constraint(
        "two_answers",
        "shape",
        ("Give two different answers with ****** between them.", "I want two versions, and ****** between the two."),
        _two_answers,
    ),
    Constraint(
        "words_at_most",
        "length",
        ("Use at most {} words.", "Keep it to {} words or fewer."),
        _at_most,
        _each("20", "30", "40", "60"),
    ),
    Constraint(
        "words_at_least",
        "length",
        ("Use at least {} words.", "It must be {} words long or longer."),
        _at_least,
        _each("50", "70", "90", "110"),
    ),
    Constraint(
        "sentences_at_least",
        "length",
        ("Write {} sentences or more.", "There must be at least {} sentences."),
        _sentences_at_least,
        _each("four", "five", "six", "eight"),
    ),
    Constraint(
        "sentences_fewer",
        "length",
        ("Write fewer than {} sentences.", "Stop before you have written {} sentences."),
        _sentences_fewer,
        _each("three", "four", "five", "six"),
    ),
    Constraint("no_commas", "commas", ("Do not use any commas.", "Write it without commas."), _no_commas),
    Constraint(
        "avoids_words",
        "commas",
        ("Do not write the words {} and {}.", 'Leave out the words "{}" and "{}".'),
        _avoids,
        _all(_PLAIN, _PLAIN),
    ),
    Constraint(
        "lower_case", "case", ("Write in lower case letters only.", "no capital letters, please."), _no_capitals
    ),
    Constraint(
        "capital_words",
        "case",
        ("Write {} words or more in capital letters.", "Let at least {} words stand in ALL CAPITALS."),
        _capital_words,
        _each("two", "three", "five"),
    ),
    Constraint("ends_with_question", "end", ("End your answer with a question.",), _ends_with_question),
    Constraint(
        "ends_with_phrase",
        "end",
        ('Your last words must be "{}".', 'Close with the words "{}" and nothing behind them.'),
        _ends_with,
        _each(*_ENDS),
    ),
    Constraint(
        "postscript",
        "end",
        ("The last line is a P.S. with one more thought.", "Put a line with P.S. and an afterthought under it."),
        _postscript,
    ),
    Constraint("contains_word", "word", ("Use the word {}.",), _contains, _each(*_WORDS)),
    Constraint(
        "contains_words",
        "word",
        ("Use the words {} and {}.", 'Both "{}" and "{}" must occur.'),
        _contains,
        _all(_WORDS, _WORDS),
    ),
    Constraint(
        "frequency",
        "word",
        ("Write the word {} {} times or more.", 'Let "{}" occur at least {} times.'),
        _frequency,
        _all(_WORDS, ("two", "three", "four")),
    ),
    Constraint(
        "letters",
        "word",
        ("Use the letter {} {} times or more.", "Let the letter {} occur no fewer than {} times."),
        _letters,
        _all(tuple("abcdhklmprtwy"), ("3", "6", "10", "15")),
    ),
    Constraint("begins_with_word", "begin", ("Begin your answer with the word {}.",), _begins_with, _each(*_FIRST)),
    Constraint(
        "title",
        "begin",
        ("Give it a title, and write the title in <<double angle brackets>>.", "Start with a title like <<this one>>."),
        _title,
    ),
    Constraint(
        "quoted",
        "begin",
        ("Put your whole answer in double quotes.", 'Start with a " and end with a ".'),
        _quoted,
    ),
    Constraint(
        "highlights",
        "inside",
        ("Highlight {} parts or more with stars, *like this*.", "Let at least {} parts stand between *single stars*."),
        _highlights,
        _each("two", "three", "four"),
    ),
    Constraint(
        "blanks",
        "inside",
        (
            "Leave {} blanks or more in square brackets, such as [name].",
            "Put at least {} gaps to fill in, like [date].",
        ),
        _blanks,
        _each("two", "three", "four"),
    ),
    # what training never sees
    Constraint("one_sentence", "shape", ("Answer in a single sentence.",), _one_sentence, held_out=True),
    Constraint("hyphens", "shape", (_HYPHENS,), _hyphen_points, _each("two", "three"), held_out=True),
    Constraint("capitals", "case", ("WRITE IN CAPITAL LETTERS ONLY.",), _only_capitals, held_out=True),
    Constraint("words_fewer", "length", ("Stay below {} words.",), _fewer, _each("12", "18"), held_out=True),
    Constraint(
        "avoids_word", "commas", ("Do not use the word {}.",), _avoids, _each("the", "is", "and"), held_out=True
    ),
    Constraint(
        "ends_with_word", "end", ("End your answer with the word {}.",), _ends_with, _each(*_LAST), held_out=True
    ),
)

# Constraints of two groups of which no answer follows both, or of which one says nothing beside the other.
APART = {
    frozenset(pair)
    for one, others in {
        "postscript": ("lower_case", "numbered", "hyphens", "one_sentence"),
        "ends_with_phrase": ("lower_case", "avoids_words", "avoids_word"),
        "sentences_at_least": ("sentences", "one_sentence"),
        "sentences_fewer": ("sentences", "one_sentence", "paragraphs"),
        "letters": ("words_fewer",),
    }.items()
    for pair in ((one, other) for other in others)
}


def constraints_in(prompt: str) -> list[tuple[Constraint, tuple[str, ...]]]:
    """The constraints that a prompt holds, each with its parameters."""
    found = ((constraint, constraint.find(prompt)) for constraint in CONSTRAINTS)
    return [(constraint, parameters) for constraint, parameters in found if parameters is not None]


# The preference and the measures.


def closeness(prompt: str, answer: str) -> dict[Constraint, float]:
    """How nearly an answer follows each of its prompt's constraints, 1 exactly when it does.

    An answer of fewer than three words, or one that repeats itself, follows none. Otherwise an answer that says nothing
    would follow most of them.
    """
    inside = constraints_in(prompt)
    if len(words_of(answer)) < 3 or repeats(answer):
        return {constraint: 0.0 for constraint, _ in inside}
    return {constraint: constraint.check(parameters, answer) for constraint, parameters in inside}


_ENDINGS = tuple(".!?\"”')]>*")  # what a text that was cut rarely ends with


def preference(prompt: str, first: str, second: str) -> float:
    """The ranker, as a logit: the difference of the answers' scores, above 0 where `first` is better.

    A score is 3 for each constraint that the answer follows; up to 1.5 for each one that it misses, the more the nearer
    it comes; 0.5 for naming the topic; and 1 for coming to an end: a model of this size often goes on until it is cut.
    """
    return _score(prompt, first) - _score(prompt, second)


def _score(prompt: str, answer: str) -> float:
    near = list(closeness(prompt, answer).values())
    followed = sum(c == 1 for c in near)
    missed = sum(c for c in near if c < 1)
    topic = _topic_of(prompt)
    named = bool(topic) and topic in answer.lower()
    ends = answer.rstrip().endswith(_ENDINGS) and not repeats(answer)
    return 3 * followed + 1.5 * missed + 0.5 * named + ends


def _topic_of(prompt: str) -> str:
    """The topic's word, without the s of a plural; empty where the prompt has none of our tasks."""
    for task in TASKS:
        match = re.match(re.escape(task).replace(re.escape("{}"), r"([a-z ]+)"), prompt)
        if match:
            return match[1].removeprefix("the ").removesuffix("s")
    return ""


def measures(prompt: str, answer: str) -> dict[str, list[float]]:
    """For the report (--measure): for each constraint 1 if the answer follows it exactly, else 0.

    followed_seen: of the constraints that training has too; followed_unseen: of the others.
    """
    near = closeness(prompt, answer)
    followed = {c: float(value == 1) for c, value in near.items()}
    return {
        "followed": list(followed.values()),
        "followed_seen": [value for c, value in followed.items() if not c.held_out],
        "followed_unseen": [value for c, value in followed.items() if c.held_out],
    }


# The prompts.


def make_prompts(topics: list[str], count: int, held_out: bool, rng: random.Random) -> list[str]:
    """`count` prompts, no two alike, each with one to three constraints.

    held_out: every second prompt has exactly one constraint of those that training never sees.
    """
    made: dict[str, None] = {}  # a set that keeps its order
    seen = [c for c in CONSTRAINTS if not c.held_out]
    unseen = [c for c in CONSTRAINTS if c.held_out]
    while len(made) < count:
        number = rng.choices((1, 2, 3), (4, 4, 2))[0]
        chosen = [rng.choice(unseen)] if held_out and len(made) % 2 else []
        while len(chosen) < number:
            constraint = rng.choice(seen)
            if all(c.group != constraint.group and {c.name, constraint.name} not in APART for c in chosen):
                chosen.append(constraint)
        rng.shuffle(chosen)
        sentences = [rng.choice(c.phrases).format(*rng.choice(c.choices)) for c in chosen]
        made[" ".join([rng.choice(TASKS).format(rng.choice(topics)), *sentences])] = None
    return list(made)


def make_instructions(directory: Path, train: int, held_out: int, seed: int) -> None:
    """Write train.jsonl and heldout.jsonl into `directory`: so many prompts each, which share no topic."""
    rng = random.Random(seed)
    sets = {
        "heldout": make_prompts(HELD_OUT_TOPICS, held_out, True, random.Random(0)),  # the same for every seed
        "train": make_prompts(TRAIN_TOPICS, train, False, rng),
    }
    for name, prompts in sets.items():
        lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
