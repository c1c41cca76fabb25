"""The router of a split FFN: made by its name, and fitted to what each expert contributes to a sample of tokens."""

from __future__ import annotations

from torch import Tensor

from sparsify.config import SparsifyConfig
from sparsify.passes.split.experts import Experts
from sparsify.passes.split.train_router import expert_norms, train_router
from sparsify.routers import LinearRouter, Router, make_router


def fit_router(experts: Experts, x: Tensor, config: SparsifyConfig, ids: Tensor | None = None) -> Router:
    """Make the router that `config` names for `experts`.

    Args:
        experts: the split.
        x: `[T, D]`, T > 0.
        config: `router`, its options and `top_k`.
        ids: `[T]`, for a router that reads ids.

    Returns:
        A router in evaluation mode.
    """
    top_k = config.top_k - config.shared
    if config.router_name == "mlp":
        return train_router(x, expert_norms(experts, x), top_k, config.router_hidden_size, config.seed).eval()
    router = make_router(config.router_name, x.shape[1], experts.num_routed, top_k, config.options, config.seed)
    router.weights = "one" if config.exact_start else "native"
    router = router.to(x.device)
    if isinstance(router, LinearRouter):
        router.fit(x, expert_norms(experts, x))
    if ids is not None:
        router.fit_ids(ids)
    return router.eval()
