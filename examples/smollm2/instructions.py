"""Instructions that a program can check: the prompts, the preference and the measures of run_sppo_smollm2.sh.

A prompt is a question about a topic and one to three constraints:

    Why do people like chess? Use at most 25 words. Do not use any commas.

The preference finds the constraints in the prompt and counts how many of them an answer follows. So it can rank answers
to any prompt that holds these sentences. It checks the form of an answer, and not whether it is true. IFEval (arXiv
2311.07911) checks in the same way.

To read it from top to bottom: how to count in a text, the checks, the constraints, the preference, the prompts.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sppo.evaluation.health import repeats

TRAIN_TOPICS = (
    "chess,bread,rivers,whales,bicycles,maps,coffee,winter,trains,bees,gardens,castles,volcanoes,music,dreams,"
    "elephants,windmills,honey,lighthouses,snow,books,penguins,bridges,apples,clocks,sailing,forests,deserts,"
    "football,cats,painting,thunder,spiders,rice,candles,tigers,islands,dancing,mirrors,owls,cheese,balloons,"
    "mountains,radios,kites,wolves,salt,tents,pianos,frogs,markets,horses,rainbows,tunnels,potatoes,swimming,"
    "parrots,glass,libraries,camels,fire,shoes,storms,turtles,wine,towers,puzzles,ants,harbours,oranges,drums,fog"
).split(",")
HELD_OUT_TOPICS = (
    "tea,the moon,gold,dolphins,chocolate,spring,kitchens,airplanes,butterflies,paper,museums,earthquakes,guitars,"
    "sleep,lions,soap,lakes,tomatoes,running,stars,wool,eagles,pencils,pyramids"
).split(",")
QUESTIONS = (
    "What is interesting about {}?",
    "Why do people like {}?",
    "Explain {} to a child.",
    "Tell me something about {}.",
    "What should everybody know about {}?",
    "Give me some advice about {}.",
)
NUMBERS = {"two": 2, "three": 3, "four": 4}


# Counting in a text.


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[a-z0-9]+(?:['’-][a-z0-9]+)*", text.lower())


def sentences_of(text: str) -> int:
    """How many sentences a text has. An unfinished one at the end counts; the number of a list's point does not."""
    text = re.sub(r"(?m)^\s*(?:\d+[.)]|[-*•])\s+", "", text)
    return sum(bool(words_of(part)) for part in re.split(r"[.!?]+[\"'”)]*(?:\s+|$)", text))


