"""Two models' answers to the same held-out prompts, compared pair by pair. The report and the win matrix read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sppo.command.errors import SPPOError, UsageError
from sppo.command.progress import progress
from sppo.method.preference import Array, sigmoid
from sppo.rankers import Ranker, backend, log_odds, pending_chunks
from sppo.recipe import Recipe
from sppo.store.files import digest
from sppo.store.journal import Journal
from sppo.store.manifest import Stage
from sppo.store.parquet import read_rows, write_parquet

Row = tuple[str, Any, list[Any], list[Any]]  # prompt_id, prompt, first's responses, second's
_CHUNK = 64  # prompts whose comparisons a ranker gets at once


@dataclass
class Match:
    """P(`second` beats `first`), (N, n, m): N prompts, n responses of second, m of first; NaN where nobody answered.

    `lengths`: tokens of second's responses, (N, n), and of first's, (N, m).
    """

    probability: Array
    lengths: tuple[Array, Array]


def judges(recipe: Recipe) -> dict[str, Recipe]:
    """Who compares, by name: the ranker, and the second judge as a recipe whose ranker it is.

    Raises UsageError for a judge that is called as the ranker is: one's figures would take the other's place.
    """
    found = {"ranker": recipe}
    if recipe.judge:
        name = recipe.judge.partition(":")[2]
        if name in found:
            raise UsageError(f"--judge {recipe.judge}: the name {name} is the ranker's; give the function another name")
        found[name] = dataclasses.replace(recipe, ranker=recipe.judge, ranker_backend="function")
    return found


def iterations_of(run_dir: Path) -> list[int]:
    """The numbers of a run's iter<i> directories, in order; 0, the first model's, is there where its answers are."""
    return sorted(int(p.name[4:]) for p in run_dir.glob("iter*") if p.name[4:].isdecimal())


def iteration_models(run_dir: Path) -> dict[int, Path]:
    """The trained model of each iteration of a run that has one, in order. Raises SPPOError where none has."""
    found = {i: model for i in iterations_of(run_dir) if (model := run_dir / f"iter{i}" / "model").is_dir()}
    if not found:
        raise SPPOError(f"--run_dir {run_dir}: no iter<i>/model in it")
    return found


def answers_of(run_dir: Path, iteration: int) -> Path:
    """The held-out prompts' answers of an iteration's model; iteration 0 is the first model."""
    return run_dir / f"iter{iteration}" / "eval" / "responses.parquet"


def match_stage(by: Recipe, name: str, run_dir: Path, first: int, second: int) -> Stage:
    """The comparison of iteration second's answers with iteration first's by the ranker of `by`, called `name`."""
    paths = answers_of(run_dir, first), answers_of(run_dir, second)
    here = paths[1].parent / f"against-iter{first}-{name}"
    inputs = {"first": digest(paths[0]), "second": digest(paths[1]), "ranker": backend(by).identity(by)}
    output = here.with_suffix(".parquet")
    return Stage("match", here.with_suffix(".manifest.json"), [output], inputs, {}, here.with_suffix(".journal"))


def match(by: Recipe, name: str, run_dir: Path, first: int, second: int, overwrite: bool = False) -> Match:
    """Compare every response of one with every response of the other, both ways round; keep it, and return it.

    What a killed try had compared is in the journal. Raises SPPOError where the two answer different prompts.
    """
    stage = match_stage(by, name, run_dir, first, second)
    rows = _joined(answers_of(run_dir, first), answers_of(run_dir, second))
    if overwrite:
        stage.discard()
    if stage.is_current():
        stage.remove_leftovers()
    else:
        stage.refuse_foreign()
        stage.begin()
        journal = Journal(stage.journal, stage.identity)
        label = f"{name}: iteration {second} against {first}"
        with progress(len(rows), label, "prompt", len(journal.done)) as bar:
            is_done, load = lambda row: row[0] in journal.done, lambda: backend(by).load(by)
            for ranker, asked in pending_chunks(rows, is_done, _CHUNK, load):
                for row, block in zip(asked, _blocks(ranker, asked), strict=True):
                    if not is_done(row):
                        journal.add(row[0], {"probability": block.tolist()})
                        bar.update()
        made = ({"prompt_id": row[0], **journal.read(row[0])} for row in rows)
        stage.finish({"prompts": write_parquet(stage.outputs[0], _schema(), made)}, ranker=by.ranker)
        journal.remove()
    table = {row["prompt_id"]: row["probability"] for row in read_rows(stage.outputs[0], ["prompt_id", "probability"])}
    probability = np.array([table[row[0]] for row in rows], dtype=np.float64)
    return Match(probability, (_lengths([row[3] for row in rows]), _lengths([row[2] for row in rows])))


def _lengths(responses: list[list[Any]]) -> Array:
    """Tokens of each response, (N, n)."""
    return np.array([[len(r["token_ids"]) for r in row] for row in responses], dtype=np.float64)


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([("prompt_id", pa.string()), ("probability", pa.list_(pa.list_(pa.float64())))])


def _joined(first: Path, second: Path) -> list[Row]:
    """The row of every prompt, in first's order."""
    columns = ["prompt_id", "prompt", "responses"]
    old = {row["prompt_id"]: row for row in read_rows(first, columns)}
    new = {row["prompt_id"]: row for row in read_rows(second, columns)}
    if set(old) != set(new):
        raise SPPOError(f"{first} and {second} answer different prompts; delete the eval directories and report again")
    return [(key, row["prompt"], row["responses"], new[key]["responses"]) for key, row in old.items()]


def _blocks(ranker: Ranker, rows: list[Row]) -> Iterator[Array]:
    """P(second's i beats first's j), (n, m), of each row, from both orders of each pair."""
    pairs = [(prompt, a["text"], b["text"]) for _, prompt, old, new in rows for a in new for b in old]
    found, start = sigmoid(log_odds(ranker, pairs)), 0
    for _, _, old, new in rows:
        stop = start + len(new) * len(old)
        yield found[start:stop].reshape(len(new), len(old))
        start = stop
