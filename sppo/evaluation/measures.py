"""Measures of the answers to the held-out prompts: length, health, the user's own, perplexity and KL divergence.

They do not ask who wins. A policy that learns to fool its ranker shows here first.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sppo.command.errors import FOREIGN, SPPOError
from sppo.command.progress import progress
from sppo.command.stopping import end_if_asked, heard
from sppo.evaluation.health import health
from sppo.models.loading import load_causal_lm
from sppo.models.policy import Policy, open_policy
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
    *("kl", "empty", "cut", "repeated", "mean_thought_tokens", "unfinished_thoughts"),
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


def measure(recipe: Recipe, directory: Path, base: str, model: str = "") -> dict[str, float]:
    """Write directory/measures.json, unless it is there already, and return what is in it.

    model: the one that gave the answers, where it is not the base itself. One of other settings is replaced: it needs
    no new answers, so nothing is lost.
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
            found |= _under_the_base(recipe, base, model, rows)
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


class _Sequence(NamedTuple):
    """A response as token ids: what was read, and thought, before its answer, and the answer."""

    before: list[int]
    answer: list[int]

    @property
    def ids(self) -> list[int]:
        return self.before + self.answer


def _under_the_base(recipe: Recipe, base: str, model: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """base_perplexity, and with a `model` kl: how far it has gone from the base, by its own answers.

    base_perplexity is exp of the mean of -log p(token | prompt and the tokens before it) under the base, over all
    answers' tokens. kl is the mean over the answers y of log model(y | x) - log base(y | x), in nats an answer: an
    estimate of KL(model || base), without bias where the answers were drawn at temperature 1 and top_p 1. Both
    log-probs are of the same pass in the same precision, so that rounding cancels. It is the plain mean and not
    Schulman's k3, r - 1 - log r with r = base(y | x) / model(y | x): r of a whole answer has a long tail, and one
    answer would decide the mean. So of few answers kl may be a little below 0.

    A thought is among the tokens before an answer, and not counted itself.
    """
    sequences = []
    for row in rows:
        for response in row["responses"]:
            thought = response.get("thought_tokens") or 0
            before, answer = response["token_ids"][:thought], response["token_ids"][thought:]
            if answer:
                sequences.append(_Sequence([*row["prompt_token_ids"], *before], answer))
    if not sequences:
        raise SPPOError(f"{recipe.eval_prompts}: no answer has a token, so they have no perplexity")

    policy = open_policy(base, recipe.model_revision, recipe.trust_remote_code)
    under_base = _logps(policy, sequences, "perplexity under the base")
    found = {"base_perplexity": math.exp(-math.fsum(under_base) / sum(len(s.answer) for s in sequences))}
    if model:
        own = _logps(open_policy(model, "", recipe.trust_remote_code), sequences, "log-probs under the model itself")
        found["kl"] = math.fsum(a - b for a, b in zip(own, under_base, strict=True)) / len(sequences)
    return found


def _logps(policy: Policy, sequences: list[_Sequence], label: str) -> list[float]:
    """log p(answer | what stands before it) under a policy, in nats, of each sequence."""
    import torch

    device, dtype = device_and_dtype()
    with heard():
        network = load_causal_lm(policy, dtype).to(device).eval()
    found = [0.0] * len(sequences)
    with progress(len(sequences), label, "answer") as bar, torch.inference_mode():
        for indices in batches([len(s.ids) for s in sequences], _BATCH_TOKENS):
            end_if_asked()
            part = [sequences[i] for i in indices]
            width = max(len(s.ids) for s in part)
            ids = torch.tensor([s.ids + [0] * (width - len(s.ids)) for s in part], device=device)  # (B, T)
            mask = torch.tensor([[1] * len(s.ids) + [0] * (width - len(s.ids)) for s in part], device=device)
            logits = network(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, T, V)
            for n, (place, sequence) in enumerate(zip(indices, part, strict=True)):
                span = slice(len(sequence.before) - 1, len(sequence.ids) - 1)
                logps = torch.log_softmax(logits[n, span].float(), -1)  # (R, V)
                targets = torch.tensor(sequence.answer, device=device)[:, None]
                found[place] = logps.gather(-1, targets).sum().item()
            bar.update(len(part))
    return found
