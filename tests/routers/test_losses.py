"""Auxiliary losses against loops in fp64, their known values, and gradients against the published formulas."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from sparsify.routers import losses

SIZES = [(1, 1, 1), (1, 5, 2), (7, 5, 1), (13, 7, 7), (31, 8, 3)]  # T, E, K


def example(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    logits = 2 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    return logits, logits.topk(top_k).indices


@pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES)
def test_balance_is_the_formula(tokens: int, experts: int, top_k: int) -> None:
    """Protects: `E sum_e f_e P_e` with f over all K choices, unused slots left out."""
    logits, ids = example(tokens, experts, top_k)
    ids[0, -1] = -1 if tokens > 1 else ids[0, -1]
    p = logits.softmax(-1)
    total = sum(1 for row in ids.tolist() for e in row if e >= 0)
    expected = 0.0
    for e in range(experts):
        share = sum(row.count(e) for row in ids.tolist()) / total
        expected += experts * share * sum(p[t, e].item() for t in range(tokens)) / tokens
    assert losses.balance_loss(p, ids).item() == pytest.approx(expected, rel=1e-12)


def test_known_values_of_balance() -> None:
    """Protects: 1 where f or P is uniform whatever K is, E at collapse, and 0.40 where half of 8 experts idle."""
    uniform, ids = torch.full((8, 8), 1 / 8).double(), torch.arange(16).view(8, 2) % 8
    collapsed = torch.eye(8).double()[[3] * 8]
    assert losses.balance_loss(uniform, torch.zeros(8, 1).long()).item() == pytest.approx(1)
    assert losses.balance_loss(collapsed, ids).item() == pytest.approx(1)
    assert losses.balance_loss(collapsed, torch.full((8, 1), 3)).item() == pytest.approx(8)
    busy = torch.zeros(4, 8).double()
    for e in range(4):
        busy[e, [e, 4, 5, 6, 7]] = 1 / 5
    assert losses.balance_loss(busy, torch.arange(4).view(4, 1)).item() == pytest.approx(8 / (4 * 5))


def test_balance_of_groups() -> None:
    """Protects: the device loss: f a mean and P a sum over the experts of a device."""
    logits, ids = example(31, 8, 3)
    p, counts = logits.softmax(-1), losses.count_tokens(ids, 8, torch.float64)
    expected = 0.0
    for device in range(4):
        f = sum(8 * counts[e].item() / (3 * 31) for e in (2 * device, 2 * device + 1)) / 2
        expected += f * (p[:, 2 * device] + p[:, 2 * device + 1]).mean().item()
    assert losses.balance_loss(p, ids, num_groups=4).item() == pytest.approx(expected, rel=1e-12)


def test_gradient_of_balance() -> None:
    """Protects: `dL/dl_tj = (E / T) p_tj (f_j - sum_e f_e p_te)`, which moves tokens off busy experts."""
    logits, ids = example(31, 8, 1)
    logits.requires_grad_()
    p = logits.softmax(-1)
    losses.balance_loss(p, ids).backward()
    f = losses.count_tokens(ids, 8, torch.float64) / 31
    expected = 8 / 31 * p * (f - (p @ f)[:, None])
    torch.testing.assert_close(logits.grad, expected.detach(), rtol=1e-10, atol=1e-14)


def test_balance_spreads_the_load() -> None:
    """Protects: claim 7: 200 steps of SGD on the loss alone bring a biased router below max/mean 1.3."""
    torch.manual_seed(0)
    x, bias = torch.randn(1024, 16), torch.zeros(8)
    bias[0] = 2
    weight = (0.2 * torch.randn(16, 8)).requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], lr=1.0)
    for _ in range(200):
        logits = x @ weight + bias
        optimizer.zero_grad()
        losses.balance_loss(logits.softmax(-1), logits.argmax(-1, keepdim=True)).backward()
        optimizer.step()
    load = losses.count_tokens((x @ weight + bias).argmax(-1, keepdim=True), 8)
    assert load.max() / load.mean() < 1.3


def test_z_loss() -> None:
    """Protects: the mean squared logsumexp, `(log E)^2` at 0, 0 at `-log E`, and `2 lse softmax / T` as gradient."""
    assert losses.z_loss(torch.zeros(3, 8)).item() == pytest.approx(math.log(8) ** 2, rel=1e-6)
    assert losses.z_loss(torch.full((3, 8), -math.log(8))).item() == pytest.approx(0, abs=1e-12)
    logits = example(31, 8, 1)[0].requires_grad_()
    loss = losses.z_loss(logits)
    rows = [math.log(sum(math.exp(v) for v in row)) for row in logits.tolist()]
    assert loss.item() == pytest.approx(sum(v * v for v in rows) / 31, rel=1e-12)
    loss.backward()
    expected = 2 / 31 * torch.tensor(rows).double()[:, None] * logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-6, atol=1e-12)


def test_importance() -> None:
    """Protects: population variance over squared mean: E - 1 at collapse, 0 at balance."""
    collapsed = torch.zeros(5, 8)
    collapsed[:, 2] = 1
    assert losses.importance_loss(collapsed).item() == pytest.approx(7)
    assert losses.importance_loss(torch.ones(5, 8)).item() == 0
    weights = example(13, 7, 1)[0].softmax(-1)
    sums = [sum(weights[t, e].item() for t in range(13)) for e in range(7)]
    mean = sum(sums) / 7
    expected = sum((s - mean) ** 2 for s in sums) / 7 / mean**2
    assert losses.importance_loss(weights).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("drawn_again", [True, False])
def test_load_probability_is_a_probability(drawn_again: bool) -> None:
    """Protects: P(x, e) = Phi((clean - threshold) / sigma), the threshold being the K-th of the others, or of all."""
    clean, top_k = example(13, 7, 1)[0], 3
    noisy = clean + torch.randn(13, 7, generator=torch.Generator().manual_seed(1)).double()
    sigma = torch.rand(13, 7, dtype=torch.float64) + 0.5
    found = losses.load_probability(clean, noisy, sigma, top_k, drawn_again=drawn_again)
    for t in range(13):
        for e in range(7):
            others = [noisy[t, o].item() for o in range(7) if not drawn_again or o != e]
            threshold = sorted(others, reverse=True)[top_k - 1]
            z = (clean[t, e].item() - threshold) / sigma[t, e].item()
            assert found[t, e].item() == pytest.approx(0.5 * (1 + math.erf(z / math.sqrt(2))), rel=1e-9)


def test_load_sums_to_top_k() -> None:
    """Protects: `sum_e P(x, e)` averages K, and all experts are certain at K = E."""
    torch.manual_seed(0)
    clean = 0.5 * torch.randn(4000, 8)
    noisy = clean + torch.randn(4000, 8)
    assert losses.load_probability(clean, noisy, 1.0, 2).sum(-1).mean().item() == pytest.approx(2, abs=0.05)
    assert losses.load_probability(clean, noisy, 1.0, 8).eq(1).all()


def test_entropy_conditions() -> None:
    """Protects: local is 0 at one-hot; global is 0 from S equally used experts on and `threshold` at one expert."""
    one_hot, uniform = torch.eye(8), torch.full((8, 8), 1 / 8)
    assert losses.local_entropy_loss(one_hot).item() == 0
    assert losses.local_entropy_loss(uniform).item() == pytest.approx(math.log(8))
    assert losses.global_entropy_loss(one_hot, math.log(8)).item() == pytest.approx(0, abs=1e-6)
    assert losses.global_entropy_loss(one_hot[:4], math.log(4)).item() == pytest.approx(0, abs=1e-6)
    assert losses.global_entropy_loss(one_hot[:2], math.log(4)).item() == pytest.approx(math.log(2), rel=1e-6)
    assert losses.global_entropy_loss(one_hot[[3] * 5], math.log(4)).item() == pytest.approx(math.log(4))


def test_entropy_gradients() -> None:
    """Protects: finite gradients where a probability underflows, right ones elsewhere."""
    logits = example(5, 4, 1)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.local_entropy_loss(x.softmax(-1)), logits)
    assert torch.autograd.gradcheck(lambda x: losses.global_entropy_loss(x.softmax(-1), 1.3), logits)
    sure = torch.tensor([[0.0, -500.0]], requires_grad=True)
    losses.local_entropy_loss(sure.softmax(-1)).backward()
    assert sure.grad is not None
    assert sure.grad.isfinite().all()


def test_losses_of_speech() -> None:
    """Protects: sparsity from 1 (sure) to sqrt(E), importance from 1 (equal) to E, and loops in between."""
    one_hot, uniform = torch.eye(8), torch.full((8, 8), 1 / 8)
    assert losses.sparsity_loss(one_hot).item() == 1
    assert losses.sparsity_loss(uniform).item() == pytest.approx(math.sqrt(8))
    assert losses.mean_importance_loss(one_hot).item() == pytest.approx(1)
    assert losses.mean_importance_loss(one_hot[[3] * 5]).item() == 8
    p = example(7, 5, 1)[0].softmax(-1)
    rows = p.tolist()
    sparsity = sum(sum(row) / math.sqrt(sum(v * v for v in row)) for row in rows) / 7
    importance = 5 * sum((sum(column) / 7) ** 2 for column in zip(*rows, strict=True))
    assert losses.sparsity_loss(p).item() == pytest.approx(sparsity, rel=1e-9)
    assert losses.mean_importance_loss(p).item() == pytest.approx(importance, rel=1e-9)
    logits = example(5, 4, 1)[0].requires_grad_()
    for loss in (losses.sparsity_loss, losses.mean_importance_loss):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x.softmax(-1)), logits)


def test_consistency() -> None:
    """Protects: 0 for equal outputs, symmetric, and the mean over tokens of the symmetric KL."""
    p, q = example(7, 5, 1)[0], example(13, 5, 1)[0][:7]
    assert losses.consistency_loss(p, p).item() == 0
    expected = 0.0
    for a, b in zip(p.softmax(-1).tolist(), q.softmax(-1).tolist(), strict=True):
        expected += 0.5 * sum((u - v) * (math.log(u) - math.log(v)) for u, v in zip(a, b, strict=True)) / 7
    assert losses.consistency_loss(p, q).item() == pytest.approx(expected, rel=1e-9)
    assert losses.consistency_loss(q, p).item() == pytest.approx(expected, rel=1e-9)


def test_no_tokens_cost_nothing() -> None:
    """Protects: an empty batch gives 0, not NaN."""
    empty, ids = torch.zeros(0, 4), torch.zeros(0, 2).long()
    found = [
        losses.balance_loss(empty, ids),
        losses.z_loss(empty),
        losses.importance_loss(empty),
        losses.load_loss(losses.load_probability(empty, empty, 1.0, 2)),
        losses.local_entropy_loss(empty),
        losses.global_entropy_loss(empty, 1.0),
        losses.consistency_loss(empty, empty),
        losses.local_entropy_loss(empty, empty[:, :3]),
        losses.global_entropy_loss(empty, 1.0, empty[:, :3]),
        losses.sparsity_loss(empty),
        losses.mean_importance_loss(empty),
    ]
    assert [loss.item() for loss in found] == [0] * 11


def test_count_tokens() -> None:
    """Protects: -1 counts for nobody."""
    ids = [[random.Random(t * 3 + k).randrange(-1, 5) for k in range(3)] for t in range(17)]
    expected = [sum(row.count(e) for row in ids) for e in range(5)]
    assert losses.count_tokens(torch.tensor(ids), 5).tolist() == expected
