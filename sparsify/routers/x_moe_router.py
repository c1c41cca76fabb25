"""X-MoE: cosine logits in a small space (arXiv 2204.09179)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.routers.base import System, wide
from sparsify.routers.token_choice import TokenChoiceRouter

_LARGEST_SCALE = math.log(100)


class XMoERouter(TokenChoiceRouter):
    """`l_e = cos(P x, m_e) exp(min(t, log 100))`: the length of a token cannot drive its logits.

    P `[projected_size, D]`, m_e of N(0, 0.01), t learned from log(1 / 0.5) on.
    """

    system = System(
        name="x-moe",
        paper="On the Representation Collapse of Sparse Mixture of Experts (arXiv 2204.09179)",
        mechanism="the K largest cosines between a projected token and expert embeddings; weights sum to 1",
        export_form="top-k",
    )
    normalised = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        projected_size: int = 256,
        balance_coefficient: float = 1e-2,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        if projected_size < 1:
            raise ValueError(f"projected_size must be at least 1, got {projected_size}")
        self.projected_size = projected_size
        self.balance_coefficient = balance_coefficient
        self.coefficients = {"balance": balance_coefficient}
        self.projection = nn.Parameter(torch.randn(projected_size, hidden_size) / math.sqrt(hidden_size))
        self.embeddings = nn.Parameter(0.01 * torch.randn(num_experts, projected_size))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.5)))

    def logits(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, E]`, fp32."""
        tokens = wide(x)
        projection, embeddings, scale = (
            wide(parameter).to(tokens.dtype) for parameter in (self.projection, self.embeddings, self.log_scale)
        )
        projected = nn.functional.normalize(nn.functional.linear(tokens, projection), dim=-1)
        cosines = nn.functional.linear(projected, nn.functional.normalize(embeddings, dim=-1))
        return cosines * scale.clamp(max=_LARGEST_SCALE).exp()
