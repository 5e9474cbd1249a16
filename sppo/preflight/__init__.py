"""The preflight: everything that can be known before GPU time is spent, with a plan in numbers and a yes or a no.

What is done already is not looked at again: an iteration whose data exists needs no prompts, one whose model exists
no training. A check that fails never hides the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from sppo.config import Recipe
from sppo.errors import SPPOError
from sppo.loop import place
from sppo.preflight import checks, plan
from sppo.preflight.checks import Finding, Findings, Iteration, Run, no


def open_run(recipe: Recipe, args: argparse.Namespace) -> Run:
    """The run that the drivers' flags ask for, and what of it is left. Raises UsageError for flags that clash."""
    name, run_dir, gpus = place(recipe, args)
    left = []
    for i in range(1, recipe.iterations + 1):
        here = run_dir / f"iter{i}"
        data = not (here / "data" / "train.manifest.json").exists()
        training = not (here / "model" / "sppo_manifest.json").exists()
        report = bool(recipe.eval_prompts) and not (here / "eval" / "report.manifest.json").exists()
        if data or training or report:
            left.append(Iteration(i, data, training, report))
    return Run(recipe, name, run_dir, gpus, args.world_size, args.accelerate_config, left)


def examine(run: Run) -> dict[str, list[Finding]]:
    """Every check's findings, by group, in the order in which they are shown."""
    from sppo.preflight import inputs, memory

    groups: list[tuple[str, Callable[[Run], Findings]]] = [
        ("versions", checks.check_versions),
        ("GPUs", memory.check_gpus),
        ("model", inputs.check_model),
        ("chat template", inputs.check_tokenizer),
        ("training", checks.check_settings),
        ("training", checks.check_batches),
        ("prompts", inputs.check_prompts),
        ("memory", memory.check_memory),
        ("ranker", inputs.check_ranker_download),
        ("disk", checks.check_disk),
        ("ranker", inputs.check_ranker),
        ("report", inputs.check_report),
        ("report", inputs.check_judge),
        ("Hub", checks.check_hub),
        ("ports", checks.check_ports),
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
        print("\n".join(f"  {line}" for line in plan.table(run.loads, run.recipe, _hours(run))))
    problems = sum(finding.level == "no" for findings in found.values() for finding in findings)
    counted = f"{problems} problem{'s' if problems > 1 else ''}"
    print(f"ready: no: {counted}, see above" if problems else "ready: yes", flush=True)
    return problems


def _hours(run: Run) -> dict[int, list[float]]:
    """Rough hours of each iteration's stages; none where the model or the devices are not known."""
    if run.shape is None or not any(load.prompts for load in run.loads):
        return {}
    if run.cpu:
        run.rate = plan.matrix_rate()
    if not run.rate:
        return {}
    count, ranker, per_pair = run.shape.parameters, run.ranker_parameters, run.ranker_reads_pairs
    return {load.iteration: plan.hours(load, run.recipe, count, ranker, per_pair, run.rate) for load in run.loads}
