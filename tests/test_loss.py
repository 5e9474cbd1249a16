"""Losses against the numbers worked by hand in the paper's terms, and log-probs against the plain definition."""

from __future__ import annotations

import math

import pytest
import torch

from sppo.loss import preference_loss, response_logps

# beta = 1e-3 (eta = 1000), a = 1, b = -1, p_win = .8, p_lose = .3, p = .9:
#   sppo         1/2 [(1 - 1000 * .3)^2 + (-1 + 1000 * .2)^2] = 1/2 [299^2 + 199^2]  = 64501
#   sppo_single  1/2 [(1 - 1000 * .4)^2 + (-1 + 1000 * .4)^2] = 399^2                = 159201
#   ipo          (2 - 500)^2                                                         = 248004
#   sigmoid      -log sigmoid(.002)                                                  = 0.692148
#   hinge        1 - .002                                                            = 0.998
#   kto_pair     KL_w = 1, KL_l = 0: 1 - sigmoid(.001), 1 - sigmoid(.002)            = 0.49975, 0.4995
WORKED = {"sppo": [64501.0], "sppo_single": [159201.0], "ipo": [248004.0], "sigmoid": [0.692148], "hinge": [0.998]}
WORKED["kto_pair"] = [0.49975, 0.4995]


@pytest.mark.parametrize("loss_type", sorted(WORKED))
def test_worked_by_hand(loss_type: str) -> None:
    a, b, p, p_win, p_lose = (torch.tensor([x]) for x in (1.0, -1.0, 0.9, 0.8, 0.3))
    loss = preference_loss(loss_type, a, b, 1e-3, p, p_win, p_lose)
    torch.testing.assert_close(loss, torch.tensor(WORKED[loss_type]), rtol=1e-5, atol=1e-6)


def test_sppo_pulls_each_side_to_its_own_target() -> None:
    """The gradient is zero where beta * a = p_win - 1/2 and beta * b = p_lose - 1/2, and nowhere else."""
    half = torch.tensor([0.5], dtype=torch.float64)
    a = torch.tensor([300.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([-100.0], dtype=torch.float64, requires_grad=True)
    preference_loss("sppo", a, b, 1e-3, half, half + 0.3, half - 0.2).sum().backward()
    assert abs(a.grad.item()) < 1e-9
    assert b.grad.item() == pytest.approx(-100 + 200)  # b - eta (p_lose - 1/2)


def test_logps_are_sums_over_response_tokens_only() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    ids = torch.randint(0, 7, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1]])
    expected = []
    for row in range(2):
        total = 0.0
        for t in range(1, 5):
            if mask[row, t]:
                scores = logits[row, t - 1].exp()
                total += math.log(scores[ids[row, t]] / scores.sum())
        expected.append(total)
    torch.testing.assert_close(response_logps(logits, ids, mask), torch.tensor(expected), rtol=1e-5, atol=1e-5)
