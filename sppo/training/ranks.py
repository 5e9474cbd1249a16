"""What all ranks of a training must do alike: rank 0 decides, and the others hear of it."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from sppo.command.stopping import may_stop, stop_asked


class Stopped(KeyboardInterrupt):
    """All ranks end here because somebody asked for it; what is done is kept."""


def stop_agreed(accelerator: Accelerator) -> bool:
    """Whether somebody has asked this training to stop. Rank 0 looks, so that all ranks agree."""
    if not may_stop():
        return False
    asked = torch.tensor(float(accelerator.is_main_process and stop_asked()), device=accelerator.device)
    return accelerator.reduce(asked, "sum").item() > 0


def broadcast_checkpoint(accelerator: Accelerator, work: Path, checkpoint: Path | None) -> Path | None:
    """The checkpoint in `work` that rank 0 goes on from, on every rank; the others pass None."""
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    step = int(accelerator.reduce(torch.tensor(step, device=accelerator.device), "sum"))
    return work / f"checkpoint-{step}" if step else None
