"""Product keys (PEER, arXiv 2407.04153; Lample et al., arXiv 1907.05242): choose among n^2 experts with 2 n keys.

    q = LayerNorm halves of x W_q  [H, 2, d],   s_1 = q_1 keys_1^T,   s_2 = q_2 keys_2^T          [n] each
    expert (i, j) scores s_1[i] + s_2[j];  its K best are among the K best rows times the K best columns

T tokens, E = n^2 num_experts, K experts of a head, H heads. Experts of one neuron, as in the paper, are
`start="split", num_experts=` the number of neurons.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparsify.routers.base import Router, System, WeightRule, wide

_INIT_STD = 0.02


class PeerRouter(Router):
    """K slots for each head, weighted by the softmax over the K scores.

    Weights are divided by the number of heads, so that they sum to 1; two heads may choose the same expert. Queries are
    normalised by themselves, not over the batch as in the paper, so that a token is routed the same in any batch.
    """

    system = System(
        name="peer",
        paper="Mixture of A Million Experts (PEER, arXiv 2407.04153)",
        mechanism="the K best of n^2 product keys for each head, weighted by their softmax; built for tiny experts",
        export_form="top-k",
    )

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, heads: int = 8, key_size: int = 64) -> None:
        """Draw keys and queries.

        Args:
            num_experts: E, a square.
            top_k: K, at most n = sqrt(E).
            heads: H.
            key_size: d, of one half.
        """
        self.heads = heads
        super().__init__(hidden_size, num_experts, top_k)
        if heads < 1 or key_size < 1:
            raise ValueError(f"heads and key_size must be at least 1, got {heads} and {key_size}")
        self.key_size = key_size
        self.query = nn.Parameter(torch.randn(heads * 2 * key_size, hidden_size) * _INIT_STD)
        self.keys = nn.Parameter(torch.randn(2, heads, self.side, key_size) / key_size**0.5)

    @property
    def side(self) -> int:
        """N."""
        return math.isqrt(self.num_experts)

    def check_top_k(self, top_k: int) -> None:
        """E is a square, and every half offers K keys."""
        super().check_top_k(top_k)
        if self.side**2 != self.num_experts:
            near = (self.side**2, (self.side + 1) ** 2)
            raise ValueError(
                f"product keys need a square number of routed experts, such as {near[0]} or {near[1]}, "
                f"got {self.num_experts}"
            )
        if top_k > self.side:
            raise ValueError(f"product keys offer {self.side} keys a half, so top_k must be at most that, got {top_k}")

    @property
    def num_slots(self) -> int:
        """K for each head."""
        return self.heads * self.top_k

    @property
    def rule(self) -> WeightRule:
        """The weights of a token sum to 1."""
        return "one" if self.weights == "one" else "sum"

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Head after head, each by falling score."""
        tokens = wide(x)
        query = nn.functional.linear(tokens, wide(self.query).to(tokens.dtype))
        query = nn.functional.layer_norm(query.view(-1, self.heads, 2, self.key_size), (self.key_size,))
        scores = torch.einsum("thpd,phnd->pthn", query, wide(self.keys).to(tokens.dtype))  # [2, T, H, n]
        best, places = torch.topk(scores, self.top_k, dim=-1)
        sums = (best[0].unsqueeze(-1) + best[1].unsqueeze(-2)).flatten(-2)  # [T, H, K*K]
        experts = (places[0].unsqueeze(-1) * self.side + places[1].unsqueeze(-2)).flatten(-2)
        best, chosen = torch.topk(sums, self.top_k, dim=-1)
        weights = torch.softmax(best, dim=-1) / self.heads
        return weights.flatten(1), experts.gather(-1, chosen).flatten(1)
