"""What the first step of a training must show: that it begins at its reference, with the loss that follows from that,
and that its weights get a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from sppo.command.errors import SPPOError
from sppo.training.batches import Batch
from sppo.training.logps import rounding, tokens_of
from sppo.training.ranks import sum_over_ranks


class FirstLoss(NamedTuple):
    """The mean loss of a step's rows where the policy still is its reference."""

    loss: float
    rounding: float  # how far from it rounding may bring the step's loss, at most

    def described(self, beta: float) -> str:
        """For the log, in the names of its metrics."""
        return f"at the first step the loss must be near {self.loss:.6g} (beta2_loss {beta**2 * self.loss:.6g})"


def loss_at_reference(losses: Callable[[torch.Tensor], torch.Tensor], furthest: torch.Tensor) -> FirstLoss:
    """The mean loss where each log-ratio is 0.

    losses: of each row, (B,), from the log-ratios, (S,). furthest: (S,), nats by which rounding may move each log-ratio
    from 0. Its worst is all of them, each to the side on which the loss grows, or each to the other side: most losses
    fall by less there, but the forward KL of --reg, which is clipped, falls by more.
    """
    ratios = torch.zeros_like(furthest, requires_grad=True)
    loss = losses(ratios).double().mean()
    (slope,) = torch.autograd.grad(loss, ratios)
    # without a slope it grows where a row's responses go apart
    apart = 1.0 - 2.0 * (torch.arange(len(slope)) % 2)
    sides = furthest * torch.where(slope == 0, apart, slope.sign())
    moved = [abs((losses(one).double().mean() - loss).item()) for one in (sides, -sides)]
    # the least is what float32 makes of the loss itself
    return FirstLoss(loss.item(), max(*moved, 1e-5 * abs(loss.item())))


class FirstStep:
    """Sums over the micro-batches of a training's first step; `check` raises SPPOError for what they must not be.

    expected: the loss of its rows at the reference, to which the policy must still be equal; None where steps were made
    before this one.
    """

    def __init__(self, accelerator: Accelerator, expected: FirstLoss | None) -> None:
        self.accelerator, self.expected = accelerator, expected
        # |log-prob - reference's| / sqrt(tokens), summed over responses; how many are beyond rounding; how many there
        # are; |d loss / d log-prob|, summed; the step's mean loss
        self.sums = torch.zeros(5, dtype=torch.float64, device=accelerator.device)

    def note(self, logps: torch.Tensor, ratios: torch.Tensor, batch: Batch) -> None:
        """Add a micro-batch. logps, ratios: (S,), the policy's log-probs, and less the reference's."""
        apart = ratios.detach().abs() / tokens_of(batch).sqrt()  # (S,)
        self.sums[0] += apart.sum()
        self.sums[1] += (~(apart <= rounding(self.accelerator))).sum()
        self.sums[2] += len(ratios)
        if logps.requires_grad:
            logps.register_hook(self._note_gradient)

    def note_loss(self, share: torch.Tensor) -> None:
        """Add a micro-batch's share of the step's mean loss."""
        self.sums[4] += share.detach()

    def _note_gradient(self, gradient: torch.Tensor) -> None:
        self.sums[3] += gradient.abs().sum()

    def check(self, network: torch.nn.Module, config: Any, where: str) -> None:
        """Look at the sums of all ranks, and at the gradients of `network` before the step is made.

        A few responses may be far apart: rounding may send a token to another expert. Dropout, noise and a wrong
        reference move nearly all. where: the file of the reference's log-probs.
        """
        apart, beyond, responses, pull, loss = sum_over_ranks(self.accelerator, self.sums).tolist()
        limit = rounding(self.accelerator)
        if self.expected and beyond > responses / 2:
            raise SPPOError(
                "before its first step the policy is its own reference, but a response's log-probs by both differ by "
                f"{apart / responses:.2g} nats times the square root of its tokens, and rounding makes at most "
                f"{limit:g}. Usual reasons: dropout or noise that stays on in training ({_random_parts(config)}; set "
                "it to 0 in the model's config.json), code of the model's own that computes something else in "
                "training, under ZeRO-3 a longrope whose original context lies between the lengths, or a damaged "
                f"{where} (delete it to compute it again)"
            )
        expected = self.expected
        if expected and not abs(loss - expected.loss) <= expected.rounding and self.accelerator.is_main_process:
            print(
                f"train: warning: at the first step the loss is {loss:.6g}, and it must be near {expected.loss:.6g}; "
                f"rounding makes a difference of at most {expected.rounding:.2g}. For {beyond:.0f} of the step's "
                f"{responses:.0f} responses the policy is not its reference. Usual reasons: a router that sends tokens "
                "to other experts, dropout, another precision or attention than the reference's, or log-probs of "
                f"another model in {where} (delete it to compute them again)",
                flush=True,
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
