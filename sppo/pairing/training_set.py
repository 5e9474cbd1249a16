"""Stage 3: responses and rankings joined by prompt_id into the training set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sppo.command.errors import SPPOError, UsageError
from sppo.command.progress import progress
from sppo.method import preference, winrates
from sppo.pairing.choose import Choice, choose
from sppo.pairing.columns import conversations, lists, where
from sppo.pairing.join import Rankings, hash64, prompt_ids
from sppo.pairing.statistics import Statistics
from sppo.rankers import estimator_of
from sppo.recipe import Recipe
from sppo.schema import NO_ANSWER, content_id, training_schema
from sppo.store.files import atomic_together, digest
from sppo.store.manifest import Stage
from sppo.store.parquet import RowGroups, open_parquet, read_batches
from sppo.store.rankings import check_rankings, ranking_files, set_aside
from sppo.store.responses import Count, require_responses, responses_columns, responses_each

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 512  # prompts at once: tens of MB of the longest responses


def pairing_stage(recipe: Recipe, output_dir: Path) -> Stage:
    """The stage that makes the training set of the responses and rankings in $DATA. Raises SPPOError without them."""
    responses = require_responses(output_dir)
    shards = ranking_files(output_dir)
    settings = {k: getattr(recipe, k) for k in ("test_size", "seed", "keep_degenerate")}
    settings["pairs"] = responses_each(output_dir, recipe.pairs).total
    settings["estimator"] = estimator_of(recipe, shards)  # the one that is used, not `auto`
    # manifests from before there were these do not name them
    for key in ("length_penalty", "ranker_temperature", "select", "min_margin"):
        if getattr(recipe, key) != getattr(Recipe, key):
            settings[key] = getattr(recipe, key)
    return Stage(
        "compute_prob",
        output_dir / "train.manifest.json",
        [output_dir / "train.parquet", output_dir / "test.parquet"],
        inputs={"responses": digest(responses), "ranking": {p.name: digest(p) for p in shards}},
        settings=settings,
    )


def compute_prob(recipe: Recipe, output_dir: Path, overwrite: bool) -> None:
    """Write $DATA/train.parquet and test.parquet from $DATA/responses.parquet and $DATA/ranking.

    Memory grows by about 350 bytes a prompt (benchmarks/pairing.py). Raises SPPOError for files that do not fit
    together and UsageError for a hold-out that leaves nothing, both before anything is written or overwritten.
    """
    responses, shards = require_responses(output_dir), ranking_files(output_dir)
    train, test = output_dir / "train.parquet", output_dir / "test.parquet"
    schema = responses_columns(responses)
    stage = pairing_stage(recipe, output_dir)
    check_rankings(shards, responses, stage.inputs["responses"])
    if not overwrite and not stage.make_ready():
        return
    each = responses_each(output_dir, recipe.pairs)
    rankings = Rankings(shards, each.total)
    if not len(rankings):
        skipped = set_aside(shards)
        why = f", because all prompts were set aside: {skipped}" if skipped else "; run rank.py first"
        raise SPPOError(f"{output_dir / 'ranking'} holds no ranking{why}")
    rows, held_out = _match(responses, rankings, recipe)
    if overwrite:
        stage.discard()  # the old ones may go now that new ones can be made
    stage.begin()
    statistics = Statistics()
    recipe = dataclasses.replace(recipe, estimator=stage.settings["estimator"])
    pairs = _pairs(responses, schema, rankings, rows, each, recipe, statistics)
    written = _write(train, test, pairs, held_out, statistics)
    counts = {"train": written[0], "test": written[1], **statistics.summary()}
    stage.finish(counts)
    print(f"compute_prob: {train}")
    for key, value in counts.items():
        print(f"  {key}: {json.dumps(value)}")
    if said := statistics.scale.warning(recipe.ranker_temperature):
        print(f"compute_prob: warning: {said}")


def _match(responses: Path, rankings: Rankings, recipe: Recipe) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(row in `rankings`, -1 if there is none; whether it is held out) of every row of `responses`, (N,) each.

    Raises SPPOError for rankings without a row here and a ranked prompt that is here twice.
    """
    import pyarrow as pa

    size = recipe.test_size
    total = open_parquet(responses, []).metadata.num_rows
    rows, contents = np.empty(total, dtype=np.int64), np.zeros(total if size else 0, dtype=np.uint64)
    fields = [f for f in training_schema() if f.name == "prompt_id" or (size and f.name == "prompt")]
    times = np.zeros(len(rankings), dtype=np.uint16)  # each ranking's rows here
    start = 0
    for batch in read_batches(responses, pa.schema(fields), 8 * _BATCH):
        ids = prompt_ids(batch, responses)
        here = slice(start, start + len(ids))
        start = here.stop
        found = rankings.find(ids)
        rows[here] = found
        ranked = np.flatnonzero(found >= 0)
        np.add.at(times, found[ranked], 1)
        again = ranked[times[found[ranked]] > 1]
        if len(again):
            raise SPPOError(f"{responses}: prompt_id {ids[again[0]]} is there twice; each row needs its own")
        if size:
            prompts = batch.column("prompt").to_pylist()
            contents[here] = hash64(f"{recipe.seed} {content_id(p)}" for p in prompts)
    unmatched = int((times == 0).sum())
    if unmatched:
        raise SPPOError(f"{unmatched} rankings have no row in {responses}; they are another run's")
    held_out = _held_out(contents, rows >= 0, size) if size else np.zeros(total, dtype=bool)
    return rows, held_out


