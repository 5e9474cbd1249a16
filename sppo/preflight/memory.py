"""What a training takes of memory, and a run of disk, in bytes."""

from __future__ import annotations

from typing import Any

from sppo.models.shape import Shape
from sppo.preflight.facts import Work
from sppo.recipe import Recipe, reads_anchor

RUNTIME = 2 << 30  # bytes of a GPU that CUDA, kernels and buffers take beside what is counted
# State that an optimiser keeps for each trained number, in bytes; any other keeps two float32, as Adam.
_STATE = {"rmsprop": 4, "sgd": 0, "adagrad": 4, "adafactor": 1, "lion_32bit": 4}
# A token of a response is on disk in the journal (JSON), its shard, responses.parquet and train.parquet.
_TOKEN_BYTES = 40
_ROW_BYTES = 4000  # of a prompt beside its responses: its text, four times, its matrix, its pair


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


def training_memory(
    recipe: Recipe, shape: Shape, config: dict[str, Any], processes: int, extra: int = 0
) -> tuple[int, int]:
    """Bytes that each process takes under an accelerate config: (what stays, what comes and goes).

    What stays is weights, gradients and the optimiser's state. What comes and goes is activations, or the anchor's
    weights before the first step. extra: each prompt's answers of other models.
    """
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
    tokens = recipe.batch_size * (recipe.pairs + extra if recipe.loss_type == "sppo_all" else 2) * recipe.max_length
    layer = 34 * number // 2 * tokens * shape.hidden
    activations = layer * shape.layers
    if recipe.gradient_checkpointing:  # each layer's input is kept, and one layer is computed again at a time
        activations = number * tokens * shape.hidden * shape.layers + layer

    # the anchor's network (reference.find_anchor) is whole on each rank, but gone before the first step
    anchor = 0
    if reads_anchor(recipe):
        anchor = (2 if is_mixed and (zero or recipe.use_peft) else 4) * shape.parameters
    return int(fixed), int(max(anchor, fp32_bucket + activations))


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


def data_bytes(work: Work, tokens: int) -> int:
    """An iteration's data on disk, with so many tokens in its responses."""
    return _TOKEN_BYTES * tokens + _ROW_BYTES * work.prompts if work.iteration.data else 0
