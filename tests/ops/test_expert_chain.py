"""The three ops in a chain, against a loop in fp64, on awkward shapes and routings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify import ops

# T tokens, K slots, E experts, D inputs, N outputs: no token, one token, primes, K = 1, K = E.
SHAPES = [(0, 2, 3, 5, 7), (1, 1, 3, 5, 7), (7, 3, 3, 5, 2), (13, 2, 5, 3, 7), (37, 4, 11, 17, 13)]


def route(num_tokens: int, top_k: int, num_experts: int) -> Tensor:
    """Distinct random experts for every token: `[T, K]`."""
    return torch.rand(num_tokens, num_experts).argsort(1)[:, :top_k]


def chain(x: Tensor, weight: Tensor, bias: Tensor | None, routing_weights: Tensor, ids: Tensor) -> Tensor:
    """dispatch, expert_linear, combine."""
    rows, order, offsets = ops.dispatch(x, ids, len(weight))
    return ops.combine(ops.expert_linear(rows, weight, bias, offsets), routing_weights, order)


def loop(x: Tensor, weight: Tensor, bias: Tensor | None, routing_weights: Tensor, ids: Tensor) -> Tensor:
    """The definition, pair by pair, in fp64."""
    x, weight, routing_weights = x.double(), weight.double(), routing_weights.double()
    y = torch.zeros(len(x), weight.shape[1], dtype=torch.float64)
    for t, k in [(t, k) for t in range(len(x)) for k in range(ids.shape[1]) if ids[t, k] >= 0]:
        expert = int(ids[t, k])
        offset = 0 if bias is None else bias[expert].double()
        y[t] += routing_weights[t, k] * (weight[expert] @ x[t] + offset)
    return y


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_chain_equals_the_loop(shape: tuple[int, ...], dtype: torch.dtype, biased: bool) -> None:
    """Protects: every token reaches its experts and comes back to its place, with its weight."""
    num_tokens, top_k, num_experts, inputs, outputs = shape
    x = torch.randn(num_tokens, inputs).to(dtype)
    weight = torch.randn(num_experts, outputs, inputs).to(dtype)
    bias = torch.randn(num_experts, outputs).to(dtype) if biased else None
    routing_weights, ids = torch.rand(num_tokens, top_k).to(dtype), route(num_tokens, top_k, num_experts)
    y = chain(x, weight, bias, routing_weights, ids)
    expected = loop(x, weight, bias, routing_weights, ids)
    assert y.dtype == dtype
    bound = 8 * torch.finfo(dtype).eps * max(float(expected.abs().max()) if num_tokens else 0.0, 1.0)
    assert y.shape == expected.shape
    assert num_tokens == 0 or float((y.double() - expected).abs().max()) <= bound


@pytest.mark.parametrize("case", ["all on one expert", "an unused slot", "no slot used"])
def test_odd_routings(case: str) -> None:
    """Protects: empty experts, slots of id -1 (they add nothing, even where memory was never written)."""
    ids = {
        "all on one expert": torch.full((6, 1), 2),
        "an unused slot": torch.tensor([[0, -1], [-1, 2], [1, 0], [-1, -1]]),
        "no slot used": torch.full((5, 2), -1),
    }[case]
    x, weight, bias = torch.randn(len(ids), 4), torch.randn(3, 5, 4), torch.randn(3, 5)
    routing_weights = torch.rand(ids.shape)
    y = chain(x, weight, bias, routing_weights, ids)
    torch.testing.assert_close(y.double(), loop(x, weight, bias, routing_weights, ids), rtol=1e-5, atol=1e-6)


def test_memory_that_is_not_contiguous() -> None:
    """Protects: strides of x, weights and routing are honoured."""
    x, weight = torch.randn(4, 9).t(), torch.randn(3, 4, 5).transpose(1, 2)
    routing_weights, ids = torch.rand(2, 9).t(), route(9, 3, 3)[:, ::2]
    y = chain(x, weight, None, routing_weights, ids)
    torch.testing.assert_close(y.double(), loop(x, weight, None, routing_weights, ids), rtol=1e-5, atol=1e-6)


def test_gradients() -> None:
    """Protects: the backward of all three ops, with unused slots, an empty expert and an expanded output gradient."""
    ids = torch.tensor([[0, 1], [-1, 3], [1, 0], [3, -1]])  # nobody asks for expert 2
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    routing_weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, b, r: chain(x, w, b, r, ids), (x, weight, bias, routing_weights))
    chain(x, weight, bias, routing_weights, ids).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad[2], torch.zeros(5, 3, dtype=torch.float64))


def test_repeats_bit_by_bit() -> None:
    """Protects: determinism (promise 6)."""
    x, weight, routing_weights, ids = torch.randn(50, 8), torch.randn(6, 8, 8), torch.rand(50, 3), route(50, 3, 6)
    first = chain(x, weight, None, routing_weights, ids)
    assert all(torch.equal(first, chain(x, weight, None, routing_weights, ids)) for _ in range(3))


def test_exports_and_compiles_with_any_number_of_tokens() -> None:
    """Protects: shapes do not depend on data, so one graph serves every T."""

    class Chain(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, routing_weights: Tensor, ids: Tensor) -> Tensor:
            return chain(x, weight, None, routing_weights, ids)

    def inputs(num_tokens: int) -> tuple[Tensor, ...]:
        return torch.randn(num_tokens, 4), weight, torch.rand(num_tokens, 2), route(num_tokens, 2, 3)

    weight, tokens = torch.randn(3, 5, 4), torch.export.Dim("tokens")
    shapes = ({0: tokens}, None, {0: tokens}, {0: tokens})
    exported = torch.export.export(Chain(), inputs(6), dynamic_shapes=shapes).module()
    for num_tokens in (2, 11):
        given = inputs(num_tokens)
        torch.testing.assert_close(exported(*given), Chain()(*given))
