"""PR-MoE (DeepSpeed-MoE, arXiv 2201.05596): a dense FFN for every token beside routed experts, mixed by two weights.

    y = c_1 E_0(x) + c_0 sum over the selected e >= 1 of w_e E_e(x),      c = softmax(W_c x)

T tokens, D hidden_size, E num_experts. Expert 0 is the dense one; the pyramid of the paper (more experts in late
layers) is `overrides`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.routers.base import Router, System, WeightRule, straighten, wide

_INIT_STD = 0.02


class PRMoERouter(Router):
    """Slot 0 is expert 0, the other slots are the K - 1 most likely of the rest.

    The paper scales a single routed expert by its probability p. Here it counts p / stop_gradient(p), so that the
    weights of a token sum to 1 for any c and the router still learns.
    """

    system = System(
        name="pr-moe",
        paper="DeepSpeed-MoE (PR-MoE, arXiv 2201.05596)",
        mechanism="one expert for every token and K - 1 chosen ones, mixed by a softmax of two logits",
        export_form="top-k",
    )

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        self.weight = nn.Parameter(torch.randn(num_experts - 1, hidden_size) * _INIT_STD)
        self.mixture = nn.Parameter(torch.randn(2, hidden_size) * _INIT_STD)

    def check_top_k(self, top_k: int) -> None:
        """One of the experts is no choice."""
        super().check_top_k(top_k)
        if top_k < 2:
            raise ValueError(
                f"the router 'pr-moe' runs one expert for every token and chooses the rest: top_k must be "
                f"at least 2, got {top_k}"
            )

    @property
    def rule(self) -> WeightRule:
        """The weights of a token sum to 1."""
        return "one" if self.weights == "one" else "sum"

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expert 0, then by falling logit."""
        tokens = wide(x)
        mixture = torch.softmax(nn.functional.linear(tokens, wide(self.mixture).to(tokens.dtype)), dim=-1)  # [T, 2]
        chances = torch.softmax(nn.functional.linear(tokens, wide(self.weight).to(tokens.dtype)), dim=-1)
        chances, ids = torch.topk(chances, self.top_k - 1, dim=-1)
        chosen = mixture[:, :1] * straighten(chances, ids, "sum", keep_gradient=self.training)
        return torch.cat([mixture[:, 1:], chosen], dim=-1), torch.cat([torch.zeros_like(ids[:, :1]), ids + 1], dim=-1)
