"""The preflight: everything that can be known before GPU time is spent.

gather.py looks at the run, the checks of each stage (generation.py, training.py, ...) say what they find in that, and
hours.py puts the work into numbers. All checks are done, also where one of them fails, and only the work that is left
is checked. Nothing is written: the findings, the plan, and a yes or a no are printed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sppo.launch.devices import CPU, devices
from sppo.launch.script import open_launcher
from sppo.preflight import hours
from sppo.preflight.facts import Facts, Iteration, Run
from sppo.preflight.findings import Finding, Findings, no
from sppo.preflight.gather import gather, trouble
from sppo.recipe import Recipe


def open_run(recipe: Recipe) -> Run:
    """The run that an opened recipe (see iterations.opened) asks for, and what of it is left."""
    run_dir, left = Path(recipe.run_dir), []
    for i in range(1, recipe.iterations + 1):
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


def examine(facts: Facts) -> dict[str, list[Finding]]:
    """Every check's findings, by group, in the order in which they are shown."""
    from sppo.preflight import evaluation, generation, hub, machine, ranking, training

    run = facts.run
    checks: list[tuple[str, Callable[..., Findings], Run | Facts]] = [
        ("versions", machine.check_versions, run),
        ("machines", machine.check_machines, facts),
        ("GPUs", machine.check_gpus, facts),
        ("model", generation.check_model, facts),
        ("chat template", generation.check_template, facts),
        ("training", training.check_settings, facts),
        ("training", training.check_batches, facts),
        ("prompts", generation.check_prompts, facts),
        ("memory", generation.check_memory, facts),
        ("memory", training.check_memory, facts),
        ("disk", machine.check_outputs, run),
        ("disk", machine.check_disk, facts),
        ("ranker", ranking.check_ranker, facts),
        ("report", generation.check_held_out, facts),
        ("report", evaluation.check_judge, run),
        ("report", evaluation.check_measure, run),
        ("Hub", hub.check_hub, run),
        ("ports", training.check_ports, run),
    ]
    found: dict[str, list[Finding]] = {group: [] for group, _, _ in checks}
    for group, troubles in facts.troubles.items():
        found.setdefault(group, []).extend(map(no, troubles))
    for group, check, known in checks:
        try:
            for finding in check(known):
                found[group].append(finding)
        except Exception as error:  # noqa: BLE001 - one check's own trouble must not hide what the others find
            found[group].append(no(trouble(error, check)))
    return found


def report(run: Run) -> int:
    """Examine the run and print what was found, the plan and the verdict; returns how many problems there are."""
    if not run.left:
        print(f"preflight: {run.run_dir}: all {run.recipe.iterations} iterations are done\nready: yes")
        return 0
    numbers = ", ".join(str(i.number) for i in run.left)
    print(f"preflight: {run.run_dir}: iterations with work left: {numbers}", flush=True)
    facts = gather(run)
    found = examine(facts)
    for group, findings in found.items():
        if findings:
            print(group)
        for finding in findings:
            print(f"  {finding.level:<4}  {finding.text}")
    if facts.work:
        print("plan")
        print("\n".join(f"  {line}" for line in hours.table(facts.work, run.recipe, hours.hours(facts))))
    problems = sum(finding.level == "no" for findings in found.values() for finding in findings)
    counted = f"{problems} problem{'s' if problems > 1 else ''}"
    print(f"ready: no: {counted}, see above" if problems else "ready: yes", flush=True)
    return problems
