"""What training needs, looked at before a run starts: its settings, batches, memory, ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from sppo.command.errors import SPPOError
from sppo.models.loading import empty_network
from sppo.models.policy import open_policy
from sppo.models.shape import Shape
from sppo.preflight.facts import RUNTIME, Facts, Run, Training
from sppo.preflight.findings import Finding, Findings, fits, many, no, note, ok, size
from sppo.preflight.memory import training_memory
from sppo.training.launching import training_config
from sppo.training.network import check_network
from sppo.training.settings import accumulation, check_flags, check_machine


def look_at_training(run: Run) -> Training:
    """The processes that would train. Raises UsageError for an accelerate config that does not fit."""
    path, config, processes = training_config(run.gpus, run.recipe.accelerate_config, run.machines)
    try:
        return Training(path.stem, config, processes, accumulation(run.recipe, processes), "")
    except SPPOError as error:
        return Training(path.stem, config, processes, 0, str(error))


def check_settings(facts: Facts) -> Findings:
    """Flags that contradict each other, names that transformers does not know, a network that cannot be trained so."""
    recipe, model = facts.recipe, facts.model
    if facts.run.trains:
        check_flags(recipe)
        check_machine(recipe, gpu=not facts.run.cpu)
        if recipe.anchor_model:
            anchor = open_policy(recipe.anchor_model, recipe.anchor_revision, recipe.trust_remote_code, weights=False)
            empty_network(anchor, recipe.attn_implementation)
        if model is not None and not model.refused:
            check_network(recipe, model.policy)
    yield from ()


def check_batches(facts: Facts) -> Findings:
    """Whether the global batch comes out even."""
    training, recipe = facts.training, facts.recipe
    if training is None:
        return
    if not facts.run.cpu and training.config.get("use_cpu"):
        yield note(f"{training.config_name} trains on the CPU although there are GPUs; leave --accelerate_config out")
    if training.uneven:
        yield no(training.uneven)
        return
    processes, accumulate = training.processes, training.accumulation
    rows = processes * recipe.batch_size * accumulate
    how = f"{many(processes, 'process')} x {recipe.batch_size} x {many(accumulate, 'accumulation step')}"
    yield ok(f"{rows} pairs a step: {how}, by {training.config_name}")


def check_memory(facts: Facts) -> Findings:
    run = facts.run
    if facts.shape and facts.training and (run.cpu or facts.machines.cards):
        yield _training_fits(facts, facts.shape, facts.training)


def _training_fits(facts: Facts, shape: Shape, training: Training) -> Finding:
    run, recipe, processes = facts.run, facts.recipe, training.processes
    fixed, activations = training_memory(recipe, shape, training.config, processes)
    passing = "activations or the anchor's weights" if recipe.anchor else "activations"
    if run.cpu or training.config.get("use_cpu"):
        here = processes // run.machines
        parts = f"weights, gradients and optimiser in {many(here, 'process')} and about {{}} of {passing}"
        room, fixed, activations = facts.machines.memory, fixed * here, activations * here
        return fits("training", fixed, activations, room, parts, "Take a smaller model or --use_peft")

    parts = f"weights, gradients and optimiser in each process and about {{}} of {passing}"
    room = min(free for _, free in facts.machines.cards.values())
    advice = "Lower --batch_size, or --use_peft"
    if fixed > room:
        everything = max(total for total, _ in facts.machines.cards.values())
        advice = "More GPUs share it under zero3; --use_peft trains an adapter instead"
        if fixed <= everything:
            advice = f"Others use some of the {size(everything)}: stop what does. {advice}"
    return fits("training", fixed, activations + RUNTIME, room, parts, advice)


def check_ports(run: Run) -> Findings:
    if not run.trains:
        return
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 10)"
        done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        yield no(f"processes here cannot reach each other on 127.0.0.1 ({last}), and training's must")
    else:
        yield ok("processes reach each other on 127.0.0.1")
    standing = [k for k in "MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE".split() if k in os.environ]
    if standing:
        yield note(
            f"{', '.join(standing)} in the environment, as under a launcher: training may wait for others; unset"
        )
