"""The whole run: for each iteration generate.sh, pipeline.sh and the report, each feeding the next.

A step that is done is skipped. Any other step runs, and each of its stages finds out what is left to do; so the same
command goes on where it stopped. With --org the data is pushed on the way. A push that fails does not stop the run; the
run then ends with an error that says what to push.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sppo import cli
from sppo.cli import flags
from sppo.command import stopping
from sppo.command.errors import INTERRUPTED, NO_OVERWRITE, WRONG_USE, OtherWorkError, SPPOError, UsageError
from sppo.command.search_path import ROOT
from sppo.hub.push import SCRIPT, check_name
from sppo.hub.push import command as push_command
from sppo.launch.devices import devices, groups
from sppo.launch.processes import start, stop
from sppo.launch.resources import Place, add_place_flags
from sppo.launch.slurm import in_allocation
from sppo.launch.submit import submit
from sppo.recipe import KEYS, Recipe, require_pairs
from sppo.store.files import atomic, exclusive, has_begun, read_json
from sppo.store.manifest import Stage
from sppo.store.shards import Slice, as_begun, known_count

Stages = Iterator[list[Stage]]  # those of one group were made beside each other, from the groups before them


@dataclass
class Step:
    """One step of an iteration: its command, the settings that it reads, and the stages that it consists of.

    `stages` may raise SPPOError or FileNotFoundError where what they stand on is not there; a step without them decides
    for itself. `ends_with`: files without which it is not done, whatever its stages say.
    """

    label: str
    command: list[str]
    recipe: tuple[Path, Recipe] | None = None  # written when the step begins
    stages: Callable[[], Iterable[list[Stage]]] | None = None
    ends_with: tuple[Path, ...] = ()
    is_shown: bool = False  # report.html is made anew behind it

    def is_done(self) -> bool:
        if self.stages is None or not all(path.exists() for path in self.ends_with):
            return False
        try:
            return all(stage.stands() for group in self.stages() for stage in group)
        except (SPPOError, FileNotFoundError):
            return False


def refuse_others(steps: list[Step]) -> None:
    """Raise OtherWorkError where a step would meet work of other settings. Asks, before anything is written.

    As far as the steps stand: what is made of files that are missing or damaged is known when these are made again.
    """
    for step in steps:
        try:
            for group in step.stages() if step.stages else ():
                for stage in group:
                    stage.refuse_others()
                if not all(stage.stands() for stage in group):
                    return
        except (OtherWorkError, UsageError):
            raise
        except (SPPOError, FileNotFoundError):
            return


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Flags of the drivers: every key of the recipe, and the run's own."""
    made = cli.make_parser(doc, [f.name for f in dataclasses.fields(Recipe)])
    made.add_argument("--name", help="name of the run and of its data sets on the Hub (default: the model's)")
    made.add_argument("--run_dir", type=Path, help="the run's directory (default: runs/<name>)")
    add_place_flags(made)
    made.add_argument(
        "--gpus_per_node", type=int, default=0, help="slurm: GPUs that the submitted job asks for on a node"
    )
    made.add_argument("--sbatch", default="", help='slurm: more of sbatch\'s flags: "--partition=gpu --time=12:00:00"')
    made.add_argument("--accelerate_config", default="", help="YAML, or a name in recipes/accelerate_configs")
    made.add_argument("--evaluate", action="store_true", help="at the end, all iterations' models against each other")
    made.add_argument("--dry_run", action="store_true", help="preflight, print what would be run, and stop")
    made.add_argument("--skip_preflight", action="store_true", help="start without scripts/doctor.py's checks")
    return made


def place(recipe: Recipe, args: argparse.Namespace) -> tuple[str, Path, Place]:
    """(the run's name, its directory, where its processes go). Raises UsageError for flags that clash."""
    require_pairs(recipe)
    name = args.name or Path(recipe.model).name
    where = Place.of(args)
    if where.launcher == "local":
        groups(devices(where.gpus), where.world_size)
    if where.launcher != "slurm" and (args.gpus_per_node or args.sbatch):
        raise UsageError("--gpus_per_node and --sbatch are for --launcher slurm")
    if recipe.split_prompts and "{iter}" in recipe.prompts:
        raise UsageError("--split_prompts splits one prompt set; these prompts already differ by {iter}")
    if args.evaluate and not recipe.eval_prompts:
        raise UsageError("--evaluate needs --eval_prompts, the held-out prompts on which the models are compared")
    if (recipe.public or recipe.push_model) and not recipe.org:
        raise UsageError(f"--{'public' if recipe.public else 'push_model'} needs --org, where to push to")
    if recipe.org:
        check_name(recipe.org, f"{name}-iter{recipe.iterations}")
    return name, args.run_dir or Path("runs") / name, where


