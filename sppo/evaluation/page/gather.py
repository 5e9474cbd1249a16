"""What a run has written, as plain records.

The run may be going on, or may have stopped: what is missing is empty or None.

A file that is damaged, or that disappears while it is read, is left out and named in RunRecord.unread. A run that could
make the file again must not end because its page cannot be drawn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sppo.command.errors import SPPOError
from sppo.evaluation.match import iterations_of
from sppo.method.preference import Array
from sppo.recipe import read_yaml
from sppo.schema import Message, answer_tokens, has_answer
from sppo.store.directories import work_of
from sppo.store.files import read_json
from sppo.store.parquet import read_rows
from sppo.store.responses import EXTRA

_RATES = {"p": "chosen_probs", "p_win": "chosen_probs_win", "p_lose": "chosen_probs_lose"}


@dataclass
class IterationRecord:
    """One iteration's work."""

    number: int
    drawn: dict[str, Any] = field(default_factory=dict)  # counts of the responses
    paired: dict[str, Any] = field(default_factory=dict)  # counts and statistics of the training set
    rates: dict[str, Array] = field(default_factory=dict)  # p, p_win and p_lose of the pairs, each (N,)
    lengths: dict[str, Array] = field(default_factory=dict)  # tokens of the responses of each kind, (n,): see _pairs
    steps: list[dict[str, Any]] = field(default_factory=list)  # the training's metrics, a record a step
    trained: dict[str, Any] = field(default_factory=dict)  # the model's manifest
    compared: dict[str, Any] = field(default_factory=dict)  # the row of summary.json
    seconds: dict[str, float] = field(default_factory=dict)  # by stage; of shards that ran side by side, the longest


@dataclass
class Answer:
    """An answer, and the thought before it if there was any. `text` is empty where the thought did not end."""

    text: str
    thought: str = ""
    is_unfinished: bool = False


@dataclass
class AnsweredPrompt:
    """A held-out prompt, as text, and the answers of each iteration, by its number."""

    text: str
    answers: dict[int, list[Answer]]


@dataclass
class RunRecord:
    """All of a run that the page shows."""

    name: str
    settings: dict[str, Any]
    iterations: list[IterationRecord]
    base: dict[str, float]  # measures of the first model's answers
    matrix: dict[str, Any] | None  # matrix.json
    prompts: list[AnsweredPrompt]
    versions: dict[str, str]  # of the packages
    commands: list[str]
    suites: dict[int, list[dict[str, Any]]]  # by iteration: a suite's figures.json each
    unread: list[str]  # what could not be read, and why
    guard: dict[str, Any] | None = None  # guard.json: each iteration against the one before; with a second judge

    @property
    def compared(self) -> list[dict[str, Any]]:
        """The rows of summary.json with win rates."""
        return [iteration.compared for iteration in self.iterations if iteration.compared]


def gather(run_dir: Path) -> RunRecord:
    """Read a run's directory. Raises SPPOError where it is none."""
    numbers = [i for i in iterations_of(run_dir) if i]
    if not numbers:
        raise SPPOError(f"{run_dir} is no run: it has no iter1; a run's directory is what --run_dir names")
    reader = _Reader()

    recipe = run_dir / f"iter{numbers[0]}" / "recipe.yaml"
    settings = reader.read(recipe, lambda: read_yaml(recipe.read_text(encoding="utf-8"))) or {}
    rows = {row["iteration"]: row for row in reader.json(run_dir / "summary.json") or [] if "prompts" in row}
    iterations = [_iteration(run_dir / f"iter{i}", i, rows.get(i, {}), reader) for i in numbers]
    suites = {i: _suites(run_dir / f"iter{i}", reader) for i in [0, *numbers]}
    manifests = [reader.json(path) or {} for path in sorted(run_dir.rglob("*manifest.json"))]
    commands = reader.text(run_dir / "logs" / "commands.log") or ""

    return RunRecord(
        name=run_dir.resolve().name,
        settings=settings,
        iterations=iterations,
        base=reader.json(run_dir / "iter0" / "eval" / "measures.json") or {},
        matrix=reader.json(run_dir / "matrix.json"),
        prompts=_prompts(run_dir, [0, *numbers], reader),
        versions=next((each["versions"] for each in manifests if "versions" in each), {}),
        commands=commands.splitlines(),
        suites=suites,
        guard=reader.json(run_dir / "guard.json"),
        unread=sorted(set(reader.unread)),  # last, when all is read
    )


