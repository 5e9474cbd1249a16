"""The preflight: everything that can be known before GPU time is spent.

Reads the run's flags, and what the checks of each stage's folder (checks.py) read.
Does all checks, also when one of them fails; only the work that is left is checked.
Writes nothing; prints the findings, a plan in numbers, and a yes or a no.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sppo.command.errors import SPPOError
from sppo.launch.devices import CPU, devices
from sppo.launch.script import open_launcher
from sppo.preflight import plan
from sppo.preflight.findings import Finding, Findings, Iteration, Run, no
from sppo.recipe import Recipe


def open_run(recipe: Recipe) -> Run:
    """The run that an opened recipe (see run.opened) asks for, and what of it is left."""
    run_dir, left = Path(recipe.run_dir), []
    for i in range(1, recipe.iterations + 1):
        here = run_dir / f"iter{i}"
        data = not (here / "data" / "train.manifest.json").exists()
        training = not (here / "model" / "sppo_manifest.json").exists()
        report = bool(recipe.eval_prompts) and not (here / "eval" / "report.manifest.json").exists()
        if data or training or report:
            left.append(Iteration(i, data, training, report))
    where = (recipe.world_size, recipe.accelerate_config, left)
    if recipe.launcher == "local":
        return Run(recipe, recipe.name, run_dir, devices(recipe.gpus), *where)
    cluster = open_launcher(recipe, "look") if left else None
    machines, gpus = cluster.machines() if cluster else (1, [CPU])
    return Run(recipe, recipe.name, run_dir, gpus, *where, machines, cluster)


def examine(run: Run) -> dict[str, list[Finding]]:
    """Every check's findings, by group, in the order in which they are shown."""
    from sppo.preflight import evaluation, generation, hub, machine, ranking, training

    groups: list[tuple[str, Callable[[Run], Findings]]] = [
        ("versions", machine.check_versions),
        ("machines", machine.check_machines),
        ("GPUs", machine.check_gpus),
        ("model", generation.check_model),
        ("chat template", generation.check_template),
        ("training", training.check_settings),
        ("training", training.check_batches),
        ("prompts", generation.check_prompts),
        ("plan", plan.count_work),
        ("memory", generation.check_memory),
        ("memory", training.check_memory),
        ("ranker", ranking.check_download),
        ("disk", machine.check_outputs),
        ("disk", machine.check_disk),
        ("ranker", ranking.check_ranker),
        ("report", generation.check_held_out),
        ("report", evaluation.check_judge),
        ("report", evaluation.check_measure),
        ("Hub", hub.check_hub),
        ("ports", training.check_ports),
    ]
    found: dict[str, list[Finding]] = {group: [] for group, _ in groups}
    for group, check in groups:
        try:
            for finding in check(run):
                found[group].append(finding)
        except SPPOError as error:
            found[group].append(no(str(error)))
        except Exception as error:  # noqa: BLE001 - one check's own trouble must not hide what the others find
            trouble = f"this check failed itself ({check.__name__}: {type(error).__name__}: {error})"
            found[group].append(no(f"{trouble}; --skip_preflight starts without the preflight"))
    return found


def report(run: Run) -> int:
    """Examine the run and print what was found, the plan and the verdict; returns how many problems there are."""
    if not run.left:
        print(f"preflight: {run.run_dir}: all {run.recipe.iterations} iterations are done\nready: yes")
        return 0
    numbers = ", ".join(str(i.number) for i in run.left)
    print(f"preflight: {run.run_dir}: iterations with work left: {numbers}", flush=True)
    found = examine(run)
    for group, findings in found.items():
        if findings:
            print(group)
        for finding in findings:
            print(f"  {finding.level:<4}  {finding.text}")
    if run.loads:
        print("plan")
        print("\n".join(f"  {line}" for line in plan.table(run.loads, run.recipe, plan.hours(run))))
    problems = sum(finding.level == "no" for findings in found.values() for finding in findings)
    counted = f"{problems} problem{'s' if problems > 1 else ''}"
    print(f"ready: no: {counted}, see above" if problems else "ready: yes", flush=True)
    return problems
