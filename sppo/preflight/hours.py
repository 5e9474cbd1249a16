"""The plan: a run in numbers before it starts. How much work, and roughly how many hours.

Counts are exact or upper bounds. Hours are rough: the stages' FLOPs over their usual shares of the machine's measured
matrix rate.
"""

from __future__ import annotations

from sppo.command.errors import SPPOError
from sppo.command.progress import columns
from sppo.launch.devices import matrix_rate
from sppo.preflight import generation, memory, ranking
from sppo.preflight.facts import TYPICAL_RESPONSE, Facts, Iteration, PromptSet, Run, Training, Work
from sppo.recipe import Recipe
from sppo.store.files import read_json


def count_work(run: Run, prompts: list[PromptSet], training: Training | None) -> list[Work]:
    """What each iteration has to do, as far as its prompts are known. Raises SPPOError where nothing is left to train.

    From its prompts, or, where its data is made, from what that holds.
    """
    readable = [made for made in prompts if not made.unreadable]
    sets = {number: made for made in readable for number in made.iterations}
    work = []
    for i in run.left:
        if i.data and i.number in sets:
            one = _from_prompts(run.recipe, i, sets[i.number])
        elif i.training and not i.data:
            one = _from_data(run, i)
        else:
            continue
        if training and training.accumulation and i.training:
            one.steps = memory.steps(one.rows, run.recipe, training.processes, training.accumulation)
        work.append(one)
    return work


def _from_prompts(recipe: Recipe, i: Iteration, made: PromptSet) -> Work:
    rows = memory.training_rows(made.usable, recipe.test_size)
    if made.usable and not rows:
        raise SPPOError(f"--test_size {recipe.test_size:g} holds all {made.usable} prompts out; nothing is trained on")
    return Work(
        iteration=i.number,
        generate=True,
        train=i.training,
        prompts=made.usable,
        prompt_tokens=made.every * sum(made.lengths),
        most_tokens=recipe.pairs * made.every * sum(made.rooms),
        rows=rows,
    )


def _from_data(run: Run, i: Iteration) -> Work:
    data = run.run_dir / f"iter{i.number}" / "data"
    rows = read_json(data / "train.manifest.json")["counts"]["train"]
    manifest = data / "responses.manifest.json"  # not there where another tool made the responses
    counts = read_json(manifest)["counts"] if manifest.exists() else {}
    tokens = counts.get("response_tokens", rows * run.recipe.pairs * TYPICAL_RESPONSE)
    return Work(i.number, generate=False, train=True, prompts=rows, most_tokens=tokens, rows=rows)


def hours(facts: Facts) -> dict[int, list[float]]:
    """Rough hours of generating, ranking and training of each iteration; none where model or devices are not known."""
    if facts.shape is None or not any(work.prompts for work in facts.work):
        return {}
    rate = facts.machines.rate or (matrix_rate() if facts.run.cpu else 0)
    if not rate:
        return {}
    size = facts.shape.parameters
    spent = {}
    for work in facts.work:
        seconds = [
            generation.drawing_seconds(work, facts.run, size, rate),
            ranking.ranking_seconds(work, facts.run, facts.ranker, rate),
            memory.training_seconds(work, facts.run, size, rate),
        ]
        spent[work.iteration] = [s / 3600 for s in seconds]
    return spent


def table(works: list[Work], recipe: Recipe, spent: dict[int, list[float]]) -> list[str]:
    """The plan, a line an iteration; `spent`: rough hours of generating, ranking and training, where known."""
    header = ["", "prompts", "responses", "comparisons", "response tokens at most", "pairs", "steps"]
    if spent:
        header += ["rough hours", "(generate + rank + train)"]
    numbers = [_counts(work, recipe) for work in works]
    lines = [header]
    for work, counts in zip(works, numbers, strict=True):
        lines.append(_line(f"iteration {work.iteration}", counts, spent.get(work.iteration)))
    if len(works) > 1:
        total = [sum(column) for column in zip(*numbers, strict=True)]
        lines.append(_line("all", total, [sum(part) for part in zip(*spent.values(), strict=True)]))
    return columns(lines)


def _counts(work: Work, recipe: Recipe) -> list[int]:
    """The numbers of an iteration's line: 0 where that part is done."""
    drawn, trained = [0, 0, 0, 0], [0, 0]
    if work.generate:
        drawn = [work.prompts, work.responses(recipe.pairs), work.comparisons(recipe.pairs), work.most_tokens]
    if work.train:
        trained = [work.rows, work.steps]
    return [*drawn, *trained]


def _line(name: str, counts: list[int], parts: list[float] | None) -> list[str]:
    *others, rows, steps = counts
    is_uneven = rows and not steps  # the global batch does not come out even
    line = [name, *(f"{n:,}" for n in (*others, rows)), "?" if is_uneven else f"{steps:,}"]
    if parts:
        line += [_hours(sum(parts)), f"({' + '.join(map(_hours, parts))})"]
    return line


def _hours(value: float) -> str:
    return f"{value:.1f}" if value >= 0.05 or not value else "<0.1"
