"""`HashRouter`: a fixed table, random or balanced."""

from __future__ import annotations

import pytest
import torch

from sparsify.routers.hash_router import HashRouter


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("experts", [1, 5])
def test_the_id_alone_chooses(num_tokens: int, experts: int) -> None:
    """Protects: claim 14: the same id has the same expert in any context, and the same table everywhere."""
    router = HashRouter(7, experts, 1, num_ids=50)
    ids = torch.randint(0, 50, (num_tokens,))
    weights, chosen = router(torch.randn(num_tokens, 7), ids)
    assert chosen[:, 0].tolist() == [int(router.table[i]) for i in ids]
    assert torch.equal(chosen, router(torch.randn(num_tokens, 7), ids)[1])
    assert weights.eq(1).all()
    torch.manual_seed(123)
    assert torch.equal(router.table, HashRouter(7, experts, 1, num_ids=50).table)


def test_balanced_table_is_the_greedy_one() -> None:
    """Protects: frequent ids first, each to the expert with the fewest tokens; ids that never occur are spread too."""
    counts = torch.tensor([50, 1, 30, 20, 19, 0, 0, 0, 0])
    router = HashRouter(4, 3, 1, num_ids=9, balanced=True)
    router.fit_ids(torch.repeat_interleave(torch.arange(9), counts))
    loads = [0.0, 0.0, 0.0]
    for index in sorted(range(9), key=lambda i: -int(counts[i])):
        expert = min(range(3), key=lambda e: loads[e])
        assert int(router.table[index]) == expert
        loads[expert] += int(counts[index]) + 1 / 9
    assert max(loads) / (sum(loads) / 3) < 1.3
    table = HashRouter(4, 3, 1, num_ids=9).table
    assert torch.equal(table, HashRouter(4, 3, 1, num_ids=9).table)


def test_balance_beats_chance() -> None:
    """Protects: on Zipf counts the largest load over the mean is lower than with the random table."""
    counts = (1000 / torch.arange(1, 201)).long()
    router = HashRouter(4, 8, 1, num_ids=200)
    loads = torch.zeros(8, dtype=torch.long).index_add_(0, router.table, counts)
    router.balance(counts)
    balanced = torch.zeros(8, dtype=torch.long).index_add_(0, router.table, counts)
    assert balanced.max() < loads.max()
    assert balanced.max() / balanced.float().mean() < 1.4


def test_refusals() -> None:
    """Protects: no ids, ids outside the table, several experts."""
    router, x = HashRouter(4, 3, 1, num_ids=9), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"reads an integer of every token: call router\(x, ids\)"):
        router(x)
    with pytest.raises(ValueError, match="knows the ids 0 to 8, got 9; give a larger num_ids"):
        router(x, torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="got -100"):
        router(x, torch.tensor([0, -100]))
    with pytest.raises(ValueError, match="give num_ids in router_options, at least 10 for these"):
        HashRouter(4, 3, 1)(x, torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="give top_k=1"):
        HashRouter(4, 3, 2)
