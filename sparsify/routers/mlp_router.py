"""A two-layer perceptron that predicts which experts of a split FFN contribute most (as in D2DMoE, arXiv 2310.04361).

T tokens, D hidden_size, H hidden size of the router, E num_experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.routers.base import Router


class MLPRouter(Router):
    """Logits are `output(relu(hidden(x)))`. `routers/` holds the form; `passes/split/train_router.py` fits it."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, router_hidden_size: int) -> None:
        super().__init__(num_experts, top_k)
        self.hidden = nn.Linear(hidden_size, router_hidden_size)
        self.output = nn.Linear(router_hidden_size, num_experts)

    def logits(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, E]`."""
        return self.output(torch.relu(self.hidden(x.to(self.hidden.weight.dtype))))
