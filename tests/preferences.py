"""Training sets for tests, with random answers of mixed length and random win rates; and what they are made of."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sppo import cli
from sppo.recipe import KEYS
from sppo.training.settings import Training, prepare

WORDS = "red blue ball dog house river market None sky return".split()
# settings small enough for a test, on top of demo.yaml
SMALL = ("--recipe=recipes/sppo/demo.yaml", "--global_batch_size=8", "--batch_size=2", "--learning_rate=1e-3")


def rows(count: int, pairs: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = [{"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randint(2, 12)))}]
        answers = [" ".join(rng.choices(WORDS, k=rng.randint(1, 25))) for _ in range(pairs)]
        p = [[0.5] * pairs for _ in range(pairs)]
        for i in range(pairs):
            for j in range(i):
                p[i][j] = rng.random()
                p[j][i] = 1 - p[i][j]
        rates = [sum(line) / pairs for line in p]
        w, l = rates.index(max(rates)), rates.index(min(rates))  # noqa: E741 - the paper's names
        made.append(
            {
                "chosen": [*prompt, {"role": "assistant", "content": answers[w]}],
                "rejected": [*prompt, {"role": "assistant", "content": answers[l]}],
                "chosen_probs": p[w][l],
                "chosen_probs_win": rates[w],
                "chosen_probs_lose": rates[l],
                "prompt": prompt,
                "responses": [{"text": text} for text in answers],
                "probability": p,
            }
        )
    return made


def write(directory: Path, made: list[dict[str, Any]]) -> Path:
    """A $DATA directory with these rows."""
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(made), directory / "train.parquet")
    return directory


LOGITS = [[0.0, 2.0, -1.0], [-2.0, 0.0, 1.0], [3.0, 0.5, 0.0]]


def data_directory(out: Path, answers: list[list[str]]) -> Path:
    """responses.parquet and ranking/ as another tool would write them: the documented columns and no more.

    The third answer is always the best, the second the worst.
    """
    (out / "ranking").mkdir(parents=True)
    responses, rankings = [], []
    for n, texts in enumerate(answers):
        prompt = [{"role": "user", "content": f"prompt {n // 2}"}]  # each prompt twice
        responses.append({"prompt_id": f"id{n}", "prompt": prompt, "responses": [{"text": t} for t in texts]})
        rankings.append({"prompt_id": f"id{n}", "logits": LOGITS, "scores": [0.0] * len(texts)})
    pq.write_table(pa.Table.from_pylist(responses), out / "responses.parquet")
    pq.write_table(pa.Table.from_pylist(rankings[::-1]), out / "ranking" / "theirs.parquet")  # never by position
    return out


def metrics(model: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a trained model, or of a training that is under way."""
    return [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]


def asked(words: list[str], processes: int) -> Training:
    """The training that sppo/run_sppo.py would do with these flags."""
    parser = cli.chain_parser("", KEYS["train"], "model_dir")
    return prepare(cli.parse(parser, [*SMALL, *words])[1], processes)
