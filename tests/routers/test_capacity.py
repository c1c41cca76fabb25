"""Capacity against plain loops, the published rules, and the analytic drop curve."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from sparsify.routers.capacity import CapacityRule, Overflow, capacity, check_capacity, within_capacity

SIZES = [(0, 4, 2), (1, 1, 1), (1, 5, 2), (13, 5, 1), (31, 8, 3), (16, 4, 4)]  # T, E, K
ORDERS = [overflow for overflow in get_args(Overflow) if overflow != "random"]


def example(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Skewed scores `[T, E]`, and the K largest of each token."""
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    scores = (logits + torch.linspace(1, 0, experts, dtype=torch.float64)).softmax(-1)
    weights, ids = scores.topk(top_k)
    return ids, weights, scores


def pairs_in_order(ids: Tensor, weights: Tensor, scores: Tensor, overflow: str) -> list[tuple[int, int]]:
    """The published orders, in plain words."""
    tokens, slots = range(ids.shape[0]), range(ids.shape[1])
    if overflow == "token":
        return [(t, k) for t in tokens for k in slots]
    if overflow == "choice":
        return [(t, k) for k in slots for t in tokens]
    if overflow == "priority":
        by_priority = sorted(tokens, key=lambda t: -max(scores[t].tolist()))
        return [(t, k) for k in slots for t in by_priority]
    return sorted([(t, k) for t in tokens for k in slots], key=lambda pair: -weights[pair].item())


@pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES)
@pytest.mark.parametrize("overflow", ORDERS)
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_first_served_is_kept(tokens: int, experts: int, top_k: int, overflow: Overflow, factor: float) -> None:
    """Protects: who keeps a slot in every order, with unused slots taking none."""
    ids, weights, scores = example(tokens, experts, top_k)
    if top_k > 1:
        ids[::3, -1] = -1
    slots = capacity(tokens, experts, top_k, factor)
    kept = within_capacity(ids, weights, scores, slots, overflow)
    taken = [0] * experts
    expected = torch.zeros(tokens, top_k, dtype=torch.bool)
    for t, k in pairs_in_order(ids, weights, scores, overflow):
        expert = int(ids[t, k])
        if expert >= 0:
            expected[t, k] = taken[expert] < int(slots)
            taken[expert] += 1
    assert torch.equal(kept, expected)


def test_gshard_puts_second_choices_behind_all_first_ones() -> None:
    """Protects: a later first choice evicts an earlier second one, which filling token by token does not let happen."""
    ids = torch.tensor([[0, 1], [1, 0], [1, 2]])
    scores = torch.zeros(3, 3)
    kept = {o: within_capacity(ids, torch.ones(3, 2), scores, torch.tensor(2), o) for o in ("choice", "token")}
    assert kept["choice"].tolist() == [[True, False], [True, True], [True, True]]
    assert kept["token"].tolist() == [[True, True], [True, True], [False, True]]


@pytest.mark.parametrize("tokens", [1, 7, 64, 251])
@pytest.mark.parametrize("factor", [0.75, 1.0, 1.25, 2.0])
def test_rules(tokens: int, factor: float) -> None:
    """Protects: the number of slots of each implementation, K counted or not, rounded up or down."""
    experts, top_k = 8, 2
    per_expert, counted = tokens * factor / experts, tokens * factor * top_k / experts
    expected: dict[CapacityRule, int] = {
        "switch": math.ceil(counted),
        "mesh": min(tokens, math.floor(per_expert)),
        "lingvo": math.ceil(math.floor(per_expert) / 4) * 4,
        "deepspeed": max(4, math.ceil(counted)),
        "v-moe": math.ceil(math.ceil(counted) / 4) * 4,
        "st-moe-pytorch": max(4, min(tokens, int(per_expert))),
    }
    for rule, slots in expected.items():
        if slots:
            assert capacity(tokens, experts, top_k, factor, rule).item() == slots
        else:
            with pytest.raises(ValueError, match=f"'{rule}' rounds .* down to no slot; use capacity_rule='switch'"):
                capacity(tokens, experts, top_k, factor, rule)
    assert set(expected) == set(get_args(CapacityRule))


def test_factors_are_decimal() -> None:
    """Protects: `ceil(1.1 * 10)` is 11, which floating point makes 12."""
    assert capacity(10, 1, 1, 1.1).item() == 11
    assert [capacity(t, 3, 1, 1.0).item() for t in (0, 1, 3, 4)] == [0, 1, 1, 2]


def analytic_drop(tokens: int, experts: int, top_k: int, factor: float) -> float:
    """`E / (K T) sum_{x > C} (x - C) Binom(x; T, K / E)`."""
    q, slots = top_k / experts, math.ceil(factor * top_k * tokens / experts)
    excess = sum((x - slots) * math.comb(tokens, x) * q**x * (1 - q) ** (tokens - x) for x in range(slots, tokens + 1))
    return experts / (top_k * tokens) * excess


