"""Broken inputs for tests, one small function each, and commands called as a user calls them but in this process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import preferences
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from sppo.schema import responses_schema
from sppo.store.parquet import write_parquet

LOGITS = [[0.0, 1.0], [-1.0, 0.0]]
FINAL = (".parquet", ".manifest.json", ".safetensors", "ranker.json", "summary.json", "config.json")
RANKERS = """
raised = 1
def words(prompt, a, b): return "better"
def raises(prompt, a, b): raise RuntimeError("no GPU for you")
def nan(prompt, a, b): return float("nan")
def good(prompt, a, b): return len(a) - len(b)
"""


def call(command: list[str], environment: dict[str, str | None]) -> tuple[int, str]:
    """(exit code, all that was written) of a script's own main, in this process; what it changes of it is put back."""
    said = io.StringIO()
    kept = sys.argv, list(sys.path), dict(os.environ), signal.getsignal(signal.SIGTERM)
    for name, value in environment.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    sys.argv = [str(word) for word in command]
    try:
        leaves = mock.patch("sppo.command.errors.leave", sys.exit)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), leaves:
            runpy.run_path(str(tiny.ROOT / command[0]), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001 - what a user would see as a traceback
        code = -1
        said.write(traceback.format_exc())
    finally:
        sys.argv, sys.path[:] = kept[0], kept[1]
        os.environ.clear()
        os.environ.update(kept[2])
        signal.signal(signal.SIGTERM, kept[3])
    return code, said.getvalue()


@dataclass
class World:
    """A case's own directory and the tiny models."""

    d: Path
    models: Path
    patch: pytest.MonkeyPatch

    # files

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.d / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def jsonl(self, *prompts: Any) -> Path:
        return tiny.write_jsonl(self.d / "p.jsonl", [{"prompt": p} for p in prompts])

    def table(self, name: str, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
        path = self.d / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        return path

    def good(self) -> Path:
        return self.jsonl("What is it?", "And that?")

    # models

    def model(self, family: str = "llama3", **change: Callable[[Path], Any]) -> Path:
        """A copy of a model whose files `change` spoils: name (dots as __) -> what is done to the path."""
        copy = shutil.copytree(self.models / family, self.d / "m" / family)
        if family == "PairRM":
            shutil.copytree(self.models / "tiny-deberta", self.d / "m" / "tiny-deberta")
        for name, spoil in change.items():
            spoil(copy / name.replace("__", "."))
        return copy

    def classifier(self, labels: int) -> Path:
        import transformers

        directory = self.d / "m" / "classifier"
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.models / "llama3")
        shape = tiny.shape(tokenizer, num_labels=labels)
        transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**shape)).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    def adapter(self, weights: bool = True, **config: Any) -> Path:
        written = {"peft_type": "LORA", "base_model_name_or_path": str(self.d / "gone"), "r": 8, **config}
        self.file("adapter/adapter_config.json", json.dumps({k: v for k, v in written.items() if v is not None}))
        if weights:
            self.file("adapter/adapter_model.safetensors", "")
        return self.d / "adapter"

    # data

    def responses(self, *rows: dict[str, Any], name: str = "data/responses.parquet", schema: Any = None) -> Path:
        """responses.parquet with K = 2; a row's keys replace those of a good one."""
        made = []
        for n, row in enumerate(rows or ({}, {})):
            good = {"prompt_id": f"p{n}", "prompt": [{"role": "user", "content": f"question {n}"}]}
            answers = [{"text": t, "token_ids": None, "finish_reason": "stop"} for t in ("yes", f"no {n}")]
            made.append({**good, "responses": answers, **row})
        path = self.d / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if schema == "inferred":
            pq.write_table(pa.Table.from_pylist(made), path)
        else:
            write_parquet(path, responses_schema(), made)
        return path.parent

    def ranking(self, *rows: dict[str, Any], name: str = "data/ranking/shard-00000.parquet") -> Path:
        """Responses, and rankings of them; a row's keys replace those of a good one."""
        self.responses()
        made = [{"prompt_id": f"p{n}", "logits": LOGITS, **row} for n, row in enumerate(rows or ({}, {}))]
        self.table(name, made)
        return self.d / "data"

    def shards(self, count: int = 2) -> Path:
        """`count` finished shards of generate.py."""
        prompts = self.jsonl("a", "b", "c", "d")
        for i in range(count):
            code, said = call([*self.generate(prompts, f"--numgpu={count}", f"--data_frac={i}")], {})
            assert code == 0, said
        return self.d / "out"

    def train_rows(self, change: Callable[[dict[str, Any]], Any] = lambda row: None, count: int = 8) -> Path:
        """A $DATA directory whose rows `change` spoils."""
        rows = preferences.rows(count)
        for row in rows:
            change(row)
        return preferences.write(self.d / "data", rows)

    # commands

    def generate(self, prompts: Any, *flags: Any) -> list[str]:
        common = ("--pairs=2", "--maxlen=2", "--engine=transformers")
        own = [f"--model={self.models / 'llama3'}", f"--prompts={prompts}", f"--output_dir={self.d / 'out'}"]
        return ["scripts/generate.py", *own, *common, *map(str, flags)]

    def of_model(self, model: Any, *flags: Any) -> list[str]:
        return self.generate(self.good(), f"--model={model}", *flags)

    def recipe(self, content: bytes | str) -> list[str]:
        return self.generate(self.good(), f"--recipe={self.file('r.yaml', content)}")

    def combine(self, out: Path, *flags: Any) -> list[str]:
        return ["scripts/combine_generate.py", f"--output_dir={out}", "--pairs=2", "--numgpu=2", *map(str, flags)]

    def rank(self, data: Path, ranker: Any = "good", *flags: Any) -> list[str]:
        if isinstance(ranker, str) and ranker.isidentifier():
            self.file("some_rankers.py", RANKERS)
            self.patch.syspath_prepend(str(self.d))
            sys.modules.pop("some_rankers", None)
            ranker = f"some_rankers:{ranker}"
        own = [f"--output_dir={data}", f"--ranker={ranker}", "--pairs=2", "--ranker_prompt=text"]
        return ["scripts/rank.py", *own, *map(str, flags)]

    def pair(self, data: Path, *flags: Any) -> list[str]:
        return ["scripts/compute_prob.py", f"--output_dir={data}", "--pairs=2", *map(str, flags)]

    def train(self, data: Any = None, *flags: Any) -> list[str]:
        own = [f"--model={self.models / 'llama3'}", f"--dataset={data or self.train_rows()}"]
        own += [f"--output_dir={self.d / 'model'}", *preferences.SMALL, "--max_prompt_length=60", "--max_length=90"]
        return ["sppo/run_sppo.py", *own, *map(str, flags)]

    def loop(self, *flags: Any) -> list[str]:
        own = [f"--model={self.models / 'llama3'}", f"--prompts={self.good()}", f"--run_dir={self.d / 'run'}"]
        return ["scripts/plan.py", *own, "--gpus=none", *map(str, flags)]


# what is done to a file


def write(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text)


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(**changes: Any) -> Callable[[Path], Any]:
    """Change keys of a JSON file; None takes one away."""

    return lambda path: tiny.edit_json(path, **changes)


def weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Change the tensors of a safetensors file."""

    def spoil(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})

    return spoil


def pickled(path: Path) -> None:
    path.rename(path.with_name("pytorch_model.bin"))


def sharded(path: Path) -> None:
    """Weights in two shards of which the second is not there."""
    from safetensors import safe_open

    with safe_open(path, "pt") as tensors:
        names = list(tensors.keys())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    path.rename(path.with_name(first))
    where = {name: (first if i < len(names) - 1 else second) for i, name in enumerate(names)}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))
