"""Training, looked at before a run starts: its settings, batches, memory, ports."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path
from typing import Any

from sppo.models import chat
from sppo.models.loading import empty_network, load_config, original_context
from sppo.models.policy import open_policy
from sppo.models.shape import Shape
from sppo.preflight.facts import Machines, Model, Run
from sppo.preflight.findings import Look, fits, many, no, note, ok, size
from sppo.preflight.memory import RUNTIME, training_memory
from sppo.recipe import Recipe, reads_anchor
from sppo.schema import THOUGHT_MARKS
from sppo.store.parquet import read_rows
from sppo.training.launching import AccelerateConfig, training_config
from sppo.training.network import check_network
from sppo.training.settings import accumulation, check_flags, check_machine, refuse_other_vocabulary
from sppo.training.trial import try_training

_LOOKED_AT = 200  # rows of a training set


def check_settings(run: Run, model: Model | None) -> Look[None]:
    """Flags that contradict each other, names that transformers does not know, a network that cannot be trained so."""
    recipe = run.recipe
    check_flags(recipe)
    check_machine(recipe, gpu=not run.cpu)
    if recipe.anchor_model:
        anchor = open_policy(recipe.anchor_model, recipe.anchor_revision, recipe.trust_remote_code, weights=False)
        empty_network(anchor, recipe.attn_implementation)
        if model:
            refuse_other_vocabulary(recipe, anchor, model.policy)
    if model and model.loads:
        check_network(recipe, model.policy)
        if untried := try_training(recipe, model.policy):
            yield note(f"{untried}: whether it trains with these settings is not tried")
        else:
            yield ok("a miniature of the model trains with these settings")
        context = original_context(load_config(model.policy))
        if context and recipe.max_length > context:
            yield note(
                f"the model computes otherwise beyond {context} tokens (longrope): under ZeRO-3 or FSDP, keep "
                f"--max_length at {context}, or the first step is an error"
            )


def check_thoughts(run: Run, tokenizer: Any) -> Look[None]:
    """--train_thoughts false, where nothing has a thought: the data that are there, or the model that would draw."""
    if run.recipe.train_thoughts:
        return
    without = "--train_thoughts false changes nothing: a response without a thought is trained on whole"
    for i in run.left:
        path = run.run_dir / f"iter{i.number}" / "data" / "train.parquet"
        if i.training and not i.data and not _has_thoughts(path):
            yield note(f"iteration {i.number}: no response in {path} has a thought. {without}")
    if run.makes_data and tokenizer is not None and not _thinks(tokenizer):
        yield note(f"nothing in the chat template or the vocabulary shows that this model thinks. {without}")


def _has_thoughts(path: Path) -> bool:
    """Whether a response in the first rows of a training set has a thought."""
    rows = itertools.islice(read_rows(path, ["responses"]), _LOOKED_AT)
    return any((response or {}).get("thought_tokens") for row in rows for response in row["responses"] or ())


def _thinks(tokenizer: Any) -> bool:
    """Whether the model may think before it answers, by its template or its tokens."""
    shown = chat.template_source(tokenizer) + "".join(tokenizer.get_added_vocab())
    return bool(chat.thought_field(tokenizer)) or any(mark in shown for pair in THOUGHT_MARKS for mark in pair)


def look_at_config(run: Run) -> Look[AccelerateConfig]:
    """The accelerate config of the processes that would train. Raises UsageError for one that does not fit."""
    config = training_config(run.gpus, run.recipe.accelerate_config, run.machines)
    if not run.cpu and config.content.get("use_cpu"):
        yield note(f"{config.path.stem} trains on the CPU although there are GPUs; leave --accelerate_config out")
    return config


def look_at_batch(recipe: Recipe, config: AccelerateConfig) -> Look[int]:
    """Pairs a step. Raises UsageError where the global batch does not come out even."""
    processes, accumulate = config.processes, accumulation(recipe, config.processes)
    rows = processes * recipe.batch_size * accumulate
    how = f"{many(processes, 'process')} x {recipe.batch_size} x {many(accumulate, 'accumulation step')}"
    yield ok(f"{rows} pairs a step: {how}, by {config.path.stem}")
    return rows


def check_memory(run: Run, machines: Machines, shape: Shape, config: AccelerateConfig, extra: int = 0) -> Look[None]:
    """extra: each prompt's answers of other models, which sppo_all trains on too."""
    if not run.cpu and not machines.cards:
        return
    recipe, processes = run.recipe, config.processes
    fixed, activations = training_memory(recipe, shape, config.content, processes, extra)
    passing = "activations or the anchor's weights" if reads_anchor(recipe) else "activations"
    if run.cpu or config.content.get("use_cpu"):
        here = processes // run.machines
        parts = f"weights, gradients and optimiser in {many(here, 'process')} and about {{}} of {passing}"
        advice = "Take a smaller model or --use_peft"
        yield fits("training", fixed * here, activations * here, machines.memory, parts, advice)
        return

    parts = f"weights, gradients and optimiser in each process and about {{}} of {passing}"
    room = min(free for _, free in machines.cards.values())
    advice = "Lower --batch_size, or --use_peft"
    if fixed > room:
        everything = max(total for total, _ in machines.cards.values())
        advice = "More GPUs share it under zero3; --use_peft trains an adapter instead"
        if fixed <= everything:
            advice = f"Others use some of the {size(everything)}: stop what does. {advice}"
    yield fits("training", fixed, activations + RUNTIME, room, parts, advice)


def check_ports() -> Look[None]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        try:
            socket.create_connection(server.getsockname(), 10).close()
            yield ok("processes reach each other on 127.0.0.1")
        except OSError as error:
            yield no(f"processes here cannot reach each other on 127.0.0.1 ({error}), and training's must")
    standing = [k for k in "MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE".split() if k in os.environ]
    if standing:
        yield note(
            f"{', '.join(standing)} in the environment, as under a launcher: training may wait for others; unset"
        )
