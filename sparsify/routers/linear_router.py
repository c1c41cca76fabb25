"""Routers whose logits are one linear map of the token. T tokens, D hidden_size, E num_experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.routers.base import Router, wide

_INIT_STD = 0.02  # of sparse upcycling (arXiv 2212.05055)
_RIDGE = 1e-3


class LinearRouter(Router):
    """`logits` are `x W^T`, fp32, W `[E, D]` of small random numbers until it is fitted or trained.

    `options` go to the next class of a router that has another base, such as `TokenChoiceRouter`.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        self.weight = nn.Parameter(torch.randn(num_experts, hidden_size) * _INIT_STD)

    def logits(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, E]`, fp32."""
        return nn.functional.linear(wide(x), wide(self.weight).to(wide(x).dtype))

    @torch.no_grad()
    def fit(self, x: Tensor, scores: Tensor) -> None:
        """Start from a ridge regression of `scores` `[T, E]`, standardised, on tokens `x` `[T, D]`.

        The part of the scores that is the same for all tokens is left out, as the router has no bias.
        """
        tokens, targets = x.double(), scores.double()
        targets = (targets - targets.mean(0)) / targets.std(0, correction=0).mean().clamp(min=1e-12)
        centred = tokens - tokens.mean(0)
        gram = centred.t() @ centred
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp(min=1e-12))
        self.weight.copy_(torch.linalg.solve(gram, centred.t() @ targets).t())
