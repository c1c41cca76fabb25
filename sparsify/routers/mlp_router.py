"""A two-layer perceptron that predicts which experts of a split FFN contribute most (as in D2DMoE, arXiv 2310.04361).

T tokens, D hidden_size, H hidden size of the router, E num_experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.routers.base import System, UnitRouter, wide


class MLPRouter(UnitRouter):
    """Logits are `output(relu(hidden(x)))`. `routers/` holds the form; `passes/split/train_router.py` fits it."""

    system = System(
        name="mlp",
        paper="Exploiting Activation Sparsity with Dense to Dynamic-k MoE Conversion (D2DMoE, arXiv 2310.04361)",
        mechanism="a small MLP predicts the norm of each expert's output; the K largest run with weight 1",
        export_form="top-k",
    )

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, router_hidden_size: int = 64) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.router_hidden_size = router_hidden_size
        self.hidden = nn.Linear(hidden_size, router_hidden_size)
        self.output = nn.Linear(router_hidden_size, num_experts)

    def logits(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, E]`, fp32."""
        return _linear(self.output, torch.relu(_linear(self.hidden, wide(x))))


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, wide(linear.weight).to(x.dtype), wide(linear.bias).to(x.dtype))
