"""Every router that `sparsify(model, router=name)` can take. To add one, write its file and add its class here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparsify.routers.base import Router
from sparsify.routers.base_router import BaseRouter
from sparsify.routers.deepseek_moe_router import DeepSeekMoERouter
from sparsify.routers.deepseek_v3_router import DeepSeekV3Router
from sparsify.routers.dselect_k_router import DSelectKRouter
from sparsify.routers.dts_router import DTSRouter
from sparsify.routers.expert_choice_router import ExpertChoiceRouter
from sparsify.routers.fixed_router import FixedRouter
from sparsify.routers.gshard_router import GShardRouter
from sparsify.routers.hash_router import HashRouter
from sparsify.routers.label_routers import DEMixRouter, MMoERouter, TaskMoERouter
from sparsify.routers.limoe_router import LIMoERouter
from sparsify.routers.m6_t_router import M6TRouter
from sparsify.routers.merging_routers import LoryRouter, SmearRouter
from sparsify.routers.mixture_of_depths_router import MixtureOfDepthsRouter
from sparsify.routers.mlp_router import MLPRouter
from sparsify.routers.noisy_top_k_router import NoisyTopKRouter
from sparsify.routers.peer_router import PeerRouter
from sparsify.routers.policy_routers import RLRouter, RoutingNetworkRouter
from sparsify.routers.pr_moe_router import PRMoERouter
from sparsify.routers.remoe_router import ReMoERouter
from sparsify.routers.s_base_router import SBaseRouter
from sparsify.routers.soft_moe_router import SoftMoERouter
from sparsify.routers.speech_moe_router import SpeechMoERouter
from sparsify.routers.st_moe_router import STMoERouter
from sparsify.routers.switch_router import SwitchRouter
from sparsify.routers.thor_router import ThorHashRouter, ThorRouter
from sparsify.routers.top_k_router import TopKRouter
from sparsify.routers.top_p_router import TopPRouter
from sparsify.routers.v_moe_router import VMoERouter
from sparsify.routers.x_moe_router import XMoERouter

ROUTERS: tuple[type[Router], ...] = (
    MLPRouter,
    TopKRouter,
    PRMoERouter,
    BaseRouter,
    SBaseRouter,
    RLRouter,
    RoutingNetworkRouter,
    ThorRouter,
    ThorHashRouter,
    HashRouter,
    DEMixRouter,
    TaskMoERouter,
    MMoERouter,
    FixedRouter,
    DSelectKRouter,
    ReMoERouter,
    TopPRouter,
    ExpertChoiceRouter,
    MixtureOfDepthsRouter,
    SoftMoERouter,
    SmearRouter,
    LoryRouter,
    PeerRouter,
    NoisyTopKRouter,
    SwitchRouter,
    GShardRouter,
    STMoERouter,
    VMoERouter,
    M6TRouter,
    DTSRouter,
    XMoERouter,
    LIMoERouter,
    SpeechMoERouter,
    DeepSeekMoERouter,
    DeepSeekV3Router,
)


def router_class(name: str) -> type[Router]:
    """The class of the router that the catalogue calls `name`.

    Raises:
        ValueError: no router has that name.
    """
    for router in ROUTERS:
        if router.system.name == name:
            return router
    names = ", ".join(router.system.name for router in ROUTERS)
    raise ValueError(f"router must be one of {names}, got {name!r}; `sparsify routers` describes them")


def make_router(
    name: str, hidden_size: int, num_experts: int, top_k: int, options: Mapping[str, Any], seed: int
) -> Router:
    """Construct a router; the same seed gives the same weights.

    Args:
        name: of the catalogue.
        hidden_size: D.
        num_experts: routed experts.
        top_k: of them, for a token.
        options: further arguments of its constructor.
        seed: of its initial weights.

    Raises:
        ValueError: no router has that name, it has no such option, or the numbers do not fit it.
    """
    made = router_class(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return made(hidden_size, num_experts, top_k, **options)
        except TypeError as error:
            raise ValueError(f"router_options do not fit the router {name!r}: {error}") from error


def describe_routers() -> list[dict[str, Any]]:
    """One plain dict per router of the catalogue, with its default options."""
    return [_describe(router) for router in ROUTERS]


def _describe(router: type[Router]) -> dict[str, Any]:
    system = router.system
    example = make_router(system.name, 8, router.default_num_experts, router.default_top_k, {}, seed=0)
    return {
        "name": system.name,
        "paper": system.paper,
        "mechanism": system.mechanism,
        "causal": example.causal,
        "batch_invariant": example.batch_invariant,
        "exact_at_init": example.start_sum is not None,
        "export_form": system.export_form,
        "needs": list(system.needs),
    }