def _held_out(contents: NDArray[np.uint64], ranked: NDArray[np.bool_], size: float) -> NDArray[np.bool_]:
    """The rows whose content's seeded hash is among the smallest, (N,): a prompt asked twice stays on one side."""
    distinct = np.unique(contents[ranked])
    count = round(size * len(distinct)) if size < 1 else int(size)
    if count >= len(distinct):
        raise UsageError(f"--test_size {size:g} leaves nothing to train on: there are {len(distinct)} prompts")
    return contents < distinct[count]


def _write(
    train: Path,
    test: Path,
    pairs: Iterator[tuple[pa.RecordBatch, NDArray[np.int64]]],
    held_out: NDArray[np.bool_],
    statistics: Statistics,
) -> tuple[int, int]:
    """Write both files in one pass; returns their rows. Neither appears if anything fails or no pair is left."""
    schema = training_schema()
    with (
        atomic_together([train, test]) as (train_part, test_part),
        RowGroups(train_part, schema) as train_rows,
        RowGroups(test_part, schema) as test_rows,
    ):
        for batch, numbers in pairs:
            test_rows.write(where(held_out[numbers], batch))
            train_rows.write(where(~held_out[numbers], batch))
        if not train_rows.rows:
            why = f"dropped: {dict(+statistics.dropped)}{statistics.one_sided()}"
            raise SPPOError(f"no pair is left to train on; {why}")
    return train_rows.rows, test_rows.rows


def _pairs(
    responses: Path,
    schema: pa.Schema,
    rankings: Rankings,
    rows: NDArray[np.int64],
    each: Count,
    recipe: Recipe,
    statistics: Statistics,
) -> Iterator[tuple[pa.RecordBatch, NDArray[np.int64]]]:
    """Batches of the training set, and the numbers of the responses' rows that they were made from."""
    statistics.dropped["not ranked"] = int((rows < 0).sum())
    start = 0
    with progress(len(rows), "compute_prob", "prompt") as bar:
        for batch in read_batches(responses, schema, _BATCH):
            numbers = np.arange(start, start + batch.num_rows)
            start += batch.num_rows
            ranked = rows[numbers] >= 0
            logits = rankings.logits[rows[numbers[ranked]]].astype(np.float64)  # (N, K, K)
            finite = np.asarray(np.isfinite(logits).all((1, 2)))
            statistics.dropped["logits not finite"] += int((~finite).sum())
            batch, numbers = where(finite, where(ranked, batch)), numbers[ranked][finite]

            counts = batch.column("responses").value_lengths().fill_null(0).to_numpy()
            wrong = np.flatnonzero(counts != each.total)
            if len(wrong):
                name, count = batch.column("prompt_id")[wrong[0]], counts[wrong[0]]
                raise SPPOError(f"{responses}: prompt {name} has {count} responses, not {each}")

            pairs, kept = _pair(batch, logits[finite], recipe, statistics)
            yield where(kept, pairs), numbers[kept]
            bar.update(len(ranked))


