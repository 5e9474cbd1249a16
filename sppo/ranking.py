"""Stage 2: the preference model's logit for every ordered pair of a prompt's K responses."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.config import Recipe
from sppo.errors import SPPOError
from sppo.files import Journal, digest, open_parquet, read_rows, write_parquet
from sppo.generation import Slice, shard_paths
from sppo.manifest import Stage
from sppo.models import model_identity, open_policy, resolve
from sppo.progress import progress
from sppo.prompts import Message

if TYPE_CHECKING:
    import pyarrow as pa

    from sppo.pairrm import PairRM

_CHUNK = 64  # prompts whose pairs are packed into batches together


def ranking_schema() -> pa.Schema:
    """Columns of ranking/shard-*.parquet: logits (K, K), row i against column j with i shown first; scores (K,)."""
    import pyarrow as pa

    matrix = pa.list_(pa.list_(pa.float32()))
    return pa.schema([("prompt_id", pa.string()), ("logits", matrix), ("scores", pa.list_(pa.float32()))])


def prompt_text(messages: list[Message]) -> str:
    """A prompt as the plain text that a ranker reads: the user's words; earlier turns named by role before them."""
    if len(messages) == 1:
        return messages[0]["content"]
    if [m["role"] for m in messages] == ["system", "user"]:
        return f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return "\n".join(f"{m['role'].upper()}: {m['content']}" for m in messages)


def prompt_logits(ranker: PairRM, items: list[tuple[str, list[str]]]) -> list[tuple[list[list[float]], int]]:
    """((K, K) logits, diagonal 0; how many texts were cut) for each (prompt text, K response texts).

    K may differ between items. Identical responses are asked once, and batches mix the pairs of all items.
    """
    inputs: list[tuple[list[int], list[int]]] = []
    index: list[dict[tuple[str, str], int]] = []
    cuts: list[int] = []
    for text, responses in items:
        before = ranker.cut
        source = ranker.encode_source(text)
        encoded = {r: ranker.encode_candidate(r, len(source)) for r in dict.fromkeys(responses)}
        asked: dict[tuple[str, str], int] = {}
        for i, first in enumerate(responses):
            for j, second in enumerate(responses):
                if i != j and (first, second) not in asked:
                    asked[first, second] = len(inputs)
                    inputs.append(ranker.pair_input(source, encoded[first], encoded[second]))
        index.append(asked)
        cuts.append(ranker.cut - before)
    logits = ranker.logits(inputs)
    answers = []
    for (_, responses), asked, cut in zip(items, index, cuts, strict=True):
        rows = [
            [0.0 if i == j else logits[asked[a, b]] for j, b in enumerate(responses)] for i, a in enumerate(responses)
        ]
        answers.append((rows, cut))
    return answers


def rank_shard(recipe: Recipe, output_dir: Path, part: Slice, shard: int, overwrite: bool) -> None:
    """Write $DATA/ranking/shard-<shard>.parquet for its slice of $DATA/responses.parquet."""
    responses = output_dir / "responses.parquet"
    total = open_parquet(responses, ["prompt_id", "prompt", "responses"]).metadata.num_rows
    start, stop = part.bounds(total)
    ranker_dir = resolve(recipe.ranker, recipe.ranker_revision, "ranker")
    path, manifest, journal_path = shard_paths(output_dir / "ranking", shard)
    inputs = {"responses": digest(responses), "ranker": model_identity(ranker_dir)}
    if recipe.ranker_prompt == "templated":
        inputs["model"] = open_policy(recipe.model, recipe.model_revision).identity()
    stage = Stage(
        "rank",
        manifest,
        [path],
        inputs=inputs,
        settings={"rows": [start, stop], "pairs": recipe.pairs, "ranker_prompt": recipe.ranker_prompt},
        journal=journal_path,
    )
    if stage.is_done(overwrite):
        print(f"rank: shard {shard} is done: {path}")
        return
    stage.begin()
    journal = Journal(journal_path, stage.identity)
    rendered = prompt_renderer(recipe)
    missing = (row for row in _slice(responses, start, stop, recipe.pairs) if row["prompt_id"] not in journal.done)
    print(f"rank: rows {start} to {stop} of {total}: {len(journal.done)} in the journal")
    with progress(stop - start, f"shard {shard}", "prompt", len(journal.done)) as bar:
        ranker = None
        while rows := list(islice(missing, _CHUNK)):
            if ranker is None:
                from sppo.pairrm import load_pairrm

                ranker = load_pairrm(ranker_dir, recipe.batch_tokens)
            items = [(rendered(row["prompt"]), [r["text"] for r in row["responses"]]) for row in rows]
            for row, (logits, cut) in zip(rows, prompt_logits(ranker, items), strict=True):
                journal.add(row["prompt_id"], {"logits": logits, "cut": cut})
                bar.update()
    _write_shard(stage, journal, path, responses, (start, stop), recipe)


def prompt_renderer(recipe: Recipe) -> Any:
    """messages -> what the ranker reads as the prompt."""
    if recipe.ranker_prompt == "text":
        return prompt_text
    tokenizer = open_policy(recipe.model, recipe.model_revision).tokenizer()
    kwargs = recipe.chat_template_kwargs
    return lambda messages: tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **kwargs
    )


def _slice(responses: Path, start: int, stop: int, pairs: int) -> Iterator[dict[str, Any]]:
    for row in read_rows(responses, ["prompt_id", "prompt", "responses"], start, stop):
        if len(row["responses"]) != pairs:
            raise SPPOError(
                f"{responses}: prompt {row['prompt_id']} has {len(row['responses'])} responses, not --pairs {pairs}"
            )
        yield row


def _write_shard(
    stage: Stage, journal: Journal, path: Path, responses: Path, bounds: tuple[int, int], recipe: Recipe
) -> None:
    skipped: list[dict[str, str]] = []
    cut: Counter[str] = Counter()

    def rows() -> Iterator[dict[str, Any]]:
        for row in read_rows(responses, ["prompt_id"], *bounds):
            answer = journal.read(row["prompt_id"])
            logits, cut["texts"] = answer["logits"], cut["texts"] + answer["cut"]
            if not all(math.isfinite(x) for line in logits for x in line):
                skipped.append({"prompt_id": row["prompt_id"], "reason": "the ranker's logits are not finite"})
                continue
            k = len(logits)
            scores = [sum(logits[i][j] - logits[j][i] for j in range(k)) / k for i in range(k)]
            yield {"prompt_id": row["prompt_id"], "logits": logits, "scores": scores}

    written = write_parquet(path, ranking_schema(), rows())
    counts = {
        "prompts": bounds[1] - bounds[0],
        "written": written,
        "pairs": written * recipe.pairs * (recipe.pairs - 1),
        "texts_cut_for_the_ranker": cut["texts"],
        "skipped": dict(Counter(s["reason"] for s in skipped)),
    }
    stage.finish(counts, ranker=recipe.ranker, skipped=skipped)
    journal.remove()
    print(f"rank: {path}: {json.dumps(counts)}")
