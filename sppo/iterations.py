"""A run: the recipe of each iteration, what of it is left to do, and whether it may begin.

scripts/plan.py asks this before anything is written. The work itself is scripts/run.sh's: for each iteration
generate.sh, pipeline.sh and the report, each with that iteration's recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import yaml

from sppo.command.errors import OtherWorkError, SPPOError, UsageError
from sppo.hub.push import check_name
from sppo.launch.devices import devices, groups
from sppo.recipe import Recipe, load_recipe, read_yaml, reads_anchor, require_pairs
from sppo.store.files import atomic, digest_of, read_json
from sppo.store.manifest import Stage
from sppo.store.shards import Slice, known_count

Stages = Iterator[list[Stage]]  # those of one group are made beside each other, from the groups before them
_OF_A_DRIVER = ("iteration", "prompts_part", "data_dir", "dataset", "model_dir")


def opened(recipe: Recipe) -> Recipe:
    """The recipe of a run, with its name, directory and date. Raises UsageError for settings that clash in a run."""
    require_pairs(recipe)
    for key in _OF_A_DRIVER:
        if getattr(recipe, key) != getattr(Recipe, key):
            raise UsageError(
                f"--{key} {getattr(recipe, key)!r} is for one iteration by hand; a run sets it for each of its "
                "iterations. A --recipe that an iteration has written is for generate.sh, pipeline.sh and report.py"
            )
    name = recipe.name or Path(recipe.model).name
    if recipe.launcher == "local":
        groups(devices(recipe.gpus), recipe.world_size)
    if recipe.split_prompts and "{iter}" in recipe.prompts:
        raise UsageError("--split_prompts splits one prompt set; these prompts already differ by {iter}")
    if recipe.evaluate and not recipe.eval_prompts:
        raise UsageError("--evaluate needs --eval_prompts, the held-out prompts on which the models are compared")
    if recipe.judge and not recipe.eval_prompts:
        raise UsageError("--judge needs --eval_prompts, the held-out prompts whose answers it compares")
    if recipe.stop_when == "judge" and not recipe.judge:
        raise UsageError(
            "--stop_when judge needs --judge, a second judge that says when the model gets worse, and --eval_prompts, "
            "the held-out prompts whose answers it compares; --stop_when none runs without"
        )
    if recipe.org:
        check_name(recipe.org, f"{name}-iter{recipe.iterations}")
    run_dir = recipe.run_dir or str(Path("runs") / name)
    if "\n" in run_dir or run_dir.startswith("-"):
        raise UsageError(f"--run_dir {run_dir!r} begins with - or has more than one line; name it by its whole path")
    opened = dataclasses.replace(recipe, name=name, run_dir=run_dir)
    return dataclasses.replace(
        opened, date=recipe.date or _date_of_run(opened), thinking_tags=_thinking_tags_of_run(opened)
    )


def _date_of_run(recipe: Recipe) -> str:
    """The date that the run's first start has fixed for chat templates; today where this is the first.

    Empty for a run of an older version, which goes on without one.
    """
    from sppo.generation.source import as_begun

    first = path_of(dataclasses.replace(recipe, iteration=1))
    if first.exists():
        return load_recipe(first).date
    return as_begun(recipe, first.parent / "data").date


def _thinking_tags_of_run(recipe: Recipe) -> str:
    """--thinking_tags; `off` in a run of an older version, which told no thought apart, and goes on so."""
    first = path_of(dataclasses.replace(recipe, iteration=1))
    if recipe.thinking_tags != "auto" or recipe.thinking_budget or not first.exists():
        return recipe.thinking_tags
    written = read_yaml(first.read_text(encoding="utf-8")) or {}
    return "off" if written.get("thinking_tags", "off") == "off" else "auto"


def iteration(recipe: Recipe, number: int) -> Recipe:
    """The recipe of one iteration of an opened run: its model is the one that the iteration before trained."""
    run_dir = Path(recipe.run_dir)
    here = run_dir / f"iter{number}"
    mine = dataclasses.replace(
        recipe,
        name=f"{recipe.name}-iter{number}",
        iteration=number,
        prompts=recipe.prompts.replace("{iter}", str(number)),
        extra_responses=recipe.extra_responses.replace("{iter}", str(number)),
        prompts_part=f"{number - 1}/{recipe.iterations}" if recipe.split_prompts else "0/1",
        seed=recipe.seed + number - 1,
        data_dir=str(here / "data"),
        dataset=str(here / "data"),
        model_dir=str(here / "model"),
    )
    if reads_anchor(recipe) and not recipe.anchor_model:
        mine = dataclasses.replace(mine, anchor_model=recipe.model, anchor_revision=recipe.model_revision)
    if number > 1:
        before = str(run_dir / f"iter{number - 1}" / "model")
        mine = dataclasses.replace(mine, model=before, model_revision="")
    return mine


def path_of(recipe: Recipe) -> Path:
    """Where an iteration's recipe is written."""
    return Path(recipe.run_dir) / f"iter{recipe.iteration}" / "recipe.yaml"


