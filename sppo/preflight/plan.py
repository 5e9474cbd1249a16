"""The plan: a run in numbers before it starts. How much work, and roughly how many hours.

Counts are exact or upper bounds. Hours are rough: the stages' FLOPs over their usual shares of the machine's measured
matrix rate.
"""

from __future__ import annotations

import time

from sppo.command.errors import SPPOError
from sppo.command.progress import columns
from sppo.preflight import generation, ranking
from sppo.preflight import memory as training
from sppo.preflight.findings import TYPICAL_RESPONSE, Findings, Iteration, Load, Run
from sppo.recipe import Recipe
from sppo.store.files import read_json

_TRIES = 5  # of measuring the matrix rate


def count_work(run: Run) -> Findings:
    """Count what each iteration has to do; there is nothing to find wrong."""
    run.loads = [_load(run, i) for i in run.left if i.number in run.sets or (i.training and not i.data)]
    yield from ()


def _load(run: Run, i: Iteration) -> Load:
    """The iteration's work: from its prompts, or, where its data is made, from what that holds."""
    recipe = run.recipe
    if i.data:
        made = run.sets[i.number]
        prompts, tokens, longest = made.usable, made.every * sum(made.lengths), made.longest
        rows, most = training.training_rows(prompts, recipe.test_size), recipe.pairs * made.every * sum(made.rooms)
        if prompts and not rows:
            raise SPPOError(f"--test_size {recipe.test_size:g} holds all {prompts} prompts out; nothing is trained on")
    else:
        data = run.run_dir / f"iter{i.number}" / "data"
        rows = prompts = read_json(data / "train.manifest.json")["counts"]["train"]
        manifest = data / "responses.manifest.json"  # not there where another tool made the responses
        counts = read_json(manifest)["counts"] if manifest.exists() else {}
        usual = rows * recipe.pairs * TYPICAL_RESPONSE
        tokens, longest, most = 0, 0, counts.get("response_tokens", usual)
    steps = 0
    if run.training and run.training[2] and i.training:
        _, processes, accumulate = run.training
        steps = training.steps(rows, recipe, processes, accumulate)
    return Load(i.number, i.data, i.training, prompts, tokens, longest, most, rows, steps)


def hours(run: Run) -> dict[int, list[float]]:
    """Rough hours of generating, ranking and training of each iteration; none where model or devices are not known."""
    if run.shape is None or not any(load.prompts for load in run.loads):
        return {}
    if run.cpu and not run.rate:
        run.rate = matrix_rate()
    if not run.rate:
        return {}
    size = run.shape.parameters
    spent = {
        load.iteration: (
            generation.seconds(load, run, size),
            ranking.seconds(load, run),
            training.seconds(load, run, size),
        )
        for load in run.loads
    }
    return {iteration: [s / 3600 for s in seconds] for iteration, seconds in spent.items()}


def matrix_rate() -> float:
    """FLOPs a second of one device's matrix products: bfloat16 on the GPU that is visible, else float32 on the CPU."""
    import torch

    gpu = torch.cuda.is_available()
    n, seconds = (8192, 0.5) if gpu else (1024, 0.2)
    # of random numbers: a product of equal ones is faster than any real one
    a = torch.randn(n, n, device="cuda" if gpu else "cpu", dtype=torch.bfloat16 if gpu else torch.float32)

    def run(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            a @ a
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    run(2)  # the first takes longer
    times = max(1, int(seconds / max(run(1), 1e-6)) // _TRIES)
    # the best of some tries: a moment in which other processes compute is not the machine's rate
    return 2 * n**3 * times / min(run(times) for _ in range(_TRIES))


def table(loads: list[Load], recipe: Recipe, spent: dict[int, list[float]]) -> list[str]:
    """The plan, a line an iteration; `spent`: rough hours of generating, ranking and training, where known."""
    header = ["", "prompts", "responses", "comparisons", "response tokens at most", "pairs", "steps"]
    header += ["rough hours", "(generate + rank + train)"] if spent else []
    numbers = []
    for load in loads:
        most = load.most_tokens if load.generate else 0
        made = [load.prompts if load.generate else 0, load.responses(recipe.pairs), load.comparisons(recipe.pairs)]
        numbers.append([*made, most, *((load.rows, load.steps) if load.train else (0, 0))])
    lines = [header]
    total = [sum(column) for column in zip(*numbers, strict=True)], [sum(h) for h in zip(*spent.values(), strict=True)]
    rows = [(f"iteration {x.iteration}", n, spent.get(x.iteration)) for x, n in zip(loads, numbers, strict=True)]
    for name, counts, parts in [*rows, *([("all", *total)] if len(loads) > 1 else [])]:
        time_spent = [_hours(sum(parts)), f"({' + '.join(map(_hours, parts))})"] if parts else []
        unknown = counts[-2] and not counts[-1]  # the batches do not come out even
        lines.append([name, *(f"{n:,}" for n in counts[:-1]), "?" if unknown else f"{counts[-1]:,}", *time_spent])
    return columns(lines)


def _hours(value: float) -> str:
    return f"{value:.1f}" if value >= 0.05 or not value else "<0.1"
