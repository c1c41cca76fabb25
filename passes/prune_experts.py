"""SparseModel -> the same with the most used experts of every FFN alone.

A token whose experts are all kept has the same route as before; the others go to the best of those that are left. E
experts, K top_k.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.passes.specialise import keep_experts, rewire
from sparsify.routers import Router, UnitRouter

if TYPE_CHECKING:
    from sparsify.routing_stats import RoutingStats
    from sparsify.sparse_model import SparseModel


def prune_experts(sparse: SparseModel, keep: int, stats: RoutingStats) -> SparseModel:
    """Keep `keep` routed experts of every FFN.

    Args:
        sparse: left as it is; weights that are not experts are shared with the result.
        keep: at least the K of every router.
        stats: says how much each expert is used.

    Raises:
        ValueError: `keep` does not fit, the experts of an FFN are parts of one sum (a split), or its router cannot do
            with fewer experts. Nothing is changed then.
    """
    from sparsify.sparse_model import SparseModel

    made = SparseModel(sparse, copy.deepcopy(sparse.graph))
    made.info = sparse.info
    for layer in stats.layers:
        router = sparse.routers[layer.name]
        if sparse.info.shards.get(layer.name, 1) > 1:
            raise ValueError(f"{layer.name}: its experts are shards of copies, which belong together, so none can go")
        loads = torch.tensor(layer.tokens_per_expert)
        kept = torch.sort(loads.argsort(descending=True, stable=True)[:keep]).values
        made.set_submodule(f"{layer.name}.router", _pruned(router, kept, keep, layer.name))
        left = keep_experts(made, layer.name, kept.tolist(), router.num_experts)
        rewire(made.graph, f"{layer.name}.router", left)
    made.recompile()
    return made.train(sparse.training)


def _pruned(router: Router, kept: Tensor, keep: int, name: str) -> Router:
    """The router with the rows of the experts `kept`."""
    if isinstance(router, UnitRouter):
        raise ValueError(f"{name}: its experts are parts of one sum, and none of them can go; use set_top_k()")
    if not router.top_k <= keep <= router.num_experts:
        raise ValueError(
            f"{name}: keep between {router.top_k} (its top_k) and {router.num_experts} experts, got {keep}"
        )
    made = type(router)(**{**router.options(), "num_experts": keep})
    state = made.state_dict()
    own = {key: _rows(value, state[key], kept) for key, value in router.state_dict().items()}
    try:
        made.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"{name}: the router {router.system.name!r} cannot do with fewer experts: {error}") from error
    made.weights = router.weights
    for parameter, old in zip(made.parameters(), router.parameters(), strict=True):
        parameter.requires_grad_(old.requires_grad)
    return made.to(kept.device).train(router.training)


def _rows(old: Tensor, new: Tensor, kept: Tensor) -> Tensor:
    return old if old.shape == new.shape else old[kept.to(old.device)]
