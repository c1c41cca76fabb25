"""Pruning by use: the experts that are left compute what they did, and nothing of the others stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparsify import SparseModel, sparsify

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


def converted(**options: Any) -> SparseModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
    given: dict[str, Any] = {"start": "upcycle", "num_experts": 6, "top_k": 2, "select": "all", **options}
    sparse = sparsify(model, (X,), **given)
    for parameter in sparse.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return sparse.eval()


def expert_bytes(sparse: SparseModel) -> int:
    found = [(name, p) for name, p in sparse.named_parameters() if "experts." in name and not name.endswith("s.bias")]
    return sum(p.nbytes for _, p in found)


def test_routes_and_outputs_survive() -> None:
    """Protects: claim 17: where the top-K is kept, the same experts and outputs; expert bytes fall by (E - n) / E."""
    sparse = converted()
    stats = sparse.routing_stats([X])
    pruned = sparse.prune(4, stats)
    loads = stats.layers[0].tokens_per_expert
    kept = sorted(sorted(range(6), key=lambda e: -loads[e])[:4])
    (router,), (fewer,) = sparse.routers.values(), pruned.routers.values()
    before, after = router(X)[1], torch.tensor(kept)[fewer(X)[1]]
    survives = torch.isin(before, torch.tensor(kept)).all(-1)
    assert 0 < int(survives.sum()) < len(X)
    assert torch.equal(before[survives], after[survives])
    torch.testing.assert_close(pruned(X)[survives], sparse(X)[survives])
    assert expert_bytes(pruned) * 6 == expert_bytes(sparse) * 4
    assert len(next(iter(sparse.parameters()))) == 6


def test_refusals() -> None:
    """Protects: a split loses no part of its sum, and no token is left without its K experts."""
    sparse = converted()
    stats = sparse.routing_stats([X])
    with pytest.raises(ValueError, match=r"keep between 2 \(its top_k\) and 6 experts, got 1"):
        sparse.prune(1, stats)
    shards = converted(granularity=2)
    with pytest.raises(ValueError, match="shards of copies, which belong together"):
        shards.prune(4, shards.routing_stats([X]))
    split = converted(start="split", num_experts=4)
    with pytest.raises(ValueError, match="parts of one sum"):
        split.prune(2, split.routing_stats([X]))
