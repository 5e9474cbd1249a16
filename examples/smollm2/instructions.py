"""Instructions that a program can check: the prompts, the preference and the measures of run_sppo_smollm2.sh.

A prompt is a question about a topic and one to three constraints: "Why do people like chess? Use at most 25 words. Do
not use any commas." The preference reads the constraints back from the prompt and counts which of them an answer
follows, so it ranks answers to any prompt that holds these sentences. Forms are checked, not facts: nothing here knows
whether an answer is true. The kind of check is IFEval's (arXiv 2311.07911).
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

Check = Callable[[str, str], float]


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[a-z0-9]+(?:['’-][a-z0-9]+)*", text.lower())


def sentences_of(text: str) -> int:
    """How many sentences a text has; the number before a list's point is none, and an unfinished end is one."""
    text = re.sub(r"(?m)^\s*(?:\d+[.)]|[-*•])\s+", "", text)
    return sum(bool(words_of(part)) for part in re.split(r"[.!?]+[\"'”)]*(?:\s+|$)", text))


def points_of(text: str, mark: str) -> int:
    """How many lines begin with `mark`, a regular expression, and say something; 0 where others stand among them."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    marked = [bool(re.match(mark + r"\s*\w", line)) for line in lines]
    return sum(marked) if any(marked) and all(marked[marked.index(True) :]) else 0


def _near(found: int, wanted: int) -> float:
    """1 where the counts are equal, and less the further they are apart."""
    return 1 / (1 + abs(found - wanted))


@dataclass(frozen=True)
class Constraint:
    """A sentence of a prompt and its check, which says how nearly an answer follows it: 1 exactly when it does.

    Of a `group` a prompt has one at most, so that its constraints do not contradict each other.
    """

    name: str
    group: str
    phrase: str
    choices: tuple[str, ...]
    check: Check  # (parameter, answer) -> 0 to 1
    held_out: bool = False  # only in held-out prompts

    @property
    def pattern(self) -> str:
        """Finds the sentence in a prompt, and its parameter."""
        return re.escape(self.phrase).replace(re.escape("{}"), "([a-z0-9]+)")


WORDS = ("water", "people", "time", "world", "small", "beautiful", "old", "light")
FIRST, LAST = ("today", "well", "listen", "yes"), ("done", "friend", "always")


def _no_other(pattern: str) -> Check:
    """Nearer to 1 the fewer places match."""
    return lambda _, answer: 1 / (1 + len(re.findall(pattern, answer)))


def _points(mark: str) -> Check:
    return lambda number, answer: _near(points_of(answer, mark), NUMBERS[number])


def _sentences(number: str, answer: str) -> float:
    return _near(sentences_of(answer), NUMBERS[number])


def _words(limit: str, answer: str) -> float:
    return min(1.0, int(limit) / max(len(words_of(answer)), 1))


def _without(word: str, answer: str) -> float:
    return 1 / (1 + words_of(answer).count(word))


def _question(_: str, answer: str) -> float:
    return 1.0 if answer.rstrip("\"'”) \n").endswith("?") else 0.5 if "?" in answer else 0.0


def _place(place: int) -> Check:
    """1 where the word stands first (0) or last (-1), a half where it stands elsewhere."""
    return lambda word, a: 1.0 if words_of(a)[place : place + 1 or None] == [word] else 0.5 * (word in words_of(a))


_LIST = "Answer with a numbered list of {} points, each on its own line."
_HYPHENS = "Answer with a list of {} points, each on its own line after a hyphen."
_SEEN = (
    ("sentences", "shape", "Write exactly {} sentences.", ("two", "three", "four"), _sentences),
    ("numbered", "shape", _LIST, ("two", "three", "four"), _points(r"\d+[.)]")),
    ("words_at_most", "length", "Use at most {} words.", ("15", "20", "25", "30"), _words),
    ("no_commas", "commas", "Do not use any commas.", (), _no_other(",")),
    ("lower_case", "case", "Write in lower case letters only.", (), _no_other("[A-Z]")),
    ("ends_with_question", "end", "End your answer with a question.", (), _question),
    ("contains_word", "word", "Use the word {}.", WORDS, lambda word, a: float(word in words_of(a))),
    ("begins_with_word", "begin", "Begin your answer with the word {}.", FIRST, _place(0)),
)
_HELD_OUT = (
    ("one_sentence", "shape", "Answer in a single sentence.", (), lambda _, a: _near(sentences_of(a), 1)),
    ("hyphens", "shape", _HYPHENS, ("two", "three"), _points("[-–]")),
    ("words_fewer", "length", "Stay below {} words.", ("12", "18"), lambda limit, a: _words(str(int(limit) - 1), a)),
    ("capitals", "case", "WRITE IN CAPITAL LETTERS ONLY.", (), _no_other("[a-z]")),
    ("avoids_word", "commas", "Do not use the word {}.", ("the", "is", "and"), _without),
    ("ends_with_word", "end", "End your answer with the word {}.", LAST, _place(-1)),
)
CONSTRAINTS = (
    *(Constraint(*parts) for parts in _SEEN),
    *(Constraint(*parts, held_out=True) for parts in _HELD_OUT),
)


def constraints_in(prompt: str) -> list[tuple[Constraint, str]]:
    """The constraints that a prompt holds, each with its parameter ("" for one that has none)."""
    found = [(c, re.search(c.pattern, prompt)) for c in CONSTRAINTS]
    return [(c, match[1] if match.groups() else "") for c, match in found if match]


def closeness(prompt: str, answer: str) -> dict[Constraint, float]:
    """How nearly an answer follows each of its prompt's constraints, 1 exactly when it does.

    An answer of fewer than three words, or one that repeats itself, follows none: most forms are easily kept by
    saying nothing.
    """
    empty = len(words_of(answer)) < 3 or repeats(answer)
    return {c: 0.0 if empty else c.check(parameter, answer) for c, parameter in constraints_in(prompt)}


def preference(prompt: str, first: str, second: str) -> float:
    """The ranker, as a logit: 3 for each constraint more that `first` follows.

    Among answers that follow as many, the one is better that comes nearer to what it misses; then the one that names
    the topic. A prompt without constraints is a tie, but for the topic.
    """
    return _score(prompt, first) - _score(prompt, second)


def _score(prompt: str, answer: str) -> float:
    near = list(closeness(prompt, answer).values())
    topic = _topic_of(prompt)
    named = bool(topic) and topic in answer.lower()
    return 3 * sum(c == 1 for c in near) + 1.5 * sum(c for c in near if c < 1) + 0.5 * named


def _topic_of(prompt: str) -> str:
    """The topic's word, without the ending of a plural; empty for a prompt about none of ours."""
    for question in QUESTIONS:
        match = re.match(re.escape(question).replace(re.escape("{}"), r"([a-z ]+)"), prompt)
        if match:
            return match[1].removeprefix("the ").removesuffix("s")
    return ""


def measures(prompt: str, answer: str) -> dict[str, list[float]]:
    """For the report (--measure): a 1 or 0 for each constraint, strict; `seen` are those that training has too."""
    near = closeness(prompt, answer)
    followed = {c: float(value == 1) for c, value in near.items()}
    return {
        "followed": list(followed.values()),
        "followed_seen": [value for c, value in followed.items() if not c.held_out],
        "followed_unseen": [value for c, value in followed.items() if c.held_out],
    }


def make_prompts(topics: list[str], count: int, held_out: bool, rng: random.Random) -> list[str]:
    """`count` prompts, no two alike, each with one to three constraints.

    held_out: every second prompt has exactly one constraint of those that training never sees.
    """
    made: dict[str, None] = {}
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
    """Write train.jsonl and heldout.jsonl, which share no topic, into `directory`."""
    rng = random.Random(seed)
    sets = {
        "heldout": make_prompts(HELD_OUT_TOPICS, held_out, True, random.Random(0)),  # the same for every seed
        "train": make_prompts(TRAIN_TOPICS, train, False, rng),
    }
    for name, prompts in sets.items():
        lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
