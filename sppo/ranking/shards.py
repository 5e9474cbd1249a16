"""Stage 2: the preference model's logit for every ordered pair of a prompt's K responses."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sppo import rankers
from sppo.command.errors import SPPOError
from sppo.command.progress import progress
from sppo.method.preference import Array, mean_scores
from sppo.models.dates import today
from sppo.models.files import public_name
from sppo.rankers import Ranker
from sppo.rankers.pinning import pinned
from sppo.recipe import Recipe
from sppo.schema import NO_ANSWER, Message, Pair, answered_of, apart, as_messages, ranking_schema
from sppo.store.files import digest
from sppo.store.journal import Journal
from sppo.store.manifest import Stage, read_manifest
from sppo.store.parquet import open_parquet, read_rows, write_parquet
from sppo.store.responses import Count, require_responses, responses_columns, responses_each
from sppo.store.shards import Slice, begun_identities, lay_out, overwriting_since, shard_paths

Logits = list[list[float]]
_CHUNK = 64  # prompts whose pairs are packed into batches together


def prompt_logits(ranker: Ranker, items: list[tuple[list[Message], list[str]]]) -> Iterator[tuple[int, Logits]]:
    """(index in `items`, (K, K) logits with diagonal 0) of each (prompt, K responses), as soon as it is complete.

    K may differ between items. Identical responses are asked once, and batches mix the pairs of all items.
    """
    # the ordered pairs of all items in one list, and for each pair the index of its item
    pairs: list[Pair] = []
    owners: list[int] = []
    for owner, (prompt, responses) in enumerate(items):
        for first, second in dict.fromkeys(itertools.permutations(responses, 2)):
            pairs.append((prompt, first, second))
            owners.append(owner)

    left = Counter(owners)
    answers: list[dict[tuple[str, str], float]] = [{} for _ in items]
    for owner in sorted({*range(len(items))} - {*owners}):  # fewer than two responses: nothing to ask
        yield owner, _logit_matrix(items[owner][1], answers[owner])
    for index, logit in ranker.logits(pairs):
        owner = owners[index]
        answers[owner][pairs[index][1:]] = logit
        left[owner] -= 1
        if not left[owner]:
            yield owner, _logit_matrix(items[owner][1], answers[owner])


def _logit_matrix(responses: list[str], answers: dict[tuple[str, str], float]) -> Logits:
    """(K, K): the answers to (first, second), row first, column second; a response against itself is 0."""
    matrix = []
    for i, first in enumerate(responses):
        matrix.append([0.0 if i == j else answers[first, second] for j, second in enumerate(responses)])
    return matrix


def rank_stage(recipe: Recipe, output_dir: Path, part: Slice) -> Stage:
    """The stage that makes a shard of the ranking.

    Raises SPPOError where there are no responses, or the recipe has no model and the one that drew them has changed.
    """
    responses = require_responses(output_dir)
    named = _with_ranker_and_model(_with_date(recipe, output_dir), output_dir)
    asked = rankers.backend(named).identity(named)
    if not recipe.model and "model" in asked:
        drew = read_manifest(output_dir / "responses.manifest.json", "generated")["generated"]["model"]
        if asked["model"] != drew:
            raise SPPOError(f"{named.model} is not the model any more that drew {responses}; pass --model")
    path, manifest, journal = shard_paths(output_dir / "ranking", part.data_frac)
    rows = list(part.bounds(open_parquet(responses, []).metadata.num_rows))
    inputs = {"responses": digest(responses), "ranker": asked}
    settings = {"rows": rows, "pairs": responses_each(output_dir, recipe.pairs).total}
    return Stage("rank", manifest, [path], inputs, settings, journal)


def _with_ranker_and_model(recipe: Recipe, output_dir: Path) -> Recipe:
    """The recipe with the commit of the ranker that preload.py pinned, if it did.

    And, where it names no model, with the model that drew the responses: a PairRM may need its chat template.
    """
    recipe = pinned(recipe, output_dir)
    manifest = output_dir / "responses.manifest.json"
    if recipe.model or not manifest.exists():
        return recipe
    generated = read_manifest(manifest, "generated")["generated"]
    return dataclasses.replace(recipe, model=generated.get("model_name", ""))


def _with_date(recipe: Recipe, output_dir: Path, overwrite: bool = False) -> Recipe:
    """The recipe with the date for chat templates: its own, or the one that the ranking here began with.

    Where none has begun, and with `overwrite`, the one that the policy read, else today, or the day on which the
    overwriting began. A ranking of an older version names none: then it stays empty, which is today at each start, as
    it was for that version.
    """
    shards = output_dir / "ranking"
    begun = [] if overwrite or recipe.date else begun_identities(shards)
    if begun:
        return dataclasses.replace(recipe, date=begun[0]["inputs"].get("ranker", {}).get("date", ""))
    manifest = output_dir / "responses.manifest.json"
    read = read_manifest(manifest).get("generated", {}) if manifest.exists() and not recipe.date else {}
    since = overwriting_since(shards) if overwrite else ""
    return dataclasses.replace(recipe, date=recipe.date or read.get("date") or since or today())


def rank_shards(recipe: Recipe, output_dir: Path, parts: list[Slice], overwrite: bool) -> None:
    """Write $DATA/ranking/shard-<data_frac>.parquet for each slice of $DATA/responses.parquet, with one ranker.

    Prompts that a killed try had finished are in the journal and are not asked again (see rankers.pending_chunks).
    """
    responses = require_responses(output_dir)
    responses_columns(responses)
    total = open_parquet(responses, []).metadata.num_rows
    recipe = _with_date(recipe, output_dir, overwrite)
    named = _with_ranker_and_model(recipe, output_dir)

    @functools.cache
    def load() -> Ranker:
        return rankers.backend(named).load(named)

    for part in parts:
        stage = rank_stage(recipe, output_dir, part)
        if stage.make_ready(overwrite):
            lay_out(output_dir / "ranking", part.count(total), overwrite)
            _rank_shard(named, stage, part.data_frac, load)


def _rank_shard(recipe: Recipe, stage: Stage, shard: int, load: Callable[[], Ranker]) -> None:
    path = stage.outputs[0]
    responses = path.parent.parent / "responses.parquet"
    (start, stop), total = stage.settings["rows"], open_parquet(responses, []).metadata.num_rows
    stage.begin()
    journal = stage.open_journal()
    print(f"rank: rows {start} to {stop} of {total}: {len(journal.done)} in the journal", flush=True)

    # every prompt's logits into the journal
    rows = _checked_rows(responses, start, stop, responses_each(responses.parent, recipe.pairs))
    with progress(stop - start, f"shard {shard}", "prompt", len(journal.done)) as bar:
        for _ in _ask_ranker(rows, journal, load):
            bar.update()

    # from the journal into the shard
    outcome, k = _Outcome(), stage.settings["pairs"]
    prompt_ids = (str(row["prompt_id"]) for row in read_rows(responses, ["prompt_id"], start, stop))
    written = write_parquet(path, ranking_schema(), _shard_rows(prompt_ids, journal, outcome))
    counts = {
        "prompts": stop - start,
        "written": written,
        "pairs": written * k * (k - 1),
        "texts_cut_for_the_ranker": outcome.texts_cut,
        "skipped": dict(Counter(prompt["reason"] for prompt in outcome.skipped)),
    }
    if outcome.unfinished:
        counts["unfinished_thoughts"] = outcome.unfinished
    stage.finish(counts, ranker=recipe.ranker, ranker_name=public_name(recipe.ranker), skipped=outcome.skipped)
    journal.remove()
    print(f"rank: {path}: {json.dumps(counts)}")


def _ask_ranker(rows: Iterator[dict[str, Any]], journal: Journal, load: Callable[[], Ranker]) -> Iterator[str]:
    """Put the logits of every prompt that is not in the journal there; yields the prompt's id each time."""

    def is_done(row: dict[str, Any]) -> bool:
        return row["prompt_id"] in journal.done

    for ranker, chunk in rankers.pending_chunks(rows, is_done, _CHUNK, load):
        answered = [answered_of(row["responses"]) for row in chunk]
        items = [
            (row["prompt"], [(row["responses"][i] or {}).get("text") or "" for i in places])
            for row, places in zip(chunk, answered, strict=True)
        ]
        for index, logits in prompt_logits(ranker, items):
            if not is_done(chunk[index]):
                prompt_id, places = chunk[index]["prompt_id"], answered[index]
                kept: dict[str, Any] = {"logits": logits, "cut": ranker.count_cut(*items[index]) if places else 0}
                if len(places) < (k := len(chunk[index]["responses"])):
                    kept |= {"logits": _with_unanswered(logits, places, k), "answered": places}
                journal.add(prompt_id, kept)
                yield prompt_id


