"""What training needs, looked at before a run starts: its settings, batches, memory, ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from sppo.models.loading import skeleton
from sppo.models.policy import open_policy
from sppo.models.shape import Shape
from sppo.preflight.findings import RUNTIME, Finding, Findings, Run, fits, many, no, note, ok, size
from sppo.preflight.memory import training_memory
from sppo.training.launching import training_config
from sppo.training.network import check_network
from sppo.training.settings import accumulation, check_flags, check_machine


def check_settings(run: Run) -> Findings:
    """Flags that contradict each other, names that transformers does not know, a network that cannot be trained so."""
    recipe = run.recipe
    if run.trains:
        check_flags(recipe)
        check_machine(recipe, gpu=not run.cpu)
        if recipe.anchor_model:
            anchor = open_policy(recipe.anchor_model, recipe.anchor_revision, recipe.trust_remote_code, weights=False)
            skeleton(anchor, recipe.attn_implementation)
        if run.policy is not None and run.loads_model:
            check_network(recipe, run.policy)
    yield from ()


def check_batches(run: Run) -> Findings:
    """The processes that would train, and whether the global batch comes out even."""
    if not run.trains:
        return
    path, config, processes = training_config(run.gpus, run.accelerate_config, run.machines)
    if not run.cpu and config.get("use_cpu"):
        yield note(f"{path.stem} trains on the CPU although there are GPUs; leave --accelerate_config out")
    run.training = config, processes, 0
    recipe, accumulate = run.recipe, accumulation(run.recipe, processes)
    run.training = config, processes, accumulate
    rows = processes * recipe.batch_size * accumulate
    how = f"{many(processes, 'process')} x {recipe.batch_size} x {many(accumulate, 'accumulation step')}"
    yield ok(f"{rows} pairs a step: {how}, by {path.stem}")


def check_memory(run: Run) -> Findings:
    if run.shape and run.trains and run.training and (run.cpu or run.cards):
        yield _training_fits(run, run.shape)


def _training_fits(run: Run, shape: Shape) -> Finding:
    config, processes, _ = run.training
    fixed, activations = training_memory(run.recipe, shape, config, processes)
    passing = "activations or the anchor's weights" if run.recipe.anchor else "activations"
    parts = f"weights, gradients and optimiser in each process and about {{}} of {passing}"
    if run.cpu or config.get("use_cpu"):
        here = processes // run.machines
        parts = f"weights, gradients and optimiser in {many(here, 'process')} and about {{}} of {passing}"
        room, fixed, activations = run.main_memory, fixed * here, activations * here
        return fits("training", fixed, activations, room, parts, "Take a smaller model or --use_peft")
    room = min(free for _, free in run.cards.values())
    advice = "Lower --batch_size, or --use_peft"
    if fixed > room:
        everything = max(total for total, _ in run.cards.values())
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
