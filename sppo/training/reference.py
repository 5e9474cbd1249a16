"""The reference as a table: log pi_t of every response, computed once and kept under a hash of what decides it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sppo.schema import AGREEING
from sppo.store.files import atomic
from sppo.training.data import TrainingSet


@dataclass
class ReferenceTable:
    """Where the table of one policy over one data set is kept: beside the data, else in the run's own directory.

    `whole`: False for what a pass that was broken off has computed; the rest of such a table is NaN.
    """

    key: str
    homes: tuple[Path, ...]
    whole: bool = True

    def part(self, batches: str) -> ReferenceTable:
        """Where a pass keeps what it has; `batches`: what decides which responses share a batch."""
        return ReferenceTable(f"{self.key}.{batches}", self.homes, whole=False)

    def remove_parts(self) -> None:
        """Delete what passes that were broken off have kept of this table, as far as it may be deleted."""
        for path in (path for home in self.homes for path in home.glob(f"{self.key}.*.safetensors")):
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
                print(f"train: reference log-probs cannot be kept in {home} ({error.strerror}), so they go to the run")
                continue
            return path
        raise AssertionError("no home")


def _digest(table: torch.Tensor) -> str:
    return hashlib.sha256(table.float().cpu().numpy().tobytes()).hexdigest()


def agreement(table: torch.Tensor, data: TrainingSet) -> dict[str, float]:
    """How far the engine that drew the responses and the trainer agree about the policy; empty where nothing is known.

    table: (S,), the trainer's log-probs. Of each response that kept the engine's, the difference of the log-probs is
    divided by its tokens: `mean_difference` and `largest_difference` are of the absolute values, in nats a token;
    `kl` is the mean of the signed ones over all tokens, an estimate of KL(engine || trainer), as the engine drew them.
    """
    known = np.flatnonzero(np.isfinite(data.drawn_logps))
    if not len(known):
        return {}
    tokens = np.array([len(response) for row in data.responses for response in row])[known]
    apart = data.drawn_logps[known] - table.double().cpu().numpy()[known]  # (n,)
    each = np.abs(apart) / tokens
    found = {"mean_difference": each.mean(), "largest_difference": each.max(), "kl": apart.sum() / tokens.sum()}
    return {"responses": len(known), "tokens": int(tokens.sum()), **{k: float(f"{v:.3g}") for k, v in found.items()}}


def describe(found: dict[str, float]) -> str:
    """The agreement as a line for the log: a warning where it is worse than AGREEING."""
    apart = f"{found['mean_difference']:.2g} nats a token apart on average over {found['responses']} responses"
    if found["mean_difference"] <= AGREEING:
        return f"the engine's and the trainer's log-probs are {apart}"
    return (
        f"warning: the engine that drew the responses and the trainer disagree about the policy: their log-probs are "
        f"{apart}; at most {AGREEING} is usual. The loss compares with the trainer's, so it learns from responses "
        "of another policy. Usual reasons: another precision or attention, quantised weights, a template or an adapter "
        "that one of the two does not apply"
    )


def reference_key(policy: str, data: TrainingSet, **how: Any) -> str:
    """Hash of the policy's identity, of how it is run (precision, attention, library), and of every token id.

    The token ids stand for the data set's file, the lengths, the template and its arguments, which decide them.
    """
    sha = hashlib.sha256(json.dumps({"policy": policy, **how}, sort_keys=True).encode())
    for sides in zip(data.prompts, data.responses, strict=True):
        for prompt, response in zip(*sides, strict=True):
            sha.update(f"{len(prompt)},{len(response)};".encode() + prompt.tobytes() + response.tobytes())
    return sha.hexdigest()[:32]
