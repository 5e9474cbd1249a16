"""What a run has written, as plain records. A run may be going on or have broken off: what is missing is None.

A file that is damaged, or that goes while it is read, is left out and named in Run.unread: a run that could mend the
file must not end because its page cannot be drawn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sppo.command.errors import SPPOError
from sppo.evaluation.match import iterations_of
from sppo.method.preference import Array
from sppo.recipe import read_yaml
from sppo.store.directories import work_of
from sppo.store.files import read_json
from sppo.store.parquet import read_rows

_RATES = {"p": "chosen_probs", "p_win": "chosen_probs_win", "p_lose": "chosen_probs_lose"}


@dataclass
class Iteration:
    """One iteration's work. rates: p, p_win and p_lose of the pairs, (N,). lengths: tokens, by whose they are, (n,)."""

    number: int
    drawn: dict[str, Any] | None = None  # counts of the responses
    paired: dict[str, Any] | None = None  # counts and statistics of the training set
    rates: dict[str, Array] = field(default_factory=dict)
    lengths: dict[str, Array] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)  # the training's metrics, a record a step
    trained: dict[str, Any] | None = None  # the model's manifest
    compared: dict[str, Any] | None = None  # the row of summary.json
    seconds: dict[str, float] = field(default_factory=dict)  # by stage; of shards beside each other the longest


@dataclass
class Prompt:
    """A held-out prompt, as text, and the answers of each iteration, by its number."""

    text: str
    answers: dict[int, list[str]]


@dataclass
class Run:
    """All of a run that the page shows."""

    name: str
    settings: dict[str, Any]
    iterations: list[Iteration]
    base: dict[str, float]  # measures of the first model's answers
    matrix: dict[str, Any] | None
    prompts: list[Prompt]
    versions: dict[str, str]
    commands: list[str]
    suites: dict[int, list[dict[str, Any]]]  # by iteration: a suite's figures.json each
    unread: list[str]  # what could not be read, and why


def gather(run_dir: Path) -> Run:
    """Read a run's directory. Raises SPPOError where it is none."""
    numbers = [i for i in iterations_of(run_dir) if i]
    if not numbers:
        raise SPPOError(f"{run_dir} is no run: it has no iter1; a run's directory is what --run_dir names")
    reader = _Reader()
    rows = {row["iteration"]: row for row in reader.json(run_dir / "summary.json") or [] if "prompts" in row}
    iterations = [_iteration(run_dir / f"iter{i}", i, rows.get(i), reader) for i in numbers]
    recipe = run_dir / f"iter{numbers[0]}" / "recipe.yaml"
    written = [reader.json(p) or {} for p in sorted(run_dir.rglob("*manifest.json"))]
    commands = reader.text(run_dir / "logs" / "commands.log")
    answered = ((i, run_dir / f"iter{i}") for i in [0, *numbers])
    suites = {i: [reader.json(p) for p in sorted(here.glob("suites/*/figures.json"))] for i, here in answered}
    return Run(
        run_dir.resolve().name,
        reader.read(recipe, lambda: read_yaml(recipe.read_text(encoding="utf-8"))) or {},
        iterations,
        (reader.json(run_dir / "iter0" / "eval" / "measures.json") or {}),
        reader.json(run_dir / "matrix.json"),
        _prompts(run_dir, [0, *numbers], reader),
        next((m["versions"] for m in written if "versions" in m), {}),
        (commands or "").splitlines(),
        {i: [found for found in of if found] for i, of in suites.items()},
        sorted(set(reader.unread)),
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


def _iteration(here: Path, number: int, row: dict[str, Any] | None, reader: _Reader) -> Iteration:
    data, model = here / "data", here / "model"
    found = Iteration(number, compared=row)
    found.drawn = (reader.json(data / "responses.manifest.json") or {}).get("counts")
    found.paired = (reader.json(data / "train.manifest.json") or {}).get("counts")
    found.trained = reader.json(model / "sppo_manifest.json")
    pairs = data / "train.parquet"
    if found.paired and (known := reader.read(pairs, lambda: _pairs(pairs))):
        found.rates, found.lengths = known
    metrics = model / "metrics.jsonl"
    if not metrics.exists():
        metrics = work_of(Path(os.path.realpath(model))) / "metrics.jsonl"  # a training that is going on
    lines = (reader.text(metrics) or "").splitlines()
    steps = {line["step"]: line for line in map(_line, lines) if "step" in line}  # a repeated step: the last
    found.steps = [steps[i] for i in sorted(steps)]
    for stage, pattern in (("generate", "data/responses/*.manifest.json"), ("rank", "data/ranking/*.manifest.json"),
                           ("pair", "data/train.manifest.json"), ("train", "model/sppo_manifest.json"),
                           ("held-out answers", "eval/responses/*.manifest.json")):  # fmt: skip
        took = [m["seconds"] for p in here.glob(pattern) if "seconds" in (m := reader.json(p) or {})]
        if took:
            found.seconds[stage] = max(took)
    return found


def _line(text: str) -> dict[str, Any]:
    """A line of metrics.jsonl; nothing for the last one while it is being written."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {}


def _pairs(train: Path) -> tuple[dict[str, Array], dict[str, Array]]:
    """(p, p_win, p_lose of each pair, tokens of all, chosen and rejected responses)."""
    columns = [*_RATES.values(), "responses", "chosen_index", "rejected_index"]
    rates: dict[str, list[float]] = {name: [] for name in _RATES}
    lengths: dict[str, list[int]] = {"all": [], "chosen": [], "rejected": []}
    for row in read_rows(train, columns):
        for name, column in _RATES.items():
            rates[name].append(row[column])
        tokens = [len(r["token_ids"] or []) for r in row["responses"] or []]
        if any(tokens):  # files of other tools may hold texts alone
            lengths["all"] += tokens
            lengths["chosen"].append(tokens[row["chosen_index"]])
            lengths["rejected"].append(tokens[row["rejected_index"]])
    return {k: np.array(v, dtype=float) for k, v in rates.items()}, {
        k: np.array(v, dtype=float) for k, v in lengths.items()
    }


def _prompts(run_dir: Path, numbers: list[int], reader: _Reader) -> list[Prompt]:
    """The held-out prompts with each iteration's answers, in the first model's order."""
    found: dict[str, Prompt] = {}
    for number in numbers:
        path = run_dir / f"iter{number}" / "eval" / "responses.parquet"
        for row in (
            reader.read(path, lambda path=path: list(read_rows(path, ["prompt_id", "prompt", "responses"]))) or []
        ):
            text = "\n\n".join(f"{m['role']}: {m['content']}" for m in row["prompt"])
            if len(row["prompt"]) == 1:
                text = row["prompt"][0]["content"]
            prompt = found.setdefault(row["prompt_id"], Prompt(text, {}))
            prompt.answers[number] = [r["text"] for r in row["responses"]]
    return list(found.values())