class _Reader:
    """Reads files that may be missing (None), and notes those that cannot be read (None too)."""

    def __init__(self) -> None:
        self.unread: list[str] = []

    def read(self, path: Path, how: Callable[[], Any]) -> Any:
        if not path.exists():
            return None
        try:
            return how()
        # pyarrow's errors are OSError and ValueError
        except (SPPOError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            message = str(error).splitlines()[0] if isinstance(error, SPPOError) else f"{path}: {error}"
            self.unread.append(message)
            return None

    def json(self, path: Path) -> Any:
        return self.read(path, lambda: read_json(path))

    def text(self, path: Path) -> str | None:
        return self.read(path, lambda: path.read_text(encoding="utf-8", errors="replace"))


_STAGES = {  # by the name that the page shows: the manifests of the stage
    "generate": "data/responses/*.manifest.json",
    "rank": "data/ranking/*.manifest.json",
    "pair": "data/train.manifest.json",
    "train": "model/sppo_manifest.json",
    "held-out answers": "eval/responses/*.manifest.json",
}


def _iteration(here: Path, number: int, row: dict[str, Any], reader: _Reader) -> IterationRecord:
    data, model = here / "data", here / "model"
    found = IterationRecord(number, compared=row)
    found.drawn = (reader.json(data / "responses.manifest.json") or {}).get("counts") or {}
    found.paired = (reader.json(data / "train.manifest.json") or {}).get("counts") or {}
    found.trained = reader.json(model / "sppo_manifest.json") or {}

    pairs = data / "train.parquet"
    extra = found.drawn.get(EXTRA, 0)
    if found.paired and (known := reader.read(pairs, lambda: _pairs(pairs, extra))):
        found.rates, found.lengths = known

    metrics = model / "metrics.jsonl"
    if not metrics.exists():
        metrics = work_of(Path(os.path.realpath(model))) / "metrics.jsonl"  # a training that is going on
    lines = (reader.text(metrics) or "").splitlines()
    steps = {line["step"]: line for line in map(_line, lines) if "step" in line}  # of a repeated step the last
    found.steps = [steps[i] for i in sorted(steps)]

    for stage, pattern in _STAGES.items():
        manifests = [reader.json(path) or {} for path in here.glob(pattern)]
        took = [manifest["seconds"] for manifest in manifests if "seconds" in manifest]
        if took:
            found.seconds[stage] = max(took)
    return found


def _suites(here: Path, reader: _Reader) -> list[dict[str, Any]]:
    """The figures of an iteration's benchmark suites."""
    figures = [reader.json(path) for path in sorted(here.glob("suites/*/figures.json"))]
    return [each for each in figures if each]


def _line(text: str) -> dict[str, Any]:
    """A line of metrics.jsonl; nothing for the last one while it is being written."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {}


def _pairs(train: Path, extra: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """The rates and the lengths of an IterationRecord. extra: how many of a prompt's responses are other models'."""
    columns = [*_RATES.values(), "responses", "chosen_index", "rejected_index"]
    rates: dict[str, list[float]] = {name: [] for name in _RATES}
    lengths: dict[str, list[int]] = {"drawn": [], "of other models": [], "chosen": [], "rejected": []}
    for row in read_rows(train, columns):
        for name, column in _RATES.items():
            rates[name].append(row[column])
        tokens = [answer_tokens(r) for r in row["responses"] or []]
        if any(tokens):  # files of other tools may hold texts alone
            lengths["drawn"] += tokens[: len(tokens) - extra]
            lengths["of other models"] += tokens[len(tokens) - extra :]
            lengths["chosen"].append(tokens[row["chosen_index"]])
            lengths["rejected"].append(tokens[row["rejected_index"]])
    return _arrays(rates), _arrays(lengths)


def _arrays(lists: Mapping[str, Sequence[float]]) -> dict[str, Array]:
    return {name: np.array(values, dtype=float) for name, values in lists.items()}


def _prompts(run_dir: Path, numbers: list[int], reader: _Reader) -> list[AnsweredPrompt]:
    """The held-out prompts with each iteration's answers, in the first model's order."""
    found: dict[str, AnsweredPrompt] = {}
    for number in numbers:
        path = run_dir / f"iter{number}" / "eval" / "responses.parquet"
        for row in reader.read(path, partial(_answered, path)) or []:
            prompt = found.setdefault(row["prompt_id"], AnsweredPrompt(_shown(row["prompt"]), {}))
            prompt.answers[number] = [
                Answer(response["text"], response.get("thought") or "", not has_answer(response))
                for response in row["responses"]
            ]
    return list(found.values())


def _answered(path: Path) -> list[dict[str, Any]]:
    return list(read_rows(path, ["prompt_id", "prompt", "responses"]))


def _shown(messages: list[Message]) -> str:
    """A prompt as the page shows it: of several turns, each with who speaks."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
