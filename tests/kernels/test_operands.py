"""`sparsify.kernels.operands`: what the kernels take, and in which form."""

from __future__ import annotations

import torch

from sparsify.kernels.operands import operands


def test_declines_what_the_kernels_cannot_do(problem):
    """Protects: fp64 and mixed dtypes are for plain ops."""
    given = problem(5, 2, 3)
    wide = given.to(torch.float64)
    assert operands(*wide.arguments) is None
    mixed = [*given.arguments[:7], *wide.arguments[7:]]
    assert operands(*mixed) is None
    assert operands(*given.arguments) is not None


def test_copies_only_what_it_must(problem):
    """Protects: weights are never copied, rows only if their elements are apart."""
    x, r, ids, up, up_bias, gate, gate_bias, down, _ = problem(5, 2, 3, size=16).tensors
    transposed = down.transpose(1, 2).contiguous().transpose(1, 2)
    op = operands(x.T.contiguous().T, r, ids.T.contiguous().T, up, up_bias, gate, gate_bias, transposed, None, "gelu")
    assert op is not None
    assert op.x.stride() == (16, 1)
    assert op.expert_ids.is_contiguous()
    assert op.down_proj is transposed
    assert op.up_proj is up
    assert (op.num_pairs, op.top_k, op.num_experts, op.neurons, op.features) == (10, 2, 3, 23, 17)
