"""Answers of one model to a set of prompts, drawn as in training: generate.py's shards, put together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sppo.common.errors import SPPOError
from sppo.config import KEYS, ROOT, Recipe, flags


def draw(recipe: Recipe, out: Path, logs: Path, gpus: str, world_size: int, name: str, overwrite: bool = False) -> Path:
    """out/responses.parquet: recipe.pairs responses of recipe.model to each of recipe.prompts. `name`: of the logs."""
    generate = [sys.executable, str(ROOT / "scripts/generate.py"), *settings(recipe, "generate")]
    again = ["--overwrite"] * overwrite
    launch(gpus, world_size, logs, name, [*generate, *flags(output_dir=out, world_size=world_size), *again])
    shards = len(list((out / "responses").glob("shard-*.manifest.json")))
    combine = [sys.executable, str(ROOT / "scripts/combine_generate.py"), *settings(recipe, "combine_generate")]
    call([*combine, *flags(output_dir=out, numgpu=shards), *again], name)
    return out / "responses.parquet"


def settings(recipe: Recipe, script: str) -> list[str]:
    """The flags of all settings that a script reads."""
    return flags(**{key: getattr(recipe, key) for key in KEYS[script]})


def launch(gpus: str, world_size: int, logs: Path, name: str, command: list[str]) -> None:
    """Run a shard of `command` on each device. Raises SPPOError where one fails."""
    where = flags(name=name, gpus=gpus, logs=logs, world_size=world_size)
    call([sys.executable, "-m", "sppo.launch", "shards", *where, "--", *command], name)


def call(command: list[str], name: str) -> None:
    """Run a command to its end. Raises SPPOError, with what it said, where it fails."""
    # SPPO_CHILD: killed, this command leaves nothing running
    environment = {
        **os.environ,
        "SPPO_CHILD": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SPPOError(f"{name} failed:\n{done.stdout}")
