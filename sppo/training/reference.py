"""The reference: log pi_t of every response, computed once before the first step, and kept as a table in a file.

A pass over the responses that is broken off keeps what it has, and the next start computes what is missing in the same
batches. Which responses share a batch decides a log-prob's last bits, so the table is the same as after a pass that ran
to its end. The anchor's table (--anchor, --reg) is made the same way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import release_memory

from sppo.command.errors import SPPOError
from sppo.command.progress import progress
from sppo.command.stopping import heard, may_stop, stop_asked
from sppo.models.loading import add_adapter, load_causal_lm
from sppo.models.policy import Policy
from sppo.store.files import atomic
from sppo.training.batches import Batches, MicroBatch, even_parts, to_device
from sppo.training.data import TrainingSet
from sppo.training.logps import Forward, add_lean_forward
from sppo.training.network import unsharded
from sppo.training.ranks import Stopped, sum_over_ranks

_KEPT_EVERY = 32  # batches between two times at which a pass writes what it has


@dataclass
class LogProbTable:
    """Where the log-probs of one policy over one data set are kept: beside the data, else in the run's directory."""

    key: str  # see reference_key
    homes: tuple[Path, ...]
    name: Literal["reference", "anchor"]  # in messages
    whole: bool = True  # False for what a pass that was broken off has computed; the rest of such a table is NaN

    def part(self, batches: str) -> LogProbTable:
        """Where a pass keeps what it has; `batches`: what decides which responses share a batch."""
        return LogProbTable(f"{self.key}.{batches}", self.homes, self.name, whole=False)

    def remove_parts(self) -> None:
        """Delete what passes that were broken off have kept of this table, as far as it may be deleted."""
        for home in self.homes:
            for path in home.glob(f"{self.key}.*.safetensors"):
                with contextlib.suppress(OSError):
                    path.unlink()

    def load(self, size: int) -> tuple[torch.Tensor, Path] | None:
        """The table, (size,) float32, and its file; None where there is none that is whole and as it was written."""
        from safetensors import SafetensorError, safe_open

        for home in self.homes:
            path = home / f"{self.key}.safetensors"
            if not path.is_file():
                continue
            try:
                with safe_open(path, "pt") as file:
                    table, wanted = file.get_tensor("logps"), (file.metadata() or {}).get("sha256")
            except (SafetensorError, KeyError, OSError) as error:
                print(f"train: {path} is damaged ({error}); it is not used", flush=True)
                continue
            if wanted not in (None, _digest(table)):  # older tables have none
                print(f"train: {path} is damaged (it changed since it was written); it is not used", flush=True)
                continue
            if table.shape == (size,) and (table.isfinite().all() or not self.whole):
                return table, path
        return None

    def save(self, table: torch.Tensor) -> Path:
        """Write the table into the first of `homes` that can be written to; says so where that is not the first one."""
        from safetensors.torch import save_file

        for home in self.homes:
            path = home / f"{self.key}.safetensors"
            try:
                with atomic(path) as temporary:
                    save_file({"logps": table}, temporary, metadata={"sha256": _digest(table)})
            except OSError as error:
                if home == self.homes[-1]:
                    raise
                said = f"the {self.name}'s log-probs cannot be kept in {home} ({error.strerror})"
                print(f"train: {said}, so they go to the run")
                continue
            return path
        raise AssertionError("no home")


def _digest(table: torch.Tensor) -> str:
    return hashlib.sha256(table.float().cpu().numpy().tobytes()).hexdigest()


def reference_key(policy: str, data: TrainingSet, **how: Any) -> str:
    """Hash of the policy's identity, of how it is run (precision, attention, library), and of every token id.

    The token ids stand for the data set's file, the lengths, the template and its arguments, which decide them.
    """
    sha = hashlib.sha256(json.dumps({"policy": policy, **how}, sort_keys=True).encode())
    for sides in zip(data.prompts, data.responses, strict=True):
        for prompt, response in zip(*sides, strict=True):
            sha.update(f"{len(prompt)},{len(response)};".encode() + prompt.tobytes() + response.tobytes())
    return sha.hexdigest()[:32]


class Anchor(NamedTuple):
    """What --anchor and --reg pull towards."""

    policy: Policy
    table: LogProbTable  # where its log-probs are kept
    dtype: Any  # of its weights: the precision that the trained policy is loaded in
    attention: str
    merge: bool  # an adapter into its base: as the policy's is, since a merge rounds


def find_reference(
    network: Any,
    batches: Batches,
    accelerator: Accelerator,
    forward: Forward,
    table: LogProbTable,
    resumed: Path | None = None,
) -> torch.Tensor:
    """(S,): the table of an earlier run, or the network's own log-probs before its first step.

    resumed: where a run works that goes on from a checkpoint. Its policy is not the reference any more, so it needs the
    table; without one SPPOError is raised.
    """
    found = _look_up(table, batches, accelerator)
    if found is not None:
        return found
    if resumed is not None:
        raise SPPOError(
            f"{table.homes[0] / table.key}.safetensors is gone or damaged, so this run cannot be resumed: "
            f"its policy is not the reference any more. Delete {resumed} to train again"
        )
    return log_probs(network, batches, accelerator, forward, table)