def write(recipe: Recipe) -> None:
    """Write an iteration's recipe: every setting of generate.sh, pipeline.sh and report.py for it."""
    from sppo.rankers.pinning import pinned

    text = yaml.safe_dump(dataclasses.asdict(pinned(recipe, _first_data(recipe))), sort_keys=False)
    with atomic(path_of(recipe)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest_of_recipes(paths: list[Path]) -> str:
    """What tells the recipes that a start has written from those of a start beside it."""
    return digest_of(b"".join(path.read_bytes() for path in paths))


def of_run(recipe: Recipe) -> Recipe:
    """An iteration's recipe with the model and the seed that its run began with: what all its reports compare with.

    And with --thinking_tags off where that run is of an older version: the answers of all its models are told apart
    alike. They stand in the first iteration's recipe. Where there is none, `recipe` as it is.
    """
    written = path_of(dataclasses.replace(recipe, iteration=1))
    if not written.exists():
        return recipe
    first = load_recipe(written)
    began = {"model": first.model, "model_revision": first.model_revision, "seed": first.seed}
    return dataclasses.replace(recipe, **began, thinking_tags=_thinking_tags_of_run(recipe))


# What is left to do


def left(recipes: list[Recipe], run: Recipe) -> list[Recipe]:
    """The iterations that have work left; where nothing but the win matrix is left, the last one. Writes nothing.

    Behind the iteration at which the guard stops the run (--stop_when) nothing is left. Where something before it is
    made again, the guard is asked again at each iteration, so they all are left.

    Raises OtherWorkError where the run would meet work of other settings, as far as the stages stand: what is made of
    files that are missing or damaged is known when these are made again.
    """
    from sppo.evaluation.guard import stop_of

    found: list[Recipe] = []
    stands = True  # all that is looked at so far
    stopped_at = stop_of(run)
    for recipe in recipes:
        steps = [data_stages(recipe), training_stages(recipe)]
        if run.eval_prompts:
            steps.append(report_stages(recipe, run))
        is_whole = all(is_done(step, refuse=stands) for step in steps)
        stands = stands and is_whole
        is_asked_again = run.stop_when == "judge" and not stands
        if recipe.org or not is_whole or is_asked_again:  # the scripts know what is pushed
            found.append(recipe)
        if stands and recipe.iteration == stopped_at:
            break
    if run.evaluate and stands and not is_done(matrix_stages(run), refuse=True):
        return found or [recipe]
    return found


def is_done(step: Stages, refuse: bool = False) -> bool:
    """Whether all stages are current. Writes nothing. refuse: raises OtherWorkError for work of other settings."""
    try:
        for group in step:
            if refuse:
                for stage in group:
                    stage.refuse_others()
            if not all(stage.is_current() for stage in group):
                return False
        return True
    except (OtherWorkError, UsageError):
        if refuse:
            raise
        return False
    except (SPPOError, FileNotFoundError):  # what they stand on is not there, or not whole
        return False


# The stages of one iteration, from its recipe


def drawing_stages(recipe: Recipe, data_dir: Path, extra_responses: str = "") -> Stages:
    """The stages of generation: each shard, and the shards put together, with a file of other models' answers if any.

    Raises SPPOError where none has begun.
    """
    from sppo.generation.combine import combine_stage
    from sppo.generation.source import Source, as_begun

    count = known_count(data_dir / "responses")
    if not count:
        raise SPPOError(f"{data_dir} is not begun")
    source = Source.of(as_begun(recipe, data_dir))
    yield [source.stage(data_dir, Slice(0, i, count)) for i in range(count)]
    yield [combine_stage(data_dir, count, recipe.pairs, extra_responses)]


def data_stages(recipe: Recipe) -> Stages:
    """The stages of generate.sh."""
    from sppo.pairing.training_set import pairing_stage
    from sppo.rankers.pinning import pinned
    from sppo.ranking.shards import rank_stage

    data_dir = Path(recipe.data_dir)
    recipe = pinned(recipe, _first_data(recipe))
    yield from drawing_stages(recipe, data_dir, recipe.extra_responses)
    count = known_count(data_dir / "ranking") or 1  # not begun: then one that is not current
    yield [rank_stage(recipe, data_dir, Slice(0, i, count)) for i in range(count)]
    yield [pairing_stage(recipe, data_dir)]


def training_stages(recipe: Recipe) -> Stages:
    """The stage of pipeline.sh."""
    from sppo.training.launching import training_config
    from sppo.training.settings import prepare

    is_local = recipe.launcher == "local"
    config = training_config(devices(recipe.gpus), recipe.accelerate_config) if is_local else None
    asked = prepare(recipe, config.processes if config else 1)
    if asked.recipe.accumulate and not is_local:
        raise SPPOError("how many rows a step has depends on the cluster's devices")
    asked.refuse_others()
    if asked.work.exists():
        raise SPPOError(f"{recipe.model_dir} is not whole")
    yield [asked.stage]


def report_stages(recipe: Recipe, run: Recipe) -> Stages:
    """The stages of report.py: the answers of the run's first model, the iteration's answers, and their comparison.

    With a second judge also the comparison with the iteration before.
    """
    from sppo.evaluation.match import judges, match_stage
    from sppo.evaluation.measures import measure_stage
    from sppo.evaluation.report import comparing, drawing, report_stage, summary_rows
    from sppo.evaluation.step import step_stage

    run_dir, number = Path(recipe.run_dir), recipe.iteration
    asked = dataclasses.replace(recipe, model=run.model, model_revision=run.model_revision, seed=run.seed)
    yield from drawing_stages(drawing(asked, run.model, run.model_revision), run_dir / "iter0" / "eval")
    yield from drawing_stages(drawing(asked, recipe.model_dir), run_dir / f"iter{number}" / "eval")
    by = comparing(asked, run_dir, number, run.model)
    opponents = sorted({0, number - 1}) if recipe.judge else [0]
    yield [match_stage(one, name, run_dir, i, number) for name, one in judges(by).items() for i in opponents]
    yield [measure_stage(asked, run_dir / f"iter{n}" / "eval", run.model) for n in (0, number)]
    yield [report_stage(by, run_dir, number)]
    if recipe.judge:
        yield [step_stage(by, run_dir, number)]
    if read_json(run_dir / "summary.json") != summary_rows(run_dir):
        raise SPPOError(f"{run_dir / 'summary.json'} is not what the reports say")


def matrix_stages(run: Recipe) -> Stages:
    """The stages of win_matrix.py."""
    from sppo.evaluation.matrix import match_stages, matrix_stage

    yield list(match_stages(run, Path(run.run_dir)).values())
    yield [matrix_stage(run, Path(run.run_dir))]


def _first_data(recipe: Recipe) -> Path:
    """The first iteration's data: its ranker's revision is that of all iterations."""
    return Path(recipe.run_dir) / "iter1" / "data"
