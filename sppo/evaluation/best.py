"""Best of n: n responses to each prompt, and of them the one with the highest mean P against the others."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sppo.command.errors import SPPOError
from sppo.evaluation.answers import call, draw, launch, settings
from sppo.method.preference import estimator_for
from sppo.method.winrates import compare
from sppo.models.files import public_name
from sppo.rankers import backend, estimator_of
from sppo.rankers.pinning import pinned
from sppo.recipe import Recipe
from sppo.schema import NO_ANSWER, Message, answered_of, prompt_text
from sppo.store.files import atomic, digest, write_json
from sppo.store.manifest import Stage, read_manifest
from sppo.store.parquet import read_rows, write_parquet
from sppo.store.rankings import check_rankings, ranking_files

Prompts = dict[str, list[Message]]  # by prompt_id, in the source's order; without messages where a prompt is no text
Row = dict[str, Any]  # of responses.parquet
_UNANSWERED = "the ranker gave no answer"


@dataclass
class Best:
    """The best response to one prompt: its index among the n, and its mean P against the others.

    tied: the prompt's comparisons with P = 1/2, of different texts. same: those of two equal texts.
    """

    index: int
    win_rate: float
    tied: int
    same: int


def best_of_n(recipe: Recipe, out: Path, overwrite: bool, load_prompts: Callable[[], Prompts]) -> None:
    """Draw recipe.pairs responses a prompt, choose, and write best.parquet, best.jsonl and best.alpaca.json into `out`.

    A prompt without a best response was skipped in generation, or the ranker gave no answer. It is counted by reason,
    and is in best.alpaca.json alone, with an empty output.

    Every step keeps what it has finished, and goes on when it is started again. Raises SPPOError where `out` holds work
    made under other settings, before the ranker is asked. `overwrite` ranks and chooses again, and keeps the responses.
    """
    recipe = dataclasses.replace(recipe, data_dir=str(out), prompts_part="0/1")
    responses = draw(recipe, out, out / "logs", "generate")
    call("preload", settings(recipe, "preload"), "preload", overwrite)

    recipe = pinned(recipe, out)
    stage = best_stage(recipe, out)
    if not stage.make_ready(overwrite):
        return

    launch(recipe, "rank", out / "logs", "rank", overwrite)
    stage.begin()

    rows = list(read_rows(responses, ["prompt_id", "prompt", "responses"]))
    found = _choose(recipe, out, rows)
    chosen = [(row, found[row["prompt_id"]]) for row in rows if row["prompt_id"] in found]
    if not chosen:
        raise SPPOError(f"{out}: the ranker answered for no prompt, so there is no best response")
    _write(stage.outputs, chosen)
    _write_alpaca(stage.outputs[2], chosen, load_prompts(), f"{public_name(recipe.model)}-best-of-{recipe.pairs}")

    skipped = list(read_manifest(out / "responses.manifest.json", "skipped")["skipped"])
    unanswered = [row["prompt_id"] for row in rows if row["prompt_id"] not in found]
    without = {row["prompt_id"] for row in rows if not answered_of(row["responses"])}
    skipped += [{"prompt_id": key, "reason": NO_ANSWER if key in without else _UNANSWERED} for key in unanswered]
    counts = {
        "prompts": len(chosen) + len(skipped),
        "written": len(chosen),
        "skipped": dict(Counter(each["reason"] for each in skipped)),
        "responses": sum(len(row["responses"]) for row in rows),
        "equal to an earlier one": sum(len(texts) - len(set(texts)) for texts in map(_answers, rows)),
        "comparisons": len(chosen) * recipe.pairs * (recipe.pairs - 1) // 2,
        "tied comparisons": sum(best.tied for _, best in chosen),
        "comparisons of equal texts": sum(best.same for _, best in chosen),
    }
    if unfinished := sum(len(row["responses"]) - len(answered_of(row["responses"])) for row in rows):
        counts["unfinished thoughts"] = unfinished
    stage.finish(counts, ranker=recipe.ranker, skipped=skipped)
    print(f"best_of_n: {stage.outputs[0]}: {json.dumps(counts)}")


def best_stage(recipe: Recipe, out: Path) -> Stage:
    """The stage that chooses among the responses in `out`."""
    ranker = backend(recipe).identity(recipe)
    settings: dict[str, Any] = {
        "n": recipe.pairs,
        "method": "full comparison",  # a knock-out, which there was once, chose otherwise
        "seed": recipe.seed,
        "estimator": estimator_for(ranker["backend"]) if recipe.estimator == "auto" else recipe.estimator,
    }
    if recipe.ranker_temperature != 1:  # manifests from before there was one do not name it
        settings["ranker_temperature"] = recipe.ranker_temperature
    return Stage(
        "best_of_n",
        out / "best.manifest.json",
        [out / name for name in ("best.parquet", "best.jsonl", "best.alpaca.json")],
        {"responses": digest(out / "responses.parquet"), "ranker": ranker},
        settings,
    )


def _texts(row: Row) -> list[str]:
    return [(response or {}).get("text") or "" for response in row["responses"]]


def _answers(row: Row) -> list[str]:
    """The texts of those that have an answer."""
    texts = _texts(row)
    return [texts[i] for i in answered_of(row["responses"])]


def _choose(recipe: Recipe, out: Path, rows: list[Row]) -> dict[str, Best]:
    """By prompt_id, from the ranking's shards: the best response, by the rule of `chosen` in the training set.

    Of equally good ones it is the first. A response without an answer is behind all that have one. A prompt without a
    finite answer of the ranker is in no shard.
    """
    asked = {row["prompt_id"]: row for row in rows}
    files, responses = ranking_files(out), out / "responses.parquet"
    check_rankings(files, responses, digest(responses))
    estimator = estimator_of(recipe, files)

    found = {}
    for path in files:
        for row in read_rows(path, ["prompt_id", "logits"]):
            logits = np.array([row["logits"]], dtype=np.float64) / recipe.ranker_temperature  # (1, n, n)
            of, n = asked[row["prompt_id"]], logits.shape[-1]
            places = answered_of(of["responses"])
            answered = np.isin(np.arange(n), places)[None]  # (1, n)
            compared = compare(logits, answered, estimator)
            index = int(compared.order[0].argmax())
            against_all = compared.probability[0, index].sum()  # with 1/2 against itself
            win_rate = float((against_all - 0.5) / (n - 1))
            same = sum(a == b for a, b in itertools.combinations(_answers(of), 2))
            answers = compared.logits[0][np.ix_(places, places)]
            equal = int(np.triu(answers == answers.T, 1).sum())
            found[row["prompt_id"]] = Best(index, win_rate, equal - same, same)
    return found


def _write(paths: list[Path], chosen: list[tuple[Row, Best]]) -> None:
    """best.parquet and best.jsonl."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("prompt_id", pa.string()), ("prompt", pa.list_(message)), ("response", pa.string()),
                        ("index", pa.int32()), ("win_rate", pa.float64())])  # fmt: skip

    rows = [
        {
            "prompt_id": row["prompt_id"],
            "prompt": row["prompt"],
            "response": _texts(row)[best.index],
            "index": best.index,
            "win_rate": best.win_rate,
        }
        for row, best in chosen
    ]
    write_parquet(paths[0], schema, rows)
    with atomic(paths[1]) as temporary, open(temporary, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_alpaca(path: Path, chosen: list[tuple[Row, Best]], prompts: Prompts, generator: str) -> None:
    """An entry for each prompt: AlpacaEval would compare on the rest alone, and those left out are not the easy ones.

    The instruction is the prompt as it was asked, by which AlpacaEval finds the answer to compare with.
    """
    outputs = {row["prompt_id"]: _texts(row)[best.index] for row, best in chosen}
    entries = [
        {"instruction": prompt_text(prompt), "output": outputs.get(key, ""), "generator": generator, "dataset": ""}
        for key, prompt in prompts.items()
        if prompt
    ]
    write_json(path, entries)
