"""`choose_neurons`: a partition with the most important neurons in the shared experts."""

from __future__ import annotations

import pytest
import torch

from sparsify.passes.split.choose_neurons import activation_profiles, choose_neurons
from sparsify.passes.split.dense_ffn import DenseFFN


@pytest.mark.parametrize(("num_experts", "num_shared"), [(4, 0), (4, 1), (5, 2), (7, 1), (23, 1)])
def test_partition(num_experts: int, num_shared: int) -> None:
    """Protects: each neuron once, also where the experts do not divide the neurons."""
    importance = torch.rand(24)
    chosen = choose_neurons(torch.randn(24, 9), importance, num_experts, num_shared, seed=0)
    assert chosen.shape == (num_experts, -(-24 // num_experts))
    assert sorted(chosen[chosen >= 0].tolist()) == list(range(24))
    shared = chosen[:num_shared].flatten()
    assert set(shared.tolist()) == set(importance.topk(len(shared)).indices.tolist())


def test_profiles(dense: DenseFFN) -> None:
    """Protects: a sample of the tokens, centred and normalised; a constant neuron gives no NaN."""
    profiles = activation_profiles(dense, torch.randn(4000, 7))
    assert profiles.shape == (24, 1334)
    torch.testing.assert_close(profiles.norm(dim=1), torch.ones(24))
    torch.testing.assert_close(profiles.mean(dim=1), torch.zeros(24), rtol=0, atol=1e-6)
    assert torch.isfinite(activation_profiles(dense, torch.ones(5, 7))).all()