def run(recipe: Recipe, args: argparse.Namespace, argv: list[str]) -> None:
    """All iterations into args.run_dir, after a preflight with the flags `argv`.

    A preflight that says no, or a stage that fails, ends the run with its exit code. A push that fails does not:
    SPPOError at the end names the commands that push what is missing.
    """
    name, run_dir, where = place(recipe, args)
    os.environ[NO_OVERWRITE] = "1"
    if where.launcher == "slurm" and not in_allocation():
        submit(args, name, run_dir, argv)
        return
    if recipe.iterations > 1 and not recipe.split_prompts and "{iter}" not in recipe.prompts:
        print(f"loop: {recipe.prompts} is used whole in each of {recipe.iterations} iterations (see --split_prompts)")
    steps = [step for i in range(1, recipe.iterations + 1) for step in _iteration(recipe, args, name, run_dir, i)]
    if args.evaluate:
        steps.append(_matrix_step(recipe, run_dir, steps[0].recipe))
    refuse_others(steps)
    held_out = Path(recipe.eval_prompts)
    if has_begun(run_dir) and held_out.suffix in (".parquet", ".jsonl", ".csv") and not held_out.exists():
        # the preflight looks only at what is left to do, and the answers to other prompts may be there
        raise UsageError(f"--eval_prompts {held_out}: no such file")
    stop_file = Path(os.environ.get(stopping.VARIABLE) or run_dir.absolute() / "stop")
    old_request = stop_file.exists()  # one that comes during the preflight is for this start
    code = 0 if args.skip_preflight else _preflight(run_dir, argv)
    if args.dry_run:
        for step in steps:
            print(f"{step.label}: {shlex.join(step.command)}")
    if code or args.dry_run:
        raise SystemExit(code)
    os.environ.setdefault(stopping.VARIABLE, str(stop_file))
    with exclusive(run_dir):
        if old_request:
            stop_file.unlink(missing_ok=True)
        _note_command(run_dir, argv)
        unpushed = _run_steps(steps, run_dir)
    if recipe.eval_prompts:
        from sppo.evaluation.report import print_table

        print_table(read_json(run_dir / "summary.json"))
    if args.evaluate:
        from sppo.evaluation.matrix import print_matrix

        print_matrix(read_json(run_dir / "matrix.json"))
    print(f"report: {run_dir / 'report.html'}")
    print(f"done: {recipe.iterations} iterations; the last model is {run_dir / f'iter{recipe.iterations}' / 'model'}")
    if unpushed:
        raise SPPOError(
            "\n  ".join(["all is made and here, but not all is on the Hub; to push the rest, run:", *unpushed])
        )


def _run_steps(steps: list[Step], run_dir: Path) -> list[str]:
    """Run what is not done; returns the commands of the pushes that failed."""
    from sppo.rankers.pinning import pinned

    unpushed = []
    for step in steps:
        if step.is_done():
            print(f"=== {step.label}: done", flush=True)
            continue
        stopping.end_if_asked()
        if step.recipe is not None:
            path, mine = step.recipe
            _write_recipe(path, pinned(mine, run_dir / "iter1" / "data"))  # one ranker for all iterations
        code = _call(step.label, step.command)
        if code == INTERRUPTED and stopping.stop_asked():
            print(f"=== {step.label}: stopped, as asked; run the same command to go on from here", flush=True)
            raise SystemExit(code)
        if code and (str(SCRIPT) not in step.command or code in (WRONG_USE, INTERRUPTED)):
            print(f"=== {step.label}: failed; run the same command again to go on from here", file=sys.stderr)
            raise SystemExit(code)
        if code:
            print(f"=== {step.label}: failed; going on without", file=sys.stderr, flush=True)
            unpushed.append(shlex.join(step.command))
        if step.is_shown and _make_page(run_dir):
            print("=== report: no page yet; the run goes on", file=sys.stderr, flush=True)
    if code := _make_page(run_dir):
        raise SystemExit(code)
    return unpushed


