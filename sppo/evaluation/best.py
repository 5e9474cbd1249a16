"""Best of n: n responses a prompt, and the one that the ranker prefers, by a full comparison or by a knock-out."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sppo.cli import flags
from sppo.command.errors import SPPOError
from sppo.command.progress import progress
from sppo.command.search_path import ROOT
from sppo.evaluation.answers import call, draw, launch, settings
from sppo.method.preference import Array, probability
from sppo.method.winrates import ordering_score
from sppo.models.files import public_name
from sppo.rankers import Ranker, backend, log_odds, pending_chunks
from sppo.rankers.pinning import pinned
from sppo.recipe import Recipe
from sppo.schema import Message, prompt_text
from sppo.store.files import atomic, digest
from sppo.store.journal import Journal
from sppo.store.manifest import Stage, read_manifest
from sppo.store.parquet import read_rows, write_parquet
from sppo.store.rankings import check_rankings, ranking_files
from sppo.store.shards import Slice

Asked = dict[str, list[Message]]  # by prompt_id, in the source's order; no message where a prompt is no text
_UNANSWERED = "the ranker gave no answer"
_CHUNK = 64  # prompts whose knock-outs are played beside each other
_SAMPLE = 32  # prompts of a knock-out that are compared in full too, for the agreement
_FULL = 16  # of their responses, at most: the agreement must not cost what the knock-out saves


@dataclass
class Choice:
    """The response that won, and its mean P against the others (full comparison; NaN for a knock-out).

    Of its prompt's comparisons: those without a finite answer, those that say 1/2, those of two equal texts.
    """

    index: int
    win_rate: float
    unanswered: int = 0
    tied: int = 0
    same: int = 0


def best_of_n(recipe: Recipe, out: Path, knockout: bool, overwrite: bool, asked: Callable[[], Asked]) -> None:
    """Draw recipe.pairs responses a prompt, choose, and write best.parquet, best.jsonl and best.alpaca.json into `out`.

    A prompt without a best response, skipped in generation or without an answer of the ranker, is counted by reason; it
    is in best.alpaca.json alone, with an empty output. `asked`: gives all prompts.

    Every step keeps what it has finished; started again it goes on. Raises SPPOError where `out` holds work made under
    other settings, before the ranker is asked; `overwrite` ranks and chooses again, and keeps the responses.
    """
    logs = out / "logs"
    responses = draw(recipe, out, logs, "generate")
    preload = [sys.executable, str(ROOT / "scripts/preload.py"), *settings(recipe, "preload"), *flags(output_dir=out)]
    call([*preload, *["--overwrite"] * overwrite], "preload")
    recipe = pinned(recipe, out)
    stage = _stage(recipe, out, responses, knockout)
    if overwrite:
        stage.discard()
    if stage.is_current():
        stage.remove_leftovers()
        print(f"best_of_n: done: {stage.outputs[0]}")
        return
    stage.refuse_foreign()
    if knockout:
        if overwrite and not stage.has_begun():
            _forget_games(out / "knockout")
        stage.begin()  # before the games, so that --overwrite keeps those of a killed try
        own = flags(n=recipe.pairs, output_dir=out)
        play = [sys.executable, str(ROOT / "scripts/best_of_n.py"), *settings(recipe, "best_of_n"), *own, "--knockout"]
        call(play, "knock-out")
    else:
        launch(dataclasses.replace(recipe, data_dir=str(out)), "rank", logs, "rank", overwrite)
        stage.begin()
    rows = list(read_rows(responses, ["prompt_id", "prompt", "responses"]))
    choices, more = _played(recipe, stage, rows) if knockout else (_ranked(recipe, out, rows), {})
    chosen = [(row, choices[row["prompt_id"]]) for row in rows if row["prompt_id"] in choices]
    if not chosen:
        raise SPPOError(f"{out}: the ranker answered for no prompt, so there is no best response")
    _write(stage.outputs, chosen)
    _write_alpaca(stage.outputs[2], chosen, asked(), f"{public_name(recipe.model)}-best-of-{recipe.pairs}")
    skipped = list(read_manifest(out / "responses.manifest.json", "skipped")["skipped"])
    left = [row["prompt_id"] for row in rows if row["prompt_id"] not in choices]
    skipped += [{"prompt_id": key, "reason": _UNANSWERED} for key in left]
    counts: dict[str, Any] = {"prompts": len(chosen) + len(skipped), "written": len(chosen)}
    counts |= {"skipped": dict(Counter(each["reason"] for each in skipped))}
    counts |= {"responses": sum(len(row["responses"]) for row in rows)}
    counts |= {"equal to an earlier one": sum(len(row["responses"]) - len(set(_texts(row))) for row in rows)}
    counts |= _comparisons(recipe.pairs, knockout, [choice for _, choice in chosen]) | more
    stage.finish(counts, ranker=recipe.ranker, skipped=skipped)
    _forget_games(out / "knockout")
    print(f"best_of_n: {stage.outputs[0]}: {json.dumps(counts)}")


def _stage(recipe: Recipe, out: Path, responses: Path, knockout: bool) -> Stage:
    """The stage that chooses; a knock-out's shards keep their winners under its identity."""
    return Stage(
        "best_of_n",
        out / "best.manifest.json",
        [out / name for name in ("best.parquet", "best.jsonl", "best.alpaca.json")],
        {"responses": digest(responses), "ranker": backend(recipe).identity(recipe)},
        {
            "n": recipe.pairs,
            "method": "knock-out" if knockout else "full comparison",
            "seed": recipe.seed,
            "estimator": recipe.estimator,
        },
        out / "knockout" / "agreement.journal",
    )