def find_anchor(anchor: Anchor, batches: Batches, accelerator: Accelerator, forward: Forward) -> torch.Tensor:
    """(S,): log pi_0 of every response, from the table of an earlier run, or from the anchor's own network.

    For its pass that network is whole on every rank, beside the policy, also where the policy's is sharded.
    """
    found = _look_up(anchor.table, batches, accelerator)
    if found is not None:
        return found
    network, is_lean = _anchor_network(anchor, accelerator)
    with accelerator.autocast():
        if is_lean := is_lean and forward.is_lean:  # the policy's were checked; an anchor may be built otherwise
            shortest = to_device(batches.shortest(), accelerator.device)
            is_lean = forward.agrees_with_plain(network, shortest, accelerator)
        logps = log_probs(network, batches, accelerator, replace(forward, is_lean=is_lean), anchor.table)
    del network
    release_memory()  # its lean forward refers to it: without the collector it would stay for the whole training
    return logps


def _anchor_network(anchor: Anchor, accelerator: Accelerator) -> tuple[Any, bool]:
    """The anchor's network, in the precision of the policy's, and whether it has the lean forward."""
    deepspeed = accelerator.state.deepspeed_plugin
    half = deepspeed is not None and accelerator.mixed_precision == "bf16"
    with unsharded(deepspeed), heard():
        dtype = torch.bfloat16 if half else anchor.dtype
        network = load_causal_lm(anchor.policy, dtype, anchor.attention, anchor.merge)
        is_lean = add_lean_forward(network)
        if anchor.policy.adapter is not None and not anchor.merge:
            network = add_adapter(network, anchor.policy, None)
    if half:  # an adapter comes in float32, and DeepSpeed casts the policy's
        for weight in network.parameters():
            weight.data = weight.data.to(torch.bfloat16)
    return network.to(accelerator.device), is_lean


@torch.no_grad()
def log_probs(
    network: Any, batches: Batches, accelerator: Accelerator, forward: Forward, table: LogProbTable
) -> torch.Tensor:
    """(S,), float32: a network's log-prob of every response, kept in `table`.

    The ranks share the rows and make the same number of passes. Raises Stopped where the run is asked to stop: what is
    computed until then is kept.
    """
    data, rank, ranks = batches.data, accelerator.process_index, accelerator.num_processes
    kept = table.part(f"{ranks}x{forward.batch_size}x{batches.groups}")  # what decides who shares a batch
    logps = _look_up(kept, batches, accelerator)  # (S,), NaN where there is none yet
    if logps is None:
        logps = torch.full((len(data.sequence_rates),), torch.nan, device=accelerator.device)
    lengths = data.lengths()
    shortest = int(lengths.argmin())
    was_training = network.training
    network.eval()

    with progress(len(data), f"{table.name} log-probs", "row") as bar:
        for number, shares in enumerate(_deal(lengths, forward.batch_size, ranks), start=1):
            bar.update(sum(len(rows) for rows in shares))
            sequences = torch.cat([data.sequences(row) for rows in shares for row in rows])
            if not logps[sequences].isnan().any():
                continue
            # a rank without rows computes the shortest one: sharded weights need all ranks at each call of the network
            rows = shares[rank]
            batch = to_device(batches.make(MicroBatch(rows or [shortest])), accelerator.device)
            made = forward.logps(network, batch).float()

            # each rank fills in its own; the last place says whether to stop
            shared = torch.zeros(len(logps) + 1, device=logps.device)
            if rows:
                shared[batch["sequences"]] = made
            shared[-1] = float(accelerator.is_main_process and stop_asked())
            shared = sum_over_ranks(accelerator, shared)
            logps[sequences] = shared[sequences]

            is_asked = may_stop() and shared[-1].item() > 0
            if is_asked or number % _KEPT_EVERY == 0:
                _keep(kept, logps, accelerator)
            if is_asked:
                raise Stopped

    network.train(was_training)
    if not logps.isfinite().all():
        bad = (~logps.isfinite()).nonzero().flatten().tolist()
        raise SPPOError(
            f"the {table.name}'s log-probs are not finite for {len(bad)} responses, the first are {bad[:10]}; "
            f"the weights of {'--anchor_model' if table.name == 'anchor' else '--model'} are damaged or too large for "
            "this precision"
        )
    path = _keep(table, logps, accelerator)
    if accelerator.is_main_process:
        table.remove_parts()
        print(f"train: the {table.name}'s log-probs are kept in {path}", flush=True)
    return logps


def _deal(lengths: np.ndarray, batch_size: int, ranks: int) -> list[list[list[int]]]:
    """[pass][rank][row]: all rows, longest first, in passes of neighbours that are about as long."""
    order = (-lengths).argsort(kind="stable")
    passes = -(-len(order) // (batch_size * ranks))
    parts = [order[list(part)].tolist() for part in even_parts(lengths[order], passes * ranks)]
    return [parts[first : first + ranks] for first in range(0, len(parts), ranks)]


def _look_up(table: LogProbTable, batches: Batches, accelerator: Accelerator) -> torch.Tensor | None:
    """(S,): what an earlier run has kept; None where there is nothing. Only rank 0 looks, so that all ranks agree."""
    size = len(batches.data.sequence_rates)
    shared = torch.zeros(size + 1)  # the last place says whether there is a table
    found = table.load(size) if accelerator.is_main_process else None
    if found is not None:
        logps, path = found
        shared[:size], shared[size] = logps, 1
        many = "" if table.whole else f"{int((~logps.isnan()).sum())} of {size} of "
        print(f"train: found {many}the {table.name}'s log-probs in {path}", flush=True)
    shared = sum_over_ranks(accelerator, shared.to(accelerator.device))
    return shared[:size] if shared[size] else None


def _keep(table: LogProbTable, logps: torch.Tensor, accelerator: Accelerator) -> Path | None:
    """Write a table, on rank 0, which returns the file; the others wait."""
    path = table.save(logps.cpu()) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    return path
