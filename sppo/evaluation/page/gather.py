"""What a run has written, as plain records. A run may be going on or have broken off: what is missing is None."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sppo.common.errors import SPPOError
from sppo.common.files import read_json
from sppo.common.parquet import read_rows
from sppo.common.preference import Array
from sppo.config import read_yaml

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

    path: Path
    name: str
    settings: dict[str, Any]
    iterations: list[Iteration]
    base: dict[str, float]  # measures of the first model's answers
    matrix: dict[str, Any] | None
    prompts: list[Prompt]
    versions: dict[str, str]
    commands: list[str]
    suites: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # by iteration: a suite's figures.json each


def gather(run_dir: Path) -> Run:
    """Read a run's directory. Raises SPPOError where it is none."""
    numbers = sorted(int(p.name[4:]) for p in run_dir.glob("iter*") if p.name[4:].isdecimal() and p.name != "iter0")
    if not numbers:
        raise SPPOError(f"{run_dir} is no run: it has no iter1; a run's directory is what --run_dir names")
    rows = {row["iteration"]: row for row in _json(run_dir / "summary.json") or []}
    iterations = [_iteration(run_dir / f"iter{i}", i, rows.get(i)) for i in numbers]
    recipe = run_dir / f"iter{numbers[0]}" / "recipe.yaml"
    written = [_json(p) or {} for p in sorted(run_dir.rglob("*manifest.json"))]
    commands = run_dir / "logs" / "commands.log"
    return Run(
        run_dir,
        run_dir.resolve().name,
        read_yaml(recipe.read_text(encoding="utf-8")) if recipe.exists() else {},
        iterations,
        (_json(run_dir / "iter0" / "eval" / "measures.json") or {}),
        _json(run_dir / "matrix.json"),
        _prompts(run_dir, [0, *numbers]),
        next((m["versions"] for m in written if "versions" in m), {}),
        commands.read_text(encoding="utf-8").splitlines() if commands.exists() else [],
        {i: [read_json(p) for p in sorted(run_dir.glob(f"iter{i}/suites/*/figures.json"))] for i in [0, *numbers]},
    )


def _json(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def _iteration(here: Path, number: int, row: dict[str, Any] | None) -> Iteration:
    data, model = here / "data", here / "model"
    found = Iteration(number, compared=row)
    found.drawn = (_json(data / "responses.manifest.json") or {}).get("counts")
    found.paired = (_json(data / "train.manifest.json") or {}).get("counts")
    found.trained = _json(model / "sppo_manifest.json")
    if found.paired:
        found.rates, found.lengths = _pairs(data / "train.parquet")
    metrics = model / "metrics.jsonl"
    if not metrics.exists():
        metrics = here / "model.partial" / "metrics.jsonl"  # a training that is going on
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines()
        steps = {line["step"]: line for line in map(_line, lines) if "step" in line}  # a repeated step: the last
        found.steps = [steps[i] for i in sorted(steps)]
    for stage, pattern in (("generate", "data/responses/*.manifest.json"), ("rank", "data/ranking/*.manifest.json"),
                           ("pair", "data/train.manifest.json"), ("train", "model/sppo_manifest.json"),
                           ("held-out answers", "eval/responses/*.manifest.json")):  # fmt: skip
        took = [m["seconds"] for p in here.glob(pattern) if "seconds" in (m := _json(p) or {})]
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


def _prompts(run_dir: Path, numbers: list[int]) -> list[Prompt]:
    """The held-out prompts with each iteration's answers, in the first model's order."""
    found: dict[str, Prompt] = {}
    for number in numbers:
        path = run_dir / f"iter{number}" / "eval" / "responses.parquet"
        if not path.exists():
            continue
        for row in read_rows(path, ["prompt_id", "prompt", "responses"]):
            text = "\n\n".join(f"{m['role']}: {m['content']}" for m in row["prompt"])
            if len(row["prompt"]) == 1:
                text = row["prompt"][0]["content"]
            prompt = found.setdefault(row["prompt_id"], Prompt(text, {}))
            prompt.answers[number] = [r["text"] for r in row["responses"]]
    return list(found.values())
