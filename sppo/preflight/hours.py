"""The plan: a run in numbers before it starts. How much work, and roughly how many hours.

Counts are exact or upper bounds. Hours are rough: the stages' FLOPs over their usual shares of the machine's measured
matrix rate.
"""

from __future__ import annotations

import math

from sppo.command.progress import columns
from sppo.generation.engines import pick_engine
from sppo.launch.devices import matrix_rate
from sppo.preflight.facts import TYPICAL_RESPONSE, Iteration, Machines, Model, PromptSet, Ranker, Run, Work
from sppo.preflight.findings import Look, no
from sppo.recipe import Recipe, reads_anchor
from sppo.store.files import read_json
from sppo.store.responses import EXTRA

# The share of the matrix rate that a stage reaches. Drawing on a GPU: a guess; the others are measured
# (docs/benchmarks.md, docs/gpu.md).
_SHARES = {
    "cpu": {"vllm": 0.29, "transformers": 0.08, "rank": 0.7, "train": 0.35},
    "gpu": {"vllm": 0.10, "transformers": 0.02, "rank": 0.28, "train": 0.3},
}


def count_work(run: Run, prompts: list[PromptSet], batch: int) -> Look[list[Work]]:
    """What each iteration has to do, as far as its prompts are known; from its data, where that is made.

    batch: pairs a step; 0 where that is not known.
    """
    sets = {number: made for made in prompts for number in made.iterations}
    works = []
    for i in run.left:
        if i.data and i.number in sets:
            work = _from_prompts(run.recipe, i, sets[i.number])
        elif i.training and not i.data:
            work = _from_data(run, i)
        else:
            continue
        if batch and i.training:
            work.steps = math.ceil(math.ceil(work.rows / batch) * run.recipe.num_train_epochs)
        works.append(work)
    held_out = next((work.prompts for work in works if work.prompts and not work.rows), 0)
    if held_out:
        yield no(f"--test_size {run.recipe.test_size:g} holds all {held_out} prompts out; nothing is trained on")
    return works


def _from_prompts(recipe: Recipe, i: Iteration, made: PromptSet) -> Work:
    share = recipe.test_size < 1
    held_out = round(recipe.test_size * made.usable) if share else int(recipe.test_size)
    return Work(
        iteration=i,
        prompts=made.usable,
        prompt_tokens=made.every * sum(made.lengths),
        most_tokens=recipe.pairs * made.every * sum(made.rooms),
        rows=max(0, made.usable - held_out),
        extra=made.extra.get(i.number, 0),
    )


def _from_data(run: Run, i: Iteration) -> Work:
    data = run.run_dir / f"iter{i.number}" / "data"
    rows = read_json(data / "train.manifest.json")["counts"]["train"]
    manifest = data / "responses.manifest.json"  # not there where another tool made the responses
    counts = read_json(manifest)["counts"] if manifest.exists() else {}
    tokens = counts.get("response_tokens", rows * run.recipe.pairs * TYPICAL_RESPONSE)
    return Work(i, prompts=rows, most_tokens=tokens, rows=rows, extra=counts.get(EXTRA, 0))


def hours(
    run: Run, works: list[Work], machines: Machines, model: Model | None, ranker: Ranker | None
) -> dict[int, list[float]]:
    """Rough hours of generating, ranking and training of each iteration.

    None where the model cannot be loaded or the devices are not known.
    """
    if model is None or not model.loads or not any(work.prompts for work in works):
        return {}
    rate = machines.rate or (matrix_rate() if run.cpu else 0)
    if not rate:
        return {}
    shares, parameters = _SHARES["cpu" if run.cpu else "gpu"], model.shape.parameters

    def in_hours(flops: float, stage: str) -> float:
        return flops / (rate * shares[stage]) / 3600

    spent = {}
    for work in works:
        draw = rank = train = 0.0
        if work.iteration.data:
            draw = in_hours(_drawing(work, run.recipe, parameters), pick_engine(run.recipe.engine))
            rank = in_hours(_ranking(work, run.recipe, ranker), "rank")
        if work.iteration.training:
            train = in_hours(_training(work, run.recipe, parameters), "train")
        spent[work.iteration.number] = [draw, rank, train]
    return spent


def _drawing(work: Work, recipe: Recipe, parameters: int) -> float:
    """FLOPs of drawing an iteration's responses."""
    return 2 * parameters * (work.prompt_tokens + work.response_tokens(recipe))


def _ranking(work: Work, recipe: Recipe, ranker: Ranker | None) -> float:
    """FLOPs of ranking them: a PairRM reads every ordered pair, a reward model and a GPM every response once.

    0 where the ranker's size is not known.
    """
    if ranker is None:
        return 0.0
    k = recipe.pairs + work.extra
    tokens = work.response_tokens(recipe) + work.prompts * work.extra * TYPICAL_RESPONSE
    if ranker.kind in ("reward_model", "gpm"):
        read = k * work.prompt_tokens + tokens
    else:
        read = k * (k - 1) * work.prompt_tokens + 2 * (k - 1) * tokens
    return 2 * ranker.parameters * read


def _training(work: Work, recipe: Recipe, parameters: int) -> float:
    """FLOPs of training on its pairs."""
    prompts = max(1, work.prompts)
    mean = work.response_tokens(recipe) / (prompts * recipe.pairs)
    sequences = work.rows * (recipe.pairs + work.extra if recipe.loss_type == "sppo_all" else 2)
    length = min(work.prompt_tokens / prompts + mean, recipe.max_length)
    passes = 3 + recipe.gradient_checkpointing  # forward, twice that backward, and what is recomputed
    is_own = work.iteration.number == 1 and not recipe.anchor_model  # then the reference's log-probs are the anchor's
    before = 1 + (reads_anchor(recipe) and not is_own)  # the reference's pass, and the anchor's
    return 2 * (passes * recipe.num_train_epochs + before) * parameters * sequences * length


def table(works: list[Work], recipe: Recipe, spent: dict[int, list[float]]) -> list[str]:
    """The plan, a line an iteration; `spent`: rough hours of generating, ranking and training, where known."""
    header = ["", "prompts", "responses", "comparisons", "response tokens at most", "pairs", "steps"]
    if spent:
        header += ["rough hours", "(generate + rank + train)"]
    numbers = [_counts(work, recipe) for work in works]
    lines = [header]
    for work, counts in zip(works, numbers, strict=True):
        lines.append(_line(f"iteration {work.iteration.number}", counts, spent.get(work.iteration.number)))
    if len(works) > 1:
        total = [sum(column) for column in zip(*numbers, strict=True)]
        lines.append(_line("all", total, [sum(part) for part in zip(*spent.values(), strict=True)]))
    return columns(lines)


def _counts(work: Work, recipe: Recipe) -> list[int]:
    """The numbers of an iteration's line: 0 where that part is done."""
    drawn, trained = [0, 0, 0, 0], [0, 0]
    if work.iteration.data:
        k = recipe.pairs + work.extra
        drawn = [work.prompts, work.prompts * recipe.pairs, work.prompts * k * (k - 1), work.most_tokens]
    if work.iteration.training:
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
