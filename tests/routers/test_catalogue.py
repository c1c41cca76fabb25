"""The catalogue: every router of it can be made, described and rebuilt."""

from __future__ import annotations

import json

import pytest
import torch

from sparsify.routers import ROUTERS, Router, describe_routers, make_router, router_class

KEYS = {"name", "paper", "mechanism", "causal", "batch_invariant", "exact_at_init", "export_form", "needs"}


def test_names_are_unique() -> None:
    """Protects: a name means one router."""
    names = [router.system.name for router in ROUTERS]
    assert len(set(names)) == len(names)


def test_descriptions_are_plain() -> None:
    """Protects: `sparsify routers --json` prints a list of objects with the documented keys."""
    described = describe_routers()
    assert json.loads(json.dumps(described)) == described
    assert all(set(entry) == KEYS for entry in described)


@pytest.mark.parametrize("made", ROUTERS, ids=lambda router: router.system.name)
def test_options_rebuild_the_router(made: type[Router]) -> None:
    """Protects: saved models load: the options and the state give the same routes."""
    router = make_router(made.system.name, 8, made.default_num_experts, made.default_top_k, {}, seed=0)
    again = made(**router.options())
    again.load_state_dict(router.state_dict())
    assert again.options() == router.options()


@pytest.mark.parametrize("made", ROUTERS, ids=lambda router: router.system.name)
def test_same_seed_same_weights(made: type[Router]) -> None:
    """Protects: determinism, and the caller's random numbers."""
    before = torch.get_rng_state()
    counts = (made.default_num_experts, made.default_top_k)
    first, second = (make_router(made.system.name, 8, *counts, {}, seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_refuses_unknown_names_and_options() -> None:
    """Protects: a typing error is told at once, with what is allowed."""
    with pytest.raises(ValueError, match="router must be one of mlp, top-k"):
        router_class("swich")
    with pytest.raises(ValueError, match=r"do not fit the router .top-k.: .*capacity"):
        make_router("top-k", 8, 4, 2, {"capacity": 1}, seed=0)
