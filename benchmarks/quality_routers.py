"""Other routers and other things for them to learn, to compare with ours: each takes the place of `fit_router`.

The split, the refit and the number of experts that run are those of "ours, closed form", without block-wise training.
T tokens, D hidden_size, R routed experts, K of them that run, d_e `[T, D_out]` what expert e adds to the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify import SparsifyConfig
from sparsify.passes.split.choice_loss import choose
from sparsify.passes.split.experts import Experts
from sparsify.passes.split.split_ffn import SplitResult, split_ffn
from sparsify.passes.split.statistics import chunks
from sparsify.passes.split.train_router import expert_norms, learn_logits, train_router
from sparsify.routers import UnitRouter

_RIDGE = 1e-3

FitRouter = Callable[[Experts, Tensor, SparsifyConfig, Tensor | None], UnitRouter]


def routed_by(fit: FitRouter) -> Callable[..., SplitResult]:
    """Our split, behind another router."""

    def split(*args: Any, **kwargs: Any) -> SplitResult:
        with mock.patch("sparsify.passes.split.split_ffn.fit_router", fit):
            return split_ffn(*args, **kwargs)

    return split


def linear(experts: Experts, x: Tensor, config: SparsifyConfig, ids: Tensor | None = None) -> UnitRouter:
    """Ridge regression of the norms |d_e|, in closed form."""
    weight, bias = _ridge(x, expert_norms(experts, x))
    return ProductRouter(weight, None, bias, config.top_k - config.shared)


def low_rank(experts: Experts, x: Tensor, config: SparsifyConfig, ids: Tensor | None = None) -> UnitRouter:
    """The same, of half the rank that our router is wide: the largest directions of what the regression predicts."""
    weight, bias = _ridge(x, expert_norms(experts, x))  # [D, R]
    rank = max(1, config.router_hidden_size // 2)
    directions = torch.linalg.svd((x - x.mean(0)) @ weight, full_matrices=False).Vh[:rank]
    return ProductRouter(weight @ directions.t(), directions, bias, config.top_k - config.shared)


def by_gain(experts: Experts, x: Tensor, config: SparsifyConfig, ids: Tensor | None = None) -> UnitRouter:
    """Our perceptron, on the part of the squared error that an expert alone takes away, 2 <sum d, d_e> - |d_e|^2."""
    oracle = GreedyRouter(experts, config.top_k - config.shared)
    products = torch.cat([oracle.products(part) for part in chunks(x)])
    gains = 2 * products.sum(2) - products.diagonal(dim1=1, dim2=2)
    return train_router(x, gains, config.top_k - config.shared, config.router_hidden_size, config.seed).eval()


def by_sets(experts: Experts, x: Tensor, config: SparsifyConfig, ids: Tensor | None = None) -> UnitRouter:
    """Our perceptron, on whether an expert is one of the K that lower the error most, found greedily."""
    top_k = config.top_k - config.shared
    chosen = choose(GreedyRouter(experts, top_k).logits(x), top_k)
    loss = functional.binary_cross_entropy_with_logits
    return learn_logits(x, chosen, top_k, config.router_hidden_size, config.seed, loss).eval()


class GreedyRouter(UnitRouter):
    """Adds the expert that lowers the squared error of the folded split most, K times."""

    def __init__(self, experts: Experts, top_k: int) -> None:
        super().__init__(experts.projections[0].shape[2], experts.num_routed, top_k)
        self._experts = experts

    def logits(self, x: Tensor) -> Tensor:
        """`[T, R]`: K for what is added first, and so on; 0 for what is not."""
        products = torch.cat([self.products(part) for part in x.split(256)])  # [T, R, R], <d_e, d_f>
        squares = products.diagonal(dim1=1, dim2=2)
        inner, ranks = products.sum(2), torch.zeros_like(squares)  # <d_e, what is left>
        for rank in range(self.top_k, 0, -1):
            gains = (2 * inner - squares).masked_fill(ranks > 0, -torch.inf)
            best = gains.argmax(1, keepdim=True)  # [T, 1]
            ranks.scatter_(1, best, float(rank))
            inner = inner - products.gather(2, best.unsqueeze(1).expand(-1, self.num_experts, 1)).squeeze(2)
        return ranks

    def products(self, x: Tensor) -> Tensor:
        """`[T, R, R]`: <d_e, d_f>."""
        hidden = self._experts.hidden(x)  # [T, R, m]
        added = torch.einsum("trm,rom->tro", hidden, self._experts.down)
        added = added if self._experts.expert_bias is None else added + self._experts.expert_bias
        return added @ added.transpose(1, 2)


class ProductRouter(UnitRouter):
    """Logits are `x first second + bias`; without `second`, `x first + bias`."""

    def __init__(self, first: Tensor, second: Tensor | None, bias: Tensor, top_k: int) -> None:
        super().__init__(len(first), len(bias), top_k)
        self.first, self.bias = nn.Parameter(first.contiguous(), False), nn.Parameter(bias, False)
        self.second = None if second is None else nn.Parameter(second.contiguous(), False)

    def logits(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, R]`."""
        scores = x.to(self.first.dtype) @ self.first
        return self.bias + (scores if self.second is None else scores @ self.second)


def _ridge(x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """`[D, R]` and `[R]`."""
    tokens, centre, middle = x.double(), x.double().mean(0), scores.double().mean(0)
    gram = (tokens - centre).t() @ (tokens - centre)
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp(min=1e-12))
    weight = torch.linalg.solve(gram, (tokens - centre).t() @ (scores.double() - middle))
    return weight.to(x.dtype), (middle - centre @ weight).to(x.dtype)

