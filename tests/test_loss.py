"""Losses against the numbers worked by hand in the paper's terms, and log-probs against the plain definition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import preferences
import pytest
import torch

from sppo.method.loss import FORWARD_CLIP, anchored_loss, divergence, preference_loss, sppo_all_loss
from sppo.training.logps import response_logps

# beta = 1e-3 (eta = 1000), a = 1, b = -1, p_win = .8, p_lose = .3, p = .9:
#   sppo         1/2 [(1 - 1000 * .3)^2 + (-1 + 1000 * .2)^2] = 1/2 [299^2 + 199^2]  = 64501
#   sppo_single  1/2 [(1 - 1000 * .4)^2 + (-1 + 1000 * .4)^2] = 399^2                = 159201
#   ipo          (2 - 500)^2                                                         = 248004
#   sigmoid      -log sigmoid(.002)                                                  = 0.692148
#   hinge        1 - .002                                                            = 0.998
#   kto_pair     KL_w = 1, KL_l = 0: 1 - sigmoid(.001), 1 - sigmoid(.002)            = 0.49975, 0.4995
WORKED = {"sppo": [64501.0], "sppo_single": [159201.0], "ipo": [248004.0], "sigmoid": [0.692148], "hinge": [0.998]}
WORKED["kto_pair"] = [0.49975, 0.4995]
WORKED["ipo_mean"] = WORKED["ipo"]  # of means over tokens, which the trainer makes


@pytest.mark.parametrize("loss_type", sorted(WORKED))
def test_worked_by_hand(loss_type: str) -> None:
    a, b, p, p_win, p_lose = (torch.tensor([x]) for x in (1.0, -1.0, 0.9, 0.8, 0.3))
    loss = preference_loss(loss_type, a, b, 1e-3, p, p_win, p_lose)
    torch.testing.assert_close(loss, torch.tensor(WORKED[loss_type]), rtol=1e-5, atol=1e-6)


def test_label_smoothing_by_hand() -> None:
    """a - b = 2, beta = 1, epsilon = .1: -.9 log sigmoid(2) - .1 log sigmoid(-2) = .9 * .126928 + .1 * 2.126928."""
    a, b, p = torch.tensor([1.0]), torch.tensor([-1.0]), torch.tensor([0.9])
    loss = preference_loss("sigmoid", a, b, 1.0, p, p, p, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.326928, abs=1e-6)


def test_sppo_all_by_hand() -> None:
    """beta = .1, eta = 10. Row 0: responses of rates .8, .5, .2 with ratios 1, 0, -1: targets 3, 0, -3, so
    ((1 - 3)^2 + 0 + (-1 + 3)^2) / 3 = 8 / 3. Row 1: rates .6, .4 with ratios 2, 2: ((2 - 1)^2 + (2 + 1)^2) / 2 = 5."""
    ratios = torch.tensor([1.0, 0.0, -1.0, 2.0, 2.0])
    rates = torch.tensor([0.8, 0.5, 0.2, 0.6, 0.4])
    loss = sppo_all_loss(ratios, rates, torch.tensor([0, 0, 0, 1, 1]), 2, 0.1)
    torch.testing.assert_close(loss, torch.tensor([8 / 3, 5.0]))
    # of K = 2 responses it is sppo
    a, b, win, lose = ratios[3:4], ratios[4:], rates[3:4], rates[4:]
    torch.testing.assert_close(loss[1:], preference_loss("sppo", a, b, 0.1, win, win, lose))


def numbers(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


@pytest.mark.parametrize("loss_type", sorted(WORKED))
def test_gradients_are_those_of_finite_differences(loss_type: str) -> None:
    a, b = numbers(1, 6), numbers(2, 6)
    p, p_win, p_lose = (
        torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (3, 4, 5)
    )

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return preference_loss(loss_type, a, b, 0.1, p, p_win, p_lose, 0.1 if loss_type == "sigmoid" else 0.0)

    assert torch.autograd.gradcheck(loss, (a, b))


def test_the_gradient_of_sppo_all_is_that_of_finite_differences() -> None:
    rates = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    row = torch.tensor([0, 0, 1, 1, 1, 2])
    assert torch.autograd.gradcheck(lambda r: sppo_all_loss(r, rates, row, 3, 0.1), (numbers(1, 6),))


@pytest.fixture(scope="module")
def batch_of_trl(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """trl's DPOTrainer on a tiny model whose reference differs, with one batch of its own making."""
    trl = pytest.importorskip("trl")
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{k: r[k] for k in ("chosen", "rejected")} for r in preferences.rows(4)]
    policy, reference = (AutoModelForCausalLM.from_pretrained(models / "llama3") for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.02)

    def made(loss_type: str) -> tuple[Any, Any, Any, Any]:
        arguments = trl.DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), loss_type=[loss_type], beta=0.05, use_cpu=True, bf16=False,
            per_device_train_batch_size=4, report_to="none", gradient_checkpointing=False,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            policy, reference, arguments, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(models / "llama3"),
        )  # fmt: skip
        return trainer, next(iter(trainer.get_train_dataloader())), policy, reference

    return made


