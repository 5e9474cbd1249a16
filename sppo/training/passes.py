"""The passes over all responses before the first step: the log-probs of the reference and of the anchor, as tables.

A pass that is broken off keeps what it has, and the next start computes what is missing in the same batches. Which
responses share a batch decides a log-prob's last bits, so the table is the same as after a pass that ran to its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sppo.command.errors import SPPOError
from sppo.command.progress import progress
from sppo.command.stopping import heard, may_stop, stop_asked
from sppo.models.loading import load_causal_lm
from sppo.models.policy import Policy
from sppo.training.data import Place, even_parts
from sppo.training.logps import add_lean_forward
from sppo.training.network import unsharded
from sppo.training.reference import ReferenceTable

if TYPE_CHECKING:
    from sppo.training.trainer import SPPOTrainer

_KEPT_EVERY = 32  # batches between two times at which a pass writes what it has


class Anchor(NamedTuple):
    """What --anchor pulls towards, where its log-probs are kept, and the precision that the policy is loaded in."""

    policy: Policy
    table: ReferenceTable
    dtype: Any


def find_reference(trainer: SPPOTrainer) -> torch.Tensor:
    """(S,): the table of an earlier run, or the policy's own log-probs before its first step.

    A resumed run needs the table: its policy is no longer the reference.
    """
    table = trainer.table
    found = _look_up(trainer, table, "reference")
    if found is not None:
        return found
    if trainer.state.global_step:
        raise SPPOError(
            f"{table.homes[0] / table.key}.safetensors is gone or damaged, so this run cannot be resumed: "
            f"its policy is not the reference any more. Delete {trainer.args.output_dir} to train again"
        )
    return _compute(trainer, trainer.model_wrapped, trainer.lean, table, "reference")


def find_anchor(trainer: SPPOTrainer, anchor: Anchor) -> torch.Tensor:
    """(S,): log pi_0 of every response, from the table of an earlier run, or from the anchor's own network.

    For its pass that network is whole on every rank, beside the policy, also where the policy's is sharded.
    """
    found = _look_up(trainer, anchor.table, "anchor")
    if found is not None:
        return found
    deepspeed = trainer.accelerator.state.deepspeed_plugin
    half = deepspeed is not None and trainer.accelerator.mixed_precision == "bf16"
    with unsharded(deepspeed), heard():
        dtype = torch.bfloat16 if half else anchor.dtype
        network = load_causal_lm(anchor.policy, dtype, trainer.recipe.attn_implementation)
    lean = add_lean_forward(network) and trainer.lean
    with trainer.accelerator.autocast():
        return _compute(trainer, network.to(trainer.args.device), lean, anchor.table, "anchor")


def _look_up(trainer: SPPOTrainer, table: ReferenceTable, whose: str) -> torch.Tensor | None:
    """(S,): what an earlier run has kept; None where there is nothing. Only rank 0 looks, so that all ranks agree."""
    size = len(trainer.train_dataset.sequence_rates)
    found = table.load(size) if trainer.is_world_process_zero() else None
    shared = torch.zeros(size + 1)
    if found is not None:
        shared[:size], shared[size] = found[0], 1
        many = "" if table.whole else f"{int((~found[0].isnan()).sum())} of {size} of "
        print(f"train: found {many}the {whose}'s log-probs in {found[1]}", flush=True)
    shared = trainer.accelerator.reduce(shared.to(trainer.args.device), "sum")
    return shared[:size] if shared[size] else None


@torch.no_grad()
def _compute(trainer: SPPOTrainer, network: Any, lean: bool, table: ReferenceTable, whose: str) -> torch.Tensor:
    """(S,): a network's log-prob of every response, kept in `table`; `whose` names it in progress.

    The ranks share the rows and make the same number of passes. Raises KeyboardInterrupt where the run is asked to
    stop: what is computed until then is kept.
    """
    data, accelerator, batch_size = trainer.train_dataset, trainer.accelerator, trainer.recipe.batch_size
    ranks, rank = accelerator.num_processes, accelerator.process_index
    lengths = data.lengths()
    order = (-lengths).argsort(kind="stable")
    parts = even_parts(lengths[order], -(-len(order) // (batch_size * ranks)) * ranks)
    kept = table.part(f"{ranks}x{batch_size}x{trainer.parts}")  # what decides who shares a batch
    logps = _look_up(trainer, kept, whose)  # (S,), NaN where there is none yet
    if logps is None:
        logps = torch.full((len(data.sequence_rates),), torch.nan, device=trainer.args.device)
    was_training = network.training
    network.eval()

    with progress(len(order), f"{whose} log-probs", "row") as bar:
        for number, first in enumerate(range(0, len(parts), ranks), start=1):
            rows = [order[list(part)] for part in parts[first : first + ranks]]
            bar.update(sum(map(len, rows)))
            sequences = torch.cat([data.sequences(int(i)) for i in np.concatenate(rows)])
            if not logps[sequences].isnan().any():
                continue
            # a rank without rows runs too, so that all ranks make the same number of passes
            places = [Place(int(i)) for i in (rows[rank] if len(rows[rank]) else order[-1:])]
            batch = trainer._prepare_inputs(trainer.data_collator(places))
            made = trainer.logps(network, batch, lean).float()
            shared = torch.zeros(len(logps) + 1, device=logps.device)
            if len(rows[rank]):
                shared[batch["sequence"]] = made
            shared[-1] = float(trainer.is_world_process_zero() and stop_asked())
            shared = accelerator.reduce(shared, "sum")
            logps[sequences] = shared[sequences]
            is_asked = may_stop() and shared[-1].item() > 0
            if is_asked or number % _KEPT_EVERY == 0:
                _keep(trainer, kept, logps)
            if is_asked:
                trainer.is_stopped = True
                raise KeyboardInterrupt

    network.train(was_training)
    if not logps.isfinite().all():
        bad = (~logps.isfinite()).nonzero().flatten().tolist()
        raise SPPOError(
            f"the model's log-probs are not finite for {len(bad)} responses, the first are {bad[:10]}; "
            "its weights are damaged or too large for this precision"
        )
    path = _keep(trainer, table, logps)
    if trainer.is_world_process_zero():
        table.remove_parts()
        print(f"train: the {whose}'s log-probs are kept in {path}", flush=True)
    return logps


def _keep(trainer: SPPOTrainer, table: ReferenceTable, logps: torch.Tensor) -> Path | None:
    """Write a table, on rank 0, which returns the file; the others wait."""
    path = table.save(logps.cpu()) if trainer.is_world_process_zero() else None
    trainer.accelerator.wait_for_everyone()
    return path
