"""A run in numbers, before it starts: how much work, how much memory, how much disk, how many hours.

Counts are exact or upper bounds. Bytes follow from the model's shape. Hours are rough: FLOPs over guessed shares of the
machine's measured matrix rate.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from sppo.config import Recipe

# Guesses: a chat model's usual response; the share of the matrix rate that each stage reaches.
TYPICAL_RESPONSE = 400
GENERATION, RANKING, TRAINING = 0.10, 0.25, 0.35
# A token of a response is on disk in the journal (JSON), its shard, responses.parquet and train.parquet.
_DATA_BYTES = 40
_ROW_BYTES = 4000  # of a prompt beside its responses: its text, four times, its matrix, its pair
# State that an optimiser keeps for each trained number, in bytes; any other keeps two float32, as Adam.
_STATE = {"rmsprop": 4, "sgd": 0, "adagrad": 4, "adafactor": 1, "lion_32bit": 4}


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def many(number: int, what: str) -> str:
    """So many of something."""
    return f"{number} {what}" if number == 1 else f"{number} {what}{'es' if what.endswith('s') else 's'}"


def count(number: int) -> str:
    """A number of parameters for a person."""
    billions = number >= 5e7
    return f"{number / (1e9 if billions else 1e6):.3g} {'billion' if billions else 'million'} parameters"


@dataclass
class Shape:
    """What a config.json says of a causal model, and its number of parameters."""

    parameters: int
    layers: int
    hidden: int
    heads: int
    kv_width: int  # numbers in a token's keys, in one layer
    bytes: int  # of a stored number

    @classmethod
    def of(cls, config: dict[str, Any], parameters: int) -> Shape:
        """From config.json as read; a key that an architecture does not have counts nothing."""
        text = config.get("text_config") or config
        heads, hidden = text.get("num_attention_heads") or 1, text.get("hidden_size") or 0
        width = text.get("head_dim") or hidden // heads
        kv = (text.get("num_key_value_heads") or heads) * width
        return cls(parameters, text.get("num_hidden_layers") or 0, hidden, heads, kv, stored_bytes(config))

    def cache(self, tokens: int, number: int = 2) -> int:
        """Bytes of keys and values of so many tokens, `number` bytes each."""
        return 2 * number * self.layers * self.kv_width * tokens


def stored_bytes(config: dict[str, Any]) -> int:
    """Bytes of one stored weight, by config.json's dtype."""
    kind = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return {"float32": 4, "float64": 8}.get(kind.removeprefix("torch."), 2)


@dataclass
class Load:
    """What one iteration has to do, as far as it is not done."""

    iteration: int
    generate: bool
    train: bool
    prompts: int  # that can be answered
    prompt_tokens: int
    longest_prompt: int
    most_tokens: int  # in all responses, were each as long as it may be
    rows: int  # pairs to train on, at most
    steps: int  # of the optimiser

    def responses(self, pairs: int) -> int:
        return self.prompts * pairs if self.generate else 0

    def comparisons(self, pairs: int) -> int:
        """Ordered pairs."""
        return self.prompts * pairs * (pairs - 1) if self.generate else 0

    def response_tokens(self, recipe: Recipe) -> int:
        """In all responses, as they usually are."""
        return min(self.most_tokens, self.prompts * recipe.pairs * TYPICAL_RESPONSE)


def training_rows(prompts: int, test_size: float) -> int:
    """Rows of train.parquet, if no pair is dropped."""
    return max(0, prompts - (round(test_size * prompts) if test_size < 1 else int(test_size)))


def steps(rows: int, recipe: Recipe, processes: int, accumulate: int) -> int:
    """Optimiser steps of one iteration's training."""
    return math.ceil(math.ceil(rows / (recipe.batch_size * accumulate * processes)) * recipe.num_train_epochs)


def trained_numbers(recipe: Recipe, shape: Shape) -> int:
    """Numbers that training moves: all, or a LoRA adapter on about seven matrices a layer."""
    if not recipe.use_peft:
        return shape.parameters
    return min(shape.parameters, 7 * 3 * recipe.lora_r * shape.hidden * shape.layers)


def state_bytes(optim: str) -> int:
    """Bytes that the optimiser keeps for a trained number."""
    return 2 if "8bit" in optim else _STATE.get(optim.removesuffix("_bnb"), 8)


