"""Stage 3: responses and rankings joined by prompt_id into the training set."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sppo import winrates
from sppo.config import Recipe
from sppo.errors import SPPOError, UsageError
from sppo.files import digest, open_parquet, read_rows, write_parquet
from sppo.manifest import Stage
from sppo.prompts import content_id

if TYPE_CHECKING:
    import pyarrow as pa


def training_schema() -> pa.Schema:
    """train.parquet: the released data sets' five columns, then ours, which others' files may lack."""
    import pyarrow as pa

    from sppo.generation import responses_schema

    answers = responses_schema()
    conversation = answers.field("prompt").type
    return pa.schema(
        [
            ("chosen", conversation),  # the whole conversation, the response last
            ("rejected", conversation),
            ("chosen_probs", pa.float64()),  # P(chosen > rejected)
            ("chosen_probs_win", pa.float64()),  # P(chosen > policy)
            ("chosen_probs_lose", pa.float64()),  # P(rejected > policy)
            ("prompt_id", pa.string()),
            ("prompt", conversation),
            ("responses", answers.field("responses").type),
            ("chosen_index", pa.int32()),
            ("rejected_index", pa.int32()),
            ("probability", pa.list_(pa.list_(pa.float64()))),  # (K, K)
            ("rm_scores", pa.list_(pa.float32())),
            ("prompt_token_ids", pa.list_(pa.int32())),
            ("tokenizer", pa.string()),
        ]
    )


def compute_prob(recipe: Recipe, output_dir: Path, overwrite: bool) -> None:
    """Write $DATA/train.parquet and test.parquet from $DATA/responses.parquet and $DATA/ranking."""
    responses = output_dir / "responses.parquet"
    shards = sorted((output_dir / "ranking").glob("*.parquet"))
    if not shards:
        raise SPPOError(f"{output_dir / 'ranking'} holds no ranking; run rank.py first")
    train, test = output_dir / "train.parquet", output_dir / "test.parquet"
    open_parquet(responses, ["prompt_id", "prompt", "responses"])
    stage = Stage(
        "compute_prob",
        output_dir / "train.manifest.json",
        [train, test],
        inputs={"responses": digest(responses), "ranking": {p.name: digest(p) for p in shards}},
        settings={k: getattr(recipe, k) for k in ("pairs", "estimator", "test_size", "seed", "keep_degenerate")},
    )
    if stage.is_done(overwrite):
        print(f"compute_prob: done: {train}")
        return
    stage.begin()
    ranking = _load_ranking(shards, recipe.pairs)
    held_out = _hold_out(responses, ranking, recipe)
    statistics = _Statistics()
    # Twice through the responses, so that neither side is held in memory.
    written = {
        path: write_parquet(path, training_schema(), _rows(responses, ranking, recipe, keep, statistics))
        for path, keep in ((train, lambda c: c not in held_out), (test, lambda c: c in held_out))
    }
    if not written[train]:
        train.unlink()
        test.unlink()
        raise SPPOError(f"no pair is left to train on; dropped: {dict(+statistics.dropped)}")
    known = set(ranking)
    answered = sum(1 for row in read_rows(responses, ["prompt_id"]) if row["prompt_id"] in known)
    if answered != len(known):
        raise SPPOError(f"{len(known) - answered} rankings have no row in {responses}; they are another run's")
    counts = {"train": written[train], "test": written[test], **statistics.summary()}
    stage.finish(counts)
    print(f"compute_prob: {train}")
    for key, value in counts.items():
        print(f"  {key}: {json.dumps(value)}")


def _load_ranking(shards: list[Path], pairs: int) -> dict[str, np.ndarray]:
    """prompt_id -> logits (K, K), float32. Raises SPPOError for another K or a prompt ranked twice."""
    ranking: dict[str, np.ndarray] = {}
    for shard in shards:
        for row in read_rows(shard, ["prompt_id", "logits"]):
            logits = np.array(row["logits"], dtype=np.float32)
            if logits.shape != (pairs, pairs):
                raise SPPOError(f"{shard}: prompt {row['prompt_id']} has logits {logits.shape}, not ({pairs}, {pairs})")
            if row["prompt_id"] in ranking:
                raise SPPOError(f"{shard}: prompt {row['prompt_id']} is ranked twice; remove the stale shard")
            ranking[row["prompt_id"]] = logits
    return ranking


def _hold_out(responses: Path, ranking: dict[str, np.ndarray], recipe: Recipe) -> set[str]:
    """Contents of the prompts held out: drawn by content, so that a prompt asked twice stays on one side."""
    if not recipe.test_size:
        return set()
    rows = read_rows(responses, ["prompt_id", "prompt"])
    contents = sorted({content_id(r["prompt"]) for r in rows if r["prompt_id"] in ranking})
    share = recipe.test_size < 1
    if not share and recipe.test_size != int(recipe.test_size):
        raise UsageError(f"--test_size {recipe.test_size}: a whole number of prompts, or a share below 1")
    count = round(recipe.test_size * len(contents)) if share else int(recipe.test_size)
    if count >= len(contents):
        raise UsageError(
            f"--test_size {recipe.test_size:g} leaves nothing to train on: there are {len(contents)} prompts"
        )
    return set(random.Random(recipe.seed).sample(contents, count))


def _rows(
    responses: Path, ranking: dict[str, np.ndarray], recipe: Recipe, keep: Any, statistics: _Statistics
) -> Iterator[dict[str, Any]]:
    names = open_parquet(responses, []).schema_arrow.names
    columns = ["prompt_id", "prompt", "responses"] + [c for c in ("prompt_token_ids", "tokenizer") if c in names]
    source = (row for row in read_rows(responses, columns) if keep(content_id(row["prompt"])))
    while rows := list(islice(source, 512)):
        statistics.dropped["not ranked"] += sum(r["prompt_id"] not in ranking for r in rows)
        rows = [r for r in rows if r["prompt_id"] in ranking]
        if not rows:
            continue
        logits = np.stack([ranking[r["prompt_id"]] for r in rows]).astype(np.float64)  # (N, K, K)
        scores = winrates.mean_scores(logits)
        probability = winrates.probability(logits, recipe.estimator)
        win_rates = probability.mean(-1)  # (N, K)
        # sigmoids saturate, scores do not: the released estimator orders by its scores
        chosen, rejected = winrates.best_and_worst(scores if recipe.estimator == "released" else win_rates)
        statistics.ranked(logits, probability, scores, rows)
        for n, row in enumerate(rows):
            w, l = int(chosen[n]), int(rejected[n])  # noqa: E741 - the paper's names
            texts = [r["text"] for r in row["responses"]]
            degenerate = "equal scores" if w == l else "same text" if texts[w] == texts[l] else ""
            if not degenerate and not (texts[w].strip() and texts[l].strip()):
                degenerate = "empty response"
            if degenerate and not recipe.keep_degenerate:
                statistics.dropped[degenerate] += 1
                continue
            values = float(probability[n, w, l]), float(win_rates[n, w]), float(win_rates[n, l])
            statistics.pair(*values)
            yield {
                **{c: row[c] for c in columns},
                "chosen": [*row["prompt"], {"role": "assistant", "content": texts[w]}],
                "rejected": [*row["prompt"], {"role": "assistant", "content": texts[l]}],
                "chosen_probs": values[0],
                "chosen_probs_win": values[1],
                "chosen_probs_lose": values[2],
                "chosen_index": w,
                "rejected_index": l,
                "probability": probability[n].tolist(),
                "rm_scores": scores[n].tolist(),
            }


class _Statistics:
    """What compute_prob prints, gathered while rows stream by."""

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.pairs: list[tuple[float, float, float]] = []
        self.sums: Counter[str] = Counter()
        self.moments = np.zeros(5)  # of (score, length): sums of x, y, x^2, y^2, xy, within each prompt

    def ranked(
        self, logits: np.ndarray, probability: np.ndarray, scores: np.ndarray, rows: list[dict[str, Any]]
    ) -> None:
        n, k, _ = logits.shape
        self.sums["prompts"] += n
        self.sums["triples"] += n * (k >= 3)
        self.sums["intransitive"] += winrates.intransitive_share(probability) * n if k >= 3 else 0
        self.sums["bias"] += winrates.position_bias(logits) * n
        upper = np.triu_indices(k, 1)
        self.sums["ties"] += int((probability[:, upper[0], upper[1]] == 0.5).sum())
        lengths = np.array([[len(r["text"]) for r in row["responses"]] for row in rows], dtype=np.float64)
        x, y = (v - v.mean(-1, keepdims=True) for v in (scores, lengths))
        self.moments += [x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]

    def pair(self, p: float, win: float, lose: float) -> None:
        self.pairs.append((p, win, lose))

    def summary(self) -> dict[str, Any]:
        n = self.sums["prompts"] or 1
        _, _, xx, yy, xy = self.moments
        quantiles = {}
        for name, values in zip(("p", "p_win", "p_lose"), np.array(self.pairs).reshape(-1, 3).T, strict=True):
            points = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]) if len(values) else []
            quantiles[name] = {
                "mean": round(float(values.mean()), 4) if len(values) else None,
                "quantiles": [round(float(q), 4) for q in points],
            }
        return {
            "prompts": self.sums["prompts"],
            "dropped": {k: v for k, v in self.dropped.items() if v},
            "tied_pairs": self.sums["ties"],
            "intransitive_triples": round(self.sums["intransitive"] / self.sums["triples"], 5)
            if self.sums["triples"]
            else None,
            "position_bias": round(self.sums["bias"] / n, 5),
            "score_length_correlation": round(float(xy / np.sqrt(xx * yy)), 4) if xx > 0 and yy > 0 else None,
            **quantiles,
        }