def points_of(text: str, mark: str) -> int:
    """How many points a list has: lines that begin with `mark`, a regular expression, and go on with a word.

    0 if there is another line between or behind them.
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    marked = [bool(re.match(mark + r"\s*\w", line)) for line in lines]
    if not any(marked):
        return 0
    first = marked.index(True)
    return sum(marked) if all(marked[first:]) else 0


def _near(found: int, wanted: int) -> float:
    """1 where the counts are equal, and less the further they are apart."""
    return 1 / (1 + abs(found - wanted))


# The checks: (the constraint's parameter, the answer) -> how nearly the answer follows it, 1 exactly when it does.

Check = Callable[[str, str], float]


def _sentences(number: str, answer: str) -> float:
    return _near(sentences_of(answer), NUMBERS[number])


def _one_sentence(_: str, answer: str) -> float:
    return _near(sentences_of(answer), 1)


def _numbered_points(number: str, answer: str) -> float:
    return _near(points_of(answer, r"\d+[.)]"), NUMBERS[number])


def _hyphen_points(number: str, answer: str) -> float:
    return _near(points_of(answer, "[-–]"), NUMBERS[number])


def _at_most(limit: str, answer: str) -> float:
    return min(1.0, int(limit) / max(len(words_of(answer)), 1))


def _fewer(limit: str, answer: str) -> float:
    return _at_most(str(int(limit) - 1), answer)


def _no_commas(_: str, answer: str) -> float:
    return 1 / (1 + answer.count(","))


def _no_capitals(_: str, answer: str) -> float:
    return 1 / (1 + len(re.findall("[A-Z]", answer)))


def _only_capitals(_: str, answer: str) -> float:
    return 1 / (1 + len(re.findall("[a-z]", answer)))


def _ends_with_question(_: str, answer: str) -> float:
    if answer.rstrip("\"'”) \n").endswith("?"):
        return 1.0
    return 0.5 if "?" in answer else 0.0


def _contains(word: str, answer: str) -> float:
    return float(word in words_of(answer))


def _avoids(word: str, answer: str) -> float:
    return 1 / (1 + words_of(answer).count(word))


def _begins_with(word: str, answer: str) -> float:
    words = words_of(answer)
    return 1.0 if words[:1] == [word] else 0.5 * (word in words)


def _ends_with(word: str, answer: str) -> float:
    words = words_of(answer)
    return 1.0 if words[-1:] == [word] else 0.5 * (word in words)


# The constraints.


@dataclass(frozen=True)
class Constraint:
    """A sentence of a prompt, and the check of whether an answer follows it.

    A prompt has at most one constraint of each `group`, so that they do not contradict each other.
    """

    name: str
    group: str
    phrase: str  # the sentence; {} stands for the parameter
    check: Check
    choices: tuple[str, ...] = ()  # of the parameter
    held_out: bool = False  # only in held-out prompts: training never sees it

    @property
    def pattern(self) -> str:
        """The regular expression that finds the sentence in a prompt, and its parameter."""
        return re.escape(self.phrase).replace(re.escape("{}"), "([a-z0-9]+)")


_COUNTS = ("two", "three", "four")
_LIST = "Answer with a numbered list of {} points, each on its own line."
_HYPHENS = "Answer with a list of {} points, each on its own line after a hyphen."
_WORDS = ("water", "people", "time", "world", "small", "beautiful", "old", "light")
_FIRST, _LAST = ("today", "well", "listen", "yes"), ("done", "friend", "always")

CONSTRAINTS = (
    Constraint("sentences", "shape", "Write exactly {} sentences.", _sentences, _COUNTS),
    Constraint("numbered", "shape", _LIST, _numbered_points, _COUNTS),
    Constraint("words_at_most", "length", "Use at most {} words.", _at_most, ("15", "20", "25", "30")),
    Constraint("no_commas", "commas", "Do not use any commas.", _no_commas),
    Constraint("lower_case", "case", "Write in lower case letters only.", _no_capitals),
    Constraint("ends_with_question", "end", "End your answer with a question.", _ends_with_question),
    Constraint("contains_word", "word", "Use the word {}.", _contains, _WORDS),
    Constraint("begins_with_word", "begin", "Begin your answer with the word {}.", _begins_with, _FIRST),
    # what training never sees
    Constraint("one_sentence", "shape", "Answer in a single sentence.", _one_sentence, held_out=True),
    Constraint("hyphens", "shape", _HYPHENS, _hyphen_points, ("two", "three"), held_out=True),
    Constraint("words_fewer", "length", "Stay below {} words.", _fewer, ("12", "18"), held_out=True),
    Constraint("capitals", "case", "WRITE IN CAPITAL LETTERS ONLY.", _only_capitals, held_out=True),
    Constraint("avoids_word", "commas", "Do not use the word {}.", _avoids, ("the", "is", "and"), held_out=True),
    Constraint("ends_with_word", "end", "End your answer with the word {}.", _ends_with, _LAST, held_out=True),
)


def constraints_in(prompt: str) -> list[tuple[Constraint, str]]:
    """The constraints that a prompt holds, each with its parameter ("" for one that has none)."""
    found = []
    for constraint in CONSTRAINTS:
        match = re.search(constraint.pattern, prompt)
        if match:
            found.append((constraint, match[1] if match.groups() else ""))
    return found


# The preference and the measures.


def closeness(prompt: str, answer: str) -> dict[Constraint, float]:
    """How nearly an answer follows each of its prompt's constraints, 1 exactly when it does.

    An answer of fewer than three words, or one that repeats itself, follows none. Otherwise an answer that says nothing
    would follow most of them.
    """
    if len(words_of(answer)) < 3 or repeats(answer):
        return {constraint: 0.0 for constraint, _ in constraints_in(prompt)}
    return {constraint: constraint.check(parameter, answer) for constraint, parameter in constraints_in(prompt)}


def preference(prompt: str, first: str, second: str) -> float:
    """The ranker, as a logit: the difference of the answers' scores, above 0 where `first` is better.

    A score is 3 for each constraint that the answer follows; up to 1.5 for each one that it misses, the more the nearer
    it comes; and 0.5 for naming the topic.
    """
    return _score(prompt, first) - _score(prompt, second)


def _score(prompt: str, answer: str) -> float:
    near = list(closeness(prompt, answer).values())
    followed = sum(c == 1 for c in near)
    missed = sum(c for c in near if c < 1)
    topic = _topic_of(prompt)
    named = bool(topic) and topic in answer.lower()
    return 3 * followed + 1.5 * missed + 0.5 * named


def _topic_of(prompt: str) -> str:
    """The topic's word, without the s of a plural; empty where the prompt is none of our questions."""
    for question in QUESTIONS:
        match = re.match(re.escape(question).replace(re.escape("{}"), r"([a-z ]+)"), prompt)
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
            if constraint.group not in {c.group for c in chosen}:
                chosen.append(constraint)
        rng.shuffle(chosen)
        sentences = [c.phrase.format(rng.choice(c.choices)) if c.choices else c.phrase for c in chosen]
        made[" ".join([rng.choice(QUESTIONS).format(rng.choice(topics)), *sentences])] = None
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
