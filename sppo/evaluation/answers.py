"""Answers of one model to a set of prompts, drawn as in training: generate.py's shards, put together."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from sppo.cli import flags
from sppo.command.errors import INTERRUPTED, NO_OVERWRITE, SPPOError
from sppo.command.search_path import ROOT, search_path
from sppo.recipe import KEYS, Recipe


def draw(recipe: Recipe, out: Path, logs: Path, name: str, overwrite: bool | None = None) -> Path:
    """out/responses.parquet: recipe.pairs responses of recipe.model to each of recipe.prompts. `name`: of the logs.

    overwrite: None where the command that asks has no such flag for its answers.
    """
    # what other models answer to the training's prompts has no place here
    recipe = dataclasses.replace(recipe, data_dir=str(out), extra_responses="")
    told = {NO_OVERWRITE: "1"} if overwrite is None else {}
    launch(recipe, "generate", logs, name, bool(overwrite), **told)
    call("combine_generate", settings(recipe, "combine_generate"), name, bool(overwrite), **told)
    return out / "responses.parquet"


def settings(recipe: Recipe, script: str) -> list[str]:
    """The flags of all settings that a script reads."""
    return flags(**{key: getattr(recipe, key) for key in KEYS[script]})


def launch(recipe: Recipe, script: str, logs: Path, name: str, overwrite: bool, **more: str) -> None:
    """Run scripts/<script>.py (generate or rank) over all devices of the recipe, with what it reads, and where.

    Raises SPPOError where a process fails.
    """
    keys = dict.fromkeys([*KEYS["launch"], *KEYS[script]])
    asked = flags(**{key: getattr(recipe, key) for key in keys}, logs=logs)
    call("launch", [f"--label={name}", f"scripts/{script}.py", *asked], name, overwrite, **more)


def call(script: str, words: list[str], name: str, overwrite: bool, **more: str) -> None:
    """Run scripts/<script>.py to its end, with `more` in its environment.

    Raises SPPOError, with what it said, where it fails, KeyboardInterrupt where it was interrupted, or asked to stop.
    """
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words]
    if overwrite:
        command.append("--overwrite")
    # SPPO_CHILD: killed, this command leaves nothing running
    environment = {**os.environ, **search_path(), "SPPO_CHILD": "1", **more}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode:
        raise SPPOError(f"{name} failed, see above\n{done.stdout}".strip())
