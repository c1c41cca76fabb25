"""`ThorRouter`: one expert for a whole batch in training, a stable form at inference."""

from __future__ import annotations

import pytest
import torch

from sparsify.routers.hash_router import HashRouter
from sparsify.routers.losses import consistency_loss
from sparsify.routers.thor_router import ThorHashRouter, ThorRouter


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("average", [False, True])
def test_training_draws_one_expert_for_the_batch(num_tokens: int, average: bool) -> None:
    """Protects: all tokens of a call have the same expert, and every expert has its turn."""
    router, x = ThorRouter(4, 3, 1, average=average), torch.randn(num_tokens, 4)
    drawn = set()
    for _ in range(40):
        weights, ids = router(x)
        assert ids.shape == (num_tokens, router.num_slots)
        assert ids[:, 0].unique().numel() == min(num_tokens, 1)
        assert weights.sum(-1).eq(1).all()
        assert ids[:, 1:].eq(-1).all()
        drawn |= set(ids[:, 0].tolist())
    assert drawn == ({0, 1, 2} if num_tokens else set())


def test_inference_draws_nothing() -> None:
    """Protects: the fixed expert, or the mean of all."""
    x = torch.randn(5, 4)
    weights, ids = ThorRouter(4, 3, 1, inference_expert=2).eval()(x)
    assert (weights.tolist(), ids.tolist()) == ([[1.0]] * 5, [[2]] * 5)
    weights, ids = ThorRouter(4, 3, 1, average=True).eval()(x)
    torch.testing.assert_close(weights, torch.full((5, 3), 1 / 3))
    assert ids.tolist() == [[0, 1, 2]] * 5


def test_hashed_inference() -> None:
    """Protects: training draws one expert for the batch whatever the ids, inference has that of the id's table."""
    router, x, ids = ThorHashRouter(4, 3, 1, num_ids=11), torch.randn(5, 4), torch.tensor([7, 0, 10, 7, 3])
    drawn: set[int] = set()
    for _ in range(40):
        weights, experts = router(x, ids)
        assert weights.eq(1).all()
        assert len(experts.unique()) == 1
        drawn |= set(experts.flatten().tolist())
    assert drawn == {0, 1, 2}
    router.eval()
    assert router(x, ids)[1].flatten().tolist() == [int(router.table[i]) for i in ids]
    assert torch.equal(router.table, HashRouter(4, 3, 1, num_ids=11).table)
    with pytest.raises(ValueError, match="knows the ids 0 to 10, got 11"):
        router(x, ids + 1)


def test_copies_agree_at_the_start() -> None:
    """Protects: the consistency loss of two calls is 0 while the experts are equal, and positive once they are not."""
    logits = torch.randn(4, 9)
    assert float(consistency_loss(logits, logits)) == 0
    assert float(consistency_loss(logits, torch.randn(4, 9))) > 0


def test_refusals() -> None:
    """Protects: an expert that does not exist, and more than one."""
    with pytest.raises(ValueError, match="from 0 to 2, got 3"):
        ThorRouter(4, 3, 1, inference_expert=3)
    with pytest.raises(ValueError, match="give top_k=1"):
        ThorRouter(4, 3, 2)