def _with_unanswered(logits: Logits, places: list[int], k: int) -> Logits:
    """(A, A) logits of the responses at `places`, those with an answer, as (K, K): 0 where one of two has none."""
    whole = [[0.0] * k for _ in range(k)]
    for i, line in zip(places, logits, strict=True):
        for j, logit in zip(places, line, strict=True):
            whole[i][j] = logit
    return whole


def _checked_rows(responses: Path, start: int, stop: int, each: Count) -> Iterator[dict[str, Any]]:
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
        if len(answers) != each.total:
            raise SPPOError(f"{responses}: prompt {name} has {len(answers)} responses, not {each}")
        try:
            row["prompt"] = apart(as_messages(row["prompt"])).messages  # thoughts of earlier turns are the policy's
        except ValueError as error:
            raise SPPOError(
                f"{responses}: prompt {name} is no list of messages with a role and a text: {error}"
            ) from None
        yield row


@dataclass
class _Outcome:
    """What a shard's manifest says besides the number of rows. `skipped`: prompt_id and reason of each."""

    texts_cut: int = 0
    unfinished: int = 0  # responses without an answer, about which the ranker was not asked
    skipped: list[dict[str, str]] = field(default_factory=list)


def _shard_rows(prompt_ids: Iterator[str], journal: Journal, outcome: _Outcome) -> Iterator[dict[str, Any]]:
    """The rows of the shard, from the journal; what else the journal tells is added to `outcome`."""
    for prompt_id in prompt_ids:
        answer = journal.read(prompt_id)
        outcome.texts_cut += answer["cut"]
        logits = np.array(answer["logits"])  # (K, K)
        places = answer.get("answered", range(len(logits)))
        outcome.unfinished += len(logits) - len(places)
        if not places:
            outcome.skipped.append({"prompt_id": prompt_id, "reason": NO_ANSWER})
        elif np.isfinite(logits).all():
            yield {"prompt_id": prompt_id, "logits": answer["logits"], "scores": _scores(logits, list(places))}
        else:
            outcome.skipped.append({"prompt_id": prompt_id, "reason": "the ranker's logits are not finite"})


def _scores(logits: Array, places: list[int]) -> list[float | None]:
    """The scores (K,) of those with an answer, among themselves; None for the others."""
    scores: list[float | None] = [None] * len(logits)
    for place, score in zip(places, mean_scores(logits[np.ix_(places, places)]).tolist(), strict=True):
        scores[place] = score
    return scores