def _forget_games(directory: Path) -> None:
    """Delete the journals of a knock-out, and their directory where nothing else is in it."""
    for journal in directory.glob("*.journal"):
        journal.unlink()
    with contextlib.suppress(OSError):
        directory.rmdir()


def _texts(row: dict[str, Any]) -> list[str]:
    return [(response or {}).get("text") or "" for response in row["responses"]]


def _comparisons(n: int, knockout: bool, choices: list[Choice]) -> dict[str, int]:
    """How many pairs of responses were compared, and what came of them."""
    return {
        "comparisons": len(choices) * (n - 1 if knockout else n * (n - 1) // 2),
        "comparisons without an answer": sum(c.unanswered for c in choices),
        "tied comparisons": sum(c.tied for c in choices),
        "comparisons of equal texts": sum(c.same for c in choices),
    }


def _means(logits: Array, estimator: str) -> Array:
    """Each response's mean P against the others, from the logits of one prompt: (n, n) -> (n,)."""
    return (probability(logits[None], estimator)[0].sum(-1) - 0.5) / (len(logits) - 1)


def _ranked(recipe: Recipe, out: Path, rows: list[dict[str, Any]]) -> dict[str, Choice]:
    """By prompt_id: the response of the highest mean P against the others, from the ranking's shards.

    By the same rule and estimator as `chosen` in the training set; of equal ones the first. A prompt for which the
    ranker gave no finite answer is in no shard.
    """
    texts, found = {row["prompt_id"]: _texts(row) for row in rows}, {}
    files, responses = ranking_files(out), out / "responses.parquet"
    check_rankings(files, responses, digest(responses))
    for path in files:
        for row in read_rows(path, ["prompt_id", "logits"]):
            logits = np.array(row["logits"], dtype=np.float64)
            best = int(ordering_score(logits[None], recipe.estimator)[0].argmax())
            means = _means(logits, recipe.estimator)
            same = sum(a == b for a, b in itertools.combinations(texts[row["prompt_id"]], 2))
            tied = int(np.triu(logits == logits.T, 1).sum()) - same
            found[row["prompt_id"]] = Choice(best, float(means[best]), 0, tied, same)
    return found


def play_shard(recipe: Recipe, out: Path, part: Slice) -> None:
    """Play the knock-outs of a shard's prompts; the winners are in <out>/knockout/shard-<n>.journal."""
    recipe, responses = pinned(recipe, out), out / "responses.parquet"
    stage = _stage(recipe, out, responses, knockout=True)
    rows = list(read_rows(responses, ["prompt_id", "prompt", "responses"]))
    rows = rows[slice(*part.bounds(len(rows)))]
    journal = Journal(out / "knockout" / f"shard-{part.data_frac:05d}.journal", stage.identity)
    is_done = lambda row: row["prompt_id"] in journal.done  # noqa: E731 - short, and for two places
    with progress(len(rows), "knock-out", "prompt", sum(map(is_done, rows))) as bar:
        for ranker, asked in pending_chunks(rows, is_done, _CHUNK, lambda: backend(recipe).load(recipe)):
            items = [(row["prompt"], _texts(row)) for row in asked]
            orders = [draw_order(recipe.seed, row["prompt_id"], len(row["responses"])) for row in asked]
            for row, choice in zip(asked, knockout_winners(ranker, items, orders), strict=True):
                if not is_done(row):
                    journal.add(row["prompt_id"], dataclasses.asdict(choice))
                    bar.update()
    journal.close()


def _played(recipe: Recipe, stage: Stage, rows: list[dict[str, Any]]) -> tuple[dict[str, Choice], dict[str, Any]]:
    """The knock-outs' winners by prompt_id, from the shards' journals, and their agreement with full comparisons.

    Shards of an earlier start, with other GPUs, may have played a prompt too: then the first of them counts.
    """
    choices: dict[str, Choice] = {}
    for path in sorted(stage.journal.parent.glob("shard-*.journal")):
        journal = Journal(path, stage.identity)
        choices = {key: Choice(**journal.read(key)) for key in journal.done} | choices
        journal.close()
    journal = Journal(stage.journal, stage.identity)
    sample = sorted(rows, key=lambda row: hashlib.sha256(row["prompt_id"].encode()).digest())[:_SAMPLE]
    agreement = _agreement(recipe, backend(recipe).load(recipe), journal, sample)
    journal.close()
    return choices, {"agreement": agreement}


def draw_order(seed: int, prompt_id: str, n: int) -> list[int]:
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
    left, found = [list(order) for order in orders], [Choice(0, float("nan")) for _ in orders]
    while any(len(order) > 1 for order in left):
        games = [(k, a, b) for k, order in enumerate(left) for a, b in _games(order)]
        apart = log_odds(ranker, [(items[k][0], items[k][1][a], items[k][1][b]) for k, a, b in games]).tolist()
        for (k, a, b), x in zip(games, apart, strict=True):
            same = items[k][1][a] == items[k][1][b]
            found[k].same += same
            found[k].tied += x == 0 and not same
            found[k].unanswered += x != x
        results = iter(apart)
        left = [_through(order, list(itertools.islice(results, len(order) // 2))) for order in left]
    for choice, order in zip(found, left, strict=True):
        choice.index = order[0]
    return found


def _games(order: list[int]) -> list[tuple[int, int]]:
    """The neighbours that meet in a round."""
    return list(zip(order[0::2], order[1::2], strict=False))


def _through(order: list[int], apart: list[float]) -> list[int]:
    """Who is in the next round, from the log-odds that each game's first beats its second."""
    winners = [b if x < 0 else a for (a, b), x in zip(_games(order), apart, strict=True)]
    return winners + order[-1:] * (len(order) % 2)


def _agreement(recipe: Recipe, ranker: Ranker, journal: Journal, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Knock-out against full comparison, of the same first responses: how often it finds the best, and the mean P.

    A prompt with a comparison that the ranker has no answer for is left out.
    """
    keys = {row["prompt_id"]: row for row in rows}
    with progress(len(rows), "agreement", "prompt", sum(key in journal.done for key in keys)) as bar:
        for key, row in keys.items():
            if key not in journal.done:
                journal.add(key, knockout_and_full(recipe, ranker, row))
                bar.update()
    found = [value for key in keys if (value := journal.read(key))]
    if not found:
        return {"prompts": 0}
    mine, best = (np.array([value[name] for value in found]) for name in ("knock-out", "full comparison"))
    measured = {"the same best": (mine == best).mean(), "win rate": mine.mean(), "win rate of the best": best.mean()}
    sizes = {"prompts": len(found), "responses": min(_FULL, recipe.pairs)}
    return sizes | {name: round(float(value), 4) for name, value in measured.items()}


def knockout_and_full(recipe: Recipe, ranker: Ranker, row: dict[str, Any]) -> dict[str, float]:
    """Mean P of the knock-out's winner and of the full comparison's, of one prompt; empty without all answers."""
    texts = _texts(row)[:_FULL]
    pairs = list(itertools.combinations(range(len(texts)), 2))
    apart = np.zeros((len(texts), len(texts)))
    for (i, j), x in zip(pairs, log_odds(ranker, [(row["prompt"], texts[i], texts[j]) for i, j in pairs]), strict=True):
        apart[i, j], apart[j, i] = x, -x
    if not np.isfinite(apart).all():
        return {}
    order = [i for i in draw_order(recipe.seed, row["prompt_id"], len(row["responses"])) if i < len(texts)]
    while len(order) > 1:
        order = _through(order, [float(apart[a, b]) for a, b in _games(order)])
    means = _means(apart, recipe.estimator)  # half differences are logits whose own half differences they are
    return {"knock-out": float(means[order[0]]), "full comparison": float(means.max())}


def _write(paths: list[Path], chosen: list[tuple[dict[str, Any], Choice]]) -> None:
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("prompt_id", pa.string()), ("prompt", pa.list_(message)), ("response", pa.string()),
                        ("index", pa.int32()), ("win_rate", pa.float64())])  # fmt: skip

    def rows() -> Iterator[dict[str, Any]]:
        for row, choice in chosen:
            rate = None if np.isnan(choice.win_rate) else choice.win_rate
            text = _texts(row)[choice.index]
            yield {"prompt_id": row["prompt_id"], "prompt": row["prompt"], "response": text, "index": choice.index,
                   "win_rate": rate}  # fmt: skip

    write_parquet(paths[0], schema, rows())
    with atomic(paths[1]) as temporary, open(temporary, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())


def _write_alpaca(path: Path, chosen: list[tuple[dict[str, Any], Choice]], asked: Asked, generator: str) -> None:
    """An entry for each prompt: AlpacaEval would compare on the rest alone, and those left out are not the easy ones.

    The instruction is the prompt as it was asked, by which AlpacaEval finds the answer to compare with.
    """
    found = {row["prompt_id"]: _texts(row)[choice.index] for row, choice in chosen}
    answers = [
        {"instruction": prompt_text(prompt), "output": found.get(key, ""), "generator": generator, "dataset": ""}
        for key, prompt in asked.items()
        if prompt
    ]
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(answers, ensure_ascii=False, indent=1), encoding="utf-8")