def _make_page(run_dir: Path) -> int:
    """Make report.html where something is newer than it; the exit code."""
    page = run_dir / "report.html"
    made = page.stat().st_mtime if page.exists() else 0.0
    if all(manifest.stat().st_mtime <= made for manifest in run_dir.rglob("*manifest.json")):
        return 0
    return _call("report", [sys.executable, str(ROOT / "scripts/report.py"), *flags(run_dir=run_dir)])


def _note_command(run_dir: Path, argv: list[str]) -> None:
    """Keep what this run was started with, for its report."""
    log = run_dir / "logs" / "commands.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as out:
        out.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} python scripts/run.py {shlex.join(argv)}\n")


def _iteration(recipe: Recipe, args: argparse.Namespace, name: str, run_dir: Path, i: int) -> list[Step]:
    """The steps of iteration i."""
    here = run_dir / f"iter{i}"
    prompts = recipe.prompts.replace("{iter}", str(i))
    model = recipe.model if i == 1 else str(run_dir / f"iter{i - 1}" / "model")
    changes = {"model": model, "prompts": prompts, "seed": recipe.seed + i - 1}
    if recipe.anchor and not recipe.anchor_model:
        changes |= {"anchor_model": recipe.model, "anchor_revision": recipe.model_revision}
    if i > 1:
        changes["model_revision"] = ""
    mine = dataclasses.replace(recipe, **changes)
    part = (i - 1, recipe.iterations) if recipe.split_prompts else (0, 1)
    written = here / "recipe.yaml"
    where = Place.of(args)
    generate = ["bash", str(ROOT / "scripts/generate.sh"), *flags(recipe=written, model=model), *where.flags()]
    generate += flags(prompt=prompts, out_path=here / "data")
    if recipe.split_prompts:
        generate += flags(part=f"{part[0]}/{part[1]}")
    training = flags(recipe=written, model=model, iter=i, dataset=here / "data", output_dir=here / "model")
    train = ["bash", str(ROOT / "scripts/pipeline.sh"), *training, *where.flags(world_size=False)]
    train += flags(accelerate_config=args.accelerate_config)
    on_hub = (recipe.org, f"{name}-iter{i}", recipe.public)
    read = (written, mine)
    data, model_there = here / "data" / "train.manifest.json", here / "model" / "sppo_manifest.json"
    drawn, trained = (lambda: _data_stages(mine, args, here, part)), (lambda: _training_stages(mine, args, here))
    steps = [
        Step(f"iteration {i}: generate", generate, read, drawn, (data,)),
        Step(f"iteration {i}: push the data", push_command(*on_hub, output_dir=here / "data")),
        Step(f"iteration {i}: train", train, read, trained, (model_there,), is_shown=True),
        Step(f"iteration {i}: push the model", push_command(*on_hub, model_dir=here / "model")),
    ]
    wanted = (True, bool(recipe.org), True, recipe.push_model)
    steps = [step for step, is_wanted in zip(steps, wanted, strict=True) if is_wanted]
    if recipe.eval_prompts:
        report = [sys.executable, str(ROOT / "scripts/report.py"), *flags(recipe=written, run_dir=run_dir)]
        report += flags(base=recipe.model, model_revision=recipe.model_revision, iteration=i, seed=recipe.seed)
        report += where.flags()
        stages = lambda: _report_stages(recipe, mine, args, run_dir, i)  # noqa: E731 - as for the other steps
        ends_with = (here / "eval" / "report.manifest.json", run_dir / "summary.json")
        steps.append(Step(f"iteration {i}: report", report, read, stages, ends_with))
    return steps


def _matrix_step(recipe: Recipe, run_dir: Path, read: tuple[Path, Recipe]) -> Step:
    """The step behind the last iteration: all models against each other. `read`: the first iteration's recipe."""
    command = [sys.executable, str(ROOT / "scripts/win_matrix.py")]
    command += flags(recipe=read[0], run_dir=run_dir, judge=recipe.judge)

    def stages() -> Stages:
        from sppo.evaluation.matrix import match_stages, matrix_stage

        yield match_stages(recipe, run_dir)
        yield [matrix_stage(recipe, run_dir)]

    return Step("win matrix", command, read, stages, (run_dir / "matrix.json",))


