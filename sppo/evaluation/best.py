"""Best of n: n responses a prompt, and the one that the ranker prefers, by a full comparison or by a knock-out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sppo.common.errors import SPPOError
from sppo.common.files import atomic, digest
from sppo.common.journal import Journal
from sppo.common.manifest import Stage
from sppo.common.model_files import public_name
from sppo.common.parquet import read_rows, write_parquet
from sppo.common.preference import paper_probability
from sppo.common.progress import progress
from sppo.config import KEYS, ROOT, Recipe, flags
from sppo.evaluation.answers import call, draw, launch
from sppo.formats import Message, prompt_text
from sppo.rankers import Ranker, backend, pinned

_CHUNK = 64  # prompts whose knock-outs are played beside each other
_SAMPLE = 32  # prompts of a knock-out that are compared in full too, for the agreement


@dataclass
class Choice:
    """The response that won, and its mean P against the others (full comparison; NaN for a knock-out)."""

    index: int
    win_rate: float
    unanswered: int = 0


def best_of_n(recipe: Recipe, out: Path, gpus: str, world_size: int, knockout: bool) -> None:
    """Draw recipe.pairs responses a prompt, choose, and write best.parquet, best.jsonl and best.alpaca.json into `out`.

    Every step keeps what it has finished; started again it goes on. Raises SPPOError where `out` holds work made under
    other settings.
    """
    logs = out / "logs"
    responses = draw(recipe, out, logs, gpus, world_size, "generate")
    asking = {k: _flag(getattr(recipe, k)) for k in KEYS["rank"]}
    if not knockout:
        call([sys.executable, str(ROOT / "scripts/preload.py"), *_preload_flags(recipe, out)], "preload")
        rank = [sys.executable, str(ROOT / "scripts/rank.py"), *flags(**asking, output_dir=out)]
        launch(gpus, 1, logs, "rank", rank)
    recipe = pinned(recipe, out)
    stage = Stage(
        "best_of_n",
        out / "best.manifest.json",
        [out / name for name in ("best.parquet", "best.jsonl", "best.alpaca.json")],
        {"responses": digest(responses), "ranker": backend(recipe).identity(recipe)},
        {"n": recipe.pairs, "method": "knock-out" if knockout else "full comparison", "seed": recipe.seed},
        out / "knockout.journal",
    )
    if stage.is_done():
        print(f"best_of_n: done: {stage.outputs[0]}")
        return
    stage.begin()
    rows = list(read_rows(responses, ["prompt_id", "prompt", "responses"]))
    choices, more = _play(recipe, stage, rows) if knockout else (_ranked(out), {})
    chosen = [(row, choices[row["prompt_id"]]) for row in rows if row["prompt_id"] in choices]
    if not chosen:
        raise SPPOError(f"{out}: the ranker answered for no prompt, so there is no best response")
    _write(stage.outputs, chosen, f"{public_name(recipe.model)}-best-of-{recipe.pairs}")
    counts = {"prompts": len(rows), "written": len(chosen), "without an answer of the ranker": len(rows) - len(chosen)}
    counts |= {"responses": sum(len(row["responses"]) for row in rows), **more}
    stage.finish(counts, ranker=recipe.ranker)
    (out / "knockout.journal").unlink(missing_ok=True)
    print(f"best_of_n: {stage.outputs[0]}: {json.dumps(counts)}")


def _flag(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else value


def _preload_flags(recipe: Recipe, out: Path) -> list[str]:
    return flags(**{k: _flag(getattr(recipe, k)) for k in KEYS["preload"]}, output_dir=out)


def _ranked(out: Path) -> dict[str, Choice]:
    """By prompt_id: the response of the highest mean P against the others, from the ranking's shards."""
    found = {}
    for path in sorted((out / "ranking").glob("shard-*.parquet")):
        for row in read_rows(path, ["prompt_id", "logits"]):
            p = paper_probability(np.array(row["logits"], dtype=np.float64)[None])[0]  # (n, n)
            means = (p.sum(-1) - 0.5) / (len(p) - 1)
            found[row["prompt_id"]] = Choice(int(means.argmax()), float(means.max()))
    return found


def _play(recipe: Recipe, stage: Stage, rows: list[dict[str, Any]]) -> tuple[dict[str, Choice], dict[str, Any]]:
    """The knock-outs' winners by prompt_id, and how they agree with full comparisons on a sample."""
    ranker, journal = backend(recipe).load(recipe), Journal(stage.journal, stage.identity)
    with progress(len(rows), "knock-out", "prompt", len(journal.done)) as bar:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            missing = [row for row in chunk if row["prompt_id"] not in journal.done]
            asked = chunk if missing and ranker.batched else missing
            items = [(row["prompt"], [r["text"] or "" for r in row["responses"]]) for row in asked]
            orders = [_order(recipe.seed, row["prompt_id"], len(row["responses"])) for row in asked]
            for row, choice in zip(asked, knockout_winners(ranker, items, orders), strict=True):
                if row["prompt_id"] not in journal.done:
                    journal.add(row["prompt_id"], dataclasses.asdict(choice))
                    bar.update()
    choices = {row["prompt_id"]: Choice(**journal.read(row["prompt_id"])) for row in rows}
    journal.close()
    sample = sorted(rows, key=lambda row: hashlib.sha256(row["prompt_id"].encode()).digest())[:_SAMPLE]
    comparisons = {"comparisons": len(rows) * (recipe.pairs - 1)}
    unanswered = {"comparisons without an answer": sum(c.unanswered for c in choices.values())}
    return choices, {**comparisons, **unanswered, "agreement": _agreement(ranker, sample, choices)}


