"""Stage 2: the preference model's logit for every ordered pair of a prompt's K responses."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sppo import rankers
from sppo.command.errors import SPPOError
from sppo.command.progress import progress
from sppo.method.preference import mean_scores
from sppo.models.files import public_name
from sppo.rankers import Ranker
from sppo.rankers.pinning import pinned
from sppo.recipe import Recipe
from sppo.schema import Message, Pair, as_messages, ranking_schema
from sppo.store.files import digest
from sppo.store.journal import Journal
from sppo.store.manifest import Stage, read_manifest
from sppo.store.parquet import open_parquet, read_rows, write_parquet
from sppo.store.responses import require_responses, responses_columns
from sppo.store.shards import Slice, as_begun, lay_out, shard_paths

Logits = list[list[float]]
_CHUNK = 64  # prompts whose pairs are packed into batches together


def prompt_logits(ranker: Ranker, items: list[tuple[list[Message], list[str]]]) -> Iterator[tuple[int, Logits]]:
    """(index in `items`, (K, K) logits with diagonal 0) of each (prompt, K responses), as soon as it is complete.

    K may differ between items. Identical responses are asked once, and batches mix the pairs of all items.
    """
    pairs: list[Pair] = []
    owners: list[int] = []
    asked: list[dict[tuple[str, str], float]] = []
    for owner, (prompt, responses) in enumerate(items):
        unique = dict.fromkeys(itertools.permutations(responses, 2))
        pairs += [(prompt, first, second) for first, second in unique]
        owners += [owner] * len(unique)
        asked.append({})
    left = Counter(owners)
    for index, logit in ranker.logits(pairs):
        owner = owners[index]
        asked[owner][pairs[index][1:]] = logit
        left[owner] -= 1
        if not left[owner]:
            responses = items[owner][1]
            yield (
                owner,
                [
                    [0.0 if i == j else asked[owner][a, b] for j, b in enumerate(responses)]
                    for i, a in enumerate(responses)
                ],
            )


def rank_stage(recipe: Recipe, output_dir: Path, part: Slice) -> Stage:
    """The stage that makes a shard of the ranking.

    Raises SPPOError where there are no responses, or the recipe has no model and the one that drew them has changed.
    """
    responses = require_responses(output_dir)
    named = _with_model(pinned(recipe, output_dir), output_dir)
    asked = rankers.backend(named).identity(named)
    if not recipe.model and "model" in asked:
        drew = read_manifest(output_dir / "responses.manifest.json", "generated")["generated"]["model"]
        if asked["model"] != drew:
            raise SPPOError(f"{named.model} is not the model any more that drew {responses}; pass --model")
    path, manifest, journal = shard_paths(output_dir / "ranking", part.data_frac)
    rows = list(part.bounds(open_parquet(responses, []).metadata.num_rows))
    inputs = {"responses": digest(responses), "ranker": asked}
    return Stage("rank", manifest, [path], inputs, {"rows": rows, "pairs": recipe.pairs}, journal)


def _with_model(recipe: Recipe, output_dir: Path) -> Recipe:
    """The recipe with the model that drew the responses, where it has none: a PairRM may need its chat template."""
    manifest = output_dir / "responses.manifest.json"
    if recipe.model or not manifest.exists():
        return recipe
    generated = read_manifest(manifest, "generated")["generated"]
    return dataclasses.replace(recipe, model=generated.get("model_name", ""))


def rank_shards(recipe: Recipe, output_dir: Path, parts: list[Slice], overwrite: bool) -> None:
    """Write $DATA/ranking/shard-<data_frac>.parquet for each slice of $DATA/responses.parquet, with one ranker.

    Prompts that a killed try had finished are in the journal and are not asked again (see rankers.pending_chunks).
    """
    responses = require_responses(output_dir)
    responses_columns(responses)
    directory, total = output_dir / "ranking", open_parquet(responses, []).metadata.num_rows
    parts = parts if overwrite else as_begun(parts, directory)
    named = _with_model(pinned(recipe, output_dir), output_dir)
    load = functools.cache(lambda: rankers.backend(named).load(named))
    note_count = functools.cache(lambda: lay_out(directory, parts[0].count(total), overwrite))
    for part in parts:
        stage = rank_stage(recipe, output_dir, part)
        if stage.is_done(overwrite):
            print(f"rank: shard {part.data_frac} is done: {stage.outputs[0]}")
        else:
            note_count()
            _rank_shard(named, stage, part.data_frac, load)


def _rank_shard(recipe: Recipe, stage: Stage, shard: int, load: Callable[[], Ranker]) -> None:
    path = stage.outputs[0]
    responses = path.parent.parent / "responses.parquet"
    (start, stop), total = stage.settings["rows"], open_parquet(responses, []).metadata.num_rows
    stage.begin()
    journal = Journal(stage.journal, stage.identity)
    rows = _slice(responses, start, stop, recipe.pairs)
    print(f"rank: rows {start} to {stop} of {total}: {len(journal.done)} in the journal", flush=True)
    with progress(stop - start, f"shard {shard}", "prompt", len(journal.done)) as bar:
        is_done = lambda row: row["prompt_id"] in journal.done  # noqa: E731 - short
        for ranker, asked in rankers.pending_chunks(rows, is_done, _CHUNK, load):
            items = [(row["prompt"], [(r or {}).get("text") or "" for r in row["responses"]]) for row in asked]
            for index, logits in prompt_logits(ranker, items):
                name = asked[index]["prompt_id"]
                if name not in journal.done:
                    journal.add(name, {"logits": logits, "cut": ranker.count_cut(*items[index])})
                    bar.update()
    _write_shard(stage, journal, path, responses, (start, stop), recipe)


def _slice(responses: Path, start: int, stop: int, pairs: int) -> Iterator[dict[str, Any]]:
    """The rows to rank. Raises SPPOError for one without an id, with a repeated id, or without K responses."""
    seen: set[str] = set()
    for row in read_rows(responses, ["prompt_id", "prompt", "responses"], start, stop):
        if row["prompt_id"] is None:
            raise SPPOError(f"{responses}: a row without a prompt_id; nothing can be joined to it")
        name, answers = str(row["prompt_id"]), row["responses"] or []  # another tool's may be a number
        row["prompt_id"] = name
        if name in seen:
            raise SPPOError(f"{responses}: prompt_id {name} is there twice; each row needs its own")
        seen.add(name)
        if len(answers) != pairs:
            raise SPPOError(f"{responses}: prompt {name} has {len(answers)} responses, not --pairs {pairs}")
        try:
            row["prompt"] = as_messages(row["prompt"])
        except ValueError as error:
            raise SPPOError(
                f"{responses}: prompt {name} is no list of messages with a role and a text: {error}"
            ) from None
        yield row


def _write_shard(
    stage: Stage, journal: Journal, path: Path, responses: Path, bounds: tuple[int, int], recipe: Recipe
) -> None:
    skipped: list[dict[str, str]] = []
    cut: Counter[str] = Counter()

    def rows() -> Iterator[dict[str, Any]]:
        for row in read_rows(responses, ["prompt_id"], *bounds):
            name = str(row["prompt_id"])
            answer = journal.read(name)
            logits, cut["texts"] = answer["logits"], cut["texts"] + answer["cut"]
            if not all(math.isfinite(x) for line in logits for x in line):
                skipped.append({"prompt_id": name, "reason": "the ranker's logits are not finite"})
                continue
            scores = mean_scores(np.array(logits)).tolist()
            yield {"prompt_id": name, "logits": logits, "scores": scores}

    written = write_parquet(path, ranking_schema(), rows())
    counts = {
        "prompts": bounds[1] - bounds[0],
        "written": written,
        "pairs": written * recipe.pairs * (recipe.pairs - 1),
        "texts_cut_for_the_ranker": cut["texts"],
        "skipped": dict(Counter(s["reason"] for s in skipped)),
    }
    stage.finish(counts, ranker=recipe.ranker, ranker_name=public_name(recipe.ranker), skipped=skipped)
    journal.remove()
    print(f"rank: {path}: {json.dumps(counts)}")
