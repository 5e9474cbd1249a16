"""What ranking needs, looked at before a run starts: the ranker, which is loaded and asked where it is small."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sppo import rankers
from sppo.models.files import files_to_fetch, parameters, weight_files, weight_shapes
from sppo.preflight.findings import Findings, Load, Run, no, note, ok, parameters_text, size
from sppo.rankers import TRIAL, ask_trial
from sppo.rankers.pairrm import prompt_renderer
from sppo.rankers.pinning import pinned

# The share of the device's matrix rate that ranking reaches, measured: docs/benchmarks.md, docs/gpu.md.
_SHARE = {"cpu": 0.7, "gpu": 0.28}
_SMALL_RANKER = 4 << 30  # bytes on disk up to which a ranker is loaded to see that it can be


def check_download(run: Run) -> Findings:
    """Count the bytes to download. What is wrong with the ranker is check_ranker's to say."""
    from huggingface_hub import constants

    local = Path(run.recipe.ranker).expanduser().is_dir() or ":" in run.recipe.ranker
    if run.generates and not local and run.recipe.ranker_backend not in ("judge", "function"):
        recipe = pinned(run.recipe, run.run_dir / "iter1" / "data")
        try:
            found = {} if constants.HF_HUB_OFFLINE else files_to_fetch(recipe.ranker, recipe.ranker_revision)
        except Exception:  # noqa: BLE001 - check_ranker meets the same and tells it
            found = {}
        run.downloads["ranker"] = sum(length for length, missing in found.values() if missing)
    yield from ()


def check_ranker(run: Run) -> Findings:
    """Fetch the ranker, load it where it is small, and ask it something."""
    if not run.generates:
        return
    recipe = pinned(run.recipe, run.run_dir / "iter1" / "data")
    module = rankers.backend(recipe)
    kind = module.__name__.rpartition(".")[2]
    where = Path(module.fetch(recipe))
    if kind == "judge":
        yield ok(f"{recipe.ranker} at {recipe.ranker_url} answers a trial question")
        return
    told = recipe.ranker
    if kind != "function":
        shapes = weight_shapes(where)
        run.ranker_parameters, run.ranker_reads_pairs = parameters(shapes), kind != "reward_model"
        on_disk = sum(f.stat().st_size for f in weight_files(where))
        told += f": {parameters_text(run.ranker_parameters)}, {size(on_disk)}"
        room = min((free for _, free in run.cards.values()), default=0)
        if run.cards and 2 * run.ranker_parameters > room:
            yield no(f"{told}; {size(room)} of GPU memory is free, and each GPU loads all of it")
        if on_disk > _SMALL_RANKER:
            yield ok(f"{told}; its config, tokenizer and files are whole; not loaded, which would take long")
            return
    # on the CPU, with the prompt as text: the policy's weights may not be here yet
    ranker = module.load(dataclasses.replace(recipe, ranker_prompt="text"))
    one, other = ask_trial(ranker, [TRIAL, (TRIAL[0], TRIAL[2], TRIAL[1])], f"--ranker {recipe.ranker}")
    yield ok(f"{told}; it loads and answers a trial pair ({one:.3g}, {other:.3g} the other way round)")
    yield from _ranker_cuts(run, ranker)


def _ranker_cuts(run: Run, ranker: Any) -> Findings:
    """Prompts that the ranker reads only in part."""
    inputs = getattr(ranker, "inputs", None)
    if inputs is not None and run.tokenizer is not None:
        inputs.render = prompt_renderer(run.recipe, run.tokenizer)
    limit = f", and at least {inputs.candidate_maxlength - 3} tokens of a response" if inputs is not None else ""
    for made in {id(s): s for s in run.sets.values()}.values():
        which = ", ".join(str(n) for n, s in run.sets.items() if s is made)
        cut = made.every * sum(ranker.count_cut(messages, [""]) > 0 for messages in made.conversations)
        if cut:
            yield note(f"iteration {which}: the ranker reads {cut} of {made.usable} prompts in part{limit}")
        elif limit:
            yield ok(f"iteration {which}: the ranker reads all of each prompt{limit}")


def seconds(load: Load, run: Run) -> float:
    """Rough seconds of ranking the iteration's responses, at run.rate FLOPs a second.

    A PairRM reads every ordered pair, a reward model every response once. 0 where the ranker's size is not known.
    """
    if not load.generate:
        return 0.0
    k, tokens, prompts = run.recipe.pairs, load.response_tokens(run.recipe), max(1, load.prompts)
    if run.ranker_reads_pairs:
        read = load.comparisons(k) * (load.prompt_tokens / prompts + 2 * tokens / (prompts * k))
    else:
        read = load.prompt_tokens * k + tokens
    return 2 * run.ranker_parameters * read / (run.rate * _SHARE["cpu" if run.cpu else "gpu"])