def _left_out(
    chosen: pa.Array, rejected: pa.Array, choice: Choice, answered: NDArray[np.bool_], recipe: Recipe
) -> dict[str, NDArray[np.bool_]]:
    """By reason: which of N pairs teach nothing, or too little, (N,). chosen, rejected: texts; answered: (N, K)."""
    from pyarrow import compute

    pc: Any = compute
    row = np.arange(len(answered))

    def is_blank(texts: pa.Array, which: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Of a response with an answer. One without is the rejected one, and teaches to end thoughts."""
        blank = pc.equal(pc.utf8_trim_whitespace(texts), "").to_numpy(zero_copy_only=False)
        return blank & answered[row, which]

    no_answer: NDArray[np.bool_] = ~np.asarray(answered.any(1))
    narrow = {"below --min_margin": choice.is_narrow}
    if recipe.keep_degenerate:
        return {NO_ANSWER: no_answer, **narrow}
    return {
        NO_ANSWER: no_answer,
        "equal scores": choice.is_equal,
        "same text": pc.equal(chosen, rejected).to_numpy(zero_copy_only=False),
        "empty response": is_blank(chosen, choice.chosen) | is_blank(rejected, choice.rejected),
        **narrow,
    }


def _pair(
    batch: pa.RecordBatch, logits: preference.Array, recipe: Recipe, statistics: Statistics
) -> tuple[pa.RecordBatch, NDArray[np.bool_]]:
    """Rows of the training set for N ranked prompts, logits (N, K, K), and which of them are kept, (N,)."""
    import pyarrow as pa
    from pyarrow import compute

    pc: Any = compute  # its functions are made when it is imported, where no type checker sees them
    n, k, _ = logits.shape
    row = np.arange(n)
    responses = batch.column("responses").flatten()
    texts = pc.fill_null(pc.struct_field(responses, "text"), "")  # (N * K,)
    lengths = pc.utf8_length(texts).to_numpy().reshape(n, k).astype(np.float64)
    answered = _answered(responses).reshape(n, k)
    statistics.add_responses(answered, pc.struct_field(responses, "thought_tokens").null_count < n * k)

    scores = preference.mean_scores(winrates.among_answers(logits, answered, "released"))  # (N, K)
    logits = logits / recipe.ranker_temperature
    choice = choose(logits, lengths, answered, batch.column("prompt_id").to_pylist(), recipe)
    w, l, rates = choice.chosen, choice.rejected, choice.rates  # noqa: E741 - the paper's
    chosen, rejected = texts.take(pa.array(row * k + w)), texts.take(pa.array(row * k + l))

    kept = np.ones(n, dtype=bool)
    for reason, found in _left_out(chosen, rejected, choice, answered, recipe).items():
        statistics.dropped[reason] += int((kept & found).sum())
        kept &= ~found
    whole = answered.all(1)
    of_whole = (each[whole] for each in (logits, choice.probability, scores, choice.win_rates, lengths))
    statistics.add_ranked(*of_whole)
    statistics.scale.add(choice.odds[whole])
    statistics.add_pairs(rates[:, kept])

    made = {
        "chosen": conversations(batch.column("prompt"), chosen),
        "rejected": conversations(batch.column("prompt"), rejected),
        "chosen_probs": pa.array(rates[0]),
        "chosen_probs_win": pa.array(rates[1]),
        "chosen_probs_lose": pa.array(rates[2]),
        "chosen_index": pa.array(w.astype(np.int32)),
        "rejected_index": pa.array(l.astype(np.int32)),
        "probability": lists(lists(pa.array(choice.probability.reshape(-1)), k), k),
        "rm_scores": lists(pa.array(scores.reshape(-1).astype(np.float32), mask=~answered.reshape(-1)), k),
        **dict(zip(batch.schema.names, batch.columns, strict=True)),
    }
    columns = [made[f.name] if f.name in made else pa.nulls(n, f.type) for f in training_schema()]
    return pa.RecordBatch.from_arrays(columns, schema=training_schema()), kept


def _answered(responses: pa.Array) -> NDArray[np.bool_]:
    """Whether each of so many responses has an answer, as schema.has_answer says it."""
    from pyarrow import compute

    pc: Any = compute
    tokens = pc.fill_null(pc.list_value_length(pc.struct_field(responses, "token_ids")), 0)
    found = pc.less(pc.struct_field(responses, "thought_tokens"), tokens)  # null where nothing was thought
    return pc.fill_null(found, True).to_numpy(zero_copy_only=False)
