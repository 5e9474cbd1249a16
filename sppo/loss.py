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
) -> torch.Tensor:
    """Loss of each row, (B,); for `kto_pair` (2B,). All inputs (B,), float32; eta = 1 / beta.

    p = P(chosen > rejected), p_win = P(chosen > policy), p_lose = P(rejected > policy).
    """
    eta = 1 / beta
    if loss_type == "sppo":
        return 0.5 * ((a - eta * (p_win - 0.5)) ** 2 + (b - eta * (p_lose - 0.5)) ** 2)
    if loss_type == "sppo_single":
        return 0.5 * ((a - eta * (p - 0.5)) ** 2 + (b + eta * (p - 0.5)) ** 2)
    if loss_type == "sigmoid":  # DPO, arXiv 2305.18290
        return -F.logsigmoid(beta * (a - b))
    if loss_type == "hinge":  # SLiC, arXiv 2309.06657
        return torch.relu(1 - beta * (a - b))
    if loss_type == "ipo":  # arXiv 2310.12036, equation 17
        return (a - b - 1 / (2 * beta)) ** 2
    if loss_type == "kto_pair":  # arXiv 2402.01306, on pairs
        kl_win, kl_lose = a.mean().clamp(min=0), b.mean().clamp(min=0)
        return torch.cat([1 - torch.sigmoid(beta * (a - kl_lose)), 1 - torch.sigmoid(beta * (kl_win - b))])
    raise ValueError(f"unknown loss_type {loss_type!r}")


def response_logps(logits: torch.Tensor, input_ids: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Log-probability of each row's response, summed over its tokens, in float32.

    logits: (B, T, V); input_ids, response_mask: (B, T), the mask 1 on response tokens. Returns (B,).
    """
    targets = input_ids[:, 1:]
    logps = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, targets[..., None]).squeeze(-1)  # (B, T-1)
    return (logps * response_mask[:, 1:]).sum(-1)
