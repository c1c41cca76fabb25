"""The common path of token-choice routers, shown by its families: capacity, losses, rules, refusals, options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sparsify.routers import ROUTERS, TokenChoiceRouter, make_router

FAMILIES = [router.system.name for router in ROUTERS if issubclass(router, TokenChoiceRouter)]
SIZES = [(1, 1), (5, 1), (7, 2), (4, 4)]  # E, K


def make(name: str, num_experts: int = 8, top_k: int | None = None, **options: Any) -> TokenChoiceRouter:
    """A router of larger weights than at its start, so that its scores differ."""
    (made,) = (router for router in ROUTERS if router.system.name == name)
    router = make_router(name, 16, num_experts, top_k or made.default_top_k, options, seed=0)
    assert isinstance(router, TokenChoiceRouter)
    for parameter in router.parameters():
        parameter.data *= 20 if parameter.dim() == 2 else 1
    return router


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_awkward_shapes(name: str, num_tokens: int, num_experts: int, top_k: int) -> None:
    """Protects: no token, one, primes, K = 1 and K = E: shapes, distinct experts, finite losses and gradients."""
    only = {"switch": 1, "limoe": 1, "speech-moe": 1, "gshard": 2, "st-moe": 2}.get(name, top_k)
    if top_k != only or (name == "m6-t" and num_experts % top_k):
        pytest.skip("refused, see test_refusals")
    router = make(name, num_experts, top_k)
    x = torch.randn(num_tokens, 16)
    for training in (True, False):
        weights, ids = router.train(training)(x)
        assert weights.shape == ids.shape == (num_tokens, router.num_slots)
        assert all(len(set(row) - {-1}) == len([e for e in row if e >= 0]) for row in ids.tolist())
        assert weights[ids < 0].eq(0).all()
        loss = router.aux_loss()
        assert loss.isfinite()
        assert loss.requires_grad == (training and bool(router.coefficients))
        (weights.sum() + loss).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in router.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_inference_repeats(name: str) -> None:
    """Protects: noise and random choices are for training; at inference the same tokens take the same routes."""
    router, x = make(name, eval_capacity_factor=0.5, overflow="random").eval(), torch.randn(13, 16)
    before = torch.get_rng_state()
    first, second = router(x), router(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(before, torch.get_rng_state())
    assert router.losses == {}


@pytest.mark.parametrize("name", FAMILIES)
def test_capacity_in_training_and_at_inference(name: str) -> None:
    """Protects: two factors, each in its mode; a dropped slot has id -1 and weight 0; no expert exceeds C."""
    router, x = make(name, capacity_factor=0.5, eval_capacity_factor=1.0), torch.randn(24, 16)
    for training, factor in ((True, 0.5), (False, 1.0)):
        weights, ids = router.train(training)(x)
        slots = math.ceil(24 * ids.shape[1] * factor / 8)
        assert torch.bincount(ids[ids >= 0], minlength=8).max() <= slots
        assert weights[ids < 0].eq(0).all()
    assert not router.batch_invariant
    assert not router.causal


@pytest.mark.parametrize("name", FAMILIES)
def test_dropless_by_default_at_inference(name: str) -> None:
    """Protects: by default each token takes its route whoever else is in the batch, and whatever comes after it."""
    router, x = make(name).eval(), torch.randn(13, 16)
    assert router.batch_invariant
    assert router.causal
    weights, ids = router(x)
    for token in range(13):
        alone = router(x[token : token + 1])
        assert torch.equal(alone[1][0], ids[token])
        torch.testing.assert_close(alone[0][0], weights[token], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rule_is_true(name: str) -> None:
    """Protects: where the catalogue says that weights sum to 1, they do; `weights` makes any family do so."""
    router, x = make(name).eval(), torch.randn(13, 16)
    sums = router(x)[0].sum(-1)
    assert (router.rule == "sum") == torch.allclose(sums, torch.ones(13), atol=1e-5)
    router.weights = "sum"
    assert router.rule == "sum"
    torch.testing.assert_close(router(x)[0].sum(-1), torch.ones(13), rtol=1e-5, atol=1e-6)
    router.weights = "one"
    assert router.rule == "one"
    assert router(x)[0].eq(1).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_reach_the_router(name: str) -> None:
    """Protects: `aux_loss` is the sum of losses times coefficients, and its gradient moves the logits."""
    router = make(name)
    router(torch.randn(24, 16))
    assert set(router.losses) == set(router.coefficients)
    expected = sum(router.coefficients[key] * loss.item() for key, loss in router.losses.items())
    assert router.aux_loss().item() == pytest.approx(expected, rel=1e-5, abs=1e-12)
    if router.losses:
        router.aux_loss().backward()
        gradients = [p.grad.abs().max() for p in router.parameters() if p.grad is not None]
        assert max(gradients) > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_tokens_are_routed_in_fp32(name: str) -> None:
    """Protects: claim 9: logits are computed from wide tokens and weights, not rounded after the product."""
    router, x = make(name).eval(), torch.randn(64, 16).bfloat16()
    assert router.logits(x).dtype == torch.float32
    weights, ids = router(x)
    assert weights.dtype == torch.bfloat16
    assert torch.equal(ids, router(x.float())[1])


def test_logits_close_together_stay_apart() -> None:
    """Protects: claim 9: beside ten logits of 128 one of 128.5 has the probability 0.142, not bf16's 0.091."""
    router = make("switch", num_experts=11).eval()
    router.weight.data = torch.full((11, 16), 8.0)
    router.weight.data[3, 0] = 8.5
    x = torch.zeros(1, 16)
    x[0, 0], x[0, 1] = 1.0, 15.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, ids = router(x)
    assert ids.item() == 3
    assert weights.item() == pytest.approx(0.1415, abs=1e-4)  # e^0.5 / (e^0.5 + 10)


