"""The numbers of a line of metrics.jsonl, beside the loss."""

from __future__ import annotations

import math
import time

import torch
from accelerate import Accelerator

from sppo.training.batches import Batch
from sppo.training.ranks import sum_over_ranks

_TARGETS = ("rewards/chosen_target", "rewards/rejected_target")
_NAMES = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *_TARGETS,
    *("logps/chosen", "logps/rejected"),
    "divergence",
)
_OPTIONAL = (*_TARGETS, "divergence")  # NaN, and left out, where there are no win rates or no --reg


class Metrics:
    """Sums over the rows since the last line, kept on the device; `line` averages them over all ranks."""

    def __init__(self, accelerator: Accelerator, step: int) -> None:
        """`step`: the optimiser steps that were made before this process started."""
        self.accelerator, self.first_step = accelerator, step
        self.began = time.monotonic()
        self._reset()

    def _reset(self) -> None:
        device = self.accelerator.device
        self._sums = torch.zeros(len(_NAMES), dtype=torch.float64, device=device)
        self._rows = 0
        self._tokens = torch.zeros((), dtype=torch.long, device=device)
        self._since = time.monotonic()

    @torch.no_grad()
    def add(
        self,
        batch: Batch,
        logps: torch.Tensor,
        ratios: torch.Tensor,
        win_rates: torch.Tensor,
        beta: float,
        divergence: torch.Tensor | None,
    ) -> None:
        """Add the B rows of a micro-batch that count.

        logps, ratios: (B, 2), log-probs of the chosen and the rejected response, and less the reference's. win_rates:
        (B, 2), P(response > policy) of each. divergence: (B,), with --reg, before its weight.
        """
        a, b = ratios.unbind(1)
        chosen, rejected = logps.unbind(1)
        p_win, p_lose = win_rates.unbind(1)
        rewards = (beta * a).sum(), (beta * b).sum(), (a > b).sum(), (beta * (a - b)).sum()
        targets = (p_win - 0.5).sum(), (p_lose - 0.5).sum()  # what SPPO moves beta * a and beta * b towards
        apart = a.new_full((), math.nan) if divergence is None else divergence.sum()
        sums = torch.stack([*rewards, *targets, chosen.sum(), rejected.sum(), apart])
        self._sums += sums.double().to(self._sums.device)
        self._rows += batch["counted"]
        self._tokens += batch["attention_mask"].sum()

    def line(self, step: int, max_steps: int) -> dict[str, float]:
        """The means since the last line, and how fast training goes. All ranks call it, and the sums begin anew."""
        local = torch.tensor([self._rows, self._tokens], dtype=torch.float64, device=self._sums.device)
        *sums, rows, tokens = sum_over_ranks(self.accelerator, torch.cat([self._sums, local])).tolist()
        values = {name: total / rows for name, total in zip(_NAMES, sums, strict=True)}
        values = {name: x for name, x in values.items() if name not in _OPTIONAL or not math.isnan(x)}
        now = time.monotonic()
        values["tokens_per_second"] = round(tokens / (now - self._since), 1)
        seconds_a_step = (now - self.began) / (step - self.first_step)
        values["seconds_left"] = round(seconds_a_step * (max_steps - step), 1)
        self._reset()
        return values
