"""The preflight: everything that can be known before GPU time is spent.

The files of the stages (generation.py, training.py, ...) look at the run, and hours.py puts the work into numbers. All
looks are done, also where one of them fails, and only the work that is left is looked at. Nothing is written: the
findings, the plan, and a yes or a no are printed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from sppo.command.errors import SPPOError
from sppo.command.memory import main_memory
from sppo.evaluation.guard import stop_of
from sppo.launch.devices import CPU, devices
from sppo.launch.script import open_launcher
from sppo.preflight import hours
from sppo.preflight.facts import Iteration, Machines, Run
from sppo.preflight.findings import Finding, Look, many, no
from sppo.recipe import Recipe

T = TypeVar("T")


def open_run(recipe: Recipe) -> Run:
    """The run that an opened recipe (see iterations.opened) asks for, and what of it is left."""
    run_dir, left = Path(recipe.run_dir), []
    for i in range(1, (stop_of(recipe) or recipe.iterations) + 1):
        here = run_dir / f"iter{i}"
        data = not (here / "data" / "train.manifest.json").exists()
        training = not (here / "model" / "sppo_manifest.json").exists()
        report = bool(recipe.eval_prompts) and not (here / "eval" / "report.manifest.json").exists()
        if data or training or report:
            left.append(Iteration(i, data, training, report))
    if recipe.launcher == "local":
        return Run(recipe, devices(recipe.gpus), left)
    cluster = open_launcher(recipe) if left else None
    machines, gpus = cluster.machines() if cluster else (1, [CPU])
    return Run(recipe, gpus, left, machines, cluster)


class Examined:
    """What the looks at a run have found, by group, in the order in which it is shown, and the lines of the plan."""

    def __init__(self) -> None:
        self.found: dict[str, list[Finding]] = {}
        self.plan: list[str] = []

    def learn(self, group: str, look: Look[T]) -> T | None:
        """Look, and return what later looks need; None where that cannot be learned, and then a finding says why."""
        findings = self.found.setdefault(group, [])
        try:
            while True:
                findings.append(next(look))
        except StopIteration as end:
            return end.value
        except SPPOError as error:
            findings.append(no(str(error)))
        except Exception as error:  # noqa: BLE001 - a fault of one look must not hide what the others find
            said = f"{getattr(look, '__name__', look)}: {type(error).__name__}: {error}"
            findings.append(no(f"this check failed itself ({said}); --skip_preflight starts without the preflight"))
        return None


def examine(run: Run) -> Examined:
    """Look at everything that the rest of a run needs."""
    from sppo.preflight import evaluation, extras, generation, hub, machine, ranking, training

    recipe, examined = run.recipe, Examined()
    learn = examined.learn

    # what the run stands on
    learn("versions", machine.check_versions(run))
    if run.cluster is None:
        machines = learn("GPUs", machine.look_at_gpus(run))
    else:
        machines = learn("machines", machine.look_at_cluster(run))
    machines = machines or Machines(main_memory())

    # the model, how it is trained, and what it is asked
    tokenizer = config = batch = ranker = None
    model = learn("model", generation.look_at_model(run))
    if model:
        tokenizer = learn("chat template", generation.look_at_tokenizer(run, model))
    if run.trains:
        learn("training", training.check_settings(run, model))
        learn("training", training.check_thoughts(run, tokenizer))
        config = learn("training", training.look_at_config(run))
    if config:
        batch = learn("training", training.look_at_batch(recipe, config))
    prompts = learn("prompts", generation.look_at_prompts(run, model, tokenizer)) or []
    learn("prompts", extras.check_extras(run, prompts, model, tokenizer))

    # what it takes
    work = learn("training", hours.count_work(run, prompts, batch or 0)) or []
    most_extra = max((each.extra for each in work), default=0)
    if model and run.generates:
        learn("memory", generation.check_memory(run, machines, model.shape, prompts))
    if model and config:
        learn("memory", training.check_memory(run, machines, model.shape, config, most_extra))
    learn("disk", machine.check_outputs(run))
    learn("disk", machine.check_disk(run, model, config, work))

    # what answers and takes what is made
    if run.generates:
        ranker = learn("ranker", ranking.look_at_ranker(run))
    if ranker:
        learn("ranker", ranking.check_ranker(run, ranker, machines, tokenizer, prompts))
        learn("ranker", ranking.check_scale(run, ranker))
    if run.reports:
        learn("report", generation.check_held_out(recipe, model, tokenizer))
        learn("report", evaluation.check_judge(run, machines))
        learn("report", evaluation.check_measure(recipe))
    learn("Hub", hub.check_hub(run))
    if run.trains:
        learn("ports", training.check_ports())

    if work:
        spent = hours.hours(run, work, machines, model, ranker)
        examined.plan = hours.table(work, recipe, spent)
    return examined


def report(run: Run) -> int:
    """Examine the run and print what was found, the plan and the verdict; returns how many problems there are."""
    if not run.left:
        stopped_at = stop_of(run.recipe)
        done = f"stopped after iteration {stopped_at}, as --stop_when {run.recipe.stop_when} asks"
        done = f"all {run.recipe.iterations} iterations are done" if stopped_at is None else done
        print(f"preflight: {run.run_dir}: {done}\nready: yes")
        return 0
    numbers = ", ".join(str(i.number) for i in run.left)
    print(f"preflight: {run.run_dir}: iterations with work left: {numbers}", flush=True)
    examined = examine(run)
    for group, findings in examined.found.items():
        if findings:
            print(group)
        for finding in findings:
            print(f"  {finding.level:<4}  {finding.text}")
    if examined.plan:
        print("plan")
        print("\n".join(f"  {line}" for line in examined.plan))
    problems = sum(finding.level == "no" for findings in examined.found.values() for finding in findings)
    print(f"ready: no: {many(problems, 'problem')}, see above" if problems else "ready: yes", flush=True)
    return problems
