"""The losses: from win rates to what the optimiser minimises.

A response's log-ratio is log pi(y|x) - log pi_t(y|x), summed over its tokens: a for the chosen response y_w, b for the
rejected one y_l, each (B,) for B rows. pi is the policy in training, and pi_t is the reference: the policy as it was
before its first step, which drew the responses. eta = 1 / beta is the size of the step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# R: how many nats less likely than under the first model a response may become before the forward KL lets it go
FORWARD_CLIP = 10.0


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
    are taken to be the wrong way round; only `sigmoid` reads it. `ipo_mean` is given a and b over their tokens. Raises
    ValueError for an unknown loss_type.
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

    # IPO, arXiv 2310.12036, equation 17: the difference of the log-ratios goes to 1 / (2 beta). The released trainer
    # sums a log-ratio over a response's tokens. IPO's authors take the mean over them (trl's pull request 1265), so
    # that 1 / (2 beta) is per token: `ipo_mean`.
    if loss_type in ("ipo", "ipo_mean"):
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
    missed = ratios - (win_rates - 0.5) / beta
    if pull is not None:
        missed = missed - pull
        missed = missed - _row_means(missed, row, rows)[row]
    return _row_means(missed**2, row, rows)


def _row_means(values: torch.Tensor, row: torch.Tensor, rows: int) -> torch.Tensor:
    """(S,) -> (rows,): the mean over each row's responses."""
    sums = values.new_zeros(rows).index_add(0, row, values)
    return sums / values.new_zeros(rows).index_add(0, row, torch.ones_like(values))


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


def divergence(reg: str, drift: torch.Tensor, row: torch.Tensor, rows: int) -> torch.Tensor:
    """How far a row's K responses are from the first model pi_0: (rows,). --reg_coef times it is added to SPPO's loss.

    RSPO (arXiv 2503.00030), with the weights of its authors' code. drift: (S,), d_i = log pi(y_i|x) - log pi_0(y_i|x)
    of each of the batch's S responses; row: (S,), which of the batch's rows a response belongs to.

        reverse    (2/K) sum_i d_i^2
        forward    (2/K) sum_i exp(min(-d_i, R)),    R = 10
        both       their sum

    Of a pair that is d_w^2 + d_l^2, which stands beside SPPO's 1/2 (a - ...)^2 + 1/2 (b - ...)^2. These are no
    estimates of a KL divergence, but their gradients are those of one. A response is drawn from pi_t, and where
    training begins pi is pi_t:

        grad E_{y ~ pi_t} [d^2]      =  2 E_{y ~ pi} [d grad log pi]             =  2 grad KL(pi || pi_0)
        grad E_{y ~ pi_t} [exp(-d)]  =   -E_{y ~ pi} [(pi_0 / pi) grad log pi]   =    grad KL(pi_0 || pi)

    Where it ends: let pi be a policy that an exact step leaves as it is, so pi = pi_t. There a = b = 0. Of two
    responses drawn from pi, SPPO's gradient is -2 eta (P(y > pi) - 1/2) per log pi(y), that of lambda times the
    divergence 4 lambda d (reverse) or -2 lambda exp(-d) (forward). Since pi adds up to 1, the sum of the two gradients
    is the same for every response. Divided by -2 eta, with c for a constant:

        reverse    P(y > pi) - (2 lambda / eta) log(pi(y) / pi_0(y))  =  c
        forward    P(y > pi) + (lambda / eta)       pi_0(y) / pi(y)   =  c

    That is the Nash equilibrium of the game in which each side also pays tau times its own divergence. With reverse it
    is KL(pi || pi_0) and tau = 2 lambda / eta, so log pi = log pi_0 + P(y > pi) / tau - log Z. With forward it is
    KL(pi_0 || pi) and tau = lambda / eta, so pi = pi_0 / (1 - (P(y > pi) - 1/2) / tau). SPPO's guess of log Z is a part
    of c and changes nothing. The best and the worst of K are not two such responses; `sppo_all` has all of them.
    benchmarks/game.py plays it.

    The way to it: without the sum to 1, a step of reverse is that of an anchor (see anchored_loss) with A =
    2 lambda / (1 + 2 lambda), and eta / (1 + 2 lambda) in the place of eta. Where -d is above R, forward has no
    gradient any more: a response that has become exp(R) times less likely than under pi_0 is let go.

    Raises ValueError for an unknown `reg`.
    """
    if reg == "reverse":
        apart = drift**2
    elif reg == "forward":
        apart = torch.exp((-drift).clamp(max=FORWARD_CLIP))
    elif reg == "both":
        apart = drift**2 + torch.exp((-drift).clamp(max=FORWARD_CLIP))
    else:
        raise ValueError(f"unknown reg {reg!r}")
    return 2 * _row_means(apart, row, rows)
