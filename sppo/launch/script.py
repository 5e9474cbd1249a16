"""What scripts/launch.py does: from a script and its flags to its processes."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from sppo import cli
from sppo.command.errors import UsageError
from sppo.command.search_path import ROOT
from sppo.launch.nodes import check_machines
from sppo.launch.watch import Launcher, run_shards, run_training
from sppo.recipe import KEYS, Recipe
from sppo.store.locks import alone

_SHARDS = {"scripts/generate.py": "responses", "scripts/rank.py": "ranking"}  # where in $DATA their shards appear
_TRAINING = "sppo/run_sppo.py"


def open_launcher(recipe: Recipe) -> Launcher:
    """The launcher that a recipe names. Raises UsageError, or SPPOError where its cluster is not there."""
    return importlib.import_module(f"sppo.launch.{recipe.launcher}").Launcher(recipe)


def launch(argv: list[str], doc: str | None) -> None:
    """Run the script that `argv` begins with, with the flags behind it, over the devices that the flags name.

    --label=X in front of the script is the stage's name in messages and logs.
    """
    label = argv.pop(0).removeprefix("--label=") if argv and argv[0].startswith("--label=") else ""
    script = argv[0] if argv else ""
    is_training = script == _TRAINING
    parser = cli.chain_parser(doc, KEYS["launch"], "model_dir" if is_training else "data_dir")
    if not is_training and script not in _SHARDS:
        parser.parse_args(argv)  # --help ends here, and a typo
        raise UsageError(f"the first argument is the script to run: {', '.join([*_SHARDS, _TRAINING])}")
    args, recipe = cli.parse(parser, argv[1:])

    if is_training:
        model_dir = cli.require_dir("--output_dir", recipe.model_dir)
        _refuse_useless_push(recipe, cli.given(parser, args))
        launcher = _opened(recipe, logs := args.logs or model_dir.parent / "logs")
        run_training(launcher, recipe, args.overwrite, logs, argv[1:])
        return

    # of the stages, generation alone spreads one model over several GPUs
    stage = Path(script).stem
    data_dir = cli.data_dir_of(recipe)
    if stage != "generate":
        recipe = dataclasses.replace(recipe, world_size=1)
    shards_dir = data_dir / _SHARDS[script]
    launcher = _opened(recipe, logs := args.logs or data_dir.parent / "logs")
    command = [sys.executable, str(ROOT / script), *argv[1:]]
    if stage != "generate" and args.frac_len:
        command.append("--frac_len=0")  # it is generation's: the rows are those of all its shards
    with _only_launcher(shards_dir):
        run_shards(launcher, recipe.shards, shards_dir, logs, label or stage, command)


def _opened(recipe: Recipe, logs: Path) -> Launcher:
    launcher = open_launcher(recipe)
    if recipe.launcher != "local":
        check_machines(launcher, logs)
    return launcher


def _only_launcher(shards_dir: Path) -> AbstractContextManager[None]:
    """Hold the lock on the shards in a directory. Nobody can be making shards where nobody can write."""
    if shards_dir.exists() and not os.access(shards_dir, os.W_OK):
        return nullcontext()
    return alone(shards_dir / "launch.lock", f"is at work on the shards in {shards_dir}")


def _refuse_useless_push(recipe: Recipe, given: dict[str, object]) -> None:
    """Raise UsageError, before the training, for a push that is half asked for."""
    if recipe.push_model and not recipe.name:
        raise UsageError("--push_model needs --org and --name, where to push to")
    if not recipe.push_model and {"org", "name", "public"} & given.keys():
        raise UsageError("--org, --name and --public are for --push_model")
