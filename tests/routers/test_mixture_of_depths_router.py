"""`MixtureOfDepthsRouter`: the best tokens in training, a causal predictor at inference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sparsify.routers.mixture_of_depths_router import MixtureOfDepthsRouter


def trained(**options: Any) -> MixtureOfDepthsRouter:
    router = MixtureOfDepthsRouter(6, 1, 1, **options)
    router.weight.data.normal_()
    return router


@pytest.mark.parametrize(("shape", "capacity"), [((1, 0), 0.5), ((1, 1), 0.125), ((3, 16), 0.125), ((2, 13), 0.3)])
def test_training_runs_the_best_tokens(shape: tuple[int, int], capacity: float) -> None:
    """Protects: ceil(capacity S) tokens of every sequence, those with the largest r, weighted by r."""
    router, x = trained(capacity=capacity), torch.randn(*shape, 6)
    weights, ids = router(x)
    scores = (x.double() @ router.weight[0].detach().double()).flatten(0, 1)
    expected = torch.full((len(scores), 1), -1)
    for group in range(shape[0]):
        first = group * shape[1]
        count = math.ceil(capacity * shape[1])
        for token in sorted(range(first, first + shape[1]), key=lambda t: -float(scores[t]))[:count]:
            expected[token] = 0
    assert torch.equal(ids, expected)
    used = ids[:, 0] == 0
    torch.testing.assert_close(weights[used, 0].double(), scores[used], rtol=1e-5, atol=1e-6)


def test_inference_asks_the_predictor() -> None:
    """Protects: the decode path is causal: a token runs or does not whatever stands around it; at first all run."""
    router, x = trained().eval(), torch.randn(2, 16, 6)
    assert router(x)[1].eq(0).all()
    router.predictor_weight.data.normal_()
    together = router(x)[1].view(2, 16)
    for place in range(16):
        assert torch.equal(router(x[:, place : place + 1])[1].view(2), together[:, place])
    assert torch.equal(together == 0, x @ router.predictor_weight[0] >= 0)
    assert router.causal
    assert not trained(predictor=False).causal


def test_the_predictor_learns_who_runs() -> None:
    """Protects: its loss is the binary cross-entropy, whose gradient reaches neither token nor score."""
    router, x = trained(capacity=0.25, predictor_coefficient=1.0), torch.randn(4, 16, 6, requires_grad=True)
    router.predictor_weight.data.normal_()
    _, ids = router(x)
    target = (ids[:, 0] == 0).double()
    p = torch.sigmoid((x.detach().double() @ router.predictor_weight[0].detach().double()).flatten())
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    assert float(router.losses["predictor"]) == pytest.approx(float(expected), rel=1e-5)
    grads = torch.autograd.grad(router.aux_loss(), [x, router.weight, router.predictor_weight], allow_unused=True)
    assert grads[0] is None
    assert grads[1] is None
    by_hand = ((p - target).unsqueeze(1) * x.detach().flatten(0, 1).double()).mean(0)
    torch.testing.assert_close(grads[2][0].double(), by_hand, rtol=1e-4, atol=1e-6)


def test_training_teaches_it() -> None:
    """Protects: after training the predictor names about the tokens that the scores choose."""
    torch.manual_seed(0)
    router, x = trained(capacity=0.5, predictor_coefficient=1.0), torch.randn(8, 32, 6)
    optimizer = torch.optim.Adam([router.predictor_weight], lr=5e-2)
    for _ in range(100):
        router(x)
        optimizer.zero_grad()
        router.aux_loss().backward()
        optimizer.step()
    chosen = router(x)[1]
    assert (router.eval()(x)[1] == chosen).float().mean() > 0.85


def test_refusals() -> None:
    """Protects: several experts, and a share that is none."""
    with pytest.raises(ValueError, match="give num_experts=1, top_k=1"):
        MixtureOfDepthsRouter(6, 4, 1)
    with pytest.raises(ValueError, match=r"at most 1, got 1\.5"):
        MixtureOfDepthsRouter(6, 1, 1, capacity=1.5)
