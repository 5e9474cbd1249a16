"""The ranker, looked at before a run starts: it is loaded and asked where it is small."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sppo import rankers
from sppo.models.files import parameters, weight_files, weight_shapes
from sppo.preflight.facts import Machines, PromptSet, Ranker, Run
from sppo.preflight.findings import Look, no, note, ok, parameters_text, size
from sppo.rankers import TRIAL, ask_trial
from sppo.rankers.pairrm import prompt_renderer
from sppo.rankers.pinning import pinned

_SMALL_RANKER = 4 << 30  # bytes on disk up to which a ranker is loaded to see that it can be


def look_at_ranker(run: Run) -> Look[Ranker]:
    """Fetch the ranker and read its size. Raises SPPOError where it cannot be had."""
    recipe = pinned(run.recipe, run.run_dir / "iter1" / "data")
    module = rankers.backend(recipe)
    kind = module.__name__.rpartition(".")[2]
    where = Path(module.fetch(recipe))
    if kind in ("judge", "reward_server"):
        yield ok(f"{recipe.ranker} at {recipe.ranker_url} answers a trial question")
    if kind in ("judge", "reward_server", "function"):
        return Ranker(recipe, module, kind)
    on_disk = sum(f.stat().st_size for f in weight_files(where))
    return Ranker(recipe, module, kind, parameters(weight_shapes(where)), on_disk)


def check_ranker(run: Run, found: Ranker, machines: Machines, tokenizer: Any, prompts: list[PromptSet]) -> Look[None]:
    """Load the ranker where it is small, and ask it something."""
    if found.kind == "judge":
        return
    recipe = found.recipe
    told = recipe.ranker
    if found.parameters:
        told += f": {parameters_text(found.parameters)}, {size(found.on_disk)}"
        room = min((free for _, free in machines.cards.values()), default=0)
        if machines.cards and 2 * found.parameters > room:
            yield no(f"{told}; {size(room)} of GPU memory is free, and each GPU loads all of it")
        if found.on_disk > _SMALL_RANKER:
            yield ok(f"{told}; its config, tokenizer and files are whole; not loaded, which would take long")
            return
    # on the CPU, with the prompt as text: the policy's weights may not be here yet
    ranker = found.backend.load(dataclasses.replace(recipe, ranker_prompt="text"))
    one, other = ask_trial(ranker, [TRIAL, (TRIAL[0], TRIAL[2], TRIAL[1])], f"--ranker {recipe.ranker}")
    yield ok(f"{told}; it loads and answers a trial pair ({one:.3g}, {other:.3g} the other way round)")

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
