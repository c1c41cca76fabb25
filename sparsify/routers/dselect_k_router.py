"""DSelect-k (arXiv 2106.03760): K selectors, each a smooth binary code of the number of an expert.

T tokens, D hidden_size, E num_experts, K selectors, m = ceil(log2 E) digits.

    r_j[e] = product over b of (S(z_jb) if digit b of e is 1, else 1 - S(z_jb)),      z = x W_z + b_z   [K, m]
    weights[e] = sum over j of softmax(a)_j r_j[e],                                    a = x W_a + b_a   [K]

S is the smooth step: 0 up to -gamma/2, 1 from gamma/2 on, a cubic between. Once it saturates, at most K weights are
above 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.routers.base import Router, System, WeightRule, where_used, wide

_EPSILON = 1e-6


class DSelectKRouter(Router):
    """Differentiable selection: dense at first, sparse once the entropy loss has done its work."""

    system = System(
        name="dselect-k",
        paper="DSelect-k: Differentiable Selection in the Mixture of Experts (arXiv 2106.03760)",
        mechanism="K smooth binary codes choose the experts; their mixture is the weight, above 0 for K once trained",
        export_form="mask",
    )

    codes: Tensor

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, gamma: float = 1.0, entropy_coefficient: float = 0.01
    ) -> None:
        """Draw the first digits near one half.

        Args:
            num_experts: E. Where it is no power of two, codes of experts that do not exist lose their weight.
            top_k: K selectors.
            gamma: width of the smooth step.
            entropy_coefficient: of the entropy loss, which the paper tunes for every task.
        """
        super().__init__(hidden_size, num_experts, top_k)
        if gamma <= 0:
            raise ValueError(f"gamma must be above 0, got {gamma}")
        self.gamma = gamma
        self.entropy_coefficient = entropy_coefficient
        digits = max(num_experts - 1, 0).bit_length()
        self.weight = nn.Parameter(torch.empty(top_k * digits, hidden_size).uniform_(-gamma / 100, gamma / 100))
        self.bias = nn.Parameter(torch.empty(top_k * digits).uniform_(-gamma / 100, gamma / 100))
        self.mixture = nn.Linear(hidden_size, top_k)
        codes = [[bool(expert >> digit & 1) for digit in range(digits)] for expert in range(num_experts)]
        self.register_buffer("codes", torch.tensor(codes, dtype=torch.bool).view(num_experts, digits), persistent=False)
        self.coefficients = {"entropy": entropy_coefficient, "reach": entropy_coefficient}

    def check_top_k(self, top_k: int) -> None:
        """The number of selectors has weights of its own, so it stays."""
        super().check_top_k(top_k)
        if top_k != self.top_k:
            raise ValueError(f"the router 'dselect-k' has {self.top_k} selectors, which cannot become {top_k}")

    @property
    def num_slots(self) -> int:
        """E: how many are used differs from token to token."""
        return self.num_experts

    @property
    def rule(self) -> WeightRule:
        """The weights sum to 1 where every code is an expert."""
        whole = self.num_experts & (self.num_experts - 1) == 0
        return "sum" if whole and self.weights == "native" else super().rule

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Slot e is expert e."""
        tokens = wide(x)
        selected = self._selected(tokens)  # [T, K, E]
        mixture = torch.softmax(_linear(tokens, self.mixture.weight, self.mixture.bias), dim=-1)  # [T, K]
        weights = (mixture.unsqueeze(-1) * selected).sum(1)
        if self.training and tokens.shape[0]:
            self.losses["entropy"] = -(selected * torch.log(selected + _EPSILON)).sum() / tokens.shape[0]
            if self.rule != "sum" or self.weights != "native":
                self.losses["reach"] = (1 / selected.sum(-1)).sum() / tokens.shape[0]
        return where_used(weights, weights > 0)

    def _selected(self, tokens: Tensor) -> Tensor:
        digits = self.codes.shape[1]
        z = _linear(tokens, self.weight, self.bias).view(tokens.shape[0], self.top_k, 1, digits) / self.gamma
        z = z.clamp(-0.5, 0.5)
        step = -2 * z**3 + 1.5 * z + 0.5
        return torch.where(self.codes, step, 1 - step).prod(-1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.linear(x, wide(weight).to(x.dtype), wide(bias).to(x.dtype))
