"""`PeerRouter`: product keys against a search over all experts."""

from __future__ import annotations

import math

import pytest
import torch

from sparsify.routers.peer_router import PeerRouter


def plain(router: PeerRouter, token: torch.Tensor, head: int) -> dict[int, float]:
    """Expert -> softmax weight within its head, by scoring every expert."""
    d = router.key_size
    halves = []
    for half in range(2):
        start = (head * 2 + half) * d
        q = router.query[start : start + d].double() @ token.double()
        halves.append((q - q.mean()) / (q.var(correction=0) + 1e-5).sqrt())
    scores = {}
    for i in range(router.side):
        for j in range(router.side):
            row, column = router.keys[0, head, i].double(), router.keys[1, head, j].double()
            scores[i * router.side + j] = float(halves[0] @ row + halves[1] @ column)
    best = sorted(scores, key=lambda e: -scores[e])[: router.top_k]
    total = sum(math.exp(scores[e]) for e in best)
    return {e: math.exp(scores[e]) / total for e in best}


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize(("experts", "top_k", "heads"), [(16, 1, 1), (25, 3, 2), (9, 3, 4), (1, 1, 2)])
def test_keys_equal_brute_force(num_tokens: int, experts: int, top_k: int, heads: int) -> None:
    """Protects: the K best of the rows times the K best columns are the K best of all experts."""
    router = PeerRouter(6, experts, top_k, heads=heads, key_size=5).eval()
    router.query.data.normal_()
    x = torch.randn(num_tokens, 6)
    weights, ids = router(x)
    assert ids.shape == (num_tokens, router.num_slots) == (num_tokens, heads * top_k)
    for token in range(num_tokens):
        for head in range(heads):
            part = slice(head * top_k, (head + 1) * top_k)
            found = dict(zip(ids[token, part].tolist(), (heads * weights[token, part]).tolist(), strict=True))
            assert found == pytest.approx(plain(router, x[token], head), rel=1e-4)


def test_weights_sum_to_one_and_learn() -> None:
    """Protects: an exact start of copies, and a gradient for queries and keys."""
    router = PeerRouter(6, 16, 2, heads=3, key_size=5)
    weights, _ = router(torch.randn(9, 6))
    torch.testing.assert_close(weights.sum(-1), torch.ones(9))
    weights.square().sum().backward()
    assert router.query.grad is not None
    assert router.keys.grad is not None
    assert router.query.grad.abs().max() > 0
    assert router.keys.grad.abs().max() > 0


def test_refusals() -> None:
    """Protects: experts that form no square, and more of them than a half has keys."""
    with pytest.raises(ValueError, match="such as 9 or 16, got 12"):
        PeerRouter(6, 12, 2)
    with pytest.raises(ValueError, match="offer 3 keys a half, so top_k must be at most that, got 4"):
        PeerRouter(6, 9, 4)
    with pytest.raises(ValueError, match="at least 1, got 0 and 64"):
        PeerRouter(6, 9, 2, heads=0)
