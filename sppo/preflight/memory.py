"""What a training takes: rows, steps, bytes of memory and of disk."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from sppo.models.shape import Shape
from sppo.preflight.facts import Run, Work
from sppo.recipe import Recipe

# The share of the device's matrix rate that training reaches, measured: docs/benchmarks.md, docs/gpu.md.
_SHARE = {"cpu": 0.35, "gpu": 0.3}
# State that an optimiser keeps for each trained number, in bytes; any other keeps two float32, as Adam.
_STATE = {"rmsprop": 4, "sgd": 0, "adagrad": 4, "adafactor": 1, "lion_32bit": 4}


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


def _zero_stage(config: dict[str, Any]) -> int:
    """DeepSpeed's ZeRO stage of an accelerate config; 0 without DeepSpeed."""
    return (config.get("deepspeed_config") or {}).get("zero_stage", 0)


class TrainingMemory(NamedTuple):
    """Bytes of memory that one process of a training takes."""

    fixed: int  # weights, gradients and the optimiser's state
    passing: int  # what comes and goes: activations, or the anchor's weights before the first step


def training_memory(recipe: Recipe, shape: Shape, config: dict[str, Any], processes: int) -> TrainingMemory:
    """What training takes under an accelerate config (`config`, as read) with so many processes."""
    trained, state = trained_numbers(recipe, shape), state_bytes(recipe.optim)
    zero = _zero_stage(config)
    is_mixed = config.get("mixed_precision") == "bf16"
    number = 2 if is_mixed else 4  # bytes of a weight or an activation in a product

    # what stays for the whole training
    fp32_bucket = 0.0  # DeepSpeed's group of gradients in float32, as the optimiser steps
    if zero:
        weights = number * shape.parameters
        gradients = number * trained
        master = 4 * trained if is_mixed else 0  # float32 weights that the optimiser moves
        if is_mixed:
            fp32_bucket = 4 * min(1e9, trained / processes)
        sharded = (gradients + master + state * trained) / processes
        fixed = sharded + (weights / processes if zero == 3 else weights)
    else:
        frozen = 0.0
        if trained != shape.parameters:
            stored = shape.bytes if is_mixed else 4
            frozen = (0.6 if recipe.load_in_4bit else stored) * shape.parameters
        buckets = 4 if processes > 1 else 0  # DistributedDataParallel's copy of the gradients
        fixed = frozen + (4 + 4 + state + buckets) * trained

    # activations of a micro-batch: of one layer, arXiv 2205.05198, without attention's scores
    tokens = recipe.batch_size * (recipe.pairs if recipe.loss_type == "sppo_all" else 2) * recipe.max_length
    layer = 34 * number // 2 * tokens * shape.hidden
    activations = layer * shape.layers
    if recipe.gradient_checkpointing:  # each layer's input is kept, and one layer is computed again at a time
        activations = number * tokens * shape.hidden * shape.layers + layer

    # the anchor's network (reference.find_anchor) is whole on each rank, but gone before the first step
    anchor = 0
    if recipe.anchor:
        anchor = (2 if is_mixed and (zero or recipe.use_peft) else 4) * shape.parameters
    return TrainingMemory(int(fixed), int(max(anchor, fp32_bucket + activations)))


def checkpoint_bytes(recipe: Recipe, shape: Shape, config: dict[str, Any]) -> int:
    """One checkpoint: weights, and under DeepSpeed master weights beside them, and the optimiser's state."""
    weights = 4
    if _zero_stage(config):
        weights = 6 if config.get("mixed_precision") == "bf16" else 8
    return (weights + state_bytes(recipe.optim)) * trained_numbers(recipe, shape)


def model_bytes(recipe: Recipe, shape: Shape, config: dict[str, Any]) -> int:
    """One iteration's model on disk."""
    if recipe.use_peft:
        merged = shape.bytes * shape.parameters if recipe.merge_adapter else 0
        return 4 * trained_numbers(recipe, shape) + merged
    if config.get("distributed_type") == "DEEPSPEED":
        return (2 if config.get("mixed_precision") == "bf16" else 4) * shape.parameters
    return shape.bytes * shape.parameters


def training_seconds(work: Work, run: Run, parameters: int, rate: float) -> float:
    """Rough seconds of training on the iteration's pairs, at so many FLOPs a second."""
    if not work.train:
        return 0.0
    recipe, prompts = run.recipe, max(1, work.prompts)
    mean = work.response_tokens(recipe) / (prompts * recipe.pairs)
    sequences = work.rows * (recipe.pairs if recipe.loss_type == "sppo_all" else 2)
    length = min(work.prompt_tokens / prompts + mean, recipe.max_length)
    passes = 3 + recipe.gradient_checkpointing  # forward, twice that backward, and what is recomputed
    flops = 2 * (passes * recipe.num_train_epochs + 1) * parameters * sequences * length  # + the reference's pass
    return flops / (rate * _SHARE["cpu" if run.cpu else "gpu"])
