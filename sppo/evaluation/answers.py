"""Answers of one model to a set of prompts, drawn as in training: generate.py's shards, put together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sppo.cli import flags
from sppo.command.errors import INTERRUPTED, NO_OVERWRITE, SPPOError
from sppo.command.search_path import ROOT, search_path
from sppo.launch.resources import Place
from sppo.recipe import KEYS, Recipe


def draw(recipe: Recipe, out: Path, logs: Path, place: Place, name: str, overwrite: bool | None = None) -> Path:
    """out/responses.parquet: recipe.pairs responses of recipe.model to each of recipe.prompts. `name`: of the logs.

    overwrite: None where the command that asks has no such flag for its answers.
    """
    generate = [sys.executable, str(ROOT / "scripts/generate.py"), *settings(recipe, "generate")]
    again, told = ["--overwrite"] * bool(overwrite), {NO_OVERWRITE: "1"} if overwrite is None else {}
    shard = [*generate, *flags(output_dir=out, world_size=place.world_size), *again]
    launch([*place.flags(), *flags(shards_dir=out / "responses")], logs, name, shard, **told)
    combine = [sys.executable, str(ROOT / "scripts/combine_generate.py"), *settings(recipe, "combine_generate")]
    call([*combine, *flags(output_dir=out), *again], name, **told)
    return out / "responses.parquet"


def settings(recipe: Recipe, script: str) -> list[str]:
    """The flags of all settings that a script reads."""
    return flags(**{key: getattr(recipe, key) for key in KEYS[script]})


def launch(where: list[str], logs: Path, name: str, command: list[str], **more: str) -> None:
    """Run the shards of `command`; `where`: the launcher's flags. Raises SPPOError where one fails."""
    words = [sys.executable, "-m", "sppo.launch", "shards", *where, *flags(name=name, logs=logs)]
    call([*words, "--", *command], name, **more)


def call(command: list[str], name: str, **more: str) -> None:
    """Run a command to its end, with `more` in its environment.

    Raises SPPOError, with what it said, where it fails, KeyboardInterrupt where it was interrupted, or asked to stop.
    """
    # SPPO_CHILD: killed, this command leaves nothing running
    environment = {**os.environ, **search_path(), "SPPO_CHILD": "1", **more}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode:
        raise SPPOError(f"{name} failed:\n{done.stdout}")