@pytest.mark.parametrize(
    ("theirs", "ours", "factor"),
    [("sppo_hard", "sppo", 2), ("sigmoid",) * 2 + (1,), ("hinge",) * 2 + (1,), ("ipo", "ipo_mean", 1)],
)
def test_parity_with_trl(batch_of_trl: Any, theirs: str, ours: str, factor: int) -> None:
    """Losses and gradients. At p_win = 1 and p_lose = 0 trl's sppo_hard has no 1/2, so it is twice ours. trl's ipo is
    that of means over tokens."""
    trainer, batch, policy, reference = batch_of_trl(theirs)
    policy.zero_grad()
    expected = trainer.compute_loss(policy, dict(batch))
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in policy.named_parameters()}

    mask = batch["completion_mask"]
    positions = mask[:, 1:].nonzero() @ torch.tensor([mask.shape[1], 1])
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    policy.zero_grad()
    with torch.no_grad():
        fixed = response_logps(reference(**given).logits, batch["input_ids"], positions)
    a, b = (response_logps(policy(**given).logits, batch["input_ids"], positions) - fixed).chunk(2)
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    assert a.abs().max() > 1  # a policy that has moved
    if ours == "ipo_mean":
        a, b = (torch.cat([a, b]) / mask.sum(1)).chunk(2)
    loss = factor * preference_loss(ours, a, b, 0.05, one, one, zero).mean()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in policy.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 1e-4 * gradients[name].norm(), name


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
    positions = mask[:, 1:].nonzero() @ torch.tensor([5, 1])  # t - 1 predicts t
    torch.testing.assert_close(response_logps(logits, ids, positions), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_anchored_by_hand() -> None:
    """eta = 2. A pair: 1 - -1 - (0.2 - -0.4) - 2 (0.8 - 0.3) = 0.4, and 0.4^2 / 4."""
    a, b, p_win, p_lose, pull_win, pull_lose = (torch.tensor([x]) for x in (1.0, -1.0, 0.8, 0.3, 0.2, -0.4))
    assert anchored_loss(a, b, 0.5, p_win, p_lose, pull_win, pull_lose).item() == pytest.approx(0.04)
    # three responses miss by 1 - 0.6 - 0.1, 0 - 0 - -0.3 and -1 - -0.6 - 0: 0.3, 0.3 and -0.4, less 0.2 / 3
    ratios, rates = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.8, 0.5, 0.2])
    pull, row = torch.tensor([0.1, -0.3, 0.0]), torch.zeros(3, dtype=torch.long)
    expected = (2 * (0.3 - 0.2 / 3) ** 2 + (-0.4 - 0.2 / 3) ** 2) / 3
    assert sppo_all_loss(ratios, rates, row, 1, 0.5, pull).item() == pytest.approx(expected)


def test_anchored_is_inpo_where_labels_are_drawn() -> None:
    """INPO (arXiv 2407.00617): (h - 1 / (2 eta))^2, h = log pi(w)/pi(l) - tau/eta log ref(w)/ref(l) - (1 - tau/eta) log
    pi_t(w)/pi_t(l). Ours is a quarter of it with A = tau / eta, beta = eta, p_win - p_lose = 1/2."""
    eta, tau = 0.3, 0.06
    policy, reference, first = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = (policy - tau / eta * first - (1 - tau / eta) * reference).diff(dim=0).neg().squeeze(0)
    a, b = policy - reference
    pull = tau / eta * (first - reference)
    three, one = torch.full_like(a, 0.75), torch.full_like(a, 0.25)
    found = anchored_loss(a, b, eta, three, one, *pull)
    torch.testing.assert_close(4 * found, (h - 1 / (2 * eta)) ** 2)


@pytest.mark.parametrize("loss_type", ["sppo", "sppo_all"])
def test_a_long_training_of_a_table_reaches_the_exact_anchored_step(loss_type: str) -> None:
    """log pi_{t+1} = (1 - A) log pi_t + A log pi_0 + eta P(y > pi_t) - log Z, by gradient descent on the loss alone."""
    make = torch.Generator().manual_seed(1)
    first, reference = torch.log_softmax(torch.randn(2, 6, dtype=torch.float64, generator=make), -1)
    odds = torch.randn(6, 6, dtype=torch.float64, generator=make)
    rates = torch.sigmoid(odds - odds.T) @ reference.exp()  # P(y > pi_t)
    anchor, beta = 0.3, 0.5
    exact = torch.log_softmax((1 - anchor) * reference + anchor * first + rates / beta, -1)
    logits = reference.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe")
    pull = anchor * (first - reference)
    w, l = torch.combinations(torch.arange(6)).T  # noqa: E741 - the paper's names

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        ratios = torch.log_softmax(logits, -1) - reference
        if loss_type == "sppo":
            value = anchored_loss(ratios[w], ratios[l], beta, rates[w], rates[l], pull[w], pull[l]).mean()
        else:
            value = sppo_all_loss(ratios, rates, torch.zeros(6, dtype=torch.long), 1, beta, pull).sum()
        value.backward()
        return value

    optimiser.step(loss)
    torch.testing.assert_close(torch.softmax(logits, -1).detach(), exact.exp(), atol=1e-3, rtol=0)
    sppo = torch.softmax(reference + rates / beta, -1)
    assert (sppo - exact.exp()).abs().max() > 0.02  # without the anchor it is another policy


