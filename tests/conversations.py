"""Conversations, pairs and responses as other tools write them, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sppo.models import chat
from sppo.recipe import Recipe
from sppo.training.data import TrainingSet, load_training_set

USER = {"role": "user", "content": "Why None?"}
RATES = {"chosen_probs": 0.9, "chosen_probs_win": 0.8, "chosen_probs_lose": 0.3}


def answer(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


IMAGE = {"type": "image", "image": "a.png"}
CALL = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]
NO_CALL: dict[str, Any] = {"tool_calls": None, "name": None, "reasoning_content": ""}
HANDS_ON = "which this pipeline does not hand on"


def read(models: Path, path: Path, rows: list[dict[str, Any]] | pa.Table, **settings: Any) -> TrainingSet:
    """The rows as they are trained on by the tiny Llama-3."""
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path)
    tokenizer = chat.load_tokenizer(models / "llama3")
    return load_training_set(path, tokenizer, chat.stop_token_ids(models / "llama3", tokenizer), Recipe(**settings))


def ids(data: TrainingSet) -> list[list[tuple[list[int], list[int]]]]:
    """Each row's (prompt ids, response ids)."""
    sides = zip(data.prompts, data.responses, strict=True)
    return [[(p.tolist(), r.tolist()) for p, r in zip(*row, strict=True)] for row in sides]


def others(directory: Path, rows: list[dict[str, Any]], logits: Any) -> Path:
    """$DATA with responses and a ranking of other tools."""
    (directory / "ranking").mkdir(parents=True)
    good = {"prompt_id": "p", "prompt": [USER], "responses": [{"text": "a"}, {"text": "bc"}]}
    pq.write_table(pa.Table.from_pylist([{**good, **row} for row in rows]), directory / "responses.parquet")
    ranking = [{"prompt_id": row.get("prompt_id", "p"), "logits": logits} for row in rows]
    pq.write_table(pa.Table.from_pylist(ranking), directory / "ranking" / "theirs.parquet")
    return directory


LOGITS = [[0.0, 1.0], [-1.0, 0.0]]
