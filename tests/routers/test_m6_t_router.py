"""`M6TRouter`: exactly one expert of every group, weighted within it, and balance by group."""

from __future__ import annotations

import math

import pytest
import torch

from sparsify.routers.m6_t_router import M6TRouter


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_one_expert_of_every_group(num_tokens: int, groups: int) -> None:
    """Protects: softmax and top-1 inside each group, against loops in fp64; and the mean of the groups' losses."""
    torch.manual_seed(0)
    router, x = M6TRouter(7, 6, groups).double(), torch.randn(num_tokens, 7, dtype=torch.float64)
    router.weight.data *= 30
    weights, ids = router(x)
    size = 6 // groups
    choices = [[0] * size for _ in range(groups)]
    sums = [[0.0] * size for _ in range(groups)]
    for t in range(num_tokens):
        logits = [float(row @ x[t]) for row in router.weight.detach()]
        for g in range(groups):
            part = [math.exp(v) for v in logits[g * size : (g + 1) * size]]
            best = part.index(max(part))
            assert ids[t, g].item() == g * size + best
            assert weights[t, g].item() == pytest.approx(part[best] / sum(part), rel=1e-12)
            choices[g][best] += 1
            sums[g] = [s + p / sum(part) for s, p in zip(sums[g], part, strict=True)]
    count = max(num_tokens, 1)
    losses = [
        size * sum(c / count * s / count for c, s in zip(choices[g], sums[g], strict=True)) for g in range(groups)
    ]
    assert router.losses["balance"].item() == pytest.approx(sum(losses) / groups, rel=1e-10, abs=1e-12)


def test_groups_of_one_expert_are_all_on() -> None:
    """Protects: K = E: every expert runs with weight 1."""
    router = M6TRouter(7, 4, 4).eval()
    weights, ids = router(torch.randn(5, 7))
    assert ids.tolist() == [[0, 1, 2, 3]] * 5
    assert weights.eq(1).all()


def test_another_number_of_groups_must_divide_too() -> None:
    """Protects: `set_top_k` meets the same check as the constructor."""
    router = M6TRouter(7, 6, 2)
    router.check_top_k(3)
    with pytest.raises(ValueError, match="6 routed experts do not fall into top_k=4 groups"):
        router.check_top_k(4)