@pytest.mark.parametrize(
    ("name", "top_k", "options", "message"),
    [
        ("switch", 2, {}, "'switch' sends every token to one expert, got top_k=2; give top_k=1"),
        ("limoe", 3, {}, "'limoe' sends every token to one expert"),
        ("gshard", 1, {}, "policies for a second expert, got top_k=1; give top_k=2, or choose 'switch'"),
        ("st-moe", 3, {}, "'st-moe' has policies for a second expert"),
        ("m6-t", 3, {}, "8 routed experts do not fall into top_k=3 groups"),
        ("top-k", 9, {}, "between 1 and the 8 routed experts, got 9"),
        ("top-k", 2, {"capacity_factor": 0.0}, "leaves no expert a slot"),
        ("v-moe", 2, {"eval_capacity_factor": -1.0}, "leaves no expert a slot"),
        ("top-k", 2, {"overflow": "last"}, "overflow must be one of"),
        ("switch", 1, {"jitter": 1.0}, "jitter must be from 0 to below 1, got 1.0"),
        ("gshard", 2, {"second": "maybe"}, "second must be one of all, none"),
        ("gshard", 2, {"threshold": 0.0}, "threshold is compared with a weight"),
        ("gshard", 2, {"normalise": "never"}, "normalise must be 'before' or 'after'"),
        ("deepseek-moe", 2, {"num_devices": 3}, "num_devices must divide the 8 routed experts, got 3"),
        ("deepseek-v3", 2, {"num_groups": 3}, "num_groups must divide the 8 routed experts"),
        ("deepseek-v3", 3, {"num_groups": 4}, "leave 2 experts to choose from, fewer than top_k=3; raise top_groups"),
        ("deepseek-v3", 2, {"routed_scaling": 0.0}, "routed_scaling be above 0"),
        ("dts", 1, {"anneal_steps": 0}, "anneal_steps must be at least 1"),
        ("dts", 1, {"last_temperature": 3.0}, "temperatures must fall"),
        ("dts", 1, {"threshold": 1.0}, "threshold is compared with a probability"),
        ("x-moe", 2, {"projected_size": 0}, "projected_size must be at least 1"),
        ("limoe", 1, {"soft_minimum": 9}, "soft_minimum between 1 and the 8 routed experts"),
        ("noisy-top-k", 2, {"capacity": 1.0}, "do not fit the router 'noisy-top-k'.*capacity"),
    ],
)
def test_refusals(name: str, top_k: int, options: dict[str, Any], message: str) -> None:
    """Protects: what cannot work is refused at once, with what to change."""
    with pytest.raises(ValueError, match=message):
        make(name, 8, top_k, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_options_hold_those_of_every_base(name: str) -> None:
    """Protects: a saved router is rebuilt with its capacity."""
    router = make(name, eval_capacity_factor=1.5, capacity_factor=0.75, overflow="choice", capacity_rule="v-moe")
    again = type(router)(**router.options())
    assert again.options() == router.options()
    assert again.eval_capacity_factor == 1.5
    assert again.capacity_rule == "v-moe"


def test_gradients_pass_what_is_kept() -> None:
    """Protects: a dropped slot gives its expert's weight no gradient; a kept one does."""
    router = make("switch", capacity_factor=0.5)
    weights, ids = router(torch.randn(24, 16))
    assert (ids < 0).any()
    parameters = list(router.parameters())
    (dropped,) = torch.autograd.grad(weights[ids < 0].sum(), parameters, retain_graph=True)
    (kept,) = torch.autograd.grad(weights[ids >= 0].sum(), parameters)
    assert dropped.eq(0).all()
    assert kept.ne(0).any()