def training_memory(recipe: Recipe, shape: Shape, config: dict[str, Any], processes: int) -> tuple[int, int]:
    """(bytes of weights, gradients and optimiser, bytes of activations) in one process of a training."""
    trained, state = trained_numbers(recipe, shape), state_bytes(recipe.optim)
    zero = (config.get("deepspeed_config") or {}).get("zero_stage", 0)
    mixed = config.get("mixed_precision") == "bf16"
    base = 0.6 if recipe.load_in_4bit else 4  # bytes; frozen under LoRA
    number = 2 if mixed else 4
    moment = 0.0  # a group of gradients in float32, as the optimiser steps
    if zero:  # weights and gradients in half precision where mixed, master weights, the optimiser's state
        weights, own = number * shape.parameters, (number + 4 * mixed + state) * trained
        moment = 4 * min(1e9, trained / processes) * mixed
        fixed = (weights / processes if zero == 3 else weights) + own / processes
    else:
        frozen = 0 if trained == shape.parameters else base * shape.parameters
        buckets = 4 * (processes > 1)  # DistributedDataParallel's copy of the gradients
        fixed = frozen + (4 + 4 + state + buckets) * trained
    tokens = recipe.batch_size * (recipe.pairs if recipe.loss_type == "sppo_all" else 2) * recipe.max_length
    layer = 34 * number // 2 * tokens * shape.hidden  # arXiv 2205.05198, without attention's scores
    kept = number * tokens * shape.hidden * shape.layers + layer
    return int(fixed), int(moment + (kept if recipe.gradient_checkpointing else layer * shape.layers))


def checkpoint_bytes(recipe: Recipe, shape: Shape, config: dict[str, Any]) -> int:
    """One checkpoint: weights, and under DeepSpeed master weights beside them, and the optimiser's state."""
    zero = (config.get("deepspeed_config") or {}).get("zero_stage", 0)
    weights = (4 if not zero else 6 if config.get("mixed_precision") == "bf16" else 8) + state_bytes(recipe.optim)
    return weights * trained_numbers(recipe, shape)


def model_bytes(recipe: Recipe, shape: Shape, config: dict[str, Any]) -> int:
    """One iteration's model on disk."""
    if recipe.use_peft:
        return 4 * trained_numbers(recipe, shape) + recipe.merge_adapter * shape.bytes * shape.parameters
    zero = config.get("distributed_type") == "DEEPSPEED"
    return shape.parameters * ((2 if config.get("mixed_precision") == "bf16" else 4) if zero else shape.bytes)


def data_bytes(load: Load, tokens: int) -> int:
    """An iteration's data, with so many tokens in its responses."""
    return _DATA_BYTES * tokens + _ROW_BYTES * load.prompts if load.generate else 0


def hours(load: Load, recipe: Recipe, parameters: int, ranker: int, per_pair: bool, rate: float) -> list[float]:
    """Rough hours of generating, ranking and training at `rate` FLOPs a second over all devices.

    ranker: its parameters, 0 where they are not known. per_pair: it reads every ordered pair, not every response.
    """
    k, tokens = recipe.pairs, load.response_tokens(recipe)
    mean = tokens / max(1, load.prompts * k)
    generating = 2 * parameters * (load.prompt_tokens + tokens) if load.generate else 0
    if per_pair:
        read = load.comparisons(k) * (load.prompt_tokens / max(1, load.prompts) + 2 * mean)
    else:
        read = load.prompt_tokens * k + tokens
    ranking = 2 * ranker * read if load.generate else 0
    sequences = load.rows * (k if recipe.loss_type == "sppo_all" else 2)
    length = min(load.prompt_tokens / max(1, load.prompts) + mean, recipe.max_length)
    flops = (8 if recipe.gradient_checkpointing else 6) * recipe.num_train_epochs + 2  # and the reference's pass
    training = flops * parameters * sequences * length if load.train else 0
    work = zip((generating, ranking, training), (GENERATION, RANKING, TRAINING), strict=True)
    return [flops / (rate * share) / 3600 for flops, share in work]


def matrix_rate() -> float:
    """FLOPs a second of one device's matrix products: bfloat16 on the GPU that is visible, else float32 on the CPU."""
    import torch

    gpu = torch.cuda.is_available()
    n, seconds = (8192, 0.5) if gpu else (1024, 0.2)
    a = torch.ones(n, n, device="cuda" if gpu else "cpu", dtype=torch.bfloat16 if gpu else torch.float32)

    def run(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            a @ a
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    run(2)  # the first takes longer
    times = max(1, int(seconds / max(run(1), 1e-6)))
    return 2 * n**3 * times / run(times)


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
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(header))]
    return ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=False)) for line in lines]


def _hours(value: float) -> str:
    return f"{value:.1f}" if value >= 0.05 or not value else "<0.1"
