"""`sparsify.kernels.up` by itself: what the op does not show."""

from __future__ import annotations

import torch

from sparsify.kernels.layout import make_layout
from sparsify.kernels.operands import operands
from sparsify.kernels.up import up_rows


def test_writes_what_is_asked_for_and_rows_of_experts_only(problem):
    """Protects: z before, h after the activation and times the weight; rows of no expert stay as they were."""
    given = problem(37, 2, 3, gated=True, activation="silu")
    op = operands(*given.arguments)
    assert op is not None
    layout = make_layout(op.expert_ids, 3, op.row_tile().rows)
    hidden, up_z, gate_z = (torch.empty(op.num_pairs, op.neurons, device=op.x.device) for _ in range(3))
    up_rows(op, layout, op.up_tile(), hidden=hidden, row_weights=op.routing_weights, up_z=up_z, gate_z=gate_z)
    used = int(layout.offsets[-1])
    pairs = layout.order[:used].long()
    experts, rows = op.expert_ids.flatten()[pairs], op.x[pairs // 2]
    assert op.gate_proj is not None
    assert op.up_bias is not None
    assert op.gate_bias is not None
    up = torch.einsum("pd,pid->pi", rows, op.up_proj[experts]) + op.up_bias[experts]
    gate = torch.einsum("pd,pid->pi", rows, op.gate_proj[experts]) + op.gate_bias[experts]
    weighted = torch.nn.functional.silu(gate) * up * op.routing_weights.flatten()[pairs, None]
    for found, expected in ((up_z, up), (gate_z, gate), (hidden, weighted)):
        torch.testing.assert_close(found[:used], expected, rtol=1e-5, atol=1e-5)
        assert found[used:].isnan().all()
