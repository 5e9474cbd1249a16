"""Answers of one model to a set of prompts, drawn as in training: generate.py's shards, put together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from sppo.common.errors import SPPOError
from sppo.config import ROOT, Recipe, flags

_KEYS = (
    "trust_remote_code prompt_column prompt_split temperature top_p maxlen engine seed prompt_seeds system_prompt "
    "gpu_memory_utilization"
).split()


def draw(recipe: Recipe, out: Path, logs: Path, gpus: str, world_size: int, name: str) -> Path:
    """out/responses.parquet: recipe.pairs responses of recipe.model to each of recipe.prompts. `name`: of the logs."""
    common = flags(output_dir=out, pairs=recipe.pairs)
    settings = flags(**{k: getattr(recipe, k) for k in _KEYS}, world_size=world_size)
    settings += flags(model_revision=recipe.model_revision, prompts_revision=recipe.prompts_revision)
    settings += flags(chat_template_kwargs=json.dumps(recipe.chat_template_kwargs))
    generate = [sys.executable, str(ROOT / "scripts/generate.py"), *flags(model=recipe.model, prompts=recipe.prompts)]
    launch(gpus, world_size, logs, name, [*generate, *common, *settings])
    shards = len(list((out / "responses").glob("shard-*.manifest.json")))
    call([sys.executable, str(ROOT / "scripts/combine_generate.py"), *common, *flags(numgpu=shards)], name)
    return out / "responses.parquet"


def launch(gpus: str, world_size: int, logs: Path, name: str, command: list[str]) -> None:
    """Run a shard of `command` on each device. Raises SPPOError where one fails."""
    where = flags(name=name, gpus=gpus, logs=logs, world_size=world_size)
    call([sys.executable, "-m", "sppo.launch", "shards", *where, "--", *command], name)


def call(command: list[str], name: str) -> None:
    """Run a command to its end. Raises SPPOError, with what it said, where it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SPPOError(f"{name} failed:\n{done.stdout}")
