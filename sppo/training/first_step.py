"""What the first step of a training must show: that it begins at its reference, and that its weights get a gradient."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from sppo.command.errors import SPPOError
from sppo.training.batches import Batch
from sppo.training.logps import rounding, tokens_of
from sppo.training.ranks import sum_over_ranks


class FirstStep:
    """Sums over the micro-batches of a training's first step; `check` raises SPPOError for what they must not be.

    at_reference: whether no step was made before this one; the policy must then still be equal to the reference.
    """

    def __init__(self, accelerator: Accelerator, at_reference: bool) -> None:
        self.accelerator, self.at_reference = accelerator, at_reference
        # |log-prob - reference's| / sqrt(tokens), summed over responses; how many are beyond rounding; how many there
        # are; |d loss / d log-prob|, summed
        self.sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)

    def note(self, logps: torch.Tensor, ratios: torch.Tensor, batch: Batch) -> None:
        """Add a micro-batch. logps, ratios: (S,), the policy's log-probs, and less the reference's."""
        apart = ratios.detach().abs() / tokens_of(batch).sqrt()  # (S,)
        self.sums[0] += apart.sum()
        self.sums[1] += (~(apart <= rounding(self.accelerator))).sum()
        self.sums[2] += len(ratios)
        if logps.requires_grad:
            logps.register_hook(self._note_gradient)

    def _note_gradient(self, gradient: torch.Tensor) -> None:
        self.sums[3] += gradient.abs().sum()

    def check(self, network: torch.nn.Module, config: Any, where: str) -> None:
        """Look at the sums of all ranks, and at the gradients of `network` before the step is made.

        A few responses may be far apart: rounding may send a token to another expert. Dropout, noise and a wrong
        reference move nearly all. where: the file of the reference's log-probs.
        """
        apart, beyond, responses, pull = sum_over_ranks(self.accelerator, self.sums).tolist()
        limit = rounding(self.accelerator)
        if self.at_reference and beyond > responses / 2:
            raise SPPOError(
                "before its first step the policy is its own reference, but a response's log-probs by both differ by "
                f"{apart / responses:.2g} nats times the square root of its tokens, and rounding makes at most "
                f"{limit:g}. Usual reasons: dropout or noise that stays on in training ({_random_parts(config)}; set "
                "it to 0 in the model's config.json), code of the model's own that computes something else in "
                "training, under ZeRO-3 a longrope whose original context lies between the lengths, or a damaged "
                f"{where} (delete it to compute it again)"
            )
        # where the loss asks for nothing, as for win rates of 1/2, there is no gradient, and that is right
        if pull and self.accelerator.clip_grad_norm_(network.parameters(), float("inf")) == 0:
            raise SPPOError(
                "the loss asks for other log-probs at the first step, but the gradient of each trained weight is 0, so "
                "training would change nothing. Usual reasons: what is trained has no part in the log-probs (look at "
                "--lora_target_modules), its weights are frozen, or the two responses of each pair are the same"
            )


def _random_parts(config: Any) -> str:
    """What in a model's config looks like dropout or noise, with its value."""
    values = {**config.to_dict(), **config.get_text_config().to_dict()}
    found = [
        f"{name} {value:g}"
        for name, value in values.items()
        if isinstance(value, float) and value > 0 and any(word in name for word in ("drop", "jitter", "noise"))
    ]
    return f"its config has {', '.join(found)}" if found else "its config names none"
