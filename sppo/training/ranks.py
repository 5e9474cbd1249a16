"""What all ranks of a training must do alike: rank 0 decides, and the others hear of it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator

from sppo.command.stopping import may_stop, stop_asked


class Stopped(KeyboardInterrupt):
    """All ranks end here because somebody asked for it; what is done is kept."""


def sum_over_ranks(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The sum of each rank's tensor, on all of them."""
    return cast(torch.Tensor, accelerator.reduce(values, "sum"))


def stop_agreed(accelerator: Accelerator) -> bool:
    """Whether somebody has asked this training to stop. Rank 0 looks, so that all ranks agree."""
    if not may_stop():
        return False
    asked = torch.tensor(float(accelerator.is_main_process and stop_asked()), device=accelerator.device)
    return sum_over_ranks(accelerator, asked).item() > 0


def broadcast_checkpoint(accelerator: Accelerator, work: Path, checkpoint: Path | None) -> Path | None:
    """The checkpoint in `work` that rank 0 goes on from, on every rank; the others pass None."""
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    step = int(sum_over_ranks(accelerator, torch.tensor(step, device=accelerator.device)).item())
    return work / f"checkpoint-{step}" if step else None