def _order(seed: int, prompt_id: str, n: int) -> list[int]:
    """The draw of a knock-out: the responses in an order that the seed and the prompt decide."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{prompt_id}".encode()).digest()[:8], "big")
    return np.random.default_rng(key).permutation(n).tolist()


def knockout_winners(
    ranker: Ranker, items: Sequence[tuple[list[Message], list[str]]], orders: list[list[int]]
) -> list[Choice]:
    """Each prompt's winner of a knock-out of its n responses in the given order, by n - 1 comparisons both ways round.

    In each round neighbours meet, all prompts' beside each other, and an odd last one goes on. Of equal responses, and
    where the ranker has no answer, the first in the order goes on.
    """
    left, unanswered = [list(order) for order in orders], [0] * len(orders)
    while any(len(order) > 1 for order in left):
        games = [(k, a, b) for k, order in enumerate(left) for a, b in zip(order[0::2], order[1::2], strict=False)]
        wins = _first_wins(ranker, [(items[k][0], items[k][1][a], items[k][1][b]) for k, a, b in games])
        winners: list[list[int]] = [[] for _ in left]
        for (k, a, b), p in zip(games, wins, strict=True):
            unanswered[k] += not np.isfinite(p)
            winners[k].append(b if p < 0.5 else a)
        for k, order in enumerate(left):
            left[k] = winners[k] + (order[-1:] if len(order) % 2 else [])
    return [Choice(order[0], float("nan"), lost) for order, lost in zip(left, unanswered, strict=True)]


def _first_wins(ranker: Ranker, pairs: list[tuple[list[Message], str, str]]) -> np.ndarray:
    """P(first beats second) of each pair, from both orders; 1/2 without asking where the two are the same text."""
    asked = [i for i, (_, a, b) in enumerate(pairs) if a != b]
    both = [side for i in asked for side in (pairs[i], (pairs[i][0], pairs[i][2], pairs[i][1]))]
    logits = np.full(len(both), np.nan)
    for index, logit in ranker.logits(both):
        logits[index] = logit
    found = np.full(len(pairs), 0.5)
    found[asked] = 1 / (1 + np.exp(-np.clip((logits[0::2] - logits[1::2]) / 2, -500, 500)))
    return found


def _agreement(ranker: Ranker, rows: list[dict[str, Any]], choices: dict[str, Choice]) -> dict[str, Any]:
    """The knock-out against the full comparison: how often it finds the best, and the winners' mean P against all."""
    same, mine, theirs, count = 0, 0.0, 0.0, 0
    for row in rows:
        texts = [r["text"] or "" for r in row["responses"]]
        n = len(texts)
        pairs = [(row["prompt"], texts[i], texts[j]) for i in range(n) for j in range(n) if i != j]
        p = np.full((n, n), 0.5)
        p[~np.eye(n, dtype=bool)] = _first_wins(ranker, pairs)
        if np.isfinite(p).all():
            means, index = (p.sum(-1) - 0.5) / (n - 1), choices[row["prompt_id"]].index
            same, count = same + (means[index] == means.max()), count + 1
            mine, theirs = mine + means[index], theirs + means.max()
    if not count:
        return {"prompts": 0}
    found = {"the same best": same / count, "win rate": mine / count, "win rate of the best": theirs / count}
    return {"prompts": count, **{k: round(float(v), 4) for k, v in found.items()}}


def _write(paths: list[Path], chosen: list[tuple[dict[str, Any], Choice]], generator: str) -> None:
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("prompt_id", pa.string()), ("prompt", pa.list_(message)), ("response", pa.string()),
                        ("index", pa.int32()), ("win_rate", pa.float64())])  # fmt: skip

    def rows() -> Iterator[dict[str, Any]]:
        for row, choice in chosen:
            rate = None if np.isnan(choice.win_rate) else choice.win_rate
            text = row["responses"][choice.index]["text"]
            yield {"prompt_id": row["prompt_id"], "prompt": row["prompt"], "response": text, "index": choice.index,
                   "win_rate": rate}  # fmt: skip

    write_parquet(paths[0], schema, rows())
    with atomic(paths[1]) as temporary, open(temporary, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())
    answers = [
        {"instruction": prompt_text(row["prompt"]), "output": row["response"], "generator": generator, "dataset": ""}
        for row in rows()
    ]
    with atomic(paths[2]) as temporary:
        temporary.write_text(json.dumps(answers, ensure_ascii=False, indent=1), encoding="utf-8")