def _drawing_stages(recipe: Recipe, args: argparse.Namespace, data: Path, part: tuple[int, int]) -> Stages:
    """The stages of generation: each shard, and the shards put together."""
    from sppo.generation.combine import combine_stage
    from sppo.generation.source import Source

    if not (data / "responses").exists():
        raise SPPOError(f"{data} is not begun")
    source, count = Source.of(recipe, part, data), known_count(data / "responses")
    count = count or len(groups(devices(args.gpus), args.world_size))  # a version that kept no count had one a device
    slices = as_begun([Slice(0, i, count) for i in range(count)], data / "responses")
    yield [source.stage(data, part) for part in slices]
    yield [combine_stage(data, count, recipe.pairs)]


def _data_stages(recipe: Recipe, args: argparse.Namespace, here: Path, part: tuple[int, int]) -> Stages:
    """The stages of generate.sh."""
    from sppo.pairing.training_set import pairing_stage
    from sppo.rankers.pinning import pinned
    from sppo.ranking.shards import rank_stage

    data = here / "data"
    recipe = pinned(recipe, here.parent / "iter1" / "data")
    yield from _drawing_stages(recipe, args, data, part)
    count = known_count(data / "ranking") or len(devices(args.gpus))
    slices = as_begun([Slice(0, i, count) for i in range(count)], data / "ranking")
    yield [rank_stage(recipe, data, part) for part in slices]
    yield [pairing_stage(recipe, data)]


def _training_stages(recipe: Recipe, args: argparse.Namespace, here: Path) -> Stages:
    """The stage of pipeline.sh."""
    from sppo.training.launching import training_config
    from sppo.training.settings import prepare

    asked = flags(**{key: getattr(recipe, key) for key in KEYS["train"]})
    asked += flags(dataset=here / "data", output_dir=here / "model")
    is_local = args.launcher == "local"
    made = prepare(asked, training_config(devices(args.gpus), args.accelerate_config)[2] if is_local else 1)
    if made.recipe.accumulate and not is_local:
        raise SPPOError("how many rows a step has depends on the cluster's devices")
    made.refuse_others()
    if made.work.exists():
        raise SPPOError(f"{here / 'model'} is not whole")
    yield [made.stage]


def _report_stages(recipe: Recipe, iteration: Recipe, args: argparse.Namespace, run_dir: Path, i: int) -> Stages:
    """The stages of scripts/report.py: the base's answers, iteration i's, and their comparison."""
    from sppo.evaluation.match import judges, match_stage
    from sppo.evaluation.measures import measure_stage
    from sppo.evaluation.report import comparing, report_stage, summary_rows

    here = run_dir / f"iter{i}"
    base = dataclasses.replace(recipe, prompts=recipe.eval_prompts, prompts_revision="", pairs=recipe.eval_pairs)
    after = dataclasses.replace(base, model=str(here / "model"), model_revision="")
    yield from _drawing_stages(base, args, run_dir / "iter0" / "eval", (0, 1))
    yield from _drawing_stages(after, args, here / "eval", (0, 1))
    by = comparing(dataclasses.replace(iteration, model_revision=recipe.model_revision), run_dir, i, recipe.model)
    yield [match_stage(one, name, run_dir, 0, i) for name, one in judges(by).items()]
    yield [measure_stage(recipe, run_dir / f"iter{n}" / "eval", recipe.model) for n in (0, i)]
    yield [report_stage(by, run_dir, i)]
    if read_json(run_dir / "summary.json") != summary_rows(run_dir):
        raise SPPOError(f"{run_dir / 'summary.json'} is not what the reports say")


def _preflight(run_dir: Path, argv: list[str]) -> int:
    """The exit code of scripts/doctor.py, in a process of its own: what it imports and holds of a GPU goes with it.

    In a run that has begun nobody else may be at work; in a run that has not, nothing is written.
    """
    with exclusive(run_dir) if has_begun(run_dir) else contextlib.nullcontext():
        return _wait([sys.executable, str(ROOT / "scripts/doctor.py"), *argv])


def _write_recipe(path: Path, recipe: Recipe) -> None:
    """The iteration's complete settings: what `generate.sh --recipe` and `pipeline.sh --recipe` read."""
    import yaml

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
