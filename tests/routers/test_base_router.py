"""`BaseRouter`: the linear assignment against enumeration and scipy in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from sparsify.routers.base_router import BaseRouter, assign


def test_every_expert_gets_the_same_number_of_tokens() -> None:
    """Protects: claim 10: loads T / E, whose sum of scores is the optimum of the assignment."""
    torch.manual_seed(0)
    scores = torch.randn(64, 8)
    ids = assign(scores)
    assert torch.bincount(ids, minlength=8).tolist() == [8] * 8
    rows, columns = linear_sum_assignment(-scores.double().repeat_interleave(8, dim=1).numpy())
    optimum = scores.double().repeat_interleave(8, dim=1)[rows, columns].sum()
    assert float(scores.double().gather(1, ids[:, None]).sum()) == pytest.approx(float(optimum))


def test_assignment_is_the_best_of_all() -> None:
    """Protects: the optimum, by enumeration."""
    scores = torch.randn(4, 2, dtype=torch.float64)
    best = max(
        (choice for choice in itertools.product(range(2), repeat=4) if sum(choice) == 2),
        key=lambda choice: sum(float(scores[t, e]) for t, e in enumerate(choice)),
    )
    assert assign(scores).tolist() == list(best)


@pytest.mark.parametrize(("tokens", "experts"), [(0, 3), (1, 4), (13, 4), (7, 1), (3, 7)])
def test_awkward_numbers(tokens: int, experts: int) -> None:
    """Protects: where E does not divide T no expert has more than ceil(T / E) tokens, and every token has one."""
    ids = assign(torch.randn(tokens, experts))
    assert ids.shape == (tokens,)
    assert int(torch.bincount(ids, minlength=experts).max()) <= -(-tokens // experts)


def test_inference_is_greedy() -> None:
    """Protects: argmax and sigmoid at inference, whatever else is in the batch; biased loads are then not equal."""
    router, x = BaseRouter(6, 4, 1).eval(), torch.randn(32, 6) + 1
    weights, ids = router(x)
    logits = x.double() @ router.weight.detach().double().t()
    assert torch.equal(ids[:, 0], logits.argmax(-1))
    torch.testing.assert_close(weights[:, 0].double(), torch.sigmoid(logits.amax(-1)), rtol=1e-5, atol=1e-6)
    assert torch.equal(router(x[:1])[1], ids[:1])
    balanced = router.train()(x)[1]
    assert torch.bincount(balanced[:, 0], minlength=4).tolist() == [8] * 4


def test_gradient_and_start() -> None:
    """Protects: centroids start orthogonal with gain 0.1, and learn through the sigmoid."""
    router = BaseRouter(6, 4, 1)
    torch.testing.assert_close(router.weight @ router.weight.t(), 0.01 * torch.eye(4), rtol=1e-4, atol=1e-6)
    x = torch.randn(8, 6)
    weights, ids = router(x)
    weights.sum().backward()
    alpha = torch.sigmoid((x * router.weight[ids[:, 0]]).sum(-1)).detach()
    expected = torch.zeros(4, 6)
    for token in range(8):
        expected[ids[token, 0]] += alpha[token] * (1 - alpha[token]) * x[token]
    torch.testing.assert_close(router.weight.grad, expected)


def test_refuses_two_experts() -> None:
    """Protects: the assignment gives one expert."""
    with pytest.raises(ValueError, match="give top_k=1"):
        BaseRouter(6, 4, 2)
