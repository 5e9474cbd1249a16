"""What scripts/plan.py does before a run: refuse what cannot work, and write each iteration's recipe."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import time
from pathlib import Path

from sppo import cli, iterations
from sppo.command import stopping
from sppo.command.errors import NO_OVERWRITE, UsageError
from sppo.launch.devices import CPU
from sppo.launch.slurm import in_allocation
from sppo.launch.submit import submit
from sppo.recipe import Recipe
from sppo.store.files import exclusive, has_begun


def driver_parser(doc: str | None) -> cli.Parser:
    """The flags of the drivers: every setting, and what the preflight is to do."""
    parser = cli.make_parser(doc, [field.name for field in dataclasses.fields(Recipe)])
    parser.prog = "bash scripts/run.sh"
    parser.add_argument(
        "--dry_run", action="store_true", help="preflight, print what would be run where it is ready, and stop"
    )
    parser.add_argument("--skip_preflight", action="store_true", help="start without scripts/doctor.py's checks")
    return parser


def plan(recipe: Recipe, args: argparse.Namespace, argv: list[str]) -> None:
    """Look at the run that `recipe` asks for, and write the recipes of its iterations that have work left.

    args: dry_run, skip_preflight, plan (see scripts/plan.py); argv: the flags, as they were given. Raises
    OtherWorkError where the run would meet work of other settings, SystemExit where the preflight says no.
    """
    whole = iterations.opened(recipe)
    run_dir = Path(whole.run_dir)
    os.environ[NO_OVERWRITE] = "1"
    argv = [word for word in argv if not word.startswith("--plan=")]
    if whole.launcher == "slurm" and not in_allocation():
        submit(whole, argv, args.dry_run)
        return
    if whole.iterations > 1 and not whole.split_prompts and "{iter}" not in whole.prompts:
        print(f"plan: {whole.prompts} is used whole in each of {whole.iterations} iterations (see --split_prompts)")

    # nobody else may be at work in a run that has begun; a run that has not is not touched
    with exclusive(run_dir) if has_begun(run_dir) else contextlib.nullcontext():
        asked = stop_file(run_dir)
        old_request = asked.exists()  # one that comes during the preflight is for this start
        recipes = [iterations.iteration(whole, number) for number in range(1, whole.iterations + 1)]
        _require_files(whole, recipes)
        left = iterations.left(recipes, whole)
        problems = 0 if args.skip_preflight else preflight(whole)
        if args.dry_run and not problems:
            _print_commands(left)
        if problems or args.dry_run:
            raise SystemExit(min(1, problems))

    with exclusive(run_dir):
        if old_request:
            asked.unlink(missing_ok=True)
        # the win matrix reads the first one, and so does who makes a report by hand
        is_first_read = whole.evaluate or not iterations.path_of(recipes[0]).exists()
        for mine in recipes[:1] + left if left and is_first_read else left:
            iterations.write(mine)
        _note_command(run_dir, argv)
        planned = iterations.digest_of_recipes([iterations.path_of(mine) for mine in left])
    if args.plan:
        lines = [run_dir, planned, *map(iterations.path_of, left)]
        args.plan.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogateescape")


def stop_file(run_dir: Path) -> Path:
    """The file that asks a run to stop."""
    return Path(os.environ.get(stopping.VARIABLE) or run_dir.absolute() / "stop")


def _require_files(whole: Recipe, recipes: list[Recipe]) -> None:
    """Raise for files that are gone: the preflight looks only at what is left to do, and what was made of them, or of
    others, may be there.
    """
    from sppo.generation.extras import extras_file

    for mine in recipes:
        if mine.extra_responses and (Path(mine.data_dir) / "train.manifest.json").exists():
            extras_file(mine.extra_responses)
    held_out = Path(whole.eval_prompts)
    is_file = held_out.suffix in (".parquet", ".jsonl", ".csv")
    if has_begun(Path(whole.run_dir)) and is_file and not held_out.exists():
        raise UsageError(f"--eval_prompts {held_out}: no such file")


def preflight(whole: Recipe) -> int:
    """Look at everything that an opened recipe needs, and print it; returns how many problems there are."""
    from sppo.preflight.verdict import open_run, report

    opened = open_run(whole)
    os.environ["CUDA_VISIBLE_DEVICES"] = CPU  # what is tried here is tried on the CPU; the GPUs stay free
    return report(opened)


def _print_commands(left: list[Recipe]) -> None:
    """What a run would do: its recipes are written when it begins."""
    for recipe in left:
        path = shlex.quote(str(iterations.path_of(recipe)))
        print(f"iteration {recipe.iteration}: {recipe.model} answers {recipe.prompts}, and becomes {recipe.model_dir}:")
        print(f"  bash scripts/generate.sh --recipe {path}")
        print(f"  bash scripts/pipeline.sh --recipe {path}")
        print(f"  python scripts/report.py --recipe {path}")


def _note_command(run_dir: Path, argv: list[str]) -> None:
    """Keep what this run was started with, for its page."""
    log = run_dir / "logs" / "commands.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as out:
        out.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} bash scripts/run.sh {shlex.join(argv)}\n")
