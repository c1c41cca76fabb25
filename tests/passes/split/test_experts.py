"""`divide`: any partition is exact with every expert on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsify.passes.split.dense_ffn import DenseFFN
from sparsify.passes.split.experts import divide, divide_unevenly


@pytest.mark.parametrize(("num_experts", "num_shared"), [(1, 0), (4, 0), (4, 1), (6, 2), (24, 5)])
def test_exact_with_every_expert_on(dense: DenseFFN, num_experts: int, num_shared: int) -> None:
    """Protects: the promise of the split, for random partitions with and without shared experts."""
    experts = divide(dense, torch.randperm(24).view(num_experts, -1), num_shared)
    x = torch.randn(13, 7)
    everyone = torch.arange(experts.num_routed).expand(13, -1)
    torch.testing.assert_close(experts(x, everyone), dense(x), rtol=1e-5, atol=1e-6)


def test_experts_of_several_units(dense: DenseFFN) -> None:
    """Protects: an expert is all its units, with its weight, and the shared one has any width."""
    order, x = torch.randperm(24), torch.randn(6, 7)
    routed = order[6:].view(6, 3)
    experts = divide_unevenly(dense, order[:6], routed, (1, 3, 2))
    assert (experts.num_routed, experts.num_units, experts.widths) == (3, 6, (3, 9, 6))
    ids, weights = torch.tensor([[0, 1], [2, 1], [1, -1], [-1, -1], [2, 0], [0, 2]]), torch.rand(6, 2)
    hidden, gate = dense.hidden(x), torch.zeros(6, 24)
    gate[:, order[:6]] = 1
    for t, k in ((t, k) for t in range(6) for k in range(2) if ids[t, k] >= 0):
        gate[t, routed.flatten().split([3, 9, 6])[int(ids[t, k])]] += weights[t, k]
    torch.testing.assert_close(experts(x, ids, weights), dense.down(hidden * gate), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [None, (1, 3, 2)])
@pytest.mark.parametrize("num_tokens", [0, 1, 6])
def test_masked_is_the_same(dense: DenseFFN, sizes: tuple[int, ...] | None, num_tokens: int) -> None:
    """Protects: both ways to run experts agree, biases of experts, shared ones, padding and unused slots included."""
    order = torch.randperm(24)
    padded = torch.cat([order[6:], torch.full((6,), -1)]).view(-1, 4) if sizes is None else order[6:].view(6, 3)
    experts = divide_unevenly(dense, order[:6], padded, sizes)
    experts = replace(experts, expert_bias=torch.randn(experts.num_units, 7))
    x, weights = torch.randn(num_tokens, 7), torch.rand(num_tokens, 2)
    ids = torch.tensor([[0, 1], [2, 1], [1, -1], [-1, -1], [2, 0], [0, 2]])[:num_tokens]
    torch.testing.assert_close(experts.masked(x, ids, weights), experts(x, ids, weights), rtol=1e-4, atol=1e-5)


def test_padding_adds_nothing(dense: DenseFFN) -> None:
    """Protects: experts with fewer neurons than places, the activation of padding included."""
    neurons = torch.cat([torch.randperm(24), torch.full((6,), -1)]).view(5, 6)
    x = torch.randn(13, 7)
    torch.testing.assert_close(divide(dense, neurons, 1)(x, torch.arange(4).expand(13, -1)), dense(x))


def test_a_selection_is_the_sum_of_its_experts(dense: DenseFFN) -> None:
    """Protects: what is not selected adds nothing, and what is selected adds once."""
    neurons, x = torch.arange(24).view(4, 6), torch.randn(5, 7)
    experts = divide(dense, neurons, 0)
    ids = torch.tensor([[0, 1], [3, 2], [2, 0], [1, 3], [-1, 2]])
    hidden = dense.hidden(x)
    mask = torch.zeros(5, 4).scatter_(1, ids.clamp(min=0), (ids >= 0).float()).repeat_interleave(6, dim=1)
    torch.testing.assert_close(experts(x, ids), dense.down(hidden * mask))


def test_counts_its_parameters(dense: DenseFFN) -> None:
    """Protects: the parameter count of the report."""
    experts = divide(dense, torch.arange(24).view(4, 6), 1)
    linears = (*dense.projections, dense.down)
    expected = sum(t.numel() for linear in linears for t in (linear.weight, linear.bias) if t is not None)
    assert experts.num_parameters == expected + sum(vector.numel() for vector in dense.vectors)


@pytest.mark.parametrize("num_shared", [0, 1, 4])
def test_hidden_has_the_neurons_of_all_routed_experts(dense: DenseFFN, num_shared: int) -> None:
    """Protects: the order of experts and neurons, and splits without routed experts."""
    neurons, x = torch.randperm(24).view(4, 6), torch.randn(5, 7)
    hidden = divide(dense, neurons, num_shared).hidden(x)
    torch.testing.assert_close(hidden, dense.hidden(x)[:, neurons[num_shared:]])
