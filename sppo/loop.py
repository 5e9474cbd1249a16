"""The whole run: for each iteration generate.sh, pipeline.sh and the report, each feeding the next.

Every stage decides for itself whether it is done, so the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

import yaml

from sppo import config
from sppo.config import ROOT, Recipe
from sppo.errors import UsageError
from sppo.files import atomic, exclusive
from sppo.launch import devices, flags, groups, start, stop


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Flags of the drivers: every key of the recipe, and the run's own."""
    made = config.make_parser(doc, [f.name for f in dataclasses.fields(Recipe)])
    made.add_argument("--name", help="name of the run and of its data sets on the Hub (default: the model's)")
    made.add_argument("--run_dir", type=Path, help="the run's directory (default: runs/<name>)")
    made.add_argument("--gpus", default="auto", help="0,2,5 or auto (default) or none")
    made.add_argument("--world_size", type=int, default=1, help="GPUs that one model is spread over in generation")
    made.add_argument("--accelerate_config", default="", help="YAML, or a name in recipes/accelerate_configs")
    made.add_argument("--dry_run", action="store_true", help="print what would be run, and stop")
    return made


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """All iterations into args.run_dir. A stage that fails ends the run with its exit code."""
    name = args.name or Path(recipe.model).name
    run_dir = args.run_dir or Path("runs") / name
    names = devices(args.gpus)
    groups(names, args.world_size)
    if recipe.iterations > 1 and not recipe.split_prompts and "{iter}" not in recipe.prompts:
        print(f"loop: {recipe.prompts} is used whole in each of {recipe.iterations} iterations (see --split_prompts)")
    if recipe.split_prompts and "{iter}" in recipe.prompts:
        raise UsageError("--split_prompts splits one prompt set; these prompts already differ by {iter}")
    steps = [step for i in range(1, recipe.iterations + 1) for step in _iteration(recipe, args, name, run_dir, i)]
    if args.dry_run:
        for label, command, _ in steps:
            print(f"{label}: {' '.join(command)}")
        return
    with exclusive(run_dir):
        for label, command, settings in steps:
            if settings is not None:
                _write_recipe(*settings)
            _call(label, command)
    print(f"done: {recipe.iterations} iterations; the last model is {run_dir / f'iter{recipe.iterations}' / 'model'}")


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
    if recipe.org:
        generate += flags(org=recipe.org, name=f"{name}-iter{i}")
    train = ["bash", str(ROOT / "scripts/pipeline.sh"), *common, *flags(iter=i, dataset=here / "data")]
    train += flags(output_dir=here / "model", accelerate_config=args.accelerate_config)
    steps: list[Step] = [
        (f"iteration {i}: generate", generate, (written, mine)),
        (f"iteration {i}: train", train, None),
    ]
    if recipe.eval_prompts:
        report = [sys.executable, str(ROOT / "scripts/report.py"), *flags(recipe=written, run_dir=run_dir)]
        report += flags(base=recipe.model, iteration=i, seed=recipe.seed, gpus=args.gpus, world_size=args.world_size)
        steps.append((f"iteration {i}: report", report, None))
    return steps


def _write_recipe(path: Path, recipe: Recipe) -> None:
    """The iteration's complete settings: what `generate.sh --recipe` and `pipeline.sh --recipe` read."""
    with atomic(path) as temporary:
        temporary.write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False), encoding="utf-8")


def _call(label: str, command: list[str]) -> None:
    started = time.monotonic()
    print(f"\n=== {label}", flush=True)
    os.environ.setdefault("PYTHON", sys.executable)
    process = start(command, None, None)
    try:
        code = process.wait()
    except BaseException:
        stop([process])
        raise
    if code:
        print(f"=== {label}: failed; run the same command again to go on from here", file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)
    print(f"=== {label}: {time.monotonic() - started:.0f} s", flush=True)