PAIRS = torch.tensor([0, 0, 1, 1])  # which row each of four responses belongs to


def test_divergence_by_hand() -> None:
    """Of a pair with d = 2 and -1: 4 + 1, and e^-2 + e^1. Of three responses: twice the mean. Beyond R: e^10."""
    drift = torch.tensor([2.0, -1.0, 0.0, -12.0], dtype=torch.float64)
    expected = {
        "reverse": [5.0, 144.0],
        "forward": [math.exp(-2) + math.e, 1 + math.exp(10)],
        "both": [5 + math.exp(-2) + math.e, 145 + math.exp(10)],
    }
    for reg, values in expected.items():
        torch.testing.assert_close(divergence(reg, drift, PAIRS, 2), torch.tensor(values, dtype=torch.float64))
    three = divergence("reverse", drift[:3], torch.zeros(3, dtype=torch.long), 1)
    assert three.item() == pytest.approx(2 * 5 / 3)
    with pytest.raises(ValueError, match="unknown reg"):
        divergence("none", drift, PAIRS, 2)


@pytest.mark.parametrize("reg", ["reverse", "forward", "both"])
@pytest.mark.parametrize("loss_type", ["sppo", "sppo_all"])
def test_gradients_with_a_divergence_are_the_closed_form(reg: str, loss_type: str) -> None:
    """a - eta (P - 1/2) + 2 lambda d - lambda exp(-d), of each response; beyond R the forward part is gone."""
    weight, eta = 0.3, 2.0
    ratios = torch.tensor([0.7, -0.4, 0.2, -3.0], dtype=torch.float64, requires_grad=True)
    moved = torch.tensor([0.1, -0.3, 0.0, -FORWARD_CLIP + 2.5], dtype=torch.float64)  # the last: d = -10.5
    rates = torch.tensor([0.8, 0.3, 0.6, 0.4], dtype=torch.float64)
    pairs = torch.tensor([[0, 1], [2, 3]])
    if loss_type == "sppo":
        (a, b), (win, lose) = ratios[pairs].T, rates[pairs].T
        losses = preference_loss("sppo", a, b, 1 / eta, win, win, lose)
    else:
        losses = sppo_all_loss(ratios, rates, PAIRS, 2, 1 / eta)
    (losses + weight * divergence(reg, ratios + moved, PAIRS, 2)).sum().backward()

    d = (ratios + moved).detach()
    expected = ratios.detach() - eta * (rates - 0.5)
    if reg != "forward":
        expected += 2 * weight * d
    if reg != "reverse":
        expected -= weight * torch.tensor([math.exp(-x) if -x <= FORWARD_CLIP else 0.0 for x in d.tolist()])
    torch.testing.assert_close(ratios.grad, expected)


def test_the_divergences_gradients_are_those_of_the_kl_divergences() -> None:
    """Where training begins, over responses drawn from the policy: twice that of KL(pi || pi_0), that of
    KL(pi_0 || pi). With another sign or factor, --reg_coef would mean another game."""
    make = torch.Generator().manual_seed(2)
    logits, first = torch.randn(2, 6, dtype=torch.float64, generator=make)
    first, logits = torch.log_softmax(first, -1), logits.requires_grad_()
    policy = torch.log_softmax(logits, -1)
    alone = torch.arange(6)  # each response a row of its own, so that all can be weighed by how often they are drawn

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    reverse = (policy.exp() * (policy - first)).sum()
    forward = (first.exp() * (first - policy)).sum()
    for reg, kl in {"reverse": 2 * reverse, "forward": forward}.items():
        drawn = policy.exp().detach() @ (divergence(reg, policy - first, alone, 6) / 2)
        torch.testing.assert_close(gradient(drawn), gradient(kl))


def test_a_weight_of_0_changes_no_bit() -> None:
    ratios = torch.randn(4, generator=torch.Generator().manual_seed(0)) * 20
    rates = torch.tensor([0.8, 0.3, 0.6, 0.4])

    def made(reg: str) -> tuple[torch.Tensor, torch.Tensor]:
        at = ratios.clone().requires_grad_()
        losses = sppo_all_loss(at, rates, PAIRS, 2, 1e-3)
        if reg:
            losses = losses + 0.0 * divergence(reg, at - 1, PAIRS, 2)
        losses.sum().backward()
        assert at.grad is not None
        return losses.detach(), at.grad

    for reg in ("reverse", "forward", "both"):
        assert all(x.equal(y) for x, y in zip(made(""), made(reg), strict=True))
