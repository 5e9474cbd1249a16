"""The whole run: for each iteration generate.sh, pipeline.sh and the report, each feeding the next.

Every stage decides for itself whether it is done, so the same command goes on where it stopped. With --org what was
made is pushed on the way; the Hub's failures stop nothing, and are what the run ends with.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path

import yaml

from sppo import config, hub
from sppo.config import ROOT, Recipe
from sppo.errors import INTERRUPTED, WRONG_USE, SPPOError, UsageError
from sppo.files import atomic, exclusive
from sppo.launch import devices, flags, groups, start, stop
from sppo.models import pinned


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Flags of the drivers: every key of the recipe, and the run's own."""
    made = config.make_parser(doc, [f.name for f in dataclasses.fields(Recipe)])
    made.add_argument("--name", help="name of the run and of its data sets on the Hub (default: the model's)")
    made.add_argument("--run_dir", type=Path, help="the run's directory (default: runs/<name>)")
    made.add_argument("--gpus", default="auto", help="0,2,5 or auto (default) or none")
    made.add_argument("--world_size", type=int, default=1, help="GPUs that one model is spread over in generation")
    made.add_argument("--accelerate_config", default="", help="YAML, or a name in recipes/accelerate_configs")
    made.add_argument("--dry_run", action="store_true", help="preflight, print what would be run, and stop")
    made.add_argument("--skip_preflight", action="store_true", help="start without scripts/doctor.py's checks")
    return made


def place(recipe: Recipe, args: argparse.Namespace) -> tuple[str, Path, list[str]]:
    """(the run's name, its directory, its devices). Raises UsageError for flags that contradict each other."""
    name = args.name or Path(recipe.model).name
    names = devices(args.gpus)
    groups(names, args.world_size)
    if recipe.split_prompts and "{iter}" in recipe.prompts:
        raise UsageError("--split_prompts splits one prompt set; these prompts already differ by {iter}")
    if (recipe.public or recipe.push_model) and not recipe.org:
        raise UsageError(f"--{'public' if recipe.public else 'push_model'} needs --org, where to push to")
    if recipe.org:
        hub.check_name(recipe.org, f"{name}-iter{recipe.iterations}")
    return name, args.run_dir or Path("runs") / name, names


def run(recipe: Recipe, args: argparse.Namespace, argv: list[str]) -> None:
    """All iterations into args.run_dir, after a preflight with the flags `argv`.

    A preflight that says no, or a stage that fails, ends the run with its exit code. A push that fails does not:
    SPPOError at the end names the commands that push what is missing.
    """
    name, run_dir, _ = place(recipe, args)
    if recipe.iterations > 1 and not recipe.split_prompts and "{iter}" not in recipe.prompts:
        print(f"loop: {recipe.prompts} is used whole in each of {recipe.iterations} iterations (see --split_prompts)")
    steps = [step for i in range(1, recipe.iterations + 1) for step in _iteration(recipe, args, name, run_dir, i)]
    code = 0 if args.skip_preflight else _preflight(run_dir, argv)
    if args.dry_run:
        for label, command, _ in steps:
            print(f"{label}: {shlex.join(command)}")
    if code or args.dry_run:
        raise SystemExit(code)
    unpushed = []
    with exclusive(run_dir):
        for label, command, settings in steps:
            if settings is not None:
                path, mine = settings
                _write_recipe(path, pinned(mine, run_dir / "iter1" / "data"))  # one ranker for all iterations
            code = _call(label, command)
            if code and (str(hub.SCRIPT) not in command or code in (WRONG_USE, INTERRUPTED)):
                print(f"=== {label}: failed; run the same command again to go on from here", file=sys.stderr)
                raise SystemExit(code)
            if code:
                print(f"=== {label}: failed; going on without", file=sys.stderr, flush=True)
                unpushed.append(shlex.join(command))
    print(f"done: {recipe.iterations} iterations; the last model is {run_dir / f'iter{recipe.iterations}' / 'model'}")
    if unpushed:
        raise SPPOError(
            "\n  ".join(["all is made and here, but not all is on the Hub; to push the rest, run:", *unpushed])
        )


Step = tuple[str, list[str], tuple[Path, Recipe] | None]


def _iteration(recipe: Recipe, args: argparse.Namespace, name: str, run_dir: Path, i: int) -> list[Step]:
    """(label, command, recipe to write first) of each step of iteration i."""
    here = run_dir / f"iter{i}"
    prompts = recipe.prompts.replace("{iter}", str(i))
    model = recipe.model if i == 1 else str(run_dir / f"iter{i - 1}" / "model")
    changes = {"model": model, "prompts": prompts, "seed": recipe.seed + i - 1}
    if i > 1:
        changes["model_revision"] = ""
    mine = dataclasses.replace(recipe, **changes)
    written = here / "recipe.yaml"
    common = flags(recipe=written, model=model, gpus=args.gpus)
    generate = ["bash", str(ROOT / "scripts/generate.sh"), *common]
    generate += flags(prompt=prompts, out_path=here / "data", world_size=args.world_size)
    if recipe.split_prompts:
        generate += flags(part=f"{i - 1}/{recipe.iterations}")
    train = ["bash", str(ROOT / "scripts/pipeline.sh"), *common, *flags(iter=i, dataset=here / "data")]
    train += flags(output_dir=here / "model", accelerate_config=args.accelerate_config)
    on_hub = (recipe.org, f"{name}-iter{i}", recipe.public)
    steps: list[Step] = [(f"iteration {i}: generate", generate, (written, mine))]
    if recipe.org:
        steps.append((f"iteration {i}: push the data", hub.command(*on_hub, output_dir=here / "data"), None))
    steps.append((f"iteration {i}: train", train, None))
    if recipe.push_model:
        steps.append((f"iteration {i}: push the model", hub.command(*on_hub, model_dir=here / "model"), None))
    if recipe.eval_prompts:
        report = [sys.executable, str(ROOT / "scripts/report.py"), *flags(recipe=written, run_dir=run_dir)]
        report += flags(
            base=recipe.model,
            model_revision=recipe.model_revision,
            iteration=i,
            seed=recipe.seed,
            gpus=args.gpus,
            world_size=args.world_size,
        )
        steps.append((f"iteration {i}: report", report, None))
    return steps


def _preflight(run_dir: Path, argv: list[str]) -> int:
    """The exit code of scripts/doctor.py, in a process of its own: what it imports and holds of a GPU goes with it.

    In a run that has begun nobody else may be at work; in none, nothing is written.
    """
    with exclusive(run_dir) if (run_dir / ".lock").exists() else contextlib.nullcontext():
        return _wait([sys.executable, str(ROOT / "scripts/doctor.py"), *argv])


def _write_recipe(path: Path, recipe: Recipe) -> None:
    """The iteration's complete settings: what `generate.sh --recipe` and `pipeline.sh --recipe` read."""
    with atomic(path) as temporary:
        temporary.write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False), encoding="utf-8")


def _call(label: str, command: list[str]) -> int:
    """Run a step; returns its exit code."""
    started = time.monotonic()
    print(f"\n=== {label}", flush=True)
    code = _wait(command)
    if code == 0:
        print(f"=== {label}: {time.monotonic() - started:.0f} s", flush=True)
    return code


def _wait(command: list[str]) -> int:
    """Run a command to its end; returns its exit code, for a signal as a shell tells it."""
    os.environ.setdefault("PYTHON", sys.executable)
    sys.stdout.flush()
    process = start(command, None, None)
    try:
        code = process.wait()
    except BaseException:
        stop([process])
        raise
    return code if code >= 0 else 128 - code
