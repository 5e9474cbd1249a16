"""The losses, one line of mathematics each. SPPO: arXiv 2405.00675, equation 4.9 and the released trainer.

a, b: log pi(y|x) - log pi_t(y|x) of the chosen and the rejected response, summed over response tokens, (B,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def preference_loss(
    loss_type: str,
    a: torch.Tensor,
    b: torch.Tensor,
    beta: float,
    p: torch.Tensor,
    p_win: torch.Tensor,
    p_lose: torch.Tensor,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Loss of each row, (B,); for `kto_pair` (2B,). All inputs (B,), float32; eta = 1 / beta.

    p = P(chosen > rejected), p_win = P(chosen > policy), p_lose = P(rejected > policy). label_smoothing is the
    share of preferences taken to be the wrong way round; only `sigmoid` has one. `kto_pair` couples the rows of a
    batch through its two KL estimates, so that a row's loss depends on the other rows.
    """
    eta = 1 / beta
    if loss_type == "sppo":
        return 0.5 * ((a - eta * (p_win - 0.5)) ** 2 + (b - eta * (p_lose - 0.5)) ** 2)
    if loss_type == "sppo_single":
        return 0.5 * ((a - eta * (p - 0.5)) ** 2 + (b + eta * (p - 0.5)) ** 2)
    if loss_type == "sigmoid":  # DPO, arXiv 2305.18290; smoothed: cDPO
        delta, epsilon = beta * (a - b), label_smoothing
        return -(1 - epsilon) * F.logsigmoid(delta) - epsilon * F.logsigmoid(-delta)
    if loss_type == "hinge":  # SLiC, arXiv 2309.06657
        return torch.relu(1 - beta * (a - b))
    if loss_type == "ipo":  # arXiv 2310.12036, equation 17
        return (a - b - 1 / (2 * beta)) ** 2
    if loss_type == "kto_pair":  # arXiv 2402.01306, on pairs
        kl_win, kl_lose = a.mean().clamp(min=0), b.mean().clamp(min=0)
        return torch.cat([1 - torch.sigmoid(beta * (a - kl_lose)), 1 - torch.sigmoid(beta * (kl_win - b))])
    raise ValueError(f"unknown loss_type {loss_type!r}")


def anchored_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    beta: float,
    p_win: torch.Tensor,
    p_lose: torch.Tensor,
    pull_win: torch.Tensor,
    pull_lose: torch.Tensor,
) -> torch.Tensor:
    """Anchored self-play on pairs: 1/4 (a - b - (pull_win - pull_lose) - eta (p_win - p_lose))^2, (B,).

    The step is log pi_{t+1} = (1 - A) log pi_t + A log pi_0 + eta P(y > pi_t) - log Z: magnetic mirror descent
    (arXiv 2206.05825) on the preference game, with the first model as the magnet. So a response's log-ratio is

        log pi_{t+1} - log pi_t = pull + eta P(y > pi_t) - log Z(x),    pull = A (log pi_0 - log pi_t).

    SPPO takes log Z = eta / 2, the mean of eta P under pi_t. The pull's part of it, A KL(pi_t || pi_0) and more, is not
    known, so what is regressed is free of a constant for each prompt: the difference of a pair. SPPO's own loss, with
    u and v for what a and b miss their targets by, is (u^2 + v^2) / 2 = (u - v)^2 / 4 + (u + v)^2 / 4; this is the
    first part, so that A = 0 keeps its gradient on the difference.

    INPO (arXiv 2407.00617) with its own eta', tau is A = tau / eta', beta = eta', with 1/2 in the place of
    p_win - p_lose: its labels are drawn, not estimated. Nash-MD (arXiv 2312.00886) asks for the win rate against
    pi_t^(1 - A) pi_0^A instead of that against pi_t.
    """
    return 0.25 * (a - b - (pull_win - pull_lose) - (p_win - p_lose) / beta) ** 2


def sppo_all_loss(
    ratios: torch.Tensor,
    win_rates: torch.Tensor,
    row: torch.Tensor,
    rows: int,
    beta: float,
    pull: torch.Tensor | None = None,
) -> torch.Tensor:
    """The theory's own update (arXiv 2405.00675, section 4), which regresses every response: (rows,).

    (1/K) sum_i (a_i - eta (P(y_i > pi_t) - 1/2))^2. ratios: (S,), a_i of each of the batch's S responses;
    win_rates: (S,), P(y_i > pi_t); row: (S,), which of the batch's rows a response belongs to. K may differ by row.

    pull: (S,), as in anchored_loss: then a_i - pull_i - eta P(y_i > pi_t) less its mean over the row, which is free of
    log Z, is what is squared.
    """

    def mean(values: torch.Tensor) -> torch.Tensor:  # (S,) -> (rows,)
        sums = values.new_zeros(rows).index_add(0, row, values)
        return sums / values.new_zeros(rows).index_add(0, row, torch.ones_like(values))

    missed = ratios - (win_rates - 0.5) / beta
    if pull is not None:
        missed = missed - pull
        missed = missed - mean(missed)[row]
    return mean(missed**2)
