"""`DSelectKRouter` against loops in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from sparsify.routers.dselect_k_router import DSelectKRouter


def step(z: float, gamma: float) -> float:
    if abs(z) >= gamma / 2:
        return float(z > 0)
    return -2 * z**3 / gamma**3 + 3 * z / (2 * gamma) + 0.5


def plain(router: DSelectKRouter, token: torch.Tensor) -> tuple[list[float], list[list[float]]]:
    """Weights of the experts, and of every selector."""
    digits = max(router.num_experts - 1, 0).bit_length()
    z = (router.weight.double() @ token.double() + router.bias.double()).tolist()
    a = (router.mixture.weight.double() @ token.double() + router.mixture.bias.double()).tolist()
    total = sum(map(math.exp, a))
    selectors: list[list[float]] = []
    for j in range(router.top_k):
        row: list[float] = []
        for expert in range(router.num_experts):
            product = 1.0
            for b in range(digits):
                s = step(z[j * digits + b], router.gamma)
                product *= s if expert >> b & 1 else 1 - s
            row.append(product)
        selectors.append(row)
    weights = [
        sum(math.exp(a[j]) / total * selectors[j][e] for j in range(router.top_k)) for e in range(router.num_experts)
    ]
    return weights, selectors


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (8, 8), (5, 1), (6, 3), (1, 1)])
@pytest.mark.parametrize("gamma", [1.0, 2.5])
def test_smooth_codes(num_tokens: int, experts: int, top_k: int, gamma: float) -> None:
    """Protects: the smooth step, the codes and their mixture, for any number of experts."""
    router = DSelectKRouter(7, experts, top_k, gamma=gamma).eval()
    router.weight.data.normal_()
    x = torch.randn(num_tokens, 7)
    weights, ids = router(x)
    for token in range(num_tokens):
        expected, _ = plain(router, x[token])
        assert weights[token].tolist() == pytest.approx(expected, abs=1e-5)
        assert [int(e) >= 0 for e in ids[token]] == [w > 0 for w in weights[token].tolist()]


def test_sums_to_one_and_saturates_to_k() -> None:
    """Protects: E = 8, K = 2: 8 experts while the digits are soft, 2 once they are not; the weights sum to 1."""
    router, x = DSelectKRouter(7, 8, 2).eval(), torch.randn(20, 7)
    weights, ids = router(x)
    assert (ids >= 0).sum(-1).eq(8).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(20))
    router.weight.data.mul_(1e6)
    weights, ids = router(x)
    assert (ids >= 0).sum(-1).le(2).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(20))


@pytest.mark.parametrize(("experts", "rule"), [(8, "sum"), (6, "free")])
def test_losses(experts: int, rule: str) -> None:
    """Protects: entropy of every selector, and where codes without an expert exist the price of their weight."""
    router = DSelectKRouter(5, experts, 2, entropy_coefficient=0.5).double()
    router.weight.data.normal_(std=0.1)
    x = torch.randn(4, 5, dtype=torch.float64)
    router(x)
    assert router.rule == rule
    entropy, reach = 0.0, 0.0
    for token in x:
        _, selectors = plain(router, token)
        entropy -= sum(r * math.log(r + 1e-6) for row in selectors for r in row) / 4
        reach += sum(1 / sum(row) for row in selectors) / 4
    assert router.losses["entropy"].item() == pytest.approx(entropy, rel=1e-9)
    assert ("reach" in router.losses) == (rule == "free")
    if rule == "free":
        assert router.losses["reach"].item() == pytest.approx(reach, rel=1e-9)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        torch.func.functional_call(router, {"weight": weight}, (x,))
        return router.aux_loss()

    assert torch.autograd.gradcheck(loss, router.weight.detach().clone().requires_grad_())


def test_entropy_training_makes_it_sparse() -> None:
    """Protects: the entropy loss alone drives every selector to one expert."""
    torch.manual_seed(0)
    router, x = DSelectKRouter(6, 8, 2, entropy_coefficient=1.0), torch.randn(32, 6)
    optimizer = torch.optim.Adam(router.parameters(), lr=3e-2)
    for _ in range(200):
        router(x)
        optimizer.zero_grad()
        router.aux_loss().backward()
        optimizer.step()
    assert float((router(x)[1] >= 0).float().sum(-1).mean()) < 3


def test_selectors_stay() -> None:
    """Protects: `set_top_k` cannot ask for selectors that have no weights."""
    with pytest.raises(ValueError, match="2 selectors, which cannot become 3"):
        DSelectKRouter(4, 8, 2).check_top_k(3)
    with pytest.raises(ValueError, match="gamma must be above 0"):
        DSelectKRouter(4, 8, 2, gamma=0.0)
