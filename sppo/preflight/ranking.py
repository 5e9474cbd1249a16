"""The ranker, looked at before a run starts: it is loaded and asked where it is small."""

from __future__ import annotations

import dataclasses
import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from sppo import rankers
from sppo.command.errors import SPPOError
from sppo.method.preference import Array, estimator_for, log_odds
from sppo.models.files import parameters, weight_files, weight_shapes
from sppo.pairing.scale import Scale
from sppo.preflight.facts import Machines, PromptSet, Ranker, Run
from sppo.preflight.findings import Finding, Look, no, note, ok, parameters_text, size
from sppo.rankers import TRIAL, ask_trial
from sppo.rankers.function import load_function
from sppo.rankers.pairrm import prompt_renderer
from sppo.rankers.pinning import pinned
from sppo.recipe import Recipe
from sppo.schema import Pair
from sppo.store.parquet import read_rows

_SAMPLE = 512  # prompts whose pairs are looked at, where some are ranked
_SMALL_RANKER = 4 << 30  # bytes on disk up to which a ranker is loaded to see that it can be
_BOTH_WAYS: list[Pair] = [TRIAL, (TRIAL[0], TRIAL[2], TRIAL[1])]


def look_at_ranker(run: Run) -> Look[Ranker]:
    """Fetch the ranker and read its size. Raises SPPOError where it cannot be had."""
    recipe = pinned(run.recipe, run.run_dir / "iter1" / "data")
    return (yield from fetch_ranker(recipe, recipe.ranker))


def fetch_ranker(recipe: Recipe, told: str) -> Look[Ranker]:
    """Fetch a recipe's ranker, called `told`, and read its size. Raises SPPOError where it cannot be had."""
    module = rankers.backend(recipe)
    kind = module.__name__.rpartition(".")[2]
    where = Path(module.fetch(recipe))
    if kind in ("judge", "reward_server"):
        yield ok(f"{told} at {recipe.ranker_url} answers a trial question")
    if kind in ("judge", "reward_server", "function"):
        return Ranker(recipe, module, kind)
    on_disk = sum(f.stat().st_size for f in weight_files(where))
    return Ranker(recipe, module, kind, parameters(weight_shapes(where)), on_disk)


def check_scale(run: Run, found: Ranker) -> Look[None]:
    """Whether --estimator suits the ranker, and what is known of its scale: of pairs that are ranked already."""
    recipe, backend = run.recipe, found.kind.replace("_", "-")
    if recipe.estimator == "released" and estimator_for(backend) != "released":
        yield note(
            "--estimator released is made for PairRM's scores, and doubles the differences of another ranker's; "
            "--estimator paper takes them as they are, and auto takes what suits the ranker"
        )
    if recipe.select == "best_2sd" and recipe.pairs <= 5 and not recipe.extra_responses:
        yield note(f"--select best_2sd takes the worst response of {recipe.pairs}: of up to 5 none is further below")
    scale = Scale()
    for logits in _ranked(run.run_dir / "iter1" / "data" / "ranking") if run.makes_data else ():
        estimator = estimator_for(backend) if recipe.estimator == "auto" else recipe.estimator
        scale.add(log_odds(logits / recipe.ranker_temperature, estimator))
    if said := scale.warning(recipe.ranker_temperature):
        yield note(f"of {scale.pairs} pairs that iteration 1 has ranked: {said}")


def _ranked(ranking: Path) -> list[Array]:
    """Logits, (1, K, K), of the first prompts that are ranked; [] where none is.

    Also where a file is damaged: a run makes it again.
    """
    found: list[Array] = []
    try:
        for path in sorted(ranking.glob("*.parquet"))[:1]:
            for row in itertools.islice(read_rows(path, ["logits"]), _SAMPLE):
                logits = np.array([row["logits"]], dtype=np.float64)
                if np.isfinite(logits).all():
                    found.append(logits)
    except (SPPOError, OSError, ValueError, TypeError):  # pyarrow's errors are OSError and ValueError
        return []
    return found


def check_ranker(run: Run, found: Ranker, machines: Machines, tokenizer: Any, prompts: list[PromptSet]) -> Look[None]:
    """Load the ranker where it is small, and ask it something; count what it reads only in part."""
    ranker = yield from try_ranker(run, found, machines, found.recipe.ranker, f"--ranker {found.recipe.ranker}")
    if ranker is None:
        return

    # prompts that it reads only in part
    inputs = getattr(ranker, "inputs", None)
    if inputs is not None and tokenizer is not None:
        inputs.render = prompt_renderer(run.recipe, tokenizer)
    limit = f", and at least {inputs.candidate_maxlength - 3} tokens of a response" if inputs is not None else ""
    for made in prompts:
        cut = made.every * sum(ranker.count_cut(messages, [""]) > 0 for messages in made.conversations)
        if cut:
            yield note(f"{made.which}: the ranker reads {cut} of {made.usable} prompts in part{limit}")
        elif limit:
            yield ok(f"{made.which}: the ranker reads all of each prompt{limit}")


def try_ranker(run: Run, found: Ranker, machines: Machines, told: str, which: str) -> Look[Any]:
    """Load a ranker where it is small, and ask it something. Returns it; None where this process does not have it.

    told, which: what it is called, and the same with its flag.
    """
    if found.kind == "judge":
        return None
    recipe = found.recipe
    if found.kind == "function" and isinstance(load_function(recipe.ranker, which), type):
        yield _try_class(run, recipe, told, which)
        return None
    if found.parameters:
        told += f": {parameters_text(found.parameters)}, {size(found.on_disk)}"
        room = min((free for _, free in machines.cards.values()), default=0)
        if machines.cards and 2 * found.parameters > room:
            yield no(f"{told}; {size(room)} of GPU memory is free, and each GPU loads all of it")
        if found.on_disk > _SMALL_RANKER:
            yield ok(f"{told}; its config, tokenizer and files are whole; not loaded, which would take long")
            return None
    # on the CPU, with the prompt as text: the policy's weights may not be here yet
    ranker = found.backend.load(dataclasses.replace(recipe, ranker_prompt="text"))
    yield _answers(told, ask_trial(ranker, _BOTH_WAYS, which))
    return ranker


def _answers(told: str, logits: list[float]) -> Finding:
    one, other = logits
    return ok(f"{told}; it loads and answers a trial pair ({one:.3g}, {other:.3g} the other way round)")


def _try_class(run: Run, recipe: Recipe, told: str, which: str) -> Finding:
    """Ask a class of the user's. It may be large and may want its GPU, so a process of its own makes it, and ends."""
    if run.cluster is not None:
        return note(f"{told}; it is made on the cluster's machines, and was not tried here")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        try:
            logits = apart.submit(_trial, recipe, run.gpus[0], which).result()
        except BrokenProcessPool:
            raise SPPOError(f"{which}: the process that made it and asked it a trial pair was killed") from None
    return _answers(told, logits)


def _trial(recipe: Recipe, device: str, which: str) -> list[float]:
    """A class's logits of a trial pair, on a device as sppo.launch.devices names it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    return ask_trial(rankers.backend(recipe).load(recipe), _BOTH_WAYS, which)
