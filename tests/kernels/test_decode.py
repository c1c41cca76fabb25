"""The path of few tokens against the one that sorts, and what it costs."""

from __future__ import annotations

import pytest
import torch

from sparsify.kernels import moe_triton
from sparsify.kernels.decode import moe_ffn_decode
from sparsify.kernels.moe_triton import moe_ffn_triton
from sparsify.kernels.operands import operands


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (1, 2, 3), (4, 3, 3), (3, 1, 40)])
def test_same_as_float64(tokens, top_k, experts, gated, problem, relative_error, launches):
    """Protects: three launches, no sorting, inner sizes beyond one block and odd ones."""
    given = problem(tokens, top_k, experts, 263, 37, 33, gated=gated, unused=0.3)
    found = given.forward(moe_ffn_triton)
    assert launches == ["decode_up_kernel", "decode_down_kernel", "combine_kernel"]
    assert relative_error(found, given.to(torch.float64).forward()) <= 1e-5


def test_same_as_the_sorted_path(problem, relative_error):
    """Protects: a batch that grows by a token does not change the answers."""
    given = problem(7, 2, 3, gated=True)
    arguments = given.arguments
    op = operands(*arguments)
    assert op is not None
    assert relative_error(moe_ffn_decode(op), moe_ffn_triton(*arguments)) <= 1e-5


def test_a_token_without_experts_is_zero(problem):
    """Protects: nothing of the unwritten rows gets into the sum."""
    found = problem(3, 2, 4, unused=1.1).forward(moe_triton.moe_ffn_triton)
    assert torch.equal(found, torch.zeros_like(found))
