"""What ranking needs, looked at before a run starts: the ranker, which is loaded and asked where it is small."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sppo import rankers
from sppo.models.files import parameters, weight_files, weight_shapes
from sppo.preflight.facts import Facts, Ranker, Run, Work
from sppo.preflight.findings import Findings, no, note, ok, parameters_text, size
from sppo.rankers import TRIAL, ask_trial
from sppo.rankers.pairrm import prompt_renderer
from sppo.rankers.pinning import pinned

# The share of the device's matrix rate that ranking reaches, measured: docs/benchmarks.md, docs/gpu.md.
_SHARE = {"cpu": 0.7, "gpu": 0.28}
_SMALL_RANKER = 4 << 30  # bytes on disk up to which a ranker is loaded to see that it can be


def look_at_ranker(run: Run) -> Ranker:
    """Fetch the ranker and read its size. Raises SPPOError where it cannot be had."""
    recipe = pinned(run.recipe, run.run_dir / "iter1" / "data")
    module = rankers.backend(recipe)
    kind = module.__name__.rpartition(".")[2]
    where = Path(module.fetch(recipe))
    if kind in ("judge", "function"):
        return Ranker(recipe, module, kind)
    on_disk = sum(f.stat().st_size for f in weight_files(where))
    return Ranker(recipe, module, kind, parameters(weight_shapes(where)), on_disk, kind != "reward_model")


def check_ranker(facts: Facts) -> Findings:
    """Load the ranker where it is small, and ask it something."""
    found = facts.ranker
    if found is None:
        return
    recipe = found.recipe
    if found.kind == "judge":
        yield ok(f"{recipe.ranker} at {recipe.ranker_url} answers a trial question")
        return
    told = recipe.ranker
    if found.parameters:
        told += f": {parameters_text(found.parameters)}, {size(found.on_disk)}"
        room = min((free for _, free in facts.machines.cards.values()), default=0)
        if facts.machines.cards and 2 * found.parameters > room:
            yield no(f"{told}; {size(room)} of GPU memory is free, and each GPU loads all of it")
        if found.on_disk > _SMALL_RANKER:
            yield ok(f"{told}; its config, tokenizer and files are whole; not loaded, which would take long")
            return
    # on the CPU, with the prompt as text: the policy's weights may not be here yet
    ranker = found.backend.load(dataclasses.replace(recipe, ranker_prompt="text"))
    one, other = ask_trial(ranker, [TRIAL, (TRIAL[0], TRIAL[2], TRIAL[1])], f"--ranker {recipe.ranker}")
    yield ok(f"{told}; it loads and answers a trial pair ({one:.3g}, {other:.3g} the other way round)")
    yield from _ranker_cuts(facts, ranker)


def _ranker_cuts(facts: Facts, ranker: Any) -> Findings:
    """Prompts that the ranker reads only in part."""
    inputs = getattr(ranker, "inputs", None)
    if inputs is not None and facts.tokenizer is not None:
        inputs.render = prompt_renderer(facts.recipe, facts.tokenizer)
    limit = f", and at least {inputs.candidate_maxlength - 3} tokens of a response" if inputs is not None else ""
    for made in facts.readable:
        which = ", ".join(map(str, made.iterations))
        cut = made.every * sum(ranker.count_cut(messages, [""]) > 0 for messages in made.conversations)
        if cut:
            yield note(f"iteration {which}: the ranker reads {cut} of {made.usable} prompts in part{limit}")
        elif limit:
            yield ok(f"iteration {which}: the ranker reads all of each prompt{limit}")


def ranking_seconds(work: Work, run: Run, ranker: Ranker | None, rate: float) -> float:
    """Rough seconds of ranking the iteration's responses, at so many FLOPs a second.

    A PairRM reads every ordered pair, a reward model every response once. 0 where the ranker's size is not known.
    """
    if not work.generate or ranker is None:
        return 0.0
    k, tokens, prompts = run.recipe.pairs, work.response_tokens(run.recipe), max(1, work.prompts)
    if ranker.reads_pairs:
        read = work.comparisons(k) * (work.prompt_tokens / prompts + 2 * tokens / (prompts * k))
    else:
        read = work.prompt_tokens * k + tokens
    return 2 * ranker.parameters * read / (rate * _SHARE["cpu" if run.cpu else "gpu"])
