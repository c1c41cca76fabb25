"""BASE layers (arXiv 2103.16716): in training a linear assignment gives every expert the same number of tokens.

    y = sigmoid(x . w_e) E_e(x),      training: e maximises the sum of x . w_e at equal loads;  inference: the largest

T tokens, E num_experts. The paper adds the input to E_e; in a block with a residual that is the residual.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.routers.base import System, require_one
from sparsify.routers.linear_router import LinearRouter

_GAIN = 0.1


class BaseRouter(LinearRouter):
    """At most ceil(T/E) tokens for an expert in training, exactly T/E where E divides T. No balance loss is needed.

    The assignment is solved exactly, on the CPU, in time that grows with the cube of T at worst. Rows of `weight`, the
    paper's centroids, start orthogonal.
    """

    system = System(
        name="base",
        paper="BASE Layers: Simplifying Training of Large, Sparse Models (arXiv 2103.16716)",
        mechanism="training: one expert a token by linear assignment, equal loads; inference: the largest logit",
        export_form="top-k",
    )
    default_top_k = 1

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        nn.init.orthogonal_(self.weight, gain=_GAIN)

    def check_top_k(self, top_k: int) -> None:
        """One expert a token."""
        super().check_top_k(top_k)
        require_one(self.system.name, top_k)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One slot, weighted by the sigmoid of its logit."""
        logits = self.logits(x)
        ids = assign(logits) if self.training else logits.argmax(-1)
        ids = ids.unsqueeze(-1)
        return torch.sigmoid(logits.gather(-1, ids)), ids


def assign(scores: Tensor) -> Tensor:
    """The assignment of tokens to experts with the largest sum of scores, at most ceil(T/E) tokens for an expert.

    Args:
        scores: `[T, E]`, finite.

    Returns:
        `[T]` int64.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and needed in training alone

    tokens, experts = scores.shape
    places = -(-tokens // experts)
    _, columns = linear_sum_assignment(scores.detach().double().cpu().repeat(1, places), maximize=True)
    return torch.as_tensor(columns % experts, dtype=torch.int64, device=scores.device)
