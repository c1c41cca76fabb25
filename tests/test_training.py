"""Freezing all but routers, and gradients of experts times `1 / sqrt(E)`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparsify import SparseModel, sparsify

X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))


def converted(**options: Any) -> SparseModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
    given: dict[str, Any] = {"start": "shared", "num_experts": 4, "top_k": 2, "select": "all", **options}
    sparse = sparsify(model, (X,), **given)
    for parameter in sparse.parameters():  # experts of "shared" start at 0, where there is no gradient to compare
        parameter.data += 0.1 * torch.randn_like(parameter)
    return sparse.train()


def gradients(sparse: SparseModel) -> dict[str, torch.Tensor]:
    sparse.zero_grad()
    sparse(X).square().sum().backward()
    return {name: p.grad.clone() for name, p in sparse.named_parameters() if p.grad is not None}


def test_expert_gradients_are_scaled_exactly() -> None:
    """Protects: claim 15: the ratio is 1 / sqrt(E) for experts; router, shared experts and the bias keep theirs."""
    sparse = converted()
    plain = gradients(sparse)
    handles = sparse.scale_expert_gradients()
    scaled = gradients(sparse)
    for name, gradient in plain.items():
        factor = 0.5 if ".experts." in name and not name.endswith("experts.bias") else 1.0
        assert torch.equal(scaled[name], gradient * factor), name
    assert len(handles) == 3
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(gradients(sparse).values(), plain.values(), strict=True))


def test_only_routers_are_left_to_train() -> None:
    """Protects: a step changes the router and nothing else."""
    sparse = converted()
    sparse.freeze_all_but_routers()
    found = gradients(sparse)
    assert found
    assert all(".router." in name or name.startswith("router.") for name in found)


def test_refuses_where_no_router_learns() -> None:
    """Protects: a model whose routers get no gradient is not frozen to the last parameter."""
    sparse = converted(start="split")
    with pytest.raises(ValueError, match=r"no router \(mlp\) has weights that a gradient reaches"):
        sparse.freeze_all_but_routers()
    assert any(parameter.requires_grad for parameter in sparse.parameters())
