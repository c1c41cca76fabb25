"""Routers, one family a file, all with the contract of `Router`; `catalogue.py` lists them."""

from __future__ import annotations

from sparsify.routers.base import Reads, Router, System, UnitRouter, WeightRule
from sparsify.routers.catalogue import ROUTERS, describe_routers, make_router, router_class
from sparsify.routers.group_routers import GroupRouter
from sparsify.routers.id_routers import IdRouter, LabelRouter
from sparsify.routers.linear_router import LinearRouter
from sparsify.routers.merging_routers import MergingRouter
from sparsify.routers.mlp_router import MLPRouter
from sparsify.routers.policy_routers import PolicyRouter
from sparsify.routers.token_choice import TokenChoiceRouter
from sparsify.routers.top_k_router import TopKRouter

__all__ = [
    "ROUTERS",
    "GroupRouter",
    "IdRouter",
    "LabelRouter",
    "LinearRouter",
    "MLPRouter",
    "MergingRouter",
    "PolicyRouter",
    "Reads",
    "Router",
    "System",
    "TokenChoiceRouter",
    "TopKRouter",
    "UnitRouter",
    "WeightRule",
    "describe_routers",
    "make_router",
    "router_class",
]