@pytest.mark.parametrize(
    ("tokens", "top_k", "factor", "share"),
    [(64, 1, 0.75, 0.2880), (64, 1, 1.0, 0.1305), (64, 1, 1.25, 0.0453), (64, 2, 1.0, 0.0859), (256, 2, 1.0, 0.0431)],
)
@pytest.mark.parametrize("overflow", ["token", "choice"])
def test_drop_curve(tokens: int, top_k: int, factor: float, share: float, overflow: Overflow) -> None:
    """Protects: claim 6: the dropped share of uniform choices is the analytic one, within four standard errors."""
    assert analytic_drop(tokens, 8, top_k, factor) == pytest.approx(share, abs=5e-5)
    torch.manual_seed(0)
    slots, dropped = capacity(tokens, 8, top_k, factor), []
    for _ in range(300):
        scores = torch.rand(tokens, 8)
        weights, ids = scores.topk(top_k)
        kept = within_capacity(ids, weights, scores, slots, overflow)
        dropped.append(1 - kept.float().mean().item())
    found = torch.tensor(dropped)
    assert abs(found.mean().item() - share) < 4 * found.std().item() / math.sqrt(len(dropped))


@pytest.mark.parametrize("overflow", get_args(Overflow))
def test_bounds_of_drops(overflow: Overflow) -> None:
    """Protects: drops never rise with the factor, meet the pigeonhole bound, and end where C reaches T."""
    ids, weights, scores = example(31, 8, 3)
    shares = []
    for factor in (0.25, 0.5, 1.0, 1.5, 8 / 3):
        slots = capacity(31, 8, 3, factor)
        shares.append(1 - within_capacity(ids, weights, scores, slots, overflow).double().mean().item())
        assert shares[-1] >= 1 - 8 * int(slots) / (3 * 31) - 1e-12
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0
    assert int(slots) >= 31
    assert shares[-1] == 0


@pytest.mark.parametrize("factor", [0.25, 0.5, 0.75])
def test_priority_keeps_more_mass(factor: float) -> None:
    """Protects: claim 16: for CF < 1 batch prioritised routing keeps at least the mass that first-come keeps."""
    for seed in range(20):
        torch.manual_seed(seed)
        scores = torch.randn(64, 8).softmax(-1)
        weights, ids = scores.topk(1)
        slots = capacity(64, 8, 1, factor)
        mass = {
            o: (weights * within_capacity(ids, weights, scores, slots, o)).sum().item() for o in ("priority", "token")
        }
        assert mass["priority"] >= mass["token"]


def test_random_priority_is_uniform() -> None:
    """Protects: every token is as likely to be kept, and the seed fixes who is."""
    ids, scores = torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1)

    def draw() -> Tensor:
        return within_capacity(ids, torch.ones(6, 1), scores, torch.tensor(2), "random").flatten()

    torch.manual_seed(0)
    kept = torch.stack([draw() for _ in range(1500)])
    assert kept.sum(1).eq(2).all()
    spread = math.sqrt(1500 * (1 / 3) * (2 / 3))
    assert (kept.sum(0) - 500).abs().max() < 4 * spread
    torch.manual_seed(0)
    assert torch.equal(draw(), kept[0])


def test_token_order_is_causal_at_fixed_capacity() -> None:
    """Protects: filled token by token, no later token changes what an earlier one keeps; in GShard's order some do."""
    changed: dict[Overflow, int] = {"token": 0, "choice": 0}
    for seed in range(50):
        torch.manual_seed(seed)
        scores = torch.rand(16, 4)
        other = torch.cat([scores[:-1], torch.rand(1, 4)])
        for overflow in changed:
            kept = [
                within_capacity(s.topk(2).indices, s.topk(2).values, s, torch.tensor(8), overflow)[:-1]
                for s in (scores, other)
            ]
            changed[overflow] += not torch.equal(*kept)
    assert changed["token"] == 0
    assert changed["choice"] > 0


@pytest.mark.parametrize(
    ("factor", "overflow", "rule", "message"),
    [
        (0.0, "token", "switch", "leaves no expert a slot; give a number above 0"),
        (-1.0, "token", "switch", "leaves no expert a slot"),
        (float("inf"), "token", "switch", "leaves no expert a slot; .* or None to drop nothing"),
        (1.0, "first", "switch", "overflow must be one of token, choice, priority, random, probability, got 'first'"),
        (1.0, "token", "floor", "capacity_rule must be one of switch, mesh"),
    ],
)
def test_refusals(factor: float, overflow: str, rule: str, message: str) -> None:
    """Protects: what cannot work is refused where it is given."""
    with pytest.raises(ValueError, match=message):
        check_capacity(factor, overflow, rule)
