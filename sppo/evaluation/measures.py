"""Measures of the answers to the held-out prompts: length, health, the user's own, perplexity under the base model.

They do not ask who wins. A policy that learns to fool its ranker shows here first.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sppo.command.errors import FOREIGN, SPPOError
from sppo.command.progress import progress
from sppo.command.stopping import end_if_asked, heard
from sppo.evaluation.health import health
from sppo.models.loading import load_causal_lm
from sppo.models.policy import open_policy
from sppo.rankers.batching import batches, device_and_dtype
from sppo.rankers.function import load_function, source_file
from sppo.recipe import Recipe
from sppo.schema import has_answer, prompt_text
from sppo.store.files import digest, read_json, write_json
from sppo.store.manifest import Stage
from sppo.store.parquet import read_rows

_BATCH_TOKENS = 4096  # logits of a 128k vocabulary in float32: 2 GB
_TAKEN = {  # the report's own names
    *("iteration", "base", "suites", "prompts", "responses", "loss", "beta2_loss", "mean_tokens", "base_perplexity"),
    *("empty", "cut", "repeated", "mean_thought_tokens", "unfinished_thoughts"),
}


def measure_stage(recipe: Recipe, directory: Path, base: str) -> Stage:
    """The stage that measures the answers in directory/responses.parquet; `base` is the run's first model."""
    inputs: dict[str, Any] = {"answers": digest(directory / "responses.parquet")}
    if recipe.measure:
        inputs["measure"] = digest(source_file(recipe.measure, "--measure"))
    if recipe.base_perplexity:
        inputs["base"] = open_policy(base, recipe.model_revision, recipe.trust_remote_code).identity()
    settings = {"measure": recipe.measure, "base_perplexity": recipe.base_perplexity}
    output = directory / "measures.json"
    return Stage("measure", directory / "measures.manifest.json", [output], inputs, settings, remade=True)


def measure(recipe: Recipe, directory: Path, base: str) -> dict[str, float]:
    """Write directory/measures.json, unless it is there already, and return what is in it.

    One of other settings is replaced: it needs no new answers, so nothing is lost.
    """
    stage = measure_stage(recipe, directory, base)
    if not stage.is_current():
        stage.discard()
        stage.begin()
        rows = list(read_rows(directory / "responses.parquet", ["prompt", "responses", "prompt_token_ids"]))
        found = health([response for row in rows for response in row["responses"]])
        if recipe.measure:
            found |= _own(recipe.measure, rows)
        if recipe.base_perplexity:
            found["base_perplexity"] = _perplexity(recipe, base, rows)
        write_json(stage.outputs[0], {name: float(f"{value:.6g}") for name, value in found.items()})
        stage.finish({"prompts": len(rows)})
    return read_json(stage.outputs[0])


def _own(name: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the user's function measures: for each name the mean of all its numbers, over all answers."""
    function = load_function(name, "--measure")
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for response in filter(has_answer, row["responses"]):
            for key, numbers in ask(function, name, prompt_text(row["prompt"]), response["text"]).items():
                values[key] += numbers
    refuse_taken(values, name)
    return {key: sum(numbers) / len(numbers) for key, numbers in values.items() if numbers}


def refuse_taken(names: Iterable[str], measure: str) -> None:
    """Raise SPPOError for names that the report needs for its own figures."""
    taken = [name for name in names if name in _TAKEN or name.endswith(("_win_rate", "_interval", "_unanswered"))]
    if taken:
        raise SPPOError(f"--measure {measure}: {', '.join(taken)} is the report's own name; give it another")


def ask(function: Any, name: str, prompt: str, answer: str) -> dict[str, list[float]]:
    """What the measure `name` gives for one answer. Raises SPPOError where it fails, or gives anything but numbers."""
    try:
        answers = function(prompt, answer).items()
        said = {str(key): [float(x) for x in (v if isinstance(v, list) else [v])] for key, v in answers}
    except FOREIGN as error:
        raise SPPOError(
            f"the measure {name} failed ({type(error).__name__}: {error}); it should return a dictionary "
            "of numbers, or of lists of numbers"
        ) from None
    if not all(math.isfinite(x) for numbers in said.values() for x in numbers):
        raise SPPOError(f"the measure {name} gave {said} for {answer!r}: not finite")
    return said


def _perplexity(recipe: Recipe, base: str, rows: list[dict[str, Any]]) -> float:
    """exp of the mean of -log p(token | prompt and the tokens before it) under the base, over all answers' tokens.

    A thought is among the tokens before an answer, and not counted itself.
    """
    import torch

    device, dtype = device_and_dtype()
    policy = open_policy(base, recipe.model_revision, recipe.trust_remote_code)
    with heard():
        network = load_causal_lm(policy, dtype).to(device).eval()
    sequences = [  # (what was read and thought, the answer)
        ([*row["prompt_token_ids"], *r["token_ids"][: r.get("thought_tokens") or 0]], answer)
        for row in rows
        for r in row["responses"]
        if (answer := r["token_ids"][r.get("thought_tokens") or 0 :])
    ]
    if not sequences:
        raise SPPOError(f"{recipe.eval_prompts}: no answer has a token, so they have no perplexity")
    total, count = 0.0, 0
    with progress(len(sequences), "perplexity under the base", "answer") as bar, torch.inference_mode():
        for indices in batches([len(p) + len(r) for p, r in sequences], _BATCH_TOKENS):
            end_if_asked()
            part = [sequences[i] for i in indices]
            width = max(len(p) + len(r) for p, r in part)
            ids = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in part], device=device)  # (B, T)
            mask = torch.tensor([[1] * (len(p) + len(r)) + [0] * (width - len(p) - len(r)) for p, r in part])
            logits = network(input_ids=ids, attention_mask=mask.to(device), use_cache=False).logits  # (B, T, V)
            for n, (prompt, response) in enumerate(part):
                span = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
                logps = torch.log_softmax(logits[n, span].float(), -1)  # (R, V)
                targets = torch.tensor(response, device=device)[:, None]
                total -= logps.gather(-1, targets).sum().item()
                count += len(response)
            bar.update(len(part))
    return math.exp(total / count)
