"""The losses: from win rates to what the optimiser minimises.

A response's log-ratio is log pi(y|x) - log pi_t(y|x), summed over its tokens: a for the chosen response y_w, b for the
rejected one y_l, each (B,) for B rows. pi is the policy in training, and pi_t is the reference: the policy as it was
before its first step, which drew the responses. eta = 1 / beta is the size of the step.
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
    """Loss of each row, (B,); for `kto_pair` (2B,). All tensors are (B,), float32.

    p = P(y_w > y_l), p_win = P(y_w > pi_t), p_lose = P(y_l > pi_t). label_smoothing is the share of preferences that
    are taken to be the wrong way round; only `sigmoid` reads it. Raises ValueError for an unknown loss_type.
    """
    eta = 1 / beta

    # SPPO, arXiv 2405.00675, equation 4.9: each log-ratio goes to eta times its win rate, less log Z = eta / 2.
    # The released trainer's factor of 1/2 is kept.
    if loss_type == "sppo":
        return 0.5 * ((a - eta * (p_win - 0.5)) ** 2 + (b - eta * (p_lose - 0.5)) ** 2)

    # The released trainer's variant, from the pair's own probability: p for the chosen, 1 - p for the rejected.
    if loss_type == "sppo_single":
        return 0.5 * ((a - eta * (p - 0.5)) ** 2 + (b + eta * (p - 0.5)) ** 2)

    # DPO, arXiv 2305.18290: -log sigmoid(beta (a - b)). With label smoothing: conservative DPO.
    if loss_type == "sigmoid":
        delta, epsilon = beta * (a - b), label_smoothing
        return -(1 - epsilon) * F.logsigmoid(delta) - epsilon * F.logsigmoid(-delta)

    # SLiC, arXiv 2309.06657: a margin of 1.
    if loss_type == "hinge":
        return torch.relu(1 - beta * (a - b))

    # IPO, arXiv 2310.12036, equation 17: the difference of the log-ratios goes to 1 / (2 beta).
    if loss_type == "ipo":
        return (a - b - 1 / (2 * beta)) ** 2

    # KTO, arXiv 2402.01306, on pairs. Its two KL estimates are means over the batch, so that a row's loss depends on
    # the other rows.
    if loss_type == "kto_pair":
        kl_win, kl_lose = a.mean().clamp(min=0), b.mean().clamp(min=0)
        return torch.cat([1 - torch.sigmoid(beta * (a - kl_lose)), 1 - torch.sigmoid(beta * (kl_win - b))])

    raise ValueError(f"unknown loss_type {loss_type!r}")


def sppo_all_loss(
    ratios: torch.Tensor,
    win_rates: torch.Tensor,
    row: torch.Tensor,
    rows: int,
    beta: float,
    pull: torch.Tensor | None = None,
) -> torch.Tensor:
    """The paper's update for all K responses of a row and not for two of them (section 4): (rows,).

    (1/K) sum_i (a_i - eta (P(y_i > pi_t) - 1/2))^2. ratios: (S,), the log-ratio a_i of each of the batch's S responses;
    win_rates: (S,), P(y_i > pi_t); row: (S,), which of the batch's rows a response belongs to. K may differ by row.

    pull: (S,), with an anchor: see anchored_loss. Then a_i - pull_i - eta P(y_i > pi_t) is squared after its mean over
    the row is taken from it, which takes log Z away.
    """

    def mean(values: torch.Tensor) -> torch.Tensor:  # (S,) -> (rows,)
        sums = values.new_zeros(rows).index_add(0, row, values)
        return sums / values.new_zeros(rows).index_add(0, row, torch.ones_like(values))

    missed = ratios - (win_rates - 0.5) / beta
    if pull is not None:
        missed = missed - pull
        missed = missed - mean(missed)[row]
    return mean(missed**2)


def anchored_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    beta: float,
    p_win: torch.Tensor,
    p_lose: torch.Tensor,
    pull_win: torch.Tensor,
    pull_lose: torch.Tensor,
) -> torch.Tensor:
    """SPPO with a pull towards the first model: 1/4 (a - b - (pull_win - pull_lose) - eta (p_win - p_lose))^2, (B,).

    Not in the paper. The step is magnetic mirror descent (arXiv 2206.05825) on the preference game, with the first
    model pi_0 as the magnet and A for --anchor:

        log pi_{t+1} = (1 - A) log pi_t + A log pi_0 + eta P(y > pi_t) - log Z(x)

    So a response's log-ratio has one more term:

        log pi_{t+1} - log pi_t = pull + eta P(y > pi_t) - log Z(x),    pull = A (log pi_0 - log pi_t)

    SPPO replaces log Z by eta / 2, the mean of eta P under pi_t. With the pull log Z also holds A KL(pi_t || pi_0) and
    more, which nobody knows. The difference of a pair has no log Z, so that difference is regressed. SPPO's own loss,
    with u and v for what a and b miss their targets by, is (u^2 + v^2) / 2 = (u - v)^2 / 4 + (u + v)^2 / 4. The loss
    here is the first part, so A = 0 keeps SPPO's gradient on the difference.

    INPO (arXiv 2407.00617) with its own eta' and tau is A = tau / eta' and beta = eta', with 1/2 in the place of
    p_win - p_lose, because its labels are drawn and not estimated. Nash-MD (arXiv 2312.00886) takes the win rate
    against pi_t^(1 - A) pi_0^A and not that against pi_t.
    """
    return 0.25 * (a - b - (pull_win - pull_lose) - (p_win - p_lose) / beta) ** 2
